"""Every countdown problem is solvable, its rules admit solutions and nothing else, and held-out problems stay out."""

import ast
import operator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.errors import InputError
from stepwell.tasks.countdown import all_problems, countdown, show, solved, value_of, verdict, well_formed
from stepwell.tasks.registry import get_task

PROBLEMS = all_problems(3, 9, 99)


def by_python(expression):
    """The expression's value from Python's own grammar, an independent reader."""
    signs = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}

    def walk(node):
        if isinstance(node, ast.BinOp):
            return signs[type(node.op)](walk(node.left), walk(node.right))
        assert isinstance(node, ast.Constant)
        return node.value

    return walk(ast.parse(expression, mode="eval").body)


numbers = st.integers(0, 999_999)


@given(st.lists(numbers, min_size=1, max_size=16), st.data())
def test_values_are_those_of_arithmetic(terms, data):
    signs = data.draw(st.lists(st.sampled_from("+-*"), min_size=len(terms) - 1, max_size=len(terms) - 1))
    expression = str(terms[0]) + "".join(s + str(n) for s, n in zip(signs, terms[1:], strict=True))
    assert value_of(expression) == by_python(expression)


@given(st.text(alphabet="0123456789+-*/() \n._e٣²", max_size=12))
def test_whatever_is_read_is_an_expression_of_the_rules(text):
    value = value_of(text)
    if value is not None:
        assert value == by_python(text)
        assert set(text) <= set("0123456789+-*")


@pytest.mark.parametrize(
    "text",
    ["", "-1", "1+", "1++1", "(1)", "01", "1 + 1", "2**3", "1/1", "1\n", "9" * 7, "1" + "+1" * 16, "__import__('os')"],
)
def test_anything_else_is_no_expression(text):
    assert value_of(text) is None


@settings(max_examples=200)
@given(st.sampled_from(PROBLEMS))
def test_every_problem_has_a_solution_and_solutions_keep_the_rules(problem):
    assert problem.solutions
    for solution in problem.solutions:
        assert verdict(solution, problem.numbers, problem.target) == ""
        assert solved([solution], [problem.numbers], [problem.target]) == [1.0]


@settings(max_examples=200)
@given(st.sampled_from(PROBLEMS), st.text(alphabet="0123456789+-*", min_size=5, max_size=5))
def test_the_solver_misses_no_solution(problem, text):
    assert (verdict(text, problem.numbers, problem.target) == "") == (text in problem.solutions)


def test_near_misses_earn_nothing():
    texts = ["5*9+2", "9*5+2", "5*9-2", "5*9", "5*9+2+0", "5*9+5", "45+2", "5*9+2 "]
    given_, target = [[2, 5, 9]] * len(texts), [47] * len(texts)
    assert solved(texts, given_, target) == [1.0, 1.0, 0, 0, 0, 0, 0, 0]
    assert well_formed(texts, given_) == [1.0, 1.0, 1.0, 0, 0, 0, 0, 0]


def test_training_and_held_out_problems_are_disjoint():
    """They are the same every time."""
    first, second = countdown(), get_task("countdown")
    train, held = ({p.value for p in prompts} for prompts in (first.prompts, first.evaluation))
    assert not train & held
    assert len(held) == 300
    assert len(train | held) == len(PROBLEMS)
    assert [p.value for p in first.evaluation] == [p.value for p in second.evaluation]
    assert {p.value for p in countdown(seed=1).evaluation} != held
    ids = [p.id for p in [*first.prompts, *first.evaluation]]
    assert len(set(ids)) == len(ids)


def test_a_report_says_what_is_wrong_with_an_answer():
    prompt = next(p for p in countdown().prompts if len(set(p.columns["numbers"])) == 3)
    assert "not the given numbers" in show(prompt, "1+1+1")
    assert "no expression" in show(prompt, "+")


@pytest.mark.parametrize(
    "wrong", [{"numbers": 1}, {"largest": 1}, {"numbers": 6, "largest": 12}, {"evaluation": 10**6}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(InputError):
        countdown(**wrong)
