"""Stands in for `jdiff train`: fake_point.py FOLDER NAME PLAN; writes what a run would write.

PLAN: words joined by "+", one an attempt, the last for all further ones: `done`, `fail` (code 1),
`mistake` (code 2), `die` (SIGKILL), `wait` (until SIGTERM; then saves and ends with 75), `meet`
(until another point is there too, then done).
"""

import json
import os
import pathlib
import signal
import sys
import time

folder, name, plan = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3].split("+")
run = folder / name
run.mkdir(exist_ok=True)
tries = run / "tries"
number = int(tries.read_text()) + 1 if tries.exists() else 1
tries.write_text(str(number))
act = plan[min(number, len(plan)) - 1]


def describe(state, step):
    (run / "config.json").write_text((folder / "points" / f"{name}.json").read_text())
    line = {"step": step, "kind": "train", "time": 1.5, "loss": 1.0 / number, "images_per_s": 10.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    part = run / "run.json.part"
    part.write_text(json.dumps({"state": state, "wall_seconds": 2.0}))
    part.replace(run / "run.json")


if act == "mistake":
    print("error: config.seed is no seed", file=sys.stderr)
    sys.exit(2)
describe("running", 5)
print(f"attempt {number} sees {os.environ.get('CUDA_VISIBLE_DEVICES')}", flush=True)
if act == "fail":
    describe("failed", 5)
    print("error: OSError: the disk is on fire", file=sys.stderr)
    print("       This should not happen.", file=sys.stderr)
    sys.exit(1)
if act == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "wait":

    def save(signum, frame):
        describe("stopped", 7)
        os._exit(75)

    signal.signal(signal.SIGTERM, save)
    (run / "ready").touch()
    while True:
        signal.pause()
if act == "meet":
    (run / "here").touch()
    until = time.monotonic() + 60
    while len(list(folder.glob("*/here"))) < 2:
        if time.monotonic() > until:
            sys.exit("nobody came")
        time.sleep(0.01)
describe("finished", 10)
(run / "evaluation.json").write_text(json.dumps({"settings": {"step": 10}, "metrics": []}))
