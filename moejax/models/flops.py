"""Parameters and floating-point operations of a model, counted from its config.

A product of [m, k] and [k, n] counts 2 m k n. Per token of a sequence of T tokens, layer by layer:

    attention projections   2 (2 D H C + 2 D G C)
    scores and mixing       4 H C (T + 1) / 2        causal: a token sees (T + 1) / 2 on average
    feed-forward            2 * 3 D F                times K active experts in an MoE
    router                  2 (D J + J J) "mlp" gate, 2 D J "linear"; plus 2 D J for its noise

and 2 D V for the head. Norms, rope, softmax, activations and the sorting of tokens are left out: on
a model worth training they are below 1%. What remat computes twice is not counted either, so a
rate in these FLOPs says how fast useful work is done.
"""

from __future__ import annotations

from moejax.core import tree
from moejax.models.config import ModelConfig
from moejax.models.transformer import abstract_params


def num_params(config: ModelConfig) -> int:
    """All parameters, embeddings included."""
    return tree.num_params(abstract_params(config))


def active_params(config: ModelConfig) -> int:
    """Parameters that one token uses: all but the experts it is not sent to."""
    if config.moe is None:
        return num_params(config)
    idle = config.moe.num_experts - config.moe.top_k
    experts, _ = tree.split(abstract_params(config), "**/experts/**")
    return num_params(config) - tree.num_params(experts) // config.moe.num_experts * idle


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """One forward pass with the head, per token of sequences of `seq_len`; no router noise."""
    return (
        config.num_layers
        * (_attention_flops(config, seq_len) + _ffn_flops(config) + _router_flops(config))
        + 2 * config.d_model * config.vocab_size
    )


def train_flops(config: ModelConfig, num_tokens: int, seq_len: int) -> float:
    """Training every parameter on `num_tokens` tokens: 3 forward passes, and the router's noise.

    The backward pass has two products (for inputs, for weights) where the forward one has one.
    """
    noise = 0
    if config.moe is not None and config.moe.noise:
        noise = 2 * config.d_model * config.moe.num_routed * config.num_layers
    return 3.0 * num_tokens * (forward_flops_per_token(config, seq_len) + noise)


def merge_flops(config: ModelConfig, num_tokens: int, seq_len: int, num_steps: int) -> float:
    """Learning an MoE's merge coefficients on `num_tokens` tokens in `num_steps` steps.

    Of the dense model: a forward pass, gradients to every input, and to the weights of the
    feed-forward layers only. Per step and parameter of a routed expert: subtract, multiply and add
    to mix, the same again for the inner products of the backward pass.
    """
    assert config.moe is not None
    dense = forward_flops_per_token(config, seq_len) - config.num_layers * (
        _router_flops(config) + _ffn_flops(config) * (1 - 1 / config.moe.top_k)
    )
    ffn = config.num_layers * _ffn_flops(config) / config.moe.top_k
    experts, _ = tree.split(abstract_params(config), "**/experts/**")
    routed = tree.num_params(experts) / config.moe.num_experts * config.moe.num_routed
    return num_tokens * (2 * dense + ffn) + 6.0 * num_steps * routed


def _attention_flops(config: ModelConfig, seq_len: int) -> float:
    heads, kv_heads = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    projections = 4 * config.d_model * (heads + kv_heads)
    return projections + 2 * heads * (seq_len + 1)


def _ffn_flops(config: ModelConfig) -> float:
    active = config.moe.top_k if config.moe else 1
    return 6 * config.d_model * config.d_ff * active


def _router_flops(config: ModelConfig) -> float:
    if config.moe is None:
        return 0
    num_routed = config.moe.num_routed
    gate = config.d_model * num_routed
    return 2 * (gate + num_routed**2 if config.moe.gate == "mlp" else gate)
