"""The bundled digits, TFDS folders, split strings and error texts."""

import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from jdiff import data
from jdiff.data import digits, folders, sources
from jdiff.data.prepare import registry
from jdiff.errors import UserError


def test_digits_are_scikit_learns_in_eight_bits():
    raw = load_digits()
    pixels = raw.images.astype(np.uint8)
    digest = hashlib.sha256(pixels.tobytes() + raw.target.astype(np.uint8).tobytes()).hexdigest()
    # Of scikit-learn's arrays: if this changes, published numbers of the digits change.
    assert digest == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
    train, test = data.source("digits", "train"), data.source("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train[0]["image"].shape == train.info.shape == (8, 8, 1)
    assert train[0]["image"].dtype == np.uint8
    ours = sorted(
        (row["label"], row["image"].tobytes())
        for s in (train, test)
        for row in (s[i] for i in range(len(s)))
    )
    table = np.asarray([round(255 * v / 16) if v != 8 else 128 for v in range(17)], np.uint8)
    assert ours == sorted((int(y), table[x].tobytes()) for x, y in zip(pixels, raw.target))


def test_digits_split_is_the_documented_one():
    raw = load_digits()
    order = sorted(range(1797), key=lambda i: hashlib.sha256(str(i).encode()).hexdigest())
    seen, test = {}, []
    for i in order:
        seen[raw.target[i]] = seen.get(raw.target[i], 0) + 1
        if seen[raw.target[i]] <= 36:
            test.append(i)
    train = [i for i in order if i not in set(test)]
    for split, rows in (("train", train), ("test", test)):
        images, labels = digits.load()[split]
        np.testing.assert_array_equal(labels, raw.target[rows])
        np.testing.assert_array_equal(images[..., 0], np.rint(raw.images[rows] * 255 / 16))
    assert np.bincount(raw.target[test]).tolist() == [36] * 10
    assert not set(train) & set(test)


def test_digits_slices_are_mixed():
    labels = data.source("digits", "train[:10%]").gather(range(144))["label"]
    assert len(labels) == 144 and np.bincount(labels, minlength=10).min() >= 4


@pytest.mark.parametrize(
    "split",
    [
        *("train", "test", "train[:10%]", "train[50%:]", "train[-30%:]", "train[3:9]"),
        *("train[20:]", "train[-4:]", "test[:50%]+train[:2]", "train[10%:21%]", "all"),
    ],
)
def test_split_strings_mean_what_they_mean_in_tfds(split, toy_folder):
    tfds_rows = data.source("tiny", split, toy_folder, fields=("caption",)).gather
    found = digits.positions("tiny", split, {"train": 25, "test": 11})
    captions = tfds_rows(range(len(found)))["caption"].tolist()
    assert captions == [f"{s} picture {i} \u00e9" for s, i in found]
    assert len(data.source("tiny", split, toy_folder)) == len(found)


@pytest.mark.parametrize("in_memory", [False, True, None])
def test_a_tfds_folder_round_trip(toy_folder, toy, in_memory):
    told = []
    source = data.source(
        "tiny", "test", toy_folder, fields=("caption",), in_memory=in_memory, progress=told.append
    )
    assert len(told) == (in_memory is not False)
    assert source.info == data.Info("tiny", "test", (5, 7, 3), 10, tuple("abcdefghij"), 11)
    expected = np.random.default_rng(7).integers(0, 256, (11, 5, 7, 3), dtype=np.uint8)
    rows = source.gather([4, 0, 10])
    np.testing.assert_array_equal(rows["image"], expected[[4, 0, 10]])
    assert rows["label"].tolist() == [4, 0, 0] and rows["label"].dtype == np.int32
    assert rows["caption"][0] == "test picture 4 \u00e9"
    one = source[-1]
    assert one["label"] == 0 and type(one["label"]) is int and one["caption"].startswith("test")
    np.testing.assert_array_equal(one["image"], expected[-1])
    assert [r["label"] for r in source.__getitems__([1, 2])] == [1, 2]
    with pytest.raises(IndexError):
        source[11]


@pytest.mark.parametrize(
    "name,split,message",
    [
        ("digit", "train", "Did you mean 'digits'"),
        ("tinny", "train", "Did you mean 'tiny'"),
        ("digits", "trian", "Did you mean 'train'"),
        ("tiny", "tset", "Did you mean 'test'"),
        ("tiny", "train[:10", "train[:10"),
        ("digits", "train[:10", "is not like train, test[:10%]"),
        ("tiny:2.0.0", "train", "1.0.0"),
        ("tiny/x", "train", "no such config"),
        ("a b", "train", "is not like cifar10"),
        ("cifar10", "train", "run: jdiff prepare cifar10 --data_dir="),
        ("cifar100", "train", "tfds build cifar100 --file_format=array_record"),
        ("imagenet_resized/64x64", "train", "tfds build imagenet_resized/64x64 "),
        ("imagenet_resised", "train", "Did you mean 'imagenet_resized'"),
    ],
)
def test_errors_offer_the_way_out(name, split, message, toy_folder):
    with pytest.raises(UserError) as error:
        data.source(name, split, toy_folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_order_in_which_tfds_lists_features_does_not_matter():
    features = {"style": 1, "name": "text", "group": 2}
    for listed in (features, dict(reversed(features.items()))):
        assert sources.main(listed, "label", int) == "group"
        assert sources.main(listed | {"label": 3}, "label", int) == "label"
        assert sources.main(listed, "image", float) is None


def test_unknown_fields_are_named(toy_folder):
    with pytest.raises(UserError, match="Did you mean 'caption'"):
        data.source("tiny", "train", toy_folder, fields=("captoin",))
    with pytest.raises(UserError, match="caption"):
        data.source("digits", "train", fields=("caption",))


def test_the_default_folder_needs_no_flag(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match="jdiff prepare mnist$"):
        data.source("mnist", "train")


def test_the_newest_version_is_read(toy_folder, tmp_path):
    for version in ("1.0.0", "1.10.0", "1.9.0"):
        folder = tmp_path / "tiny" / version
        folder.parent.mkdir(exist_ok=True)
        folder.mkdir()
        for file in (toy_folder / "tiny" / "1.0.0").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    assert str(folders.open_builder("tiny", tmp_path).data_dir).endswith("1.10.0")
    assert str(folders.open_builder("tiny:1.9.0", tmp_path).data_dir).endswith("1.9.0")


@pytest.mark.parametrize("name,train,test,classes", [
    ("cifar10", 50_000, 10_000, 10),
    ("mnist", 60_000, 10_000, 10),
    ("fashion_mnist", 60_000, 10_000, 10),
    ("emoji", None, None, 10),
])  # fmt: skip
def test_prepared_sets(name, train, test, classes):
    version = registry.ITEMS[name].version
    if not (folders.data_root() / name / version / "dataset_info.json").is_file():
        pytest.skip(f"NOT CHECKED: {name} is not prepared here; run: jdiff prepare {name}")
    sources = {s: data.source(name, s, in_memory=False) for s in ("train", "test")}
    assert train is None or [len(s) for s in sources.values()] == [train, test]
    for source in sources.values():
        rows = source.gather(range(0, len(source), len(source) // 50))
        assert rows["image"].shape[1:] == source.info.shape and rows["image"].std() > 10
        assert source.info.num_classes == classes and rows["label"].max() < classes
