"""MM-DiT against diffusers' SD3Transformer2DModel, on one set of weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import (
    assert_gradients,
    assert_round_trip,
    channels_first,
    channels_last,
    distance,
    images,
    randomise,
)
from peers import peer

from jdiff import models
from jdiff.errors import UserError
from jdiff.interop import loading
from jdiff.interop.families import sd3

torch = peer("torch")
diffusers = peer("diffusers")
torch.set_num_threads(1)

COMMON = {
    "sample_size": 12,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 7,
}
CONFIGS = {
    "sd3": {"num_layers": 2},
    "sd35": {"num_layers": 4, "qk_norm": "rms_norm", "dual_attention_layers": (0,)},
}
FIELDS = {"sd3": {}, "sd35": {"scan": True}}  # what we choose beside the config
X, T = images(2, 8, 4, 4), np.asarray([3.0, 700.5], np.float32)
COND = {"text": images(2, 5, 12, seed=1), "pooled": images(2, 10, seed=2)}
SPREAD = images(2, 8, 4, 4, seed=5)  # weighs the outputs in a loss


def network(name):
    theirs = randomise(diffusers.SD3Transformer2DModel(**COMMON, **CONFIGS[name]))
    table = theirs.pos_embed.pos_embed  # read from the file, so it may be any
    return theirs, table.add_(torch.tensor(images(*table.shape, seed=3)))


def call(theirs):
    text, pooled = (torch.tensor(COND[name]) for name in ("text", "pooled"))
    return theirs(channels_first(X), text, pooled, torch.tensor(T)).sample


@functools.cache
def saved(name, folder):
    theirs, _ = network(name)
    theirs.save_pretrained(folder / name)
    return theirs, folder / name


@pytest.fixture(params=CONFIGS)
def pair(request, tmp_path_factory):
    """`(name, their network, our component read from its folder, the folder)`."""
    theirs, folder = saved(request.param, tmp_path_factory.getbasetemp())
    ours = loading.load_component(folder, **FIELDS[request.param])
    return request.param, theirs, ours, folder


def test_outputs_and_gradients_are_theirs(pair):
    name, theirs, ours, _ = pair
    output = call(theirs)

    def loss(params):
        y = ours.apply(params, X, T, COND)
        return jnp.vdot(SPREAD, y), y

    if name == "sd35":  # one of the kind: it takes long to compile
        (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(ours.params)
        (channels_first(SPREAD) * output).sum().backward()
        grads.pop("table")  # a buffer of theirs
        unread = r"\.3\.attn\.(add_q_proj|norm_added_q)"  # the last text's queries
        assert_gradients(ours, grads, theirs, 1e-4, zero=unread)
    else:
        y = jax.jit(loss)(ours.params)[1]
    assert distance(y, channels_last(output)) < 1e-4


def test_what_is_saved_is_what_was_read_and_opens_there(pair, tmp_path):
    name, theirs, ours, folder = pair
    assert_round_trip(ours, theirs, folder, tmp_path, **FIELDS[name])


def test_scanned_blocks_are_read_as_the_others(pair):
    name, _, ours, folder = pair
    if name == "sd35":
        looped = loading.load_component(folder)
        stacked = models.stack_blocks(looped.params, ("dual_blocks", "blocks"))
        assert jax.tree.all(jax.tree.map(np.array_equal, stacked, ours.params))


def test_a_network_that_computes_its_table_computes_theirs(tmp_path):
    """Nothing of the table is saved; diffusers fills it in, and so do we on reading."""
    fields = sd3.fields_from_config(COMMON | CONFIGS["sd3"])[1] | {"stored_positions": False}
    apply, params = models.init(lambda r: models.MMDiT(**fields, rngs=r), jax.random.key(0))
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda w: w + 0.1 * random.standard_normal(w.shape, np.float32), params)
    loading.save_component(loading.component(sd3.CLS, params, **fields), tmp_path)
    back = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path)
    assert distance(jax.jit(apply)(params, X, T, COND), channels_last(call(back))) < 1e-4
    assert loading.load_component(tmp_path).fields["stored_positions"] is False


PRESETS = {
    models.sd3_medium: {"num_layers": 24, "width": 1536, "pos_embed_max_size": 192},
    models.sd35_medium: {
        "num_layers": 24,
        "width": 1536,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "dual_attention_layers": range(13),
    },
    models.sd35_large: {
        "num_layers": 38,
        "width": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda f: f.__name__)
def test_presets_are_the_published_configs(preset):
    config = dict(PRESETS[preset])
    width = config.pop("width")
    config |= {"num_attention_heads": width // 64, "caption_projection_dim": width}
    fields = sd3.FAMILY.build(config)[1] | {"stored_positions": False}
    given = sd3.fields_from_config(sd3.config_from_fields(preset()))[1]
    assert fields == given
    _, shapes = models.abstract(lambda rngs: models.MMDiT(**preset(), rngs=rngs))
    with torch.device("meta"):
        theirs = diffusers.SD3Transformer2DModel(**config)
    assert models.count(shapes) == sum(w.numel() for w in theirs.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_make_a_config_that_makes_them_again(name):
    config = dict(diffusers.SD3Transformer2DModel(**(COMMON | CONFIGS[name])).config)
    model, fields = sd3.FAMILY.build(config)
    assert model is models.MMDiT
    assert sd3.FAMILY.build(sd3.FAMILY.config(fields)) == (model, fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dual_attention_layers": (1,)}, r"dual_attention_layers=\(1,\) is not served"),
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm' is not served, only None and 'rms_norm'"),
        ({"caption_projection_dim": 8}, "caption_projection_dim=8 is not served.* = 16"),
        ({"qk_nrm": None}, "'qk_nrm'.*qk_norm"),
    ],
)
def test_configs_that_are_not_served_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        sd3.FAMILY.build(COMMON | CONFIGS["sd35"] | config)


def test_fields_that_cannot_be_written_are_refused():
    with pytest.raises(UserError, match="no time_scale=1000"):
        sd3.FAMILY.config(models.sd3_medium(time_scale=1000.0))
