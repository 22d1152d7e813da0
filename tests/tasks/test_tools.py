"""The tools task: the desk keeps its protocol, demonstrations solve their problems, and held-out problems stay out."""

import pytest
import torch

from stepwell.check.tolerance import tolerance
from stepwell.errors import InputError
from stepwell.process.conversation.build import conversation
from stepwell.process.language.build import language
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.tasks.registry import get_task
from stepwell.tasks.tools import (
    CHARACTERS,
    END,
    Desk,
    ToolsProblem,
    all_expressions,
    demonstration,
    demonstrations,
    problems_for,
    show,
    tools,
)
from stepwell.tasks.warm_start import WarmStart, _encoded, character_tokenizer, imitate

PROBLEM = ToolsProblem("c*a-f", {"c": 7, "a": 3, "f": 12})


def at_desk(cost=0.0):
    desk = Desk(cost)
    desk.reset(PROBLEM.prompt, values=PROBLEM.values, answer=PROBLEM.answer)
    return desk


@pytest.mark.parametrize(
    ("message", "said"),
    [("?c", ":7;"), ("?f", ":12;"), ("?g", ":?;"), ("?", ":?;"), ("=7*3-12", ":9;"), ("=2+", ":?;"), ("=c", ":?;")]
    + [("", ":?;"), ("c", ":?;"), ("7*3", ":?;"), ("=" + "9" * 9, ":?;")],
)
def test_the_desk_answers_what_it_can(message, said):
    observation, reward, terminated, truncated, _ = at_desk(0.25).step(message)
    assert (observation, reward, terminated, truncated) == (said, -0.25, False, False)


@pytest.mark.parametrize(("message", "reward"), [("!9", 1.0), ("!8", 0.0), ("!", 0.0), ("!09", 0.0), ("!7*3-12", 0.0)])
def test_an_answer_ends_and_only_the_right_one_earns(message, reward):
    assert at_desk(0.25).step(message)[1:3] == (reward, True)


def test_a_demonstration_solves_unless_it_guessed_wrongly():
    """The desk answers it as it says."""
    rng = Rng(0)
    for expression in all_expressions(3)[::97]:
        problem = problems_for([expression], 19, rng)[0]
        for guessed in ({}, {problem.names[1]: problem.values[problem.names[1]] + 1}):
            pieces = demonstration(problem, guessed)
            desk = Desk()
            desk.reset(problem.prompt, values=problem.values, answer=problem.answer)
            said = [text.removesuffix(END) for text, learnt in pieces if learnt]
            answers = [text for text, learnt in pieces[1:] if not learnt]
            for message, answer in zip(said[:-1], answers, strict=True):
                assert desk.step(message)[0] == answer
            believed = ToolsProblem(expression, {**problem.values, **guessed}).answer
            assert desk.step(said[-1])[1] == float(believed == problem.answer)
            assert guessed or believed == problem.answer


def test_haste_is_the_share_of_names_not_looked_up():
    made = demonstrations(all_expressions(3), 19, 0.3, 2000, Rng(0))
    looked_up = sum(text.startswith("?") for pieces in made for text, learnt in pieces if learnt)
    assert abs(looked_up / 6000 - 0.7) < 4 * (0.21 / 6000) ** 0.5  # four standard errors
    assert not any(
        text.startswith("?") for p in demonstrations(["a+b"], 9, 1.0, 20, Rng(0)) for text, learnt in p if learnt
    )


def test_only_what_the_model_says_is_learnt():
    tokenizer = character_tokenizer(CHARACTERS)
    ids, labels = _encoded(tokenizer, [demonstration(PROBLEM, {"a": 5}), demonstration(PROBLEM, {})])
    assert tokenizer.decode(labels[0][labels[0] >= 0]).replace(END, " ") == "?c ?f =7*5-12 !23 "
    assert torch.equal(labels[labels >= 0], ids[labels >= 0])
    assert tokenizer.unk_token_id not in ids


def test_training_and_held_out_expressions_are_disjoint():
    """They are the same every time."""
    first, second = tools(), get_task("tools")
    train, held = ({p.value for p in prompts} for prompts in (first.prompts, first.evaluation))
    assert not train & held
    assert len(held) == 300
    assert len(train | held) == len(all_expressions(3)) == 8 * 7 * 6 * 9
    assert [(p.value, p.columns) for p in first.evaluation] == [(p.value, p.columns) for p in second.evaluation]
    assert {p.value for p in tools(seed=1).evaluation} != held
    assert len({p.id for p in [*first.prompts, *first.evaluation]}) == len(train | held)


def test_a_short_warm_start_gives_conversations_with_untrained_tool_output(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPWELL_CACHE", str(tmp_path))
    task = tools(warm_steps=30)
    process = task.process()
    drawn = rollout(process, [Request(prompt, 4) for prompt in task.prompts[:8]], Rng(0))
    rows = drawn.trajectories
    with torch.no_grad():
        assert float((process.score(rows).log_prob - rows.log_prob).abs().max()) < tolerance(process.module)
    said = (rows.node >= 0) & ~rows.mask
    assert bool(said.any())
    assert int(rows.segment.max()) > 0
    again = tools(warm_steps=30).process()
    pairs = zip(process.module.parameters(), again.module.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_the_longest_conversation_can_be_learnt_by_heart(tmp_path):
    problem = ToolsProblem("a*b*c", {"a": 19, "b": 19, "c": 19})
    start = WarmStart(layers=1, hidden=32, intermediate=64, positions=64, steps=150, batch=4)
    imitate(tmp_path, start, CHARACTERS, [demonstration(problem, {})] * 4)
    longest = tools(warm_steps=1)
    limit = max(len("".join(text for text, _ in demonstration(problem, {})).replace(END, "E")), 1)
    process = conversation(language(tmp_path, max_new_tokens=64), Desk, max_turns=6)
    columns = {"values": problem.values, "answer": problem.answer}
    drawn = rollout(process, [Request(Prompt(0, problem.prompt, columns), 4)], Rng(0))
    assert drawn.samples.columns["environment_return"].count(1.0) >= 3
    assert limit < 64
    assert longest.settings


def test_a_report_says_what_is_wrong_with_an_answer():
    prompt = Prompt(0, PROBLEM.prompt, {"values": PROBLEM.values, "answer": PROBLEM.answer})
    assert show(prompt, "?c:7;=7*3-12:9;!9") == "?c:7;=7*3-12:9;!9"
    assert "it is 9" in show(prompt, "?c:7;!8")
    assert "no answer" in show(prompt, "?c:7;")


@pytest.mark.parametrize(
    "wrong", [{"names": 1}, {"names": 5}, {"highest": 1}, {"haste": 1.5}, {"cost": -1.0}, {"evaluation": 10**6}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(InputError):
        tools(**wrong)
