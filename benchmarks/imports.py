"""What `import jdiff` costs over `import jax, flax`, and that it loads nothing heavy.

python benchmarks/imports.py
"""

import argparse
import subprocess
import sys
import time

from timing import table, verdict

HEAVY = ("tensorflow", "torch", "matplotlib", "sklearn", "scipy.stats", "orbax", "grain")


def seconds(statement: str) -> float:
    """Wall time of a fresh interpreter that runs `statement`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rounds", type=int, default=5, help="repetitions, the best counts (default 5)")
    a = p.parse_args()
    rivals = ("import jdiff", "import jax, flax")
    best = dict.fromkeys(rivals, float("inf"))
    for _ in range(a.rounds + 1):
        for statement in rivals:
            best[statement] = min(best[statement], seconds(statement))
    code = f"import jdiff, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    ratio = best["import jdiff"] / best["import jax, flax"]
    table(
        "import",
        [
            ("import jdiff / import jax, flax", f"{ratio:.2f}", "1.5", verdict(ratio, 1.5)),
            ("heavy modules loaded", loaded.stdout.strip(), "[]",
             "ok" if loaded.stdout.strip() == "[]" else "MISSED"),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
