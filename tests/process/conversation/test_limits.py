"""The limits of a conversation: tokens of all turns, tokens of one turn, the model's positions; and cut messages."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from chatty import ASK, CLOSING, KINDS, chatty, likely, shown
from parrot import draw, talk

import stepwell as sw
from stepwell import check
from stepwell.check.tolerance import tolerance
from stepwell.errors import InputError
from stepwell.process.conversation.build import conversation
from stepwell.rng import Rng
from stepwell.sampling.request import Completion, Prompt, Request
from stepwell.sampling.rollout import rollout

WORDS = "You said something that is longer than all that the model may say."


class Talker:
    """Answers at length, for ever."""

    heard: list[str] = []  # noqa: RUF012

    def reset(self, prompt: Any) -> None:
        return None

    def step(self, message: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.heard.append(message)
        return WORDS, 1.0, False, False, {}


def speaks(kind: str = "chatml", *, says: tuple[str, ...] = ("a", "b"), **settings: Any) -> Any:
    own = {name: settings.pop(name) for name in ("max_new_tokens", "positions") if name in settings}
    process = chatty(kind, **own)
    likely(process, *says)
    return conversation(process, Talker, **settings)


def rows_of(process: Any, prompt: Any = ASK, count: int = 3) -> Any:
    Talker.heard = []
    return rollout(process, [Request(Prompt(0, prompt), count)], Rng(0))


@pytest.mark.parametrize("prompt", [ASK, "Say blue."], ids=["chat", "text"])
def test_only_what_the_model_draws_counts(prompt: Any) -> None:
    process = speaks(says=("a", "b", "<|im_end|>"), max_new_tokens=12, positions=4000, max_turns=100)
    rows = rows_of(process, prompt, 8).trajectories
    assert rows.mask.sum(1).tolist() == [12] * 8
    assert bool(rows.truncated.all())
    assert int(rows.length.max()) > 12 + len(WORDS)
    assert torch.allclose(process.score(rows).log_prob, rows.log_prob, atol=tolerance(process.language.module))


@pytest.mark.parametrize("kind", KINDS)
def test_a_turn_that_is_as_long_as_it_may_be_is_closed_for_the_model(kind: str) -> None:
    process = speaks(kind, max_turn_tokens=4, max_new_tokens=11, positions=4000)
    drawn = rows_of(process)
    rows = drawn.trajectories
    assert rows.mask.sum(1).tolist() == [11] * 3  # 4 and 4 and 3
    assert [len(turns) for turns in drawn.samples.columns["turns"]] == [2] * 3
    assert all(len(message) == 4 for message in Talker.heard)
    answer = [{"role": "assistant", "content": "MMMM"}, {"role": "user", "content": WORDS}]
    whole = process.encoder.tokenizer.apply_chat_template([*ASK, *answer], add_generation_prompt=True, tokenize=False)
    after = whole.rpartition("MMMM")[2]
    assert after.startswith(CLOSING[kind])
    for row in range(3):
        text = shown(process, drawn.samples.columns["completion_ids"][row])
        first, second = (turn["message"] for turn in drawn.samples.columns["turns"][row])
        opened = process.encoder.tokenizer.apply_chat_template(ASK, add_generation_prompt=True, tokenize=False)
        bare = process.encoder.tokenizer.apply_chat_template(ASK, tokenize=False)
        assert text.startswith(opened.removeprefix(bare) + first + after + second + after)
        length = int(rows.length[row])
        given = shown(process, rows.action[row, :length][~rows.mask[row, :length]])
        assert CLOSING[kind] in given  # nothing trains on the closing that the model did not write


def test_a_turn_ends_by_itself_before_it_is_too_long() -> None:
    process = speaks(says=("<|im_end|>",), max_turn_tokens=1, max_new_tokens=3, positions=4000, max_turns=3)
    drawn = rows_of(process)
    text = shown(process, drawn.samples.columns["completion_ids"][0])
    assert text.count("<|im_end|>") == 2 * 2 + 1  # the model's own and the user's, none written twice
    assert [len(turns) for turns in drawn.samples.columns["turns"]] == [3] * 3


@pytest.mark.parametrize("drawn_end", ["<|im_end|>", "<|endoftext|>"])
def test_an_end_that_was_drawn_is_neither_doubled_nor_lost(drawn_end: str) -> None:
    process = speaks(says=(drawn_end,), max_new_tokens=8, positions=4000, max_turns=2)
    drawn = rows_of(process)
    text = shown(process, drawn.samples.columns["completion_ids"][0])
    joint = (
        "<|im_end|>\n<|im_start|>user\n" if drawn_end == "<|im_end|>" else f"{drawn_end}<|im_end|>\n<|im_start|>user\n"
    )
    assert text.count(joint) == 1
    assert "<|im_end|><|im_end|>" not in text


def test_an_end_that_begins_the_next_message_is_written_once() -> None:
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    more = ("<|user|>", "<|assistant|>")
    process = chatty("chatml", template=template, more=more, eos=["<|user|>"], positions=4000, max_new_tokens=8)
    likely(process, "<|user|>")
    drawn = rows_of(conversation(process, Talker, max_turns=3))
    text = shown(process, drawn.samples.columns["completion_ids"][0])
    assert text == "<|assistant|><|user|>" + f"{WORDS}<|assistant|><|user|>" * 2


@pytest.mark.parametrize("first", [None, "noon"])
def test_words_that_the_template_leaves_out_are_refused(first: str | None) -> None:
    template = "{% for m in messages if m.role != 'tool' %}{{ m.content + '<|im_end|>' }}{% endfor %}"

    class Tool(Talker):
        def reset(self, prompt: Any) -> str | None:
            return first

    process = chatty("chatml", template=template, positions=4000, max_new_tokens=8)
    likely(process, "<|im_end|>")
    with pytest.raises(
        InputError, match=r"template leaves out the .*observation .*, of the role 'tool', which the model"
    ):
        rows_of(conversation(process, Tool, role="tool"))


def test_a_demonstration_cannot_open_a_turn_in_a_conversation() -> None:
    request = Request(Prompt(0, ASK), 1, start=Completion([{"role": "assistant", "content": "blue"}]))
    with pytest.raises(
        InputError, match="must follow a plain text in a conversation with an environment, got the chat"
    ):
        rollout(speaks(max_new_tokens=8), [request], Rng(0))
    plain = Request(Prompt(0, "Say "), 1, start=Completion("blue"))
    ids = rollout(speaks(max_new_tokens=8), [plain], Rng(0)).samples.columns["completion_ids"][0]
    assert shown(speaks(), ids) == "blue<|endoftext|>"


def test_the_models_positions_bound_the_whole_row() -> None:
    process = speaks(says=("a", "b", "<|im_end|>"), max_new_tokens=500, positions=256, max_turns=100)
    rows = rows_of(process, count=8).trajectories
    prompt = int(rows.condition["prompt_mask"][0].sum())
    assert int(rows.length.max()) <= 256 - prompt + 1
    assert bool(rows.truncated.all())
    assert bool(rows.mask.gather(1, rows.length[:, None] - 1).all())  # no answer is begun without room to speak


def test_a_message_that_begins_with_given_words_is_continued() -> None:
    process = speaks(says=("a", "<|im_end|>"), max_new_tokens=6, positions=4000, max_turns=2)
    chat = [*ASK, {"role": "assistant", "content": "so"}]
    drawn = rows_of(process, chat)
    before = shown(process, drawn.trajectories.condition["prompt_ids"][0])
    assert before.endswith("<|im_start|>assistant\nso")
    assert bool(drawn.trajectories.mask[:, 0].all())  # there is nothing to open

    class Begins(Talker):
        def reset(self, prompt: Any) -> str:
            return "go"

    opened = conversation(process.language, Begins, max_turns=2)
    first = shown(opened, opened.encoder.opening(chat, "go"))
    assert first == "<|im_end|>\n<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n"


def test_tools_of_a_row_open_its_conversation() -> None:
    from stepwell.process.language.chat import Chat

    tools = [{"type": "function", "function": {"name": "clock"}}]
    rows = rows_of(speaks(max_new_tokens=2), Chat(ASK, tools)).trajectories
    words = speaks().encoder
    assert words.tokenizer.decode(rows.condition["prompt_ids"][0]).startswith("<|im_start|>system\nTools: clock")


def test_the_laws_hold_for_rows_longer_than_the_model_may_draw(small_language: Any) -> None:
    process = talk(small_language, "gpt2", max_new_tokens=8, max_turn_tokens=3, dtype="float64")
    report = check.process(process, ["a b c d", "f g"])
    assert set(report.skipped) == {"exact law"}
    rows = draw(process).trajectories
    assert int(rows.length.max()) > 8 >= int(rows.mask.sum(1).max())


def test_methods_train_on_rows_longer_than_the_model_may_draw(small_language: Any) -> None:
    for method in ("dr-grpo", "dapo"):
        process = talk(small_language, max_new_tokens=8, max_turn_tokens=3)
        settings = {"steps": 1, "group_size": 4, "prompts_per_step": 2, "learning_rate": 1e-3, "progress": False}
        run = sw.train(process, ["a b c d", "f g", "e"], sw.environment_return, method, **settings)
        assert run.steps == 1
    assert process.horizon == 8  # what the constant of Dr. GRPO divides by: the most tokens that train


@pytest.mark.parametrize("settings", [{"max_turn_tokens": 4}, {}], ids=["of a turn", "of a row"])
def test_conversations_of_nothing_but_cut_messages_warn_once(settings: dict[str, Any]) -> None:
    process = speaks(max_new_tokens=8, positions=4000, **settings)
    with pytest.warns(UserWarning, match="the model ended none of its messages by itself.*max_new_tokens=8 or") as said:
        rows_of(process, count=9)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows_of(process, count=9)
        rows_of(speaks(says=("a", "<|im_end|>"), max_new_tokens=9, positions=4000, **settings), count=9)
