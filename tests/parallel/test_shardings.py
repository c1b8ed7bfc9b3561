"""Where a training state lives: what is large is split, and mirrors lie as their parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdiff import models, parallel
from jdiff.models.layers import Linear
from jdiff.parallel.fetch import NAME, fetch
from jdiff.parallel.layout import CONVOLUTIONAL, TRANSFORMER, layout, within
from jdiff.parallel.shardings import SMALL, of_array, of_state
from jdiff.training import ema
from jdiff.training import step as steps

P = jax.P
FSDP = layout(parallel.make({"fsdp": 4}))


@pytest.mark.parametrize(
    ("names", "shape", "spec"),
    [
        (("embed", "mlp"), (64, 256), P("fsdp")),
        (("mlp", "embed"), (256, 64), P(None, "fsdp")),
        ((None, None), (64, 256), P(None, "fsdp")),  # no rule: the largest dimension
        (("embed", None), (66, 256), P(None, "fsdp")),  # the rule's does not divide
        ((None, None), (66, 1001), P()),
        (("embed", "mlp"), (8, 256), P()),  # small
        (("layers", "embed", "mlp"), (12, 64, 256), P(None, "fsdp")),
        (("layers", "embed"), (4096, 64), P()),  # small, each layer
        (("layers", None, None), (4096, 64, 64), P(None, "fsdp")),  # not the layers
        ((), (), P()),
    ],
)
def test_where_an_array_lives(names, shape, spec):
    assert of_array(shape, names, FSDP).spec == spec


def test_without_fsdp_weights_are_whole():
    assert of_array((64, 256), ("embed", "mlp"), layout(parallel.make({"data": 4}))).spec == P()


NETS = {
    "dit": (models.DiT, models.dit_imagenet("B/2") | {"scan": True}),
    "mmdit": (models.MMDiT, {"width": 256, "depth": 3, "heads": 4}),
    "unet": (models.UNet, models.ddpmpp_cifar10()),
    "edm2": (models.EDM2, models.edm2_imagenet("img64-XS")),
    "cond_unet": (models.CondUNet, models.sd15()),
}
OPTIMIZERS = {
    "adam": optax.adam(1e-3), "adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1)),
    "lion": optax.lion(1e-3), "muon": optax.contrib.muon(1e-3), "sgd": optax.sgd(1e-3, 0.9),
}  # fmt: skip


@functools.cache
def placed(net, optimizer):
    """(shapes, shardings) of a training state, on 4 devices by FSDP."""
    cls, fields = NETS[net]
    build = lambda rngs: cls(**fields, rngs=rngs)
    laid = layout(parallel.make({"fsdp": 4}), getattr(cls, "rules", CONVOLUTIONAL))
    tx = OPTIMIZERS[optimizer]
    tx = cls.constrained(tx) if hasattr(cls, "constrained") else tx
    averages = {"a": ema.constant(0.9), "b": ema.power(0.1)}
    start = lambda params: steps.start(params, jax.random.key(0), tx, averages)
    state = jax.eval_shape(start, models.abstract(build)[1])
    return state, of_state(state, models.axes(build), laid)


def leaves(tree):
    return {jax.tree_util.keystr(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


CASES = [("dit", name) for name in OPTIMIZERS] + [(net, "adam") for net in NETS if net != "dit"]


@pytest.mark.parametrize(("net", "optimizer"), CASES)
def test_averages_and_moments_lie_as_their_parameters(net, optimizer):
    state, where = placed(net, optimizer)
    shapes, specs = leaves(state.params), leaves(where.params)
    for name in ("a", "b"):
        assert leaves(where.averages[name]) == specs
    mirrored, places = dict.fromkeys(specs, 0), leaves(where.opt)
    for path, leaf in leaves(state.opt).items():
        tails = (path[i:] for i in range(len(path)) if path[i] == "[")
        name = next((tail for tail in tails if tail in specs), None)
        if name is not None and leaf.shape == shapes[name].shape:
            assert places[path] == specs[name], path
            mirrored[name] += 1
    moments = {"adam": 2, "adamw": 2, "lion": 1, "muon": None, "sgd": 1}[optimizer]
    for name, count in mirrored.items():  # muon: one moment of matrices, two of the others
        assert count == moments or (moments is None and count in (1, 2)), name


@pytest.mark.parametrize(("net", "optimizer"), CASES)
def test_a_device_holds_a_quarter(net, optimizer):
    """All large arrays are split; what is whole is below 1 % of the state."""
    state, where = placed(net, optimizer)
    held = total = 0
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        parts = int(np.prod(place.shard_shape(leaf.shape)))
        held, total = held + parts, total + leaf.size
        if leaf.size >= 2**20:
            assert parts * 4 == leaf.size
    assert held < 0.26 * total


def test_a_teacher_of_another_shape_is_split_by_its_largest_dimension():
    _, fields = NETS["dit"]
    build = lambda rngs: models.DiT(**fields, rngs=rngs)
    state = {"frozen": {"conv": jax.ShapeDtypeStruct((3, 3, 128, 256), "float32")}}
    where = of_state(state, models.axes(build), FSDP)
    assert where["frozen"]["conv"].spec == P(None, None, None, "fsdp")


def names_of(jaxpr):
    return [equation.primitive.name for equation in jaxpr.eqns]


def test_a_weight_is_fetched_where_it_is_split_and_only_there():
    assert SMALL <= 64 * 64
    large, small = jnp.ones((64, 64)), jnp.ones((8, 8))

    def done(laid, w):
        with within(laid):
            return names_of(jax.make_jaxpr(lambda w: fetch(w, ("embed", None)))(w))

    assert done(FSDP, large) == [NAME]
    assert done(FSDP, small) == []
    assert done(layout(parallel.make({"data": 4})), large) == []
    assert done(None, large) == []


def test_a_fetch_changes_no_number_under_any_transformation():
    w = jnp.arange(64 * 64.0).reshape(64, 64) / 999
    batch = jnp.stack([w, -w])

    def f(w):
        return jnp.sin(fetch(w, ("embed", None))).sum()

    def all_of(f):
        once = (f(w), jax.grad(f)(w), jax.jvp(f, (w,), (w,))[1])
        return *once, jax.vmap(jax.grad(f))(batch), jax.grad(lambda w: jax.jvp(f, (w,), (w,))[1])(w)

    plain = jax.jit(lambda: all_of(f))()
    with within(FSDP):
        laid_out = jax.jit(lambda: all_of(f))()
    for a, b in zip(plain, laid_out, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_a_cast_goes_before_the_fetch():
    """Half the bytes are sent for bfloat16."""
    layer = Linear(64, 64, init=models.initializers.ones, dtype=jnp.bfloat16,
                   axes=("embed", None), rngs=models.initializers.Unseeded())  # fmt: skip
    with within(FSDP):
        jaxpr = jax.make_jaxpr(lambda w: layer.kernel.fetched(lambda _: w.astype(jnp.bfloat16)))(
            jnp.ones((64, 64))
        )
    assert names_of(jaxpr)[-1] == NAME and jaxpr.out_avals[0].dtype == jnp.bfloat16
    assert TRANSFORMER["embed"] == ("fsdp",)
