"""DeepSeek-V2 in GGUF: the sizes of its heads, and keys' and values' matrices cut apart."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from moejax.core.errors import InputError

# llama.cpp takes the model's epsilon for the two small norms too, where DeepSeek's code has this.
NORM_EPS = 1e-6
_SOFTMAX = 1
_log = logging.getLogger(__name__)


def fields_in(stored: Mapping[str, Any], place: Any) -> dict[str, Any]:
    """config.json's fields that a file says in other words. Inverse: `fields_out`.

    Heads' sizes lie under names of their own; files older than these (of 2024) have them under the
    usual ones.
    """
    gating = stored.get("expert_gating_func", _SOFTMAX)
    if gating not in (0, _SOFTMAX):
        raise InputError(
            f"{place} has expert_gating_func {gating}, not softmax ({_SOFTMAX}): a DeepSeek-V3, "
            "which moejax does not read"
        )
    sizes = []
    for name in ("key", "value"):
        size = stored.get(f"attention.{name}_length_mla", stored.get(f"attention.{name}_length"))
        if size is None:
            raise InputError(f"{place} lacks the field attention.{name}_length: fetch it again")
        sizes.append(size)
    groups = stored.get("expert_group_count", 1)
    limited = {"topk_method": "group_limited_greedy"} if groups > 1 else {}
    rope_size = stored.get("rope.dimension_count", 0)
    return {"qk_nope_head_dim": sizes[0] - rope_size, "v_head_dim": sizes[1]} | limited


def fields_out(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A file's fields below the architecture's name, as llama.cpp's converter writes them.

    InputError for what llama.cpp would compute otherwise; a warning where that is the only way.
    """
    eps = fields["rms_norm_eps"]
    if eps != NORM_EPS:
        raise InputError(
            f"rms_norm_eps is {eps}: llama.cpp would take it for the norms inside attention too, "
            f"which have {NORM_EPS}, so no GGUF file can say this model"
        )
    if fields["n_group"] > 1:
        _log.warning(
            "llama.cpp scores each of the %d groups of experts by its two best (as DeepSeek-V3), "
            "DeepSeek-V2 by its best: from this file it will choose other experts than moejax and "
            "transformers do",
            fields["n_group"],
        )
    latent, rope_size = fields["kv_lora_rank"], fields["qk_rope_head_dim"]
    return {
        # One key and value per token, the latent vector.
        "attention.head_count_kv": 1,
        "attention.key_length": latent + rope_size,
        "attention.value_length": latent,
        "attention.key_length_mla": fields["qk_nope_head_dim"] + rope_size,
        "attention.value_length_mla": fields["v_head_dim"],
        "expert_shared_count": fields["n_shared_experts"] or 0,
        "expert_gating_func": _SOFTMAX,
    }
