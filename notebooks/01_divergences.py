# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # What an f-divergence sees
#
# $D_f(\pi\|p) = \sum_y p(y)\, f\!\left(\pi(y)/p(y)\right)$ is zero where the policy $\pi$ is the target $p$, whatever convex $f$ is.
# Which $f$ matters where $\pi$ cannot be $p$, and where training ends before it is. This page shows why, on a picture.

# %%
import math

import matplotlib.pyplot as plt
import torch

from rlhf_fdiv import divergences

FS = ["forward_kl", "hellinger", "js", "tv", "reverse_kl", "pearson_chi2"]

# %% [markdown]
# ## The price, and the pseudo-reward
#
# Left: $f(t)$ at $t = \pi/p$, what a text costs. Right: $-f'(t)$, which is the reward that `match` gives it: a text that the policy
# has too rarely (left of 1) is rewarded, one that it has too often is punished. Forward KL's reward is $p/\pi$: without bound for
# what is missing, nearly blind to what is too much. Reverse KL's is $-\log t$: even-handed, and on its way to $-\infty$ for what $p$
# does not have. Total variation only says yes or no.

# %%
s = torch.linspace(-4, 4, 401, dtype=torch.float64)
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
for name in FS:
    f = divergences.get(name)
    axes[0].plot(s, f.f(s), label=name)
    axes[1].plot(s, -f.f_prime(s), label=name)
axes[0].set(ylim=(0, 4), xlabel="log π/p", title="f(π/p): the price")
axes[1].set(ylim=(-4, 4), xlabel="log π/p", title="−f'(π/p): the pseudo-reward")
axes[1].legend(frameon=False, fontsize=8, bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# ## A face, and a model that has one ellipse
#
# The target is a face: an outline, two eyes, a mouth. The policy is a single Gaussian on the same grid, so it cannot be the face.
# Each $f$ is minimised exactly, over all pixels, by the same few lines: `divergences.exact` is the object that the training
# stages and the reports use.

# %%
SIZE = 48
axis = torch.linspace(-1.2, 1.2, SIZE, dtype=torch.float64)
y, x = torch.meshgrid(-axis, axis, indexing="ij")


def face():
    """log p of every pixel: a thin ring, two eyes of unequal weight, a mouth that holds most of the mass."""
    radius = (x**2 + y**2).sqrt()
    ring = torch.exp(-((radius - 1) ** 2) / 0.003)
    eyes = 2.0 * torch.exp(-((x - 0.35) ** 2 + (y - 0.35) ** 2) / 0.01) + torch.exp(
        -((x + 0.35) ** 2 + (y - 0.35) ** 2) / 0.01
    )
    mouth = 2.5 * torch.exp(-((radius - 0.55) ** 2) / 0.006) * (y < -0.2)
    return (0.35 * ring + eyes + mouth + 1e-4).flatten().log().log_softmax(0)


def ellipse(parameters):
    """log π of every pixel for a mean and a triangular square root of the precision."""
    mean, scale, shear = parameters[:2], parameters[2:4].exp(), parameters[4]
    dx, dy = x - mean[0], y - mean[1]
    return (-0.5 * ((scale[0] * dx) ** 2 + (scale[1] * dy + shear * dx) ** 2)).flatten().log_softmax(0)


log_p = face()

# %%
STARTS = [[0.0, 0.0, 0.3, 0.3], [0.35, 0.35, 2.0, 2.0], [-0.35, 0.35, 2.0, 2.0], [0.0, -0.5, 0.8, 2.0]]


def fit(f):
    """The best of four starts by Adam on the exact divergence: (value, log π)."""
    best = (math.inf, None)
    for start in STARTS:
        parameters = torch.tensor([*start, 0.0], dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.Adam([parameters], lr=0.05)
        for _ in range(150):
            optimiser.zero_grad()
            value = divergences.exact(f, ellipse(parameters), log_p)
            value.backward()
            optimiser.step()
        best = min(best, (value.item(), ellipse(parameters.detach())), key=lambda pair: pair[0])
    return best


fits = {name: fit(divergences.get(name)) for name in FS}

# %%
figure, axes = plt.subplots(1, len(FS) + 1, figsize=(14, 2.4))
axes[0].imshow(log_p.exp().view(SIZE, SIZE), cmap="gray_r")
axes[0].set_title("the target", fontsize=10)
for panel, (name, (value, log_pi)) in zip(axes[1:], fits.items(), strict=True):
    panel.imshow(log_p.exp().view(SIZE, SIZE), cmap="gray_r", alpha=0.35)
    panel.contour(log_pi.exp().view(SIZE, SIZE), levels=5, cmap="autumn_r", linewidths=1.2)
    panel.set_title(f"{name}\n{value:.2f} nats", fontsize=10)
for panel in axes:
    panel.set_axis_off()
plt.show()

# %% [markdown]
# Forward KL has to cover everything that the face has, and puts most of its mass where the face has none. Reverse KL and Pearson
# must not be where the face is not, and pick one part. The bounded ones, Hellinger, js and tv, may ignore what they cannot reach at
# a bounded price. A language model that is asked for more than it can be does the same with texts.
#
# ## How much is covered, how much is sound
#
# *Recall* is the share of the target that the policy has at least a tenth of; *precision* the share of the policy that the target
# has at least a tenth of. Each model is also measured under every other $f$: the diagonal is the smallest of its column, as it must
# be where the minimisation is exact.

# %%
p = log_p.exp()
print(f"{'trained with':14} recall  precision   " + "".join(f"{name:>13}" for name in FS))
cross = {}
for name, (_, log_pi) in fits.items():
    pi = log_pi.exp()
    recall, precision = float((p * (pi > p / 10)).sum()), float((pi * (p > pi / 10)).sum())
    cross[name] = {other: float(divergences.exact(divergences.get(other), log_pi, log_p)) for other in FS}
    print(f"{name:14} {recall:6.2f}  {precision:9.2f}   " + "".join(f"{value:13.2f}" for value in cross[name].values()))

# %%
for name in FS:
    assert all(cross[name][name] <= cross[other][name] + 0.01 for other in FS), f"{name} does not win its own column"
