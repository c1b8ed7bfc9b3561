"""A component's folder becomes a network's weights, and the same folder again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from toy import FIELDS, TOY

from jdiff import interop, models
from jdiff.errors import UserError
from jdiff.interop import files, loading, tables
from jdiff.models import DiT


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(loading, "BY_CLASS", {TOY.cls: TOY})


@pytest.fixture(scope="module")
def drawn():
    _, params = models.init(lambda rngs: DiT(**FIELDS, rngs=rngs), jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return tree.unflatten([rng.normal(size=a.shape).astype(np.float32) for a in leaves])


@pytest.fixture
def folder(tmp_path, drawn):
    interop.save_component(interop.component(TOY.cls, drawn, **FIELDS), tmp_path / "net")
    return tmp_path / "net"


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_load_gives_what_was_saved_and_save_gives_the_same_files(folder, drawn, tmp_path):
    found = interop.load_component(folder)
    equal(found.params, drawn)
    interop.save_component(found, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_the_layout_is_theirs(folder, drawn):
    saved = files.component(folder)
    q = saved["b.1.q.weight"]
    kernel = drawn["blocks"]["1"]["qkv"]["kernel"]
    np.testing.assert_array_equal(q, kernel[:, 0].T)
    # Output o at patch pixel (row, column), channel c.
    conv, dense = saved["proj.weight"], drawn["embed_patches"]["kernel"]
    assert conv.shape == (16, 4, 2, 2)
    assert conv[5, 3, 1, 0] == dense[(1 * 2 + 0) * 4 + 3, 5]
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "ToyTransformer"


def test_a_scanned_network_reads_and_writes_the_same_files(folder, drawn, tmp_path):
    scanned = interop.load_component(folder, scan=True)
    equal(scanned.params, models.stack_blocks(drawn))
    interop.save_component(scanned, tmp_path / "again", shard_bytes=4000)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 3
    equal(interop.load_component(tmp_path / "again").params, drawn)


def test_weights_are_cast_when_asked_and_kept_as_they_are_otherwise(folder, drawn, tmp_path):
    half = interop.load_component(folder, dtype="bfloat16", compute="bfloat16")
    equal(half.params, jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), drawn))
    assert half.fields["dtype"] == "bfloat16"
    interop.save_component(half, tmp_path / "half", variant="bf16")
    equal(interop.load_component(tmp_path / "half").params, half.params)
    x, t = jnp.ones((1, 4, 4, 4)), jnp.ones(1)
    one = half.apply(half.params, x, t)
    full = interop.load_component(folder)
    np.testing.assert_allclose(one, full.apply(full.params, x, t), atol=0.1 * float(abs(one).max()))


def test_leaves_are_placed_by_their_logical_axes(folder, drawn):
    mesh = jax.make_mesh((4,), ("fsdp",))
    seen = []

    def place(path, shape, axes):
        seen.append((path, shape.shape, axes))
        spec = ["fsdp" if size % 4 == 0 and i == 0 else None for i, size in enumerate(shape.shape)]
        return NamedSharding(mesh, P(*spec))

    found = interop.load_component(folder, sharding=place)
    equal(found.params, drawn)
    kernel = found.params["blocks"]["0"]["mlp1"]["kernel"]
    assert kernel.sharding.spec == P("fsdp", None)
    assert all(len(axes) == len(shape) for _, shape, axes in seen)
    one = NamedSharding(mesh, P())
    assert interop.load_component(folder, sharding=one).params["out"]["bias"].sharding == one


def rewrite(folder, change):
    arrays = change(dict(files.component(folder)))
    shapes = {name: (a.shape, a.dtype) for name, a in arrays.items()}
    copies = {name: np.array(a) for name, a in arrays.items()}
    files.write(folder, shapes, copies.__getitem__)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda a: {k: v for k, v in a.items() if k != "b.2.k.bias"}, "missing: b.2.k.bias"),
        (lambda a: a | {"lora.up": a["ada.bias"]}, "not part of it: lora.up"),
        (lambda a: a | {"b.1.q.bias": np.zeros(3, np.float32)}, r"b.1.q.bias \[3\].*\[3, 16\]"),
        (lambda a: a | {"b.0.fc1.weight": a["b.0.fc1.weight"].T}, r"misshapen: b.0.fc1.weight"),
    ],
)
def test_tensors_missing_extra_and_misshapen_are_named(folder, change, named):
    rewrite(folder, change)
    with pytest.raises(UserError, match=named):
        interop.load_component(folder)


def test_buffers_that_we_compute_are_passed_over(folder):
    rewrite(folder, lambda a: a | {"b.0.rope": np.zeros(4, np.float32)})
    interop.load_component(folder)


def test_names_of_older_files_are_understood_and_written_again(folder, drawn, tmp_path):
    rewrite(folder, lambda a: {k.replace(".q.", ".query."): v for k, v in a.items()})
    found = interop.load_component(folder)
    equal(found.params, drawn)
    interop.save_component(found, tmp_path / "again")
    again, before = files.component(tmp_path / "again"), files.component(folder)
    assert "b.0.query.weight" in again
    equal(again, before)


def test_of_two_names_of_a_tensor_todays_is_read(folder, drawn):
    q = "b.0.q.weight"
    rewrite(folder, lambda a: {q.replace(".q.", ".query."): a[q] + 1} | a)
    with pytest.raises(UserError, match=r"not part of it: b\.0\.query\.weight"):
        interop.load_component(folder)


@pytest.mark.parametrize("named", [["ToyModel"], ["ToyForAll"], ["Unknown", "ToyModel"]])
def test_a_transformers_folder_names_its_class_among_architectures(
    folder, drawn, tmp_path, monkeypatch, named
):
    """What is written is its layout: the files are called model, and there is no _class_name."""
    family = dataclasses.replace(TOY, cls="ToyModel", also=("ToyForAll",), library="transformers")
    monkeypatch.setattr(loading, "BY_CLASS", dict.fromkeys(("ToyModel", "ToyForAll"), family))
    (folder / "config.json").write_text(json.dumps(FIELDS | {"architectures": named}))
    found = interop.load_component(folder)
    equal(found.params, drawn)
    interop.save_component(found, tmp_path / "again", variant="fp16", shard_bytes=4000)
    written = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert written[0] == "config.json" and written[-1] == "model.safetensors.index.fp16.json"
    assert written[1].startswith("model.fp16-00001-of-")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == FIELDS | {
        "architectures": ["ToyModel"]
    }
    equal(interop.load_component(tmp_path / "again").params, drawn)


def test_a_config_without_a_class_is_refused(folder):
    (folder / "config.json").write_text(json.dumps(FIELDS))
    with pytest.raises(UserError, match="neither _class_name nor architectures"):
        interop.load_component(folder)
    (folder / "config.json").write_text(json.dumps({"architectures": ["ToyTransfomer"]}))
    with pytest.raises(UserError, match="architectures .* Did you mean 'ToyTransformer'"):
        interop.load_component(folder)


def test_a_class_that_is_not_known_gets_the_nearest(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "ToyTransfomer"}))
    with pytest.raises(UserError, match="Did you mean 'ToyTransformer'"):
        interop.load_component(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        interop.load_component(folder)


def test_a_leaf_without_a_rule_is_named():
    _, shapes = models.abstract(lambda rngs: DiT(**FIELDS, num_classes=3, rngs=rngs))
    with pytest.raises(UserError, match="no rule of the table names label"):
        tables.plan(shapes, TOY, FIELDS)


def test_params_of_another_network_are_refused(drawn):
    with pytest.raises(UserError, match="not those of DiT"):
        interop.component(TOY.cls, drawn, **(FIELDS | {"depth": 2}))
