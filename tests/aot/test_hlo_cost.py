"""FLOPs, traffic and collectives of small program texts, counted by hand beside each."""

import math

import pytest

from moejax.aot import hlo, hlo_cost, roofline
from moejax.core.chips import CHIPS, chip_of
from moejax.core.errors import InputError
from moejax.moe.chunked import BALANCED

# 24 trips; in each a product of [8, 16] and one [16, 32] of a stack, and an all-gather of 2.
LOOP = """
%matmul (p: bf16[8,16], w: bf16[24,16,32], i: s32[]) -> bf16[8,32] {
  %p = bf16[8,16]{1,0} parameter(0)
  %w = bf16[24,16,32]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %slice = bf16[1,16,32]{2,1,0} dynamic-slice(%w, %i), dynamic_slice_sizes={1,16,32}
  %flat = bf16[16,32]{1,0} bitcast(%slice)
  ROOT %c = bf16[8,32]{1,0} convolution(%p, %flat), dim_labels=bf_io->bf
}

%body (t: (s32[], bf16[8,16], bf16[24,16,32])) -> (s32[], bf16[8,16], bf16[24,16,32]) {
  %t = (s32[], bf16[8,16]{1,0}, bf16[24,16,32]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%t), index=1
  %ws = bf16[24,16,32]{2,1,0} get-tuple-element(%t), index=2
  %y = bf16[8,32]{1,0} fusion(%x, %ws, %i.1), kind=kOutput, calls=%matmul
  %g = bf16[16,32]{1,0} all-gather(%y), replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}
  ROOT %out = (s32[], bf16[8,16]{1,0}, bf16[24,16,32]{2,1,0}) tuple(%i.1, %x, %ws)
}

%cond (t.1: (s32[], bf16[8,16], bf16[24,16,32])) -> pred[] {
  %n = s32[] constant(24)
  %t.1 = (s32[], bf16[8,16]{1,0}, bf16[24,16,32]{2,1,0}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %n), direction=LT
}

ENTRY %main (a: bf16[8,16], b: bf16[24,16,32]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[24,16,32]{2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = s32[] copy(%zero)
  %all = (s32[], bf16[8,16]{1,0}, bf16[24,16,32]{2,1,0}) tuple(%start, %a, %b)
  %loop = (s32[], bf16[8,16]{1,0}, bf16[24,16,32]{2,1,0}) while(%all), condition=%cond, body=%body
  ROOT %r = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""

# A gather of [2,2] to [8,2] that runs beside a product, which also updates a slice of a stack.
BESIDE = """
%begin (p: bf16[2,2]) -> (bf16[2,2], bf16[8,2]) {
  %p = bf16[2,2]{1,0} parameter(0)
  %g = bf16[8,2]{1,0} all-gather(%p), dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c = (bf16[2,2], bf16[8,2]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%along (p.1: bf16[2,2], o.1: bf16[8,2], s.1: bf16[24,4,4], w.1: bf16[4,4]) -> (bf16[24,4,4]) {
  %p.1 = bf16[2,2]{1,0} parameter(0)
  %o.1 = bf16[8,2]{1,0} parameter(1)
  %s.1 = bf16[24,4,4]{2,1,0} parameter(2)
  %w.1 = bf16[4,4]{1,0} parameter(3)
  %y = bf16[4,4]{1,0} convolution(%w.1, %w.1), dim_labels=bf_io->bf
  %y.1 = bf16[1,4,4]{2,1,0} bitcast(%y)
  %u = bf16[24,4,4]{2,1,0} dynamic-update-slice(%s.1, %y.1)
  %g.1 = bf16[8,2]{1,0} all-gather(%p.1), dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %t = (bf16[24,4,4]{2,1,0}, bf16[2,2]{1,0}, bf16[8,2]{1,0}) tuple(%u, %p.1, %g.1)
}

%end (p.2: bf16[2,2], o.2: bf16[8,2]) -> bf16[8,2] {
  %p.2 = bf16[2,2]{1,0} parameter(0)
  %o.2 = bf16[8,2]{1,0} parameter(1)
  %g.2 = bf16[8,2]{1,0} all-gather(%p.2), dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c.2 = bf16[8,2]{1,0} custom-call(%p.2, %o.2, %g.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[2,2], s: bf16[24,4,4], w: bf16[4,4]) -> bf16[8,2] {
  %a = bf16[2,2]{1,0} parameter(0)
  %s = bf16[24,4,4]{2,1,0} parameter(1)
  %w = bf16[4,4]{1,0} parameter(2)
  %f = (bf16[2,2]{1,0}, bf16[8,2]{1,0}) fusion(%a), kind=kCustom, calls=%begin
  %f.0 = bf16[2,2]{1,0} get-tuple-element(%f), index=0
  %f.1 = bf16[8,2]{1,0} get-tuple-element(%f), index=1
  %m = (bf16[24,4,4], bf16[2,2], bf16[8,2]) fusion(%f.0, %f.1, %s, %w), kind=kOutput, calls=%along
  %m.1 = bf16[2,2]{1,0} get-tuple-element(%m), index=1
  %m.2 = bf16[8,2]{1,0} get-tuple-element(%m), index=2
  ROOT %d = bf16[8,2]{1,0} fusion(%m.1, %m.2), kind=kCustom, calls=%end
}
"""


def test_what_a_fusion_carries_along_is_no_traffic():
    """The gather reads its part and writes the whole once; of the stack a slice is written."""
    found = hlo_cost.cost(hlo.parse(BESIDE))
    gather, product = 2 * (2 * 2 + 8 * 2), 2 * (4 * 4 + 4 * 4)
    assert found.traffic_bytes == gather + product


def test_a_loop_counts_with_its_trips():
    found = hlo_cost.cost(hlo.parse(LOOP))
    assert found.runs["body"] == 24 and found.runs["matmul"] == 24 and found.open_loops == 0
    assert found.flops == 24 * 2 * 8 * 16 * 32
    # The fusion reads x, one slice of the stack and an index, and writes y; the gather moves them.
    fusion, gather = 2 * (8 * 16 + 16 * 32 + 8 * 32) + 4, 2 * (8 * 32 + 16 * 32)
    compare, start = 4 + 4 + 1, 4 + 4  # of the counter: each trip, and its copy once
    assert found.traffic_bytes == 24 * (fusion + gather + compare) + start


def test_what_is_launched_has_its_own_flops_and_traffic():
    found = hlo_cost.cost(hlo.parse(LOOP))
    fusion = 2 * (8 * 16 + 16 * 32 + 8 * 32) + 4
    product = (24, 2 * 8 * 16 * 32, fusion)
    assert sorted(found.launched) == [
        (1, 0, 8),
        (24, 0, 9),
        product,
    ]  # the counter's, and no gather
    assert (1, 2 * 4 * 4 * 4, 64) in hlo_cost.cost(hlo.parse(BESIDE)).launched


def test_trips_the_text_states_and_trips_that_depend_on_data():
    stated = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert hlo_cost.cost(hlo.parse(stated)).runs["body"] == 7
    open_end = hlo_cost.cost(hlo.parse(LOOP.replace("constant(24)", "custom-call(%t.1)")))
    assert open_end.runs["body"] == 1 and open_end.open_loops == 1
    scope = f"{BALANCED}5/while/body/{BALANCED}3/while"  # a loop inside one with five trips
    named = LOOP.replace("body=%body", f'body=%body, metadata={{op_name="{scope}"}}')
    assert hlo_cost.cost(hlo.parse(named)).runs["body"] == 3
    other = named.replace(scope, f"{BALANCED}5/while/body/sort")
    assert hlo_cost.cost(hlo.parse(other)).runs["body"] == 24


def test_collectives_count_with_their_trips_and_their_group():
    program = hlo.parse(LOOP)
    (row,) = roofline.by_kind(hlo.collectives(LOOP), hlo_cost.cost(program).runs)
    assert (row.kind, row.count, row.result_bytes) == ("all-gather", 24, 24 * 16 * 32 * 2)
    assert row.sent_bytes == row.result_bytes / 2 and row.overlapped_bytes == 0


@pytest.mark.parametrize(
    ("text", "flops"),
    [
        # A plain product; a batch of 16 written as a window with holes; a window with padding.
        ("f32[8,4] convolution(%a, %b), dim_labels=bf_io->bf|f32[8,5]|f32[5,4]", 2 * 8 * 5 * 4),
        (
            "f32[16,256,64] convolution(%a, %b), window={size=16 stride=15 lhs_dilate=16}, "
            "dim_labels=0bf_0oi->0bf|f32[16,256,128]|f32[16,64,128]",
            2 * 16 * 256 * 64 * 128,
        ),
        (
            "f32[1,3,2] convolution(%a, %b), window={size=3 pad=1_1}, "
            "dim_labels=b0f_0io->b0f|f32[1,3,5]|f32[3,5,2]",
            2 * 2 * 5 * (2 + 3 + 2),
        ),
        (
            "f32[7,8,4] dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
            "rhs_batch_dims={0}, rhs_contracting_dims={1}|f32[7,8,5]|f32[7,5,4]",
            2 * 7 * 8 * 4 * 5,
        ),
        (
            'f32[8,4] custom-call(%a, %b), custom_call_target="tpu_custom_call", '
            'backend_config={"custom_call_config":{"cost_estimate":{"flops":"123"}}}|f32[8]|f32[4]',
            123,
        ),
    ],
)
def test_flops_of_a_product(text, flops):
    result, lhs, rhs = text.split("|")
    lines = [f"%a = {lhs} parameter(0)", f"%b = {rhs} parameter(1)", f"ROOT %c = {result}"]
    program = hlo.parse("ENTRY %main (a: f32[]) -> f32[] {\n  " + "\n  ".join(lines) + "\n}\n")
    assert hlo_cost.cost(program).flops == flops


def test_an_unrolled_loop_takes_several_steps_at_a_time():
    added = "%two = s32[] constant(2)\n  %next = s32[] add(%i.1, %two)\n  %g = bf16"
    text = LOOP.replace("%g = bf16", added)
    text = text.replace("tuple(%i.1, %x, %ws)", "tuple(%next, %x, %ws)")
    assert hlo_cost.cost(hlo.parse(text)).runs["body"] == 12


KERNEL = """
ENTRY %main (a: f32[]) -> f32[] {
  %mask = s8[1,8,8]{2,1,0} parameter(0)
  %q = bf16[16,4096,192]{2,1,0} parameter(1)
  %v = bf16[16,4096,128]{2,1,0} parameter(2)
  %rows = bf16[1024,64]{1,0} parameter(3)
  %w = bf16[8,64,32]{2,1,0} parameter(4)
  %KERNEL.4 = (f32[512,128], bf16[16,4096,128]) custom-call(ARGS), TARGET
}
""".replace("TARGET", 'custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize(
    ("name", "arguments", "flops"),
    [
        # Of 8 x 8 blocks a causal mask has 36.
        ("splash_mha_fwd_no_residuals", "%mask, %q, %q, %v", 16 * 4096**2 * 36 / 64 * 2 * 320),
        ("splash_mha_dkv_segmented", "%mask, %q, %q, %v", 16 * 4096**2 * 36 / 64 * 2 * 640),
        ("splash_mha_dq_segmented", "%mask, %q, %q, %v", 16 * 4096**2 * 36 / 64 * 2 * 512),
        ("grouped_matmul", "%mask, %rows, %w", 2 * 1024 * 64 * 32),
        ("transpose_jvp_grouped_matmul_dx__", "%rows, %w", 2 * 1024 * 64 * 32),
        ("grouped_gated", "%rows, %w, %w", 2 * 2 * 1024 * 64 * 32),
    ],
)
def test_flops_of_a_kernel(name, arguments, flops):
    text = KERNEL.replace("KERNEL", name).replace("ARGS", arguments)
    if "grouped" in name:
        text = text.replace("bf16[16,4096,128]) custom", "bf16[1024,32]) custom")
    found = hlo_cost.cost(hlo.parse(text))
    assert found.flops == flops and not found.unknown_kernels
    found = hlo_cost.cost(hlo.parse(text.replace(name, "other")))
    assert found.flops == 0 and found.unknown_kernels == ("other.4",)


def test_a_kernel_on_a_gpu_is_known_by_its_operation():
    named = 'custom_call_target="__gpu$xla.gpu.triton"'
    named += ', metadata={op_name="jit(f)/NAME/pallas_call"}'
    text = KERNEL.replace("KERNEL", "pallas_call").replace("ARGS", "%mask, %rows, %w")
    text = text.replace('custom_call_target="tpu_custom_call"', named)
    text = text.replace("bf16[16,4096,128]) custom", "bf16[1024,32]) custom")
    found = hlo_cost.cost(hlo.parse(text.replace("NAME", "grouped_matmul")))
    assert found.flops == 2 * 1024 * 64 * 32 and not found.unknown_kernels
    found = hlo_cost.cost(hlo.parse(text.replace("NAME", "other")))
    assert found.flops == 0 and found.unknown_kernels == ("pallas_call.4",)


def test_what_lies_in_the_chips_own_memory_is_no_traffic():
    text = LOOP.replace("%y = bf16[8,32]{1,0}", "%y = bf16[8,32]{1,0:T(8,128)S(1)}")
    less = hlo_cost.cost(hlo.parse(LOOP)).traffic_bytes - 24 * 2 * (2 * 8 * 32)
    assert hlo_cost.cost(hlo.parse(text)).traffic_bytes == less


def test_room_that_is_only_taken_is_no_traffic():
    room = '  %room = f32[64,64]{1,0} custom-call(), custom_call_target="AllocateBuffer"\n'
    text = BESIDE.replace("  ROOT %d = bf16[8,2]", room + "  ROOT %d = bf16[8,2]")
    found = [hlo_cost.cost(hlo.parse(t)).traffic_bytes for t in (BESIDE, text)]
    assert text != BESIDE and found[0] == found[1]
    text = text.replace("AllocateBuffer", "Other")
    assert hlo_cost.cost(hlo.parse(text)).traffic_bytes == found[0] + 4 * 64 * 64


def test_bytes_sent_per_kind_and_the_roofline():
    assert roofline.sent_bytes("all-gather", 800, 8) == 700
    assert roofline.sent_bytes("all-reduce", 800, 8) == 1400
    assert roofline.sent_bytes("reduce-scatter", 100, 8) == 700
    assert roofline.sent_bytes("collective-permute", 800, 8) == 800
    chip = CHIPS["v5p"]
    moved = [roofline.Moved("all-gather", 1, 0, 2 * chip.link_bytes_per_s, chip.link_bytes_per_s)]
    found = roofline.roofline(3 * chip.flops_per_s, chip.hbm_bytes_per_s, moved, chip)
    assert (found.bound, found.step_s, found.exposed_s) == ("compute", 3, 1)
    assert math.isclose(found.in_turn_s, 4) and found.one_by_one_s == 0
    each = [(2, chip.flops_per_s, 0), (1, chip.flops_per_s, 3 * chip.hbm_bytes_per_s)]
    found = roofline.roofline(3 * chip.flops_per_s, chip.hbm_bytes_per_s, moved, chip, each)
    assert math.isclose(found.launched_s, 5) and math.isclose(found.one_by_one_s, 6)


def test_the_chip_of_a_topology():
    assert chip_of("v5p:2x2x2").name == "v5p" and chip_of("h100x8").name == "h100"
    with pytest.raises(InputError, match="v5e, v5p, v6e, h100"):
        chip_of("v9:2x2")
