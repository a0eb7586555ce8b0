# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Reading an ablation
#
# `rlhf-fdiv ablate configs/ablation/reviews.yaml` trained a small GPT-2 on film reviews with several divergences, strengths β and
# seeds; `rlhf-fdiv report` wrote what came out. This page reads those tables and draws the figures again, with the functions that
# drew them first.

# %%
from pathlib import Path

import altair as alt
import pandas as pd

from rlhf_fdiv import charts, comparison

RESULTS = Path("../results/reviews")
KEYS = ["divergence", "target.beta", "seed"]
table = comparison.with_settings(pd.read_csv(RESULTS / "results.csv"), KEYS)
curves = pd.read_csv(RESULTS / "curves.csv", keep_default_na=True).fillna({"rest": ""})
fs = list(dict.fromkeys(table["config.divergence"]))
print(f"{len(table)} runs, {table['samples'].sum():,} samples, {table['seconds'].sum() / 3600:.1f} hours of one core")
table.groupby(["config.divergence", "config.target.beta"])[
    ["policy.reward", "policy.gold", "policy.kl_reference"]
].mean().round(3)

# %% [markdown]
# ## What reward costs
#
# Further up and to the left is better. Best of n needs no training, but n completions for each one that it keeps. A policy below
# that line has paid more KL than it had to: by how much tells how far the training is from its end.

# %%
best = (
    pd.read_csv(RESULTS / "best_of_n.csv").rename(columns={"kl_reference": "x", "reward": "y"}).assign(kind="best of n")
)
points = charts.points(table, "policy.kl_reference", "policy.reward")
_ = alt.renderers.enable("png", ppi=72)
charts.for_paper({"reward": charts.lines(points, fs, "KL(π‖reference), nats", "reward", best[["x", "y", "kind"]])})

# %% [markdown]
# ## Proxy and gold
#
# The reward is a ridge on n-grams, fitted to the ratings of half of the films; gold is fitted to the other half. What the first
# has learnt by chance, the second does not pay for: where the lines part, the policy is exploiting its reward.

# %%
by_beta = {rest: charts.over_optimisation(part, "reward", "gold") for rest, part in curves.groupby("rest")}
charts.for_paper({rest: charts.lines(part, fs, "√KL(π‖reference)", "score") for rest, part in by_beta.items()})

# %% [markdown]
# ## Every model under every divergence

# %%
cross = comparison.cross_table(table)
charts.for_paper({rest: charts.heat_map(part, fs) for rest, part in cross.groupby("rest")})

# %% [markdown]
# ## What the data say, and what they do not
#
# Pairs are compared by seed, within the same β. A test is made only where so many seeds could reject at all; five cannot go below
# .0625, and then the interval stands alone.

# %%
for metric in ("policy.objective", "policy.gold", "policy.distinct_2"):
    pairs = [("js", "reverse_kl"), ("js", "forward_kl"), ("forward_kl", "reverse_kl")]
    for claim in comparison.compare(table, KEYS, "divergence", pairs, metric):
        print(claim.sentence)
