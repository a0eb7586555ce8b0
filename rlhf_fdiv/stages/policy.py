"""On-policy alignment: prompts → rollout → score → log Z → pseudo-reward → advantage → update → log.

    accelerate launch -m rlhf_fdiv.stages.policy CONFIG [a.b=value …]

Divergence, objective, target and estimator come from the config; nothing below depends on which they are.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from transformers import TrainerState

from rlhf_fdiv import targets
from rlhf_fdiv.chat import stop_ids
from rlhf_fdiv.checkpoints import newest_checkpoint
from rlhf_fdiv.config import RunConfig
from rlhf_fdiv.data import PROMPTS, read_rows, tokenize_prompts
from rlhf_fdiv.divergences import Divergence
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.models import Reference, context_length, load_policy, load_tokenizer
from rlhf_fdiv.objectives import token_rewards
from rlhf_fdiv.replay import Replay, Scored
from rlhf_fdiv.rollout import Rollout
from rlhf_fdiv.scoring import Scorers
from rlhf_fdiv.sequences import sequence_sum
from rlhf_fdiv.stages.common import resolve_scorers, run_stage, starting_model
from rlhf_fdiv.stages.policy_log import Log
from rlhf_fdiv.stages.policy_rollout import Sampler, scores_of_prefixes
from rlhf_fdiv.stages.policy_update import update
from rlhf_fdiv.stages.training import Training, launch, row_order
from rlhf_fdiv.targets import DualAscent, LogPartition, MomentSolution
from rlhf_fdiv.tracking import RunFolder, write_atomically


def main(config: RunConfig, folder: RunFolder, out: Path) -> None:
    """Trains the policy and writes `model/`, `metrics.jsonl`, completions and checkpoints into `out`."""
    for _ in steps(config, folder, out):
        pass


def steps(config: RunConfig, folder: RunFolder, out: Path) -> Iterator[int]:
    """The whole stage, held after each step with its number: what a benchmark times is what users run."""
    options, f, objective, estimator = config.policy, config.f, config.objective, config.estimator

    # load
    start = starting_model(config, folder)
    specs = resolve_scorers(config, folder, (*config.target.scorers, *options.logged_scorers))
    accelerator = launch("policy.num_prompts", options.num_prompts)
    set_seed(config.seed)
    tokenizer = load_tokenizer(start)
    source = str(config.data.prompts_train)
    rows = read_rows(source, PROMPTS)
    prompt_ids = tokenize_prompts(rows, tokenizer, source, context_length(start) - options.max_completion_length)
    policy, reference = load_policy(start, config.model, estimator.value_head, options.logprob_chunk)
    log_partition = LogPartition()
    training = Training(policy, options, out, accelerator, config.report_to, log_partition=log_partition)
    replay = Replay(options.replay_steps, accelerator)
    reference.to(accelerator.device, training.whole())
    sampler = Sampler(config, training, reference, tokenizer, rows, prompt_ids)
    scorers = Scorers(specs, accelerator.device, config.target.scorers)
    scored = list(dict.fromkeys((*config.target.scorers, *options.logged_scorers)))
    critic = list(config.target.scorers) if getattr(estimator, "reads_prefixes", False) else []

    target = solve_target(config, sampler, scorers, log_partition)
    dual = training.state["dual"] = DualAscent(target)
    step = training.restore()
    log = Log(config, training, stop_ids(tokenizer))
    if step == 0:
        first = row_order(config.seed, 0, options.num_prompts, len(rows))
        self_check(training.policy, reference, sampler.draw(0, first, 1, sampler.policy())[0], options.engine)

    while step < options.max_steps:
        began = time.perf_counter()
        step += 1
        prompts = row_order(config.seed, step, options.num_prompts, len(rows))

        # roll out
        now = sampler.policy()
        batch, texts = sampler.draw(step, prompts, options.num_generations, now, options.reference_share)
        mask = batch.sequences.mask

        # score
        with training.keeping(step, texts):
            state = TrainerState(global_step=step, max_steps=options.max_steps)
            columns = texts | {"completion_ids": batch.token_ids(), "trainer_state": state}
            scores = scorers(scored, **columns)
            potential = dual.target.potential(scores).to(accelerator.device)
            prefixes = scores_of_prefixes(scorers, critic, batch, columns, tokenizer)
        log_a = reference.log_probs(batch.sequences, options.per_device_train_batch_size)
        batch, mismatch = sampler.off_policy(batch, log_a)

        # log Z, the same on every process
        log_ratio = sequence_sum(log_a, mask) - batch.log_mu
        by_prompt = torch.stack([log_ratio + potential, log_ratio], -1).view(-1, options.num_generations, 2)
        log_partition.update(gather_object(batch.prompts), *accelerator.gather(by_prompt.contiguous()).unbind(-1))

        # pseudo-reward and update, with the completions of `replay_steps` steps before
        new = Scored(batch, log_a, scores, prefixes)
        whole = replay.beside(new, training.policy, options.per_device_train_batch_size)
        potentials = dual.target.potential(whole.scores).to(accelerator.device)
        log_z = log_partition.of(whole.batch.prompts, options.num_generations).to(potentials)
        log_z = log_z.repeat_interleave(options.num_generations)
        rewards = rewards_of(objective, f, whole.log_a, whole.batch.sequences.mask, potentials, log_z)
        paid, seed = rewards(whole.batch.log_probs), config.seed * 1_000_003 + step
        figures = update(training, estimator, whole.batch, paid, seed, rewards, whole.by_prefix)
        figures |= {"coverage": log_partition.coverage, **mismatch}
        drawn = accelerator.gather(batch.drawn)
        figures |= dual.step({name: accelerator.gather(x)[drawn] for name, x in scores.items()}, training.schedule)

        # log
        log.step(step, batch, texts, scores, potential, log_a, log_z[: len(mask)], figures, time.perf_counter() - began)
        if training.end_step(step):
            log.flush_completions(step)
            training.save(step)
        yield step

    training.finish(tokenizer)


def solve_target(config: RunConfig, sampler: Sampler, scorers: Scorers, log_partition: LogPartition) -> Any:
    """λ of moment constraints and a warm start of log Z, from samples of the reference; kept in target.json for a resume."""
    target, moments, out = config.target, targets.unsolved(config.target), sampler.training.out
    kept = out / "target.json"
    if moments is not None and kept.is_file() and newest_checkpoint(out):  # which holds the log Z of these samples
        return targets.with_lambdas(target, json.loads(kept.read_text(encoding="utf-8"))["lambdas"])
    num_generations = moments.num_generations if moments else config.policy.warm_start_generations
    if not num_generations:
        return target
    accelerator, total = sampler.training.accelerator, len(sampler.rows)
    wanted = min(moments.num_prompts if moments else total, total)
    count = max(wanted - wanted % accelerator.num_processes, accelerator.num_processes)
    prompts = row_order(config.seed + 1, 1, count, total)
    table = reference_scores(sampler, scorers, list(target.scorers), prompts, num_generations)
    try:
        target, solution = targets.solve(target, table, extrapolate=True)
    except ValueError as error:
        raise UserError(f"target: {error}") from error
    log_partition.warm_start(prompts, target.potential(table))
    if moments and solution and accelerator.is_main_process:
        keep_solution(kept, list(moments.moments), solution, len(prompts) * num_generations)
    return target


def reference_scores(
    sampler: Sampler, scorers: Scorers, names: list[str], prompts: list[int], num_generations: int
) -> dict[str, Tensor]:
    """Scores [P, K] of completions of the reference, no more of them at a time than a step has."""
    options, accelerator = sampler.options, sampler.training.accelerator
    share = options.num_prompts * options.num_generations // num_generations
    width = max(share // accelerator.num_processes, 1) * accelerator.num_processes
    scores: dict[str, list[Tensor]] = {name: [] for name in names}
    for i in range(0, len(prompts), width):
        part = prompts[i : i + width]
        with sampler.reference.lm() as lm:
            batch, texts = sampler.draw(range(-1 - i, -1 - i - len(part), -1), part, num_generations, lm)
        texts |= {"completion_ids": batch.token_ids(), "trainer_state": TrainerState(max_steps=options.max_steps)}
        for name, values in scorers(names, **texts).items():
            scores[name].append(accelerator.gather(values).view(-1, num_generations))
    return {name: torch.cat(parts).cpu() for name, parts in scores.items()}


def keep_solution(path: Path, names: list[str], solution: MomentSolution, samples: int) -> None:
    """Writes λ with what it was solved from, and says it."""
    moments = {
        k: dict(zip(names, (None if math.isnan(x) else x for x in getattr(solution, k).tolist()), strict=True))
        for k in ("lambdas", "reference", "reached", "bias")
    }
    figures = {"ess": solution.ess, "samples": samples, "residual": solution.residual}
    write_atomically(path, json.dumps({**moments, **figures}, indent=2))
    print(f"λ {moments['lambdas']} takes {moments['reference']} to {moments['reached']}; {figures}")
    if solution.ess < 50 * len(names):
        print(
            f"warning: only {solution.ess:.0f} effective samples for {len(names)} moments; "
            f"about {samples * 50 * len(names) / solution.ess:.0f} samples would give 50 each"
        )


def rewards_of(objective: Any, f: Divergence, log_a: Tensor, mask: Tensor, *by_text: Tensor) -> Callable[..., Tensor]:
    """`token_rewards` of one rollout as a function of log π, [B, T], of all its completions or of some rows."""

    def rewards(log_pi: Tensor, rows: Any = slice(None)) -> Tensor:
        by_token = (x[rows, : log_pi.shape[1]] for x in (log_a, mask))
        return token_rewards(objective, f, log_pi, *by_token, *(x[rows] for x in by_text))

    return rewards


@torch.no_grad()
def self_check(policy: Any, reference: Reference, batch: Rollout, engine: str = "cached") -> None:
    """Before the first update the policy is its reference: ratio 1 and D(π‖a) = 0, through the real path.

    Raises UserError with the likely cause. Rollout and scoring round differently, so their bound depends on the dtype.
    """
    mask = batch.sequences.mask
    scored = policy(batch.sequences).log_probs
    against_reference = float((scored - reference.log_probs(batch.sequences)).abs().max())
    if not against_reference <= 1e-4:
        raise UserError(
            f"self-check: policy and reference differ by {against_reference:.3g} nats a token before the first update. "
            "Is dropout on, or is the model itself an unmerged adapter?"
        )
    error = float(((scored - batch.log_probs).abs() * mask).sum() / mask.sum())
    rough = engine == "vllm" or next(policy.parameters()).dtype == torch.bfloat16  # whatever a server computes in
    bound = 0.1 if rough else 1e-3
    if not error <= bound:
        raise UserError(
            f"self-check: rollout and a fresh forward differ by {error:.3g} nats a token (bound {bound:g}). "
            "Likely causes: positions under left padding, a truncated sampler, another dtype in the rollout, dropout, "
            "a server of another model"
        )


if __name__ == "__main__":
    run_stage("policy")
