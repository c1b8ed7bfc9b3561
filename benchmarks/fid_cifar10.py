"""The FID's acceptance test: CIFAR-10's training split against its test split.

    jdiff prepare cifar10 fid
    python benchmarks/fid_cifar10.py --num 5000     # quick check: 10.26
    python benchmarks/fid_cifar10.py                # all 60,000 images: 3.15 is published

Uses the first `--num` images of each split. Statistics are saved every thousand images, and the
same command, or one with a larger `--num`, goes on from them. The first 5,000 images of each split
come first, so that the quick check falls out of the long run on its way.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import multiprocessing
import os
import pathlib
import sys
import time
import zlib

import numpy as np

from jdiff.evaluation.moments import Moments, frechet

SPLITS = ("train", "test")
QUICK = 5_000
SAVE_EVERY = 1_000
CHUNK = 250  # images that a worker takes at a time
BATCH = 5  # images a call: few, so that they stay in cache


def main() -> None:
    options = parse(sys.argv[1:])
    options.work.mkdir(parents=True, exist_ok=True)
    sources = {split: read_split(split, options.data_dir) for split in SPLITS}
    sizes = {s: min(len(sources[s]), options.num or len(sources[s])) for s in SPLITS}
    progress = Progress(sum(n - resume(options.work, s, n)[0] for s, n in sizes.items()))
    # Whole processes, one thread each: threads that share one image would wait for each other.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
    with concurrent.futures.ProcessPoolExecutor(
        options.workers, multiprocessing.get_context("spawn"), start_worker, (options.weights,)
    ) as pool:
        for target in sorted({min(QUICK, max(sizes.values())), max(sizes.values())}):
            counts = {split: min(target, sizes[split]) for split in SPLITS}
            pair = [advance(sources[s], s, counts[s], options.work, pool, progress) for s in SPLITS]
            counted = " and ".join(f"{counts[s]:,} {s}" for s in SPLITS)
            print(f"FID {frechet(*pair):.4f} for {counted} images", flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = pathlib.Path(os.environ.get("JDIFF_CACHE", "~/.cache/jdiff")).expanduser()
    parser.add_argument("--num", type=int, help="images of each split (default: all)")
    parser.add_argument("--data-dir", help="TFDS folder (default: as jdiff prepare)")
    parser.add_argument(
        "--weights",
        type=pathlib.Path,
        default=cache / "weights" / "fid.safetensors",
        help="Inception weights of `jdiff prepare fid` (default: %(default)s)",
    )
    parser.add_argument(
        "--work",
        type=pathlib.Path,
        default=pathlib.Path("runs/fid_cifar10"),
        help="folder of the saved statistics (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if options.num is not None and options.num < 2:
        parser.error(f"--num {options.num}: at least 2 images of each split are needed")
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: at least 1 is needed")
    if not options.weights.is_file():
        parser.error(f"no Inception weights at {options.weights}: run `jdiff prepare fid`")
    return options


def read_split(split: str, data_dir: str | None):
    from jdiff import data

    return data.source("cifar10", split, data_dir=data_dir)


def start_worker(weights: pathlib.Path) -> None:
    global features  # noqa: PLW0603  (a worker process has no other place to keep its network)
    import jax

    from jdiff.evaluation import inception

    params = inception.load(weights)
    compute = jax.jit(inception.features)
    features = lambda images: np.asarray(compute(params, images))


def chunk_moments(images: np.ndarray) -> Moments:
    """Runs in a worker: the moments of the features of one chunk of images."""
    rows = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        missing = BATCH - len(batch)  # padded: one compiled shape
        padded = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
        rows.append(features(padded)[: len(batch)])
    return Moments.of(np.concatenate(rows))


def advance(source, split: str, target: int, work: pathlib.Path, pool, progress) -> Moments:
    """The moments of the first `target` images: those saved, and the rest computed and saved."""
    count, path = resume(work, split, target)
    check, total = digest(source, 0, count), None
    if path:
        total = Moments.load(path)
        with np.load(path) as file:
            if int(file["check"]) != check:
                sys.exit(f"{path}: made from other images; choose another --work")
    starts = range(count, target, CHUNK)
    chunks = (images_of(source, start, min(start + CHUNK, target)) for start in starts)
    for start, part in zip(starts, ahead(pool, chunk_moments, chunks)):
        stop = min(start + CHUNK, target)
        total = part if total is None else total + part
        progress.add(split, stop - start, stop, target)
        if stop % SAVE_EVERY == 0 or stop == target:
            check = digest(source, count, stop, check)
            total.save(work / f"{split}-{stop:06d}.npz", check=np.uint32(check))
            if count != QUICK:  # whose statistics are the quick check's
                (work / f"{split}-{count:06d}.npz").unlink(missing_ok=True)
            count = stop
    return total


def ahead(pool, function, items, depth: int = 8):
    """`map` over a pool, in order, with at most `depth` items on their way."""
    waiting = []
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) == depth:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def images_of(source, start: int, stop: int) -> np.ndarray:
    return source.gather(range(start, stop))["image"]


def digest(source, start: int, stop: int, check: int = 0) -> int:
    """CRC-32 of images in order, so that saved statistics go on only with the same images."""
    for at in range(start, stop, SAVE_EVERY):
        check = zlib.crc32(images_of(source, at, min(at + SAVE_EVERY, stop)).tobytes(), check)
    return check


def resume(work: pathlib.Path, split: str, target: int) -> tuple[int, pathlib.Path | None]:
    """The largest saved count that is at most `target`, and its file."""
    saved = [(int(path.stem.rpartition("-")[2]), path) for path in work.glob(f"{split}-*.npz")]
    return max(((c, path) for c, path in saved if c <= target), default=(0, None))


@dataclasses.dataclass
class Progress:
    """Prints images done, rate and time left."""

    total: int
    done: int = 0
    started: float = dataclasses.field(default_factory=time.time)

    def add(self, split: str, new: int, count: int, target: int) -> None:
        """Counts `new` images; `count` of `target` of the split are done."""
        self.done += new
        rate = self.done / (time.time() - self.started)
        left = datetime.timedelta(seconds=round((self.total - self.done) / rate))
        print(f"{split} {count:,}/{target:,}  {rate:.1f} images/s  {left} left", flush=True)


if __name__ == "__main__":
    main()
