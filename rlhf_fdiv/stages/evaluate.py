"""Before and after on held-out prompts: rewards, divergences with intervals, diversity, perplexity, samples, a report."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import TrainerState

from rlhf_fdiv import metrics, targets
from rlhf_fdiv.chat import Prompt, shown, stop_ids
from rlhf_fdiv.config import RunConfig
from rlhf_fdiv.data import (
    COMPLETIONS,
    PROMPTS,
    Rows,
    extra_columns,
    have_references,
    read_rows,
    reference_texts,
    tokenize_prompts,
)
from rlhf_fdiv.divergences import clustered_error
from rlhf_fdiv.errors import UserError, told_as
from rlhf_fdiv.models import context_length, load_causal_lm, load_tokenizer
from rlhf_fdiv.objectives import log_target
from rlhf_fdiv.report import write_report
from rlhf_fdiv.reward_models import completion_states
from rlhf_fdiv.rollout import Rollout, sample, uniforms
from rlhf_fdiv.scoring import Scorers
from rlhf_fdiv.stages.common import process_state, resolve_scorers, run_stage, starting_model
from rlhf_fdiv.tracking import RunFolder, finite, write_atomically


@dataclass(frozen=True)
class Samples:
    """What one model wrote, K completions for each of P prompts, [P × K] each, and their log-probs under both models in nats.

    `kl` is Σ_t KL(π_t‖a_t) of the visited states.
    """

    drawn: list[Rollout]
    texts: list[str]
    scores: dict[str, Tensor]
    log_pi: Tensor
    log_a: Tensor
    kl: Tensor


def main(config: RunConfig, folder: RunFolder, out: Path) -> None:
    """Writes `metrics.json`, `samples.parquet`, figures and the run's `report.md`; one process does all of it."""
    state = process_state()
    if not state.is_main_process:
        return
    options, device = config.evaluate, state.device

    # load
    start = starting_model(config, folder)
    trained = folder.find(config.objective.stage)
    if trained is None:
        raise UserError(f"{folder.path}: the {config.objective.stage} stage is not finished; run it before evaluate")
    source = str(config.data.prompts_eval)
    rows = read_rows(source, PROMPTS, options.num_prompts)
    if len(rows) * options.num_generations < 2:
        raise UserError("evaluate: one completion cannot be measured; raise num_prompts or num_generations")
    tokenizer = load_tokenizer(start)
    length = config.training.max_completion_length
    ids = tokenize_prompts(rows, tokenizer, source, context_length(start) - length)
    scorers = Scorers(resolve_scorers(config, folder), device, config.target.scorers)
    models: dict[str, Any] = {
        "sft": load_causal_lm(start, config.model).to(device),
        "policy": load_causal_lm(str(trained / "model"), config.model).to(device),
    }
    distilled = config.objective.stage == "distil"
    teacher = load_causal_lm(str(config.distil.teacher), config.model).to(device) if distilled else None
    target = solved_target(config, trained)

    # the same prompts and random streams for both
    k, groups = options.num_generations, torch.arange(len(rows)).repeat_interleave(options.num_generations)
    noise = uniforms(config.seed + 1, 0, len(rows) * k, length)
    repeated = [row for row in rows for _ in range(k)]
    own = {"prompts": [row["prompt"] for row in repeated], "trainer_state": ended(config)}
    columns: dict[str, Any] = extra_columns(repeated) | own
    samples: dict[str, Samples] = {}
    report: dict[str, Any] = {"beta": config.beta, "prompts": len(rows), "paired": {}}
    for name, lm in models.items():
        drawn = draw(lm, tokenizer, ids, k, noise, options.batch_size)
        samples[name] = measured(drawn, models, name == "policy", scorers, columns, tokenizer, options.batch_size)
        report[name] = describe(samples[name], repeated, config, groups) | held_out_perplexity(config, lm, tokenizer)

    # compare
    against_reference(report, samples, config, groups)
    if teacher is not None:
        against_teacher(report, samples["policy"], teacher, config, groups)
    elif target is not None:
        against_target(report, samples, target, config, groups)
    if options.exact and target is not None:
        report["exact"] = enumerate_language(config, models, tokenizer, ids, rows, scorers, target, teacher)
    if options.mauve:
        add_mauve(report, samples, models["sft"], tokenizer, repeated, config)
    if options.lm_eval:
        how = (options.lm_eval, options.lm_eval_limit, options.batch_size, config.seed)
        report["lm_eval"] = {name: metrics.lm_eval(lm, tokenizer, *how) for name, lm in models.items()}

    # write
    table = side_by_side(columns["prompts"], samples)
    table.to_parquet(out / "samples.parquet")
    write_atomically(out / "metrics.json", json.dumps(finite(report), indent=2, ensure_ascii=False))
    write_report(config, folder.path, out, finite(report), table)


def ended(config: RunConfig) -> TrainerState:
    """What a reward function is told of the training: that it is over."""
    return TrainerState(global_step=config.training.max_steps, max_steps=config.training.max_steps)


def draw(lm: Any, tokenizer: Any, ids: list[list[int]], k: int, noise: Tensor, batch_size: int) -> list[Rollout]:
    """K completions a prompt, in batches of whole prompts."""
    width = max(1, batch_size // k)
    batches = []
    for i in range(0, len(ids), width):
        part = ids[i : i + width]
        prompts = list(range(i, i + len(part)))
        batches.append(Rollout(*sample(lm, tokenizer, part, k, noise[i * k : (i + len(part)) * k]), prompts))
    return batches


def measured(
    drawn: list[Rollout],
    models: dict[str, Any],
    of_policy: bool,
    scorers: Scorers,
    columns: dict[str, Any],
    tokenizer: Any,
    batch_size: int,
) -> Samples:
    """Completions with their scores and their log-probs under both models."""
    texts = [text for batch in drawn for text in batch.texts(tokenizer)]
    completions = {"completions": texts, "completion_ids": [ids for batch in drawn for ids in batch.token_ids()]}
    scores = scorers(scorers.names, **columns | completions)
    parts = [metrics.score_both(models["policy"], models["sft"], batch.sequences, batch_size) for batch in drawn]
    log_pi, log_a, kl = (torch.cat(x) for x in zip(*parts, strict=True))
    if of_policy:  # of the softmax that was sampled: in bfloat16 a fresh forward would put k1 too low
        log_pi = torch.cat([batch.log_probs.double().sum(-1).cpu() for batch in drawn])
    return Samples(drawn, texts, scores, log_pi, log_a, kl)


def against_reference(report: dict[str, Any], samples: dict[str, Samples], config: RunConfig, groups: Tensor) -> None:
    """Adds the policy's divergence to the reference, and by how much its scores are higher for the same prompt and noise."""
    policy = samples["policy"]
    report["divergence_to_reference"] = metrics.measure_all(config.measured, policy.log_pi, policy.log_a, groups)
    report["policy"] |= {"kl_reference": float(policy.kl.mean()), "kl_reference_se": clustered_error(policy.kl, groups)}
    report["sft"] |= {"kl_reference": 0.0, "kl_reference_se": 0.0}
    for name, scores in policy.scores.items():
        report["paired"][f"{name}_gain"], report["paired"][f"{name}_gain_se"] = metrics.paired_difference(
            scores.cpu(), samples["sft"].scores[name].cpu(), groups
        )


def against_teacher(report: dict[str, Any], policy: Samples, teacher: Any, config: RunConfig, groups: Tensor) -> None:
    """Adds the student's divergence to its teacher."""
    log_q = torch.cat([metrics.score(teacher, d.sequences, config.evaluate.batch_size) for d in policy.drawn])
    report["divergence_to_target"] = metrics.measure_all(config.measured, policy.log_pi, log_q, groups)


def against_target(
    report: dict[str, Any], samples: dict[str, Samples], target: Any, config: RunConfig, groups: Tensor
) -> None:
    """Adds the policy's divergence to the target, both models' objective, and what inference alone buys for this target."""
    k, policy = config.evaluate.num_generations, samples["policy"]
    potential = {name: target.potential(x.scores).double().cpu() for name, x in samples.items()}

    def both(*parts: Tensor) -> Tensor:
        """The reference's and the policy's samples of each prompt together, [P, 2K]."""
        return torch.cat([x.double().cpu().view(-1, k) for x in parts], 1)

    log_pi, log_a = (both(*(getattr(x, key) for x in samples.values())) for key in ("log_pi", "log_a"))
    tilt = both(*potential.values())
    log_z = metrics.log_partition_of(log_a + tilt, log_pi, log_a)
    log_p = log_target(policy.log_a, potential["policy"], log_z.log_z.repeat_interleave(k))
    report["divergence_to_target"] = metrics.measure_all(config.measured, policy.log_pi, log_p, groups, log_z.bias)
    report["log_z"] = {"mean": float(log_z.log_z.mean()), "ess": log_z.ess, "samples": 2 * k, "bias": log_z.bias}
    for name in samples:
        report[name]["objective"] = config.beta * (float(potential[name].mean()) - report[name]["kl_reference"])
    gain = config.beta * (potential["policy"] - potential["sft"] - policy.kl)
    report["paired"] |= {"objective_gain": float(gain.mean()), "objective_gain_se": clustered_error(gain, groups)}
    scores = {name: both(*(x.scores[name] for x in samples.values())) for name in policy.scores}
    log_weights = log_a - torch.logaddexp(log_a, log_pi) + math.log(2)  # of samples of (a + π)/2
    report["inference"] = metrics.inference_baselines(log_weights, tilt, scores, k, config.beta)


def add_mauve(
    report: dict[str, Any], samples: dict[str, Samples], reference: Any, tokenizer: Any, rows: Rows, config: RunConfig
) -> None:
    """Adds the MAUVE of both models' samples to held-out texts, by the reference's last hidden states."""
    known = reference_texts(rows[:: config.evaluate.num_generations], config.data.sft_eval, len(rows))
    size, length = config.evaluate.batch_size, config.training.max_completion_length

    def states(prompts: list[Prompt], texts: list[str]) -> Tensor:
        return completion_states(reference.base_model, tokenizer, [-1], prompts, texts, size, length)

    features = states([row["prompt"] for row in known], [row["completion"] for row in known])
    prompts = [row["prompt"] for row in rows]
    for name, x in samples.items():
        report[name]["mauve"] = metrics.mauve(features, states(prompts, x.texts), config.seed)
    report["mauve_texts"] = min(len(known), len(rows))


def enumerate_language(
    config: RunConfig,
    models: dict[str, Any],
    tokenizer: Any,
    ids: list[list[int]],
    rows: Rows,
    scorers: Scorers,
    target: Any,
    teacher: Any,
) -> dict[str, Any]:
    """The same figures without an estimate, over every text; to the target, which is the teacher where there is one."""
    vocab_size = models["policy"].config.vocab_size
    with told_as("evaluate.exact", (ValueError,)):
        every = metrics.all_texts(vocab_size, stop_ids(tokenizer), config.training.max_completion_length)
    log_pi, log_a = (
        metrics.log_probs_of_all(models[n], ids, every, config.evaluate.batch_size) for n in ("policy", "sft")
    )
    repeated = [row for row in rows for _ in every]
    decoded = tokenizer.batch_decode(every, skip_special_tokens=True)
    texts = {"prompts": [row["prompt"] for row in repeated], "completions": decoded * len(rows)}
    texts |= {"completion_ids": every * len(rows), "trainer_state": ended(config)}
    scores = scorers(list(target.scorers), **extra_columns(repeated) | texts)
    potential = target.potential(scores).double().cpu().view(log_pi.shape)
    log_p = (log_a + potential).log_softmax(1)
    if teacher is not None:
        log_p = metrics.log_probs_of_all(teacher, ids, every, config.evaluate.batch_size)
    report = metrics.exact_report(config.measured, log_pi, log_a, log_p, config.beta * potential)
    report["objective"] = report["reward"] - config.beta * report["kl_reference"]
    return report


def side_by_side(prompts: list[Prompt], samples: dict[str, Samples]) -> pd.DataFrame:
    """Each prompt with what each model wrote, and its scores."""
    table = pd.DataFrame({"prompt": [shown(prompt) for prompt in prompts]})
    for name, x in samples.items():
        table[name] = x.texts
        for scorer, values in x.scores.items():
            table[f"{name}_{scorer}"] = values.cpu().tolist()
    return table


def describe(samples: Samples, rows: Rows, config: RunConfig, groups: Tensor) -> dict[str, Any]:
    """The figures of one model's samples alone."""
    figures: dict[str, Any] = {}
    for name, values in samples.scores.items():
        applies = ~values.cpu().isnan()
        values = values.cpu()[applies]
        figures[name], figures[f"{name}_se"] = float(values.mean()), clustered_error(values, groups[applies])
    texts, drawn = samples.texts, samples.drawn
    tokens = sum(float(d.sequences.mask.sum()) for d in drawn)
    figures["entropy"] = sum(float(d.entropy.sum()) for d in drawn) / tokens
    figures["length"] = tokens / len(texts)
    figures |= {f"distinct_{n}": metrics.distinct_n(texts, n) for n in (1, 2, 3)}
    figures["self_bleu"] = metrics.self_bleu(texts)
    if have_references(rows):
        figures |= metrics.likeness(texts, [row["references"] for row in rows])
    return figures


def held_out_perplexity(config: RunConfig, lm: Any, tokenizer: Any) -> dict[str, float]:
    if config.data.sft_eval is None or not config.evaluate.perplexity_rows:
        return {}
    rows = read_rows(config.data.sft_eval, COMPLETIONS, config.evaluate.perplexity_rows)
    return metrics.perplexity(lm, tokenizer, rows, config.evaluate.batch_size)


def solved_target(config: RunConfig, trained: Path) -> Any:
    """The config's target, with the λ that the policy stage solved; None where the run has no scores or λ for it."""
    if not set(config.target.scorers) <= set(config.scorers):
        return None
    if targets.unsolved(config.target) is None:
        return config.target
    if not (trained / "target.json").is_file():
        return None
    solution = json.loads((trained / "target.json").read_text(encoding="utf-8"))
    return targets.with_lambdas(config.target, solution["lambdas"])


if __name__ == "__main__":
    run_stage("evaluate")
