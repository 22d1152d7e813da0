"""A comparison is fair: one start, one budget, paired seeds; and one method's failure is its own."""

import dataclasses
import json

import pytest
import torch

import stepwell as sw
from stepwell import methods
from stepwell.comparison.report.page import write_report
from stepwell.comparison.report.runs import report_runs
from stepwell.comparison.results import Comparison
from stepwell.comparison.run import _score, compare
from stepwell.comparison.specs import parse_specs
from stepwell.errors import InputError, UnknownName
from stepwell.meter import Budget, Cost
from stepwell.sampling.request import Prompt
from stepwell.tasks.registry import Task, forget_task, get_task, task, tasks


@pytest.mark.parametrize(
    ("written", "labels"),
    [
        ("grpo", ["grpo"]),
        ("grpo, dr-grpo", ["grpo", "dr-grpo"]),
        ("grpo:clip=0.1,kl=0.05,gspo", ["grpo:clip=0.1,kl=0.05", "gspo"]),
        ("gspo:low=1e-3:high=2e-3,grpo", ["gspo:low=0.001,high=0.002", "grpo"]),
        (["grpo", "grpo:clip=0.1"], ["grpo", "grpo:clip=0.1"]),
    ],
)
def test_methods_are_read_with_their_options(written, labels):
    assert [spec.label for spec in parse_specs(written)] == labels
    assert [spec.label for spec in parse_specs(labels)] == labels


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("", "methods must name at least one, got none"),
        ("grop", "did you mean 'grpo'"),
        ("grpo:clop=0.1", "did you mean 'clip'"),
        ("grpo:clip", "has no value"),
        ("clip=0.1,grpo", "option without a method"),
        ("grpo:clip=big", "must be a number"),
        ("grpo,grpo", "given twice"),
    ],
)
def test_a_wrong_method_is_named_before_anything_is_trained(written, said, tiny):
    def never():
        raise AssertionError("trained")

    with pytest.raises(InputError, match=said):
        compare(dataclasses.replace(tiny, process=never), written, budget="2-steps", progress=False)


@pytest.mark.parametrize("budget", ["5-steps", "100-reward-calls", "700-tokens", "600-evaluations"])
def test_every_method_stops_at_the_step_that_reaches_the_budget(tiny, budget):
    """All methods have the same."""
    result = compare(tiny, "grpo,rloo", budget=budget, seeds=2, progress=False)
    whole = Budget.parse(budget)
    for entry in result.entries:
        for trial in entry.trials:
            spent = [whole.fraction(_cost(point), point["step"]) for point in trial.history]
            assert spent[-1] >= 1.0
            assert all(share < 1.0 for share in spent[:-1])
            assert trial.curve[0]["share"] == 0.0
            assert trial.curve[-1]["share"] == pytest.approx(spent[-1])
            assert trial.cost["reward_calls"] == trial.steps * 2 * 4  # judging is not on the bill


def _cost(point):
    units = [field.name for field in dataclasses.fields(Cost) if field.name != "wall_time"]
    return Cost(**{unit: point[f"cost/{unit}"] for unit in units}, wall_time=point["wall_time"])


@pytest.mark.filterwarnings("ignore:The run took")  # a slow machine may take long for a step,
@pytest.mark.filterwarnings("ignore:For 3 steps all samples")  # and a fast one make so many that all are alike
def test_a_budget_of_seconds_is_kept_without_the_time_of_judging(tiny):
    result = compare(tiny, "grpo", budget="0.3s", seeds=1, progress=False)
    trial = result.entries[0].trials[0]
    whole = Budget.parse("0.3s")
    assert whole.share(Cost(**trial.cost), trial.steps) >= 1.0
    assert all(whole.share(_cost(point), point["step"]) < 1.0 for point in trial.history[:-1])


def test_one_seed_is_the_same_run_for_all_and_another_seed_is_not(tiny):
    result = compare(tiny, "grpo,grpo:clip=0.2", budget="4-steps", seeds=2, progress=False)
    first, second = result.entries
    for one, other in zip(first.trials, second.trials, strict=True):
        assert one.start == other.start
        assert one.end == other.end
        assert [p["reward"] for p in one.history] == [p["reward"] for p in other.history]
    assert first.trials[0].history != first.trials[1].history


def test_methods_that_learn_score_above_the_start(tiny):
    result = compare(tiny, "rloo", budget="60-steps", seeds=1, evaluation_samples=16, progress=False)
    trial = result.entries[0].trials[0]
    assert sum(trial.end) != sum(trial.start)
    assert trial.history[-1]["reward"] > trial.history[0]["reward"]


def test_a_failing_method_loses_only_its_own_results(tiny, tmp_path):
    calls = []

    def fails(completions, prompts):
        calls.append(len(completions))
        if len(completions) == 15:  # only the method with five samples a prompt asks for so many
            raise ValueError("no disk")
        return [0.5 + (i % 2) / 4 for i, _ in enumerate(completions)]

    broken = dataclasses.replace(tiny, rewards=type(tiny.rewards)(fails), settings={"learning_rate": 0.1})

    @methods.method("five", title="Three prompts, five samples each")
    def five() -> sw.Recipe:
        from stepwell.planning.groups import Groups

        return methods.get("rloo").recipe().replace(planner=Groups(3, 5))

    try:
        result = compare(broken, "five,grpo", budget="2-steps", seeds=2, out=tmp_path, progress=False)
    finally:
        methods.forget("five")
    assert list(result.errors) == ["five"]
    assert "no disk" in result.errors["five"]
    assert [trial.seed for trial in result.entries[1].trials] == [0, 1]
    assert result.shared_seeds == [0, 1]
    assert Comparison.load(tmp_path).errors == result.errors


def test_a_comparison_is_read_back_as_it_was_written(tiny, tmp_path):
    result = compare(tiny, "grpo,rloo", budget="3-steps", seeds=[4, 9], out=tmp_path, progress=False)
    loaded = Comparison.load(tmp_path)
    assert loaded.seeds == [4, 9]
    assert loaded.entries == result.entries
    assert loaded.made["command"] == ""
    (tmp_path / "comparison.json").write_text('{"version": 1}')
    with pytest.raises(InputError, match="holds no comparison"):
        Comparison.load(tmp_path)


def test_costs_are_named_as_the_process_says(tiny, tmp_path):
    class Spelling(sw.exact.TabularLanguage):
        work = "symbols"

    def start():
        process = tiny.process()
        process.__class__ = Spelling
        return process

    named = dataclasses.replace(tiny, process=start)
    result = compare(named, "grpo", budget="2-steps", seeds=1, out=tmp_path, keep_runs=True, progress=False)
    assert (compare(tiny, "grpo", budget="2-steps", seeds=1, progress=False).work, result.work) == ("tokens", "symbols")
    assert Comparison.load(tmp_path).work == "symbols"
    folder = tmp_path / "runs" / "grpo" / "seed-0"
    assert json.loads((folder / "run.json").read_text())["work"] == "symbols"
    for page in (write_report(result, tmp_path / "one.html"), report_runs([folder], tmp_path / "two.html")):
        assert "symbols forward" in page.read_text()
        assert "tokens forward" not in page.read_text()


def test_runs_are_kept_where_asked_for(tiny, tmp_path):
    result = compare(tiny, "grpo:clip=0.1", budget="2-steps", seeds=1, out=tmp_path, keep_runs=True, progress=False)
    folder = tmp_path / "runs" / "grpo_clip=0.1" / "seed-0"
    assert result.entries[0].trials[0].model == str(folder)
    assert (folder / "metrics.jsonl").is_file()
    with pytest.raises(InputError, match="holds runs of an earlier comparison"):
        compare(tiny, "rloo,grpo:clip=0.1", budget="2-steps", seeds=1, out=tmp_path, keep_runs=True, progress=False)


@pytest.mark.parametrize(
    "wrong",
    [{"seeds": 0}, {"seeds": [1, 1]}, {"settings": {"learning_rat": 1}}, {"settings": {"steps": 3}}, {"budget": "soon"}]
    + [{"keep_runs": True}, {"evaluation_samples": 0}, {"options": {"numbers": 3}}, {"settings": {"group_size": 1}}]
    + [{"settings": {"learning_rate": "fast"}}, {"settings": {"group_size": 2.5}}, {"settings": {"minibatches": 9}}],
)
def test_wrong_requests_are_refused_before_anything_is_trained(tiny, wrong):
    with pytest.raises(InputError):
        compare(tiny, "grpo", **{"budget": "2-steps", "progress": False, **wrong})


def test_a_users_task_is_found_by_name(tiny):
    """An unknown task or option names the nearest."""

    @task("mine")
    def mine(size: int = 2) -> Task:
        """A task of my own."""
        return dataclasses.replace(tiny, name="mine", description=str(size))

    try:
        assert get_task("mine", size=5).description == "5"
        assert ("mine", "A task of my own.") in [(entry.name, entry.summary) for entry in tasks()]
        with pytest.raises(UnknownName, match="did you mean 'size'"):
            get_task("mine", sizes=5)
        with pytest.raises(InputError, match="Option 'size' of task mine must be a number, got 'big'"):
            get_task("mine", size="big")
    finally:
        forget_task("mine")
    with pytest.raises(UnknownName, match="did you mean 'countdown'"):
        get_task("count-down")


def test_the_command_that_is_reported_says_all_that_was_asked_for(tiny):
    @task("mine")
    def mine(size: int = 2) -> Task:
        return dataclasses.replace(tiny, name="mine", description=str(size))

    asked = {"options": {"size": 5}, "settings": {"learning_rate": 0.2}, "evaluation_samples": 3}
    try:
        result = sw.compare("mine", "rloo,grpo:clip=0.1", "2-steps", seeds=1, progress=False, **asked)
    finally:
        forget_task("mine")
    assert result.made["command"] == (
        "stepwell compare mine --methods rloo,grpo:clip=0.1 --budget 2-steps --seeds 1 --evaluation-samples 3 "
        f"--set size=5 --setting learning_rate=0.2 --plugin {__file__}"
    )


def test_a_task_that_trains_on_what_it_is_judged_by_is_refused(tiny):
    with pytest.raises(InputError, match="keep them apart"):
        dataclasses.replace(tiny, evaluation=[Prompt(9, 0)])


def test_a_score_has_the_standard_error_of_a_mean_and_one_prompt_has_none():
    assert _score(torch.tensor([1.0, 2.0, 6.0])) == pytest.approx({"score": 3.0, "error": (7 / 3) ** 0.5})
    assert _score(torch.tensor([2.0])) == {"score": 2.0, "error": 0.0}
