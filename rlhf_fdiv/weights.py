"""A model's files, whatever is wrong with them: one clear error, and no weight that was not there."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from rlhf_fdiv.errors import UserError, told_as
from rlhf_fdiv.known_models import resolve_model


def readable(name_or_path: str, problem: str) -> contextlib.AbstractContextManager[None]:
    """Whatever transformers, tokenizers, safetensors, peft or the hub raise of a model's files becomes a UserError."""
    return told_as(f"model {name_or_path}: {problem}")


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
