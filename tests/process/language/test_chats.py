"""Chats: end tokens, completions as the template writes them, continued messages, tools, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chatty import ASK, BOS, CLOSING, EOS, KINDS, chatty, shown, tokenizer

import stepwell as sw
from stepwell.data.prompts import load_prompts
from stepwell.errors import InputError
from stepwell.process.language import template as room
from stepwell.process.language.chat import Chat, is_chat
from stepwell.process.language.vocabulary import Vocabulary
from stepwell.rng import Rng
from stepwell.sampling.request import Completion, Prompt, Request
from stepwell.sampling.rollout import rollout

BLUE = [{"role": "assistant", "content": "blue"}]
ALL_ENDS = {
    "llama 3": ("<|end_of_text|>", "<|eot_id|>"),
    "chatml": ("<|im_end|>", "<|endoftext|>"),
    "gemma": ("<eos>", "<end_of_turn>"),
    "mistral": ("</s>",),
}


def refuse(call: Any, *words: str) -> str:
    with pytest.raises(InputError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said
    assert said[-1] in ".?"
    assert all(word in said for word in words), said
    return said


# end tokens


@pytest.mark.parametrize("declared", [True, False], ids=["all ends declared", "eos declared"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_demonstration_is_what_the_template_writes(kind: str, declared: bool) -> None:
    process = chatty(kind, ends=ALL_ENDS[kind] if declared else ())
    ids = process.encode_completion(BLUE, ASK).tolist()
    before = process.tokenizer.apply_chat_template(ASK, add_generation_prompt=True, tokenize=False)
    whole = process.tokenizer.apply_chat_template([*ASK, *BLUE], tokenize=False)
    assert whole.startswith(before)
    assert shown(process, process.encoder(ASK) + ids) == whole.removesuffix("\n")
    assert shown(process, ids[-1:]) == CLOSING[kind]
    assert process.encode_completion("blue", ASK).tolist() == ids
    assert ids[-1] in process.ends.tolist()
    assert shown(process, process.encode_completion("blue", "Say blue. ")) == "blue" + EOS[kind]
    assert shown(process, process.encode_completion("blue")) == "blue" + EOS[kind]
    assert process.encode_completion(BLUE).tolist() == ids  # a message without a prompt is a chat's


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_is_written_once(kind: str) -> None:
    process = chatty(kind, ends=ALL_ENDS[kind])
    ended = [{"role": "assistant", "content": f"blue{CLOSING[kind]}"}]
    assert process.encode_completion(ended, ASK).tolist() == process.encode_completion(BLUE, ASK).tolist()
    text = f"blue{EOS[kind]}"
    assert shown(process, process.encode_completion(text, "Say: ")) == text


def test_a_template_that_closes_nothing_leaves_it_to_the_end_of_sequence() -> None:
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    process = chatty("chatml", ends=ALL_ENDS["chatml"], template=plain)
    assert shown(process, process.encode_completion(BLUE, ASK)) == "blue<|endoftext|>"
    assert process.ends.tolist() == sorted(process.tokenizer.convert_tokens_to_ids(list(ALL_ENDS["chatml"])))


def test_the_templates_closing_ends_what_is_drawn() -> None:
    ends = chatty("chatml").ends.tolist()  # its settings list the end of sequence alone
    words = tokenizer("chatml")
    assert ends == sorted(words.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    two = "{% for m in messages %}{{ m.role + m.content + '<|im_end|><|im_start|>' }}{% endfor %}"
    assert chatty("chatml", template=two).ends.tolist() == [words.eos_token_id]


def test_a_tokenizer_without_an_end_of_sequence_ends_texts_as_the_model_says() -> None:
    from stepwell.process.language.build import language

    process = chatty("chatml", ends=("<|im_end|>", "<|endoftext|>"))
    words = tokenizer("chatml")
    words.eos_token = None
    bare = language(process.network.causal, words)
    assert shown(bare, bare.encode_completion("blue")) == "blue<|im_end|>"  # the first that it lists, not the lowest


THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% if '</think>' in m.content %}"
    "{{ '<think>\n' + m.content.split('</think>')[0].split('<think>')[-1].strip('\n') + '\n</think>\n\n' "
    "+ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ '<think>\n\n</think>\n\n' + m.content }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRIPS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def test_words_around_thoughts_are_the_templates_own() -> None:
    process = chatty("chatml", template=THINKS, max_new_tokens=80)
    ids = process.encode_completion([{"role": "assistant", "content": "<think>hm</think>blue"}], ASK)
    assert shown(process, ids) == "<think>\nhm\n</think>\n\nblue<|im_end|>"
    assert shown(process, process.encode_completion(BLUE, ASK)) == "<think>\n\n</think>\n\nblue<|im_end|>"


def test_a_template_that_strips_thoughts_leaves_a_completion_as_it_stands() -> None:
    process = chatty("chatml", template=STRIPS, max_new_tokens=80)
    thought = [{"role": "assistant", "content": "hm</think>blue"}]
    assert shown(process, process.encode_completion(thought, ASK)) == "hm</think>blue<|im_end|>"
    assert shown(process, process.encoder(ASK)).endswith("assistant\n<think>\n")


def test_a_thought_begins_once() -> None:
    process = chatty("chatml", template=STRIPS, max_new_tokens=80)
    for said in ("<think>\nhm</think>blue", "<think>hm</think>blue"):
        thought = [{"role": "assistant", "content": said}]
        assert shown(process, process.encode_completion(thought, ASK)) == "hm</think>blue<|im_end|>"
    begun = [*ASK, {"role": "assistant", "content": "<think>\nhm"}]
    for template in (STRIPS, THINKS):  # the second would write an empty thought before it
        other = chatty("chatml", template=template)
        assert shown(other, other.encoder(begun)).endswith("<|im_start|>assistant\n<think>\nhm")
    assert shown(process, process.encode_completion("!</think>blue", begun)) == "!</think>blue<|im_end|>"


def test_the_closing_is_what_stands_after_a_message_in_any_case() -> None:
    ends = "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"  # after the whole chat
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    opens = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    process = chatty("chatml", template=template + opens + ends)
    assert shown(process, process.encode_completion(BLUE, ASK)) == "blue<|im_end|>"
    assert shown(process, process.ends) in ("<|endoftext|><|im_end|>", "<|im_end|><|endoftext|>")


def test_demonstrations_are_taught_with_the_templates_end() -> None:
    process = chatty("chatml", ends=ALL_ENDS["chatml"])
    drawn = rollout(process, [Request(Prompt(0, ASK), 1, start=Completion(BLUE))], Rng(0))
    assert shown(process, drawn.samples.columns["completion_ids"][0]) == "blue<|im_end|>"
    assert drawn.samples.values == [BLUE]
    assert not drawn.trajectories.truncated.any()


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        ([*ASK, *BLUE], "one message of the assistant's, got messages of user, assistant"),
        (ASK, "one message of the assistant's, got messages of user"),
        ([{"role": "assistant", "content": [{"type": "image", "url": "x"}]}], "part of type 'image'"),
        (3, "must be a text or a list of messages, got 3"),
        ("a" * 40, "at most max_new_tokens=32 tokens, got 41"),
    ],
)
def test_a_completion_that_is_none_is_refused(completion: Any, said: str) -> None:
    refuse(lambda: chatty("chatml").encode_completion(completion, ASK), said)


# prompts


def test_no_prompt_ends_with_an_end() -> None:
    process = chatty("mistral", adds="<s> $A </s>")
    assert shown(process, process.encoder("hi")) == "<s>hi"
    assert shown(process, process.encoder("hi</s>")) == "<s>hi</s>"  # which the prompt says itself
    assert shown(process, process.encoder(ASK)) == "<s>[INST] Say blue.[/INST]"
    assert shown(chatty("chatml", adds="$A <|endoftext|>"), process.encoder("hi")[1:]) == "hi"


class Accented:
    """A tokenizer that writes texts themselves in another way once it ends them."""

    def __init__(self, words: Any):
        self.words = words

    def __getattr__(self, name: str) -> Any:
        return getattr(self.words, name)

    def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> Any:
        own = "#" + text[1:] + "<|endoftext|>" if add_special_tokens else text
        return self.words(own, add_special_tokens=False)


def test_an_end_goes_where_the_text_itself_is_written_otherwise() -> None:
    words = tokenizer("chatml")
    read = Vocabulary(Accented(words), len(words), (words.eos_token_id,))
    assert words.decode(read.prompt("hi")) == "#i"


@pytest.mark.parametrize("kind", BOS)
def test_a_prompt_begins_once(kind: str) -> None:
    process = chatty(kind, adds=f"{BOS[kind]} $A")
    assert shown(process, process.encoder("hi")) == f"{BOS[kind]}hi"
    assert process.encoder(f"{BOS[kind]}hi") == process.encoder("hi")
    rendered = process.tokenizer.apply_chat_template(ASK, add_generation_prompt=True, tokenize=False)
    assert process.encoder(rendered) == process.encoder(ASK)
    begun = [{"role": "user", "content": "hi"}]
    twice = chatty(kind, template="{{ bos_token }}{% for m in messages %}{{ bos_token + m.content }}{% endfor %}")
    assert shown(twice, twice.encoder(begun)).count(BOS[kind]) == 1


@pytest.mark.parametrize("said", ["Let me think:", " so ", "a\n"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_assistants_last_message_is_continued(kind: str, said: str) -> None:
    process = chatty(kind)
    chat = [*ASK, {"role": "assistant", "content": said}]
    wanted = process.tokenizer.apply_chat_template(chat, continue_final_message=True, tokenize=False)
    assert shown(process, process.encoder(chat)) == wanted
    assert not wanted.rstrip().endswith(CLOSING[kind])
    assert shown(process, process.encode_completion("blue", chat)) == "blue" + CLOSING[kind]


@pytest.mark.parametrize(
    "template",
    [
        STRIPS,  # drops what stands before </think>
        "{% for m in messages %}{% if loop.last and m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
        "{% for m in messages %}{{ m.role + ':' + (m.content | upper) + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    ],
    ids=["strips", "refuses", "changes"],
)
def test_what_the_template_would_change_is_continued_as_it_stands(template: str) -> None:
    process = chatty("chatml", template=template)
    chat = [*ASK, {"role": "assistant", "content": "hm</think>so"}]
    opened = process.tokenizer.apply_chat_template(ASK, add_generation_prompt=True, tokenize=False)
    assert shown(process, process.encoder(chat)) == opened + "hm</think>so"


def test_a_last_message_without_words_cannot_be_continued() -> None:
    chat = [*ASK, {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "clock"}}]}]
    refuse(lambda: chatty("chatml").encoder(chat), "the assistant's and has no text that could be continued")


# tools and variables


def clock(zone: str) -> str:
    """The time.

    Args:
        zone: The time zone.
    """
    return zone


SCHEMA = {"type": "function", "function": {"name": "dice", "description": "", "parameters": {"type": "object"}}}


def told(process: Any, prompt: Any) -> str:
    return shown(process, process.condition([prompt])["prompt_ids"][0])


def test_tools_reach_the_template_everywhere(tmp_path: Path) -> None:
    process = chatty("chatml", tools=[clock, SCHEMA])
    rows = [
        {"prompt": ASK},
        {"prompt": ASK, "tools": [SCHEMA]},
        {"prompt": ASK, "tools": json.dumps([SCHEMA])},
        {"prompt": ASK, "tools": ["clock"]},
        {"prompt": ASK, "tools": []},
        {"prompt": "plain", "tools": [SCHEMA]},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_prompts(tmp_path / "data.jsonl")
    heads = ["Tools: clock dice", "Tools: dice", "Tools: dice", "Tools: clock"]
    for prompt, head in zip(prompts, heads, strict=False):
        text = f"<|im_start|>system\n{head}<|im_end|>\n<|im_start|>user\nSay blue.<|im_end|>\n<|im_start|>assistant\n"
        assert told(process, prompt.value) == text
        process.check_prompt(prompt.value)
        assert process.start([prompt.value], Rng(0)).memory.columns == len(process.encoder(prompt.value))
    assert "Tools" not in told(process, prompts[4].value)
    assert told(process, prompts[5].value) == "plain"
    assert prompts[1].columns["tools"] == [SCHEMA]
    assert json.dumps(prompts[1].value) == json.dumps(ASK)
    assert prompts[1].value == ASK
    plain = chatty("chatml")
    assert "Tools: dice" in told(plain, prompts[1].value)
    refuse(lambda: plain.encoder(prompts[3].value), "The tool 'clock' of the prompt", "there is none")


def test_a_hint_is_told_of_the_tools_of_its_row() -> None:
    hinted = [{"role": "user", "content": "Say blue, which is a colour."}]

    def wrong(prompts: Any, completions: Any) -> list[float]:
        return [0.0] * len(prompts)

    process = chatty("chatml", max_new_tokens=4)
    start, read = process.start, []
    process.start = lambda prompts, rng: (read.extend(told(process, each) for each in prompts), start(prompts, rng))[1]
    data = [{"prompt": ASK, "hinted": hinted, "tools": [SCHEMA]}]
    sw.train(process, data, wrong, "guide", steps=1, group_size=2, prompts_per_step=1)
    assert any("Tools: dice" in text and "a colour" in text for text in read)


def test_rewards_get_messages_and_the_column_of_tools() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: Any, completions: Any, tools: Any) -> list[float]:
        seen.update(prompts=prompts, tools=tools)
        return [float(len(text[-1]["content"])) for text in completions]

    data = [{"prompt": ASK, "tools": [SCHEMA]}]
    sw.train(chatty("chatml", max_new_tokens=4), data, reward, steps=1, group_size=2, prompts_per_step=1)
    assert seen["prompts"] == [ASK, ASK]
    assert seen["tools"] == [[SCHEMA], [SCHEMA]]


def test_a_table_fills_absent_entries_of_tools_which_are_left_out() -> None:
    filled = {**SCHEMA, "function": {**SCHEMA["function"], "strict": None}}  # as Arrow has it
    assert load_prompts([{"prompt": ASK, "tools": [filled]}])[0].value.tools == (SCHEMA,)


@pytest.mark.parametrize("tools", [3, [3], {"name": "clock"}])
def test_a_column_of_other_things_is_refused(tools: Any) -> None:
    refuse(lambda: load_prompts([{"prompt": ASK, "tools": tools}]), "row 0, column 'tools' must hold a list of JSON")


def test_variables_and_another_template(tmp_path: Path) -> None:
    process = chatty("chatml", chat_template_kwargs={"enable_thinking": False})
    assert told(process, ASK).endswith("assistant\n<think></think>")
    file = tmp_path / "other.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    for given in (file, str(file), file.read_text()):
        assert told(chatty("chatml", chat_template=given), ASK) == "[Say blue.]"
    words = tokenizer("chatml")
    kept = words.chat_template
    from stepwell.process.language.build import language

    other = language(chatty("chatml").network.causal, words, chat_template=str(file))
    assert words.chat_template == kept
    other.save(tmp_path / "saved")
    assert told(language(tmp_path / "saved", device="cpu"), ASK) == "[Say blue.]"
    described = [p.encoder.describe() for p in (process, other, chatty("chatml", system="s", tools=[SCHEMA]))]
    assert len({json.dumps(each, sort_keys=True) for each in described}) == 3
    assert described[0].items() <= process.describe().items()  # so that a run resumes with no other


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tools": "clock"}, "tools must be a list, or None, got 'clock'"),
        ({"tools": [lambda x: x]}, "tools must be functions with type hints and a docstring"),
        ({"tools": [3]}, "tools must be functions or JSON schemas, got 3"),
        ({"chat_template": "absent.jinja"}, "The chat template 'absent.jinja' cannot be read: No such file"),
        ({"chat_template": "x" * 5000}, "cannot be read: File name too long"),
        ({"chat_template": "~nobody/x"}, "cannot be read"),
        ({"chat_template": 3}, "chat_template must be a text, or a PathLike, or None, got 3"),
        ({"chat_template": "{% for %}"}, "chat_template is no template of jinja (line 1"),
        ({"chat_template_kwargs": ["a"]}, "chat_template_kwargs must be a dictionary, or None, got ['a']"),
        ({"chat_template": ""}, "chat_template must be a file or a template's text, got ''"),
        ({"chat_template_kwargs": {3: 4}}, "must be a dictionary of variables by name, got {3: 4}"),
        ({"chat_template_kwargs": {"tokenize": True}}, "variables of the template's own, got 'tokenize'"),
        ({"keep_special_tokens": "yes"}, "keep_special_tokens must be True or False, or None, got 'yes'"),
        ({"system": 3}, "system must be a text, or None, got 3"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    refuse(lambda: chatty("chatml", **options), said)


# messages


def test_messages_of_parts_and_without_content_are_read() -> None:
    process = chatty("chatml")
    parts = [{"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "blue."}]}]
    assert process.encoder(parts) == process.encoder(ASK)
    calls = [*ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}]
    talk = [*calls, {"role": "tool", "content": "noon"}]
    wanted = "<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\nnoon<|im_end|>\n<|im_start|>assistant\n"
    for content in ({}, {"content": None}):
        whole = [talk[0], {**talk[1], **content}, talk[2]]
        assert is_chat(whole)
        assert shown(process, process.encoder(load_prompts([{"prompt": whole}])[0].value)).endswith(wanted)


def test_a_template_that_writes_parts_alone_gets_parts() -> None:
    part = "{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    takes_parts = f"{{% for m in messages %}}{{% for p in m.content %}}{part}{{% endfor %}}{{% endfor %}}"
    process = chatty("chatml", template=takes_parts)
    assert told(process, ASK) == "Say blue."
    assert told(process, [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]) == "hi"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "part of type 'image'"),
        ({"role": "user", "content": [{"type": "text"}]}, "part without a text"),
        ({"role": "user", "content": 3}, "'content' is of type int"),
        ({"role": "user", "content": None}, "without a 'content'"),
        ({"role": 3, "content": "a"}, "without a 'role'"),
        ({"content": "a"}, None),
    ],
)
def test_messages_that_cannot_be_read_are_refused_by_name(message: Any, said: str | None) -> None:
    process = chatty("chatml")
    refuse(lambda: process.encoder([message]), said or "must be a text or a list of messages")
    refuse(lambda: load_prompts([{"prompt": [message]}]), "entry 0 is no chat message", said or "without a 'role'")


# templates that do not end


@pytest.mark.parametrize("loop", ["", "{% if messages[0].content == 'Say blue.' %}"], ids=["always", "for a prompt"])
def test_a_template_that_loops_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch, loop: str) -> None:
    monkeypatch.setattr(room, "SECONDS", 0.2)
    many = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3
    text = f"{loop}{many}{'{% endif %}' if loop else ''}{{{{ messages[-1].content }}}}"

    def ask() -> None:
        chatty("chatml", template=text).encoder(ASK)

    said = refuse(ask, "The tokenizer's chat template did not end within 0.2 seconds for")
    assert len(said) < 200
    assert told(chatty("chatml"), ASK)  # the next one is not interrupted


def test_a_chat_with_tools_survives_copies() -> None:
    import copy
    import pickle

    chat = Chat(ASK, ["clock"])
    for twin in (copy.deepcopy(chat), copy.copy(chat), pickle.loads(pickle.dumps(chat))):
        assert (list(twin), twin.tools) == (ASK, ("clock",))
