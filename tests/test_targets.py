"""Targets: λ of moment constraints against scipy on the same dual, log Z against the exact one, potentials by hand."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special
from toy import INF, N, P, everything, exact_log_probs, language, scores

from rlhf_fdiv.targets import (
    LogPartition,
    Moments,
    Pointwise,
    Product,
    Tilted,
    effective_sample_size,
    extrapolated,
    solve,
    solve_moments,
    unsolved,
    with_lambdas,
)

quick = settings(max_examples=50, deadline=None, derandomize=True)


def T(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def binary(*rates, k=1000):
    """One feature [P, K, 1], 1 for exactly the given share of each prompt's samples."""
    return torch.stack([(torch.arange(k) < round(rate * k)).double() for rate in rates])[..., None]


# -- moments -----------------------------------------------------------------------------------------------------------


def reached_with(phi, lambdas, base=0.0):
    """mean_x E_p[φ|x] with a Z for each prompt, in numpy."""
    weights = special.softmax(phi.numpy() @ np.asarray(lambdas) + np.asarray(base), 1)
    return np.einsum("pk,pki->i", weights, phi.numpy()) / len(phi)


def test_one_z_a_prompt_reaches_the_goal_where_pooled_samples_miss_it():
    phi = binary(0.02, 0.5)
    solution = solve_moments(phi, T(0.5), ["x"])
    assert reached_with(phi, solution.lambdas) == pytest.approx([0.5], abs=1e-8)
    assert solution.reached.tolist() == pytest.approx([0.5], abs=1e-8)
    assert solution.reference.tolist() == pytest.approx([0.26])
    pooled = solve_moments(phi.reshape(1, -1, 1), T(0.5), ["x"])
    assert pooled.reached.tolist() == pytest.approx([0.5], abs=1e-8), "in its own, wrong, view it has arrived"
    assert reached_with(phi, pooled.lambdas) == pytest.approx([0.397], abs=5e-4)


def test_a_single_binary_moment_has_the_closed_form_logit_difference():
    solution = solve_moments(binary(0.1), T(0.7), ["x"])
    assert solution.lambdas.tolist() == pytest.approx([special.logit(0.7) - special.logit(0.1)], abs=1e-8)
    assert solution.log_z.tolist() == pytest.approx([math.log(0.9 + 0.1 * math.exp(solution.lambdas[0]))], abs=1e-8)


def features(seed, prompts=5, k=400):
    """Two binary and two real features, correlated, with base rates that differ between prompts."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(prompts, k, 4)) @ rng.normal(size=(4, 4)) + rng.normal(size=(prompts, 1, 4))
    return torch.from_numpy(np.concatenate([z[..., :2] > 0.5, z[..., 2:]], -1))


@pytest.mark.parametrize("seed", range(4))
def test_several_binary_and_real_moments_are_those_of_scipy_on_the_same_dual(seed):
    phi = features(seed)
    base = 0.5 * torch.randn(phi.shape[:2], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    goal = torch.from_numpy(reached_with(phi, [0.8, -0.6, 0.3, -0.2], base))  # reachable by construction
    solution = solve_moments(phi, goal, list("abcd"), base)

    def dual(lambdas):
        return special.logsumexp(base.numpy() + phi.numpy() @ lambdas, 1).mean() - lambdas @ goal.numpy()

    oracle = optimize.minimize(dual, np.zeros(4), method="BFGS", options={"gtol": 1e-9})
    assert solution.lambdas.numpy() == pytest.approx(oracle.x, abs=1e-4)
    assert solution.lambdas.numpy() == pytest.approx([0.8, -0.6, 0.3, -0.2], abs=1e-6)
    assert dual(solution.lambdas.numpy()) <= oracle.fun + 1e-12
    assert reached_with(phi, solution.lambdas, base) == pytest.approx(goal.numpy(), abs=1e-8)
    assert solution.reference.numpy() == pytest.approx(reached_with(phi, np.zeros(4), base), abs=1e-12)
    log_weights = base + phi @ solution.lambdas
    assert torch.allclose(solution.log_z, torch.logsumexp(log_weights, 1) - math.log(phi.shape[1]), atol=1e-12)
    assert solution.ess == pytest.approx(float(effective_sample_size(log_weights).sum()))
    assert solution.residual <= 1e-8


@pytest.mark.parametrize("seed", range(4))
def test_the_scale_and_the_origin_of_a_feature_only_rescale_its_lambda(seed):
    """A share of .01 beside a length of 100 characters is an ordinary config."""
    phi, scale, shift = features(seed), T(1.0, 1e-2, 1e2, 10.0), T(0.0, 1.0, -400.0, 100.0)
    lambdas = T(0.8, -0.6, 0.3, -0.2)
    goal = torch.from_numpy(reached_with(phi, lambdas))
    moved = solve_moments(phi * scale + shift, goal * scale + shift, list("abcd"))
    assert torch.allclose(moved.lambdas * scale, lambdas, rtol=0, atol=1e-4)


def test_a_moment_that_the_reference_already_has_needs_no_tilt():
    solution = solve_moments(binary(0.2, 0.4), T(0.3), ["x"])
    assert solution.lambdas.abs().max() <= 1e-8
    assert solution.ess == pytest.approx(2000)


@pytest.mark.parametrize(("goal", "shown"), [(0.6, "0.6"), (0.0, "0 "), (1.0, "1 "), (-2.0, "-2")])
def test_a_goal_outside_the_hull_is_refused_with_the_reachable_range(goal, shown):
    """One prompt never shows the feature, so its mean over both prompts stays below ½."""
    with pytest.raises(ValueError, match=r"\(0, 0\.5\)") as error:
        solve_moments(binary(0.0, 0.3), T(goal), ["funny"])
    assert f"funny = {shown}" in str(error.value)


def test_goals_that_are_reachable_alone_but_not_together_are_refused_by_name():
    one = binary(0.3, 0.4)
    exclusive = torch.cat([one, 1 - one], -1)
    with pytest.raises(ValueError, match="together") as error:
        solve_moments(exclusive, T(0.7, 0.7), ["good", "bad"])
    assert "good = 0.7" in str(error.value)
    assert "bad = 0.7" in str(error.value)


def test_goals_on_the_edge_of_the_hull_are_refused_not_chased_to_infinity():
    a, b = binary(0.5, 0.5), binary(0.2, 0.2)  # b implies a
    with pytest.raises(ValueError, match="together"):
        solve_moments(torch.cat([a, b], -1), T(0.6, 0.7), ["a", "b"])


def test_a_feature_named_twice_is_no_problem():
    phi = binary(0.1, 0.4)
    twice = solve_moments(torch.cat([phi, phi], -1), T(0.5, 0.5), ["a", "b"])
    assert reached_with(phi, [float(twice.lambdas.sum())]) == pytest.approx([0.5], abs=1e-7)


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_a_feature_that_is_not_a_number_is_refused(bad):
    phi = binary(0.5)
    phi[0, 3] = bad
    with pytest.raises(ValueError, match="nan or infinite"):
        solve_moments(phi, T(0.5), ["x"])


def test_with_a_pointwise_part_only_texts_of_the_target_count_as_reachable():
    """Every sample with φ = 1 has b = 0, so under a·b the feature never occurs: no λ can reach .5."""
    phi = binary(0.5, 0.5)
    base = torch.where(phi[..., 0] == 1, -INF, 0.0)
    with pytest.raises(ValueError, match="x"):
        solve_moments(phi, T(0.5), ["x"], base)


def test_a_prompt_whose_samples_all_have_zero_weight_is_named_not_reported_as_nan():
    phi = binary(0.5, 0.5)
    base = torch.zeros(2, 1000).double()
    base[1] = -INF
    with pytest.raises(ValueError, match="moments: ") as error:
        solve_moments(phi, T(0.5), ["x"], base)
    assert "nan" not in str(error.value)


def test_solve_fills_the_lambdas_of_the_moments_part_and_leaves_the_others():
    table = {"x": binary(0.1, 0.3)[..., 0], "r": torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))}
    target = Product([Tilted(beta=2.0, reward="r"), Moments({"x": 0.5})])
    assert unsolved(target) == Moments({"x": 0.5})
    solved, solution = solve(target, table)
    assert unsolved(solved) is None
    assert solved.of[0] is target.of[0]
    assert solved.of[1].lambdas == {"x": pytest.approx(float(solution.lambdas[0]))}
    log_weights = solved.potential(table).double()
    reached = (torch.softmax(log_weights, 1) * table["x"]).sum(1).mean()
    assert float(reached) == pytest.approx(0.5, abs=1e-6), "the moments hold under the product, tilt included"
    assert solve(solved, table) == (solved, None)
    assert solve(Tilted(), {}) == (Tilted(), None)
    alone, _ = solve(Moments({"x": 0.5}), table)
    assert alone == with_lambdas(Moments({"x": 0.5}), alone.lambdas)


def test_a_product_within_a_product_has_its_moments_solved_too():
    nested = Product([Tilted(reward="r"), Product([Pointwise("b", floor=0.1), Moments({"x": 0.5})])])
    assert unsolved(nested) == Moments({"x": 0.5})


def test_two_moments_parts_are_refused_for_they_share_one_lambda():
    table = {"x": binary(0.1)[..., 0], "y": binary(0.2)[..., 0]}
    with pytest.raises(ValueError, match="one `moments`"):
        solve(Product([Moments({"x": 0.5}), Moments({"y": 0.5})]), table)


def test_moments_check_their_own_fields():
    with pytest.raises(ValueError, match="at least one"):
        Moments({})
    with pytest.raises(ValueError, match=r"keys.*: a"):
        Moments({"a": 0.5}, lambdas={"b": 1.0})
    with pytest.raises(ValueError, match="not solved"):
        Moments({"a": 0.5}).potential({"a": T(0.0)})


# -- log Z -------------------------------------------------------------------------------------------------------------


def test_importance_sampling_on_the_policys_own_completions_is_unbiased_for_z():
    policy, reference = language()
    with torch.no_grad():
        log_pi, log_a = exact_log_probs(policy), exact_log_probs(reference)
    log_target = log_a + scores()["reward"].view(P, N)
    exact = torch.logsumexp(log_target, 1).exp()
    generator, repeats, k = torch.Generator().manual_seed(3), 20_000, 4
    y = torch.multinomial(log_pi.exp(), repeats * k, replacement=True, generator=generator)
    log_weights = (log_target - log_pi).gather(1, y).view(P, repeats, k)
    estimates = torch.stack([LogPartition().update([0, 1, 2], log_weights[:, i]) for i in range(repeats)]).exp()
    error = estimates.std(0) / repeats**0.5
    assert ((estimates.mean(0) - exact).abs() < 4 * error).all()
    running = LogPartition(horizon=repeats)
    for i in range(2000):
        last = running.update([0, 1, 2], log_weights[:, i])
    assert torch.allclose(last.exp(), estimates[:2000].mean(0), rtol=1e-9)
    assert len(everything()) == log_pi.numel()


@quick
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.integers(1, 5))
def test_the_running_estimate_is_a_plain_mean_up_to_the_horizon_and_exponential_after(values, horizon):
    running, mean = LogPartition(horizon), 0.0
    for n, value in enumerate(values, 1):
        rate = max(1 / n, 1 / horizon)
        mean = (1 - rate) * mean + rate * math.exp(value)
        found = running.update([7], T([value, value]))
        assert float(found) == pytest.approx(math.log(mean), abs=1e-9)


def test_a_batch_estimate_is_the_log_of_the_mean_weight_of_each_prompt_and_prompts_do_not_mix():
    running = LogPartition()
    running.update([5, 9], T([0.0, math.log(3)], [1.0, 1.0]))
    again = running.update([9, 4], T([math.log(2), math.log(2)], [-1.0, -1.0]))
    assert again.tolist() == pytest.approx([math.log((math.e + 2) / 2), -1.0])
    assert running.update([5], T([math.log(2)] * 2)).tolist() == pytest.approx([math.log(2)])


def test_a_prompt_twice_in_a_batch_counts_twice():
    running = LogPartition()
    assert running.update([1, 1], T([0.0], [math.log(3)])).tolist() == pytest.approx([math.log(2)] * 2)


def test_weights_of_zero_count_as_zero_and_an_all_zero_prompt_recovers():
    running = LogPartition()
    assert running.update([1], T([-INF, -INF])).tolist() == [-INF]
    assert running.update([1], T([-INF, 0.0])).tolist() == pytest.approx([math.log(0.25)])
    assert running.update([1], T([-INF, -INF])).tolist() == pytest.approx([math.log(0.5 / 3)])


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_log_weights_far_from_zero_neither_overflow_nor_vanish(shift):
    near, far = LogPartition(), LogPartition()
    for seed in range(4):
        w = torch.randn(1, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        expected, found = near.update([0], w), far.update([0], w + shift)
        assert torch.allclose(found, expected + shift, rtol=0, atol=1e-9)
    assert torch.allclose(effective_sample_size(w + shift), effective_sample_size(w), rtol=1e-9)


def test_the_state_survives_json_exactly_zero_estimates_included():
    running = LogPartition(horizon=3)
    for i in range(5):
        running.update([0, 12, 5], T([0.1 * i, -1.0], [1 / 3, i], [-INF, -INF]))
    restored = LogPartition(horizon=3)
    restored.load_state_dict(json.loads(json.dumps(running.state_dict())))
    assert restored.state_dict() == running.state_dict()
    batch = T([0.3, 0.4], [1.0, 2.0], [0.0, -1.0])
    assert torch.equal(restored.update([0, 12, 5], batch), running.update([0, 12, 5], batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_effective_sample_size_is_k_for_equal_weights_1_for_one_and_0_for_none(dtype):
    for log_weights, expected in [
        ([2.0] * 8, 8.0),
        ([0.0, *[-INF] * 7], 1.0),
        ([0.0, *[-200.0] * 7], 1.0),
        ([1.0, 1.0, *[-INF] * 6], 2.0),
        ([-INF] * 8, 0.0),
    ]:
        assert float(effective_sample_size(torch.tensor(log_weights, dtype=dtype))) == pytest.approx(expected)


@quick
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20), st.floats(-500, 500))
def test_the_effective_sample_size_lies_between_1_and_k_and_ignores_the_scale_of_weights(values, shift):
    w = T(*values)
    ess = float(effective_sample_size(w))
    assert 1 - 1e-9 <= ess <= len(values) + 1e-9
    assert float(effective_sample_size(w + shift)) == pytest.approx(ess, rel=1e-6)


# -- potentials --------------------------------------------------------------------------------------------------------


def test_tilted_is_the_reward_over_beta():
    assert Tilted(beta=0.5, reward="r").potential({"r": T(1.0, -2.0)}).tolist() == [2.0, -4.0]
    assert Tilted(reward="r").scorers == ("r",)
    for beta in (0, -1, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            Tilted(beta=beta)


def test_pointwise_is_log_b_with_real_zeros():
    target = Pointwise("b")
    assert target.has_zeros
    assert target.potential({"b": T(1.0, 0.5, 0.0)}).tolist() == pytest.approx([0.0, math.log(0.5), -INF])


def test_a_floor_replaces_small_b_and_leaves_no_zeros():
    target = Pointwise("b", floor=0.1)
    assert not target.has_zeros
    expected = [0.0, math.log(0.5), math.log(0.1), math.log(0.1)]
    assert target.potential({"b": T(1.0, 0.5, 0.05, 0.0)}).tolist() == pytest.approx(expected)
    for floor in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            Pointwise("b", floor=floor)


@pytest.mark.parametrize("bad", [-0.01, 1.5])
def test_b_outside_0_and_1_is_refused_with_the_scorer_and_the_value(bad):
    with pytest.raises(ValueError, match=rf"'good'.*{bad:g}"):
        Pointwise("good").potential({"good": T(0.5, bad)})


def test_a_product_adds_potentials_and_a_zero_in_any_part_is_a_zero():
    target = Product([Tilted(beta=0.5, reward="r"), Pointwise("b"), Moments({"x": 0.5}, lambdas={"x": 2.0})])
    table = {"r": T(1.0, 1.0), "b": T(0.5, 0.0), "x": T(1.0, 3.0)}
    assert target.potential(table).tolist() == pytest.approx([2 + math.log(0.5) + 2, -INF])
    assert target.scorers == ("r", "b", "x")
    assert target.has_zeros
    assert not Product([Tilted(), Pointwise("b", floor=0.5)]).has_zeros
    with pytest.raises(ValueError, match="at least one"):
        Product([])


def test_a_scorer_shared_by_two_parts_is_asked_once():
    assert Product([Tilted(reward="r"), Tilted(beta=1.0, reward="r"), Pointwise("b", 0.1)]).scorers == ("r", "b")


# -- the bias of few samples a prompt ----------------------------------------------------------------------------------


def test_lambda_of_a_rare_feature_is_biased_by_few_samples_and_extrapolation_takes_that_off():
    """Base rate 1/15, goal 1/2: λ = ln 14. Over 60 draws of 32 prompts × 64 samples, plain and extrapolated."""
    generator, truth = torch.Generator().manual_seed(5), math.log(14)
    goal, found = T(0.5), []
    for _ in range(60):
        phi = (torch.rand(32, 64, 1, generator=generator, dtype=torch.float64) < 1 / 15).double()
        plain = solve_moments(phi, goal, ["rare"])
        better = extrapolated(plain, phi, goal, ["rare"])
        assert float(better.lambdas + better.bias.nan_to_num()) == pytest.approx(float(plain.lambdas))
        assert torch.allclose(better.log_z, torch.logsumexp(phi @ better.lambdas, 1) - math.log(64))
        found.append([float(plain.lambdas), float(better.lambdas)])
    mean, error = torch.tensor(found).mean(0), torch.tensor(found).std(0) / 60**0.5
    assert mean[0] - truth > 4 * error[0], "else this test shows nothing"
    assert abs(mean[1] - truth) < 0.3 * (mean[0] - truth) + 3 * error[1]


def test_a_half_that_cannot_reach_the_goal_leaves_lambda_as_it_is_and_its_bias_unknown():
    phi = torch.zeros(2, 4, 1, dtype=torch.float64)
    phi[:, 0] = 1.0
    plain = solve_moments(phi, T(0.5), ["rare"])
    same = extrapolated(plain, phi, T(0.5), ["rare"])
    assert same.lambdas == plain.lambdas
    assert same.bias.isnan().all()
