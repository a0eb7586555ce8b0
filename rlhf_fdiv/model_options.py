"""What a config says of a model; apart from models.py so that checking a config loads no deep-learning library but torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import MinLen

from rlhf_fdiv.ranges import Count


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters, as peft names them. Their weights are float32 whatever the model's dtype."""

    r: Count = 16
    lora_alpha: Count = 32
    target_modules: str | list[str] = "all-linear"


@dataclass(frozen=True)
class ModelOptions:
    """`name_or_path`: a folder, a hub name, or `smollm2-135m`, which comes from the package registry."""

    name_or_path: Annotated[str, MinLen(1)]
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    lora: LoraOptions | None = None
    attn_implementation: str | None = None
