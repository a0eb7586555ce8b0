"""What a run will hold in memory, told before it starts: `rlhf-fdiv plan CONFIG`.

From configs alone: the model is made of tensors that have shapes and no storage, and the code that trains, `Policy`'s own
forward, its backward and a step of decoding, runs on them while a ledger adds up what is alive. So activations, logits,
checkpointing and `logprob_chunk` have no formula here that the code could leave behind. Where values decide a shape the
largest is taken: every completion is as long as it may be. What a strategy makes of it is `held`.

Not counted: the context of CUDA (about half a GiB), what kernels and NCCL need for themselves, fragmentation, loading; the
activations of reward models, and with `engine: generate` the logits of every step that it keeps.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Column, Table
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache
from trl.trainer.utils import add_fused_lm_head

from rlhf_fdiv.config import RunConfig
from rlhf_fdiv.config.files import find_config
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.known_models import resolve_model
from rlhf_fdiv.models import Policy, Reference, adapted, base_of, under_adapter, with_reference
from rlhf_fdiv.reward_models import is_reward_folder
from rlhf_fdiv.rewards import RewardModel, Threshold
from rlhf_fdiv.rollout import _Appending, _in_place, _inverse_cdf
from rlhf_fdiv.sequences import Sequences, wide
from rlhf_fdiv.weights import readable

STRATEGIES = ("one device", "DDP", "ZeRO-1", "ZeRO-2", "FSDP2", "FSDP2, checkpointing", "ZeRO-3")
BUCKET, LIVE = 500_000_000, 1_000_000_000  # weights: DeepSpeed's reduce_bucket_size and stage3_max_live_parameters
DEPTH = 4  # layers that are run; each of the others adds what two of these do


class Ledger(TorchDispatchMode):
    """Bytes of the tensors that are alive, `now` and at `most`, of real ones or of FakeTensorMode's. What only values could
    tell, `distinct` does where it is given: `unique` finds so many, and a boolean mask keeps everything."""

    def __init__(self, distinct: int | None = None) -> None:
        super().__init__()
        self.now = self.most = 0
        self.distinct, self._known = distinct, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        index = args[1][0] if func is torch.ops.aten.index.Tensor else None
        if self.distinct and func is torch.ops.aten.unique_dim.default:
            which = torch.arange(args[0].shape[1]) % self.distinct
            out = (args[0][:, : self.distinct].clone(), which, which[: self.distinct])
        elif self.distinct and index is not None and index.dtype == torch.bool:
            out = args[0].flatten(0, index.ndim - 1).clone()
        else:
            out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._enter, out)
        return out

    def _enter(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Work(NamedTuple):
    """One process's share of a step: a micro-batch of `rows` texts with `distinct` prompts, and what it samples at a time."""

    rows: int
    distinct: int
    prompts: int
    generations: int
    prompt_length: int
    length: int
    several: bool

    @classmethod
    def of(cls, config: RunConfig, stage: str, processes: int, prompt_length: int) -> Work:
        options: Any = getattr(config, stage)
        batch = options.per_device_train_batch_size
        if stage == "sft":
            several = options.gradient_accumulation_steps > 1
            return cls(batch, batch, 0, 0, prompt_length, max(options.max_length - prompt_length, 1), several)
        count = options.num_prompts if stage == "policy" else options.num_pairs
        prompts, length = math.ceil(count / processes), options.max_completion_length
        if stage == "prefer":  # both texts of a pair
            return cls(2 * min(batch, prompts), min(batch, prompts), 0, 0, prompt_length, length, batch < prompts)
        texts = prompts * options.num_generations * (1 + options.replay_steps)
        texts = math.ceil(texts / getattr(config.estimator, "num_minibatches", 1))
        rows = min(batch, texts)
        sampled = prompts if options.engine != "vllm" else 0
        return cls(rows, min(rows, prompts), sampled, options.num_generations, prompt_length, length, rows < texts)


class Use(NamedTuple):
    """Bytes of a process that holds everything. `master`: the trained weights in float32; `update`: what a micro-batch needs
    beside weights and gradients; `block` and `outside` of the blocks: weights and gradients that FSDP2 gathers at a time."""

    weights: int
    gradients: int
    master: int
    reference: int
    others: int
    sampling: int
    update: int
    several: bool  # micro-batches, whose gradients add up
    block: tuple[int, int]
    outside: tuple[int, int]


def architecture(name: str, depth: float = 1.0) -> Any:
    """A model's config, of which no weight is read: of a folder, a JSON file, a hub name, or one of configs/model; with only
    `depth` layers, or that share of them."""
    own = find_config("configs/quickstart.yaml").parent / "model" / f"{name}.json"
    with readable(name, "no model config there that can be read"):
        shape = AutoConfig.from_pretrained(own if own.is_file() else base_of(resolve_model(name)))
    layers = round(depth * shape.num_hidden_layers) if isinstance(depth, float) else min(depth, shape.num_hidden_layers)
    shape.num_hidden_layers = max(1, layers)
    if getattr(shape, "layer_types", None):
        shape.layer_types = shape.layer_types[: shape.num_hidden_layers]
    return shape


def make(config: RunConfig, stage: str, depth: float = 1.0) -> tuple[Policy, Reference]:
    """What the stage trains, and its reference, on the meta device."""
    options: Any = getattr(config, stage)
    eager = {"attn_implementation": "eager"} if config.model.attn_implementation == "eager" else {}
    shape = architecture(getattr(options, "model", None) or config.model.name_or_path, depth)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.model.dtype), **eager)
        lm = adapted(lm.eval())
        if stage == "sft":
            add_fused_lm_head(lm.train(), outputs=("log_probs", "entropy", "is_top1"))
            if options.training_args.get("gradient_checkpointing", True):
                lm.gradient_checkpointing_enable()
        head = stage == "policy" and config.estimator.value_head
        return with_reference(lm, config.model, head, getattr(options, "logprob_chunk", 0))


def size(module: nn.Module, trained: bool = False) -> int:
    """Bytes of its weights, or of those that are trained."""
    return sum(p.nbytes for p in module.parameters() if p.requires_grad or not trained)


def reward_weights(config: RunConfig) -> int:
    """Bytes of the reward models that the policy stage scores with, of the layers that they load."""
    names, total = [*config.target.scorers, *config.policy.logged_scorers], 0
    names += [spec.of for name in names if isinstance(spec := config.scorers[name], Threshold)]
    for spec in (config.scorers[name] for name in dict.fromkeys(names)):
        if isinstance(spec, RewardModel):
            made = {
                "backbone": spec.path or config.model.name_or_path,
                "dtype": "float32",
                "layers": [1],
            }  # classifierifier
            if spec.path and is_reward_folder(spec.path):
                made = json.loads((Path(spec.path) / "reward_config.json").read_text(encoding="utf-8"))
            elif not spec.path and config.reward.method == "head":
                made |= {"dtype": config.model.dtype, "layers": config.reward.layers}
            shape = architecture(made["backbone"], float(max(made["layers"])))
            with torch.device("meta"):
                total += size(AutoModel.from_config(shape, dtype=getattr(torch, made["dtype"])))
    return total


def cache_bytes(shape: Any, rows: int, tokens: int, itemsize: int) -> int:
    """Keys and values of `tokens` tokens, of their own heads, in each layer; where it has a sliding window of w, of w − 1."""
    shape = shape.get_text_config()
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = heads * (getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads)
    windows = [getattr(layer, "sliding_window", math.inf) for layer in DynamicCache(config=shape).layers]
    return 2 * rows * width * itemsize * sum(min(tokens, window - 1) for window in windows)


@contextlib.contextmanager
def without_storage(policy: Policy, reference: Reference, distinct: int) -> Iterator[Ledger]:
    """The modules, made on the meta device, as tensors of a CPU that take no memory. Garbage waits, since collecting such
    tensors in the middle of an operation crashes torch 2.13."""
    gc.disable()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Ledger(distinct) as ledger:
            for module in {policy, reference.policy}:
                module.to_empty(device="cpu")
                under_adapter(module.lm).tie_weights()
            yield ledger
    finally:
        gc.enable()
        gc.collect()


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.long)


def loss(policy: Policy, reference: Reference, stage: str, work: Work) -> Tensor:
    """What the stage's update sends backwards, as far as memory goes."""
    rows, first, length = work.rows, work.prompt_length, work.length
    if stage == "sft":
        ids = ones(rows, first + length)
        return policy.lm(input_ids=ids, attention_mask=ids, labels=ids, fused_lm_head=True).log_probs.sum()
    x = Sequences(ones(rows, first), ones(rows, first), ones(rows, length), ones(rows, length))
    out = policy(x)
    value = out.log_probs.sum() + (0 if out.values is None else out.values.sum())
    return value - reference.log_probs(x).sum() if stage == "prefer" else value


@torch.no_grad()
def decode(lm: Any, work: Work) -> None:
    """The last step of the rollout's loop, with the cache of all that came before."""
    cache, rows, later = _in_place(DynamicCache(config=lm.config)), work.prompts * work.generations, work.length - 1
    lm(input_ids=ones(work.prompts, work.prompt_length), past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(work.generations)
    for layer in cache.layers if later > 1 else []:
        layer.update(*(x.new_empty(*x.shape[:2], later - 1, x.shape[3]) for x in (layer.keys, layer.values)))
    mask = ones(rows, work.prompt_length + max(later, 1))
    out = lm(input_ids=ones(rows, 1), attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    _inverse_cdf(wide(out.logits[:, -1]), torch.rand(rows))


def measure(config: RunConfig, stage: str, work: Work, share_prompts: bool = True, checkpointing: bool = False) -> Use:
    """Runs a micro-batch of a step and, where the stage samples, a step of decoding."""
    policy, reference = make(config, stage)
    shape, alive, sampling = under_adapter(policy.lm).config, {}, 0
    is_block = (policy._no_split_modules or ()).__contains__
    depth, few = shape.num_hidden_layers, min(DEPTH, shape.num_hidden_layers)
    for layers in {max(few // 2, 1), few}:
        pair = make(config, stage, layers)
        if checkpointing:
            apply_activation_checkpointing(pair[0], check_fn=lambda m: is_block(type(m).__name__))
        pair[0].share_prompts = pair[1].policy.share_prompts = share_prompts
        with without_storage(*pair, distinct=work.distinct) as ledger:
            for p in pair[0].parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None
            before = ledger.most = ledger.now
            value = loss(*pair, stage, work)
            alive[layers] = ledger.now - before
            if layers == few:
                value.backward()
                update, before = ledger.most - before, ledger.now
                if work.prompts:
                    ledger.most = ledger.now
                    decode(pair[0].lm, work)
                    tokens = work.prompt_length + work.length + _Appending.room
                    caches = (
                        cache_bytes(x, work.prompts * work.generations, tokens, pair[0].lm.dtype.itemsize)
                        for x in (shape, under_adapter(pair[0].lm).config)
                    )
                    sampling = ledger.most - before + next(caches) - next(caches)
            del value
    if depth > few:
        update += (depth - few) * (alive[few] - alive[few // 2]) // (few - few // 2)
    blocks = [m for m in policy.modules() if is_block(type(m).__name__)]
    whole, inside = (size(policy), size(policy, True)), (sum(map(size, blocks)), sum(size(b, True) for b in blocks))
    return Use(
        *whole,
        master=4 * sum(p.numel() for p in policy.parameters() if p.requires_grad),
        reference=0 if stage == "sft" or reference.adapter_off else size(reference.policy),
        others=reward_weights(config) if stage == "policy" else 0,
        sampling=sampling,
        update=update,
        several=work.several,
        block=max(((size(b), size(b, True)) for b in blocks), default=(0, 0)),
        outside=(whole[0] - inside[0], whole[1] - inside[1]),
    )


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
    rows, stages = [], [stage for stage in config.stages if stage in ("sft", "policy", "prefer")]
    if not stages:
        raise UserError("stages: sft, policy and prefer are planned, and this config has none of them")
    for stage in stages:
        moments = 0 if getattr(getattr(config, stage), "optim", "") == "sgd" else 2
        for lora in [None] if stage == "sft" or config.model.lora is None else [None, config.model.lora]:
            tuned, uses = replace(config, model=replace(config.model, lora=lora)), dict[Any, Use]()
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
        table = Table("", *(Column(k, justify="right") for k in numbers), "fits", title=title)
        for row in found:
            table.add_row(row["strategy"], *(f"{row[k]:.2f}" for k in numbers), "yes" if row["fits"] else "")
        yield table
        fitting = [row["strategy"] for row in found[devices > 1 :] if row["fits"]]
        lower = "nothing fits: lower per_device_train_batch_size or set logprob_chunk, model.lora or model.dtype=bfloat16"
        yield f"take {fitting[0]}" if fitting else lower
