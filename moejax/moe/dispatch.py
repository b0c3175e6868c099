"""Moving tokens to their experts and back: a sort, and its inverse.

Both moves are gathers, forward and backward. Left to autodiff the backward of a gather is a
scatter-add; knowing that the rows are a permutation, it is a gather by the inverse one.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.ops.kept import ROUTING, keep


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each of R = N * K (token, choice) pairs goes.

    order_R: pair that sorted row r holds, sorted by expert, stable in the token.
    place_R: its inverse, the sorted row that holds pair n * K + k.
    group_sizes_E: rows per expert.
    """

    order_R: jax.Array
    place_R: jax.Array
    group_sizes_E: jax.Array


def plan(experts_NK: jax.Array, num_experts: int) -> Plan:
    """Sorts the (token, choice) pairs by expert."""
    experts_R = experts_NK.reshape(-1)
    order_R = jnp.argsort(experts_R, stable=True)
    moves = Plan(
        order_R=order_R,
        place_R=jnp.argsort(order_R),
        group_sizes_E=jnp.bincount(experts_R, length=num_experts).astype(jnp.int32),
    )
    return keep(moves, ROUTING)


@jax.custom_vjp
def dispatch(x_ND: jax.Array, moves: Plan) -> jax.Array:
    """Copies each token to the rows of its experts: [N, D] -> [R, D]. Inverse: `combine`."""
    num_choices = moves.order_R.shape[0] // x_ND.shape[0]
    return x_ND[moves.order_R // num_choices]


def combine(rows_RD: jax.Array, weights_NK: jax.Array, moves: Plan) -> jax.Array:
    """Sums each token's rows by their weights: [R, D], [N, K] -> [N, D]. Inverse: `dispatch`."""
    rows_NKD = unsort(rows_RD, moves).reshape(*weights_NK.shape, rows_RD.shape[1])
    return jnp.einsum(
        "nkd,nk->nd", rows_NKD, weights_NK, preferred_element_type=jnp.float32
    ).astype(rows_RD.dtype)


@jax.custom_vjp
def unsort(rows_RD: jax.Array, moves: Plan) -> jax.Array:
    """Rows in the order of their pairs again."""
    return rows_RD[moves.place_R]


def _dispatch_forward(x_ND, moves):
    return dispatch(x_ND, moves), (x_ND.shape[0], moves)


def _dispatch_backward(saved, d_rows_RD):
    num_tokens, moves = saved
    d_pairs_RD = d_rows_RD[moves.place_R]
    d_pairs_NKD = d_pairs_RD.reshape(num_tokens, -1, d_pairs_RD.shape[1])
    return d_pairs_NKD.sum(axis=1, dtype=jnp.float32).astype(d_rows_RD.dtype), None


def _unsort_forward(rows_RD, moves):
    return unsort(rows_RD, moves), moves


def _unsort_backward(moves, d_pairs_RD):
    return d_pairs_RD[moves.order_R], None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)
unsort.defvjp(_unsort_forward, _unsort_backward)
