"""What inference alone buys: quasi-rejection and best of n, against sums over every text and against a sampler."""

import itertools
import json
import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import N, P, exact_log_probs, language, scores

from rlhf_fdiv.metrics import best_of_n_kl, inference_baselines, quasi_rejection

CAPS = (0.2, 0.5, 0.8, 1.0)  # quantiles of the potential


def target(beta=0.2):
    """log a and a potential of every text of the toy language, [P, N] each."""
    _, reference = language()
    with torch.no_grad():
        return exact_log_probs(reference), scores()["reward"].view(P, N) / beta


@pytest.mark.parametrize("quantile", CAPS)
def test_the_figures_are_those_of_the_distribution_that_is_sampled(quantile):
    log_a, potential = target()
    log_b = potential[0].quantile(quantile)
    length = scores()["has_1"].view(P, N)
    found = quasi_rejection(log_a, potential, log_b, {"has_1": length})
    for x in range(P):
        a, w, b = log_a[x].exp(), potential[x].exp(), log_b.exp()
        kept = a * (w / b).clamp(max=1)
        p, p_b = a * w / (a * w).sum(), kept / kept.sum()
        known = {
            "acceptance": kept.sum(),
            "kl_reference": (p_b * (p_b / a).log()).sum(),
            "tv": (p - p_b).abs().sum() / 2,
            "tv_bound": 1 - b * kept.sum() / (a * w).sum(),
            "kl_target": (p_b * (p_b / p).log()).sum(),
            "kl_bound": ((a * w).sum() / (b * kept.sum())).log(),
            "value": (p_b * (potential[x] - (p_b / a).log())).sum(),
            "has_1": (p_b * length[x]).sum(),
        }
        assert found.keys() == known.keys()
        for name, value in known.items():
            assert float(found[name][x]) == pytest.approx(float(value), abs=1e-9), name


def test_a_sampler_that_accepts_so_draws_from_it():
    log_a, potential = (x[1] for x in target())
    log_b, draws, generator = potential.quantile(0.6), 400_000, torch.Generator().manual_seed(0)
    text = torch.multinomial(log_a.exp(), draws, True, generator=generator)
    accepted = text[torch.rand(draws, generator=generator) < (potential[text] - log_b).exp()]
    found = quasi_rejection(log_a, potential, log_b, {"has_1": (has_1 := scores()["has_1"].view(P, N)[1])})
    rate, share = float(found["acceptance"]), float(found["has_1"])
    assert len(accepted) / draws == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / draws))
    error = math.sqrt(share * (1 - share) / len(accepted))
    assert float(has_1[accepted].mean()) == pytest.approx(share, abs=4 * error)


distributions = st.lists(
    st.tuples(st.floats(0.01, 1), st.one_of(st.floats(-30, 30), st.just(-math.inf))), min_size=2, max_size=12
).filter(lambda rows: any(v > -math.inf for _, v in rows))


@settings(deadline=None)
@given(distributions, st.floats(-32, 32), st.floats(0, 5))
def test_the_bounds_hold_and_tighten_as_b_grows(rows, log_b, more):
    weights, potential = torch.tensor(rows, dtype=torch.float64).T
    log_a = weights.log().log_softmax(0)
    found, later = (
        quasi_rejection(log_a, potential, torch.tensor(b, dtype=torch.float64), {}) for b in (log_b, log_b + more)
    )
    above = float((log_a + potential).softmax(0)[potential > log_b].sum())
    small = 1e-9
    assert 0 <= found["tv"] <= found["tv_bound"] + small
    assert found["tv_bound"] <= above + small
    assert -small <= found["kl_target"] <= found["kl_bound"] + small
    assert later["tv_bound"] <= found["tv_bound"] + small
    assert later["acceptance"] <= found["acceptance"] + small <= 1 + 2 * small
    assert later["value"] >= found["value"] - 1e-7, "nearer to p is never a worse objective"
    if log_b >= potential.max():
        assert found["tv"] <= small


def test_where_nothing_is_accepted_nothing_is_said():
    potential = torch.tensor([-math.inf, -math.inf, 0.0]).double()
    log_a = torch.tensor([0.5, 0.5, 0.0]).double().log()
    found = quasi_rejection(log_a, potential, torch.tensor(0.0).double(), {"reward": torch.ones(3)})
    assert found["acceptance"] == 0
    assert all(math.isnan(found[name]) for name in ("kl_reference", "tv", "value", "reward"))


def sampled(towards, k, prompts, beta, seed=0):
    """log a/μ, potential and scores of k samples of a and k of a·e^(towards·potential), for copies of the first prompt."""
    log_a, potential = (x[0] for x in target(beta))
    log_pi = (log_a + towards * potential).log_softmax(0)
    generator = torch.Generator().manual_seed(seed)
    text = torch.cat(
        [torch.multinomial(x.exp(), prompts * k, True, generator=generator).view(prompts, k) for x in (log_a, log_pi)],
        1,
    )
    log_weights = log_a[text] - torch.logaddexp(log_a[text], log_pi[text]) + math.log(2)
    return log_weights, potential[text], {"has_1": scores()["has_1"].view(P, N)[0][text]}


@pytest.mark.parametrize(("towards", "k", "beta"), [(0.5, 16, 0.2), (1.0, 16, 0.2), (0.5, 4, 0.5), (0.0, 64, 0.5)])
def test_estimates_from_samples_are_within_their_errors(towards, k, beta):
    """Of every row that is given: four standard errors, which at these sizes leave no room for the bias of a plug-in."""
    log_a, potential = (x[:1] for x in target(beta))
    has_1 = scores()["has_1"].view(P, N)[:1]
    rows = [r for r in inference_baselines(*sampled(towards, k, 200, beta), k, beta) if "log_b" in r]
    assert len(rows) >= 2
    for row in rows:
        known = quasi_rejection(log_a, potential, torch.tensor(row["log_b"], dtype=torch.float64), {"has_1": has_1})
        known["objective"] = beta * known.pop("value")
        assert row["samples"] == pytest.approx(1 / row["acceptance"])
        for name, value in known.items():
            if math.isfinite(row[name]):
                assert row[name] == pytest.approx(float(value), abs=4 * row[f"{name}_se"] + 1e-9), (row["method"], name)


def test_what_the_samples_cannot_support_is_left_out():
    """A target far from a that no policy has come near to: its tail is not in the samples, nor are the distances to it."""
    rows = [r for r in inference_baselines(*sampled(0.0, 4, 50, 0.1), 4, 0.1) if "log_b" in r]
    known = target(0.1)[1][0].max()
    assert rows, "cutting at a low b is within reach"
    assert all(row["log_b"] < known / 2 for row in rows)
    assert all(math.isnan(row[name]) for row in rows for name in ("tv", "tv_bound", "kl_target", "kl_bound_se"))
    assert all(math.isfinite(row["objective"]) for row in rows)


def test_best_of_n_stands_beside_it():
    log_weights, potential, values = sampled(0.5, 4, 30, 0.5)
    two, four = inference_baselines(log_weights, potential, values, 4, 0.5)[:2]
    assert (two["method"], four["method"], four["samples"]) == ("best of 2", "best of 4", 4)
    best = [max(p[i, :4].tolist()) for p in (potential,) for i in range(30)]
    assert four["objective"] == pytest.approx(0.5 * (sum(best) / 30 - best_of_n_kl(4)))
    pairs = [max(pair) for row in potential[:, :4].tolist() for pair in itertools.combinations(row, 2)]
    assert two["objective"] == pytest.approx(0.5 * (sum(pairs) / len(pairs) - best_of_n_kl(2)))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_atoms_of_zero_are_no_obstacle(share):
    log_weights, potential, values = sampled(0.5, 8, 20, 0.5)
    inside = torch.rand(potential.shape, generator=torch.Generator().manual_seed(1)) < share
    rows = inference_baselines(log_weights, torch.where(inside, potential, -math.inf), values, 8, 0.5)
    quasi = [row for row in rows if "log_b" in row]
    assert bool(quasi) == (share > 0)
    assert all(math.isfinite(row["objective"]) and math.isfinite(row["has_1"]) for row in quasi)


@pytest.mark.slow
def test_the_report_puts_the_policy_beside_them(start, data, tmp_path):
    raw = tiny.raw_config(start, data, tmp_path / "runs") | {"stages": ["policy", "evaluate"], "report_to": "none"}
    raw["scorers"] = {"praise": {"name": "pattern", "pattern": tiny.PATTERN}}
    raw["target"] = {"name": "tilted", "reward": "praise", "beta": 0.5}
    raw["policy"]["model"], raw["evaluate"]["num_generations"] = start, 8
    folder = tiny.run(tiny.write_config(tmp_path / "run.yaml", raw)).path
    report = json.loads((folder / "evaluate" / "metrics.json").read_text())
    rows = {row["method"]: row for row in report["inference"]}
    assert {"best of 2", "best of 4", "best of 8"} < rows.keys()
    assert rows["best of 8"]["praise"] >= rows["best of 2"]["praise"] >= report["sft"]["praise"]
    top = max((row for row in rows.values() if "log_b" in row), key=lambda row: row["log_b"])
    assert top["log_b"] == pytest.approx(2.0), "1/β where the pattern is found"
    assert top["objective"] >= report["policy"]["objective"] - 4 * top["objective_se"]
    text = (folder / "report.md").read_text()
    section = text.partition("## What training buys")[2].partition("\n## ")[0]
    assert [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| ")][2:] == [
        f"| {name}" for name in ("reference", "trained", *rows)
    ]
    assert "nan" not in section
