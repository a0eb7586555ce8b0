"""What training holds in one process, found without a weight: the model is made of tensors that have shapes and no storage,
and the code that trains, `Policy`'s own forward, its backward and a step of decoding, runs on them while a ledger adds up
what is alive. So activations, logits, checkpointing and `logprob_chunk` have no formula that the code could leave behind.
Where values decide a shape the largest is taken: every completion is as long as it may be.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache
from trl.trainer.utils import add_fused_lm_head

from rlhf_fdiv.config import RunConfig
from rlhf_fdiv.config.files import find_config
from rlhf_fdiv.known_models import resolve_model
from rlhf_fdiv.models import Policy, Reference, adapted, base_of, under_adapter, with_reference
from rlhf_fdiv.reward_models import is_reward_folder
from rlhf_fdiv.rewards import RewardModel, with_parts
from rlhf_fdiv.rollout import _Appending, _in_place, _inverse_cdf
from rlhf_fdiv.sequences import Sequences, wide
from rlhf_fdiv.weights import readable

DEPTH = 2  # layers that are run; each of the others adds what the last of these does


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
            add_fused_lm_head(lm, outputs=("log_probs", "entropy", "is_top1"))
            if options.training_args.get("gradient_checkpointing", True):
                lm.gradient_checkpointing_enable()
        head = stage == "policy" and config.estimator.value_head
        pair = with_reference(lm, config.model, head, getattr(options, "logprob_chunk", 0))
        pair[0].train(stage == "sft")  # TRL's way, and without it no checkpointing
        return pair


def size(module: nn.Module, trained: bool = False) -> int:
    """Bytes of its weights, or of those that are trained."""
    return sum(p.nbytes for p in module.parameters() if p.requires_grad or not trained)


def reward_weights(config: RunConfig) -> int:
    """Bytes of the reward models that the policy stage scores with, of the layers that they load."""
    names, total = dict.fromkeys((*config.target.scorers, *config.policy.logged_scorers)), 0
    for spec in (config.scorers[name] for name in with_parts(names, config.scorers)):
        if isinstance(spec, RewardModel):
            made: dict[str, Any] = {
                "backbone": spec.path or config.model.name_or_path,
                "dtype": "float32",
                "layers": [1],
            }  # a classifier
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
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), Ledger(distinct) as ledger:
            warnings.simplefilter("ignore")  # of a tensor's address, which the cache asks for
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
    cache: Any = _in_place(DynamicCache(config=lm.config))
    rows, later = work.prompts * work.generations, work.length - 1
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
    shape: Any = policy.lm.config
    alive, update, sampling = [0, 0], [0, 0], 0
    is_block = (policy._no_split_modules or ()).__contains__
    few = min(DEPTH, shape.num_hidden_layers)
    for i, layers in enumerate((few - 1, few) if shape.num_hidden_layers > few else (few,)):
        pair = make(config, stage, layers)
        if checkpointing:
            apply_activation_checkpointing(pair[0], check_fn=lambda m: is_block(type(m).__name__))
        pair[0].share_prompts = pair[1].policy.share_prompts = share_prompts
        with without_storage(*pair, distinct=work.distinct) as ledger:
            for p in pair[0].parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None
            before = ledger.most = ledger.now
            value = loss(*pair, stage, work)
            alive[i] = ledger.now - before
            value.backward()
            update[i] = ledger.most - before
            if work.prompts and layers == few:
                before = ledger.most = ledger.now
                decode(pair[0].lm, work)
                rows, tokens = work.prompts * work.generations, work.prompt_length + work.length + _Appending.room
                itemsize = getattr(torch, config.model.dtype).itemsize
                caches = [cache_bytes(x, rows, tokens, itemsize) for x in (shape, pair[0].lm.config)]
                sampling = ledger.most - before + caches[0] - caches[1]
    if more := shape.num_hidden_layers - few:
        update[0] = update[1] + more * max(update[1] - update[0], alive[1] - alive[0])
    blocks = [m for m in policy.modules() if is_block(type(m).__name__)]
    weights, gradients = size(policy), size(policy, True)
    return Use(
        weights,
        gradients,
        master=4 * sum(p.numel() for p in policy.parameters() if p.requires_grad),
        reference=0 if stage == "sft" or reference.adapter_off else size(reference.policy),
        others=reward_weights(config) if stage == "policy" else 0,
        sampling=sampling,
        update=update[0],
        several=work.several,
        block=max(((size(b), size(b, True)) for b in blocks), default=(0, 0)),
        outside=(weights - sum(map(size, blocks)), gradients - sum(size(b, True) for b in blocks)),
    )
