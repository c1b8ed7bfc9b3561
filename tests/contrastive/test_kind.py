"""The kind "contrastive": what it trains finds the captions of pictures that it has not seen."""

import json

import jax
import made_colours as made
import numpy as np
import pytest

from jdiff import cli, kinds, report
from jdiff.contrastive import assess, kind
from jdiff.data import sources
from jdiff.errors import UserError
from jdiff.experiment import prepared


def info_of(config):
    source = sources.source(
        config.data.name, "train", config.data.data_dir, fields=config.data.conditions
    )
    return source, prepared(source.info, config.data)


def test_a_run_finds_the_captions_of_held_out_pictures(trained, config):
    assert kinds.of(config) is kind
    assert cli.main(["evaluate", f"--workdir={trained}"]) == 0
    found = json.loads((trained / "evaluation.json").read_text())
    rows = {row["key"]: row for row in found["metrics"]}
    assert rows["recall_1"]["ceiling"] == pytest.approx(1 / 16)  # 8 colours in 2 styles
    assert rows["recall_5"]["ceiling"] == pytest.approx(5 / 16)
    assert rows["recall_1_same"]["ceiling"] == pytest.approx(2 / 16)  # either style is right
    assert rows["recall_1"]["value"] > 0.8 and rows["recall_1"]["floor"] > 0.8
    assert rows["recall_1"]["value"] <= rows["recall_1_same"]["value"] <= 1.0
    assert rows["text_recall_1"]["value"] > 0.8
    assert found["settings"]["num"] == 32 and found["settings"]["captions"] == 16
    assert "Caption found" in [str(cell) for cell in kind.table(found).columns[0].cells]
    page = report.write(trained).read_text()
    assert "Found in the batch" in page and "Caption found" in page
    logged = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in logged if line.get("kind") == "train"][-1]
    assert last["loss"] < 0.5 * np.log(32) and last["found"] > 0.3
    assert (trained / "samples" / "step_00000060.png").is_file()


def test_the_loss_is_the_same_on_one_device_and_on_four(config):
    source, info = info_of(config)
    batch = {k: v for k, v in source.gather(range(32)).items() if k != "caption"}
    key, values = jax.random.key(0), {}
    params = kind.build(config, info).init(jax.random.key(1))
    for name, sizes in {"one": None, "four": {"data": 2, "fsdp": 2}}.items():
        c = config.copy_and_resolve_references()
        c.mesh.update(sizes or {})
        layout = kind.layout(c) if sizes else None
        exp = kind.build(c, info, None, layout)
        if layout:
            params = jax.device_put(params, exp.placed(params))
            batch = layout.put(batch, 32)
        values[name], figures = jax.jit(exp.loss)(params, key, batch)
        assert figures["scale"] == pytest.approx(1 / 0.07, rel=1e-5)
    np.testing.assert_allclose(values["four"], values["one"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train.accumulate": 2}, "cannot be cut into micro-batches"),
        ({"train.batch_size": 30}, "batch_size=30 is not a multiple of 4"),
        ({"model.chanels": 3}, "Did you mean 'channels'"),
        ({"model.stem": 3}, "image_size=8 must be a multiple of 3"),
        ({"model.dropout": 1.0}, "dropout=1.0"),
        ({"data.conditions": ()}, "nothing to tell texts by"),
        ({"data.conditions": ("txt",)}, "Did you mean 'text'"),
        ({"loss.shift": 0.5}, "loss.shift=0.5"),
        ({"mesh.tensor": 2}, "not split over 'tensor'"),
        ({"evaluation.same": "("}, "config.evaluation.same"),
        ({"evaluation.top": (0,)}, "give ranks from 1 on"),
    ],
)
def test_what_does_not_fit_is_refused(config, change, words):
    c = config.copy_and_resolve_references()
    for name, value in change.items():
        section, field = name.split(".")
        c[section][field] = value
    with pytest.raises(UserError, match=words):
        _, info = info_of(c)
        exp = kind.build(c, info, None, kind.layout(c))
        kind.check(exp, info)
        kind.check_later(exp)


def test_what_is_no_retrieval_is_refused(trained):
    run = kind.open(trained)
    with pytest.raises(UserError, match="by retrieval alone"):
        assess.assess(run, features="pixels")
    with pytest.raises(UserError, match="Did you mean 'recall_1'"):
        assess.assess(run, metrics=["recal_1"])
    with pytest.raises(UserError, match="at least 8"):
        assess.assess(run, num=7)


def test_padding_of_a_text_is_not_read(trained):
    run = kind.open(trained)
    texts = jax.jit(run.experiment.texts)
    told = made.told("plain red")
    cond = {name: np.asarray(entry)[None] for name, entry in told.items()}
    assert not cond["text_mask"].all()
    other = cond | {"text": np.where(cond["text_mask"][..., None], cond["text"], 7.0)}
    longer = {
        "text": np.pad(other["text"], ((0, 0), (0, 2), (0, 0))),
        "text_mask": np.pad(cond["text_mask"], ((0, 0), (0, 2))), "pooled": cond["pooled"],
    }  # fmt: skip
    found = [np.asarray(texts(run.params, c)) for c in (cond, other, longer)]
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found[0], axis=1), 1.0, rtol=1e-5)
