"""The report's section on time: bars, the bottleneck and what to do about it."""

import json
import re

import pytest

from jdiff import report
from jdiff.config import to_json
from jdiff.experiment import defaults
from jdiff.report.timing import bottleneck, traced_bottleneck

TRACE = {
    "steps": [11, 12, 13, 14], "devices": 4, "seconds": 0.2, "hidden": 0.004,
    "split": {"compute": 0.1, "collectives": 0.06, "transfers": 0.0, "gaps": 0.01, "input": 0.02,
              "checkpoint": 0.0, "samples": 0.0, "logging": 0.0, "compile": 0.0, "host": 0.01},
    "collectives": {"all-gather": 0.05, "all-reduce": 0.014},
    "dearest": [
        {"name": "fusion.1", "doing": "dot_general, <backward>", "place": "Linear (layers.py:43)",
         "kind": "compute", "seconds": 0.05, "count": 112.0},
        {"name": "all-gather.3", "doing": "", "place": "", "kind": "collective", "seconds": 0.025,
         "count": 6.0},
    ],
}  # fmt: skip


def config():
    c = defaults()
    c.data.threads = 3
    return {
        "data.threads": c.data.threads, "train.checkpoint_every": 500, "train.sample_every": 1500,
        "sampling.grid.steps": 18, "train.log_every": 50,
    }  # fmt: skip


def make(folder, *, trace=None, spent=()):
    folder.mkdir()
    (folder / "config.json").write_text(to_json(defaults()))
    (folder / "run.json").write_text(
        json.dumps(
            {"devices": ["gpu NVIDIA H200"] * 4, "speed": {"flops": 659554304, "peak": 1e12}}
        )
    )
    lines = [{"step": 50, "loss": 1.0, "images_per_s": 1000.0, "images_per_s_chip": 250.0,
              "mfu": 0.412}, *spent]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if trace:
        (folder / "profile").mkdir()
        (folder / "profile" / "summary.json").write_text(json.dumps(trace))
    return report.render(folder)


def widths(text):
    """The parts of every bar: (class, %)."""
    bars = re.findall(r'<div class="stack".*?</div>', text, re.DOTALL)
    return [
        [(c, float(w)) for c, w in re.findall(r'class="(c-\w+)" style="width:([\d.]+)%"', bar)]
        for bar in bars
    ]


def test_the_lines_of_a_run_and_its_resumed_parts_are_added_up(tmp_path):
    spent = [
        {"step": 50, "kind": "spent", "time": 9.0, "steps": 5.0, "input": 3.0, "start": 1.0},
        {"step": 50, "kind": "spent", "time": 9.5, "checkpoint": 0.5},
        {"step": 100, "kind": "spent", "time": 3.0, "steps": 9.0, "start": 1.5},
    ]
    text = make(tmp_path / "run", spent=spent)
    (bar,) = widths(text)
    assert bar == [("c-compute", 70.0), ("c-input", 15.0), ("c-checkpoint", 2.5), ("c-start", 12.5)]
    assert "After the start 17.1 % of the time goes into waiting for data" in text
    assert "20 s of wall time" in text


def test_a_trace_has_a_bar_and_its_operations(tmp_path):
    text = make(tmp_path / "run", trace=TRACE)
    (bar,) = widths(text)
    assert bar == [
        ("c-compute", 50.0), ("c-collectives", 30.0), ("c-gaps", 5.0), ("c-input", 10.0),
        ("c-other", 5.0),
    ]  # fmt: skip
    assert "11 to 14, 50.0 ms a step, mean of 4 devices; 1.00 ms of collectives" in text
    assert "dot_general, &lt;backward&gt;" in text and "Linear (layers.py:43) · fusion.1" in text
    assert ">28<" in text and ">12.5 ms<" in text and "25.0 %" in text
    assert ">1.50<" in text  # calls of the gather, a step


def test_a_run_without_either_has_no_such_section(tmp_path):
    assert "<h2>Time</h2>" not in make(tmp_path / "run")


def test_speed_stands_with_what_it_means_for_a_chip(tmp_path):
    text = make(tmp_path / "run")
    assert "median, 250 a chip, MFU 41.2 %" in text
    assert "at best MFU 41.2 %" in text
    assert "6.596e+08" in text and "1e+12 at best" in text


@pytest.mark.parametrize(
    ("spent", "words"),
    [
        ({"input": 38}, "38.0 % of the time goes into waiting for data, while no step runs: more "
         "config.data.threads (3 now)"),
        ({"checkpoint": 30, "input": 8}, "config.train.checkpoint_every (500 now)"),
        ({"samples": 30}, "config.train.sample_every (1,500 now), or fewer config.sampling.grid."
         "steps (18 now)"),
        ({"logging": 6}, "config.train.log_every (50 now)"),
        ({"other": 10}, "jdiff train --profile"),
        ({"input": 4, "checkpoint": 1}, "95.0 % of the time goes into the training steps"),
        ({"profile": 20}, "After the start 100 % of the time goes into the training steps"),
        # What comes once hides nothing of what comes again and again.
        ({"compile": 40, "start": 40, "input": 10}, "After the start 50.0 % of the time goes into "
         "waiting for data"),
        ({"compile": 40, "start": 40, "input": 10}, "The start is 80.0 % of all"),
        ({"start": 100}, "The start is 100 % of all"),
    ],
)  # fmt: skip
def test_the_bottleneck_of_a_run_is_named_with_what_to_do(spent, words):
    sentence = bottleneck({"steps": 100 - sum(spent.values())} | spent, config())
    assert words in sentence
    assert "{" not in sentence


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "30.0 % of the time in collectives that nothing hides, most of it all-gather"),
        ({"collectives": 0.0, "compute": 0.16}, "10.0 % of the time waiting for data"),
        ({"gaps": 0.07, "collectives": 0.0}, "between the operations"),
        ({"compute": 0.18, "collectives": 0.0, "input": 0.0},
         "A device computes 90.0 % of the time; the dearest operation takes 25.0 %"),
    ],
)  # fmt: skip
def test_the_bottleneck_of_a_trace_is_named(more, words):
    assert words in traced_bottleneck(TRACE | {"split": TRACE["split"] | more})
