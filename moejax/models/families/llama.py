"""Llama and all that took its shape: SmolLM2, TinyLlama, DeepSeek-Coder, Llama 2 and 3."""

from __future__ import annotations

from typing import Any

from moejax.core.errors import InputError
from moejax.models.config import ModelConfig
from moejax.models.families.family import Family, Weight
from moejax.ops.rope import RopeConfig

REQUIRED = (
    "vocab_size",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
)
HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


def config_from_hf(fields: dict[str, Any]) -> ModelConfig:
    """Reads config.json's fields, of transformers 4 (`rope_scaling`) or 5 (`rope_parameters`)."""
    missing = [name for name in REQUIRED if name not in fields]
    if missing:
        raise InputError(f"config.json lacks {', '.join(missing)}: a Llama config must have them")
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    head_size = fields.get("head_dim")
    if head_size is None:
        if width % heads:
            raise InputError(
                f"config.json: hidden_size {width} is not a multiple of num_attention_heads "
                f"{heads}, and there is no head_dim"
            )
        head_size = width // heads
    activation = fields.get("hidden_act", "silu")
    if activation not in HF_ACTIVATIONS:
        raise InputError(f"config.json: hidden_act {activation!r} is not one that moejax knows")
    max_position = fields.get("max_position_embeddings", 2048)
    return ModelConfig(
        family="llama",
        vocab_size=fields["vocab_size"],
        num_layers=fields["num_hidden_layers"],
        d_model=width,
        d_ff=fields["intermediate_size"],
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_size=head_size,
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope=rope_from_hf(fields, max_position),
        max_position=max_position,
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        attention_bias=bool(fields.get("attention_bias", False)),
        mlp_bias=bool(fields.get("mlp_bias", False)),
        activation=HF_ACTIVATIONS[activation],
        initializer_range=fields.get("initializer_range", 0.02),
    )


def rope_from_hf(fields: dict[str, Any], max_position: int) -> RopeConfig:
    """Reads either spelling of the rope fields; DeepSeek-Coder's "linear" is one of the kinds."""
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = scaling.get("rope_theta") or fields.get("rope_theta") or 10000.0
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta=float(theta))
    try:
        factor = float(scaling["factor"])
        if kind != "llama3":
            # transformers measures "dynamic" against max_position_embeddings.
            original = max_position if kind == "dynamic" else 0
            return RopeConfig(float(theta), kind, factor, original_max_position=original)
        return RopeConfig(
            float(theta),
            kind,
            factor,
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_max_position=int(scaling["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise InputError(f"config.json: rope scaling {kind!r} lacks its field {error}") from error


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """config.json's rope fields, in transformers 4's spelling, which transformers 5 reads too."""
    if rope.kind == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope.kind, "type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_max_position
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields, without dtype and special tokens. Inverse: `config_from_hf`."""
    hf_activation = {ours: hf for hf, ours in reversed(HF_ACTIVATIONS.items())}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": hf_activation[config.activation],
        "initializer_range": config.initializer_range,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "use_cache": True,
        **rope_to_hf(config.rope),
    }


def name_table(config: ModelConfig) -> list[Weight]:
    """Every tensor of a `LlamaForCausalLM` and where it lies in our tree."""
    d, f, v = config.d_model, config.d_ff, config.vocab_size
    h, g, c = config.num_heads, config.num_kv_heads, config.head_size
    layer = [
        ("attn_norm/scale", "input_layernorm.weight", (d,), 0),
        ("mlp_norm/scale", "post_attention_layernorm.weight", (d,), 0),
        ("attn/w_q", "self_attn.q_proj.weight", (d, h, c), 1),
        ("attn/w_k", "self_attn.k_proj.weight", (d, g, c), 1),
        ("attn/w_v", "self_attn.v_proj.weight", (d, g, c), 1),
        ("attn/w_o", "self_attn.o_proj.weight", (h, c, d), 2),
        ("mlp/w_gate", "mlp.gate_proj.weight", (d, f), 1),
        ("mlp/w_up", "mlp.up_proj.weight", (d, f), 1),
        ("mlp/w_down", "mlp.down_proj.weight", (f, d), 1),
    ]
    if config.attention_bias:
        layer += [
            ("attn/b_q", "self_attn.q_proj.bias", (h, c), 0),
            ("attn/b_k", "self_attn.k_proj.bias", (g, c), 0),
            ("attn/b_v", "self_attn.v_proj.bias", (g, c), 0),
            ("attn/b_o", "self_attn.o_proj.bias", (d,), 0),
        ]
    if config.mlp_bias:
        layer += [
            ("mlp/b_gate", "mlp.gate_proj.bias", (f,), 0),
            ("mlp/b_up", "mlp.up_proj.bias", (f,), 0),
            ("mlp/b_down", "mlp.down_proj.bias", (d,), 0),
        ]
    table = [Weight("embed/tokens", None, "model.embed_tokens.weight", (v, d), 0)]
    first = 0
    for run in config.runs:
        for i in range(run.num_layers):
            for path, name, shape, in_dims in layer:
                hf_name = f"model.layers.{first + i}.{name}"
                table.append(Weight(f"layers/{run.name}/{path}", i, hf_name, shape, in_dims))
        first += run.num_layers
    table.append(Weight("final_norm/scale", None, "model.norm.weight", (d,), 0))
    if not config.tie_embeddings:
        table.append(Weight("lm_head/w", None, "lm_head.weight", (d, v), 1))
    return table


PRESETS = {
    "smollm2-135m": ModelConfig(
        "llama", 49152, 30, 576, 1536, 9, 3, 64, 1e-5, RopeConfig(1e5), 8192, True
    ),
    "deepseek-coder-1.3b": ModelConfig(
        "llama", 32256, 24, 2048, 5504, 16, 16, 128, 1e-6, RopeConfig(1e5, "linear", 4.0), 16384
    ),
}

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    name_table=name_table,
    presets=PRESETS,
    gguf_architecture="llama",
)
