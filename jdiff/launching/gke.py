"""GKE: a JobSet, one Job for each TPU slice or one for all GPU nodes, one pod a host.

The JobSet restarts as a whole. A pod that ends with `exits.REQUEUE`, or that is evicted, costs none
of its restarts; a mistake in the command ends it; anything else costs one. Needs JobSet 0.10.
"""

import dataclasses
import json
import pathlib
from typing import Any

from jdiff import exits
from jdiff.errors import UserError
from jdiff.launching import programs, tpu_slices
from jdiff.launching.jobs import Job, Standing
from jdiff.launching.task import ENDS, Plan, Task, peers

_PORT = 8476  # of the coordinator
_CONTAINER = "jdiff"
_JOB = "hosts"  # the replicated job: pods are NAME-hosts-SLICE-HOST
_CONFIG = "/tmp/jdiff-config.json"
_GPUS = "cloud.google.com/gke-accelerator"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked of the cluster.

    Attributes:
      image: with jdiff in it.
      accelerator: a TPU (v5p-256, or v5p with a topology), or GKE's name of a GPU (nvidia-...).
      topology, slices, chips_per_node: of TPUs.
      nodes, gpus: of GPUs.
      namespace, service_account, queue: Kubernetes' namespace and account, and Kueue's local queue.
      mounts: (gs://BUCKET or pvc/CLAIM, path) pairs.
      spot: on nodes that may be taken away.
      notice: seconds between SIGTERM and SIGKILL when a pod is evicted.
    """

    image: str | None = None
    accelerator: str | None = None
    topology: str | None = None
    slices: int = 1
    chips_per_node: int | None = None
    nodes: int | None = None
    gpus: int | None = None
    namespace: str = "default"
    service_account: str | None = None
    queue: str | None = None
    mounts: tuple[tuple[str, str], ...] = ()
    spot: bool = False
    notice: int = 300


@dataclasses.dataclass(frozen=True)
class _Hosts:
    """What both kinds of nodes come to."""

    jobs: int
    pods: int  # of each job
    selector: dict[str, str]
    resource: str
    each: int
    tpu: bool


def plan(task: Task, options: Options, folder: pathlib.Path) -> Plan:
    """The manifest, and the command that creates it.

    Raises:
      UserError: no image or accelerator, a topology that does not exist for it, options of TPUs
        with GPUs or the other way round, or a mount that cannot be read.
    """
    made = manifest(task, options, folder.name)
    path = folder / "jobset.yaml"
    warnings = []
    mounted = [where for _, where in options.mounts]
    if not any(pathlib.PurePosixPath(task.workdir).is_relative_to(where) for where in mounted):
        warnings.append(
            f"--workdir={task.workdir} is under no --mount: it is lost with the pods, and several "
            "hosts do not share it. --workdir=gs://BUCKET/PATH mounts the bucket."
        )
    return Plan(
        folder=folder,
        files={path: _yaml(made)},
        commands=(("kubectl", "create", f"--namespace={options.namespace}", "-f", str(path)),),
        warnings=tuple(warnings),
    )


def _yaml(tree: dict[str, Any]) -> str:
    """As YAML, scripts as blocks."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, width=1000)


def manifest(task: Task, options: Options, name: str) -> dict[str, Any]:
    """The JobSet, as kubectl takes it; errors as `plan`."""
    hosts = _hosts(options)
    if not options.image:
        raise UserError("--image is missing: a container image with jdiff in it.")
    labels = {"app.kubernetes.io/managed-by": "jdiff"}
    if options.queue:
        labels["kueue.x-k8s.io/queue-name"] = options.queue
    metadata: dict[str, Any] = {"name": name, "namespace": options.namespace, "labels": labels}
    if hosts.tpu and hosts.pods > 1:  # the pods of a job on the hosts of one slice
        metadata["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": task.retries,
                "rules": [
                    {
                        "name": "ends",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "onJobFailureMessagePatterns": [f".*with exit code ({_ends('|')}) .*"],
                    },
                    {
                        "name": "saved",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    },
                ],
            },
            "replicatedJobs": [
                {
                    "name": _JOB,
                    "replicas": hosts.jobs,
                    "template": {"spec": _job(task, options, hosts, name)},
                }
            ],
        },
    }


def _job(task: Task, options: Options, hosts: _Hosts, name: str) -> dict[str, Any]:
    """One Job: as many pods as hosts, which fail together."""
    codes = lambda values: {"containerName": _CONTAINER, "operator": "In", "values": values}
    rules = [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": codes([exits.REQUEUE])},
        {"action": "FailJob", "onExitCodes": codes(sorted(ENDS - {exits.OK}))},
    ]
    return {
        "parallelism": hosts.pods,
        "completions": hosts.pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": rules},
        "template": _pod(task, options, hosts, name),
    }


def _pod(task: Task, options: Options, hosts: _Hosts, name: str) -> dict[str, Any]:
    volumes = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]  # NCCL's and data workers'
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    for i, (source, where) in enumerate(options.mounts):
        volumes.append({"name": f"mount-{i}", **_volume(source)})
        mounts.append({"name": f"mount-{i}", "mountPath": where})
    lines = ["set -e", *([f"cd {task.cwd}"] if task.cwd else []), *task.setup]
    lines.append(task.here_document(_CONFIG))
    lines.append("exec " + programs.line(task.command(_CONFIG)))
    selector = dict(hosts.selector)
    tolerations = [{"key": hosts.resource, "operator": "Exists", "effect": "NoSchedule"}]
    if options.spot:
        key = "cloud.google.com/gke-spot"
        selector[key] = "true"
        tolerations.append(
            {"key": key, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        )
    env: list[dict[str, Any]] = [{"name": "PYTHONUNBUFFERED", "value": "1"}]
    if not hosts.tpu and hosts.pods > 1:  # on TPU slices GKE itself says who is who
        env += _meeting(name, hosts.pods)
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.notice,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [
            {
                "name": _CONTAINER,
                "image": options.image,
                "command": ["bash", "-c", "\n".join(lines) + "\n"],
                "env": env,
                "ports": [{"containerPort": 8471 if hosts.tpu else _PORT, "protocol": "TCP"}],
                "resources": {"limits": {hosts.resource: hosts.each}},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    if options.service_account:
        spec["serviceAccountName"] = options.service_account
    template: dict[str, Any] = {"spec": spec}
    if any(source.startswith("gs://") for source, _ in options.mounts):
        template["metadata"] = {"annotations": {"gke-gcsfuse/volumes": "true"}}
    return template


def _meeting(name: str, processes: int) -> list[dict[str, Any]]:
    """The environment by which pods find pod 0; each one's number is an annotation of it."""
    field = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    known = peers(f"{name}-{_JOB}-0-0.{name}:{_PORT}", processes, "")
    return [
        {"name": key, "value": value} if value else {"name": key, "valueFrom": {"fieldRef": field}}
        for key, value in known.items()
    ]


def _volume(source: str) -> dict[str, Any]:
    kind, _, rest = source.partition("/")
    if source.startswith("gs://"):
        # Checkpoints become whole by renaming a folder.
        options = "implicit-dirs,rename-dir-limit=100000"
        attributes = {"bucketName": source.removeprefix("gs://"), "mountOptions": options}
        return {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
    if kind == "pvc" and rest:
        return {"persistentVolumeClaim": {"claimName": rest}}
    raise UserError(f"--mount={source}:...: write gs://BUCKET:/PATH or pvc/CLAIM:/PATH.")


def _hosts(options: Options) -> _Hosts:
    name = options.accelerator
    if not name:
        raise UserError(
            "--accelerator is missing: a TPU slice such as v5p-256 or v6e-64, or GKE's name of a "
            "GPU such as nvidia-h100-80gb."
        )
    gpu = name.startswith("nvidia-")
    foreign = ("topology", "chips_per_node") if gpu else ("nodes", "gpus")
    for other in foreign:
        if getattr(options, other) is not None:
            kind = "TPUs" if gpu else "GPUs; a slice has as many nodes as its topology says"
            raise UserError(f"--{other} with --accelerator={name}: it is for {kind}.")
    if gpu:
        if options.slices != 1:
            raise UserError(f"--slices with --accelerator={name}: it is for TPUs; say --nodes.")
        pods, each = options.nodes or 1, options.gpus or 8
        if pods < 1 or each < 1:
            raise UserError(f"--nodes={pods} --gpus={each}: at least 1 of each is needed.")
        return _Hosts(1, pods, {_GPUS: name}, "nvidia.com/gpu", each, tpu=False)
    found = tpu_slices.parse(name, options.topology)
    each = options.chips_per_node or found.chips_per_host
    if each not in (1, 4, 8) or found.chips % each or (each == 8 and found.chips != 8):
        raise UserError(
            f"--chips_per_node={each}: nodes of TPU {found.generation} {found.topology} have "
            f"{found.chips_per_host}{' or 4' if found.chips == 8 else ''} chips."
        )
    if options.slices < 1:
        raise UserError(f"--slices={options.slices} given; at least 1 is needed.")
    selector = {
        "cloud.google.com/gke-tpu-accelerator": tpu_slices.GENERATIONS[found.generation].label,
        "cloud.google.com/gke-tpu-topology": found.topology,
    }
    return _Hosts(options.slices, found.chips // each, selector, "google.com/tpu", each, tpu=True)


def _ends(between: str) -> str:
    return between.join(str(code) for code in sorted(ENDS - {exits.OK}))


def submit(plan: Plan, name: str, workdir: str) -> Job:
    """Writes the manifest and creates the JobSet.

    Raises:
      UserError: kubectl is not there, or the cluster refuses the manifest.
    """
    plan.write()
    programs.call(plan.commands[0])
    namespace = plan.commands[0][2].partition("=")[2]
    id = plan.folder.name
    log = programs.line(_logs(id, namespace, 100))
    return Job.new("gke", name, id, workdir, plan.folder, log=log, namespace=namespace)


def _logs(name: str, namespace: str, lines: int) -> list[str]:
    """The command that shows the output of host 0 of slice 0."""
    labels = {
        "jobset.sigs.k8s.io/jobset-name": name,
        "jobset.sigs.k8s.io/job-index": 0,
        "batch.kubernetes.io/job-completion-index": 0,
    }
    selector = ",".join(f"{key}={value}" for key, value in labels.items())
    return ["kubectl", "logs", f"--namespace={namespace}", f"--selector={selector}",
            f"--container={_CONTAINER}", f"--tail={lines}"]  # fmt: skip


def standing(job: Job) -> Standing:
    """By the status of the JobSet.

    Raises:
      UserError: kubectl is not there, or the cluster does not answer.
    """
    namespace = f"--namespace={job.details['namespace']}"
    try:
        said = programs.call(["kubectl", "get", "jobset", job.id, namespace, "-o", "json"])
    except UserError as error:
        if "NotFound" in str(error):
            return Standing("cancelled", "the JobSet was deleted")
        raise
    return read_jobset(json.loads(said))


def read_jobset(found: dict[str, Any]) -> Standing:
    """Reads a JobSet with its status, as the cluster gives it."""
    status = found.get("status", {})
    restarts = f", restarted {status['restarts']}x" if status.get("restarts") else ""
    counts = {key: 0 for key in ("active", "ready", "succeeded", "failed")}
    for jobs in status.get("replicatedJobsStatus", []):
        for key in counts:
            counts[key] += jobs.get(key, 0)
    terminal = status.get("terminalState") or next(
        (c["type"] for c in status.get("conditions", [])
         if c["type"] in ("Completed", "Failed") and c["status"] == "True"), None,
    )  # fmt: skip
    if terminal:
        state = {"Completed": "finished", "Failed": "failed"}.get(terminal, terminal.lower())
        why = next((c.get("message", "") for c in status.get("conditions", [])
                    if c["type"] == terminal and c["status"] == "True"), "")  # fmt: skip
        return Standing(state, f"JobSet: {terminal}{restarts} {why}".strip())
    if found.get("spec", {}).get("suspend"):
        return Standing("waiting", "JobSet: suspended, in a queue")
    total = sum(jobs["replicas"] for jobs in found["spec"]["replicatedJobs"])
    state = "running" if counts["ready"] == total else "waiting"
    return Standing(state, f"JobSet: {counts['ready']} of {total} slices ready{restarts}")


def tail(job: Job, lines: int) -> str:
    """The end of host 0's output."""
    return programs.call(_logs(job.id, job.details["namespace"], lines)).rstrip()


def cancel(job: Job) -> str:
    """Deletes the JobSet; its pods get SIGTERM and the time to save."""
    namespace = f"--namespace={job.details['namespace']}"
    programs.call(["kubectl", "delete", "jobset", job.id, namespace, "--wait=false"])
    return f"JobSet {job.id} is deleted; its pods get SIGTERM first"
