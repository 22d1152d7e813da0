"""The public names: each is found, `import stepwell` is light, and type checkers read the same list."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import stepwell as sw


def test_every_public_name_is_found():
    for name in sw.__all__:
        assert getattr(sw, name) is not None
    assert {"train", "sample", "compare", "solvers", "language", "flow", "conversation", "Process"} <= set(sw.__all__)
    assert sorted(dir(sw)) == sorted([*sw.__all__, "__version__"])


def test_importing_the_package_imports_nothing_heavy():
    script = (
        "import sys, stepwell\n"
        "heavy = {'torch', 'numpy', 'transformers', 'stepwell.rng'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert stepwell.exact.markov and stepwell.environment_return and stepwell.Rng  # imported when asked for\n"
        "assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"stepwell has no 'trian'; it offers .* train"):
        sw.trian  # noqa: B018


def test_type_checkers_read_the_same_list(tmp_path):
    """Only the stub is read, and not what it imports, which takes a minute."""
    stub = Path(sw.__file__).with_suffix(".pyi")
    assert stub.with_name("py.typed").is_file()
    lines = ["import stepwell as sw", *(f"sw.{name}" for name in [*sw.__all__, "__version__", "trian"])]
    (tmp_path / "mine.py").write_text("\n".join(lines) + "\n")
    words = ["--follow-imports=skip", "--no-incremental", str(stub), str(tmp_path / "mine.py")]
    done = subprocess.run([sys.executable, "-m", "mypy", *words], capture_output=True, text=True, cwd=tmp_path)
    errors = [line for line in done.stdout.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert 'Module has no attribute "trian"' in errors[0]
