"""Small MoE blocks of Hugging Face's families: our config, theirs, and weights for both.

Weights are drawn by numpy in Hugging Face's layout ([out, in]; gate and up of an expert in one
array) under the names of its modules.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax.moe.config import CONVENTIONS, MoEConfig

NUM_EXPERTS, TOP_K, D_MODEL, FFN, SHARED_FFN = 8, 3, 16, 12, 24
X_BTD = np.random.default_rng(1).normal(size=(2, 15, D_MODEL)).astype(np.float32)
MASK_BT = np.arange(15)[None] < np.array([[15], [9]])


@dataclasses.dataclass(frozen=True)
class Case:
    """family: its module name in transformers; fields: what its config has beside the sizes."""

    family: str
    config: MoEConfig
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


def case(family: str, fields: dict[str, Any], **ours: Any) -> Case:
    config = MoEConfig(NUM_EXPERTS, TOP_K, **(CONVENTIONS[family] | {"expert_ffn": FFN} | ours))
    return Case(family, config, fields)


GROUPS = {"n_group": 4, "topk_group": 2}
OUR_GROUPS: dict[str, Any] = {"num_groups": 4, "top_groups": 2, "shared_ffn": SHARED_FFN}
GREEDY = {"topk_method": "greedy", "routed_scaling_factor": 1.5}
LIMITED = {"topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0, **GROUPS}
V3 = {"routed_scaling_factor": 2.5, **GROUPS}
SHARED: dict[str, Any] = {"shared_ffn": SHARED_FFN}
CASES = {
    "mixtral": case("mixtral", {}),
    "olmoe": case("olmoe", {"norm_topk_prob": False}),
    "olmoe_renormalized": case("olmoe", {"norm_topk_prob": True}, weighting="renormalized"),
    "qwen2_moe": case("qwen2_moe", {"norm_topk_prob": False}, **SHARED),
    "qwen2_moe_renormalized": case(
        "qwen2_moe", {"norm_topk_prob": True}, **SHARED, weighting="renormalized"
    ),
    "qwen3_moe": case("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_moe_scores": case("qwen3_moe", {"norm_topk_prob": False}, weighting="scores"),
    "deepseek_v2": case("deepseek_v2", GREEDY, scale=1.5, **SHARED),
    "deepseek_v2_groups": case("deepseek_v2", LIMITED, scale=4.0, **OUR_GROUPS),
    "deepseek_v3": case("deepseek_v3", V3 | {"norm_topk_prob": True}, scale=2.5, **OUR_GROUPS),
    "deepseek_v3_scores": case(
        "deepseek_v3",
        V3 | {"norm_topk_prob": False},
        scale=2.5,
        weighting="scores",
        **OUR_GROUPS,
    ),
}


def tensors_of(case: Case) -> dict[str, np.ndarray]:
    """A block's weights under Hugging Face's names."""
    config = case.config
    shapes: dict[str, tuple[int, ...]] = {
        "gate.weight": (NUM_EXPERTS, D_MODEL),
        "experts.gate_up_proj": (NUM_EXPERTS, 2 * FFN, D_MODEL),
        "experts.down_proj": (NUM_EXPERTS, D_MODEL, FFN),
    }
    if config.selection_bias:
        shapes["gate.e_score_correction_bias"] = (NUM_EXPERTS,)
    if config.shared_ffn:
        name = shared_name(case)
        for part in ("gate_proj", "up_proj"):
            shapes[f"{name}.{part}.weight"] = (SHARED_FFN, D_MODEL)
        shapes[f"{name}.down_proj.weight"] = (D_MODEL, SHARED_FFN)
    if config.shared_gate:
        shapes["shared_expert_gate.weight"] = (1, D_MODEL)
    rng = np.random.default_rng(2)
    return {
        name: (0.4 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()
    }


def shared_name(case: Case) -> str:
    """What transformers calls the network that every token passes."""
    return "shared_expert" if case.config.shared_gate else "shared_experts"


def params_of(case: Case) -> dict[str, Any]:
    """The same weights as our tree."""
    tensors = {name: jnp.asarray(value) for name, value in tensors_of(case).items()}
    gate_up = jnp.swapaxes(tensors["experts.gate_up_proj"], 1, 2)
    params: dict[str, Any] = {
        "router": {"w_out": tensors["gate.weight"].T},
        "experts": {
            "w_gate": gate_up[..., :FFN],
            "w_up": gate_up[..., FFN:],
            "w_down": jnp.swapaxes(tensors["experts.down_proj"], 1, 2),
        },
    }
    if case.config.selection_bias:
        params["router"]["b_select"] = tensors["gate.e_score_correction_bias"]
    if case.config.shared_ffn:
        params["shared"] = {
            f"w_{part}": tensors[f"{shared_name(case)}.{part}_proj.weight"].T
            for part in ("gate", "up", "down")
        }
    if case.config.shared_gate:
        params["shared"]["w_mix"] = tensors["shared_expert_gate.weight"].T
    return params
