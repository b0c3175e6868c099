"""Optimizers and learning-rate schedules, as the papers' reference code (HF Trainer) sets them.

Adafactor here is the torch one of `transformers` with scale_parameter=False and
relative_step=False. `optax.adafactor` differs in four ways (it scales by the parameter's size,
factors only dims >= 128, cuts the decay differently, and clips a whole array at once), and ours
must work on stacked trees: a leaf [L, E, D, F] is L * E matrices, each factored and clipped alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from moejax.core import tree
from moejax.core.errors import InputError

NAMES = ("adafactor", "adamw", "muon")
SCHEDULES = ("linear", "cosine", "constant")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How gradients become steps.

    Attributes:
      name: "adafactor", "adamw" or "muon". lr: the peak learning rate.
      schedule: "linear" or "cosine" (both to 0 at the last step) or "constant".
      warmup_steps: steps over which the rate grows linearly; step 0 then has rate 0, as in HF's.
      clip_norm: largest global gradient norm, 0 leaves gradients alone (the paper's way).
      weight_decay: decoupled, times the learning rate, on every leaf but those of `no_decay`.
      no_decay: patterns of paths (`moejax.core.tree`).
      lr_scale: (pattern, factor) pairs; the learning rate of a leaf is multiplied by the factor of
        the first pattern that fits.
      b1, b2, eps: AdamW's, and of what Muon leaves to it.
      decay_rate, clip_threshold: Adafactor's beta2_t = 1 - t^decay_rate, and the RMS of an update
        above which it is scaled down.
    """

    name: str = "adafactor"
    lr: float = 5e-5
    schedule: str = "linear"
    warmup_steps: int = 0
    clip_norm: float = 0.0
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = ()
    lr_scale: tuple[tuple[str, float], ...] = ()
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    decay_rate: float = -0.8
    clip_threshold: float = 1.0

    def __post_init__(self):
        for field, known in (("name", NAMES), ("schedule", SCHEDULES)):
            value = getattr(self, field)
            if value not in known:
                raise InputError(f"optimizer {field} {value!r} is unknown: use {', '.join(known)}")
        for field in ("lr", "warmup_steps", "clip_norm", "weight_decay"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"optimizer {field} must be 0 or more and finite, got {value}")
        for pattern, factor in self.lr_scale:
            if not (math.isfinite(factor) and factor >= 0):
                raise InputError(f"lr_scale of {pattern} must be 0 or more, got {factor}")


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of a step (0-based), with w warm-up steps of S in all:

    warm-up: lr * t / w;  linear: lr * (S - t) / (S - w);  cosine: lr * (1 + cos(pi p)) / 2 with
    p = (t - w) / (S - w);  constant: lr. (HF transformers' schedules.)
    """
    warmup = config.warmup_steps
    if warmup > total_steps:
        raise InputError(
            f"warmup_steps {warmup} is more than the {total_steps} steps of the run: lower it"
        )

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(1, total_steps - warmup), 0.0, 1.0)
        if config.schedule == "linear":
            factor = 1.0 - progress
        elif config.schedule == "cosine":
            factor = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        else:
            factor = jnp.ones_like(progress)
        return config.lr * jnp.where(step < warmup, step / max(1, warmup), factor)

    return schedule


class MatrixView(NamedTuple):
    """How a stacked leaf is read as torch's matrices: leading dims that count them, then rows and
    columns, each of one or more dims. A vector has no column dims."""

    num_stacked: int
    num_row_dims: int
    num_col_dims: int


def matrix_view(path: str, shape: tuple[int, ...]) -> MatrixView:
    """The matrices (or vectors) that one leaf of our tree is in a Hugging Face model.

    Below ``layers/<run>/`` the first dim counts layers, below ``experts/`` the next counts experts.
    Attention weights keep heads apart ([D, H, C], [H, C, D]): in torch they are one dim. Merge
    coefficients are one vector (`alpha`) or number (`lam_logit`) per layer, or layer and matrix.
    """
    if path.endswith(("/alpha", "/lam_logit")):
        num_row_dims = int(path.endswith("/alpha"))
        return MatrixView(len(shape) - num_row_dims, num_row_dims, 0)
    num_stacked = int(path.startswith("layers/")) + int("/experts/" in f"/{path}")
    num_stacked = min(num_stacked, len(shape))
    name, rest = path.rsplit("/", 1)[-1], len(shape) - num_stacked
    if rest < 2 or name.startswith("b_"):
        return MatrixView(num_stacked, rest, 0)
    if rest == 2:
        return MatrixView(num_stacked, 1, 1)
    return MatrixView(num_stacked, 2, 1) if name == "w_o" else MatrixView(num_stacked, 1, rest - 1)


class AdafactorState(NamedTuple):
    """Steps done; per leaf {"row": [..., R], "col": [..., C]} or, for vectors, {"full": ...}."""

    step: jax.Array
    moments: tree.Tree


def scale_by_adafactor(
    decay_rate: float = -0.8,
    clip_threshold: float = 1.0,
    eps: float = 1e-30,
    view: Callable[[str, tuple[int, ...]], MatrixView] = matrix_view,
) -> optax.GradientTransformation:
    """Adafactor's update (Shazeer & Stern 2018, algorithm 4 without scaling by the parameter).

    b_t = 1 - t^decay_rate;  r = b_t r + (1 - b_t) mean_cols(g^2 + eps);  c likewise over rows;
    u = g / sqrt(r c / mean(r));  u / max(1, rms(u) / clip_threshold).  Vectors keep the whole
    second moment. Per matrix of `view`; no momentum; float32 whatever the gradients are.
    """

    def init(params):
        def moments(path, leaf):
            stacked, rows, cols = _sizes(path, leaf.shape, view)
            if cols is None:
                return {"full": jnp.zeros((*stacked, rows), jnp.float32)}
            return {
                "row": jnp.zeros((*stacked, rows), jnp.float32),
                "col": jnp.zeros((*stacked, cols), jnp.float32),
            }

        return AdafactorState(jnp.zeros((), jnp.int32), tree.map_with_path(moments, params))

    def update(grads, state, params=None):
        del params
        step = state.step + 1
        beta = 1.0 - step.astype(jnp.float32) ** decay_rate
        flat_moments = tree.flatten(state.moments)
        updates: dict[str, jax.Array] = {}
        moments: dict[str, jax.Array] = {}
        for path, grad in tree.flatten(grads).items():
            stacked, rows, cols = _sizes(path, grad.shape, view)
            shape = (*stacked, rows) if cols is None else (*stacked, rows, cols)
            old = {k: flat_moments.get(f"{path}/{k}") for k in ("row", "col", "full")}
            scaled, new = _adafactor_leaf(grad.astype(jnp.float32).reshape(shape), old, beta, eps)
            dims = tuple(range(len(stacked), len(shape)))
            rms = jnp.sqrt(jnp.mean(jnp.square(scaled), axis=dims, keepdims=True))
            scaled = scaled / jnp.maximum(1.0, rms / clip_threshold)
            updates[path] = scaled.reshape(grad.shape)
            moments |= {f"{path}/{k}": value for k, value in new.items()}
        return tree.unflatten(updates), AdafactorState(step, tree.unflatten(moments))

    return optax.GradientTransformation(init, update)


def _sizes(path, shape, view) -> tuple[tuple[int, ...], int, int | None]:
    """Stacked dims, rows, columns (None for a vector) of a leaf."""
    num_stacked, num_rows, num_cols = view(path, shape)
    assert num_stacked + num_rows + num_cols == len(shape), (path, shape)
    split = num_stacked + num_rows
    cols = math.prod(shape[split:]) if num_cols else None
    return shape[:num_stacked], math.prod(shape[num_stacked:split]), cols


def _adafactor_leaf(grad, old, beta, eps) -> tuple[jax.Array, dict[str, jax.Array]]:
    square = jnp.square(grad) + eps
    if old["full"] is not None:
        full = beta * old["full"] + (1.0 - beta) * square
        return grad * jax.lax.rsqrt(full), {"full": full}
    row = beta * old["row"] + (1.0 - beta) * square.mean(-1)
    col = beta * old["col"] + (1.0 - beta) * square.mean(-2)
    row_factor = jax.lax.rsqrt(row / row.mean(-1, keepdims=True))
    update = grad * row_factor[..., :, None] * jax.lax.rsqrt(col)[..., None, :]
    return update, {"row": row, "col": col}


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """The whole chain: clip, precondition, decay, times minus the learning rate of each leaf."""
    parts: list[Any] = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name == "adafactor":
        parts.append(scale_by_adafactor(config.decay_rate, config.clip_threshold))
    elif config.name == "adamw":
        parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    else:
        parts.append(scale_by_muon(config))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, _decayed(config)))
    if config.lr_scale:
        parts.append(optax.stateless(_lr_scaling(config)))
    parts.append(optax.scale_by_learning_rate(make_schedule(config, total_steps)))
    return optax.chain(*parts)


def scale_by_muon(config: OptimConfig) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) as optax has it, for the matrices of the layers; Adam for the rest.

    A momentum of gradients is made orthogonal by Newton-Schulz steps, each matrix of `matrix_view`
    alone, and scaled by 0.2 sqrt(max(rows, columns)) (arXiv 2502.16982), so that AdamW's learning
    rates serve. Embeddings, heads, routers and vectors take Adam's update.
    """

    def dims(params: tree.Tree) -> tree.Tree:
        # optax also asks with what Adam takes masked out, which has no shape.
        return tree.map_with_path(
            lambda path, leaf: _muon_dims(path, leaf.shape) if hasattr(leaf, "shape") else None,
            params,
        )

    return optax.contrib.muon(
        -1.0,  # its sign; the learning rate comes last in the chain
        adam_learning_rate=-1.0,
        adam_b1=config.b1,
        adam_b2=config.b2,
        eps=config.eps,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=dims,
    )


def _muon_dims(path: str, shape: tuple[int, ...]) -> Any:
    """Which dims of a leaf are a matrix's rows and columns; None where Adam takes it."""
    num_stacked, num_rows, num_cols = matrix_view(path, shape)
    if not num_cols or not path.startswith("layers/") or "/router/" in path:
        return None
    rows = tuple(range(num_stacked, num_stacked + num_rows))
    cols = tuple(range(num_stacked + num_rows, len(shape)))
    return optax.contrib.MuonDimensionNumbers(reduction_axis=rows, output_axis=cols)


def _decayed(config: OptimConfig) -> Callable[[tree.Tree], tree.Tree]:
    return lambda params: jax.tree.map(lambda fits: not fits, tree.mask(params, config.no_decay))


def _lr_scaling(config: OptimConfig):
    def factor(path: str) -> float:
        fits = (number for pattern, number in config.lr_scale if tree.matches(path, pattern))
        return next(fits, 1.0)

    return lambda updates, params: tree.map_with_path(lambda path, u: factor(path) * u, updates)


def check_patterns(patterns: Iterable[str], params: tree.Tree, what: str) -> None:
    """InputError for a pattern that no path of the parameters fits."""
    paths = list(tree.flatten(params))
    for pattern in patterns:
        if not any(tree.matches(path, pattern) for path in paths):
            raise InputError(
                f"{what} {pattern!r} fits none of the {len(paths)} parameters "
                f"({', '.join(paths[:3])}, ...): * is any text in one key, ** any number of keys"
            )
