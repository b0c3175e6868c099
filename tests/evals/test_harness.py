"""The adapter answers the harness's requests with our numbers; without lm-eval it says so.

Where lm-eval is not installed its base class is stood in for: what the adapter overrides is all
that is tested here. `python -m tests.evals.measure_harness` runs the harness itself.
"""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import jax
import pytest

from moejax.core.errors import InputError
from moejax.evals.harness import HarnessConfig, harness_model
from moejax.io.tokenizer import Tokenizer
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.serve.likelihood import log_likelihoods
from tests.tiny_tokenizer import gguf_fields

IS_THERE = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture
def asked(monkeypatch):
    """(params, config, tokenizer), with a base class to adapt."""
    tokenizer = Tokenizer.from_gguf_metadata(gguf_fields())
    config = ModelConfig("llama", tokenizer.vocab_size, 1, 16, 24, 2, 1, 8, max_position=64)
    params = jax.jit(transformer.init_params, static_argnums=0)(config, jax.random.key(0))
    if not IS_THERE:
        with pytest.raises(InputError, match=r"pip install 'moejax\[eval\]'"):
            harness_model(params, config, tokenizer)
        names = ("lm_eval", "lm_eval.api", "lm_eval.api.model")
        modules = {name: ModuleType(name) for name in names}
        modules[names[-1]].TemplateLM = type("TemplateLM", (), {})
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
    return params, config, tokenizer


def requests(*args):
    return [SimpleNamespace(args=one) for one in args]


def test_the_adapter(asked):
    params, config, tokenizer = asked
    lm = harness_model(params, config, tokenizer, HarnessConfig(max_new_tokens=4))
    context, both = tokenizer.encode("hello"), tokenizer.encode("hello ab")
    pair = context, both[len(context) :]
    (wanted,) = log_likelihoods(params, config, [pair])
    long = tokenizer.encode("hello ab " * 30)
    found = lm._loglikelihood_tokens([(("", ""), *pair), (("", ""), long, pair[1])], True)
    assert found[0] == (pytest.approx(wanted.log_prob), wanted.greedy) and len(found) == 2
    if IS_THERE:
        assert lm.loglikelihood(requests(("hello", " ab"), ("", "ab")), True)[0] == found[0]
    (rolled,) = lm.loglikelihood_rolling(requests(("hello ab " * 30,)), True)
    assert rolled < 0
    free, other, again = lm.generate_until(
        requests(("hello", {"max_gen_toks": 9}), ("ab", {}), ("hello", {"max_gen_toks": 9})), True
    )
    assert free == again and len(free) > 3 and other != free
    stop = free[1:3]  # in the middle, whatever it is
    how = {"until": ["", stop, "never"], "max_gen_toks": 9, "do_sample": False}
    (cut,) = lm.generate_until(requests(("hello", how)), True)
    assert cut == free[: free.find(stop)]
    with pytest.raises(InputError, match="64 new tokens leave no room in the 64 read"):
        lm.generate_until(requests(("hello", {"max_gen_toks": 64})), True)
