"""The assessment of a contrastive run: retrieval among pictures and captions it has not seen."""

import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jdiff import real, runs
from jdiff.assess import enough, write
from jdiff.contrastive.retrieval import chance, recall, same
from jdiff.data import sources
from jdiff.errors import UserError, choose
from jdiff.experiment import to_float
from jdiff.parallel import hosts
from jdiff.yardstick import told

# What begins the key of a figure, what is sought, and by what.
_WAYS = (("", "caption", "picture"), ("text_", "picture", "caption"))


def check(config: Any) -> None:
    """Refuses a config that `assess` could not follow.

    Raises:
      UserError: a pattern that is no regular expression, or ranks below 1.
    """
    c = config.evaluation
    try:
        re.compile(c.same or "")
    except re.error as error:
        raise UserError(f"config.evaluation.same={c.same!r}: {error}.") from error
    if not c.top or min(c.top) < 1:
        raise UserError(f"config.evaluation.top={tuple(c.top)}: give ranks from 1 on, as 1,5.")


def assess(
    run: runs.Restored, *, num: int | None = None, seed: int = 0, batch: int | None = None,
    sampling: dict[str, Any] | None = None, features: str | None = None,
    metrics: Iterable[str] | None = None, console: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Measures retrieval and writes evaluation.json; returns what it holds.

    Among the distinct captions of the held-out pictures each picture is to find its own
    ("recall_1", "recall_5"), and each of those captions one of its own pictures
    ("text_recall_1"). Captions that are equal but for what config.evaluation.same matches are the
    same thing for the figures that end in "_same". Candidates of equal score count by chance, see
    `retrieval.recall`. Beside each figure stand that of as many pictures of the training split
    (which were learnt) and that of chance.

    Args:
      run: from `kind.open`.
      num: pictures; config.evaluation.num, or all that there are, unless given.
      seed: of their choice.
      batch: pictures at a time; config.sampling.batch unless given.
      sampling, features: of other kinds; there are none here.
      metrics: some of the keys; all unless given.
      console: a rich Console for a progress bar, or None.

    Returns:
      {"settings", "seconds", "metrics": [{"key", "name", "better", "about", "value", "floor",
      "ceiling"}], "classifier": None}, the floor being the training split, the ceiling chance.

    Raises:
      UserError: an unknown metric, features, or fewer than 8 pictures.
    """
    started = time.monotonic()
    config = run.config
    check(config)
    if features is not None:
        raise UserError(f"features={features}: a contrastive run is measured by retrieval alone.")
    num = enough(config.evaluation.num if num is None else num)
    known = list(_named(config))
    chosen = known if metrics is None else [choose("metric", name, known) for name in metrics]
    with told(console) as tell:
        held_out = _figures(run, "held-out", num, seed, batch, tell)
        training = _figures(run, "training", held_out["num"], seed, batch, tell)
    rows = [
        {"key": key, "name": name, "better": "higher", "about": about,
         "value": held_out[key], "floor": training[key], "ceiling": held_out[f"{key} chance"]}
        for key, (name, about) in _named(config).items() if key in chosen
    ]  # fmt: skip
    result = {
        "settings": {
            "what": "held-out pictures", "num": held_out["num"], "seed": seed, "step": run.step,
            "ema": run.ema, "captions": held_out["captions"], "same": config.evaluation.same,
            "reference": "held-out", "reference_images": held_out["num"],
            "floor": "training", "floor_images": training["num"],
        },
        "seconds": {"total": round(time.monotonic() - started, 2)},
        "metrics": rows,
        "classifier": None,
    }  # fmt: skip
    if hosts.line().first:
        write(run.workdir, run.step, result)
    return result


def table(result: dict[str, Any]) -> Any:
    """A rich table of a result."""
    from rich import box
    from rich.table import Table

    from jdiff.report.figures import percent

    made = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, caption_justify="left")
    for title, style in (("", None), ("held-out", "bold"), ("training", None), ("chance", None)):
        made.add_column(title, justify="right" if title else "left", style=style)
    for row in result["metrics"]:
        made.add_row(row["name"], *(percent(row[k]) for k in ("value", "floor", "ceiling")))
    s = result["settings"]
    made.caption = (
        f"{s['num']:,} pictures, {s['captions']:,} captions; {result['seconds']['total']:.0f} s"
    )
    return made


def embedded(
    run: runs.Restored, rows: Iterable[dict[str, Any]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(vectors of the images, of their texts) of batches of the data, one program for all."""
    exp, params = run.experiment, run.params
    size = run.config.sampling.batch
    whole = None if exp.layout is None else exp.layout.whole

    @jax.jit
    def both(params: Any, image: Any, cond: Any) -> Any:
        return exp.images(params, to_float(image)), exp.texts(params, cond)

    for row in rows:
        count = len(row["image"])
        fill = np.minimum(np.arange(size), count - 1)
        image, cond = np.asarray(row["image"])[fill], exp.cond(row)
        given = jax.device_put((image, {k: np.asarray(a)[fill] for k, a in cond.items()}), whole)
        images, texts = hosts.fetched(both(params, *given))
        yield images[:count], texts[:count]


def _named(config: Any) -> dict[str, tuple[str, str]]:
    """Name and meaning of each figure by its key."""
    found = {}
    for prefix, sought, given in _WAYS:
        for k in config.evaluation.top:
            name = f"{sought.capitalize()} found" + (f", first {k}" if k > 1 else "")
            about = f"share of {given}s whose own {sought} is among the first {k}"
            found[f"{prefix}recall_{k}"] = (name, about)
            if config.evaluation.same:
                also = f"{about}, but for what config.evaluation.same says is no difference"
                found[f"{prefix}recall_{k}_same"] = (f"{name}: the same thing", also)
    return found


def _figures(
    run: runs.Restored, side: str, num: int, seed: int, batch: int | None, tell: real.Tell
) -> dict[str, Any]:
    """Recalls of a split and their chance, and how many pictures and captions there were."""
    c = run.config.data
    split = {"held-out": c.test_split, "training": c.train_split}[side]
    fields = (*run.experiment.told, c.captions)
    source = sources.source(c.name, split, c.data_dir, fields=fields)
    source = real.part(source, num, seed)
    captions: list[str] = []

    def read() -> Iterator[dict[str, Any]]:
        for row in real.rows(run, source, batch=min(batch or 256, run.config.sampling.batch)):
            captions.extend(row[c.captions])
            tell(f"{side} pictures", len(captions), len(source))
            yield row

    parts = list(embedded(run, read()))
    images, texts = (np.concatenate(column) for column in zip(*parts))
    _, first = np.unique(captions, return_index=True)
    scores = images @ texts[first].T
    found: dict[str, Any] = {"num": len(images), "captions": len(first)}
    patterns = {"": None} | ({"_same": rule} if (rule := run.config.evaluation.same) else {})
    for ending, pattern in patterns.items():
        thing = same(captions, pattern)
        right = thing[:, None] == thing[first]
        for prefix, (s, r) in {"": (scores, right), "text_": (scores.T, right.T)}.items():
            for rank in run.config.evaluation.top:
                k, key = min(rank, s.shape[1]), f"{prefix}recall_{rank}{ending}"
                found |= {key: recall(s, r, k), f"{key} chance": chance(r, k)}
    return found
