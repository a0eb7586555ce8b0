"""rlhf_fdiv: align language models by minimising an f-divergence. Submodules are imported by name."""

__version__ = "0.1.0"
