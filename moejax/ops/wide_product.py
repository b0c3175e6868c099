"""Products of 16-bit operands whose sums stay float32, with gradients that are 16-bit products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def wide_product(
    product: Callable[..., jax.Array], x: jax.Array, w: jax.Array, *rest: jax.Array
) -> jax.Array:
    """product(x, w, *rest), unrounded: at least float32.

    product: linear in x and in w, with a keyword `preferred_element_type`, as `jnp.matmul` has it.
    rest: integers. The gradient that arrives is rounded to the operands' dtype before it is
    multiplied by them, as in the backward pass of a product with a rounded result; jax alone would
    multiply float32 by 16 bits: twice the bytes, and on a GPU at half the speed (TF32).
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if x.dtype == wide or x.dtype != w.dtype:
        return product(x, w, *rest, preferred_element_type=wide)
    return _wide(product, x, w, rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide(product: Callable[..., jax.Array], x: jax.Array, w: jax.Array, rest: Any) -> jax.Array:
    return product(x, w, *rest, preferred_element_type=jnp.float32)


def _forward(product, x, w, rest) -> tuple[jax.Array, Any]:
    # The product itself: in a call of `_wide` remat's policies would not find it to keep.
    return product(x, w, *rest, preferred_element_type=jnp.float32), (x, w, rest)


def _backward(product, saved, d_out) -> tuple[jax.Array, jax.Array, None]:
    x, w, rest = saved
    d_out = d_out.astype(x.dtype)
    (dx,) = jax.linear_transpose(lambda x: product(x, w, *rest), x)(d_out)
    (dw,) = jax.linear_transpose(lambda w: product(x, w, *rest), w)(d_out)
    return dx, dw, None


_wide.defvjp(_forward, _backward)
