import json
import pathlib

import pytest
from ml_collections import ConfigDict

from jdiff import config, experiment, runs
from jdiff.errors import UserError

FILE = """\
from ml_collections import ConfigDict, config_dict

def get_config(size="small"):
    c = ConfigDict()
    c.seed = 0
    c.note = size
    c.flip = False
    c.rate = 1e-3
    c.model = ConfigDict({"name": "unet", "mult": (1, 2), "sizes": (0.5, 2)})
    c.train = ConfigDict({"batch_size": 128, "steps": 1000})
    c.train.micro = c.train.get_oneway_ref("batch_size") // 2
    c.data = ConfigDict({"crop": config_dict.placeholder(str), "size": 32})
    c.data.limit = config_dict.placeholder(int)
    c.data.range = config_dict.placeholder(tuple)
    c.data.limit = 7
    c.sampling = ConfigDict({"solver": {"name": "heun"}})
    return c.lock()
"""


@pytest.fixture
def file(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "small.py"
    path.write_text(FILE)
    return str(path)


def test_overrides_take_the_type_of_the_field(file):
    c = config.load(
        file,
        [
            "--config.train.steps=250", "--config.rate", "1", "--config.model.mult=1,2,4",
            "--config.model.sizes=(1, 2)", "--config.note=7", "--config.flip",
            "--config.train.batch_size=1e2", "--config.data.crop=center",
            "--config.data.range=-1,0.5", "--config.seed", "-3",
        ],
    )  # fmt: skip
    assert c.train.steps == 250 and isinstance(c.train.steps, int)
    assert c.rate == 1.0 and isinstance(c.rate, float)
    assert c.model.mult == (1, 2, 4)
    assert c.model.sizes == (1.0, 2.0) and all(isinstance(v, float) for v in c.model.sizes)
    assert c.note == "7"
    assert c.flip is True
    assert c.train.batch_size == 100
    assert c.train.micro == 50  # a reference follows the field it is made from
    assert c.data.crop == "center"
    assert c.data.range == (-1, 0.5)
    assert c.seed == -3


@pytest.mark.parametrize(
    "words,expected",
    [
        (["--config.flip"], True),
        (["--config.flip=true"], True),
        (["--config.flip", "1"], True),
        (["--config.flip=no"], False),
        (["--config.flip", "--config.seed=1"], True),
        (["--config.flip=true", "--noconfig.flip"], False),
    ],
)
def test_true_or_false(file, words, expected):
    assert config.load(file, words).flip is expected


def test_the_last_override_wins(file):
    assert config.load(file, ["--config.seed=1", "--config.seed=2"]).seed == 2


def test_none_goes_only_where_none_may_stand(file):
    assert config.load(file, ["--config.data.limit=None"]).data.limit is None
    assert config.load(file, ["--config.data.crop=None"]).data.crop is None
    with pytest.raises(UserError, match="config.train.steps=None .* takes a whole number"):
        config.load(file, ["--config.train.steps=None"])


def test_arguments_may_be_added_to_what_a_name_chooses(file):
    c = config.load(file, ["--config.sampling.solver.eta=0.5", "--config.model.remat=true"])
    assert c.sampling.solver.eta == 0.5 and c.model.remat is True
    c = config.load(file, ['--config.sampling.solver={"name": "ddim", "eta": 1.0}'])
    assert c.sampling.solver.to_dict() == {"name": "ddim", "eta": 1.0}


def test_text_after_the_colon_goes_to_get_config(file):
    assert config.load(file).note == "small"
    assert config.load(file + ":a:b").note == "a:b"


def test_what_is_loaded_is_locked(file):
    with pytest.raises((KeyError, AttributeError)):
        config.load(file).train.stepz = 1


@pytest.mark.parametrize(
    "word,message",
    [
        (
            "--config.train.batchsize=64",
            "config.train.batchsize is not known. Did you mean config.train.batch_size?",
        ),
        ("--config.batch_size=64", "Did you mean config.train.batch_size?"),
        ("--config.trian.steps=64", "Did you mean config.train.steps?"),
        ("--config.wholly.else=1", "config has data, flip, "),
        ("--config.train.steps=8.5", "config.train.steps=8.5 given; it takes a whole number"),
        ("--config.train.steps=many", "config.train.steps=many given; it takes a whole number"),
        ("--config.rate=fast", "config.rate=fast given; it takes a number"),
        ("--config.flip=maybe", "config.flip=maybe given; it takes true or false"),
        ("--config.model.mult=a,b", "config.model.mult=a,b given; it takes a tuple"),
        ("--config.data.limit=big", "config.data.limit=big given; it takes a whole number"),
        ("--config.train=5", "config.train is a section; set one of its fields (batch_size,"),
        ("--config.seed.x=5", "config.seed is no section but 0"),
        ("--config.seed", "write --config.seed=VALUE"),
        ("--noconfig.seed", "is for a true-or-false field"),
    ],
)
def test_a_mistake_gets_one_line(file, word, message):
    with pytest.raises(UserError) as caught:
        config.load(file, [word])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_offers_those_that_are_there(file):
    folder = pathlib.Path(file).parent
    with pytest.raises(UserError, match=r"Did you mean .*small\.py\? There are: .*small\.py"):
        config.load(str(folder / "smal.py"))


@pytest.mark.parametrize(
    "text,message",
    [
        ("import nothing_of_this_name\n", "line 1: ModuleNotFoundError: No module named"),
        ("def get_config():\n    x = 1\n    return 1 / 0\n", "line 3: ZeroDivisionError"),
        ("def get_config(:\n", "line 1: SyntaxError"),
        ("x = 1\n", "has no function get_config()"),
        ("def get_config():\n    return {}\n", "returned dict; it must return an ml_collections"),
        ("def get_config():\n    return 1\n", "returned int"),
    ],
)
def test_an_error_in_the_file_is_one_line_that_says_where(tmp_path, text, message):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        config.load(str(path))
    assert message in str(caught.value) and "bad.py" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_keeps_types(file):
    c = config.load(file, ["--config.rate=1"])
    text = config.to_json(c)
    assert json.loads(text)["model"]["mult"] == [1, 2]
    back = config.from_json(text)
    assert back.to_dict() == c.to_dict()
    kinds = {name: type(value) for name, value in config.fields(c)}
    assert {name: type(value) for name, value in config.fields(back)} == kinds
    assert isinstance(back.rate, float) and isinstance(back.seed, int) and back.data.crop is None
    assert back.is_locked


def test_json_keeps_empty_sections_and_unusual_numbers():
    c = ConfigDict({"empty": {}, "inf": float("inf"), "deep": ((1, (2.0,)), "x")})
    back = config.from_json(config.to_json(c))
    assert back.to_dict() == c.to_dict()
    assert isinstance(back.empty, ConfigDict)


def test_json_names_a_field_that_it_cannot_write():
    with pytest.raises(UserError, match=r"config\.train\.loss is <built-in"):
        config.to_json(ConfigDict({"train": {"loss": max}}))


def test_a_config_of_an_earlier_version_gets_the_new_fields_and_keeps_its_own():
    new = experiment.defaults()
    old = config.from_json(config.to_json(new))
    with old.unlocked():
        del old.evaluation["reference"]
        old.evaluation.num = 7
        old.schedule = {"name": "cosine", "shift": 0.5}
        del old.sampling["threshold"]
    found = config.completed(old, new)
    assert (found.evaluation.reference, found.evaluation.num) == ("test", 7)
    assert found.schedule.to_dict() == {"name": "cosine", "shift": 0.5}
    assert found.sampling.threshold is None


def test_a_threshold_is_a_name_a_section_or_nothing(tmp_path):
    section = {"name": "dynamic", "quantile": 0.9}
    forms = {"None": None, "static": "static", json.dumps(section): section}
    for before in forms.values():
        c = experiment.defaults()
        c.sampling.threshold = before
        path = tmp_path / "config.json"
        path.write_text(config.to_json(c))
        for text, wanted in forms.items():
            found = config.load(path, [f"--config.sampling.threshold={text}"]).sampling.threshold
            assert (found.to_dict() if isinstance(found, ConfigDict) else found) == wanted
            replaced = runs.chosen(config.load(path), {"threshold": wanted}).sampling.threshold
            assert (replaced.to_dict() if isinstance(replaced, ConfigDict) else replaced) == wanted
    c = config.load(path, ["--config.sampling.threshold.limit=2"])  # of the section
    assert c.sampling.threshold.to_dict() == section | {"limit": 2}
    with pytest.raises(UserError, match="threshold=0.9 given, but .* is a section"):
        config.load(path, ["--config.sampling.threshold=0.9"])


def test_differences():
    a = ConfigDict({"seed": 0, "train": {"steps": 10}, "old": 1})
    b = ConfigDict({"seed": 0, "train": {"steps": 20}, "new": (1,)})
    assert config.differences(a, a) == []
    assert config.differences(a, b) == [
        "old: 1 -> absent", "train.steps: 10 -> 20", "new: absent -> (1,)"
    ]  # fmt: skip
