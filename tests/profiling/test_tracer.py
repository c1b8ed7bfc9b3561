"""A trace that jax's profiler records here, of a loop on four simulated devices."""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff.errors import UserError
from jdiff.profiling import tracer, xplane
from jdiff.profiling.breakdown import breakdown
from jdiff.profiling.clock import Clock

WAIT = 0.02  # seconds for data, in every step


def loop(wanted, folder, *, steps=range(1, 9), tell=None, stop=None):
    """A training loop in small: data in parallel, so that gradients are summed over devices."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = (
        jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((), ("data",))
    )  # fmt: skip

    @functools.partial(jax.jit, in_shardings=(whole, split), out_shardings=whole)
    # A name of its own: the trace knows every program of this process, and finds them by name.
    def step_of_this_test(w, x):
        return w - 0.1 * jax.grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)

    w, x = jnp.ones((32, 32)), np.ones((64, 32), np.float32)
    taken = []
    with Clock() as clock, tracer.recording(wanted, folder, steps, clock, tell) as numbers:
        for number in numbers:
            with clock.part("input"):
                time.sleep(WAIT)
                batch = jax.device_put(x, split)
            begun = clock.now()
            w = step_of_this_test(w, batch)
            clock.dispatched(w, begun)
            taken.append(number)
            if number == stop:
                raise KeyError(number)
        clock.wait()
    return taken


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(folder of the trace, what was told)."""
    folder, told = tmp_path_factory.mktemp("run"), []
    assert loop(tracer.Profile(3, 4), folder, tell=told.append) == list(range(1, 9))
    return folder / "profile", told


def test_the_summary_says_where_the_time_of_the_chosen_steps_went(recorded):
    folder, told = recorded
    found = json.loads((folder / "summary.json").read_text())
    assert found["steps"] == [3, 4, 5, 6]
    assert found["devices"] == 4
    assert sum(found["split"].values()) == pytest.approx(found["seconds"], rel=1e-6)
    # It begins at rest, so the first wait is all waiting. Later ones may be hidden by a step.
    split = found["split"]
    assert 0.99 * WAIT < split["input"] < found["seconds"]
    running = split["compute"] + split["collectives"] + split["gaps"]
    assert split["input"] + running > 0.99 * 4 * WAIT
    assert found["split"]["compute"] > 0
    assert list(found["collectives"]) == ["all-reduce"]
    assert found["collectives"]["all-reduce"] > 0
    assert (folder / found["trace"]).is_file()
    (line,) = told
    assert str(folder) in line and "% input" in line


def test_the_dearest_operations_say_what_they_are_and_where_they_come_from(recorded):
    dearest = breakdown(xplane.read(xplane.newest(recorded[0])), dearest=1000).dearest
    sums = [o for o in dearest if o.kind == "collective"]
    assert len(sums) == 1 and sums[0].count == 4  # one a step
    products = [o for o in dearest if "dot_general" in o.doing]
    assert {o.doing for o in products} == {"dot_general, forward", "dot_general, backward"}
    assert all("test_tracer.py:" in o.place for o in products)
    assert [o.seconds for o in dearest] == sorted((o.seconds for o in dearest), reverse=True)
    summary = json.loads((recorded[0] / "summary.json").read_text())
    assert summary["dearest"] == [o._asdict() for o in dearest[:10]]


def test_programs_from_the_compilation_cache_have_other_numbers_than_their_events(recorded):
    planes = xplane.read(xplane.newest(recorded[0]))
    wanted = breakdown(planes, dearest=1000).dearest
    for plane in planes:
        moved = {number + 1000: program for number, program in plane.programs.items()}
        wrong = {
            number: xplane.Program("jit_other", dict.fromkeys(program.operations))
            for number, program in plane.programs.items()
        }
        plane.programs = wrong | moved
    assert breakdown(planes, dearest=1000).dearest == wanted


def test_the_reader_agrees_with_jax_s_own(recorded):
    path = xplane.newest(recorded[0])
    theirs = {
        (plane.name, line.name, event.name, round(event.start_ns), round(event.duration_ns),
         *sorted((k, str(v)) for k, v in dict(event.stats).items()))
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines for event in line.events
    }  # fmt: skip
    ours = {
        (plane.name, line.name, event.name, round(event.start), round(event.end - event.start),
         *sorted((k, str(v)) for k, v in event.stats.items()))
        for plane in xplane.read(path) for line in plane.lines for event in line
    }  # fmt: skip
    assert len(ours) > 100
    assert ours == theirs


def test_a_trace_that_is_cut_off_is_named(recorded, tmp_path):
    path = tmp_path / "x.xplane.pb"
    path.write_bytes(xplane.newest(recorded[0]).read_bytes()[:-7])
    with pytest.raises(UserError, match=r"x.xplane.pb is damaged"):
        xplane.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        xplane.read(tmp_path / "none")


def test_an_error_in_a_traced_step_ends_the_trace(tmp_path):
    with pytest.raises(KeyError):
        loop(tracer.Profile(2, 4), tmp_path, stop=3)
    assert not (tmp_path / "profile" / "summary.json").exists()
    jax.profiler.start_trace(str(tmp_path / "next"))  # none is running any more
    jax.profiler.stop_trace()


def test_steps_that_are_not_taken_cannot_be_traced(tmp_path):
    with pytest.raises(UserError, match=r"--profile=5:6 goes up to step 10 .* has 8 to take"):
        loop(tracer.Profile(5, 6), tmp_path)
    assert loop(None, tmp_path, steps=range(3, 5)) == [3, 4]
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("text", "wanted"), [("11:5", (11, 5)), ("3", (3, 5)), ("1:1", (1, 1))]
)  # fmt: skip
def test_an_option_is_read(text, wanted):
    assert tracer.profile(text) == wanted


@pytest.mark.parametrize("text", ["", "a:b", "3:", "0:5", "3:0", "1:2:3", "-1"])
def test_an_option_that_is_something_else_is_named(text):
    with pytest.raises(UserError, match="--profile="):
        tracer.profile(text)


def test_a_trace_of_nothing_is_named(tmp_path):
    jax.profiler.start_trace(str(tmp_path))
    jax.profiler.stop_trace()
    with pytest.raises(UserError, match="no training step"):
        breakdown(xplane.read(xplane.newest(tmp_path)))
