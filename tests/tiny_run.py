"""A model, a tokenizer and conversations small enough to train in seconds; the command for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax

from moejax.io.load import save_any
from moejax.io.loaded import Loaded
from moejax.io.tokenizer import Tokenizer
from moejax.methods.upcycle import upcycle
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.moe.config import MoEConfig
from tests.tiny_tokenizer import gguf_fields

# Two layers, sizes that 8 devices divide; 256 ids.
SIZES = (2, 16, 24, 4, 2, 8)


def write(folder: Path, moe_too: bool = True) -> None:
    """FOLDER/dense, FOLDER/moe (4 experts, top 2) if wanted and FOLDER/data.jsonl."""
    tokenizer = Tokenizer.from_gguf_metadata(gguf_fields())
    vocab = -(-tokenizer.vocab_size // 8) * 8
    config = ModelConfig("llama", vocab, *SIZES, max_position=64)
    params = transformer.init_params(config, jax.random.key(0))
    save_any(Loaded(params, config, tokenizer), folder / "dense", "orbax")
    if moe_too:
        # A local balance loss is another function per mesh.
        settings = MoEConfig(4, 2, balance_scope="global")
        moe, moe_config = upcycle(params, config, settings, jax.random.key(1))
        save_any(Loaded(moe, moe_config, tokenizer), folder / "moe", "orbax")
    rows = [{"prompt": f"hello {i}", "completion": f"{i * 7} ab\n"} for i in range(400)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(folder: Path, workdir: Path, *flags: str, model: str = "dense") -> list[str]:
    """launch.train on it, or ESFT's training of "esft": 8 rows of 64 tokens a step."""
    launcher = ["launch.train", "--config=configs/gsm8k_sft.py"]
    if model == "esft":
        launcher = ["launch.esft", "--stage=train", "--config=configs/esft/base.py"]
        model = "moe"
    return [
        *(sys.executable, "-m", *launcher),
        *(f"--config.model.source={folder / model}", f"--workdir={workdir}"),
        *(f"--config.data.source={folder / 'data.jsonl'}", "--config.data.seq_len=64"),
        *("--config.train.batch_size=8", "--config.train.epochs=0.0", "--compile_cache="),
        *("--config.train.lr=0.01", "--config.train.save_every=2", "--config.train.accumulation=1"),
        *flags,
    ]
