"""What reward functions are given, how they are added up, and what is said when one fails."""

import asyncio
import functools
import time

import numpy as np
import pytest
import torch

from stepwell.errors import InputError, RewardError
from stepwell.meter import Meter
from stepwell.process.base import Samples
from stepwell.reward.mixing import Rewards
from stepwell.reward.verifiers import ExactMatch, exact_match
from stepwell.sampling.record import Drawn
from stepwell.sampling.request import Prompt
from stepwell.trajectories import make


def draw(completions, prompts=None, **samples):
    rows = len(completions)
    prompts = prompts or [Prompt(row, f"question {row}", {"answer": str(row)}) for row in range(rows)]
    action = torch.arange(rows * 3).reshape(rows, 3)
    truncated = torch.tensor([False] * (rows - 1) + [True] if rows else [], dtype=torch.bool)
    mask = torch.ones(rows, 3, dtype=torch.bool)
    length = torch.full((rows,), 2)
    trajectories = make(action, torch.zeros(rows, 3), mask, length=length, truncated=truncated)
    return Drawn(trajectories, Samples(list(completions), samples), prompts)


def constant(value):
    return lambda completions: [value] * len(completions)


def score(functions, drawn, weights=None):
    return Rewards(functions, weights)(drawn, Meter())


def test_a_function_with_kwargs_sees_every_column_under_the_names_of_trl():
    seen = {}

    def spy(prompts, **columns):
        seen.update(columns, prompts=prompts)
        return [0.0] * len(prompts)

    score(spy, draw(["a", "b"], style=["x", "y"]))
    assert seen == {
        "prompts": ["question 0", "question 1"],
        "completions": ["a", "b"],
        "completion_ids": [[0, 1], [3, 4]],
        "truncated": [False, True],
        "style": ["x", "y"],
        "answer": ["0", "1"],
    }


def test_a_function_without_kwargs_is_given_only_what_it_names():
    assert score(lambda completions, answer, unheard_of=7: [unheard_of], draw(["a"])).total.tolist() == [7.0]


def test_a_function_that_changes_its_lists_harms_nobody():
    def greedy(completions):
        return [completions.pop() and 1.0, 1.0]

    seen = []
    score([greedy, lambda completions: seen.extend(completions) or [0, 0]], draw(["a", "b"]))
    assert seen == ["a", "b"]


def test_a_column_that_a_row_lacks_is_none_there():
    prompts = [Prompt(0, "p", {"answer": "a"}), Prompt(1, "q", {"level": 3})]
    seen = {}
    score(lambda answer, level: seen.update(answer=answer, level=level) or [0, 0], draw(["a", "b"], prompts))
    assert seen == {"answer": ["a", None], "level": [None, 3]}


def test_a_missing_column_is_named_before_any_call():
    """With the function, its parameter and the columns that there are."""

    def needy(completions, solution):
        return [1.0]

    calls = []
    with pytest.raises(InputError, match=r"'needy' requires 'solution'.*answer, completion_ids, completions"):
        score([lambda completions: calls.append(1) or [1.0], needy], draw(["a"]))
    assert not calls


def test_a_data_column_with_a_taken_name_is_an_error():
    with pytest.raises(InputError, match=r"column 'truncated'.*rename"):
        score(constant(1), draw(["a"], [Prompt(0, "p", {"truncated": 1})]))


def test_positional_only_parameters_are_refused():
    def positional(completions, /):
        return [1.0]

    with pytest.raises(InputError, match="'completions' by position only"):
        score(positional, draw(["a"]))


def test_the_total_is_the_weighted_sum_over_the_functions_that_apply():
    def first(completions):
        return [1.0, None, 3.0]

    def second(completions):
        return [10, 20, None]

    scored = score([first, second], draw(["a", "b", "c"]), weights=[2.0, 0.5])
    assert scored.total.tolist() == [7.0, 10.0, 6.0]
    assert scored.total.dtype == scored.each.dtype == torch.float64
    nan = float("nan")
    torch.testing.assert_close(
        scored.each, torch.tensor([[1, 10], [nan, 20], [3, nan]], dtype=torch.float64), equal_nan=True
    )


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0],
        (True, False),
        [1.0, np.float32(0)],
        [torch.tensor(1.0), np.array(0)],
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16, requires_grad=True),
        np.array([True, False]),
        np.array([1, None], dtype=object),
    ],
)
def test_lists_tensors_and_arrays_of_numbers_are_understood(returned):
    scored = score([lambda completions: returned, constant(0)], draw(["a", "b"]))
    assert scored.total.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), torch.tensor(float("nan")), 10**400])
def test_a_number_that_is_not_finite_names_function_row_and_prompt(number):
    def broken(completions):
        return [0.0, number]

    with pytest.raises(
        RewardError, match=r"'broken' must .* None .*, got (nan|inf) for row 1, prompt 1 \('question 1'\)"
    ):
        score(broken, draw(["a", "b"]))


@pytest.mark.parametrize(
    ("value", "kind"), [("1.0", "str"), ([1.0], "list"), ({"a": 1}, "dict"), (1j, "complex"), (b"1", "bytes")]
)
def test_an_entry_that_is_no_number_names_function_row_and_prompt(value, kind):
    def broken(completions):
        return [0.0, value]

    with pytest.raises(
        RewardError, match=rf"'broken' must .*, got a value of type {kind} for row 1, prompt 1 \('question 1'\)"
    ):
        score(broken, draw(["a", "b"]))


@pytest.mark.parametrize("returned", [None, 1.0, "ab", {0: 1.0, 1: 2.0}, torch.tensor(1.0)])
def test_a_return_that_is_no_list_names_function_and_batch(returned):
    with pytest.raises(
        RewardError,
        match=r"must return a list .*, got a value of type \w+ for the batch of 2 rows that begins with prompt 0",
    ):
        score(lambda completions: returned, draw(["a", "b"]))


def test_a_column_vector_is_no_list_of_numbers():
    with pytest.raises(RewardError, match="got a value of type list for row 0"):
        score(lambda completions: torch.zeros(2, 1), draw(["a", "b"]))


def test_a_wrong_number_of_values_is_an_error():
    with pytest.raises(RewardError, match="must return one value a row, got 1 for the batch of 2 rows"):
        score(lambda completions: [1.0], draw(["a", "b"]))


def test_an_exception_names_function_line_and_batch_and_stays_the_cause():
    def fails(completions):
        return [1 / 0]

    with pytest.raises(RewardError) as caught:
        score(fails, draw(["a"], [Prompt(4, [{"role": "user", "content": "long\n " * 50}])]))
    line = fails.__code__.co_firstlineno + 1
    said = str(caught.value)
    assert said.startswith(
        f"Reward 'fails' raised ZeroDivisionError (division by zero) at test_mixing.py, line {line},"
    )
    assert "batch of 1 rows that begins with prompt 4 ('long long long" in said
    assert "\n" not in said
    assert len(said) < 250
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_row_to_which_no_function_applies_is_an_error():
    with pytest.raises(RewardError, match=r"applies to row 1, prompt 1 \('question 1'\)"):
        score([lambda completions: [1, None], constant(None)], draw(["a", "b"]), weights=[0.0, 1.0])
    assert score([constant(1), constant(None)], draw(["a"]), weights=[0.0, 1.0]).total.tolist() == [0.0]


def test_a_verifiers_own_input_error_reaches_the_user_unwrapped():
    with pytest.raises(InputError, match=r"'exact_match' reads the column 'solution'.*answer") as caught:
        score(ExactMatch(column="solution"), draw(["a"]))
    assert caught.value.__cause__ is None


def test_coroutine_rewards_run_side_by_side():
    both = asyncio.Barrier(2)  # passed only if the two wait for each other

    async def first(completions):
        await asyncio.wait_for(both.wait(), 10)
        return [1.0]

    async def second(completions):
        await asyncio.wait_for(both.wait(), 10)
        return [2.0]

    assert score([first, constant(4), second], draw(["a"])).total.tolist() == [7.0]


def test_coroutine_rewards_work_inside_a_running_loop_and_keep_their_loop():
    loops = []

    async def reward(completions):
        loops.append(asyncio.get_running_loop())
        return [1.0]

    async def notebook():
        return score(reward, draw(["a"])).total.tolist()

    assert asyncio.run(notebook()) == asyncio.run(notebook()) == score(reward, draw(["a"])).total.tolist() == [1.0]
    assert len(set(loops)) == 1


@pytest.mark.filterwarnings("error")
def test_a_failing_coroutine_or_a_failure_beside_one_is_a_reward_error():
    async def fails(completions):
        raise ValueError("no answer.")

    def fails_at_once(completions):
        raise KeyError("answer")

    with pytest.raises(RewardError, match=r"'fails' raised ValueError \(no answer\) at .* 1 rows") as caught:
        score([constant(1), fails], draw(["a"]))
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(RewardError, match="'fails_at_once' raised KeyError"):
        score([fails, fails_at_once], draw(["a"]))


def test_the_meter_counts_rows_times_functions():
    meter = Meter()
    Rewards([constant(1), constant(2)])(draw(["a", "b", "c"]), meter)
    assert meter.spent.reward_calls == 6


def test_no_rows_call_nothing():
    meter = Meter()
    scored = Rewards(lambda completions: time.sleep(60))(draw([]), meter)
    assert scored.total.shape == (0,)
    assert scored.each.shape == (0, 1)
    assert meter.spent.reward_calls == 0


def test_names_are_unique_and_come_from_functions_partials_and_objects():
    def judge(completions, scale=1):
        return [scale] * len(completions)

    def judge_2(completions):
        return [0] * len(completions)

    double = functools.partial(judge, scale=2)
    rewards = Rewards([judge, judge_2, double, exact_match])
    assert rewards.names == ("judge", "judge_2", "judge_3", "exact_match")
    assert rewards(draw(["0"]), Meter()).each.tolist() == [[1.0, 0.0, 2.0, 1.0]]


@pytest.mark.parametrize(
    ("functions", "weights", "said"),
    [
        ([], None, "at least one"),
        (["reward"], None, "got 'reward'"),
        (ExactMatch, None, "callable object, got <class"),
        ([constant(1)], [1.0, 2.0], "as many as the functions .*, got 2 for 1"),
        ([constant(1)], [float("nan")], "finite"),
    ],
)
def test_functions_and_weights_that_do_not_match_are_refused(functions, weights, said):
    with pytest.raises(InputError, match=said):
        Rewards(functions, weights)


def test_completion_ids_are_offered_only_where_actions_are_tokens():
    drawn = draw(["a"])
    latents = make(torch.zeros(1, 3, 5), torch.zeros(1, 3), torch.ones(1, 3))
    with pytest.raises(InputError, match="requires 'completion_ids'"):
        score(lambda completion_ids: [1.0], Drawn(latents, drawn.samples, drawn.prompts))
