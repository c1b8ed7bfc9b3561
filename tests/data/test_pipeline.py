"""Order, sharding, augmentation and resuming of the batch stream."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from jdiff import data
from jdiff.errors import UserError


def _take(iterator, n):
    return list(itertools.islice(iterator, n))


def _ids(iterator, n):
    return np.concatenate([b["id"] for b in _take(iterator, n)])


def test_a_batch_holds_the_examples_that_its_ids_name(toy):
    batch = next(data.batches(toy, 16, seed=3))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "image": ((16, 4, 6, 3), np.uint8),
        "label": ((16,), np.int32),
        "id": ((16,), np.int64),
    }
    for i, image, label in zip(batch["id"], batch["image"], batch["label"]):
        np.testing.assert_array_equal(image, toy[i]["image"])
        assert label == toy[i]["label"]


def test_every_epoch_is_another_permutation(toy):
    n = len(toy)
    stream = _ids(data.batches(toy, n, seed=0), 4).reshape(4, n)
    other = _ids(data.batches(toy, n, seed=1), 4).reshape(4, n)
    epochs = [*stream, *other]  # of neighbouring seeds, too
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    for a, b in itertools.combinations(epochs, 2):
        assert np.mean(a == b) < 0.1  # 1 / n for independent permutations
    assert abs(np.corrcoef(stream[0], np.arange(n))[0, 1]) < 0.4


def test_batches_straddle_epochs_without_a_remainder(toy):
    ids = _ids(data.batches(toy, 16, seed=0), 2 * 103 // 16 + 1)
    assert sorted(ids[:103]) == sorted(ids[103:206]) == list(range(103))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("train", [True, False])
def test_shards_are_disjoint_and_complete(toy, count, train):
    whole = _take(data.batches(toy, 8, seed=5, flip=True, train=train), 13)
    shards = [
        _take(
            data.batches(toy, 8, seed=5, flip=True, train=train, shard_index=i, shard_count=count),
            13,
        )
        for i in range(count)
    ]
    for k, batch in enumerate(whole):
        parts = [shard[k] for shard in shards]
        for field in batch:
            np.testing.assert_array_equal(np.concatenate([p[field] for p in parts]), batch[field])
            assert parts[-1][field].shape[1:] == batch[field].shape[1:]


def test_the_stream_does_not_depend_on_the_batch_size(toy):
    options = {"seed": 2, "flip": True, "crop": "random", "size": 3}
    small, large = (
        np.concatenate([b["image"] for b in _take(data.batches(toy, size, **options), n)])
        for size, n in ((5, 48), (60, 4))
    )
    np.testing.assert_array_equal(small, large)


@pytest.mark.parametrize("threads", [0, 2])
def test_the_seed_fixes_everything(toy, threads):
    options = {"flip": True, "crop": "patch", "size": 3}
    a = _take(data.batches(toy, 32, seed=9, threads=threads, **options), 6)
    b = _take(data.batches(toy, 32, seed=9, **options), 6)
    c = _take(data.batches(toy, 32, seed=10, **options), 6)
    for x, y, z in zip(a, b, c):
        np.testing.assert_array_equal(x["image"], y["image"])
        assert not np.array_equal(x["id"], z["id"])


@pytest.mark.parametrize("steps", [0, 1, 3, 11])
def test_exact_resume_in_the_middle_of_an_epoch(toy, steps):
    options = {"seed": 1, "flip": True, "crop": "random", "size": 5}
    straight = data.batches(toy, 16, **options)
    _take(straight, steps)
    state = json.loads(json.dumps(straight.get_state()))
    expected = _take(straight, 9)
    resumed = data.batches(toy, 16, **options)
    _take(resumed, 4)  # wherever it stood
    resumed.set_state(state)
    for a, b in zip(expected, _take(resumed, 9)):
        for field in a:
            np.testing.assert_array_equal(a[field], b[field])
    assert resumed.get_state() == straight.get_state()


def test_resume_on_another_number_of_processes(toy):
    one = data.batches(toy, 12, seed=4)
    _take(one, 7)
    state = one.get_state()
    pair = [data.batches(toy, 12, seed=4, shard_index=i, shard_count=2) for i in range(2)]
    for half in pair:
        half.set_state(state)
    for _ in range(3):
        joined = np.concatenate([next(half)["id"] for half in pair])
        np.testing.assert_array_equal(joined, next(one)["id"])


@pytest.mark.parametrize(
    "change,message",
    [
        ({"batch_size": 32}, "batch_size was 16 and is 32"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"train": False}, "train was True and is False"),
        ({"source": {"size": 90}}, "examples was 103 and is 90"),
        ({"source": {"split": "test"}}, "split was 'train' and is 'test'"),
        ({"source": {"name": "toys"}}, "dataset was 'toy' and is 'toys'"),
    ],
)
def test_a_state_is_refused_by_another_pipeline(toy, make_source, change, message):
    first = data.batches(toy, 16, seed=0)
    _take(first, 2)
    options = {"batch_size": 16, "seed": 0} | change
    options["source"] = make_source(**change.get("source", {}))
    other = data.batches(**options)
    with pytest.raises(UserError, match=message):
        other.set_state(first.get_state())
    np.testing.assert_array_equal(next(other)["id"], next(data.batches(**options))["id"])


def test_evaluation_goes_through_once_in_order(toy):
    found = list(data.batches(toy, 16, train=False))
    assert [len(b["id"]) for b in found] == [16] * 6 + [7]
    np.testing.assert_array_equal(np.concatenate([b["id"] for b in found]), np.arange(103))
    np.testing.assert_array_equal(np.concatenate([b["image"] for b in found]), toy.fields["image"])


def test_flips_are_true_mirrors_half_of_the_time_and_anew_each_epoch(toy):
    n, epochs = len(toy), 12
    flipped = np.zeros((epochs, n), bool)
    stream = data.batches(toy, n, seed=0, flip=True)
    for epoch, batch in enumerate(_take(stream, epochs)):
        for i, image in zip(batch["id"], batch["image"]):
            original = toy[i]["image"]
            flipped[epoch, i] = not np.array_equal(image, original)
            if flipped[epoch, i]:
                np.testing.assert_array_equal(image, original[:, ::-1])
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / np.sqrt(epochs * n)
    assert not np.any(flipped.all(axis=0) | ~flipped.any(axis=0))  # p = 103 / 2**11
    changed = np.mean(flipped[1:] != flipped[:-1])
    assert abs(changed - 0.5) < 4 * 0.5 / np.sqrt((epochs - 1) * n)


@pytest.mark.parametrize(
    "options,shape",
    [
        ({"crop": "center"}, (4, 4, 3)),
        ({"crop": "random", "size": 3}, (3, 3, 3)),
        ({"crop": "adm", "size": 2}, (2, 2, 3)),
        ({"crop": "patch", "size": 2}, (2, 2, 3)),
        ({}, (4, 6, 3)),
    ],
)
def test_crop_and_size_give_the_announced_shape(toy, options, shape):
    stream = data.batches(toy, 8, seed=0, **options)
    assert stream.shape == shape and next(stream)["image"].shape[1:] == shape


def test_crop_and_resize_are_those_of_the_transforms(toy):
    from jdiff.data import transforms

    batch = next(data.batches(toy, 8, train=False, crop="center", size=2, resample="box"))
    expected = [transforms.resize(toy[i]["image"][:, 1:5], (2, 2), "box") for i in range(8)]
    np.testing.assert_array_equal(batch["image"], expected)


def test_records_and_memory_give_the_same_batches_and_captions(toy_folder):
    streams = [
        data.batches(
            data.source("tiny", "train", toy_folder, fields=("caption",), in_memory=m),
            *(10,),
            seed=0,
            flip=True,
        )
        for m in (False, True)
    ]
    for a, b in itertools.islice(zip(*streams), 5):
        assert set(a) == {"image", "label", "caption", "id"}
        for field in a:
            np.testing.assert_array_equal(a[field], b[field])
        assert a["caption"][0] == f"train picture {a['id'][0]} \u00e9"


def test_patches_are_placed_independently_in_height_and_width(make_source):
    side = np.arange(16, dtype=np.uint8)
    image = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1)  # its own coordinates
    source = make_source(size=50, shape=(16, 16, 2))
    source.fields["image"][:] = image
    batch = next(data.batches(source, 400, seed=0, crop="patch", size=4))
    top, left = batch["image"][:, 0, 0].T.astype(float)
    assert {*top} == {*left} == set(range(13))
    assert abs(np.corrcoef(top, left)[0, 1]) < 4 / np.sqrt(400)


def test_evaluation_is_never_mirrored(toy):
    for batch in data.batches(toy, 16, train=False, flip=True):
        np.testing.assert_array_equal(batch["image"], toy.fields["image"][batch["id"]])


class _Ragged(list):
    info = data.Info("ragged", "train", (None, None, 3), 0, (), 8)


def test_any_sequence_of_images_is_a_source():
    rows = [{"image": np.full((6 + i, 9, 3), i, np.uint8)} for i in range(8)]
    stream = data.batches(_Ragged(rows), 4, seed=0, crop="center", size=5)
    batch = next(stream)
    assert set(batch) == {"image", "id"}  # no labels, none made up
    expected = np.broadcast_to(batch["id"][:, None, None, None], (4, 5, 5, 3))
    np.testing.assert_array_equal(batch["image"], expected)
    with pytest.raises(UserError, match="differ in shape"):
        next(data.batches(_Ragged(rows), 4, seed=0, threads=0))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 9, "shard_index": 0, "shard_count": 2}, "batch_size 9 .* 2 processes"),
        ({"shard_index": 2, "shard_count": 2}, "shard_index 2"),
        ({"crop": "centre"}, "Did you mean 'center'"),
        ({"crop": "adm"}, "needs a size"),
        ({"resample": "cubic"}, "Did you mean 'bicubic'"),
        ({"size": 3}, "would distort"),
        ({"size": 0, "crop": "center"}, "size 0"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_bad_arguments_are_named(toy, options, message):
    with pytest.raises(UserError, match=message):
        data.batches(toy, **({"batch_size": 8} | options))


def test_an_empty_split_is_refused(toy):
    empty = dataclasses.replace(toy, info=dataclasses.replace(toy.info, size=0))
    with pytest.raises(UserError, match="no examples"):
        data.batches(empty, 8)


def test_digits_stream(tmp_path):
    source = data.source("digits", "train")
    ids = _ids(data.batches(source, 1437, seed=0), 1)
    assert sorted(ids) == list(range(1437))
