"""Parameters and floating-point operations of a model, counted from its config.

A product of [m, k] and [k, n] counts 2 m k n, so a matrix costs a token twice its parameters:

    attention, feed-forward, router, head    2 per parameter; experts times K / E
    scores and mixing                        2 H (C + Cv) s, in a text of T tokens

where s is how many tokens one sees on average: (T + 1) / 2, or with a window of w < T the mean of
min(t, w) over t = 1 .. T. A router's noise is there in training only. Norms, rope, softmax,
activations, the embedding's look-up and the sorting of tokens are left out: on a model worth
training they are below 1%. What remat computes twice is not counted either, so a rate in these
FLOPs says how fast useful work is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moejax.core import tree
from moejax.models.config import ModelConfig
from moejax.models.params import abstract_params


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
    scores = sum(_score_flops(config, seq_len, w) for run in config.runs for w in run.windows)
    head = 2 * config.embed_size * config.vocab_size
    return _matrix_flops(config) + scores + head


def train_flops(
    config: ModelConfig, num_tokens: int, seq_len: int, freeze: Sequence[str] = ()
) -> float:
    """Training on `num_tokens` tokens: 3 forward passes, and the router's noise.

    The backward pass has two products (for inputs, for weights) where the forward one has one; the
    second is left out for weights whose path fits a pattern of `freeze`. Gradients of inputs are
    counted in every layer, also below the lowest one that is trained. Tokens are all of a batch's:
    padding counts, and scores as if a packed row were one text.
    """
    noise = _flops_of(config, _is_noise)
    whole = 3.0 * num_tokens * (forward_flops_per_token(config, seq_len) + noise)
    return whole - num_tokens * _frozen_flops(config, freeze)


def _frozen_flops(config: ModelConfig, freeze: Sequence[str]) -> float:
    """All products with frozen matrices, the head among them, per token."""

    def frozen(path: str) -> bool:
        return any(tree.matches(path, pattern) for pattern in freeze)

    experts = _flops_of(config, lambda path: frozen(path) and _is_expert(path))
    matrices = _flops_of(config, lambda path: frozen(path) and _is_matrix(path))
    noise = _flops_of(config, lambda path: frozen(path) and _is_noise(path))
    head = frozen("embed/tokens" if config.tie_embeddings else "lm_head/w")
    others = matrices - experts + noise + head * 2 * config.embed_size * config.vocab_size
    return others + experts * _active_share(config)


def merge_flops(config: ModelConfig, num_tokens: int, seq_len: int, num_steps: int) -> float:
    """Learning an MoE's merge coefficients on `num_tokens` tokens in `num_steps` steps.

    Of the dense model: a forward pass, gradients to every input, and to the weights of the
    feed-forward layers only. Per step and parameter of a routed expert: subtract, multiply and add
    to mix, the same again for the inner products of the backward pass.
    """
    assert config.moe is not None
    experts = _flops_of(config, _is_expert)
    router = _flops_of(config, _is_router)
    ffn = experts / config.moe.num_experts
    active = experts * _active_share(config)
    dense = forward_flops_per_token(config, seq_len) - router - active + ffn
    stacks, _ = tree.split(abstract_params(config), "**/experts/**")
    routed = tree.num_params(stacks) / config.moe.num_experts * config.moe.num_routed
    return num_tokens * (2 * dense + ffn) + 6.0 * num_steps * routed


def _matrix_flops(config: ModelConfig) -> float:
    """All products with matrices but the head's, per token."""
    experts = _flops_of(config, _is_expert)
    others = _flops_of(config, _is_matrix) - experts
    return others + experts * _active_share(config)


def _flops_of(config: ModelConfig, wanted: Callable[[str], bool]) -> float:
    flat = tree.flatten(abstract_params(config))
    return 2.0 * sum(tree.num_params(leaf) for path, leaf in flat.items() if wanted(path))


def _is_matrix(path: str) -> bool:
    return path.rsplit("/", 1)[1].startswith("w_") and not path.endswith("/w_noise")


def _is_noise(path: str) -> bool:
    return path.endswith("/w_noise")


def _is_expert(path: str) -> bool:
    return "/experts/" in path and _is_matrix(path)


def _is_router(path: str) -> bool:
    return "/router/" in path and _is_matrix(path)


def _active_share(config: ModelConfig) -> float:
    """Share of the experts that a token uses, on average."""
    if config.moe is None:
        return 0.0
    active = float(config.moe.top_k)
    if config.moe.selection == "expert_choice":
        active *= config.moe.capacity_factor
    return active / config.moe.num_experts


def _score_flops(config: ModelConfig, seq_len: int, window: int) -> float:
    seen = (seq_len + 1) / 2
    if 0 < window < seq_len:
        seen = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
    value_size = config.head_size if config.mla is None else config.mla.v_size
    return 2 * config.num_heads * (config.head_size + value_size) * seen
