"""Every family of models against transformers itself, one text at a time: what is drawn, scored, learned and saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import word_tokenizer
from torch import Tensor
from zoo.families import FAMILIES, REFUSED, SEEING, STATEFUL, Family, tiny

from stepwell import methods
from stepwell.batch import Batch
from stepwell.check.tolerance import tolerance
from stepwell.errors import InputError
from stepwell.process.language.apart import long_rope_switch
from stepwell.process.language.build import language
from stepwell.process.language.process import Language
from stepwell.process.models import Models
from stepwell.rng import Rng
from stepwell.sampling.record import Drawn
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.training.update import accumulate
from stepwell.trajectories import count

pytestmark = [  # families that take a slower path say so
    pytest.mark.filterwarnings("ignore:.* turns hidden states into logits in an unknown way"),
    pytest.mark.filterwarnings("ignore:Prompts are not shared by their groups"),
]

PROMPTS = ["a b c d e f g h i j k l", "x", "m n o", "b d y"]
NEW = 12
ENDS = [1, 2, 3, 12, 20]
EXACT = 1e-4
"""The largest difference of log-probabilities, and of gradients relative to the largest."""

QUICK = ("phimoe", "phi3, longrope", "llama4_text", "qwen2_vl")
"""Those that the quick tests have: a window, a switch of positions, no padding, and a model that also sees."""
EVERY = {**FAMILIES, **STATEFUL, **SEEING}


@dataclass(frozen=True)
class Member:
    """One family: its folder, the process, and the same model as transformers loads it."""

    folder: Path
    process: Language
    model: Any

    def alone(self, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """(T,) log-probabilities of each token after the prompt and the tokens before it, read alone and unpadded.

        With LongRoPE a text up to the switch is another than its beginning within a longer text.
        """
        text = torch.tensor([[*prompt, *tokens]])
        logits = self.model(text, use_cache=False).logits[0]
        switch = long_rope_switch(self.model.config.get_text_config())
        if switch is not None and switch < text.shape[1]:
            logits = torch.cat([self.model(text[:, :switch], use_cache=False).logits[0], logits[switch:]])
        scores = logits[len(prompt) - 1 : -1].log_softmax(-1)
        return scores.gather(-1, text[0, len(prompt) :, None])[:, 0]

    def gap(self, drawn: Drawn, model: Any = None) -> float:
        """The largest difference of the stored log-probabilities from those of transformers, or of `model` there."""
        other = Member(self.folder, self.process, self.model if model is None else model)
        rows, worst = drawn.trajectories, 0.0
        for row, prompt in enumerate(drawn.prompts):
            tokens = rows.action[row, : int(rows.length[row])].tolist()
            with torch.no_grad():
                alone = other.alone(self.process.encoder(prompt.value), tokens)
            worst = max(worst, float((alone - rows.log_prob[row, : len(tokens)]).abs().max()))
        return worst


def loaded(folder: Path, seeing: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if seeing else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def written(family: Family, folder: Path) -> Path:
    tiny(family).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def drawn_from(process: Language, number: int, seed: int = 0, window: tuple[int, int] | None = None) -> Drawn:
    requests = [Request(Prompt(i, text), count=number, window=window) for i, text in enumerate(PROMPTS)]
    return rollout(process, requests, Rng(seed))


def some(name: str) -> Any:
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.fixture(scope="module", params=[some(name) for name in EVERY])
def member(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Member:
    folder = written(EVERY[request.param], tmp_path_factory.mktemp("model"))
    process = language(folder, device="cpu", max_new_tokens=NEW, eos=ENDS)
    return Member(folder, process, loaded(folder, request.param in SEEING))


def test_greedy_text_is_that_of_transformers_one_prompt_at_a_time(member: Member) -> None:
    drawn = drawn_from(member.process, 2, window=(0, 0))
    for row, prompt in enumerate(drawn.prompts):
        ids = torch.tensor([member.process.encoder(prompt.value)])
        options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": ENDS, "pad_token_id": 0}
        member.model(ids, use_cache=False)  # RecurrentGemma would go on from the state of the text before
        whole = member.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert drawn.samples.columns["completion_ids"][row] == whole[0, ids.shape[1] :].tolist()


def test_stored_log_probabilities_are_the_scores_and_those_of_each_text_alone(member: Member) -> None:
    drawn = drawn_from(member.process, 3)
    rows = drawn.trajectories
    assert len(rows.length.unique()) > 1
    with torch.no_grad():
        scores = member.process.score(rows).log_prob
    assert float((scores - rows.log_prob).abs().max()) <= EXACT
    assert member.gap(drawn) <= EXACT


def test_forks_in_the_middle_of_rows_go_on_from_there(member: Member) -> None:
    trunk = drawn_from(member.process, 2, seed=1)
    rows = (trunk.trajectories.length >= 4).nonzero()[:, 0].tolist()[:4]
    forks = [Request(trunk.prompts[row], count=2, start=(row, 3)) for row in rows]
    assert forks
    drawn = rollout(member.process, forks, Rng(2), so_far=trunk.trajectories)
    with torch.no_grad():
        scores = member.process.score(drawn.trajectories).log_prob
    assert float(((scores - drawn.trajectories.log_prob) * drawn.trajectories.mask).abs().max()) <= EXACT


def test_the_gradient_of_grpo_is_that_of_each_row_alone(member: Member) -> None:
    drawn = drawn_from(member.process, 3, seed=3)
    rows = drawn.trajectories
    reward = torch.tensor([len(set(ids)) % 5 + 0.1 * len(ids) for ids in drawn.samples.columns["completion_ids"]])
    rows = rows.replace(reward=reward)
    objective = methods.get("grpo").recipe().whole
    models, counts = Models(member.process, member.process), count(rows, member.process.horizon)
    with torch.no_grad():
        targets = objective.plan(Batch(rows, counts, models.score(rows, objective.needs).detach()))
    member.process.module.zero_grad()
    accumulate(models, objective, Batch(rows, counts), targets, tokens=90)
    ours = {name: p.grad for name, p in member.process.network.causal.named_parameters() if p.grad is not None}

    groups = torch.stack([rows.prompt == number for number in rows.prompt])
    mean = torch.stack([reward[group].mean() for group in groups])
    spread = torch.stack([reward[group].std() for group in groups])
    member.model.zero_grad()
    for row, advantage in enumerate(((reward - mean) / (spread + 1e-4)).tolist()):
        tokens = rows.action[row, : int(rows.length[row])].tolist()
        log_prob = member.alone(member.process.encoder(drawn.prompts[row].value), tokens)
        (-advantage * log_prob.mean() / len(rows)).backward()
    naive = {name: p.grad for name, p in member.model.named_parameters() if p.grad is not None}
    scale = max(float(gradient.abs().max()) for gradient in naive.values())
    assert scale > 1e-3
    assert {name for name, gradient in naive.items() if bool(gradient.any())} <= ours.keys()
    for name, gradient in ours.items():
        other = naive.get(name, torch.zeros_like(gradient))
        assert float((gradient - other).abs().max()) <= EXACT * scale, name


def test_a_saved_model_has_the_same_logits(member: Member, tmp_path: Path) -> None:
    member.process.save(tmp_path)
    text = torch.tensor([member.process.encoder(PROMPTS[0])])
    with torch.no_grad():
        again = loaded(tmp_path, hasattr(member.model.config, "vision_config"))(text).logits
        assert float((again - member.model(text).logits).abs().max()) <= tolerance(member.model)
    assert language(tmp_path, device="cpu").network.causal.config.model_type == member.model.config.model_type


@pytest.mark.parametrize("targets", [{}, {"target_modules": "all-linear"}], ids=["default", "all"])
def test_a_moved_adapter_is_drawn_with_scored_and_merged(
    member: Member, tmp_path: Path, targets: dict[str, Any]
) -> None:
    process = language(member.folder, device="cpu", max_new_tokens=NEW, eos=ENDS, lora={"r": 4, **targets})
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in process.module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.1)
    drawn = drawn_from(process, 2, seed=4)
    scores = process.score(drawn.trajectories).log_prob
    scores.sum().backward()
    adapters = {name: p.grad for name, p in process.module.named_parameters() if p.requires_grad}
    still = [name for name, gradient in adapters.items() if gradient is None or not gradient.any()]
    assert all(".indexer." in name for name in still), "all learn but what chooses by rank, which has no slope"
    with torch.no_grad():
        base = process.frozen().score(drawn.trajectories).log_prob
        unadapted = member.process.score(drawn.trajectories).log_prob
    scores = scores.detach()
    assert float((scores - drawn.trajectories.log_prob).abs().max()) <= EXACT
    assert float((base - unadapted).abs().max()) <= EXACT
    assert float((base - scores).abs().max()) > 0.01
    process.save(tmp_path)
    assert member.gap(drawn, loaded(tmp_path, hasattr(member.model.config, "vision_config"))) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_step_by_step_is_refused_when_it_is_loaded(name: str, tmp_path: Path) -> None:
    family, reason = REFUSED[name]
    folder = written(family, tmp_path)
    with pytest.raises(InputError, match=reason):
        language(folder, device="cpu")


def test_there_are_many_families() -> None:
    assert len(EVERY) >= 75
