"""The line between the processes of a run: who does not come, who has gone, what all agree on.

Without jax: a process here is a thread, or a small Python program where one is to end.
"""

import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from jdiff import exits
from jdiff.errors import UserError
from jdiff.parallel.clusters import Cluster
from jdiff.parallel.meeting import Unreached, meet

VERSIONS = {"jdiff": "1"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def gathered(clusters, timeout=20.0, versions=VERSIONS):
    """What `meet` gives each of these, met at the same time: a line, or the error."""
    found = {}

    def one(place, cluster):
        try:
            mine = versions[place] if isinstance(versions, list) else versions
            found[place] = meet(cluster, timeout, mine)
        except UserError as error:
            found[place] = error

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(clusters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout + 20)
    return [found[place] for place in range(len(clusters))]


def clusters(count, *indices, port=None):
    address = f"127.0.0.1:{port or free_port()}"
    return [Cluster("flags", address, count, i) for i in indices or range(count)]


@pytest.fixture(scope="module")
def three():
    lines = gathered(clusters(3))
    yield lines


def test_all_meet_and_know_who_they_are(three):
    assert [(line.index, line.count, line.first) for line in three] == [
        (0, 3, True), (1, 3, False), (2, 3, False)
    ]  # fmt: skip


def test_the_port_is_free_for_jax_when_all_have_met():
    lines = gathered(clusters(2, port=(port := free_port())))
    with socket.create_server(("127.0.0.1", port)):
        assert lines[0].count == 2


@pytest.mark.parametrize("who", [0, 1, 2])
def test_a_signal_to_any_stops_all_behind_one_step_that_none_has_passed(who):
    """Loops of different speed: some are a few steps ahead, as hosts are of their devices."""
    lines = gathered(clusters(3))
    stopped, seen = {}, {}
    wish_at = 20

    def loop(index):
        rng = random.Random(index)
        for step in range(101, 10_000):
            time.sleep(rng.random() * 0.002 * (index + 1))
            wish = signal.SIGTERM if index == who and step >= 100 + wish_at else None
            seen[index] = step
            if (signum := lines[index].agreed(step, wish)) is not None:
                stopped[index] = (step, signum)
                return

    threads = [threading.Thread(target=loop, args=(i,), daemon=True) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(stopped) == 3 and len(set(stopped.values())) == 1
    step, signum = stopped[0]
    assert signum == signal.SIGTERM and step > 100 + wish_at
    assert seen == dict.fromkeys(range(3), step)  # none has begun a later one


def test_asking_for_agreement_costs_a_step_next_to_nothing(three):
    start = time.perf_counter()
    for step in range(10_000):
        three[1].agreed(step, None)
    assert (time.perf_counter() - start) / 10_000 < 100e-6  # 1 us on an idle core


def test_those_who_do_not_come_are_named():
    first, third = gathered(clusters(4, 0, 2), timeout=1.0)
    assert isinstance(first, Unreached) and first.code == exits.PEER_LOST
    assert "2 of 4 processes did not come" in str(first) and "within 1 s: 1, 3." in str(first)
    assert str(third) == str(first)  # whoever came is told the same


def test_a_coordinator_that_is_not_there_is_named_with_what_to_check():
    (found,) = gathered(clusters(2, 1), timeout=0.5)
    assert isinstance(found, Unreached)
    assert "process 1 of 2 could not reach the first one at 127.0.0.1:" in str(found)
    assert "Connection refused" in str(found) and "Is process 0 running" in str(found)


def test_a_name_that_does_not_resolve_is_told():
    (found,) = gathered([Cluster("flags", "no-such-host.invalid:61000", 2, 1)], timeout=0.5)
    assert "no-such-host.invalid:61000" in str(found) and "not known" in str(found)


def test_a_port_that_is_taken_is_an_error_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (found,) = gathered(clusters(2, 0, port=taken.getsockname()[1]))
    assert "cannot listen on port" in str(found) and "Address already in use" in str(found)
    assert found.code == exits.USER


def test_processes_that_do_not_fit_together_are_told_why():
    mixed = [*clusters(3, 0, port=(port := free_port())), *clusters(2, 1, port=port)]
    for error in gathered(mixed):
        assert "process 1 was told of 2 processes, and the first of 3" in str(error)
        assert error.code == exits.USER
    twice = gathered(clusters(3, 0, 1, 1))
    assert "two processes 1" in str(twice[0])
    old = gathered(clusters(2), versions=[{"jax": "0.11"}, {"jax": "0.10"}])
    assert "runs jax 0.10; the first runs jax 0.11" in str(old[0])


def test_somebody_else_at_the_port_does_not_count():
    port = free_port()

    def stranger():
        for _ in range(200):
            try:
                with socket.create_connection(("127.0.0.1", port)) as s:
                    s.sendall(b"PRI * HTTP/2.0\r\n\r\n")
                    return
            except OSError:
                time.sleep(0.01)

    thread = threading.Thread(target=stranger)
    thread.start()
    first, second = gathered([clusters(2, 0, port=port)[0], clusters(2, 1, port=port)[0]])
    thread.join()
    assert (first.count, second.index) == (2, 1)


PROGRAM = """
import sys, time
from jdiff.parallel.clusters import Cluster
from jdiff.parallel.meeting import meet

index, count, address, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
line = meet(Cluster("flags", address, count, index), 60, {})
print("met", flush=True)
if what == "fail":
    line.fail("error: the moon is full.", 2)
if what == "finish":
    line.finish()
    sys.exit(0)
time.sleep(100)
"""


def started(*whats):
    """Programs that meet and then do this: wait, fail or finish."""
    address = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(i), str(len(whats)), address, what],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i, what in enumerate(whats)
    ]  # fmt: skip


def ended(processes):
    """(codes, all that they told on stderr)."""
    told = [process.communicate(timeout=90)[1] for process in processes]
    return [process.returncode for process in processes], "".join(told)


def test_an_error_on_one_ends_all_with_its_code_and_is_told_once():
    codes, told = ended(started("wait", "wait", "fail"))
    assert codes == [2, 2, 2]
    assert told.startswith("error: the moon is full. (process 2 of 3, on ")
    assert told.count("\n") == 1


def test_the_same_error_on_all_is_told_once():
    codes, told = ended(started("fail", "fail", "fail"))
    assert codes == [2, 2, 2]
    assert told == "error: the moon is full.\n"


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_the_others_end_and_one_of_them_says_who(killed):
    made = started("wait", "wait", "wait")
    assert [process.stdout.readline() for process in made] == ["met\n"] * 3
    made[killed].kill()
    start = time.monotonic()
    codes, told = ended(made)
    assert time.monotonic() - start < 20
    assert [c for i, c in enumerate(codes) if i != killed] == [exits.PEER_LOST] * 2
    assert told.startswith(f"error: process {killed} of 3, on ") and told.count("\n") == 1


def test_those_who_finish_wait_for_each_other_and_are_not_missed():
    assert ended(started("finish", "finish")) == ([0, 0], "")
