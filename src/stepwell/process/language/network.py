"""The network of a causal language model: it reads tokens, counts them, and returns logits or hidden states."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepwell.errors import InputError
from stepwell.meter import Meter
from stepwell.process.base import refuse_no_adapter
from stepwell.process.language import attention, saving
from stepwell.process.language.apart import Apart, long_rope_switch
from stepwell.process.language.cache import (
    cache_argument,
    empty_cache,
    forked,
    joined,
    keeps_attention_only,
    layer_kinds,
    swap_states,
)
from stepwell.process.language.chunked import Head, head_of
from stepwell.process.language.compiled import Compiled
from stepwell.process.language.prompts import Packed
from stepwell.process.language.shared_forward import Line, line
from stepwell.writing import write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stepwell.process.language.shared_prefix import SharedCache

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""The largest difference of two readings' logits, relative to the largest of them or to 1, by the type of the weights.

It is that of float32 in float64 too: models compute norms, positions and softmax in float32 whatever their weights are.
"""


class LanguageModule(nn.Module):
    """All parameters in one place, for optimisers and checkpoints: the model and, if there is one, a value head."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.value_head: nn.Linear | None = None


class CausalNetwork:
    """A causal language model of `transformers`, adapted by `peft` or not, always in evaluation mode.

    Hidden states and logits are read at (row, column) pairs only. The fast path gives hidden states, whose logits
    are then computed chunk by chunk; the plain path takes the model's own logits, all at once.
    """

    def __init__(self, module: LanguageModule, meter: Meter, compile: bool = False):
        self.module = module.eval()
        self.meter = meter
        self.can_learn = True
        self.fast: bool | None = None  # the fast path agrees with the plain one; None until first used
        self.checked: list[bool] = []  # not empty once its reading is known to be right; twins share it (`guard`)
        self.shares: dict[str, bool] = {}  # shared prompts agree with the plain path, by use: "rollout" or "score"
        self.compiled = Compiled() if compile else None
        self.adapted = hasattr(module.model, "disable_adapter")
        self.base_only = False  # the adapter is left out: this is the frozen twin of an adapted model

    @property
    def causal(self) -> PreTrainedModel:
        """The model of `transformers` itself, with the layers of an adapter in it."""
        model: Any = self.module.model
        return model.get_base_model() if self.adapted else model

    @property
    def value_head(self) -> nn.Linear | None:
        return self.module.value_head

    @property
    def head(self) -> Head:
        """The layer from hidden states to logits, on the fast path."""
        head = head_of(self.causal)
        assert head is not None
        return head

    @property
    def device(self) -> torch.device:
        return self.causal.get_input_embeddings().weight.device  # type: ignore[return-value]

    def position_ids(self, mask: Tensor) -> Tensor:
        """(N, L) the number of real tokens before each, from the mask (N, L) of real ones."""
        return (mask.long().cumsum(1) - 1).clamp(min=0)

    def read_on(self, cache: Any, ids: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
        """Read `ids` (R, n) after what the cache holds: the longer cache, and the logits (R, V) after the last token.

        `cache` is None where nothing was read before. `mask` (R, columns) is True for the real ones of all columns, old
        and new. The layers of `cache` change. Rows share the keys and values of their prompts, for models that can and
        if it agrees with the plain path.
        """
        from stepwell.process.language.shared_prefix import SharedCache, shared

        new = ids.shape[1]
        self.meter.add(model_evaluations=len(ids), forward=int(mask[:, -new:].sum()))
        if cache is None:
            longer, logits = self._read_on(empty_cache(self.causal), ids, mask)
            return (shared(longer, mask) if self.shares.get("rollout", self._can_share) else longer), logits
        if isinstance(cache, SharedCache):
            if not bool(mask[:, cache.mask.shape[1] :].all()) or not self._shares_rollouts(cache, ids, mask):
                cache = cache.plain()
        elif not self._attends_only:  # not every recurrent layer can go on by several tokens
            for column in range(new - 1):
                cache, _ = self._read_on(cache, ids[:, column, None], mask[:, : mask.shape[1] - new + column + 1])
            ids = ids[:, -1:]
        return self._read_on(cache, ids, mask)

    def _read_on(self, cache: Any, ids: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
        """The cache, changed in place or new, which holds what was read, and the logits (R, V) after the last token."""
        from stepwell.process.language.shared_prefix import SharedCache

        if self._cache_name == "state" and cache is not None and len(ids) > 1:  # RWKV mixes rows that go on by a token
            rows = [torch.tensor([row], device=ids.device) for row in range(len(ids))]
            parts = [self._read_on(forked(cache, row), ids[row], mask[row]) for row in rows]
            return joined([part for part, _ in parts]), torch.cat([logits for _, logits in parts])
        arguments = {
            "attention_mask": None if self.apart.padless else mask.long(),
            "position_ids": self.position_ids(mask)[:, -ids.shape[1] :],
            self._cache_name: cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        sharing = isinstance(cache, SharedCache)
        own: dict[str, Any] = {"own_attention": cache} if sharing else {}
        with self._ready(), attention.taken_over(self.causal) if sharing else contextlib.nullcontext():
            before = swap_states(self.causal, getattr(cache, "in_modules", None)) if self._states_in_modules else None
            output = self.causal(ids, **_accepted(self.causal, arguments), **own)
            longer = output[self._cache_name] if cache is None else cache
            if before is not None:
                longer.in_modules = swap_states(self.causal, before)
        last: Tensor = output.logits[:, -1]
        return longer, last

    @functools.cached_property
    def _cache_name(self) -> str:
        return cache_argument(self.causal)

    @functools.cached_property
    def _attends_only(self) -> bool:
        """True if all that the model keeps of a text are keys and values, which a mask can leave out."""
        return keeps_attention_only(empty_cache(self.causal))

    @functools.cached_property
    def _states_in_modules(self) -> bool:
        return bool(swap_states(self.causal, None))

    @functools.cached_property
    def _can_share(self) -> bool:
        """True if the model's attention can be replaced by one that shares prompts: it is full in every layer."""
        from transformers.cache_utils import DynamicLayer

        return attention.can_take(self.causal) and layer_kinds(empty_cache(self.causal)) == {DynamicLayer}

    @functools.cached_property
    def apart(self) -> Apart:
        """The rows that can be read together.

        Llama 4 tunes the temperature of its attention by columns, so that padding would change it; attention that is
        computed step by step gives NaN for padding in float64.
        """
        config = self.causal.config.get_text_config()
        by_column = bool(getattr(config, "attn_temperature_tuning", False))
        no_numbers = self.causal.dtype == torch.float64 and config._attn_implementation == "eager"
        return Apart(by_column or no_numbers or not self._attends_only, long_rope_switch(config))

    def _shares_rollouts(self, cache: SharedCache, ids: Tensor, mask: Tensor) -> bool:
        """True if rows that share prompts get the model's own logits: tried once, on up to 4 rows, unmetered."""
        if "rollout" not in self.shares:
            few = torch.linspace(0, len(ids) - 1, min(len(ids), 4), device=ids.device).long()
            some = cache.chosen(few)
            _, plain = self._read_on(some.plain(), ids[few], mask[few])
            self._try("rollout", lambda: self._read_on(some, ids[few], mask[few])[1], plain)
        return self.shares["rollout"]

    def _precision(self) -> torch.dtype:
        device = self.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.causal.dtype

    def _try(self, use: str, fast: Callable[[], Any], plain: Tensor) -> None:
        """Remember whether prompts can be shared for a use ("rollout" or "score"), and warn if they cannot."""
        try:
            self.shares[use] = attention.near(fast(), plain, TOLERANCE[self._precision()])
            reason = "it does not agree with the model's own attention"
        except (NotImplementedError, TypeError, RuntimeError, AttributeError) as error:
            self.shares[use], reason = False, str(error).splitlines()[0].rstrip(".")
        if not self.shares[use]:
            name, action = type(self.causal).__name__, {"rollout": "drawing", "score": "scoring"}[use]
            warnings.warn(
                f"Prompts are not shared by their groups when {action} with {name}: {reason}. The plain path is used, "
                "which takes longer.",
                stacklevel=2,
            )

    def read(self, packed: Packed, fast: bool, hidden: bool) -> tuple[Tensor, Tensor | None]:
        """Hidden states (M, D) before each step and, on the plain path only, the model's own logits (M, V) there.

        On the plain path the hidden states are empty unless `hidden` asks for them.
        """
        if self.apart.switch is None or len(packed.row) == 0:
            return self._read(packed, fast, hidden)
        places, parts = zip(*self.apart.split(packed), strict=True)
        values = [self._read(part, fast, hidden) for part in parts]
        order = torch.cat(places).argsort()
        logits = None if fast else torch.cat([part for _, part in values if part is not None])[order]
        return torch.cat([part for part, _ in values])[order if fast or hidden else slice(None)], logits

    def _read(self, packed: Packed, fast: bool, hidden: bool) -> tuple[Tensor, Tensor | None]:
        """`read`, for rows that can be read together."""
        together = self._line(packed, fast)
        tokens = int(packed.mask.sum()) if together is None else len(together.ids)
        self.meter.add(model_evaluations=len(packed.ids), forward=tokens)
        if torch.is_grad_enabled():
            self.meter.add(backward=tokens)
        run = functools.partial(self._run, packed, fast, hidden, together)
        if self.compiled is None or len(packed.row) == 0:
            return run()
        trial = functools.partial(self._tried, packed, fast)
        return self.compiled.run(self.causal, run, trial, TOLERANCE[self._precision()])

    def _tried(self, packed: Packed, fast: bool) -> Tensor:
        """Hidden states, or the model's own logits, of a few tokens; unmetered."""
        values: Any = self._run(_shortened(packed), fast, hidden=False)[0 if fast else 1]
        return values

    def _run(
        self, packed: Packed, fast: bool, hidden: bool, together: Line | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`read`, for rows side by side or for all of them `together` in one line."""
        if together is None:
            ids, mask, positions = packed.ids, packed.mask.long(), self.position_ids(packed.mask)
            where, own = (packed.row, packed.column), {}
        else:
            ids, positions, own = together.ids[None], together.position[None], {"own_attention": together}
            mask, where = torch.ones_like(ids), (torch.zeros_like(together.at), together.at)
        arguments: dict[str, Any] = {"position_ids": positions, "use_cache": False}
        if not self.apart.padless:  # else what follows a row changes nothing before it
            arguments["attention_mask"] = mask
        with self._ready(), contextlib.nullcontext() if together is None else attention.taken_over(self.causal):
            if fast:
                base = self.causal.base_model
                return base(ids, **_accepted(base, arguments), **own).last_hidden_state[where], None
            arguments["output_hidden_states"] = hidden
            output = self.causal(ids, **_accepted(self.causal, arguments), **own)
        logits = output.logits[where]
        return (output.hidden_states[-1][where] if hidden else logits.new_empty(0)), logits

    def _line(self, packed: Packed, fast: bool) -> Line | None:
        """All rows in one line, or None unless that pays and agrees with the plain path (tried once, unmetered)."""
        if not self.shares.get("score", self._can_share):
            return None
        together = line(packed)
        if together is not None and "score" not in self.shares:
            few = _shortened(packed)
            short = line(few, worth=1.0)
            assert short is not None  # the trial shares a prompt, so that the first call takes the path of all others
            which = 0 if fast else 1
            with torch.no_grad():
                plain: Any = self._run(few, fast, hidden=False)[which]
                self._try("score", lambda: self._run(few, fast, False, short)[which], plain)
        return together if self.shares.get("score") else None

    @torch.no_grad()
    def is_fast(self, packed: Packed) -> bool:
        """True if hidden states and head give the model's own logits: tried once, on up to 16 tokens, unmetered."""
        if self.fast is None:
            length = int(packed.mask[0, :16].sum())
            column = torch.arange(length, device=self.device)
            row = torch.zeros_like(column)
            few = Packed(packed.ids[:1, :length], packed.mask[:1, :length], row, column, column, column)
            self.fast = self._agrees(few)
            if not self.fast:
                warnings.warn(
                    f"{type(self.causal).__name__} turns hidden states into logits in an unknown way; scoring holds "
                    "all its logits at once, which takes more memory.",
                    stacklevel=2,
                )
        return self.fast

    def _agrees(self, packed: Packed) -> bool:
        head = head_of(self.causal)
        if head is None or self.causal.base_model is self.causal:
            return False
        plain = self._run(packed, fast=False, hidden=False)[1]
        assert plain is not None
        gap = (head(self._run(packed, fast=True, hidden=False)[0]) - plain).abs().max()
        return bool(gap <= TOLERANCE[self.causal.dtype] * plain.abs().max().clamp(min=1))

    @contextlib.contextmanager
    def _ready(self) -> Iterator[None]:
        """Switch off dropout and, for the frozen twin of an adapted model, the adapter."""
        if self.module.training:
            self.module.eval()
        model: Any = self.module.model
        with model.disable_adapter() if self.base_only else contextlib.nullcontext():
            yield

    def with_value_head(self) -> CausalNetwork:
        """A twin with a linear layer on the last hidden state, (D,) -> 1: the one there is, else one of zeros."""
        twin = copy.copy(self)
        if self.value_head is None:
            size = self.causal.config.get_text_config().hidden_size
            dtype = torch.float64 if self.causal.dtype == torch.float64 else torch.float32
            head = nn.utils.skip_init(nn.Linear, size, 1, device=self.device, dtype=dtype)  # draws no random numbers
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            module = LanguageModule(self.module.model)
            module.value_head = head
            twin.module = module.eval()
        return twin

    def frozen(self) -> CausalNetwork:
        """A twin that cannot learn: a copy, or for an adapted model its base, on the same weights."""
        twin = copy.copy(self)
        twin.can_learn = False
        if self.adapted:
            twin.base_only = True
        else:
            twin.module = copy.deepcopy(self.module).requires_grad_(False)
        return twin

    @torch.no_grad()
    def sync(self, other: CausalNetwork, rate: float) -> None:
        """Parameters moved to those of `other` by `rate` of the way."""
        if self.base_only:
            raise InputError("The reference of an adapted model is its base, which cannot follow the adapter.")
        own, theirs = dict(self.causal.named_parameters()), dict(other.causal.named_parameters())
        if own.keys() != theirs.keys():
            raise InputError("Only models with the same parameters can be synced.")
        for name, parameter in own.items():
            parameter.copy_(theirs[name] if rate == 1.0 else parameter.lerp(theirs[name].to(parameter), rate))

    def save(self, folder: str | os.PathLike[str], merged: bool | None) -> None:
        """Write weights, adapter and value head as safetensors; the model in memory does not change.

        A value head that is there of an earlier model goes with it.
        """
        refuse_no_adapter(merged, self.adapted and not self.base_only)
        from safetensors.torch import save as as_bytes

        with self._ready():
            saving.save(self.module.model, folder, merged is not False, self.base_only)
        file = Path(folder) / "value_head.safetensors"
        if self.value_head is None:
            file.unlink(missing_ok=True)
        else:
            tensors = {name: value.detach().contiguous() for name, value in self.value_head.state_dict().items()}
            write_whole(file, as_bytes(tensors))


def _accepted(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the model's forward names: not every model has positions or can skip logits."""
    names = inspect.signature(model.forward).parameters
    always = {"output_hidden_states", "use_cache"}
    return {name: value for name, value in arguments.items() if name in names or name in always}


def _shortened(packed: Packed) -> Packed:
    """A small trial: the first row that has steps twice, at most 16 tokens of its prompt and 8 more that differ."""
    row = int(packed.row[0])
    prompt = int(packed.column[0] - packed.step[0]) + 1
    ids = packed.ids[row, : min(prompt, 16)]
    own = packed.ids[packed.mask][:8]
    pair = torch.stack([torch.cat([ids, own]), torch.cat([ids, own.flip(0)])])
    step = torch.arange(len(own) + 1, device=ids.device).repeat(2)
    which = torch.arange(2, device=ids.device).repeat_interleave(len(own) + 1)
    real = torch.ones_like(pair, dtype=torch.bool)
    return Packed(pair, real, which, step, len(ids) - 1 + step, torch.zeros_like(step))
