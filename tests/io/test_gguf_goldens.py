"""llama.cpp's own numbers, made from the files that we write, are those that we make."""

import jax
import numpy as np
import pytest

from moejax.io.load import load_any, save_any
from moejax.models import transformer
from tests.parity.make_gguf_goldens import CASES, GOLDENS, LENGTHS, TOKENS, checksum, model_of

# Gemma's GELU is a table of float16 there.
MAX_GAP = {"gemma2": 3e-3}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_we_compute(case, tmp_path):
    save_any(model_of(case), tmp_path / "m.gguf", "gguf")
    golden = np.load(GOLDENS / f"{case}.npz")
    # Else make the goldens anew: `python -m tests.parity.make_gguf_goldens`.
    assert checksum(tmp_path / "m.gguf") == golden["checksum"]
    loaded = load_any(tmp_path / "m.gguf")
    logits = transformer.logits(loaded.params, loaded.config, TOKENS[None])[0]
    found = np.asarray(jax.nn.log_softmax(logits))[[length - 1 for length in LENGTHS]]
    assert np.max(np.abs(found - golden["logp"])) < MAX_GAP.get(loaded.config.family, 2e-5)
