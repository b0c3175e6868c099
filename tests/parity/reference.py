"""What transformers computes for a case: logits, loss, gradients, decoding with a cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tests.parity.cases import NUM_PREFILLED, TOKENS, decodes_alike, fields_of
from tests.parity.stacked import stack, unstack
from tests.tiny_llama import tensors_of


@dataclasses.dataclass(frozen=True)
class Reference:
    """logits [B, T, V], loss, gradients by Hugging Face name, decoded logits [B, n, V].

    All float32, loss and gradients computed in float64 and rounded; bfloat16_BTV are the logits of
    the model in bfloat16. choices: of each layer with experts those of each token, int [B * T, K]
    in ascending order.
    """

    logits_BTV: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]
    decoded_BNV: np.ndarray | None
    bfloat16_BTV: np.ndarray
    choices: list[np.ndarray]


def build(fields: dict[str, Any], tensors: dict[str, np.ndarray]):
    """A transformers model with these weights, of which none is missing and none left over."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {k: v for k, v in fields.items() if k not in ("architectures", "model_type")}
    config = AutoConfig.for_model(fields["model_type"], **own)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    model = model.float().eval()
    state = {name: torch.from_numpy(value.copy()) for name, value in stack(tensors).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    assert (missing, unexpected) == (tied, []), (missing, unexpected)
    return model


def compute(name: str):
    """A case's model and its `Reference`."""
    import torch

    fields = fields_of(name)
    tensors = tensors_of(fields)
    model = build(fields, tensors)
    choices: list[np.ndarray] = []
    hooks = [m.register_forward_hook(_record(choices)) for m in model.modules() if _routes(m)]
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    # In float64: with experts the rounding of transformers' own float32 gradients is the larger.
    exact = build(fields, tensors).double()
    exact_logits = exact(tokens).logits
    loss = torch.nn.functional.cross_entropy(
        exact_logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1)
    )
    loss.backward()
    gradients = {n: p.grad.float().numpy() for n, p in exact.named_parameters()}
    gradients = unstack(gradients, tensors)
    decoded = _decode(model, tokens) if decodes_alike(name) else None
    half = build(fields, tensors).to(torch.bfloat16)
    with torch.no_grad():
        rounded = half(tokens).logits.float().numpy()
    found = logits.detach().numpy()
    return model, Reference(found, float(loss.detach()), gradients, decoded, rounded, choices)


def _routes(module) -> bool:
    return type(module).__name__.lower().endswith("topkrouter")


def _record(choices: list[np.ndarray]):
    def hook(module, inputs, outputs):
        choices.append(np.sort(outputs[2].numpy(), axis=1))

    return hook


def _decode(model, tokens) -> np.ndarray:
    """Logits for every token after the prefilled ones, one at a time with a cache."""
    import torch

    with torch.no_grad():
        out = model(tokens[:, :NUM_PREFILLED], use_cache=True)
        found = []
        for t in range(NUM_PREFILLED, tokens.shape[1]):
            out = model(tokens[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits[:, 0].numpy())
    return np.stack(found, axis=1)
