"""The adapter answers the harness's requests with our numbers; without lm-eval it says so."""

import importlib.util
from types import SimpleNamespace

import jax
import pytest

from moejax.core.errors import InputError
from moejax.evals.harness import HarnessConfig, harness_model
from moejax.io.tokenizer import Tokenizer
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.serve.likelihood import log_likelihoods
from tests.tiny_tokenizer import gguf_fields


def test_the_adapter():
    tokenizer = Tokenizer.from_gguf_metadata(gguf_fields())
    config = ModelConfig("llama", tokenizer.vocab_size, 1, 16, 24, 2, 1, 8, max_position=64)
    params = transformer.init_params(config, jax.random.key(0))
    if importlib.util.find_spec("lm_eval") is None:
        with pytest.raises(InputError, match=r"pip install 'moejax\[eval\]'"):
            harness_model(params, config, tokenizer)
        return
    lm = harness_model(params, config, tokenizer, HarnessConfig(max_new_tokens=4))

    def ask(*args):
        return [SimpleNamespace(args=one) for one in args]

    found = lm.loglikelihood(ask(("hello", " ab"), ("", "ab"), ("hello ", "12")), True)
    context, both = tokenizer.encode("hello"), tokenizer.encode("hello ab")
    (wanted,) = log_likelihoods(params, config, [(context, both[len(context) :])])
    assert found[0] == (pytest.approx(wanted.log_prob), wanted.greedy) and len(found) == 3
    (rolled,) = lm.loglikelihood_rolling(ask(("hello ab " * 30,)), True)
    assert rolled < 0
    how = {"until": ["ab"], "max_gen_toks": 3}
    answers = lm.generate_until(ask(("hello", how), ("ab", {}), ("hello", how)), True)
    assert answers[0] == answers[2] and "ab" not in answers[0]
