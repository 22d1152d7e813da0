"""Rewards that compare a completion with the known answer: exactly, by pattern, as a number, as mathematics.

Each verifier is a small callable with TRL's signature: `exact_match`, `numeric` and `math_equal` read the column
`answer`; `ExactMatch(column="solution")` and its like read another. The reward is 1.0 or 0.0, and None (does not
apply) for a row whose answer is None, so that data sets of several kinds can be mixed.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from stepwell.errors import InputError, RewardError
from stepwell.guarded import Guarded, OutOfTime, said_of
from stepwell.terminal import one_line


def text_of(completion: Any) -> str:
    """The text of a completion or a prompt: a string itself, or the content of the last of its chat messages.

    A content that is a list of parts gives the text of its text parts; one that is None (a bare tool call) gives
    "". Raises `InputError` for anything else.

    Example:
        >>> text_of([{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}])
        '4'
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, list | tuple) and completion and isinstance(completion[-1], Mapping):
        content = completion[-1].get("content")
        if content is None:
            return ""
        if isinstance(content, str):
            return content
        if isinstance(content, list | tuple):
            parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
            return "".join(part for part in parts if isinstance(part, str))
    raise InputError(
        f"Text must be a string or a list of chat messages with a role and a content, got a value of type "
        f"{type(completion).__name__}."
    )


@dataclass(frozen=True)
class ExactMatch:
    """1.0 where the completion's text is the answer, apart from white space at both ends.

    Example:
        >>> exact_match(completions=[" 4\\n", "four"], answer=[4, 4])
        [1.0, 0.0]
        >>> ExactMatch(column="city", ignore_case=True)(completions=["paris"], city=["Paris"])
        [1.0]
    """

    column: str = "answer"
    ignore_case: bool = False
    __name__ = "exact_match"

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        answers = _answers(self.__name__, self.column, columns)
        return _judge(completions, answers, lambda text, answer: self._plain(text) == self._plain(str(answer)))

    def _plain(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()


MATCHING = 10.0
"""The most seconds that a regular expression may take for the texts of a batch."""


@dataclass(frozen=True)
class RegularExpression:
    """1.0 where the pattern's last match in the text is the answer; with `column=None`, where there is any match.

    The pattern's first group is compared, or the whole match where it has none, apart from white space at both ends.
    With `whole`, the pattern has to match the whole text. Flags go into the pattern: `(?s)` lets `.` match new lines,
    `(?i)` ignores case. Raises `InputError` for a pattern that is no regular expression, `RewardError` for one that
    tries more ways through a text than `MATCHING` seconds allow, as `(a+)+$` does.

    Example:
        >>> boxed = regular_expression(r"<answer>(.*?)</answer>")
        >>> boxed(completions=["<answer> 4 </answer>", "4"], answer=["4", "4"])
        [1.0, 0.0]
        >>> regular_expression("(?s)<think>.*</think>.*", column=None, whole=True)(completions=["<think>\\n</think> 4"])
        [1.0]
    """

    pattern: str
    column: str | None = "answer"
    whole: bool = False
    __name__ = "regular_expression"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError, RecursionError, OverflowError) as error:
            raise InputError(
                f"RegularExpression.pattern must be a regular expression, got {_quoted(self.pattern)}: {error}."
            ) from error

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        read = [""]

        def found(text: str) -> str | None:
            read[0] = text
            return self._found(text)

        with Guarded(lambda error: self._refusal(read[0], error), MATCHING):
            if self.column is None:
                return [float(found(text_of(completion)) is not None) for completion in completions]
            answers = _answers(self.__name__, self.column, columns, "; with column=None no answer is read")
            return _judge(completions, answers, lambda text, answer: found(text) == str(answer).strip())

    def _found(self, text: str) -> str | None:
        if self.whole:
            match = re.fullmatch(self.pattern, text)
        else:
            match = None
            for match in re.finditer(self.pattern, text):  # noqa: B007 the last one is wanted
                pass
        if match is None:
            return None
        return (match[1] if match.re.groups and match[1] is not None else match[0]).strip()

    def _refusal(self, text: str, error: BaseException) -> RewardError:
        reason = (
            f"took longer than {MATCHING:g} seconds" if isinstance(error, OutOfTime) else f"raised {said_of(error)}"
        )
        return RewardError(
            f"Reward '{self.__name__}' {reason} on '{one_line(text, 60)}'; write its pattern, "
            f"{_quoted(self.pattern)}, without repetitions inside of repetitions."
        )


def _quoted(pattern: Any) -> str:
    return f"'{one_line(str(pattern), 60)}'"


# A sign counts only where it cannot be a minus between two terms; 1,234.5 and 3/4 are one number each.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?<![\w.)])[-+]?(?:{_DIGITS})(?:[eE][-+]?\d+)?(?:/\d+)?|(?:{_DIGITS})", re.ASCII)


@dataclass(frozen=True)
class Numeric:
    """1.0 where the last number in the text is the last number in the answer.

    Numbers are compared exactly, as decimals, unless a relative `tolerance` is given. Signs, thousands separated by
    commas, powers of ten (1.5e-3) and plain fractions (3/4) are read; units and percent signs are ignored. An answer
    such as GSM8K's, with its reasoning before `#### 72`, can be used as it is. A text without a number gets 0.0; an
    answer without one raises `InputError`.

    Example:
        >>> numeric(completions=["It is 1,234.50 dollars.", "1/2", "none"], answer=["1234.5", 0.5, 3])
        [1.0, 1.0, 0.0]
    """

    column: str = "answer"
    tolerance: float = 0.0
    __name__ = "numeric"

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        answers = _answers(self.__name__, self.column, columns)
        wanted = [None if answer is None else _last_number(str(answer)) for answer in answers]
        for row, (answer, number) in enumerate(zip(answers, wanted, strict=True)):
            if answer is not None and number is None:
                raise InputError(
                    f"Reward '{self.__name__}' needs a number in column '{self.column}', "
                    f"but row {row} of the batch holds {str(answer)[:60]!r}."
                )
        return _judge(completions, wanted, self._equal)

    def _equal(self, text: str, wanted: Decimal) -> bool:
        number = _last_number(text)
        if number is None:
            return False
        try:
            return number == wanted or abs(number - wanted) <= Decimal(self.tolerance) * abs(wanted)
        except ArithmeticError:  # a difference beyond the range of decimals
            return False


def _last_number(text: str) -> Decimal | None:
    """The last number in the text, None if there is none or none that is finite."""
    last = None
    for last in _NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")):  # noqa: B007 the last one is wanted
        pass
    if last is None:
        return None
    numerator, _, denominator = last[0].replace(",", "").partition("/")
    try:
        # Decimal and not float: 1e999999999 is no trouble, and long integers stay different.
        value = Decimal(numerator) / Decimal(denominator) if denominator else Decimal(numerator)
    except ArithmeticError:
        return None
    return value if value.is_finite() else None


@dataclass(frozen=True)
class MathEqual:
    """1.0 where the text's final mathematical expression equals the answer, judged by `math-verify`.

    The answer is an expression, with or without dollars or `\\boxed{}`, a number, or GSM8K's reasoning with `#### 72`
    at its end. A text that cannot be parsed gets 0.0. `timeout` (whole seconds, for each expression) is kept by a
    signal and so works only in the main thread; in other threads there is none.
    Raises `InputError` where `math-verify` (`pip install 'stepwell[math]'`) is missing.

    Example:
        >>> math_equal(completions=[r"So it is $\\frac{2}{4}$.", "no idea"], answer=["1/2", "1/2"])
        [1.0, 0.0]
    """

    column: str = "answer"
    timeout: int = 5
    __name__ = "math_equal"

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        answers = _answers(self.__name__, self.column, columns)
        try:
            from math_verify import parse, verify
        except ImportError as error:
            raise InputError(
                f"Reward '{self.__name__}' needs math-verify; install it with `pip install 'stepwell[math]'`."
            ) from error
        timeout: Any = self.timeout if threading.current_thread() is threading.main_thread() else None
        read: dict[str, list[Any]] = {}  # a group shares its answer, which is parsed once

        def equal(text: str, answer: Any) -> bool:
            wanted = str(answer)
            if wanted not in read:
                read[wanted] = parse(_marked(wanted), parsing_timeout=timeout) or parse(wanted, parsing_timeout=timeout)
            return bool(verify(read[wanted], parse(text, parsing_timeout=timeout), timeout_seconds=timeout))

        return _judge(completions, answers, equal)


def _marked(answer: str) -> str:
    """The answer as math-verify finds it for certain: it overlooks a bare `x^2+1`, and may pick a part of it."""
    answer = answer.rpartition("####")[2].strip()
    if re.search(r"\$|\\boxed|\\\(|\\\[", answer):
        return answer
    return "\\boxed{" + re.sub(r"(?<!\\)%", r"\\%", answer) + "}"


def _answers(name: str, column: str, columns: Mapping[str, Any], mend: str = "") -> Sequence[Any]:
    """The column of answers, or an error that names the columns there are."""
    if column not in columns:
        listed = ", ".join(sorted(columns)) or "none"
        raise InputError(
            f"Reward '{name}' reads the column '{column}', which the data do not have; there are: {listed}{mend}."
        )
    return columns[column]


def _judge(completions: Sequence[Any], answers: Sequence[Any], right: Callable[[str, Any], bool]) -> list[float | None]:
    """1.0 or 0.0 a row; None where there is no answer."""
    pairs = zip(completions, answers, strict=True)
    return [None if answer is None else float(right(text_of(completion), answer)) for completion, answer in pairs]


exact_match = ExactMatch()
regular_expression = RegularExpression
numeric = Numeric()
math_equal = MathEqual()
