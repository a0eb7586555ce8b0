"""What a run will hold in memory, told before it starts: `rlhf-fdiv plan CONFIG`. What `footprint` finds of one process is
shared out here among devices, as each strategy does it.

Not counted: the context of CUDA (about half a GiB), what kernels and NCCL need for themselves, fragmentation, loading; the
activations of reward models, and with `engine: generate` the logits of every step that it keeps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rich.table import Column, Table

from rlhf_fdiv.config import RunConfig
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.footprint import Use, Work, measure

STRATEGIES = ("one device", "DDP", "ZeRO-1", "ZeRO-2", "FSDP2", "FSDP2, checkpointing", "ZeRO-3")
BUCKET, LIVE = 500_000_000, 1_000_000_000  # weights: DeepSpeed's reduce_bucket_size and stage3_max_live_parameters


def held(use: Use, strategy: str, devices: int, moments: int = 2, whole_copy: bool = True) -> dict[str, int]:
    """Bytes a device holds, by kind; `peak` is what stays and the largest of three moments: sampling, the update, the step.

    Of N trained weights of b bytes (ZeRO: arXiv 1910.02054, section 5): DDP holds all and, for its gradients' buckets, b·N
    more; ZeRO-1 shares out the optimiser, ZeRO-2 also the gradients, FSDP2 and ZeRO-3 also the weights. AdamW's `moments` are
    of its weights' dtype; DeepSpeed steps along float32 weights of its own. What is shared out comes together for use: with
    FSDP2 two blocks and what is outside of them, with DeepSpeed `BUCKET` gradients and `LIVE` weights; what samples is a
    whole copy, with an adapter the reference too. On a GPU AdamW's step makes one tensor as large as all it steps along.
    Gradients come as activations go, so that of an update the larger counts, beside the head's gradient, which comes first.
    """
    zero, fsdp = strategy.startswith("ZeRO"), strategy.startswith("FSDP2")
    sharded = fsdp or strategy == "ZeRO-3"
    one = use.gradients / max(use.master // 4, 1)  # bytes of a weight
    weights, gradients, optimiser, buckets = use.weights, use.gradients, moments * use.gradients, 0
    update, step, copy = use.update, use.gradients, use.weights if sharded and whole_copy else 0
    if strategy == "DDP":
        buckets = gradients
    if zero:
        optimiser, step = (1 + moments) * use.master // devices, 2 * use.master // devices
    if fsdp:
        optimiser, step = optimiser // devices, step // devices
        update += 2 * sum(use.block) + sum(use.outside)
    if sharded or strategy == "ZeRO-2":
        gradients, buckets = gradients // devices, 0 if fsdp else round(BUCKET * one)
    if sharded:
        weights = weights // devices
        update += 0 if fsdp else min(use.weights, round(LIVE * one))
    together = gradients + update if use.several else max(gradients, update) + min(gradients, use.outside[1])
    stays = {"weights": weights, "optimiser": optimiser, "reference": use.reference, "copy": copy, "others": use.others}
    peak = sum(stays.values()) + buckets + max(use.sampling, together, gradients + step)
    return {**stays, "gradients": gradients + buckets, "sampling": use.sampling, "update": update, "peak": peak}


def plan(config: RunConfig, devices: int, memory: float, prompt_length: int) -> list[dict[str, Any]]:
    """GiB a device, and whether they fit `memory`: a row for each of the stages sft, policy and prefer that the config has,
    each way to train it, all weights or the config's adapter, and each strategy. Raises UserError where it has none."""
    rows: list[dict[str, Any]] = []
    stages = [stage for stage in config.stages if stage in ("sft", "policy", "prefer")]
    if not stages:
        raise UserError("stages: sft, policy and prefer are planned, and this config has none of them")
    for stage in stages:
        moments = 0 if getattr(getattr(config, stage), "optim", "") == "sgd" else 2
        for lora in [None] if stage == "sft" or config.model.lora is None else [None, config.model.lora]:
            tuned = replace(config, model=replace(config.model, lora=lora))
            uses: dict[Any, Use] = {}
            for strategy in STRATEGIES if devices > 1 else STRATEGIES[:1]:
                number = 1 if strategy == "one device" else devices
                sharded = strategy.startswith("FSDP2") or strategy == "ZeRO-3"
                key = (Work.of(config, stage, number, prompt_length), not sharded, strategy.endswith("checkpointing"))
                if key not in uses:
                    uses[key] = measure(tuned, stage, *key)
                found = held(uses[key], strategy, number, moments, whole_copy=stage != "sft")
                row = {"stage": stage, "trains": "LoRA" if lora else "all weights", "strategy": strategy}
                rows.append(row | {k: round(v / 2**30, 3) for k, v in found.items()})
    return [row | {"fits": row["peak"] <= memory} for row in rows]


def tables(rows: list[dict[str, Any]], devices: int, memory: float) -> Iterator[Any]:
    """A table for each stage and way to train, and below it the first of its strategies that fits."""
    for (stage, trains), group in itertools.groupby(rows, lambda row: (row["stage"], row["trains"])):
        found = list(group)
        numbers = [k for k, v in found[0].items() if isinstance(v, float)]
        title = f"{stage}, {trains}: GiB a device, {devices} of {memory:g} GiB"
        table = Table(Column(no_wrap=True), *(Column(k, justify="right") for k in numbers), "fits", title=title)
        for row in found:
            table.add_row(row["strategy"], *(f"{row[k]:.2f}" for k in numbers), "yes" if row["fits"] else "")
        yield table
        fitting = [row["strategy"] for row in found[devices > 1 :] if row["fits"]]
        lower = (
            "nothing fits: lower per_device_train_batch_size or set logprob_chunk, model.lora or model.dtype=bfloat16"
        )
        yield f"take {fitting[0]}" if fitting else lower
