"""Qwen-Image against diffusers' QwenImageTransformer2DModel, on one set of weights."""

import jax
import numpy as np
import pytest
from checkpoints import assert_round_trip, distance, images, randomise
from peers import peer

from jdiff import models
from jdiff.errors import UserError
from jdiff.interop import loading
from jdiff.interop.families import qwen_image
from jdiff.models import QwenImage

torch = peer("torch")
diffusers = peer("diffusers")
torch.set_num_threads(1)

CONFIG = {
    "in_channels": 12,
    "out_channels": 3,
    "num_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "axes_dims_rope": (2, 4, 6),
}
HEIGHT, WIDTH = 6, 10  # 3 x 5 patches: odd sides, of which the middle is no token's border
X, T = images(3, HEIGHT, WIDTH, 3), np.asarray([1.0, 0.37, 0.001], np.float32)
TEXT = images(3, 5, 10, seed=1)
MASK = np.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 0]], bool)
CONDS = {"text": {"text": TEXT}, "padded text": {"text": TEXT, "text_mask": MASK}}


def network(**changes):
    return randomise(diffusers.QwenImageTransformer2DModel(**CONFIG | changes))


def call(theirs, text_mask=None):
    """Their output on patches (channel, row, column), as their pipeline cuts and joins them."""
    rows, columns = HEIGHT // 2, WIDTH // 2
    tokens = X.reshape(3, rows, 2, columns, 2, 3).transpose(0, 1, 3, 5, 2, 4).reshape(3, -1, 12)
    mask = None if text_mask is None else torch.tensor(text_mask)
    shapes = [[(1, rows, columns)]] * 3
    with torch.no_grad():
        y = theirs(torch.tensor(tokens), torch.tensor(TEXT), mask, torch.tensor(T), shapes).sample
    y = y.numpy().reshape(3, rows, columns, -1, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return y.reshape(3, HEIGHT, WIDTH, -1)


@pytest.mark.parametrize("scan", [False, True])
def test_outputs_are_theirs(tmp_path, scan):
    theirs = network()
    theirs.save_pretrained(tmp_path)
    ours = loading.load_component(tmp_path, scan=scan)
    assert ours.model is QwenImage
    apply = jax.jit(ours.apply)
    outputs = {}
    for name, cond in CONDS.items():
        outputs[name] = call(theirs, cond.get("text_mask"))
        assert distance(apply(ours.params, X, T, cond), outputs[name]) < 1e-4, name
    moved = np.abs(outputs["text"] - outputs["padded text"]).max(axis=(1, 2, 3))
    assert moved[0] < 1e-5  # nothing of the first text is masked
    assert moved[1:].min() > 1e-2


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_saved_is_what_was_read_and_opens_there(tmp_path, scan):
    theirs = network()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = loading.load_component(tmp_path / "theirs", scan=scan)
    assert_round_trip(ours, theirs, tmp_path / "theirs", tmp_path, scan=scan)


def test_presets_have_as_many_parameters_as_theirs_of_their_config():
    config = qwen_image.FAMILY.config(models.qwen_image())
    model, fields = qwen_image.FAMILY.build(config)
    _, shapes = models.abstract(lambda rngs: model(**fields, rngs=rngs))
    with torch.device("meta"):
        theirs = diffusers.QwenImageTransformer2DModel(**config)
        default = diffusers.QwenImageTransformer2DModel()
    counts = [sum(w.numel() for w in one.parameters()) for one in (theirs, default)]
    assert counts == [models.count(shapes)] * 2


@pytest.mark.parametrize("changes", [{}, {"out_channels": None}], ids=str)
def test_fields_make_a_config_that_makes_them_again(changes):
    theirs = network(**changes)
    model, fields = qwen_image.FAMILY.build(dict(theirs.config))
    assert model is QwenImage
    config = qwen_image.FAMILY.config(fields)
    assert qwen_image.FAMILY.build(config) == (model, fields)
    assert qwen_image.FAMILY.build({"pooled_projection_dim": 768} | config) == (model, fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_cond_t": True}, "zero_cond_t=True is not served, only False"),
        ({"use_layer3d_rope": True}, "use_layer3d_rope=True is not served"),
        ({"patch_size": 1}, "patch_size=1 and in_channels=64 are not served"),
        ({"num_layer": 3}, "key of the config 'num_layer' is not known. Did you mean 'num_layers'"),
    ],
)
def test_configs_that_are_not_served(config, message):
    with pytest.raises(UserError, match=message):
        qwen_image.FAMILY.build(config)


def test_fields_that_cannot_be_written():
    with pytest.raises(UserError, match=r"no scalars=\('t-s',\): only \(\) can be written"):
        qwen_image.FAMILY.config({"scalars": ["t-s"]})
