"""A model's files, whatever is wrong with them: one clear error, and no weight that was not there."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from rlhf_fdiv.errors import UserError, told_as
from rlhf_fdiv.known_models import resolve_model

NO_MODEL = "no model there that can be read, neither a folder nor a hub name"


def readable(name_or_path: str, problem: str) -> contextlib.AbstractContextManager[None]:
    """Whatever transformers, tokenizers, safetensors, peft or the hub raise of a model's files becomes a UserError."""
    return told_as(f"model {name_or_path}: {problem}")


def base_of(path: str) -> str:
    """The model folder under any adapters; `path` itself where it is no adapter."""
    adapter = Path(path) / "adapter_config.json"
    if not adapter.is_file():
        return path
    return base_of(resolve_model(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]))


def context_length(name_or_path: str) -> int:
    """How many tokens a model can read, from its config alone."""
    with readable(name_or_path, NO_MODEL):
        config = AutoConfig.from_pretrained(base_of(resolve_model(name_or_path)))
    kind = config.model_type
    if config.is_encoder_decoder:
        problem = "is an encoder–decoder"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        problem = "is a masked LM: it reads both ways and predicts no next token"
    elif config.get_text_config() is not config:
        problem = "reads more than text; save its language model alone"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        problem = "is no language model that transformers knows"
    else:
        problem = ""
    if problem:
        raise UserError(f"model {name_or_path}: {kind} {problem}; only decoder-only (causal) models are supported")
    return int(getattr(config, "max_position_embeddings", None) or 10**9)


def require_own_tokenizer(name_or_path: str, tokenizer: Any) -> None:
    """Raises UserError where ids of a tokenizer have no row among the model's embeddings. Those of tokens that were added to
    it and that no text needs may lie beyond: in Gemma 3 one does."""
    rows = AutoConfig.from_pretrained(base_of(resolve_model(name_or_path))).get_text_config().vocab_size
    needed = {tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token}
    added = tokenizer.get_added_vocab().keys() - needed
    token, last = max(((t, i) for t, i in tokenizer.get_vocab().items() if t not in added), key=lambda pair: pair[1])
    if last >= rows:
        raise UserError(
            f"model {name_or_path}: its tokenizer gives {token!r} the id {last}, and its embeddings have {rows} rows. Take "
            "the tokenizer that belongs to it, or resize_token_embeddings"
        )


def from_safetensors(cls: Any, name_or_path: str, new_head: bool = False, **options: Any) -> Any:
    """`cls.from_pretrained` in eval mode, from safetensors alone: a pickle can run any code.

    Raises UserError where weights cannot be read, are not finite, or are not there: transformers would draw them at random
    and say nothing. With `new_head` those outside the base model may be missing.
    """
    with readable(
        name_or_path,
        "no weights in safetensors there that can be loaded (what you trust load with transformers, and save_pretrained it)",
    ):
        options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, found = cls.from_pretrained(resolve_model(name_or_path), **options)
    wrong = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    lacking = sorted(k for k in wrong if not new_head or k.startswith(f"{model.base_model_prefix}."))
    if lacking:
        raise UserError(
            f"model {name_or_path}: {len(lacking)} of the weights that its config asks for are not there, or of another "
            f"shape: {', '.join(lacking[:3])}"
        )
    require_finite(name_or_path, model)
    return model.eval()


def require_finite(name_or_path: str, model: nn.Module) -> None:
    """Raises UserError, naming the first, where weights are nan or infinite."""
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise UserError(f"model {name_or_path}: its weight {name} is not finite; was its learning rate too high?")
