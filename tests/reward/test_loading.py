"""A user's reward is found by its address, or the message says what is wrong with the address or the file."""

import sys

import pytest

from stepwell.errors import InputError
from stepwell.reward.loading import load_reward
from stepwell.reward.verifiers import math_equal

GOOD = """
from neighbour_of_my_reward import SCALE
LOADED = []
def reward(completions):
    return [SCALE] * len(completions)
def loads(completions):
    return LOADED
class Judge:
    def __call__(self, completions):
        return [2.0] * len(completions)
judge = Judge()
table = [1.0]
"""


@pytest.fixture(autouse=True)
def _import_path_restored(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def file(tmp_path):
    (tmp_path / "neighbour_of_my_reward.py").write_text("SCALE = 3.0")
    (tmp_path / "my.py").write_text(GOOD)
    return tmp_path / "my.py"


def test_functions_and_callable_objects_may_import_their_neighbours(file):
    assert load_reward(f"{file}:reward")(completions=["a"]) == [3.0]
    assert load_reward(f"{file}:judge")(completions=["a"]) == [2.0]


def test_an_unchanged_file_runs_once_and_a_changed_one_again(file):
    loads = load_reward(f"{file}:loads")
    assert load_reward(f"{file}:loads") is loads
    file.write_text(GOOD.replace("3.0", "4.0") + "\n\nnew = reward\n")
    assert load_reward(f"{file}:new") is not None


def test_a_module_is_found_on_the_path_and_in_the_working_folder(file, monkeypatch):
    assert load_reward("stepwell.reward.verifiers:math_equal") is math_equal
    (file.parent / "module_beside_me.py").write_text("def reward(completions): return [5.0]")
    monkeypatch.chdir(file.parent)
    assert load_reward("module_beside_me:reward")(completions=["a"]) == [5.0]


@pytest.mark.parametrize("address", ["my.py", ":reward", "my.py:"])
def test_an_address_has_two_parts(address):
    with pytest.raises(InputError, match=r"such as 'my.py:reward'"):
        load_reward(address)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rewrd", "There is no function of .*my.py named 'rewrd'; did you mean 'reward'?"),
        ("xyz", "known: judge, loads, reward\\."),
        ("table", "'table' in .*my.py must be a function, got a value of type list"),
        ("Judge", "'Judge' in .*my.py is a class"),
    ],
)
def test_a_name_that_is_no_function_is_an_error(file, name, said):
    with pytest.raises(InputError, match=said):
        load_reward(f"{file}:{name}")


def test_a_missing_file_names_the_nearest(file):
    with pytest.raises(InputError, match=r"no file '.*mi.py'; did you mean '.*my.py'"):
        load_reward(f"{file.with_name('mi.py')}:reward")
    with pytest.raises(InputError, match="check the path"):
        load_reward("no/such/folder/my.py:reward")


def test_a_missing_module_is_told_from_one_that_lacks_another(file, monkeypatch):
    with pytest.raises(InputError, match=r"no module 'no_such_module'; .*'no_such_module.py:"):
        load_reward("no_such_module:reward")
    (file.parent / "module_lacking_another.py").write_text("import json\nimport no_such_module")
    monkeypatch.chdir(file.parent)
    with pytest.raises(InputError, match=r"module_lacking_another.py failed at line 2 .*no_such_module"):
        load_reward("module_lacking_another:reward")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ny = 1 / 0\n", "at line 2 while it was imported: ZeroDivisionError: division by zero"),
        ("import json\njson.loads('{')\n", "at line 2 while it was imported: JSONDecodeError"),
        ("def reward(:\n", "at line 1 while it was imported: SyntaxError"),
        ("import sys\n\nsys.exit('usage')\n", "at line 3 while it was imported: SystemExit: usage"),
    ],
)
def test_a_file_that_fails_is_named_with_its_line(tmp_path, text, said):
    (tmp_path / "bad.py").write_text(text)
    for _ in range(2):  # a failed import leaves nothing behind
        with pytest.raises(InputError, match=f"bad.py failed {said}"):
            load_reward(f"{tmp_path / 'bad.py'}:reward")
