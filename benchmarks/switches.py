"""What dtype, packing, checkpointing, compile and processes gain here: speed and memory of SFT and policy on SmolLM2.

    python benchmarks/switches.py [--steps 6] [--only sft]

Each line is a run of its own, of the stage itself by the command line, with one switch changed against the first; the first
is run again at the end, so that a drift of the machine shows. SFT in texts a second (padding does not count), policy in
seconds a step (the median, without the first). Peak memory is that of the process with the most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rlhf_fdiv import film_reviews

ROOT = Path(__file__).parent.parent
PLAIN = "plain: float32"
SWITCHES: dict[str, dict[str, list[str]]] = {
    "sft": {
        PLAIN: [],
        "bfloat16": ["model.dtype=bfloat16"],
        "packing": ["sft.training_args.packing=true", "sft.training_args.packing_strategy=wrapped"],
        "activation checkpointing": ["sft.training_args.gradient_checkpointing=true"],
        "torch.compile": ["sft.training_args.torch_compile=true"],
        "two processes": ["sft.per_device_train_batch_size=8"],
    },
    "policy": {
        PLAIN: [],
        "bfloat16": ["model.dtype=bfloat16"],
        "all weights, no adapter": ["model.lora=null"],
        "Hugging Face generate": ["policy.engine=generate"],
        "logprob_chunk=128": ["policy.logprob_chunk=128"],
        "micro-batches of 8": ["policy.per_device_train_batch_size=8"],
        "two processes": [],
    },
}


def run(stage: str, switches: list[str], steps: int, processes: int) -> tuple[float, float]:
    """Speed, and peak MB."""
    with tempfile.TemporaryDirectory() as place:
        overrides = [f"output_dir={place}", "name=run", "report_to=none", "model.dtype=float32", f"{stage}.max_steps={steps}",
                     "sft.training_args.logging_steps=1", "policy.model=smollm2-135m", "policy.save_steps=1000",
                     "target={name: tilted, reward: acting, beta: 0.15}", *switches]  # fmt: skip
        stages = [f"rlhf_fdiv.stages.{stage}", str(ROOT / "configs/quickstart.yaml"), *overrides]
        command = [sys.executable, "-m", *stages]
        env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
        if processes > 1:
            command[2:2] = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
                            "--num_processes", str(processes), "--dynamo_backend", "no", "-m"]  # fmt: skip
            env["ACCELERATE_USE_CPU"] = "true"
        said = Path(place) / "said"
        with said.open("w") as file:
            process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=file)
            *_, usage = os.wait4(process.pid, 0)  # of the process and of those that it has waited for
        path = Path(place) / "run" / stage / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        if len(rows) < steps:
            raise RuntimeError(said.read_text()[-500:])
        if stage == "policy":
            return statistics.median(row["seconds"] for row in rows[1:]), usage.ru_maxrss / 1024
        texts = len((film_reviews.build() / "sft_train.jsonl").read_text(encoding="utf-8").splitlines())
        return rows[-1]["epoch"] * texts / rows[-1]["train_runtime"], usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", choices=SWITCHES)
    args = parser.parse_args()
    for stage in [args.only] if args.only else SWITCHES:
        unit = "s a step" if stage == "policy" else "texts a s"
        print(f"\n{stage}, {unit}, peak MB\n", flush=True)
        for name, switches in [*SWITCHES[stage].items(), (f"{PLAIN}, again", [])]:
            try:
                speed, peak = run(stage, switches, args.steps, 2 if name == "two processes" else 1)
                print(f"{name:28} {speed:8.2f} {peak:8.0f}", flush=True)
            except RuntimeError as error:
                print(f"{name:28} failed: {' '.join(str(error).split())[-200:]}", flush=True)


if __name__ == "__main__":
    main()
