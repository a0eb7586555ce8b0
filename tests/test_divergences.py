"""Every f: its golden values, the laws of an f-divergence, independent oracles, gradients, a user's own f, the registry.

The oracle of values and slopes is the table of docs/mathematics.md typed again below in t and read with 60 digits.
"""

import dataclasses
import functools
import math
import re
from typing import ClassVar

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial import distance
from scipy.special import rel_entr

from rlhf_fdiv import divergences as D
from rlhf_fdiv.divergences import registry

INF, NAN = math.inf, math.nan
mp.mp.dps = 60


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Vectors this short are not worth sharing: on busy cores two threads take several times as long as one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def T(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def ids(f):
    return D.label(f)[:30]


FS = [D.get(name, **params) for name in D.names() for params in D.divergence_class(name).examples]
BLEND = D.get("mixture", components=["tv", "js", {"name": "alpha", "alpha": 2}], weights=[0.5, 2, 0.1])
MORE = [D.get("js", unit_curvature=True), D.get("skew_js", w=0.1, unit_curvature=True), BLEND, D.get("chi_mix").dual()]
ALL = FS + MORE
every_f = pytest.mark.parametrize("f", ALL, ids=ids)
registered = pytest.mark.parametrize("f", FS, ids=ids)
SMOOTH = [f for f in ALL if f is not BLEND and f.name != "tv"]
smooth = pytest.mark.parametrize("f", SMOOTH, ids=ids)
quick = settings(max_examples=30, deadline=None, derandomize=True)
log_ratios = st.lists(st.floats(-20, 20), min_size=1, max_size=20).map(lambda x: T(*x))
logits = st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=6).map(lambda x: T(*x).T)
pairs = logits.map(lambda x: torch.log_softmax(x, -1))  # (log π, log p)


# -- the table, by hand ------------------------------------------------------------------------------------------------


def _alpha(t, a):
    if a in (0, 1):
        return t * mp.log(t) - t + 1 if a else t - 1 - mp.log(t)
    return (t**a - a * t - 1 + a) / (a * (a - 1))


TABLE = {  # name: f(t), f'(t), f'(∞), f(0), f''(1)
    "reverse_kl": (lambda t: t * mp.log(t) - t + 1, mp.log, INF, 1, 1),
    "forward_kl": (lambda t: t - 1 - mp.log(t), lambda t: 1 - 1 / t, 1, INF, 1),
    "js": (lambda t: t * mp.log(t) - (t + 1) * mp.log((t + 1) / 2), lambda t: mp.log(2 * t / (1 + t)), math.log(2),
           math.log(2), 0.5),
    "tv": (lambda t: abs(t - 1) / 2, lambda t: mp.sign(t - 1) / 2, 0.5, 0.5, NAN),
    "pearson_chi2": (lambda t: (t - 1) ** 2, lambda t: 2 * (t - 1), INF, 1, 2),
    "neyman_chi2": (lambda t: (1 - t) ** 2 / t, lambda t: 1 - t**-2, 1, INF, 2),
    "hellinger": (lambda t: (mp.sqrt(t) - 1) ** 2 / 2, lambda t: (1 - 1 / mp.sqrt(t)) / 2, 0.5, 0.5, 0.25),
    "jeffreys": (lambda t: (t - 1) * mp.log(t), lambda t: mp.log(t) + 1 - 1 / t, INF, INF, 2),
    "chi_mix": (lambda t: (t - 1) ** 2 / 2 + t * mp.log(t) - t + 1, lambda t: t - 1 + mp.log(t), INF, 1.5, 2),
    "mixture": (lambda t: (t - 1) * mp.log(t) / 2, lambda t: (mp.log(t) + 1 - 1 / t) / 2, INF, INF, 1),
}  # fmt: skip


def by_hand(f):
    if f.name == "alpha":
        a = mp.mpf(f.alpha)
        slope = mp.log if a == 1 else lambda t: (t ** (a - 1) - 1) / (a - 1)
        zero, far = 1 / f.alpha if a > 0 else INF, 1 / (1 - f.alpha) if a < 1 else INF
        return lambda t: _alpha(t, a), slope, far, zero, 1
    if f.name == "skew_js":
        w = mp.mpf(f.w)
        far, zero = -f.w * math.log(f.w), -(1 - f.w) * math.log1p(-f.w)
        return (
            lambda t: w * t * mp.log(t) - (w * t + 1 - w) * mp.log(w * t + 1 - w),
            lambda t: w * mp.log(t / (w * t + 1 - w)),
            far,
            zero,
            f.w * (1 - f.w),
        )
    return TABLE[f.name]


GRID = [-80, -30, -8, -2, -1, -0.999, -0.5, -0.1, -0.0999, -1e-2, -1e-4, -1e-7]
GRID = GRID + [-s for s in GRID]


@registered
def test_f_and_its_slope_are_the_table_to_twelve_digits_also_next_to_one(f):
    value, slope, *_ = by_hand(f)
    for s, got, got_slope in zip(GRID, f.f(T(*GRID)).tolist(), f.f_prime(T(*GRID)).tolist(), strict=True):
        t = mp.exp(mp.mpf(s))
        assert got == pytest.approx(float(value(t)), rel=1e-12), s
        assert got_slope == pytest.approx(float(slope(t)), rel=1e-12), s


@registered
def test_the_constants_are_the_table(f):
    got = [f.f_prime_at_infinity, f.f_at_zero, f.curvature]
    assert got == pytest.approx(list(by_hand(f)[2:]), rel=1e-9, nan_ok=True)
    assert f.dual().f_prime_at_infinity == pytest.approx(f.f_at_zero)


# -- golden values -----------------------------------------------------------------------------------------------------

PI, P = T(0.6, 0.3, 0.1).log(), T(0.2, 0.3, 0.5).log()


def d(name, log_pi=PI, log_p=P, **params):
    return float(D.exact(D.get(name, **params), log_pi, log_p))


GOLDEN = [
    ("reverse_kl", {}, 0.4982235820), ("forward_kl", {}, 0.5849964985), ("js", {}, 2 * 0.1251006059), ("tv", {}, 0.4),
    ("pearson_chi2", {}, 1.12), ("neyman_chi2", {}, 1.8666666667), ("hellinger", {}, 0.1299830407),
    ("jeffreys", {}, 0.4982235820 + 0.5849964985), ("chi_mix", {}, 1.12 / 2 + 0.4982235820),
    ("mixture", {}, (0.4982235820 + 0.5849964985) / 2), ("skew_js", {"w": 0.5}, 0.1251006059),
    ("alpha", {"alpha": 0}, 0.5849964985), ("alpha", {"alpha": 1}, 0.4982235820), ("alpha", {"alpha": 2}, 1.12 / 2),
    ("alpha", {"alpha": -1}, 1.8666666667 / 2), ("alpha", {"alpha": 0.5}, 4 * 0.1299830407),
]  # fmt: skip


@pytest.mark.parametrize(("name", "params", "value"), GOLDEN)
def test_golden_values(name, params, value):
    assert d(name, **params) == pytest.approx(value, abs=2e-10)


def test_golden_values_cover_every_name():
    assert {name for name, *_ in GOLDEN} == set(D.names())


def test_the_golden_kl_that_a_copied_text_prints_wrong():
    assert d("reverse_kl", T(0.5, 0.3, 0.2).log(), T(0.4, 0.4, 0.2).log()) == pytest.approx(0.0252672, abs=5e-8)


@quick
@given(pairs)
def test_relations_between_the_divergences(pair):
    def of(name, **params):
        return d(name, *pair, **params)

    close = functools.partial(pytest.approx, rel=1e-9, abs=1e-14)
    assert of("js") == close(2 * of("skew_js", w=0.5))
    assert of("pearson_chi2") == close(2 * of("alpha", alpha=2))
    assert of("neyman_chi2") == close(2 * of("alpha", alpha=-1))
    assert of("hellinger") == close(of("alpha", alpha=0.5) / 4)
    assert of("chi_mix") == close(of("pearson_chi2") / 2 + of("reverse_kl"))
    assert of("jeffreys") == close(of("reverse_kl") + of("forward_kl"))
    blend = of("mixture", components=["js", "tv", {"name": "alpha", "alpha": 0.3}], weights=[2, 0.5, 3])
    assert blend == close(2 * of("js") + 0.5 * of("tv") + 3 * of("alpha", alpha=0.3))
    assert of("reverse_kl") == close(d("forward_kl", *pair.flip(0)))


# -- the laws of every f -----------------------------------------------------------------------------------------------


@every_f
def test_every_f_and_its_dual_pass_the_registrys_proofs(f):
    assert D.check(f) == []
    assert D.check(f.dual()) == []


@every_f
def test_normal_form_and_nonnegative(f):
    assert f.f(T(0.0)).item() == f.f_prime(T(0.0)).item() == 0

    @quick
    @given(log_ratios)
    def nonnegative(s):
        assert (f.f(s) >= 0).all()

    nonnegative()


@every_f
@quick
@given(s=log_ratios)
def test_f_prime_is_the_slope_that_autograd_finds_and_never_falls(f, s):
    s = torch.where(s == 0, 1e-3, s).sort().values.requires_grad_()
    (slope,) = torch.autograd.grad(f.f(s).sum(), s)
    s = s.detach()
    torch.testing.assert_close(slope, f.f_prime(s) * s.exp(), rtol=1e-9, atol=1e-15)
    assert (f.f_prime(s).diff() >= -1e-13 * (1 + f.f_prime(s)[1:].abs())).all()


@every_f
@quick
@given(pair=pairs)
def test_the_dual_swaps_the_arguments_and_is_an_involution(f, pair):
    log_pi, log_p = pair
    forth = D.exact(f, log_pi, log_p)
    torch.testing.assert_close(D.exact(f.dual(), log_p, log_pi), forth, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(D.exact(f.dual().dual(), log_pi, log_p), forth, rtol=1e-9, atol=1e-13)
    assert forth >= 0


@registered
@quick
@given(pair=pairs)
def test_exact_is_the_sum_of_p_f_of_pi_over_p(f, pair):
    value = by_hand(f)[0]
    pi, p = ([mp.exp(mp.mpf(x)) for x in row] for row in pair.tolist())
    total = mp.fsum(q * value(r / q) for r, q in zip(pi, p, strict=True))
    assert D.exact(f, *pair).item() == pytest.approx(float(total), rel=1e-9, abs=1e-13)


@every_f
@quick
@given(s=log_ratios, share=st.lists(st.floats(-5, 1), min_size=1, max_size=20))
def test_fenchel_young_holds_and_touches_at_the_slope(f, s, share):
    u = T(*share) * min(f.f_prime_at_infinity, 5.0)
    product, bound = u[:, None] * s.exp(), f.conjugate(u)[:, None] + f.f(s)
    assert (bound - product >= -1e-9 * (1 + bound.abs() + product.abs())).all()
    s = s.clamp(-8, 8)
    u = f.f_prime(s)
    touching = u * s.exp() - f.f(s)
    torch.testing.assert_close(f.conjugate(u), touching, rtol=1e-7, atol=1e-7)


@every_f
def test_the_conjugate_is_minus_f_of_zero_far_below_and_infinite_above_the_last_slope(f):
    lowest, highest = f.f_prime(T(-700.0)).item(), f.f_prime_at_infinity
    assert f.conjugate(T(-INF, INF)).tolist() == pytest.approx([-f.f_at_zero, INF])
    if lowest > -1e9:  # a finite f'(0) is reached
        assert f.conjugate(T(lowest - 1e-3, lowest - 9)).tolist() == pytest.approx([-f.f_at_zero] * 2)
    if highest < INF:
        assert f.conjugate(T(highest + 1e-6, highest + 9)).tolist() == [INF, INF]


@smooth
@quick
@given(s=log_ratios)
def test_f_prime_inverse_undoes_f_prime(f, s):
    s = s.clamp(-8, 8)
    torch.testing.assert_close(f.f_prime_inverse(f.f_prime(s)), s, rtol=1e-6, atol=1e-6)


def _moving(f, far):
    """f' at log t = far has neither overflowed nor settled."""
    half, whole = f.f_prime(T(far / 2, far)).tolist()
    return math.isfinite(whole) and abs(whole - half) > 1e-6


@pytest.mark.parametrize(("f", "far"), [(f, x) for f in SMOOTH for x in (-1e3, 1e3) if _moving(f, x)], ids=str)
def test_f_prime_inverse_undoes_f_prime_a_thousand_nats_out(f, far):
    assert f.f_prime_inverse(f.f_prime(T(far))).item() == pytest.approx(far, rel=1e-6)


@smooth
def test_f_prime_inverse_is_infinite_outside_the_range_of_f_prime(f):
    assert f.f_prime_inverse(T(-INF, INF)).tolist() == [-INF, INF]
    if (highest := f.f_prime_at_infinity) < INF:
        assert f.f_prime_inverse(T(highest, highest + 1e-6, highest + 9)).tolist() == [INF] * 3
    if (lowest := f.f_prime(T(-700.0)).item()) > -1e9 and f.f_prime(T(-800.0)).item() == lowest:
        assert f.f_prime_inverse(T(lowest - 1e-6, lowest - 9)).tolist() == [-INF] * 2


def test_total_variation_says_that_its_slope_has_no_inverse():
    with pytest.raises(NotImplementedError, match="tv"):
        D.get("tv").f_prime_inverse(T(0.1))


@pytest.mark.parametrize("near", [0, 1])
@pytest.mark.parametrize("step", [1e-3, 1e-6, 1e-9, 1e-12, -1e-3, -1e-6, -1e-9, -1e-12])
def test_alpha_passes_through_the_two_kls_without_a_jump_in_value_or_slope(near, step):
    f, limit, s = D.get("alpha", alpha=near + step), D.get(("forward_kl", "reverse_kl")[near]), T(*GRID).clamp(-10, 10)
    value, slope, *_ = by_hand(f)
    t = [mp.exp(mp.mpf(x)) for x in s.tolist()]
    torch.testing.assert_close(f.f(s), T(*(float(value(x)) for x in t)), rtol=1e-11, atol=0)
    torch.testing.assert_close(f.f_prime(s), T(*(float(slope(x)) for x in t)), rtol=1e-11, atol=0)
    torch.testing.assert_close(f.f(s), limit.f(s), rtol=20 * abs(step) + 1e-11, atol=0)
    torch.testing.assert_close(f.f_prime(s), limit.f_prime(s), rtol=20 * abs(step) + 1e-11, atol=0)


# a subnormal α or log-ratio loses its digits before any formula sees it, and 400 digits are too few for the oracle
@quick
@given(
    st.floats(-3, 4).filter(lambda a: a in (0, 1) or min(abs(a), abs(a - 1)) > 1e-50),
    st.lists(st.floats(-20, 20).filter(lambda s: s == 0 or abs(s) > 1e-50), min_size=1, max_size=20).map(
        lambda x: T(*x)
    ),
)
def test_alpha_is_its_formula_and_its_slope_grows_with_t_for_every_alpha(alpha, s):
    f = D.get("alpha", alpha=alpha)
    value, slope, *_ = by_hand(f)
    mp.mp.dps = 400  # hypothesis likes α = 1e-100
    t = [mp.exp(mp.mpf(x)) for x in s.tolist()]
    want, want_slope = ([float(h(x)) for x in t] for h in (value, slope))
    mp.mp.dps = 60
    assert f.f(s).tolist() == pytest.approx(want, rel=1e-11, abs=1e-300)
    assert f.f_prime(s).tolist() == pytest.approx(want_slope, rel=1e-11, abs=1e-300)
    assert (f.f_prime(T(-3, -1, 0, 1, 3)).diff() > 0).all()


@smooth
def test_curvature_is_the_second_derivative_at_one(f):
    h = T(1e-3, -1e-3)
    assert float(2 * f.f(h).mean() / 1e-6) == pytest.approx(f.curvature, rel=1e-5)


@smooth
def test_divided_by_its_curvature_every_smooth_f_is_half_chi_square_near_p(f):
    p, h = T(0.2, 0.3, 0.5), 1e-4 * T(1.0, 2.0, -1.6)
    value = D.exact(f, (p * (1 + h)).log(), p.log()) / f.curvature
    assert value.item() == pytest.approx((p * h**2).sum().item() / 2, rel=1e-3)


# -- numbers in half and single precision ------------------------------------------------------------------------------


@every_f
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_log_ratios_of_80_nothing_is_nan_and_only_an_overflow_is_infinite(f, dtype):
    s, tolerance = T(-80.0, 80.0, dtype=dtype), 1e-4 if dtype == torch.float32 else 0.5
    for g in (f, f.dual()):
        for method in (g.f, g.f_prime):
            torch.testing.assert_close(method(s), method(s.double()).to(dtype), rtol=tolerance, atol=0)
        u = g.f_prime(s)
        assert not g.conjugate(u).isnan().any()
        if f not in (BLEND, D.get("tv")):
            assert not g.f_prime_inverse(u).isnan().any()
        for method in (g.f, g.f_prime, g.conjugate):
            assert method(s).dtype == dtype


@every_f
def test_single_precision_does_not_cancel_next_to_one(f):
    s = torch.logspace(-6, 0, 2001)
    s = torch.cat([s, -s])
    for method in (f.f, f.f_prime, f.dual().f):
        torch.testing.assert_close(method(s).double(), method(s.double()), rtol=5e-5, atol=0)


@every_f
def test_f_at_minus_infinity_is_f_of_zero_and_f_prime_at_infinity_its_limit(f):
    for g in (f, f.dual()):
        assert g.f(T(-INF)).item() == pytest.approx(g.f_at_zero)
        assert g.f_prime(T(INF)).item() == pytest.approx(g.f_prime_at_infinity)


@every_f
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [40.0, 60.0, 100.0, 1e4])
def test_exact_with_a_token_suppressed_in_pi_or_in_p_is_the_double_and_its_gradient_is_not_nan(f, gap, dtype):
    plain, suppressed = T(0.1, 0.4, 0.2, dtype=dtype), T(0.3, 0.0, -gap, dtype=dtype)
    for pi, p in ((plain, suppressed), (suppressed, plain)):
        x = pi.clone().requires_grad_()
        value = D.exact(f, torch.log_softmax(x, -1), torch.log_softmax(p, -1))
        double = D.exact(f, torch.log_softmax(pi.double(), -1), torch.log_softmax(p.double(), -1))
        assert not value.isnan()
        torch.testing.assert_close(value.detach(), double.to(dtype), rtol=1e-4, atol=1e-6)
        if value.isfinite() and value < 1e30:
            assert not torch.autograd.grad(value, x)[0].isnan().any()


# -- independent oracles -----------------------------------------------------------------------------------------------


def _skewed(pi, p, w):
    m = w * pi + (1 - w) * p
    return w * rel_entr(pi, m).sum() + (1 - w) * rel_entr(p, m).sum()


def _cressie_read(pi, p, alpha):
    return stats.power_divergence(pi, p, lambda_=alpha - 1).statistic / 2


SCIPY = {
    "reverse_kl": lambda pi, p, f: rel_entr(pi, p).sum(),
    "forward_kl": lambda pi, p, f: stats.entropy(p, pi),
    "js": lambda pi, p, f: 2 * distance.jensenshannon(pi, p) ** 2,
    "tv": lambda pi, p, f: distance.cityblock(pi, p) / 2,
    "pearson_chi2": lambda pi, p, f: stats.chisquare(pi, p).statistic,
    "neyman_chi2": lambda pi, p, f: stats.power_divergence(pi, p, lambda_="neyman").statistic,
    "hellinger": lambda pi, p, f: distance.sqeuclidean(np.sqrt(pi), np.sqrt(p)) / 2,
    "alpha": lambda pi, p, f: _cressie_read(pi, p, f.alpha),
    "jeffreys": lambda pi, p, f: rel_entr(pi, p).sum() + rel_entr(p, pi).sum(),
    "chi_mix": lambda pi, p, f: stats.chisquare(pi, p).statistic / 2 + rel_entr(pi, p).sum(),
    "skew_js": lambda pi, p, f: _skewed(pi, p, f.w),
    "mixture": lambda pi, p, f: (rel_entr(pi, p).sum() + rel_entr(p, pi).sum()) / 2,
}


@pytest.mark.parametrize("f", [f for f in FS if "000001" not in str(f) and "1e-06" not in str(f)], ids=ids)
@quick
@given(pair=pairs)
def test_scipy_agrees_on_random_categoricals(f, pair):  # where it does not cancel: next to α = 0 and 1 it does
    pi, p = pair.exp().numpy()
    pi, p = pi / pi.sum(), p / p.sum()
    assert D.exact(f, *pair).item() == pytest.approx(SCIPY[f.name](pi, p, f), rel=1e-7, abs=1e-12)


def _dit(*rows):
    package = pytest.importorskip("dit")
    return package.divergences, [package.Distribution([*"0123"[: len(row)]], row) for row in rows]


def _nats(x):
    return x * math.log(2)


DIT = {  # dit counts in bits and leaves out the f'(∞) term: full supports only
    "reverse_kl": lambda d, a, b, f: _nats(d.kullback_leibler_divergence(a, b)),
    "forward_kl": lambda d, a, b, f: _nats(d.kullback_leibler_divergence(b, a)),
    "jeffreys": lambda d, a, b, f: _nats(d.kullback_leibler_divergence(a, b) + d.kullback_leibler_divergence(b, a)),
    "js": lambda d, a, b, f: 2 * _nats(d.jensen_shannon_divergence([a, b])),
    "skew_js": lambda d, a, b, f: _nats(d.jensen_shannon_divergence([a, b], [f.w, 1 - f.w])),
    "tv": lambda d, a, b, f: d.variational_distance(a, b),
    "hellinger": lambda d, a, b, f: d.hellinger_distance(a, b) ** 2,
}


def _dit_f(d, a, b, f):
    return d.f_divergence(a, b, lambda t: float(by_hand(f)[0](mp.mpf(float(t)))))


@registered
@pytest.mark.parametrize("seed", range(3))
def test_dit_agrees_on_random_categoricals(f, seed):
    pair = torch.log_softmax(torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)).double(), -1)
    package, (a, b) = _dit(*pair.exp().tolist())
    want = DIT.get(f.name, _dit_f)(package, a, b, f)
    assert D.exact(f, *pair).item() == pytest.approx(want, rel=1e-6)


def test_dit_agrees_on_skew_js_where_the_supports_differ():
    rows = [0.6, 0.4, 0.0], [0.2, 0.0, 0.8]
    package, pair = _dit(*rows)
    want = _nats(package.jensen_shannon_divergence(pair, [0.3, 0.7]))
    assert d("skew_js", *(T(*row).log() for row in rows), w=0.3) == pytest.approx(want)


@quick
@given(pairs)
def test_torch_agrees_on_the_kl_of_categoricals(pair):
    a, b = (torch.distributions.Categorical(logits=x) for x in pair)
    assert d("reverse_kl", *pair) == pytest.approx(torch.distributions.kl_divergence(a, b).item(), abs=1e-12)
    assert d("forward_kl", *pair) == pytest.approx(torch.distributions.kl_divergence(b, a).item(), abs=1e-12)


@registered
def test_atoms_of_p_0_and_of_pi_0_are_paid_at_their_price_and_of_both_at_none(f):
    value, _, far, zero, _ = by_hand(f)
    log_pi, log_p = T(0.6, 0.4, 0.0, 0.0).log(), T(0.2, 0.0, 0.8, 0.0).log()
    assert D.exact(f, log_pi, log_p).item() == pytest.approx(0.2 * float(value(mp.mpf(3))) + 0.4 * far + 0.8 * zero)
    no_atom_in_p = 0.2 * float(value(mp.mpf(5))) + 0.8 * zero
    assert D.exact(f, T(1.0, 0.0).log(), T(0.2, 0.8).log()).item() == pytest.approx(no_atom_in_p)
    no_atom_in_pi = float(value(mp.mpf(0.2))) + 0.8 * far
    assert D.exact(f, T(0.2, 0.8).log(), T(1.0, 0.0).log()).item() == pytest.approx(no_atom_in_pi)


@every_f
def test_exact_works_row_by_row_and_its_terms_are_perspective(f):
    x = torch.log_softmax(torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(1)).double(), -1)
    rows = [[D.exact(f, x[0, i, j], x[1, i, j]).item() for j in range(3)] for i in range(2)]
    torch.testing.assert_close(D.exact(f, x[0], x[1]), T(*rows))
    torch.testing.assert_close(D.perspective(f, x[0], x[1]), x[1].exp() * f.f(x[0] - x[1]), rtol=1e-9, atol=1e-13)


# -- gradients ---------------------------------------------------------------------------------------------------------


@every_f
def test_exact_is_differentiable_in_both_arguments(f):
    xy = [
        x.requires_grad_() for x in torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2)).double().unbind()
    ]
    assert torch.autograd.gradcheck(lambda *xy: D.exact(f, *(torch.log_softmax(z, -1) for z in xy)), xy)


def _policy_gradient(f, logits, log_p):
    """Σ_y π(y) f'(π/p) ∇log π(y) in the logits, by hand."""
    log_pi = torch.log_softmax(logits, -1)
    pi, reward = log_pi.exp(), f.f_prime(log_pi - log_p)
    return pi * (reward - (pi * reward).sum(-1, keepdim=True))


@every_f
@quick
@given(x=logits)
def test_the_gradient_is_the_policy_gradient_with_f_prime_as_the_score(f, x):
    logits, log_p = x[0].clone().requires_grad_(), torch.log_softmax(x[1], -1)
    (grad,) = torch.autograd.grad(D.exact(f, torch.log_softmax(logits, -1), log_p), logits)
    ratio = torch.log_softmax(logits, -1).detach() - log_p
    if f not in (BLEND, D.get("tv")) or (ratio.abs() > 1e-9).all():  # at its kink a subgradient will do
        torch.testing.assert_close(grad, _policy_gradient(f, logits.detach(), log_p), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("f", [f for f in ALL if f.f_prime_at_infinity < INF], ids=ids)
def test_the_policy_gradient_pays_f_prime_of_infinity_where_p_is_0(f):
    logits, log_p = T(0.5, -0.3, 0.1, 0.0).requires_grad_(), T(0.5, 0.0, 0.3, 0.2).log()
    (grad,) = torch.autograd.grad(D.exact(f, torch.log_softmax(logits, -1), log_p), logits)
    torch.testing.assert_close(grad, _policy_gradient(f, logits.detach(), log_p), rtol=1e-9, atol=1e-12)
    assert grad[1] > 0  # mass on an impossible outcome is pushed away


@every_f
def test_masked_tokens_leave_a_gradient_without_nan_and_pi_equal_to_p_has_none(f):
    masked = T(0.5, -INF, 0.1).requires_grad_()
    (grad,) = torch.autograd.grad(D.exact(f, torch.log_softmax(masked, -1), T(0.6, 0.0, 0.4).log()), masked)
    assert grad.isfinite().all()
    same = T(0.5, -0.2, 0.1).requires_grad_()
    (grad,) = torch.autograd.grad(D.exact(f, torch.log_softmax(same, -1), torch.log_softmax(same.detach(), -1)), same)
    torch.testing.assert_close(grad, torch.zeros(3).double(), rtol=0, atol=1e-15)


# -- a user's own f ----------------------------------------------------------------------------------------------------


def own(name, f, f_prime, at_infinity, base=D.Divergence, **more):
    """A user's class that knows t only, not how to be careful."""
    body = {"f": lambda self, s: f(s.exp(), s), "f_prime": lambda self, s: f_prime(s.exp(), s)}
    return type("Own", (base,), {"name": name, "f_prime_at_infinity": at_infinity, **body, **more})


HELLINGER = (lambda t, s: (t.sqrt() - 1) ** 2 / 2, lambda t, s: (1 - t**-0.5) / 2, 0.5)
PEARSON = (lambda t, s: (t - 1) ** 2, lambda t, s: 2 * (t - 1), INF)
FORWARD = (lambda t, s: t - 1 - s, lambda t, s: 1 - 1 / t, 1.0)
AS_USER = {
    "reverse_kl": (lambda t, s: t * s - t + 1, lambda t, s: s, INF),
    "forward_kl": FORWARD,
    "js": (lambda t, s: t * s - (t + 1) * ((t + 1) / 2).log(), lambda t, s: s - ((1 + t) / 2).log(), math.log(2)),
    "pearson_chi2": PEARSON,
    "neyman_chi2": (lambda t, s: t - 2 + 1 / t, lambda t, s: 1 - t**-2, 1.0),
    "hellinger": HELLINGER,
    "alpha": (lambda t, s: (t**0.5 - 0.5 * t - 0.5) / -0.25, lambda t, s: (t**-0.5 - 1) / -0.5, 2.0),
    "tv": (lambda t, s: (t - 1).abs() / 2, lambda t, s: torch.sign(t - 1) / 2, 0.5),
}


@pytest.mark.parametrize("name", AS_USER)
def test_what_is_derived_for_a_users_f_is_the_closed_form_of_the_same_f(name):
    mine, f = own("own", *AS_USER[name])(), D.get(name)
    s = torch.linspace(-6, 6, 40).double()
    u = 0.9 * f.f_prime(s) if name == "tv" else f.f_prime(s)
    close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-8)
    close(mine.conjugate(u), f.conjugate(u))
    close(mine.dual().f(s), f.dual().f(s))
    close(mine.dual().f_prime(s), f.dual().f_prime(s))
    close(mine.dual().dual().f(s), f.f(s))
    if name != "tv":
        close(mine.f_prime_inverse(u), s)
    assert mine.curvature == pytest.approx(f.curvature, rel=1e-5, nan_ok=True)
    assert mine.f_at_zero == pytest.approx(f.f_at_zero)
    assert mine.dual().f_prime_at_infinity == pytest.approx(f.dual().f_prime_at_infinity)
    for log_pi, log_p in ((PI, P), (T(0.6, 0.4, 0).log(), T(0.5, 0, 0.5).log()), (T(0.6, 0.4).log(), T(1.0, 0).log())):
        close(D.exact(mine, log_pi, log_p), D.exact(f, log_pi, log_p))
    assert D.check(mine) == []


@pytest.mark.parametrize("name", AS_USER)
def test_the_derived_inverse_and_conjugate_end_where_the_closed_ones_do(name):
    mine, f = own("own", *AS_USER[name])(), D.get(name)
    u = T(-INF, f.f_prime_at_infinity, f.f_prime_at_infinity + 1, INF)
    at_last = {"tv": 0.5, "neyman_chi2": 2}.get(name, INF)
    assert mine.conjugate(u).tolist() == pytest.approx([-f.f_at_zero, at_last, INF, INF])
    assert mine.f_prime_inverse(u).tolist() == [-INF, INF, INF, INF]


@pytest.mark.parametrize("parent", D.names())
def test_a_subclass_that_overrides_f_inherits_no_closed_form(parent):
    mine, s = own("own", *HELLINGER, base=D.divergence_class(parent))(), T(-3, -1, 0.5, 2)
    f = D.get("hellinger")
    torch.testing.assert_close(mine.conjugate(f.f_prime(s)), f.conjugate(f.f_prime(s)), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(mine.f_prime_inverse(f.f_prime(s)), s, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine.dual().f(s), f.f(s), rtol=1e-6, atol=1e-8)
    assert (mine.curvature, mine.f_at_zero) == (pytest.approx(0.25), pytest.approx(0.5))
    assert D.check(mine) == []


@pytest.mark.parametrize("missing", ["f_prime", "f_prime_at_infinity"])
def test_a_subclass_that_overrides_f_alone_is_refused_where_it_is_written(missing):
    body = {"f": lambda self, s: s, "f_prime": lambda self, s: s, "f_prime_at_infinity": 1.0}
    with pytest.raises(TypeError, match=f"not {missing}:"):
        type("Half", (D.divergence_class("js"),), {k: v for k, v in body.items() if k != missing})


# -- register ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clean_registry():
    before = dict(registry._REGISTRY)
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


@dataclasses.dataclass(frozen=True, repr=False)
class Quartic(D.Divergence):
    """k·((t − 1)²/2 + (t − 1)⁴/12), a user's f with a parameter."""

    k: float = 1.0
    name: ClassVar[str] = "quartic"
    examples: ClassVar = ({"k": 1.0}, {"k": 2.5})
    f_prime_at_infinity: ClassVar[float] = INF

    def f(self, s):
        return self.k * (torch.expm1(s) ** 2 / 2 + torch.expm1(s) ** 4 / 12)

    def f_prime(self, s):
        return self.k * (torch.expm1(s) + torch.expm1(s) ** 3 / 3)


def test_a_registered_f_is_found_by_its_name_with_its_parameters(clean_registry):
    assert D.register(Quartic) is Quartic
    assert D.register(Quartic) is Quartic  # a module imported again
    assert D.names()[-1] == "quartic"
    assert D.names().count("quartic") == 1
    f = D.get({"name": "quartic", "k": 2})
    assert D.label(f) == "quartic(k=2)"
    assert f.curvature == pytest.approx(2)
    assert D.get("quartic", k=5, unit_curvature=True).curvature == pytest.approx(1)
    with pytest.raises(ValueError, match=r"quartic has no parameter 'w'; it takes k"):
        D.get("quartic", w=1)


INVERSE, CONJUGATE, DUAL = (
    {name: getattr(D.divergence_class("forward_kl"), name)} for name in ("f_prime_inverse", "conjugate", "dual")
)
WRONG = {
    "f' is not the slope of f at t = ": (HELLINGER[0], FORWARD[1], 1.0),
    "f' is not the slope": (PEARSON[0], lambda t, s: 2.002 * (t - 1), INF),
    "f'(∞) is declared 0.6, but": (*HELLINGER[:2], 0.6),
    "f'(∞) is declared infinite, but": (*FORWARD[:2], INF),
    "f'(∞) is declared 5, but": (*PEARSON[:2], 5.0),
    "f' decreases with t": (
        lambda t, s: torch.log1p((t - 1) ** 2),
        lambda t, s: 2 * (t - 1) / (1 + (t - 1) ** 2),
        0.0,
    ),
    "f is negative": (lambda t, s: -((t - 1) ** 2), lambda t, s: -2 * (t - 1), -INF),
    "not in normal form: f(1) = 0, f'(1) = 1": (lambda t, s: t * s, lambda t, s: s + 1, INF),
    "not in normal form: f(1) = 1, f'(1) = 0": (lambda t, s: (t - 1) ** 2 + 1, PEARSON[1], INF),
    "f_prime_inverse is not the inverse": (*PEARSON, INVERSE),
    "conjugate is not sup": (*PEARSON, CONJUGATE),
    "dual is not t·f(1/t)": (*PEARSON, DUAL),
    "curvature is declared 1, f''(1) is 2": (*PEARSON, {"curvature": 1.0}),
    "nan at s = ±80": (lambda t, s: (t**4 - 2 * t**3 + t**2) / t**2, PEARSON[1], INF),
}


@pytest.mark.parametrize("reason", WRONG)
def test_register_refuses_a_wrong_f_and_names_what_is_wrong(clean_registry, reason):
    before, (f, f_prime, at_infinity, *more) = D.names(), WRONG[reason]
    with pytest.raises(ValueError, match=f"mine is not registered: .*{re.escape(reason)}"):
        D.register(own("mine", f, f_prime, at_infinity, **(more[0] if more else {})))
    assert D.names() == before


def test_register_proves_every_example_and_not_only_the_first(clean_registry):
    @dataclasses.dataclass(frozen=True, repr=False)
    class Half(Quartic):
        name: ClassVar[str] = "half"
        examples: ClassVar = ({"k": 1.0}, {"k": -1.0})

    with pytest.raises(ValueError, match=r"half\(k=-1.0\)"):
        D.register(Half)


@pytest.mark.parametrize("name", ["js", "tv"])
def test_register_refuses_a_taken_name(clean_registry, name):
    with pytest.raises(ValueError, match=f"{name!r} exists already: give Own another name"):
        D.register(own(name, *HELLINGER))
    assert D.get(name).f_prime_at_infinity == TABLE[name][2]


# -- get ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("reverse-kl", "reverse_kl"), ("pearson", "pearson_chi2"), ("helinger", "hellinger"), ("Jeffreys", "jeffreys")],
)
def test_an_unknown_name_is_answered_with_the_nearest_and_all_names(typo, meant):
    with pytest.raises(ValueError, match=f"{typo!r}: did you mean {meant!r}.*Known: {', '.join(D.names())}"):
        D.get(typo)


@pytest.mark.parametrize("spec", [{}, {"alpha": 1}, {"name": 3}, "zzzzzz", "", "no_such_module:F", "math:nothing"])
def test_a_spec_without_a_known_name_is_a_value_error(spec):
    with pytest.raises(ValueError, match=r"name|unknown|no_such_module|nothing"):
        D.get(spec)


@pytest.mark.parametrize("path", ["math:sqrt", "math:pi", "collections:OrderedDict"])
def test_a_dotted_path_to_something_else_than_an_f_is_a_value_error(path):
    with pytest.raises(ValueError, match=path):
        D.get(path)


@pytest.mark.parametrize(("name", "known"), [("js", "none"), ("alpha", "alpha"), ("mixture", "components, weights")])
def test_an_unknown_parameter_is_named_with_those_that_exist(name, known):
    with pytest.raises(ValueError, match=f"{name} has no parameter 'beta'; it takes {known}"):
        D.get(name, beta=1)


@pytest.mark.parametrize(
    "value", [True, False, "0.3", "", None, NAN, INF, -INF, {"a": 1}, [0.3], D.get("js")], ids=repr
)
@pytest.mark.parametrize(("name", "key"), [("alpha", "alpha"), ("skew_js", "w")])
def test_a_parameter_that_is_no_finite_number_is_a_value_error(name, key, value):
    with pytest.raises(ValueError, match=key):
        D.get(name, **{key: value})


@pytest.mark.parametrize("w", [0, 1, -0.1, 1.1])
def test_a_skew_outside_0_to_1_is_refused(w):
    with pytest.raises(ValueError, match="w must lie strictly between 0 and 1"):
        D.get("skew_js", w=w)


def test_a_dotted_path_finds_a_class_and_takes_its_parameters():
    alpha = D.divergence_class("alpha")
    assert D.get(f"{alpha.__module__}:{alpha.__name__}", alpha=0.3) == D.get("alpha", alpha=0.3)
    f = D.get({"name": f"{Quartic.__module__}:Quartic", "k": 3})
    assert isinstance(f, Quartic)
    assert f.k == 3


def test_an_f_is_its_own_spec_and_params_beside_it_are_never_dropped_in_silence():
    f = D.get("alpha", alpha=0.3)
    assert D.get(f) is f
    assert D.get(D.get("js"), unit_curvature=True).curvature == pytest.approx(1)


@pytest.mark.parametrize("f", [f for f in FS if f.name != "tv"], ids=ids)
def test_unit_curvature_divides_everything_by_the_curvature(f):
    params = {x.name: getattr(f, x.name) for x in dataclasses.fields(f) if x.init}
    g, s, c = D.get(f.name, **params, unit_curvature=True), T(-2, -0.3, 0, 1.5), f.curvature
    assert g.curvature == pytest.approx(1)
    assert g.f_prime_at_infinity == pytest.approx(f.f_prime_at_infinity / c)
    assert g.f_at_zero == pytest.approx(f.f_at_zero / c)
    torch.testing.assert_close(g.f(s) * c, f.f(s))
    torch.testing.assert_close(g.f_prime(s) * c, f.f_prime(s))
    torch.testing.assert_close(g.f_prime_inverse(g.f_prime(s)), s)
    torch.testing.assert_close(g.dual().f(s) * c, f.dual().f(s))


@pytest.mark.parametrize("spec", ["tv", {"name": "mixture", "components": ["js", "tv"], "weights": [1, 1]}])
def test_unit_curvature_is_refused_at_a_kink(spec):
    with pytest.raises(ValueError, match="unit_curvature is for smooth f"):
        D.get(spec, unit_curvature=True)


def test_a_mixture_is_spelt_as_nested_dicts():
    inner = {"name": "mixture", "components": [{"name": "skew_js", "w": 0.1}, "reverse_kl"], "weights": [1, 3]}
    f = D.get({"name": "mixture", "components": ["js", inner], "weights": [0.5, 2]})
    want = 0.5 * d("js") + 2 * (d("skew_js", w=0.1) + 3 * d("reverse_kl"))
    assert D.exact(f, PI, P).item() == pytest.approx(want)
    assert D.check(f) == []


def test_a_component_of_weight_0_costs_nothing_even_where_it_is_infinite():
    f = D.get("mixture", components=["tv", "reverse_kl", "forward_kl"], weights=[2, 0, 0])
    log_pi, log_p = T(0.6, 0.4, 0.0).log(), T(0.2, 0.0, 0.8).log()
    assert D.exact(f, log_pi, log_p).item() == pytest.approx(2 * 0.8)
    assert (f.f_prime_at_infinity, f.f_at_zero) == (1, 1)


@pytest.mark.parametrize(
    "params",
    [
        {"components": ["js", "tv"], "weights": [1]},
        {"weights": [1, -1]},
        {"weights": [0, 0]},
        {"weights": [NAN, 1]},
        {"weights": [INF, 1]},
        {"weights": [True, 1]},
        {"weights": ["1", 1]},
        {"weights": 1.0},
        {"components": [], "weights": []},
        {"components": "js", "weights": [1]},
        {"components": [1.0, 2.0]},
        {"components": ["js", "jss"]},
        {"components": ["js", {"name": "alpha", "alpha": "x"}]},
    ],
    ids=str,
)
def test_a_malformed_mixture_is_a_value_error(params):
    with pytest.raises(ValueError, match=r"mixture|unknown divergence|alpha"):
        D.get("mixture", **params)


@pytest.mark.parametrize("name", D.names())
def test_the_summary_row_shows_name_formula_direction_and_constants(name):
    f = D.get(name)
    label, formula, direction, far, curvature = D.summary(f)
    assert label.startswith(name)
    assert formula
    assert direction
    assert (float(far), float(curvature)) == pytest.approx((f.f_prime_at_infinity, f.curvature), rel=1e-3, nan_ok=True)
