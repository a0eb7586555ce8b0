"""Distillation: completions of the student (or the data) → both next-token distributions → D_f by token → update → log.

accelerate launch -m rlhf_fdiv.stages.distil CONFIG [a.b=value …]
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from rlhf_fdiv.config import RunConfig
from rlhf_fdiv.data import COMPLETIONS, PROMPTS, Rows, read_rows, tokenize_completions, tokenize_prompts
from rlhf_fdiv.divergences import Divergence
from rlhf_fdiv.models import Policy, context_length, load_causal_lm, load_policy, load_tokenizer
from rlhf_fdiv.objectives import Distil
from rlhf_fdiv.rollout import sample, uniforms
from rlhf_fdiv.sequences import Sequences, wide
from rlhf_fdiv.stages.common import run_stage, starting_model
from rlhf_fdiv.stages.training import Training, launch, row_order
from rlhf_fdiv.tracking import RunFolder


def main(config: RunConfig, folder: RunFolder, out: Path) -> None:
    """Trains the student and writes `model/`, `metrics.jsonl` and checkpoints into `out`."""
    options, f, objective = config.distil, config.f, config.objective

    # load
    start, length = starting_model(config, folder), options.max_completion_length
    accelerator = launch("distil.num_prompts", options.num_prompts)
    set_seed(config.seed)
    tokenizer = load_tokenizer(start)
    room = min(context_length(start), context_length(str(options.teacher))) - length
    prompts = _read(config.data.prompts_train, PROMPTS, tokenizer, room) if objective.on_policy > 0 else ([], [])
    texts = _read(config.data.sft_train, COMPLETIONS, tokenizer, room) if objective.on_policy < 1 else ([], [])
    policy, _ = load_policy(start, config.model)
    teacher = Policy(load_causal_lm(str(options.teacher), config.model).requires_grad_(False)).to(accelerator.device)
    training = Training(policy, options, out, accelerator, config.report_to)

    step = training.restore()
    while step < options.max_steps:
        began = time.perf_counter()
        step += 1

        # completions: the student's own, or those of the data
        own = float(uniforms(config.seed, step, 1, 1, stream=2)) < objective.on_policy
        rows, ids = prompts if own else texts
        numbers = training.share(row_order(config.seed, step, options.num_prompts, len(rows)))
        if own:
            noise = uniforms(config.seed, step, options.num_prompts, length)
            mine = torch.tensor(training.share(list(range(options.num_prompts))))
            batch, *_ = sample(training.whole().lm, tokenizer, [ids[i] for i in numbers], 1, noise[mine])
        else:
            before, after = ([rows[i][key] for i in numbers] for key in COMPLETIONS)
            written = tokenize_completions(before, after, tokenizer, length)
            batch = Sequences.of([ids[i] for i in numbers], written, accelerator.device)

        # D_f by token, and the update
        def loss_of(some: Tensor, batch: Sequences = batch) -> Tensor:
            part = batch[some]
            with torch.no_grad():
                theirs = teacher(part).logits
            by_token = token_divergences(objective, f, training.policy(part).logits, theirs, part.mask, options.chunk)
            return by_token.sum(-1)

        with training.keeping(step, {"prompt": [rows[i]["prompt"] for i in numbers]}):
            loss, norm = training.step(torch.arange(len(numbers)), loss_of, batch.mask.sum(1).cpu())

        # log
        tokens = float(accelerator.gather(batch.mask.sum(1)).double().mean())
        values = {"loss": loss, "divergence_by_token": loss / tokens, "length": tokens, "on_policy": float(own)}
        training.log(step, {**values, "grad_norm": norm}, time.perf_counter() - began)
        if training.end_step(step):
            training.save(step)

    training.finish(tokenizer)


def token_divergences(
    objective: Distil, f: Divergence, ours: Tensor, theirs: Tensor, mask: Tensor, chunk: int
) -> Tensor:
    """D_f(student‖teacher) of each token, [B, T], from logits [B, T, V]; `chunk` tokens at a time, 0 where masked."""
    tokens, width = mask.bool(), ours.shape[-1]  # a teacher's vocabulary may be padded further than the student's
    values: Tensor = _ByToken.apply(ours[tokens], theirs[tokens][:, :width], objective, f, chunk)  # type: ignore[no-untyped-call]
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(tokens, values)


class _ByToken(torch.autograd.Function):
    """Takes the slope together with the value, so that of all that f computes nothing of [N, V] outlives a chunk but the
    gradient of the logits; autograd through f would keep dozens of such tensors."""

    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor, objective: Distil, f: Divergence, chunk: int) -> Tensor:
        values, gradient = [], torch.empty_like(ours)
        for x, y, out in zip(ours.split(chunk), theirs.split(chunk), gradient.split(chunk), strict=True):
            log_pi, log_q = wide(x).log_softmax(-1), wide(y).log_softmax(-1)
            values.append(objective.divergence(f, log_pi, log_q))
            slope = objective.slope(f, log_pi, log_q)
            out.copy_(slope - log_pi.exp() * slope.sum(-1, keepdim=True))  # through the softmax
        ctx.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient), None, None, None, None


def _read(source: str | None, fields: dict[str, type], tokenizer: Any, room: int) -> tuple[Rows, list[list[int]]]:
    rows = read_rows(str(source), fields)
    return rows, tokenize_prompts(rows, tokenizer, str(source), room)


if __name__ == "__main__":
    run_stage("distil")
