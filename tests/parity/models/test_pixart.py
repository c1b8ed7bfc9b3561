"""PixArt against diffusers' PixArtTransformer2DModel, on one set of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import (
    assert_gradients,
    assert_same_files,
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
from jdiff.interop.families import pixart

torch = peer("torch")
diffusers = peer("diffusers")
safetensors = peer("safetensors.torch")
torch.set_num_threads(1)

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "caption_channels": 10,
    "sample_size": 8,
    "patch_size": 2,
}
CONFIGS = {
    "sigma": {"interpolation_scale": 2.0},
    "alpha": {"use_additional_conditions": True, "patch_size": 4, "out_channels": None},
}
T = np.asarray([3.0, 0.0, 981.0], np.float32)
TEXT = images(3, 5, 10, seed=1)
MASK = np.arange(5) < np.asarray([[5], [2], [1]])
COND = {"text": TEXT, "text_mask": MASK}
SHAPE = {
    "resolution": np.asarray([[512, 768], [1024, 1024], [640, 320]], np.float32),
    "aspect_ratio": np.asarray([0.6667, 1.0, 2.0], np.float32),
}


def network(folder, changes):
    theirs = randomise(diffusers.PixArtTransformer2DModel(**(CONFIG | changes)))
    theirs.save_pretrained(folder)
    return theirs


def run(theirs, x, mask=MASK):
    added = {"resolution": None, "aspect_ratio": None}
    if theirs.use_additional_conditions:
        added = {name: torch.tensor(value) for name, value in SHAPE.items()}
        added["aspect_ratio"] = added["aspect_ratio"][:, None]
    return theirs(
        channels_first(x),
        torch.tensor(TEXT),
        torch.tensor(T),
        added_cond_kwargs=added,
        encoder_attention_mask=None if mask is None else torch.tensor(mask, dtype=torch.float32),
    ).sample


@pytest.mark.parametrize("name", CONFIGS)
def test_output_on_another_shape_than_trained(tmp_path, name):
    """Twice as wide as the training images: the positions are squeezed along the columns alone."""
    theirs = network(tmp_path, CONFIGS[name])
    if name == "alpha":  # its first files have a tensor that is not read
        (file,) = tmp_path.glob("*.safetensors")
        unread = {"caption_projection.y_embedding": torch.zeros(7, 10)}
        safetensors.save_file(safetensors.load_file(file) | unread, file)
    ours = loading.load_component(tmp_path, scan=name == "alpha")
    cond = COND | (SHAPE if name == "alpha" else {})
    x = images(3, 8, 16, 3)
    with torch.no_grad():
        expected = channels_last(run(theirs, x))
    assert distance(jax.jit(ours.apply)(ours.params, x, T, cond), expected) < 1e-4


def test_gradient_of_a_loss_without_a_mask(tmp_path):
    theirs = network(tmp_path, CONFIGS["sigma"])
    ours = loading.load_component(tmp_path)
    x = images(3, 8, 8, 3)
    run(theirs, x, None).square().mean().backward()
    loss = lambda params: jnp.square(ours.apply(params, x, jnp.asarray(T), {"text": TEXT})).mean()
    grads = jax.jit(jax.grad(loss))(ours.params)
    assert_gradients(ours, grads, theirs, 1e-4, zero=r"to_k\.bias")


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_weights_are_the_loaded_ones_and_diffusers_reads_them(tmp_path, name):
    theirs = network(tmp_path / "one", CONFIGS[name])
    ours = loading.load_component(tmp_path / "one", scan=name == "sigma")
    made = loading.component("PixArtTransformer2DModel", ours.params, **ours.fields)
    for folder, component in (("two", ours), ("three", made)):
        loading.save_component(component, tmp_path / folder)
        assert_same_files(tmp_path / "one", tmp_path / folder)
        again = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / folder)
        for key, weight in theirs.state_dict().items():
            assert torch.equal(again.state_dict()[key], weight), key


def test_the_older_class_is_the_same_network():
    """The fields of the published alpha's config, whose class has other defaults."""
    published = {
        "norm_type": "ada_norm_single",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "sample_size": 128,
        "patch_size": 2,
    }
    model, fields = pixart.old_fields(published)
    assert model is models.PixArt
    defaults = {"heads": 16, "in_channels": 4, "patch": 2, "width": 1152, "depth": 28}
    assert fields == defaults | {"text_width": 4096} | models.pixart_alpha(1024)
    assert pixart.old_fields(pixart.old_config(fields))[1] == fields
    dit = published | {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 5, "sample_size": 32}
    assert pixart.old_fields(dit)[0] is models.UntiedDiT
    assert pixart.old_fields(pixart.old_config(pixart.old_fields(dit)[1]))[0] is models.UntiedDiT
    with pytest.raises(UserError, match="norm_type='layer_norm' is not served, only DiT's"):
        pixart.old_fields(published | {"norm_type": "layer_norm"})
    with pytest.raises(UserError, match="interpolation_scale=2 is not served"):
        pixart.old_fields(dit | {"sample_size": 128})


@pytest.mark.parametrize(("micro", "fields"), [(True, "alpha"), (False, "sigma")])
def test_the_published_networks_have_diffusers_count(micro, fields):
    make = {"alpha": models.pixart_alpha, "sigma": models.pixart_sigma}[fields]
    _, shapes = models.abstract(lambda rngs: models.PixArt(**make(1024), rngs=rngs))
    with torch.device("meta"):
        theirs = diffusers.PixArtTransformer2DModel(
            caption_channels=4096, use_additional_conditions=micro
        )
    assert models.count(shapes) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"caption_channels": None}, "caption_channels=None is not served"),
        ({"cross_attention_dim": 8}, "cross_attention_dim=8 is not served, only the width .* 24"),
        ({"norm_eps": 1e-5}, "norm_eps=1e-05 is not served, only 1e-06"),
    ],
)
def test_options_that_we_have_not_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        pixart.fields_from_config(CONFIG | config)
    with pytest.raises(UserError, match=r"has no time_scale=2.0: only 1.0 can be written"):
        pixart.config_from_fields({"time_scale": 2.0})
