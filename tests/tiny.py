"""A run small enough for a test: a model folder of 2 layers and 24 words, its data files, a config, and the real stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_fdiv import config as configs
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.stages.common import execute
from rlhf_fdiv.tracking import RunFolder

torch.set_num_threads(1)

WORDS = ["<pad>", "<eos>", "<unk>", "film", ":", "review", "a", "the", "and", "is", "very", "plot", "cast", "good", "great",
         "fine", "bad", "dull", "weak", "one", "two", "three", "four", "five"]  # fmt: skip
GOOD, BAD = ["good", "great", "fine"], ["bad", "dull", "weak"]
FILMS = ["one", "two", "three", "four", "five", "one two", "two three four", "five five", "four one", "three two",
         "one four five", "five two"]  # fmt: skip
PATTERN = r"\b(good|great|fine)\b"


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = special or {"eos_token": "<eos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special)


def model_folder(folder: Path, **special: str) -> str:
    """What a user has: config, float32 weights and tokenizer of a Llama with 64 tokens of context."""
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=64, initializer_range=0.1,
                         bos_token_id=None, eos_token_id=1, pad_token_id=0)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(**special).save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def data_files(folder: Path) -> dict[str, str]:
    """Reviews, pairs with the raters' share and margin, prompts with references, and rated texts for a gold score."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [f"film : {title} review :" for title in FILMS]
    texts = [f"the {noun} is {word}" for noun in ("plot", "cast") for word in (*GOOD, *BAD)]
    sft = [{"prompt": prompts[i % 12], "completion": f" {texts[(5 * i) % 12]}"} for i in range(40)]
    pairs = [
        {
            "prompt": prompts[i % 12],
            "chosen": f" the {noun} is {GOOD[i % 3]}",
            "rejected": f" the {noun} is {BAD[(i // 3) % 3]}",
            "preference": (0.8, 0.9, 1.0)[i % 3],
            "margin": 1.0 + i % 2,
        }
        for i in range(30)
        for noun in (("plot", "cast")[i % 2],)
    ]
    rows = [{"prompt": p, "references": [texts[i], texts[-1 - i]]} for i, p in enumerate(prompts)]
    gold = [{"text": f"a {t}", "rating": 2.0 if t.split()[-1] in GOOD else -2.0} for t in texts * 3]
    return {
        "sft_train": write_rows(folder / "sft_train.jsonl", sft),
        "sft_eval": write_rows(folder / "sft_eval.jsonl", sft[:7]),
        "preferences_train": write_rows(folder / "preferences_train.jsonl", pairs),
        "preferences_eval": write_rows(folder / "preferences_eval.jsonl", pairs[:9]),
        "prompts_train": write_rows(folder / "prompts_train.jsonl", rows),
        "prompts_eval": write_rows(folder / "prompts_eval.jsonl", rows[:8]),
        "gold": write_rows(folder / "gold.jsonl", gold),
    }


def raw_config(model: str, data: dict[str, str], output_dir: Path) -> dict[str, Any]:
    """All stages, each a few steps."""
    return {
        "output_dir": str(output_dir),
        "report_to": "tensorboard",
        "model": {"name_or_path": model, "dtype": "float32", "lora": {"r": 2, "lora_alpha": 4}},
        "data": {k: v for k, v in data.items() if k != "gold"},
        "scorers": {
            "reward": {"name": "reward_model", "clip": [-4, 4]},
            "gold": {"name": "ngram_ridge", "data": data["gold"]},
            "praise": {"name": "pattern", "pattern": PATTERN},
            "positive": {"name": "threshold", "of": "reward", "above": 0.0},
        },
        "sft": {"max_steps": 6, "learning_rate": 1.0e-2, "per_device_train_batch_size": 8},
        "reward": {"layers": [0.5, 1.0], "l2": 1.0},
        "policy": {
            "max_steps": 4,
            "num_prompts": 4,
            "num_generations": 4,
            "max_completion_length": 6,
            "per_device_train_batch_size": 8,
            "learning_rate": 1.0e-2,
            "save_steps": 2,
        },
        "evaluate": {"num_generations": 4, "batch_size": 16},
        "target": {"name": "tilted", "reward": "reward", "beta": 0.5},
        "divergence": "reverse_kl",
        "objective": "match",
        "estimator": "rloo",
    }


def write_config(path: Path, raw: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return str(path)


def run(path: str, *overrides: str) -> RunFolder:
    """What `rlhf-fdiv run PATH a.b=value …` does."""
    config = configs.load(path, list(overrides))
    return execute(config, config.stages)


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def completions(out):
    return pd.concat(pd.read_parquet(p) for p in sorted((out / "completions").glob("*.parquet"))).reset_index(drop=True)


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def problems(function: Any, *args: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        function(*args)
    return caught.value.problems


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def away(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest distance of any weight of two models."""
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def two_processes(*args: str) -> str:
    """`accelerate launch` on the CPU; what it said. Judge by what is left: interpreters sometimes abort at exit."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", *args,
    ]  # fmt: skip
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        try:
            return process.communicate(timeout=400)[0]
        except subprocess.TimeoutExpired:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:  # in sessions of their own
                child.kill()
            return f"hung: {process.communicate()[0]}"
