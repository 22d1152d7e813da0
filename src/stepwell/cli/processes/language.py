"""Language models of `transformers`: `--model` names a folder or an id of the hub, perhaps with an environment."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepwell.cli.command import Flag
from stepwell.cli.processes.base import Kind, flag, given
from stepwell.cli.processes.options import AdapterOptions, File, LoadingOptions, Text, Texts, Whole
from stepwell.cli.processes.own import takes
from stepwell.errors import InputError

if TYPE_CHECKING:
    from stepwell.process.base import Process


@dataclass(kw_only=True)
class LanguageOptions:
    """A language model, and the distribution that its tokens are drawn from."""

    temperature: float = 1.0  # the temperature at which tokens are drawn and scored
    top_k: int = 0  # draw only from this many most probable tokens; 0 for all
    top_p: float = 1.0  # draw only from the fewest tokens that have this probability together
    min_p: float = 0.0  # draw only from tokens at least this probable, relative to the most probable
    max_new_tokens: int = 256  # the length at which a completion is cut; in a conversation, of all its turns together
    system: Text = None  # a system message for chats that have none
    compile: Flag = False  # compile the model's norms and perceptrons; updates take less memory


@dataclass(kw_only=True)
class ConversationOptions:
    """A conversation of a language model with an environment: tools, games, users."""

    environment: File = None  # my.py:Desk, a class or a function; its objects have gymnasium's reset and step
    max_turns: Whole = None  # turns after which a conversation is cut; 8 unless given
    turn_role: Text = None  # the role of the environment's messages in a chat; user unless given
    turn_stop: Texts = ()  # texts that end the model's turn, besides its end token

    def settings(self) -> dict[str, Any]:
        """The settings that were given, as `sw.conversation` takes them."""
        names = {"max_turns": "max_turns", "turn_role": "role", "turn_stop": "stop"}
        chosen = {theirs: getattr(self, ours) for ours, theirs in names.items()}
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
        made = language(model, lora=lora, **vars(command.language), **vars(command.loading))
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


def quieten_transformers() -> None:
    """Hide the progress bars and advice that libraries print while they load weights, for the one line that matters."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|diffusers")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
