"""jdiff launch: starts a training on this machine, SLURM, GKE or a TPU VM."""

import argparse
import dataclasses
import os
import pathlib
import re
import sys
from types import ModuleType
from typing import Any

from jdiff.commands.options import whole
from jdiff.errors import UserError

SUMMARY = "start a training on several processes, SLURM, GKE or a TPU VM"
DESCRIPTION = """\
Starts `jdiff train` of a config on every host of a platform, and again when it asks for it: a run
that got SIGTERM (the time limit is near, the node is taken away) saves, ends with code 75, and
goes on where it was, bit for bit. A mistake in the config, or a loss that is not finite, is not
repeated.

The config is read and checked here, and travels whole: editing the file later changes nothing.
--dry_run prints exactly what would be written, submitted or run, and does none of it."""
EXAMPLES = """\
examples:
  jdiff launch --platform=local --config=configs/digits.py --workdir=runs/two \\
      --processes=2 --devices=4
  jdiff launch --platform=slurm --config=configs/cifar10_edm.py --workdir=/shared/runs/edm \\
      --nodes=4 --gpus=8 --time=1-00:00:00 --partition=gpu --dry_run
  jdiff launch --platform=gke --config=configs/imagenet64_edm.py --workdir=gs://bucket/runs/adm \\
      --image=europe-docker.pkg.dev/me/images/jdiff:1 --accelerator=v5p-256 --slices=2
  jdiff launch --platform=tpu-vm --config=configs/cifar10_edm.py --workdir=gs://bucket/runs/edm \\
      --tpu=mine --zone=europe-west4-b --accelerator=v6e-64 --create --copy=.
  jdiff jobs --workdir=runs/two            # where it stands, and the end of its log
  jdiff jobs --workdir=runs/two --cancel   # it saves and ends

WORKDIR/launch/ then holds jobs.json and, for each launch, a folder with the script or manifest, the
config and the logs. docs/pods.md has a chapter for each platform."""

PLATFORMS = ("local", "slurm", "gke", "tpu-vm")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options; what is not given is None, so that a foreign option can be refused."""
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:TEXT]",
        help="as of `jdiff train`; fields are overridden by --config.a.b=X",
    )  # fmt: skip
    parser.add_argument(
        "--workdir", required=True, metavar="DIR",
        help="the run directory, as the hosts see it; all must see the same one. gs://BUCKET/PATH "
        "on gke and tpu-vm mounts the bucket there",
    )  # fmt: skip
    parser.add_argument(
        "--platform", required=True, choices=PLATFORMS, metavar="WHERE",
        help="`local`: processes of this machine; `slurm`: a batch job; `gke`: a JobSet on "
        "Kubernetes; `tpu-vm`: the workers of a TPU VM, over ssh",
    )  # fmt: skip
    parser.add_argument(
        "--name", metavar="NAME", help="of the job (default: the last part of --workdir)"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print what would be done; write and submit nothing"
    )
    parser.add_argument(
        "--no-evaluate", action="store_true", help="only train, as of `jdiff train`"
    )
    parser.add_argument(
        "--retries", type=whole(0), default=3, metavar="N",
        help="times in a row to start again after a crash or a lost host; being asked to stop and "
        "saving is no crash and is always followed by a new start (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--setup", action="append", default=[], metavar="LINE",
        help="a line of shell that every host runs first, as --setup='module load cuda/12'; may be "
        "repeated",
    )  # fmt: skip
    parser.add_argument(
        "--python", metavar="PATH",
        help="the interpreter on the hosts (default: this one for local and slurm, else python3)",
    )  # fmt: skip
    shared = parser.add_argument_group("hosts")
    shared.add_argument(
        "--nodes", type=whole(1), metavar="N", help="slurm, gke with GPUs: machines (default: 1)"
    )
    shared.add_argument(
        "--gpus", type=whole(1), metavar="K",
        help="GPUs of each node (slurm: as the cluster gives; gke: 8), or of each process (local)",
    )  # fmt: skip
    shared.add_argument(
        "--accelerator", metavar="TYPE",
        help="gke, tpu-vm: a TPU slice by Google's name, whose number counts TensorCores on v4, "
        "v5p and tpu7x (v5p-256 has 128 chips) and chips on v5e and v6e; or v5p with --topology. "
        "gke: or a GPU, by the node label cloud.google.com/gke-accelerator, as nvidia-h100-80gb",
    )  # fmt: skip
    shared.add_argument(
        "--topology", metavar="AxBxC",
        help="how the chips of the slice are joined, as 4x4x8 (default: nearest to a cube)",
    )  # fmt: skip
    shared.add_argument(
        "--mount", dest="mounts", action="append", type=_mount, metavar="WHAT:PATH",
        help="gke, tpu-vm: gs://BUCKET:/PATH mounts a bucket on every host; gke: also "
        "pvc/CLAIM:/PATH; may be repeated",
    )  # fmt: skip
    shared.add_argument(
        "--spot", action="store_true", default=None,
        help="gke, tpu-vm: cheaper machines that may be taken away at any time",
    )  # fmt: skip
    shared.add_argument(
        "--notice", type=whole(30), metavar="S",
        help="slurm, gke: seconds between SIGTERM, upon which the run saves, and the end of the "
        "job (default: 300)",
    )  # fmt: skip
    _local(parser.add_argument_group("--platform=local"))
    _slurm(parser.add_argument_group("--platform=slurm", "What is not given is up to the cluster."))
    _gke(parser.add_argument_group("--platform=gke"))
    _tpu_vm(parser.add_argument_group("--platform=tpu-vm"))


def _local(group: Any) -> None:
    group.add_argument(
        "--processes", type=whole(1), metavar="N",
        help="processes, which meet on loopback as hosts would (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--devices", type=whole(1), metavar="M",
        help="simulated CPU devices of each process (default: the machine's real devices)",
    )  # fmt: skip
    group.add_argument(
        "--detach", action="store_true", default=None,
        help="go on when this terminal closes; `jdiff jobs` shows and cancels it",
    )  # fmt: skip


def _slurm(group: Any) -> None:
    group.add_argument(
        "--tasks_per_node", type=whole(1), metavar="N",
        help="processes of each node: 1, which takes all its GPUs, or one a GPU (default: 1)",
    )  # fmt: skip
    group.add_argument("--cpus_per_task", type=whole(1), metavar="N", help="cores of each process")
    group.add_argument("--memory", metavar="SIZE", help="of each node, as 64G; 0 for all of it")
    group.add_argument(
        "--time", metavar="LIMIT",
        help="as 30 (minutes), 4:00:00 or 2-00:00:00; a run that needs longer saves --notice "
        "seconds before, is queued again, and goes on",
    )  # fmt: skip
    group.add_argument("--partition", metavar="NAME", help="the queue; `sinfo` lists them")
    group.add_argument("--account", metavar="NAME", help="whom to charge")
    group.add_argument("--qos", metavar="NAME", help="quality of service: limits and priority")
    group.add_argument("--constraint", metavar="LIST", help="features of nodes, as a100|h100")
    group.add_argument(
        "--sbatch", action="append", metavar="OPTION",
        help="any other, as --sbatch=--exclusive or --sbatch=--mail-type=END; may be repeated",
    )  # fmt: skip


def _gke(group: Any) -> None:
    group.add_argument("--image", metavar="IMAGE", help="the container image, with jdiff in it")
    group.add_argument(
        "--slices", type=whole(1), metavar="N",
        help="TPU slices, joined by the data centre's network (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--chips_per_node", type=whole(1), metavar="N",
        help="of the node pool's machines: 4 where a 2x4 slice is of two ct5lp-hightpu-4t or "
        "ct6e-standard-4t (default: 8 there, 1 for 1x1, else 4)",
    )  # fmt: skip
    group.add_argument("--namespace", metavar="NAME", help="of Kubernetes (default: default)")
    group.add_argument(
        "--service_account", metavar="NAME",
        help="of Kubernetes, with access to the buckets (Workload Identity)",
    )  # fmt: skip
    group.add_argument("--queue", metavar="NAME", help="Kueue's local queue to wait in")


def _tpu_vm(group: Any) -> None:
    group.add_argument("--tpu", metavar="NAME", help="of the TPU VM, there or to be made")
    group.add_argument("--zone", metavar="ZONE", help="as europe-west4-b")
    group.add_argument("--project", metavar="ID", help="(default: that of gcloud's configuration)")
    group.add_argument(
        "--create",
        action="store_true",
        default=None,
        help="make the TPU VM first, of --accelerator",
    )
    group.add_argument(
        "--runtime", metavar="VERSION",
        help="the TPU VM's software (default: that of its generation, as v2-alpha-tpuv5)",
    )  # fmt: skip
    group.add_argument(
        "--copy", metavar="DIR",
        help="copy this folder to every worker and start there; with --setup='pip install -e .' it "
        "may be jdiff itself",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Plans, and unless it is a dry run, claims the work directory and submits."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed here: devices are the run's
    from jdiff import config, staged
    from jdiff.launching import jobs, local_processes, task

    module = _module(args.platform)
    options = _options(args, module)
    settings = config.load(args.config, args.overrides)
    here = args.platform in ("local", "slurm")
    workdir = str(pathlib.Path(args.workdir).absolute()) if here else args.workdir
    if args.workdir.startswith("gs://"):
        if here:
            raise UserError(
                f"--workdir={args.workdir}: --platform={args.platform} needs a path; mount the "
                "bucket."
            )
        workdir, options = _on_bucket(args.workdir, options)
    one = staged.one(settings, "launch")
    whose = title = args.workdir  # the run directory; that of a stage lies in the one given
    if one is not settings:
        stage = f"stage{staged.chosen(settings)}"
        whose, title = (args.workdir.rstrip("/") + end for end in (f"/{stage}", f"-{stage}"))
    home = jobs.home(whose, here=here)
    name = task.named(args.name, title)
    folder = jobs.next_folder(home, name)
    planned = module.plan(
        task.Task(
            name=name, workdir=workdir, config=config.to_json(settings),
            words=("--no-evaluate",) if args.no_evaluate else (),
            cwd=os.getcwd() if here else "",
            python=args.python or (sys.executable if here else "python3"),
            setup=tuple(args.setup), retries=args.retries,
        ), options, folder,
    )  # fmt: skip
    for warning in planned.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if args.dry_run:
        print(planned)
        return 0
    jobs.refuse_second(home, _module)
    if here:
        from jdiff import runs

        if one is not settings:
            staged.claim(pathlib.Path(workdir), settings)
        runs.claim(pathlib.Path(whose).absolute(), one)
    if args.platform == "local" and not args.detach:
        planned.write()
        jobs.add(home, local_processes.job_of(os.getpid(), planned, name, whose))
        return local_processes.run(folder, show=True)
    job = module.submit(planned, name, whose)
    jobs.add(home, job)
    print(f"submitted {job.platform} job {job.id} ({name})")
    print(f"folder    {folder}")
    print(f"log       {job.log}")
    print(f"status    jdiff jobs --workdir={whose}")
    return 0


def _module(platform: str) -> ModuleType:
    from jdiff.launching import gke, local_processes, slurm, tpu_vm

    return {"local": local_processes, "slurm": slurm, "gke": gke, "tpu-vm": tpu_vm}[platform]


def _options(args: argparse.Namespace, module: ModuleType) -> Any:
    """The platform's own options; an option of another platform is refused by name."""
    takes = {name: _takes(_module(name)) for name in PLATFORMS}
    known = set().union(*takes.values())
    given = {k: v for k, v in vars(args).items() if k in known and v is not None}
    for name in given:
        if name not in takes[args.platform]:
            theirs = " and ".join(f"--platform={p}" for p in PLATFORMS if name in takes[p])
            option = "mount" if name == "mounts" else name
            raise UserError(f"--{option} is for {theirs}; --platform={args.platform} was given.")
    fields = {takes[args.platform][name]: value for name, value in given.items()}
    return module.Options(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def _takes(module: ModuleType) -> dict[str, str]:
    """{option: field} of a platform."""
    fields = [field.name for field in dataclasses.fields(module.Options)]
    return {("gpus" if field == "gpus_per_node" else field): field for field in fields}


def _on_bucket(workdir: str, options: Any) -> tuple[str, Any]:
    """The path on the hosts of gs://BUCKET/PATH, and options that mount the bucket there."""
    bucket, _, path = workdir.removeprefix("gs://").partition("/")
    if not bucket or not path:
        raise UserError(f"--workdir={workdir}: write gs://BUCKET/PATH.")
    where = f"/gcs/{bucket}"
    mounts = (*options.mounts, (f"gs://{bucket}", where))
    return f"{where}/{path}", dataclasses.replace(options, mounts=mounts)


def _mount(text: str) -> tuple[str, str]:
    """Reads WHAT:PATH."""
    found = re.fullmatch(r"(gs://[^:/]+|pvc/[^:/]+):(/[^:]+)", text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} given; gs://BUCKET:/PATH or pvc/CLAIM:/PATH is needed"
        )
    return found.group(1), found.group(2)
