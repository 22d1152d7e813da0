"""Verifiers: what counts as right, and what is said when they cannot judge."""

import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwell.errors import InputError
from stepwell.reward.verifiers import (
    ExactMatch,
    MathEqual,
    Numeric,
    RegularExpression,
    exact_match,
    math_equal,
    numeric,
    regular_expression,
    text_of,
)


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "b"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}, "b"]}], "ab"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], ""),
    ],
)
def test_the_text_of_a_completion_is_its_last_messages(completion, text):
    assert text_of(completion) == text


@pytest.mark.parametrize("completion", [3, None, [], ["a"], [{"content": 3}]])
def test_what_has_no_text_is_an_error(completion):
    with pytest.raises(InputError, match="string or a list of chat messages"):
        text_of(completion)


@pytest.mark.parametrize("verifier", [exact_match, numeric, math_equal, RegularExpression(r"\d+")])
def test_every_verifier_reads_chat_and_takes_trls_keywords(verifier):
    """Rows without an answer are skipped."""
    chat = [{"role": "assistant", "content": "72"}]
    rewards = verifier(
        prompts=["p"] * 3, completions=[chat, "71", "72"], completion_ids=[[1]] * 3, answer=["72", "72", None]
    )
    assert rewards == [1.0, 0.0, None]


@pytest.mark.parametrize("kind", [ExactMatch, Numeric, MathEqual, lambda column: RegularExpression(".+", column)])
def test_every_verifier_reads_the_column_given_and_names_a_missing_one(kind):
    assert kind(column="solution")(completions=["5"], solution=["5"]) == [1.0]
    with pytest.raises(InputError, match="reads the column 'solution', which the data do not have; there are: answer"):
        kind(column="solution")(completions=["5"], answer=["5"])


def test_the_last_match_of_a_pattern_counts():
    last = regular_expression(r"Answer: (\w+)")
    assert last(completions=["Answer: a. No, Answer: b", "Answer: b. No, Answer: a"], answer=["b", "b"]) == [1.0, 0.0]


def test_a_pattern_alone_judges_the_format():
    found = RegularExpression(r"<a>.*</a>", column=None)
    whole = RegularExpression(r"<a>.*</a>", column=None, whole=True)
    completions = ["<a>1</a>", "so <a>1</a>", "1"]
    assert found(completions=completions) == [1.0, 1.0, 0.0]
    assert whole(completions=completions) == [1.0, 0.0, 0.0]


def test_a_broken_pattern_is_refused_when_it_is_written():
    with pytest.raises(InputError, match=r"RegularExpression.pattern must be a regular expression, got '\('"):
        regular_expression("(")


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("so 3-4", 4, True),  # a minus between two terms is no sign
        ("so (3) -4", -4, True),
        ("x=-4", -4, True),
        ("\N{MINUS SIGN}4", -4, True),
        ("$1,234,567.50", "1234567.5", True),
        ("1,2345", "2345", True),
        ("1.5e-3", 0.0015, True),
        (".5", "1/2", True),
        ("2/6", "1/3", True),
        ("1/0", 1, False),
        ("50%", 50, True),
        ("72.", "Natalia sold 48/2 = 24. 48+24 = 72.\n#### 72", True),
        ("12345678901234567891", "12345678901234567890", False),
        ("1e999999999", "1e999999998", False),
        ("1e99999999999999999999", 5, False),
        ("9" * 10000, "9" * 10000, True),
        ("nothing", 0, False),
    ],
)
def test_the_last_number_counts(text, answer, right):
    assert numeric(completions=[text], answer=[answer]) == [float(right)]


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_equals_itself_as_python_writes_it(number):
    assert numeric(completions=[f"It is {number}."], answer=[number]) == [1.0]


def test_the_tolerance_is_relative():
    assert Numeric(tolerance=0.01)(completions=["99.5", "98"], answer=[100, 100]) == [1.0, 0.0]


def test_an_answer_without_a_number_is_an_error_that_names_the_row():
    with pytest.raises(InputError, match="column 'answer', but row 1 of the batch holds 'many'"):
        numeric(completions=["1", "2"], answer=["1", "many"])


MATHEMATICS = [
    (r"\boxed{\frac{2}{4}}", "1/2", 1.0),
    (r"So $1 + x^2$", "x^2+1", 1.0),
    (r"\boxed{3}", "2x+3", 0.0),  # a part of the answer is not the answer
    (r"\boxed{2x+3}", "$2x+3$", 1.0),
    (r"\boxed{72}", "24 + 48 = 72\n#### 72", 1.0),
    (r"\boxed{50\%}", "50%", 1.0),
    (r"\boxed{(1, 2)}", "(1,2)", 1.0),
    (r"\boxed{7}", 7, 1.0),
    (r"\boxed{", "1", 0.0),
    ("", "1", 0.0),
    ("1", "", 0.0),
    (r"\frac{\frac{", "\\frac{", 0.0),
]


def judge_mathematics():
    texts, answers, _ = zip(*MATHEMATICS, strict=True)
    return math_equal(completions=texts, answer=answers)


def test_mathematics_is_compared_by_value():
    """An expression that cannot be parsed is wrong."""
    assert judge_mathematics() == [right for _, _, right in MATHEMATICS]


def test_mathematics_is_judged_outside_the_main_thread_too():
    found = []
    thread = threading.Thread(target=lambda: found.extend(judge_mathematics()))
    thread.start()
    thread.join()
    assert found == [right for _, _, right in MATHEMATICS]


def test_a_missing_math_verify_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=r"pip install 'stepwell\[math\]'"):
        math_equal(completions=["1"], answer=["1"])
