"""Two checkpoints of one tiny run and a file of sums, for commands that sample and grade."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np

from moejax.io import lineage
from moejax.io.load import save_any
from moejax.io.loaded import Loaded
from moejax.io.tokenizer import Tokenizer
from moejax.models import transformer
from moejax.models.config import ModelConfig
from tests.tiny_tokenizer import gguf_fields


def write(folder: Path, num_problems: int = 10) -> None:
    """folder/early, folder/late and folder/sums.jsonl in GSM8K's form."""
    tokenizer = Tokenizer.from_gguf_metadata(gguf_fields())
    config = ModelConfig("llama", tokenizer.vocab_size, 1, 16, 24, 2, 1, 8, max_position=512)
    history = lineage.append((), "import", [{"path": "base", "xxh3": "1"}])
    for seed, name in enumerate(("early", "late")):
        params = jax.tree.map(np.asarray, transformer.init_params(config, jax.random.key(seed)))
        save_any(Loaded(params, config, tokenizer, lineage=history), folder / name, "hf")
    rows = [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(num_problems)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
