"""Samples that are tensors: measures of them, pictures before and after, and figures, on a page that loads nothing."""

import base64
import dataclasses
import io
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console
from torch import nn

from stepwell import methods
from stepwell.comparison import samples as samples_module
from stepwell.comparison.findings import find, over_seeds
from stepwell.comparison.report.gallery import embedded
from stepwell.comparison.report.page import page, render, write_report
from stepwell.comparison.report.runs import report_runs
from stepwell.comparison.report.table import print_comparison
from stepwell.comparison.results import Comparison
from stepwell.comparison.run import compare
from stepwell.comparison.samples import kept, measured
from stepwell.errors import InputError
from stepwell.figures.charts import safe
from stepwell.figures.pictures import png
from stepwell.objective.policy import Policy
from stepwell.planning.groups import Groups
from stepwell.process.base import Samples
from stepwell.process.flow.build import flow
from stepwell.recipe.recipe import Recipe
from stepwell.reward.mixing import Rewards
from stepwell.sampling.record import Drawn
from stepwell.sampling.request import Prompt
from stepwell.tasks.registry import Task, tasks
from stepwell.training.log import read_lines
from stepwell.trajectories import make

SVG = '<svg viewBox="0 0 9 9"><circle r="{}" style="fill: var(--series-0)"/></svg>'


class Shift(nn.Module):
    """A velocity that moves every dimension towards a class's own number."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x, time, label):
        return x + self.shift[label].reshape(-1, *[1] * (x.dim() - 1))


def bright(completions):
    return torch.stack([value.double().mean() for value in completions])


def made(shape, **fields):
    common = {
        "name": "toy",
        "title": "Toy",
        "description": "Bright ones.",
        "process": lambda: flow(Shift(), shape, steps=3, encode="label", decode=torch.sigmoid),
        "prompts": [Prompt(i, i) for i in range(3)],
        "evaluation": [Prompt(3 + i, i % 3) for i in range(6)],
        "rewards": Rewards(bright),
        "settings": {"learning_rate": 0.1},
        "same_prompts": True,
        "measures": {"deviation": lambda prompts, values: float(torch.stack(values).std())},
    }
    return Task(**{**common, **fields})


@pytest.fixture
def images():
    return made((1, 8, 8))


@pytest.fixture
def points():
    return made((2,), figure=lambda start, ends: SVG.format(len(start)), caption="One dot.")


@pytest.fixture(autouse=True)
def toy_method():
    for name in ("toy-flow", "toy-other"):

        @methods.method(name, title="A policy gradient for flows", processes=("flow",))
        def toy_flow() -> Recipe:
            return Recipe(Policy(), Groups(3, 4), sampler={"solver": "sde-flow", "steps": 3})

    yield
    for name in ("toy-flow", "toy-other"):
        methods.forget(name)


def run(task, budget="3-steps", **options):
    return compare(task, "toy-flow", **{"budget": budget, "seeds": 1, "progress": False, **options})


class Images(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.found.append(dict(attributes))


def test_measures_are_those_of_the_held_out_samples_before_and_after(images):
    seen = []

    def count(prompts, values):
        seen.append([(prompt.value, prompt.id) for prompt in prompts])
        return float(torch.stack(values).mean())

    result = run(dataclasses.replace(images, measures={"mean": count}), evaluation_samples=5)
    trial = result.entries[0].trials[0]
    expected = [(i % 3, 3 + i) for i in range(6) for _ in range(5)]
    assert seen == [expected, expected]
    for value, scores in zip(trial.measures["mean"], (trial.start, trial.end), strict=True):
        assert value == pytest.approx(sum(scores) / len(scores), rel=1e-6)  # here the reward is the mean, too


def test_every_seed_has_its_measures_and_they_are_read_back(images, tmp_path):
    result = run(images, seeds=3, out=tmp_path)
    values = [trial.measures["deviation"] for trial in result.entries[0].trials]
    assert len({start for start, _ in values}) == 3
    loaded = Comparison.load(tmp_path)
    assert loaded == dataclasses.replace(result)
    findings = find(loaded)
    for place, found in ((0, findings.start_measures), (1, findings.rows[0].measures)):
        mine = [pair[place] for pair in values]
        assert found["deviation"].value == pytest.approx(sum(mine) / 3)
        assert found["deviation"].low < min(mine)  # three seeds say little: their t-interval is wider than they are
        assert found["deviation"].high > max(mine)


def test_the_interval_of_a_measure_covers_what_it_is_the_mean_of():
    """Student's interval of three normal numbers covers at its level; the bootstrap that imitates it nearly so.

    400 draws at 95 % have a standard error of 1.1 points; 4 of them below are 90.6 %.
    """
    draws = torch.randn(400, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    intervals = [over_seeds(row.tolist()) for row in draws]
    assert sum(found.low <= 0.0 <= found.high for found in intervals) / 400 > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 400)
    planted = [(row.min(), row.max()) for row in draws]  # the span of the seeds, said to be an interval
    assert sum(bool(low <= 0.0 <= high) for low, high in planted) / 400 < 0.95 - 4 * math.sqrt(0.95 * 0.05 / 400)


def test_a_measure_that_is_not_finite_is_shown_as_missing(images, tmp_path):
    result = run(dataclasses.replace(images, measures={"odd": lambda p, v: float("nan")}), seeds=2, out=tmp_path)
    assert result.entries[0].trials[0].measures == {"odd": [None, None]}
    assert Comparison.load(tmp_path) == result
    assert "–" in render(page(result))


def test_a_measure_that_is_no_number_is_named_before_anything_is_trained(images):
    with pytest.raises(InputError, match="Measure 'odd' of task 'toy' must return a number, got a str"):
        run(dataclasses.replace(images, measures={"odd": lambda p, v: "high"}))


def test_the_terminal_shows_measures_within_its_width(images):
    names = {f"a measure with a long name, number {i} (lower is better)": lambda p, v: 0.5 for i in range(4)}
    result = run(dataclasses.replace(images, measures=names), seeds=2)
    console = Console(file=io.StringIO(), width=80)
    print_comparison(result, console)
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert sum(line.count("0.5") for line in lines) >= 4 * 2
    assert any("prompts drawn anew" in line for line in lines)


def test_images_are_kept_for_each_different_prompt(images):
    """Their reward is the mean of those that are kept."""
    values = [torch.full((1, 8, 8), i / 100) for i in range(12)]
    prompts = [prompt for prompt in images.evaluation for _ in range(2)]
    rows = make(torch.zeros(12, 1), torch.zeros(12, 1), torch.ones(12, 1))
    before = Drawn(rows, Samples(values), prompts)
    after = Drawn(rows, Samples([1.0 - value for value in values]), prompts)
    found = kept(images, before, after, 2)
    assert [row["prompt"] for row in found] == [0, 1, 2]
    places = [0, 1, 6, 7]  # prompt 0 is asked twice, with two samples each
    assert found[0]["before_images"] == [base64.b64encode(png(values[i])).decode() for i in places]
    assert found[0]["before_reward"] == pytest.approx(sum(places) / 400)
    assert found[0]["after_reward"] == pytest.approx(1.0 - sum(places) / 400)


def test_large_images_are_few_and_small(images):
    values = [torch.rand(3, 300, 200) for _ in range(24)]
    prompts = [prompt for prompt in images.evaluation for _ in range(4)]
    rows = make(torch.zeros(24, 1), torch.zeros(24, 1), torch.ones(24, 1))
    drawn = Drawn(rows, Samples(values), prompts)
    found = kept(images, drawn, drawn, 4)
    for row in found:
        sizes = [(embedded(image)["width"], embedded(image)["height"]) for image in row["before_images"]]
        assert sizes == [(64, 96)] * 6  # no more than the pixels of four squares
    assert samples_module.PIXELS // (64 * 96) == 6


def test_points_are_shown_as_numbers(points):
    result = run(points)
    assert re.fullmatch(r"\[0\.\d+, 0\.\d+\]", result.entries[0].samples[0]["before"])
    assert not Images(render(page(result))).found


def test_the_page_holds_its_images_and_they_are_magnified_by_whole_numbers(images, tmp_path):
    text = write_report(run(images, out=tmp_path), tmp_path).read_text()
    found = Images(text).found
    assert len(found) == 3 * 8 * 2  # three prompts, eight samples, before and after
    for image in found:
        assert image["src"].startswith("data:image/png;base64,")
        assert (image["width"], image["height"]) == ("40", "40")
    assert "image-rendering: pixelated" in text
    assert "held-out prompts" not in text
    assert "sampled anew from random numbers that training does not use" in text
    assert "latents forward" in text
    assert "Tokens" not in text
    assert write_report(Comparison.load(tmp_path), tmp_path / "again.html").read_text() == text


def test_the_figure_gets_the_start_and_every_method_and_is_on_the_page(points, tmp_path):
    asked = []

    def figure(start, ends):
        asked.append((len(start), {label: len(values) for label, values in ends.items()}))
        return SVG.format(len(ends))

    task = dataclasses.replace(points, figure=figure)
    result = compare(task, "toy-flow,toy-other", budget="2-steps", seeds=2, out=tmp_path, progress=False)
    assert asked == [(48, {"toy-flow": 48}), (48, {"toy-flow": 48, "toy-other": 48})]  # on the first seed only
    text = render(page(Comparison.load(tmp_path)))
    assert SVG.format(2) in text
    assert result.figure == SVG.format(2)
    assert "One dot." in text
    assert "Single samples" in text


def test_a_figure_that_fails_costs_no_result(points):
    def broken(start, ends):
        raise ValueError("no ink")

    with pytest.warns(UserWarning, match="figure of task 'toy' is left out: no ink"):
        result = run(dataclasses.replace(points, figure=broken))
    assert result.figure == ""
    assert result.entries[0].trials


@pytest.mark.parametrize(
    "figure",
    [
        "<svg><script>alert(1)</script></svg>",
        "<svg onload='alert(1)'/>",
        "<svg><g onclick='x'/></svg>",
        "<svg><foreignObject><p/></foreignObject></svg>",
        "<svg><a href='javascript:alert(1)'><text>x</text></a></svg>",
        "<svg><use href='https://example.org/x.svg'/></svg>",
        "<svg><image href='https://example.org/x.png'/></svg>",
        "<svg><image href='data:image/svg+xml;base64,AAAA'/></svg>",
        "<svg><rect style='fill: url(https://example.org)'/></svg>",
        "<svg><rect fill='URL(//example.org)'/></svg>",
        "<svg><style>@import 'https://example.org'</style></svg>",
        "<svg><style>* { background: u\\72l(https://example.org) }</style></svg>",
        "<svg><set attributeName='href' to='x'/></svg>",
        '<!DOCTYPE svg [<!ENTITY a "b">]><svg>&a;</svg>',
        "<svg><g></svg>",
        "<p/>",
        None,
    ],
)
def test_a_figure_only_draws(figure, points):
    with pytest.raises(InputError, match="figure"):
        safe(figure)
    result = run(points)
    with pytest.raises(InputError, match="figure"):
        render(page(dataclasses.replace(result, figure=figure or "x")))


def test_the_figures_of_the_package_are_safe():
    from matplotlib.figure import Figure

    from stepwell.figures import charts

    drawn = Figure()
    axes = drawn.add_subplot()
    axes.plot([0, 1], [1, 2], label="line")
    axes.imshow(torch.rand(4, 4).numpy(), extent=(0, 1, 1, 2))
    axes.legend()
    text = charts.svg(drawn, "All that matplotlib does")
    assert safe(text) == text


def test_an_image_that_is_no_png_is_refused():
    for wrong in ("x", "AAAA", base64.b64encode(b"<script>").decode(), b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(InputError, match="must be a PNG"):
            embedded(wrong)


def test_prompts_may_be_the_same_only_where_the_task_says_so(images):
    with pytest.raises(InputError, match="keep them apart"):
        dataclasses.replace(images, same_prompts=False)


def test_the_page_of_a_run_shows_its_pictures(images, tmp_path):
    run(images, "7-steps", seeds=2, out=tmp_path, keep_runs=True)
    folders = [tmp_path / "runs" / "toy-flow" / f"seed-{seed}" for seed in (0, 1)]
    text = report_runs(folders, tmp_path / "runs.html").read_text()
    found = Images(text).found
    assert len(found) == 2 * 4  # steps 1, 2, 5 and the last
    assert {image["alt"] for image in found} == {f"samples of step {step}" for step in (1, 2, 5, 7)}
    assert all(image["src"].startswith("data:image/png;base64,") for image in found)
    assert "Samples of seed-1" in text
    assert "latents forward" in text
    lines = [line for line in read_lines(folders[0] / "completions.jsonl") if line["step"] == 5]
    assert ", ".join(f"{line['prompt']}: {line['reward']:.2g}" for line in lines) in text


def test_measures_are_numbers_of_what_was_drawn(images):
    values = [torch.full((1, 8, 8), i / 100) for i in range(6)]
    rows = make(torch.zeros(6, 1), torch.zeros(6, 1), torch.ones(6, 1))
    found = measured(images, Drawn(rows, Samples(values), images.evaluation))
    assert found == {"deviation": pytest.approx(float(torch.stack(values).std()))}


def test_tasks_that_come_with_the_package_are_listed():
    assert {"countdown", "digits", "mixture"} <= {entry.name for entry in tasks()}
