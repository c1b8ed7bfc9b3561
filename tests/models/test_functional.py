"""split, init, abstract, count: modules as plain pytrees."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jdiff import models
from jdiff.models import initializers, layers

KEY = jax.random.key(0)
X, T = jnp.ones((2, 8, 8, 3)), jnp.asarray([0.1, 0.9])


def small_dit(rngs, **changes):
    fields = {"width": 16, "depth": 2, "heads": 2, "patch": 4} | changes
    return models.DiT(**fields, rngs=rngs)


def small_unet(rngs, **changes):
    fields = {"image_size": 8, "channels": 8, "multipliers": (1, 2), "blocks": 1}
    return models.UNet(**(fields | {"attention_sizes": (4,)} | changes), rngs=rngs)


BUILDS = [small_dit, small_unet, functools.partial(small_dit, scan=True)]


@pytest.mark.parametrize("build", BUILDS)
def test_split_undoes_merge(build, randomise):
    apply, params = models.init(build, KEY)
    params = randomise(params)
    again, same = models.split(apply.merge(params))
    assert again == apply
    assert jax.tree.all(jax.tree.map(np.array_equal, params, same))


def test_split_keeps_the_function(randomise):
    apply, params = models.init(small_dit, KEY)
    model = apply.merge(randomise(params))
    apply, params = models.split(model)
    expected = nnx.jit(lambda model: model(X, T, {}))(model)
    np.testing.assert_allclose(jax.jit(apply)(params, X, T, {}), expected, rtol=1e-6)


@pytest.mark.parametrize("build", BUILDS)
def test_params_are_dicts_with_string_keys(build):
    def check(tree):
        assert type(tree) is dict
        for key, value in tree.items():
            assert type(key) is str
            if isinstance(value, dict):
                check(value)
            else:
                assert isinstance(value, jax.Array)
                assert value.dtype == jnp.float32

    check(models.init(build, KEY)[1])


@pytest.mark.parametrize("build", BUILDS)
def test_abstract_tells_the_shapes_of_init(build):
    apply, shapes = models.abstract(build)
    apply2, params = models.init(build, KEY)
    assert apply == apply2
    assert hash(apply) == hash(apply2)
    wanted = jax.tree.map(lambda s: (s.shape, s.dtype), shapes)
    assert wanted == jax.tree.map(lambda a: (a.shape, a.dtype), params)
    assert (
        models.count(shapes) == models.count(params) == sum(a.size for a in jax.tree.leaves(params))
    )


def test_the_constructor_makes_the_same_network_as_init():
    apply, params = models.split(small_dit(nnx.Rngs(7)))
    assert apply == models.abstract(small_dit)[0]
    drawn = models.init(small_dit, KEY)[1]
    for own, other in zip(jax.tree.leaves(params), jax.tree.leaves(drawn), strict=True):
        assert float(own.std()) == pytest.approx(float(other.std()), rel=0.2, abs=1e-6)


def test_other_structure_is_unequal():
    apply = models.abstract(small_dit)[0]
    for changes in ({"depth": 3}, {"heads": 4}, {"time_scale": 2.0}, {"dtype": jnp.bfloat16}):
        assert apply != models.abstract(functools.partial(small_dit, **changes))[0]
    unet = models.abstract(small_unet)[0]
    assert unet != models.abstract(functools.partial(small_unet, dropout=0.1))[0]


def test_jit_compiles_equal_networks_once():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(apply, params, x, t):
        traces.append(1)
        return apply(params, x, t, {})

    for seed in range(2):
        run(*models.split(small_dit(nnx.Rngs(seed))), X, T)
    run(*models.init(small_dit, KEY), X, T)
    assert len(traces) == 1


def test_apply_as_static_field_of_a_pytree():
    apply, params = models.init(small_dit, KEY)
    again, _ = models.init(small_dit, KEY)
    bound = jax.tree_util.Partial(apply, params)
    assert jax.tree.structure(bound) == jax.tree.structure(jax.tree_util.Partial(again, params))


def test_a_method_is_a_pure_function_of_the_weights():
    class Pair(models.module.Module):
        def __init__(self, rngs):
            self.first = layers.Linear(3, 2, init=initializers.normal(1.0), rngs=rngs)

        def encode(self, x, *, twice=False):
            return self.first(x) * (2 if twice else 1)

    apply, params = models.init(lambda rngs: Pair(rngs), KEY)
    encode = jax.jit(apply.method("encode"), static_argnames="twice")
    expected = X[0, 0] @ params["first"]["kernel"] + params["first"]["bias"]
    np.testing.assert_allclose(encode(params, X[0, 0], twice=True), 2 * expected, rtol=1e-6)
    assert apply.method("encode") == models.abstract(lambda rngs: Pair(rngs))[0].method("encode")
    assert apply.method("encode") != apply.method("decode")


def test_params_that_do_not_fit_are_named():
    apply, params = models.init(small_dit, KEY)
    params = {name: value for name, value in params.items() if name != "time1"} | {"extra": T}
    with pytest.raises(ValueError, match="missing time1/bias, time1/kernel, not part of it extra"):
        apply(params, X, T, {})


def test_state_besides_parameters_is_refused():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 2, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    with pytest.raises(ValueError, match="Noisy holds state besides its parameters: dropout/rngs"):
        models.split(Noisy(nnx.Rngs(0)))


def test_init_of_a_foreign_module_runs_its_constructor():
    class Foreign(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 64, rngs=rngs)

        def __call__(self, x, t, cond, *, key=None):
            return self.linear(x)

    apply, params = models.init(Foreign, KEY)
    assert float(params["linear"]["kernel"].std()) == pytest.approx(math.sqrt(1 / 3), rel=0.25)
    assert apply(params, X, T).shape == (2, 8, 8, 64)
    assert not jnp.array_equal(
        params["linear"]["kernel"], models.init(Foreign, jax.random.key(1))[1]["linear"]["kernel"]
    )


RULES = {
    "normal": (initializers.normal(0.02), 0.02),
    "xavier": (initializers.xavier_uniform(300, 500, 0.5), 0.5 * math.sqrt(2 / 800)),
    "kaiming": (initializers.kaiming_uniform(300), math.sqrt(1 / 300)),
    "torch": (initializers.kaiming_uniform(300, math.sqrt(1 / 3)), math.sqrt(1 / 900)),
    "ones": (initializers.ones, 0.0),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(300, 500), (1200, 1000)])  # pooled, and on its own
def test_rules_have_their_published_spread(name, shape):
    rule, std = RULES[name]
    assert rule.std == pytest.approx(std)
    for seed in range(2):
        _, array = initializers.draw(jax.random.key(seed), [((7,), rule), (shape, rule)])
        assert array.shape == shape
        assert float(array.std()) == pytest.approx(std, rel=0.01)
        assert float(array.mean()) == pytest.approx(float(name == "ones"), abs=0.01 * std + 1e-6)
        if rule.distribution == "uniform":
            assert float(jnp.abs(array).max()) <= std * math.sqrt(3) * (1 + 1e-6)
    own = initializers.param(nnx.Rngs(0), shape, rule)
    assert float(own[...].std()) == pytest.approx(std, rel=0.01)


def test_equal_shapes_get_different_numbers():
    leaves = [((64, 64), initializers.normal(1.0))] * 2 + [
        ((1100, 1000), initializers.normal(1.0))
    ] * 2
    small1, small2, big1, big2 = initializers.draw(KEY, leaves)
    assert abs(float(jnp.corrcoef(small1.ravel(), small2.ravel())[0, 1])) < 0.06
    assert abs(float(jnp.corrcoef(big1.ravel(), big2.ravel())[0, 1])) < 0.01


def test_init_depends_on_the_key_alone():
    first, again = (models.init(small_dit, jax.random.key(3))[1] for _ in range(2))
    other = models.init(small_dit, jax.random.key(4))[1]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, first, again))
    assert not jnp.array_equal(first["time1"]["kernel"], other["time1"]["kernel"])


def test_init_under_jit_is_sharded_and_equal():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    build = functools.partial(small_dit, width=512, heads=8)  # leaves above the pool's limit
    _, shapes = models.abstract(build)
    assert max(leaf.size for leaf in jax.tree.leaves(shapes)) > initializers.POOLED

    def sharding(leaf):
        divisible = leaf.ndim == 2 and leaf.shape[0] % 4 == 0
        return NamedSharding(mesh, PartitionSpec("data") if divisible else PartitionSpec())

    draw = jax.jit(
        lambda key: models.init(build, key)[1], out_shardings=jax.tree.map(sharding, shapes)
    )
    sharded, plain = draw(KEY), models.init(build, KEY)[1]
    kernel = sharded["blocks"]["0"]["mlp1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (128, 2048)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), sharded, plain)
    )


def test_init_survives_donation():
    _, params = models.init(small_dit, KEY)
    expected = jax.tree.map(lambda a: np.asarray(a) + 1, params)
    moved = jax.jit(lambda p: jax.tree.map(lambda a: a + 1, p), donate_argnums=0)(params)
    jax.tree.map(np.testing.assert_array_equal, moved, expected)


def test_remat_helper_recomputes():
    linear = layers.Linear(4, 4, init=initializers.normal(1.0), rngs=nnx.Rngs(0))

    def loss(x, remat):
        return layers.run(linear, x, remat=remat).sum()

    x = jnp.ones((2, 4))
    assert "remat" in str(jax.make_jaxpr(jax.grad(functools.partial(loss, remat=True)))(x))
    assert "remat" not in str(jax.make_jaxpr(jax.grad(functools.partial(loss, remat=False)))(x))
