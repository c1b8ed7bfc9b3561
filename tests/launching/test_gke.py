"""JobSets: by the published schema, and by what Kubernetes would do with them."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from jdiff import exits
from jdiff.errors import UserError
from jdiff.launching import gke
from jdiff.launching.task import Task

TPU = gke.Options(
    image="registry/jdiff:1", accelerator="v5p-256", slices=2, spot=True, queue="research",
    service_account="trainer", mounts=(("gs://bucket", "/gcs/bucket"),),
)  # fmt: skip
GPU = gke.Options(
    image="registry/jdiff:1", accelerator="nvidia-h100-80gb", nodes=4,
    mounts=(("pvc/disk", "/data"),), namespace="lab",
)  # fmt: skip


def task(**changes):
    given = {"python": "python3", "cwd": "", "setup": ("export A=1",), **changes}
    return Task("adm", "/gcs/bucket/run", '{"seed": 7}', **given)


def job_of(manifest):
    (job,) = manifest["spec"]["replicatedJobs"]
    return job


def pod_of(manifest):
    return job_of(manifest)["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("options", [TPU, GPU, gke.Options(image="i", accelerator="v6e-1")])
def test_the_published_schema_knows_every_field_and_type(options):
    # Models generated from the OpenAPI of JobSet (v1alpha2) and Kubernetes; what they do not know
    # they drop, and what has another type they refuse.
    reason = "NOT VALIDATED: pip install kubeflow-trainer-api"
    models = pytest.importorskip("kubeflow_trainer_api.models", reason=reason)
    made = gke.manifest(task(), options, "adm-1")
    assert models.JobsetV1alpha2JobSet.from_dict(made).to_dict() == made
    made["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 0  # a slip is found
    assert models.JobsetV1alpha2JobSet.from_dict(made).to_dict() != made
    made["spec"]["replicatedJobs"][0]["replicas"] = "two"
    with pytest.raises(ValueError, match="replicas"):
        models.JobsetV1alpha2JobSet.from_dict(made)


def test_a_tpu_slice_is_a_job_with_a_pod_a_host():
    made = gke.manifest(task(), TPU, "adm-1")
    pod = pod_of(made)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
        "cloud.google.com/gke-spot": "true",
    }
    job = job_of(made)
    hosts = job["template"]["spec"]["parallelism"]
    assert hosts == job["template"]["spec"]["completions"] == 32
    assert job["replicas"] == 2
    chips = pod["containers"][0]["resources"]["limits"]
    assert chips == {"google.com/tpu": 4} and 4 * hosts == 128  # of 256 TensorCores
    # GKE tells the hosts of a slice who they are; here nothing may contradict it.
    assert [entry["name"] for entry in pod["containers"][0]["env"]] == ["PYTHONUNBUFFERED"]
    small = gke.Options(image="i", accelerator="v6e-8")
    pairs = [(small, 1, 8), (gke.Options(**{**vars(small), "chips_per_node": 4}), 2, 4)]
    for options, hosts, each in pairs:
        made = gke.manifest(task(), options, "a-1")
        assert job_of(made)["template"]["spec"]["parallelism"] == hosts
        limits = pod_of(made)["containers"][0]["resources"]["limits"]
        assert limits == {"google.com/tpu": each}


def test_gpu_pods_find_the_first_of_them():
    made = gke.manifest(task(), GPU, "adm-1")
    pod = pod_of(made)
    (container,) = pod["containers"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    env = {entry["name"]: entry for entry in container["env"]}
    # A pod's name is JOBSET-JOB-JOBINDEX-PODINDEX.SUBDOMAIN, the subdomain that of the JobSet.
    where = f"adm-1-{job_of(made)['name']}-0-0.adm-1:{container['ports'][0]['containerPort']}"
    assert env["JAX_COORDINATOR_ADDRESS"]["value"] == where
    assert env["JAX_NUM_PROCESSES"]["value"] == "4"
    assert job_of(made)["template"]["spec"]["parallelism"] == 4
    field = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert made["spec"]["network"]["enableDNSHostnames"]
    alone = gke.manifest(task(), gke.Options(**{**vars(GPU), "nodes": 1}), "adm-1")
    assert [e["name"] for e in pod_of(alone)["containers"][0]["env"]] == ["PYTHONUNBUFFERED"]


def fate(manifest, code=None, condition=None):
    """What happens to the JobSet when a pod ends so: the rules of Job, then those of JobSet."""
    job = job_of(manifest)["template"]["spec"]
    assert job["backoffLimit"] == 0 and pod_of(manifest)["restartPolicy"] == "Never"
    container = pod_of(manifest)["containers"][0]["name"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for i, rule in enumerate(job["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        by_code, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        if by_code and code in by_code["values"] and by_code["containerName"] == container:
            message = f"Container {container} for pod ns/p failed with exit code {code} matching FailJob rule at index {i}"  # noqa: E501
        elif condition in [c["type"] for c in conditions]:
            message = f"Pod ns/p has condition {condition} matching FailJob rule at index {i}"
        else:
            continue
        reason = "PodFailurePolicy"
        break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [".*"])
        if reason in rule["onJobFailureReasons"] and any(re.match(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"  # JobSet's own, which costs one of maxRestarts


def test_what_restarts_and_what_that_costs():
    made = gke.manifest(task(retries=5), TPU, "adm-1")
    free = "RestartJobSetAndIgnoreMaxRestarts"
    assert fate(made, code=exits.REQUEUE) == free
    assert fate(made, condition="DisruptionTarget") == free  # evicted, preempted, drained
    for code in (exits.USER, exits.DIVERGED, exits.INTERRUPTED):
        assert fate(made, code=code) == "FailJobSet"
    for code in (exits.FAILED, exits.PEER_LOST, exits.IO, 134, 137, 139):
        assert fate(made, code=code) == "RestartJobSet"
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 5
    assert pod_of(made)["terminationGracePeriodSeconds"] == 300


def test_the_container_writes_the_config_and_becomes_the_training(tmp_path):
    program = tmp_path / "python3"
    program.write_text(
        '#!/bin/sh\necho "$$ $A $*"\ncat "${4#--config=}"\nexit 75\n'  # words: -m jdiff.cli train
    )
    program.chmod(0o755)
    made = gke.manifest(task(python=str(program)), TPU, "adm-1")
    command = pod_of(made)["containers"][0]["command"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said = started.communicate(timeout=60)[0].splitlines()
    # exec: the process that Kubernetes sends SIGTERM is the training itself.
    words = "-m jdiff.cli train --config=/tmp/jdiff-config.json --workdir=/gcs/bucket/run"
    assert said[0] == f"{started.pid} 1 {words}"
    assert json.loads(said[1]) == {"seed": 7}
    assert started.returncode == 75


def test_a_dry_run_prints_the_manifest_and_writes_nothing(tmp_path):
    words = [
        sys.executable, "-m", "jdiff.cli", "launch", "--platform=gke", "--config=configs/digits.py",
        "--workdir=gs://bucket/runs/adm", "--image=registry/jdiff:1", "--accelerator=v5p-256",
        "--config.train.steps=12", "--dry_run",
    ]  # fmt: skip
    environ = os.environ | {"XDG_STATE_HOME": str(tmp_path)}
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and not any(tmp_path.iterdir())
    text, _, command = done.stdout.rstrip().rpartition("\n")
    path = tmp_path / "jdiff/launch/gs_bucket_runs_adm/adm-1/jobset.yaml"
    assert command == f"kubectl create --namespace=default -f {path}"
    found = yaml.safe_load(text)
    assert found["metadata"]["name"] == "adm-1"
    script = pod_of(found)["containers"][0]["command"][-1]
    assert "--workdir=/gcs/bucket/runs/adm" in script
    config = json.loads(next(line for line in script.splitlines() if line.startswith("{")))
    assert config["train"]["steps"] == 12 and config["data"]["name"] == "digits"
    (volume,) = [v for v in pod_of(found)["volumes"] if "csi" in v]
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "bucket"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"accelerator": None}, "--accelerator is missing"),
        ({"image": None}, "--image is missing"),
        ({"accelerator": "v5p", "topology": "4x4x6"}, "--topology=4x4x6 does not exist"),
        ({"accelerator": "v6e-256", "topology": "8x8"}, "has 64: v6e-64"),
        ({"nodes": 2}, "--nodes with --accelerator=v5p-256"),
        ({"chips_per_node": 3}, "--chips_per_node=3"),
        ({"accelerator": "nvidia-l4", "slices": 2}, "--slices with"),
        ({"accelerator": "nvidia-l4", "slices": 1, "topology": "2x2"}, "--topology with"),
        ({"mounts": (("nfs://x", "/x"),)}, "--mount=nfs://x"),
    ],
)
def test_what_cannot_be_is_refused(changes, says, tmp_path):
    options = gke.Options(**{**vars(TPU), **changes})
    with pytest.raises(UserError, match=re.escape(says)):
        gke.plan(task(), options, tmp_path / "adm-1")


def test_a_work_directory_that_pods_lose_gets_a_warning(tmp_path):
    assert gke.plan(task(), TPU, tmp_path / "adm-1").warnings == ()
    (warning,) = gke.plan(task(), GPU, tmp_path / "adm-1").warnings  # /gcs/... and /data is mounted
    assert "lost with the pods" in warning


@pytest.mark.parametrize(
    "status, suspend, state, says",
    [
        ({}, False, "waiting", "0 of 2 slices ready"),
        ({}, True, "waiting", "queue"),
        ({"replicatedJobsStatus": [{"ready": 2, "active": 2}], "restarts": 3}, False, "running", "restarted 3x"),  # noqa: E501
        ({"terminalState": "Completed"}, False, "finished", "Completed"),
        ({"terminalState": "Failed", "conditions": [{"type": "Failed", "status": "True", "message": "why"}]}, False, "failed", "why"),  # noqa: E501
    ],
)  # fmt: skip
def test_the_status_of_a_jobset_is_read(status, suspend, state, says):
    spec = {"suspend": suspend, "replicatedJobs": [{"replicas": 2}]}
    found = gke.read_jobset({"spec": spec, "status": status})
    assert found.state == state and says in found.detail
