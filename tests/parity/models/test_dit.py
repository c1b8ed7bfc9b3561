"""DiT against diffusers' DiTTransformer2DModel and the original layout, on one set of weights."""

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
from jdiff.interop.families import dit

torch = peer("torch")
diffusers = peer("diffusers")
torch.set_num_threads(1)

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
    "norm_eps": 1e-2,  # large enough to be seen
}
T = np.asarray([3.0, 0.0, 981.0], np.float32)
LABEL = np.asarray([1, 5, 0])


def network(folder, size=8, **changes):
    """(diffusers' network, our component read from its files)."""
    theirs = randomise(diffusers.DiTTransformer2DModel(**(CONFIG | changes)))
    theirs.save_pretrained(folder)
    return theirs, images(3, size, size, 3)


def run(theirs, x):
    out = theirs(channels_first(x), torch.tensor(T), class_labels=torch.tensor(LABEL))
    return out.sample


def test_output_and_gradient_of_a_loss(tmp_path):
    theirs, x = network(tmp_path)
    ours = loading.load_component(tmp_path)
    expected = run(theirs, x)
    expected.square().mean().backward()

    def loss(params):
        out = ours.apply(params, x, jnp.asarray(T), {"label": jnp.asarray(LABEL)})
        return jnp.square(out).mean(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(ours.params)
    assert distance(out, channels_last(expected)) < 1e-4
    assert_gradients(ours, grads, theirs, 1e-4, zero=r"to_k\.bias")


@pytest.mark.parametrize("changes", [{"patch_size": 4, "out_channels": None}], ids=str)
def test_scanned_at_another_size_than_trained(tmp_path, changes):
    """The positions of 16 pixels are squeezed into the grid of 8, as diffusers does."""
    theirs, x = network(tmp_path, size=16, **changes)
    ours = loading.load_component(tmp_path, scan=True)
    out = jax.jit(ours.apply)(ours.params, x, T, {"label": LABEL})
    with torch.no_grad():
        assert distance(out, channels_last(run(theirs, x))) < 1e-4


@pytest.mark.parametrize("scan", [False, True])
def test_saved_weights_are_the_loaded_ones_and_diffusers_reads_them(tmp_path, scan):
    theirs, _ = network(tmp_path / "one")
    ours = loading.load_component(tmp_path / "one", scan=scan)
    made = loading.component("DiTTransformer2DModel", ours.params, **ours.fields)
    for name, component in (("two", ours), ("three", made)):
        loading.save_component(component, tmp_path / name)
        assert_same_files(tmp_path / "one", tmp_path / name)
        again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / name)
        for key, weight in theirs.state_dict().items():
            assert torch.equal(again.state_dict()[key], weight), key
    back = loading.load_component(tmp_path / "three")
    assert back.fields == {k: v for k, v in ours.fields.items() if k != "scan"}


def test_the_older_class_is_the_same_network(tmp_path):
    changes = {"norm_type": "ada_norm_zero", "attention_bias": True}
    changes |= {"norm_elementwise_affine": False, "activation_fn": "gelu-approximate"}
    theirs = randomise(diffusers.Transformer2DModel(**CONFIG, **changes))
    # diffusers 0.42 makes another class of it, whose files have that class's name.
    network = diffusers.DiTTransformer2DModel(**CONFIG).eval()
    network.load_state_dict(theirs.state_dict())
    network.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    older = config.replace('"DiTTransformer2DModel"', '"Transformer2DModel"')
    (tmp_path / "config.json").write_text(older)
    ours = loading.load_component(tmp_path)
    x = images(3, 8, 8, 3)
    with torch.no_grad():
        expected = channels_last(run(network, x))
    assert distance(jax.jit(ours.apply)(ours.params, x, T, {"label": LABEL}), expected) < 1e-4


def test_the_original_layout(tmp_path):
    """The names of the published files, on diffusers' weights where the two networks agree.

    At t = 0 the waves do not depend on the frequencies, in which they differ; the embeddings of all
    blocks are made equal and the perceptron's epsilon is the original's.
    """
    theirs = randomise(diffusers.DiTTransformer2DModel(**(CONFIG | {"norm_eps": 1e-6})))
    shared = theirs.transformer_blocks[0].norm1.emb.state_dict()
    theirs.transformer_blocks[1].norm1.emb.load_state_dict(shared)
    w = theirs.state_dict()
    tensors = {"pos_embed": theirs.pos_embed.pos_embed}
    names = {
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.linear": "proj_out_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
    }
    embedder = "transformer_blocks.0.norm1.emb"
    for n in (0, 1):
        names[f"t_embedder.mlp.{2 * n}"] = f"{embedder}.timestep_embedder.linear_{n + 1}"
    for i in (0, 1):
        block = f"transformer_blocks.{i}"
        names |= {
            f"blocks.{i}.attn.proj": f"{block}.attn1.to_out.0",
            f"blocks.{i}.mlp.fc1": f"{block}.ff.net.0.proj",
            f"blocks.{i}.mlp.fc2": f"{block}.ff.net.2",
            f"blocks.{i}.adaLN_modulation.1": f"{block}.norm1.linear",
        }
        for leaf in ("weight", "bias"):
            parts = [w[f"{block}.attn1.to_{part}.{leaf}"] for part in "qkv"]
            tensors[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat(parts)
    for name, their_name in names.items():
        tensors |= {f"{name}.{leaf}": w[f"{their_name}.{leaf}"] for leaf in ("weight", "bias")}
    table = w[f"{embedder}.class_embedder.embedding_table.weight"]
    tensors["y_embedder.embedding_table.weight"] = table
    file = tmp_path / "dit.safetensors"
    peer("safetensors.torch").save_file({k: v.contiguous() for k, v in tensors.items()}, file)

    fields = {"in_channels": 3, "out_channels": 6, "width": 16, "depth": 2, "heads": 2}
    ours = loading.load_file(file, "DiT", fields | {"num_classes": 5})
    assert ours.model is models.DiT
    x, start = images(3, 8, 8, 3), np.zeros(3, np.float32)
    with torch.no_grad():
        labels = torch.tensor(LABEL)
        expected = theirs(channels_first(x), torch.tensor(start), class_labels=labels).sample
    out = jax.jit(ours.apply)(ours.params, x, start, {"label": LABEL})
    assert distance(out, channels_last(expected)) < 1e-4
    loading.save_component(ours, tmp_path / "saved")
    again = loading.load_component(tmp_path / "saved")
    assert jax.tree.all(jax.tree.map(np.array_equal, ours.params, again.params))


def test_configs_and_fields_are_each_other():
    _, fields = dit.fields_from_config(CONFIG)
    assert dit.fields_from_config(dit.config_from_fields(fields))[1] == fields
    assert dit.original_fields({"name": "XL/2"})[1] == models.dit_imagenet("XL/2")
    _, shapes = models.abstract(lambda rngs: models.UntiedDiT(**dit_xl(), rngs=rngs))
    with torch.device("meta"):
        theirs = diffusers.DiTTransformer2DModel(out_channels=8)
    assert models.count(shapes) == sum(p.numel() for p in theirs.parameters())


def dit_xl():
    return dit.fields_from_config({"out_channels": 8})[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm_type": "ada_norm"}, "norm_type='ada_norm' is not served, only 'ada_norm_zero'"),
        ({"attention_bias": False}, "attention_bias=False is not served, only True"),
    ],
)
def test_options_that_we_have_not_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        dit.fields_from_config(config)
    with pytest.raises(UserError, match="give image_size"):
        dit.config_from_fields({"num_classes": 3})
    with pytest.raises(UserError, match="field 'widht' is not known. Did you mean 'width'"):
        dit.original_fields({"widht": 3})
