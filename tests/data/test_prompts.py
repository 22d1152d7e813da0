"""Prompts are read alike from every source, and bad data is named by file, row and column."""

import json
import re
import sys

import pytest

from stepwell.data.columns import RESERVED
from stepwell.data.prompts import load_prompts
from stepwell.errors import InputError
from stepwell.sampling.request import Prompt

CHAT = [{"role": "user", "content": "2 + 2 ="}]
ROWS = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "1,5 + \u2028\n1 =", "answer": "2,5"}]
EXPECTED = [Prompt(row, data["prompt"], {"answer": data["answer"]}) for row, data in enumerate(ROWS)]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def write_json_lines(folder):
    return write(folder / "d.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))


def write_json(folder):
    return write(folder / "d.JSON", "\ufeff" + json.dumps(ROWS))


def write_csv(folder):
    return write(folder / "d.csv", 'prompt,answer\n1 + 1 =,2\n\n"1,5 + \u2028\n1 =","2,5"\n')


def write_parquet(folder):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "d.parquet")
    return folder / "d.parquet"


def dataset(folder):
    return pytest.importorskip("datasets").Dataset.from_list(ROWS)


def dataset_folder(folder):
    dataset(folder).save_to_disk(str(folder / "d"))
    return folder / "d"


SOURCES = [write_json_lines, write_json, write_csv, write_parquet, dataset, dataset_folder, lambda folder: ROWS]


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_prompts(source, tmp_path):
    assert load_prompts(source(tmp_path)) == EXPECTED


@pytest.mark.parametrize("source", [write_json_lines, write_json, write_csv])
def test_text_files_need_no_further_library(source, tmp_path, monkeypatch):
    for name in ("datasets", "pyarrow", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)
    assert load_prompts(str(source(tmp_path))) == EXPECTED


def test_chat_messages_are_prompts(tmp_path):
    path = write(tmp_path / "d.jsonl", json.dumps({"prompt": CHAT}))
    assert load_prompts(path) == load_prompts([{"prompt": CHAT}]) == [Prompt(0, CHAT)]


def test_texts_alone_are_prompts(tmp_path):
    assert load_prompts(["a", "b"]) == [Prompt(0, "a"), Prompt(1, "b")]
    assert load_prompts(write(tmp_path / "d.json", '["a", "b"]')) == [Prompt(0, "a"), Prompt(1, "b")]


def test_the_prompts_column_can_be_named():
    assert load_prompts([{"question": "a", "prompt": "b"}], column="question") == [Prompt(0, "a", {"prompt": "b"})]


def test_columns_that_a_row_lacks_are_none(tmp_path):
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "level": 2}]
    columns = [{"answer": 1, "level": None}, {"answer": None, "level": 2}]
    assert [prompt.columns for prompt in load_prompts(rows)] == columns
    path = write(tmp_path / "d.csv", "answer,prompt,level\n1,a\n")
    assert load_prompts(path) == [Prompt(0, "a", {"answer": "1", "level": None})]


BAD_FILES = {
    "d.txt": ("a", "unknown suffix '.txt'; prompts are read from .jsonl, .json, .csv, .parquet"),
    "empty.jsonl": ("\n\n", "empty.jsonl holds no rows"),
    "empty.json": ("[]", "empty.json holds no rows"),
    "empty.csv": ("prompt\n", "empty.csv holds no rows"),
    "broken.jsonl": ('{"prompt": "a"}\n\n{"prompt": }\n', r"broken.jsonl, line 3 is no JSON \(Expecting value"),
    "number.jsonl": (
        '{"prompt": "a"}\n3\n',
        r"row 1 \(line 2\) is of type int; a row is an object with the column 'prompt'",
    ),
    "lines.json": ('{"prompt": "a"}\n{"prompt": "b"}', "lines.json, line 2, is no JSON .*name the file .jsonl"),
    "object.json": ('{"prompt": "a"}', "object.json must hold a list of rows, got one value of type dict"),
    "without.jsonl": (
        '{"prompt": "a"}\n\n{"answer": 1}',
        r"without.jsonl, row 1 \(line 3\), column 'prompt' holds no prompt",
    ),
    "blank.csv": ("prompt,answer\n ,2\n", r"row 0 \(line 2\), column 'prompt' holds no prompt"),
    "wide.csv": ("prompt,answer\na, b,2\n", r"row 0 \(line 2\) has 3 cells for 2 columns; .*double quotes"),
    "quotes.csv": ('prompt\n"a\n', "quotes.csv, line 2 is no CSV"),
    "twice.csv": ("prompt,a,a\n", "two columns named 'a'"),
    "near.csv": ("prmpt,answer\na,b\n", r"no column 'prompt' \(its columns are 'prmpt', 'answer'\); .*column='prmpt'"),
    "far.csv": ("x,y\na,b\n", "no column 'prompt' .*'x', 'y'.*name the one that holds the prompts with column="),
    "no.parquet": ("prompt", "no.parquet is no parquet file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_row_column_and_mend(name, tmp_path):
    text, said = BAD_FILES[name]
    with pytest.raises(InputError, match=said) as caught:
        load_prompts(write(tmp_path / name, text))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_ROWS = [
    ([], "The list of prompts holds no rows"),
    ([{"prompt": "a"}, "b"], "row 1 is of type str; a row is an object"),
    ([{"prompt": "a"}, {"prompt": 0.5}], "row 1, column 'prompt' holds a value of type float; a prompt is text, or"),
    ([{"prompt": []}], "row 0, column 'prompt' holds no prompt"),
    ([{"prompt": [*CHAT, {"role": "user"}]}], "row 0, column 'prompt' holds a list whose entry 1 is no chat message"),
    ([{"prompt": ["a"]}], "entry 0 is no chat message"),
    (["a", " "], "row 1 holds no prompt"),
    ([{"prompt": "a", 3: "b"}], "column named 3"),
    ([{}], r"no column 'prompt' \(it has none\)"),
    (3, "a list of rows, got an object of type int"),
]


@pytest.mark.parametrize(("rows", "said"), BAD_ROWS)
def test_a_bad_row_is_named_with_its_mend(rows, said):
    with pytest.raises(InputError, match=said):
        load_prompts(rows)


def test_a_missing_file_names_the_nearest(tmp_path):
    write_json_lines(tmp_path)
    with pytest.raises(InputError, match=r"no file '.*e.jsonl'; did you mean '.*d.jsonl'"):
        load_prompts(tmp_path / "e.jsonl")
    with pytest.raises(InputError, match="texts go in a list"):
        load_prompts("What is 2 + 2?")


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "d.csv").write_bytes("prompt\né".encode("latin-1"))
    with pytest.raises(InputError, match=r"d.csv is not UTF-8 text .*save it as UTF-8"):
        load_prompts(tmp_path / "d.csv")


def test_missing_libraries_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs pyarrow; install it with `pip install 'stepwell\[data\]'`"):
        load_prompts(write(tmp_path / "d.parquet", ""))
    with pytest.raises(InputError, match=r"needs datasets; install it with `pip install 'stepwell\[data\]'`"):
        load_prompts(tmp_path)


def test_a_folder_or_data_set_of_splits_asks_for_one(tmp_path):
    splits = pytest.importorskip("datasets").DatasetDict(train=dataset(tmp_path), test=dataset(tmp_path))
    splits.save_to_disk(str(tmp_path / "d"))
    for source in (splits, tmp_path / "d"):
        with pytest.raises(InputError, match="has the splits train, test; choose one"):
            load_prompts(source)
    assert load_prompts(tmp_path / "d" / "train") == EXPECTED


def test_a_folder_that_is_no_data_set_is_named(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(InputError, match=r"was not written by Dataset.save_to_disk"):
        load_prompts(tmp_path)


# prompts of any kind, for processes that are not conditioned on texts


@pytest.mark.parametrize(
    ("source", "values"),
    [
        ([3, 1, 4], [3, 1, 4]),
        ([None, None], [None, None]),
        (["a", ""], ["a", ""]),
        ([{"prompt": 3}, {"prompt": None}], [3, None]),
        ([{"prompt": {"label": 3}}], [{"label": 3}]),
        ([{"weight": 1}, {"weight": 2}], [None, None]),
        ([{"prompt_id": 1}], [None]),
    ],
)
def test_a_prompt_may_be_anything_where_that_is_said(source, values):
    assert [prompt.value for prompt in load_prompts(source, anything=True)] == values


def test_columns_stay_with_their_rows_where_a_prompt_may_be_anything():
    first, second = load_prompts([{"weight": 1}, {"prompt": 5, "weight": 2}], anything=True)
    assert (first.value, dict(first.columns)) == (None, {"weight": 1})
    assert (second.value, dict(second.columns)) == (5, {"weight": 2})


@pytest.mark.parametrize(
    ("source", "column", "said"),
    [
        ([{"promt": 1}], "prompt", "did you mean column='promt'?"),
        ([{"Prompts": 1}], "prompt", "has no column 'prompt'"),
        ([{"label": 1}], "lable", "did you mean column='label'?"),
        ([{"label": 1}, 3], "label", "row 1 is of type int"),
        ([], "prompt", "holds no rows"),
    ],
)
def test_a_slip_is_a_slip_even_where_a_prompt_may_be_anything(source, column, said):
    with pytest.raises(InputError, match=re.escape(said)):
        load_prompts(source, column, anything=True)


@pytest.mark.parametrize("name", RESERVED)
@pytest.mark.parametrize("anything", [True, False])
def test_a_column_may_not_take_the_name_of_what_rewards_are_given(name, anything):
    with pytest.raises(InputError, match=f"has a column '{name}'"):
        load_prompts([{"prompt": 1, name: 2}], anything=anything)
    assert load_prompts([{name: "text"}], name, anything=anything)[0].value == "text"
