"""Z-Image against diffusers' ZImageTransformer2DModel, on one set of weights."""

import jax
import numpy as np
import pytest
from checkpoints import assert_round_trip, distance, images, randomise
from peers import peer

from jdiff import models
from jdiff.errors import UserError
from jdiff.interop import loading
from jdiff.interop.families import z_image
from jdiff.models import ZImage

torch = peer("torch")
diffusers = peer("diffusers")
torch.set_num_threads(1)

CONFIG = {
    "in_channels": 3,
    "dim": 24,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "norm_eps": 1e-3,  # large enough to be seen
    "cap_feat_dim": 10,
    "rope_theta": 100.0,
    "axes_dims": [4, 2, 6],
    "axes_lens": [80, 6, 8],
}
# Their frequencies are exponentials in float32, off by ulps that 1000 (1 - t) multiplies: at t = 1
# the outputs agree to 1e-6, at t = 0 to no more than 1e-4.
X, T = images(5, 6, 10, 3), np.asarray([1.0, 0.37, 0.5, 0.8, 0.6], np.float32)
TEXT = images(5, 40, 10, seed=1)
#: Texts whose filled length is that of the longest, is less, needs no filling; with gaps; empty.
MASK = np.arange(40) < np.asarray([40, 7, 32, 0, 0])[:, None]
MASK[3, [2, 3, 30, 39]] = True
CONDS = {"text": {"text": TEXT}, "padded text": {"text": TEXT, "text_mask": MASK}}


def network(**changes):
    theirs = randomise(diffusers.ZImageTransformer2DModel(**CONFIG | changes))
    with torch.no_grad():  # norms whose names do not say so
        theirs.cap_embedder[0].weight.add_(1.0)
    return theirs


def call(theirs, text_mask=None):
    """Their velocity, from what their pipeline hands over: 1 - t, each text by itself."""
    masks = np.ones(TEXT.shape[:2], bool) if text_mask is None else text_mask
    texts = [torch.tensor(text[mask]) for text, mask in zip(TEXT, masks)]
    latents = list(torch.tensor(np.moveaxis(X, -1, 1))[:, :, None])
    with torch.no_grad():
        y = theirs(latents, torch.tensor(1 - T), texts).sample
    return -np.moveaxis(torch.stack(y)[:, :, 0].numpy(), 1, -1)


@pytest.mark.parametrize("scan", [False, True])
def test_outputs_are_theirs(tmp_path, scan):
    theirs = network()
    theirs.save_pretrained(tmp_path)
    ours = loading.load_component(tmp_path, scan=scan)
    assert ours.model is ZImage
    apply = jax.jit(ours.apply)
    outputs = {}
    for name, cond in CONDS.items():
        outputs[name] = call(theirs, cond.get("text_mask"))
        assert distance(apply(ours.params, X, T, cond), outputs[name]) < 1e-4, name
    moved = np.abs(outputs["text"] - outputs["padded text"]).max(axis=(1, 2, 3))
    assert moved[0] < 1e-5  # nothing of the first text is masked
    assert moved[1:].min() > 1e-2


def test_outputs_are_theirs_without_refiners_and_query_norms(tmp_path):
    theirs = network(n_refiner_layers=0, qk_norm=False, t_scale=10.0)
    theirs.save_pretrained(tmp_path)
    ours = loading.load_component(tmp_path)
    y = jax.jit(ours.apply)(ours.params, X, T, CONDS["padded text"])
    assert distance(y, call(theirs, MASK)) < 1e-4


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_saved_is_what_was_read_and_opens_there(tmp_path, scan):
    theirs = network()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = loading.load_component(tmp_path / "theirs", scan=scan)
    assert_round_trip(ours, theirs, tmp_path / "theirs", tmp_path, scan=scan)


def test_presets_have_as_many_parameters_as_theirs_of_their_config():
    config = z_image.FAMILY.config(models.z_image())
    model, fields = z_image.FAMILY.build(config)
    _, shapes = models.abstract(lambda rngs: model(**fields, rngs=rngs))
    with torch.device("meta"):
        theirs = diffusers.ZImageTransformer2DModel(**config)
        default = diffusers.ZImageTransformer2DModel()
    counts = [sum(w.numel() for w in one.parameters()) for one in (theirs, default)]
    assert counts == [models.count(shapes)] * 2


def test_fields_make_a_config_that_makes_them_again():
    changes = {"qk_norm": False, "n_refiner_layers": 0, "t_scale": 10.0, "all_patch_size": (4,)}
    for theirs in (network(), network(**changes)):
        model, fields = z_image.FAMILY.build(dict(theirs.config))
        assert model is ZImage
        config = z_image.FAMILY.config(fields)
        assert z_image.FAMILY.build(config) == (model, fields)
        given = {name: dict(theirs.config)[name] for name in config}
        same = lambda c: {k: list(v) if isinstance(v, tuple) else v for k, v in c.items()}
        assert same(config) == same(given)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"siglip_feat_dim": 1152}, r"siglip_feat_dim=1152 \(Omni\) is not served"),
        ({"all_patch_size": [1, 2]}, r"all_patch_size=\[1, 2\] .* are not served"),
        ({"n_layer": 3}, "key of the config 'n_layer' is not known. Did you mean 'n_layers'"),
    ],
)
def test_configs_that_are_not_served(config, message):
    with pytest.raises(UserError, match=message):
        z_image.FAMILY.build(config)
