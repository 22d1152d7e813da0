"""The page shows every method, loads nothing, escapes what it shows, and claims no more than was found."""

import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from stepwell import methods
from stepwell.comparison.findings import find
from stepwell.comparison.report.page import page, render, write_report
from stepwell.comparison.report.runs import report_runs
from stepwell.comparison.report.table import print_comparison
from stepwell.comparison.results import Comparison, Entry, Trial
from stepwell.comparison.run import compare
from stepwell.errors import InputError
from stepwell.training.loop import train
from stepwell.training.settings import Settings

HOSTILE = "<script>alert(1)</script>&\"'<img src=x onerror=y>"


def made(means, seeds=3, prompts=40, unit="solved", spread=0.01):
    """A comparison whose methods have these mean scores."""
    draw = np.random.default_rng(0)
    hard = draw.uniform(-0.2, 0.2, size=prompts)
    entries = []
    for label, mean in means.items():
        card = methods.get(label.split(":")[0]).as_dict()
        trials = []
        for seed in range(seeds):
            start, end = (m + hard + spread * draw.standard_normal(prompts) for m in (0.3, mean))
            cost = {"model_evaluations": 10, "forward": 2000, "backward": 1000, "reward_calls": 50}
            cost |= {"constraint_checks": 0, "wall_time": 2.0}
            point = {f"cost/{unit}": value for unit, value in cost.items() if unit != "wall_time"}
            curve = [
                {"share": s, "step": int(10 * s), "score": 0.3 + s * (mean - 0.3), "wall_time": 2 * s}
                | {name: s * value for name, value in point.items()}
                for s in (0.0, 0.5, 1.0)
            ]
            history = [{"step": i + 1, "reward": 0.3 + i / 100} for i in range(10)]
            trials.append(Trial(seed, start.tolist(), end.tolist(), curve, history, cost, 10))
        samples = [{"prompt": HOSTILE, "before": "1+1", "before_reward": 0.0, "after": HOSTILE, "after_reward": 1.0}]
        entries.append(Entry(label, card["id"], {}, card, trials, samples))
    task = {"name": "fake", "title": "Fake", "description": "A task.", "unit": unit}
    about = {"when": "2026-01-01T00:00:00", "command": "stepwell compare fake", "versions": {"stepwell": "0"}}
    counts = {"prompts": prompts, "samples": 4}
    return Comparison(task, "2 seconds", "seconds", list(range(seeds)), entries, {"learning_rate": 1e-4}, counts, about)


class Loads(HTMLParser):
    """The addresses that a browser would fetch, and every tag in order."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "data", "poster", "background", "action", "xlink:href"):
                self.loads.append((tag, name, value))
            if name == "href" and tag != "a" and not str(value).startswith("#"):
                self.loads.append((tag, name, value))


def test_the_page_shows_every_method_and_loads_nothing():
    text = render(page(made({"grpo": 0.5, "dr-grpo": 0.6, "grpo:clip=0.1": 0.4})))
    seen = Loads(text)
    assert seen.loads == []
    assert not {"script", "link", "iframe", "object", "img"} & set(seen.tags)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    outside = re.findall(r"https?://[^\"'<> ]+", text)
    assert outside  # the papers
    assert all(address.startswith("https://arxiv.org/abs/") for address in outside)
    for label in ("grpo", "dr-grpo", "grpo:clip=0.1"):
        assert text.count(label) >= 5
    assert "2402.03300" in text


def test_planted_mistake_a_loaded_picture_is_seen():
    text = render(page(made({"grpo": 0.5}))).replace("<main>", '<main><img src="https://example.org/x.png">')
    assert Loads(text).loads == [("img", "src", "https://example.org/x.png")]


def test_what_models_write_is_shown_and_never_run():
    text = render(page(made({"grpo": 0.5})))
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_ids_are_unique_and_references_find_them():
    text = render(page(made({"grpo": 0.5, "dr-grpo": 0.6, "rloo": 0.4})))
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def test_charts_take_their_colours_from_the_style_sheet():
    svgs = re.findall(r"<svg.*?</svg>", render(page(made({"grpo": 0.5, "dr-grpo": 0.6}))), flags=re.DOTALL)
    assert len(svgs) >= 6
    for svg in svgs:
        assert not re.search(r"#[0-9a-f]{6}\b", svg)
        assert "var(--" in svg
        assert "<text" in svg


@pytest.mark.parametrize(
    ("means", "said"),
    [
        ({"grpo": 0.6, "rloo": 0.4, "dr-grpo": 0.4}, "grpo has the highest mean.* is better than all 2 others"),
        ({"grpo": 0.6, "rloo": 0.4}, "is better than rloo"),
        ({"grpo": 0.6, "rloo": 0.6}, "no method is shown to be better than another"),
        ({"grpo": 0.6, "rloo": 0.6, "dr-grpo": 0.4}, "is better than dr-grpo, but not shown to be better than"),
        ({"grpo": 0.6}, "the gain is real"),
        ({"grpo": 0.3}, "the gain may be chance"),
    ],
)
def test_findings_say_what_intervals_allow(means, said):
    findings = find(made(means))
    assert re.search(said, findings.sentences[0])


@pytest.mark.parametrize("spread", [0.01, 0.3, 2.0])
def test_nothing_is_called_better_whose_interval_contains_zero(spread):
    comparison = made({"grpo": 0.6, "rloo": 0.55, "dr-grpo": 0.5, "gspo": 0.3}, spread=spread)
    findings = find(comparison)
    shown = {(pair.first, pair.second) for pair in findings.pairs if pair.difference.above_zero}
    assert claims(findings) == shown
    if not shown:
        assert "no method is shown to be better than another" in findings.sentences[0]


def claims(findings):
    """The pairs of methods of which the sentences call the first better."""
    found, labels = set(), [row.label for row in findings.rows]
    for sentence in findings.sentences:
        said = re.fullmatch(r"(?:After .*? each, )?(\S+) .*?is better than (.*?)(?:, but .*)?\.", sentence)
        if said and "no method is shown to be better" not in sentence:
            everyone = [label for label in labels if label != said[1]]
            others = everyone if said[2].startswith("all ") else re.split(", | and ", said[2])
            found |= {(said[1], other) for other in others}
    return found


def test_planted_mistake_a_claim_too_many_is_seen():
    findings = find(made({"grpo": 0.6, "rloo": 0.6}))
    boast = dataclasses.replace(findings, sentences=["After 2 seconds each, grpo is better than rloo."])
    assert claims(findings) == set()
    assert claims(boast) == {("grpo", "rloo")}


def test_a_single_seed_is_said_to_be_one():
    assert any("one seed" in sentence for sentence in find(made({"grpo": 0.6, "rloo": 0.4}, seeds=1)).sentences)


def test_failures_are_on_the_page_and_in_the_table():
    comparison = made({"grpo": 0.5, "rloo": 0.4})
    failed = dataclasses.replace(comparison.entries[1], error="seed 1: ValueError: <b>no disk</b>")
    comparison = dataclasses.replace(comparison, entries=[comparison.entries[0], failed])
    text = render(page(comparison))
    assert "no disk" in text
    assert "<b>no disk" not in text
    assert "no disk" in _printed(comparison)
    nothing = dataclasses.replace(comparison, entries=[failed])
    assert "No method finished a run" in render(page(nothing))
    assert "No method finished a run" in _printed(nothing)


def _printed(comparison):
    console = Console(file=io.StringIO(), width=80)
    print_comparison(comparison, console)
    return console.file.getvalue()


def test_the_table_fits_a_terminal_and_names_every_unit_spent():
    text = _printed(made({"grpo": 0.5, "dr-grpo": 0.6}))
    assert all(len(line) <= 80 for line in text.splitlines())
    for label in ("grpo", "dr-grpo", "start", "seconds", "reward calls".split()[0]):
        assert label in text
    rewards = _printed(made({"grpo": 0.5}, unit="reward"))
    assert "%" not in rewards.replace("95 %", "")


def test_the_table_shows_scores_in_brackets_and_what_every_method_spent():
    scores, spent = _printed(made({"grpo": 0.5, "rloo": 0.6})).split("spent, on average")
    for label, mean in (("grpo", r"5\d\.\d"), ("rloo", r"6\d\.\d")):
        number = r"[+-]?\d+\.\d"
        assert re.search(rf"{label} +{mean} \[{number}, {number}\] +\+{number} \[{number}, {number}\]", scores)
        assert re.search(rf"{label} +10 +2 +10 +2\.0 k +1\.0 k +50", spent)


def test_the_band_of_a_curve_spans_its_seeds_or_the_interval_of_one():
    from stepwell.comparison.report.page import _curve

    def band(seeds):
        comparison = made({"grpo": 0.5}, seeds=seeds)
        for place, trial in enumerate(comparison.entries[0].trials):
            for point in trial.curve:
                point["error"] = 0.1
                point["score"] += 0.01 * place
        return _curve(comparison, comparison.entries[0], 0, "steps")

    one, several = band(1), band(3)
    assert one.high - one.y == pytest.approx(0.196)
    assert one.y - one.low == pytest.approx(0.196)
    assert several.y - several.low == pytest.approx(0.01)
    assert several.high - several.y == pytest.approx(0.01)


@pytest.mark.parametrize(("unit", "said"), [("solved", "0 of these 1 solved before, 1 after"), ("reward", "1 prompts")])
def test_samples_are_counted_where_a_score_is_a_share(unit, said):
    from stepwell.comparison.report.gallery import samples_of

    comparison = made({"grpo": 0.5}, unit=unit)
    assert samples_of(comparison.entries[0], 0, comparison)["about"] == said


def test_a_real_comparison_becomes_a_page(tiny, tmp_path):
    result = compare(tiny, "grpo,rloo", budget="3-steps", seeds=2, out=tmp_path, progress=False)
    path = write_report(result, tmp_path)
    assert path.name == "report.html"
    assert "Say 1 three times." in path.read_text()
    assert report_runs([tmp_path], tmp_path / "again.html").read_text() == path.read_text()


def test_runs_become_a_page_with_their_curves_and_answers(tiny, tmp_path):
    for name in ("grpo", "rloo"):
        config = {"method": name, "options": {}, "card": methods.get(name).as_dict()}
        settings = Settings(steps=40, evaluate_every=10, **tiny.settings)
        recipe = methods.get(name).recipe()
        arguments = (tiny.process(), recipe, tiny.prompts, tiny.rewards, settings)
        train(*arguments, out=tmp_path / name, evaluation=tiny.evaluation, config=config)
    text = report_runs([tmp_path / "grpo", tmp_path / "rloo"], tmp_path / "report.html").read_text()
    seen = Loads(text)
    assert seen.loads == []
    for word in ("grpo", "rloo", "evaluation/reward", "gradient norm", "step 40", "learning_rate = 0.1"):
        assert word in text
    assert "better" not in re.sub("whether one method is better", "", text)
    one = report_runs([tmp_path / "grpo"], tmp_path)
    assert "Run: grpo" in one.read_text()


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(InputError, match="got no finished step"):
        report_runs([tmp_path], tmp_path / "report.html")
    with pytest.raises(InputError, match="got no such folder"):
        report_runs([tmp_path / "nowhere"], tmp_path / "report.html")


SEVEN = {"grpo": 0.5, "dr-grpo": 0.6, "rloo": 0.4, "gspo": 0.5, "cispo": 0.45, "dpo": 0.3, "ppo": 0.55}


def test_many_methods_have_a_panel_each_and_a_table_of_their_differences():
    few, many = (page(made({name: SEVEN[name] for name in list(SEVEN)[:count]})) for count in (6, 7))
    assert few["heading"].endswith("gspo, cispo, dpo")
    assert many["heading"] == "Fake: 7 methods"
    for content, charts in ((few, 3), (many, 1)):
        learning, differences = content["sections"][:2]
        assert len(learning["charts"]) == charts
        assert learning["legend"] == (content is few)
        assert len(differences["charts"]) == 1
    table = str(many["sections"][1]["charts"][0]["svg"])
    assert "7 methods" not in table
    for label in SEVEN:  # as a row and as a column
        assert len(re.findall(rf">\s*{label}\s*<", table)) == 2
    assert len(re.findall(r">\s*[+−-]\d+\.\d\s*<", table)) == 7 * 6 // 2
    ids = re.findall(r'\bid="([^"]+)"', render(many))
    assert len(ids) == len(set(ids))


def test_methods_that_never_differed_are_said_to_be_alike():
    """Others are not."""
    comparison = made(SEVEN)
    assert not any("very same" in sentence for sentence in find(comparison).sentences)
    by_label = {entry.label: entry for entry in comparison.entries}
    for twin in ("gspo", "cispo"):
        trials = [
            dataclasses.replace(t, end=o.end)
            for t, o in zip(*(by_label[n].trials for n in (twin, "grpo")), strict=True)
        ]
        by_label[twin] = dataclasses.replace(by_label[twin], trials=trials)
    comparison = dataclasses.replace(comparison, entries=list(by_label.values()))
    said = [sentence for sentence in find(comparison).sentences if "very same" in sentence]
    assert len(said) == 1
    assert said[0].startswith("grpo, gspo and cispo ended")
    assert "cannot be told apart" in said[0]
    assert not re.search("came into play|make no difference", " ".join(find(comparison).sentences))
    assert str(page(comparison)["sections"][1]["charts"][0]["svg"]).count(">=<") == 3


def equal(comparison, *labels):
    """The comparison with the first one's scores for all of these methods."""
    first = next(entry for entry in comparison.entries if entry.label == labels[0])
    entries = [
        dataclasses.replace(entry, trials=first.trials) if entry.label in labels else entry
        for entry in comparison.entries
    ]
    return dataclasses.replace(comparison, entries=entries)


@pytest.mark.parametrize(
    ("means", "same", "said", "unsaid"),
    [
        ({"grpo": 0.6, "rloo": 0.5}, ("grpo", "rloo"), "no method is shown to be better.*all reach 6", "grpo|rloo"),
        ({"grpo": 0.6, "rloo": 0.6}, (), "no method is shown to be better.*their means are from", "grpo|rloo"),
        (
            {"grpo": 0.6, "rloo": 0.4, "dr-grpo": 0.3},
            ("grpo", "rloo"),
            "grpo and rloo are better than dr-grpo",
            "highest",
        ),
    ],
)
def test_the_headline_names_no_winner_among_equals(means, same, said, unsaid):
    comparison = made(means, spread=0.1)
    headline = find(equal(comparison, *same) if same else comparison).sentences[0]
    assert re.search(said, headline), headline
    assert not re.search(unsaid, headline), headline


def test_the_best_of_several_is_not_named_where_it_beats_none():
    """The middle method beats the last; the first varies too much to beat any."""
    comparison = made({"grpo": 0.62, "rloo": 0.6, "dr-grpo": 0.5}, spread=0.01)
    trials = [
        dataclasses.replace(trial, end=(np.array(trial.end) + shift).tolist())
        for trial, shift in zip(comparison.entries[0].trials, (-0.6, 0.0, 0.6), strict=True)
    ]
    wild = dataclasses.replace(comparison.entries[0], trials=trials)
    found = find(dataclasses.replace(comparison, entries=[wild, *comparison.entries[1:]]))
    assert found.rows[0].label == "grpo"
    assert "no method is shown to be better than all others; their means are from 51.4" in found.sentences[0]
    assert "rloo is better than dr-grpo." in found.sentences


def within(interval, low, high):
    return low <= interval.low <= interval.value <= interval.high <= high


def test_percentages_stay_within_0_and_100_and_rewards_above_0():
    hard = {"grpo": 0.02, "rloo": 0.98}
    for unit, most in (("solved", 1.0), ("reward", np.inf)):
        comparison = made(hard, seeds=2, prompts=3, unit=unit, spread=0.0)
        entries = []
        for entry in comparison.entries:
            trials = [
                dataclasses.replace(trial, start=[0.0, 0.1, 0.0], end=np.clip(trial.end, 0, 1).tolist())
                for trial in entry.trials
            ]
            trials[1] = dataclasses.replace(trials[1], end=[0.9, 0.0, 1.0])
            entries.append(dataclasses.replace(entry, trials=trials))
        findings = find(dataclasses.replace(comparison, entries=entries))
        for row in findings.rows:
            assert within(row.score, 0.0, most)
            assert within(row.middle, 0.0, most)
            assert within(row.gain, -most, most)
        assert within(findings.start, 0.0, most)
        assert all(within(pair.difference, -most, most) for pair in findings.pairs)


def test_a_reward_that_is_negative_somewhere_has_no_bound():
    comparison = made({"grpo": 0.1, "rloo": 0.5}, seeds=2, prompts=3, unit="reward")
    assert min(min(trial.end) for trial in comparison.entries[0].trials) < 0
    assert find(comparison).rows[-1].score.low < -0.1


def test_a_line_of_one_point_is_a_dot():
    from stepwell.figures.charts import Curve, curves, multiples

    one, two = (Curve("a", 0, np.arange(float(n)), np.ones(n)) for n in (1, 2))
    gap = Curve("a", 0, np.arange(3.0), np.array([1.0, np.nan, 2.0]))
    still = Curve("a", 0, np.zeros(3), np.ones(3))
    for draw in (curves, multiples):
        dots = [len(re.findall(r"<use[^>]*--series-0", draw([line], "x", "title"))) for line in (two, one, gap, still)]
        assert dots == [0, 1, 2, 3]


def test_a_run_of_one_step_shows_its_metrics(tiny, tmp_path):
    settings = Settings(steps=1, **tiny.settings)
    train(tiny.process(), methods.get("rloo").recipe(), tiny.prompts, tiny.rewards, settings, out=tmp_path / "one")
    text = report_runs([tmp_path / "one"], tmp_path / "report.html").read_text()
    assert "<strong>reward</strong>" in text


def test_a_run_without_a_reward_is_reported_without_one(tmp_path):
    import stepwell as sw

    student, teacher = (sw.exact.markov(symbols=3, length=3, prompts=4, seed=seed) for seed in (0, 1))
    prompts = [{"prompt": number} for number in range(4)]
    sw.train(student, prompts, None, "gkd", teacher=teacher, steps=2, prompts_per_step=2, out=tmp_path / "run")
    text = report_runs([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "run: 2 steps, without a reward of the policy&#39;s own samples." in text
    assert "nan" not in re.sub("<style.*?</style>|<svg.*?</svg>", "", text, flags=re.DOTALL)
