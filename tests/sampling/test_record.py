"""Rows that others draw: by hand through a public record, or whole by an engine behind the process."""

import pytest
import torch

from stepwell.errors import InputError
from stepwell.meter import Meter
from stepwell.process.abilities import Generated
from stepwell.process.base import Samples, Steps
from stepwell.process.exact.table import TabularLanguage, markov
from stepwell.rng import Rng
from stepwell.sampling.record import Record
from stepwell.sampling.request import Prompt, Request, SamplerChanges
from stepwell.sampling.rollout import rollout

MODEL = markov(symbols=3, length=4, prompts=2, seed=1)
FIRST, SECOND = Prompt(0, 0), Prompt(1, 1)


def assert_same(found, expected):
    assert [name for name, _ in found.trajectories.present()] == [n for n, _ in expected.trajectories.present()]
    for name, value in expected.trajectories.present():
        if name != "condition":
            assert torch.equal(getattr(found.trajectories, name), value), name
    assert torch.equal(found.trajectories.condition["prompt"], expected.trajectories.condition["prompt"])
    assert found.samples == expected.samples
    assert found.prompts == expected.prompts


# a record of one's own


def test_rows_of_ones_own_become_trajectories_through_a_record():
    """A loop over the process's contract, put on record step by step, gives the rows of the house's own loop."""
    requests, owner, rng = [Request(FIRST, 2), Request(SECOND, 1)], torch.tensor([0, 0, 1]), Rng(3)
    record, rows = Record(requests, owner), torch.arange(3)
    state = MODEL.start([request.prompt.value for request in requests], rng)[owner]
    with torch.no_grad():
        for step in range(4):
            distribution = MODEL.propose(state)
            action = distribution.sample(rng)
            record.add(rows, step, action, distribution.log_prob(action), distribution.random)
            state = MODEL.advance(state, action, rng)
            record.end(rows[state.done], MODEL.finish(state[state.done.nonzero()[:, 0]]))
            state, rows = state[(~state.done).nonzero()[:, 0]], rows[~state.done]
            if len(rows) == 0:
                break
    assert_same(record.drawn(MODEL, version=2), rollout(MODEL, requests, Rng(3), version=2))


def test_weights_on_record_are_the_rows_log_weights():
    record = Record([Request(FIRST, 2)], torch.zeros(2, dtype=torch.long))
    record.add_rows([torch.tensor([1, 0]), torch.tensor([2])], [torch.zeros(2).double(), torch.zeros(1).double()])
    record.weigh(torch.tensor([1]), torch.tensor([0.25]))
    record.weigh(torch.tensor([0, 1]), torch.tensor([1.0, 0.5]))
    record.end(torch.tensor([1, 0]), Samples([(2,), (1, 0)]))
    drawn = record.drawn(MODEL)
    assert drawn.trajectories.weight.tolist() == [1.0, 0.75]
    assert drawn.samples.values == [(1, 0), (2,)]


def test_whole_rows_may_say_which_of_their_steps_were_random():
    record = Record([Request(FIRST, 2)], torch.zeros(2, dtype=torch.long))
    random = [torch.tensor([True, False]), torch.tensor([False])]
    record.add_rows([torch.tensor([1, 0]), torch.tensor([2])], [torch.tensor([-1.0, -2]), torch.tensor([-3.0])], random)
    rows = record.drawn(MODEL).trajectories
    assert rows.mask.tolist() == [[True, False], [False, False]]
    assert rows.log_prob.tolist() == [[-1.0, 0.0], [0.0, 0.0]]
    assert rows.length.tolist() == [2, 1]


# an engine behind the process


class Engine(TabularLanguage):
    """The table, which draws whole rows by itself and counts how often it was asked to."""

    def __init__(self, hotter=0.0):
        super().__init__(MODEL.logits.detach(), MODEL.length)
        self.calls, self.hotter = [], hotter

    def generate(self, requests, rng):
        self.calls.append([request.count for request in requests])
        inner = TabularLanguage(self.logits.detach() * (1 - self.hotter), self.length)
        inner.meter = self.meter
        drawn = rollout(inner, requests, rng)
        lengths, answers = drawn.trajectories.length.tolist(), []
        for row, length in enumerate(lengths):
            action, log_prob = drawn.trajectories.action[row, :length], drawn.trajectories.log_prob[row, :length]
            columns = {"completion_ids": drawn.samples.columns["completion_ids"][row]}
            answers.append(Generated(action, log_prob, drawn.samples.values[row], columns))
        return [[answers.pop(0) for _ in range(request.count)] for request in requests]


@pytest.mark.parametrize(
    ("samples", "name"),
    [
        (Samples([(0,)]), "values"),
        (Samples([(0,), (1,)], {"score": [1.0]}), r"columns\['score'\]"),
        (Samples([(0,), (1,)], truncated=[True]), "truncated"),
        (Samples([(0,), (1,)], steps=Steps(last=[torch.zeros(3)])), r"steps\.last"),
    ],
)
def test_samples_that_are_not_one_for_each_row_are_refused(samples, name):
    record = Record([Request(Prompt(0, 0), 2)], torch.tensor([0, 0]))
    with pytest.raises(InputError, match=rf"Samples\.{name} must have an entry for each of the 2 rows .* got 1\."):
        record.end(torch.tensor([0, 1]), samples)


def test_an_engine_leaves_the_trajectories_that_drawing_step_by_step_would():
    requests = [Request(SECOND, 3), Request(FIRST, 2, source=4)]
    engine = Engine()
    found, expected = (rollout(process, requests, Rng(0), version=5) for process in (engine, MODEL))
    assert engine.calls == [[3, 2]]
    assert_same(found, expected)
    with torch.no_grad():
        scored = engine.score(found.trajectories).log_prob
    torch.testing.assert_close(scored, found.trajectories.log_prob, rtol=0, atol=1e-14)


def test_the_score_finds_an_engine_that_draws_from_another_model():
    rows = rollout(Engine(hotter=0.3), [Request(FIRST, 8)], Rng(0)).trajectories
    with torch.no_grad():
        assert float((MODEL.score(rows).log_prob - rows.log_prob).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "special",
    [
        {"window": (0, 2)},
        {"horizon": 2},
        {"proposal": lambda distribution, state, prompts: distribution},
        {"start": (0, 1)},
    ],
)
def test_rows_that_an_engine_cannot_draw_are_drawn_step_by_step(special):
    engine, so_far = Engine(), rollout(MODEL, [Request(FIRST, 1)], Rng(1)).trajectories
    requests = [Request(FIRST, 2, **special), Request(SECOND, 3)]
    drawn = rollout(engine, requests, Rng(0), so_far=so_far)
    assert engine.calls == [[3]]
    assert drawn.trajectories.prompt.tolist() == [0, 0, 1, 1, 1]
    with torch.no_grad():
        scored = engine.score(drawn.trajectories).log_prob
    torch.testing.assert_close(scored, drawn.trajectories.log_prob, rtol=0, atol=1e-14)


def test_an_engine_is_asked_for_so_many_rows_at_once():
    engine = Engine()
    rollout(engine, [Request(FIRST, 2), Request(SECOND, 2), Request(FIRST, 1)], Rng(0), rows_at_once=3)
    assert engine.calls == [[2], [2, 1]]


def test_rows_that_an_engine_cut_short_are_truncated_judged_or_not():
    class Cut(Engine):
        def generate(self, requests, rng):
            row = Generated(torch.tensor([1, 2]), torch.zeros(2).double(), (1, 2), truncated=True)
            return [[row] * request.count for request in requests]

    requests = [Request(FIRST, 2), Request(SECOND, 1, judged=False)]
    drawn = rollout(Cut(), requests, Rng(0))
    assert drawn.trajectories.truncated.tolist() == [True] * 3
    assert drawn.trajectories.outcome.tolist() == [True, True, False]
    assert drawn.samples.values == [(1, 2), (1, 2), None]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[:1], "Wrong.generate must return a list of rows for each of 2 requests, got 1"),
        (lambda rows: [rows[0], rows[1][:-1]], "Wrong.generate must return 3 rows for prompt 1, got 2"),
        (lambda rows: [rows[0], rows[1] * 2], "Wrong.generate must return 3 rows for prompt 1, got 6"),
    ],
)
def test_an_engine_that_returns_other_numbers_of_rows_is_named(change, said):
    class Wrong(Engine):
        def generate(self, requests, rng):
            return change(super().generate(requests, rng))

    with pytest.raises(InputError, match=said):
        rollout(Wrong(), [Request(FIRST, 2), Request(SECOND, 3)], Rng(0))


# settings of the sampler for some rows


class Tempered(TabularLanguage):
    """The table at a temperature, which counts the batches that it proposes for."""

    def __init__(self, logits, temperature=1.0, count=None):
        super().__init__(logits, MODEL.length)
        self.temperature, self.count = temperature, [] if count is None else count

    def with_sampler(self, temperature=1.0, label=""):
        return Tempered(self.logits.detach(), temperature, self.count)

    def propose(self, state):
        self.count.append((self.temperature, len(state)))
        distribution = super().propose(state)
        return type(distribution)(distribution.logits / self.temperature)


def first_batches(*samplers):
    process = Tempered(MODEL.logits.detach())
    process.meter = Meter()
    rollout(process, [Request(FIRST, 2, sampler=sampler) for sampler in samplers], Rng(0))
    whole = [(temperature, rows) for temperature, rows in process.count if rows % 2 == 0]
    return whole[0], len({temperature for temperature, _ in process.count})


def test_rows_with_equal_settings_are_drawn_side_by_side():
    same = ({"temperature": 2.0, "label": "a"}, {"label": "a", "temperature": 2.0})
    assert first_batches(*same) == ((2.0, 4), 1), "the order of the names does not matter"
    assert first_batches({"temperature": 2.0}, {"temperature": 3.0}) == ((2.0, 2), 2)
    assert first_batches({"temperature": 2.0}, None) == ((2.0, 2), 2)


def test_settings_are_compared_by_value_and_lists_count_as_tuples():
    given = SamplerChanges({"times": [1.0, 0.5], "steps": 2})
    assert given == {"steps": 2, "times": (1.0, 0.5)}
    assert hash(given) == hash(SamplerChanges({"steps": 2, "times": (1.0, 0.5)}))
    assert given != {"steps": 3, "times": (1.0, 0.5)}
    assert Request(FIRST, sampler={"steps": 2}).sampler == Request(FIRST, sampler=SamplerChanges({"steps": 2})).sampler


def test_settings_that_cannot_be_compared_are_refused():
    with pytest.raises(InputError, match="Settings of a sampler must be hashable, got"):
        Request(FIRST, sampler={"times": {"a": [1]}})
