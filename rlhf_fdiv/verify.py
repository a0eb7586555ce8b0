"""The proof: the gradient of every divergence × objective × target × estimator, on a language that can be enumerated.

The truth is the objective itself (`exact_objective`), written out below over all texts and differentiated by autograd.
All else is what stages/policy.py calls: a target's `potential` and `solve`, `LogPartition`, `token_rewards`, `update`
(hence the estimators, `policy_loss` and `Training`), and `sample`; none of it is written a second time here. Nothing is
estimated: all N texts of a prompt are one off-policy rollout, drawn uniformly with weights N·π(y), and an estimator of
groups is averaged over every group of K texts that π can draw.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate import Accelerator
from scipy import stats
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from rlhf_fdiv import divergences, targets, toy
from rlhf_fdiv.config.options import PolicyOptions
from rlhf_fdiv.divergences import Divergence, exact, label
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.estimators import GRPO, PPO, RLOO, Advantages, Reinforce
from rlhf_fdiv.models import Policy, Reference
from rlhf_fdiv.objectives import Match, Regularise, chain_rule_factor
from rlhf_fdiv.rollout import Rollout, sample, uniforms
from rlhf_fdiv.sequences import sequence_sum
from rlhf_fdiv.stages.policy import rewards_of
from rlhf_fdiv.stages.policy_update import update
from rlhf_fdiv.stages.training import Training
from rlhf_fdiv.targets import LogPartition, Moments, Pointwise, Product, Tilted
from rlhf_fdiv.toy import LENGTH, N, P

EXACT = 1e-6  # the relative error that rounding may leave
K = 2  # texts a group
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
    """The error is in units of the exact gradient's norm; None where nothing was measured. A `reason` that ends in
    "after × c" says that the gradient was multiplied by c before it was compared: known for grpo's (K − 1)/K, else the c of
    least error, so that a bias by design is one of direction."""

    divergence: str
    objective: str
    target: str
    estimator: str
    cosine: float | None = None
    relative_error: float | None = None
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
        # every group of K texts of a prompt, and the chance that π draws it, beside each of its texts, [groups × K] both
        rows = torch.cartesian_prod(*[torch.arange(N)] * K) + N * torch.arange(P)[:, None, None]
        chance = sequence_sum(self.log_pi, self.mask)[rows].sum(-1).exp()
        self.groups = rows.flatten(), chance.flatten().repeat_interleave(K)
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
            conflict = objective.conflicts(f, target.has_zeros)
            problem = None if conflict else Problem(self, f, objective, target)
            for case in (*CASES, *((DEFAULTS, *SECOND_EPOCHS, local_z) if plain and problem else ())):
                row = Row(label(f), objective.name, name, case.name, status="undefined", reason=conflict or "")
                try:
                    yield verdict(row, case, *problem.gradients(case)) if problem else row
                except UserError as error:  # Training refuses a loss or gradient that is not finite
                    yield row._replace(status="fail", reason=error.problems[0])

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
        by_token = (self.proof.policy(self.proof.sequences).log_probs, self.proof.log_a)
        by_text = (*(sequence_sum(x, self.proof.mask) for x in by_token), self.potential)
        loss = exact_objective(self.objective, self.f, *(x.view(P, N) for x in by_text))
        return parameters_to_vector(torch.autograd.grad(loss, [*self.proof.lm.parameters()]))

    def step(self, estimator: Any) -> Tensor:
        """Leaves the weights where the stage's update takes them; returns how far that was, in units of LR, [D]."""
        proof = self.proof
        vector_to_parameters(proof.start.clone(), proof.lm.parameters())
        training = proof.trainings[estimator.value_head]
        update(training, estimator, proof.batch, self.rewards(proof.log_pi), 0, self.rewards)
        return (proof.start - parameters_to_vector(proof.lm.parameters()).detach()) / LR

    def gradients(self, case: Case) -> tuple[Tensor, Tensor]:
        """The estimator's gradient and the exact one, [D] each."""
        estimator, before = case.estimator, torch.zeros_like(self.proof.start)
        vector_to_parameters(self.proof.start.clone(), self.proof.lm.parameters())
        if case in SECOND_EPOCHS:
            before = self.step(replace(estimator, num_epochs=1))
        elif estimator.min_generations > 1:
            local = self.rewards_with_local_z if case.name == LOCAL_Z.name else None
            estimator = OverGroups(estimator, *self.proof.groups, local)
        truth = self.gradient_here()  # at the start, or where the first epoch has left the weights
        return self.step(estimator) - before, truth


@dataclass(frozen=True)
class OverGroups:
    """A groups' estimator in expectation over every group: one of the whole language, which `update` takes as any other."""

    estimator: Any
    rows: Tensor
    chance: Tensor
    rewards_of: Callable[[Tensor], Tensor] | None  # of a group's own log Ẑ, where the stage's are not meant

    def __getattr__(self, name: str) -> Any:
        return getattr(self.estimator, name)

    def __call__(self, rewards: Tensor, mask: Tensor, *_: Any) -> Advantages:
        """Drawn from π itself, the groups need no weights; N/K, since the stage takes the mean over all N texts."""
        drawn = rewards[self.rows] if self.rewards_of is None else self.rewards_of(self.rows)
        each = N / K * self.chance[:, None] * self.estimator(drawn, mask[self.rows], K).advantages
        return Advantages(torch.zeros_like(rewards).index_add_(0, self.rows, each))


def verdict(row: Row, case: Case, found: Tensor, truth: Tensor) -> Row:
    """Fills in the figures of an estimator's gradient and the exact one, [D] each."""
    scale = float(found @ truth / (found @ found)) if case.bias else 1 / case.factor
    cosine = float(torch.cosine_similarity(found, truth, 0))
    relative = float((scale * found - truth).norm() / truth.norm())
    if not (math.isfinite(cosine) and math.isfinite(relative)):
        return row._replace(status="fail", reason="a gradient is zero or not finite")
    after = f"after × {scale:.3g}" if scale != 1 else ""
    if case.bias:
        status, reason = "biased" if cosine > 0 else "fail", f"{case.bias}; {after}"
    elif relative <= EXACT:
        status, reason = "pass", after
    else:
        status, reason = "fail", f"not the gradient: relative error {relative:.2g}, allowed {EXACT:.2g}"
    return row._replace(cosine=cosine, relative_error=relative, status=status, reason=reason)


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


def counts(rows: Iterable[Row]) -> str:
    count = Counter(row.status for row in rows)
    return ", ".join(f"{count[status]} {status}" for status in ("pass", "fail", "biased", "undefined") if count[status])


def lines(rows: list[Row]) -> Iterator[str]:
    """A line for each row, under one with the counts of its divergence × objective; a reason is told once, then ditto."""
    for (divergence, objective), group in itertools.groupby(rows, lambda row: row[:2]):
        part, told = list(group), ""
        yield f"{divergence} · {objective}: {counts(part)}"
        for row in part:
            figures = "" if row.cosine is None else f"cosine {row.cosine:.4f}, error {row.relative_error:.2g}"
            reason = "″" if row.reason and row.reason == told else row.reason
            yield f"  {row.target:9}  {row.estimator:28}  {figures:29}  {row.status:9}  {reason}".rstrip()
            told = row.reason
