"""How a forward pass is computed, never what: dtypes, what is kept, implementations, the mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from moejax.core.errors import InputError
from moejax.moe.expert_parallel import Parallel
from moejax.ops import kept

REMAT = ("nothing", "dots", "full", "offload")
# Of what a block hands on, what "offload" keeps in the host's memory: its input.
BLOCK_INPUT = "block_input"


def _dots(*names: str) -> Callable[..., Any]:
    return jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(*names, *kept.ALWAYS),
    )


REMAT_POLICIES = {
    "full": jax.checkpoint_policies.save_only_these_names(*kept.ALWAYS),
    "dots": _dots(kept.ATTENTION, kept.GROUPED, kept.EXCHANGED),
    "dense_dots": _dots(kept.ATTENTION, kept.EXCHANGED),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[*kept.ALWAYS],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def keeps_products(remat: str) -> bool:
    """Whether matrix products are kept for the backward pass."""
    return remat in ("none", "nothing", "dots")


@dataclasses.dataclass(frozen=True)
class ForwardOptions:
    """How to compute, never what.

    Attributes:
      compute_dtype: dtype of the arithmetic (routers and norms' statistics stay float32).
      remat: what of a block is computed again in the backward pass: "nothing" (also "none"),
        "dots" (all but matrix products, grouped ones too, and what blockwise attention mixed),
        "full" (all; block inputs are kept) or "offload" (all; block inputs wait in the host's
        memory). Which experts tokens chose is kept always. "dense_dots" does not keep grouped
        products, and "dots" where tokens travel to experts those of a balanced load: "chunked" and
        "capacity" have them in their buffers, other strategies' are as large as the worst load.
      moe_implementation: a name of `moejax.ops.grouped_matmul.IMPLEMENTATIONS`, None chooses.
      attention: a name of `moejax.ops.attention.IMPLEMENTATIONS`, None chooses.
      trace_routing: keep each token's experts in `Output.stats.trace`, [L, B, T, K].
      parallel: the mesh, and how tokens travel to their experts on it; None is one device. Rows
        are then split over its data, fsdp and expert axes, so their number must divide by those.
    """

    compute_dtype: str = "float32"
    remat: str = "nothing"
    moe_implementation: str | None = None
    attention: str | None = None
    trace_routing: bool = False
    parallel: Parallel | None = None

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of `parallel`."""
        return None if self.parallel is None else self.parallel.mesh

    @property
    def travel(self) -> Parallel | None:
        """`parallel`, which keeps what the experts computed if products are kept."""
        if self.parallel is None or not keeps_products(self.remat):
            return self.parallel
        return dataclasses.replace(self.parallel, keep=True)

    @property
    def policy(self) -> Callable[..., Any] | None:
        """What `jax.checkpoint` keeps of a block; None leaves it out."""
        travel = self.mesh is not None and self.mesh.shape["expert"] > 1
        name = "dense_dots" if self.remat == "dots" and travel else self.remat
        return REMAT_POLICIES.get(name)

    def __post_init__(self):
        if self.remat not in ("none", *REMAT, *REMAT_POLICIES):
            raise InputError(f"remat {self.remat!r} is unknown: use {', '.join(REMAT)}")
