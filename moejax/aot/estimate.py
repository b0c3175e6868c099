"""A training step's memory and time from shapes alone: seconds to compute where a compile takes
minutes. Ranks what to compile, and orders the remedies of a step that does not fit."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from moejax.aot.roofline import Moved, Roofline, roofline
from moejax.core import tree
from moejax.core.chips import Chip
from moejax.core.mesh import AXES, TOKEN_AXES
from moejax.core.narrow import slots
from moejax.core.platform import compiling_for
from moejax.models import flops
from moejax.models.config import ModelConfig
from moejax.models.options import ForwardOptions, keeps_products
from moejax.models.params import abstract_params
from moejax.moe.choose import worth_keeping
from moejax.moe.chunked import buffer_rows
from moejax.train.loss import MAX_LOGIT_BYTES, lm_loss
from moejax.train.memory import step_memory
from moejax.train.optim import OptimConfig, make_optimizer
from moejax.train.placement import place_params, place_state
from moejax.train.state import TrainState, init_state

# Products computed twice, over those of a step that keeps everything: a forward pass of three.
RECOMPUTED = {"nothing": 0.0, "none": 0.0, "dots": 0.02, "full": 1 / 3, "offload": 1 / 3}


@dataclasses.dataclass(frozen=True)
class Setup:
    """A training step by its sizes; every field is also a key of a config.

    mesh: devices of each axis. batch_size: rows of the whole update, cut into `accumulation` parts,
    whose gradients are summed in accumulation_dtype. max_logit_mib: of float32 logits at once.
    strategy: how tokens travel to experts. factor: buffer rows of the exchange over the balanced
    load. freeze: patterns of what is not trained: it has no gradient and no state. trained_share:
    below 1, of the others the share that is, in float32 beside all the rest, as the experts that
    ESFT chose; FLOPs take no notice of it.
    """

    model: ModelConfig
    chip: Chip
    mesh: Mapping[str, int]
    batch_size: int
    seq_len: int
    accumulation: int
    optim: OptimConfig
    param_dtype: str = "float32"
    compute_dtype: str = "bfloat16"
    remat: str = "full"
    strategy: str = "auto"
    factor: float = 1.25
    freeze: tuple[str, ...] = ()
    accumulation_dtype: str = "float32"
    max_logit_mib: int = MAX_LOGIT_BYTES // 2**20
    trained_share: float = 1.0

    @property
    def num_devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def token_parts(self) -> int:
        return math.prod(self.mesh[axis] for axis in TOKEN_AXES)

    @property
    def rows_per_device(self) -> int:
        """Of one microbatch."""
        return max(1, self.batch_size // self.accumulation // self.token_parts)

    @property
    def logit_bytes(self) -> int:
        """Float32 logits of a microbatch on one device, were they computed at once."""
        number = self.rows_per_device * self.seq_len * self.model.vocab_size
        return 4 * number // self.mesh["tensor"]

    @property
    def max_logit_bytes(self) -> int:
        return self.max_logit_mib * 2**20


@dataclasses.dataclass(frozen=True)
class Hbm:
    """Bytes on one device while it trains, of `capacity`.

    params, optimizer: at rest, as they are split. batch: the step's input. gradients: one for
    every trained parameter, and with accumulation their sum. activations: what the forward pass
    keeps for the backward pass. buffers: everything else at the peak (gathered weights, what is
    exchanged and recomputed, logits). estimated: whether all was reckoned; of a compiled step that
    are gradients and activations, and buffers are the rest of what the compiler says.
    """

    params: int
    optimizer: int
    batch: int
    gradients: int
    activations: int
    buffers: int
    capacity: int
    estimated: bool

    @property
    def used(self) -> int:
        parts = (self.params, self.optimizer, self.batch, self.gradients)
        return sum(parts) + self.activations + self.buffers

    @property
    def left(self) -> int:
        return self.capacity - self.used


def shard_bytes(leaves: tree.Tree) -> int:
    """Bytes on one device of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(leaves)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def at_rest(setup: Setup) -> tuple[TrainState, tree.Tree]:
    """Abstract arrays in their places: the state of all that is not frozen, and what is frozen.

    InputError where a size does not divide by the mesh.
    """
    sizes = tuple(setup.mesh[axis] for axis in AXES)
    dtype = setup.param_dtype if setup.trained_share == 1 else "float32"
    return _state(setup.model, setup.optim, dtype, sizes, setup.freeze)


@functools.lru_cache(maxsize=256)
def _state(
    model: ModelConfig,
    optim: OptimConfig,
    dtype: str,
    sizes: tuple[int, ...],
    freeze: tuple[str, ...],
) -> tuple[TrainState, tree.Tree]:
    optimizer, mesh = make_optimizer(optim, max(1, optim.warmup_steps)), AbstractMesh(sizes, AXES)
    frozen, params = tree.split(tree.abstract(abstract_params(model, dtype)), freeze)
    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    return place_state(state, mesh), place_params(frozen, mesh)


def estimate(setup: Setup) -> Hbm:
    """Parameters and optimizer as they are; the rest reckoned on one device's rows.

    buffers: one block computed again (what it keeps without remat), two blocks' gathered weights,
    three chunks of logits. InputError where a size does not divide by the mesh.
    """
    state, frozen = at_rest(setup)
    share = setup.trained_share
    numbers = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state.params)
    )
    width = jnp.dtype(setup.accumulation_dtype).itemsize
    sums = width * numbers if setup.accumulation > 1 else 0
    tensor = setup.mesh["tensor"]
    block = _kept(setup, "nothing") // (setup.model.num_layers * tensor)
    kept = _kept(setup, setup.remat) // tensor
    gathered = 2 * _gathered_bytes(setup) // setup.model.num_layers
    logits = min(setup.logit_bytes, setup.max_logit_bytes)
    tokens = setup.batch_size // setup.token_parts * setup.seq_len
    params = shard_bytes(state.params)
    if share < 1:  # of what is trained float32 masters, and what the model came as
        params = round(share * params) + numbers * jnp.dtype(setup.param_dtype).itemsize
    return Hbm(
        params=params + shard_bytes(frozen),
        optimizer=round(share * shard_bytes(state.opt_state)),
        batch=4 * 4 * tokens,
        gradients=round(share * (_gradient_bytes(setup, state) + sums)),
        activations=kept,
        buffers=block + gathered + 3 * logits,
        capacity=setup.chip.hbm_bytes,
        estimated=True,
    )


def _gradient_bytes(setup: Setup, state: TrainState) -> int:
    """Gradients before the optimizer takes them: of blocks in the dtype of the arithmetic."""
    if jnp.dtype(setup.compute_dtype).itemsize >= jax.tree.leaves(state.params)[0].dtype.itemsize:
        return shard_bytes(state.params)
    narrow = jax.eval_shape(lambda params: slots(params, setup.compute_dtype), state.params)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * slot.dtype.itemsize
        for leaf, slot in zip(jax.tree.leaves(state.params), jax.tree.leaves(narrow), strict=True)
    )


def estimate_time(setup: Setup) -> Roofline:
    """Compute, weights and exchanges at peak rates; the HBM traffic of weights and state only."""
    num_tokens = setup.batch_size * setup.seq_len
    sizes = (setup.model, num_tokens, setup.seq_len)
    again = RECOMPUTED[setup.remat] * flops.train_flops(*sizes)
    if setup.logit_bytes > setup.max_logit_bytes:  # chunks are computed again
        again += 2 * num_tokens * setup.model.embed_size * setup.model.vocab_size
    compute = (flops.train_flops(*sizes, setup.freeze) + again) / setup.num_devices
    state, frozen = at_rest(setup)
    moved = shard_bytes(state.params) + shard_bytes(state.opt_state)
    traffic = 2 * setup.trained_share * moved + shard_bytes(frozen)
    traffic += 3 * setup.accumulation * _gathered_bytes(setup)
    sent = _weight_bytes_sent(setup) + _exchanged_bytes(setup) + _tensor_bytes(setup)
    return roofline(compute, traffic, [Moved("all", 1, sent, sent, sent)], setup.chip)


@functools.lru_cache(maxsize=64)
def _kept_bytes(
    model: ModelConfig, shape: tuple[int, int], options: ForwardOptions, max_logit_bytes: int
) -> int:
    names = ("tokens", "segment_ids", "positions", "loss_mask")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    optimizer = make_optimizer(OptimConfig("adafactor"), 1)

    def loss(params, frozen, batch, rng):
        return lm_loss(params, model, batch, rng, options, max_logit_bytes)

    return step_memory(loss, optimizer, abstract_params(model), {}, batch).activations


def _kept(setup: Setup, remat: str) -> int:
    """What one device's microbatch keeps, were it alone."""
    if remat == "offload":
        return 0
    exchanged = 0
    if remat == "dots" and setup.mesh["expert"] > 1:  # as `ForwardOptions.policy` and `.travel`
        remat = "dense_dots"
        if _keeps_exchanged(setup):
            numbers = setup.model.d_model + 2 * _expert_ff(setup.model)
            width = jnp.dtype(setup.compute_dtype).itemsize
            exchanged = _moe_layers(setup.model) * _exchanged_rows(setup) * numbers * width
    implementation = None if setup.model.moe is None else "ragged_dot"
    options = ForwardOptions(setup.compute_dtype, remat, implementation, "blockwise")
    shape = (setup.rows_per_device, setup.seq_len)
    with compiling_for("gpu" if setup.chip.name == "h100" else "tpu"):
        return exchanged + _kept_bytes(setup.model, shape, options, setup.max_logit_bytes)


def _moe_layers(model: ModelConfig) -> int:
    return sum(run.num_layers for run in model.runs if run.kind != "dense")


def _expert_ff(model: ModelConfig) -> int:
    return (model.moe.expert_ffn if model.moe else 0) or model.d_ff


def _exchanged_rows(setup: Setup) -> int:
    """Of one layer and microbatch, what a device sends one way."""
    assert setup.model.moe is not None
    tokens, shards = setup.rows_per_device * setup.seq_len, setup.mesh["expert"]
    if setup.strategy == "all_gather":  # gathered, and as many partial sums scattered
        return shards * tokens
    return buffer_rows(tokens, setup.model.moe.routed_per_token, shards, setup.factor)


def _keeps_exchanged(setup: Setup) -> bool:
    """As `ForwardOptions.travel` and the layer have it."""
    model, tensor = setup.model, setup.mesh["tensor"]
    if model.moe is None or setup.strategy in ("all_gather", "ragged"):
        return False
    dear = worth_keeping(setup.chip, model.d_model, _expert_ff(model) // tensor)
    return dear and setup.mesh["expert"] > 1 and keeps_products(setup.remat)


def _gathered_bytes(setup: Setup) -> int:
    """All weights as one device uses them: whole but for "tensor", and experts for "expert"."""
    width = jnp.dtype(setup.compute_dtype).itemsize
    total = 0
    for path, leaf in tree.flatten(abstract_params(setup.model)).items():
        parts = setup.mesh["tensor"] * (setup.mesh["expert"] if "/experts/" in path else 1)
        total += tree.num_params(leaf) * width // parts
    return total


def _weight_bytes_sent(setup: Setup) -> float:
    """Gathered in the forward and backward pass, gradients scattered; of each microbatch.

    Then the gradients' sum over "data".
    """
    mesh = AbstractMesh(tuple(setup.mesh[axis] for axis in AXES), AXES)
    lying = shard_bytes(place_params(abstract_params(setup.model, setup.compute_dtype), mesh))
    data = setup.mesh["data"]
    passes = 3 * setup.accumulation * max(0, _gathered_bytes(setup) - lying)
    return passes + 2 * (data - 1) / data * 2 * lying


def _exchanged_bytes(setup: Setup) -> float:
    """Tokens to their experts and back, in both passes, and again where they are recomputed."""
    moe, shards = setup.model.moe, setup.mesh["expert"]
    if moe is None or shards == 1:
        return 0.0
    # Forward there and back; backward dL/dy there, dL/dx back, and x again if it was not kept.
    passes = 4 if _keeps_exchanged(setup) else 5
    passes += 2 if RECOMPUTED[setup.remat] > 0.1 else 0
    row = setup.model.d_model * jnp.dtype(setup.compute_dtype).itemsize
    rows = setup.accumulation * _moe_layers(setup.model) * _exchanged_rows(setup)
    return passes * rows * row * (shards - 1) / shards


def _tensor_bytes(setup: Setup) -> float:
    """Two sums of activations per block and pass."""
    tensor = setup.mesh["tensor"]
    row = setup.model.d_model * jnp.dtype(setup.compute_dtype).itemsize
    tokens = setup.accumulation * setup.rows_per_device * setup.seq_len
    passes = 4 + (2 if RECOMPUTED[setup.remat] > 0.1 else 0)
    return passes * setup.model.num_layers * tokens * row * 2 * (tensor - 1) / tensor
