"""launch.graft as a user runs it: two tokenizers, every stage, states that are another's."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from moejax.io.load import save_any
from moejax.io.loaded import Loaded
from moejax.io.tokenizer import Tokenizer
from moejax.models import transformer
from moejax.models.config import ModelConfig
from tests.data.test_alignment import WORDS, tokenizers
from tests.launch import tiny_run
from tests.tiny_tokenizer import gguf_fields


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("graft")
    pairs = {"source": Tokenizer.from_gguf_metadata(gguf_fields()), "target": tokenizers()[0]}
    for seed, (name, tokenizer) in enumerate(pairs.items()):
        config = ModelConfig(
            "llama", tokenizer.vocab_size, 2, 16, 24, 2, 1, 8, max_position=256
        )
        params = jax.tree.map(np.asarray, transformer.init_params(config, jax.random.key(seed)))
        save_any(Loaded(params, config, tokenizer), path / name, "hf")
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(rng.choice(WORDS, 6)) + " end"}) for _ in range(12)]
    (path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return path


def flags(folder, workdir, **changes) -> list[str]:
    values = {
        "source.model": folder / "source", "target.model": folder / "target",
        "data.path": folder / "texts.jsonl", "data.heldout": 4, "data.target_len": 96,
        "data.source_len": 96, "train.steps": 4, "train.batch_size": 4, "train.lr": 0.01,
        "bridge.every": 1, "bridge.num_heads": 2, "bridge.bottleneck": 4, "train.save_every": 2,
    } | changes
    return [f"--workdir={workdir}", *(f"--config.{name}={v}" for name, v in values.items())]


def test_every_stage_with_two_tokenizers(folder, tmp_path):
    asked = flags(folder, tmp_path / "run")
    done = tiny_run.run("graft", "--stage=train", *asked)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert (run / "bridge" / "bridge.safetensors").is_file()
    assert json.loads((run / "states" / "states.json").read_text())["dtype"] == "bfloat16"
    records = [json.loads(x) for x in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [r["nll"] for r in records if "nll" in r]
    assert losses[-1] < losses[0]
    done = tiny_run.run("graft", "--stage=evaluate", *asked)
    assert done.returncode == 0, done.stderr
    arms = json.loads((run / "evaluation.json").read_text())["arms"]
    assert set(arms) == {"bridge", "bridge shut", "target as it came", "shuffled states",
                         "all states in sight", "source alone"}
    assert all(0 < arm["bits_per_byte"] < 20 for arm in arms.values())
    assert arms["bridge"]["bits_per_byte"] < arms["target as it came"]["bits_per_byte"]
    done = tiny_run.run("graft", "--stage=report", *asked)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (run / "plots").glob("*.png")} >= {
        "bits_per_byte.png", "gates.png", "attention_0.png", "layers.png"
    }
    done = tiny_run.run("graft", "--stage=generate", *asked, "--prompt=the capital",
                        "--max_new_tokens=4")
    assert done.returncode == 0, done.stderr
    # States of other layers are not these: nothing is trained on them.
    other = tiny_run.run("graft", "--stage=train", *asked, "--config.source.layers=(0,)")
    assert other.returncode == 2 and "states of another layers" in other.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.target_len": 8}, "texts are too long"),
        ({"data.source_len": 512}, "more than the 256 positions"),
        ({"source.layers": "(7,)"}, "source has no layer 7"),
        ({"bridge.alignment": "same"}, "needs one tokenizer"),
    ],
)
def test_what_cannot_work_is_one_line(folder, tmp_path, changes, said):
    done = tiny_run.run("graft", "--stage=train", *flags(folder, tmp_path / "x", **changes))
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()
