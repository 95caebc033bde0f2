"""What is read from a program's text: cycles and collectives, as often as loops run, nothing twice."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.config import MeshConfig
from clip_jax.planning import topology
from clip_jax.planning.hlo import Collective, Program, bytes_of, parsed
from clip_jax.sharding import make_mesh

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

# As a TPU's compiler writes: no trip counts, limits in conditions. An outer loop of 3 rounds (from 1 to 7 in steps of
# 2) around an inner one of 5; an asynchronous pair; a collective spread over three fusions; one in a fusion of its own.
TEXT = """\
HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  ROOT %exp = f32[8]{0:T(128)} exponential(%p), backend_config={"estimated_cycles":"7777"}
}

%inner_body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %v = f32[8]{0:T(128)} get-tuple-element(%s), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %w = f32[8]{0:T(128)} fusion(%v), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
  %start = (f32[8]{0:T(128)}, f32[8]{0:T(128)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%w), channel_id=1
  %done = f32[8]{0:T(128)} collective-permute-done(%start)
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%next, %done)
}

%inner_condition (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %five = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i, %five), direction=LT
}

%outer_body (s: (f32[8], /*index=1*/s32[])) -> (f32[8], s32[]) {
  %s = (f32[8]{0:T(128)}, /*index=1*/s32[]{:T(128)}) parameter(0)
  %v = f32[8]{0:T(128)} get-tuple-element(%s), index=0
  %k = s32[]{:T(128)} get-tuple-element(%s), index=1
  %zero = s32[]{:T(128)} constant(0)
  %begin = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%zero, %v)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%begin), condition=%inner_condition, body=%inner_body
  %u = f32[8]{0:T(128)} get-tuple-element(%loop), index=1
  %next = s32[]{:T(128)} fusion(%k), kind=kLoop, calls=%two_more, backend_config={"estimated_cycles":"10"}
  %r = f32[8]{0:T(128)} all-reduce(%u), channel_id=2, replica_groups=mesh['a'=8] {'a'}, to_apply=%add
  ROOT %t = (f32[8]{0:T(128)}, s32[]{:T(128)}) tuple(%r, %next)
}

%two_more (k: s32[]) -> s32[] {
  %k = s32[]{:T(128)} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  ROOT %sum = s32[]{:T(128)} add(%k, %two)
}

%not_yet (k: s32[], limit: s32[]) -> pred[] {
  %k = s32[]{:T(128)} parameter(0)
  %limit = s32[]{:T(128)} parameter(1)
  ROOT %less = pred[]{:T(512)} compare(%k, %limit), direction=LT
}

%outer_condition (s: (f32[8], s32[])) -> pred[] {
  %s = (f32[8]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %k = s32[]{:T(128)} get-tuple-element(%s), index=1
  %seven = s32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} fusion(%k, %seven), kind=kLoop, calls=%not_yet
}

%begins (p: bf16[2,4]) -> (bf16[2,4], bf16[16,4], u32[]) {
  %p = bf16[2,4]{1,0} parameter(0)
  %all-gather.1 = bf16[16,4]{1,0} all-gather(%p), channel_id=72, dimensions={0}
  ROOT %c = (bf16[2,4], bf16[16,4], u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.7 (p: bf16[2,4], q: f32[8]) -> (f32[8], bf16[16,4]) {
  %p = bf16[2,4]{1,0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %all-gather.2 = bf16[16,4]{1,0} all-gather(%p), channel_id=72, dimensions={0}
  ROOT %t = (f32[8]{0}, bf16[16,4]{1,0}) tuple(%q, %all-gather.2)
}

%ends (p: bf16[2,4]) -> bf16[16,4] {
  %p = bf16[2,4]{1,0} parameter(0)
  %all-gather.3 = bf16[16,4]{1,0} all-gather(%p), channel_id=72, dimensions={0}
  ROOT %custom = bf16[16,4]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.3 (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %zero = s32[] constant(0)
  %all-reduce.9 = f32[64]{0} all-reduce(%p), channel_id=3, to_apply=%add
  ROOT %slice = f32[8]{0} dynamic-slice(%all-reduce.9, %zero), dynamic_slice_sizes={8}
}

ENTRY %main (a: f32[8], b: bf16[2,4], c: f32[64]) -> f32[8] {
  %a = f32[8]{0:T(128)} parameter(0)
  %b = bf16[2,4]{1,0} parameter(1)
  %c = f32[64]{0} parameter(2)
  %one = s32[]{:T(128)} constant(1)
  %begin = (f32[8]{0:T(128)}, s32[]{:T(128)}) tuple(%a, %one)
  %loop = (f32[8]{0:T(128)}, s32[]{:T(128)}) while(%begin), condition=%outer_condition, body=%outer_body
  %out = f32[8]{0:T(128)} get-tuple-element(%loop), index=0
  %f1 = (bf16[2,4]{1,0}, bf16[16,4]{1,0}, u32[]) fusion(%b), kind=kCustom, calls=%begins
  %f2 = (f32[8]{0}, bf16[16,4]{1,0}) fusion(%b, %out), kind=kOutput, calls=%async_collective_fusion.7
  %f3 = bf16[16,4]{1,0} fusion(%b), kind=kCustom, calls=%ends
  %f4 = f32[8]{0} fusion(%c), kind=kCustom, calls=%all-reduce-scatter.3, backend_config={"estimated_cycles":"1"}
  ROOT %last = f32[8]{0:T(128)} fusion(%out), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"1000"}
}
"""


def test_cycles_in_loops_count_as_often_as_these_run_and_what_is_inside_a_fusion_not_again():
    assert Program.of_text(TEXT).cycles() == 3 * (5 * 100 + 10) + 1 + 1000


def test_collectives_count_as_often_as_loops_run_and_asynchronous_ones_once():
    assert set(Program.of_text(TEXT).collectives()) == {
        Collective("collective-permute", 32, 15),
        Collective("all-reduce", 32, 3),
        Collective("all-gather", 128, 1),
        Collective("reduce-scatter", 256, 1),
    }


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("f32[8,128]{1,0:T(8,128)S(1)}", 4096),
        ("bf16[3]{0}", 6),
        ("pred[]", 1),
        ("(f32[2], (s8[3], u32[]))", 15),
        ("f8e4m3fn[4]", 4),
        ("f8e4m3b11fnuz[4]", 4),
        ("s4[4]", 4),
        ("c64[2]", 16),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_type(kind, size):
    assert bytes_of(kind) == size


def test_a_line_is_taken_apart_whatever_brackets_its_layouts_have():
    made = parsed(
        "  ROOT %a.1 = (f32[2]{0:T(2,128)(2,1)}, /*index=1*/u32[]{:S(2)}) fusion(%b.2, %c), kind=kLoop, calls=%d.3"
    )
    assert (made.name, made.opcode, made.operand_names, made.child("calls")) == ("a.1", "fusion", ["b.2", "c"], "d.3")


@pytest.mark.parametrize(
    ("direction", "limit", "rounds"), [("LT", 7, 3), ("LE", 7, 4), ("NE", 7, 3), ("LT", 8, 4), ("LT", 1, 0)]
)
def test_a_loops_rounds_follow_from_where_it_begins_its_step_and_its_limit(direction, limit, rounds):
    text = TEXT.replace("compare(%k, %limit), direction=LT", f"compare(%k, %limit), direction={direction}")
    text = text.replace("%seven = s32[]{:T(128)} constant(7)", f"%seven = s32[]{{:T(128)}} constant({limit})")
    assert Program.of_text(text).cycles() == rounds * 510 + 1001


def loops(x, outer: int, inner: int):
    """Returns something whose every round needs a sum over all devices, of 512 and of 2,048 bytes."""

    def round_(_, x):
        x = jax.lax.fori_loop(0, inner, lambda _, x: jnp.sin(jax.lax.psum(x, "data") / 7), x)
        return x + jax.lax.psum(jnp.cos(jnp.tile(x, 4)), "data")[: len(x)]

    return jax.lax.fori_loop(0, outer, round_, x)


def compiled(devices, outer: int, inner: int) -> Program:
    mesh = make_mesh(MeshConfig(), devices)
    mapped = jax.shard_map(
        lambda x: loops(x, outer, inner), mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    x = jax.ShapeDtypeStruct((8 * 128,), "float32", sharding=NamedSharding(mesh, P("data")))
    return Program.of_text(jax.jit(mapped).lower(x).compile().as_text())


def test_in_a_program_compiled_for_cpus_collectives_are_counted_through_nested_loops():
    assert set(compiled(jax.devices(), 6, 11).collectives()) == {
        Collective("all-reduce", 512, 66),
        Collective("all-reduce", 2048, 6),
    }


@needs_libtpu
def test_in_a_program_compiled_for_tpus_collectives_and_cycles_are_counted_through_nested_loops():
    devices = topology.devices(topology.parse("v5e:2x4"))
    few, many = compiled(devices, 6, 11), compiled(devices, 6, 110)
    assert set(few.collectives()) == {Collective("all-reduce", 512, 66), Collective("all-reduce", 2048, 6)}
    assert set(many.collectives()) == {Collective("all-reduce", 512, 660), Collective("all-reduce", 2048, 6)}
    assert 5 < many.cycles() / few.cycles() < 10
