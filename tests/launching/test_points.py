"""Points of sweeps: products, names, and what is refused before anything starts."""

import pathlib
import re

import numpy as np
import pytest

from jdiff import config as configs
from jdiff.errors import UserError
from jdiff.launching import points
from jdiff.launching.points import product, zipped

FILE = """\
from jdiff.experiment import defaults


def get_config():
    c = defaults()
    c.model.update({{"name": "dit", "width": 16, "depth": 1, "heads": 2}})
    c.train.batch_size = 16
    c.sampling.grid.steps = 2
    return c


def sweep():
    {body}
"""


@pytest.fixture
def written(tmp_path):
    def write(body: str) -> str:
        path = tmp_path / "c.py"
        path.write_text(FILE.format(body=body))
        return str(path)

    return write


def test_a_product_varies_its_last_field_fastest():
    assert product({"a.b": (1, 2), "seed": range(2)}) == [
        {"a.b": 1, "seed": 0}, {"a.b": 1, "seed": 1},
        {"a.b": 2, "seed": 0}, {"a.b": 2, "seed": 1},
    ]  # fmt: skip
    assert len(product({"a": range(3), "b": ("", "y"), "c": [(1,), (2,)]})) == 12


def test_what_belongs_together_is_zipped_and_then_multiplied():
    both = product(zipped({"width": (64, 128), "heads": (2, 4)}), {"seed": (0, 1)})
    assert both == [
        {"width": 64, "heads": 2, "seed": 0}, {"width": 64, "heads": 2, "seed": 1},
        {"width": 128, "heads": 4, "seed": 0}, {"width": 128, "heads": 4, "seed": 1},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: product({"seed": 3}), "product: seed takes a list of values, given 3"),
        (lambda: product({"name": "adam"}), "takes a list of values, given 'adam'"),
        (lambda: product({"seed": ()}), "seed has no values"),
        (lambda: product({"seed": (0,)}, {"seed": (1,)}), "seed is given twice"),
        (lambda: zipped({"a": (1, 2), "b": (1,)}), "different lengths: {'a': 2, 'b': 1}"),
    ],
)
def test_axes_that_are_none(make, message):
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value)


def test_names_are_made_of_what_differs():
    made = product(
        {"optimizer.learning_rate": (1e-3, 1e-4), "optimizer.name": ("adam",),
         "model.name": ("dit", "unet"), "ema.ema.decay": (0.99,), "seed": (0,)}
    )  # fmt: skip
    assert points.names(made) == [
        "00_lr=0.001_name=dit", "01_lr=0.001_name=unet",
        "02_lr=0.0001_name=dit", "03_lr=0.0001_name=unet",
    ]  # fmt: skip
    two = product({"model.name": ("dit", "unet"), "optimizer.name": ("adam", "lion")})
    assert points.names(two)[1] == "01_model.name=dit_optimizer.name=lion"
    odd = [{"data.data_dir": "/a b/c:d"}, {"model.multipliers": [1, 2]}, {"train.start": None}]
    assert points.names(odd) == ["00_data_dir=a-b-c-d", "01_multipliers=1,2", "02_start=None"]
    assert points.names([{"seed": 3}]) == ["00_seed=3"]
    assert points.names([{}, {"seed": 1}]) == ["00", "01_seed=1"]
    many = points.names(product({"seed": range(101)}))
    assert many[0] == "000_seed=0" and many[100] == "100_seed=100"


def test_names_stay_when_points_are_added():
    few = product({"seed": (0, 1)})
    known = dict(zip(points.names(few), few))
    more = product({"optimizer.learning_rate": (1e-3,), "seed": (0,)}) + product(
        {"seed": (2, 1, 0)}
    )
    assert points.names(more, known) == [
        "02_lr=0.001_seed=0",
        "03_seed=2",
        "01_seed=1",
        "00_seed=0",
    ]


def test_every_point_has_the_config_that_its_overrides_make(written):
    path = written(
        "import numpy as np\n"
        "    for lr in np.float64([1e-3, 3e-4]):\n"
        "        yield {'optimizer.learning_rate': lr, 'seed': np.int64(7),\n"
        "               'sampling.solver': {'name': 'ddim', 'eta': 0.5},\n"
        "               'data.flip': True, 'optimizer.clip': 1.0, 'model.depth': 2}"
    )
    a, b = points.resolve(path, ["--config.train.steps=11"])
    assert (a.name, b.name) == ("00_lr=0.001", "01_lr=0.0003")
    assert (a.config.optimizer.learning_rate, b.config.optimizer.learning_rate) == (1e-3, 3e-4)
    assert type(a.overrides["seed"]) is int and a.config.seed == 7
    assert a.config.train.steps == 11 and a.config.data.flip is True
    assert a.config.sampling.solver.to_dict() == {"name": "ddim", "eta": 0.5}
    # The words of the command line make the same config.
    assert configs.load(path, ["--config.train.steps=11", *points.words(a.overrides)]) == a.config


@pytest.mark.parametrize(
    "body,message",
    [
        ("return [{'optimiser.learning_rate': 1e-3}]",
         "point 0 of sweep(): config.optimiser.learning_rate is not known. Did you mean "
         "config.optimizer.learning_rate?"),
        ("return [{}, {'seed': 1.5}]", "point 1 of sweep(): config.seed=1.5 given; it takes a w"),
        ("return [{'seed': '1'}]", "seed='1' is str, and would be read as 1"),
        ("return [{'seed': True}]", "config.seed=true given; it takes a whole number"),
        ("return [{'data.flip': 1}]", "data.flip=1 is int, and would be read as True"),
        ("return [{'optimizer.learning_rate': 'fast'}]", "it takes a number"),
        ("return [{'train': 3}]", "config.train is"),
        ("return [{'model.depht': 2}]", "'depht' is not known. Did you mean 'depth'?"),
        ("return [{'optimizer.learning_rate': -1.0}]", "learning_rate=-1.0 must be positive"),
        ("return [{'sampling.solver': {'name': 'huen'}}]", "Did you mean 'heun'?"),
        ("return [{'model.name': 'unte'}]", "Did you mean 'unet'?"),
        ("return [{'seed': 1}, {'seed': 0}, {'train.steps': 1000}]",
         "points 1 and 2 of sweep() are the same: seed=0 and train.steps=1000"),
        ("return []", "sweep() yields no point"),
        ("return [3]", "point 0 of sweep() is 3; a dict like {'seed': 1} is needed"),
        ("return 3", "sweep() yields dicts"),
        ("yield {'seed': 1 / 0}", "line 13: ZeroDivisionError: division by zero"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_starts(written, body, message):
    with pytest.raises(UserError) as caught:
        points.resolve(written(body))
    assert message in str(caught.value), str(caught.value)


def test_a_file_without_a_sweep_and_one_with_two(written):
    path = written("return [{'seed': 1}]\n\n\ndef sweep_many():\n    return [{'seed': 5}]")
    assert configs.points(path, "many") == [{"seed": 5}]
    with pytest.raises(UserError, match=r"no function sweep_few\(\)"):
        configs.points(path, "few")


def test_a_config_is_read_from_json_too(tmp_path):
    before = configs.load("configs/digits.py", ["--config.seed=3"])
    path = tmp_path / "a:b.json"
    path.write_text(configs.to_json(before))
    assert configs.load(str(path)) == before
    assert configs.load(str(path), ["--config.seed=4"]).seed == 4
    path.write_text('{"seed": ')
    with pytest.raises(UserError, match="cannot be read: the config is not JSON"):
        configs.load(str(path))


def test_the_sweep_of_the_digits():
    found = configs.points("configs/digits.py")
    assert len(found) == len({tuple(point.values()) for point in found}) == 9
    assert set(found[0]) == {"optimizer.learning_rate", "seed"}
    assert all(np.isfinite(point["optimizer.learning_rate"]) for point in found)
    assert pathlib.Path("configs/digits.py").is_file()


def test_the_code_of_the_chapter_runs():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "sweeps.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, names)  # noqa: S102, our own text
    assert names["sweep"]() == configs.points("configs/digits.py")
