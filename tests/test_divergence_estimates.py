"""D_f from samples of π: what it averages, when it withholds, and that a nominal 95 % interval covers 95 %."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fdiv import divergences as D

INF = math.inf
NAMES = [D.get(name) for name in D.names()]
FS = [D.get(name, **params) for name in D.names() for params in D.divergence_class(name).examples]
each_name = pytest.mark.parametrize("f", NAMES, ids=lambda f: f.name)
registered = pytest.mark.parametrize("f", FS, ids=lambda f: D.label(f)[:30])
BOUNDED = [f for f in FS if f.f_prime_at_infinity < INF]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Vectors this short are not worth sharing: on busy cores two threads take several times as long as one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def T(*values):
    return torch.tensor(values, dtype=torch.float64)


def estimate(f, s, groups=None):
    """From log-ratios alone: log π = s, log p = 0."""
    return D.estimate(f, s, torch.zeros_like(s), groups)


def log_ratios(kl, n=1000, seed=0):
    """s ~ N(KL, 2·KL), the one normal with E_π[e^−s] = 1."""
    return kl + math.sqrt(2 * kl) * torch.randn(n, generator=torch.Generator().manual_seed(seed)).double()


# -- coverage ----------------------------------------------------------------------------------------------------------


def truth(f, kl):
    """D_f between N(KL, 2·KL) and N(−KL, 2·KL) in closed form, the skewed ones by the trapezoidal rule."""
    if f.name == "alpha":
        c = f.alpha * (f.alpha - 1)
        return math.expm1(c * kl) / c if c else kl
    if f.name in ("js", "skew_js"):
        s, w = np.linspace(-kl - 14 * math.sqrt(2 * kl), kl + 14 * math.sqrt(2 * kl), 20001), getattr(f, "w", 0.5)
        log_m = np.logaddexp(math.log(w) + s, math.log1p(-w))  # log m/p
        pi, p = (np.exp(-((s - mean) ** 2) / (4 * kl)) / math.sqrt(4 * math.pi * kl) for mean in (kl, -kl))
        return (2 if f.name == "js" else 1) * np.trapezoid(w * pi * (s - log_m) - (1 - w) * p * log_m, s)
    return {"reverse_kl": kl, "forward_kl": kl, "jeffreys": 2 * kl, "mixture": kl, "tv": math.erf(math.sqrt(kl) / 2),
            "pearson_chi2": math.expm1(2 * kl), "neyman_chi2": math.expm1(2 * kl),
            "hellinger": -math.expm1(-kl / 4), "chi_mix": math.expm1(2 * kl) / 2 + kl}[f.name]  # fmt: skip


def assert_covers(f, kl, simulations, must_be_given=False):
    """95 % intervals cover in .92 to .97 of those that are given, or nearly none is given."""
    want, given, covered = truth(f, kl), 0, 0
    for seed in range(simulations):
        measured = estimate(f, log_ratios(kl, seed=1000 * int(100 * kl) + seed))
        (value, error, _), reason = measured, measured.reason
        assert math.isnan(value) == math.isnan(error) == bool(reason)
        given += not reason
        covered += abs(value - want) <= 1.96 * error
    if given <= 0.05 * simulations and not must_be_given:
        return
    assert given >= 0.95 * simulations or not must_be_given
    slack = 3 * math.sqrt(0.95 * 0.05 / given)
    assert 0.92 - slack <= covered / given <= 0.97 + slack, f"{covered / given:.3f} of the {given} given"


@each_name
@pytest.mark.parametrize("kl", [1, 3, 6, 10])
def test_an_interval_covers_the_truth_or_is_withheld(f, kl):
    assert_covers(f, kl, 200)


@each_name
def test_an_interval_is_given_and_covers_where_pi_is_near_p(f):
    assert_covers(f, 0.03, 200, must_be_given=True)


@pytest.mark.slow
@registered
@pytest.mark.parametrize("kl", [0.03, 1, 3, 6, 10])
def test_an_interval_covers_the_truth_or_is_withheld_in_many_simulations(f, kl):
    assert_covers(f, kl, 1500, must_be_given=kl == 0.03)


@pytest.mark.parametrize("name", ["reverse_kl", "alpha", "js", "skew_js", "tv"])
def test_the_measurable_ones_are_not_withheld_far_from_p(name):
    f = D.get(name, **({"alpha": 0.9} if name == "alpha" else {}))
    assert not any(estimate(f, log_ratios(kl, seed=seed)).reason for kl in (1, 3, 6, 10) for seed in range(20))


@pytest.mark.parametrize("name", ["reverse_kl", "js", "tv"])
def test_only_the_clustered_interval_covers_when_the_samples_of_a_prompt_are_alike(name):
    f, kl, n, per = D.get(name), 3, 1000, 10
    groups, hits = torch.arange(n) // per, np.zeros(2)
    for seed in range(300):
        z = torch.randn(2, n, generator=torch.Generator().manual_seed(seed)).double()
        s = kl + math.sqrt(2 * kl) * (0.6**0.5 * z[0][::per].repeat_interleave(per) + 0.4**0.5 * z[1])
        for i, e in enumerate((estimate(f, s, groups), estimate(f, s))):
            hits[i] += abs(e.value - truth(f, kl)) <= 1.96 * e.standard_error
    clustered, naive = hits / 300
    assert 0.92 - 0.038 <= clustered <= 0.97 + 0.038
    assert naive < 0.75


# -- what it averages --------------------------------------------------------------------------------------------------


def _drawn_in_proportion(pi, p, n=1000):
    counts = (T(*pi) * n).round().long()
    return [T(*x).log().repeat_interleave(counts) for x in (pi, p)]


@registered
def test_the_samples_drawn_in_exact_proportion_give_the_exact_divergence(f):
    pi, p = (0.5, 0.3, 0.2), (0.4, 0.35, 0.25)
    value = D.estimate(f, *_drawn_in_proportion(pi, p)).value
    assert value == pytest.approx(D.exact(f, T(*pi).log(), T(*p).log()).item(), rel=1e-8)


@registered
def test_an_atom_of_p_0_costs_f_prime_of_infinity_as_in_the_exact_divergence(f):
    pi, p = (0.5, 0.3, 0.2), (0.35, 0.65, 0.0)
    value = D.estimate(f, *_drawn_in_proportion(pi, p, n=20_000)).value
    assert value == pytest.approx(D.exact(f, T(*pi).log(), T(*p).log()).item(), rel=1e-8)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_reverse_kl_is_the_mean_log_ratio_and_its_error_that_of_a_mean(s):
    e = estimate(D.get("reverse_kl"), T(*s))
    assert e.value == pytest.approx(np.mean(s), rel=1e-12, abs=1e-12)
    assert e.standard_error == pytest.approx(np.std(s, ddof=1) / math.sqrt(len(s)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kl", [0.1, 1, 6])
def test_total_variation_is_the_mean_of_1_minus_p_over_pi_where_positive(kl):
    s = log_ratios(kl)
    g = (1 - (-s).exp()).clamp(min=0)
    e = estimate(D.get("tv"), s)
    assert e.value == pytest.approx(g.mean().item(), rel=1e-12)
    plain = g.std().item() / math.sqrt(1000)
    skewness = torch.distributions.Normal(kl, math.sqrt(2 * kl)).sample((10**6,)).double()
    skewness = float(scipy.stats.skew((1 - (-skewness).exp()).clamp(min=0))) / math.sqrt(1000)
    widened = plain * (1 + (1.96**4 + 2 * 1.96**2 - 3) / 18 * skewness**2)
    assert e.standard_error == pytest.approx(widened, rel=1e-3)
    assert e.standard_error > plain


@registered
def test_two_equal_distributions_are_at_0_with_no_error(f):
    measured = estimate(f, torch.zeros(10))
    assert measured == (0, 0, 10)
    assert measured.reason == ""


@pytest.mark.parametrize("f", [f for f in BOUNDED if not f.f_at_zero > 4 * f.curvature], ids=D.label)
def test_only_log_ratios_matter_and_neither_their_order_nor_their_precision(f):
    s, shift = log_ratios(0.5), torch.linspace(-300, 0, 1000).double()
    e = estimate(f, s)
    assert D.estimate(f, s + shift, shift)[:3] == pytest.approx(e[:3], rel=1e-9)
    assert estimate(f, s.flip(0))[:3] == pytest.approx(e[:3], rel=1e-9)
    assert estimate(f, s.float().requires_grad_())[:3] == pytest.approx(e[:3], rel=1e-4)


@pytest.mark.parametrize(
    ("pi", "p"),
    [
        (torch.distributions.Normal(a, b), torch.distributions.Normal(T(0.0)[0], 1.0))
        for a, b in ((0.4, 0.95), (-0.2, 1))
    ],
    ids=str,
)
def test_normal_samples_give_the_kl_of_torch_in_both_directions(pi, p):
    torch.manual_seed(0)
    y = pi.sample((20_000,)).double()
    forth, back = (torch.distributions.kl_divergence(*x).item() for x in ((pi, p), (p, pi)))
    for name, want in (("reverse_kl", forth), ("forward_kl", back), ("jeffreys", forth + back)):
        e = D.estimate(D.get(name), pi.log_prob(y), p.log_prob(y))
        assert abs(e.value - want) < 4 * e.standard_error
        assert 0 < e.standard_error < 0.1 * want


# -- clusters, the effective sample size, refusals ---------------------------------------------------------------------


@registered
def test_duplicates_of_a_sample_add_nothing_to_what_the_distinct_ones_know(f):
    s = log_ratios(0.03, n=300)
    once, groups = estimate(f, s), torch.arange(300).repeat_interleave(4)
    many = estimate(f, s.repeat_interleave(4), groups)
    assert many.value == pytest.approx(once.value, rel=1e-9, nan_ok=True)
    assert many.standard_error == pytest.approx(once.standard_error, rel=1e-4, nan_ok=True)  # n − 1 in its skewness
    assert bool(many.reason) == bool(once.reason)
    assert D.clustered_error(s.repeat_interleave(4), groups) > 1.9 * D.clustered_error(s.repeat(4), torch.arange(1200))


@pytest.mark.parametrize("count", [0, 1])
def test_the_clustered_error_of_fewer_than_two_groups_is_not_known(count):
    assert math.isnan(D.clustered_error(torch.ones(3 * count), torch.zeros(3 * count)))


def test_the_clustered_error_is_that_of_the_sums_over_groups_whatever_their_names_and_order():
    x, groups = T(1, 5, 2, 8, 3, 4), torch.tensor([70, -1, 70, 3, -1, 3])
    sums = np.array([3, 8, 12]) - 2 * x.mean().item()
    want = math.sqrt((sums**2).sum() * 3 / 2) / 6
    assert D.clustered_error(x, groups) == pytest.approx(want)
    assert D.clustered_error(x.flip(0), groups.flip(0)) == pytest.approx(want)
    assert D.clustered_error(x, torch.arange(6)) == pytest.approx(x.std().item() / math.sqrt(6))


def test_the_effective_sample_size_is_that_of_the_weights_p_over_pi():
    s = log_ratios(1)
    w = (-s).exp()
    assert estimate(D.get("js"), s).ess == pytest.approx((w.sum() ** 2 / (w**2).sum()).item())


@pytest.mark.parametrize("name", ["forward_kl", "neyman_chi2", "jeffreys", "mixture"])
def test_a_p_that_is_not_normalised_is_withheld_where_the_estimate_relies_on_it(name):
    f, s = D.get(name), log_ratios(0.03)
    measured = D.estimate(f, s, torch.full_like(s, 0.5))
    assert math.isnan(measured.value)
    assert math.isnan(measured.standard_error)
    assert "not 1" in measured.reason


def test_a_sample_that_pi_cannot_have_drawn_is_an_error():
    with pytest.raises(ValueError, match="estimate"):
        D.estimate(D.get("js"), T(0.1, -INF, 0.2), T(0.2, 0.3, 0.1))


@each_name
def test_a_value_that_overflows_says_so(f):
    s = log_ratios(0.1)
    s[3] = -800.0  # p/π = e^800 for one sample
    e = estimate(f, s)
    assert e.reason or math.isfinite(e.value)


@each_name
@pytest.mark.parametrize("spread", [1e-170, 1e-9, 100.0, 170.0, 235.0, 400.0])
def test_no_spread_of_the_log_ratios_is_too_small_or_too_large(f, spread):
    """Squares and cubes of what an f makes of them leave the range of a float long before they do."""
    e = estimate(f, spread * log_ratios(1.0))
    assert e.reason or (math.isfinite(e.value) and math.isfinite(e.standard_error))
    assert not e.reason or spread > 1


@each_name
def test_clusters_whose_sums_agree_leave_no_error(f):
    """Each holds the same two values, so that the clustered error is 0 or what rounding leaves of it."""
    s = T(0.3, -0.4).repeat(500)
    e = estimate(f, s, torch.arange(1000) // 2)
    assert not e.reason.startswith("too heavy")
    assert e.reason or e.standard_error < 1e-15


def test_one_cluster_has_no_error_and_says_so():
    e = estimate(D.get("reverse_kl"), log_ratios(1), torch.zeros(1000))
    assert math.isnan(e.standard_error)
    assert e.reason


def test_a_log_ratio_that_is_nan_is_an_error():
    with pytest.raises(ValueError, match="nan"):
        estimate(D.get("js"), T(0.1, math.nan, 0.2))
    with pytest.raises(ValueError, match="nan"):
        D.estimate(D.get("js"), T(0.1, -INF), T(0.2, -INF))


@pytest.mark.parametrize(
    ("log_pi", "log_p", "groups"),
    [
        (torch.zeros(4), torch.zeros(5), None),
        (torch.zeros(4), torch.zeros(1), None),
        (torch.zeros(2, 2), torch.zeros(2, 2), None),
        (torch.zeros(1), torch.zeros(1), None),
        (torch.zeros(()), torch.zeros(()), None),
        (torch.zeros(4), torch.zeros(4), torch.arange(3)),
        (torch.zeros(4), torch.zeros(4), torch.arange(5)),
        (torch.zeros(4), torch.zeros(4), torch.zeros(4, 1)),
    ],
)
def test_shapes_that_do_not_fit_are_a_value_error(log_pi, log_p, groups):
    with pytest.raises(ValueError, match=r"estimate"):
        D.estimate(D.get("js"), log_pi, log_p, groups)
