"""rlhf_fdiv: align language models by minimising an f-divergence. Submodules are imported by name, `align` when asked for."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name != "align":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # with the stages all of transformers comes, which the divergences do without

    return import_module("rlhf_fdiv.library").align
