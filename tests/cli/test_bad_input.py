"""Every mistake a user can make ends with exit code 2 and one line that says what, where and how to mend it."""

from __future__ import annotations

import json
import shutil

import pytest

from stepwell.cli import main


def test_the_run_that_the_others_spoil_is_right(bench):
    assert main(bench.words()) == 0
    bench.whole()


# data


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], ("data.jsonl holds no rows", "at least one prompt is needed")),
        (['{"question": "a"}'], ("data.jsonl has no column 'prompt'", "'question'", "name the one that holds")),
        (
            ['{"prompt": "a"}', '{"prompt": ""}'],
            ("row 1 (line 2)", "column 'prompt' holds no prompt", "remove the row"),
        ),
        (['{"prompt": "a"}', '{"answer": "a"}'], ("row 1 (line 2)", "column 'prompt'")),
        (['{"prompt": "a"}', '{"prompt": "b"'], ("data.jsonl, line 2 is no JSON", "one object")),
        (['{"prompt": 3}'], ("data.jsonl, row 0", "A prompt must be a text", "got 3")),
        (['["a"]'], ("row 0 (line 1)", "of type list")),
    ],
    ids=["empty", "wrong column", "empty prompt", "row without a prompt", "broken JSON", "number", "no object"],
)
def test_bad_data(bench, lines, said):
    bench.write("data.jsonl", *lines)
    line = bench.refused(*bench.words())
    assert all(words in line for words in said)
    assert not bench.out.exists()


def test_missing_data_with_the_nearest_file(bench):
    line = bench.refused(*bench.words("--data", "dat.jsonl"))
    assert "There is no file 'dat.jsonl'; did you mean 'data.jsonl'?" in line
    assert not bench.out.exists()


def test_the_column_of_prompts_has_another_name(bench):
    line = bench.refused(*bench.words("--prompt-column", "promt"))
    assert "no column 'promt'" in line
    assert "did you mean" in line


def test_a_prompt_longer_than_the_model(bench):
    bench.write("data.jsonl", json.dumps({"prompt": "a " * 80, "answer": "a"}))
    line = bench.refused(*bench.words())
    assert "data.jsonl, row 0: The prompt 'a a a" in line
    assert "has 80 tokens; the model has positions for 64" in line
    assert not bench.out.exists()


# rewards


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("missing.py:reward", "There is no file 'missing.py'"),
        ("reward.py:reward", "did you mean 'rewards.py'?"),
        ("rewards.py:rewrd", "no function of rewards.py named 'rewrd'; did you mean 'reward'?"),
        ("rewards.py", "There is no reward 'rewards.py'; write your own as file.py:function."),
        ("exact_mach", "There is no reward 'exact_mach'; did you mean 'exact_match'?"),
        ("regular_expression", "needs a pattern"),
        ("regular_expression:(", "RegularExpression.pattern must be a regular expression, got '('"),
        ("rewards.py:calls", "must be a function, got a value of type int"),
    ],
)
def test_a_reward_that_is_not_there(bench, reward, said):
    assert said in bench.refused(*bench.words("--reward", reward))
    assert not bench.out.exists()


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("rewards.py:one_number", ("'one_number'", "1", "4")),
        ("rewards.py:text", ("'text'", "type str", "row 0", "a number")),
        ("rewards.py:not_a_number", ("'not_a_number'", "nan", "row 0", "a finite number")),
        ("rewards.py:raises", ("'raises'", "KeyError", "rewards.py, line 15")),
        ("rewards.py:ends", ("'ends'", "SystemExit (3)", "rewards.py, line 18")),
        ("rewards.py:needs_solution", ("'needs_solution'", "'solution'", "answer")),
    ],
)
def test_a_reward_that_returns_nonsense(bench, reward, said):
    line = bench.refused(*bench.words("--reward", reward))
    assert all(words in line for words in said)
    assert not (bench.out / "metrics.jsonl").exists()
    bench.whole()


def test_a_reward_that_fails_later_leaves_a_run_that_goes_on(bench):
    line = bench.refused(*bench.words("--reward", "rewards.py:raises_later", "--steps", "4"))
    assert "'raises_later' raised RuntimeError (the judge is gone)" in line
    bench.whole()
    assert main(bench.words("--reward", "rewards.py:raises_later", "--steps", "4", "--resume")) == 0
    assert len((bench.out / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_reward_file_that_fails_while_it_is_imported(bench):
    bench.write("broken.py", "import math", "x = math.sqrt(-1)", "def reward(completions): return []")
    assert "broken.py failed at line 2" in bench.refused(*bench.words("--reward", "broken.py:reward"))


def test_no_reward_and_too_many_weights(bench):
    words = [word for word in bench.words() if word not in ("--reward", "rewards.py:reward")]
    assert "--reward must be given, such as my.py:function; see" in bench.refused(*words)
    line = bench.refused(*bench.words("--reward-weights", "1", "0.5"))
    assert "Reward weights must be as many as the functions (reward), got 2 for 1" in line


# methods, options, settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("--method", "gsop"), "There is no method 'gsop'; did you mean 'gspo'?"),
        (("--method", "grpo", "--set", "clp=0.1"), "There is no option of grpo 'clp'; did you mean 'clip'?"),
        (("--method", "grpo", "--set", "clip=wide"), "Option 'clip' of grpo must be a number, got 'wide'."),
        (("--set", "clip"), "'clip' has no value; write it as name=value"),
        (("--lerning-rate", "1"), "There is no argument '--lerning-rate'; did you mean '--learning-rate'?"),
        (("--learning-rate", "-1"), "Settings.learning_rate must be a finite number above 0, got -1.0."),
        (("--steps", "many"), "--steps must be a whole number, got 'many'."),
        (("--schedule", "cosin"), "--schedule must be one of constant, cosine, linear, got 'cosin'."),
        (("--budget", "60"), "A budget must be like 60s, 5m, 200-steps"),
        (("--group-size", "0"), "Settings.group_size must be a whole number, at least 1, or None, got 0."),
        (("--top-p", "1.5"), "top_p must be above 0 and at most 1 (off), got 1.5"),
        (("--max-new-tokens", "0"), "max_new_tokens must be a whole number of at least 1, got 0"),
        (("--minibatches", "5"), "Settings.minibatches must be at most the 2 prompts of a step, got 5."),
        (("--lora-alpha", "8"), "--lora-alpha needs --lora-rank, or --lora for a rank of 8."),
        (
            ("--evaluate-every", "2"),
            "--evaluation and --evaluate-every must be given together: prompts, and steps between.",
        ),
        (("--trackers", "tensorbord"), "tensorbord"),
        (("--seed", str(2**70)), "Settings.seed must be a whole number of 64 bits, got 1180591620717411303424."),
        (("--weight-decay", "nan"), "Settings.weight_decay must be a finite number, 0 or more, got nan."),
        (("--max-gradient-norm", "nan"), "Settings.max_gradient_norm must be a number above 0, got nan."),
        (("--rows-at-once", "0"), "Settings.rows_at_once must be a whole number, at least 1, or None, got 0."),
        (("--evaluation-samples", "0"), "Settings.evaluation_samples must be a whole number, at least 1, got 0."),
        (("--completions-logged", "-1"), "Settings.completions_logged must be a whole number, 0 or more, got -1."),
        (
            ("--group-size", "1"),
            "group_size must be at least 2 for GroupCredit, which compares the samples of a prompt, got 1.",
        ),
        (
            ("--group-size", "1", "--method", "dpo"),
            "group_size must be at least 2 for Pairing, which compares the samples of a prompt, got 1.",
        ),
        (("--set", "clip=-0.2"), "Clip.low must be a finite number, 0 or more, got -0.2."),
        (("--device", "tpu"), "There is no device 'tpu' here; there is cpu"),
        (("--out", ""), "--out must name a folder or a file, got an empty name."),
    ],
)
def test_an_unknown_or_impossible_argument(bench, changes, said):
    assert said in bench.refused(*bench.words(*changes))
    assert not bench.out.exists()


# models


def test_one_sample_is_enough_for_methods_that_compare_none(bench):
    assert main(bench.words("--group-size", "1", "--method", "reinforce")) == 0


def test_a_model_that_is_not_there(bench):
    assert "is a file; name the folder" in bench.refused(*bench.words("--model", str(bench.model / "config.json")))
    assert "model must be a folder or a hub id, got an empty name" in bench.refused(*bench.words("--model", ""))
    assert "There is no model folder './modle'" in bench.refused(*bench.words("--model", "./modle"))
    (bench.folder / "empty").mkdir()
    assert "holds no config.json" in bench.refused(*bench.words("--model", "empty"))
    assert not bench.out.exists()


def test_a_tokenizer_with_neither_padding_nor_end(bench, make_tokenizer):
    shutil.copytree(bench.model, bench.folder / "model", ignore=shutil.ignore_patterns("*token*"))
    make_tokenizer(pad=False, eos=False).save_pretrained(bench.folder / "model")
    line = bench.refused(*bench.words("--model", "model"))
    assert "neither a padding nor an end-of-sequence token; set tokenizer.pad_token" in line
    assert not bench.out.exists()


def test_a_language_model_is_not_trained_or_drawn_from_as_a_flow(bench):
    line = bench.refused(*bench.words("--method", "flow-grpo"))
    assert "The method 'flow-grpo' trains flows, and not language models; choose a method for them, such as" in line
    assert "--height must be left out for a language model." in bench.refused(*bench.words("--height", "64"))
    assert "--model must be a flow, as my.py:NAME" in bench.refused(
        "sample", "--model", str(bench.model), "--prompt", "a"
    )
    assert not bench.out.exists()
    assert not (bench.folder / "runs").exists()


# what would fail at the first step is refused before it


def test_parameters_that_learn_in_float16(bench):
    line = bench.refused(*bench.words("--dtype", "float16"))
    assert "Parameters that learn must not be float16" in line
    assert "load the model as float32, or train a LoRA adapter" in line
    assert not bench.out.exists()
    assert main(bench.words("--dtype", "float16", "--lora")) == 0


@pytest.mark.parametrize("name", ["prompts", "completions", "truncated", "completion_ids"])
def test_a_column_whose_name_is_taken(bench, name):
    bench.write("data.jsonl", json.dumps({"prompt": "a", "answer": "a", name: 1}))
    line = bench.refused(*bench.words())
    assert f"data.jsonl has a column '{name}', and reward functions are given something else under that name" in line
    assert not bench.out.exists()
