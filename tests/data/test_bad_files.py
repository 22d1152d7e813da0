"""Files that are no data are refused in one sentence that says where, whatever is wrong with them."""

from __future__ import annotations

import json
import os
import socket

import pytest

from stepwell.data.prompts import load_prompts
from stepwell.errors import InputError
from stepwell.paths import readable, usable

ROW = '{"prompt": "a", "answer": "b"}'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1 is no JSON (it is nested too deeply)"),
        ("a.json", "[" * 100_000, "a.json is no JSON (it is nested too deeply)"),
        ("a.jsonl", ROW + '\n{"prompt": "a", "prompt": "b"}', "line 2 is no JSON ('prompt' stands twice in an object)"),
        ("a.json", '[{"prompt": "a", "x": {"y": 1, "y": 2}}]', "is no JSON ('y' stands twice in an object)"),
        ("a.jsonl", '{"prompt": "a", "answer": ' + "9" * 5000 + "}", "line 1 is no JSON (Exceeds the limit"),
        ("a.jsonl", '{"prompt": NaN}', "row 0 (line 1), column 'prompt' holds a value of type float"),
        ("a.jsonl", ROW.encode("utf-16"), "is not UTF-8 text"),
        ("a.csv", 'prompt\n"a', "is no CSV"),
        ("a.parquet", b"PAR1", "is no parquet file"),
        ("a.parquet", b"", "is no parquet file"),
    ],
)
def test_a_file_that_is_no_data(name, content, said, tmp_path):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as refused:
        load_prompts(path)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "values"),
    [
        ("a.csv", "prompt,answer\n" + "a" * 300_000 + ",b\n", ["a" * 300_000]),
        ("a.jsonl", '{"prompt": "a", "answer": [NaN, Infinity, ' + "9" * 400 + "]}\n", ["a"]),
        ("a.jsonl", b"\xef\xbb\xbf" + ROW.encode(), ["a"]),
        ("a.jsonl", f"{ROW}\r\n\r\n{ROW}\r\n", ["a", "a"]),
        ("a.json", f"[{ROW}]", ["a"]),
        ("a.jsonl", '{"prompt": "a\\u0000b"}', ["a\0b"]),
    ],
)
def test_a_file_that_is_odd_and_right(name, content, values, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert [prompt.value for prompt in load_prompts(path)] == values


def test_parquet_with_columns_of_every_kind(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="an extra")
    from datetime import date, datetime, timedelta
    from decimal import Decimal

    from pyarrow import parquet

    rows = {
        "prompt": ["a", "b"],
        "day": [date(2020, 1, 1), None],
        "time": [datetime(2020, 1, 1), None],
        "span": [timedelta(1), None],
        "exact": [Decimal("1.5"), None],
        "raw": [b"\0\xff", None],
        "nested": [[{"role": "user", "content": None}], None],
    }
    parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    first, second = load_prompts(tmp_path / "a.parquet")
    assert first.columns == {name: values[0] for name, values in rows.items() if name != "prompt"}
    assert set(second.columns.values()) == {None}
    far = pyarrow.array([2**62, 0], type=pyarrow.timestamp("ms"))
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "when": far}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet (cannot be read|is no parquet file)"):
        load_prompts(tmp_path / "b.parquet")
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    parquet.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(InputError, match="two columns named 'prompt'"):
        load_prompts(tmp_path / "c.parquet")


@pytest.mark.parametrize("broken", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, None])
def test_a_folder_of_datasets_that_is_broken(broken, content, tmp_path):
    datasets = pytest.importorskip("datasets", reason="an extra")
    datasets.Dataset.from_list([{"prompt": "a"}]).save_to_disk(tmp_path / "set")
    assert [prompt.value for prompt in load_prompts(tmp_path / "set")] == ["a"]
    (tmp_path / "set" / broken).unlink()
    if content is not None:
        (tmp_path / "set" / broken).write_bytes(content)
    refusal, read = None, []
    try:
        read = [prompt.value for prompt in load_prompts(tmp_path / "set")]
    except InputError as error:
        refusal = str(error)
    # datasets does not need every file
    assert read == ["a"] if refusal is None else f"The folder {tmp_path / 'set'} " in refusal


def special(kind, folder):
    """The path of something that is no file, and its name."""
    path = folder / "special.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_file_is_refused_at_once(kind, tmp_path):
    path = special(kind, tmp_path)
    with pytest.raises(InputError, match=f"must name a file or a folder, got a {kind}"):
        load_prompts(path)
    with pytest.raises(InputError, match=f"got a {kind}"):
        usable(path)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("n" * 300, "cannot be used (File name too long)"),
        ("a/" * 3000, "cannot be used (File name too long)"),
        ("a\0b", "must not hold the character NUL"),
        ("~nobody-of-this-name/a", "begins with the home folder of an unknown user"),
        (3, "must be a path, got 3"),
        ("loop/a", "cannot be used (Too many levels of symbolic links)"),
    ],
)
def test_a_path_that_nothing_can_have(path, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError) as refused:
        usable(path, "--data")
    assert str(refused.value).startswith("--data ")
    assert said in str(refused.value)


def test_a_path_of_a_file_and_of_none(tmp_path):
    (tmp_path / "a").write_text("b")
    assert readable(tmp_path / "a") == tmp_path / "a"
    with pytest.raises(InputError, match="must name a file, got a folder"):
        readable(tmp_path)
    with pytest.raises(InputError, match="there is none at"):
        readable(tmp_path / "b")


ARGUMENTS = [
    "--data",
    "--out",
    "--evaluation",
    "--plugin",
    "--weights",
    "--model",
    "--reward",
    "--teacher",
    "--environment",
]


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("path", ["n" * 300, "~nobody-of-this-name", "pipe"])
def test_a_commands_path_is_refused_by_its_argument(argument, path, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    (tmp_path / "data.jsonl").write_text(ROW)
    words = ["train", "--model", "m", "--data", "data.jsonl", "--reward", "exact_match", argument, path]
    assert refused(*words).startswith(f"stepwell: {argument} ")


def test_the_paths_of_reports_are_refused(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    for words in (("report", "pipe"), ("report", "n" * 300), ("report", ".", "--out", "pipe")):
        assert " must name a file or a folder" in (said := refused(*words)) or "File name too long" in said


@pytest.mark.parametrize(
    "about",
    [
        "[",
        "[]",
        "5",
        '{"card": 3}',
        '{"method": []}',
        '{"settings": 7, "parts": 3}',
        "[" * 100_000,
        '{"card": {"options": 1}}',
    ],
)
@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "reward": 1.0}',
        '{"step": "x", "reward": {"a": 1}}',
        '{"step": null, "reward": 1e999}',
        "[" * 100_000,
    ],
)
def test_a_runs_folder_that_is_odd_is_reported_or_refused(about, line, tmp_path, capsys):
    from stepwell.cli import main

    run = tmp_path / "run"
    run.mkdir()
    for name in ("metrics.jsonl", "clock.jsonl", "completions.jsonl"):
        (run / name).write_text(line + "\n")
    (run / "run.json").write_text(about)
    code = main(["report", str(run), "--out", str(tmp_path / "page.html")])
    said = capsys.readouterr().err
    assert code in (0, 2)
    assert said.count("\n") == (code == 2)
    assert (tmp_path / "page.html").exists() == (code == 0)


def test_a_comparison_that_is_none(tmp_path, refused):
    for content in ("[", "5", '{"version": 1, "entries": 5}', json.dumps({"version": 1, "entries": []}), "[" * 100_000):
        (tmp_path / "comparison.json").write_text(content)
        assert "comparison" in refused("report", str(tmp_path), "--out", str(tmp_path / "page.html"))
