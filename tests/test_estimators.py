"""Advantages and losses against definitions written out anew, and one optimiser step against the same step by hand."""

import copy
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import (
    PROMPTS,
    TEXTS,
    TOKENIZER,
    N,
    P,
    everything,
    exact_log_probs,
    gradient,
    language,
    perturbed,
    scores,
    text_index,
    tiny_lm,
)

from rlhf_fdiv import divergences
from rlhf_fdiv.config.options import PolicyOptions
from rlhf_fdiv.estimators import (
    ESTIMATORS,
    GRPO,
    PPO,
    RLOO,
    Reinforce,
    explained_variance,
    generalised_advantages,
    out_of_range,
    policy_loss,
    prefix_values,
    whiten,
)
from rlhf_fdiv.models import Policy
from rlhf_fdiv.objectives import Match, token_rewards
from rlhf_fdiv.rollout import Rollout, sample, uniforms
from rlhf_fdiv.sequences import Sequences, sequence_sum
from rlhf_fdiv.stages.policy_update import update
from rlhf_fdiv.stages.training import Training

quick = settings(max_examples=60, deadline=None, derandomize=True)
unit = st.floats(0, 1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(lengths, width=None):
    return (torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]).long()


@st.composite
def rollouts(draw):
    """Rewards, values and a mask of unequal lengths, with rubbish at padding."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    mask = mask_of(lengths, 6)
    seed = draw(st.integers(0, 999))
    return normal(*mask.shape, seed=seed), normal(*mask.shape, seed=seed + 1), mask


# -- generalised advantages --------------------------------------------------------------------------------------------


def advantages_by_definition(rewards, values, mask, gamma, lam):
    """Σ_l (γλ)^l·δ_{t+l} for every t, each sum written out; a completion ends with its last token."""
    out = torch.zeros_like(rewards)
    for i, length in enumerate(mask.sum(1).tolist()):
        value = [*values[i, :length].tolist(), 0.0]
        delta = [float(rewards[i, t]) + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            out[i, t] = sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, length))
    return out


@quick
@given(rollouts(), unit, unit)
def test_generalised_advantages_are_their_definition_and_ignore_padding(rollout, gamma, lam):
    rewards, values, mask = rollout
    found = generalised_advantages(rewards, values, mask, gamma, lam)
    assert torch.allclose(found, advantages_by_definition(rewards, values, mask, gamma, lam), rtol=0, atol=1e-12)


@quick
@given(rollouts())
def test_with_lam_one_an_advantage_is_the_reward_to_come_less_the_value(rollout):
    rewards, values, mask = rollout
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1)
    found = generalised_advantages(rewards, values, mask, 1.0, 1.0)
    assert torch.allclose(found, (to_come - values) * mask, rtol=0, atol=1e-12)


@quick
@given(rollouts())
def test_ppo_learns_the_return_that_its_advantage_was_measured_against(rollout):
    rewards, values, mask = rollout
    plain = PPO(whiten_advantages=False)(rewards, mask, 1, values)
    assert torch.allclose((plain.returns - values) * mask, plain.advantages, rtol=0, atol=1e-12)
    white = PPO()(rewards, mask, 1, values)
    assert torch.equal(white.returns, plain.returns), "whitening must not touch what the critic learns"
    assert torch.allclose(white.advantages, whiten(plain.advantages, mask))


def test_ppo_without_its_value_head_says_so():
    with pytest.raises(ValueError, match="value head"):
        PPO()(normal(2, 3), torch.ones(2, 3), 1)


# -- a critic of prefixes ----------------------------------------------------------------------------------------------


@st.composite
def scored_rollouts(draw):
    """Rewards, mask, scores of prefixes [B, T, S] and K; rubbish at padding."""
    prompts, k, features = draw(st.integers(2, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 2))
    lengths = draw(st.lists(st.integers(1, 5), min_size=prompts * k, max_size=prompts * k))
    seed, mask = draw(st.integers(0, 999)), mask_of(lengths, 5)
    return normal(*mask.shape, seed=seed), mask, normal(*mask.shape, features, seed=seed + 1), k


def halves(rows, k):
    return torch.arange(rows) % max(k, 2) % 2 == 0


@quick
@given(scored_rollouts(), st.integers(0, 99))
def test_a_value_knows_of_its_own_completion_no_more_than_the_prefix(rollout, seed):
    """Hence it is a baseline: E[V(x, y_<t)·∇log π(y_t)] = 0 whatever it says."""
    rewards, mask, of_prefixes, k = rollout
    values, half = prefix_values(rewards, mask, of_prefixes, k), halves(len(mask), k)
    changed = torch.where(half[:, None], normal(*mask.shape, seed=seed), rewards)
    assert torch.equal(prefix_values(changed, mask, of_prefixes, k)[half], values[half]), "what its half was paid"
    for t in range(mask.shape[1]):
        later = (torch.arange(mask.shape[1]) > t) & half[:, None]
        after = torch.where(later[..., None], 5.0, of_prefixes)
        found = prefix_values(changed, mask, after, k)
        assert torch.allclose(found[half, : t + 1], values[half, : t + 1], rtol=0, atol=1e-12), "what came after"


@quick
@given(scored_rollouts(), st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_values_are_least_squares_whatever_the_unit_of_a_score(rollout, unit_of_score, offset):
    rewards, mask, of_prefixes, k = rollout
    values, half = prefix_values(rewards, mask, of_prefixes, k), halves(len(mask), k)
    returns = (rewards * mask).flip(1).cumsum(1).flip(1)
    for own in (half, ~half):
        prompts, fitted = torch.arange(len(mask)) // k, ~own
        siblings = [(prompts == prompts[i]) & fitted & (torch.arange(len(mask)) != i) for i in range(len(mask))]
        means = torch.stack([returns[s, 0].mean() if s.any() else torch.zeros(()).double() for s in siblings])
        x = torch.cat(
            [torch.ones(*mask.shape, 1), means[:, None, None].expand(*mask.shape, 1), of_prefixes], -1
        ).numpy()
        seen = [(i, t) for i, t in mask.nonzero().tolist() if fitted[i]]
        for i, t in [(i, t) for i, t in mask.nonzero().tolist() if own[i]]:
            weights = np.array([(u == t) + 8.0 / len(seen) for _, u in seen]) ** 0.5
            rows, goals = np.array([x[j, u] for j, u in seen]), np.array([float(returns[j, u]) for j, u in seen])
            if np.linalg.matrix_rank(rows) < rows.shape[1]:
                continue  # more than one fit is the best; which one, is not laid down
            fit = np.linalg.lstsq(weights[:, None] * rows, weights * goals, rcond=None)[0]
            assert float(values[i, t]) == pytest.approx(np.clip(x[i, t] @ fit, goals.min(), goals.max()), abs=1e-6)
    again = prefix_values(rewards, mask, unit_of_score * of_prefixes + offset, k)
    assert torch.allclose(again, values, rtol=0, atol=1e-5)


@quick
@given(scored_rollouts(), unit)
def test_a_value_is_of_the_discounted_return(rollout, gamma):
    rewards, mask, of_prefixes, k = rollout
    zero = torch.zeros_like(rewards)
    returns = generalised_advantages(rewards, zero, mask, gamma, 1.0)  # γ times what follows, and nothing off it
    by_token = returns - torch.cat([returns[:, 1:], zero[:, :1]], 1)
    found = prefix_values(rewards, mask, of_prefixes, k, gamma)
    torch.testing.assert_close(found, prefix_values(by_token, mask, of_prefixes, k), rtol=1e-6, atol=1e-6)


def test_where_the_scores_of_prefixes_tell_the_return_the_advantage_has_no_noise():
    mask, k = mask_of([4, 2, 3, 4, 1, 4, 3, 2]), 4
    of_prefixes = normal(*mask.shape, 1) * mask[..., None]
    returns = (3 - 2 * of_prefixes[..., 0]) * mask
    rewards = returns - torch.cat([returns[:, 1:], torch.zeros(len(mask), 1)], 1)
    inside = prefix_values(rewards, mask, of_prefixes, k)
    low, high = returns[mask.bool()].sort().values[[2, -3]]  # a value stays within the returns of the other half
    known = (returns > low) & (returns < high) & mask.bool()
    assert known.sum() > 10
    assert torch.allclose(inside[known], returns[known], rtol=0, atol=1e-9)


@pytest.mark.parametrize("said", [0.0, 7.0, 1e9])
def test_scores_that_do_not_vary_tell_nothing(said):
    rewards, mask = normal(6, 3), mask_of([3, 1, 3, 2, 3, 3])
    values = prefix_values(rewards, mask, torch.full((6, 3, 2), said), 3)
    assert torch.equal(values, prefix_values(rewards, mask, torch.zeros(6, 3, 0), 3))
    assert float(values.std()) > 0, "there is the mean return by position yet"


def test_with_lam_one_the_expected_gradient_is_that_of_the_expected_reward():
    """Every pair of texts that a table of next-token laws can draw, each with its probability: two binary tokens."""
    logits = normal(3, 2, seed=3).requires_grad_()  # after nothing, after 0, after 1
    texts = [(a, b) for a in (0, 1) for b in (0, 1)]
    reward = torch.tensor([1.0, -0.5, 0.3, 2.0]).double()
    by_token = torch.stack(
        [torch.stack([logits.log_softmax(1)[0, a], logits.log_softmax(1)[1 + a, b]]) for a, b in texts]
    )
    pi = by_token.sum(1).exp()
    (expected,) = torch.autograd.grad(pi @ reward, logits, retain_graph=True)
    of_prefixes = torch.tensor([[0.0, a] for a, _ in texts]).double()[..., None]
    ppo, loss = PPO(critic="prefixes", lam=1.0, whiten_advantages=False), torch.zeros(()).double()
    mask, chosen = torch.ones(2, 2), torch.cartesian_prod(torch.arange(4), torch.arange(4))
    for pair in chosen:
        paid = torch.stack([torch.zeros(2).double(), reward[pair]], 1)
        values = prefix_values(paid, mask, of_prefixes[pair], 2)
        assert bool(values.abs().sum() > 0)
        advantages = ppo(paid, mask, 2, values).advantages
        loss = loss + pi[pair].prod().detach() * (advantages * by_token[pair]).sum() / 2
    (found,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


# -- baselines ---------------------------------------------------------------------------------------------------------


@quick
@given(rollouts())
def test_ppo_at_one_epoch_lam_one_terminal_scores_no_whitening_zero_values_is_reinforce(rollout):
    rewards, _, mask = rollout
    last = torch.zeros_like(mask).scatter(1, mask.sum(1, keepdim=True) - 1, 1)
    terminal = rewards * last
    ppo = PPO(num_epochs=1, lam=1.0, whiten_advantages=False)
    found = ppo(terminal, mask, 1, torch.zeros_like(rewards)).advantages
    assert torch.allclose(found, Reinforce()(terminal, mask, 1).advantages, rtol=0, atol=1e-12)


@quick
@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 99))
def test_rloo_subtracts_the_mean_of_the_others(prompts, k, seed):
    rewards, mask = normal(prompts * k, 5, seed=seed), mask_of([1 + i % 5 for i in range(prompts * k)], 5)
    rewards = rewards * mask
    total = rewards.sum(1).tolist()
    found = RLOO()(rewards, mask, k).advantages
    for i, score in enumerate(total):
        group = range(i // k * k, i // k * k + k)
        expected = score - sum(total[j] for j in group if j != i) / (k - 1)
        assert found[i].tolist() == pytest.approx([expected * m for m in mask[i].tolist()], abs=1e-12)


@pytest.mark.parametrize("estimator", [RLOO(), GRPO(), GRPO(scale_rewards=False)], ids=repr)
def test_a_constant_of_the_prompt_drops_out(estimator):
    rewards, mask = normal(12, 4), mask_of([1, 2, 3, 4] * 3)
    rewards = rewards * mask
    constant = normal(3, seed=1).repeat_interleave(4)[:, None] * mask_of([1] * 12, 4)
    found = estimator(rewards + 100 * constant, mask, 4).advantages
    assert torch.allclose(found, estimator(rewards, mask, 4).advantages, rtol=0, atol=1e-10)


def test_grpo_is_rloo_shrunk_by_k_minus_1_over_k_and_scaled_by_the_groups_std():
    rewards, mask = normal(12, 4), torch.ones(12, 4)
    plain = GRPO(scale_rewards=False)(rewards, mask, 4).advantages
    assert torch.allclose(plain, 0.75 * RLOO()(rewards, mask, 4).advantages, rtol=0, atol=1e-12)
    scaled = GRPO()(rewards, mask, 4).advantages[:, 0].view(3, 4)
    std = rewards.sum(1).view(3, 4).std(1, keepdim=True)
    assert torch.allclose(scaled, plain[:, 0].view(3, 4) / (std + 1e-4), rtol=1e-12)


def test_equal_scores_in_a_group_teach_nothing_and_divide_by_nothing():
    for estimator in (RLOO(), GRPO()):
        assert estimator(torch.full((4, 3), 0.7), torch.ones(4, 3), 4).advantages.abs().max() <= 1e-6


def test_every_estimator_gives_padding_no_advantage():
    rewards, mask = normal(8, 6), mask_of([1, 2, 3, 4, 5, 6, 1, 3], 6)
    for estimator in (cls() for cls in ESTIMATORS.values()):
        found = estimator(rewards * mask, mask, 4, normal(8, 6, seed=1)).advantages
        assert (found[mask == 0] == 0).all(), estimator.name


# -- Monte Carlo on the toy --------------------------------------------------------------------------------------------


GROUPS, K = 3000, 4


@functools.cache
def drawn():
    """Completions of the toy policy: the text of each, and log π and log a by token."""
    policy, reference = language()
    with torch.no_grad():
        noise = uniforms(5, 1, P * K * GROUPS, 4)
        sequences, log_pi, _ = sample(policy.lm, TOKENIZER, PROMPTS, K * GROUPS, noise)
        log_a = reference(everything()).log_probs
    rows = text_index(sequences.completion_ids, sequences.mask) + N * torch.arange(P).repeat_interleave(K * GROUPS)
    return rows, log_pi.double(), log_a[rows, : log_pi.shape[1]], sequences.mask


@functools.cache
def slopes_of_log_pi(count=12):
    """Of every text along `count` random directions in weight space, [P × N, count]."""
    policy, _ = language()
    moved, weights = copy.deepcopy(policy), torch.nn.utils.parameters_to_vector(policy.parameters())
    columns = []
    for i in range(count):
        way = 1e-3 * normal(len(weights), seed=i)
        ends = []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(weights + sign * way, moved.parameters())
            with torch.no_grad():
                ends.append(exact_log_probs(moved).flatten())
        columns.append((ends[0] - ends[1]) / 2e-3)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "js", "tv"])
def test_rloo_on_sampled_completions_has_the_exact_gradient_as_its_mean(name):
    f = divergences.get(name)
    policy, reference = language()
    log_pi, log_a = exact_log_probs(policy), exact_log_probs(reference).detach()
    potential = scores()["reward"].view(P, N) / 2
    log_z = torch.logsumexp(log_a + potential, 1)
    rows, token_log_pi, token_log_a, mask = drawn()
    rewards = token_rewards(
        Match(), f, token_log_pi, token_log_a, mask, potential.flatten()[rows], log_z.repeat_interleave(K * GROUPS)
    )
    advantage = RLOO()(rewards, mask, K).advantages[:, 0]

    exact = gradient(divergences.exact(f, log_pi, log_a + potential - log_z[:, None]).mean(), policy)
    weights = torch.zeros(P * N).double().index_add(0, rows, -advantage / len(rows))
    estimate = gradient((weights * log_pi.flatten()).sum(), policy)
    assert float(torch.cosine_similarity(estimate, exact, 0)) >= 0.99

    slope = f.f_prime(log_pi - (log_a + potential - log_z[:, None])).detach()
    expected = (log_pi.detach().exp() * slope / P).flatten() @ slopes_of_log_pi()
    of_group = (-advantage[:, None] * slopes_of_log_pi()[rows]).view(P, GROUPS, K, -1).mean(2)
    error = (of_group.var(1) / GROUPS).sum(0).sqrt() / P
    assert ((of_group.mean((0, 1)) - expected).abs() < 4 * error).all()


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_at_ratio_one_the_gradient_is_minus_advantage_times_score_clipped_or_not(clip_range):
    policy, _ = language()
    whole = everything()[torch.arange(0, P * N, 7)]
    log_probs = policy(whole).log_probs
    advantages = normal(*log_probs.shape)
    loss = policy_loss(log_probs, log_probs.detach(), advantages, whole.mask, clip_range)
    assert torch.allclose(loss, -(advantages * whole.mask).sum(1), rtol=0, atol=1e-12)
    found, expected = gradient(loss.sum(), policy), gradient(-(advantages * log_probs * whole.mask).sum(), policy)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("ratio", "advantage", "alive"),
    [(1.3, 1.0, False), (1.3, -1.0, True), (0.7, 1.0, True), (0.7, -1.0, False), (1.1, 1.0, True), (0.9, -1.0, True)],
)
def test_clipping_stops_a_token_only_where_it_has_gone_too_far_already(ratio, advantage, alive):
    log_prob = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    policy_loss(log_prob, zero, advantage * one, one, 0.2).sum().backward()
    assert float(log_prob.grad) == pytest.approx(-advantage * ratio if alive else 0.0)


def test_an_unclipped_loss_is_the_importance_weighted_one_and_sums_over_tokens():
    new, old, advantages, mask = normal(4, 3), normal(4, 3, seed=1), normal(4, 3, seed=2), mask_of([3, 1, 2, 3])
    expected = -((new - old).exp() * advantages * mask).sum(1)
    assert torch.allclose(policy_loss(new, old, advantages, mask), expected)


def test_a_token_is_out_of_range_on_either_side_of_it():
    log_ratio = torch.tensor([[1.3, 1.1, 0.7], [0.9, 1.19, 0.79]]).log()
    found = out_of_range(log_ratio, torch.zeros(2, 3), 0.2)
    assert found.tolist() == [[True, False, True], [False, False, True]]


def test_the_value_loss_is_the_larger_of_clipped_and_unclipped():
    ppo = PPO(vf_coef=0.6, clip_range_value=0.2)
    values, old, returns = (
        torch.tensor([[0.5, -1.0, 0.1, 7.0]]),
        torch.zeros(1, 4),
        torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
    )
    # V = .5 towards R = 1 counts as .2, V = −1 away from R = 0 as −1, V = .1 lies inside the range, the last is padding
    expected = 0.5 * 0.6 * ((0.2 - 1) ** 2 + 1 + 0.1**2)
    mask = mask_of([3], 4)
    assert float(ppo.value_loss(values, old, returns, mask)) == pytest.approx(expected)
    unclipped = 0.5 * 0.6 * (0.5**2 + 1 + 0.1**2)
    assert float(PPO(vf_coef=0.6, clip_range_value=None).value_loss(values, old, returns, mask)) == pytest.approx(
        unclipped
    )


@quick
@given(rollouts())
def test_whitened_tokens_have_mean_0_and_variance_1_whatever_stands_in_the_padding(rollout):
    x, rubbish, mask = rollout
    white = whiten(x, mask)
    kept = white[mask.bool()]
    assert abs(float(kept.mean())) <= 1e-9
    assert len(kept) < 3 or float((kept**2).mean()) == pytest.approx(1, abs=1e-4)
    assert (white[mask == 0] == 0).all()
    assert torch.allclose(white, whiten(torch.where(mask.bool(), x, rubbish * 99), mask), rtol=0, atol=1e-12)


def test_explained_variance_is_1_for_a_perfect_critic_0_for_a_constant_one_and_less_for_a_wrong_one():
    returns, mask = normal(4, 5), mask_of([5, 3, 1, 4])
    rubbish = torch.where(mask.bool(), returns, 1e6)
    assert float(explained_variance(rubbish, returns, mask)) == pytest.approx(1)
    assert float(explained_variance(torch.full_like(returns, 3.0), returns, mask)) == pytest.approx(0)
    assert float(explained_variance(-returns, returns, mask)) == pytest.approx(-3)


# -- one step of the stage ---------------------------------------------------------------------------------------------

TRAINED_TEXTS = [TEXTS[i] for i in (0, 5, 20, 100, 1, 60)]  # 2 completions a prompt, of 1 to 4 tokens
LR = 0.01


def stepped(
    estimator,
    size,
    value_head=False,
    rewards=None,
    max_grad_norm=1e9,
    lr=LR,
    architecture="llama",
    prefix_scores=None,
    seed=0,
):
    """The policy before and after `update`, what it was trained on, its figures and the number of optimiser steps."""
    policy = Policy(perturbed(tiny_lm(architecture)), value_head).double()
    before = copy.deepcopy(policy)
    sequences = Sequences.of([p for p in PROMPTS for _ in range(2)], TRAINED_TEXTS)
    with torch.no_grad():
        log_probs = policy(sequences).log_probs
    batch = Rollout(sequences, log_probs, torch.zeros_like(log_probs), [0, 1, 2])
    rewards = normal(*log_probs.shape) * sequences.mask if rewards is None else rewards
    options = PolicyOptions(num_generations=2, per_device_train_batch_size=size, max_grad_norm=max_grad_norm,
                            optim="sgd", learning_rate=lr)  # fmt: skip
    training, steps = Training(policy, options, Path(), Accelerator(cpu=True)), []
    training.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    figures = update(training, estimator, batch, rewards, seed, None, prefix_scores)
    return before, policy, sequences, rewards, figures, len(steps)


def change(before, after):
    return torch.cat([(b - a).flatten() for a, b in zip(before.lm.parameters(), after.lm.parameters(), strict=True)])


@pytest.mark.parametrize("size", [6, 4, 2, 1])
def test_one_update_is_one_step_along_the_hand_computed_gradient_however_it_is_split(size):
    before, after, sequences, rewards, figures, _ = stepped(RLOO(), size)
    total = rewards.sum(1)
    advantage = (total - total.view(3, 2).flip(1).flatten()).detach()  # K = 2: the other one is the baseline
    log_pi = sequence_sum(before(sequences).log_probs, sequences.mask)
    expected = gradient((advantage * log_pi).mean(), before)
    found = change(before, after)
    assert float(figures["grad_norm"]) == pytest.approx(float(expected.norm()), rel=1e-6)
    lengths = sequences.mask.sum(1)
    assert float(figures["loss"]) == pytest.approx(float(-(advantage * lengths).mean()), rel=1e-6)
    # 1e-6: Llama's norm works in float32 in the backward, too; how the batch is split may not matter beyond it
    assert float((found - LR * expected).norm() / (LR * expected).norm()) <= 1e-6


def test_micro_batches_of_any_size_give_the_same_step():
    # GPT-2: Llama's norm works in float32 in the backward, too, where a prompt's sum over its completions is then rounded
    whole, *parts = (change(*stepped(RLOO(), size, architecture="gpt2")[:2]) for size in (6, 5, 4, 3, 2, 1))
    for part in parts:
        assert torch.allclose(part, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("estimator", "widths"),
    [(RLOO(), [2, 4, 4]), (PPO(num_epochs=1, num_minibatches=1), [2, 4, 4] * 2), (RLOO(num_epochs=2), [3, 4, 4] * 2)],
    ids=["rloo", "ppo", "scored anew"],
)
def test_micro_batches_are_of_texts_of_like_length_unless_groups_must_stay_whole(monkeypatch, estimator, widths):
    seen, forward = [], Policy.forward

    def watched(self, sequences):
        seen.append(sequences.mask.shape[1])
        return forward(self, sequences)

    lengths = [len(text) for text in TRAINED_TEXTS]
    assert [max(lengths[i : i + 2]) for i in (0, 2, 4)] == [3, 4, 4]
    monkeypatch.setattr(Policy, "forward", watched)
    stepped(estimator, 2, estimator.value_head)
    assert seen[1:] == widths  # the first is that of `stepped` itself


def test_a_ppo_step_without_critic_clip_or_whitening_is_the_reinforce_step():
    settings_ = {"num_epochs": 1, "num_minibatches": 1, "lam": 1.0, "whiten_advantages": False, "clip_range": None}
    sequences = Sequences.of([p for p in PROMPTS for _ in range(2)], TRAINED_TEXTS)
    last = torch.zeros_like(sequences.mask).scatter(1, sequences.mask.sum(1, keepdim=True) - 1, 1)
    terminal = normal(*last.shape) * last
    reinforce, ppo = (stepped(e, 4, value_head=e.value_head, rewards=terminal) for e in (Reinforce(), PPO(**settings_)))
    assert torch.allclose(change(*ppo[:2]), change(*reinforce[:2]), rtol=0, atol=1e-12)
    assert ppo[1].value_head.bias.abs() > 0, "the critic learns at the same step"


def test_a_ppo_step_is_that_of_the_clipped_loss_and_half_the_squared_error_of_the_critic():
    ppo = PPO(num_epochs=1, num_minibatches=1, gamma=0.9, lam=0.5, vf_coef=0.6, whiten_advantages=False)
    policy = Policy(perturbed(tiny_lm("gpt2")), value_head=True).double()
    torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(0))
    before, sequences = copy.deepcopy(policy), Sequences.of([p for p in PROMPTS for _ in range(2)], TRAINED_TEXTS)
    out, mask = before(sequences), sequences.mask
    old, rewards = out.values.detach(), normal(*mask.shape) * mask
    batch = Rollout(sequences, out.log_probs.detach(), torch.zeros_like(old), [0, 1, 2])
    options = PolicyOptions(num_generations=2, per_device_train_batch_size=6, max_grad_norm=1e9,
                            optim="sgd", learning_rate=LR)  # fmt: skip
    update(Training(policy, options, Path(), Accelerator(cpu=True)), ppo, batch, rewards, 0)
    advantages = generalised_advantages(rewards, old, mask, 0.9, 0.5)
    critic = 0.5 * 0.6 * ((out.values - advantages - old) ** 2 * mask).sum(1)
    expected = gradient((critic - (advantages * out.log_probs * mask).sum(1)).mean(), before)
    found = torch.cat([(b - a).flatten() for a, b in zip(policy.parameters(), before.parameters(), strict=True)])
    assert float((found - LR * expected).norm() / (LR * expected).norm()) <= 1e-9


def test_a_critic_of_prefixes_discounts_as_its_advantages_do():
    ppo = PPO("prefixes", num_epochs=1, num_minibatches=1, gamma=0.5, lam=1.0, whiten_advantages=False)
    of_prefixes = normal(6, 4, 1)
    before, after, sequences, rewards, *_ = stepped(ppo, 6, architecture="gpt2", prefix_scores=of_prefixes)
    values = prefix_values(rewards, sequences.mask, of_prefixes, 2, 0.5)
    advantages = generalised_advantages(rewards, values, sequences.mask, 0.5, 1.0)
    expected = gradient((advantages * before(sequences).log_probs * sequences.mask).sum(1).mean(), before)
    assert float((change(before, after) - LR * expected).norm() / (LR * expected).norm()) <= 1e-9


def test_grpo_weighs_completions_of_another_law():
    rewards, w = normal(12, 1), normal(12, seed=1).exp()
    s, v = rewards.view(3, 4), w.view(3, 4)
    expected = v * (s - (v * s).mean(1, keepdim=True)) / (s.std(1, keepdim=True) + 1e-4)
    found = GRPO()(rewards, torch.ones(12, 1), 4, weights=w).advantages.view(3, 4)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_each_epoch_shuffles_all_rows_anew_by_the_seed_of_the_step(monkeypatch):
    step = Training.step

    def rows_of(seed):
        seen = []
        monkeypatch.setattr(Training, "step", lambda self, rows, *rest: seen.append(rows) or step(self, rows, *rest))
        stepped(PPO(num_epochs=2, num_minibatches=3), 6, True, seed=seed)
        return [torch.cat(seen[:3]).tolist(), torch.cat(seen[3:]).tolist()]

    first, second = rows_of(0)
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second
    assert rows_of(0) == [first, second] != rows_of(1)


def test_several_epochs_of_minibatches_see_every_row_once_a_pass():
    """With clipping off and a tiny rate, two epochs of three minibatches move as far as two full passes."""
    two = PPO(num_epochs=2, num_minibatches=3, lam=1.0, whiten_advantages=False, clip_range=None, vf_coef=0.0)
    one = PPO(num_epochs=1, num_minibatches=1, lam=1.0, whiten_advantages=False, clip_range=None, vf_coef=0.0)
    far, near = (change(*stepped(e, 6, True, lr=1e-7)[:2]) for e in (two, one))
    assert float((far - 6 * near).norm() / far.norm()) <= 1e-4


@pytest.mark.parametrize("critic", ["value_head", "prefixes"])
def test_a_second_minibatch_knows_that_the_policy_has_moved(critic):
    scores_of_prefixes = normal(6, 4, 1) if critic == "prefixes" else None
    ppo = PPO(critic, num_epochs=1, num_minibatches=2, clip_range=1e-6)
    figures = stepped(ppo, 6, ppo.value_head, lr=1.0, prefix_scores=scores_of_prefixes)[4]
    assert 0.2 < figures["clip_fraction"] < 0.8, "all of the second, none of the first"


def test_the_gradient_norm_is_clipped_at_max_grad_norm():
    before, after, *_ = stepped(RLOO(), 3, max_grad_norm=0.01)
    assert float(change(before, after).norm()) == pytest.approx(LR * 0.01, rel=1e-3)


@pytest.mark.parametrize("minibatches", [1, 3, 4, 5, 7])
def test_an_epoch_has_as_many_steps_as_minibatches_were_asked_for_where_there_are_rows_enough(minibatches):
    *_, steps = stepped(PPO(num_epochs=2, num_minibatches=minibatches), 6, True)
    assert steps == 2 * min(minibatches, 6)
