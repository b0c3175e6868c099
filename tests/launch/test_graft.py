"""launch.graft as a user runs it: two tokenizers, every stage, states that are another's."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from configs import graft as graft_config
from configs import graft_paper
from launch.graft_lenders import read_grafted
from launch.graft_setup import load_examples, make_setup
from launch.graft_train import num_steps
from launch.settings import checked
from moejax.core.errors import InputError
from moejax.io.load import load_any, save_any
from moejax.io.loaded import Loaded
from moejax.io.tokenizer import Tokenizer
from moejax.models import transformer
from moejax.models.config import ModelConfig
from tests import commands
from tests.data.test_alignment import WORDS, tokenizers
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


def test_the_papers_recipe_counts_epochs_and_leaves_long_texts_out(folder, capsys):
    config = graft_paper.get_config()
    config.source.model = config.target.model = str(folder / "source")
    config.data.update(path=str(folder / "texts.jsonl"), heldout=2, target_len=32, source_len=32)
    setup = make_setup(checked(config, graft_config.get_config()))
    train, heldout = load_examples(setup)
    assert setup.joined.paper and len(heldout) == 2
    assert num_steps(setup, len(train)) == 15 * len(train)
    assert f"left out {10 - len(train)} of 12 texts" in capsys.readouterr().out
    assert train[0].limits[0] == len(train[0].source_ids)


def test_every_stage_with_two_tokenizers(folder, tmp_path):
    asked = flags(folder, tmp_path / "run")
    done = commands.run("graft", "--stage=train", *asked)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert (run / "bridge" / "bridge.safetensors").is_file()
    assert json.loads((run / "states" / "states.json").read_text())["dtype"] == "bfloat16"
    records = [json.loads(x) for x in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [r["nll"] for r in records if "nll" in r]
    assert losses[-1] < losses[0]
    done = commands.run("graft", "--stage=evaluate", *asked)
    assert done.returncode == 0, done.stderr
    arms = json.loads((run / "evaluation.json").read_text())["arms"]
    assert set(arms) == {"bridge", "bridge shut", "target as it came", "shuffled states",
                         "all states in sight", "source alone"}
    assert all(0 < arm["bits_per_byte"] < 20 for arm in arms.values())
    assert arms["bridge"]["bits_per_byte"] < arms["target as it came"]["bits_per_byte"]
    done = commands.run("graft", "--stage=report", *asked)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (run / "plots").glob("*.png")} >= {
        "bits_per_byte.png", "gates.png", "attention_0.png", "layers.png"
    }
    done = commands.run("graft", "--stage=generate", *asked, "--prompt=the capital",
                        "--max_new_tokens=4")
    assert done.returncode == 0, done.stderr
    # A bridge goes with its target wherever that is named; several may, each may be left out.
    bridges = f"--bridges=a={run}/bridge,b={run}/bridge"
    model = f"--config.target.model={run}/target"
    done = commands.run("graft", "--stage=generate", bridges, model, "--sources=b",
                        "--prompt=the capital", "--max_new_tokens=4")
    assert done.returncode == 0, done.stderr
    params = load_any(run / "target", "float32").params
    lenders = read_grafted(str(run / "target"), params, [f"a={run}/bridge"], "float32").lenders
    assert list(lenders) == ["a"]
    with pytest.raises(InputError, match="trained with another target"):
        read_grafted(str(folder / "target"), params, [f"a={run}/bridge"], "float32")
    with pytest.raises(InputError, match="holds no bridge"):
        read_grafted(str(run / "target"), params, [f"a={run}"], "float32")
    # States of other layers are not these: nothing is trained on them.
    other = commands.run("graft", "--stage=train", *asked, "--config.source.layers=(0,)")
    assert other.returncode == 2 and "states of another layers" in other.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.target_len": 8}, "texts are too long"),
        ({"data.source_len": 512}, "more than the 256 positions"),
        ({"source.layers": "(7,)"}, "source has no layer 7"),
        ({"bridge.alignment": "same"}, "needs one tokenizer"),
        ({"train.epochs": 2}, "set one of the two"),
        ({"method": "forward"}, "it needs one tokenizer"),
        ({"bridge.placement": "paper", "data.source_len": 48}, "must be equal"),
    ],
)
def test_what_cannot_work_is_one_line(folder, tmp_path, changes, said):
    done = commands.run("graft", "--stage=train", *flags(folder, tmp_path / "x", **changes))
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()
