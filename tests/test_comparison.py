"""Runs side by side: statistics against brute force, matching of pairs, and what a report of real cells holds."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ablation import POLICY, make  # noqa: F401
from tiny import problems

from rlhf_fdiv import comparison
from rlhf_fdiv.comparison import compare, summarise


def table(effect=0.0, seeds=8, fs=("js", "tv"), betas=(0.5, 1.0), noise=0.1):
    """Runs whose metric is shared by seed and β, plus noise, plus `effect` for js; each f with a learning rate of its own."""
    random = np.random.default_rng(0)
    rows = []
    for seed, beta in itertools.product(range(seeds), betas):
        common = 5 * random.normal()
        rows += [
            {"config.divergence": f, "config.target.beta": beta, "config.seed": seed, "config.policy.learning_rate": i,
             "policy.objective": common + noise * random.normal() + effect * (f == "js")}
            for i, f in enumerate(fs)
        ]  # fmt: skip
    return pd.DataFrame(rows).sample(frac=1, random_state=1)


KEYS, PAIR = ["divergence", "target.beta", "seed"], [("js", "tv")]


def test_a_pair_is_matched_by_seed_and_setting_so_that_what_they_share_drops_out():
    (claim,) = compare(table(effect=0.5), KEYS, "divergence", PAIR, "policy.objective")
    assert claim.seeds == 8
    assert claim.low < 0.5 < claim.high
    assert claim.high - claim.low < 0.5, "unpaired, the interval would be several units wide"
    assert claim.p == pytest.approx(2 / 2**8), "all signs agree"
    assert claim.sentence.startswith("js has a higher policy.objective than tv: +0.4")


def test_where_nothing_differs_no_difference_is_shown():
    (claim,) = compare(table(), KEYS, "divergence", PAIR, "policy.objective")
    assert claim.p > 0.05
    assert claim.sentence.startswith("No difference shown between js and tv")


@pytest.mark.parametrize(("seeds", "pairs", "can"), [(5, 1, False), (6, 1, True), (6, 2, False), (7, 2, True)])
def test_a_test_that_cannot_reject_is_not_made(seeds, pairs, can):
    """2/2^5 = .0625; with six seeds .031, which Holm's first step over two pairs does not allow."""
    data = table(effect=9.0, seeds=seeds, fs=("js", "tv", "alpha"))
    claims = compare(data, KEYS, "divergence", [("js", "tv"), ("js", "alpha")][:pairs], "policy.objective")
    for claim in claims:
        assert math.isnan(claim.p) != can
        assert ("too few seeds" in claim.sentence) != can
        assert 8 < claim.difference < 10


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.floats(-3, 3).filter(lambda x: abs(x) > 1e-3), min_size=6, max_size=9))
def test_the_sign_flip_test_is_exact(differences):
    differences = np.array(differences)
    signs = np.array(list(itertools.product([-1, 1], repeat=len(differences))))
    means = (signs * differences).mean(1)
    tail = min((means >= differences.mean() - 1e-12).mean(), (means <= differences.mean() + 1e-12).mean())
    assert comparison._sign_flip(differences, 1) == pytest.approx(min(1, 2 * tail))


def test_holm_by_hand():
    assert comparison._holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert comparison._holm([0.02, math.nan]) == pytest.approx([0.04, math.nan], nan_ok=True)


def test_the_interquartile_mean_ignores_the_outer_quarters():
    found = summarise(np.array([-1e6, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1e6]))
    assert found.iqm == pytest.approx(3.5)
    assert found.low < 3.5 < found.high
    assert found.seeds == 8


def test_the_interval_covers_what_it_says():
    """A nominal 95 % percentile interval of 12 seeds; known to be somewhat too narrow for so few."""
    random = np.random.default_rng(3)
    covered = [s.low <= 0 <= s.high for s in (summarise(random.normal(size=12)) for _ in range(200))]
    assert 0.84 <= np.mean(covered) <= 0.99


@pytest.mark.parametrize("values", [[1.0, 2.0], [2.0, 2.0, 2.0], [], [math.nan, 1.0]])
def test_without_spread_or_seeds_there_is_no_interval(values):
    found = summarise(np.array(values))
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert math.isnan(found.iqm) == (not np.isfinite(values).any())


def test_a_wrong_name_is_told_with_the_right_one():
    assert "did you mean 'js'" in problems(compare, table(), KEYS, "divergence", [("jss", "tv")], "policy.objective")[0]
    assert (
        "did you mean 'policy.objective'" in problems(compare, table(), KEYS, "divergence", PAIR, "policy.objectiv")[0]
    )


def test_the_report_of_cells_that_ran(make, tmp_path, call):  # noqa: F811
    grid = {"divergence": ["js", {"name": "alpha", "alpha": 0.3}], "target.beta": [0.5, 2.0], "seed": [0, 1, 2]}
    path = make(
        POLICY, grid=grid, compare=[["js", "alpha(alpha=0.3)"]], report=["policy.objective", "policy.kl_reference"]
    )
    code, _, err = call("report", str(path))
    assert code == 2
    assert "no finished cell; run rlhf-fdiv ablate" in err
    assert call("ablate", str(path))[0] == 0
    code, out, err = call("report", str(path))
    assert code == 0, err
    folder = tmp_path / "runs" / "ab" / "comparison"
    assert out.strip() == f"comparison: {folder / 'comparison.md'}"
    results = pd.read_csv(folder / "results.csv")
    assert len(results) == 12
    assert set(results["config.divergence"]) == {"js", "alpha(alpha=0.3)"}
    assert (results["samples"] == 2 * 4 * 4).all()
    text = (folder / "comparison.md").read_text()
    assert "12 runs, 384 samples" in text
    assert "Curvature normalisation off" in text
    assert text.count("3 seeds); too few seeds for a test to reject.") == 2
    setting = results[(results["config.divergence"] == "js") & (results["config.target.beta"] == 2.0)]
    row, other = [line.split(" | ") for line in text.splitlines() if line.startswith("| js | 2 |")]
    assert float(other[2]) == pytest.approx(summarise(setting["policy.kl_reference"].to_numpy()).iqm, rel=1e-3)
    assert float(row[2]) == pytest.approx(summarise(setting["policy.objective"].to_numpy()).iqm, rel=1e-3)
    assert float(row[6]) == pytest.approx(setting["policy.kl_reference"].mean(), rel=1e-3)
    assert (folder / "results.tex").read_text().count("\\\\") == 2 * 5
    assert (folder / "frontier.png").is_file()
    assert (folder / "frontier.pdf").is_file()


def test_cells_that_have_not_run_are_named(make, tmp_path, call):  # noqa: F811
    path = make(POLICY, grid={"divergence": ["js", "tv"]})
    tiny.run(call("ablate", str(path), "--print-commands")[1].splitlines()[0].split()[-1])
    assert call("report", str(path))[0] == 0
    assert "No finished run: tv." in (tmp_path / "runs" / "ab" / "comparison" / "comparison.md").read_text()
