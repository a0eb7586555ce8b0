"""f-DPO: pairs → log-ratios of both texts → implicit rewards β·f'(π/a) → Bradley–Terry → update → log.

accelerate launch -m rlhf_fdiv.stages.prefer CONFIG [a.b=value …]
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from rlhf_fdiv.config import RunConfig
from rlhf_fdiv.data import PREFERENCES, Rows, rater_shares, read_rows, tokenize_completions, tokenize_prompts
from rlhf_fdiv.models import context_length, load_policy, load_tokenizer
from rlhf_fdiv.objectives import soft_labels
from rlhf_fdiv.sequences import Sequences, sequence_sum
from rlhf_fdiv.stages.common import run_stage, starting_model
from rlhf_fdiv.stages.reward import agreement, rightness
from rlhf_fdiv.stages.training import Training, launch, row_order
from rlhf_fdiv.tracking import RunFolder, write_atomically


def main(config: RunConfig, folder: RunFolder, out: Path) -> None:
    """Trains on pairs; writes `model/`, `metrics.jsonl`, checkpoints and, with held-out pairs, `accuracy.json`."""
    options, f, objective = config.prefer, config.f, config.objective

    # load
    start = starting_model(config, folder)
    accelerator = launch("prefer.num_pairs", options.num_pairs)
    set_seed(config.seed)
    tokenizer = load_tokenizer(start)
    context = context_length(start)
    rows, pairs = _read(config.data.preferences_train, tokenizer, options.max_completion_length, context)
    held_out, held_out_pairs = _read(config.data.preferences_eval, tokenizer, options.max_completion_length, context)
    labels = soft_labels(rater_shares(rows), objective.label_smoothing).to(accelerator.device)
    policy, reference = load_policy(start, config.model, logprob_chunk=options.logprob_chunk)
    training = Training(policy, options, out, accelerator, config.report_to)
    reference.to(accelerator.device, training.whole())

    def margins(both: Sequences) -> Tensor:
        """Implicit reward of the chosen text less that of the rejected one, [B], from [2B] sequences."""
        log_pi = sequence_sum(training.policy(both).log_probs, both.mask)
        chosen, rejected = objective.reward(f, log_pi, sequence_sum(reference.log_probs(both), both.mask)).chunk(2)
        return chosen - rejected

    step = training.restore()
    while step < options.max_steps:
        began = time.perf_counter()
        step += 1
        numbers = training.share(row_order(config.seed, step, options.num_pairs, len(rows)))
        figures: dict[str, list[Tensor]] = {"margin": [], "accuracy": []}

        def loss_of(batch: Tensor, numbers: list[int] = numbers, figures: Any = figures) -> Tensor:
            chosen = [numbers[i] for i in batch.tolist()]
            margin = margins(collate(pairs, chosen, accelerator.device))
            figures["margin"].append(margin.detach())
            figures["accuracy"].append(rightness(margin.detach(), labels[chosen]))
            return objective.loss(margin, labels[chosen])

        lengths = torch.tensor([max(map(len, pairs[i][1:])) for i in numbers])
        with training.keeping(step, {k: [rows[i][k] for i in numbers] for k in PREFERENCES}):
            loss, norm = training.step(torch.arange(len(numbers)), loss_of, lengths)
        values = {k: float(accelerator.gather(torch.cat(v)).mean()) for k, v in figures.items()}
        training.log(step, {"loss": loss, **values, "grad_norm": norm}, time.perf_counter() - began)
        if training.end_step(step):
            training.save(step)

    if held_out:
        with torch.no_grad():  # by every process: a wrapped model's forward is one of all of them together
            batches = torch.arange(len(held_out)).split(options.per_device_train_batch_size)
            parts = [margins(collate(held_out_pairs, b.tolist(), accelerator.device)) for b in batches]
        margin = torch.cat(parts).cpu()
        loss = float(objective.loss(margin, soft_labels(rater_shares(held_out), objective.label_smoothing)).mean())
        report = agreement(margin, held_out) | {"loss": loss}
        if accelerator.is_main_process:
            write_atomically(out / "accuracy.json", json.dumps(report, indent=2))
            print("held-out pairs: " + ", ".join(f"{k} {v:.3f}" for k, v in report.items()))
    training.finish(tokenizer)


Pair = tuple[list[int], list[int], list[int]]


def _read(source: str | None, tokenizer: Any, length: int, context: int) -> tuple[Rows, list[Pair]]:
    if source is None:
        return [], []
    rows = read_rows(source, PREFERENCES)
    return rows, tokenize_pairs(rows, tokenizer, source, length, context)


def tokenize_pairs(rows: Rows, tokenizer: Any, source: str, length: int, context: int) -> list[Pair]:
    """Token ids of prompt, chosen and rejected text of each row."""
    prompts = tokenize_prompts(rows, tokenizer, source, context - length)
    before, *sides = ([r[key] for r in rows] for key in PREFERENCES)
    return list(zip(prompts, *(tokenize_completions(before, x, tokenizer, length) for x in sides), strict=True))


def collate(pairs: list[Pair], numbers: list[int], device: torch.device) -> Sequences:
    """The chosen texts of some pairs, then their rejected ones: [2B] rows."""
    prompts = [pairs[i][0] for i in numbers] * 2
    texts = [pairs[i][side] for side in (1, 2) for i in numbers]
    return Sequences.of(prompts, texts, device)


if __name__ == "__main__":
    run_stage("prefer")
