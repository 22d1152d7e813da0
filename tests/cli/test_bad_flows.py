"""Flows that cannot be drawn from or trained end with exit code 2 and one line, and leave nothing behind."""

from __future__ import annotations

import json

import pytest

from stepwell.cli import main


def test_the_drawing_and_the_run_that_the_others_spoil_are_right(flows):
    assert main(flows.drawing()) == 0
    assert main(flows.training("--out", "other")) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        # the model
        ("--predicts velocty", "predicts must be one of velocity, noise, data, score, got 'velocty'."),
        ("--path liner", "There is no path 'liner'; did you mean 'linear'?"),
        ("--model my.py:not_a_number", "prediction at t = 1 has values that are NaN or infinite"),
        ("--model my.py:narrow", "a tensor of its states' shape, (2, 2), got a tensor of shape (2, 1)."),
        ("--model my.py:a_list", "The network must return a tensor of its states' shape, (2, 2), got a list."),
        ("--model my.py:fails", "my.py failed at line 55: KeyError: 'velocity'."),
        ("--model my.py:three", "'my.py:three' must be called as f(x, t), got a function of (x, t, y)."),
        ("--encode label", "'my.py:velocity' must be called as f(x, t, label), got a function of (x, t)."),
        (
            "--model my.py:network --encode label --prompt 1",
            "'my.py:network' must be called as f(x, t, label), got a function of (x, t).",
        ),
        ("--model my.py:network --shape 3", "my.py failed at line 22: RuntimeError: The size of tensor a (3)"),
        ("--model my.py:velocit", "There is no function of my.py named 'velocit'; did you mean 'velocity'?"),
        ("--model mine.py:velocity", "There is no file 'mine.py'; did you mean 'my.py'?"),
        ("--model my.py", "--model must name a function in its file, as my.py:NAME, got the file 'my.py'."),
        ("--model ours.py", "There is no file 'ours.py'; a model of your own is written as my.py:NAME."),
        ("--model elsewhere", "--model must be a flow, as my.py:NAME or the folder of a pipeline, got 'elsewhere'."),
        ("--shape -", "must take no arguments and return a process; for a function f(x, t) give the --shape"),
        ("--shape 0", "--shape must be sizes of at least 1, got 0."),
        (
            "--model my.py:make --shape - --path ve",
            "--path needs --shape: it describes a function f(x, t) of your own.",
        ),
        (
            "--model my.py:make_nothing --shape -",
            "must return a process, such as flow(f, shape=(2,)), got a value of type NoneType.",
        ),
        ("--model my.py:make_broken --shape -", "steps must be a whole number of at least 1, got 0."),
        ("--model my.py:make --shape - --weights none", "There are no weights in 'none'"),
        ("--model -", "Exactly one of --pipeline, --model and --task must be given, got none of them."),
        ("--task mixture", "Exactly one of --pipeline, --model and --task must be given, got --model and --task."),
        ("--model - --shape - --task mixtre", "There is no task 'mixtre'; did you mean 'mixture'?"),
        ("--model - --shape - --task mixture --set mode=2", "no option of task mixture 'mode'; did you mean 'modes'?"),
        ("--model - --task mixture", "--shape must be left out for a task."),
        ("--set modes=2", "--set needs --task: it sets an option of a task."),
        ("--height 64", "--height must be left out for a model of your own."),
        ("--device cpu", "--device must be left out for a model of your own."),
        # the law
        ("--solver dpmp-2m", "There is no solver 'dpmp-2m'; did you mean 'dpmpp-2m'?"),
        ("--solver mine.json", "The solver 'mine.json' cannot be read: No such file or directory."),
        ("--steps 0", "steps must be a whole number of at least 1, got 0."),
        ("--steps few", "--steps must be a whole number, got 'few'."),
        ("--steps - --times 1 0.5 0.1", "times must end at 0, without noise, got 0.1 as the last, where sigma is 0.1."),
        (
            "--steps - --times 0.5 0",
            "times must start at noise, got 0.5 as the first, where alpha / sigma of the linear path is 1",
        ),
        (
            "--steps - --times 1 0.5 0.7 0",
            "times must fall from 1 (noise) to 0 (data), got 0.5 and then 0.7 in step 1.",
        ),
        ("--steps - --times 1", "times must be at least two, a start and an end, got 1."),
        ("--times 1 0", "--times must be given without a number of steps and without --shift: it is the grid."),
        ("--shift 0", "The factor of a time shift must be positive and finite, got 0.0."),
        ("--level 0.5", "level must be above 0 with noise and 0 without, got 0.5 with noise 'none'."),
        ("--guidance 2", "give `unconditional` to the flow"),
        ("--guidance -1", "guidance must be 0 or more, got -1.0."),
        ("--noise 1", "There is no argument '--noise'"),
        # the prompts
        ("--prompt 3", "--prompt and --data must be left out: this flow is unconditional."),
        (
            "--model my.py:labelled --encode label",
            "--prompt or --data must be given: this flow is conditioned on prompts.",
        ),
        (
            "--model my.py:labelled --encode label --prompt cat",
            "A prompt of this flow must be a whole number, its 'label', got 'cat'.",
        ),
        (
            "--model my.py:labelled --encode label --prompt 1 --data data.jsonl",
            "--prompt and --data must not be given together: both are the prompts.",
        ),
        (
            "--model my.py:labelled --encode label --data data.jsonl",
            "row 0: A prompt of this flow must be a whole number, its 'label', got 'a b c'.",
        ),
        # what is written
        ("--samples 0", "--samples must be a whole number of at least 1, got 0."),
        ("--rows-at-once 0", "--rows-at-once must be a whole number of at least 1, got 0."),
        (f"--seed {2**70}", "--seed must be a whole number of 64 bits, got 1180591620717411303424."),
        ("--format png", "Samples must be images with values from 0 to 1 to be written as png, got shape (2,)"),
        ("--format jpg", "--format must be one of json, npy, png, safetensors, got 'jpg'."),
        ("--out data.jsonl", "'data.jsonl' is a file where a folder is needed"),
        ("--out taken", "'taken' holds files already, which are not overwritten; choose a new or an empty folder."),
    ],
)
def test_a_drawing_that_cannot_be_made(flows, changes, said):
    (flows.folder / "taken").mkdir()
    (flows.folder / "taken" / "samples.npy").write_text("mine")
    before = flows.unchanged()
    assert said in flows.refused(*flows.drawing(*changes.split()))
    assert flows.unchanged() == before
    assert (flows.folder / "taken" / "samples.npy").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "{'name': 'mine'}",
            "The solver 'mine.json' must be JSON, as `stepwell solvers NAME --save FILE` writes it, got",
        ),
        (
            '["euler"]',
            "must be a JSON object with a name, as `stepwell solvers NAME --save FILE` writes it, got ['euler']",
        ),
        ('{"order": 2}', "must be a JSON object with a name, as `stepwell solvers NAME --save FILE` writes it, got {"),
        ('{"name": "mine", "weight": "half"}', "no setting of a solver 'weight'; did you mean 'weights'?"),
        ('{"name": "mine", "order": 2.5}', "The solver 'mine.json': order must be of type int, got 2.5."),
        ('{"name": "mine", "corrector": "yes"}', "The solver 'mine.json': corrector must be of type bool, got 'yes'."),
        (
            '{"name": "mine", "inner": "half", "order": 2}',
            "The solver 'mine.json': inner must be of type float | None, got 'half'.",
        ),
        ('{"name": "mine", "window": 1}', "The solver 'mine.json': window must be of type tuple[float, float], got 1."),
        (
            '{"name": "mine", "window": [1]}',
            "The solver 'mine.json': window must be of type tuple[float, float], got [1].",
        ),
        ('{"name": "mine", "weights": "haf"}', "no 'weights' of a solver 'haf'; did you mean 'half'?"),
        ('{"name": "mine", "order": 7}', "The solver 'mine.json': Solver 'mine': order must be 1 to 4, got 7."),
        (
            '{"name": "mine", "noise": "tau"}',
            "Solver 'mine': level must be above 0 with noise and 0 without, got 0.0 with noise 'tau'.",
        ),
    ],
)
def test_a_solver_s_file_that_is_none(flows, content, said):
    flows.write("mine.json", content)
    line = flows.refused(*flows.drawing("--solver", "mine.json"))
    assert said in line
    assert "The solver 'mine.json'" in line
    assert not flows.out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("solvers eulr", "There is no solver 'eulr'; did you mean 'euler'?"),
        ("solvers --save mine.json", "--save writes one solver; name it"),
        ("solvers euler --save mine.txt", "--save is 'mine.txt'; a name that ends in .json is right"),
        ("solvers euler --save taken.json", "'taken.json' is there already and is not overwritten"),
        ("solvers euler --save nowhere/mine.json", "The folder of 'nowhere/mine.json' is not there"),
    ],
)
def test_a_solver_that_cannot_be_printed_or_saved(flows, words, said):
    flows.write("taken.json", "mine")
    before = flows.unchanged()
    assert said in flows.refused(*words.split())
    assert flows.unchanged() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("--method grpo", "The method 'grpo' trains language models, and not flows; choose a method for them, such as"),
        ("--method flow-grop", "There is no method 'flow-grop'; did you mean 'flow-grpo'?"),
        ("--model my.py:velocity --shape 2", "Flow has no parameter that can learn; train a network, not a function."),
        ("--model my.py:make_half", "must not be float16, which is too coarse for their updates, got"),
        ("--temperature 0.5", "--temperature must be left out for a model of your own."),
        ("--lora-rank 2", "--lora-rank must be left out for a model of your own."),
        ("--lora", "--lora must be left out for a model of your own."),
        ("--compile", "--compile must be left out for a model of your own."),
        ("--model ./elsewhere", "There is no pipeline folder './elsewhere'."),
        ("--guidance 3", "give `unconditional` to the flow"),
        ("--solver-steps 0", "steps must be a whole number of at least 1, got 0."),
        ("--data taken.jsonl", "taken.jsonl has a column 'truncated', and reward functions are given something else"),
        ("--prompt-column word", "data.jsonl has no column 'word'"),
        ("--method draft-k --reward my.py:right", "Reward 'right' is not differentiable"),
        ("--method draft-k --reward my.py:without_gradient", "Reward 'without_gradient' is not differentiable"),
        ("--method draft-k --reward my.py:in_numpy", "'in_numpy' raised RuntimeError (Can't call numpy() on Tensor"),
        ("--reward my.py:one_number", "Reward 'one_number' must return a list with one number"),
        ("--method draft-k --reward my.py:one_number", "Reward 'one_number' must return a list with one number"),
    ],
)
def test_a_flow_that_cannot_be_trained(flows, changes, said):
    flows.write("taken.jsonl", '{"truncated": 1}')
    assert said in flows.refused(*flows.training(*changes.split()))
    flows.whole()
    assert not (flows.out / "model.safetensors").exists()


def test_weights_of_another_network(flows):
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"correction": zeros(3)}, flows.folder / "model.safetensors")
    line = flows.refused(*flows.drawing("--model", "my.py:make", "--shape", "-", "--weights", "model.safetensors"))
    assert "The weights in 'model.safetensors' are those of another network: " in line
    assert not flows.out.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("--pipeline missing/there/is/none", "There is no pipeline folder 'missing/there/is/none'."),
        ("--pipeline empty", "The folder 'empty' holds no model_index.json, so it is not a pipeline of diffusers."),
        ("--pipeline data.jsonl", "The pipeline 'data.jsonl' is a file; name the folder"),
        ("--pipeline  ", "--pipeline must be followed by a value; see `stepwell sample --help`."),
        ("--pipeline other", "StableDiffusion3Pipeline, FluxPipeline, got a OtherPipeline."),
        ("--pipeline code", "comes from 'mine'; code that is not of diffusers or transformers is never run"),
        ("--pipeline other --shape 2", "--shape must be left out for a pipeline."),
    ],
)
def test_a_pipeline_that_is_not_there(flows, changes, said):
    (flows.folder / "empty").mkdir()
    for name, index in (
        ("other", {"_class_name": "OtherPipeline"}),
        ("code", {"_class_name": "StableDiffusionPipeline", "unet": ["mine", "UNet"]}),
    ):
        (flows.folder / name).mkdir()
        flows.write(f"{name}/model_index.json", json.dumps(index))
    before = flows.unchanged()
    assert said in flows.refused("sample", *changes.split(), "--prompt", "a cat", "--out", "run")
    assert flows.unchanged() == before
