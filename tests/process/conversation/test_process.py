"""A language model in conversation: the laws of a process hold with tool output between turns, none of it trained."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parrot import OFTEN, PROMPTS, Build, Parrot, draw, talk

from stepwell import check
from stepwell.batch import Batch
from stepwell.check.tolerance import tolerance
from stepwell.credit.traces import GeneralisedAdvantage, RewardToGo
from stepwell.credit.turns import TurnReturns, Unpaid
from stepwell.distributions import Categorical
from stepwell.errors import CannotFork, InputError, LawBroken
from stepwell.meter import Meter
from stepwell.objective.ratio import Ratio
from stepwell.process.base import Scores
from stepwell.process.conversation.build import conversation
from stepwell.process.conversation.environment import environment_return
from stepwell.process.conversation.process import Conversation
from stepwell.process.conversation.state import ConversationState
from stepwell.process.language.build import language
from stepwell.rng import Rng
from stepwell.sampling.record import Drawn
from stepwell.sampling.request import Request
from stepwell.sampling.rollout import rollout
from stepwell.trajectories import count


def gap(process: Conversation, drawn: Drawn) -> float:
    rows = drawn.trajectories
    with torch.no_grad():
        return float(((process.score(rows).log_prob - rows.log_prob).abs() / (1 + rows.log_prob.abs())).max())


# the laws


@pytest.mark.parametrize("chat", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["text", "chat"])
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("qwen2", "float32"), ("gpt2", "float64"), pytest.param("gemma2", "float32", marks=pytest.mark.slow)],
)
def test_the_laws_of_a_process_hold(small_language: Build, architecture: str, dtype: str, chat: bool) -> None:
    process = talk(small_language, architecture, chat, dtype=dtype, max_new_tokens=20)
    prompts: list[Any] = [[{"role": "user", "content": text}] for text in PROMPTS] if chat else list(PROMPTS)
    report = check.process(process, prompts)
    assert set(report.skipped) == {"exact law"}


def tiny(make: Callable[[], Any], symbols: int = 3, length: int = 5, **settings: Any) -> Conversation:
    """A model of so few tokens that every conversation can be written down; `<end>`, the last of them, ends a turn."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate([*"ab"[: symbols - 1], "<end>"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<end>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": None}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=symbols, eos_token_id=words["<end>"], **sizes))
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.5)
    return conversation(language(model, tokenizer, dtype="float64", max_new_tokens=length), make, **settings)


class Counter:
    """Answers with one b for each a in the message; over when the message has a b."""

    def reset(self, prompt: Any) -> str:
        return "a" if prompt == "b" else ""

    def step(self, message: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return " ".join("b" for _ in range(message.split().count("a"))), 0.5, "b" in message, False, {}


def test_the_distribution_of_whole_conversations_is_exact() -> None:
    report = check.process(tiny(Counter, length=4, max_turns=3), ["a b", "b"])
    assert not report.skipped
    assert max(report.measured.values()) < 1e-12


class ForgetsToWait(Conversation):
    """Counts what the environment said as the model's own choice."""

    def propose(self, state: ConversationState) -> Any:
        honest = super().propose(state)
        given = state.given
        everything = torch.zeros(len(given), len(self.encoder.tokenizer)).double()
        return honest if bool((given < 0).all()) else Categorical(everything)


class ScoresToolOutput(Conversation):
    """Scores every token there is."""

    def score(self, trajectories: Any, needs: Any = (), context: Any = None, reference: Any = None) -> Scores:
        inside = torch.arange(trajectories.mask.shape[1]) < trajectories.length[:, None]
        return super().score(trajectories.replace(mask=inside), needs, context, reference)


class AnswersTheState(Conversation):
    """Steps the environment of a state in place, so that it hears messages of the states that follow."""

    def advance(self, state: Any, action: torch.Tensor, rng: Any) -> Any:
        for episode in state.episodes:
            own = episode.seat.environment
            episode.seat._take = lambda own=own: own
        return super().advance(state, action, rng)


class HidesToolOutput(Conversation):
    """Leaves what the environment said out of what is read."""

    def score(self, trajectories: Any, needs: Any = (), context: Any = None, reference: Any = None) -> Scores:
        action = trajectories.action.where(trajectories.mask, torch.zeros_like(trajectories.action))
        return super().score(trajectories.replace(action=action), needs, context, reference)


def as_a(mistake: Any, honest: Conversation) -> Any:
    wrong = object.__new__(mistake)
    vars(wrong).update(vars(honest))
    return wrong


class Tally(Counter):
    """A counter that counts all its messages, so that it has to be copied for a fork."""

    messages = 0

    def step(self, message: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.messages += 1
        return " ".join("b" for _ in range(self.messages)), 0.5, False, False, {}


@pytest.mark.parametrize(
    ("mistake", "make", "law"),
    [(ScoresToolOutput, Counter, "gradient"), (HidesToolOutput, Counter, "ratio"), (AnswersTheState, Tally, "rows")],
)
def test_a_mistake_with_tool_output_breaks_a_law(mistake: Any, make: Any, law: str) -> None:
    wrong = as_a(mistake, tiny(make, length=8))
    with pytest.raises(LawBroken, match=f"^The law '{law}' is broken"):
        check.process(wrong, ["a b", "b"], group=6)


def test_a_distribution_that_chooses_for_the_environment_is_refused() -> None:
    wrong = as_a(ForgetsToWait, tiny(Counter, length=8))
    with pytest.raises(InputError, match="observation tokens cannot be chosen"):
        draw(wrong, 8, ["a b", "b"])


# what is drawn


def test_the_environments_words_are_in_the_row_and_untrained(small_language: Build) -> None:
    drawn = draw(talk(small_language))
    rows = drawn.trajectories
    for row in range(len(drawn)):
        turns, ids = drawn.samples.columns["turns"][row], drawn.samples.columns["completion_ids"][row]
        first = ["x", "y"] if "f" in drawn.prompts[row].value else []
        own, words = rows.mask[row].tolist(), small_language().tokenizer.convert_ids_to_tokens(ids)
        assert words[: len(first)] == first
        place, wanted = len(first), [False] * len(first)
        for number, turn in enumerate(turns):
            spoken = next(i for i in range(place, len(ids)) if words[i] in [*OFTEN, "<eos>"]) + 1
            wanted += [True] * (spoken - place)
            assert turn["observation"] == " ".join("d e f g h".split()[: len(turn["message"].split()) % 5])
            answer = turn["observation"].split() if spoken < len(ids) or number + 1 < len(turns) else []
            assert words[spoken : spoken + len(answer)] == answer
            wanted += [False] * len(answer)
            place = spoken + len(answer)
        wanted += [True] * (len(ids) - len(wanted))
        assert own[: len(ids)] == wanted
        assert not rows.log_prob[row][~rows.mask[row]].any()
    assert int((~rows.mask & (rows.node >= 0)).sum()) > 20


def test_turns_are_numbered_and_paid_at_their_last_token(small_language: Build) -> None:
    drawn = draw(talk(small_language))
    rows = drawn.trajectories
    several = 0
    for row in range(len(drawn)):
        turns, length = drawn.samples.columns["turns"][row], int(rows.length[row])
        segment, paid = rows.segment[row, :length], rows.step_reward[row]
        assert bool((segment.diff() >= 0).all())
        for number, turn in enumerate(turns):
            own = ((rows.segment[row] == number) & rows.mask[row]).nonzero()[:, 0]
            assert float(paid[own[-1]]) == pytest.approx(turn["reward"])
            assert not paid[own[:-1]].any()
        several += len(turns) > 1
        assert float(paid.sum()) == pytest.approx(drawn.samples.columns["environment_return"][row])
        assert not paid[~rows.mask[row]].any()
    assert several > 3


def test_rows_end_with_the_environment_or_are_truncated(small_language: Build) -> None:
    drawn = draw(talk(small_language, max_turns=2))  # the parrot wants three turns
    rows = drawn.trajectories
    assert rows.truncated.all()
    assert max(len(turns) for turns in drawn.samples.columns["turns"]) == 2
    drawn = draw(talk(small_language, max_new_tokens=40))
    over = torch.tensor([len(turns) == 3 for turns in drawn.samples.columns["turns"]])
    assert bool(over.any())
    assert torch.equal(drawn.trajectories.truncated, ~over)
    short = draw(talk(small_language, max_new_tokens=6)).trajectories
    assert int(short.mask.sum(1).max()) == 6
    assert bool((short.mask.gather(1, short.length[:, None] - 1)).all())  # no answer is begun without room to speak


def test_an_environment_that_cuts_short_truncates() -> None:
    class Cuts(Counter):
        def step(self, message: str) -> Any:
            return "", 1.0, False, True, {}

    drawn = draw(tiny(Cuts), 4, ["a", "b"])
    assert drawn.trajectories.truncated.all()
    assert all(len(turns) <= 1 for turns in drawn.samples.columns["turns"])


def test_an_environment_that_never_ends_is_ended(small_language: Build) -> None:
    drawn = draw(talk(small_language, make=lambda: Parrot(10**9), max_turns=3, max_new_tokens=50))
    assert drawn.trajectories.truncated.all()
    assert {len(turns) for turns in drawn.samples.columns["turns"]} <= {0, 1, 2, 3}


def test_a_text_may_end_a_turn(small_language: Build) -> None:
    drawn = draw(talk(small_language, stop=["t", "d w"], eos=(), max_new_tokens=40))
    messages = [turn["message"] for turns in drawn.samples.columns["turns"] for turn in turns]
    assert sum(message.endswith(("t", "d w")) for message in messages) > 3


def test_a_chat_is_written_by_its_template(small_language: Build) -> None:
    process = talk(small_language, chat=True, role="system", max_new_tokens=40)
    chat = [{"role": "user", "content": "f g"}]
    drawn = draw(process, 4, [chat])
    row = next(i for i, turns in enumerate(drawn.samples.columns["turns"]) if len(turns) > 1)
    value, turns = drawn.samples.values[row], drawn.samples.columns["turns"][row]
    assert [message["role"] for message in value[:3]] == ["assistant", "system", "assistant"]
    assert value[1]["content"] == turns[0]["observation"]
    whole = process.encoder.tokenizer.decode(drawn.samples.columns["completion_ids"][row])
    said = turns[0]["observation"]
    assert whole.startswith("<system> x y <assistant>")
    assert f"<system> {said} <assistant>".replace("  ", " ") in whole
    assert process.encoder.tokenizer.decode(drawn.trajectories.condition["prompt_ids"][row]).endswith("<user> f g")


def test_the_models_own_end_of_turn_is_not_written_twice(make_model: Any, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <turn> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    model = language(make_model("gpt2"), tokenizer, max_new_tokens=30, eos=["<turn>", "a", "b"])
    process = conversation(model, Parrot)
    answer = process.encoder.answer("d e", True, 3)
    assert tokenizer.convert_ids_to_tokens(answer) == ["<user>", "d", "e", "<turn>", "<assistant>"]
    answer = process.encoder.answer("d e", True, 8)  # its turn ended otherwise, so the template's end comes first
    assert tokenizer.convert_ids_to_tokens(answer)[0] == "<turn>"


# cost


def test_the_environments_words_are_read_at_once(small_language: Build) -> None:
    class Long(Parrot):
        def step(self, message: str) -> Any:
            return "d e f g h d e f g h", 0.0, False, False, {}

    process = talk(small_language, make=Long, max_new_tokens=60, eos=["a"])
    spent = lambda act: (begin := process.meter.spent, act(), process.meter.spent - begin)[2]  # noqa: E731
    state, rng = process.start(["b"], Rng(0)), Rng(0)
    process.propose(state)
    state = process.advance(state, torch.tensor([8]), rng)
    for _ in range(10):
        proposed = process.propose(state)
        assert not proposed.random.any()
        assert spent(lambda: process.propose(state)).model_evaluations == 0  # noqa: B023
        state = process.advance(state, proposed.sample(rng), rng)
    cost = spent(lambda: process.propose(state))
    assert (cost.model_evaluations, cost.forward) == (1, 11)  # the token that ended the turn, and all of the answer
    before = process.meter.spent
    rows = draw(process, 4).trajectories
    cost = process.meter.spent - before
    prompts = sum(len(text.split()) for text in PROMPTS)
    assert cost.forward <= prompts + int((rows.length - 1).sum())


def test_rows_that_wait_and_rows_that_speak_keep_their_own_cache(small_language: Build) -> None:
    for architecture in ("gpt2", "gemma2"):
        process = talk(small_language, architecture, max_new_tokens=40, max_turns=6, make=lambda: Parrot(6))
        drawn = draw(process, 6)
        assert gap(process, drawn) < tolerance(process.module)
        alone = [draw(process, 1, [text]) for text in PROMPTS]
        assert max(gap(process, one) for one in alone) < tolerance(process.module)


# forks


def test_branches_go_on_from_the_middle_of_a_turn_and_of_an_answer(small_language: Build) -> None:
    process = talk(small_language, max_new_tokens=40)
    drawn = draw(process)
    rows = drawn.trajectories
    row = next(i for i, turns in enumerate(drawn.samples.columns["turns"]) if len(turns) == 3)
    answers = (~rows.mask[row, : int(rows.length[row])]).nonzero()[:, 0]
    for step in {1, int(answers[0]), int(answers[-1]), int(rows.length[row]) - 1}:
        more = rollout(process, [Request(drawn.prompts[row], 3, start=(row, step))], Rng(step), so_far=rows)
        both = drawn + more
        assert gap(process, both) < tolerance(process.module)
        assert torch.equal(more.trajectories.action[:, :step], rows.action[row, :step].expand(3, step))
        assert torch.equal(more.trajectories.mask[:, :step], rows.mask[row, :step].expand(3, step))


class Locked(Parrot):
    """Holds what cannot be copied."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).made += 1
        self.lock = threading.Lock()


def test_an_environment_that_cannot_be_copied_serves_whole_groups(small_language: Build) -> None:
    """And refuses any other fork."""
    free, locked = talk(small_language), talk(small_language, make=Locked)
    Locked.made = 0
    assert draw(locked).samples.values == draw(free).samples.values
    assert Locked.made == 12  # one for each row
    state, rng = locked.start(["a b c d"], Rng(0)), Rng(0)
    state = locked.advance(state, torch.tensor([8]), rng)
    while not bool(locked.propose(state).random.any()):
        state = locked.advance(state, locked.propose(state).sample(rng), rng)
    locked.advance(state, torch.tensor([8]), rng)
    with pytest.raises(CannotFork, match=r"^The environment Locked cannot be copied \(TypeError: .*\.$"):
        locked.advance(state, torch.tensor([8]), rng)


def test_a_state_never_changes(small_language: Build) -> None:
    process, rng = talk(small_language), Rng(0)
    state = process.start(["b"], rng)
    first = process.advance(state, torch.tensor([8]), rng)
    again = process.advance(state, torch.tensor([8]), rng)
    assert len(first.episodes[0].turns) == len(again.episodes[0].turns) == 1
    assert state.episodes[0].seat.environment.heard == 0
    assert first.episodes[0].seat.environment.heard == 1


def test_rows_that_are_done_stay_as_they_are(small_language: Build) -> None:
    process, rng = talk(small_language, make=lambda: Parrot(1)), Rng(0)
    state = process.advance(process.start(["b", "c"], rng), torch.tensor([8, 20]), rng)  # "a" ends the first row's turn
    assert state.done.tolist() == [True, False]
    before, heard = process.finish(state[torch.tensor([0])]), state.episodes[0].seat.environment.heard
    for token in (8, 21):
        state = process.advance(state, torch.tensor([token, 22]), rng)
        assert process.finish(state[torch.tensor([0])]).values == before.values
        assert process.finish(state[torch.tensor([0])]).columns == before.columns
        assert state.episodes[0].seat.environment.heard == heard == 1
    assert state.text.length.tolist() == [1, 3]


def test_a_conversation_holds_its_model_and_its_twins_hold_twins_of_it(small_language: Build) -> None:
    model = small_language(chat=True, max_new_tokens=30, eos=OFTEN)
    process = conversation(model, Parrot)
    chat = [{"role": "user", "content": "a"}]
    assert model.encoder(chat) == [*process.encoder(chat), *process.encoder.opening(chat, None)]  # who opens the turn
    assert (process.module, process.meter) == (model.module, model.meter)
    valued, frozen, elsewhere = process.with_value_head(), process.frozen(), process.metered(Meter())
    assert "value" in valued.offers
    assert "value" not in process.offers
    rows = draw(process, 2, [chat]).trajectories
    before = process.meter.spent
    assert process.score(rows, {"kl"}, reference=frozen)["kl"].detach().abs().max() < tolerance(model.module)
    assert not frozen.score(rows).log_prob.requires_grad
    assert (process.meter.spent - before).model_evaluations == 3 * len(rows)  # the frozen one spends on the same meter
    before = process.meter.spent
    elsewhere.score(rows)
    assert process.meter.spent == before
    assert elsewhere.meter.spent.model_evaluations == len(rows)
    assert valued.score(rows, {"value"})["value"].shape == rows.mask.shape


# columns and gymnasium


def test_reset_gets_the_columns_it_names(small_language: Build) -> None:
    heard: list[Any] = []

    class Named(Parrot):
        def reset(self, prompt: Any, target: int) -> Any:
            heard.append((prompt, target))
            return None, {}

    class Everything(Parrot):
        def reset(self, prompt: Any, **columns: Any) -> Any:
            heard.append((prompt, columns))

    draw(talk(small_language, make=Named), 1, ["a"], target=5, other="x")
    draw(talk(small_language, make=Everything), 1, ["a"], target=5, other="x")
    assert heard == [("a", 5), ("a", {"target": 5, "other": "x"})]


def test_environments_of_gymnasium_come_in_by_the_same_door(small_language: Build) -> None:
    gymnasium = pytest.importorskip("gymnasium")

    class Guess(gymnasium.Env):  # type: ignore[misc, name-defined]
        observation_space = action_space = gymnasium.spaces.Text(100)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            super().reset(seed=seed)
            self.secret, self.options = "def"[int(self.np_random.integers(3))], options
            return f"x {self.secret}", {}

        def step(self, message: str) -> Any:
            return self.secret, float(self.secret in message), False, False, {}

    process = talk(small_language, make=Guess, max_turns=2)
    drawn = draw(process, 3, ["a", "b", "e", "g"])
    assert gap(process, drawn) < tolerance(process.module)
    assert len({text.split()[1] for text in drawn.samples.values}) > 1
    assert draw(process, 3, ["a", "b", "e", "g"]).samples.values == drawn.samples.values
    check.process(process, ["a", "b"])
    state = process.start_on(["a"], [{"seed": 3, "level": 2}], Rng(0))
    assert state.episodes[0].seat.environment.options == {"seed": 3, "level": 2, "prompt": "a"}


class Plain:
    """Written as for gymnasium, without it."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.given = seed, options
        return "x", {}

    def step(self, message: str) -> Any:
        return "y", 1.0, True, False, {}


def test_a_reset_with_gymnasiums_arguments_is_called_as_gymnasium_calls_it(small_language: Build) -> None:
    class AlmostTheirs(Plain):
        def reset(self, prompt: Any, *, seed: int, options: str) -> Any:  # columns of the data, of the same names
            self.given = seed, options

    for make, expected in ((Plain, (3, {"seed": 3, "options": "o", "prompt": "a"})), (AlmostTheirs, (3, "o"))):
        state = talk(small_language, make=make).start_on(["a"], [{"seed": 3, "options": "o"}], Rng(0))
        assert state.episodes[0].seat.environment.given == expected


# credit


def batch(build: Build) -> tuple[Conversation, Batch, Drawn]:
    process = talk(build, "gpt2", dtype="float64", max_new_tokens=40)
    drawn = draw(process, 6)
    rows = drawn.trajectories
    reward = torch.tensor(environment_return(drawn.samples.columns["environment_return"]), dtype=torch.float64)
    return process, Batch(rows.replace(reward=reward), count(rows)), drawn


def returns(drawn: Drawn, row: int, gamma: float) -> list[float]:
    rewards = [turn["reward"] for turn in drawn.samples.columns["turns"][row]]
    return [sum(gamma**j * r for j, r in enumerate(rewards[k:])) for k in range(len(rewards))]


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_turn_returns_are_what_is_still_to_come(small_language: Build, gamma: float) -> None:
    _, whole, drawn = batch(small_language)
    credit = TurnReturns(gamma)(whole)
    assert not credit[~whole.rows.mask].any()
    for row in range(len(drawn)):
        wanted = [*returns(drawn, row, gamma), 0.0]  # a turn that was cut short earns nothing
        for step in whole.rows.mask[row].nonzero()[:, 0].tolist():
            assert float(credit[row, step]) == pytest.approx(wanted[int(whole.rows.segment[row, step])], abs=1e-12)


def test_the_outcome_is_paid_once(small_language: Build) -> None:
    """With values of 0 and lambda 1, generalised advantages are reward-to-go, and so are turn returns."""
    _, whole, _ = batch(small_language)
    wanted = TurnReturns()(whole)
    valued = Batch(whole.rows.replace(value=torch.zeros_like(whole.rows.log_prob)), whole.counts)
    assert torch.allclose(RewardToGo(reward=Unpaid())(whole), wanted, atol=1e-12)
    assert torch.allclose(GeneralisedAdvantage(lam=1.0, reward=Unpaid())(valued), wanted, atol=1e-12)
    assert not torch.allclose(RewardToGo()(whole), wanted, atol=0.1)  # the outcome on top of its own parts
    plain = Batch(whole.rows.replace(step_reward=None), whole.counts)
    assert torch.equal(Unpaid()(plain), whole.reward)
    at_the_end = TurnReturns()(plain)  # without step rewards all is earned at the end
    assert torch.allclose(at_the_end, (whole.reward[:, None] * whole.mask), atol=1e-12)


def test_a_ratio_of_turns_is_the_mean_over_each_turns_own_tokens(small_language: Build) -> None:
    process, whole, _ = batch(small_language)
    with torch.no_grad():
        for parameter in process.module.parameters():
            parameter.mul_(1.02)
        present = process.score(whole.rows).log_prob
    moved = Batch(whole.rows, whole.counts, Scores(present))
    found, mask = Ratio("turn")(moved), whole.rows.mask
    difference = present - whole.rows.log_prob
    for row in range(len(mask)):
        for number in whole.rows.segment[row][mask[row]].unique().tolist():
            own = mask[row] & (whole.rows.segment[row] == number)
            assert torch.allclose(found[row][own], difference[row][own].mean(), atol=1e-12)


def test_training_moves_the_model_and_its_copies_stay(small_language: Build, tmp_path: Any) -> None:
    import stepwell as sw

    process = talk(small_language, max_new_tokens=20)
    data = [{"prompt": text} for text in PROMPTS]
    settings = {"steps": 2, "group_size": 4, "prompts_per_step": 2, "learning_rate": 1e-3, "progress": False}
    run = sw.train(process, data, environment_return, "grpo", out=tmp_path / "run", **settings)
    assert run.steps == 2
    assert isinstance(run.process.frozen(), Conversation)


@pytest.mark.parametrize(
    "method", ["ppo", "full-step-dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gspo", "empg"))]
)
def test_methods_of_every_kind_of_credit_train_on_conversations(small_language: Build, method: str) -> None:
    import stepwell as sw

    data = [{"prompt": text} for text in PROMPTS]
    settings = {"steps": 2, "group_size": 4, "prompts_per_step": 2, "learning_rate": 1e-3, "progress": False}
    run = sw.train(talk(small_language, max_new_tokens=20), data, environment_return, method, **settings)
    assert run.steps == 2
