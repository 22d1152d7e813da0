"""A million rows of data are read, and the first step made, in bounded time and memory."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import textwrap
from datetime import date

import pytest

from stepwell.data.prompts import load_prompts
from stepwell.data.rows import PackedPrompts, PackedRows, by_number, names_of_columns, sizes_of
from stepwell.data.stream import PromptStream
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt

MEASURED = textwrap.dedent(
    """
    import json, resource, sys
    from stepwell.cli import main
    code = main(sys.argv[2:])
    used = resource.getrusage(resource.RUSAGE_SELF)
    measured = {"code": code, "seconds": used.ru_utime + used.ru_stime, "mebibytes": used.ru_maxrss / 1024}
    json.dump(measured, open(sys.argv[1], "w"))
    """
)


@pytest.mark.slow
def test_a_million_rows_begin_within_30_seconds_and_800_mebibytes(model_folder, tmp_path):
    with open(tmp_path / "rows.jsonl", "w") as file:
        for number in range(1_000_000):
            letters = " ".join("abcdefghij"[int(digit)] for digit in str(number))
            file.write(f'{{"prompt": "{letters}", "answer": "{number}"}}\n')
    (tmp_path / "mine.py").write_text(
        "def reward(completions, answer):\n    return [float(len(c)) for c in completions]\n"
    )
    (tmp_path / "measured.py").write_text(MEASURED)
    words = ["train", "--model", str(model_folder("qwen2")), "--data", "rows.jsonl", "--reward", "mine.py:reward"]
    words += ["--prompts-per-step", "1", "--group-size", "2", "--max-new-tokens", "4", "--steps", "1", "--out", "run"]
    command = [sys.executable, "measured.py", "found.json", *words, "--no-progress", "--device", "cpu"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=280)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["code"] == 0
    assert found["seconds"] < 30.0, found
    assert found["mebibytes"] < 800.0, found


ROWS = [
    {"prompt": "a", "answer": 1},
    {"prompt": [{"role": "user", "content": "b"}], "answer": None, "more": [1.5, {"deep": "x"}]},
    {"prompt": "\ud800", "answer": float("inf")},
]


def test_packed_values_come_back_as_they_were():
    values = [*ROWS, "text", 3, None, [1, [2]], date(2020, 1, 2), b"\0", 10**30]
    rows = PackedRows(values)
    assert list(rows) == values
    assert [rows[place] for place in range(-len(values), len(values))] == values * 2
    assert rows[1:3] == values[1:3]
    rows[1]["answer"] = "changed"
    assert rows[1]["answer"] is None
    assert (rows.survey.mappings, rows.survey.texts, rows.survey.odd) == (3, 1, 3)
    assert list(rows.survey.names) == ["prompt", "answer", "more"]
    with pytest.raises(IndexError):
        rows[len(values)]


def test_a_file_and_a_list_give_the_same_prompts(tmp_path):
    rows = [{"prompt": f"p{number}", "answer": number, **({"odd": 1} if number % 2 else {})} for number in range(50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    packed, listed = load_prompts(tmp_path / "rows.jsonl"), load_prompts(rows)
    assert isinstance(packed, PackedPrompts)
    assert packed == listed
    assert list(packed) == listed
    assert packed[7] == listed[7] == by_number(packed)[7]
    assert packed[3:5] == listed[3:5]
    assert packed != listed[:-1]
    assert names_of_columns(packed) == names_of_columns(listed) == ["answer", "odd"]
    assert list(sizes_of(packed)) == list(sizes_of(listed))


def test_a_stream_of_packed_prompts_is_that_of_listed_ones(tmp_path):
    rows = [{"prompt": f"p{number}"} for number in range(7)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    one, other = (PromptStream(given, Rng(3)) for given in (load_prompts(tmp_path / "rows.json"), load_prompts(rows)))
    for count in (3, 5, 6, 20, 2):
        assert one.take(count) == other.take(count)
    copied = pickle.loads(pickle.dumps(one.state_dict()["order"]))
    assert copied.tolist() == other.state_dict()["order"].tolist()


def test_of_many_prompts_the_longest_are_read_before_a_run(monkeypatch, tmp_path):
    from stepwell import api
    from stepwell.errors import InputError

    class Reads:
        def __init__(self):
            self.read = []

        def check_prompt(self, value):
            self.read.append(value)
            if len(value) > 9:
                raise InputError("it is too long.")

    monkeypatch.setattr(api, "CHECKED", 50)
    monkeypatch.setattr(api, "LONGEST", 10)
    prompts = [Prompt(number, "a" * (number % 7 + 1)) for number in range(500)]
    process = Reads()
    api.check_prompts(process, prompts, "data")
    assert 40 <= len(process.read) <= 50
    prompts[333] = Prompt(333, "b" * 10)
    with pytest.raises(InputError, match="data, row 333: it is too long"):
        api.check_prompts(Reads(), prompts, "data")
