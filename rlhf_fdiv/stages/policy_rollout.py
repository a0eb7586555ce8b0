"""A step's completions and their texts: of the policy, of a server that holds it, or of the reference."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rlhf_fdiv.config import RunConfig
from rlhf_fdiv.data import Rows, extra_columns
from rlhf_fdiv.models import Reference, in_micro_batches
from rlhf_fdiv.rollout import Rollout, sample, sample_each, uniforms
from rlhf_fdiv.scoring import Scorers
from rlhf_fdiv.stages.policy_server import Server
from rlhf_fdiv.stages.training import Training


class Sampler:
    """Draws completions of `rows`, whose prompts are `prompt_ids`. Each completion's noise is a function of seed, step and
    its place in the step, so that a launch on more processes draws the same."""

    def __init__(
        self,
        config: RunConfig,
        training: Training,
        reference: Reference,
        tokenizer: Any,
        rows: Rows,
        prompt_ids: list[list[int]],
    ) -> None:
        self.options, self.seed, self.training, self.reference = config.policy, config.seed, training, reference
        self.tokenizer, self.rows, self.prompt_ids = tokenizer, rows, prompt_ids
        self.server = Server(training, tokenizer) if self.options.engine == "vllm" else None

    def policy(self) -> Any:
        """The policy as it is now, here or on the server; asked by all processes together."""
        whole = self.training.whole()
        return self.server.holding(whole) if self.server else whole.lm

    def draw(
        self, step: int | range, prompts: list[int], num_generations: int, lm: Any, reference_share: float = 0.0
    ) -> tuple[Rollout, dict[str, Any]]:
        """This process's share of a step's completions, with the columns that scorers take; of `lm`, a model or a server,
        but for `reference_share` of them. A range gives each prompt a step of its own: its noise is then the same whatever
        prompts it is drawn with."""
        places = self.training.share(list(range(len(prompts))))
        mine = [prompts[i] for i in places]
        ids = [self.prompt_ids[i] for i in mine]

        def noise(length: int, stream: int = 0) -> Tensor:
            own = step if isinstance(step, range) else [step]
            count = len(prompts) * num_generations // len(own)
            whole = torch.cat([uniforms(self.seed, s, count, length, stream) for s in own])
            return whole.view(len(prompts), num_generations, -1)[places].flatten(0, 1)

        which, draws = None, noise(self.options.max_completion_length)
        if reference_share:
            which = (noise(1, stream=1)[:, 0] < reference_share).long()
            each = [x for x in ids for _ in range(num_generations)]
            lms = [nullcontext(lm), self.reference.lm()]
            drawn = sample_each(lms, which, self.tokenizer, each, draws, self.options.engine)
        elif isinstance(lm, Server):
            drawn = lm.sample(ids, num_generations, draws)
        else:
            drawn = sample(lm, self.tokenizer, ids, num_generations, draws, self.options.engine)
        batch = Rollout(*drawn, mine, own=None if which is None else which == 0)
        repeated = [self.rows[i] for i in mine for _ in range(num_generations)]
        texts = {"prompts": [r["prompt"] for r in repeated], "completions": batch.texts(self.tokenizer)}
        return batch, extra_columns(repeated) | texts

    def off_policy(self, batch: Rollout, log_a: Tensor) -> tuple[Rollout, dict[str, float]]:
        """The batch with log π by the policy here, where that is not what drew it, and by how much a server's differed."""
        if not (self.options.reference_share or self.server):
            return batch, {}
        log_pi = in_micro_batches(
            self.training.policy, batch.sequences, self.options.per_device_train_batch_size
        ).log_probs
        figures = {"rollout_mismatch": self.server.mismatch(log_pi, batch)} if self.server else {}
        return batch.off_policy(log_pi, log_a, self.options.reference_share), figures


def scores_of_prefixes(
    scorers: Scorers, names: list[str], batch: Rollout, columns: dict[str, Any], tokenizer: Any
) -> dict[str, Tensor]:
    """Each scorer's scores of what stood before each token, [B, T], zero at padding; `columns` are the completions'."""
    mask = batch.sequences.mask.bool()
    scores = scorers.of_prefixes(names, tokenizer, **columns) if names else {}
    return {name: x.new_zeros(mask.shape).masked_scatter(mask.to(x.device), x) for name, x in scores.items()}
