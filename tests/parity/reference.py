"""What transformers computes for a case: logits, loss, gradients, decoding with a cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tests.parity.cases import NUM_PREFILLED, TOKENS, decodes_alike, fields_of
from tests.tiny_llama import tensors_of


@dataclasses.dataclass(frozen=True)
class Reference:
    """logits [B, T, V], loss, gradients by Hugging Face name, decoded logits [B, n, V].

    All float32; bfloat16_BTV are the logits of the model in bfloat16.
    """

    logits_BTV: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]
    decoded_BNV: np.ndarray | None
    bfloat16_BTV: np.ndarray


def build(fields: dict[str, Any], tensors: dict[str, np.ndarray]):
    """A transformers model with these weights, of which none is missing and none left over."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {k: v for k, v in fields.items() if k not in ("architectures", "model_type")}
    config = AutoConfig.for_model(fields["model_type"], **own)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    state = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    assert (missing, unexpected) == (tied, []), (missing, unexpected)
    return model


def compute(name: str):
    """A case's model and its `Reference`."""
    import torch

    fields = fields_of(name)
    model = build(fields, tensors_of(fields))
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1)
    )
    loss.backward()
    gradients = {n: p.grad.numpy().copy() for n, p in model.named_parameters()}
    model.zero_grad()
    decoded = _decode(model, tokens) if decodes_alike(name) else None
    half = build(fields, tensors_of(fields)).to(torch.bfloat16)
    with torch.no_grad():
        rounded = half(tokens).logits.float().numpy()
    return model, Reference(
        logits.detach().numpy(), float(loss.detach()), gradients, decoded, rounded
    )


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
