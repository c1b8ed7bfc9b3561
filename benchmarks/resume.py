"""From the command to the first step: a resumed run beside a fresh one, programs in the cache.

    python benchmarks/resume.py
    python benchmarks/resume.py --config=configs/digits.py --rounds=5

Three starts of a process, timed until the first step's line is in metrics.jsonl: cold (nothing in
the cache of compiled programs), warm (a new run, everything in the cache), resumed (a run that was
stopped, everything in the cache). The warm and the resumed one take turns; the best of --rounds.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import timing

from jdiff import exits

ROOT = pathlib.Path(__file__).parent.parent


def first_step(config: pathlib.Path, workdir: pathlib.Path, cache: pathlib.Path) -> float:
    """Seconds from the start of `jdiff train` until its first step is told of; then stops it."""
    words = [
        sys.executable, "-m", "jdiff.cli", "train", f"--config={config}", f"--workdir={workdir}",
        "--no-evaluate", "--config.train.log_every=1", f"--config.cache_dir={cache}",
    ]  # fmt: skip
    before, began = told(workdir), time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and told(workdir) == before:
        time.sleep(0.002)
    seconds = time.perf_counter() - began
    process.terminate()  # as a scheduler does: it saves, and is to be started again
    if process.wait() != exits.REQUEUE:
        sys.exit(f"training ended with {process.returncode}: {' '.join(words)}")
    return seconds


def told(workdir: pathlib.Path) -> int:
    """The last step in metrics.jsonl."""
    try:
        return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--config", type=pathlib.Path, default=ROOT / "configs" / "digits.py")
    p.add_argument("--rounds", type=int, default=3, help="repetitions (default 3)")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        cold = first_step(a.config, folder / "run", folder / "cache")
        warm, resumed = [], []
        for i in range(a.rounds):
            warm.append(first_step(a.config, folder / f"new{i}", folder / "cache"))
            resumed.append(first_step(a.config, folder / "run", folder / "cache"))
    ratio = min(resumed) / min(warm)
    timing.table(
        f"To the first step, {a.config.name}",
        [
            ("a new run, nothing in the cache", f"{cold:.1f} s", "", ""),
            ("a new run, programs in the cache", f"{min(warm):.1f} s", "", ""),
            ("a resumed run, programs in the cache", f"{min(resumed):.1f} s, {ratio:.2f} times",
             "1.5", timing.verdict(ratio, 1.5)),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
