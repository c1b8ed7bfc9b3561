"""The report of a made-up cascade."""

import json
import pathlib
import re

import numpy as np
import pytest
import test_report
from test_report import Page

from jdiff import pictures, report, staged
from jdiff.config import to_json
from jdiff.errors import UserError
from jdiff.experiment import defaults
from jdiff.report.figures import number, signed

METRICS = [
    {"key": "frechet", "name": "Fréchet distance", "better": "lower", "about": "of features",
     "true": 9.0, "generated": 16.0, "gap": 7.0, "floor": 1.0, "ceiling": 121.0},
    {"key": "recall", "name": "Recall", "better": "higher", "about": "share",
     "true": 0.75, "generated": 0.5, "gap": -0.25, "floor": 1.0, "ceiling": 0.0},
]  # fmt: skip
PAIRS = {"num": 40, "window": 7, "rows": [
    {"key": "psnr", "name": "PSNR", "better": "higher", "about": "dB", "value": 21.25,
     "enlarged": 23.75}]}  # fmt: skip
USED = {"step": 60, "ema": "ema", "solver": {"name": "ddim"},
        "grid": {"name": "karras", "steps": 9}, "guidance": {"scale": 1.0},
        "threshold": None}  # fmt: skip


def evaluation() -> dict:
    base = [{**row, "true": None, "gap": None} for row in METRICS]
    return {
        "settings": {"name": "made", "num": 40, "seed": 3, "features": "pixels",
                     "reference": "training", "reference_images": 1437, "floor": "held-out",
                     "floor_images": 40},
        "seconds": {"sampling": 1.0, "total": 5.0},
        "stages": [
            {"stage": 0, "name": "a", "shape": [4, 4, 1], "settings": USED, "metrics": base,
             "pairs": None},
            {"stage": 1, "name": "b", "shape": [8, 8, 1], "metrics": METRICS, "pairs": PAIRS,
             "settings": {**USED, "aug_level": 0.25, "truncate": True}},
        ],
    }  # fmt: skip


def make(folder: pathlib.Path, *, begun: int = 2, evaluated: bool = True) -> pathlib.Path:
    stages = [defaults(), defaults()]
    for k, c in enumerate(stages):
        c.name = f"stage <{k}>"
        c.data.size = 4 * (k + 1)
    stages[1].low_res.factor = 2.0
    stages[1].low_res.augmentation = {"name": "gaussian"}
    stages[1].sampling.aug_level = 0.25
    staged.claim(folder, staged.config("digits & <co>", *stages))
    for k in range(begun):
        test_report.make(folder / f"stage{k}", steps=10, evaluated=False)
        (folder / f"stage{k}" / "config.json").write_text(to_json(stages[k]))
        data = test_report.RUN["data"] | {"shape": [4 * (k + 1), 4 * (k + 1), 1]}
        (folder / f"stage{k}" / "run.json").write_text(json.dumps(test_report.RUN | {"data": data}))
    if begun:
        (folder / "stage0" / "report.html").write_text("")
    if evaluated:
        (folder / "evaluation.json").write_text(json.dumps(evaluation()))
        (folder / "pictures").mkdir()
        for i, name in enumerate(("generated_0", "generated_1", "input_1", "sample_1", "truth_1")):
            image = pictures.grid(np.full((4, 8, 8, 1), 40 * i, np.uint8), columns=2)
            pictures.save(folder / "pictures" / f"{name}.png", image)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return make(tmp_path_factory.mktemp("cascades") / "made")


@pytest.fixture(scope="module")
def text(folder) -> str:
    path = report.write_cascade(folder)
    assert path == folder / "report.html"
    return path.read_text()


def test_every_stages_pictures_stand_side_by_side(text):
    page = Page(text)
    labels = [a["alt"] for a in page.all("img")]
    assert labels == ["Stage 0 · 4 × 4", "Stage 1 · 8 × 8", "Input, enlarged", "Sample", "Truth"]
    assert len({a["src"] for a in page.all("img")}) == 5


def rows(text: str) -> list[list[str]]:
    strip = lambda cell: " ".join(re.sub(r"<[^>]*>", " ", cell).split())
    return [
        [strip(cell) for cell in re.findall(r"<t[hd][ >].*?</t[hd]>", row, re.S)]
        for row in re.findall(r"<tr>.*?</tr>", text, re.S)
    ]


def test_the_table_holds_both_figures_and_their_gap(text):
    found = [row for row in rows(text) if row and row[0].startswith(("Fréchet", "Recall", "PSNR"))]
    assert [row[1:4] for row in found] == [
        ["–", "16.0", "–"], ["–", "0.500", "–"],
        ["9.00", "16.0", "+7.00"], ["0.750", "0.500", "−0.250"], ["21.2", "23.8", ""],
    ]  # fmt: skip
    assert found[2][4] == "121 1.00"
    assert (
        text.count('class="figure light worse"') == 2
    )  # a lower distance is better, a higher share


def test_the_bar_shows_what_true_input_would_add(text):
    widths = re.findall(r'class="fill( true)?" style="width:([\d.]+)%"', text)
    # By the root: (11 - 4) / (11 - 1) generated, (11 - 3) / (11 - 1) from true input.
    assert widths == [("", "70.00"), ("", "50.00"), (" true", "80.00"), ("", "70.00"),
                      (" true", "75.00"), ("", "50.00")]  # fmt: skip


def test_figures_of_the_last_stage_stand_at_the_top(text):
    cards = text[text.index('class="cards"') : text.index("<h2>")]
    for words in ("16.0", "held-out split 1.00", "+7.00", "from true input 9.00", "21.2 dB",
                  "the enlarged input 23.8 dB", "2.47 M", "all 2 stages",
                  "6 min 47 s"):  # fmt: skip
        assert words in cards, words
    assert number(7.0) in signed(7.0) and "4 × 4 → 8 × 8" in text
    assert "input augmented, level 0.25 · truncated" in text


def test_stages_have_a_row_a_loss_curve_and_a_link(text):
    page = Page(text)
    assert [a["href"] for a in page.all("a")] == ["stage0/report.html"]
    assert text.count('class="chart ') == 2
    for k in (0, 1):
        assert f'aria-label="loss of stage {k} over steps"' in text
    assert "gaussian, level 0.25 in sampling" in text


def test_it_is_one_file_that_loads_nothing(text):
    for _, attributes in Page(text).elements:
        for name in ("src", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "data:").startswith("data:"), attributes
    assert "@import" not in text and "url(" not in text and "fetch(" not in text
    assert "<co>" not in text and "digits &amp; &lt;co&gt;" in text


def test_what_is_not_there_yet_is_said(tmp_path):
    text = report.write_cascade(make(tmp_path / "c", begun=1, evaluated=False)).read_text()
    shots = [a["alt"] for a in Page(text).all("img")]
    assert shots == ["Stage 0 · 4 × 4, step 30"]  # the last picture of its training
    assert "1 waiting" in text and "1 finished" in text
    assert f"jdiff evaluate --workdir={tmp_path / 'c'}" in text and "<h2>Evaluation" not in text
    text = report.write_cascade(make(tmp_path / "d", begun=0, evaluated=False)).read_text()
    Page(text)
    assert "2 waiting" in text and "<svg" not in text


def test_the_report_of_a_stage_by_itself(folder):
    """With its figures against the truth, and a Python text that enlarges."""
    home = folder / "stage1"
    found = test_report.EVALUATION | {"pairs": PAIRS}
    (home / "evaluation.json").write_text(json.dumps(found))
    text = report.render(home)
    (home / "evaluation.json").unlink()
    page = Page(text)
    assert "21.2" in page.texts and "23.8" in page.texts and "Enlarged input" in page.texts
    assert "Means over 40 held-out images" in text and "input enlarged, sample, truth" in text
    shown = [t for t in page.texts if t.startswith("import jdiff")]
    assert shown and "generate.enlarged" in shown[0]
    assert "generate.enlarged" not in report.render(folder / "stage0")


def test_what_is_no_cascade(tmp_path):
    with pytest.raises(UserError, match="is not a cascade"):
        report.write_cascade(tmp_path)
    (tmp_path / "cascade.json").write_text('{"stages"')
    with pytest.raises(UserError, match=r"cascade\.json cannot be read"):
        report.write_cascade(tmp_path)
