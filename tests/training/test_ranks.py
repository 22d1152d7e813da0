"""Two ranks make the gradients, and the runs, of one."""

from __future__ import annotations

import json
import os
import textwrap
import time

import pytest

SCRIPT = textwrap.dedent(
    """
    import json, sys
    import torch
    from stepwell import methods
    from stepwell.check.methods import bench, gradient
    from stepwell.training.distribute import World

    torch.set_num_threads(1)
    world = World.join()
    worst = {}
    for name in methods.names()[int(sys.argv[2]) :: 4]:
        card = methods.get(name)
        recipe = card.recipe()
        models, rows = bench(recipe, card.processes[0])
        whole = gradient(models, recipe, rows)
        parameters = [p for p in models.policy.module.parameters() if p.requires_grad]
        groups = rows.prompt.unique()
        mine = torch.isin(rows.prompt, groups[world.rank :: world.size]).nonzero()[:, 0]
        alone = gradient(models, recipe, rows, [mine])
        world.sum_gradients(parameters)
        found = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in parameters])
        worst[name] = [float((found - whole).abs().max()), float((alone - whole).abs().max())]
    if world.is_main:
        json.dump({"size": world.size, "worst": worst}, open(sys.argv[1], "w"))
    """
)

TRAIN = textwrap.dedent(
    """
    import json, sys
    import torch
    import stepwell as sw
    from stepwell.training.distribute import World

    torch.set_num_threads(1)

    def long(completions, **columns):
        return [float(len(text)) for text in completions]

    model = sw.exact.markov(symbols=3, length=4, prompts=4)
    run = sw.train(model, [{"prompt": i} for i in range(4)], long, sys.argv[2], steps=3, learning_rate=0.1,
                   prompts_per_step=4, group_size=4, out=sys.argv[1] + "/run", checkpoint_every=1)
    logits = model.logits.detach().reshape(-1).tolist()
    json.dump({"logits": logits, "steps": run.steps}, open(f"{sys.argv[1]}/rank{World.join().rank}.json", "w"))
    """
)


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2, 3))])
def test_two_ranks_sum_to_the_gradient_of_one_for_every_method(launch, part, tmp_path):
    launch(SCRIPT, str(tmp_path / "found.json"), str(part))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["size"] == 2
    for name, (together, alone) in found["worst"].items():
        assert together < 1e-9, name
        assert alone > 1e-6, f"{name}: one rank by itself cannot have the whole gradient"


@pytest.mark.parametrize("method", ["dapo", "ppo"])
def test_two_ranks_train_in_step_and_leave_one_record(method, launch, tmp_path):
    launch(TRAIN, str(tmp_path), method)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["steps"] == 3
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


FAILS = TRAIN.replace(
    "    return [float(len(text)) for text in completions]",
    "    if World.join().rank == 1:\n        raise ValueError('the judge is out')\n"
    "    return [float(len(text)) for text in completions]",
)


def test_a_reward_that_fails_on_one_rank_ends_both(launch, tmp_path):
    with pytest.raises(AssertionError, match=r"RewardError: Reward 'long' raised ValueError \(the judge is out\)"):
        launch(FAILS, str(tmp_path), "grpo")


ENDS = {
    "killed": "os.kill(os.getpid(), 9)",
    "left": "os._exit(7)",
    "left by a thread": "threading.Thread(target=os._exit, args=(3,)).start(); time.sleep(60)",
}
ENDING = textwrap.dedent(
    """
    import os, sys, threading, time
    import stepwell as sw
    from stepwell.errors import StepwellError
    from stepwell.training.distribute import World

    ending, place, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]

    def end(at):
        if World.join().rank == ending and place == at:
            {how}

    calls = 0

    def long(completions, **columns):
        global calls
        calls += 1
        end("first") if calls == 1 else end("later") if calls == 3 else None
        return [float(len(text)) for text in completions]

    model = sw.exact.markov(symbols=3, length=4, prompts=4)
    try:
        sw.train(model, [{{"prompt": i}} for i in range(4)], long, "grpo", steps=9, learning_rate=0.1,
                 prompts_per_step=4, group_size=4, out=out, on_step=lambda metrics: end("after"))
    except StepwellError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    """
)


@pytest.mark.parametrize(
    ("how", "rank", "place"),
    [
        ("killed", 1, "later"),
        pytest.param("left", 0, "later", marks=pytest.mark.slow),
        pytest.param("left by a thread", 1, "first", marks=pytest.mark.slow),
        pytest.param("killed", 0, "first", marks=pytest.mark.slow),
        pytest.param("left", 1, "after", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_ends_ends_the_other_in_one_sentence(how, rank, place, start, tmp_path):
    (tmp_path / "script.py").write_text(ENDING.format(how=ENDS[how]))
    given = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(31500 + os.getpid() % 2000)}
    ranks = [
        start("script.py", str(rank), place, "run", environment=given | {"RANK": str(each), "LOCAL_RANK": str(each)})
        for each in range(2)
    ]
    ended, other = ranks[rank].wait(), ranks[1 - rank]
    begin = time.monotonic()
    other.wait(60)
    assert time.monotonic() - begin < 20.0
    assert ended.returncode not in (0, 2)
    assert other.returncode == 2
    said = [line for line in other.stderr.splitlines() if line.startswith("Another rank of this run has ended")]
    assert len(said) == 1
    if rank == 1 and place != "first":
        assert list((tmp_path / "run").glob("checkpoints/update-*"))
