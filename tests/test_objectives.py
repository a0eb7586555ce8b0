"""The objectives against the exact gradient on the enumerable language, and the losses of the other stages against
the f-divergence that they claim to be."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from toy import FINITE, FS, INF, N, P, everything, exact_log_probs, gradient, label, language, scores

from rlhf_fdiv import divergences
from rlhf_fdiv.divergences import Scaled, exact
from rlhf_fdiv.estimators import RLOO, Reinforce, policy_loss
from rlhf_fdiv.objectives import (
    Match,
    Prefer,
    Regularise,
    chain_rule_factor,
    next_token_divergence,
    preference_divergence,
    token_rewards,
)
from rlhf_fdiv.sequences import sequence_sum
from rlhf_fdiv.targets import Moments, Pointwise, Product, Tilted

BETA = 0.3
every_f = pytest.mark.parametrize("f", FS, ids=label)
TARGETS = {
    "tilted": Tilted(beta=0.7),
    "product": Product([Tilted(beta=1.5), Moments({"b": 0.5}, lambdas={"b": 0.8}), Pointwise("b", floor=0.2)]),
    "pointwise": Pointwise("b"),
    "product with zeros": Product([Tilted(beta=2.0), Pointwise("b")]),
}
CASES = [
    pytest.param(f, objective, name, id=f"{label(f)}-{objective.name}-{name}")
    for f in FS
    for objective in (Match(), Regularise(BETA))
    for name, target in TARGETS.items()
    if objective.conflicts(f, target.has_zeros) is None
]


def T(*values):
    return torch.tensor(values, dtype=torch.float64)


@functools.cache
def world():
    """The policy, log π by token (with its graph) and by text, log a by token and by text: one forward for all cases."""
    policy, reference = language()
    whole = everything()
    token_log_pi = policy(whole).log_probs
    with torch.no_grad():
        token_log_a = reference(whole).log_probs
        log_a = exact_log_probs(reference)
    return policy, token_log_pi, sequence_sum(token_log_pi, whole.mask).view(P, N), token_log_a, log_a


def potential_of(name):
    """The potential of every text and the exact log Z(x), [P, N] and [P]."""
    potential = TARGETS[name].potential(scores()).view(P, N)
    return potential, torch.logsumexp(world()[-1] + potential, 1)


def exact_objective(f, objective, name):
    """What is minimised, averaged over prompts, with gradients: D_f(π‖p), or −(E_π[r] − β·D_f(π‖a))."""
    _, _, log_pi, _, log_a = world()
    potential, log_z = potential_of(name)
    if isinstance(objective, Match):
        return exact(f, log_pi, log_a + potential - log_z[:, None]).mean()
    reward = BETA * potential
    return -((log_pi.exp() * reward).sum(1) - BETA * exact(f, log_pi, log_a)).mean()


@functools.cache
def exact_gradient(f, objective, name):
    return gradient(exact_objective(f, objective, name), world()[0])


def rewards_of(f, objective, name):
    _, token_log_pi, _, token_log_a, _ = world()
    potential, log_z = potential_of(name)
    return token_rewards(
        objective, f, token_log_pi.detach(), token_log_a, everything().mask,
        potential.flatten(), log_z.repeat_interleave(N),
    )  # fmt: skip


def loss_gradient(advantages, weights):
    """∇ of Σ_y weight(y)·policy_loss(y) through the policy's own forward."""
    policy, token_log_pi, *_ = world()
    loss = policy_loss(token_log_pi, token_log_pi.detach(), advantages, everything().mask, clip_range=0.2)
    return gradient((weights * loss).sum(), policy)


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


# -- the gradient ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("f", "objective", "name"), CASES)
def test_reinforce_weighted_by_the_exact_probabilities_is_the_gradient_of_the_exact_objective(f, objective, name):
    mask, probabilities = everything().mask, world()[2].detach().exp().flatten() / P
    advantages = Reinforce()(rewards_of(f, objective, name), mask, 1).advantages
    found, expected = loss_gradient(advantages, probabilities), exact_gradient(f, objective, name)
    assert expected.norm() > 1e-4
    assert relative_error(found, expected) <= 1e-6


@functools.cache
def all_pairs():
    """Rows of every ordered pair of a prompt's texts, two consecutive rows a pair, and each row's probability."""
    first = torch.arange(N).repeat_interleave(N)
    pair = torch.stack([first, torch.arange(N).repeat(N)], 1)
    rows = (torch.arange(P)[:, None, None] * N + pair).reshape(-1)
    p = world()[2].detach().exp().flatten()
    return rows, p[rows].view(-1, 2).prod(1).repeat_interleave(2) / 2 / P


@pytest.mark.parametrize(("f", "objective", "name"), CASES)
def test_leave_one_out_over_every_pair_of_texts_is_the_gradient_of_the_exact_objective(f, objective, name):
    rows, probabilities = all_pairs()
    rewards, mask = rewards_of(f, objective, name), everything().mask
    advantages = RLOO()(rewards[rows], mask[rows], 2).advantages
    mean = torch.zeros_like(rewards).index_add(0, rows, advantages * probabilities[:, None])
    found = loss_gradient(mean, torch.ones(P * N, dtype=torch.float64))
    assert relative_error(found, exact_gradient(f, objective, name)) <= 1e-6


def test_the_policy_of_these_tests_is_not_its_reference():
    _, _, log_pi, _, log_a = world()
    assert (exact(divergences.get("reverse_kl"), log_pi, log_a) > 0.05).all()


@every_f
def test_match_and_regularise_coincide_for_reverse_kl_alone(f):
    _, _, log_pi, _, log_a = world()
    potential, log_z = potential_of("tilted")
    arguments = (f, log_pi.detach(), log_a, potential, log_z[:, None])
    difference = BETA * Match().pseudo_reward(*arguments) - Regularise(BETA).pseudo_reward(*arguments)
    spread = float((difference - difference.mean(1, keepdim=True)).abs().max())
    if f.name == "reverse_kl" or label(f) == "alpha(alpha=1.0)":  # the same f under another name
        assert spread <= 1e-10
        constant = -BETA * log_z  # which a per-prompt baseline removes
        assert torch.allclose(difference.mean(1), constant, rtol=0, atol=1e-10)
    else:
        assert spread > (1e-7 if label(f) == "alpha(alpha=1.000001)" else 1e-2)


@every_f
def test_match_coincides_with_regularise_in_gradient_for_reverse_kl_alone(f):
    ours, theirs = exact_gradient(f, Match(), "tilted"), exact_gradient(f, Regularise(BETA), "tilted") / BETA
    same = label(f) in ("reverse_kl", "alpha(alpha=1.0)")
    near = label(f) == "alpha(alpha=1.000001)"
    # 1e-6: Llama's norm works in float32, so Σ_y π(y)·∇log π(y), which the constant multiplies, is not 0 beyond it
    assert relative_error(ours, theirs) <= 1e-6 if same else relative_error(ours, theirs) > (1e-8 if near else 1e-2)


@every_f
def test_the_pseudo_reward_is_minus_f_prime_of_the_log_ratio_with_its_sign_in_words(f):
    """π above p is paid less than π below it, and π = p is paid nothing: f is in normal form."""
    zero = T(0.0)
    low, level, high = (Match().pseudo_reward(f, T(s), zero, zero, zero) for s in (-1.0, 0.0, 1.0))
    assert high < level < low
    assert level == 0


@pytest.mark.parametrize("f", FINITE, ids=label)
def test_where_the_target_is_zero_the_pseudo_reward_is_minus_f_prime_at_infinity(f):
    found = Match().pseudo_reward(f, T(-3.0, -3.0), T(-2.0, -2.0), T(-INF, -INF), T(-0.5, -INF))
    assert found.tolist() == pytest.approx([-f.f_prime_at_infinity] * 2, rel=1e-9)


# -- laid out over tokens ----------------------------------------------------------------------------------------------


@every_f
@pytest.mark.parametrize("objective", [Match(), Regularise(BETA)], ids=label)
def test_token_rewards_sum_to_the_pseudo_reward_and_padding_gets_none(f, objective):
    _, _, log_pi, _, log_a = world()
    potential, log_z = potential_of("tilted")
    score = objective.pseudo_reward(f, log_pi.detach(), log_a, potential, log_z[:, None]).flatten()
    rewards, mask = rewards_of(f, objective, "tilted"), everything().mask
    assert torch.allclose(rewards.sum(1), score, rtol=1e-12, atol=1e-12)
    assert (rewards[mask == 0] == 0).all()


@pytest.mark.parametrize(
    ("objective", "scale"), [(Match(), 1.0), (Regularise(BETA), BETA)], ids=["match", "regularise"]
)
@pytest.mark.parametrize("f", [divergences.get("reverse_kl"), divergences.get("alpha", alpha=1.0)], ids=label)
def test_reverse_kl_pays_each_token_its_own_log_ratio_and_the_rest_at_the_end(f, objective, scale):
    _, token_log_pi, _, token_log_a, _ = world()
    potential, log_z = potential_of("tilted")
    mask = everything().mask
    rest = rewards_of(f, objective, "tilted") + scale * (token_log_pi.detach() - token_log_a) * mask
    last = torch.zeros_like(mask).scatter(1, mask.sum(1, keepdim=True) - 1, 1).bool()
    assert rest[~last].abs().max() <= 1e-12
    expected = scale * potential.flatten() - (log_z.repeat_interleave(N) if isinstance(objective, Match) else 0)
    assert torch.allclose(rest[last], expected, rtol=0, atol=1e-12)


@every_f
def test_every_other_f_pays_its_whole_score_at_the_last_token(f):
    rewards, mask = rewards_of(f, Match(), "tilted"), everything().mask
    before_last = torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True) - 1
    assert (bool((rewards[before_last] == 0).all())) == (label(f) not in ("reverse_kl", "alpha(alpha=1.0)"))


def test_only_multiples_of_reverse_kl_obey_the_chain_rule():
    found = {label(f) for f in FS if chain_rule_factor(f) is not None}
    assert found == {"reverse_kl", "alpha(alpha=1.0)"}
    assert chain_rule_factor(Scaled(divergences.get("reverse_kl"), 2.5)) == pytest.approx(2.5)


def test_a_scaled_reverse_kl_still_sums_and_still_has_the_exact_gradient():
    f = Scaled(divergences.get("reverse_kl"), 2.5)
    for objective in (Match(), Regularise(BETA)):
        advantages = Reinforce()(rewards_of(f, objective, "tilted"), everything().mask, 1).advantages
        found = loss_gradient(advantages, world()[2].detach().exp().flatten() / P)
        assert relative_error(found, exact_gradient(f, objective, "tilted")) <= 1e-6


# -- what does not go together -----------------------------------------------------------------------------------------


@every_f
def test_match_refuses_a_target_with_zeros_where_f_prime_at_infinity_is_infinite_and_says_why(f):
    message = Match().conflicts(f, target_has_zeros=True)
    assert Match().conflicts(f, target_has_zeros=False) is None
    if math.isfinite(f.f_prime_at_infinity):
        assert message is None
    else:
        assert f.name in message
        assert "f'(∞)" in message
        assert "floor" in message


@every_f
def test_regularise_refuses_a_target_with_zeros_whatever_f(f):
    assert "−inf" in Regularise().conflicts(f, target_has_zeros=True)
    assert Regularise().conflicts(f, target_has_zeros=False) is None


BOUNDED_AT_ZERO = ("pearson_chi2", "tv", "alpha(alpha=2.0)", "alpha(alpha=3.0)", "alpha(alpha=1.000001)")  # f'(0⁺) > −∞


@every_f
def test_prefer_needs_f_prime_at_zero_to_be_minus_infinity(f):
    message = Prefer().conflicts(f)
    if label(f) in BOUNDED_AT_ZERO:
        assert "f'(0⁺)" in message
    else:
        assert message is None


@pytest.mark.parametrize(
    ("spec", "allowed"),
    [
        ({"name": "skew_js", "w": 0.01}, True),
        ({"name": "mixture", "components": ["reverse_kl", "pearson_chi2"], "weights": [0.05, 1]}, True),
        ({"name": "mixture", "components": ["tv", "pearson_chi2"], "weights": [1, 1000]}, False),
        ({"name": "alpha", "alpha": 1.001}, False),
        ({"name": "alpha", "alpha": 0.999}, True),
    ],
    ids=str,
)
def test_prefer_judges_the_limit_not_the_scale_of_f(spec, allowed):
    assert (Prefer().conflicts(divergences.get(spec)) is None) == allowed


# -- SFT by token ------------------------------------------------------------------------------------------------------


def random_log_probs(*shape, seed=5):
    logits = 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.requires_grad_()


def test_next_token_forward_kl_is_cross_entropy_in_value_and_gradient():
    logits, tokens = random_log_probs(40, 7), torch.arange(40) % 7
    ours = next_token_divergence(
        divergences.get("forward_kl"), logits.log_softmax(-1).gather(1, tokens[:, None])
    ).mean()
    theirs = F.cross_entropy(logits, tokens)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(x, logits)[0] for x in (ours, theirs)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("spec", "scale", "q"),
    [
        # f(t) + f'(∞)(1 − t) = (t^α − 1)/(α(α − 1)) = (1 − t^α)/α · 1/(1 − α)
        *(({"name": "alpha", "alpha": a}, 1 / (1 - a), a) for a in (0.1, 0.3, 0.5, 0.9)),
        # ½(√t − 1)² + ½(1 − t) = 1 − √t = ½·(1 − t^½)/½
        ("hellinger", 0.5, 0.5),
        # ½(1 − t) + ½(1 − t) = 1 − t
        ("tv", 1.0, 1.0),
    ],
    ids=str,
)
def test_next_token_alpha_hellinger_and_tv_are_the_generalised_cross_entropy(spec, scale, q):
    log_prob = torch.linspace(-12, -1e-3, 50, dtype=torch.float64).requires_grad_()
    ours = next_token_divergence(divergences.get(spec), log_prob)
    theirs = scale * (1 - (q * log_prob).exp()) / q
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    slopes = [torch.autograd.grad(x.sum(), log_prob)[0] for x in (ours, theirs)]
    assert torch.allclose(*slopes, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("f", FINITE, ids=label)
def test_next_token_divergence_is_the_exact_divergence_to_a_one_hot_target(f):
    log_pi, tokens = random_log_probs(30, 6).log_softmax(-1), torch.arange(30) % 6
    one_hot = torch.where(F.one_hot(tokens, 6).bool(), 0.0, -INF).double()
    ours = next_token_divergence(f, log_pi.gather(1, tokens[:, None]).squeeze(1))
    assert torch.allclose(ours, exact(f, log_pi, one_hot), rtol=1e-9, atol=1e-12)


@every_f
def test_next_token_divergence_refuses_an_infinite_price(f):
    if f in FINITE:
        assert next_token_divergence(f, T(0.0)).abs() <= 1e-12, "a certain and right model pays nothing"
    else:
        with pytest.raises(ValueError, match=r"f'\(∞\) = ∞"):
            next_token_divergence(f, T(-1.0))


# -- reward model by pair ----------------------------------------------------------------------------------------------

MARGINS = torch.linspace(-8, 8, 33, dtype=torch.float64)


def shares(hard):
    c = torch.rand(33, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 0.98 + 0.01
    return (c > 0.5).double() if hard else c


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_preference_forward_kl_is_bradley_terry_less_the_entropy_of_the_labels(hard):
    c, margin = shares(hard), MARGINS.clone().requires_grad_()
    ours = preference_divergence(divergences.get("forward_kl"), margin, c)
    theirs = F.binary_cross_entropy_with_logits(margin, c, reduction="none")
    entropy = torch.special.entr(c) + torch.special.entr(1 - c)
    assert torch.allclose(ours, theirs - entropy, rtol=0, atol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(x.sum(), margin)[0] for x in (ours, theirs)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("f", "hard"),
    [*((f, False) for f in FS), *((f, True) for f in FINITE)],  # the reward stage refuses the others on hard labels
    ids=lambda x: {True: "hard", False: "soft"}[x] if isinstance(x, bool) else label(x),
)
def test_preference_divergence_is_the_exact_divergence_of_two_outcomes_with_a_finite_slope(f, hard):
    c, margin = shares(hard), MARGINS.clone().requires_grad_()
    ours = preference_divergence(f, margin, c)
    pi, p = torch.sigmoid(torch.stack([MARGINS, -MARGINS], -1)), torch.stack([c, 1 - c], -1)
    t = pi / p
    by_hand = torch.where(p > 0, p * f.f(t.log().clamp(max=700)), f.f_prime_at_infinity * pi).sum(-1)
    assert torch.allclose(ours, by_hand, rtol=1e-7, atol=1e-9)
    assert torch.allclose(ours, exact(f, pi.log(), p.log()), rtol=1e-7, atol=1e-9)
    slope = torch.autograd.grad(ours.sum(), margin)[0]
    assert slope.isfinite().all()
    wrong_way = slope * (torch.sigmoid(MARGINS) - c)  # the slope points away from the raters' share
    assert (wrong_way >= -1e-12).all()


@every_f
def test_preference_divergence_is_infinite_on_a_hard_label_just_where_f_prime_at_infinity_is(f):
    value = float(preference_divergence(f, T(0.3), T(1.0)))
    assert math.isinf(value) == math.isinf(f.f_prime_at_infinity)
