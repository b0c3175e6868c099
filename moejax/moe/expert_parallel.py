"""The MoE layer on a mesh: the one shard_map, around a strategy of `moejax.moe.strategies`.

Tokens are split over data, fsdp and expert; weights as `moejax.core.sharding` says. Weights that
are split over fsdp are gathered at use, which makes their gradient a reduce-scatter; what tensor
splits is summed once, at the end.
"""

import dataclasses
import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.core import tree
from moejax.core.chips import CHIPS, chip_of_kind
from moejax.core.errors import InputError
from moejax.core.mesh import TOKEN_AXES, check_axes
from moejax.core.platform import device_kind
from moejax.core.sharding import param_spec
from moejax.moe.choose import STRATEGIES, Choice, choose, load_of, worth_keeping
from moejax.moe.config import MoEConfig
from moejax.moe.layer import MoEStats, Trace, add_shared_network, layer_stats
from moejax.moe.routing import Routing, route
from moejax.moe.scores import PartKey, expert_inputs
from moejax.moe.strategies import AXIS, BY_NAME, Context
from moejax.moe.tuned import first_expert
from moejax.ops.gated_ffn import Activation, gated_ffn
from moejax.ops.kept import SHARED, keep

P = PartitionSpec
_TOKENS = P(TOKEN_AXES)
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Where a layer runs and how its tokens travel.

    mesh: with axes data, fsdp, expert, tensor (`moejax.core.mesh.make_mesh`).
    strategy: a name of `moejax.moe.choose.STRATEGIES`, or "auto" (`explain` says which and why, and
        the layer logs it once).
    factor: buffer rows over the balanced load, of "capacity" (which drops the rest) and "chunked"
        (which sends it in further rounds).
    chip: whose links "auto" reckons with; None is the chip at hand, or v5p if that is unknown.
    keep: whether "chunked" and "capacity" keep for the backward pass what experts got and computed,
        in buffers of `factor` times the balanced load, where the chip's memory is fast enough for
        that (`moejax.moe.choose.worth_keeping`); else x travels again, and two of eleven products
        are computed again. What exceeds the buffers always does.
    """

    mesh: Mesh
    strategy: str = "auto"
    factor: float = 1.25
    chip: str | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        check_axes(self.mesh)
        if self.strategy not in ("auto", *STRATEGIES):
            raise InputError(
                f"strategy {self.strategy!r} is none of the {len(STRATEGIES) + 1} known: "
                f"auto, {', '.join(STRATEGIES)}."
            )
        shards = self.mesh.shape[AXIS]
        if self.strategy == "local" and shards > 1:
            raise InputError(
                f"strategy 'local' needs an expert axis of 1, and the mesh has {shards}: choose "
                "'chunked', or a mesh with expert=1."
            )
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise InputError(f"factor={self.factor} must be more than 0; 1.25 is usual.")


def explain(parallel: Parallel, config: MoEConfig, x_shape: tuple, d_ff: int) -> Choice:
    """What "auto" chooses for inputs [B, T, D] in bfloat16 and experts of width d_ff, and why."""
    known = chip_of_kind(device_kind())
    chip = parallel.chip or (known.name if known else "v5p")
    return choose(load_of(config, parallel.mesh.shape, x_shape, d_ff), chip)


@functools.lru_cache
def _say(reason: str) -> None:
    _log.info("moe_layer, strategy 'auto': %s", reason)


def sharded_moe_layer(
    params: dict[str, Any],
    x_BTD: jax.Array,
    config: MoEConfig,
    parallel: Parallel,
    *,
    activation: Activation = jax.nn.silu,
    mask_BT: jax.Array | None = None,
    rng: jax.Array | None = None,
    implementation: str | None = None,
    trace: bool = False,
) -> tuple[jax.Array, MoEStats]:
    """`moejax.moe.layer.moe_layer` on a mesh; equal to it unless the strategy drops.

    Raises InputError if the experts do not divide by the expert axis, the B rows by the devices
    that tokens are split over, or a width by its axes. Noise is the same on any mesh.
    """
    mesh = parallel.mesh
    _check(config, x_BTD.shape, mesh)
    name = parallel.strategy
    if name == "auto":
        choice = explain(parallel, config, x_BTD.shape, params["experts"]["w_up"].shape[2])
        _say(choice.reason)
        name = choice.strategy
    d_ff = params["experts"]["w_up"].shape[2] // mesh.shape["tensor"]
    chip = CHIPS.get(parallel.chip or "") or chip_of_kind(device_kind())
    context = Context(
        *(config.num_experts, mesh.shape[AXIS], parallel.factor, activation, implementation),
        keep=parallel.keep and worth_keeping(chip, x_BTD.shape[2], d_ff),
    )
    specs = tree.map_with_path(lambda path, w: param_spec(path, w.shape, mesh), params)

    def body(params, x_BTD, mask_BT, rng):
        if rng is not None:
            rng = PartKey(rng, jax.lax.axis_index(TOKEN_AXES))
        inputs = (x_BTD, mask_BT, rng, trace)
        return _layer_on_device(params, specs, inputs, config, context, name)

    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(
            specs,
            _TOKENS,
            None if mask_BT is None else _TOKENS,
            None if rng is None else P(),
        ),
        out_specs=(_TOKENS, _stats_specs(trace)),
        check_vma=False,  # kernels and custom gradients do not say how their results vary
    )
    return mapped(params, x_BTD, mask_BT, rng)


def _stats_specs(trace: bool) -> Any:
    """How the statistics lie on the mesh: sums on every device, a trace where its tokens are."""
    tokens: Any = _TOKENS
    sums: dict[str, Any] = {field.name: P() for field in dataclasses.fields(MoEStats)}
    return MoEStats(**sums | {"trace": Trace(tokens, tokens) if trace else None})


def split_rows(x_BTD: jax.Array, mesh: Mesh) -> jax.Array:
    """x with its rows split over data, fsdp and expert, as the layer takes and gives them.

    Raises InputError if the B rows do not divide by those devices.
    """
    _check_rows(x_BTD.shape[0], mesh)
    return jax.lax.with_sharding_constraint(x_BTD, NamedSharding(mesh, _TOKENS))


def whole_columns(embed: dict[str, jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
    """An embedding's tables as they are looked up in: rows split over tensor, no column split."""
    rows = NamedSharding(mesh, P("tensor"))
    table_VD = jax.lax.with_sharding_constraint(embed["tokens"], rows)
    return {**embed, "tokens": table_VD}


def _layer_on_device(params, specs, inputs, config: MoEConfig, context: Context, name: str):
    """Routes this device's tokens, sends them, adds what is shared; sums over tensor."""
    x_BTD, mask_BT, rng, trace = inputs
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    routing = route(
        params["router"],
        x_ND,
        config,
        mask_N=None if mask_BT is None else mask_BT.reshape(-1),
        rng=rng,
        num_sequences=x_BTD.shape[0],
        axis_names=TOKEN_AXES,
    )
    x_ND = expert_inputs(x_ND, config, rng)
    gathered = {k: _at_use(params[k], specs[k]) for k in ("experts", "shared") if k in params}
    y_ND, dropped = _mix(gathered["experts"], x_ND, routing, context, name)
    if routing.shared_weight_N is not None:
        first = _first_at_use(params["experts"], specs["experts"], gathered["experts"])
        shared_ND = gated_ffn(first, x_ND, context.activation)
        y_ND = y_ND + routing.shared_weight_N[:, None] * shared_ND
    y_ND = add_shared_network(gathered, y_ND.astype(x_ND.dtype), x_ND, context.activation)
    y_ND = jax.lax.psum(y_ND, "tensor")
    stats = layer_stats(routing, x_BTD.shape[:2] if trace else None)
    stats = dataclasses.replace(stats, dropped=stats.dropped + dropped)
    return y_ND.astype(x_BTD.dtype).reshape(x_BTD.shape), stats


def _mix(experts, x_ND, routing: Routing, context: Context, name: str):
    taken_ND = x_ND if routing.token_N is None else x_ND[routing.token_N]
    y_ND, dropped = BY_NAME[name](
        context, taken_ND, routing.experts_NK, routing.weights_NK, experts
    )
    if routing.token_N is not None:  # rows are pairs, and a token has any number of them
        y_ND = jax.ops.segment_sum(y_ND, routing.token_N, x_ND.shape[0])
    return y_ND, dropped


def _at_use(params: dict[str, Any], specs: dict[str, Any]) -> dict[str, Any]:
    """Weights whole but for the expert stack and tensor; a bias of D enters the sum once.

    Trained experts (`moejax.moe.tuned`) are gathered whole too, and count from this shard's first.
    """
    whole: dict[str, Any] = {}
    for name, w in params.items():
        if name == "tuned":
            shard = params["w_up"].shape[0] * jax.lax.axis_index(AXIS)
            whole[name] = _at_use(w, specs[name])
            whole[name]["ids_M"] = whole[name]["ids_M"] - shard
            continue
        for dim, axes in enumerate(specs[name]):
            if axes == AXIS or axes == "tensor" or axes is None:
                continue
            w = jax.lax.all_gather(w, axes, axis=dim, tiled=True)
        if name == "b_down":
            w = jnp.where(jax.lax.axis_index("tensor") == 0, w, jnp.zeros_like(w))
        whole[name] = w
    return whole


def _first_at_use(
    experts: dict[str, Any], specs: dict[str, Any], gathered: dict[str, Any]
) -> dict[str, jax.Array]:
    """Expert 0 of the stack, XFT's shared one, whole but for tensor; it is on the first shard.

    Each shard gets a piece of it, which is kept for the backward pass; the pieces are put together
    as those of other weights are. Sent whole, by a sum over shards, it takes twice the bytes, and a
    TPU does nothing beside a sum.
    """
    here, shards = jax.lax.axis_index(AXIS) == 0, jax.lax.axis_size(AXIS)
    mine = lambda w: jnp.where(here, w, jnp.zeros_like(w))  # noqa: E731
    if "tuned" in experts:
        return {k: jax.lax.psum(mine(w), AXIS) for k, w in first_expert(gathered).items()}
    whole: dict[str, jax.Array] = {}
    for name, w in first_expert(experts).items():
        spec = tuple(specs[name])[1:]
        split = "fsdp" in spec and jax.lax.axis_size("fsdp") > 1
        dim = spec.index("fsdp") if split else 0
        if name == "b_down" or w.shape[dim] % shards:
            whole[name] = jax.lax.psum(mine(first_expert(gathered)[name]), AXIS)
            continue
        # The first dim alone is cut and joined without a copy, and on a TPU without a sum of all.
        piece = jax.lax.psum_scatter(jnp.moveaxis(mine(w), dim, 0), AXIS, tiled=True)
        axes = ("fsdp", AXIS) if split else AXIS
        joined = jax.lax.all_gather(keep(piece, SHARED), axes, tiled=True)
        whole[name] = jnp.moveaxis(joined, 0, dim)
    return whole


def _check(config: MoEConfig, x_shape: tuple[int, ...], mesh: Mesh) -> None:
    shards = mesh.shape[AXIS]
    if config.num_experts % shards:
        divisors = [n for n in range(1, config.num_experts + 1) if config.num_experts % n == 0]
        raise InputError(
            f"{config.num_experts} experts do not divide by an expert axis of {shards}: choose "
            f"expert={', '.join(map(str, divisors))}."
        )
    _check_rows(x_shape[0], mesh)


def _check_rows(num_rows: int, mesh: Mesh) -> None:
    parts = math.prod(mesh.shape[axis] for axis in TOKEN_AXES)
    if num_rows % parts:
        raise InputError(
            f"a batch of {num_rows} rows does not divide by the {parts} devices of "
            f"{'+'.join(TOKEN_AXES)}: give a multiple of {parts} rows (padded and masked), or put "
            "devices on the tensor axis."
        )
