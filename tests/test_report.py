"""The report of made-up run directories."""

import html.parser
import json
import pathlib
import re

import numpy as np
import pytest

from jdiff import pictures, report
from jdiff.config import to_json
from jdiff.errors import UserError
from jdiff.experiment import defaults
from jdiff.report import charts, figures
from jdiff.report.facts import gather

RUN = {
    "name": "digits", "state": "finished", "wall_seconds": 203.4, "parameters": 1_234_567,
    "argv": ["train", "--config=configs/digits.py", "--workdir=my runs/digits"],
    "devices": ["cpu cpu"], "cpu_count": 2, "started": 1795000000.0,
    "versions": {"python": "3.11.7", "jax": "0.10.2"},
    "data": {"name": "digits", "split": "train", "shape": [8, 8, 1], "num_classes": 10,
             "label_names": list("0123456789"), "size": 1437},
}  # fmt: skip


def metric(key: str, name: str, value: float, floor: float, ceiling: float) -> dict:
    return {"key": key, "name": name, "value": value, "floor": floor,
            "ceiling": ceiling, "better": "lower", "about": "about " + name}  # fmt: skip


EVALUATION = {
    "settings": {"num": 2000, "step": 60, "ema": "ema", "seed": 0, "features": "classifier",
                 "solver": {"name": "ddim", "eta": 0.5}, "grid": {"name": "karras", "steps": 18},
                 "guidance": {"scale": 2.0, "interval": None, "rescale": None}},
    "seconds": {"total": 31.2},
    "metrics": [metric("frechet", "Fréchet distance", 4.0, 1.0, 100.0),
                metric("precision", "Precision", 0.75, 1.0, 0.5)],
    "classifier": {"accuracy": 0.9861, "test_accuracy": 0.9833, "per_class": [
        {"label": k, "name": f"<{k}>", "share": 1 - k / 100, "num": 200} for k in range(10)]},
}  # fmt: skip


def make(folder: pathlib.Path, *, steps: int = 6, evaluated: bool = True, shots: int = 3) -> None:
    config = defaults()
    config.name = "digits & <co>"
    config.train.steps = 60
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config))
    (folder / "run.json").write_text(json.dumps(RUN))
    lines = [
        {"step": 10 * i, "kind": "train", "time": i * 0.5, "loss": 1.0 / i, "grad_norm": 0.5,
         "learning_rate": 1e-3, "images_per_s": 100.0 * i}
        for i in range(1, steps + 1)
    ]  # fmt: skip
    lines.append({"step": 10 * steps, "kind": "evaluation", "frechet": 4.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for i in range(shots):
        image = pictures.grid(np.full((4, 8, 8, 1), 40 * i % 256, np.uint8), columns=2)
        pictures.save(folder / "samples" / f"step_{10 * (i + 1):08d}.png", image)
    if evaluated:
        (folder / "evaluation.json").write_text(json.dumps(EVALUATION))


class Page(html.parser.HTMLParser):
    """Checks that elements are closed in order; collects texts, attributes and elements."""

    VOID = {"meta", "img", "input", "br", "line", "circle", "path", "link"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script") and data.strip():
            self.texts.append(" ".join(data.split()))

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("runs") / "digits"
    make(path)
    return path


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page(report.render(folder))


def test_it_is_one_file_that_loads_nothing(folder, page):
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "data:").startswith("data:"), attributes
    text = report.render(folder)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style and "url(" not in style
    assert not page.all("link") and all(not a for a in page.all("script"))
    assert "fetch(" not in text and "XMLHttpRequest" not in text


def test_the_figures_are_those_of_the_files(page):
    for text in ("4.00", "1.00", "100", "0.750", "0.500",  # the metrics, floors and ceilings
                 "98.6 %",  # the classifier
                 "60", "1.23 M", "3 min 23 s", "400",  # steps, parameters, wall time, images/s
                 "0.10.2", "3.11.7"):  # fmt: skip
        assert text in page.texts, text
    assert "in held-out images 98.3 %" in page.texts
    words = ("2,000 samples", "checkpoint 60", "weights ema", "ddim (eta 0.5)", "karras, 18 steps",
             "guidance scale 2", "features: classifier", "seed 0")  # fmt: skip
    assert any(" · ".join(words) in text for text in page.texts)


def test_bars_stand_where_the_value_lies(page):
    widths = [a["style"] for a in page.all("span") if a.get("class") == "fill"]
    # Frechet by its root: (10 - 2) / (10 - 1); precision: (0.75 - 0.5) / (1 - 0.5); then classes.
    assert widths[:2] == ["width:88.89%", "width:50.00%"]
    assert widths[2:] == [f"width:{100 - k}.00%" for k in range(10)]


def test_texts_of_the_run_are_escaped(folder, page):
    assert "digits & <co>" in page.texts and "<3>" in page.texts
    assert "<co>" not in report.render(folder)


def test_samples_over_training(page):
    shots = [a for a in page.all("img") if a["src"].startswith("data:image/png;base64,")]
    assert len(shots) == 4 and shots[0]["src"] == shots[-1]["src"]  # the large one is the last
    assert len({a["src"] for a in shots}) == 3
    picture = pictures.grid(np.zeros((4, 8, 8, 1), np.uint8), columns=2)
    assert (int(shots[0]["height"]), int(shots[0]["width"])) == picture.shape[:2]
    assert [a["data-step"] for a in page.all("button") if "data-step" in a] == ["10", "20", "30"]


def test_charts_hold_the_points_of_the_file(page):
    points = [json.loads(a["data-points"]) for a in page.all("svg")]
    assert len(points) == 5  # the loss for wide and narrow pages, and three more
    assert [p[2:] for p in points[0]] == [[10 * i, float(f"{1 / i:.4g}")] for i in range(1, 7)]
    assert [p[3] for p in points[-1]] == [100.0 * i for i in range(1, 7)]
    heights = [p[1] for p in points[0]]
    assert heights == sorted(heights)  # a falling loss goes down the screen


def test_commands_can_be_pasted(page):
    assert "jdiff train --config=configs/digits.py '--workdir=my runs/digits'" in page.texts
    code = next(text for text in page.texts if text.startswith("import jax"))
    assert "jdiff.load_run(" in code and "% 10" in code


def test_the_python_that_it_shows_compiles(folder):
    text = re.search(r"<code>(import jax.*?)</code>", report.render(folder), re.DOTALL).group(1)
    compile(html.unescape(text), "report", "exec")


def test_every_field_of_the_config_is_there(folder, page):
    for name, _ in gather(folder).config:
        assert name in page.texts


@pytest.mark.parametrize("steps", [0, 1, 2, 50])
def test_a_run_that_goes_on_has_a_report(tmp_path, steps):
    make(tmp_path / "run", steps=steps, evaluated=False, shots=min(steps, 1))
    text = json.dumps(RUN | {"state": "running"} | {"wall_seconds": None})
    (tmp_path / "run" / "run.json").write_text(text)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 990, "lo')  # being written
    page = Page(report.render(tmp_path / "run"))
    assert "training" in page.texts
    assert any(text.startswith("jdiff evaluate") for text in page.texts)
    assert ("No step has been logged yet." in page.texts) == (steps == 0)
    assert "990" not in page.texts


def test_a_directory_with_nothing_but_a_config(tmp_path):
    (tmp_path / "config.json").write_text(to_json(defaults()))
    page = Page(report.render(tmp_path))
    assert "not begun" in page.texts and tmp_path.name in page.texts


def test_a_loss_that_is_no_number_is_left_out(tmp_path):
    make(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 70, "loss": NaN, "images_per_s": Infinity}\n')
    assert Page(report.render(tmp_path / "run")).all("svg")


def test_negative_losses_get_a_linear_axis(tmp_path):
    make(tmp_path / "run", steps=0)
    lines = [{"step": i, "loss": -float(i)} for i in range(1, 20)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    assert "log scale" not in Page(report.render(tmp_path / "run")).texts


def test_many_pictures_are_thinned_evenly(tmp_path):
    make(tmp_path / "run", shots=45)
    steps = [picture.step for picture in gather(tmp_path / "run").pictures]
    assert len(steps) == 12 and steps[0] == 10 and steps[-1] == 450
    assert all(30 <= b - a <= 50 for a, b in zip(steps, steps[1:]))


def test_of_many_classes_the_lowest_are_shown(tmp_path):
    make(tmp_path / "run")
    per_class = [
        {"label": k, "name": f"class {k}", "share": (k * 7 % 100) / 100, "num": 5}
        for k in range(100)
    ]
    evaluation = EVALUATION | {"classifier": EVALUATION["classifier"] | {"per_class": per_class}}
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(evaluation))
    page = Page(report.render(tmp_path / "run"))
    names = [text for text in page.texts if text.startswith("class ")]
    assert names == [f"class {k}" for k in sorted(range(100), key=lambda k: k * 7 % 100)[:20]]


def test_write_replaces_the_file_at_once(folder, tmp_path):
    path = report.write(folder, tmp_path / "r.html")
    assert path == tmp_path / "r.html"
    assert [f.name for f in tmp_path.iterdir()] == ["r.html"]
    with pytest.raises(UserError, match="cannot be written"):
        report.write(folder, tmp_path / "missing" / "r.html")


@pytest.mark.parametrize("text", ['{"a": ', "[1, 2]", ""])
@pytest.mark.parametrize("damage", ["config.json", "run.json", "evaluation.json"])
def test_a_damaged_file_is_named(tmp_path, damage, text):
    make(tmp_path / "run")
    (tmp_path / "run" / damage).write_text(text)
    with pytest.raises(UserError, match=damage):
        report.render(tmp_path / "run")


@pytest.mark.parametrize(
    "value,text",
    [
        (None, "–"), (float("nan"), "–"), (0.0, "0"), (1437, "1,437"), (1480.2, "1,480"),
        (12.345, "12.3"), (0.98765, "0.988"), (0.00182, "0.00182"), (2.5e-7, "2.50e−7"),
        (-0.0001, "−0.000100"), (999.96, "1,000"), (float("inf"), "∞"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert figures.number(value) == text


def test_only_all_is_100_percent():
    assert [figures.signed(x) for x in (1.25, -0.5, 0.0, None)] == ["+1.25", "−0.500", "0", "–"]
    assert figures.percent(1.0) == "100 %"
    assert figures.percent(0.99999) == "99.9 %"
    assert figures.percent(0.955) == "95.5 %"
    assert figures.percent(0.0) == "0.0 %"


@pytest.mark.parametrize(
    "seconds,text",
    [(None, "–"), (4.21, "4.2 s"), (42.4, "42 s"), (200, "3 min 20 s"), (59.9, "1 min 00 s"),
     (7500, "2 h 05 min"), (3599.8, "1 h 00 min")],
)  # fmt: skip
def test_durations(seconds, text):
    assert figures.duration(seconds) == text


def test_axis_numbers():
    shown = [figures.short(v) for v in (0, 500, 1000, 2500, 3e6, 0.01, 1e-5, 5e-4, -2.5)]
    assert shown == ["0", "500", "1k", "2.5k", "3M", "0.01", "1e-5", "5e-4", "-2.5"]


def test_ticks():
    assert charts.linear_ticks(0, 1) == [0, 0.5, 1]
    assert charts.linear_ticks(0, 4000, 8) == [500.0 * i for i in range(9)]
    assert charts.linear_ticks(0, 2700, cover=True) == [0, 1000, 2000, 3000]
    assert charts.linear_ticks(3, 3) == [3]
    assert charts.log_ticks(0.001, 10) == [0.001, 0.01, 0.1, 1, 10]
    assert charts.log_ticks(0.2, 2.2) == pytest.approx([0.2, 0.5, 1, 2])
    assert len(charts.log_ticks(0.5, 0.52)) >= 2
    assert len(charts.log_ticks(1e-12, 1e3)) <= 9


def test_smoothing():
    assert charts.smooth([2.0] * 40) == pytest.approx([2.0] * 40)
    assert charts.smooth([1.0, 3.0], share=0.01) == [1.0, 3.0]
    rough = [1.0, -1.0] * 500
    assert max(map(abs, charts.smooth(rough)[100:])) < 0.1


def test_thinning_keeps_both_ends():
    points = charts.thin(range(5000), range(5000))
    assert points[0] == (0, 0) and points[-1] == (4999, 4999) and len(points) == 600
    assert charts.thin([1, 2], [3, 4]) == [(1, 3), (2, 4)]
