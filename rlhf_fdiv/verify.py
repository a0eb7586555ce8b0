"""The proof: the gradient of every divergence × objective × target × estimator, on a language that can be enumerated.

The truth is the objective itself (`exact_objective`), written out below over all texts and differentiated by autograd.
All else is what stages/policy.py calls: a target's `potential` and `solve`, `LogPartition`, `token_rewards`, `update`
(hence the estimators, `policy_loss` and `Training`), and `sample`; none of it is written a second time here.

    reinforce, ppo   all N texts of a prompt as an off-policy rollout, drawn uniformly with weights N·π(y): exact
    rloo, grpo       groups of K texts drawn from π, until the standard error of the mean gradient is below 1 %
"""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate import Accelerator
from rich.markup import escape
from rich.table import Table
from scipy import stats
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from rlhf_fdiv import divergences, targets, toy
from rlhf_fdiv.config.options import PolicyOptions
from rlhf_fdiv.divergences import Divergence, exact, label
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.estimators import GRPO, PPO, RLOO, Reinforce, policy_loss
from rlhf_fdiv.models import Policy, Reference
from rlhf_fdiv.objectives import Match, Regularise, chain_rule_factor
from rlhf_fdiv.rollout import Rollout, sample, uniforms
from rlhf_fdiv.sequences import sequence_sum
from rlhf_fdiv.stages.policy import rewards_of
from rlhf_fdiv.stages.policy_update import update
from rlhf_fdiv.stages.training import Training
from rlhf_fdiv.targets import LogPartition, Moments, Pointwise, Product, Tilted
from rlhf_fdiv.toy import LENGTH, N, P

EXACT, COSINE, ERRORS, PRECISION = 1e-6, 0.999, 4.0, 0.01  # bounds: relative error, cosine, bias in s.e., s.e.
K, BLOCKS, GROUPS = 4, 32, 256  # of one draw: K texts a group, GROUPS groups a prompt in each independent block
MAX_DRAWS = 256  # 25 million texts
LR = 1e-3  # a step that changes a few probabilities by the 20 % at which ppo clips

OBJECTIVES = (Match(), Regularise(beta=0.3))
TARGETS = {
    "tilted": Tilted(beta=0.7),
    "moments": Moments({"has_1": 0.8, "reward": 1.2}),
    "pointwise": Pointwise("b"),
    "product": Product([Tilted(beta=1.5), Pointwise("b", floor=0.2)]),
}


class Case(NamedTuple):
    """An estimator as it is proved: with a bias by design, in words, or with the factor by which it is known to shrink."""

    name: str
    estimator: Any
    bias: str = ""
    factor: float = 1.0


ONE_PASS = PPO(num_epochs=1, num_minibatches=1, lam=1.0, vf_coef=0.0, whiten_advantages=False)
CASES = (
    Case("reinforce", Reinforce()),
    Case("rloo", RLOO()),
    Case("grpo", GRPO(), "std reweights groups"),
    Case("grpo(scale_rewards=False)", GRPO(scale_rewards=False), factor=(K - 1) / K),
    Case("ppo", ONE_PASS),
)
DEFAULTS = Case("ppo, defaults of the library", PPO(num_epochs=1, num_minibatches=1, vf_coef=0.0),
                f"lam = {PPO.lam}, whitened")  # fmt: skip
SECOND_EPOCHS = (Case("reinforce, second epoch", Reinforce(num_epochs=2)),
                 Case("ppo, second epoch", replace(ONE_PASS, num_epochs=2), "f' frozen, clipped"))  # fmt: skip
LOCAL_Z = Case("rloo, batch-local Z", RLOO(), f"log Ẑ from {K} samples")


class Row(NamedTuple):
    """Errors are in units of the exact gradient's norm; None where nothing was measured. A `reason` that ends in
    "after × c" says that the estimate was multiplied by c before it was compared: known for grpo's (K − 1)/K, else the c of
    least error, so that a bias by design is one of direction."""

    divergence: str
    objective: str
    target: str
    estimator: str
    cosine: float | None = None
    relative_error: float | None = None
    standard_error: float | None = None
    status: str = "fail"  # pass, fail, biased (by design), undefined
    reason: str = ""


def exact_objective(objective: Any, f: Divergence, log_pi: Tensor, log_a: Tensor, potential: Tensor) -> Tensor:
    """What is minimised, from all texts, [P, N] each: D_f(π‖p), or β·D_f(π‖a) − E_π[r], averaged over prompts."""
    if isinstance(objective, Match):
        return exact(f, log_pi, (log_a + potential).log_softmax(1)).mean()
    reward = objective.beta * potential
    return (objective.beta * exact(f, log_pi, log_a) - (log_pi.exp() * reward).sum(1)).mean()


class Proof:
    """The enumerated language, a policy that has moved away from its reference, and what they have in common with a run."""

    def __init__(self, folder: Path) -> None:
        reference = toy.tiny_lm("gpt2")
        self.lm = toy.perturbed(reference, scale=0.035)
        self.start = parameters_to_vector(self.lm.parameters()).detach()
        self.policy, critic = Policy(self.lm), Policy(self.lm, value_head=True).double()
        nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr]
        self.sequences, self.mask = toy.everything(), toy.everything().mask
        with torch.no_grad():
            self.log_pi = self.policy(self.sequences).log_probs
        self.log_a = Reference(Policy(reference), adapter_off=False).log_probs(self.sequences)
        uniform, entropy = torch.full((P * N,), -math.log(N), dtype=torch.float64), torch.zeros_like(self.log_pi)
        self.batch = Rollout(self.sequences, self.log_pi, entropy, [*range(P)], log_mixture=uniform)
        options = PolicyOptions(num_generations=N, per_device_train_batch_size=P * N, optim="sgd", learning_rate=LR,
                                max_grad_norm=1e9, max_importance_weight=1e9)  # fmt: skip
        self.trainings = [Training(policy, options, folder, Accelerator(cpu=True)) for policy in (self.policy, critic)]
        self.draw = functools.lru_cache(64)(self._draw)  # shared by all rows
        # λ: these texts are no samples of a, so log a joins the potential, as another part of a product would
        table = {name: scores.view(P, N) for name, scores in toy.scores().items()}
        table["log a"] = sequence_sum(self.log_a, self.mask).view(P, N)
        moments, _ = targets.solve(Product([TARGETS["moments"], Tilted(beta=1.0, reward="log a")]), table)
        self.targets = {**TARGETS, "moments": moments.of[0]}

    def rows(self, f: Divergence) -> Iterator[Row]:
        """Every row of one f, or its failed proofs alone."""
        if failures := divergences.check(f):
            yield from (Row(label(f), "-", "-", "-", reason=failure) for failure in failures)
            return
        # in reverse KL log Ẑ is a constant of the group, which leave-one-out removes
        local_z = LOCAL_Z if chain_rule_factor(f) is None else LOCAL_Z._replace(bias="")
        for objective, (name, target) in itertools.product(OBJECTIVES, self.targets.items()):
            plain = isinstance(objective, Match) and name == "tilted"
            blank = [Row(label(f), objective.name, name, case.name) for case in CASES]
            if conflict := objective.conflicts(f, target.has_zeros):
                yield from (row._replace(status="undefined", reason=conflict) for row in blank)
                continue
            problem = Problem(self, f, objective, target)
            for case in (*CASES, *((DEFAULTS, *SECOND_EPOCHS, local_z) if plain else ())):
                row = Row(label(f), objective.name, name, case.name)
                try:
                    yield verdict(row, case, *problem.gradients(case))
                except UserError as error:  # Training refuses a loss or gradient that is not finite
                    yield row._replace(reason=error.problems[0])

    def step(self, estimator: Any, rewards: Callable[..., Tensor]) -> Tensor:
        """Leaves the weights where the stage's update takes them; returns how far that was, in units of LR, [D]."""
        vector_to_parameters(self.start.clone(), self.lm.parameters())
        update(self.trainings[estimator.value_head], estimator, self.batch, rewards(self.log_pi), 0, rewards)
        return (self.start - parameters_to_vector(self.lm.parameters()).detach()) / LR

    def sampled(self, estimator: Any, rewards_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The mean gradient over groups of K texts, and its standard error from independent blocks, [D] each.

        A step at ratio 1 is linear in the advantages, so those of equal texts are added before `policy_loss` sees them.
        """
        total, wanted = torch.zeros(BLOCKS * P * N, LENGTH, dtype=torch.float64), 1
        for done in range(1, MAX_DRAWS + 1):
            rows, places = self.draw(done)
            total.index_add_(0, places, estimator(rewards_of(rows), self.mask[rows], K).advantages)
            if done >= wanted:
                blocks = self._loss_gradients(total / (done * P * GROUPS * K), estimator.clip_range)
                mean, error = blocks.mean(0), blocks.std(0) / math.sqrt(BLOCKS)
                excess = float(error.norm() / (PRECISION * mean.norm()))
                if not excess >= 1:
                    break
                wanted = min(math.ceil(1.1 * done * excess**2), MAX_DRAWS)
        return mean, error

    def _draw(self, seed: int) -> tuple[Tensor, Tensor]:
        """Texts drawn from π as rows of the language, a group's K in consecutive places; and block × row of each.

        A Latin hypercube: every group is K independent draws, and the groups of a block together cover π evenly.
        """
        generator = torch.Generator().manual_seed(seed)
        order, within = torch.rand(2, P, BLOCKS, K, GROUPS, generator=generator, dtype=torch.float64)
        u = (order.argsort(-1) + within) / GROUPS
        cumulative = sequence_sum(self.log_pi, self.mask).view(P, N).exp().cumsum(1)
        texts = torch.searchsorted(cumulative, u.view(P, -1) * cumulative[:, -1:], right=True).view_as(u)
        rows = (texts + N * torch.arange(P)[:, None, None, None]).transpose(2, 3)
        return rows.flatten(), (rows + P * N * torch.arange(BLOCKS)[:, None, None]).flatten()

    def _loss_gradients(self, advantages: Tensor, clip_range: float | None) -> Tensor:
        """∇ Σ policy_loss of every block, [BLOCKS × P × N, T] → [BLOCKS, D]."""
        old, mask = (x.repeat(BLOCKS, 1) for x in (self.log_pi, self.mask))
        log_pi = old.clone().requires_grad_()
        (slope,) = torch.autograd.grad(policy_loss(log_pi, old, advantages, mask, clip_range).sum(), log_pi)
        return slope.view(BLOCKS, -1) @ self._slopes

    @functools.cached_property
    def _slopes(self) -> Tensor:
        """∇ log π of every token of every text, [P × N × T, D], zero at padding."""
        vector_to_parameters(self.start.clone(), self.lm.parameters())
        slopes = []
        for rows in torch.arange(P * N).split(4):
            log_pi = self.policy(self.sequences[rows]).log_probs
            each = torch.eye(log_pi.numel(), dtype=torch.float64).view(-1, *log_pi.shape)
            parts = torch.autograd.grad(log_pi, [*self.lm.parameters()], each, is_grads_batched=True)
            by_token = torch.cat([x.flatten(1) for x in parts], 1).view(*log_pi.shape, -1)
            slopes.append(nn.functional.pad(by_token, (0, 0, 0, LENGTH - log_pi.shape[1])))
        return torch.cat(slopes).flatten(0, 1)

    def sampler(self, engine: str, count: int = 7000) -> Row:
        """`sample` against the enumerated probabilities: χ² over the texts of all prompts, and the log-probs it returns."""
        noise, log_pi = uniforms(0, 1, P * count, LENGTH), sequence_sum(self.log_pi, self.mask)
        drawn, log_probs, _ = sample(self.lm, toy.TOKENIZER, toy.PROMPTS, count, noise, engine)
        row = Row("-", "sampler", "-", engine)
        try:
            rows = toy.text_index(drawn.completion_ids, drawn.mask) + N * torch.arange(P).repeat_interleave(count)
        except ValueError as error:
            return row._replace(reason=str(error))
        cells = torch.stack([torch.bincount(rows, minlength=P * N), count * log_pi.exp()])
        rare = cells[1] < 5  # too few for χ² alone
        observed, expected = torch.cat([cells[:, ~rare], cells[:, rare].sum(1, keepdim=True)], 1)
        p_value = stats.chi2.sf(float(((observed - expected) ** 2 / expected).sum()), len(expected) - P)
        gap = float((sequence_sum(log_probs, drawn.mask) - log_pi[rows]).abs().max())
        reason = f"p = {p_value:.2g} in χ² of {len(rows):,} texts, log-probs within {gap:.0e}"
        return row._replace(status="pass" if p_value >= 1e-6 and gap <= 1e-4 else "fail", reason=reason)


class Problem:
    """One divergence × objective × target: its exact gradient, and the rewards that the stage would pay each text."""

    def __init__(self, proof: Proof, f: Divergence, objective: Any, target: Any) -> None:
        self.proof, self.f, self.objective = proof, f, objective
        self.potential = target.potential(toy.scores())
        log_weights = sequence_sum(proof.log_a, proof.mask) + self.potential - proof.batch.log_mu
        log_z = LogPartition().update(proof.batch.prompts, log_weights.view(P, N))
        self.rewards = self.rewards_of(slice(None), log_z.repeat_interleave(N))
        vector_to_parameters(proof.start.clone(), proof.lm.parameters())
        self.gradient = self.gradient_here()

    def rewards_of(self, rows: Any, log_z: Tensor) -> Callable[..., Tensor]:
        """As the stage makes them, a function of log π."""
        fixed = (x[rows] for x in (self.proof.log_a, self.proof.mask, self.potential))
        return rewards_of(self.objective, self.f, *fixed, log_z)

    def rewards_with_local_z(self, rows: Tensor) -> Tensor:
        log_pi, log_a = (sequence_sum(x, self.proof.mask)[rows] for x in (self.proof.log_pi, self.proof.log_a))
        groups = (log_a + self.potential[rows] - log_pi).view(-1, K)
        log_z = LogPartition().update([*range(len(groups))], groups).repeat_interleave(K)
        return self.rewards_of(rows, log_z)(self.proof.log_pi[rows])

    def gradient_here(self) -> Tensor:
        """The exact gradient where the weights now stand, [D]."""
        log_pi = self.proof.policy(self.proof.sequences).log_probs
        by_text = (
            sequence_sum(log_pi, self.proof.mask),
            sequence_sum(self.proof.log_a, self.proof.mask),
            self.potential,
        )
        loss = exact_objective(self.objective, self.f, *(x.view(P, N) for x in by_text))
        return parameters_to_vector(torch.autograd.grad(loss, [*self.proof.lm.parameters()]))

    def gradients(self, case: Case) -> tuple[Tensor, Tensor, Tensor]:
        """The estimated gradient, its standard error and the exact one, [D] each."""
        if case.name == LOCAL_Z.name:
            return *self.proof.sampled(case.estimator, self.rewards_with_local_z), self.gradient
        if case.estimator.min_generations > 1:
            rewards = self.rewards(self.proof.log_pi)
            return *self.proof.sampled(case.estimator, lambda rows: rewards[rows]), self.gradient
        found, no_error = self.proof.step(case.estimator, self.rewards), torch.zeros_like(self.gradient)
        if case not in SECOND_EPOCHS:
            return found, no_error, self.gradient
        first = self.proof.step(replace(case.estimator, num_epochs=1), self.rewards)
        return found - first, no_error, self.gradient_here()


def verdict(row: Row, case: Case, found: Tensor, error: Tensor, truth: Tensor) -> Row:
    """Fills in the figures of an estimated gradient, its standard error and the exact one, [D] each."""
    scale = float(found @ truth / (found @ found)) if case.bias else 1 / case.factor
    cosine = float(torch.cosine_similarity(found, truth, 0))
    relative, standard = (float(x.norm() / truth.norm()) for x in (scale * found - truth, scale * error))
    if not all(map(math.isfinite, (cosine, relative, standard))):
        return row._replace(reason="a gradient is zero or not finite")
    row = row._replace(cosine=cosine, relative_error=relative, standard_error=standard)
    if error.norm() >= PRECISION * found.norm():
        return row._replace(reason=f"standard error still {standard:.0%} after {MAX_DRAWS * BLOCKS * GROUPS:,} groups")
    after = f"after × {scale:.3g}" if scale != 1 else ""
    if case.bias:
        return row._replace(status="biased" if cosine > 0 else "fail", reason=f"{case.bias}; {after}")
    bound = ERRORS * standard if standard else EXACT
    if cosine >= COSINE and relative <= bound:
        return row._replace(status="pass", reason=after)
    return row._replace(reason=f"not the gradient: relative error {relative:.2g}, allowed {bound:.2g}")


def all_of(specs: Iterable[str]) -> list[Divergence]:
    """The f's named on the command line: a name or package.module:Class stands for all of its examples, a mapping such as
    '{name: alpha, alpha: 0.3}' for one. Raises UserError for one that cannot be had."""
    found: list[Divergence] = []
    for spec in specs:
        try:
            if spec.lstrip().startswith("{"):
                found.append(divergences.get(yaml.safe_load(spec)))
            else:
                cls = divergences.divergence_class(spec)
                found += [cls(**params) for params in cls.examples]
        except Exception as error:  # a user's own module may raise anything
            raise UserError(f"--divergence {spec}: {' '.join(str(error).split()) or type(error).__name__}") from error
    return found


def verify(specs: Iterable[str] = ()) -> Iterator[list[Row]]:
    """The rows of the sampler, then those of each f in turn: of every registered one where none is named."""
    fs = all_of(specs or divergences.names())
    with tempfile.TemporaryDirectory() as folder:
        proof = Proof(Path(folder))
        yield [proof.sampler(engine) for engine in ("cached", "generate")]
        for f in fs:
            yield list(proof.rows(f))


STYLES = {"pass": "green", "fail": "bold red", "biased": "yellow", "undefined": "dim"}


def counts(rows: Iterable[Row]) -> str:
    count = Counter(row.status for row in rows)
    return ", ".join(f"[{style}]{count[status]} {status}[/]" for status, style in STYLES.items() if count[status])


def tables(rows: list[Row]) -> Iterator[Table]:
    """One table for each divergence × objective, its counts in the title; a reason is told once, then ditto."""
    for (divergence, objective), group in itertools.groupby(rows, lambda row: row[:2]):
        part, told = list(group), ""
        table = Table("target", box=None, title_justify="left",
                      title=f"[bold]{escape(divergence)}[/] · {objective}: {counts(part)}")  # fmt: skip
        for name, width in (("estimator", 28), ("cosine", 7), ("error", 8), ("s.e.", 7), ("status", 9), ("reason", 0)):
            table.add_column(name, min_width=width)
        for row in part:
            numbers = ("" if x is None else f"{x:.2g}" for x in row[5:7])
            cosine = "" if row.cosine is None else f"{row.cosine:.4f}"
            reason = "″" if row.reason and row.reason == told else escape(row.reason)
            table.add_row(*row[2:4], cosine, *numbers, f"[{STYLES[row.status]}]{row.status}[/]", reason)
            told = row.reason
        yield table
