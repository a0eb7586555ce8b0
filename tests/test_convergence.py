"""Training ends where the mathematics says, with exact expectations over the enumerable language.

The policy is a *tabular* one: free logits for each prompt and prefix, behind the face of a causal LM, so that it can be
any distribution over texts whatever and nothing but the objective decides where training ends. The gradient is the
library's own (token_rewards, reinforce, policy_loss; every text weighted by its probability); the step is Fisher's.
"""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import optimize
from torch import nn
from toy import FS, INF, PROMPTS, VOCAB, N, P, everything, exact_log_probs, label, language
from transformers import GPT2Config

from rlhf_fdiv import divergences
from rlhf_fdiv.divergences import Scaled, exact
from rlhf_fdiv.estimators import Reinforce, importance_weights, policy_loss
from rlhf_fdiv.models import Policy
from rlhf_fdiv.objectives import Match, Regularise, log_target, token_rewards
from rlhf_fdiv.optima import regularised_dual, regularised_optimum
from rlhf_fdiv.sequences import sequence_sum
from rlhf_fdiv.targets import Moments, Pointwise, Tilted, solve_moments

SMOOTH = [f for f in FS if f.name != "tv"]  # all with an (f')⁻¹; tv has a kink at t = 1, and neither
BETAS = (0.3, 1.0)
WITH_THE_SLOW_BETA = (pytest.param(0.3, marks=pytest.mark.slow), 1.0)
IS_REVERSE_KL = ("reverse_kl", "alpha(alpha=1.0)")  # one f under two names
NEARLY_REVERSE_KL = "alpha(alpha=1.000001)"
EITHER_SIDE = (-1e-2, -1e-4, -1e-6, 1e-6, 1e-4, 1e-2)
every_smooth_f = pytest.mark.parametrize("f", SMOOTH, ids=label)
TV, PEARSON = divergences.get("tv"), divergences.get("pearson_chi2")


def T(*values):
    return torch.tensor(values, dtype=torch.float64)


def distance(log_pi, log_p):
    """½ Σ|π − p|, the largest of the prompts: a distance that owes nothing to any f."""
    return float((log_pi.detach().exp() - log_p.exp()).abs().sum(-1).max()) / 2


# -- a policy that can be any distribution -----------------------------------------------------------------------------


class Tabular(nn.Module):
    """Next-token logits of its own for each (prompt, prefix), called as `Policy` calls a causal LM; starts at `lm`.

    What it keeps of a prompt, in a causal LM's cache, are its tokens.
    """

    config = GPT2Config(n_layer=1)

    def __init__(self, lm):
        super().__init__()
        inputs, keep = everything().model_inputs(), everything().mask.shape[1] + 1
        self.known, place = self.context(inputs["input_ids"], inputs["attention_mask"], keep).unique(
            return_inverse=True
        )
        table = torch.zeros(len(self.known), VOCAB, dtype=torch.float64)
        with torch.no_grad():
            table[place] = lm(**inputs).logits[:, -keep:]
        self.table = nn.Parameter(table)

    @staticmethod
    def context(ids, mask, keep):
        """A number for all that comes before each kept position's next token; it tells prompt from completion."""
        place = torch.arange(ids.shape[1]) + keep - ids.shape[1] + max(map(len, PROMPTS))
        return ((ids + 1) * mask * (VOCAB + 1) ** place).cumsum(1)[:, -keep:]

    def rows(self, ids, mask, keep):
        return torch.searchsorted(self.known, self.context(ids, mask, keep).contiguous())

    def base_model(self, input_ids, past_key_values, **_):
        ids = input_ids[:, None, :, None].double()
        return past_key_values.update(ids, ids, 0)[0][:, 0, :, 0].long()

    def forward(self, input_ids, attention_mask, past_key_values, **_):
        ids = self.base_model(input_ids, past_key_values)
        return SimpleNamespace(logits=self.table[self.rows(ids, attention_mask, input_ids.shape[1])])


def occupancy(policy, probabilities):
    """The probability of passing each (prompt, prefix) and taking each next token, [contexts, VOCAB], from that of texts."""
    whole, inputs = everything(), everything().model_inputs()
    rows = policy.lm.rows(inputs["input_ids"], inputs["attention_mask"], whole.mask.shape[1] + 1)[:, :-1]
    flat = torch.zeros(policy.lm.table.numel(), dtype=torch.float64)
    mass = (probabilities.reshape(-1, 1) * whole.mask).flatten()
    return flat.index_add(0, (rows * VOCAB + whole.completion_ids).flatten(), mass).view(-1, VOCAB)


def test_the_tabular_policy_starts_at_the_reference_and_can_be_any_distribution_over_texts():
    policy = tabular()
    assert distance(exact_log_probs(policy), log_a()) <= 1e-14
    wanted = 3 * torch.randn(P, N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    wanted = wanted.log_softmax(1)
    with torch.no_grad():
        policy.lm.table.copy_(occupancy(policy, wanted.exp()).clamp(min=1e-300).log())
    assert torch.allclose(exact_log_probs(policy), wanted, rtol=0, atol=1e-10)


# -- training ----------------------------------------------------------------------------------------------------------


def tabular():
    return Policy(Tabular(language()[1].lm))


@functools.cache
def token_log_a():
    with torch.no_grad():
        return language()[1](everything()).log_probs


def log_a():
    """log a of every text, [P, N]."""
    return sequence_sum(token_log_a(), everything().mask).view(P, N)


@functools.cache
def texts():
    """A reward with nothing to hold on to, and b ∈ {0, ½, 1}; [P, N] each."""
    generator = torch.Generator().manual_seed(11)
    reward = torch.randn(P, N, generator=generator, dtype=torch.float64)
    return {"reward": reward, "b": torch.randint(0, 3, (P, N), generator=generator).double() / 2}


def library_loss(policy, f, objective, potential, log_z, off_policy=False):
    """What a stage would call on all texts: its gradient is the exact one. Off policy, the texts are the reference's."""
    mask, log_probs = everything().mask, policy(everything()).log_probs
    old = log_probs.detach()
    log_pi = sequence_sum(old, mask)
    log_mu = log_a().flatten() if off_policy else log_pi
    rewards = token_rewards(objective, f, old, token_log_a(), mask, potential.flatten(), log_z.repeat_interleave(N))
    weights = importance_weights(log_pi, log_mu, cap=INF) if off_policy else None
    advantages = Reinforce()(rewards, mask, 1, weights=weights).advantages
    return (log_mu.exp() / P * policy_loss(log_probs, old, advantages, mask)).sum()


def loss_by_prompt(log_pi, f, objective, potential, log_z):
    """What is minimised, [P]: D_f(π‖p), or −(E_π[r] − β·D_f(π‖a))."""
    if isinstance(objective, Match):
        return exact(f, log_pi, log_target(log_a(), potential, log_z[:, None]))
    return objective.beta * exact(f, log_pi, log_a()) - (log_pi.exp() * objective.beta * potential).sum(1)


def natural_gradient(policy, *problem):
    """The library's gradient over Fisher's matrix, which for a tabular softmax is diagonal up to a shift of each row:
    d(prefix)·π(token | prefix). The Hessian of D_f at π = p is f''(1) times it, so that this step is Newton's there."""
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(library_loss(policy, *problem), policy.lm.table)
    fisher = occupancy(policy, exact_log_probs(policy).exp() / P)
    return torch.where(fisher > 0, slope / fisher, 0.0)


@torch.no_grad()
def train(f, objective, potential, goal, off_policy=False, max_steps=400, error_of_log_z=0.0):
    """log π [P, N] after natural-gradient steps, each halved until the exact loss falls, down to `goal` (mean of prompts).

    Only the library says where to go: with a wrong gradient no step is found, or another place is reached.
    """
    policy = tabular()
    problem = (f, objective, potential, torch.logsumexp(log_a() + potential, 1) + error_of_log_z)

    def loss():
        return float(loss_by_prompt(exact_log_probs(policy), *problem).mean())

    rate, now = 1 / f.curvature / (objective.beta if isinstance(objective, Regularise) else 1), loss()
    for _ in range(max_steps):
        if now <= goal or rate < 1e-9:
            break
        step, before, start = natural_gradient(policy, *problem, off_policy), policy.lm.table.clone(), now
        while rate >= 1e-9:
            policy.lm.table.copy_(before - (rate * step).clamp(-2, 2))
            if (now := loss()) < start:
                break
            rate /= 2
        rate *= 1.5
    return exact_log_probs(policy)


# -- match -------------------------------------------------------------------------------------------------------------

GOAL = {"b": 0.8, "reward": 0.3}


@functools.cache
def moments():
    """λ from the exact expectations: all texts, weighted by a."""
    phi = torch.stack([texts()[scorer] for scorer in GOAL], -1)
    return solve_moments(phi, T(*GOAL.values()), list(GOAL), base=log_a()).lambdas


@functools.cache
def potential_and_target(name):
    """The library's potential, and log p by the definition of the target, [P, N] each."""
    reward, b = texts()["reward"], texts()["b"]
    target, log_tilt = {
        "tilted": lambda: (Tilted(beta=0.7), reward / 0.7),
        "tilted by r": lambda: (Tilted(beta=1.0), reward),
        "pointwise": lambda: (Pointwise("b"), b.log()),
        "moments": lambda: (
            Moments(GOAL, lambdas=dict(zip(GOAL, moments().tolist(), strict=True))),
            moments()[0] * b + moments()[1] * reward,
        ),
    }[name]()
    return target.potential(texts()), (log_a() + log_tilt).log_softmax(1)


@functools.cache
def matched(f, name, off_policy=False):
    return train(f, Match(), potential_and_target(name)[0], goal=1e-9, off_policy=off_policy)


MATCHES = [
    pytest.param(f, name, id=f"{label(f)}-{name}")
    for f in SMOOTH
    for name, zeros in {"tilted": False, "moments": False, "pointwise": True}.items()
    if Match().conflicts(f, zeros) is None
]


@pytest.mark.parametrize(("f", "name"), MATCHES)
def test_match_trains_the_policy_into_its_target(f, name):
    log_pi, (_, log_p) = matched(f, name), potential_and_target(name)
    assert distance(log_a(), log_p) > 0.1, "there is a way to go"
    assert (exact(f, log_pi, log_p) <= 1e-8).all()
    assert distance(log_pi, log_p) <= 1e-3
    if name == "moments":
        reached = [float((log_pi.exp() * texts()[scorer]).sum(1).mean()) for scorer in GOAL]
        assert reached == pytest.approx(list(GOAL.values()), abs=1e-3)
    if name == "pointwise":
        on_zeros, at_start = ((x.exp() * (log_p == -INF)).sum(1) for x in (log_pi, log_a()))
        assert at_start.min() > 0.1
        assert (on_zeros * f.f_prime_at_infinity <= 1e-8).all(), "D_f is at least what its zeros cost"


@every_smooth_f
def test_match_reaches_it_from_texts_of_the_reference_by_importance_weights_too(f):
    assert distance(matched(f, "tilted", off_policy=True), potential_and_target("tilted")[1]) <= 1e-3


@pytest.mark.parametrize("name", ["forward_kl", "js", "hellinger", "reverse_kl", "pearson_chi2"])
@pytest.mark.parametrize("error", [-0.7, 0.7])
def test_a_wrong_log_z_does_not_move_the_place_where_match_ends(name, error):
    """Σ c·p·f(π/(c·p)) ≥ c·f(1/c) by Jensen, with equality at π = p, whatever c: Z is a matter of variance and pace."""
    potential, log_p = potential_and_target("tilted")
    log_pi = train(divergences.get(name), Match(), potential, -INF, max_steps=25, error_of_log_z=error)
    assert distance(log_pi, log_p) <= 1e-3


@torch.no_grad()
def tv_after(rate, steps):
    """The mean TV to the tilted target over the last quarter of some steps at a constant rate."""
    policy, (potential, log_p) = tabular(), potential_and_target("tilted")
    log_z, reached = torch.logsumexp(log_a() + potential, 1), []
    for _ in range(steps):
        policy.lm.table -= rate * natural_gradient(policy, TV, Match(), potential, log_z)
        reached.append(float(exact(TV, exact_log_probs(policy), log_p).mean()))
    return float(np.mean(reached[-steps // 4 :]))


def test_tv_comes_within_an_eighth_of_its_step_and_no_further():
    """Its score is ±½ however near the target is, so that each log-ratio hovers about 0 in strides of that size."""
    assert distance(log_a(), potential_and_target("tilted")[1]) > 0.2
    for rate, steps in ((0.3, 60), (0.1, 180)):
        assert 0.1 < tv_after(rate, steps) / rate < 0.15


# -- regularise --------------------------------------------------------------------------------------------------------


@functools.cache
def optimum(f, beta):
    return regularised_optimum(f, log_a(), texts()["reward"], beta)


def value_of(log_pi, f, beta):
    """E_π[r] − β·D_f(π‖a), [P]."""
    return -loss_by_prompt(log_pi, f, Regularise(beta), texts()["reward"] / beta, None)


@functools.cache
def regularised(f, beta):
    """log π [P, N], trained until the objective is, in the mean of the prompts, within 1e-6 of its optimum."""
    goal = 1e-6 - float(optimum(f, beta).value.mean())
    return train(f, Regularise(beta), texts()["reward"] / beta, goal)


@pytest.mark.parametrize("beta", WITH_THE_SLOW_BETA)
@every_smooth_f
def test_regularise_trains_the_policy_to_its_optimum(f, beta):
    log_pi, best = regularised(f, beta), optimum(f, beta)
    assert distance(log_a(), best.log_pi) > 0.1, "there is a way to go"
    gap = best.value - value_of(log_pi, f, beta)
    assert (gap >= -1e-12).all(), "nothing is better than the optimum"
    assert (gap <= P * 1e-6).all()
    assert distance(log_pi, best.log_pi) <= 5e-3


SLOPE_AT_ZERO = {"pearson_chi2": -2.0, "alpha(alpha=2.0)": -1.0, "alpha(alpha=3.0)": -0.5}


@pytest.mark.parametrize("beta", WITH_THE_SLOW_BETA)
@every_smooth_f
def test_just_an_f_with_a_finite_slope_at_zero_gives_up_texts_and_training_empties_them(f, beta):
    """A softmax must leave some mass where π* = 0, but no more than the gap pays for: since f is convex, such texts cost
    at least Σ π·(λ + β·f'(0) − r) + β·Σ a·(f(t) − f(0) − f'(0)·t), and at the mean t no more (Jensen)."""
    log_pi, best = regularised(f, beta), optimum(f, beta)
    gap, zeros = best.value - value_of(log_pi, f, beta) + 1e-12, best.log_pi == -INF
    assert bool(zeros.any()) == (label(f) in SLOPE_AT_ZERO)
    if zeros.any():
        slope = SLOPE_AT_ZERO[label(f)]
        slack = best.lambda_[:, None] + beta * slope - texts()["reward"]
        assert torch.equal(slack >= 0, zeros)
        mass, at_start = ((x.exp() * zeros).sum(1) for x in (log_pi, log_a()))
        t = mass / at_start
        convex = beta * at_start * (f.f(t.log()) - f.f(T(-INF)) - slope * t)
        assert ((log_pi.exp() * zeros * slack).sum(1) + convex <= gap)[at_start > 0].all()
        assert at_start.max() > 0.01
        assert mass.max() <= 5e-4


# -- the optimum itself ------------------------------------------------------------------------------------------------

problems = st.tuples(
    arrays(np.float64, (10, 5), elements=st.floats(-6, 6)),
    arrays(np.float64, (10, 5), elements=st.floats(-4, 4)),
    st.sampled_from([0.05, 0.3, 1.0, 3.0, 20.0]),
).map(lambda x: (torch.from_numpy(x[0]).log_softmax(1), torch.from_numpy(x[1]), x[2]))
quick = settings(max_examples=5, deadline=None, derandomize=True)


@every_smooth_f
@given(problem=problems)
@quick
def test_the_value_of_the_optimum_is_the_least_value_of_the_dual(f, problem):
    """value(π) ≤ dual(λ) for every π and λ, so that their equality proves both optimal."""
    log_a, reward, beta = problem
    best = regularised_optimum(f, *problem)
    primal = (best.log_pi.exp() * reward).sum(1) - beta * exact(f, best.log_pi, log_a)
    dual = regularised_dual(f, *problem, best.lambda_)
    assert torch.allclose(best.log_pi.exp().sum(1), torch.ones(10).double(), rtol=0, atol=1e-12)
    assert torch.allclose(best.value, primal, rtol=0, atol=1e-10)
    assert torch.allclose(best.value, dual, rtol=0, atol=1e-8)
    for step in (-0.1, 0.1):
        assert (regularised_dual(f, *problem, best.lambda_ + step) >= dual - 1e-12).all()


@functools.cache
def instance(beta):
    """Sixty problems of six texts, from nearly uniform references to ones with rare texts of 1e-9."""
    generator = torch.Generator().manual_seed(8)
    log_a, reward = torch.randn(2, 60, 6, generator=generator, dtype=torch.float64)
    return (log_a * torch.linspace(0.1, 6, 60)[:, None]).log_softmax(1), reward, beta


@every_smooth_f
@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_the_optimum_obeys_the_conditions_of_karush_kuhn_and_tucker(f, beta):
    """f'(π*/a) = (r − λ)/β, or (r − λ)/β ≤ f'(0) where π* = 0: no inverse, no conjugate, no integral of f'."""
    log_a, reward, _ = instance(beta)
    log_pi, lambda_, _ = regularised_optimum(f, *instance(beta))
    wanted, slope = (reward - lambda_[:, None]) / beta, f.f_prime(log_pi - log_a)
    assert torch.allclose(slope[log_pi > -INF], wanted[log_pi > -INF], rtol=1e-6, atol=1e-6)
    assert (wanted <= slope + 1e-9)[log_pi == -INF].all()


@every_smooth_f
def test_no_other_distribution_has_a_larger_value(f):
    log_a, reward, beta = instance(0.4)
    best = regularised_optimum(f, *instance(0.4))
    generator = torch.Generator().manual_seed(9)
    for scale in (1e-3, 0.1, 1.0, 5.0):
        log_pi = best.log_pi.clamp(min=-30) + scale * torch.randn(60, 6, generator=generator, dtype=torch.float64)
        log_pi = log_pi.log_softmax(1)
        assert ((log_pi.exp() * reward).sum(1) - beta * exact(f, log_pi, log_a) <= best.value + 1e-13).all()


@every_smooth_f
def test_a_constant_in_the_reward_moves_lambda_alone_and_the_scale_of_f_is_that_of_beta(f):
    log_a, reward, beta = instance(0.5)
    best = regularised_optimum(f, log_a, reward, beta)
    moved = regularised_optimum(f, log_a, reward + 7, beta)
    scaled = regularised_optimum(Scaled(f, 2.5), log_a, reward, beta / 2.5)
    for other, shift in ((moved, 7), (scaled, 0)):
        assert torch.allclose(other.log_pi.exp(), best.log_pi.exp(), rtol=0, atol=1e-9)
        assert torch.allclose(other.lambda_, best.lambda_ + shift, rtol=0, atol=1e-9)
        assert torch.allclose(other.value, best.value + shift, rtol=0, atol=1e-9)


@given(problem=problems)
@quick
def test_for_reverse_kl_the_optimum_is_the_softmax_of_log_a_and_r_over_beta(problem):
    log_a, reward, beta = problem
    best = regularised_optimum(divergences.get("reverse_kl"), *problem)
    log_z = torch.logsumexp(log_a + reward / beta, 1)
    assert torch.allclose(best.log_pi, log_a + reward / beta - log_z[:, None], rtol=0, atol=1e-10)
    assert torch.allclose(best.lambda_, beta * log_z, rtol=0, atol=1e-10)
    assert torch.allclose(best.value, beta * log_z, rtol=0, atol=1e-10)


@given(problem=problems)
@quick
def test_for_pearson_without_zeros_the_optimum_is_linear_in_the_reward(problem):
    """t = 1 + (r − E_a r)/2β, as long as that is nowhere negative."""
    log_a, reward, beta = problem
    mean = (log_a.exp() * reward).sum(1, keepdim=True)
    t = 1 + (reward - mean) / (2 * beta)
    linear = (t >= 0).all(1)
    best = regularised_optimum(PEARSON, *problem)
    assert torch.allclose(best.log_pi.exp()[linear], (log_a.exp() * t)[linear], rtol=0, atol=1e-10)
    assert (best.log_pi == -INF).any(1)[(t < -1e-9).any(1)].all()


# -- against an optimiser that knows neither (f')⁻¹ nor f* -------------------------------------------------------------


def power(log_t, c):
    return np.expm1(c * log_t) / c if c else log_t


def plain_alpha(t, f):
    a, log_t = f.alpha, np.log(t)
    return (power(log_t, a) - (t - 1)) / (a - 1) if a < 0.5 else (t * power(log_t, a - 1) - (t - 1)) / a


PLAIN = {
    "reverse_kl": lambda t, f: t * np.log(t) - t + 1,
    "forward_kl": lambda t, f: t - 1 - np.log(t),
    "js": lambda t, f: t * np.log(t) - (t + 1) * np.log((t + 1) / 2),
    "pearson_chi2": lambda t, f: (t - 1) ** 2,
    "neyman_chi2": lambda t, f: (1 - t) ** 2 / t,
    "hellinger": lambda t, f: (np.sqrt(t) - 1) ** 2 / 2,
    "alpha": plain_alpha,
    "jeffreys": lambda t, f: (t - 1) * np.log(t),
    "chi_mix": lambda t, f: (t - 1) ** 2 / 2 + t * np.log(t) - t + 1,
    "skew_js": lambda t, f: f.w * t * np.log(t) - (f.w * t + 1 - f.w) * np.log(f.w * t + 1 - f.w),
    "mixture": lambda t, f: (t - 1) * np.log(t) / 2,
}


def minimum(f, a, reward, beta, start):
    """Of β·D_f(q‖a) − E_q[r] by SLSQP, restarted where it stopped."""
    for _ in range(3):
        found = optimize.minimize(
            lambda q: beta * (a * PLAIN[f.name](q / a, f)).sum() - q @ reward,
            start,
            method="SLSQP",
            bounds=[(1e-12, 1)] * 5,
            constraints={"type": "eq", "fun": lambda q: q.sum() - 1},
            options={"ftol": 1e-13, "maxiter": 500},
        )
        start = found.x
    return found


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@every_smooth_f
def test_sequential_quadratic_programming_on_the_simplex_finds_no_other_optimum(f, beta):
    rng = np.random.default_rng(0)
    references, rewards = rng.dirichlet(np.ones(5), size=3), rng.normal(size=(3, 5))
    best = regularised_optimum(f, torch.from_numpy(references).log(), torch.from_numpy(rewards), beta)
    for i, (a, reward) in enumerate(zip(references, rewards, strict=True)):
        starts = (a, np.full(5, 0.2), 0.5 * a + 0.1)  # from one alone it stops short on some processors
        found = min((minimum(f, a, reward, beta, start) for start in starts), key=lambda x: x.fun)
        assert float(best.value[i]) == pytest.approx(-found.fun, abs=1e-7)
        assert best.log_pi[i].exp().numpy() == pytest.approx(found.x, abs=1e-3)


# -- edges -------------------------------------------------------------------------------------------------------------


@every_smooth_f
def test_at_a_vanishing_beta_the_best_texts_take_all_and_share_it_as_a_does(f):
    log_a, reward = T(0.6, 0.1, 0.2, 0.1).log(), T(0.0, 1.0, 1.0, 0.9)
    best = regularised_optimum(f, log_a, reward, 1e-9)
    assert best.log_pi.exp().tolist() == pytest.approx([0, 1 / 3, 2 / 3, 0], abs=1e-3)
    assert float(best.value) == pytest.approx(1.0, abs=1e-3)


@every_smooth_f
def test_at_a_large_beta_and_where_all_rewards_are_equal_the_optimum_is_a(f):
    log_a, reward = T(0.6, 0.1, 0.3).log(), T(0.0, 1.0, -1.0)
    for r, beta in ((reward, 1e7), (0 * reward + 0.2, 0.3)):
        best = regularised_optimum(f, log_a, r, beta)
        assert torch.allclose(best.log_pi, log_a, rtol=0, atol=1e-5)
        assert float(best.value) == pytest.approx(float((log_a.exp() * r).sum()), abs=1e-6)


@every_smooth_f
def test_a_text_that_a_rules_out_gets_nothing_however_large_its_reward(f):
    log_a, reward = T(0.7, 0.0, 0.3).log(), T(0.5, 50.0, 1.0)
    best = regularised_optimum(f, log_a, reward, 0.4)
    without = regularised_optimum(f, log_a[[0, 2]], reward[[0, 2]], 0.4)
    assert best.log_pi[1] == -INF
    assert torch.equal(best.log_pi[[0, 2]], without.log_pi)
    assert float(best.value) == pytest.approx(float(without.value), abs=1e-12)
    assert float(regularised_dual(f, log_a, reward, 0.4, best.lambda_)) == pytest.approx(float(best.value), abs=1e-8)


@every_smooth_f
@pytest.mark.parametrize(("rarity", "lead"), [(1e-6, 1e-20), (1e-12, 1e-20), (1e-12, 1e-10), (1e-25, 1e-20)])
def test_best_texts_of_any_rarity_leave_value_and_dual_equal(f, rarity, lead):
    """With a finite f'(∞) they take a share of their own; (r − λ)/β then agrees with f'(∞) to all its digits, and so does
    that of a second best that is worse by less than a digit, or by few of them."""
    log_a, reward, beta = T(0.7, 0.3, rarity, rarity).log().log_softmax(0), T(-2.0, -1.5, lead, 0.0), 0.4
    best = regularised_optimum(f, log_a, reward, beta)
    assert float(best.log_pi.exp().sum()) == pytest.approx(1, abs=1e-12)
    assert float(best.value) == pytest.approx(float(regularised_dual(f, log_a, reward, beta, best.lambda_)), abs=1e-8)
    if beta * f.f_prime_at_infinity < 1.4:  # all mass on them would be worth more than a is
        assert best.log_pi[2:].exp().sum() > 0.1


def test_the_kink_of_a_mixture_with_tv_keeps_texts_at_a_exactly():
    """f' jumps from −½ to ½ at t = 1: two texts stay at a while (r − λ)/β is in between, all three at a larger β."""
    f = divergences.get({"name": "mixture", "components": ["tv", "reverse_kl"], "weights": [1, 1]})
    log_a, reward = T(0.5, 0.3, 0.2).log(), T(1.0, 0.0, -1.0)
    best = regularised_optimum(f, log_a, reward, 1.0)
    assert float(best.log_pi[1] - log_a[1]) == pytest.approx(0, abs=1e-12)
    assert best.log_pi[0] > log_a[0] + 0.1
    assert best.log_pi[2] < log_a[2] - 0.1
    assert float(best.value) == pytest.approx(float(regularised_dual(f, log_a, reward, 1.0, best.lambda_)), abs=1e-8)
    assert torch.allclose(regularised_optimum(f, log_a, reward, 2.5).log_pi, log_a, rtol=0, atol=1e-12)


class Steps(divergences.Divergence):
    """½|t − 1| + (t − 2)₊, whose f' takes three values only."""

    name = "steps"
    f_prime_at_infinity = 1.5

    def f(self, s):
        return torch.expm1(s).abs() / 2 + (s.exp() - 2).clamp(min=0)

    def f_prime(self, s):
        return torch.sign(s) / 2 + (s > math.log(2))


def test_an_f_without_a_unique_optimum_is_refused():
    log_a, reward = T(0.1, 0.6, 0.3).log(), T(0.8, 0.0, -5.0)
    with pytest.raises(NotImplementedError, match="no inverse"):
        regularised_optimum(TV, log_a, reward, 1.0)
    with pytest.raises(ValueError, match="steps: no λ"):
        regularised_optimum(Steps(), log_a, reward, 1.0)


def test_inputs_that_are_no_problem_to_solve_are_refused():
    log_a, reward = T(0.5, 0.5).log(), T(0.0, 1.0)
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="β > 0"):
            regularised_optimum(PEARSON, log_a, reward, beta)
    for bad in (INF, -INF, math.nan):
        with pytest.raises(ValueError, match="finite reward"):
            regularised_optimum(PEARSON, log_a, T(0.0, bad), 1.0)
    with pytest.raises(ValueError, match="do not sum to 1"):
        regularised_optimum(PEARSON, T(0.5, 0.4).log(), reward, 1.0)


def test_leading_dimensions_are_a_batch_and_float32_is_widened():
    log_a, reward, beta = instance(0.5)
    single = log_a.view(5, 12, 6).float(), reward.view(5, 12, 6).float()
    batch = regularised_optimum(PEARSON, *single, beta)
    assert batch.log_pi.shape == (5, 12, 6)
    assert batch.lambda_.shape == batch.value.shape == (5, 12)
    assert batch.log_pi.dtype == batch.value.dtype == torch.float64
    alone = [regularised_optimum(PEARSON, log_a[i], reward[i], beta).value for i in range(60)]
    assert torch.allclose(batch.value.flatten(), torch.stack(alone), rtol=0, atol=1e-6)
    assert torch.allclose(batch.value, regularised_dual(PEARSON, *single, beta, batch.lambda_), rtol=0, atol=1e-10)


# -- where match and regularise coincide -------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
@every_smooth_f
def test_the_optima_of_match_and_regularise_coincide_for_reverse_kl_alone(f, beta):
    """Elsewhere the optimum of `match`, p ∝ a·exp(r/β), misses some of the value, which is concave in π with the slope
    U = r − β·f'(π/a): value(π*) − value(p) ≤ Σ (π* − p)·U ≤ TV(π*, p)·(max U − min U) bounds from below how far
    apart the two must lie, and knows π* by its value alone. Measured: .0142 or more, 1.4e-7 for alpha = 1 + 1e-6."""
    log_p, best = (log_a() + texts()["reward"] / beta).log_softmax(1), optimum(f, beta)
    if label(f) in IS_REVERSE_KL:
        assert torch.allclose(best.log_pi, log_p, rtol=0, atol=1e-10)
        return
    slope = texts()["reward"] - beta * f.f_prime(log_p - log_a())
    bound = (best.value - value_of(log_p, f, beta)) / (slope.amax(1) - slope.amin(1))
    apart = (best.log_pi.exp() - log_p.exp()).abs().sum(1) / 2
    assert (bound > 1e-9).all()
    assert (apart >= bound).all()
    assert (apart > (1e-7 if label(f) == NEARLY_REVERSE_KL else 1e-2)).all()


def test_alpha_moves_the_optimum_of_regularise_away_from_that_of_match_at_one_rate_on_both_sides_of_one():
    log_p = (log_a() + texts()["reward"]).log_softmax(1)
    rates = [distance(optimum(divergences.get("alpha", alpha=1 + e), 1.0).log_pi, log_p) / abs(e) for e in EITHER_SIDE]
    assert min(rates) > 0.05
    assert max(rates) < 1.02 * min(rates)


@pytest.mark.parametrize("factor", [0.5, 2.5])
def test_a_multiple_of_reverse_kl_coincides_with_match_at_its_own_beta(factor):
    best = optimum(Scaled(divergences.get("reverse_kl"), factor), 1.0).log_pi
    assert torch.allclose(best, (log_a() + texts()["reward"] / factor).log_softmax(1), rtol=0, atol=1e-10)
    assert distance(best, (log_a() + texts()["reward"]).log_softmax(1)) > 0.1


@pytest.mark.parametrize("f", [f for f in SMOOTH if label(f) != NEARLY_REVERSE_KL], ids=label)
def test_training_with_the_two_ends_at_one_place_for_reverse_kl_alone(f):
    """alpha = 1 + 1e-6 is left out: its two optima are nearer to each other than training comes to either."""
    apart = distance(matched(f, "tilted by r"), regularised(f, 1.0))
    assert apart <= 2e-3 if label(f) in IS_REVERSE_KL else apart > 1e-2
