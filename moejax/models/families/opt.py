"""OPT (arXiv 2205.01068): learned positions, LayerNorm, ReLU and no gate, biases.

Dropout, which config.json may ask for in training, is not applied.
"""

from __future__ import annotations

import functools
from typing import Any

from moejax.core.errors import InputError
from moejax.models.config import EmbeddingConfig, ModelConfig, NormConfig
from moejax.models.families.family import Family
from moejax.models.families.fields import (
    activation_from_hf,
    activation_to_hf,
    flag,
    head_size_from_hf,
    require,
)
from moejax.models.families.names import name_table

REQUIRED = ("vocab_size", "num_hidden_layers", "hidden_size", "ffn_dim", "num_attention_heads")
# The first two rows of the table are nobody's position: fairseq counts from the padding id on.
POSITION_OFFSET = 2
NORM_EPS = 1e-5
# What config.json need not say.
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
    "init_std": 0.02,
}
_LAYER = "model.decoder.layers.{i}"
MODULES = {
    "embed/tokens": "model.decoder.embed_tokens",
    "embed/positions": "model.decoder.embed_positions",
    "embed/in": "model.decoder.project_in",
    "embed/out": "model.decoder.project_out",
    "attn_norm": f"{_LAYER}.self_attn_layer_norm",
    "mlp_norm": f"{_LAYER}.final_layer_norm",
    "attn/q": f"{_LAYER}.self_attn.q_proj",
    "attn/k": f"{_LAYER}.self_attn.k_proj",
    "attn/v": f"{_LAYER}.self_attn.v_proj",
    "attn/o": f"{_LAYER}.self_attn.out_proj",
    "mlp/up": f"{_LAYER}.fc1",
    "mlp/down": f"{_LAYER}.fc2",
    "final_norm": "model.decoder.final_layer_norm",
    "lm_head": "lm_head",
}


def config_from_hf(fields: dict[str, Any]) -> ModelConfig:
    """Reads config.json's fields. Inverse: `config_to_hf`."""
    require(fields, REQUIRED, "opt")
    fields = DEFAULTS | fields
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    before = flag(fields, "do_layer_norm_before")
    size = fields.get("word_embed_proj_dim")
    size = width if size is None else size
    if fields.get("head_dim") not in (None, width // heads):
        raise InputError(
            f"config.json: head_dim {fields['head_dim']} contradicts hidden_size {width} and "
            f"num_attention_heads {heads}"
        )
    return ModelConfig(
        family="opt",
        vocab_size=fields["vocab_size"],
        num_layers=fields["num_hidden_layers"],
        d_model=width,
        d_ff=fields["ffn_dim"],
        num_heads=heads,
        num_kv_heads=heads,
        head_size=head_size_from_hf(fields),
        norm_eps=NORM_EPS,
        max_position=fields["max_position_embeddings"],
        tie_embeddings=flag(fields, "tie_word_embeddings"),
        attention_bias=flag(fields, "enable_bias"),
        mlp_bias=flag(fields, "enable_bias"),
        activation=activation_from_hf(fields, "activation_function"),
        initializer_range=fields["init_std"],
        gated=False,
        norms=NormConfig(
            kind="layer" if flag(fields, "layer_norm_elementwise_affine") else "layer_plain",
            placement="pre" if before else "post",
            final=before and not flag(fields, "_remove_final_layer_norm"),
        ),
        embedding=EmbeddingConfig("learned", POSITION_OFFSET, size=None if size == width else size),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields, without dtype and special tokens."""
    before = config.norms.placement == "pre"
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "word_embed_proj_dim": config.embed_size,
        "ffn_dim": config.d_ff,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_position,
        "activation_function": activation_to_hf(config.activation, "gelu_new"),
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not config.norms.final,
        "enable_bias": config.mlp_bias,
        "layer_norm_elementwise_affine": config.norms.kind == "layer",
        "tie_word_embeddings": config.tie_embeddings,
        "init_std": config.initializer_range,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "use_cache": True,
    }


def _preset(layers: int, width: int, heads: int, **changes: Any) -> ModelConfig:
    fields = dict(zip(REQUIRED, (50272, layers, width, 4 * width, heads), strict=True))
    return config_from_hf(fields | changes)


_POST = {"do_layer_norm_before": False, "word_embed_proj_dim": 512}
PRESETS = {
    "opt-125m": _preset(12, 768, 12),
    "opt-350m": _preset(24, 1024, 16, **_POST),
    "opt-1.3b": _preset(24, 2048, 32),
    "opt-2.7b": _preset(32, 2560, 32),
    "opt-6.7b": _preset(32, 4096, 32),
    "opt-13b": _preset(40, 5120, 40),
}

OPT = Family(
    name="opt",
    architecture="OPTForCausalLM",
    model_type="opt",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    name_table=functools.partial(name_table, modules=MODULES),
    presets=PRESETS,
)
