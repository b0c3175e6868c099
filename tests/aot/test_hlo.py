"""The reader of compiled programs on small texts: each way a compiler writes a collective."""

import pytest

from moejax.aot import hlo

SYNC = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[], bf16[8,128]{1,0}) parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %inner = bf16[8,128]{1,0:T(8,128)(2,1)} all-to-all(%x), replica_groups={{0,1}}, dimensions={0}
  ROOT %t = (s32[], bf16[8,128]{1,0}) tuple(%x, %inner)
}

%cond (p: (s32[], bf16[8,128])) -> pred[] {
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: bf16[8,128]) -> f32[16] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %loop = (s32[], bf16[8,128]{1,0}) while(%a), condition=%cond, body=%body
  %scatter = (f32[4]{0}, f32[4]{0}) reduce-scatter(%a, %a), dimensions={0}, to_apply=%add
  ROOT %gather = f32[16]{0} all-gather(%scatter), dimensions={0}, backend_config={"x":[]}
}
"""

PAIR = """
%dots (p: bf16[4,4]) -> bf16[4,4] {
  %p = bf16[4,4]{1,0} parameter(0)
  ROOT %d = bf16[4,4]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: bf16[4,4]) -> bf16[4,4] {
  %a = bf16[4,4]{1,0} parameter(0)
  %s = ((bf16[4,4]{1,0}), bf16[4,4]{1,0}) all-to-all-start(%a), dimensions={0}
  %f = bf16[4,4]{1,0} fusion(%a), kind=kCustom, calls=%dots
  %e = bf16[4,4]{1,0} all-to-all-done(%s)
  %s.1 = ((bf16[4,4]{1,0}), bf16[4,4]{1,0}) all-to-all-start(%e), dimensions={0}
  %n = bf16[4,4]{1,0} negate(%f)
  ROOT %e.1 = bf16[4,4]{1,0} all-to-all-done(%s.1)
}
"""

ASYNC = """
%moved (p: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4]{1,0} parameter(0)
  ROOT %r = f32[4,4]{1,0} ragged-all-to-all(%p, %p), replica_groups={{0,1}}
}

ENTRY %main (a: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4]{1,0} parameter(0)
  %s = ((f32[4,4]{1,0}), f32[4,4]{1,0}, u32[]) async-start(%a), calls=%moved
  %k = f32[4,4]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"
  %u = ((f32[4,4]{1,0}), f32[4,4]{1,0}, u32[]) async-update(%s), calls=%moved
  ROOT %e = f32[4,4]{1,0} async-done(%u), calls=%moved
}
"""

FUSED = """
%begin (p: bf16[2,2]) -> (bf16[2,2], bf16[8,2]) {
  %p = bf16[2,2]{1,0} parameter(0)
  %g = bf16[8,2]{1,0} all-gather(%p), dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c = (bf16[2,2]{1,0}, bf16[8,2]{1,0}) custom-call(%g), custom_call_target="Start"
}

%along (p: bf16[2,2]) -> (bf16[2,2], bf16[8,2]) {
  %p = bf16[2,2]{1,0} parameter(0)
  %w = bf16[2,2]{1,0} convolution(%p, %p), dim_labels=bf_io->bf
  %g = bf16[8,2]{1,0} all-gather(%p), dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %t = (bf16[2,2]{1,0}, bf16[8,2]{1,0}) tuple(%w, %g)
}

%end (p: bf16[2,2]) -> bf16[8,2] {
  %p = bf16[2,2]{1,0} parameter(0)
  %g = bf16[8,2]{1,0} all-gather(%p), dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c = bf16[8,2]{1,0} custom-call(%g), custom_call_target="Done"
}

ENTRY %main (a: bf16[2,2]) -> bf16[8,2] {
  %a = bf16[2,2]{1,0} parameter(0)
  %s = (bf16[2,2]{1,0}, /*index=1*/bf16[8,2]{1,0}) fusion(%a), kind=kCustom, calls=%begin
  %m = (bf16[2,2]{1,0}, bf16[8,2]{1,0}) fusion(%s), kind=kOutput, calls=%along
  ROOT %d = bf16[8,2]{1,0} fusion(%m), kind=kCustom, calls=%end
}
"""

SCATTER = """
%all-reduce-scatter.3.clone.1 (input.15: f32[8,64]) -> f32[2,64] {
  %input.15 = f32[8,64]{1,0} parameter(0)
  %all-reduce.9 = f32[8,64]{1,0} all-reduce(%input.15), replica_groups={{0,1,2,3}}, to_apply=%add
  %at = u32[] partition-id()
  ROOT %s = f32[2,64]{1,0} dynamic-slice(%all-reduce.9, %at), dynamic_slice_sizes={2,64}
}

ENTRY %main (a: f32[8,64]) -> f32[2,64] {
  %a = f32[8,64]{1,0} parameter(0)
  ROOT %f = f32[2,64]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3.clone.1
}
"""


def test_one_instruction_runs_alone_and_loops_are_told():
    found = {c.name: c for c in hlo.collectives(SYNC)}
    assert {name: (c.kind, c.bytes) for name, c in found.items()} == {
        "inner": ("all-to-all", 8 * 128 * 2),
        "scatter": ("reduce-scatter", 2 * 4 * 4),
        "gather": ("all-gather", 16 * 4),
    }
    assert not any(c.is_async or c.between or c.with_matmul for c in found.values())
    assert [name for name, c in found.items() if c.in_loop] == ["inner"]
    assert found["inner"].computation == "body"


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
    (only,) = hlo.collectives(SCATTER)
    assert (only.kind, only.bytes, only.participants) == ("reduce-scatter", 2 * 64 * 4, 4)
    assert not only.is_async


def test_a_pair_counts_once_with_what_lies_between():
    first, second = hlo.collectives(PAIR)
    assert (first.kind, first.bytes, first.is_async) == ("all-to-all", 32, True)
    assert [i.name for i in first.between] == ["f"] and first.with_matmul
    assert [i.name for i in second.between] == ["n"] and not second.with_matmul


def test_an_async_computation_is_seen_through_and_a_kernel_is_a_matmul():
    (only,) = hlo.collectives(ASYNC)
    assert (only.kind, only.bytes, only.is_async) == ("ragged-all-to-all", 64, True)
    assert [i.name for i in only.between] == ["k", "u"] and only.with_matmul


def test_a_chain_of_fusions_is_one_collective():
    (only,) = hlo.collectives(FUSED)
    assert (only.kind, only.bytes, only.is_async, only.name) == ("all-gather", 32, True, "s")
    assert [i.name for i in only.between] == ["m"] and only.with_matmul


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048),
        ("f32[]", 4),
        ("f32[0,7]{1,0}", 0),
        ("(pred[3]{0}, s32[2]{0:S(4)}, u32[]{:S(2)})", 3 + 8 + 4),
        ("f8e4m3fn[16]{0}", 16),
        ("s4[16]{0}", 8),
        ("c64[2]{0}", 16),
    ],
)
def test_bytes_of_a_type(shape, wanted):
    assert hlo.shape_bytes(shape) == wanted
