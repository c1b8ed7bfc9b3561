"""Traces in the forms of TPU, GPU and CPU, whose sums are known.

These are not recordings: they are written after OpenXLA's xplane.proto and xplane_schema.h (names
of planes, lines and stats) and the names that XLA, CUPTI and NCCL give to operations. What a CPU
really records is tested in test_tracer.py.
"""

import jax
import pytest

from jdiff.errors import UserError
from jdiff.profiling import xplane
from jdiff.profiling.breakdown import breakdown
from jdiff.profiling.operations import What, doing, instruction, place, what
from jdiff.profiling.xplane import Frame


def serialised(*planes):
    """An XSpace of (name, {line: [(event's name, start ms, end ms, its stats, its kind's)]})."""
    text = []
    for name, lines in planes:
        stats, kinds, body = {}, {}, []

        def stat(key, value, stats=stats):
            number = stats.setdefault(key, len(stats) + 1)
            kind = "str_value" if isinstance(value, str) else "int64_value"
            shown = f'"{value}"' if isinstance(value, str) else value
            return f"stats {{ metadata_id: {number} {kind}: {shown} }}"

        for line, events in lines.items():
            shown = []
            for event, start, end, *more in events:
                own, common = (*more, {}, {})[:2]
                number = kinds.setdefault((event, *common.items()), len(kinds) + 1)
                facts = " ".join(stat(k, v) for k, v in own.items())
                shown.append(
                    f"events {{ metadata_id: {number} offset_ps: {round((start - 1) * 1e9)} "
                    f"duration_ps: {round((end - start) * 1e9)} {facts} }}"
                )  # the line begins at 1 ms, so that offsets may be negative
            body.append(f'lines {{ name: "{line}" timestamp_ns: 1000000 {" ".join(shown)} }}')
        for (event, *common), number in kinds.items():
            facts = " ".join(stat(k, v) for k, v in common)
            body.append(
                f"event_metadata {{ key: {number} value {{ id: {number} "
                f'name: "{event}" {facts} }} }}'
            )
        for key, number in stats.items():
            body.append(f'stat_metadata {{ key: {number} value {{ id: {number} name: "{key}" }} }}')
        text.append(f'planes {{ name: "{name}" {" ".join(body)} }}')
    return jax.profiler.ProfileData.text_proto_to_serialized_xspace("\n".join(text))


def read(*planes):
    return breakdown(xplane.parse(serialised(*planes)))


def ms(split):
    return {name: round(1e3 * seconds, 6) for name, seconds in split.items() if seconds}


def host(*parts, steps=((7, 0, 100),)):
    """The loop's thread: parts as (name, start, end)."""
    events = [("train", start, end, {"step_num": n, "_r": 1}) for n, start, end in steps]
    events += [(f"jdiff {name}", start, end) for name, start, end in parts]
    return ("/host:CPU", {"python": events})


def test_a_tpu_whose_loop_waits_for_data_and_whose_gather_is_half_hidden():
    source = {"tf_op": "jit(step)/jvp(DiT)/dot_general:"}
    fusion = "%fusion.12 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%p.1, %p.2), kind=kOutput"
    gather = "%all-gather-start.3 = (f32[8]{0}, f32[64]{0:S(1)}) all-gather-start(%p.1)"
    done = "%all-gather-done.3 = f32[64]{0:S(1)} all-gather-done(%all-gather-start.3)"
    loop = "%while.4 = (s32[], f32[8]{0}) while(%tuple.1), condition=%c, body=%b"
    found = read(
        host(("input", 60, 90), ("dispatch", 90, 95)),
        ("/device:TPU:0", {
            "Steps": [("7", 0, 60)],
            "XLA Modules": [("jit_step(12)", 10, 60), ("jit_step(12)", 95, 100)],
            "XLA Ops": [
                (gather, 10, 11), (loop, 11, 31), (fusion, 12, 20, {}, source),
                (fusion, 20, 30, {}, source),
                (done, 40, 50), (fusion, 95, 100, {}, source),
            ],
            "Async XLA Ops": [
                (gather, 10, 11, {"flow": 5}), (done, 40, 50, {"flow": 5}),
                ("%copy-start.1 = (f32[8]{0}, u32[]) copy-start(%p.1)", 50, 60, {"flow": 6}),
            ],
            "Framework Ops": [("dot_general", 0, 100)],
        }),
        ("/device:TPU:0 SparseCore 0", {"XLA Ops": [(fusion, 0, 100)]}),
    )  # fmt: skip
    # The gather flies from 10 to 50, of which the fusions hide 18.
    assert ms(found.split) == {
        "compute": 23, "collectives": 22, "gaps": 10, "input": 30, "host": 15,
    }  # fmt: skip
    assert (found.steps, found.devices) == ((7,), 1)
    assert found.seconds == pytest.approx(0.1)
    assert found.hidden == pytest.approx(0.018)
    assert ms(found.collectives) == {"all-gather": 40}
    dearest = found.dearest[0]
    assert dearest._replace(seconds=0) == (
        "fusion.12", "dot_general, forward", "", "compute", 0, 3
    )  # fmt: skip
    assert dearest.seconds == pytest.approx(0.023)
    names = [o.name for o in found.dearest]
    assert names == ["fusion.12", "all-gather-done.3", "all-gather-start.3"]


def test_two_gpus_whose_reduction_runs_on_a_stream_of_its_own():
    ring = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    send = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
    of = lambda op: {"hlo_op": op, "hlo_module": "jit_step", "program_id": 3}
    gpu = lambda shift: {
        "Stream #13(Compute,MemcpyH2D)": [
            ("MemcpyH2D", 0, 50, {}), ("sm90_xmma_gemm_f32f32", 100, 400, of("custom-call.2")),
            ("loop_add_fusion", 400 + shift, 600, of("loop_add_fusion")),
            ("loop_add_fusion", 610, 700, of("loop_add_fusion")),
        ],
        "Stream #20(Compute)": [
            (ring, 300, 800, of("all-reduce-start")), (send, 900, 960, of("all-to-all.1")),
        ],
        "XLA Ops": [("all-reduce-start", 0, 1000)], "Steps": [("7", 0, 1000)],
    }  # fmt: skip
    found = read(
        host(("checkpoint", 800, 900), ("samples", 960, 990), steps=((7, 0, 990), (8, 990, 1000))),
        ("/device:GPU:0", gpu(0)), ("/device:GPU:1", gpu(100)),
    )  # fmt: skip
    # The first computes 590 and shows 170 of its collectives; the second 100 less, and 100 more.
    assert ms(found.split) == {
        "compute": 540, "collectives": 220, "transfers": 50, "checkpoint": 100, "samples": 30,
        "host": 60,
    }  # fmt: skip
    assert found.hidden == pytest.approx(0.34)
    assert found.devices == 2
    assert found.steps == (7, 8)
    assert ms(found.collectives) == {"all-reduce": 500, "all-to-all": 60}
    assert sum(found.split.values()) == pytest.approx(found.seconds)


def test_on_cpu_operations_are_events_of_threads_and_programs_say_what_they_are():
    of = lambda device, run: {
        "hlo_op": "x", "hlo_module": "jit_step", "device_ordinal": device, "run_id": run,
    }  # fmt: skip
    named = lambda op, *facts: of(*facts) | {"hlo_op": op}
    found = read(("/host:CPU", {
        "python": [
            ("train", 0, 60, {"step_num": 3}), ("train", 60, 100, {"step_num": 4}),
            ("jdiff input", 42, 62),
        ],
        "tf_XLAPjRtCpuClient/1": [
            ("ThreadpoolListener::Record", 0, 90, {}),
            ("fusion", 0, 10, named("fusion", 0, 1)), ("psum.7", 12, 40, named("psum.7", 0, 1)),
            ("fusion", 80, 100, named("fusion", 0, 2)), ("end: fusion", 100, 300, {}),
        ],
        "tf_XLAPjRtCpuClient/2": [
            ("fusion", 0, 30, named("fusion", 1, 1)), ("psum.7", 30, 40, named("psum.7", 1, 1)),
            ("fusion", 80, 100, named("fusion", 1, 2)),
        ],
    }))  # fmt: skip
    assert (found.steps, found.devices) == ((3, 4), 2)
    # The first waits 18 for the second in the reduction, and its own gap of 2 is in a program.
    assert ms(found.split) == {
        "compute": 40, "collectives": 19, "gaps": 1, "input": 20, "host": 20,
    }  # fmt: skip


def test_what_ran_before_the_first_step_is_left_out():
    found = read(
        host(steps=((5, 20, 100),)),
        ("/device:TPU:0", {"XLA Ops": [("fusion.1", 0, 10), ("fusion.2", 10, 50)]}),
    )
    assert ms(found.split) == {"compute": 30, "host": 50}
    assert [o.name for o in found.dearest] == ["fusion.2"]


@pytest.mark.parametrize(
    ("planes", "words"),
    [
        ((("/device:TPU:0", {"XLA Ops": [("fusion.1", 0, 10)]}),), "no training step"),
        ((host(),), "no operation of a device"),
    ],
)
def test_a_trace_of_something_else_is_named(planes, words):
    with pytest.raises(UserError, match=words):
        read(*planes)


@pytest.mark.parametrize(
    ("name", "opcode", "wanted"),
    [
        ("all-reduce.17", None, ("collective", "all-reduce")),
        ("all-reduce-start.1", None, ("collective", "all-reduce")),
        ("all-gather-done.2.clone", None, ("collective", "all-gather")),
        ("reduce-scatter.3", None, ("collective", "reduce-scatter")),
        ("all-to-all", None, ("collective", "all-to-all")),
        ("ragged-all-to-all.1", None, ("collective", "all-to-all")),
        ("collective-permute-start.9", None, ("collective", "collective-permute")),
        ("psum.7", None, ("collective", "all-reduce")),
        ("ppermute.3", None, ("collective", "collective-permute")),
        ("psum.7", "all-reduce", ("collective", "all-reduce")),
        ("psum.8", "fusion", ("compute", "fusion")),  # what was made of the sum, not the sum
        ("psum_of_squares", None, ("compute", "psum_of_squares")),
        ("all-reduce-scatter.1", "fusion", ("collective", "reduce-scatter")),
        ("async-collective-fusion.4", "fusion", ("collective", "collective")),
        ("all-gather-start.1", "async-start", ("collective", "all-gather")),
        ("slice-start.1", "async-start", ("compute", "async-start")),
        ("send.1", "send", ("collective", "send and recv")),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(x)", None, ("collective", "reduce-scatter")),
        ("ncclKernel_AllGather_RING_LL_Sum_int8_t", None, ("collective", "all-gather")),
        ("MemcpyD2H", None, ("transfer", "MemcpyD2H")),
        ("MemcpyD2D", None, ("compute", "MemcpyD2D")),
        ("while.8", "while", ("control", "while")),
        ("conditional.clone", "conditional", ("control", "conditional")),
        ("fusion.31", "fusion", ("compute", "fusion")),
        ("reduce.3", "reduce", ("compute", "reduce")),
        ("copy-start.1", "copy-start", ("compute", "copy-start")),
    ],
)
def test_names(name, opcode, wanted):
    assert what(name, opcode) == What(*wanted)


def test_an_instruction_is_read_from_its_text():
    text = "%fusion.2 = (f32[8,128]{1,0:T(8,128)S(1)}, s32[]) fusion(%a, f32[] %b), kind=kLoop"
    assert instruction(text) == ("fusion.2", "fusion")
    assert instruction("ROOT") == ("ROOT", None)
    assert instruction("%psum.7") == ("psum.7", None)


def test_operations_have_a_place_and_a_pass():
    frames = (
        Frame("Linear.__call__", "/a/models/layers.py", 43),
        Frame("attend.<locals>.<genexpr>", "/a/models/dit.py", 7),
    )
    assert place(frames) == "Linear (layers.py:43) in attend (dit.py:7)"
    assert place(()) == ""
    names = {
        "jit(step)/jvp()/dot_general": "dot_general, forward",
        "jit(step)/transpose(jvp(bhqd->bhdq))/mul": "mul, backward",
        "jit(step)/transpose(jvp())/rematted_computation/tanh": "tanh, again",
        "jit(step)/sqrt": "sqrt",
        "jit(step)/a/mul;jit(step)/b/add": "mul",
        "jit(step)/(a/dot_general:b/dot_general)": "",
        "jit(step)/jvp(DiT)/dot_general:": "dot_general, forward",  # as on TPUs
    }
    assert {name: doing(name) for name in names} == names
