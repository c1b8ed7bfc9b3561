"""jdiff encode: what the folder holds, that it is taken up where it was cut off, and bad input."""

import contextlib
import dataclasses
import json
import types

import encoded_sets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import encoding, latents
from jdiff.data import encoded, pipeline, shards, sources
from jdiff.errors import UserError
from jdiff.parallel import hosts

BATCH, FILE = 4, 8  # 21 and 6 images: three files and one; the last batches are partial


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(encoding, "SHARD", FILE)
    monkeypatch.setattr(encoding, "open_reader", lambda *_: encoded_sets.Reader())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return encoded_sets.prepare(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    return encoded_sets.save_autoencoder(tmp_path_factory.mktemp("models") / "vae")


def wanted(root, coder, **changes):
    usual = {"data": "pics", "name": "pics_latents", "autoencoder": str(coder), "batch": BATCH,
             "data_dir": root}  # fmt: skip
    return encoding.Wanted(**usual | changes)


@pytest.fixture(scope="module")
def folder(root, coder):
    """Encoded with mirror images and texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "SHARD", FILE)
        patch.setattr(encoding, "open_reader", lambda *_: encoded_sets.Reader())
        return encoding.encode(wanted(root, coder, mirrored=True, text="words"))


def held(root, name="pics_latents", split="train", **options):
    source = sources.source(name, split, root, progress=lambda _: None, **options)
    return source, source.gather(range(len(source)))


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_the_folder_holds_the_encoders_moments_of_the_images_and_of_their_mirror_images(
    root, coder, folder
):
    images = {
        s: np.stack([row["image"] for row in encoded_sets.rows(s)]) for s in ("train", "test")
    }
    both = np.concatenate([*images.values()])
    pixels = jnp.asarray(np.concatenate([both, both[:, :, ::-1]]), jnp.float32) / 127.5 - 1
    expected = [*latents.open_autoencoder(coder).moments(pixels)]
    plain, mirrored = ([part[k : k + 27] for part in expected] for k in (0, 27))
    for split, rows in (("train", slice(0, 21)), ("test", slice(21, 27))):
        source, found = held(root, split=split, mirrored=True)
        for name, value in zip(encoded.LATENTS, [*plain, *mirrored]):
            np.testing.assert_allclose(found[name], value[rows], rtol=2e-5, atol=2e-6)
            assert found[name].dtype == np.float32
        assert source.info.shape == found["latent"].shape[1:] == (4, 4, 3)
        assert source.info.image_shape == encoded_sets.SHAPE and source.info.latent
    # Neither is the mirror image of the other's latents: a convolution is not symmetric.
    assert np.abs(found["latent"][:, :, ::-1] - found["latent_mirrored"]).max() > 0.1


def test_labels_texts_and_numbers_are_kept_in_order(root, folder):
    fields = ("caption", "weight", "text", "text_mask", "pooled")
    source, found = held(root, fields=fields)
    rows = encoded_sets.rows("train")
    assert found["label"].tolist() == [row["label"] for row in rows]
    assert list(found["caption"]) == [row["caption"] for row in rows]
    np.testing.assert_array_equal(found["weight"], [row["weight"] for row in rows])
    assert source.info.num_classes == 3 and source.info.label_names == ("a", "b", "c")
    told = encoded_sets.Reader().encode([row["caption"] for row in rows])
    for ours, theirs in (("text", "text"), ("text_mask", "mask"), ("pooled", "pooled")):
        np.testing.assert_allclose(found[ours], told[theirs], atol=1e-3)
    assert [f.dtype for f in source.info.fields] == ["float32", "float16", "bool", "float16"]
    empty = encoded.read_empty(folder)
    for ours, theirs in (("text", "text"), ("text_mask", "mask"), ("pooled", "pooled")):
        np.testing.assert_allclose(
            empty[ours], encoded_sets.Reader().encode([""])[theirs][0], atol=1e-3
        )


def test_what_the_folder_says_of_itself(root, coder, folder):
    about = encoded.read(folder)
    assert about == held(root)[0].info.encoded
    assert (about.source, about.autoencoder, about.factor) == ("pics", str(coder), 2)
    assert about.digest == latents.digest(latents.open_autoencoder(coder))
    # By way of run.json, as a run keeps it.
    described = json.loads(json.dumps(dataclasses.asdict(held(root)[0].info)))
    assert sources.Info.of(described) == held(root)[0].info


class Cut(Exception):
    """Stands for a kill."""


def until_killed(rows):
    """In the middle of a file."""
    yield next(rows)
    raise Cut


def test_cut_off_and_taken_up_the_folder_is_the_same_byte_for_byte(
    root, coder, folder, monkeypatch
):
    other = wanted(root, coder, name="again", mirrored=True, text="words")
    write, calls = shards.Shards.write, []

    def cut(self, shard, rows):
        calls.append(shard)
        write(self, shard, until_killed(rows) if len(calls) == 3 else rows)

    monkeypatch.setattr(shards.Shards, "write", cut)
    with pytest.raises(Cut):
        encoding.encode(other)
    work = shards.unfinished(root, "again")
    whole = sorted(p.name for p in work.glob("*array_record*"))
    assert len(whole) == 2 and not (root / "again").exists()
    times = {name: (work / name).stat().st_mtime_ns for name in whole}
    (work / ".again-train.array_record-00002-of-00003.77").write_bytes(b"of a killed process")
    with pytest.raises(UserError, match="size was None and is 4"):
        encoding.encode(dataclasses.replace(other, size=4, crop="center"))

    said = []
    again = encoding.encode(other, lambda text, *numbers: said.append((text, *numbers)))
    assert ("going on: 2 of 4 files are there",) in said
    assert [numbers[-2:] for numbers in said if len(numbers) == 3][-1] == (27, 27)
    assert len(calls) == 3 + 2  # what was there was not written again
    assert {name: (again / name).stat().st_mtime_ns for name in whole} == times
    assert not work.exists()
    renamed = {k.replace("pics_latents", "again"): v for k, v in files(folder).items()}
    found = files(again)
    assert found.keys() == renamed.keys()
    for name in found.keys() - {"dataset_info.json"}:
        assert found[name] == renamed[name], name
    assert found["dataset_info.json"] == renamed["dataset_info.json"].replace(
        b"pics_latents", b"again"
    )
    stamp = again.stat().st_mtime_ns
    assert encoding.encode(other) == again and again.stat().st_mtime_ns == stamp


def test_what_a_process_encodes_does_not_depend_on_how_far_the_others_are(
    root, coder, folder, monkeypatch
):
    """The second of two does all of its files before the first looks what there is to do."""
    other = wanted(root, coder, name="apart", mirrored=True, text="words")
    monkeypatch.setattr(encoding, "_wait_for_all", lambda line: None)
    monkeypatch.setattr(hosts, "first_before_others", lambda name: contextlib.nullcontext())
    for index in (1, 0):
        line = types.SimpleNamespace(index=index, count=2, first=index == 0)
        monkeypatch.setattr(hosts, "line", lambda line=line: line)
        made = encoding.encode(other)
    for name, held in files(folder).items():
        if "array_record" in name:
            assert (made / name.replace("pics_latents", "apart")).read_bytes() == held


def test_batches_take_the_mirror_images_latents(root, folder):
    source, found = held(root, mirrored=True)
    feed = pipeline.batches(source, 7, seed=3, flip=True, threads=0, shard_index=0, shard_count=1)
    batch, mirrored = next(feed), 0
    assert batch.keys() == {"latent", "latent_std", "label", "id"} and feed.shape == (4, 4, 3)
    for row, i in enumerate(batch["id"]):
        kinds = {"": "latent", "_mirrored": "latent_mirrored"}
        which = [k for k, name in kinds.items()
                 if np.array_equal(batch["latent"][row], found[name][i])]  # fmt: skip
        assert len(which) == 1
        np.testing.assert_array_equal(batch["latent_std"][row], found[f"latent{which[0]}_std"][i])
        mirrored += which == ["_mirrored"]
    assert 0 < mirrored < 7
    plain = pipeline.batches(held(root)[0], 7, seed=3, threads=0, shard_index=0, shard_count=1)
    ids = next(plain)
    np.testing.assert_array_equal(ids["latent"], found["latent"][ids["id"]])
    # From disk as from memory.
    disk, rows = held(root, in_memory=False, mirrored=True)
    assert isinstance(disk, sources.RecordSource)
    np.testing.assert_array_equal(rows["latent_std"], found["latent_std"])


def test_without_an_autoencoder_the_resized_images_are_kept(root):
    made = encoding.encode(
        encoding.Wanted("pics", "small", size=4, text="words", batch=BATCH, data_dir=root)
    )
    source, found = held(root, "small", fields=("text",))
    feed = pipeline.batches(
        sources.source("pics", "train", root), 21, train=False, size=4, threads=0, shard_index=0,
        shard_count=1,
    )  # fmt: skip
    np.testing.assert_array_equal(found["image"], next(feed)["image"])
    assert source.info.shape == source.info.image_shape == (4, 4, 3) and not source.info.latent
    assert found["text"].shape == (21, encoded_sets.LENGTH, encoded_sets.WIDTH)
    assert encoded.read(made).text == "words"


def test_half_precision_is_half_as_large(root, coder):
    encoding.encode(wanted(root, coder, name="half", dtype="float16", splits=("test",)))
    source, found = held(root, "half", split="test")
    assert found["latent"].dtype == found["latent_std"].dtype == np.float16
    np.testing.assert_allclose(found["latent"], held(root, split="test")[1]["latent"], atol=5e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a-b"}, "--name='a-b': letters"),
        ({"name": "pics"}, "was not written by `jdiff encode`; give another"),
        ({"name": "pics_latents"}, "is another set: mirrored was True and is False"),
        ({"autoencoder": None}, "give --autoencoder, --text, or both"),
        ({"autoencoder": "/nowhere"}, "/nowhere is no autoencoder"),
        ({"size": 5}, "5 x 5 is not divisible by its factor 2; .* 4 x 4"),
        ({"splits": ("trian",)}, "'trian' is not known. Did you mean 'train'"),
        ({"data": "pics_latents"}, "holds latents already"),
        ({"text": "words", "caption": "captoin"}, "'captoin' is not known. Did you mean 'caption'"),
        ({"autoencoder": None, "text": "words", "mirrored": True}, "--flip is for latents"),
        ({"dtype": "float17"}, "Did you mean 'float16'"),
        ({"data": "digits"}, r"\[B, H, W, 3\]"),
    ],
)
def test_bad_input_is_one_line(root, coder, folder, changes, words):
    with pytest.raises(UserError, match=words):
        encoding.encode(wanted(root, coder, **{"name": "other"} | changes))


def test_a_pipeline_asks_for_no_other_images_than_were_encoded(root, folder):
    source, _ = held(root)
    kept = {"threads": 0, "shard_index": 0, "shard_count": 1}
    pipeline.batches(source, 4, size=8, **kept)  # as the images are
    with pytest.raises(UserError, match="size=4: the latents of pics_latents .* size=8"):
        pipeline.batches(source, 4, size=4, **kept)
    with pytest.raises(UserError, match="crop='random'"):
        pipeline.batches(source, 4, crop="random", **kept)
    plain = dataclasses.replace(source.info.encoded, mirrored=False)
    object.__setattr__(source, "info", dataclasses.replace(source.info, encoded=plain))
    with pytest.raises(UserError, match="flip: the mirror images .* encode them with --flip"):
        pipeline.batches(source, 4, flip=True, **kept)


def test_the_digest_tells_weights_and_units_apart(coder, tmp_path):
    first = latents.open_autoencoder(coder)
    same = latents.open_autoencoder(encoded_sets.save_autoencoder(tmp_path / "copy"))
    other = latents.open_autoencoder(encoded_sets.save_autoencoder(tmp_path / "other", seed=1))
    assert latents.digest(first) == latents.digest(same) != latents.digest(other)
    scaled = dataclasses.replace(first, scale=2 * first.scale)
    assert latents.digest(scaled) != latents.digest(first)
    one = jax.tree.leaves(first.params)[0]
    swapped = dataclasses.replace(
        first, params=jax.tree.map(lambda a: a[::-1] if a is one else a, first.params)
    )
    assert latents.digest(swapped) != latents.digest(first)


def test_a_batch_is_split_over_all_devices(coder):
    encoder = encoding.Encoder(latents.open_autoencoder(coder), None, 7, "float32")
    images = np.stack([row["image"] for row in encoded_sets.rows("train")])
    mean, std = encoder.moments(images[:5])  # of a last batch, with fewer than the others
    assert len(mean.sharding.device_set) == len(jax.devices()) == 4
    assert {shard.data.shape for shard in std.addressable_shards} == {(2, 4, 4, 3)}


def test_the_command_says_where_the_set_lies(root, coder, folder, capsys):
    from jdiff import cli

    words = ["encode", "--data=pics", f"--autoencoder={coder}", "--text=words", f"--batch={BATCH}"]
    words += [f"--data_dir={root}", "--name=pics_latents"]
    assert cli.main([*words, "--flip"]) == 0
    said = capsys.readouterr().out
    assert f"data set pics_latents  {folder}" in said and "is there already" in said
    assert "latents [4, 4, 3] of images [8, 8, 3], deviation" in said
    assert "--config.data.name=pics_latents" in said
    assert cli.main(words) == 2  # another set: not mirrored
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
