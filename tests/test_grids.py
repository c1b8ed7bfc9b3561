"""Time grids: the published spacings, their ends, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import CONTINUOUS, SCHEDULES, x64

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
    + [(k, "ddpm_linear") for k in ("leading", "trailing", "linspace")],
)
def test_every_grid_passes_its_own_check_in_float32(kind, name, n):
    s = SCHEDULES[name]()
    times = grids.check(grids.BY_NAME[kind](s, n), s)
    assert len(times) == n + 1
    assert times[-1] == s.t_data
    if kind not in ("leading",):
        np.testing.assert_allclose(times[0], s.t_max, rtol=1e-5)


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
