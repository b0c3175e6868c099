"""What happens to the rows of an exchange where their experts are, forward and backward.

The exchanges themselves, and when which step runs, are in `moejax.moe.chunked`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.moe.experts import ExpertParams, grouped_down, grouped_ffn, grouped_hidden
from moejax.moe.experts_backward import (
    Block,
    gate_and_up,
    hidden_and_products,
    no_gradients,
    params_backward,
    rows_backward,
)
from moejax.ops.gated_ffn import Activation
from moejax.ops.group_sizes import GroupSizes
from moejax.ops.grouped_matmul import prepared

# What travels, by name: "x" and "d_y" [N, D] as the row of a pair's token, "weights" [N, K] as the
# pair's own number, and back again "y" or "d_x" as rows, "d_weights" as numbers.
Arrays = dict[str, jax.Array]
_GRADIENTS = ("d_x", "d_weights")


@dataclasses.dataclass(frozen=True)
class Products:
    """What happens to received rows, in steps, beside each of which other rows may travel.

    gives: names of what goes back. sizes: those of groups, as the others take them. begin:
    something for `finish`, which makes what goes back and keeps something for `experts`. That adds
    gradients of the experts to their sum so far, in float32, and is told whether that is `start`
    still: None in a forward pass. written_out: whether turns of the parts are no loop, as on a GPU.
    keeps: of the rows and of what `begin` gives, what is kept of each part's turn; kept: that, for
    the backward pass, by turns.
    """

    gives: tuple[str, ...]
    sizes: Callable[[Arrays, jax.Array], GroupSizes]
    begin: Callable[[Arrays, GroupSizes], Arrays]
    finish: Callable[[Arrays, Arrays, GroupSizes], tuple[Arrays, Arrays]]
    experts: Callable[[Arrays, GroupSizes, Any, jax.Array], Any]
    start: Any = None
    written_out: bool = False
    keeps: tuple[str, ...] = ()
    kept: dict[str, Arrays] | None = None


KEPT = ("x", "gate", "up")  # all that a backward pass would send and compute again
Kinds = tuple[Activation, str | None]  # the activation, and a grouped product's implementation


def forward_products(kinds: Kinds, experts: ExpertParams, keep: bool = False) -> Products:
    """y of the rows. keep: what a backward pass takes (KEPT) is kept of the parts' turns."""
    implementation = kinds[1]

    def begin(rows, sizes_E):
        if "tuned" in experts:
            return {"y": grouped_ffn(experts, rows["x"], sizes_E, *kinds)}
        if keep:
            return hidden_and_products(Block(sizes_E, *kinds), experts, rows["x"])
        return {"hidden": grouped_hidden(experts, rows["x"], sizes_E, *kinds)}

    def finish(rows, begun, sizes_E):
        if "tuned" in experts:
            return begun, {}
        return {"y": grouped_down(experts, begun["hidden"], sizes_E, implementation)}, {}

    sizes = _prepare(kinds, experts, backward=False)
    keeps = KEPT if keep else ()
    return Products(("y",), sizes, begin, finish, lambda *_: None, keeps=keeps)


def backward_products(
    kinds: Kinds, experts: ExpertParams, kept: dict[str, Arrays] | None = None
) -> Products:
    """Gradients of the rows, of their weights and of the experts; kept: as `forward_products`."""

    def begin(rows, sizes_E):
        if kept:  # the kernel that the forward pass took, and no other
            begun = hidden_and_products(Block(sizes_E, *kinds), experts, rows["x"])
            return {name: begun[name] for name in ("gate", "up")}
        return gate_and_up(Block(sizes_E, *kinds), experts, rows["x"])

    def finish(rows, begun, sizes_E):
        d_x, d_weights, kept = rows_backward(Block(sizes_E, *kinds), experts, rows, begun)
        return {"d_x": d_x, "d_weights": d_weights}, kept

    def of_experts(kept, sizes_E, total, begins):
        return params_backward(Block(sizes_E, *kinds), experts, kept, total, begins)

    start = no_gradients(experts, kinds[1])
    sizes = _prepare(kinds, experts, backward=True)
    return Products(_GRADIENTS, sizes, begin, finish, of_experts, start, kept=kept)


def tuned_products(kinds: Kinds, experts: ExpertParams) -> Products:
    """Of a stack with trained experts in "tuned": gradients of those alone."""
    ids_M = experts["tuned"]["ids_M"]
    own = {name: w for name, w in experts["tuned"].items() if name != "ids_M"}

    def finish(rows, begun, sizes_E):
        def block(own, x_RD):
            params = experts | {"tuned": own | {"ids_M": ids_M}}
            return grouped_ffn(params, x_RD, sizes_E, *kinds)

        y_RD, pull = jax.vjp(block, own, rows["x"])
        d_y_RD = rows["d_y"].astype(jnp.float32)
        d_weights = jnp.sum(y_RD.astype(jnp.float32) * d_y_RD, axis=1)
        d_own, d_x = pull((rows["weights"][:, None] * d_y_RD).astype(y_RD.dtype))
        return {"d_x": d_x, "d_weights": d_weights}, d_own

    def of_experts(kept, sizes_E, total, begins):
        more = jax.tree.map(lambda d: d.astype(jnp.float32), kept)
        return more if begins is True else jax.tree.map(jnp.add, total, more)

    start = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), own)
    sizes = _prepare(kinds, experts, backward=True)

    def begin(rows, sizes_E) -> Arrays:  # all that is computed is in `finish`
        return {}

    # Sums of XLA's own, in a loop, would begin by reading zeros.
    return Products(_GRADIENTS, sizes, begin, finish, of_experts, start, written_out=True)


def _prepare(kinds: Kinds, experts: ExpertParams, backward: bool) -> Callable[..., Any]:
    """`Products.sizes` of experts; of a stack with trained ones as they are."""

    def sizes(rows, sizes_E):
        if "tuned" in experts:
            return sizes_E
        name, d_ff = kinds[1], experts["w_up"].shape[2]
        return prepared(sizes_E, rows["x"], d_ff, backward=backward, implementation=name)

    return sizes
