"""jdiff evaluate: measures a run's samples against real images."""

import argparse
from typing import Any

from jdiff.commands import cascades, stages
from jdiff.commands.many import add_hosts, joined
from jdiff.commands.options import add_sampling, add_workdir, choices, whole

SUMMARY = "measure the samples of a run or a cascade against held-out images"
DESCRIPTION = """\
Draws images from the model of a run, as many of each class, and compares them with the held-out
split (config.evaluation.reference: "train" compares with the training split, as papers' FID does).
Each figure stands between that of the other real split (as good as real images are: the floor of a
distance) and that of noise (the ceiling). The result is written to evaluation.json in the run
directory, and `jdiff report` shows it.

The run of an autoencoder reconstructs held-out images: distances between the sets (rFID with
--features=inception), PSNR, SSIM, LPIPS after `jdiff prepare lpips`, and the use of its codes.

The run of a super-resolution stage is given real images made smaller (true input); PSNR and SSIM
against the truth are measured too, on held-out images. Of a cascade's folder, every stage is
measured twice, from true input and from what the stages before it generate; the gap is the
compounding error. That goes to evaluation.json in the folder of the cascade, with pictures."""
EXAMPLES = """\
examples:
  jdiff evaluate --workdir=runs/digits
  jdiff evaluate --workdir=runs/digits --num=2000 --guidance_scale=1.5 --solver=dpmpp_2m --steps=20
  jdiff evaluate --workdir=runs/digits --ema=params --metrics=frechet,precision_recall
  jdiff evaluate --workdir=runs/cdm --stage=1 --aug_level=0.1
  jdiff evaluate --workdir=runs/emoji_t2i --scorer=runs/emoji_clip

metrics (all unless --metrics names some):
  frechet           Frechet distance between Gaussians fitted to features (FID for inception)
  kernel            kernel distance (KID for inception)
  precision_recall  improved precision and recall
  density_coverage  density and coverage
  inception_score   of the classifier's probabilities
  sliced            sliced Wasserstein distance between pixels
  accuracy          share of samples in which a classifier finds the intended class"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_workdir(parser)
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--num", type=whole(2), metavar="N",
        help="images to draw (default: the config's, config.evaluation.num)",
    )  # fmt: skip
    what.add_argument(
        "--features", metavar="NAME",
        help="what the distances are measured on: classifier (trained on the real training split), "
        "pixels, inception (after `jdiff prepare fid`) or resnet50 (after `jdiff prepare "
        "resnet50`) (default: the config's, config.evaluation.features)",
    )  # fmt: skip
    what.add_argument("--metrics", metavar="LIST", help="names joined by commas, see below")
    what.add_argument(
        "--scorer", metavar="PATH",
        help="run directory of a contrastive run, or the folder of a CLIP: how well samples match "
        "the captions that they are drawn for (default: the config's, config.evaluation.scorer)",
    )  # fmt: skip
    add_sampling(parser)
    add_hosts(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, writes evaluation.json, and prints the table."""
    with joined(args) as console:
        return _run(args, console)


def _run(args: argparse.Namespace, console: Any) -> int:
    from jdiff import assess, cache, kinds, runs
    from jdiff.errors import UserError

    if stages.folder(args.workdir):
        if args.scorer is not None:
            raise UserError(f"--scorer: {args.workdir} is a cascade; a scorer looks at runs.")
        return cascades.evaluate(args, console)
    config = runs.read_config(args.workdir)
    stages.of_run(args, config)
    cache.enable(config.compile_cache, config.cache_dir)
    chosen = choices(args, config)
    metrics = args.metrics and cascades.named(args.metrics)
    kind = kinds.of(config)
    moved = {} if args.autoencoder is None else {"autoencoder": args.autoencoder}
    opened = kind.open(args.workdir, ema=args.ema, step=args.step, mesh=args.mesh, **moved)
    if args.scorer is not None:
        opened = _scored(opened, args.scorer)
    figures = kind.assess(
        opened, num=args.num, seed=args.seed, batch=args.batch, sampling=chosen,
        features=args.features, metrics=metrics, console=console,
    )  # fmt: skip
    console.print(kind.table(figures))
    path = args.workdir / assess.FILE
    console.print(f"figures  {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _scored(opened: Any, scorer: str) -> Any:
    """The run, whose samples that scorer looks at."""
    from jdiff.errors import UserError

    config = opened.config.copy_and_resolve_references()
    if "scorer" not in config.evaluation:
        raise UserError(f"--scorer: {opened.workdir} is no run of a model that draws images.")
    with config.unlocked():
        config.evaluation.scorer = scorer
    return opened._replace(config=config)
