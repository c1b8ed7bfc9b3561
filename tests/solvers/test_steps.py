"""One step at a time: exact ends, evaluations counted, degenerate grids, change of variables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES, at, inside, mixture_1d, same, x64

from jdiff import grids, sample, schedules, solvers
from jdiff.noise import Fresh
from jdiff.predictions import from_x0
from jdiff.pytree import struct

MAKERS = {
    # `adaptive` counts by sample: test_adaptive.py
    **{name: make for name, make in solvers.BY_NAME.items() if name != "adaptive"},
    "ddim_half": lambda: solvers.ddim(0.5),
    "ddpm_large": lambda: solvers.ddpm(1.0),
    "edm_churn": lambda: solvers.edm(churn=5.0),
}
DETERMINISTIC = [
    "euler", "heun", "ddim", "edm", "dpmpp_2m", "dpmpp_3m", "dpm_solver_2m", "deis", "unipc",
    "res_multistep", "midpoint", "rk4", "lms", "plms", "pndm", "ipndm", "gradient_estimation",
]  # fmt: skip
every_solver = pytest.mark.parametrize("solver", MAKERS)
some_schedules = pytest.mark.parametrize("name", ["edm", "rectified_flow"])
KEY = jax.random.key(0)


@struct
class Says:
    """x0 = image + pull x, an eps that agrees with x, and NaN about sigma = 0."""

    image: jax.Array
    pull: float
    schedule: schedules.Schedule

    def __call__(self, x, t, cond):
        at_data = jnp.where(self.schedule.sigma(t) == 0, jnp.nan, 0.0)[:, None]
        return from_x0(self.schedule, x, self.image + self.pull * x + at_data, t)


@jax.jit
def _step(solver, denoise, schedule, x, memory, t, s):
    """One step with keys 0, 1, ...: the one program of a solver on a schedule."""
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(len(x)))
    return solver.step(denoise, schedule, x, memory, t, s, Fresh(keys), {})[:2]


def _first(solver, denoise, x, t, s):
    """The state after a first step."""
    t, s = jnp.asarray(t), jnp.asarray(s)
    memory = solver.init(x, jnp.stack([t, s]))
    return _step(solver, denoise, denoise.schedule, x, memory, t, s)[0]


@every_solver
@some_schedules
@x64
def test_the_step_to_the_data_returns_the_predicted_image_exactly(solver, name):
    """Without noise, and without asking the denoiser about sigma = 0, where it says NaN."""
    s = SCHEDULES[name]()
    image = jnp.asarray([[0.123, -0.7], [0.9, 0.4]])
    x_next = _first(MAKERS[solver](), Says(image, 0.0, s), 3.0 * image, inside(s, 3)[1], 0.0)
    np.testing.assert_array_equal(x_next, image)


@pytest.mark.parametrize("solver", [m for m in MAKERS if m != "consistency"])  # which renoises
@some_schedules
@x64
def test_a_step_of_no_length_changes_nothing(solver, name):
    s = SCHEDULES[name]()
    image, x = jnp.asarray([[0.1, 0.2], [-0.3, 0.5]]), jnp.asarray([[0.4, 1.0], [-1.1, 0.2]])
    t = inside(s, 3)[1]
    if solver == "edm_churn":
        solver = "edm"  # churn would renoise and come back: not nothing
    np.testing.assert_allclose(_first(MAKERS[solver](), Says(image, 0.3, s), x, t, t), x, rtol=1e-9)


@every_solver
@x64
def test_pure_noise_at_alpha_zero_is_a_finite_start(solver):
    """Rectified flow at t = 1: the logSNR is -inf, and 2M must fall to first order around it."""
    s, made = schedules.rectified_flow(), MAKERS[solver]()
    image, x = jnp.asarray([[0.1, 0.2], [-0.3, 0.5]]), jnp.asarray([[0.4, 1.0], [-1.1, 0.2]])
    denoise, times = Says(image, 0.3, s), jnp.asarray([1.0, 0.8, 0.5, 0.2, 0.0])
    memory, states = made.init(x, times), [x]
    for t, after in zip(times, times[1:]):
        x, memory = _step(made, denoise, s, x, memory, t, after)
        states.append(x)
    assert np.isfinite(states).all()
    if solver in DETERMINISTIC and solver not in ("heun", "edm", "midpoint", "rk4"):
        start = states[0]  # where eps = x: DDIM's step by hand
        expected = 0.2 * (image + 0.3 * start) + 0.8 * start
        np.testing.assert_allclose(states[1], expected, rtol=1e-6)


@every_solver
def test_n_steps_make_the_calls_that_the_solver_counts_and_none_at_the_data(solver):
    seen = []

    def denoise(x, t, cond):
        jax.debug.callback(lambda t: seen.append(float(t[0])), t)
        return from_x0(schedules.edm(), x, 0.5 * x, t)

    times = grids.karras(schedules.edm(), 6)
    sample(
        KEY, denoise, schedule=schedules.edm(), shape=(1,), solver=MAKERS[solver](), times=times
    ).block_until_ready()
    jax.effects_barrier()
    assert len(seen) == MAKERS[solver]().count(6)
    assert min(seen) > 0.0
    if MAKERS[solver]().count(6) == 6:
        assert {round(t, 4) for t in seen} == {round(t, 4) for t in times[:-1].tolist()}


@pytest.mark.parametrize(
    ("solver", "calls"),
    [
        ("ddim", 6), ("dpmpp_2m", 6), ("unipc", 6), ("heun", 11), ("dpmpp_2s", 11),
        ("lms", 6), ("plms", 7), ("pndm", 15), ("dpm_2", 11), ("rk4", 21),
        ("dpm_solver", 16), ("dpm_solver_fast", 15),
    ],
)  # fmt: skip
def test_the_counts_are_those_of_the_papers(solver, calls):
    assert MAKERS[solver]().count(6) == calls


@x64
def test_2m_forgets_nothing_wrong_over_a_repeated_time():
    """Pitfall: r = h_last / h divides by zero after a step of no length."""
    s = schedules.edm()
    denoise, _ = mixture_1d(s)
    x, (a, b, c) = jnp.asarray([[2.0]]), (jnp.asarray(v) for v in (3.0, 2.0, 1.0))
    solver = solvers.dpmpp_2m()
    x1, memory = _step(solver, denoise, s, x, solver.init(x, jnp.stack([a])), a, b)
    x1, memory = _step(solver, denoise, s, x1, memory, b, b)
    x2, _ = _step(solver, denoise, s, x1, memory, b, c)
    first_order = _first(solvers.ddim(), denoise, x1, b, c)
    np.testing.assert_allclose(x2, first_order, rtol=1e-12)


@some_schedules
@x64
def test_2m_starts_as_ddim_then_extrapolates_x0_along_log_snr(name):
    s = SCHEDULES[name]()
    denoise, _ = mixture_1d(s)
    t0, t1, t2 = (jnp.asarray(t) for t in at(s, [6.0, 2.0, 1.0]))
    x = jnp.asarray([[1.5], [-4.0]])
    solver = solvers.dpmpp_2m()
    x1, memory = _step(solver, denoise, s, x, solver.init(x, jnp.stack([t0])), t0, t1)
    np.testing.assert_allclose(x1, _first(solvers.ddim(), denoise, x, t0, t1), rtol=1e-10)
    x2, _ = _step(solver, denoise, s, x1, memory, t1, t2)
    # sigma_t2 * integral of e^lambda x0(lambda), x0 linear through the last two with the midpoint
    x0_last, x0 = (denoise(v, jnp.broadcast_to(t, 2)).x0 for v, t in ((x, t0), (x1, t1)))
    h, h_last = np.log(2.0), np.log(3.0)
    middle = x0 + (x0 - x0_last) / h_last * h / 2
    expected = s.sigma(t2) / s.sigma(t1) * x1 + s.alpha(t2) * (1 - np.exp(-h)) * middle
    np.testing.assert_allclose(x2, expected, rtol=1e-8)


@pytest.mark.parametrize("name", ["vp_linear", "cosine", "rectified_flow", "ddpm_linear"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
@x64
def test_under_x_over_alpha_every_schedule_is_edms(solver, name):
    """VP-DDIM is VE-Euler in sigma / alpha; and so for the second order."""
    sigmas, x = np.geomspace(8.0, 0.1, 7), jnp.asarray([[3.0], [-5.0]])
    ends = []
    for s in (schedules.edm(), SCHEDULES[name]()):
        times = jnp.append(at(s, sigmas), 0.0)
        start = x * s.alpha(times[0])
        ends.append(sample(KEY, mixture_1d(s)[0], x=start, times=times, solver=MAKERS[solver]()))
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-9)
    if solver == "ddim":
        euler = sample(
            KEY, mixture_1d(schedules.edm())[0], x=x, solver=solvers.euler(),
            times=jnp.append(jnp.asarray(sigmas), 0.0),
        )  # fmt: skip
        np.testing.assert_allclose(ends[0], euler, rtol=1e-9)


@pytest.mark.parametrize("name", ["euler", "heun"])
@x64
def test_a_straight_path_takes_one_step(name):
    """One data point: rectified flow's velocity is constant, so Euler and Heun are exact."""
    image = jnp.asarray([[0.3]])
    denoise = Says(image, 0.0, schedules.rectified_flow())
    x, eps = 0.2 * image + 0.8 * 1.7, 1.7
    end = _first(solvers.BY_NAME[name](), denoise, x, 0.8, 0.3)
    np.testing.assert_allclose(end, 0.7 * image + 0.3 * eps, rtol=1e-12)


@every_solver
def test_a_tree_steps_as_its_leaves_do(solver):
    """Leaves with schedules of their own; a deterministic solver gives each its lone result."""
    tree = {"image": schedules.edm(), "sound": schedules.vp_linear()}
    x = {"image": jnp.ones((2, 3)), "sound": -jnp.ones((2, 2, 2))}
    denoise = jax.tree_util.Partial(
        lambda x, t, cond: from_x0(tree, x, jax.tree.map(lambda a: 0.3 * a, x), t)
    )
    t, s = jnp.float32(0.8), jnp.float32(0.5)

    def both(solver, schedule, x, denoise):
        keys = jax.random.split(KEY, 2)
        memory = solver.init(x, jnp.stack([t, s]))
        return solver.step(denoise, schedule, x, memory, t, s, Fresh(keys), {})[0]

    out = jax.jit(both)(MAKERS[solver](), tree, x, denoise)
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, x)
    if solver in DETERMINISTIC:
        for name, schedule in tree.items():
            alone = jax.tree_util.Partial(lambda x, t, cond, s=schedule: from_x0(s, x, 0.3 * x, t))
            same(out[name], jax.jit(both)(MAKERS[solver](), schedule, x[name], alone))
