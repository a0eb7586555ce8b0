"""Kills, signals and damage: what is left of a run, and that it goes on as if nothing had been."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import completions, jsonl, problems, run, without_time, write_config

from rlhf_fdiv.checkpoints import checkpoints, damage
from rlhf_fdiv.stages.stopping import STOPPED_EXIT_CODE

pytestmark = pytest.mark.faults

PROCESSES = multiprocessing.get_context("forkserver")  # pays for the imports once
PROCESSES.set_forkserver_preload(["tiny", *(f"rlhf_fdiv.stages.{s}" for s in ("sft", "reward", "policy", "evaluate"))])
ALL = "stages=[sft, reward, policy, evaluate]"
PPO = "estimator={name: ppo, num_epochs: 2, num_minibatches: 2}"
MOMENTS = "target={name: moments, moments: {praise: 0.5}, num_prompts: 4, num_generations: 8, dual_learning_rate: 0.3}"
RUNS = {
    "all stages": (ALL, PPO, "policy.save_steps=1", "sft.save_steps=2", "report_to=none"),
    "moments, replay": ("stages=[policy]", MOMENTS, "policy.replay_steps=2", "policy.save_steps=1", "report_to=none"),
    "prefer": ("stages=[prefer]", "objective=prefer", "prefer.max_steps=5", "prefer.save_steps=1", "report_to=none"),
    "distil": ("stages=[distil]", "objective=distil", "distil.max_steps=5", "distil.save_steps=1", "report_to=none"),
}


@pytest.fixture(scope="module")
def config(start, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    raw = tiny.raw_config(start, data, folder / "runs")
    raw |= {"prefer": {"num_pairs": 4, "max_completion_length": 6}, "distil": {"num_prompts": 4, "teacher": start}}
    raw["distil"]["max_completion_length"] = 6
    return write_config(folder / "faults.yaml", raw)


def process(*args):
    """A started process that runs the stages of a config."""
    made = PROCESSES.Process(target=tiny.run, args=args)
    made.start()
    return made


def equal(a, b) -> bool:
    """Of what torch.load gives, to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b)) if hasattr(a, "shape") else a == b


def same_folder(one: Path, two: Path) -> None:
    """Everything that a stage leaves behind, but for the time that it took, down to the bits of optimiser and generators."""
    names = [sorted(str(p.relative_to(x)) for p in x.rglob("*") if p.is_file()) for x in (one, two)]
    assert names[0] == names[1]
    of_time = ("finished.json", "training_args.bin", "trainer_state.json", "report.md", "README.md")
    for name in (n for n in names[0] if Path(n).name not in of_time):
        a, b = one / name, two / name
        if name.endswith((".pdf", ".png")):
            continue  # drawn from what is compared here; a PDF holds its date
        if name.endswith(".parquet"):
            pd.testing.assert_frame_equal(pd.read_parquet(a), pd.read_parquet(b))
        elif name == "metrics.jsonl":
            timed = {"seconds", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
            rows = [[{k: v for k, v in row.items() if k not in timed} for row in jsonl(x)] for x in (a, b)]
            assert rows[0] == rows[1]
        elif name.endswith((".bin", ".pt", ".pth", ".pkl")):
            assert equal(*(torch.load(x, weights_only=False) for x in (a, b))), name
        elif name.endswith(".safetensors"):
            assert tiny.same(load_file(a), load_file(b)), name
        else:
            assert a.read_bytes().replace(b"unbroken", b"broken") == b.read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_killed_at_random_moments_ends_bit_for_bit_as_one_that_was_not(config, name):
    """Each process is killed at a moment of the time that a whole run takes, until one has come to its end."""
    words, began = RUNS[name], time.monotonic()
    process(config, *words, "name=unbroken").join()
    whole = time.monotonic() - began
    print(f"{name}: a whole run takes {whole:.1f} s")
    chance, kills = random.Random(name), 0
    while True:
        child = process(config, *words, "name=broken")
        child.join(chance.uniform(0.05, 0.5) * whole if kills < 5 else None)
        if child.exitcode is not None:
            assert child.exitcode == 0
            if kills == 5:
                break
            # done before its kill: the next one begins anew
            (Path(config).parent / "runs" / "broken").rename(Path(config).parent / "runs" / f"{name}-{time.time()}")
            continue
        child.kill()
        child.join()
        kills += 1
    runs = Path(config).parent / "runs"
    for stage in words[0].removeprefix("stages=[").removesuffix("]").split(", "):
        same_folder(runs / "unbroken" / stage, runs / "broken" / stage)
    for folder in ("unbroken", "broken"):
        (runs / folder).rename(runs / f"{name}-{folder}")
