"""The split of wall time, on a clock that the test moves and with steps that it finishes."""

import threading

import numpy as np
import pytest

from jdiff.profiling.clock import PARTS, Clock


class Step:
    """What a step gives back; it is ready when the test says so."""

    def __init__(self):
        self.ready = threading.Event()

    def block_until_ready(self):
        assert self.ready.wait(30)


class World:
    """A loop and a device by the test's own clock."""

    def __init__(self):
        self.time = 100.0
        self.clock = Clock("other", now=lambda: self.time)
        self.running = []

    def to(self, time):
        self.time = 100.0 + time

    def dispatch(self):
        step = Step()
        self.running.append(step)
        self.clock.dispatched(step, self.time)

    def finish(self):
        """The oldest step is ready now; if it is the last that runs, the clock has seen it."""
        self.running.pop(0).ready.set()
        if not self.running:
            self.clock.wait()

    def spent(self):
        return {name: s for name, s in self.clock.settle().items() if s}


@pytest.fixture
def world():
    made = World()
    with made.clock:
        yield made
        while made.running:
            made.finish()


def test_waiting_for_data_while_a_step_runs_costs_nothing(world):
    world.dispatch()
    with world.clock.part("input"):
        world.to(4)
    world.dispatch()
    world.to(10)
    world.finish()
    world.to(20)
    world.finish()
    assert world.spent() == {"steps": 20}


def test_waiting_for_data_when_the_step_is_done_is_waiting(world):
    world.dispatch()
    with world.clock.part("input"):
        world.to(3)
        world.finish()
        world.to(10)
    world.dispatch()
    world.to(13)
    world.finish()
    assert world.spent() == {"steps": 6, "input": 7}


def test_what_happens_inside_a_part_is_not_also_what_is_around_it(world):
    with world.clock.part("samples"):
        world.to(2)
        with world.clock.part("compile"):
            world.to(7)
        world.to(8)
    world.to(9)
    assert world.spent() == {"samples": 3, "compile": 5, "other": 1}


def test_a_step_that_runs_on_is_counted_on_both_sides_of_a_look(world):
    world.dispatch()
    world.to(4)
    assert world.spent() == {"steps": 4}
    world.to(6)
    world.finish()
    world.to(9)
    assert world.spent() == {"steps": 2, "other": 3}


def test_a_look_inside_a_part_leaves_the_part_open(world):
    with world.clock.part("logging"):
        world.to(1)
        assert world.spent() == {"logging": 1}
        world.to(3)
    assert world.spent() == {"logging": 2}


def test_what_is_outside_of_all_parts_has_a_name_too(world):
    world.to(2)
    world.clock.begin("start")
    world.to(5)
    assert world.spent() == {"other": 2, "start": 3}


def test_a_step_that_fails_is_over(world):
    class Broken:
        def block_until_ready(self):
            raise RuntimeError("the device is gone")

    world.clock.dispatched(Broken(), world.time)
    world.clock.wait()
    world.to(5)
    assert world.spent() == {"other": 5}


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_are_a_partition_of_the_wall_time(world, seed):
    """Against the same story told tick by tick."""
    rng = np.random.default_rng(seed)
    names = [name for name in PARTS if name != "steps"]
    told = dict.fromkeys(PARTS, 0)
    queue, now = 0, 0
    for _ in range(60):
        name = names[rng.integers(len(names))]
        with world.clock.part(name):
            for _ in range(rng.integers(0, 5)):
                told["steps" if queue else name] += 1
                now += 1
                world.to(now)
                if queue and rng.random() < 0.4:
                    world.finish()
                    queue -= 1
        if rng.random() < 0.5:
            world.dispatch()
            queue += 1
        if rng.random() < 0.1:
            for part, seconds in world.clock.settle().items():
                told[part] -= seconds
    for part, seconds in world.clock.settle().items():
        told[part] -= seconds
    assert told == dict.fromkeys(PARTS, 0)


def test_parts_are_named_in_a_trace_while_one_is_recorded(world):
    seen = []

    class Annotation:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            seen.append(("in", self.name))

        def __exit__(self, *error):
            seen.append(("out", self.name))

    world.clock.annotated(Annotation)
    with world.clock.part("input"):
        pass
    assert seen == [("in", "jdiff input"), ("out", "jdiff input")]
