"""Time grids: the published spacings, their ends, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import ALL_SCHEDULES, CONTINUOUS, SCHEDULES, x64

from jdiff import UserError, grids, schedules

#: Karras et al. 2022, equation 5: rho = 7, 0.002 to 80.
KARRAS = {
    5: [80, 17.527832, 2.515219, 0.169753, 0.002],
    10: [
        80, 42.415189, 21.108677, 9.723201, 4.066124, 1.501742, 0.469979, 0.116639, 0.020435, 0.002,
    ],
    18: [
        80, 57.585985, 40.785574, 28.374585, 19.352453, 12.910082, 8.400935, 5.315195, 3.256822,
        1.92334, 1.088171, 0.585348, 0.296442, 0.139516, 0.059947, 0.022935, 0.007528, 0.002,
    ],
}  # fmt: skip
FINITE = [name for name in SCHEDULES if name != "rectified_flow"]
TABLE = schedules.ddpm_linear()


@pytest.mark.parametrize("n", KARRAS)
@x64
def test_karras_has_the_published_noise_levels_and_ends_at_the_data(n):
    times = grids.karras(schedules.edm(), n)
    np.testing.assert_allclose(times[:-1], KARRAS[n], rtol=3e-5, atol=5e-7)
    assert times[-1] == 0.0


@pytest.mark.parametrize("name", FINITE)
@x64
def test_karras_on_any_schedule_is_edms_noise_levels_in_its_own_time(name):
    s = SCHEDULES[name]()
    ends = [float(s.sigma_ratio(jnp.asarray(t))) for t in (s.t_max, s.t_min)]
    i = np.arange(12) / 11
    sigma = (ends[0] ** (1 / 7) + i * (ends[1] ** (1 / 7) - ends[0] ** (1 / 7))) ** 7
    times = grids.karras(s, 12)
    np.testing.assert_allclose(s.sigma_ratio(times[:-1]), sigma, rtol=1e-8)


@x64
def test_karras_takes_its_own_rho_and_ends():
    s = schedules.edm()
    linear = grids.karras(s, 5, rho=1.0, first=9.0, last=1.0)
    np.testing.assert_allclose(linear, [9, 7, 5, 3, 1, 0], rtol=1e-12)
    flow = schedules.rectified_flow()
    np.testing.assert_allclose(
        flow.sigma_ratio(grids.karras(flow, 3, rho=1.0, first=0.75, last=0.5)[:-1]), [3, 2, 1]
    )


@pytest.mark.parametrize("name", FINITE)
@x64
def test_uniform_logsnr_has_equal_steps_of_logsnr_over_the_domain(name):
    s = SCHEDULES[name]()
    logsnr = np.asarray(s.logsnr(grids.uniform_logsnr(s, 9)[:-1]))
    low, high = (float(s.logsnr(jnp.asarray(t))) for t in (s.t_max, s.t_min))
    np.testing.assert_allclose(logsnr, np.linspace(low, high, 9), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@x64
def test_uniform_has_equal_steps_from_t_max_to_the_data(name):
    s = SCHEDULES[name]()
    np.testing.assert_allclose(grids.uniform(s, 4), float(s.t_max) * np.linspace(1, 0, 5))


@x64
def test_uniform_with_a_last_is_the_vp_column_of_edms_table_1():
    """t_i = 1 + i / (N - 1) (eps_s - 1), and t_N = 0."""
    times = grids.uniform(schedules.vp_linear(), 8, last=1e-3)
    np.testing.assert_allclose(times[:-1], 1 + np.arange(8) / 7 * (1e-3 - 1), rtol=1e-12)
    assert times[-1] == 0.0


@x64
def test_a_grid_can_start_half_way():
    np.testing.assert_allclose(
        grids.uniform(schedules.rectified_flow(), 2, first=0.5), [0.5, 0.25, 0]
    )
    assert grids.uniform_logsnr(schedules.edm(), 3, first=2.0)[0] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("grid", "published"),
    [
        (grids.leading(TABLE, 10), range(900, -1, -100)),
        (grids.leading(TABLE, 10, offset=1), range(901, 0, -100)),
        (grids.trailing(TABLE, 10), range(999, 98, -100)),
        (grids.linspace(TABLE, 10), range(999, -1, -111)),
    ],
    ids=["leading", "leading+1", "trailing", "linspace"],
)
def test_the_tables_spacings_are_diffusers_in_its_index_t_minus_1(grid, published):
    assert (grid[:-1] - 1).tolist() == list(published)
    assert grid[-1] == 0.0


def _half_even(p, q):
    """p / q rounded, halves to even, in integers: 1000 * i / n is not exact in floats."""
    up, half = divmod(2 * p + q, 2 * q)
    return up - (half == 0 and up % 2 == 1)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 50, 75, 149, 333, 999, 1000])
def test_the_tables_spacings_follow_numpys_formulas_for_any_n(n):
    index = lambda grid: (np.asarray(grid)[:-1] - 1).astype(int).tolist()
    i = np.arange(n)[::-1]
    assert index(grids.leading(TABLE, n)) == (i * (1000 // n)).tolist()
    ups = [_half_even((n - j) * 1000, n) for j in range(n)]
    assert index(grids.trailing(TABLE, n)) == [u - 1 for u in ups]
    if n > 1:  # numpy's linspace of one value is its lower end, ours the upper: noise
        assert index(grids.linspace(TABLE, n)) == [
            _half_even(999 * (n - 1 - j), n - 1) for j in range(n)
        ]


def test_one_step_goes_from_noise_to_the_data():
    assert grids.trailing(TABLE, 1).tolist() == [1000, 0]
    assert grids.linspace(TABLE, 1).tolist() == [1000, 0]
    assert grids.uniform(schedules.rectified_flow(), 1).tolist() == [1, 0]
    np.testing.assert_allclose(grids.karras(schedules.edm(), 1), [80, 0], rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 5, 40, 1000])
@pytest.mark.parametrize(
    ("kind", "name"),
    [(k, n) for k in ("karras", "uniform_logsnr") for n in FINITE]
    + [("uniform", n) for n in SCHEDULES]
    + [(k, "ddpm_linear") for k in ("leading", "trailing", "linspace", "simple")],
)
def test_every_grid_passes_its_own_check_in_float32(kind, name, n):
    s = SCHEDULES[name]()
    times = grids.check(grids.BY_NAME[kind](s, n), s)
    assert len(times) == n + 1
    assert times[-1] == s.t_data
    if kind not in ("leading",):
        np.testing.assert_allclose(times[0], s.t_max, rtol=1e-5)


@pytest.mark.parametrize("name", ["ve", "linear_logsnr", "monotone", "ncsn", "sub_vp", "gvp"])
@pytest.mark.parametrize("kind", ["uniform", "uniform_logsnr", "sgm_uniform", "normal", "beta"])
def test_a_grid_ends_at_the_data_wherever_that_is(kind, name):
    if (kind, name) == ("uniform_logsnr", "gvp"):
        return  # refused: its logSNR is infinite at both ends
    s = ALL_SCHEDULES[name]()
    times = grids.check(grids.BY_NAME[kind](s, 6), s)
    assert len(times) == 7
    assert float(times[-1]) == s.t_data
    assert float(times[0]) == pytest.approx(float(s.t_max), rel=1e-5)
    assert np.isfinite(np.asarray(times[:-1])).all()


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("kind", [k for k in grids.BY_NAME if k not in ("shifted", "leading")])
def test_every_named_grid_has_n_steps_on_stable_diffusions_table(kind, n):
    s = ALL_SCHEDULES["ddpm_linear"]()
    first = grids.BY_NAME[kind](s, n)
    assert len(grids.check(first, s)) == n + 1
    assert first[-1] == 0.0


# Each formula again, in numpy, from the noise levels sigma / alpha of its source.


def _levels(s, times):
    return np.asarray(s.sigma_ratio(times[:-1]))


@pytest.mark.parametrize("name", ["edm", "vp_linear", "ve"])
@x64
def test_grids_made_in_sigma_have_their_formulas_levels(name):
    s, n, i = ALL_SCHEDULES[name](), 7, np.arange(7) / 6
    top, bottom = (float(s.sigma_ratio(jnp.asarray(t))) for t in (s.t_max, s.t_min))
    expected = [
        (grids.polyexponential(s, n, rho=2.0), bottom * (top / bottom) ** ((1 - i) ** 2)),
        (grids.polyexponential(s, n), np.geomspace(top, bottom, n)),
        (grids.uniform_logsnr(s, n), np.geomspace(top, bottom, n)),
        (grids.kl_optimal(s, n), np.tan((1 - i) * np.arctan(top) + i * np.arctan(bottom))),
    ]
    for times, levels in expected:
        np.testing.assert_allclose(_levels(s, times), levels, rtol=1e-8)


@x64
def test_kl_optimal_of_other_data_scales_with_it():
    s = schedules.edm(0.01, 10.0)
    unit = grids.kl_optimal(schedules.edm(0.02, 20.0), 6)
    np.testing.assert_allclose(grids.kl_optimal(s, 6, sigma_data=0.5), unit / 2, rtol=1e-12)


@x64
def test_vp_is_the_vp_column_of_edms_table_1_on_any_schedule():
    t = 1 + np.arange(8) / 7 * (1e-3 - 1)
    sigma = np.sqrt(np.exp(19.9 * t**2 / 2 + 0.1 * t) - 1)
    wide = schedules.edm(0.002, 200.0)
    np.testing.assert_allclose(grids.vp(wide, 8)[:-1], sigma, rtol=1e-9)
    np.testing.assert_allclose(
        grids.vp(schedules.vp_linear(), 8), grids.uniform(schedules.vp_linear(), 8, last=1e-3),
        rtol=1e-9,
    )  # fmt: skip


@x64
def test_beta_puts_equal_probability_between_its_times():
    """Beta(1/2, 1/2) has a closed form, F(x) = (2 / pi) asin(sqrt(x)); Beta(1, 1) is flat."""
    flow = schedules.rectified_flow()
    arcsine = np.sin(np.pi / 2 * np.arange(5, 0, -1) / 5) ** 2
    np.testing.assert_allclose(grids.beta(flow, 5, 0.5, 0.5), [*arcsine, 0], atol=1e-9)
    np.testing.assert_allclose(grids.beta(flow, 5, 1, 1), grids.uniform(flow, 5), atol=1e-12)
    s = schedules.edm(1.0, 3.0)
    np.testing.assert_allclose(
        grids.beta_sigma(s, 5, 0.5, 0.5)[:-1],
        1 + 2 * np.sin(np.pi / 2 * np.linspace(1, 0, 5)) ** 2, rtol=1e-9,
    )  # fmt: skip


@x64
def test_linear_quadratic_is_a_line_and_a_parabola_that_goes_on_from_it():
    f = 1 - np.asarray(grids.linear_quadratic(schedules.rectified_flow(), 10))
    np.testing.assert_allclose(f[:6], 0.025 * np.arange(6) / 5, atol=1e-12)
    assert f[-1] == 1.0
    np.testing.assert_allclose(np.diff(f[5:], 3), 0, atol=1e-12)  # a parabola
    a = np.diff(f[5:], 2)[0] / 2
    np.testing.assert_allclose(
        f[6] - f[5], 0.005 + a, rtol=1e-9
    )  # of the line's slope at its start
    assert grids.linear_quadratic(schedules.rectified_flow(), 1).tolist() == [1, 0]


def _sd3(t, s):
    return s * t / (1 + (s - 1) * t)


@x64
def test_a_shifted_grid_has_shifted_times():
    flow, i = schedules.rectified_flow(), np.arange(7) / 6
    np.testing.assert_allclose(grids.shifted(flow, 6), _sd3(1 - i, 3.0), atol=1e-12)
    shift = schedules.flux_shift(4096)
    np.testing.assert_allclose(
        grids.shifted(flow, 6, shift=shift), _sd3(1 - i, np.exp(1.15)), atol=1e-12
    )
    quadratic = grids.shifted(flow, 6, shift=2.0, grid=grids.linear_quadratic)
    np.testing.assert_allclose(quadratic, _sd3(grids.linear_quadratic(flow, 6), 2.0), atol=1e-12)


@x64
def test_the_shift_of_a_schedule_and_of_a_grid_visit_the_same_noise():
    flow = schedules.rectified_flow()
    of_schedule = schedules.shifted(flow, 1 / 3)
    in_schedule = of_schedule.sigma(grids.uniform(of_schedule, 6))
    np.testing.assert_allclose(in_schedule, flow.sigma(grids.shifted(flow, 6)), atol=1e-12)


@x64
def test_iddpm_is_the_third_column_of_edms_table_1():
    u = np.zeros(1001)
    abar = lambda j: np.sin(np.pi / 2 * j / (1000 * 1.008)) ** 2
    for j in range(1000, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(abar(j - 1) / abar(j), 0.001) - 1)
    np.testing.assert_allclose(grids.iddpm_levels(), u[:-1], rtol=1e-12)
    index = [int(np.floor(8 + (999 - 8) / 9 * i + 0.5)) for i in range(10)]
    assert (index[0], index[-1]) == (8, 999)
    times = grids.iddpm(schedules.edm(0.002, 200.0), 10)
    np.testing.assert_allclose(times[:-1], u[index], rtol=1e-9)


AYS_TIMESTEPS = {  # diffusers' published indices of the same grids on Stable Diffusion's table
    "sd15": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24],
    "sdxl": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13],
}


@pytest.mark.parametrize("model", AYS_TIMESTEPS)
@x64
def test_align_your_steps_has_its_published_timesteps(model):
    times = grids.align_your_steps(schedules.scaled_linear(), 10, model)
    np.testing.assert_allclose(times[:-1] - 1, AYS_TIMESTEPS[model], atol=0.75)
    assert times[-1] == 0.0


@x64
def test_align_your_steps_is_log_linear_between_its_levels():
    s = schedules.edm(0.002, 1000.0)
    known = np.asarray(grids.align_your_steps(s, 10, "svd"))[:-1]
    np.testing.assert_allclose(known, [
        700, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034,
    ], rtol=1e-9)  # fmt: skip
    twice = np.asarray(grids.align_your_steps(s, 20, "svd"))[:-1]
    np.testing.assert_allclose(twice[::2], known, rtol=1e-9)
    np.testing.assert_allclose(twice[1:-1:2], np.sqrt(known[:-1] * known[1:]), rtol=1e-9)
    np.testing.assert_allclose(twice[-1], np.sqrt(0.034 * 0.002), rtol=1e-9)


def test_names_of_other_tools_are_the_spacings_they_mean():
    index = lambda grid: (np.asarray(grid)[:-1] - 1).tolist()
    assert index(grids.simple(TABLE, 10)) == index(grids.trailing(TABLE, 10))
    assert index(grids.simple(TABLE, 7)) == [999 - int(i * 1000 / 7) for i in range(7)]
    assert index(grids.ddim_uniform(TABLE, 10)) == list(range(901, 0, -100))
    # DPM-Solver's linspace in diffusers, and linspace before its rounding
    rounded = grids.round_steps(TABLE, grids.sgm_uniform(TABLE, 10))
    assert index(rounded) == [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]
    assert index(grids.round_steps(TABLE, grids.normal(TABLE, 8))) == index(
        grids.linspace(TABLE, 8)
    )
    assert grids.BY_NAME["exponential"] is grids.BY_NAME["lu"] is grids.uniform_logsnr


def test_image_to_image_takes_the_tail():
    flow = schedules.rectified_flow()
    times = grids.uniform(flow, 10)
    np.testing.assert_array_equal(grids.tail(times, 0.3), times[-4:])
    np.testing.assert_array_equal(grids.tail(times, 1.0), times)
    assert len(grids.tail(times, 0.01)) == 2
    part = grids.img2img(flow, 10, grids.uniform, 0.5)
    np.testing.assert_allclose(part, np.linspace(0.5, 0, 11), atol=1e-7)


@x64
def test_a_grid_of_ones_own_is_checked_and_ends_at_the_data():
    flow, ve = schedules.rectified_flow(), schedules.ve()
    assert grids.custom(flow, times=[0.9, 0.5]).tolist() == [0.9, 0.5, 0.0]
    assert grids.custom(flow, times=[0.9, 0.5, 0.0]).tolist() == [0.9, 0.5, 0.0]
    np.testing.assert_allclose(grids.custom(flow, sigmas=[3.0, 1.0, 0.0]), [0.75, 0.5, 0.0])
    np.testing.assert_allclose(ve.sigma(grids.custom(ve, sigmas=[5.0, 1.0])), [5.0, 1.0, 0.0])


@x64
def test_a_grids_numbers_can_be_traced():
    s = schedules.edm()
    many = jax.vmap(lambda rho: grids.karras(s, 6, rho=rho))(jnp.asarray([3.0, 7.0]))
    np.testing.assert_allclose(many, [grids.karras(s, 6, rho=r) for r in (3.0, 7.0)], rtol=1e-9)
    slope = jax.grad(lambda top: grids.karras(schedules.edm(0.002, top), 6)[0])(80.0)
    np.testing.assert_allclose(slope, 1.0, rtol=1e-9)


EDM, FLOW = schedules.edm(), schedules.rectified_flow()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: grids.check([1.0, 2.0, 0.0], EDM), r"times\[0\]=1 is followed by times\[1\]=2"),
        (lambda: grids.check([2.0, 1.0, 1.0], EDM), r"times\[1\]=1 is followed by times\[2\]=1"),
        (lambda: grids.check([2.0, np.nan, 0.0], EDM), r"times must fall"),
        (lambda: grids.check([np.inf, 1.0, 0.0], EDM), r"times run from inf"),
        (lambda: grids.check([80.0, 1.0, 0.0], FLOW), r"80 to 0; RectifiedFlow allows 1 down to 0"),
        (lambda: grids.check([1.0, 0.0, -0.5], FLOW), r"to -0.5; RectifiedFlow"),
        (lambda: grids.check([1.0], FLOW), r"at least two values in one axis"),
        (lambda: grids.check([[1.0, 0.0]], FLOW), r"given \(1, 2\)"),
        (lambda: grids.karras(EDM, 0), r"n=0 steps given"),
        (lambda: grids.leading(TABLE, 1001), r"leading: n=1001 .* T=1000"),
        (lambda: grids.trailing(TABLE, 1001), r"trailing: n=1001 .* T=1000"),
        (lambda: grids.linspace(TABLE, 1001), r"linspace: n=1001 .* T=1000"),
        (lambda: grids.leading(TABLE, 1000, offset=1), r"offset=1 .* allowed are 0 to 0"),
        (lambda: grids.custom(EDM, sigmas=[1.0, 2.0]), r"times\[0\]=1 is followed by times\[1\]=2"),
        (lambda: grids.custom(EDM), r"custom: give times= .* or sigmas="),
        (lambda: grids.tail(jnp.arange(3.0), 0.0), r"tail: strength=0.0 given"),
        (lambda: grids.img2img(EDM, 3, grids.karras, 1.5), r"img2img: strength=1.5 given"),
        (lambda: grids.round_steps(EDM, grids.karras(EDM, 5)), r"needs a discrete table"),
        (lambda: grids.round_steps(TABLE, jnp.asarray([9.2, 9.1, 0])), r"times must fall"),
        (lambda: grids.shifted(EDM, 5), r"shifts times on \[0, 1\] .* given EDM"),
        (lambda: grids.beta(EDM, 5, a=0), r"beta: a=0 and b=0.6 given; both must be positive"),
        (lambda: grids.linear_quadratic(schedules.ve(), 5), r"VE has its data at t = -inf"),
        (lambda: grids.linear_quadratic(FLOW, 4, linear=4), r"linear=4 given; with n=4, 1 to 3"),
        (lambda: grids.linear_quadratic(FLOW, 4, linear=0), r"linear=0 given; with n=4, 1 to 3"),
        (lambda: grids.linear_quadratic(FLOW, 4, 2.0), r"threshold=2.0 given; it lies in \(0, 1\)"),
        (lambda: grids.karras(EDM, 5, rho=0.0), r"karras: rho=0.0 given; it must be positive"),
        (lambda: grids.align_your_steps(EDM, 5, "sd14"), r"Did you mean 'sd15'"),
        (lambda: grids.iddpm(EDM, 993), r"iddpm: n=993 steps given"),
        (lambda: grids.leading(EDM, 10), r"leading: .* given EDM; .* grids.uniform"),
        (lambda: grids.trailing(FLOW, 10), r"trailing: .* given RectifiedFlow"),
        (lambda: grids.karras(FLOW, 10), r"karras: .* -inf at t=1.0; give first= .* first=0.999"),
        (lambda: grids.uniform_logsnr(FLOW, 10, first=0.9), r"inf at t=0.0; give last="),
    ],
)  # fmt: skip
def test_a_grid_that_cannot_be_followed_is_refused_with_the_reason(make, said):
    with pytest.raises(UserError, match=said):
        make()


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_grid_of_another_schedule_is_noticed(name):
    with pytest.raises(UserError, match="made for another schedule"):
        grids.check(grids.trailing(TABLE, 10), SCHEDULES[name]())


def test_every_schedule_of_a_tree_is_asked():
    times = grids.uniform(schedules.edm(), 4)
    with pytest.raises(UserError, match="RectifiedFlow allows 1 down to 0"):
        grids.check(times, {"a": schedules.edm(), "b": schedules.rectified_flow()})
