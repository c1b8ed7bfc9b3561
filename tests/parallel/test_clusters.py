"""What recorded environments of schedulers mean, and which variable an error names."""

import pytest

from jdiff.errors import UserError
from jdiff.parallel.clusters import Cluster, Given, detect

# srun -N 2 -n 4, the third task.
SLURM_TWO_NODES = {
    "SLURM_JOB_ID": "43117", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_JOB_NODELIST": "gpu[007-008]", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2",
}  # fmt: skip
# srun -N 1 -n 2, the second task.
SLURM_ONE_NODE = SLURM_TWO_NODES | {
    "SLURM_STEP_NODELIST": "node3", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
}  # fmt: skip
# mpirun of Open MPI 4 on two hosts, started inside a SLURM job: below it, SLURM's variables are
# those of mpirun's daemon, of which there is one a node.
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "SLURM_JOB_ID": "9", "SLURM_STEP_NODELIST": "b", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
}  # fmt: skip
# Open MPI 5 on one host tells of no address.
OPEN_MPI_5 = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-box-7133@1",
}  # fmt: skip
# A JobSet of two v5e slices of two hosts each; the second host of the second slice.
GKE = {
    "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "true",
    "TPU_WORKER_HOSTNAMES": "jdiff-slice-1-0.jdiff,jdiff-slice-1-1.jdiff",
    "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "jdiff-slice-0-0.jdiff", "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JOB_COMPLETION_INDEX": "1",
}  # fmt: skip
# An indexed job of two GPU nodes, as `jdiff launch --platform=gke` writes it.
GKE_GPU = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1", "JAX_NUM_PROCESSES": "2",
    "JAX_COORDINATOR_ADDRESS": "jdiff-workers-0-0.jdiff:1234",
}  # fmt: skip
TPU_VM = {
    "agent-worker-number": "2",
    "worker-network-endpoints": "unknown:unknown:10.130.0.31,unknown:unknown:10.130.0.29,"
    "unknown:unknown:10.130.0.30,unknown:unknown:10.130.0.32",
    "tpu-env": "ACCELERATOR_TYPE: 'v4-32'\nWORKER_ID: '2'\nZONE: 'us-central2-b'\n",
}
NONE = Given()


def test_a_laptop_is_alone():
    assert detect(NONE, {"HOME": "/home/me", "PATH": "/bin"}) is None


def test_slurm_on_two_nodes():
    found = detect(NONE, SLURM_TWO_NODES)
    host, port = found.coordinator.split(":")
    assert (found.found, host, found.count, found.index) == ("SLURM", "gpu007", 4, 2)
    assert 61440 <= int(port) < 65536  # where Linux gives out no port by itself


def test_the_tasks_of_a_slurm_step_find_one_port_and_another_step_another():
    others = [detect(NONE, SLURM_TWO_NODES | {"SLURM_PROCID": str(i)}) for i in range(4)]
    assert len({c.coordinator for c in others}) == 1
    ports = {
        detect(NONE, SLURM_TWO_NODES | {"SLURM_JOB_ID": str(j), "SLURM_STEP_ID": s}).coordinator
        for j in range(10) for s in ("0", "1")
    }  # fmt: skip
    assert len(ports) > 15


def test_tasks_that_share_a_node_share_its_gpus_and_one_to_itself_takes_all():
    assert detect(NONE, SLURM_ONE_NODE, gpus=8).devices == (4, 5, 6, 7)
    assert detect(NONE, SLURM_ONE_NODE, gpus=2).devices == (1,)
    assert detect(NONE, SLURM_ONE_NODE, gpus=1).devices is None  # bound by the scheduler
    assert detect(NONE, SLURM_ONE_NODE).devices is None
    lone = SLURM_TWO_NODES | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NUM_TASKS": "2",
                              "SLURM_PROCID": "1"}  # fmt: skip
    assert detect(NONE, lone, gpus=8).devices is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node3", "node3"), ("node3,node9", "node3"), ("n[001-128],m1", "n001"),
        ("n[004,006-008]", "n004"), ("rack[2-3]n[10-11]", "rack2n10"),
        ("a-1-[07-08].x", "a-1-07.x"),
    ],
)  # fmt: skip
def test_the_first_node_of_a_list(nodes, first):
    found = detect(NONE, SLURM_TWO_NODES | {"SLURM_STEP_NODELIST": nodes})
    assert found.coordinator.split(":")[0] == first


@pytest.mark.parametrize(
    "environ",
    [
        SLURM_TWO_NODES | {"SLURM_STEP_NUM_TASKS": "1"},
        # a batch script, and an interactive step: of several tasks, but not of srun's
        {"SLURM_JOB_ID": "4", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_NODELIST": "a[1-2]"},
        SLURM_TWO_NODES | {"SLURM_STEP_ID": "4294967290"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "elsewhere:1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0",
         "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
    ],
)  # fmt: skip
def test_one_process_starts_nothing(environ):
    assert detect(NONE, environ) is None


def test_open_mpi_goes_before_slurm():
    found = detect(NONE, OPEN_MPI, gpus=4)
    assert (found.found, found.count, found.index, found.devices) == ("Open MPI", 4, 3, (2, 3))
    assert found.coordinator.startswith("10.96.0.1:")


def test_open_mpi_5_on_one_host_and_on_two():
    assert detect(NONE, OPEN_MPI_5).coordinator.startswith("127.0.0.1:")
    two = OPEN_MPI_5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    with pytest.raises(UserError, match=r"OMPI_MCA_orte_hnp_uri.*--coordinator=HOST:PORT"):
        detect(NONE, two)
    assert detect(Given(coordinator="a:7000"), two) == Cluster("Open MPI", "a:7000", 2, 1)


def test_slices_of_tpus_on_gke():
    found = detect(NONE, GKE)
    assert found == Cluster("GKE", "jdiff-slice-0-0.jdiff:8482", 4, 3)
    single = {k: v for k, v in GKE.items() if not k.startswith("MEGASCALE")}
    assert detect(NONE, single) == Cluster("GKE", "jdiff-slice-1-0.jdiff:8482", 2, 1)


def test_an_indexed_job_of_gpu_nodes():
    found = detect(NONE, GKE_GPU, gpus=8)
    assert found == Cluster("JAX_NUM_PROCESSES", "jdiff-workers-0-0.jdiff:1234", 2, 1)


def test_a_tpu_vm_by_its_metadata():
    found = detect(NONE, {}, metadata=TPU_VM.get)
    assert found == Cluster("Cloud TPU VM", "10.130.0.31:8482", 4, 2)
    slices = {
        "agent-worker-number": "0", "worker-network-endpoints": "host-a,host-b",
        "tpu-env": "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
        "MEGASCALE_COORDINATOR_ADDRESS: '10.1.2.3:8080'\n",
    }  # fmt: skip
    assert detect(NONE, {}, metadata=slices.get) == Cluster("Cloud TPU VM", "10.1.2.3:8482", 4, 2)
    assert detect(NONE, {}, metadata={}.get) is None  # no TPU VM after all
    alone = {"agent-worker-number": "0", "worker-network-endpoints": "a"}
    assert detect(NONE, {}, metadata=alone.get) is None


def test_flags_go_before_the_environment():
    flags = Given("head:7000", 3, 0)
    assert detect(flags, SLURM_TWO_NODES) == Cluster("flags", "head:7000", 3, 0)
    assert detect(Given(processes=1), SLURM_TWO_NODES) is None
    moved = detect(Given(coordinator="[fe80::1]:7000"), SLURM_TWO_NODES)
    assert (moved.coordinator, moved.count, moved.index) == ("[fe80::1]:7000", 4, 2)


@pytest.mark.parametrize(
    ("given", "environ", "named"),
    [
        (Given(processes=2), {}, r"--coordinator=.* and --process=I"),
        (Given("a:1", 2), {}, r"^of many processes, --process=I \(JAX_PROCESS_ID\)"),
        (Given("a:1"), {}, r"--processes=N --process=I"),
        (Given(processes=2, process=0), {}, r"--coordinator=HOST:PORT"),
        (Given("a:1", 2, 2), {}, r"process 2 of 2: .* 0 to 1"),
        (Given("a", 2, 0), {}, r"coordinator 'a' given; HOST:PORT"),
        (Given("a:http", 2, 0), {}, r"coordinator 'a:http' given"),
        (NONE, {"JAX_NUM_PROCESSES": "two"}, r"JAX_NUM_PROCESSES='two'"),
        (NONE, {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, r"JAX_COORDINATOR_ADDRESS"),
        (NONE, GKE | {"MEGASCALE_COORDINATOR_ADDRESS": ""}, r"MEGASCALE_COORDINATOR_ADDRESS"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(given, environ, named):
    with pytest.raises(UserError, match=named):
        detect(given, environ)


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        (SLURM_TWO_NODES, "SLURM_STEP_NUM_TASKS SLURM_NTASKS"), (SLURM_TWO_NODES, "SLURM_JOB_ID"),
        (SLURM_TWO_NODES, "SLURM_LOCALID"), (OPEN_MPI, "OMPI_COMM_WORLD_RANK"),
        (OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK"), (GKE, "TPU_WORKER_ID"),
        (GKE, "MEGASCALE_SLICE_ID"),
    ],
)  # fmt: skip
def test_a_variable_that_a_scheduler_forgot_is_named(environ, name):
    without = {k: v for k, v in environ.items() if k not in name.split()}
    with pytest.raises(UserError, match=f"{name.split()[-1]} is missing.*--coordinator"):
        detect(NONE, without)
