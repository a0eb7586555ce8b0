"""`prefer` and `distil`: the formulas by hand and against TRL's own code, then both stages from config to evaluation."""

import functools
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import (
    BAD,
    FILMS,
    GOOD,
    away,
    jsonl,
    problems,
    run,
    same,
    two_processes,
    weights,
    without_time,
    write_config,
    write_rows,
)
from toy import FS, N, P, exact_log_probs, label, language, tiny_lm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_fdiv import config as configs
from rlhf_fdiv import divergences
from rlhf_fdiv.divergences import exact
from rlhf_fdiv.models import Policy
from rlhf_fdiv.objectives import Distil, Prefer, soft_labels
from rlhf_fdiv.optima import regularised_optimum
from rlhf_fdiv.rollout import sample, uniforms
from rlhf_fdiv.sequences import Sequences
from rlhf_fdiv.stages import prefer as prefer_stage
from rlhf_fdiv.stages.distil import token_divergences
from rlhf_fdiv.stages.training import Training, row_order

FULL, LORA = "model.lora=null", "model.lora={r: 2, lora_alpha: 4}"
LN2 = math.log(2)


def T(*values):
    return torch.tensor(values, dtype=torch.float64)


# -- f once more, in t and with nothing done for its stability ---------------------------------------------------------


def _alpha(f, t):
    if f.alpha in (0, 1):
        return (_KL if f.alpha else GENERATORS["forward_kl"])(f, t)
    return (t**f.alpha - f.alpha * t - 1 + f.alpha) / (f.alpha * (f.alpha - 1))


def _KL(f, t):
    return t * t.log() - t + 1


GENERATORS = {
    "reverse_kl": _KL,
    "forward_kl": lambda f, t: -t.log() + t - 1,
    "js": lambda f, t: t * t.log() - (t + 1) * ((t + 1) / 2).log(),
    "tv": lambda f, t: (t - 1).abs() / 2,
    "pearson_chi2": lambda f, t: (t - 1) ** 2,
    "neyman_chi2": lambda f, t: (1 - t) ** 2 / t,
    "hellinger": lambda f, t: (t.sqrt() - 1) ** 2 / 2,
    "alpha": _alpha,
    "jeffreys": lambda f, t: (t - 1) * t.log(),
    "chi_mix": lambda f, t: (t - 1) ** 2 / 2 + _KL(f, t),
    "skew_js": lambda f, t: f.w * t * t.log() - (f.w * t + 1 - f.w) * (f.w * t + 1 - f.w).log(),
    "mixture": lambda f, t: sum(w * by_hand(g, t) for w, g in zip(f.weights, f.components, strict=True)),
}
MINE = [f for f in FS if f.name in GENERATORS]
INVALID = ("pearson_chi2", "tv", "alpha(alpha=2.0)", "alpha(alpha=3.0)", "alpha(alpha=1.000001)")  # f'(0⁺) > −∞
VALID = [f for f in MINE if label(f) not in INVALID]
every_f = pytest.mark.parametrize("f", MINE, ids=label)
every_valid_f = pytest.mark.parametrize("f", VALID, ids=label)


def by_hand(f, t):
    """f(t)."""
    return GENERATORS[f.name](f, t)


def slope_by_hand(f, t):
    """f'(t), with its graph."""
    t = t if t.requires_grad else t.clone().requires_grad_()
    return torch.autograd.grad(by_hand(f, t).sum(), t, create_graph=True)[0]


def test_every_f_of_the_package_is_in_the_table_above():
    assert set(divergences.names()) <= GENERATORS.keys()


# -- 1. prefer: reward and loss ----------------------------------------------------------------------------------------

NEAR = torch.linspace(-9, 9, 73, dtype=torch.float64)


def shares(count, seed=9):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_f
def test_the_reward_is_beta_times_f_prime_of_policy_over_reference(f):
    log_a = -4 - 3 * shares(len(NEAR))
    found = Prefer(beta=0.7).reward(f, log_a + NEAR, log_a)
    expected = 0.7 * slope_by_hand(f, NEAR.exp())
    assert torch.allclose(found, expected, rtol=1e-7, atol=1e-9)
    assert found.dtype == Prefer().reward(f, NEAR.float(), log_a.float()).dtype == torch.float64


@every_valid_f
def test_loss_and_gradient_are_those_of_bradley_terry_on_that_reward(f):
    """All four log-probs of a pair, in any order of preference, against autograd through the plain formula."""
    count, beta = 200, 0.4
    log_a = -5 * shares(2 * count, 1).view(2, count)
    log_pi = (log_a + 3 * shares(2 * count, 2).view(2, count) - 1.5).requires_grad_()
    c = torch.cat([shares(count - 2, 3), T(0.0, 1.0)])
    objective = Prefer(beta=beta)
    rewards = objective.reward(f, log_pi, log_a)
    loss = objective.loss(rewards[0] - rewards[1], c)
    t = (log_pi - log_a).exp()
    chance = torch.sigmoid(beta * (slope_by_hand(f, t)[0] - slope_by_hand(f, t)[1]))
    plain = -c * chance.log() - (1 - c) * (1 - chance).log()
    assert loss.shape == (count,)
    assert torch.allclose(loss, plain, rtol=1e-7, atol=1e-9)
    found, expected = (torch.autograd.grad(x.sum(), log_pi)[0] for x in (loss, plain))
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9)
    rewards = objective.reward(f, log_pi, log_a)
    (hard,) = torch.autograd.grad(objective.loss(rewards[0] - rewards[1], torch.ones(count)).sum(), log_pi)
    assert (hard[0] < 0).all(), "a pair pushes its chosen text up"
    assert (hard[1] > 0).all(), "and its rejected text down"


@every_valid_f
@pytest.mark.parametrize("nats", [90.0, 250.0, 310.0, 1e4])
def test_far_from_the_reference_reward_loss_and_slope_stay_finite_and_keep_their_order(f, nats):
    s = T(-2 * nats, -nats, -8.0, 0.0, 8.0, nats).requires_grad_()
    reward = Prefer(beta=1.0).reward(f, s, torch.zeros(6))
    assert (reward.diff() >= 0).all()
    assert (reward[:4].diff() > 0).all(), "f'(0⁺) = −∞ is still on its way"
    margin = reward[:, None] - reward
    loss = Prefer().loss(margin, torch.full_like(margin, 0.9))
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), s)[0].isfinite().all()


def test_chi_mix_is_the_loss_of_chi_po():
    """arXiv 2407.13399: DPO with the link φ(z) = z + log z in the place of log z."""

    def phi(z):
        return z + z.log()

    log_pi, log_a = (-6 * shares(80, seed).view(2, 40) for seed in (4, 5))
    z = (log_pi - log_a).exp()
    chi_po = -F.logsigmoid(0.2 * phi(z[0]) - 0.2 * phi(z[1]))
    objective = Prefer(beta=0.2)
    rewards = objective.reward(divergences.get("chi_mix"), log_pi, log_a)
    assert torch.allclose(objective.loss(rewards[0] - rewards[1], torch.ones(40)), chi_po, rtol=1e-12)


MARGINS = torch.linspace(-30, 30, 121, dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_a_swapped_pair_with_the_swapped_share_is_the_same_pair(smoothing):
    c = shares(121)
    ours, swapped = soft_labels(c, smoothing), soft_labels(1 - c, smoothing)
    assert torch.allclose(ours + swapped, torch.ones(121, dtype=torch.float64))
    assert torch.allclose(Prefer().loss(MARGINS, ours), Prefer().loss(-MARGINS, swapped), rtol=1e-12)


@pytest.mark.parametrize("c", [0.5, 0.1, 0.8])
def test_a_soft_label_is_met_where_the_models_share_is_the_raters(c):
    """Least at σ(margin) = c, which is margin 0 for raters who are of two minds, and worth their entropy there."""
    best = T(math.log(c / (1 - c))).requires_grad_()
    loss = Prefer().loss(best, T(c))
    assert loss.item() == pytest.approx(-c * math.log(c) - (1 - c) * math.log(1 - c), rel=1e-12)
    assert abs(float(torch.autograd.grad(loss.sum(), best)[0])) <= 1e-15
    assert (Prefer().loss(MARGINS, torch.full_like(MARGINS, c)) >= loss.detach() - 1e-15).all()
    if c == 0.5:
        assert best.item() == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.05, 0.3])
def test_label_smoothing_is_that_of_cdpo(smoothing):
    """(1 − ε)·ℓ(m) + ε·ℓ(−m), which an ε of all raters would give; not the unbiased (`robust`) one."""
    found = Prefer().loss(MARGINS, soft_labels(torch.ones(121), smoothing))
    cdpo = -(1 - smoothing) * F.logsigmoid(MARGINS) - smoothing * F.logsigmoid(-MARGINS)
    assert torch.allclose(found, cdpo, rtol=1e-6)
    assert soft_labels(T(0.8), 0.1).tolist() == pytest.approx([0.8 * 0.9 + 0.2 * 0.1])


# -- on a language that can be enumerated ------------------------------------------------------------------------------


@functools.cache
def enumerated():
    """log a of every text and a known reward, [P, N] each."""
    with torch.no_grad():
        log_a = exact_log_probs(language()[1])
    return log_a, torch.randn(P, N, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def expected_loss(f, beta, log_pi):
    """Over all ordered pairs of each prompt's texts, the raters being Bradley–Terry with the known reward; and its least
    value, the entropy of their labels."""
    log_a, reward = enumerated()
    objective = Prefer(beta=beta)
    ours = objective.reward(f, log_pi, log_a)
    c = torch.sigmoid(reward[:, :, None] - reward[:, None])
    entropy = torch.special.entr(c) + torch.special.entr(1 - c)
    return objective.loss(ours[:, :, None] - ours[:, None], c).mean(), entropy.mean()


@pytest.mark.parametrize("beta", [0.3, 1.0])
@every_valid_f
def test_the_expected_loss_is_least_at_the_optimum_of_regularise(f, beta):
    """There β·f'(π/a) is the reward up to a constant of the prompt, and the loss is what no policy can go below."""
    log_a, reward = enumerated()
    best = regularised_optimum(f, log_a, reward, beta).log_pi
    assert ((best.exp() - log_a.exp()).abs().sum(1) > 0.2).all(), "which is not the reference"
    implicit = Prefer(beta=beta).reward(f, best, log_a)
    constant = (implicit - reward).mean(1, keepdim=True)
    assert torch.allclose(implicit - reward, constant.expand(P, N), rtol=0, atol=1e-6)
    slopes = []
    for start in (log_a, best):
        table = start.clone().requires_grad_()  # a policy of free logits: one for each text of each prompt
        loss, least = expected_loss(f, beta, table.log_softmax(1))
        slopes.append(float(torch.autograd.grad(loss, table)[0].norm()))
    assert (loss - least).item() <= 1e-12
    assert slopes[1] <= 1e-6 * slopes[0]


@every_valid_f
def test_training_on_pairs_ends_at_the_optimum_of_regularise(f):
    log_a, reward = enumerated()
    best = regularised_optimum(f, log_a, reward, 3.0).log_pi
    table = log_a.clone().requires_grad_()

    def closure():
        table.grad = None
        loss, _ = expected_loss(f, 3.0, table.log_softmax(1))
        loss.backward()
        return loss

    for _ in range(6):  # α = −1 and Neyman are steep far below the reference, and ask for a fresh start now and then
        torch.optim.LBFGS([table], max_iter=150, history_size=40, line_search_fn="strong_wolfe",
                          tolerance_grad=1e-13, tolerance_change=1e-18).step(closure)  # fmt: skip
        loss, least = expected_loss(f, 3.0, table.detach().log_softmax(1))
        if loss - least < 3e-9:
            break
    far, near = (((log_pi.exp() - best.exp()).abs().sum(1) / 2) for log_pi in (log_a, table.detach().log_softmax(1)))
    assert far.min() > 0.04, "there was a way to go"
    assert near.max() <= 3e-3


# -- 2. the prefer stage -----------------------------------------------------------------------------------------------

LENGTH = 6
LEADS = (" ", " the plot is ", " very ", " the very cast is ", " the ")


def pairs(labels=None):
    """18 pairs of unequal lengths, no two alike; `labels` are the raters' shares."""
    rows = [
        {
            "prompt": f"film : {FILMS[i % 12]} review :",
            "chosen": LEADS[i % 5] + GOOD[i % 3],
            "rejected": LEADS[(2 * i + i // 5) % 5] + BAD[(i // 3) % 3],
        }
        for i in range(18)
    ]
    return [row | ({} if labels is None else {"preference": labels[i]}) for i, row in enumerate(rows)]


@pytest.fixture
def prefer(start, data, tmp_path):
    """prefer("a.b=value", …): runs the prefer stage alone, from the untouched model, and gives its folder."""
    raw = tiny.raw_config(start, data, tmp_path / "runs")
    raw |= {"stages": ["prefer"], "scorers": {}, "report_to": "none", "objective": {"name": "prefer", "beta": 0.5}}
    raw["model"] = {"name_or_path": start}
    raw["data"] |= {
        "preferences_train": write_rows(tmp_path / "train.jsonl", pairs()),
        "preferences_eval": write_rows(tmp_path / "eval.jsonl", pairs()[3:10]),
    }
    raw["prefer"] = {
        "model": start, "max_steps": 4, "num_pairs": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "max_completion_length": LENGTH, "save_steps": 2,
    }  # fmt: skip
    path = write_config(tmp_path / "prefer.yaml", raw)

    def prefer(*overrides):
        return run(path, *overrides).path / "prefer"

    prefer.path = path
    return prefer


def plain(folder, dtype=torch.float32):
    """The model as anybody else would load it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits_of(lm, prompt, text, length=LENGTH):
    """Logits of a completion's tokens, [T, V], and the tokens: one row without any padding."""
    tok = tiny.tokenizer()
    ids = tok(prompt)["input_ids"]
    written = [*tok(text)["input_ids"], tok.eos_token_id][:length]
    return lm(torch.tensor([ids + written])).logits[0, len(ids) - 1 : -1], torch.tensor(written)


def log_prob(lm, prompt, text, length=LENGTH):
    logits, written = logits_of(lm, prompt, text, length)
    return logits.log_softmax(-1).gather(1, written[:, None]).double().sum()


def margins(f, beta, lm, reference, rows, length=LENGTH):
    """β·f'(π/a) of each row's chosen text less that of the rejected one, [N], with nothing of the library in it."""
    rewards = []
    for side in ("chosen", "rejected"):
        log_pi = torch.stack([log_prob(lm, row["prompt"], row[side], length) for row in rows])
        with torch.no_grad():
            log_a = torch.stack([log_prob(reference, row["prompt"], row[side], length) for row in rows])
        rewards.append(beta * slope_by_hand(f, (log_pi - log_a).exp()))
    return rewards[0] - rewards[1]


def bradley_terry(margin, c):
    return -c * F.logsigmoid(margin) - (1 - c) * F.logsigmoid(-margin)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *((FULL, f) for f in ("reverse_kl", "chi_mix", "forward_kl", "js", "{name: alpha, alpha: .5}")),
        (LORA, "chi_mix"),
    ],
)
def test_the_loss_starts_at_ln_2_and_falls_as_the_pairs_are_learnt(prefer, model, name):
    out = prefer(model, f"divergence={name}", "prefer.max_steps=15", "prefer.learning_rate=1.5e-2")
    rows = jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(1, 16)]
    assert rows[0]["loss"] == round(LN2, 6)
    assert rows[0]["margin"] == 0, "π = a before the first update"
    assert rows[0]["accuracy"] == 0.5, "of no difference neither side is right"
    assert rows[-1]["loss"] < 0.3
    assert rows[-1]["accuracy"] == 1
    assert rows[-1]["margin"] > 1
    assert rows[0]["grad_norm"] > 0
    report = json.loads((out / "accuracy.json").read_text())
    assert report.keys() == {"accuracy", "pairs", "loss"}
    assert report["accuracy"] == 1
    assert report["pairs"] == 7
    assert report["loss"] < 0.3
    assert (out / "adapter").is_dir() == (model == LORA)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_labels_start_at_ln_2_too_and_never_fall_below_their_entropy(prefer, tmp_path, smoothing):
    rows = write_rows(tmp_path / "soft.jsonl", pairs([0.8] * 18))
    out = prefer(
        f"data.preferences_train={rows}", f"data.preferences_eval={rows}", "prefer.max_steps=40",
        f"objective.label_smoothing={smoothing}",
    )  # fmt: skip
    losses = [row["loss"] for row in jsonl(out / "metrics.jsonl")]
    c = 0.8 * (1 - smoothing) + 0.2 * smoothing
    least = -c * math.log(c) - (1 - c) * math.log(1 - c)
    assert losses[0] == round(LN2, 6)
    assert all(loss >= least - 1e-6 for loss in losses)
    held_out = json.loads((out / "accuracy.json").read_text())["loss"]
    assert least <= held_out < least + 0.03


STEPS = {
    "reverse_kl": ("reverse_kl", 0.0, 0.3),
    "chi_mix": ("chi_mix", 0.0, 0.1),
    "forward_kl": ("forward_kl", 0.0, 0.1),
    "smoothed": ("js", 0.2, 0.3),
}


@pytest.mark.parametrize("case", STEPS)
def test_steps_are_those_of_gradient_descent_on_the_plain_formula(prefer, start, tmp_path, case):
    """Three steps of five of the 18 pairs, every pair with a label of its own, so that no mix-up would go unseen."""
    name, smoothing, rate = STEPS[case]
    rows, f, steps = pairs(shares(18, 6).tolist()), divergences.get(name), 3
    out = prefer(
        f"data.preferences_train={write_rows(tmp_path / 'labelled.jsonl', rows)}", f"divergence={name}", FULL, "seed=4",
        f"objective.label_smoothing={smoothing}", "model.dtype=float64", "prefer.optim=sgd", "prefer.max_grad_norm=1e9",
        f"prefer.learning_rate={rate}", f"prefer.max_steps={steps}", "prefer.num_pairs=5",
        "prefer.per_device_train_batch_size=2",
    )  # fmt: skip
    assert len({i for step in (1, 2, 3) for i in row_order(4, step, 5, 18)}) == 15, "no pair twice in an epoch"
    lm, reference = plain(start, torch.float64), plain(start, torch.float64)
    logged = jsonl(out / "metrics.jsonl")
    for step in range(1, steps + 1):
        batch = [rows[i] for i in row_order(4, step, 5, 18)]
        c = T(*(row["preference"] * (1 - smoothing) + (1 - row["preference"]) * smoothing for row in batch))
        margin = margins(f, 0.5, lm, reference, batch)
        loss = bradley_terry(margin, c).mean()
        slopes = torch.autograd.grad(loss, [*lm.parameters()])
        with torch.no_grad():
            for weight, slope in zip(lm.parameters(), slopes, strict=True):
                weight -= rate * slope
        norm = float(torch.stack([slope.norm() for slope in slopes]).norm())
        assert logged[step - 1]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert logged[step - 1]["margin"] == pytest.approx(margin.mean().item(), rel=1e-4, abs=1e-9)
        assert logged[step - 1]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert abs(logged[-1]["margin"]) > 1e-3, "away from the reference"
    expected = {k: v for k, v in lm.state_dict().items() if k in weights(out / "model")}
    assert away(weights(out / "model"), expected) <= 1e-6
    assert away(weights(out / "model"), weights(Path(start))) > 1e-2


@pytest.mark.slow
def test_pairs_that_the_raters_turn_round_are_learnt_the_other_way(prefer, start, tmp_path):
    """After `plot` they like `good`, after `cast` they do not, .1 for it; both kinds in the same batches."""
    rows = [
        {"prompt": f"film : {film} review :", "chosen": f" the {noun} is good", "rejected": f" the {noun} is bad",
         "preference": share}
        for film in FILMS[:9]
        for noun, share in (("plot", 0.9), ("cast", 0.1))
    ]  # fmt: skip
    out = prefer(
        f"data.preferences_train={write_rows(tmp_path / 'turned.jsonl', rows)}",
        "prefer.max_steps=40",
        "prefer.learning_rate=1.5e-2",
    )
    with torch.no_grad():
        learnt = [
            float(log_prob(plain(out / "model"), rows[i]["prompt"], rows[i][side]))
            - float(log_prob(plain(start), rows[i]["prompt"], rows[i][side]))
            for i in range(18)
            for side in ("chosen", "rejected")
        ]
    margin = 0.5 * (torch.tensor(learnt[::2]) - torch.tensor(learnt[1::2]))
    assert (margin[::2] > 1).all()
    assert (margin[1::2] < -1).all()
    assert torch.allclose(torch.sigmoid(margin).view(-1, 2).mean(0), torch.tensor([0.9, 0.1]), rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", ["full", "lora", "full on an adapter", "lora on an adapter"])
def test_the_reference_is_the_model_that_training_started_from(prefer, start, tmp_path, kind):
    """Held-out loss, from the saved model and the untouched one. Adapter off: were the reference with it, it were ln 2."""
    model = start
    if "adapter" in kind:
        trained = prefer(LORA, "name=before", "prefer.learning_rate=3e-2")
        model = str(trained / "adapter")
    out = prefer(FULL if kind.startswith("full") else LORA, f"prefer.model={model}", "divergence=js")
    report = json.loads((out / "accuracy.json").read_text())
    reference = plain(trained / "model" if "adapter" in kind else start)
    with torch.no_grad():
        log_ratios = [
            log_prob(plain(out / "model"), r["prompt"], r[side]) - log_prob(reference, r["prompt"], r[side])
            for r in pairs()[3:10]
            for side in ("chosen", "rejected")
        ]
    s = torch.stack(log_ratios).view(-1, 2)
    margin = 0.5 * (F.logsigmoid(s[:, 0]) - F.logsigmoid(s[:, 1]))  # js: f'(t) = ln 2t/(1 + t)
    assert report["loss"] == pytest.approx(float(-F.logsigmoid(margin).mean()), abs=2e-6)
    assert report["accuracy"] == pytest.approx(float((margin > 0).double().mean()))
    assert report["loss"] < LN2 - 0.02


def test_a_completion_is_cut_at_its_length_without_a_pretended_end(prefer, start):
    out = prefer("prefer.max_completion_length=3", "prefer.max_steps=2")
    report = json.loads((out / "accuracy.json").read_text())
    models = divergences.get("reverse_kl"), 0.5, plain(out / "model"), plain(start)
    margin, uncut = (margins(*models, pairs()[3:10], length).detach() for length in (3, LENGTH))
    assert report["loss"] == pytest.approx(float(-F.logsigmoid(margin).mean()), abs=2e-6)
    assert (margin - uncut).abs().max() > 1e-2


@pytest.mark.parametrize(
    "otherwise", ["per_device_train_batch_size=1", "per_device_train_batch_size=5", "logprob_chunk=7"]
)
def test_micro_batches_and_chunks_do_not_change_the_steps(prefer, otherwise):
    """5 divides no batch of 6; padding is another in every split."""
    args = (
        FULL, "model.dtype=float64", "divergence=chi_mix", "prefer.optim=sgd", "prefer.learning_rate=.2",
        "data.preferences_eval=null",
    )  # fmt: skip
    ways = ("per_device_train_batch_size=6", otherwise)
    outs = [prefer(*args, f"name=of{n}", f"prefer.{way}") for n, way in enumerate(ways)]
    assert away(*(weights(out / "model") for out in outs)) <= 1e-7
    rows = [without_time(jsonl(out / "metrics.jsonl")) for out in outs]
    for whole, split in zip(*rows, strict=True):
        assert split == pytest.approx(whole, rel=1e-5, abs=1e-6)
    assert rows[0][-1]["loss"] < rows[0][0]["loss"] - 0.05


class Stopped(BaseException):
    """As a kill: nothing in the library may catch it."""


def stop_after(monkeypatch, step):
    """The process ends right after the update of `step`, before that step is logged or saved."""
    logged = Training.log

    def log(self, now, *args):
        if now == step:
            raise Stopped
        return logged(self, now, *args)

    monkeypatch.setattr(Training, "log", log)


def assert_same_outcome(broken, unbroken):
    assert without_time(jsonl(broken / "metrics.jsonl")) == without_time(jsonl(unbroken / "metrics.jsonl"))
    assert same(weights(broken / "model"), weights(unbroken / "model"))
    for file in sorted((unbroken / "checkpoint-4").glob("*.safetensors")):
        assert same(load_file(broken / "checkpoint-4" / file.name), load_file(file)), file
    states = [json.loads((o / "checkpoint-4" / "policy_state.json").read_text()) for o in (broken, unbroken)]
    assert states[0] == states[1]
    assert states[0]["step"] == 4
    if (unbroken / "accuracy.json").is_file():
        assert (broken / "accuracy.json").read_text() == (unbroken / "accuracy.json").read_text()


RESUMES = {
    "full": [FULL, "divergence=chi_mix"],
    "lora": [LORA],
    "schedule": [LORA, "prefer.lr_scheduler_type=cosine", "prefer.warmup_steps=1", "prefer.weight_decay=.1"],
    "bfloat16": [FULL, "model.dtype=bfloat16", "objective.label_smoothing=.1"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("case", "step"), [(case, 3) for case in RESUMES] + [("lora", 1)])
def test_training_on_pairs_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(prefer, monkeypatch, case, step):
    """Stopped before the first checkpoint, and after it: the reference is still the model at the start."""
    unbroken = prefer(*RESUMES[case], "name=unbroken")
    stop_after(monkeypatch, step)
    with pytest.raises(Stopped):
        prefer(*RESUMES[case], "name=broken")
    monkeypatch.undo()
    assert_same_outcome(prefer(*RESUMES[case], "name=broken"), unbroken)


def test_pairs_whose_loss_is_not_finite_stop_the_step_and_are_kept(prefer):
    """A rate that throws the weights out of float32, and nothing in the library touched."""
    message = "\n".join(problems(prefer, FULL, "prefer.optim=sgd", "prefer.learning_rate=1e30"))
    out = Path(prefer.path).parent / "runs" / "prefer" / "prefer"
    assert "step 2" in message
    assert str(out / "bad_batch-2.parquet") in message
    kept = pd.read_parquet(out / "bad_batch-2.parquet")
    batch = [pairs()[i] for i in row_order(0, 2, 6, 18)]
    assert kept.to_dict("records") == batch
    assert not (out / "model").exists()
    assert not (out / "accuracy.json").exists()
    assert not (out / "finished.json").exists()
    assert [row["step"] for row in jsonl(out / "metrics.jsonl")] == [1]


@pytest.fixture
def no_model(monkeypatch):
    """Nothing may load weights, nor leave a run folder half begun."""

    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded before the input was checked")

    for cls in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(cls, "from_pretrained", fail)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "film", "chosen": "good"}, ("row 3", "no field 'rejected'")),
        ({"prompt": "film", "chosen": "good", "rejected": " "}, ("row 3", "'rejected' is empty")),
        ({"prompt": "film", "chosen": 3, "rejected": "bad"}, ("row 3", "'chosen' must be text")),
        ({"prompt": "film", "chosen": "good", "rejected": "bad", "preference": 1.2}, ("row 3", "'preference'", "[0, 1]")),
        ({"prompt": "film", "chosen": "good", "rejected": "bad", "preference": "most"}, ("row 3", "'preference'", "most")),
        ({"prompt": "very " * 60, "chosen": "good", "rejected": "bad"}, ("row 3", "60 tokens", "room for 58")),
    ],
    ids=["no rejected", "empty", "a number", "1.2", "a word", "too long"],
)  # fmt: skip
def test_a_bad_pair_is_named_before_any_model_loads(prefer, tmp_path, no_model, row, words):
    rows = write_rows(tmp_path / "bad.jsonl", [*pairs()[:2], row, *pairs()[2:4]])
    (message,) = problems(prefer, f"data.preferences_train={rows}")
    assert "bad.jsonl" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("key", ["preferences_train", "preferences_eval"])
def test_pairs_that_are_not_there_are_named_before_any_model_loads(prefer, tmp_path, no_model, key):
    (message,) = problems(prefer, f"data.{key}={tmp_path / 'absent.jsonl'}")
    assert "absent.jsonl: no such file" in message
    assert not (tmp_path / "runs").exists()


SPECS = {
    "pearson_chi2": "pearson_chi2",
    "tv": "tv",
    "alpha(alpha=2.0)": "{name: alpha, alpha: 2}",
    "alpha(alpha=3.0)": "{name: alpha, alpha: 3}",
    "alpha(alpha=1.000001)": "{name: alpha, alpha: 1.000001}",
    "mixture": "{name: mixture, components: [tv, pearson_chi2], weights: [1, 1]}",
}


@pytest.mark.parametrize("f", [*INVALID, "mixture"])
def test_an_f_for_which_f_dpo_is_not_valid_is_refused_with_the_reason(prefer, no_model, f):
    (message,) = problems(prefer, f"divergence={SPECS[f]}")
    assert message.startswith(f"{prefer.path}: divergence: {f.partition('(')[0]}")
    assert "f'(0⁺) = -" in message
    assert "−∞" in message
    assert "chi_mix" in message


@pytest.mark.parametrize("smoothing", [0.5, 0.7, -0.1])
def test_a_label_smoothing_that_would_turn_the_labels_round_is_refused(prefer, no_model, smoothing):
    (message,) = problems(prefer, f"objective={{name: prefer, label_smoothing: {smoothing}}}")
    assert "objective.label_smoothing" in message


@pytest.mark.parametrize("objective", ["prefer", "distil"])
def test_the_stages_of_an_objective_are_those_that_it_needs(prefer, start, objective):
    raw = {k: v for k, v in tiny.yaml.safe_load(Path(prefer.path).read_text()).items() if k != "stages"}
    raw |= {"name": "x", "objective": objective, "distil": {"teacher": start}}
    assert configs.parse(raw).stages == ["sft", "reward", objective, "evaluate"]
    other = {"prefer": "distil", "distil": "prefer"}[objective]
    (message,) = problems(configs.parse, raw | {"stages": [other]})
    assert message == f"objective: {objective} is not trained by the {other} stage, but {other} is"


# -- prefer and TRL ----------------------------------------------------------------------------------------------------

BETA = 0.5
TRLS = {
    "reverse_kl": ("reverse_kl", {"f_divergence_type": "reverse_kl"}),
    "forward_kl": ("forward_kl", {"f_divergence_type": "forward_kl"}),
    "js": ("js", {"f_divergence_type": "js_divergence"}),
    **{
        f"alpha {a}": (
            f"{{name: alpha, alpha: {a}}}",
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": a},
        )
        for a in (-1.0, 0.3, 0.5, 0.9, 1.0)
    },
}


def trl_trainer(model, reference, rows, folder, **settings):
    """TRL's DPOTrainer from its public arguments, on all rows at once unless told otherwise."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    settings = {"per_device_train_batch_size": len(rows), "per_device_eval_batch_size": len(rows)} | settings
    args = DPOConfig(
        output_dir=str(folder), beta=BETA, optim="sgd", learning_rate=0.3, lr_scheduler_type="constant", max_steps=3,
        max_grad_norm=1.0, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, **settings,
    )  # fmt: skip
    columns = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows]
    return DPOTrainer(
        plain(model), ref_model=plain(reference), args=args, train_dataset=Dataset.from_list(columns),
        eval_dataset=Dataset.from_list(columns), processing_class=AutoTokenizer.from_pretrained(reference),
    )  # fmt: skip


@torch.no_grad()
def trl_losses(*args, **settings):
    """Its loss on each batch of the rows, in their order, [batches]."""
    trainer = trl_trainer(*args, **settings)
    return torch.stack([trainer.compute_loss(trainer.model, b) for b in trainer.get_eval_dataloader()]).double()


@pytest.mark.slow
@pytest.mark.parametrize("case", TRLS)
def test_training_and_loss_are_those_of_trl(prefer, start, tmp_path, case):
    """Three steps of the stage and of DPOTrainer from the same model end in the same weights, and there both give the
    held-out pairs the same loss. TRL's α is ours, in f-DPG's convention, though its documentation says u^−α."""
    name, settings = TRLS[case]
    out = prefer(
        FULL, f"divergence={name}", f"objective.beta={BETA}", "prefer.num_pairs=18", "prefer.max_steps=3",
        "prefer.optim=sgd", "prefer.learning_rate=.3",
    )  # fmt: skip
    trainer = trl_trainer(start, start, pairs(), tmp_path / "trl", **settings)
    trainer.train()
    theirs = {k: v for k, v in trainer.model.state_dict().items() if k in weights(out / "model")}
    moved = away(weights(out / "model"), weights(Path(start)))
    assert moved > 1e-2
    assert away(weights(out / "model"), theirs) <= 1e-4 * moved, (
        "log-probs in float32 are within 1e-6, f' of them times |α|"
    )
    (loss,) = trl_losses(out / "model", start, pairs()[3:10], tmp_path / "trl", **settings)
    ours = json.loads((out / "accuracy.json").read_text())["loss"]
    assert ours == pytest.approx(float(loss), abs=1e-6)
    assert abs(ours - LN2) > 0.05


def moved(start, folder, scale, seed=1):
    """A model away from `start` by noise on every weight."""
    lm, generator = plain(start), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in lm.parameters():
            weight += scale * torch.randn(weight.shape, generator=generator)
    lm.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def library_margins(f, beta, model, reference, rows):
    """As the stage has them: its own tokenisation, batch and reward."""
    tok = tiny.tokenizer(eos_token="<eos>", pad_token="<pad>")
    both = prefer_stage.collate(prefer_stage.tokenize_pairs(rows, tok, "", LENGTH, 64), [*range(len(rows))], "cpu")
    log_pi, log_a = ((Policy(plain(m))(both).log_probs * both.mask).sum(1) for m in (model, reference))
    chosen, rejected = Prefer(beta=beta).reward(f, log_pi, log_a.detach()).chunk(2)
    return chosen - rejected, (log_pi - log_a).detach()


@pytest.mark.parametrize("a", [0.3, 0.5, 2.0])
def test_the_formula_of_alpha_is_trls_also_where_f_dpo_is_not_valid(start, tmp_path, a):
    """α = 2, say: its f' is bounded at 0, TRL computes it all the same, and here only the config refuses it."""
    policy, f = moved(start, tmp_path / "policy", 0.05), divergences.get("alpha", alpha=a)
    margin, log_ratio = library_margins(f, BETA, policy, start, pairs())
    assert log_ratio.min() < -0.5
    assert log_ratio.max() > 0.5
    settings = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": a}
    (loss,) = trl_losses(policy, start, pairs(), tmp_path, **settings)
    assert Prefer().loss(margin, torch.ones(18)).mean().item() == pytest.approx(loss.item(), abs=1e-6)


def test_where_trls_forward_kl_is_nan_ours_is_finite(start, tmp_path):
    """More than 89 nats below the reference e^−s leaves float32, and both texts of a pair become −∞."""
    lm = plain(start)
    with torch.no_grad():
        lm.lm_head.weight *= 400
    lm.save_pretrained(tmp_path / "far")
    tiny.tokenizer().save_pretrained(tmp_path / "far")
    losses = trl_losses(tmp_path / "far", start, pairs(), tmp_path, f_divergence_type="forward_kl",
                        per_device_eval_batch_size=1)  # fmt: skip
    margin, log_ratio = library_margins(divergences.get("forward_kl"), BETA, tmp_path / "far", start, pairs())
    assert (log_ratio.view(2, -1) < -89).all(0).any()
    assert losses.isnan().any()
    ours = Prefer().loss(margin, torch.ones(18))
    assert ours.isfinite().all()
    both_near = (log_ratio.view(2, -1) > -80).all(0)
    assert torch.allclose(ours[both_near], losses[both_near], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_label_smoothing_is_trls_cdpo_and_stands_to_its_robust_dpo_as_it_must(prefer, start, tmp_path, epsilon):
    """TRL's cDPO is `aot_unpaired` of one pair at a time. With ℓ = sigmoid's loss and r that of robust,
    r = ((1 − ε)·ℓ(m) − ε·ℓ(−m))/(1 − 2ε), so that cDPO = 2(1 − ε)·ℓ − (1 − 2ε)·r."""
    out = prefer(FULL, f"objective.label_smoothing={epsilon}", f"objective.beta={BETA}", "prefer.learning_rate=3e-2")
    ours = json.loads((out / "accuracy.json").read_text())["loss"]
    args, kwargs = (out / "model", start, pairs()[3:10], tmp_path), {"per_device_eval_batch_size": 1}
    losses = {
        name: float(trl_losses(*args, loss_type=[name], label_smoothing=epsilon, **kwargs).mean())
        for name in ("sigmoid", "robust", "aot_unpaired")
    }
    assert ours == pytest.approx(losses["aot_unpaired"], abs=1e-6)
    assert ours == pytest.approx(2 * (1 - epsilon) * losses["sigmoid"] - (1 - 2 * epsilon) * losses["robust"], abs=2e-6)
    assert abs(ours - losses["robust"]) > 0.02


@pytest.mark.slow
def test_a_soft_label_is_the_mean_of_trls_loss_over_the_raters(prefer, start, tmp_path):
    """c of them for the pair as it stands and 1 − c for the pair turned round."""
    c = shares(7, 8)
    rows = [row | {"preference": float(share)} for row, share in zip(pairs()[3:10], c, strict=True)]
    turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    held_out = write_rows(tmp_path / "soft.jsonl", rows)
    out = prefer(FULL, f"data.preferences_eval={held_out}", f"objective.beta={BETA}", "divergence=js")
    settings = {"f_divergence_type": "js_divergence", "per_device_eval_batch_size": 1}
    one, other = (trl_losses(out / "model", start, r, tmp_path, **settings) for r in (rows, turned))
    expected = float((c * one + (1 - c) * other).mean())
    assert json.loads((out / "accuracy.json").read_text())["loss"] == pytest.approx(expected, abs=1e-6)


# -- evaluate after prefer ---------------------------------------------------------------------------------------------


def evaluated(folder):
    return json.loads((folder / "evaluate" / "metrics.json").read_text()), (folder / "report.md").read_text()


@pytest.mark.slow
def test_evaluate_needs_no_scorer_after_prefer(prefer):
    folder = prefer("stages=[prefer, evaluate]", "divergence=chi_mix").parent
    report, text = evaluated(folder)
    assert report["sft"]["kl_reference"] == 0
    assert report["policy"]["kl_reference"] > 0
    assert report["beta"] == 0.5
    assert "objective" not in report["policy"]
    assert report["paired"] == {}
    assert "divergence_to_target" not in report
    assert report["divergence_to_reference"].keys() >= {"reverse_kl", "js", "tv"}
    assert report["policy"]["perplexity"] != report["sft"]["perplexity"]
    assert "from pairs, offline" in text
    assert "| kl_reference |" in text
    assert (folder / "evaluate" / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_evaluate_after_prefer_scores_with_a_reward_model_that_training_never_saw(prefer):
    scorers = "scorers={reward: {name: reward_model}, words: {name: length, scale: 4}}"
    folder = prefer(scorers, "stages=[reward, prefer, evaluate]", "prefer.max_steps=40").parent
    report, text = evaluated(folder)
    assert report["policy"]["reward"] > report["sft"]["reward"]
    table = pd.read_parquet(folder / "evaluate" / "samples.parquet")
    for scorer in ("reward", "words"):
        gain = table[f"policy_{scorer}"].mean() - table[f"sft_{scorer}"].mean()
        assert report["paired"][f"{scorer}_gain"] == pytest.approx(gain, abs=1e-5)
    assert "| reward |" in text
    assert isinstance(report["policy"]["objective"], float)


def test_evaluate_says_what_is_missing_after_prefer(prefer, start, no_model):
    message = "\n".join(problems(prefer, "stages=[evaluate]"))
    assert "prefer stage is not finished" in message
    message = "\n".join(problems(prefer, "stages=[evaluate]", "objective=distil", f"distil.teacher={start}", "name=d"))
    assert "distil stage is not finished" in message


def test_evaluate_says_that_the_reward_model_is_missing(prefer):
    message = "\n".join(problems(prefer, "stages=[prefer, evaluate]", "scorers={reward: {name: reward_model}}"))
    assert "reward stage" in message
    assert "scorers.reward.path" in message


# -- 3. distil: the divergence -----------------------------------------------------------------------------------------

SKEWS = [Distil(), Distil(skew=0.3), Distil(skew=0.3, skew_of="teacher")]
skew_id = {0: "plain", 1: "student", 2: "teacher"}.__getitem__
every_skew = pytest.mark.parametrize("objective", SKEWS, ids=map(skew_id, range(3)))


def logits(*shape, seed=5, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def two_laws():
    """Logits of student and teacher at 3 × 5 tokens of 11 words, some of them padding."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    return logits(3, 5, 11).requires_grad_(), logits(3, 5, 11, seed=6), mask


def tokens_of(objective, f, chunk):
    """Values and gradient of what the stage calls; every row with a weight of its own."""
    ours, theirs, mask = two_laws()
    values = token_divergences(objective, f, ours, theirs, mask, chunk)
    return values.detach(), torch.autograd.grad((values * T(1.0, -2.0, 0.5)[:, None]).sum(), ours)[0]


def mixed(objective, pi, q):
    """The two laws after the skew, in probabilities."""
    w = objective.skew
    return ((1 - w) * pi + w * q, q) if objective.skew_of == "student" else (pi, (1 - w) * q + w * pi)


@every_skew
@every_f
def test_by_token_it_is_the_exact_divergence_of_the_whole_vocabulary_in_value_and_gradient(f, objective):
    ours, theirs, mask = two_laws()
    values, gradient = tokens_of(objective, f, 4)
    pi, q = mixed(objective, ours.softmax(-1), theirs.softmax(-1))
    plain_sum = (q * by_hand(f, pi / q)).sum(-1) * mask
    assert torch.allclose(values, plain_sum.detach(), rtol=1e-8, atol=1e-9)
    assert torch.allclose(values, (exact(f, pi.log(), q.log()) * mask).detach(), rtol=1e-12, atol=1e-14)
    expected = torch.autograd.grad((plain_sum * T(1.0, -2.0, 0.5)[:, None]).sum(), ours)[0]
    assert torch.allclose(gradient, expected, rtol=1e-7, atol=1e-9)
    assert (gradient[mask == 0] == 0).all()
    assert gradient[mask == 1].abs().max() > 1e-3


@every_skew
@every_f
def test_a_student_that_is_its_teacher_has_neither_loss_nor_gradient(f, objective):
    ours = logits(4, 6, 9).requires_grad_()
    values = token_divergences(objective, f, ours, ours.detach().clone(), torch.ones(4, 6), 5)
    assert values.abs().max() <= 1e-12
    if f.name != "tv":  # which has a kink there
        assert torch.autograd.grad(values.sum(), ours)[0].abs().max() <= 1e-12


@pytest.mark.parametrize("f", [divergences.get(name) for name in ("js", "forward_kl", "pearson_chi2")], ids=label)
@every_skew
def test_the_chunk_changes_neither_value_nor_gradient(f, objective):
    whole = tokens_of(objective, f, 10**6)
    for chunk in (1, 3):
        for found, expected in zip(tokens_of(objective, f, chunk), whole, strict=True):
            assert torch.allclose(found, expected, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize(("name", "turned"), [("forward_kl", False), ("reverse_kl", True)])
def test_both_kls_are_torchs_kl_div_and_forward_kl_has_the_gradient_of_soft_cross_entropy(name, turned):
    ours, theirs, mask = two_laws()
    values, gradient = tokens_of(Distil(), divergences.get(name), 4)
    log_pi, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
    by_torch = F.kl_div(*((log_q, log_pi) if turned else (log_pi, log_q)), reduction="none", log_target=True).sum(-1)
    assert torch.allclose(values, (by_torch * mask).detach(), rtol=1e-10, atol=1e-12)
    soft = -(theirs.softmax(-1) * log_pi).sum(-1)
    weighted = ((by_torch if turned else soft) * mask * T(1.0, -2.0, 0.5)[:, None]).sum()
    assert torch.allclose(gradient, torch.autograd.grad(weighted, ours)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("w", [0.1, 0.5, 0.9])
def test_the_skew_is_that_of_distillm(w):
    """arXiv 2402.03898, p the teacher, q the student: SKL = KL(p ‖ w·p + (1 − w)·q), SRKL = KL(q ‖ (1 − w)·p + w·q)."""

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    q, p = logits(40, 7).softmax(-1), logits(40, 7, seed=6).softmax(-1)
    arguments = q.log(), p.log()
    forward = Distil(skew=w).divergence(divergences.get("forward_kl"), *arguments)
    reverse = Distil(skew=w, skew_of="teacher").divergence(divergences.get("reverse_kl"), *arguments)
    assert torch.allclose(forward, kl(p, w * p + (1 - w) * q), rtol=1e-10)
    assert torch.allclose(reverse, kl(q, (1 - w) * p + w * q), rtol=1e-10)
    assert (kl(p, q) - forward).min() > 0


@pytest.mark.parametrize(
    ("name", "skew_of", "least"),
    [("forward_kl", "student", 50), ("neyman_chi2", "student", 1e20), ("reverse_kl", "teacher", 50),
     ("pearson_chi2", "teacher", 1e20)],
)  # fmt: skip
def test_a_skew_stays_small_where_the_plain_divergence_explodes(name, skew_of, least):
    """One rules out what the other is all but sure of: 60 nats apart, in the float32 of a model."""
    f, sure, not_so = divergences.get(name), torch.tensor([[60.0, 0.0, 0.0]]), torch.tensor([[0.0, 60.0, 0.0]])
    ours, theirs = (not_so, sure) if skew_of == "student" else (sure, not_so)
    ours, mask = ours[None].requires_grad_(), torch.ones(1, 1)
    plain_value = token_divergences(Distil(), f, ours, theirs[None], mask, 1)
    skewed = token_divergences(Distil(skew=0.1, skew_of=skew_of), f, ours, theirs[None], mask, 1)
    assert plain_value > least
    bound = {"forward_kl": math.log(10), "reverse_kl": math.log(10), "neyman_chi2": 9.0, "pearson_chi2": 9.0}[name]
    assert 0 < skewed.item() <= bound * 1.001
    slope = torch.autograd.grad(skewed.sum(), ours)[0]
    assert slope.isfinite().all()
    assert slope.abs().max() <= 10


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_it_is_trls_gkd_where_the_scales_meet(beta):
    """TRL mixes β of the teacher into the student and weighs β·KL(teacher‖m) + (1 − β)·KL(student‖m): our skew_js with
    w = 1 − β, hence ½·js at β = ½. At 0 and 1 it jumps to the plain forward and reverse KL. It averages over tokens."""
    from trl.experimental.gkd import GKDTrainer

    if beta in (0, 1):
        f, scale = divergences.get("forward_kl" if beta == 0 else "reverse_kl"), 1.0
    else:
        f, scale = divergences.get("skew_js", w=1 - beta), 1.0
    for f, scale in [(f, scale), *([(divergences.get("js"), 0.5)] if beta == 0.5 else [])]:  # noqa: B020
        ours, theirs, mask = two_laws()
        found = scale * token_divergences(Distil(), f, ours, theirs, mask, 4).sum() / mask.sum()
        trl = GKDTrainer.generalized_jsd_loss(ours, theirs, labels=mask - 1 - 99 * (1 - mask), beta=beta)
        assert found.item() == pytest.approx(trl.item(), rel=1e-9)
        slopes = [torch.autograd.grad(x, ours)[0] for x in (found, trl)]
        assert torch.allclose(*slopes, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_padding_contributes_nothing_to_loss_or_gradient(architecture):
    """Prompts and texts of unequal lengths in one batch, and each alone; gpt2's positions are absolute."""
    prompts, texts = [[1], [2, 0, 1], [1, 2]], [[2, 1, 0, 3], [3], [0, 0, 1]]
    student, teacher = Policy(tiny_lm(architecture)), Policy(tiny_lm(architecture, seed=8))
    f = divergences.get("js")

    def loss(p, t):
        batch = Sequences.of(p, t)
        with torch.no_grad():
            theirs = teacher(batch).logits
        return token_divergences(Distil(), f, student(batch).logits, theirs, batch.mask, 2).sum(-1)

    together = loss(prompts, texts)
    alone = torch.cat([loss([p], [t]) for p, t in zip(prompts, texts, strict=True)])
    assert torch.allclose(together, alone, rtol=1e-6)
    weights = [p for p in student.parameters() if p.requires_grad]
    pair = [torch.autograd.grad(x.sum(), weights, allow_unused=True) for x in (together, alone)]
    for a, b in zip(*pair, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-4, atol=1e-7)


# -- 4. the distil stage -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(start, tmp_path_factory):
    return moved(start, tmp_path_factory.mktemp("teacher") / "teacher", 0.1)


@pytest.fixture
def distil(start, data, teacher, tmp_path):
    """distil("a.b=value", …): runs the distil stage alone, from the untouched model, and gives its folder."""
    raw = tiny.raw_config(start, data, tmp_path / "runs")
    raw |= {"stages": ["distil"], "scorers": {}, "report_to": "none", "divergence": "js", "objective": "distil"}
    raw["model"] = {"name_or_path": start}
    raw["data"]["sft_train"] = write_rows(
        tmp_path / "texts.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs()]
    )
    raw["distil"] = {
        "model": start, "teacher": teacher, "max_steps": 4, "num_prompts": 6, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "max_completion_length": LENGTH, "save_steps": 2, "chunk": 7,
    }  # fmt: skip
    path = write_config(tmp_path / "distil.yaml", raw)

    def distil(*overrides):
        return run(path, *overrides).path / "distil"

    distil.path = path
    return distil


def on_policy(share, **more):
    return f"objective={json.dumps({'name': 'distil', 'on_policy': share} | more)}"


def drawn(lm, prompts, step, seed=0):
    """The completions that `step` draws from `lm`, as text ids: sampling itself is proved in test_rollout.py."""
    tok = tiny.tokenizer(eos_token="<eos>", pad_token="<pad>")
    ids = tok(prompts)["input_ids"]
    batch, *_ = sample(lm, tok, ids, 1, uniforms(seed, step, len(ids), LENGTH))
    return [x[keep.bool()].tolist() for x, keep in zip(batch.completion_ids, batch.mask, strict=True)]


def divergence_by_hand(f, objective, student, teacher, prompt, written):
    """Σ_tokens of D_f for one text, from plain models in float64; one row without padding."""
    ids = tiny.tokenizer()(prompt)["input_ids"]
    both = torch.tensor([ids + written])
    pi, q = (lm(both).logits[0, len(ids) - 1 : -1].softmax(-1) for lm in (student, teacher))
    pi, q = mixed(objective, pi, q.detach())
    return (q * by_hand(f, pi / q)).sum()


DISTILLATIONS = {
    "js, own texts": ("js", Distil(on_policy=1.0)),
    "forward_kl, data": ("forward_kl", Distil(on_policy=0.0)),
    "reverse_kl, both": ("reverse_kl", Distil(on_policy=0.5)),
    "skewed student": ("forward_kl", Distil(on_policy=0.0, skew=0.1)),
    "skewed teacher": ("reverse_kl", Distil(on_policy=1.0, skew=0.2, skew_of="teacher")),
}


@pytest.mark.parametrize("case", DISTILLATIONS)
def test_steps_are_those_of_gradient_descent_on_the_divergence_to_the_teacher(distil, start, teacher, data, case):
    """Texts as given: of the data, or drawn from the student as it then is. The sum of a text's tokens, the mean of
    texts; four steps, so that a teacher that moved, or a student that did not, would show."""
    name, objective = DISTILLATIONS[case]
    f, steps, rate = divergences.get(name), 4, 0.2
    out = distil(
        on_policy(objective.on_policy, skew=objective.skew, skew_of=objective.skew_of), f"divergence={name}", FULL,
        "model.dtype=float64", "distil.optim=sgd", "distil.max_grad_norm=1e9", f"distil.learning_rate={rate}",
        f"distil.max_steps={steps}", "distil.num_prompts=5", "distil.per_device_train_batch_size=2",
    )  # fmt: skip
    student, fixed = plain(start, torch.float64), plain(teacher, torch.float64)
    prompts = [row["prompt"] for row in jsonl(Path(data["prompts_train"]))]
    tok, logged, kinds = tiny.tokenizer(), jsonl(out / "metrics.jsonl"), set()
    for step in range(1, steps + 1):
        own = logged[step - 1]["on_policy"] == 1
        assert own == (float(uniforms(0, step, 1, 1, stream=2)) < objective.on_policy), "noise of its own"
        kinds.add(own)
        if own:
            batch = [prompts[i] for i in row_order(0, step, 5, 12)]
            texts = drawn(student, batch, step)
        else:
            rows = [pairs()[i] for i in row_order(0, step, 5, 18)]
            batch, texts = [r["prompt"] for r in rows], [[*tok(r["chosen"])["input_ids"], 1] for r in rows]
        loss = sum(
            divergence_by_hand(f, objective, student, fixed, p, t) for p, t in zip(batch, texts, strict=True)
        ) / len(batch)
        slopes = torch.autograd.grad(loss, [*student.parameters()])
        with torch.no_grad():
            for weight, slope in zip(student.parameters(), slopes, strict=True):
                weight -= rate * slope
        length = sum(map(len, texts)) / len(texts)
        assert logged[step - 1]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert logged[step - 1]["length"] == pytest.approx(length, rel=1e-5)
        assert logged[step - 1]["divergence_by_token"] == pytest.approx(loss.item() / length, rel=1e-5)
    assert kinds == {0.0: {False}, 0.5: {True, False}, 1.0: {True}}[objective.on_policy]
    expected = {k: v for k, v in student.state_dict().items() if k in weights(out / "model")}
    assert away(weights(out / "model"), expected) <= 1e-6
    assert away(weights(out / "model"), weights(Path(start))) > 1e-2


def test_the_share_of_own_texts_is_what_was_asked_for(distil):
    rows = jsonl(distil(on_policy(0.3), "distil.max_steps=40", "distil.num_prompts=2") / "metrics.jsonl")
    own = sum(row["on_policy"] for row in rows)
    assert all(row["on_policy"] in (0, 1) for row in rows)
    assert 5 <= own <= 19, "12 of 40, give or take two and a half standard deviations"
    assert len({row["on_policy"] for row in rows[:10]}) == 2, "interleaved"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "steps", "name", "less"), [(0.0, 80, "js", 25), (0.5, 80, "forward_kl", 4), (1.0, 80, "reverse_kl", 6)]
)
def test_the_student_reaches_its_teacher(distil, start, teacher, share, steps, name, less):
    out = distil(
        on_policy(share), f"divergence={name}", FULL, "distil.num_prompts=12", "distil.per_device_train_batch_size=12",
        f"distil.max_steps={steps}", "distil.lr_scheduler_type=linear", "distil.save_steps=1000",
    )  # fmt: skip
    losses = [row["loss"] for row in jsonl(out / "metrics.jsonl")]
    assert losses[0] > 0.5
    assert sum(losses[-5:]) / 5 < losses[0] / less
    seen = [r["prompt"] for r in pairs()]
    with torch.no_grad():
        apart = [
            (logits_of(plain(m), seen[i], pairs()[i]["chosen"])[0].softmax(-1)
             - logits_of(plain(teacher), seen[i], pairs()[i]["chosen"])[0].softmax(-1)).abs().sum(-1).mean() / 2
            for m in (start, out / "model") for i in range(6)
        ]  # fmt: skip
    before, after = (float(torch.stack(apart[k : k + 6]).mean()) for k in (0, 6))
    assert after < before / 2, "on texts of the data, whoever wrote those of training"


def test_a_student_that_starts_as_its_teacher_stays_where_it_is(distil, start):
    out = distil(f"distil.teacher={start}", FULL)
    assert [(row["loss"], row["grad_norm"]) for row in jsonl(out / "metrics.jsonl")] == [(0, 0)] * 4
    assert same(weights(out / "model"), weights(Path(start)))


@pytest.mark.parametrize("model", [FULL, LORA], ids=["full", "lora"])
def test_the_teacher_is_left_as_it_is_and_in_no_checkpoint(distil, teacher, model):
    before = {p.name: p.read_bytes() for p in Path(teacher).iterdir()}
    out = distil(model)
    assert {p.name: p.read_bytes() for p in Path(teacher).iterdir()} == before
    (file,) = (out / "checkpoint-4").glob("*.safetensors")
    names = [n for n in load_file(file) if "lora_" in n] if model == LORA else [*weights(out / "model")]
    assert len(load_file(file)) == len(names)
    assert (out / "adapter").is_dir() == (model == LORA)


@pytest.mark.parametrize("size", [1, 5])
def test_the_size_of_a_micro_batch_does_not_change_the_steps_of_distil(distil, size):
    args = (FULL, "model.dtype=float64", on_policy(0.5), "distil.optim=sgd", "distil.learning_rate=.1")
    outs = [distil(*args, f"name=of{n}", f"distil.per_device_train_batch_size={n}") for n in (6, size)]
    assert away(*(weights(out / "model") for out in outs)) <= 1e-7
    for whole, split in zip(*(without_time(jsonl(out / "metrics.jsonl")) for out in outs), strict=True):
        assert split == pytest.approx(whole, rel=1e-5, abs=1e-6)


DISTIL_RESUMES = {
    "own texts, lora": [LORA, "divergence=forward_kl"],
    "both, full": [FULL, on_policy(0.5), "distil.lr_scheduler_type=cosine", "distil.warmup_steps=1"],
    "data, bfloat16": [FULL, on_policy(0.0), "model.dtype=bfloat16"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "step"), [(case, 3) for case in DISTIL_RESUMES] + [("both, full", 1)])
def test_distillation_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(distil, monkeypatch, case, step):
    unbroken = distil(*DISTIL_RESUMES[case], "name=unbroken")
    stop_after(monkeypatch, step)
    with pytest.raises(Stopped):
        distil(*DISTIL_RESUMES[case], "name=broken")
    monkeypatch.undo()
    assert_same_outcome(distil(*DISTIL_RESUMES[case], "name=broken"), unbroken)


def test_a_distillation_whose_loss_is_not_finite_stops_the_step_and_keeps_its_prompts(distil):
    message = "\n".join(problems(distil, FULL, on_policy(0.0), "distil.optim=sgd", "distil.learning_rate=1e30"))
    out = Path(distil.path).parent / "runs" / "distil" / "distil"
    assert "step 2" in message
    assert str(out / "bad_batch-2.parquet") in message
    kept = pd.read_parquet(out / "bad_batch-2.parquet")["prompt"].tolist()
    assert kept == [pairs()[i]["prompt"] for i in row_order(0, 2, 6, 18)]
    assert not (out / "model").exists()
    assert [row["step"] for row in jsonl(out / "metrics.jsonl")] == [1]


def test_a_teacher_of_another_vocabulary_is_refused(distil, start, tmp_path):
    plain(start).save_pretrained(tmp_path / "other")
    words = tiny.WORDS[:-2] + tiny.WORDS[:-3:-1]  # as many words, two of them with each other's number
    made = tiny.Tokenizer(tiny.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = tiny.pre_tokenizers.Whitespace()
    tiny.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(tmp_path / "other")
    (message,) = problems(distil, f"distil.teacher={tmp_path / 'other'}")
    assert message.startswith("distil.teacher: ")
    assert str(tmp_path / "other") in message
    assert "another vocabulary" in message


def test_a_missing_teacher_is_told_at_once(distil, no_model, tmp_path):
    (message,) = problems(distil, "distil.teacher=null")
    assert message.endswith("distil.teacher: is required by the distil stage, a model folder or hub name")
    message = "\n".join(problems(distil, f"distil.teacher={tmp_path / 'nowhere'}"))
    assert str(tmp_path / "nowhere") in message


@pytest.mark.parametrize(("share", "needed"), [(1.0, "prompts_train"), (0.0, "sft_train"), (0.5, "sft_train")])
def test_distil_asks_for_the_data_that_it_reads_and_no_other(distil, share, needed):
    missing = {"prompts_train", "sft_train"} - ({needed} if share != 0.5 else {"prompts_train", "sft_train"})
    out = distil(on_policy(share), *(f"data.{key}=null" for key in missing))
    assert len(jsonl(out / "metrics.jsonl")) == 4
    (message,) = problems(distil, on_policy(share), f"data.{needed}=null", "name=other")
    assert message.endswith(f"data.{needed}: is required by the distil stage")


def test_the_loss_of_the_stage_is_trls_gkd_on_the_same_texts(distil, start, teacher):
    """One step of all 18 texts: TRL's mean of tokens × tokens a text = our mean of sums; js is twice its JSD at β = ½."""
    from trl.experimental.gkd import GKDTrainer

    out = distil(FULL, on_policy(0.0), "distil.num_prompts=18", "distil.max_steps=1")
    with torch.no_grad():
        parts = [[logits_of(plain(m), r["prompt"], r["chosen"])[0] for r in pairs()] for m in (start, teacher)]
        by_token = GKDTrainer.generalized_jsd_loss(
            *(torch.cat(part)[None] for part in parts), beta=0.5, reduction="sum"
        )
    assert jsonl(out / "metrics.jsonl")[0]["loss"] == pytest.approx(2 * float(by_token) / 18, rel=2e-5)


@pytest.mark.slow
def test_evaluate_after_distil_reports_the_divergence_to_the_teacher(distil, start, teacher, data):
    """On the student's own held-out texts, drawn again here: k1 of student and teacher by plain transformers."""
    out = distil("stages=[distil, evaluate]", FULL, "evaluate.num_generations=8", "distil.learning_rate=3e-4")
    report, text = evaluated(out.parent)
    prompts = [row["prompt"] for row in jsonl(Path(data["prompts_eval"]))]
    tok, ratios = tiny.tokenizer(eos_token="<eos>", pad_token="<pad>"), {}
    noise = uniforms(1, 0, len(prompts) * 8, LENGTH)
    batch, *_ = sample(plain(out / "model"), tok, tok(prompts)["input_ids"], 8, noise)
    with torch.no_grad():
        log_probs = {
            name: (Policy(plain(m))(batch).log_probs * batch.mask).sum(1).double()
            for name, m in (("student", out / "model"), ("teacher", teacher), ("start", start))
        }
    for name, key in (("teacher", "divergence_to_target"), ("start", "divergence_to_reference")):
        ratios[name] = log_probs["student"] - log_probs[name]
        assert report[key].keys() == {"reverse_kl", "forward_kl", "js", "tv", "hellinger", "pearson_chi2"}
        assert report[key]["reverse_kl"]["value"] == pytest.approx(float(ratios[name].mean()), abs=1e-4)
        apart = (ratios[name].exp() + 1e-30).reciprocal()
        assert report[key]["tv"]["value"] == pytest.approx(float((1 - apart).clamp(min=0).mean()), abs=1e-4)
    values = [report[key]["reverse_kl"]["value"] for key in ("divergence_to_target", "divergence_to_reference")]
    assert values[0] > 5 * values[1] > 0.02, "the two are told apart"
    assert f"teacher `{teacher}`" in text
    assert (out.parent / "evaluate" / "training.png").is_file()


# -- 5. far away, and other things that go wrong in long runs ----------------------------------------------------------


@pytest.mark.parametrize("name", ["reverse_kl", "js", "chi_mix"])
def test_a_long_text_hundreds_of_nats_away_still_has_its_reward_and_its_slope(name):
    """A rejected text of a thousand tokens: log π/a = −400 for one pair, −700 for another, and DPO goes on telling them
    apart. Of these three, f' is linear in log t there."""
    f, s = divergences.get(name), T(-400.0, -700.0, -5000.0).requires_grad_()
    reward = Prefer(beta=0.1).reward(f, s, torch.zeros(3))
    assert (reward.diff() / s.diff()).tolist() == pytest.approx([0.1, 0.1], rel=1e-9)
    assert torch.autograd.grad(reward.sum(), s)[0].tolist() == pytest.approx([0.1] * 3, rel=1e-9)


@pytest.mark.parametrize("f", [*VALID, divergences.get("alpha", alpha=-3.0)], ids=label)
def test_far_from_the_reference_the_gradient_of_the_weights_stays_in_float32(f, start):
    """Models whose log-ratios reach tens and hundreds of nats either way: no inf and no nan to stop a run with."""
    lm, reference, seen = plain(start), plain(start), []
    both = prefer_stage.tokenize_pairs(pairs(), tiny.tokenizer(eos_token="<eos>", pad_token="<pad>"), "", LENGTH, 64)
    for scale in (10, 4, 4, 3):
        with torch.no_grad():
            lm.lm_head.weight *= scale
        for i in range(0, 18, 4):
            one = prefer_stage.collate(both, [i], torch.device("cpu"))
            log_pi, log_a = ((Policy(m)(one).log_probs * one.mask).sum(1) for m in (lm, reference))
            chosen, rejected = Prefer(beta=0.1).reward(f, log_pi, log_a.detach()).chunk(2)
            loss = Prefer().loss(chosen - rejected, T(0.8))
            norm = torch.nn.utils.get_total_norm(torch.autograd.grad(loss.sum(), [*lm.parameters()]))
            assert loss.isfinite().all()
            assert norm.isfinite()
            seen += (log_pi - log_a).tolist()
    assert min(seen) < -400
    assert sum(-300 < s < -43 for s in seen) >= 8


def test_a_run_with_forward_kl_that_went_far_goes_on(prefer):
    out = prefer(FULL, "divergence=forward_kl", "prefer.optim=sgd", "prefer.learning_rate=100", "prefer.max_steps=3")
    assert len(jsonl(out / "metrics.jsonl")) == 3


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js", "hellinger"])
@every_skew
def test_a_student_that_rules_out_its_teachers_word_gets_a_gradient_in_float32(name, objective):
    """100 nats apart: π·f'(π/q) is 0·∞ for forward KL, whose gradient is π − q all the same."""
    f = divergences.get(name)
    ours = torch.tensor([[[0.0, 100.0, 0.0], [110.0, 1.0, 0.0]]], requires_grad=True)
    theirs = torch.tensor([[[100.0, 0.0, 0.0], [-2.0, 0.0, 1.0]]])
    values = token_divergences(objective, f, ours, theirs, torch.ones(1, 2), 1)
    (found,) = torch.autograd.grad(values.sum(), ours)
    exactly = ours.detach().double().requires_grad_()
    pi, q = mixed(objective, exactly.softmax(-1), theirs.double().softmax(-1))
    (expected,) = torch.autograd.grad((q * by_hand(f, pi / q)).sum(), exactly)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5)
    if name == "forward_kl" and not objective.skew:
        assert torch.allclose(found, ours.softmax(-1) - theirs.softmax(-1), rtol=0, atol=1e-5)


def test_no_clipping_is_asked_for_by_0_as_in_training_arguments(prefer):
    """Not gradients of zero, with which a run would finish untrained and say nothing."""
    outs = [prefer(f"name=norm{n}", f"prefer.max_grad_norm={n}") for n in ("0", "1e9")]
    assert same(*(weights(out / "model") for out in outs))
    assert jsonl(outs[0] / "metrics.jsonl")[-1]["loss"] < LN2 - 0.05


def test_accuracy_is_agreement_with_the_raters_whichever_text_they_prefer(prefer, tmp_path):
    turned = [
        {"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"], "preference": 0.1} for r in pairs()
    ]
    rows = write_rows(tmp_path / "turned.jsonl", turned)
    out = prefer(f"data.preferences_train={rows}", f"data.preferences_eval={rows}", "prefer.max_steps=15")
    assert json.loads((out / "accuracy.json").read_text())["accuracy"] > 0.9
    assert jsonl(out / "metrics.jsonl")[-1]["accuracy"] > 0.8


def test_a_held_out_pair_that_is_too_long_is_told_before_training_not_after_it(prefer, tmp_path, no_model):
    long = [*pairs()[:2], {"prompt": "very " * 60, "chosen": "good", "rejected": "bad"}]
    message = "\n".join(problems(prefer, f"data.preferences_eval={write_rows(tmp_path / 'long.jsonl', long)}"))
    assert "long.jsonl, row 3" in message
    assert "60 tokens" in message


def test_everything_wrong_with_pairs_and_teacher_is_told_before_an_earlier_stage_runs(
    prefer, distil, tmp_path, no_model
):
    long = [row | {"completion": "good"} for row in pairs()[:3]]
    long[2]["prompt"] = "very " * 60
    rows = write_rows(tmp_path / "long.jsonl", long)
    message = "\n".join(problems(prefer, "stages=[sft, prefer]", f"data.preferences_train={rows}"))
    assert "long.jsonl, row 3" in message
    message = "\n".join(problems(distil, "stages=[sft, distil]", on_policy(0.0), f"data.sft_train={rows}"))
    assert "long.jsonl, row 3" in message
    message = "\n".join(problems(distil, "stages=[sft, distil]", f"distil.teacher={tmp_path / 'nowhere'}"))
    assert str(tmp_path / "nowhere") in message
    assert not (tmp_path / "runs").exists(), "told before the run begins"


@pytest.mark.parametrize(("rows", "right"), [(32, True), (20, False)])
def test_a_teacher_whose_embeddings_are_padded_further_is_read_without_the_padding(
    distil, start, teacher, tmp_path, rows, right
):
    """One tokenizer, 24 words, and 32 rows of embeddings, as within Qwen2.5; or fewer than the student's, which cannot be."""
    lm = plain(teacher)
    torch.manual_seed(1)
    lm.resize_token_embeddings(rows, mean_resizing=False)
    lm.save_pretrained(tmp_path / "padded")
    tiny.tokenizer().save_pretrained(tmp_path / "padded")
    if right:
        outs = [
            distil(FULL, f"name={n}", f"distil.teacher={t}") for n, t in (("p", tmp_path / "padded"), ("t", teacher))
        ]
        logged = [[row["loss"] for row in jsonl(out / "metrics.jsonl")] for out in outs]
        assert logged[0] == pytest.approx(logged[1], rel=1e-5), "padding has no mass once it is left out"
        assert away(*(weights(out / "model") for out in outs)) <= 1e-5
    else:
        (message,) = problems(distil, f"distil.teacher={tmp_path / 'padded'}")
        assert message.startswith("distil.teacher: ")
        assert "20 rows" in message


def test_the_reported_objective_of_prefer_is_reward_less_beta_kl_of_one_beta(prefer):
    scorers = "scorers={reward: {name: pattern, pattern: good}}"
    folder = prefer(scorers, "stages=[prefer, evaluate]", "target={name: tilted, reward: reward, beta: .3}").parent
    report, _ = evaluated(folder)
    for model in ("sft", "policy"):
        values = report[model]
        assert values["objective"] == pytest.approx(
            values["reward"] - report["beta"] * values["kl_reference"], abs=1e-6
        )


def test_a_loss_that_is_not_finite_is_told_once(prefer):
    told = problems(prefer, FULL, "prefer.optim=sgd", "prefer.learning_rate=1e30")
    assert len(told) == len(set(told)) == 2


LATE = """
import time
from accelerate import Accelerator
from rlhf_fdiv.stages.common import run_stage
saved = Accelerator.save_state

def late(self, *args, **kwargs):
    time.sleep(3 * self.process_index)
    return saved(self, *args, **kwargs)

Accelerator.save_state = late
run_stage("prefer")
"""


@pytest.mark.slow
def test_a_checkpoint_is_renamed_only_when_every_process_has_written_its_part(prefer, tmp_path):
    (tmp_path / "late.py").write_text(LATE)
    args = (FULL, "prefer.max_steps=1", "data.preferences_eval=null")
    said = two_processes(str(tmp_path / "late.py"), prefer.path, *args)
    out = tmp_path / "runs" / "prefer" / "prefer"
    assert (out / "finished.json").is_file(), said
    assert sorted(p.name for p in out.glob("*checkpoint*")) == ["checkpoint-1"]
    assert len(list((out / "checkpoint-1").glob("random_states_*.pkl"))) == 2
