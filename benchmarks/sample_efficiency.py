"""How near a method comes to a known optimum with equal samples, each at its own best learning rate.

    python benchmarks/sample_efficiency.py [--task toy] [--jobs 2] [--json]

J(π) = E_π[r] − β·KL(π‖a) has the optimum p = a·exp(r/β)/Z, where it is β·log Z, and what a policy lacks of it is β·KL(π‖p).
Three tasks: `toy`, whose texts are enumerated, so that J and the optimum have no error at all; `presence`, a GPT-2 trained on
film reviews that is paid for each review which says film, movie or picture; `rating`, the same paid what a ridge on n-grams,
fitted to rated reviews, says of its own. Of these two the optimum follows from 512 untrained samples a prompt, and
J is measured on fresh samples with the exact KL of each visited state.

Every method starts from the same weights and trains all of them on as many samples, with Adam, the linear schedule and the
clipping of gradients that are the default of the trainers. A sweep of rates on two seeds chooses its rate; five other seeds
confirm it. TRL's trainers run with β as ours; their other defaults stay, but for dropout, which is off everywhere. All
prompts have the same length, since TRL gives GPT-2 no position_ids and so trains it on wrong positions under padding.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

RATES = {"toy": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2], "presence": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]}
RATES["rating"] = RATES["presence"]
SWEEP, CONFIRM = [0, 1], [10, 11, 12, 13, 14]


class Task(NamedTuple):
    """`folder` holds model, tokenizer and prompts.jsonl; `measure` gives E[r] and KL(π‖a) of a model folder."""

    folder: Path
    reward: str  # module:function
    beta: float
    length: int
    num_prompts: int
    num_generations: int
    steps: int
    measure: Callable[[Path], tuple[float, float]]


# -- the tasks -----------------------------------------------------------------------------------------------------------


def toy() -> Task:
    from rlhf_fdiv import assets

    def build(folder: Path) -> None:
        shutil.copytree(assets.toy(), folder, dirs_exist_ok=True)
        (folder / "prompts.jsonl").write_text(
            "".join(json.dumps({"prompt": p}) + "\n" for p in "abcd"), encoding="utf-8"
        )

    folder = assets.build_once(assets.cache_dir() / "benchmark-toy-v1", build)
    return Task(folder, "rlhf_fdiv.assets:toy_reward", 0.1, 5, 4, 16, 150, measure_toy)


@functools.cache
def toy_tables() -> Any:
    """Tokenizer ids of the prompts, every text, its reward and log a, [P, N] each."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf_fdiv import assets, metrics

    folder = toy().folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    ids = tokenizer(prompts)["input_ids"]
    every = metrics.all_texts(len(tokenizer), [tokenizer.eos_token_id], 5)
    texts = tokenizer.batch_decode(every, skip_special_tokens=True)
    reward = torch.tensor([assets.toy_reward([p] * len(texts), texts) for p in prompts], dtype=torch.float64)
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    return ids, every, reward, metrics.log_probs_of_all(lm, ids, every, 1024)


def measure_toy(folder: Path) -> tuple[float, float]:
    from transformers import AutoModelForCausalLM

    from rlhf_fdiv import metrics

    ids, every, reward, log_a = toy_tables()
    log_pi = metrics.log_probs_of_all(AutoModelForCausalLM.from_pretrained(folder).eval(), ids, every, 1024)
    pi = log_pi.exp()
    return float((pi * reward).sum(1).mean()), float((pi * (log_pi - log_a)).sum(1).mean())


def toy_optimum() -> tuple[float, float]:
    """J of the target and of the untouched model."""
    _, _, reward, log_a = toy_tables()
    return float(0.1 * (log_a + reward / 0.1).logsumexp(1).mean()), float((log_a.exp() * reward).sum(1).mean())


FILM = r"\b(films?|movies?|pictures?)\b"


def names_the_film(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    import re

    return [float(bool(re.search(FILM, text, re.IGNORECASE))) for text in completions]


@functools.cache
def ridge() -> Any:
    from rlhf_fdiv.rewards import NgramRidge

    return NgramRidge("film_reviews/ratings_train.jsonl").open(torch.device("cpu"))


def rated(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(x) for x in ridge()(prompts, completions)]


def presence() -> Task:
    measure = functools.partial(measure_reviews, names_the_film)
    return Task(reviews_folder(), "sample_efficiency:names_the_film", 0.3, 24, 4, 16, 40, measure)


def rating() -> Task:
    return Task(
        reviews_folder(), "sample_efficiency:rated", 0.5, 24, 4, 16, 40, functools.partial(measure_reviews, rated)
    )


def reviews_folder() -> Path:
    """A GPT-2 of .7 M parameters after its SFT on film reviews; made once, by the library's own stage."""
    from transformers import AutoTokenizer

    from rlhf_fdiv import assets, film_reviews
    from rlhf_fdiv import config as configs
    from rlhf_fdiv.stages.common import execute

    def build(folder: Path) -> None:
        config = Path(__file__).parent.parent / "configs/reviews_gpt2.yaml"
        made = execute(configs.load(config, [f"output_dir={folder}", "name=made", "stages=[sft]"]), ["sft"])
        for path in (made.path / "sft/model").iterdir():
            os.replace(path, folder / path.name)
        shutil.rmtree(made.path)
        lines = (film_reviews.build() / "prompts_train.jsonl").read_text(encoding="utf-8").splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines]
        lengths = [len(x) for x in AutoTokenizer.from_pretrained(folder)(prompts)["input_ids"]]
        rows = [{"prompt": p} for p, n in zip(prompts, lengths, strict=True) if n == statistics.mode(lengths)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    return assets.build_once(assets.cache_dir() / "benchmark-presence-v1", build)


@functools.cache
def reviews_models() -> Any:
    """The untouched model, its tokenizer and the prompts, which are those that are trained on."""
    from rlhf_fdiv.model_options import ModelOptions
    from rlhf_fdiv.models import load_causal_lm, load_tokenizer

    folder = reviews_folder()
    tokenizer = load_tokenizer(str(folder))
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ids = tokenizer([json.loads(line)["prompt"] for line in lines])["input_ids"]
    return load_causal_lm(str(folder), ModelOptions(str(folder))), tokenizer, ids


def rewards_of(reward: Callable[..., list[float]], lm: Any, generations: int, seed: int) -> Any:
    """Rewards of fresh completions of every prompt, [P, generations], and what was drawn."""
    from rlhf_fdiv.rollout import sample, uniforms

    _, tokenizer, ids = reviews_models()
    drawn, _, _ = sample(lm, tokenizer, ids, generations, uniforms(seed, 0, len(ids) * generations, 24))
    rows = [x[m.bool()] for x, m in zip(drawn.completion_ids, drawn.mask, strict=True)]
    scores = reward([], tokenizer.batch_decode(rows, skip_special_tokens=True))
    return torch.tensor(scores, dtype=torch.float64).view(-1, generations), drawn


def measure_reviews(reward: Callable[..., list[float]], folder: Path) -> tuple[float, float]:
    from rlhf_fdiv import metrics
    from rlhf_fdiv.model_options import ModelOptions
    from rlhf_fdiv.models import load_causal_lm

    lm = load_causal_lm(str(folder), ModelOptions(str(folder)))
    scores, drawn = rewards_of(reward, lm, 32, 12345)
    _, _, kl = metrics.score_both(lm, reviews_models()[0], drawn, 512)
    return float(scores.mean()), float(kl.mean())


def reviews_optimum(reward: Callable[..., list[float]], beta: float) -> tuple[float, float]:
    """J of the target, β·log Z by prompt, log Ẑ corrected to second order for its number of samples; and J untouched."""
    scores, _ = rewards_of(reward, reviews_models()[0], 512, 54321)
    w = (scores / beta).exp()
    log_z = w.mean(1).log() + w.var(1) / 512 / (2 * w.mean(1) ** 2)
    return float(beta * log_z.mean()), float(scores.mean())


TASKS: dict[str, tuple[Callable[[], Task], Callable[[], tuple[float, float]]]] = {
    "toy": (toy, toy_optimum),
    "presence": (presence, functools.partial(reviews_optimum, names_the_film, 0.3)),
    "rating": (rating, functools.partial(reviews_optimum, rated, 0.5)),
}


# -- the methods ---------------------------------------------------------------------------------------------------------


def ours(
    task: Task,
    rate: float,
    seed: int,
    out: Path,
    objective: str = "match",
    policy: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    from rlhf_fdiv import config as configs
    from rlhf_fdiv.stages.common import execute

    policy = {**(policy or {}), "max_steps": task.steps, "num_prompts": task.num_prompts,
              "num_generations": task.num_generations, "max_completion_length": task.length,
              "per_device_train_batch_size": task.num_prompts * task.num_generations,
              "learning_rate": rate, "lr_scheduler_type": "linear", "save_steps": task.steps}  # fmt: skip
    raw = {"name": "ours", "output_dir": str(out), "stages": ["policy"], "report_to": "none", "seed": seed,
           "model": {"name_or_path": str(task.folder)}, "data": {"prompts_train": str(task.folder / "prompts.jsonl")},
           "scorers": {"reward": {"name": "function", "path": task.reward}}, "objective": objective,
           "target": {"name": "tilted", "reward": "reward", "beta": task.beta}, "policy": policy, **changes}  # fmt: skip
    return execute(configs.parse(raw), ["policy"]).path / "policy/model"


def trl(task: Task, rate: float, seed: int, out: Path, kind: str, **changes: Any) -> Path:
    import importlib

    import trl
    from datasets import Dataset

    module, _, name = task.reward.partition(":")
    lines = (task.folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(out), per_device_train_batch_size=task.num_prompts * task.num_generations, seed=seed,
        num_generations=task.num_generations, max_completion_length=task.length, beta=task.beta, learning_rate=rate,
        max_steps=task.steps * changes.get("num_iterations", 1), lr_scheduler_type="linear", save_strategy="no",
        logging_strategy="no", report_to="none", use_cpu=not torch.cuda.is_available(), bf16=False,
        gradient_checkpointing=False, disable_dropout=True, disable_tqdm=True, **changes,
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model=str(task.folder), reward_funcs=getattr(importlib.import_module(module), name), args=args,
        train_dataset=Dataset.from_list([{"prompt": json.loads(line)["prompt"]} for line in lines]),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(out / "model"))
    return out / "model"


def rloo(epochs: int, **policy: Any) -> dict[str, Any]:
    return {"estimator": {"name": "rloo", "num_epochs": epochs}, "policy": policy}


PREFIXES = {"name": "ppo", "critic": "prefixes", "num_epochs": 4, "num_minibatches": 1, "lam": 0.7}
METHODS: dict[str, Callable[..., Path]] = {
    "rloo": functools.partial(ours, **rloo(1)),
    "rloo, 2 epochs": functools.partial(ours, **rloo(2)),
    "rloo, 4 epochs": functools.partial(ours, **rloo(4)),
    "rloo, 2 epochs, replay 3": functools.partial(ours, **rloo(2, replay_steps=3)),
    "rloo, 4 epochs, replay 3": functools.partial(ours, **rloo(4, replay_steps=3)),
    "rloo, 2 epochs, replay 7": functools.partial(ours, **rloo(2, replay_steps=7)),
    "rloo, 2 epochs, replay 3, w≤1": functools.partial(ours, **rloo(2, replay_steps=3, max_importance_weight=1.0)),
    "rloo, 4 epochs, replay 3, w≤1": functools.partial(ours, **rloo(4, replay_steps=3, max_importance_weight=1.0)),
    "rloo, 4 epochs, replay 7, w≤1": functools.partial(ours, **rloo(4, replay_steps=7, max_importance_weight=1.0)),
    "js, 4 epochs": functools.partial(ours, divergence="js", **rloo(4)),
    "grpo": functools.partial(ours, objective="regularise", estimator="grpo"),
    "ppo, 4 epochs": functools.partial(ours, objective="regularise", estimator={"name": "ppo", "num_epochs": 4}),
    "ppo of prefixes": functools.partial(ours, objective="regularise", estimator=PREFIXES),
    "ppo of prefixes, lam 1": functools.partial(ours, objective="regularise", estimator=PREFIXES | {"lam": 1.0}),
    "TRL RLOO": functools.partial(trl, kind="RLOO"),
    "TRL RLOO, 4 iterations": functools.partial(trl, kind="RLOO", num_iterations=4),
    "TRL GRPO": functools.partial(trl, kind="GRPO"),
    "TRL GRPO, 4 iterations": functools.partial(trl, kind="GRPO", num_iterations=4),
    "TRL GRPO, not scaled": functools.partial(trl, kind="GRPO", scale_rewards="none"),
}


def one(name: str, method: str, rate: float, seed: int) -> tuple[float, float]:
    """E[r] and KL(π‖a) of one training run; nan where it broke."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(Path(__file__).parent))
    task = TASKS[name][0]()
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        try:
            return task.measure(METHODS[method](task, rate, seed, Path(place)))
        except Exception as error:
            print(f"{name}, {method}, {rate:g}, seed {seed}: {type(error).__name__}: {error}", file=sys.stderr)
            return math.nan, math.nan


# -- the comparison ------------------------------------------------------------------------------------------------------


def compare(name: str, methods: list[str], jobs: int, log: Callable[[str], None]) -> dict[str, Any]:
    make, optimum_of = TASKS[name]
    task, (optimum, untouched) = make(), optimum_of()
    rates, began = RATES[name], time.time()
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:

        def runs(grid: list[tuple[str, float, int]]) -> dict[tuple[str, float, int], float]:
            """J of each; a run that broke has learnt nothing that one could use, which counts as −∞."""
            done = pool.map(one, [name] * len(grid), *zip(*grid, strict=True))
            scores = (r - task.beta * kl for r, kl in done)
            return {key: -math.inf if math.isnan(j) else j for key, j in zip(grid, scores, strict=True)}

        swept = runs([(m, rate, seed) for m in methods for rate in rates for seed in SWEEP])
        mean = {m: [float(np.mean([swept[m, rate, s] for s in SWEEP])) for rate in rates] for m in methods}
        best = {m: rates[int(np.argmax(mean[m]))] for m in methods}
        confirmed = runs([(m, best[m], seed) for m in methods for seed in CONFIRM])
    log(f"\n{name}: optimum J* = {optimum:.4f}, untouched {untouched:.4f}; {task.steps} steps of {task.num_prompts} × "
        f"{task.num_generations} samples; {time.time() - began:.0f} s\n")  # fmt: skip
    log("J* − J on two seeds at each rate, * the best, ! worse than untouched; then at the best on five others\n")
    log(f"{'':30}" + "".join(f"{rate:>10g}" for rate in rates) + f"{'confirmed ± s.e.':>20} {'KL to target':>14}")
    results: dict[str, Any] = {"optimum": optimum, "untouched": untouched}
    for m in methods:
        cells = [f"{optimum - j:.4f}{'*' if r == best[m] else '!' if j < untouched else ' '}"
                 for r, j in zip(rates, mean[m], strict=True)]  # fmt: skip
        gaps = np.array([optimum - confirmed[m, best[m], s] for s in CONFIRM])
        gap, error = float(gaps.mean()), float(gaps.std(ddof=1) / math.sqrt(len(gaps)))
        log(f"{m:30}" + "".join(f"{c:>10}" for c in cells) + f"{gap:>11.4f} ± {error:.4f} {gap / task.beta:>14.3f}")
        above = [r for r, j in zip(rates, mean[m], strict=True) if j > untouched]
        results[m] = {
            "gap": gap,
            "gap_se": error,
            "rate": best[m],
            "sweep": [optimum - j for j in mean[m]],
            "above": above,
        }
    mine, peers = ([m for m in methods if m.startswith("TRL") == peer] for peer in (False, True))
    if mine and peers:
        ahead, behind = (min(group, key=lambda m: results[m]["gap"]) for group in (mine, peers))
        ratio = results[ahead]["gap"] / results[behind]["gap"]
        results["best_of_ours_over_best_peer"] = ratio
        log(f"\n{ahead} is left with {ratio:.2f} of the distance that {behind} is left with")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, action="append", help="only this one; may be repeated")
    parser.add_argument("--method", choices=METHODS, action="append", help="only this one; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--json", action="store_true", help="the tables go to stderr, and the last line is JSON")
    args = parser.parse_args()
    out = sys.stderr if args.json else sys.stdout
    results = {name: compare(name, args.method or list(METHODS), args.jobs, lambda text: print(text, file=out, flush=True))
               for name in args.task or TASKS}  # fmt: skip
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
