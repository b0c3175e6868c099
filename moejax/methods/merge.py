"""Merging: a mixture of experts becomes a dense model of the size it came from.

XFT (arXiv 2404.15247, section 3.2): per layer l, with alpha_l one number per routed expert,

    c = softmax(alpha_l)
    W_l = lam W_shared + (1 - lam) sum_i c_i W_i = W_shared + (1 - lam) sum_i c_i (W_i - W_shared)

and alpha is learned by the language-model loss of the merged model, everything else frozen. The
second form is the one computed: experts that never moved give the dense weights back exactly.
Without a shared expert it is the plain convex combination sum_i c_i W_i. Attention, norms,
embeddings and head are the MoE's; the router is discarded.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.models.config import ModelConfig
from moejax.moe.config import MoEConfig

MATRICES = ("gate", "up", "down")
DenseLoss = Callable[[tree.Tree, ModelConfig, Any, jax.Array], tuple[jax.Array, dict[str, Any]]]
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """How experts are mixed.

    lam: weight of the shared expert, 0 to 1 (XFT's public recipe has 0.75); no meaning for a
        model without one.
    learn_lambda: learn it too, as a sigmoid per layer that starts at lam.
    per_matrix: coefficients for each of gate, up and down, not one set per layer.
    """

    lam: float = 0.75
    learn_lambda: bool = False
    per_matrix: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise InputError(f"lam={self.lam} must lie between 0 and 1.")
        if self.learn_lambda and self.lam in (0, 1):
            raise InputError(f"lam={self.lam} cannot be learned from: start between 0 and 1.")


def dense_config(config: ModelConfig) -> ModelConfig:
    """The merged model's config: the MoE's without experts."""
    _require_moe(config)
    return dataclasses.replace(config, moe=None)


def init_coefficients(config: ModelConfig, merge: MergeConfig) -> tree.Tree:
    """The trainable tree at its start, equal weights: {run: {"alpha": ones [L, J]}}.

    alpha is [L, 3, J] with per_matrix (gate, up, down); learn_lambda adds "lam_logit" [L].
    J counts the routed experts.
    """
    moe = _require_moe(config)
    if merge.learn_lambda and moe.num_shared == 0:
        raise InputError("learn_lambda needs a shared expert, and this model has num_shared=0.")
    coefficients: dict[str, Any] = {}
    for run in config.runs:
        if run.kind != "moe":
            continue
        middle = (len(MATRICES),) if merge.per_matrix else ()
        alpha = jnp.ones((run.num_layers, *middle, moe.num_routed), jnp.float32)
        coefficients[run.name] = {"alpha": alpha}
        if merge.learn_lambda:
            logit = math.log(merge.lam / (1 - merge.lam))
            coefficients[run.name]["lam_logit"] = jnp.full(run.num_layers, logit, jnp.float32)
    if merge.learn_lambda:
        _log.warning(
            "learning lambda tends to collapse the merge onto the shared expert; "
            "XFT keeps it fixed for that reason"
        )
    return coefficients


def merged_params(
    moe_params: tree.Tree, config: ModelConfig, coefficients: tree.Tree, merge: MergeConfig
) -> tree.Tree:
    """The dense parameters for these coefficients, in float32 arithmetic and the experts' dtype.

    Differentiable in the coefficients alone; the experts are constants (gradient zero). Run it
    under jit: neither way does it then hold a second copy of the experts.
    """
    moe = _require_moe(config)
    layers = dict(moe_params["layers"])
    for run in config.runs:
        if run.kind != "moe":
            continue
        weights = _expert_weights(coefficients[run.name], moe, merge)
        layer = {name: part for name, part in layers[run.name].items() if name != "moe"}
        layer["mlp"] = {
            name: mix_experts(stack, weights[name.split("_", 1)[1]])
            for name, stack in layers[run.name]["moe"]["experts"].items()
        }
        layers[run.name] = layer
    return {**moe_params, "layers": layers}


def merge_loss(
    config: ModelConfig, merge: MergeConfig, dense_loss: DenseLoss
) -> Callable[..., tuple[jax.Array, dict[str, Any]]]:
    """The merge stage's loss: (coefficients, moe_params, batch, rng) -> (loss, metrics).

    The trainable tree is the coefficients alone, the MoE's parameters are frozen; dense_loss is
    (dense params, dense config, batch, rng) -> (loss, metrics) and sees the merged model. There
    is no balance loss.
    """
    dense = dense_config(config)

    def loss(coefficients: tree.Tree, moe_params: tree.Tree, batch: Any, rng: jax.Array):
        params = merged_params(moe_params, config, coefficients, merge)
        return dense_loss(params, dense, batch, rng)

    return loss


def merge_experts(
    moe_params: tree.Tree, config: ModelConfig, coefficients: tree.Tree, merge: MergeConfig
) -> tuple[tree.Tree, ModelConfig]:
    """The merged model, ready to use: `merged_params` compiled, and its config."""
    mix = jax.jit(lambda moe, alphas: merged_params(moe, config, alphas, merge))
    return mix(moe_params, coefficients), dense_config(config)


def uniform(
    moe_params: tree.Tree, config: ModelConfig, lam: float = MergeConfig.lam
) -> tuple[tree.Tree, ModelConfig]:
    """Equal coefficients, nothing learned: the control for a learned merge, and where it starts."""
    merge = MergeConfig(lam=lam)
    return merge_experts(moe_params, config, init_coefficients(config, merge), merge)


def shared_only(moe_params: tree.Tree, config: ModelConfig) -> tuple[tree.Tree, ModelConfig]:
    """The shared expert alone, lam = 1, bit for bit."""
    if _require_moe(config).num_shared == 0:
        raise InputError("shared_only needs a shared expert, and this model has num_shared=0.")
    layers = dict(moe_params["layers"])
    for run in config.runs:
        if run.kind == "moe":
            layer = dict(layers[run.name])
            experts = layer.pop("moe")["experts"]
            layers[run.name] = {**layer, "mlp": {name: w[:, 0] for name, w in experts.items()}}
    return {**moe_params, "layers": layers}, dense_config(config)


def lambda_grid(
    moe_params: tree.Tree, config: ModelConfig, lams: Iterable[float]
) -> Iterator[tuple[float, tree.Tree]]:
    """Merged parameters with equal coefficients for one lambda after the other."""
    for lam in lams:
        yield lam, uniform(moe_params, config, lam)[0]


def describe(config: ModelConfig, coefficients: tree.Tree, merge: MergeConfig) -> dict[str, Any]:
    """What was learned, for a record: lambda and the largest departure of c from 1/J, per run."""
    moe = _require_moe(config)
    found = {}
    for run, leaves in coefficients.items():
        c = jax.nn.softmax(leaves["alpha"], axis=-1)
        lam = jax.nn.sigmoid(leaves["lam_logit"]) if "lam_logit" in leaves else merge.lam
        found[run] = {
            "lam": jnp.asarray(lam).tolist(),
            "max_relative_departure": float(jnp.abs(c * moe.num_routed - 1).max()),
        }
    return found


@jax.custom_vjp
def mix_experts(stack: jax.Array, weights_LE: jax.Array) -> jax.Array:
    """W_0 + sum_e w_e (W_e - W_0) per layer, weights [L, E] (the one of expert 0 is ignored).

    stack [L, E, ...] -> [L, ...]. Differentiable in the weights: each gradient is the inner
    product <dW, W_e - W_0>. The difference is taken before the product: the two inner products
    apart are large and nearly equal, and float32 would lose what is left.
    """
    base = stack[:, 0].astype(jnp.float32)
    mixed = base
    for e in range(1, stack.shape[1]):
        weight = weights_LE[:, e].reshape(-1, *[1] * (base.ndim - 1))
        mixed = mixed + weight * (stack[:, e].astype(jnp.float32) - base)
    return mixed.astype(stack.dtype)


def _mix_forward(stack, weights_LE):
    return mix_experts(stack, weights_LE), stack


def _mix_backward(stack, d_mixed):
    return None, weight_gradient(stack, d_mixed)


def weight_gradient(stack: jax.Array, d_mixed: jax.Array) -> jax.Array:
    """<dW, W_e - W_0> per layer and expert: [L, E] float32, with room for one matrix at a time."""
    num_layers, num_experts, *shape = stack.shape
    ones = jnp.ones(shape[-1], jnp.float32)

    def pick(layer, expert):
        start = (layer, expert, *[0] * len(shape))
        matrix = jax.lax.dynamic_slice(stack, start, (1, 1, *shape))
        return matrix.reshape(-1, shape[-1]).astype(jnp.float32)

    def inner_product(index):
        layer, expert = index // num_experts, index % num_experts
        gradient = d_mixed[layer].reshape(-1, shape[-1]).astype(jnp.float32)
        # Summing rows as a product with ones: XLA's own reduction on the CPU is 3 times slower.
        products = gradient * (pick(layer, expert) - pick(layer, 0))
        return jnp.matmul(products, ones, precision=jax.lax.Precision.HIGHEST).sum()

    products = jax.lax.map(inner_product, jnp.arange(num_layers * num_experts))
    return products.reshape(num_layers, num_experts)


mix_experts.defvjp(_mix_forward, _mix_backward)


def _expert_weights(
    leaves: dict[str, jax.Array], moe: MoEConfig, merge: MergeConfig
) -> dict[str, jax.Array]:
    """Weights [L, E] for `mix_experts`, by matrix."""
    c = jax.nn.softmax(leaves["alpha"].astype(jnp.float32), axis=-1)
    if moe.num_shared:
        scale: Any = 1 - merge.lam
        if "lam_logit" in leaves:
            scale = 1 - jax.nn.sigmoid(leaves["lam_logit"])
            scale = scale.reshape(-1, *[1] * (c.ndim - 1))
        c = jnp.concatenate([jnp.zeros_like(c[..., :1]), scale * c], axis=-1)
    if merge.per_matrix:
        return {name: c[:, i] for i, name in enumerate(MATRICES)}
    return dict.fromkeys(MATRICES, c)


def _require_moe(config: ModelConfig) -> MoEConfig:
    if config.moe is None:
        raise InputError("this model has no experts: merging starts from a mixture of experts.")
    moe = config.moe
    if moe.expert_ffn not in (None, config.d_ff) or moe.shared_ffn:
        raise InputError(
            f"merging mixes experts of the dense layer's width d_ff={config.d_ff}; this model has "
            f"expert_ffn={moe.expert_ffn} and shared_ffn={moe.shared_ffn}: only an upcycled model "
            "can be merged."
        )
    return moe
