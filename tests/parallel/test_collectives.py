"""Collectives read from compiled programs: XLA's notations, loops, and what jax really compiles."""

import jax
import jax.numpy as jnp
import pytest

from jdiff.errors import UserError
from jdiff.parallel.collectives import Collective, collectives, counts, largest

HEADER = "HloModule jit_f, is_scheduled=true, num_partitions=8\n\n"


def program(*lines, before=""):
    return HEADER + before + "ENTRY %main (p: f32[8]) -> f32[8] {\n" + "\n".join(lines) + "\n}\n"


def one(line):
    (found,) = collectives(program("  " + line))
    return found


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=8] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=8] {'a':(2)4}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("{}", (tuple(range(8)),)),
    ],
)
def test_every_notation_of_groups(text, groups):
    found = one(f"%r = f32[4]{{0}} all-reduce(%p), replica_groups={text}, to_apply=%add")
    assert sorted(map(sorted, found.groups)) == sorted(map(sorted, groups))
    assert found.size == len(groups[0])


GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"


@pytest.mark.parametrize(
    ("line", "kind", "arrays", "size", "sent"),
    [
        (f"%r = f32[4,2]{{1,0}} all-reduce(%p), {GROUPS}", "all-reduce",
         [("f32", (4, 2))], 32, 48),
        (f"%r = (f32[3]{{0}}, /*index=1*/bf16[2,2]{{1,0:T(8,128)}}) all-reduce(%p, %q), {GROUPS}",
         "all-reduce", [("f32", (3,)), ("bf16", (2, 2))], 20, 30),
        (f"%r = (f32[3]{{0}}, f32[5]{{0}}) all-reduce-start(%p, %q), {GROUPS}", "all-reduce",
         [("f32", (3,)), ("f32", (5,))], 32, 48),
        (f"%r = (f32[2]{{0}}, f32[8]{{0}}) all-gather-start(%p), {GROUPS}, dimensions={{0}}",
         "all-gather", [("f32", (8,))], 32, 24),
        (f"%r = ((f32[2]{{0}}, s4[2]{{0}}), (f32[8]{{0}}, s4[8]{{0}})) all-gather-start(%p, %q), "
         f"{GROUPS}, dimensions={{0}}", "all-gather", [("f32", (8,)), ("s4", (8,))], 36, 27),
        (f"%r = f32[2]{{0}} reduce-scatter(%p), {GROUPS}, dimensions={{0}}", "reduce-scatter",
         [("f32", (2,))], 8, 24),
        (f"%r = (f32[1]{{0}}, f32[1]{{0}}, f32[1]{{0}}, f32[1]{{0}}) all-to-all(%a, %b, %c, %d), "
         f"{GROUPS}", "all-to-all", [("f32", (1,))] * 4, 16, 12),
        ("%r = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%p), "
         "source_target_pairs={{0,1},{1,0}}", "collective-permute", [("f32", (4,))], 16, 16),
        (f"%r = pred[6]{{0}} all-gather(%p), {GROUPS}", "all-gather", [("pred", (6,))], 6, 4.5),
    ],
)  # fmt: skip
def test_every_form_of_result(line, kind, arrays, size, sent):
    """Bytes: what a device holds afterwards; sent: by ring, of n = 4."""
    found = one(line)
    assert (found.kind, found.arrays) == (kind, tuple(arrays))
    assert (found.bytes, found.sent) == (size, sent)


def test_the_end_of_an_asynchronous_one_is_not_another():
    start = f"%s = (f32[2]{{0}}, f32[8]{{0}}) all-gather-start(%p), {GROUPS}, dimensions={{0}}"
    text = program("  " + start, "  ROOT %d = f32[8]{0} all-gather-done(%s)")
    assert counts(collectives(text)) == {"all-gather": 1}


def test_a_wrapped_one_counts_once():
    inner = f"  ROOT %r = f32[2]{{0}} reduce-scatter(%q), {GROUPS}, dimensions={{0}}\n"
    before = "%wrapped (q: f32[8]) -> f32[2] {\n" + inner + "}\n\n"
    start = "  %s = ((f32[8]{0}), f32[2]{0}) async-start(%p), calls=%wrapped"
    done = "  ROOT %d = f32[2]{0} async-done(%s), calls=%wrapped"
    assert counts(collectives(program(start, done, before=before))) == {"reduce-scatter": 1}


def test_alone_in_a_group_nothing_is_sent():
    text = "%r = f32[4]{0} all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}"
    assert collectives(program("  " + text)) == []


def test_another_text_is_refused():
    with pytest.raises(UserError, match="as_text"):
        collectives("module @jit_f { }")


def test_what_jax_compiles():
    """Trips of nested scans, bytes, groups and the place in the program, of a real one."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("b"), jax.P()))
    constrain = jax.lax.with_sharding_constraint

    def inner(w, x):
        return constrain(jnp.tanh(constrain(w, whole)) * x, split), None

    def outer(w, x):
        return jax.lax.scan(inner, w, jnp.stack([x] * 3))

    def f(w):
        w = jax.lax.scan(outer, w, jnp.arange(2.0))[0]
        return w, constrain(jnp.cos(w), jax.NamedSharding(mesh, jax.P("a"))).sum()

    w = jax.ShapeDtypeStruct((6, 5), "float32", sharding=split)
    text = jax.jit(f, out_shardings=(split, whole)).lower(w).compile().as_text()
    found = collectives(text)
    gathers = [c for c in found if c.kind == "all-gather"]
    (looped,) = [c for c in gathers if c.loops]
    assert (looped.loops, looped.trips, looped.bytes) == (2, 6, 6 * 5 * 4)
    assert sorted(looped.groups) == [(0, 1), (2, 3)] and "while" in looped.source
    assert largest(found, "all-gather") == 120 and largest(found, "reduce-scatter") == 0
    (total,) = [c for c in found if c.kind == "all-reduce"]
    assert total.arrays == (("f32", ()),) and (total.loops, total.trips) == (0, 1)


def test_an_unknown_number_of_turns():
    body = f"  %r = f32[4]{{0}} all-reduce(%q), {GROUPS}, to_apply=%add\n"
    before = "%body (q: f32[4]) -> f32[4] {\n" + body + "}\n\n"
    (found,) = collectives(
        program("  %w = f32[4]{0} while(%p), condition=%cond, body=%body", before=before)
    )
    assert isinstance(found, Collective) and (found.trips, found.loops) == (None, 1)
