"""What a config says of a model; apart from models.py so that checking a config loads no deep-learning library but torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import MinLen

from rlhf_fdiv.ranges import Count


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters, as peft names them: `target_modules: null` are peft's own choice for the architecture. Their weights
    are float32 whatever the model's dtype."""

    r: Count = 16
    lora_alpha: Count = 32
    target_modules: str | list[str] | None = "all-linear"


@dataclass(frozen=True)
class ModelOptions:
    """`name_or_path`: a folder, a hub name, or `smollm2-135m`, which comes from the package registry. `dtype: auto` is
    bfloat16 where this machine multiplies it fast, else float32; from there on the run is of that dtype."""

    name_or_path: Annotated[str, MinLen(1)]
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "float32"
    lora: LoraOptions | None = None
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        None
    )

    def __post_init__(self) -> None:
        if self.dtype == "auto":
            object.__setattr__(self, "dtype", "bfloat16" if _fast_bfloat16() else "float32")


def _fast_bfloat16() -> bool:
    """On a GPU, or a CPU with instructions for it: one without takes eight times as long as in float32."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known: Any = getattr(torch.cpu, "get_capabilities", dict)()  # of torch 2.11 and later
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
