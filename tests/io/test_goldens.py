"""Logits equal transformers' (goldens of `tests/parity/make_goldens.py`), without torch."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import moejax as mj
from moejax.core.precision import TOLERANCE
from moejax.io import hf
from moejax.io.load import load_any
from moejax.models import transformer
from tests.parity import cases as families
from tests.parity.make_goldens import GOLDENS, SMOLLM2_TEXT, checksum
from tests.tiny_llama import CASES, TOKENS, fields_of, tensors_of, write_llama
from tests.tiny_tokenizer import smollm2_gguf

# Of the largest logit, as in the live parity of the families: two float32 programs, each with its
# own rounding, so twice what one program may be off.
FAMILY_LIMIT = 2 * TOLERANCE["float32"]
CONFIGS = json.loads((GOLDENS / "llama.json").read_text())
CHECKSUMS = json.loads((GOLDENS / "families.json").read_text())


def logits(loaded, tokens) -> np.ndarray:
    fn = jax.jit(transformer.logits, static_argnums=1)
    return np.asarray(fn(loaded.params, loaded.config, np.asarray(tokens, np.int32)))


@pytest.mark.parametrize("case", CASES)
def test_a_tiny_llama_has_the_reference_logits(case, tmp_path):
    tensors = tensors_of(fields_of(case))
    assert checksum(tensors) == CONFIGS[case]["checksum"], "numpy draws other weights: make goldens"
    loaded = load_any(write_llama(tmp_path, fields_of(case), tensors))
    with np.load(GOLDENS / "llama.npz") as goldens:
        expected = goldens[case]
    gap = np.max(np.abs(logits(loaded, TOKENS) - expected))
    # 1.1e-5 of it on "llama3", where ours is 1e-6 off our own float64: the two round the scaled
    # rotary frequencies differently.
    assert gap < FAMILY_LIMIT * np.max(np.abs(expected))


@pytest.mark.parametrize("name", families.CASES)
def test_a_tiny_model_of_every_family_has_the_reference_logits(name, tmp_path):
    fields = families.fields_of(name)
    tensors = tensors_of(fields)
    assert checksum(tensors) == CHECKSUMS[name], "numpy draws other weights: make goldens"
    model = mj.load(write_llama(tmp_path, fields, tensors))
    with np.load(GOLDENS / "families.npz") as goldens:
        expected = goldens[name]
    found = np.asarray(model.logits(families.TOKENS))[:, families.GOLDEN_POSITIONS]
    assert np.max(np.abs(found - expected)) < FAMILY_LIMIT * np.max(np.abs(expected))


@pytest.mark.parametrize("case", CASES)
def test_both_spellings_of_a_config_are_one_model(case):
    old = hf.read_config(fields_of(case), "transformers 4")
    new = hf.read_config(CONFIGS[case]["config"], "transformers 5")
    assert old == new


def test_smollm2_has_the_reference_logits():
    golden = json.loads((GOLDENS / "smollm2.json").read_text())
    loaded = load_any(smollm2_gguf())
    assert loaded.tokenizer.encode(SMOLLM2_TEXT) == golden["tokens"]
    found = logits(loaded, [golden["tokens"]])[0, -1]
    assert found.argmax() == golden["argmax"]
    gap = np.max(np.abs(found[:: golden["step"]] - np.array(golden["logits"], np.float32)))
    assert gap < TOLERANCE["float32"] * golden["largest"]


def test_goldens_are_small():
    assert sum(path.stat().st_size for path in Path(GOLDENS).iterdir()) < 800_000
