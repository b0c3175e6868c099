"""Writes the goldens of MoE blocks: choices, weights, outputs as transformers computes them.

    python -m tests.parity.make_router_goldens        (torch and transformers needed)

`tests/moe/test_routing_goldens.py` compares ours with them, without torch.
"""

from __future__ import annotations

import importlib
import zlib
from pathlib import Path

import numpy as np

from tests.router_cases import (
    CASES,
    D_MODEL,
    FFN,
    MASK_BT,
    NUM_EXPERTS,
    SHARED_FFN,
    TOP_K,
    X_BTD,
    Case,
    tensors_of,
)

PATH = Path(__file__).parent / "goldens" / "routers.npz"
BLOCKS = {
    "mixtral": ("MixtralConfig", "MixtralSparseMoeBlock"),
    "olmoe": ("OlmoeConfig", "OlmoeSparseMoeBlock"),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeSparseMoeBlock"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock"),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2Moe"),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3MoE"),
}
# A family names its sizes in its own way; what it does not know it keeps as a plain attribute.
SIZES = {
    "hidden_size": D_MODEL,
    "num_experts_per_tok": TOP_K,
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_intermediate_size": FFN,
    "shared_expert_intermediate_size": SHARED_FFN,
    "n_shared_experts": SHARED_FFN // FFN,
    "num_attention_heads": 4,
    "hidden_act": "silu",
}
PLAIN_WIDTH = ("mixtral", "olmoe")  # their experts are intermediate_size wide


def checksum(case: Case) -> int:
    """CRC-32 of the weights of a case."""
    value = 0
    for name, tensor in sorted(tensors_of(case).items()):
        value = zlib.crc32(tensor.tobytes(), zlib.crc32(name.encode(), value))
    return value


def block(case: Case):
    """A transformers MoE block with the weights of the case, in float32."""
    import torch

    config_name, block_name = BLOCKS[case.family]
    package = f"transformers.models.{case.family}"
    config_class = getattr(
        importlib.import_module(f"{package}.configuration_{case.family}"), config_name
    )
    block_class = getattr(importlib.import_module(f"{package}.modeling_{case.family}"), block_name)
    width = {"intermediate_size": FFN} if case.family in PLAIN_WIDTH else {}
    made = block_class(config_class(**SIZES, **width, **case.fields)).float().eval()
    state = {name: torch.from_numpy(value.copy()) for name, value in tensors_of(case).items()}
    made.load_state_dict(state, strict=True)
    return made


def computed(case: Case) -> dict[str, np.ndarray]:
    """Logits, choices (sorted by expert) with their weights, and the block's output."""
    import torch

    module = block(case)
    with torch.no_grad():
        x = torch.from_numpy(X_BTD.copy())
        logits, weights, experts = module.gate(x.reshape(-1, D_MODEL))
        y = module(x)
    order = np.argsort(experts.numpy(), axis=1)
    return {
        "logits": logits.numpy(),
        "experts": np.take_along_axis(experts.numpy(), order, 1).astype(np.int32),
        "weights": np.take_along_axis(weights.numpy(), order, 1),
        "y": y.numpy(),
    }


def balance_losses(logits: np.ndarray) -> dict[str, np.ndarray]:
    """`load_balancing_loss_func` of one layer's logits, whole and masked; Mixtral's and OLMoE's."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral
    from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func as olmoe

    layers, mask = (torch.from_numpy(logits),), torch.from_numpy(MASK_BT.astype(np.int64))
    found = {}
    for name, function in (("mixtral", mixtral), ("olmoe", olmoe)):
        found[name] = function(layers, NUM_EXPERTS, TOP_K).numpy()
        found[f"{name}_masked"] = function(layers, NUM_EXPERTS, TOP_K, mask).numpy()
    return found


def main() -> None:
    """Writes the golden file."""
    arrays = {}
    for name, case in CASES.items():
        found = computed(case)
        arrays |= {f"{name}/{key}": value for key, value in found.items()}
        arrays[f"{name}/checksum"] = np.uint32(checksum(case))
    losses = balance_losses(arrays["mixtral/logits"])
    arrays |= {f"balance/{name}": value for name, value in losses.items()}
    np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
    main()
