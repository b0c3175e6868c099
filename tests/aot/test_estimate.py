"""Memory and remedies reckoned from shapes: exact where they can be, and each law of the order."""

import dataclasses

import pytest

from moejax.aot.estimate import Setup, estimate, estimate_time
from moejax.aot.plan import describe as describe_plan
from moejax.aot.plan import describe_hbm, failed_plan, required_bytes
from moejax.aot.remedies import describe, least_devices, remedies
from moejax.core import tree
from moejax.core.chips import CHIPS
from moejax.core.errors import InputError
from moejax.core.memory import GIB
from moejax.models import flops
from moejax.models.config import ModelConfig
from moejax.models.params import abstract_params
from moejax.moe.config import CONVENTIONS, MoEConfig
from moejax.train.optim import OptimConfig

DENSE = ModelConfig("llama", 512, 4, 64, 128, 4, 2, 16)
MOE = dataclasses.replace(DENSE, moe=MoEConfig(8, 2, **CONVENTIONS["mixtral"]))
MESH = {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}


def setup(model=MOE, mesh=MESH, hbm=None, **changes):
    chip = CHIPS["v5p"] if hbm is None else dataclasses.replace(CHIPS["v5p"], hbm_bytes=int(hbm))
    known = {"batch_size": 16, "seq_len": 256, "accumulation": 1, "remat": "nothing"}
    known |= {"model": model, "chip": chip, "mesh": dict(mesh), "optim": OptimConfig("adamw")}
    return Setup(**known | changes)


def test_what_lies_at_rest_is_exact():
    alone = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    whole = setup(mesh=alone, compute_dtype="float32")
    found = estimate(whole)
    assert found.params == found.gradients == 4 * flops.num_params(MOE)
    # With arithmetic in 16 bits so are the gradients of blocks (moejax.core.narrow).
    assert estimate(setup(mesh=alone)).gradients < 0.6 * found.gradients
    assert found.optimizer == 2 * found.params + 2 * 4  # and two counters
    assert estimate(setup()).params > found.params / 4  # norms and routers are on every device
    assert estimate(setup()).params < found.params / 3
    halved = estimate(dataclasses.replace(whole, param_dtype="bfloat16"))
    assert halved.params * 2 == pytest.approx(found.params, rel=0.01)


def test_what_is_frozen_has_no_gradient_and_no_state():
    alone = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    whole = setup(mesh=alone, compute_dtype="float32")
    some = estimate(dataclasses.replace(whole, freeze=("layers/**",)))
    rest = 4 * (flops.num_params(MOE) - sum_of_layers(MOE))
    assert some.params == estimate(whole).params and some.gradients == rest
    assert some.optimizer == 2 * rest + 2 * 4
    few = estimate(dataclasses.replace(whole, trained_share=0.1, accumulation=2))
    assert few.gradients == round(0.1 * 2 * estimate(whole).params)
    assert few.params == round(0.1 * estimate(whole).params) + estimate(whole).params
    assert few.optimizer == round(0.1 * estimate(whole).optimizer)
    assert estimate_time(dataclasses.replace(whole, trained_share=0.1)).memory_s < 0.5 * (
        estimate_time(whole).memory_s
    )


def sum_of_layers(model):
    return tree.num_params(abstract_params(model)["layers"])


def test_activations_follow_rows_and_remat():
    ways = ("nothing", "dots", "full")
    kept = {remat: estimate(setup(remat=remat)).activations for remat in ways}
    assert kept["nothing"] > kept["dots"] > kept["full"] > 0
    assert estimate(setup(remat="offload")).activations == 0
    more = estimate(setup(remat="full", batch_size=32)).activations
    assert more == pytest.approx(2 * kept["full"], rel=0.1)
    parts = estimate(setup(remat="full", accumulation=2))
    assert parts.activations == pytest.approx(kept["full"] / 2, rel=0.2)
    assert parts.gradients > estimate(setup()).gradients  # the float32 sum


def test_what_an_exchange_keeps_counts_where_it_is_kept():
    """Rows, gate and up of every layer, if memory is fast enough; then x travels once less."""
    chips = (dataclasses.replace(CHIPS["v5p"], hbm_bytes_per_s=speed) for speed in (1e12, 1e15))
    slow, fast = chips
    kept, plain = (setup(remat="dots", chip=chip) for chip in (fast, slow))
    # A device has 2 rows of 256 tokens, two choices each, and 1.25 times that in its buffers.
    rows, numbers = 1.25 * 2 * 256 * 2, MOE.d_model + 2 * MOE.d_ff
    more = estimate(kept).activations - estimate(plain).activations
    assert more == MOE.num_layers * rows * numbers * 2
    assert estimate_time(kept).network_s < estimate_time(plain).network_s
    full = (setup(remat="full", chip=chip) for chip in (fast, slow))
    assert len({estimate(one).activations for one in full}) == 1
    gathered = (setup(remat="dots", chip=chip, strategy="all_gather") for chip in (fast, slow))
    assert len({estimate(one).activations for one in gathered}) == 1


def test_the_sum_s_dtype_and_the_logits_chunk_are_known_and_named():
    parts = setup(accumulation=2, remat="full")
    halved = dataclasses.replace(parts, accumulation_dtype="bfloat16")
    sums = 2 * (estimate(parts).gradients - estimate(halved).gradients)
    plain = dataclasses.replace(parts, accumulation=1, batch_size=8)
    assert estimate(parts).gradients == estimate(plain).gradients + sums
    # A row of 2,048 tokens and 65,536 ids: 512 MiB of logits, in chunks of at most 256.
    wide = dataclasses.replace(MOE, vocab_size=2**16)
    alone = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    large = setup(wide, alone, batch_size=1, seq_len=2048, remat="full")
    small = dataclasses.replace(large, max_logit_mib=64)
    assert estimate(large).buffers - estimate(small).buffers == 3 * 192 * 2**20
    whole = dataclasses.replace(large, max_logit_mib=512)
    assert estimate(whole).activations >= estimate(large).activations + 512 * 2**20
    again = estimate_time(large).compute_s / estimate_time(whole).compute_s
    assert 1 < again < 1.3
    tight = dataclasses.replace(large.chip, hbm_bytes=estimate(large).used - 2**20)
    named = remedies(dataclasses.replace(large, chip=tight))
    assert named[0].keys == {"compute.max_logit_mib": 64} and named[0].same_run
    tight = dataclasses.replace(parts.chip, hbm_bytes=estimate(parts).used // 20)
    named = remedies(dataclasses.replace(parts, chip=tight), limit=20)
    assert {"train.accumulation_dtype": "bfloat16"} in [one.keys for one in named]


def test_a_compiled_table_marks_what_is_reckoned():
    hbm = estimate(setup())
    compiled = describe_hbm(dataclasses.replace(hbm, estimated=False))
    marked = [line.split()[0] for line in compiled if line.endswith("reckoned")]
    assert "(as compiled)" in compiled[0] and marked == ["gradients", "activations"]
    assert not any(line.endswith(("reckoned", "rest")) for line in describe_hbm(hbm))


def test_time_is_that_of_the_slowest_resource_and_grows_with_what_costs():
    plain = estimate_time(setup())
    assert estimate_time(setup(remat="full")).compute_s == pytest.approx(4 / 3 * plain.compute_s)
    one = {"data": 8, "fsdp": 1, "expert": 1, "tensor": 1}
    assert estimate_time(setup(DENSE, one)).network_s > 0  # gradients are summed over "data"
    alone = {axis: 1 for axis in MESH}
    assert estimate_time(setup(DENSE, alone)).network_s == 0
    gather = estimate_time(setup(strategy="all_gather")).network_s
    assert gather != estimate_time(setup(strategy="chunked")).network_s


def test_remedies_fit_in_the_end_and_keep_the_run_as_long_as_they_can():
    plain = setup()
    used = estimate(plain).used
    assert remedies(plain) == []
    tight = setup(hbm=0.8 * used)
    found = remedies(tight)
    assert found and found[-1].fits and not any(one.fits for one in found[:-1])
    assert all(one.same_run for one in found)
    assert [one.used for one in found] == sorted((one.used for one in found), reverse=True)
    lines = describe(found, tight.chip.hbm_bytes)
    assert lines[0].startswith("1. --config.") and "fits" in lines[-1]


def test_remedies_that_change_the_run_come_last_and_say_so():
    found = remedies(setup(hbm=0.15 * estimate(setup()).used), limit=20)
    kinds = [one.same_run for one in found]
    assert kinds == sorted(kinds, reverse=True) and not kinds[-1]
    assert any("changes the training" in line for line in describe(found, GIB))


def test_what_an_estimate_missed_is_added_to_every_other():
    plain = setup()
    first = estimate(plain).used
    tight = dataclasses.replace(
        plain, chip=dataclasses.replace(plain.chip, hbm_bytes=int(1.5 * first))
    )
    assert remedies(tight) == []
    assert remedies(tight, required=int(1.7 * first))[0].used > first


def test_each_remedy_names_keys_of_a_config():
    from configs import base
    from launch.cli import leaf_keys

    found = remedies(setup(hbm=0.1 * estimate(setup()).used), limit=20)
    known = set(leaf_keys(base.get_config()))
    assert {key for one in found for key in one.keys} <= known


def test_a_mesh_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="does not divide"):
        estimate(setup(mesh={"data": 1, "fsdp": 1, "expert": 3, "tensor": 1}))


def test_least_devices_hold_the_state():
    found = estimate(setup())
    per = found.params + found.optimizer + found.gradients
    assert least_devices(setup(hbm=per)) == 8
    assert least_devices(setup(hbm=per / 2)) in (16, 17)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("memory required for HLO temporaries (400.50G) exceeds available HBM (95.74G).", 400.5),
        ("Ran out of memory in memory space hbm. Used 105.25G of 95.74G hbm. Exceeded", 105.25),
        ("RESOURCE_EXHAUSTED: something else", None),
        ("Ran out of memory in memory space vmem. Used 17.50M of 16.00M vmem.", None),
    ],
)
def test_bytes_that_the_compiler_asks_for(message, gib):
    assert required_bytes(message) == (None if gib is None else int(gib * GIB))
    plan = failed_plan(setup(), RuntimeError(message), 1.0)
    said = "\n".join(describe_plan(plan))
    assert not plan.fits and (f"it needs {gib:.2f} GiB" if gib else message) in said
