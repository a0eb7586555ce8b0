"""How the cost of our own policy step grows: with completions, their length, prompts, vocabulary, and rows of prompt data.

    python benchmarks/scaling.py [--steps 3] [--json]

One thread, the settings of an axis interleaved, CPU seconds, medians. Each axis is fitted by a line (fixed cost + cost a
unit, least squares of relative errors), and the largest distance from it is told: what grows faster than it should bends.
Peak memory is that of a process of its own for each setting, less what it had before the model was loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import step
import torch

BASE = {"num_prompts": 4, "num_generations": 8, "max_completion_length": 24}
AXES = {
    "num_generations": [8, 16, 32, 64],
    "num_prompts": [4, 8, 16, 32],
    "max_completion_length": [24, 48, 72, 96],
    "vocabulary": [8192, 16384, 32768, 65536],
}
CHUNK, ROWS = 128, 100_000


def setting(axis: str, value: int) -> tuple[dict[str, int], int]:
    """Policy options and vocabulary."""
    return (BASE, value) if axis == "vocabulary" else (BASE | {axis: value}, 8192)


def start(place: Path, options: dict[str, Any], vocabulary: int, rows: int = 64) -> Iterator[Any]:
    """Our stage on a small GPT-2, held after each step."""
    folder = place / "model"
    folder.mkdir(parents=True)
    step.random_gpt2(vocabulary, 128, 2)(folder)
    if rows > 64:
        lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "prompts.jsonl").write_text("".join(lines * (rows // 64 + 1)), encoding="utf-8")
    batch = options["num_prompts"] * options["num_generations"]
    return step.ours(folder, step.SETUPS["small"], place / "out", **options, per_device_train_batch_size=batch)


def interleaved(stages: dict[Any, Iterator[Any]], steps: int) -> dict[Any, list[float]]:
    """CPU seconds of each step, after two to warm up."""
    seconds: dict[Any, list[float]] = {key: [] for key in stages}
    for turn in range(steps + 2):
        for key, stage in stages.items():
            began = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                next(stage)
            if turn >= 2:
                seconds[key].append(time.process_time() - began)
    return seconds


def line(x: list[int], y: list[float]) -> tuple[float, float, float]:
    """Fixed cost, cost a unit, and the largest relative distance of y from them."""
    design = np.stack([np.ones(len(x)), x], 1)
    fit, *_ = np.linalg.lstsq(design / np.array(y)[:, None], np.ones(len(x)), rcond=None)
    return float(fit[0]), float(fit[1]), float(np.abs(design @ fit / y - 1).max())


def grow(axis: str, steps: int, log: Any) -> dict[str, Any]:
    values = AXES[axis]
    with tempfile.TemporaryDirectory() as place:
        stages = {v: start(Path(place) / str(v), *setting(axis, v)) for v in values}
        cpu = {v: statistics.median(s) for v, s in interleaved(stages, steps).items()}
    peaks = {chunk: [peak_memory(axis, v, chunk) for v in values] for chunk in (0, CHUNK)}
    fixed, each, off = line(values, list(cpu.values()))
    log(f"\n{axis}: {fixed:.2f} s + {1000 * each:.3g} ms a unit; at most {100 * off:.1f} % from that line\n")
    log(f"{axis:>22} {'CPU s':>8} {'peak MB':>8} {f'by chunks of {CHUNK}':>18}")
    for i, value in enumerate(values):
        log(f"{value:22} {cpu[value]:8.3f} {peaks[0][i]:8.0f} {peaks[CHUNK][i]:18.0f}")
    memory = {name: line(values, peaks[chunk]) for name, chunk in (("peak", 0), ("chunked_peak", CHUNK))}
    return {"off_line": round(off, 4)} | {
        f"{name}_{k}": round(v, 4)
        for name, (_, mb, o) in memory.items()
        for k, v in (("mb_a_unit", mb), ("off_line", o))
    }


def bookkeeping(steps: int, log: Any) -> dict[str, float]:
    """A step with 100,000 rows of prompts, beside the same with 64; and log Z alone, with 100,000 estimates kept."""
    from rlhf_fdiv.stages.training import row_order
    from rlhf_fdiv.targets import LogPartition

    with tempfile.TemporaryDirectory() as place:
        stages = {n: start(Path(place) / str(n), BASE, 8192, n) for n in (64, ROWS)}
        seconds = {n: statistics.median(s) for n, s in interleaved(stages, 3 * steps).items()}
    known = LogPartition()
    known.update(list(range(ROWS)), torch.randn(ROWS, 8))
    weights = torch.randn(BASE["num_prompts"], BASE["num_generations"])
    began = time.process_time()
    for i in range(100):
        known.update(row_order(0, i + 1, BASE["num_prompts"], ROWS), weights, weights)
    share = (time.process_time() - began) / 100 / seconds[64]
    log(f"\n{ROWS} rows of prompts: a step takes {seconds[ROWS] / seconds[64]:.3f} of one with 64 rows; choosing its rows "
        f"and updating log Z take {100 * share:.2f} % of a step")  # fmt: skip
    return {"rows_ratio": round(seconds[ROWS] / seconds[64], 3), "log_z_share": round(share, 5)}


def peak_memory(axis: str, value: int, chunk: int) -> float:
    """MB of a process that makes three steps."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak-of", axis, str(value), str(chunk)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{axis} {value}: {done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def peak_here(axis: str, value: int, chunk: int) -> None:
    from rlhf_fdiv.stages import policy  # noqa: F401

    options, vocabulary = setting(axis, value)
    with tempfile.TemporaryDirectory() as place:
        Path("/proc/self/clear_refs").write_text("5")
        before = step.resident("VmRSS")
        stage = start(Path(place), options | {"logprob_chunk": chunk}, vocabulary)
        Path("/proc/self/clear_refs").write_text("5")  # making the model does not count
        for _ in range(3):
            next(stage)
        print(step.resident("VmHWM") - before, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", choices=[*AXES, "rows"], action="append", help="only this one; may be repeated")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each setting")
    parser.add_argument("--json", action="store_true", help="the tables go to stderr, and the last line is JSON")
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak_of:
        peak_here(args.peak_of[0], *map(int, args.peak_of[1:]))
        os._exit(0)
    out = sys.stderr if args.json else sys.stdout

    def log(text: str) -> None:
        print(text, file=out, flush=True)

    results: dict[str, Any] = {}
    for axis in args.axis or [*AXES, "rows"]:
        results[axis] = bookkeeping(args.steps, log) if axis == "rows" else grow(axis, args.steps, log)
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
