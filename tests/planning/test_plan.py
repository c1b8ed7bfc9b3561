"""Plans of configs: arithmetic that anyone can do again, every bundled config, and the command."""

import dataclasses
import json
import pathlib
import re

import jax
import pytest

from jdiff import config, models, staged
from jdiff.cli import main
from jdiff.data.sources import Info
from jdiff.errors import UserError
from jdiff.experiment import defaults
from jdiff.models.flops import PEAKS, training_flops
from jdiff.planning import ahead, devices, hints, plan, shapes
from jdiff.planning.chips import Devices
from jdiff.planning.hints import changed_config, smallest_fsdp
from jdiff.planning.roofline import crosses, seconds
from jdiff.planning.spread import Message

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
INFO = Info("test", "train", (16, 16, 4), 10, (), 0)


def dit(batch=64, depth=2, **sizes):
    c = defaults()
    c.model.update({"name": "dit", "patch": 2, "width": 128, "depth": depth, "heads": 4})
    c.model.update({"scan": True, "dtype": "bfloat16"})
    c.train.batch_size = batch
    c.mesh.update(sizes)
    return c


# Figures


def test_a_state_is_what_its_parts_are():
    """Adam has two moments, every average is float32: 16 bytes a parameter."""
    planned = plan(dit(), INFO, devices("8xh100"))
    parameters = planned.parameters
    assert planned.memory.params == pytest.approx(4 * parameters, abs=20)
    assert planned.memory.optimizer == pytest.approx(8 * parameters, abs=20)
    assert planned.memory.averages == 4 * parameters
    assert planned.memory.batch == 64 // 8 * (16 * 16 * 4 + 4)


def test_fsdp_divides_the_state():
    whole, split = (plan(dit(fsdp=n), INFO, devices("8xh100")).memory for n in (1, 8))
    assert 7 < whole.state / split.state < 8  # vectors stay whole
    assert split.activations < 2 * whole.activations  # each has as many images


def test_operations_are_those_of_the_network_three_times():
    c = dit()
    planned = plan(c, INFO, devices("8xh100"))
    fields = {k: v for k, v in c.model.items() if k != "name"}
    fields |= {"in_channels": 4, "num_classes": 10, "image_size": 16}
    apply, params = models.abstract(lambda rngs: models.DiT(**fields, rngs=rngs))
    x = jax.ShapeDtypeStruct((64, 16, 16, 4), "float32")
    t, label = (jax.ShapeDtypeStruct((64,), kind) for kind in ("float32", "int32"))
    assert planned.flops == training_flops(apply, params, x, t, {"label": label})
    assert planned.work.flops + planned.work.wide == pytest.approx(planned.flops / 8, rel=0.02)


def test_time_is_the_roof():
    planned = plan(dit(), INFO, devices("8xh100"))
    t = planned.time
    least = planned.flops / 8 / PEAKS["h100"]
    assert t.step >= least and 0 < planned.mfu < 1
    assert planned.mfu == pytest.approx(least / t.step)
    assert t.products + t.bandwidth <= t.step + 1e-12
    slower = dataclasses.replace(devices("8xh100").chip, link=1e3)
    starved = plan(dit(), INFO, Devices("slow", slower, 8))
    assert starved.time.bound == "communication"
    sent = sum(m.sent(planned.mesh) for m in planned.messages)
    assert starved.time.hidden + starved.time.waited == pytest.approx(sent / 1e3)


def test_messages_beyond_a_machine_go_by_its_network():
    mesh = {"data": 8, "fsdp": 4, "tensor": 2, "sequence": 1}
    chip = devices("64xh100")
    assert crosses(("tensor",), mesh) == 2 and crosses(("fsdp",), mesh) == 8
    assert crosses(("data",), mesh) == 64
    near, far = (seconds([Message("all-gather", (a,), 1000)], mesh, chip) for a in ("fsdp", "data"))
    assert near == pytest.approx(1000 * 3 / 4 / 450e9)
    assert far == pytest.approx(1000 * 7 / 8 / 50e9)
    torus = devices("v5p-128")
    assert seconds([Message("all-gather", ("data",), 1000)], mesh, torus) == pytest.approx(
        1000 * 7 / 8 / 600e9
    )


# What if


def test_hints_are_the_edge_of_what_fits():
    roomy = devices("8xh100")
    chip = dataclasses.replace(roomy.chip, memory=60e6, usable=1.0)
    small = Devices("small", chip, 8)
    c = dit(batch=64)
    planned = plan(c, INFO, small)
    found = hints(c, INFO, small, planned)
    assert found.largest_batch % 8 == 0
    at = lambda n: plan(changed_config(c, {"train.batch_size": n}), INFO, small)
    edge = found.largest_batch
    assert at(edge).fits and not at(int(edge * 1.04) // 8 * 8 + 8).fits
    assert planned.fits and found.smallest_fsdp == 1
    tight = Devices("tight", dataclasses.replace(chip, memory=0.7 * planned.memory.total), 8)
    fsdp = smallest_fsdp(c, INFO, tight)
    fits = lambda n: plan(changed_config(c, {"mesh.fsdp": n}), INFO, tight).fits
    assert fsdp > 1 and fits(fsdp) and not fits(fsdp // 2)


# Every config, whatever is prepared


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_bundled_config_plans(path, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))  # nothing is prepared
    c = config.load(str(path))
    if staged.is_config(c):
        c = staged.parts(c)[1]  # the first that enlarges
        if "blocks" in c.model and isinstance(c.model.blocks, int):
            c.model.blocks = 1  # deeper ones only take longer to trace
    if c.data.name not in shapes.KNOWN:
        with pytest.raises(UserError, match="--shape=64,64,3"):
            shapes.info(c)
        return
    planned = plan(c, shapes.info(c), devices("v5e-8"))
    assert planned.memory.total > planned.memory.state > 0 and planned.fits is not None


def test_a_set_that_nobody_knows_is_said_on_the_command_line(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    c = dit()
    c.data.name = "flowers102x"
    with pytest.raises(UserError, match="--shape=64,64,3 --classes=1000"):
        shapes.info(c)
    assert shapes.info(c, (16, 16, 4), 7).num_classes == 7


# The command


def run(capsys, *words):
    code = main(["plan", *words])
    return code, *capsys.readouterr()


def test_command(capsys):
    words = [f"--config={CONFIGS / 'digits_dit_flow.py'}", "--devices=v5p-16", "--no-hints"]
    code, out, _ = run(capsys, *words, "--config.mesh.fsdp=4")
    assert code == 0 and "8 x v5p; mesh: data 2 x fsdp 4" in out
    for word in ("parameters", "optimiser", "averages (EMA)", "gradients", "activations", "MFU",
                 "all-gather", "reduce-scatter", "all-reduce", "fits", "bound by"):  # fmt: skip
        assert word in out
    code, out, _ = run(capsys, *words, "--json")
    told = json.loads(out)
    assert told["devices"] == {"given": "v5p-16", "chip": "v5p", "count": 8, "slices": 1}
    assert told["memory"]["total"] == sum(
        told["memory"][k] for k in ("params", "optimizer", "averages", "frozen", "batch",
                                    "gradients", "activations")
    )  # fmt: skip
    assert told["time"]["step"] > 0 and told["collectives"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--devices=64xh20"], "8xh200"),
        (["--devices=8xh100", "--config.mesh.fsdp=3"], "fsdp=3 given for 8 devices"),
        (["--devices=48xh100"], "config.train.batch_size"),
        (["--devices=8xh100", "--shape=8,8"], "height, width and channels"),
        (["--devices=8xh100", "--compile"], "no compiler for an absent h100"),
    ],
)
def test_mistakes(capsys, words, says):
    code, _, err = run(capsys, f"--config={CONFIGS / 'digits.py'}", "--no-hints", *words)
    assert code == 2 and says in err


def test_without_libtpu_it_says_so(monkeypatch):
    monkeypatch.setattr(ahead.importlib.util, "find_spec", lambda name: None)
    reason = ahead.why_not(devices("v5p-16"))
    assert "libtpu is not installed" in reason and "\n" not in reason


def test_the_chapters_code_runs():
    text = (CONFIGS.parent / "docs" / "plan.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, names)  # noqa: S102, our own text
    assert names["p"].devices.count == 64 and names["p"].mesh["data"] == 8
