"""Every f-divergence of the library: the loss, the pseudo-reward and the metric all use these objects.

    D_f(π‖p) = E_{y~p}[f(t)] + f'(∞)·π(p = 0),      t = π(y)/p(y),  s = log t,  f convex

Each f is in *normal form*, f(1) = f'(1) = 0, and is computed from s alone, never from t, in nats. Adding an f is one
frozen dataclass whose fields are its YAML schema; `check` proves it, and `register` runs `check`.
Sources: Csiszár & Shields 2004; Go et al. 2023 (arXiv 2302.08215, f-DPG); Huang et al. 2024 (arXiv 2407.13399, χPO).
"""

from rlhf_fdiv.divergences.base import Divergence, Dual, Scaled, label, parameters
from rlhf_fdiv.divergences.measure import Estimate, clustered_error, estimate, exact, perspective
from rlhf_fdiv.divergences.proofs import check
from rlhf_fdiv.divergences.registry import divergence_class, get, names, register, spec_of, summary

__all__ = [
    "Divergence", "Dual", "Estimate", "Scaled", "check", "clustered_error", "divergence_class", "estimate", "exact",
    "get", "label", "names", "parameters", "perspective", "register", "spec_of", "summary",
]  # fmt: skip
