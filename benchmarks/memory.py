"""The memory that `rlhf-fdiv plan` tells, beside the measured peak of the stage itself, each in fresh processes.

    python benchmarks/memory.py [--case NAME] [--json]

The peak is that of resident memory (VmHWM) over two steps, less what the process had after its imports and a first
multiplication; on a CPU nothing finer sees what kernels take for themselves. glibc is told to give every tensor back at once.
Prompts have 16 tokens, completions nearly always their full length, since the models are random.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import step
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

PROMPT = 16
IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
STRATEGY = {"one": "one device", "ddp": "DDP", "fsdp2": "FSDP2", "fsdp2-ac": "FSDP2, checkpointing"}


class Case(NamedTuple):
    model: str
    keys: tuple[str, ...] = ()
    stage: str = "policy"
    launch: str = "one"


def gpt2(vocab: int) -> Any:
    return GPT2Config(vocab_size=vocab, n_embd=256, n_layer=4, n_head=4, n_positions=512, **IDS)


def llama(vocab: int, width: int = 256, layers: int = 8) -> Any:
    return LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=512, **IDS,
    )  # fmt: skip


MODELS = {
    "gpt2-8k": gpt2(8192), "gpt2-50k": gpt2(50257), "llama-8k": llama(8192), "llama-50k": llama(50257),
    "llama-8k-wide": llama(8192, 512, 12),
}  # fmt: skip
LORA, FEW = (
    "model.lora={r: 16}",
    ("policy.num_prompts=2", "policy.num_generations=4", "policy.max_completion_length=16"),
)
CASES = {
    "gpt2, 8k": Case("gpt2-8k"),
    "gpt2, 50k": Case("gpt2-50k"),
    "gpt2, 50k, chunks": Case("gpt2-50k", ("policy.logprob_chunk=256",)),
    "llama, 8k": Case("llama-8k"),
    "llama, 8k, micro-batches": Case("llama-8k", ("policy.per_device_train_batch_size=16",)),
    "llama, 8k, 400 tokens": Case("llama-8k", ("policy.num_prompts=2", "policy.max_completion_length=400")),
    "llama, 8k, ppo": Case("llama-8k", ("estimator=ppo",)),
    "llama, 50k, LoRA": Case("llama-50k", (LORA,)),
    "llama, 50k, LoRA, chunks": Case("llama-50k", (LORA, "policy.logprob_chunk=256")),
    "wide llama, few texts": Case("llama-8k-wide", FEW),
    "wide llama, few texts, LoRA": Case("llama-8k-wide", (*FEW, LORA)),
    "prefer": Case("llama-8k", stage="prefer"),
    "sft": Case("llama-8k", stage="sft"),
    "sft, no checkpointing": Case("llama-8k", ("sft.training_args={gradient_checkpointing: false}",), "sft"),
    "DDP": Case("llama-8k", launch="ddp"),
    "DDP, wide, few texts": Case("llama-8k-wide", FEW, launch="ddp"),
    "FSDP2, wide, few texts": Case("llama-8k-wide", FEW, launch="fsdp2"),
    "FSDP2": Case("llama-8k", launch="fsdp2"),
    "FSDP2, micro-batches": Case("llama-8k", ("policy.per_device_train_batch_size=8",), launch="fsdp2"),
    "FSDP2, checkpointing": Case("llama-8k", launch="fsdp2-ac"),
    "FSDP2, LoRA": Case("llama-8k", (LORA,), launch="fsdp2"),
}


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [len(set(text.split())) / 10 for text in completions]


def make(folder: Path, case: Case) -> None:
    """Model, tokenizer and data."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    shape = MODELS[case.model]
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0").save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    texts = [" ".join(f"w{t}" for t in row) for row in torch.randint(2, shape.vocab_size, (128, 64)).tolist()]
    rows = [{"prompt": " ".join(x.split()[:PROMPT]), "completion": f" {x}", "chosen": f" {x}", "rejected": f" {x[::-1]}"}
            for x in texts]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config_of(folder: Path, case: Case) -> Any:
    from rlhf_fdiv import config as configs
    from rlhf_fdiv.config.files import with_overrides

    rows = str(folder / "rows.jsonl")
    raw = {
        "name": "run", "output_dir": str(folder), "stages": [case.stage], "report_to": "none",
        "model": {"name_or_path": str(folder), "dtype": "float32"},
        "data": {"prompts_train": rows, "sft_train": rows, "preferences_train": rows},
        "scorers": {"reward": {"name": "function", "path": "memory:reward"}},
        "objective": "prefer" if case.stage == "prefer" else "match",
        "policy": {"max_steps": 2, "num_prompts": 8, "num_generations": 8, "max_completion_length": 40,
                   "per_device_train_batch_size": 64, "save_steps": 1000},
        "prefer": {"max_steps": 2, "num_pairs": 16, "max_completion_length": 40, "save_steps": 1000},
        "sft": {"max_steps": 2, "per_device_train_batch_size": 16, "max_length": 80},
    }  # fmt: skip
    return configs.parse(with_overrides(raw, list(case.keys)))


def steps(folder: Path, case: Case) -> None:
    """Two steps of the stage, without what follows them: saving is no part of the plan."""
    import importlib

    from rlhf_fdiv.stages import training
    from rlhf_fdiv.tracking import RunFolder

    config = config_of(folder, case)
    run = RunFolder(config)
    if int(os.environ.get("RANK", "0")) == 0:
        run.prepare()
        run.stage(case.stage).mkdir(parents=True, exist_ok=True)
    training.Training.save = lambda self, step: None
    training.Training.finish = lambda self, tokenizer: None
    importlib.import_module(f"rlhf_fdiv.stages.{case.stage}").main(config, run, run.stage(case.stage))


def peak_here(folder: Path, case: Case) -> float:
    """MB, in this process."""
    torch.set_num_threads(1)
    if case.launch.startswith("fsdp2"):  # which accelerate gives to GPUs alone
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
        PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
        wrap = {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "ACCELERATE_USE_CPU": "false"}
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_RESHARD_AFTER_FORWARD": "true", **wrap,
                       "FSDP_ACTIVATION_CHECKPOINTING": str(case.launch.endswith("ac")).lower()}  # fmt: skip
    from rlhf_fdiv.stages import policy, prefer, sft  # noqa: F401

    (torch.randn(256, 256, requires_grad=True) @ torch.randn(256, 256)).sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = step.resident("VmRSS")
    steps(folder, case)
    return step.resident("VmHWM") - before


def measured(folder: Path, name: str) -> float:
    """MB of the process that needed most."""
    case, own = CASES[name], [__file__, "--peak-of", name, str(folder)]
    command = [sys.executable, *own]
    if case.launch != "one":
        launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
        command = [sys.executable, *launch.split(), "--dynamo_backend", "no", "--main_process_port", "0", *own]
    give_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    env = os.environ | give_back | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    peaks = [float(path.read_text()) for path in folder.glob("peak-*")]
    if len(peaks) != (1 if case.launch == "one" else 2):
        raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
    return max(peaks)


def planned(folder: Path, case: Case) -> float:
    """MB."""
    from rlhf_fdiv.footprint import Work, measure
    from rlhf_fdiv.plan import held

    config, strategy, processes = config_of(folder, case), STRATEGY[case.launch], 1 if case.launch == "one" else 2
    work = Work.of(config, case.stage, processes, PROMPT)
    use = measure(config, case.stage, work, not strategy.startswith("FSDP2"), strategy.endswith("checkpointing"))
    return held(use, strategy, processes, whole_copy=case.stage != "sft")["peak"] / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="only this one; may be repeated")
    parser.add_argument("--json", action="store_true", help="the last line is JSON")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        folder = Path(args.peak_of[1])
        peak = peak_here(folder, CASES[args.peak_of[0]])
        (folder / f"peak-{os.environ.get('RANK', '0')}").write_text(str(peak))
        os._exit(0)
    results = {}
    for name in args.case or CASES:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            make(folder, CASES[name])
            plan, peak = planned(folder, CASES[name]), measured(folder, name)
        results[name] = [round(plan), round(peak), round(plan / peak, 2)]
        print("| " + " | ".join(map(str, (name, *results[name]))) + " |", flush=True)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
