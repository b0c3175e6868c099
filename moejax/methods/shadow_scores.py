"""How important each head and neuron was to a text: the criteria that ShadowLLM compares.

All are functions of what one backward pass gives, of one text of T tokens:
  x_THC  what a head mixed, before the output projection;  g_THC  dLoss/dx
  a_TF   a neuron's activation, before the down projection;  ga_TF  dLoss/da
where Loss is the mean cross-entropy of the scored tokens. Larger is more important. `FOR_HEADS` and
`FOR_NEURONS` name those that are defined. `parity=True` gives what the ShadowLLM reference
(github.com/abdelfattah-lab/shadow_llm, lm_eval/base.py) computes where that differs from the
published criterion; there a neuron's a is the value before the activation function, here it never
is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Needs: "values", one backward pass ("gradients"), its gradients of "weights", a second one
# ("curvature"), or token ids that follow ("labels").
FOR_HEADS = {
    "l2_norm": "values",
    "plainact": "gradients",
    "fisher": "gradients",
    "grad_norm": "gradients",
    "snip": "gradients",
    "grasp": "curvature",
    "nwot": "values",
    "jacov": "gradients",
    "epenas": "labels",
}
FOR_NEURONS = {
    "l2_norm": "values",
    "plainact": "weights",
    "act_grad": "gradients",
    "fisher": "gradients",
    "grad_norm": "weights",
    "snip": "gradients",
    "grasp": "curvature",
    "nwot": "values",
}
CRITERIA = tuple(dict.fromkeys([*FOR_HEADS, *FOR_NEURONS]))
_DIM = {"w_gate": -2, "w_up": -2, "w_down": -1}  # of a neuron's weights: the one summed over
TINY = 1e-5  # k of jacov and epenas
MIN_CLASS = 5  # samples that a class of epenas needs


def l2_norm(x: jax.Array) -> jax.Array:
    """sqrt(sum x^2) over tokens (and channels): what DejaVu calls magnitude (arXiv 2310.17157)."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=_others(x)))


def plainact_heads(x_THC: jax.Array, g_THC: jax.Array) -> jax.Array:
    """sum_t |sum_c g x|, ShadowLLM's criterion (arXiv 2406.16635, section 3)."""
    return jnp.sum(jnp.abs(jnp.sum(g_THC * x_THC, axis=2)), axis=0)


def act_grad(a_TF: jax.Array, ga_TF: jax.Array) -> jax.Array:
    """sum_t |a ga|: plainact of heads, for a neuron; needs no gradient of a weight."""
    return jnp.sum(jnp.abs(a_TF * ga_TF), axis=0)


def plainact_weights(weights: dict[str, jax.Array], grads: dict[str, jax.Array]) -> jax.Array:
    """sum |G W| over a neuron's weights: its columns of gate and up, its row of down.

    ShadowLLM's criterion for FFN neurons, there of the one matrix before a ReLU; of a gated layer
    all three belong to a neuron. weights, grads: w_gate, w_up [.., D, F], w_down [.., F, D].
    """
    parts = {name: jnp.abs(w * grads[name]) for name, w in weights.items() if name in _DIM}
    return _over_weights(parts)


def plainact_weights_parity(weights, grads) -> jax.Array:
    """sum |G W| over the first matrix alone, as the reference has it for OPT."""
    name = "w_gate" if "w_gate" in weights else "w_up"
    return jnp.sum(jnp.abs(weights[name] * grads[name]), axis=-2)


def fisher(x: jax.Array, g: jax.Array, num_tokens: jax.Array, parity: bool = False) -> jax.Array:
    """mean_t (sum_c x g)^2, the empirical Fisher information of a gate on the unit.

    Theis et al. 2018 (arXiv 1801.05787, eq. 8), a token as the sample. The reference squares each
    channel before it sums them: parity.
    """
    product = x * g
    if x.ndim == 3:
        squared = jnp.sum(product**2, 2) if parity else jnp.sum(product, 2) ** 2
    else:
        squared = product**2
    return jnp.sum(squared, axis=0) / num_tokens


def grad_norm_heads(g_THC: jax.Array) -> jax.Array:
    """Frobenius norm of dLoss/dx (Abdelfattah et al. 2021, arXiv 2101.08134)."""
    return l2_norm(g_THC)


def grad_norm_weights(grads: dict[str, jax.Array]) -> jax.Array:
    """L2 norm of the gradient of all of a neuron's weights (same source)."""
    return jnp.sqrt(_over_weights({n: jnp.square(g) for n, g in grads.items() if n in _DIM}))


def snip(x: jax.Array, g: jax.Array, parity: bool = False) -> jax.Array:
    """|dLoss/dm| = |sum_t,c g x| of a mask m on the unit (Lee et al. 2019, arXiv 1810.02340).

    The reference sums |g| instead, which does not see x: parity.
    """
    if parity:
        return jnp.sum(jnp.abs(g), axis=_others(g))
    return jnp.abs(jnp.sum(x * g, axis=_others(g)))


def grasp(x: jax.Array, hessian_g: jax.Array) -> jax.Array:
    """-sum x (H g), H the Hessian of the loss over all places together (arXiv 2002.07376, eq. 8).

    Signed. The reference takes means, so that it is this over a constant, and of weights for
    neurons; its own comment calls its second backward pass wrong.
    """
    return -jnp.sum(x * hessian_g, axis=_others(x))


def nwot(x: jax.Array, mask_T: jax.Array, parity: bool = False) -> jax.Array:
    """log det(I + K), K_ij the number of channels on which tokens i and j are alike in sign.

    NASWOT (Mellor et al. 2021, arXiv 2006.04647, eq. 2) has log det K over a batch of inputs; over
    tokens K is singular as soon as two are alike or tokens outnumber channels, hence I. K = s s' +
    (1 - s)(1 - s)' with s = (x > 0). Computed of 2C x 2C matrices, whose determinant is the same.
    The reference drops s s' and flattens s, which leaves log(sum(1 - s)) of a head and the log of
    the share of tokens with a <= 0 of a neuron: parity (half a token where there is none, for which
    the reference has no value).
    """
    on = (x > 0) & mask_T.reshape(-1, *(1,) * (x.ndim - 1))
    off = (x <= 0) & mask_T.reshape(-1, *(1,) * (x.ndim - 1))
    if parity:
        count = jnp.maximum(jnp.sum(off, axis=_others(x)), 0.5)
        return jnp.log(count / jnp.sum(mask_T) if x.ndim == 2 else count)
    if x.ndim == 2:  # one channel: the determinant in closed form
        return jnp.log1p(jnp.sum(on, 0)) + jnp.log1p(jnp.sum(off, 0))
    both_HTC = jnp.swapaxes(jnp.concatenate([on, off], axis=2), 0, 1).astype(jnp.float32)
    inner = jnp.einsum("htc,hte->hce", both_HTC, both_HTC) + jnp.eye(both_HTC.shape[2])
    return jnp.linalg.slogdet(inner)[1]


def jacov(g_RHC: jax.Array, there_R: jax.Array) -> jax.Array:
    """-sum(log(v + k) + 1/(v + k)), v the eigenvalues of the correlations of g's rows, k = 1e-5.

    Mellor et al. 2020 (arXiv 2006.04647v1, eq. 2), a token's gradient as the row of the Jacobian.
    With more rows than channels most v are 0 and the sum counts them: give at most C / 2 rows,
    spread `evenly` over the tokens that predict scored ones (earlier ones have no gradient in the
    last layer). there_R: false of rows that are another's copy, as a short answer's are: they count
    as one that goes with no other, alike for every head, where a copy would make a v of 0. The
    reference draws 200 of all rows ten times, and |v|.
    """
    alone_RR = jnp.diag(1.0 - there_R)
    correlations_HRR = _correlations(g_RHC * there_R[:, None, None]) + alone_RR
    values = jnp.abs(jnp.linalg.eigvalsh(correlations_HRR))
    return -jnp.sum(jnp.log(values + TINY) + 1 / (values + TINY), axis=-1)


def epenas(g_RHC: jax.Array, labels_R: jax.Array, parity: bool = False) -> jax.Array:
    """sum over classes of |e_c|, e_c = sum log(|correlations within class c| + k), k = 1e-5.

    EPE-NAS (Lopes et al. 2021, arXiv 2102.08099, eq. 4 and 5, up to 100 classes); rows are the
    gradients where the next token is scored, classes are those tokens, of MIN_CLASS rows at least;
    labels below 0 count as none. The reference has sum over pairs |e_c - e_d| whatever their
    number: parity. Zero where no token comes so often.
    """
    same_RR = (labels_R[:, None] == labels_R) & (labels_R >= 0)
    counts_R = same_RR.sum(1)
    first_R = jnp.argmax(same_RR, axis=1) == jnp.arange(len(labels_R))
    classes_R = first_R & (counts_R >= MIN_CLASS)  # one row stands for its class
    logs_HRR = jnp.log(jnp.abs(_correlations(g_RHC)) + TINY) * same_RR
    score_HR = jnp.einsum("hrs,qr->hq", logs_HRR, same_RR.astype(jnp.float32))
    if not parity:
        return jnp.sum(jnp.abs(score_HR) * classes_R, axis=1)
    gaps = jnp.abs(score_HR[:, :, None] - score_HR[:, None, :])
    return jnp.sum(gaps * (classes_R[:, None] & classes_R), axis=(1, 2))


def evenly(first: jax.Array, end: jax.Array, num_rows: int) -> jax.Array:
    """int32 [num_rows]: places spread evenly over the tokens from `first` to `end` - 1, ascending.

    Fewer tokens than rows: some come more than once, side by side.
    """
    at = first + jnp.arange(num_rows) * (end - first) / num_rows
    return jnp.clip(at.astype(jnp.int32), 0)


def _over_weights(parts: dict[str, jax.Array]) -> jax.Array:
    return jnp.sum(jnp.stack([jnp.sum(x, axis=_DIM[name]) for name, x in parts.items()]), axis=0)


def _others(x: jax.Array) -> tuple[int, ...]:
    """All dims but the unit's: tokens, and the channels of a head."""
    return (0, 2) if x.ndim == 3 else (0,)


def _correlations(g_RHC: jax.Array) -> jax.Array:
    """[H, R, R]: of every two rows over channels; a constant row has none with any other."""
    rows_HRC = jnp.swapaxes(g_RHC, 0, 1)
    rows_HRC = rows_HRC - rows_HRC.mean(-1, keepdims=True)
    size_HR1 = jnp.sqrt(jnp.sum(rows_HRC**2, axis=-1, keepdims=True))
    rows_HRC = rows_HRC / jnp.where(size_HR1 > 0, size_HR1, 1)
    return jnp.einsum("hrc,hsc->hrs", rows_HRC, rows_HRC)
