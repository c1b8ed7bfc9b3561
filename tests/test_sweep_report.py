"""The report of made-up sweeps: figures, groups over seeds, what is best, page and tables."""

import csv
import html
import io
import json
import pathlib
import re

import numpy as np
import pytest
from scipy import stats

from jdiff import cli, pictures
from jdiff.errors import UserError
from jdiff.experiment import defaults
from jdiff.launching import attempts, folder
from jdiff.launching.points import Point, names, product
from jdiff.report import sweep_charts, sweep_page
from jdiff.report.seeds import spread
from jdiff.report.sweep_facts import gather_sweep

RATES = (1e-3, 1e-2, 1e-1)
#: The Frechet distance by learning rate and seed, and the share of labels found.
FRECHET = {1e-3: (8.0, 9.0, 10.0), 1e-2: (4.0, 6.0, 5.0), 1e-1: (3.0, 30.0, 12.0)}
ACCURACY = {1e-3: (0.2, 0.3, 0.4), 1e-2: (0.5, 0.6, 0.5), 1e-1: (0.9, 0.9, 0.95)}


def config(overrides):
    c = defaults()
    c.train.steps = 40
    with c.unlocked():
        c.optimizer.learning_rate = overrides.get("optimizer.learning_rate", 1e-3)
        c.seed = overrides.get("seed", 0)
    return c


def finish(path: pathlib.Path, frechet: float, accuracy: float, *, num: int = 100) -> None:
    """The files of a run that has ended."""
    (path / "samples").mkdir(parents=True)
    overrides = json.loads((path.parent / "points" / f"{path.name}.json").read_text())
    (path / "config.json").write_text(json.dumps(overrides))
    (path / "run.json").write_text(json.dumps({"state": "finished", "wall_seconds": 60.0}))
    lines = [{"step": 10 * i, "kind": "train", "loss": frechet / i, "time": i,
              "images_per_s": (1.0, 40.0, 60.0, 70.0)[i - 1]}
             for i in range(1, 5)]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    image = np.full((4, 8, 8, 1), int(frechet) % 256, np.uint8)
    pictures.save(path / "samples" / "step_00000040.png", pictures.grid(image, columns=2))
    row = {"key": "frechet", "name": "Fréchet distance", "better": "lower", "about": "",
           "value": frechet, "floor": 1.0, "ceiling": 90.0}  # fmt: skip
    evaluation = {"settings": {"step": 40, "num": num}, "metrics": [row], "classifier": {
        "accuracy": accuracy, "test_accuracy": 0.99, "per_class": []}}  # fmt: skip
    (path / "evaluation.json").write_text(json.dumps(evaluation))
    (path / "report.html").write_text("its own")


def make(workdir: pathlib.Path, points, *, finished=lambda overrides: True) -> folder.Sweep:
    rows = [Point(name, o, config(o)) for name, o in zip(names(points), points)]
    sweep = folder.claim(workdir, "configs/<x>.py", rows, command=["sweep", "--config=a b.py"])
    for point in rows:
        if finished(point.overrides):
            rate, seed = point.overrides["optimizer.learning_rate"], point.overrides.get("seed", 0)
            finish(workdir / point.name, FRECHET[rate][seed], ACCURACY[rate][seed])
    return sweep


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    """Three learning rates with three seeds, all finished."""
    path = tmp_path_factory.mktemp("sweeps") / "lr"
    make(path, product({"optimizer.learning_rate": RATES, "seed": range(3)}))
    return path


@pytest.fixture
def partly(tmp_path) -> pathlib.Path:
    """The same, with one point failed, one cut off, and the rest of 0.1 not begun."""
    path = tmp_path / "lr"
    make(path, product({"optimizer.learning_rate": RATES, "seed": range(3)}),
         finished=lambda o: o["optimizer.learning_rate"] < 0.1 and o["seed"] < 2)  # fmt: skip
    failed, cut = "02_lr=0.001_seed=2", "05_lr=0.01_seed=2"
    for name in (failed, cut):
        (path / name).mkdir()
        text = (path / "points" / f"{name}.json").read_text()
        (path / name / "config.json").write_text(text)
        line = {"step": 7, "kind": "train", "loss": 0.001, "images_per_s": 50.0, "time": 3}
        (path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (path / name / "run.json").write_text(json.dumps({"state": "stopped"}))
    attempts.write(path, failed, attempts.Note(code=1, ended=5.0))
    log = attempts.log_of(path, failed)
    log.parent.mkdir()
    log.write_text("# attempt 1\nerror: no <space> left\n")
    return path


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_interval_is_students(n):
    values = list(np.random.default_rng(n).normal(3.0, 2.0, n))
    made = spread(values)
    theirs = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (made.n, made.mean) == (n, pytest.approx(np.mean(values)))
    assert made.deviation == pytest.approx(np.std(values, ddof=1))
    assert (made.low, made.high) == pytest.approx((theirs.low, theirs.high))
    assert made.half == pytest.approx((theirs.high - theirs.low) / 2)


def test_one_seed_has_no_interval_and_none_has_no_mean():
    assert spread([4.0]) == (1, 4.0, None, None, None) and spread([4.0]).half is None
    assert spread([]) is None


def test_the_interval_holds_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(1.0, 3.0, (2000, 4))
    held = [made.low <= 1.0 <= made.high for made in map(spread, draws.tolist())]
    assert abs(np.mean(held) - 0.95) < 0.02  # of the normal's 1.96 it would be 0.86


def test_points_that_differ_by_seed_alone_are_one_setting(whole):
    facts = gather_sweep(whole)
    assert facts.fields == ["optimizer.learning_rate"] and facts.seeded
    order = [group.overrides["optimizer.learning_rate"] for group in facts.groups]
    assert order == [1e-2, 1e-3, 1e-1]  # by their means: 5, 9, 15
    for group in facts.groups:
        values = FRECHET[group.overrides["optimizer.learning_rate"]]
        assert group.spreads["frechet"] == pytest.approx(spread(values))
    assert facts.best.name == "06_lr=0.1_seed=0"  # 3.0, though its setting is the worst


def test_a_metric_of_which_more_is_better(whole):
    facts = gather_sweep(whole, "accuracy")
    assert [m.key for m in facts.metrics] == ["accuracy", "frechet", "loss"]
    assert facts.best.name == "08_lr=0.1_seed=2"
    assert facts.groups[0].overrides == {"optimizer.learning_rate": 0.1}
    assert gather_sweep(whole, "loss").best.name == "06_lr=0.1_seed=0"
    with pytest.raises(UserError, match="--metric 'frechte' is not known. Did you mean 'frechet'?"):
        gather_sweep(whole, "frechte")


def read(text: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_table_of_points(partly):
    rows = read(sweep_page.points_csv(gather_sweep(partly)))
    assert [row["point"][:2] for row in rows] == [f"{i:02}" for i in range(9)]
    assert [row["state"] for row in rows] == [
        "finished", "finished", "failed", "finished", "finished", "stopped", *["waiting"] * 3,
    ]  # fmt: skip
    assert rows[3]["frechet"] == "4.0" and rows[3]["accuracy"] == "0.5"
    assert (rows[3]["optimizer.learning_rate"], rows[3]["seed"]) == ("0.01", "0")
    assert [row["best"] for row in rows] == ["1" if i == 3 else "0" for i in range(9)]
    assert rows[2]["error"] == "no <space> left" and rows[2]["step"] == "7"
    assert rows[3]["seconds"] == "60.0" and rows[3]["images_per_s"] == "50.0"


def test_the_table_of_settings_counts_what_is_finished(partly):
    rows = read(sweep_page.seeds_csv(gather_sweep(partly)))
    assert [row["optimizer.learning_rate"] for row in rows] == ["0.01", "0.001", "0.1"]
    assert [(row["points"], row["frechet_n"]) for row in rows] == [
        ("3", "2"),
        ("3", "2"),
        ("3", ""),
    ]
    assert float(rows[0]["frechet_mean"]) == 5.0
    assert float(rows[0]["frechet_deviation"]) == pytest.approx(np.sqrt(2.0))
    # The loss of the point that was cut off is the lowest of all, and counts for nothing.
    assert rows[0]["loss_n"] == "2"
    assert gather_sweep(partly, "loss").best.name == "03_lr=0.01_seed=0"


class Page:
    """The page's text, with its table as lists of texts."""

    def __init__(self, path: pathlib.Path, metric: str | None = None):
        self.text = sweep_page.render_sweep(gather_sweep(path, metric), path)
        strip = lambda cell: " ".join(html.unescape(re.sub(r"<[^>]*>", " ", cell)).split())
        table = self.text[self.text.index('id="points"') : self.text.index("</table>")]
        self.rows = [
            [strip(cell) for cell in re.findall(r"<t[hd][ >].*?</t[hd]>", row, re.S)]
            for row in re.findall(r"<tr.*?</tr>", table, re.S)
        ]
        self.sort = [re.findall(r'data-sort="([^"]*)"', row)
                     for row in re.findall(r"<tr.*?</tr>", table, re.S)]  # fmt: skip


def test_one_table_holds_settings_and_points(whole):
    page = Page(whole)
    assert page.rows[0] == ["point", "learning_rate", "seed", "state", "Fréchet distance",
                            "Intended class found", "Loss", "images/s", "time"]  # fmt: skip
    assert page.rows[1][:5] == ["learning_rate 0.01 best mean", "0.01", "n = 3",
                                "3 finished", "5.00 ± 2.5"]  # fmt: skip
    assert [row[0] for row in page.rows[2:5]] == [
        "03_lr=0.01_seed=0", "05_lr=0.01_seed=2", "04_lr=0.01_seed=1",
    ]  # fmt: skip
    best = [row[0] for row in page.rows if row[0].endswith(" best")]
    assert best == ["06_lr=0.1_seed=0 best"]
    assert page.sort[2] == ["0.01", "0", "finished", "4.0", "0.5", page.sort[2][5], "50.0", "60.0"]


def test_what_is_not_finished_tells_how_far_it_is_and_why(partly):
    page = Page(partly)
    by_name = {row[0].split()[0]: row for row in page.rows}
    assert by_name["02_lr=0.001_seed=2"][0].endswith("no <space> left")
    assert by_name["02_lr=0.001_seed=2"][3] == "failed 7 of 40"
    assert by_name["05_lr=0.01_seed=2"][3] == "stopped 7 of 40"
    assert by_name["06_lr=0.1_seed=0"][3] == "waiting 0 of 40"
    assert "no &lt;space&gt; left" in page.text and "no <space> left" not in page.text
    for words in ("4 finished", "3 waiting", "1 failed", "1 stopped", "configs/&lt;x&gt;.py"):
        assert words in page.text


def test_a_damaged_point_hides_none_of_the_others(partly):
    (partly / "04_lr=0.01_seed=1" / "evaluation.json").write_text('{"metrics": [')
    facts = gather_sweep(partly)
    assert [row.status.state for row in facts.rows[3:5]] == ["finished", "failed"]
    assert "evaluation.json is damaged" in facts.rows[4].status.error
    assert facts.groups[0].spreads["frechet"] == spread([4.0])


def test_the_page_is_one_file_that_loads_nothing(whole):
    text = Page(whole).text
    for found in re.findall(r'(?:src|srcset|poster|action)="([^"]*)"', text):
        assert found.startswith("data:"), found
    links = re.findall(r'href="([^"]*)"', text)  # to the points' own reports, beside it
    assert sorted(links) == [f"{name}/report.html" for name in folder.read(whole).points]
    assert "@import" not in text and "url(" not in text and "fetch(" not in text
    assert text.count("data:image/png;base64,") == 9
    assert "prefers-color-scheme: dark" in text


def test_charts_hold_every_point(whole):
    text = Page(whole).text
    data = json.loads(html.unescape(re.search(r'data-curves="([^"]*)"', text).group(1)))
    assert sorted(name for name, _ in data) == sorted(folder.read(whole).points)
    curves = dict(data)
    assert [point[2] for point in curves["03_lr=0.01_seed=0"]] == [10, 20, 30, 40]
    assert curves["03_lr=0.01_seed=0"][0][3] == 4.0
    setting = text[text.index('class="chart settings"') :]
    setting = setting[: setting.index("</svg>")]
    assert setting.count('class="seed"') == 9 and setting.count('class="mean"') == 3
    assert setting.count('class="interval"') == 3
    field = text[text.index('aria-label="Fréchet distance over learning_rate"') :]
    assert field[: field.index("</svg>")].count("<circle") == 9


def test_lower_is_further_left_and_dots_lie_at_their_values():
    bars = [sweep_charts.Bar("a", "red", [1.0, 3.0], spread([1.0, 3.0]), True),
            sweep_charts.Bar("b", "red", [5.0], spread([5.0]), False)]  # fmt: skip
    svg = sweep_charts.by_setting(bars, "x")
    at = [float(x) for x in re.findall(r'class="seed" cx="([\d.]+)"', svg)]
    assert at[1] - at[0] == pytest.approx(at[2] - at[1], abs=0.2) and at[0] < at[1]
    means = [float(x) for x in re.findall(r'class="mean" x1="([\d.]+)"', svg)]
    assert means == pytest.approx([(at[0] + at[1]) / 2, at[2]], abs=0.2)


def test_points_evaluated_otherwise_are_named(tmp_path):
    points = product({"optimizer.learning_rate": RATES[:2]})
    sweep = make(tmp_path / "s", points, finished=lambda o: False)
    for name, num in zip(sweep.points, (100, 500)):
        finish(tmp_path / "s" / name, 3.0, 0.5, num=num)
    assert gather_sweep(tmp_path / "s").uneven == ["num: 100, 500"]
    assert "Not evaluated alike" in Page(tmp_path / "s").text


def test_without_seeds_a_point_is_a_row(tmp_path):
    make(tmp_path / "s", product({"optimizer.learning_rate": RATES}))
    page = Page(tmp_path / "s")
    assert len(page.rows) == 4 and "seed" not in page.rows[0]
    assert "by setting</button>" not in page.text
    words = sweep_page.write_sweep(tmp_path / "s")
    assert [path.name for path in words] == ["report.html", "report.csv"]


def test_a_sweep_of_which_nothing_has_begun_has_a_report(tmp_path):
    make(tmp_path / "s", product({"seed": (0, 1)}), finished=lambda o: False)
    page = Page(tmp_path / "s")
    assert "2 waiting" in page.text and "<svg" not in page.text


def test_the_command_writes_the_page_and_the_tables(whole, tmp_path, capsys):
    assert cli.main(["report", f"--workdir={whole}", f"--out={tmp_path / 'r.html'}"]) == 0
    said = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"r.html", "r.csv", "r_seeds.csv"}
    assert "r.html" in said and "r.csv" in said and "r_seeds.csv" in said
    assert "jdiff sweep &#39;--config=a b.py&#39;" in (tmp_path / "r.html").read_text()
    run = whole / "03_lr=0.01_seed=0"
    assert cli.main(["report", f"--workdir={run}", "--metric=loss"]) == 2
    assert "--metric is for a sweep's folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_commands_of_a_run_name_the_points_of_a_sweep(whole, capsys, command):
    assert cli.main([command, f"--workdir={whole}"]) == 2
    said = capsys.readouterr().err
    assert "is a sweep; name one of its points, as --workdir=" in said
    assert "00_lr=0.001_seed=0, 01_lr=0.001_seed=1" in said and "and 1 more" in said


def test_the_config_shown_is_what_all_points_share(whole):
    common = dict(gather_sweep(whole).common)
    assert common["train.steps"] == 40 and common["optimizer.name"] == "adam"
    assert "seed" not in common and "optimizer.learning_rate" not in common
