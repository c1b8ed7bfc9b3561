"""Which processes a run has, by the environment: SLURM, Open MPI, GKE, a TPU VM, or flags.

Pure functions of environment variables (and of a TPU VM's metadata), so that recorded ones can be
tested. jax could find some of these itself, but would not say what is missing, would start a
service for one process, and would give a SLURM task that has a node to itself one of its GPUs.
"""

import dataclasses
import glob
import os
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping

from jdiff.errors import UserError

Environ = Mapping[str, str]
#: A key of the TPU VM's metadata -> its value, or None.
Metadata = Callable[[str], str | None]

# Above Linux's ephemeral ports, so that no outgoing connection holds the one we compute.
_PORTS = range(61440, 65536)
_TPU_PORT = 8482  # as jax's own
# Of SLURM's steps that are no srun: batch scripts, interactive shells, containers.
_NO_STEP = 0xFFFFFFF0


@dataclasses.dataclass(frozen=True)
class Given:
    """What the command line says; None where it is silent."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run, as one of them sees it.

    Attributes:
      found: what said so: "flags", "SLURM", ...
      coordinator: HOST:PORT where process 0 listens.
      count, index: how many processes, and which this is.
      devices: which of the host's accelerators are this process's; None for all.
    """

    found: str
    coordinator: str
    count: int
    index: int
    devices: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class _Found:
    """A cluster of which the coordinator may be unknown; `lacks` then says why."""

    found: str
    coordinator: str | None
    count: int
    index: int
    devices: tuple[int, ...] | None = None
    lacks: str = ""


def detect(
    given: Given, environ: Environ, *, metadata: Metadata | None = None, gpus: int = 0
) -> Cluster | None:
    """The cluster that this process is of; None if it is alone.

    Flags go before JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (or, of an indexed
    Kubernetes job, JOB_COMPLETION_INDEX), these before what the scheduler says: Open MPI, SLURM,
    GKE's TPU variables, a TPU VM's metadata. Each may say a part: `--coordinator` alone overrides
    an address that the scheduler gets wrong.

    Args:
      metadata: reads the metadata of a TPU VM; None if this is none.
      gpus: how many this process sees, to be shared by the processes of a host.

    Raises:
      UserError: a variable or flag is missing or is no number; it is named.
    """
    coordinator = given.coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    count = given.processes
    if count is None:
        count = _number(environ, "JAX_NUM_PROCESSES", optional=True)
    index = given.process
    if index is None and count is not None:
        names = ("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX")
        index = next((_number(environ, name) for name in names if name in environ), None)
    if count == 1:
        return None
    found = None
    if count is None or index is None or coordinator is None:
        finders = (_open_mpi, _slurm, _gke, lambda e, _: _tpu_vm(e, metadata))
        found = next((f for f in (find(environ, gpus) for find in finders) if f), None)
    if found is None and (count, index) == (None, None):
        if given.coordinator is None:
            return None  # a lone JAX_COORDINATOR_ADDRESS may be meant for another program
        raise UserError(
            "--coordinator is given, but not how many processes there are nor which this is, and "
            "the environment does not say: add --processes=N --process=I."
        )
    if found is None:
        missing = [
            flag
            for flag, value in (
                ("--coordinator=HOST:PORT (JAX_COORDINATOR_ADDRESS)", coordinator),
                ("--processes=N (JAX_NUM_PROCESSES)", count),
                ("--process=I (JAX_PROCESS_ID)", index),
            )
            if value is None
        ]
        if missing:
            raise UserError(f"of many processes, {' and '.join(missing)} must be given too.")
        found = _Found("flags" if given.processes else "JAX_NUM_PROCESSES", None, count, index)
    count = found.count if count is None else count
    index = found.index if index is None else index
    if count == 1:
        return None
    if not 0 <= index < count:
        raise UserError(f"process {index} of {count}: they are numbered 0 to {count - 1}.")
    address = coordinator or found.coordinator
    if address is None:
        raise UserError(f"{found.found} started {count} processes, but {found.lacks}")
    return Cluster(found.found, _checked(address), count, index, found.devices)


def here(given: Given) -> Cluster | None:
    """`detect` on this machine."""
    metadata = _metadata if _has_tpu() and "TPU_SKIP_MDS_QUERY" not in os.environ else None
    return detect(given, os.environ, metadata=metadata, gpus=_gpus(os.environ))


def _open_mpi(environ: Environ, gpus: int) -> _Found | None:
    """mpirun of Open MPI. Before SLURM: below mpirun its variables are those of mpirun's daemon."""
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    count = _number(environ, "OMPI_COMM_WORLD_SIZE")
    index = _number(environ, "OMPI_COMM_WORLD_RANK")
    local = _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK")
    locals_ = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", optional=True) or 1
    # "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"; Open MPI 5 does not tell any more.
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    where = re.search(r"tcp://([^,:]+)|tcp6://\[([^],]+)", uri)
    host = next((h for h in where.groups() if h), None) if where else None
    if host is None and locals_ == count:
        host = "127.0.0.1"
    name = uri.split(".")[0] or environ.get("PMIX_NAMESPACE", "")
    return _Found(
        "Open MPI", _address(host, _port(name, environ)) if host else None, count, index,
        _share(local, locals_, gpus),
        "does not tell where process 0 is (no OMPI_MCA_orte_hnp_uri, as in Open MPI 5): add "
        "--coordinator=HOST:PORT with the host of the first process.",
    )  # fmt: skip


def _slurm(environ: Environ, gpus: int) -> _Found | None:
    """A task of srun. A batch script or an interactive shell is one process of its own."""
    if "SLURM_STEP_NODELIST" not in environ or "SLURM_PROCID" not in environ:
        return None
    step = _number(environ, "SLURM_STEP_ID", optional=True) or 0
    if step >= _NO_STEP:
        return None
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    count, index = _number(environ, name), _number(environ, "SLURM_PROCID")
    if count == 1:
        return None
    job = _number(environ, "SLURM_JOB_ID")
    host = _first_host(environ["SLURM_STEP_NODELIST"])
    local = _number(environ, "SLURM_LOCALID")
    tasks = _repeated(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    node = _number(environ, "SLURM_NODEID", optional=True) or 0
    locals_ = tasks[node] if node < len(tasks) else 1
    address = _address(host, _port(f"{job}.{step}", environ))
    return _Found("SLURM", address, count, index, _share(local, locals_, gpus))


def _gke(environ: Environ, gpus: int) -> _Found | None:
    """A pod of a TPU slice, or of several, on GKE: variables that its webhook injects."""
    names = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    name = next((name for name in names if environ.get(name)), None)
    if name is None:
        return None
    workers = environ[name].split(",")
    slices = environ if "MEGASCALE_NUM_SLICES" in environ else {}
    if len(workers) == 1 and not slices:
        return None
    return _tpu("GKE", workers, _number(environ, "TPU_WORKER_ID"), slices, environ)


def _tpu_vm(environ: Environ, metadata: Metadata | None) -> _Found | None:
    """A worker of a Cloud TPU slice: what the machine's metadata server says."""
    if metadata is None:
        return None
    listed, index = metadata("worker-network-endpoints"), metadata("agent-worker-number")
    if listed is None or index is None:
        return None
    # Each worker is a host name, or name:id:address.
    workers = [worker.split(":")[-1] for worker in listed.split(",")]
    slices = dict(re.findall(r"^\s*(MEGASCALE_\w+)\s*:\s*'?([^'\n]*)", metadata("tpu-env") or "",
                             re.MULTILINE))  # fmt: skip
    return _tpu("Cloud TPU VM", workers, int(index), slices, environ)


def _tpu(
    found: str, workers: list[str], worker: int, slices: Environ, environ: Environ
) -> _Found | None:
    """Of all slices, the workers of the first come first."""
    number = _number(slices, "MEGASCALE_NUM_SLICES", optional=True) or 1
    which = _number(slices, "MEGASCALE_SLICE_ID") if number > 1 else 0
    host = slices.get("MEGASCALE_COORDINATOR_ADDRESS") if number > 1 else workers[0]
    port = int(environ.get("JAX_COORDINATOR_PORT", _TPU_PORT))
    return _Found(
        found, _address(host.split(":")[0], port) if host else None, number * len(workers),
        which * len(workers) + worker,
        lacks="MEGASCALE_COORDINATOR_ADDRESS is missing, which names the host of the first worker.",
    )  # fmt: skip


def _share(local: int, locals_: int, gpus: int) -> tuple[int, ...] | None:
    """The GPUs of one of several processes on a host, where they are all visible to each."""
    if locals_ <= 1 or gpus <= 1 or gpus % locals_:
        return None  # a node to itself, none, or bound by the scheduler
    each = gpus // locals_
    return tuple(range(local * each, (local + 1) * each))


def _number(environ: Environ, name: str, optional: bool = False) -> int | None:
    text = environ.get(name)
    if text is None and optional:
        return None
    if text is None:
        raise UserError(
            f"the environment is that of one of many processes, but {name} is missing. Give "
            "--coordinator, --processes and --process, or --processes=1 for one on its own."
        )
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text!r} in the environment is not a whole number.") from None


def _first_host(nodes: str) -> str:
    """The first host of SLURM's list: "node[003-007,9],x" -> "node003"."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", nodes).group()
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first)


def _repeated(text: str) -> list[int]:
    """SLURM's "2(x3),1" -> [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(size) for size, times in found for _ in range(int(times or 1))]


def _port(name: str, environ: Environ) -> int:
    """The same for all processes of a job, and most likely another for another job."""
    if "JAX_COORDINATOR_PORT" in environ:
        return _number(environ, "JAX_COORDINATOR_PORT")
    return _PORTS[zlib.crc32(name.encode()) % len(_PORTS)]


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _checked(address: str) -> str:
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"coordinator {address!r} given; HOST:PORT is needed, as node1:61000.")
    return address


def _gpus(environ: Environ) -> int:
    visible = environ.get("CUDA_VISIBLE_DEVICES", environ.get("ROCR_VISIBLE_DEVICES"))
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip()])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def _has_tpu() -> bool:
    """Whether Google's chips are on the PCI bus or have device files."""
    return bool(glob.glob("/dev/accel[0-9]*")) or any(
        _read(path).strip() == "0x1ae0" for path in glob.glob("/sys/bus/pci/devices/*/vendor")
    )


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def _metadata(key: str) -> str | None:
    """An attribute of this machine from Google's metadata server; None if there is none."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
    asked = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(asked, timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError, OSError):
        return None
