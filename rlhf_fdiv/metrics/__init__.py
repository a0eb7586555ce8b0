"""What is measured on a trained policy: divergences with intervals, diversity and likeness of texts, perplexity."""

from rlhf_fdiv.metrics.divergence import Measured, log_partition_of, measure_all, paired_difference
from rlhf_fdiv.metrics.exact import all_texts, exact_report, log_probs_of_all
from rlhf_fdiv.metrics.harness import MAUVE_TEXTS, lm_eval, mauve, require_harness
from rlhf_fdiv.metrics.likelihood import perplexity, score, score_both
from rlhf_fdiv.metrics.rejection import best_of_n, best_of_n_kl, inference_baselines, jackknife, quasi_rejection
from rlhf_fdiv.metrics.text import distinct_n, likeness, self_bleu

__all__ = [
    "MAUVE_TEXTS", "Measured", "all_texts", "best_of_n", "best_of_n_kl", "distinct_n", "exact_report",
    "inference_baselines", "jackknife", "likeness", "lm_eval", "log_partition_of", "log_probs_of_all", "mauve",
    "measure_all", "paired_difference", "perplexity", "quasi_rejection", "require_harness", "score", "score_both",
    "self_bleu",
]  # fmt: skip
