"""All stages of launch.shadow on a tiny model; going on; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.shadow import smollm2
from launch import shadow_collect, shadow_evaluate, shadow_report, shadow_train
from moejax.core.errors import InputError
from moejax.io.load import save_any
from moejax.io.loaded import Loaded
from moejax.io.tokenizer import Tokenizer
from moejax.methods import shadow_traces
from moejax.models import transformer
from moejax.models.config import ModelConfig
from tests import commands
from tests.tiny_tokenizer import gguf_fields


def write(folder: Path, seed: int = 0, layers: int = 3) -> None:
    """folder/model, and folder/data with a few texts under the study's names."""
    tokenizer = Tokenizer.from_gguf_metadata(gguf_fields())
    config = ModelConfig("llama", tokenizer.vocab_size, layers, 32, 64, 4, 2, 8, max_position=512)
    params = jax.device_get(transformer.init_params(config, jax.random.key(seed)))
    save_any(Loaded(params, config, tokenizer), folder / "model", "hf")
    data = folder / "data"
    data.mkdir()
    rows = [{"question": f"What is {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(12)]
    (data / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, count in (("valid", 120), ("test", 120)):
        text = " ".join(f"hello {i * 37 % 101} ab" for i in range(count))
        (data / f"wikitext2_{name}.tokens.txt").write_text(text)
    rows = [
        {"goal": f"count to {i}", "sol1": f"say {i}", "sol2": "hello", "label": i % 2}
        for i in range(6)
    ]
    (data / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(folder: Path):
    config = smollm2.get_config("tiny")
    config.model.update(source=str(folder / "model"), layers=0)
    config.data.update(folder=str(folder / "data"), slots=64, prompt=32)
    config.data.texts = {"gsm8k": 12, "wikitext": 6}
    config.mask.block = 8
    config.train.update(share=0.2, dejavu_hidden=8)
    config.evaluate.update(window=64, window_prompt=16, windows=3, questions=4)
    return config


def values(folder: Path, **more):
    return {"config": settings(folder), "workdir": str(folder / "run"), "dry_run": False, **more}


@pytest.mark.slow
def test_all_stages_and_going_on(tmp_path, capsys):
    write(tmp_path)
    flags, run = values(tmp_path), tmp_path / "run"
    with pytest.raises(InputError, match="run --stage=collect"):
        shadow_train.main(flags)
    shadow_collect.main(flags)
    (last,) = list(shadow_traces.parts(run / "traces"))[-1:]
    before = np.load(last)["neurons/plainact"]
    last.unlink()
    shadow_collect.main(flags)  # only the missing part
    assert capsys.readouterr().out.count("collect  ") == 4
    assert np.array_equal(np.load(last)["neurons/plainact"], before)
    shadow_train.main(flags)
    heldout = json.loads((run / "heldout.json").read_text())
    assert heldout["unified"]["share"] <= 0.2
    assert set(heldout["dejavu"]["blocks"]) >= {"spearman", "overlap", "gain", "static_spearman"}
    shadow_evaluate.main(flags)
    records = dict(((n, r["arm"]), r) for n, r in shadow_evaluate.read(run))
    record = records["wikitext", "predicted-both-0.5-local"]
    assert record["kept_heads"] == 0.5 and record["counts"] == [48] * 3
    (last,) = sorted((run / "evaluation/wikitext").glob("part_*.json"))[-1:]
    before = last.read_text()
    last.unlink()
    shadow_evaluate.main(flags)
    assert json.loads(last.read_text()) == json.loads(before)
    assert (record["judged"], record["total"]) == (3, 3) and not shadow_evaluate.incomplete(run)
    assert records["piqa", "teal-both-0.5-local"]["kept_heads"] is None
    last.rename(tmp_path / "aside")
    (said,) = shadow_evaluate.incomplete(run)
    assert said.startswith("wikitext: ") and "of 3 are judged" in said
    (tmp_path / "aside").rename(last)
    names = {arm for name, arm in records if name == "piqa"}
    assert {"dense-both-0-local", "oracle-both-0.5-local", "teal-both-0.5-local"} <= names
    shadow_report.main(flags)
    report = json.loads((run / "report.json").read_text())
    assert {row["minus"] for row in report["paired"]} >= {"static", "dejavu", "random", "oracle"}
    ranks = [row for row in report["ranking"] if row["predictor"] == "predicted"]
    assert {(row["set"], row["rows"]) for row in ranks} == {("wikitext", 3), ("piqa", 4)}
    assert all(-1 <= row["heads gain"] <= 1 for row in ranks)
    assert "data:image/png" in (run / "report.html").read_text()
    questions = (tmp_path / "data/piqa.jsonl").read_text()
    (tmp_path / "data/piqa.jsonl").write_text(questions.replace("count", "hello"))
    with pytest.raises(InputError, match="piqa was judged on other texts"):
        shadow_evaluate.main(flags)
    texts = (tmp_path / "data/gsm8k_train.jsonl").read_text()
    (tmp_path / "data/gsm8k_train.jsonl").write_text(texts.replace("What", "hello"))
    with pytest.raises(InputError, match="texts_sha256"):
        shadow_train.main(flags)
    other = values(tmp_path)
    other["config"].mask.block = 16
    with pytest.raises(InputError, match=r"another config: mask\.block"):
        shadow_evaluate.main(other)
    (tmp_path / "data/gsm8k_train.jsonl").write_text(texts)
    claim = run / "traces/collect.json"
    made = json.loads(claim.read_text())
    assert made.pop("traces_format") == 2  # as before there was one: contexts of other tokens
    claim.write_text(json.dumps(made))
    with pytest.raises(InputError, match=r"traces_format \(1 there, 2 here\)"):
        shadow_train.main(flags)


def test_bad_input_is_one_line(tmp_path):
    def said(*flags: str) -> str:
        done = commands.run("shadow", *flags)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "needs --config" in said("--stage=train")
    config = "--config=configs/shadow/smollm2.py:tiny"
    assert "needs --workdir" in said("--stage=collect", config)
    none = f"{config}", "--config.evaluate.questions=0", "--workdir=nowhere"
    assert "evaluate.questions 0: give at least 1" in said("--stage=evaluate", *none)
    unscored = f"{config}", "--config.data.slots=32", "--workdir=nowhere"
    assert "data.prompt 32 of data.slots 32" in said("--stage=collect", *unscored)
    with pytest.raises(InputError, match="nothing to report"):
        shadow_report.main({"workdir": str(tmp_path), "dry_run": False})
