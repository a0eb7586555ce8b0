"""Policies, references and tokenizers: ordinary Hugging Face folders or hub names, full or LoRA."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.activations import NewGELUActivation

from rlhf_fdiv.chat import end_of_turn, is_special, stop_ids
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.known_models import resolve_model
from rlhf_fdiv.model_options import ModelOptions
from rlhf_fdiv.sequences import Sequences, chunked_log_probs, pad_to_longest, token_log_probs, wide
from rlhf_fdiv.weights import NO_MODEL, base_of, context_length, from_safetensors, readable


def load_tokenizer(name_or_path: str) -> Any:
    """The tokenizer, padded on the left. Raises UserError where there is no EOS: a text could never end.

    Its `stop_ids` are what `generate` would stop at (an instruct model may have several), and the end of a turn.
    """
    path = resolve_model(name_or_path)
    with readable(name_or_path, "no tokenizer there that can be read, neither a folder nor a hub name"):
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model {name_or_path}: its tokenizer has no EOS token, so no text could ever end. Set eos_token"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless here: every mask comes from lengths, none from ids
    own: Any = None
    with readable(name_or_path, NO_MODEL), contextlib.suppress(OSError):  # where there is no generation config
        own = GenerationConfig.from_pretrained(base_of(path)).eos_token_id
    others = [*(own if isinstance(own, list) else [own]), end_of_turn(tokenizer)]
    stops = [tokenizer.eos_token_id, *(i for i in others if is_special(i, tokenizer))]
    tokenizer.stop_ids = list(dict.fromkeys(stops))
    return tokenizer


def teacher_context(name_or_path: str, student: str) -> int:
    """`context_length` of a teacher. Raises UserError where its vocabulary is not the student's: its words would be others,
    or where it has fewer rows of embeddings (a vocabulary may be padded), since a student might sample one it lacks."""
    length = context_length(name_or_path)
    if load_tokenizer(name_or_path).get_vocab() != load_tokenizer(student).get_vocab():
        raise UserError(
            f"distil.teacher: {name_or_path} has another vocabulary than the student; both must share one tokenizer"
        )
    configs = [AutoConfig.from_pretrained(base_of(resolve_model(name))) for name in (name_or_path, student)]
    theirs, ours = (config.get_text_config().vocab_size for config in configs)
    if theirs < ours:
        raise UserError(
            f"distil.teacher: {name_or_path} has {theirs} rows of embeddings and the student {ours}; resize the student's"
        )
    return length


def load_causal_lm(name_or_path: str, options: ModelOptions) -> nn.Module:
    """A causal LM in eval mode (dropout off). An adapter folder is merged into its base, so that it can be a reference."""
    path = resolve_model(name_or_path)
    kwargs: dict[str, Any] = {"dtype": getattr(torch, options.dtype)}
    # on CPUs the backward pass of PyTorch's fused attention is slow in bfloat16: 2.3 s a step against 1.3 s for eager
    slow_fused = options.dtype == "bfloat16" and not torch.cuda.is_available()
    if attention := options.attn_implementation or ("eager" if slow_fused else None):
        kwargs["attn_implementation"] = attention
    adapter = Path(path) / "adapter_config.json"
    if adapter.is_file():
        from peft import PeftModel

        if not adapter.with_name("adapter_model.safetensors").is_file():  # peft would read a pickle in its place
            raise UserError(
                f"model {name_or_path}: its adapter has no adapter_model.safetensors, and pickles are not read"
            )
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        with readable(name_or_path, "its adapter cannot be loaded"):
            merged: Any = PeftModel.from_pretrained(load_causal_lm(base, options), path).merge_and_unload().eval()
        merged.requires_grad_(True)  # peft has frozen the base, and a full model is to be trained from here too
        merged.name_or_path = path  # which an adapter trained on it names as its base
        return merged
    return adapted(from_safetensors(AutoModelForCausalLM, name_or_path, **kwargs))


def adapted(model: Any) -> Any:
    """The same model, faster and in less memory."""
    for module in model.modules():  # GPT-2's gelu_new, spelled out in eight passes over memory, is this very function
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    # logits_to_keep hands the head a strided view, and PyTorch multiplies a strided view by frozen weights as B copies of
    # them: 1.8 GB copied for 32 × 25 positions of SmolLM2, five times the whole forward
    model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: (inputs[0].contiguous(), *inputs[1:])
    )
    return model


class TokenOutputs(NamedTuple):
    """[B, T] each: log π of the completion's tokens, zero at padding; V(x, y_<t) where there is a value head. And the
    logits of every next token, [B, T, V], unless they were made a chunk at a time."""

    log_probs: Tensor
    values: Tensor | None
    logits: Tensor | None


@torch.no_grad()
def in_micro_batches(policy: Any, sequences: Sequences, size: int) -> TokenOutputs:
    """`policy(sequences)` without logits or gradient, `size` completions at a time, those of like length together."""
    order = sequences.mask.sum(1).argsort(stable=True)
    parts = [policy(sequences[rows])._replace(logits=None) for rows in order.split(size)]
    full = sequences.mask[:0]  # no row, as wide as all

    def joined(columns: list[Tensor]) -> Tensor:
        return pad_to_longest([*columns, full], "right")[order.argsort()]

    values = joined([x.values for x in parts]) if parts[0].values is not None else None
    return TokenOutputs(joined([x.log_probs for x in parts]), values, None)


class Policy(nn.Module):
    """A causal LM and, for ppo, a value head on its last hidden states: one module, so that one wrapper shards both.

    Stays in eval mode: with dropout the ratio of a policy to itself would not be 1. With `logprob_chunk` the logits exist
    for that many tokens at a time only, and are made again in the backward pass.
    """

    def __init__(self, lm: nn.Module, value_head: bool = False, logprob_chunk: int = 0) -> None:
        super().__init__()
        self.lm, self.logprob_chunk = lm, logprob_chunk
        self._no_split_modules = getattr(under_adapter(lm), "_no_split_modules", None)  # what FSDP shards one by one
        self.share_prompts = True  # not where a wrapper waits for every output of a block: keys and values are none
        self.value_head: nn.Linear | None = None
        if value_head:
            config: Any = lm.config
            dtype = wide(torch.empty(0, dtype=next(lm.parameters()).dtype)).dtype  # never bfloat16
            self.value_head = nn.Linear(config.get_text_config().hidden_size, 1, dtype=dtype)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self.eval()

    def forward(self, sequences: Sequences) -> TokenOutputs:
        tokens, mask, share = sequences.completion_ids, sequences.mask, self.share_prompts
        length = tokens.shape[1]
        if self.logprob_chunk:
            base = under_adapter(self.lm)
            hidden = read_completions(self.lm, base.base_model, sequences, share).last_hidden_state[:, -length:]
            log_probs = chunked_log_probs(base.get_output_embeddings(), hidden, tokens, mask, self.logprob_chunk)
            return TokenOutputs(log_probs, self._values(hidden, mask), None)
        critic = self.value_head is not None
        options = {"output_hidden_states": critic, "logits_to_keep": length}
        out = read_completions(self.lm, self.lm, sequences, share, **options)
        hidden = out.hidden_states[-1][:, -length:] if critic else out.logits
        return TokenOutputs(token_log_probs(out.logits, tokens, mask), self._values(hidden, mask), out.logits)

    def _values(self, hidden: Tensor, mask: Tensor) -> Tensor | None:
        if self.value_head is None:
            return None
        return self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1) * mask


def read_completions(lm: Any, model: Any, sequences: Sequences, share_prompts: bool = True, **options: Any) -> Any:
    """The outputs of `model`, which is `lm` or what is below its head, up to where they predict a completion's last token.

    What a prompt says is the same for each of its completions, so every distinct prompt is read once, all but its last
    token, and its keys and values, with their gradients, serve all of them; unless `share_prompts` is False.
    """
    inputs = {name: x[:, :-1] for name, x in sequences.model_inputs().items()}  # the last token predicts nothing
    shared = sequences.prompt_ids.shape[1] - 1
    if not shared or not share_prompts:
        return model(**inputs, use_cache=False, **options)
    cache = DynamicCache(config=lm.config)
    each, which = torch.stack([x[:, :shared] for x in inputs.values()]).unique(dim=1, return_inverse=True)
    prompts = dict(zip(inputs, each, strict=True))
    under_adapter(lm).base_model(**prompts, past_key_values=cache, use_cache=True)
    cache.batch_select_indices(which)
    rest = {name: x if name == "attention_mask" else x[:, shared:] for name, x in inputs.items()}
    return model(**rest, past_key_values=cache, use_cache=True, **options)


def under_adapter(lm: Any) -> Any:
    """The transformers model under an adapter; itself where there is none."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


@torch.no_grad()
def require_plain_head(lm: Any) -> None:
    """Raises UserError where a model's logits are not its head of its last hidden states, and nothing else."""
    tokens, seen = torch.arange(lm.get_input_embeddings().num_embeddings, device=lm.device)[None, :8], []

    def louder(head: nn.Module, inputs: Any, logits: Tensor) -> Tensor:  # even a soft cap far above the logits shows
        seen.extend([inputs[0], 1000 * logits])
        return seen[1]

    hook = lm.get_output_embeddings().register_forward_hook(louder)
    logits = lm(tokens).logits
    hook.remove()
    if not (torch.equal(seen[0], lm.base_model(tokens).last_hidden_state) and torch.equal(seen[1], logits)):
        raise UserError(
            "logprob_chunk: this model's logits are not those of its head alone (a scale or a soft cap?); leave it out"
        )


def load_policy(
    name_or_path: str, options: ModelOptions, value_head: bool = False, logprob_chunk: int = 0
) -> tuple[Policy, Reference]:
    """The policy to train and its frozen reference, both at the weights of `name_or_path`."""
    lm = load_causal_lm(name_or_path, options)
    if logprob_chunk:
        require_plain_head(lm)
    return with_reference(lm, options, value_head, logprob_chunk)


def with_reference(lm: Any, options: ModelOptions, value_head: bool, logprob_chunk: int) -> tuple[Policy, Reference]:
    """`load_policy` of a loaded model."""
    if options.lora is None:
        frozen = Policy(copy.deepcopy(lm).requires_grad_(False), logprob_chunk=logprob_chunk)
        return Policy(lm, value_head, logprob_chunk), Reference(frozen, adapter_off=False)
    from peft import LoraConfig, get_peft_model

    lora = options.lora
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=lora.target_modules,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with readable(lm.name_or_path, "model.lora does not fit it"):
        policy = Policy(get_peft_model(lm, config), value_head, logprob_chunk)
    return policy, Reference(policy, adapter_off=True)


class Reference:
    """a(y|x), frozen: a copy of the policy at its start, or the policy itself with its adapter off."""

    def __init__(self, policy: Policy, adapter_off: bool) -> None:
        self.policy = policy
        self.adapter_off = adapter_off

    @contextlib.contextmanager
    def lm(self) -> Iterator[nn.Module]:
        """The reference as a causal LM, for generation."""
        lm: Any = self.policy.lm
        with torch.no_grad(), lm.disable_adapter() if self.adapter_off else contextlib.nullcontext():
            yield lm

    def log_probs(self, sequences: Sequences, size: int | None = None) -> Tensor:
        """log a of the completion's tokens, [B, T], `size` completions at a time (by default all); no gradient."""
        with self.lm():
            out = self.policy(sequences) if size is None else in_micro_batches(self.policy, sequences, size)
            return out.log_probs

    def to(self, device: torch.device, whole: Policy) -> Reference:
        """Onto the device; where it is the policy with its adapter off, that of `whole`, which no wrapper has sharded."""
        self.policy = whole if self.adapter_off else self.policy.to(device)
        self.policy.share_prompts = whole.share_prompts  # both round alike
        return self


def merged(lm: Any) -> Any:
    """An ordinary model: itself, or a copy with its adapter merged."""
    return copy.deepcopy(lm).merge_and_unload() if hasattr(lm, "merge_and_unload") else lm


def save_policy(policy: Policy, tokenizer: Any, folder: Path) -> None:
    """`folder/model` is an ordinary model (adapters merged), `folder/adapter` the adapter alone where there is one."""
    lm: Any = policy.lm
    if hasattr(lm, "merge_and_unload"):
        lm.save_pretrained(folder / "adapter")
        tokenizer.save_pretrained(folder / "adapter")
    whole = merged(lm)
    whole.generation_config.eos_token_id = stop_ids(tokenizer)  # where it learned to stop, `generate` is to stop too
    whole.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    if policy.value_head is not None:
        from safetensors.torch import save_file

        save_file(dict(policy.value_head.state_dict()), folder / "value_head.safetensors")
