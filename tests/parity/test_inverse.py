"""RePaint against diffusers' scheduler, and the weak members' arithmetic against its guiders."""

import jax.numpy as jnp
import numpy as np
import pytest
from peers import peer

from jdiff import denoisers, guidance, schedules, solvers
from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import struct
from jdiff.solvers.repaint import diffuse

repaint = peer("diffusers.schedulers.scheduling_repaint")
guiders = peer("diffusers.guiders")
torch = peer("torch")

RNG = np.random.default_rng(0)
X, EPS, IMAGE, Z, WEAK, NULL = (RNG.normal(size=(2, 3, 4, 4)).astype("f4") for _ in range(6))
KEEP = RNG.random((4, 4)) < 0.5
TABLE = schedules.ddpm_linear()


@struct
class Given(Noise):
    """One array for every draw: diffusers reuses its noise for the known and unknown pixels."""

    z: np.ndarray

    def between(self, x, t, s, part=0):
        return self.z

    def free(self, x, i=0):
        return self.z


@pytest.fixture
def scheduler(monkeypatch):
    """Theirs with eta = 1, DDPM's noise, no clipping, and our noise injected."""
    monkeypatch.setattr(repaint, "randn_tensor", lambda *a, **k: torch.tensor(Z))
    return repaint.RePaintScheduler(beta_schedule="linear", eta=1.0, clip_sample=False)


def told(x, t, cond):
    """A network that says EPS; ours and theirs know x0 from it."""
    alpha, sigma = (f(t)[:, None, None, None] for f in (TABLE.alpha, TABLE.sigma))
    return Prediction((x - sigma * EPS) / alpha, jnp.asarray(EPS))


@pytest.mark.parametrize(("steps", "index"), [(1000, 700), (100, 500), (100, 10)])
def test_a_step_is_that_of_diffusers(scheduler, steps, index):
    """Their index is ours minus 1; like ours, algorithm 1's line 5 reads sigma, not its square."""
    scheduler.set_timesteps(steps, jump_length=1, jump_n_sample=1)
    keep = np.broadcast_to(KEEP, X.shape).astype("f4")
    theirs = scheduler.step(*map(torch.tensor, (EPS, index, X, IMAGE, keep))).prev_sample
    t, s = (jnp.asarray(float(i + 1)) for i in (index, index - 1000 // steps))
    solver = solvers.repaint(KEEP)
    ours, _, _ = solver.step(
        told, TABLE, jnp.asarray(X), solver.init(X, jnp.ones(3)), t, s, Given(Z),
        {"y": jnp.asarray(IMAGE)},
    )  # fmt: skip
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


def test_noising_back_one_step_is_that_of_diffusers(scheduler):
    """`undo_step` from index 400 to 401; over more it composes single steps, of equal law."""
    scheduler.set_timesteps(1000, jump_length=1, jump_n_sample=1)
    theirs = scheduler.undo_step(torch.tensor(X), 400).numpy()
    ours = diffuse(TABLE, jnp.asarray(X), jnp.asarray(400.0), jnp.asarray(401.0), jnp.asarray(Z))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def says(value):
    return denoisers.function(lambda x, t, cond: Prediction(value, value), TABLE)


@pytest.mark.parametrize(
    ("kind", "scale", "layers"),
    [
        ("PerturbedAttentionGuidance", "perturbed_guidance_scale", "perturbed_guidance_layers"),
        ("SkipLayerGuidance", "skip_layer_guidance_scale", "skip_layer_guidance_layers"),
        ("SmoothedEnergyGuidance", "seg_guidance_scale", "seg_guidance_layers"),
    ],
)
@pytest.mark.parametrize("original", [False, True])
def test_the_sum_over_null_and_weak_members_is_that_of_the_guiders(kind, scale, layers, original):
    """Theirs adds s (good - weak) to CFG; ours is a product of experts of the same three."""
    g, s = 4.0, 2.5
    fields = {scale: s, layers: 0, "use_original_formulation": original}

    def theirs(guidance_scale, null):
        guider = getattr(guiders, kind)(guidance_scale=guidance_scale, **fields)
        guider.set_state(step=1, num_inference_steps=10, timestep=None)
        members = [EPS, null, WEAK]
        made = guider.forward(*(None if m is None else torch.tensor(m) for m in members)).pred
        return made.numpy()

    w = g + 1 if original else g
    experts = [says(EPS), says(NULL), says(WEAK)]
    made = guidance.product(experts, [w + s, 1 - w, -s])(X, jnp.ones(2)).x0
    np.testing.assert_allclose(made, theirs(g, NULL), rtol=1e-4, atol=1e-4)
    # Without CFG: the extrapolation from the weak member, its scale as in CFG's two conventions.
    made = guidance.extrapolate(*(Prediction(a, a) for a in (WEAK, EPS)), s + original).x0
    off = 0.0 if original else 1.0
    np.testing.assert_allclose(made, theirs(off, None), rtol=1e-4, atol=1e-4)
