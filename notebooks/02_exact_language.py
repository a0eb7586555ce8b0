# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # The whole theory, with exact numbers
#
# A language of four tokens and at most four of them a text: 121 texts a prompt, three prompts, a real transformer. Every
# expectation is a finite sum, so each law below is checked to the digits of float64, through the functions that the training
# stages call.

# %%
import math

import torch

from rlhf_fdiv import divergences, objectives, optima, toy
from rlhf_fdiv.estimators import RLOO, Reinforce, policy_loss
from rlhf_fdiv.models import Policy

reference = Policy(toy.tiny_lm("gpt2"))
policy = Policy(toy.perturbed(toy.tiny_lm("gpt2"), scale=0.1))
with torch.no_grad():
    log_a, log_pi = toy.exact_log_probs(reference), toy.exact_log_probs(policy)
reward, beta = toy.scores()["reward"].view(toy.P, toy.N), 0.3
print(f"{toy.P} prompts × {toy.N} texts; the texts of a prompt sum to", log_a.exp().sum(1))

# %% [markdown]
# ## The target
#
# $p(y|x) = a(y|x)\,e^{r(x,y)/\beta}/Z(x)$. With it, $E_\pi[r] - \beta\,\mathrm{KL}(\pi\|a) = \beta\log Z - \beta\,\mathrm{KL}(\pi\|p)$ for
# every $\pi$: maximising the regularised reward is minimising reverse KL to $p$.

# %%
potential = reward / beta
log_z = torch.logsumexp(log_a + potential, 1)
log_p = objectives.log_target(log_a, potential, log_z[:, None])
pi = log_pi.exp()
objective = (pi * reward).sum(1) - beta * divergences.exact(divergences.get("reverse_kl"), log_pi, log_a)
other_side = beta * log_z - beta * divergences.exact(divergences.get("reverse_kl"), log_pi, log_p)
print("E[r] − β·KL(π‖a):", objective.tolist())
print("β·log Z − β·KL(π‖p):", other_side.tolist())
assert torch.allclose(objective, other_side, rtol=0, atol=1e-12)

# %% [markdown]
# ## For no other f do the two objectives meet
#
# `regularise` is $\max_\pi E_\pi[r] - \beta D_f(\pi\|a)$, solved here exactly; `match` is $\min_\pi D_f(\pi\|p)$, whose optimum is $p$ for
# every $f$. Only for reverse KL are they the same distribution.

# %%
for name in ("reverse_kl", "forward_kl", "js", "hellinger", "pearson_chi2"):
    optimum = optima.regularised_optimum(divergences.get(name), log_a, reward, beta)
    apart = divergences.exact(divergences.get("tv"), optimum.log_pi, log_p).max()
    zeros = int((optimum.log_pi == -math.inf).sum())
    print(f"{name:13} TV between π* and p: {apart:.2e}   texts with exactly no mass: {zeros}")

# %% [markdown]
# ## The gradient of D_f is a policy gradient
#
# $\nabla D_f(\pi\|p) = E_\pi\left[f'(\pi/p)\,\nabla\log\pi\right]$: train with the pseudo-reward $-f'(\pi/p)$. Left side by autograd through
# the exact divergence; right side by the loss of the policy stage over all texts, each weighted by its probability.

# %%
whole = toy.everything()


def gradient(value):
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(value, [p for p in policy.parameters() if p.requires_grad])]
    )


def pseudo_gradient(f):
    """The policy stage's loss on every text, with its objective's token rewards and no baseline."""
    log_probs = policy(whole).log_probs
    with torch.no_grad():
        log_ref = reference(whole).log_probs
        rewards = objectives.token_rewards(
            objectives.Match(), f, log_probs, log_ref, whole.mask, potential.flatten(), log_z.repeat_interleave(toy.N)
        )
        advantages = rewards.sum(-1, keepdim=True) * whole.mask
    loss = policy_loss(log_probs, log_probs.detach(), advantages, whole.mask)
    return gradient((log_pi.exp().flatten() * loss).sum())


for name in divergences.names():
    f = divergences.get(name) if not divergences.parameters(divergences.divergence_class(name)) else None
    if f is None:
        continue
    exact = gradient(divergences.exact(f, toy.exact_log_probs(policy), log_p).sum())
    error = float((pseudo_gradient(f) - exact).norm() / exact.norm())
    print(f"{name:14} relative distance of the two gradients: {error:.1e}")
    assert error < 1e-9 or name == "tv", name  # tv has a kink where π = p

# %% [markdown]
# ## What a baseline does
#
# From K = 8 samples of the first prompt the gradient is an estimate. The leave-one-out baseline leaves its mean alone and changes
# its variance: below, the mean squared error of 2,000 such estimates, in units of the squared length of the exact gradient, and
# how far their average is from it, beside what 2,000 estimates allow.

# %%
row_log_pi = toy.exact_log_probs(policy)[0]
slopes = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(x, list(policy.parameters()), retain_graph=True)])
                      for x in row_log_pi])  # fmt: skip
draws = torch.multinomial(pi[0], 2000 * 8, replacement=True, generator=torch.Generator().manual_seed(0)).view(-1, 8)
for name in ("forward_kl", "js", "reverse_kl"):
    score = -divergences.get(name).f_prime(log_pi[0] - log_p[0])
    exact = (pi[0] * score) @ slopes
    for baseline, estimator in (("none", Reinforce()), ("leave-one-out", RLOO())):
        advantages = estimator.advantage(score[draws], torch.ones(draws.shape, dtype=torch.float64)) / 8
        weights = torch.zeros(len(draws), toy.N, dtype=torch.float64).scatter_add_(1, draws, advantages)
        errors = weights @ slopes - exact
        mean_square = float((errors**2).sum(1).mean() / (exact**2).sum())
        distance, allowed = float(errors.mean(0).norm() / exact.norm()), math.sqrt(mean_square / len(draws))
        print(
            f"{name:11} {baseline:13} mean squared error {mean_square:8.2f}   average off by {distance:.3f} (allowed {allowed:.3f})"
        )
        assert distance < 2 * allowed

# %% [markdown]
# ## What is given up on the way
#
# The frontier: the most reward that any policy can have at its KL to the reference. Every $\beta$ is a point of it.

# %%
for b in (10.0, 1.0, 0.3, 0.1, 0.03):
    log_q = (log_a + reward / b).log_softmax(1)
    kl = divergences.exact(divergences.get("reverse_kl"), log_q, log_a).mean()
    print(f"β = {b:5}:  E[r] = {(log_q.exp() * reward).sum(1).mean():.3f} at KL(p‖a) = {kl:.3f} nats")

# %% [markdown]
# ## Learning from pairs
#
# The optimum of `regularise` tells its reward: $r = \beta f'(\pi^*/a) + \lambda(x)$. So differences of rewards within a prompt can be read
# off $\log \pi/a$, and f-DPO fits them to people's choices.

# %%
for name in ("reverse_kl", "js", "forward_kl"):
    f = divergences.get(name)
    best = optima.regularised_optimum(f, log_a, reward, beta).log_pi
    implied = objectives.Prefer(beta=beta).reward(f, best.flatten(), log_a.flatten()).view_as(reward)
    error = ((implied - implied[:, :1]) - (reward - reward[:, :1])).abs().max()
    print(f"{name:11} largest error of an implied reward difference: {error:.1e}")
    assert error < 1e-6
