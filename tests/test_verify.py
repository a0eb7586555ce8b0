"""The proof proves what is right, and finds what is wrong: each mutation of the library must fail the rows it concerns."""

import json
import sys
from collections import Counter

import pytest
import torch
from toy import FS

from rlhf_fdiv import divergences, objectives, rollout, targets, verify
from rlhf_fdiv.divergences import label
from rlhf_fdiv.estimators import RLOO, policy_loss
from rlhf_fdiv.objectives import Match, Regularise
from rlhf_fdiv.rollout import Rollout
from rlhf_fdiv.sequences import Sequences
from rlhf_fdiv.stages import policy as policy_stage
from rlhf_fdiv.stages import policy_update

STATUSES = {"pass", "fail", "biased", "undefined"}
UNBIASED = ("reinforce", "rloo", "grpo(scale_rewards=False)", "ppo")
EXACT = ("reinforce", "ppo")


@pytest.fixture
def fewer(monkeypatch):
    """Two of the four targets, for speed."""
    kept = {name: target for name, target in verify.TARGETS.items() if name in ("tilted", "moments")}
    monkeypatch.setattr(verify, "TARGETS", kept)


def rows_of(*specs):
    return [row for part in verify.verify(specs) for row in part]


def statuses(rows, objective="match", target="tilted"):
    """The status of each estimator's row."""
    return {row.estimator: row.status for row in rows if (row.objective, row.target) == (objective, target)}


# -- what is right -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_table_holds_every_combination_and_nothing_fails():
    rows = rows_of()
    assert {row.status for row in rows} == STATUSES - {"fail"}
    found = Counter(row[:4] for row in rows)
    assert max(found.values()) == 1
    assert len(divergences.names()) >= 10
    for f in FS:
        for objective in ("match", "regularise"):
            for target in ("tilted", "moments", "pointwise", "product"):
                for estimator in ("reinforce", "rloo", "grpo", "ppo"):
                    assert (label(f), objective, target, estimator) in found
    for row in rows:
        assert row.reason or row.status == "pass"
        if row.status == "pass" and row.objective != "sampler":
            assert row.relative_error <= 1e-9, row


@pytest.mark.slow
def test_a_row_agrees_with_what_its_combination_allows():
    rows = rows_of("js")
    assert len({row[:4] for row in rows}) == len(rows) == 2 + 2 * 4 * 5 + 4
    for row in rows:
        undefined = (row.objective, row.target) == ("regularise", "pointwise")
        biased = row.estimator == "grpo" or row.estimator.startswith(("ppo,", "rloo,"))
        assert row.status == ("undefined" if undefined else "biased" if biased else "pass"), row
        assert bool(row.reason) == (row.status != "pass" or row.estimator.startswith("grpo") or row.target == "-")
        if undefined:
            assert row[4:6] == (None, None)
            assert "−inf" in row.reason
        elif row.status == "pass" and row.objective != "sampler":
            assert row.relative_error <= 1e-9


def test_in_reverse_kl_a_batch_local_log_z_does_no_harm_and_p_zero_is_refused(fewer, monkeypatch):
    monkeypatch.setitem(verify.TARGETS, "pointwise", targets.Pointwise("b"))
    rows = rows_of("reverse_kl")
    assert statuses(rows)["rloo, batch-local Z"] == "pass"
    refused = [row for row in rows if row.target == "pointwise"]
    assert {row.status for row in refused} == {"undefined"}
    assert "f'(∞)" in refused[0].reason


def test_the_moments_are_solved_for_the_enumerated_language(tmp_path):
    proof = verify.Proof(tmp_path)
    target = proof.targets["moments"]
    scores = verify.toy.scores()
    log_a = verify.sequence_sum(proof.log_a, proof.mask)
    p = (log_a + target.potential(scores)).view(verify.P, verify.N).softmax(1)
    for name, goal in target.moments.items():
        assert float((p * scores[name].view_as(p)).sum(1).mean()) == pytest.approx(goal, abs=1e-6)
    assert set(scores["has_1"].tolist()) == {0.0, 1.0}
    assert len(scores["reward"].unique()) > 20


def test_every_group_that_the_policy_can_draw_is_there_with_its_chance(tmp_path):
    proof = verify.Proof(tmp_path)
    rows, chance = proof.groups
    prompts = (rows // verify.N).view(-1, verify.K)
    assert (prompts == prompts[:, :1]).all()
    assert len(rows.view(-1, verify.K).unique(dim=0)) == verify.P * verify.N**verify.K
    drawn = torch.bincount(rows, chance, minlength=verify.P * verify.N) / verify.K
    assert torch.allclose(drawn, verify.sequence_sum(proof.log_pi, proof.mask).exp(), rtol=1e-9)


# -- what is wrong -----------------------------------------------------------------------------------------------------


def test_a_wrong_sign_of_the_pseudo_reward_fails_every_row_of_match_alone(fewer, monkeypatch):
    right = Match.pseudo_reward
    monkeypatch.setattr(Match, "pseudo_reward", lambda *args: -right(*args))
    rows = rows_of("js")
    assert set(statuses(rows).values()) == {"fail"}
    assert all(row.cosine < 0 for row in rows if row.objective == "match")
    assert "fail" not in statuses(rows, "regularise").values()


@pytest.mark.parametrize("factor", [1.1, 0.9])
def test_a_wrong_factor_fails_every_unbiased_row(fewer, monkeypatch, factor):
    right = Match.pseudo_reward
    monkeypatch.setattr(Match, "pseudo_reward", lambda *args: factor * right(*args))
    found = statuses(rows_of("js"))
    assert {found[name] for name in UNBIASED} == {"fail"}


def test_a_beta_that_is_forgotten_fails_regularise(fewer, monkeypatch):
    def forgetful(self, f, log_pi, log_a, potential, log_z):
        return self.beta * potential - f.f_prime(log_pi - log_a)

    monkeypatch.setattr(Regularise, "pseudo_reward", forgetful)
    rows = rows_of("js")
    assert {statuses(rows, "regularise")[name] for name in UNBIASED} == {"fail"}
    assert "fail" not in statuses(rows).values()


def test_a_baseline_that_includes_the_sample_itself_fails_rloo_alone(fewer, monkeypatch):
    def including_itself(self, scores, weights):
        return weights * (scores - (weights * scores).mean(1, keepdim=True))

    monkeypatch.setattr(RLOO, "advantage", including_itself)
    rows = rows_of("js")
    for target in ("tilted", "moments"):
        found = statuses(rows, target=target)
        assert [name for name, status in found.items() if status == "fail"] == ["rloo"]


@pytest.mark.slow
def test_a_missing_log_z_fails_match_except_in_reverse_kl(fewer, monkeypatch):
    right = Match.pseudo_reward
    monkeypatch.setattr(Match, "pseudo_reward", lambda *args: right(*args[:-1], torch.zeros_like(args[-1])))
    rows = rows_of("js", "reverse_kl")
    js, reverse_kl = (statuses([row for row in rows if row.divergence == name]) for name in ("js", "reverse_kl"))
    assert {js[name] for name in UNBIASED} == {"fail"}
    assert {reverse_kl[name] for name in UNBIASED} == {"pass"}, "a constant of the prompt, whose gradient is zero"


@pytest.mark.slow
def test_a_log_z_that_is_too_large_fails(fewer, monkeypatch):
    right = targets.LogPartition.update
    monkeypatch.setattr(targets.LogPartition, "update", lambda *args: right(*args) + 0.1)
    assert {statuses(rows_of("js"))[name] for name in UNBIASED} == {"fail"}


def test_a_p_of_zero_that_costs_nothing_fails_pointwise_alone(fewer, monkeypatch):
    def free(self, f, log_pi, log_a, potential, log_z):
        return torch.where(potential == -torch.inf, 0.0, right(self, f, log_pi, log_a, potential, log_z))

    right = Match.pseudo_reward
    monkeypatch.setattr(Match, "pseudo_reward", free)
    monkeypatch.setitem(verify.TARGETS, "pointwise", targets.Pointwise("b"))
    rows = rows_of("js")
    assert {statuses(rows, target="pointwise")[name] for name in UNBIASED} == {"fail"}
    assert "fail" not in statuses(rows).values()


def test_a_score_paid_at_padding_fails_ppo(fewer, monkeypatch):
    def at_last_column(score, mask):
        return torch.nn.functional.pad(score[:, None], (mask.shape[1] - 1, 0))

    monkeypatch.setattr(objectives, "at_last_token", at_last_column)
    assert statuses(rows_of("js"))["ppo"] == "fail"


def test_a_loss_that_averages_over_tokens_fails_every_row(fewer, monkeypatch):
    def averaged(log_probs, old, advantages, mask, clip_range=None):
        return policy_loss(log_probs, old, advantages, mask, clip_range) / mask.sum(-1)

    monkeypatch.setattr(policy_update, "policy_loss", averaged)
    rows = rows_of("js")
    for objective in ("match", "regularise"):
        found = statuses(rows, objective)
        assert {found[name] for name in UNBIASED} == {"fail"}


def test_forgotten_importance_weights_fail_what_is_enumerated(fewer, monkeypatch):
    monkeypatch.setattr(Rollout, "weights", lambda self, cap: None)
    found = statuses(rows_of("js"))
    assert {found[name] for name in EXACT} == {"fail"}
    assert found["rloo"] == "pass"


@pytest.mark.slow
def test_a_second_epoch_with_the_weights_or_scores_of_the_first_fails_alone(fewer, monkeypatch):
    right = policy_update.importance_weights
    stale = [lambda log_pi, log_mu, cap: right(log_pi, log_mu, cap).new_full(log_mu.shape, 1.0), right]
    for weights, rewards_of in zip(stale, (verify.rewards_of, frozen), strict=True):
        monkeypatch.setattr(policy_update, "importance_weights", weights)
        monkeypatch.setattr(verify, "rewards_of", rewards_of)
        found = statuses(rows_of("js"))
        assert {name for name, status in found.items() if status == "fail"} == {"reinforce, second epoch"}


def frozen(objective, f, log_a, *rest):
    """Scores of the policy that sampled, whatever it is asked for."""
    right, first = policy_stage.rewards_of(objective, f, log_a, *rest), []

    def rewards(log_pi, rows=slice(None)):
        first.append(right(log_pi, rows))
        return first[0][:, : log_pi.shape[1]]

    return rewards


def test_an_infinite_reward_is_a_failed_row_not_a_crash(fewer, monkeypatch):
    monkeypatch.setattr(Match, "pseudo_reward", lambda self, f, log_pi, *_: torch.full_like(log_pi, torch.inf))
    rows = [row for row in rows_of("js") if row.objective == "match"]
    assert {row.status for row in rows} == {"fail"}
    assert all("infinite" in row.reason or "finite" in row.reason or "nan" in row.reason for row in rows)


def test_a_sampler_at_another_temperature_fails(monkeypatch, tmp_path):
    right = rollout._inverse_cdf
    monkeypatch.setattr(rollout, "_inverse_cdf", lambda logits, u: right(1.1 * logits, u))
    proof = verify.Proof(tmp_path)
    assert [proof.sampler(engine).status for engine in ("cached", "generate")] == ["fail", "pass"]


def test_positions_that_count_the_left_padding_fail(monkeypatch, tmp_path):
    right = Sequences.model_inputs

    def padded(self):
        inputs = right(self)
        return {**inputs, "position_ids": torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])}

    monkeypatch.setattr(Sequences, "model_inputs", padded)
    assert verify.Proof(tmp_path).sampler("cached").status == "fail"


# -- a stranger's f ----------------------------------------------------------------------------------------------------

STRANGERS = '''
import torch
from rlhf_fdiv.divergences import Divergence, get


class LeCam(Divergence):
    """½(t − 1)²/(t + 1), no more of it than a user must give."""

    name = "le_cam"
    f_prime_at_infinity = 0.5

    def f(self, s):
        return torch.expm1(s) * torch.tanh(s / 2) / 2

    def f_prime(self, s):
        h = torch.tanh(s / 2)
        return h * (2 - h) / 2


class WrongSlope(LeCam):
    name = "wrong_slope"

    def f_prime(self, s):
        return 1.01 * super().f_prime(s)


class WrongInfinity(LeCam):
    name = "wrong_infinity"
    f_prime_at_infinity = 0.51


class NotConvex(Divergence):
    """(ln t)²"""

    name = "not_convex"
    f_prime_at_infinity = 0.0

    def f(self, s):
        return s**2

    def f_prime(self, s):
        return 2 * s * (-s).exp()


class NotNormal(Divergence):
    """t ln t"""

    name = "not_normal"
    f_prime_at_infinity = float("inf")

    def f(self, s):
        return s * s.exp()

    def f_prime(self, s):
        return s + 1


class WrongConjugate(LeCam):
    name = "wrong_conjugate"

    def conjugate(self, u):
        return 1.01 * super().conjugate(u)


class WrongInverse(LeCam):
    name = "wrong_inverse"

    def f_prime_inverse(self, u):
        return super().f_prime_inverse(u) + 0.01


class WrongDual(LeCam):
    name = "wrong_dual"

    def dual(self):
        return get("forward_kl")


class Broken(LeCam):
    name = "broken"

    def f(self, s):
        raise RuntimeError("half [written]")

    f_prime, f_prime_at_infinity = LeCam.f_prime, 0.5
'''


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    (tmp_path / "strangers.py").write_text(STRANGERS, encoding="utf-8")
    (tmp_path / "unreadable.py").write_text("class MyF(:\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("strangers", None)


@pytest.mark.parametrize(
    ("name", "proof"),
    [
        ("WrongSlope", "f' is not the slope of f"),
        ("WrongInfinity", "f'(∞) is declared 0.51"),
        ("NotConvex", "f' decreases with t, so f is not convex"),
        ("NotNormal", "not in normal form: f(1) = 0, f'(1) = 1"),
        ("WrongConjugate", "conjugate is not sup_t ut − f(t)"),
        ("WrongInverse", "f_prime_inverse is not the inverse of f'"),
        ("WrongDual", "dual is not t·f(1/t)"),
        ("Broken", "raised RuntimeError: half [written]"),
    ],
)
def test_a_wrong_f_is_refused_and_its_failed_proof_named(strangers, call, name, proof):
    code, out, _ = call("verify", "--json", "--divergence", f"strangers:{name}")
    rows = [row for row in json.loads(out) if row["divergence"] != "-"]
    assert code == 1
    assert {row["status"] for row in rows} == {"fail"}
    assert any(proof in row["reason"] for row in rows)
    assert all(row[key] == "-" for row in rows for key in ("objective", "target", "estimator"))


@pytest.mark.slow
def test_a_strangers_sound_f_passes(strangers, fewer, call):
    code, out, _ = call("verify", "--divergence", "strangers:LeCam", "--divergence", "{name: alpha, alpha: 0.3}")
    assert code == 0
    assert "le_cam" in out
    assert "alpha(alpha=0.3)" in out
    assert "alpha(alpha=0.5)" not in out, "a mapping is one f"
    counts = out.splitlines()[-1]
    assert counts.startswith("50 rows: ")
    assert "fail" not in counts


def test_a_failure_is_repeated_at_the_end_with_its_reason_as_it_stands(strangers, call):
    code, out, _ = call("verify", "--divergence", "strangers:Broken")
    assert code == 1
    assert out.count("half [written]") > 1
    assert "fail" in out.splitlines()[-1]


# -- the command -------------------------------------------------------------------------------------------------------


def test_json_is_a_list_of_rows_and_nothing_else(fewer, call):
    code, out, _ = call("verify", "--json", "--divergence", "tv")
    rows = json.loads(out)
    assert code == 0
    assert {row["status"] for row in rows} <= STATUSES
    for row in rows:
        assert " ".join(row) == ("divergence objective target estimator cosine relative_error status reason")


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("revers_kl", "did you mean 'reverse_kl'?"),
        ("{name: alpha, alpha: x}", "alpha must be a finite number"),
        ("{name: alpha, gamma: 1}", "no parameter 'gamma'"),
        ("{name: alpha", "{name: alpha"),
        ("nowhere:MyF", "cannot load"),
        ("strangers:Missing", "cannot load"),
        ("unreadable:MyF", "invalid syntax"),
        ("math:sqrt", "no subclass"),
    ],
)
def test_an_f_that_cannot_be_had_is_a_users_error_of_one_line(strangers, call, spec, told):
    code, out, err = call("verify", "--divergence", spec)
    assert (code, out) == (2, "")
    assert err.startswith("error: --divergence ")
    assert told in err
    assert err.count("\n") == 1
