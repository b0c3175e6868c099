"""Writes the goldens of GGUF files: log-probabilities as llama.cpp itself computes them from ours.

    pip install xllamacpp              (llama.cpp with bindings; no other file of moejax needs it)
    python -m tests.parity.make_gguf_goldens [CASE ...]

`tests/io/test_gguf_goldens.py` compares ours with them, and the checksum of the file that llama.cpp
read with that of the file written now.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import urllib.request
import zlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from moejax.core import tree
from moejax.io.gguf_write import LINEAGE
from moejax.io.load import Loaded, save_any
from moejax.io.tokenizer import Tokenizer
from moejax.models.families import by_name
from moejax.models.params import abstract_params
from tests.tiny_tokenizer import gguf_fields

GOLDENS = Path(__file__).parent / "goldens" / "gguf"
VOCAB = 288
TOKENS = np.random.default_rng(7).integers(4, 260, 24).astype(np.int32)
# After so many tokens the next one is asked for; rope kinds act beyond 16.
LENGTHS = (2, 9, 24)
_FOUND = "completion_probabilities"
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_ROPE = {"factor": 4.0, "original_max_position_embeddings": 16}
YARN = _ROPE | {"rope_type": "yarn", "beta_fast": 4.0, "beta_slow": 1.0}
LLAMA3 = _ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}
_ROUTED = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DEEPSEEK = {
    **{"kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16},
    **{"v_head_dim": 24, "n_routed_experts": 8, "num_experts_per_tok": 3, "head_dim": None},
    **{"moe_intermediate_size": 32, "n_shared_experts": 2, "first_k_dense_replace": 1},
    **{"rms_norm_eps": 1e-6, "num_key_value_heads": 4},
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
CASES: dict[str, dict[str, Any]] = {
    "llama-plain": {},
    "llama-tied_biases": {"tie_word_embeddings": True, "attention_bias": True},
    "llama-linear": {"rope_scaling": LINEAR},
    "llama-llama3": {"rope_scaling": LLAMA3},
    "llama-yarn": {"rope_scaling": YARN},
    "llama-yarn_attention_factor": {"rope_scaling": YARN | {"attention_factor": 1.3}},
    "mixtral-grouped": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "mixtral-llama3": {"num_local_experts": 4, "rope_scaling": LLAMA3},
    "olmoe-mha": _ROUTED | {"num_key_value_heads": 4},
    "qwen2-tied_yarn": {"tie_word_embeddings": True, "rope_scaling": YARN},
    "qwen3-head_size": {"head_dim": 32},
    "gemma2-window": {
        **{"sliding_window": 8, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    },
    "qwen2_moe-shared": _ROUTED | {"shared_expert_intermediate_size": 64},
    "qwen3_moe-yarn": _ROUTED | {"norm_topk_prob": True, "rope_scaling": YARN},
    # llama.cpp knows those without q_lora_rank by their 27 layers.
    "deepseek_v2-lite": _DEEPSEEK | {"num_hidden_layers": 27, "hidden_size": 32},
    "deepseek_v2-q_rank": _DEEPSEEK
    | {"q_lora_rank": 32, "routed_scaling_factor": 2.5, "rope_scaling": None},
}


def model_of(case: str) -> Loaded:
    """A case's model with random weights and a tokenizer."""
    config = by_name(case.split("-")[0]).config_from_hf(_SHAPE | CASES[case])
    rng = np.random.default_rng(zlib.crc32(case.encode()))

    def draw(path, leaf):
        value = rng.standard_normal(leaf.shape, dtype=np.float32)
        return (1 + value / 4 if path.endswith("/scale") else value / 8).astype(leaf.dtype)

    params = tree.map_with_path(draw, abstract_params(config))
    return Loaded(params, config, Tokenizer.from_gguf_metadata(gguf_fields()))


def checksum(path: Path) -> int:
    """CRC-32 of all that a file says but its name and lineage."""
    reader = gguf.GGUFReader(path)
    value = 0
    for name in sorted(reader.fields):
        if name not in (LINEAGE, "general.name") and not name.startswith("GGUF."):
            value = zlib.crc32(f"{name}={reader.fields[name].contents()!r}".encode(), value)
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.name):
        about = f"{tensor.name} {tensor.tensor_type} {tensor.shape.tolist()}"
        value = zlib.crc32(tensor.data.tobytes(), zlib.crc32(about.encode(), value))
    return value


def serve(path: Path):
    """llama.cpp with a file, on one thread, with a float32 cache."""
    import xllamacpp

    wanted = xllamacpp.CommonParams()
    wanted.model.path = str(path)
    wanted.n_ctx, wanted.n_parallel, wanted.n_gpu_layers = 256, 1, 0
    wanted.warmup = wanted.fit_params = False
    wanted.verbosity = int(os.environ.get("LLAMA_VERBOSITY", "-1"))
    wanted.cache_type_k = wanted.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    wanted.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    wanted.cpuparams.n_threads = 1
    return xllamacpp.Server(wanted)


def llama_cpp(path: Path) -> np.ndarray:
    """Log-probabilities of the next token [len(LENGTHS), V], float32."""
    server = serve(path)
    found = np.full((len(LENGTHS), VOCAB), np.nan, np.float32)
    for row, length in zip(found, LENGTHS, strict=True):
        asked = {
            **{"prompt": TOKENS[:length].tolist(), "n_predict": 1, "n_probs": VOCAB},
            **{"temperature": 1.0, "samplers": ["temperature"], "cache_prompt": False},
        }
        answers = (ask(server, "completion", asked | {"seed": seed}) for seed in range(1000))
        # Half a character or an end comes without probabilities: another seed is tried.
        first = next(a[_FOUND][0] for a in answers if _FOUND in a)
        for entry in first["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
    return found


def ask(server, route: str, asked: dict[str, Any]) -> dict[str, Any]:
    """One answer of llama.cpp's server."""
    request = urllib.request.Request(
        f"{server.listening_address}/{route}",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def main() -> None:
    """Writes the cases that are named, or all."""
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for case in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.gguf"
            save_any(model_of(case), path, "gguf")
            found = llama_cpp(path)
            np.savez_compressed(GOLDENS / f"{case}.npz", logp=found, checksum=checksum(path))
        print(case, flush=True)


if __name__ == "__main__":
    main()
