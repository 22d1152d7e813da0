"""Language models of `transformers`: `--model` names a folder or an id of the hub, perhaps with an environment."""

from __future__ import annotations

import inspect
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from stepwell.cli.command import Flag
from stepwell.cli.processes.base import Kind, flag, given
from stepwell.cli.processes.options import AdapterOptions, File, LoadingOptions, Number, Text, Texts, Whole
from stepwell.cli.processes.own import takes
from stepwell.errors import InputError

if TYPE_CHECKING:
    from stepwell.process.base import Process

Errors = Annotated[Literal["raise", "end"] | None, tyro.conf.arg(metavar="{raise,end}", help_behavior_hint="")]


@dataclass(kw_only=True)
class LanguageOptions:
    """A language model, and the distribution that its tokens are drawn from."""

    temperature: float = 1.0  # the temperature at which tokens are drawn and scored
    top_k: int = 0  # draw only from this many most probable tokens; 0 for all
    top_p: float = 1.0  # draw only from the fewest tokens that have this probability together
    min_p: float = 0.0  # draw only from tokens at least this probable, relative to the most probable
    max_new_tokens: int = 256  # the most tokens that the model draws for a prompt; in a conversation, in all its turns
    system: Text = None  # a system message for chats that have none
    tools: File = None  # my.py:TOOLS, a list of functions or JSON schemas that chats are told of
    chat_template: File = None  # a file with a chat template, in place of the tokenizer's
    chat_template_kwargs: Text = None  # variables of the chat template, as JSON: {"enable_thinking": false}
    keep_special_tokens: Flag = False  # texts show special tokens such as <think>; in conversations they always do
    compile: Flag = False  # compile the model's norms and perceptrons; updates take less memory

    def settings(self) -> dict[str, Any]:
        """The settings as `sw.language` takes them."""
        own = {**vars(self), "keep_special_tokens": self.keep_special_tokens or None}
        own["chat_template"] = None if self.chat_template is None else Path(self.chat_template)
        own["tools"] = tools_from(self.tools)
        own["chat_template_kwargs"] = variables_from(self.chat_template_kwargs)
        return own


@dataclass(kw_only=True)
class ConversationOptions:
    """A conversation of a language model with an environment: tools, games, users."""

    environment: File = None  # my.py:Desk, a class or a function; its objects have gymnasium's reset and step
    max_turns: Whole = None  # turns after which a conversation is cut; 8 unless given
    max_turn_tokens: Whole = None  # the most tokens that the model draws in one turn; unless given, as many as in all
    turn_role: Text = None  # the role of the environment's messages in a chat; user unless given
    turn_stop: Texts = ()  # texts that end the model's turn, besides its end token
    environment_errors: Errors = None  # raise: an exception of the environment's ends the run; end: only its row
    environment_penalty: Number = None  # the reward of a row that ended so; 0 unless given

    def settings(self) -> dict[str, Any]:
        """The settings that were given, as `sw.conversation` takes them."""
        theirs = {"turn_role": "role", "turn_stop": "stop"}
        chosen = {theirs.get(name, name): value for name, value in vars(self).items() if name != "environment"}
        return {name: value for name, value in chosen.items() if value not in (None, ())}


class LanguageModel(Kind):
    """A causal language model of `transformers`, perhaps in conversation with an environment."""

    name = "language"
    called = "a language model"
    uses = (LanguageOptions, ConversationOptions, LoadingOptions, AdapterOptions)
    process = "language"
    on_hub = True

    def is_named_by(self, model: str) -> bool:
        return Path(model).exists() and not model.endswith(".py") and not (Path(model) / "model_index.json").is_file()

    def check(self, command: Any) -> None:
        command.language.settings()  # raises before the model is loaded
        if command.conversation.environment is not None:
            environment_from(command.conversation.environment)  # raises before the model is loaded
            return
        for entry, value in given(command.conversation):
            if value != entry.default:
                raise InputError(f"{flag(entry.name)} needs --environment: it is about a conversation with one.")

    def build(self, model: str, command: Any, lora: Any = None) -> Process:
        from stepwell.process.conversation.build import conversation
        from stepwell.process.language.build import language

        quieten_transformers()
        made = language(model, lora=lora, **command.language.settings(), **vars(command.loading))
        talk: ConversationOptions = command.conversation
        if talk.environment is None:
            return made
        return conversation(made, environment_from(talk.environment), **talk.settings())


def environment_from(address: str) -> Any:
    """The class or function of a user's file that makes environments; it is called without arguments."""
    from stepwell.reward.loading import load_function

    maker = load_function(address, "environment", classes=True)
    if not takes(maker):
        raise InputError(
            f"--environment must name a class or a function without arguments, got '{address}' with "
            f"{inspect.signature(maker)}."
        )
    return maker


def tools_from(address: str | None) -> list[Any] | None:
    """The tools of a user's file."""
    from stepwell.reward.loading import load_list

    return None if address is None else load_list(address, "tools")


def variables_from(text: str | None) -> dict[str, Any] | None:
    """The variables of a chat template, from JSON."""
    if text is None:
        return None
    try:
        variables = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--chat-template-kwargs must be a JSON object, got {text!r:.60} ({error!s:.60}).") from error
    if not isinstance(variables, dict):
        raise InputError(f"--chat-template-kwargs must be a JSON object, got {text!r:.60}.")
    return variables


def quieten_transformers() -> None:
    """Hide the progress bars and advice that libraries print while they load weights, for the one line that matters."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|diffusers")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
