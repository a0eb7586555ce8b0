"""λ that follows the policy: where it ends for one that can be the target, and for one that goes only part of the way."""

import json
import math

import pytest
import torch

from rlhf_fdiv.targets import DualAscent, Moments, Pointwise, Product, Tilted, solve_moments

P, N, K, ETA = 3, 40, 64, 0.2
GOAL = {"rare": 0.5, "graded": 1.2}


def T(*values):
    return torch.tensor(values, dtype=torch.float64)


def world():
    """log a and two features of 3 prompts with 40 texts each: one that .1 or so of them have, one real-valued."""
    generator = torch.Generator().manual_seed(3)
    log_a = torch.randn(P, N, generator=generator, dtype=torch.float64).log_softmax(1)
    rare = (torch.arange(N) < 4).double().expand(P, N)
    return log_a, {"rare": rare, "graded": 2 * torch.rand(P, N, generator=generator, dtype=torch.float64)}


def exact_lambdas():
    log_a, phi = world()
    goal = T(*GOAL.values())
    return solve_moments(torch.stack([*phi.values()], -1), goal, list(GOAL), base=log_a).lambdas.tolist()


def ascended(follows, lambdas=(0.0, 0.0), steps=500, unit=1.0):
    """The λ of each step, [steps, 2], and the moments of its samples; the policy is a·exp of `follows` of the potential."""
    log_a, phi = world()
    phi = {"rare": phi["rare"], "graded": unit * phi["graded"]}
    goal = {"rare": GOAL["rare"], "graded": unit * GOAL["graded"]}
    start = dict(zip(goal, (lambdas[0], lambdas[1] / unit), strict=True))
    dual = DualAscent(Moments(goal, lambdas=start, dual_learning_rate=ETA))
    generator, path, means = torch.Generator().manual_seed(1), [], []
    for _ in range(steps):
        pi = (log_a + follows * dual.target.potential(phi)).softmax(1)
        drawn = torch.multinomial(pi, K, True, generator=generator)
        scores = {name: x.gather(1, drawn).flatten() for name, x in phi.items()}
        told = dual.step(scores)
        path.append([told["lambda_rare"], told["lambda_graded"]])
        means.append([float(x.mean()) for x in scores.values()])
    return T(*path), T(*means)


def autocorrelated_error(x):
    """The standard error of a mean over steps, from batches of 50 of them."""
    return x.view(-1, 50, x.shape[1]).mean(1).std(0) / (len(x) / 50) ** 0.5


@pytest.mark.parametrize("follows", [1.0, 0.6])
def test_the_policys_own_moments_meet_the_goal_and_lambda_makes_up_for_what_the_policy_cannot(follows):
    path, means = (x[100:] for x in ascended(follows))
    assert ((means.mean(0) - T(*GOAL.values())).abs() <= 4 * autocorrelated_error(means) + 1e-3).all()
    wanted = T(*exact_lambdas()) / follows
    assert wanted.abs().min() > 0.3, "the case is to have something to find"
    assert ((path.mean(0) - wanted).abs() <= 4 * autocorrelated_error(path) + 0.02 * wanted.abs()).all()


def test_without_it_a_policy_that_goes_part_of_the_way_misses_the_goal():
    log_a, phi = world()
    target = Moments(GOAL, lambdas=dict(zip(GOAL, exact_lambdas(), strict=True)))
    dual = DualAscent(target)
    assert dual.step({name: x[0] for name, x in phi.items()}) == {}
    assert dual.target is target
    pi = (log_a + 0.6 * target.potential(phi)).softmax(1)
    assert float((pi * phi["rare"]).sum(1).mean()) < GOAL["rare"] - 0.1


def test_the_unit_of_a_feature_does_not_matter():
    (path, _), (other, _) = ascended(1.0, (1.0, 0.5), 40), ascended(1.0, (1.0, 0.5), 40, unit=1000.0)
    assert torch.allclose(other * T(1, 1000), path, rtol=1e-9)


def test_two_steps_by_hand():
    dual = DualAscent(Moments({"x": 0.5}, lambdas={"x": 2.0}, dual_learning_rate=0.1))
    assert dual.step({"x": T(0, 0, 0, 1)})["lambda_x"] == pytest.approx(2 + 0.1 * 0.25 / 0.25)
    later = dual.step({"x": T(1, 2)})["lambda_x"]  # the mean of (φ − μ̄)² is .25, then 1.25
    assert later == pytest.approx(2.1 - 0.1 * 1.0 / 0.75)
    assert dual.target.lambdas == {"x": later}


def test_the_schedule_scales_the_step():
    steps = []
    for schedule in (1.0, 0.25, 0.0):
        dual = DualAscent(Moments({"x": 0.5}, lambdas={"x": 2.0}, dual_learning_rate=0.1))
        steps.append(dual.step({"x": T(0, 0, 0, 1)}, schedule)["lambda_x"] - 2)
    assert steps == pytest.approx([0.1, 0.025, 0])


def test_where_the_policy_drew_nothing_lambda_stays():
    dual = DualAscent(Moments({"x": 0.5}, lambdas={"x": 2.0}, dual_learning_rate=0.1))
    first = dual.step({"x": T(0, 0, 0, 1)})
    before = dual.state_dict() | {}
    assert dual.step({"x": T()}) == first
    assert dual.state_dict() == before


def test_a_feature_that_is_always_at_its_goal_moves_nothing():
    dual = DualAscent(Moments({"x": 0.5}, lambdas={"x": 2.0}, dual_learning_rate=0.1))
    assert dual.step({"x": T(0.5, 0.5)}) == {"lambda_x": 2.0}


def test_the_other_parts_of_a_product_stay():
    parts = [Tilted(reward="r"), Moments({"x": 0.5}, lambdas={"x": 2.0}, dual_learning_rate=0.1), Pointwise("b")]
    dual = DualAscent(Product(parts))
    dual.step({"x": T(0.0, 0.0), "r": T(1, 2), "b": T(1, 1)})
    assert dual.target.of[0] == parts[0]
    assert dual.target.of[2] == parts[2]
    assert dual.target.of[1].lambdas["x"] == pytest.approx(2 + 0.1 * 0.5 / 0.25)


@pytest.mark.parametrize("target", [Tilted(), Product([Tilted(), Pointwise("b")])])
def test_a_target_without_moments_is_left_alone(target):
    dual = DualAscent(target)
    assert dual.step({"reward": T(1.0)}) == {}
    assert dual.target is target


def test_its_state_goes_through_json():
    target = Moments({"x": 0.5}, lambdas={"x": 2.0}, dual_learning_rate=0.1)
    one, other = DualAscent(target), DualAscent(target)
    one.step({"x": T(0.0, 1.0, 3.0)})
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.target == one.target != target
    assert one.step({"x": T(1.0, 0.0)}) == other.step({"x": T(1.0, 0.0)})
    assert math.isfinite(one.target.lambdas["x"])
