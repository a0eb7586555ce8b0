"""Runs side by side: statistics against brute force, matching of pairs, and what a report of real cells holds."""

import html
import itertools
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from playwright.sync_api import sync_playwright
from scipy import integrate
from test_ablation import POLICY, make  # noqa: F401
from tiny import problems

import rlhf_fdiv
import rlhf_fdiv.ablation
from rlhf_fdiv import comparison
from rlhf_fdiv.comparison import compare, summarise, training_curves
from rlhf_fdiv.metrics import best_of_n, best_of_n_kl
from rlhf_fdiv.report import markdown_table, plain


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


def test_a_grid_over_one_field_of_an_f_has_a_setting_for_each_value():
    runs = table().assign(
        **{"config.divergence": lambda x: x["config.divergence"].map({"js": "alpha(.3)", "tv": "alpha(.5)"})}
    )
    keys = ["divergence.alpha", "target.beta", "seed"]
    assert comparison.setting_columns(runs, keys) == ["config.divergence", "config.target.beta"]
    assert set(comparison.with_settings(runs, keys)["divergence"]) == {"alpha(.3)", "alpha(.5)"}


def test_best_of_n_counts_each_runs_own_generations(tmp_path):
    runs = []
    for seed, k in enumerate((4, 6)):
        (tmp_path / f"{seed}" / "evaluate").mkdir(parents=True)
        samples = {"sft": ["a"] * 3 * k, "sft_reward": torch.arange(3.0 * k).numpy(), "policy_reward": [0.0] * 3 * k}
        pd.DataFrame(samples).drop(columns="sft").to_parquet(tmp_path / f"{seed}" / "evaluate" / "samples.parquet")
        runs.append({"run": str(tmp_path / f"{seed}"), "config.seed": seed, "config.evaluate.num_generations": k})
    curve = comparison.best_of_n_curve(pd.DataFrame(runs), "reward").set_index("n")["reward"]
    assert curve[1] == pytest.approx((5.5 + 8.5) / 2)
    assert curve[4] > curve[2] > curve[1]


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


@pytest.mark.slow
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
    assert out.strip() == f"report: {folder / 'report.html'}"
    results = pd.read_csv(folder / "results.csv")
    assert len(results) == 12
    assert set(results["config.divergence"]) == {"js", "alpha(alpha=0.3)"}
    assert (results["samples"] == 2 * 4 * 4).all()
    text = (folder / "report.md").read_text()
    assert "12 runs, 384 samples" in text
    assert "Curvature normalisation off" in text
    assert text.count("3 seeds); too few seeds for a test to reject.") == 2
    setting = results[(results["config.divergence"] == "js") & (results["config.target.beta"] == 2.0)]
    row, other = [line.split(" | ") for line in text.splitlines() if line.startswith("| js | 2 |")]
    assert float(other[2]) == pytest.approx(summarise(setting["policy.kl_reference"].to_numpy()).iqm, rel=1e-3)
    assert float(row[2]) == pytest.approx(summarise(setting["policy.objective"].to_numpy()).iqm, rel=1e-3)
    assert float(row[6]) == pytest.approx(setting["policy.kl_reference"].mean(), rel=1e-3)
    assert (folder / "results.tex").read_text().count("\\\\") == 2 * 5
    for name in ("frontier", "diversity", "cross_table", "by_step", "over_optimisation"):
        assert (folder / f"{name}.png").is_file() == (folder / f"{name}.pdf").is_file() == (f"]({name}.png)" in text)
        assert (folder / f"{name}.png").is_file() == (name != "over_optimisation"), "these runs log no gold score"
    in_a_browser(folder / "report.html")
    shutil.rmtree(folder)
    runs = [
        str(tmp_path / "runs" / "ab" / f"{f}-beta=2.0-seed={seed}")
        for f in ("js", "alpha-alpha=0.3")
        for seed in (0, 1)
    ]
    code, out, err = call("report", *runs)
    assert code == 0, err
    assert out.strip() == f"report: {folder / 'report.html'}", "beside the runs"
    assert [line[:24] for line in (folder / "report.md").read_text().splitlines() if line.startswith("| js | ")]


def in_a_browser(path):
    """It draws every figure without a word on the console and without a network, at 400 px too; legends filter."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        assert "CI" not in os.environ, "no browser: install chromium"
        pytest.skip("no browser: install chromium")
    assert path.stat().st_size < 3_000_000
    with sync_playwright() as playwright, playwright.chromium.launch(
        executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
    ) as browser:  # fmt: skip
        page = browser.new_page(viewport={"width": 400, "height": 800}, offline=True)
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
        page.goto(path.as_uri())
        page.evaluate("window.drawn.then(() => true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        figures = page.locator(".figure")
        assert figures.count() == page.locator(".figure svg.marks").count() > 6
        dots = page.locator("#frontier-0 .mark-symbol.role-mark path")
        assert dots.count() == 4
        for box in (figures.nth(i).bounding_box() for i in range(figures.count())):
            assert box["width"] <= 400
            assert box["height"] > 60
        page.locator("#frontier-0 .role-legend-label text", has_text="js").click()
        page.wait_for_function("document.querySelectorAll('#frontier-0 .mark-symbol.role-mark path').length == 2")
        assert all("divergence: js" in (dots.nth(i).get_attribute("aria-label") or "") for i in range(2))
        page.locator("#frontier-0 .role-legend-label text", has_text="alpha").click(modifiers=["Shift"])
        page.wait_for_function("document.querySelectorAll('#frontier-0 .mark-symbol.role-mark path').length == 4")
        assert (
            page.locator("details td", has_text="alpha(alpha=0.3), beta 2").count()
            == page.locator("details").count()
            > 1
        )
        assert said == []


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from("`*_[]()<>|&~!\\#\n")))
def test_anyones_text_shows_as_it_stands(text):
    """Whatever a model writes is neither markup nor the end of its cell, in report.md and report.html alike."""
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown_table(["text"], [plain(text)]))
    (shown,) = re.findall("<td>(.*?)</td>", page, re.DOTALL)
    assert html.unescape(shown) == " ".join(text.split())


@pytest.mark.slow
def test_what_a_report_needs_and_lacks_is_named(make, call, monkeypatch):  # noqa: F811
    path = make(POLICY, grid={"divergence": ["js"]})
    assert call("ablate", str(path))[0] == 0
    monkeypatch.delitem(sys.modules, "rlhf_fdiv.comparison_report", raising=False)
    monkeypatch.delattr(rlhf_fdiv, "comparison_report", raising=False)
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    code, _, err = call("report", str(path))
    assert code == 2
    assert "needs vl_convert: pip install 'rlhf_fdiv[report]'" in err


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    generator = torch.Generator().manual_seed(n)
    reward, score = torch.randn(2, 3, 5, generator=generator)
    subsets = list(itertools.combinations(range(5), n))
    brute = [score[i, max(subset, key=lambda j: reward[i, j])] for i in range(3) for subset in subsets]
    assert float(best_of_n(reward, score, n).mean()) == pytest.approx(float(torch.stack(brute).mean()))
    with pytest.raises(ValueError, match="best of 6 needs at least 6 completions a prompt, not 5"):
        best_of_n(reward, score, 6)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_kl_of_best_of_n_is_that_of_a_continuous_reward(n):
    """Best of n has density n·u^(n−1) in the reward's quantile u under the reference."""
    value, _ = integrate.quad(lambda u: n * u ** (n - 1) * math.log(n * u ** (n - 1)), 0, 1)
    assert best_of_n_kl(n) == pytest.approx(value, abs=1e-9)


def test_curves_are_means_over_windows_of_steps(tmp_path):
    (tmp_path / "policy").mkdir()
    lines = [json.dumps({"step": s, "kl_reference": float(s), "absent": None}) for s in range(1, 25)]
    (tmp_path / "policy" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    runs = pd.DataFrame([{"run": str(tmp_path), "seed": 3, "divergence": "js", "rest": ""}])
    curves = training_curves(runs, windows=12)
    assert curves["step"].tolist() == [1.5 + 2 * i for i in range(12)] == curves["kl_reference"].tolist()
    assert set(curves["divergence"]) == {"js"}


@pytest.mark.slow
def test_cells_that_have_not_run_are_named(make, tmp_path, call):  # noqa: F811
    path = make(POLICY, grid={"divergence": ["js", "tv"]})
    tiny.run(call("ablate", str(path), "--print-commands")[1].splitlines()[0].split()[-1])
    assert call("report", str(path))[0] == 0
    assert "No finished run: tv." in (tmp_path / "runs" / "ab" / "comparison" / "report.md").read_text()


def test_the_optimum_is_one_for_runs_of_one_reward_whatever_their_beta_rounds_it_to(tmp_path):
    rows = [{"beta": 0.1 * i, "reward": 0.3 * i, "kl_reference": 1.0 / i} for i in range(1, 5)]
    rounded = [{k: v * (1 + 1e-7) for k, v in row.items()} for row in rows]
    other = [{k: v * 1.1 for k, v in row.items()} for row in rows]

    def frontier(*values):
        return comparison.exact_frontier(pd.DataFrame({"exact.frontier": [json.dumps(v) for v in values]}))

    assert frontier(rows, rounded, rows).to_dict("records") == rows
    assert (
        len(frontier(rows, other))
        == 0
        == len(frontier(rows, rows[:2]))
        == len(comparison.exact_frontier(pd.DataFrame()))
    )


def test_runs_named_by_relative_and_absolute_folders_are_compared_together(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(comparison, "read_run", lambda folder: {"run": str(folder)})
    monkeypatch.setattr(rlhf_fdiv.ablation, "_write", lambda out, *content: found.append(out))
    monkeypatch.chdir(tmp_path)
    rlhf_fdiv.ablation.report_runs([Path("runs/a"), tmp_path / "runs" / "b"])
    assert found == [tmp_path / "runs" / "comparison"]
