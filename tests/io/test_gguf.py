"""GGUF files that the gguf package writes come back as the tensors that went in."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io.gguf import GgufFile, read_metadata
from moejax.io.gguf_tokenizer import PRE_TOKENIZERS
from moejax.io.load import load_any
from tests.tiny_llama import BASE, fields_of, tensors_of, write_llama
from tests.tiny_tokenizer import gguf_fields

# Blocks of a quantised tensor have 32 values, so every row must be a multiple of that.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    _, _, layer, module = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[module]}.{kind}"


def interleave(value: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of a head's rows: (0, C/2), (1, C/2 + 1), ... neighbours."""
    rows = [np.stack(np.split(head, 2), 1) for head in np.split(value, num_heads)]
    return np.concatenate(rows).reshape(value.shape)


def write_gguf(
    path, fields, tensors, kind=Type.F32, extra=(), arch="llama", tokenizer=True, raw=None
):
    """Writes tensors by Hugging Face name as llama.cpp's converter does; matrices as `kind`."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_freq_base(fields["rope_theta"])
    writer.add_vocab_size(fields["vocab_size"])
    writer.add_string("general.license", "apache-2.0")
    if "head_dim" in fields:
        writer.add_rope_dimension_count(fields["head_dim"])
    if (fields.get("rope_scaling") or {}).get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(fields["rope_scaling"]["factor"])
    if tokenizer:
        for name, value in gguf_fields().items():
            if name.startswith("tokenizer."):
                add = writer.add_array if isinstance(value, list) else writer.add_key_value
                args = () if isinstance(value, list) else (value_type(value),)
                add(name, value, *args)
    for name, value in tensors.items():
        if ".q_proj." in name:
            value = interleave(value, fields["num_attention_heads"])
        if ".k_proj." in name:
            value = interleave(value, fields["num_key_value_heads"])
        if gguf_name(name) in (raw or {}):
            stored, used = raw[gguf_name(name)]
            writer.add_tensor(gguf_name(name), stored, raw_dtype=used)
            continue
        used = kind if value.ndim > 1 else Type.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(value, used), raw_dtype=used)
    for name, value in extra:
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def value_type(value):
    kinds = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32}
    return kinds[type(value)]


def with_vocabulary(fields):
    return fields | {"vocab_size": len(gguf_fields()["tokenizer.ggml.tokens"])}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_kind_of_tensor_comes_back(kind, tmp_path):
    fields = BASE | WIDE | {"num_key_value_heads": 2}
    tensors = tensors_of(fields)
    kind = Type[kind]
    path = write_gguf(tmp_path / "m.gguf", fields, tensors, kind, tokenizer=False)
    file = GgufFile(path)
    assert file.infos.keys() == tensors.keys()
    for name, value in tensors.items():
        used = kind if value.ndim > 1 else Type.F32
        expected = gguf.quants.dequantize(gguf.quants.quantize(value, used), used)
        found = file.read(name)
        assert (found.shape, found.dtype) == (file.infos[name].shape, file.infos[name].dtype)
        assert np.array_equal(found.astype(np.float32), expected), name
    plain = {Type.F16: "float16", Type.BF16: "bfloat16"}
    assert file.infos["lm_head.weight"].dtype.name == plain.get(kind, "float32")


@pytest.mark.parametrize("case", ["plain", "grouped_tied", "attention_bias", "mlp_bias", "linear"])
def test_a_gguf_file_is_the_model_it_was_made_of(case, tmp_path):
    fields = with_vocabulary(fields_of(case))
    tensors = tensors_of(fields)
    loaded = load_any(write_gguf(tmp_path / "m.gguf", fields, tensors))
    expected = load_any(write_llama(tmp_path / "hf", fields, tensors))
    assert loaded.config == expected.config
    assert tree.diff(loaded.params, expected.params) == []
    assert loaded.generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert loaded.tokenizer.vocab_size == fields["vocab_size"]
    assert loaded.license.name == "apache-2.0" and "Apache License" in loaded.license.text
    assert loaded.lineage[0]["op"] == "import"


def test_a_head_size_of_its_own_is_carried(tmp_path):
    fields = with_vocabulary(fields_of("everything") | {"rope_scaling": None, "hidden_act": "silu"})
    loaded = load_any(write_gguf(tmp_path / "m.gguf", fields, tensors_of(fields)))
    assert loaded.config.head_size == 10 and loaded.config.rope.theta == 500000.0


def llama3_factors(size: int, theta: float, factor: float) -> np.ndarray:
    """As llama.cpp's converter computes them, one frequency at a time."""
    factors = []
    for i in range(0, size, 2):
        wavelength = 2 * np.pi * theta ** (i / size)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama3_rope_is_found_behind_its_factors(tmp_path):
    fields = fields_of("theta") | {"head_dim": 32, "rope_theta": 500000.0}
    factors = llama3_factors(32, 500000.0, 32.0)
    assert len(set(factors.tolist())) == 3  # some kept, some stretched, some between
    path = write_gguf(
        tmp_path / "m.gguf",
        fields,
        tensors_of(fields),
        extra=[("rope_freqs.weight", factors)],
        tokenizer=False,
    )
    rope = load_any(path).config.rope
    assert (rope.kind, rope.factor, rope.original_max_position) == ("llama3", 32.0, 8192)
    bad = write_gguf(
        tmp_path / "bad.gguf",
        fields,
        tensors_of(fields),
        tokenizer=False,
        extra=[("rope_freqs.weight", factors[::-1].copy())],
    )
    with pytest.raises(InputError, match="is not Llama 3's rope scaling"):
        load_any(bad)


def test_metadata_are_plain_values(tmp_path):
    fields = with_vocabulary(BASE)
    metadata = read_metadata(write_gguf(tmp_path / "m.gguf", fields, tensors_of(fields)))
    assert metadata["llama.block_count"] == 2
    assert metadata["tokenizer.ggml.tokens"] == gguf_fields()["tokenizer.ggml.tokens"]


def test_a_file_cut_anywhere_is_one_line(tmp_path):
    fields = with_vocabulary(BASE)
    path = write_gguf(tmp_path / "m.gguf", fields, tensors_of(fields))
    content = path.read_bytes()
    for part in np.linspace(0, len(content) - 64, 25).astype(int):
        cut = tmp_path / f"cut{part}.gguf"
        cut.write_bytes(content[:part])
        with pytest.raises(InputError, match="GGUF|truncated") as raised:
            load_any(cut)
        assert "\n" not in str(raised.value) and str(cut) in str(raised.value)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"arch": "falcon"}, "architecture 'falcon': moejax reads llama"),
        ({"extra": [("blk.0.strange.weight", np.ones(2, np.float32))]}, "no place in the model"),
    ],
)
def test_what_is_not_read(tmp_path, changes, message):
    path = write_gguf(tmp_path / "m.gguf", BASE, tensors_of(BASE), tokenizer=False, **changes)
    with pytest.raises(InputError, match=message):
        load_any(path)


def test_a_file_without_its_fields_is_refused(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_expert_count(8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="lacks the field llama.block_count"):
        load_any(tmp_path / "m.gguf")


# Bytes of one block of 256 values and how many scales it has; only reading is in the gguf package.
K_QUANTS = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}


@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants_are_read_and_dequantised(kind, tmp_path):
    """Random bytes are blocks too, once their float16 scales are made finite ones."""
    fields = BASE | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    rng = np.random.default_rng(0)
    kind = Type[kind]
    assert gguf.GGML_QUANT_SIZES[kind] == (256, K_QUANTS[kind.name])
    raw = rng.integers(0, 40, (256, K_QUANTS[kind.name])).astype(np.uint8)
    tensors = tensors_of(fields)
    stored = {"blk.0.ffn_up.weight": (raw, kind)}
    path = write_gguf(tmp_path / "m.gguf", fields, tensors, tokenizer=False, raw=stored)
    flat = tree.flatten(load_any(path).params)
    expected = gguf.quants.dequantize(raw, kind)
    assert np.ptp(expected) > 0
    assert np.array_equal(flat["layers/0/mlp/w_up"][0], expected.T)
    cut = GgufFile(path).read("model.layers.0.mlp.up_proj.weight", (3, 9), (2, 200))
    assert np.array_equal(cut, expected[3:9, 2:200])


def test_a_folder_with_one_file_is_that_file(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", BASE, tensors_of(BASE), tokenizer=False)
    assert tree.diff(load_any(tmp_path).params, load_any(path).params) == []
    (tmp_path / "b.gguf").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="holds 2 GGUF files: name one"):
        load_any(tmp_path)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Don't 12\n", ["Don", "'", "t", "Ġ", "1", "2", "Ċ"]),
        ("naïve\u212a x=1", ["na", "Ã¯", "ve", "âĦª", "Ġx", "=", "1"]),
        ("\u6f22\u5b57 a", ["æ¼¢åŃĹ", "Ġa"]),
    ],
)
def test_deepseek_s_way_of_cutting(text, parts):
    """As its tokenizer.json says, whose punctuation marks reach from ":" to "~", letters too."""
    cut = PRE_TOKENIZERS["deepseek-llm"]().pre_tokenize_str(text)
    assert [part for part, _ in cut] == parts
