"""Sparse rows behind the server's engine: each answers as it would alone, dense ones as densely."""

import dataclasses
import functools

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.io.tokenizer import Tokenizer
from moejax.methods.shadow_audit import Audit, AuditConfig, compare
from moejax.serve import sparse
from moejax.serve.engine import Engine
from moejax.serve.openai_request import ApiLimits, BadRequestError, parse_completion
from moejax.serve.request import EngineConfig, Request
from moejax.serve.sampling import SamplingConfig
from moejax.serve.shadow_engine import ShadowEngine
from tests.serve.test_sparse import PROMPTS, asking, model_of
from tests.tiny_tokenizer import gguf_fields

SETTINGS = EngineConfig(
    num_slots=3, max_length=64, page_size=8, prefill_chunk=16, num_steps=4, max_logprobs=2
)
NEW = 9


@functools.cache
def ready(case, decides):
    """(params, model): decides: tokens between two decisions, or who decides inside each step."""
    if decides == "layers":
        return asking(case)[:2]
    params, model = model_of(case, 0 if decides == "token" else decides)
    return params, dataclasses.replace(model, at_token=decides == "token")


def engine_of(case, decides=0, **audit):
    """Everything is audited in every test, so that all share their compiled programs."""
    model = ready(case, decides)[1]
    return ShadowEngine(model, SETTINGS, None, Audit(AuditConfig(share=1.0, **audit)))


def asked(prompt, sparsity=None, **more):
    return Request(tuple(prompt), NEW, SamplingConfig(0), num_logprobs=1, sparsity=sparsity, **more)


def alone(case, prompt, decides=0):
    """Ids and ln p of `launch.shadow --stage=generate`, which test_sparse.py holds to the masks."""
    model = ready(case, decides)[1]
    (answer,) = sparse.generate(model, [list(prompt)], NEW, with_logits=True)
    log_probs = answer.logits_TV - np.log(np.exp(answer.logits_TV).sum(-1, keepdims=True))
    return answer.ids, log_probs[np.arange(NEW), answer.ids]


def drift_of(model, request):
    """The audit's number from whole logits."""
    (answer,) = sparse.generate(model, [list(request.prompt)], NEW, with_logits=True)
    dense_TV = sparse.dense_logits(model, request.prompt, answer.ids)
    return compare(dense_TV[1:], answer.logits_TV[1:]).drift


def ln_p(answer):
    return [token.log_prob for token in answer.logprobs]


@pytest.mark.parametrize(
    ("case", "decides"),
    [
        ("gqa_heads", "token"),
        pytest.param("opt", "token", marks=pytest.mark.slow),
        pytest.param("experts", "token", marks=pytest.mark.slow),
        ("opt", "layers"),
        pytest.param("deepseek", "layers", marks=pytest.mark.slow),
        pytest.param("gqa_heads", "layers", marks=pytest.mark.slow),
        ("gqa_heads", 3),
        pytest.param("mqa_heads", 3, marks=pytest.mark.slow),
        pytest.param("experts", 0, marks=pytest.mark.slow),
        pytest.param("opt", 0, marks=pytest.mark.slow),
        pytest.param("latent_low_rank", 3, marks=pytest.mark.slow),
        pytest.param("deepseek", 3, marks=pytest.mark.slow),
        pytest.param("gqa_groups", 4, marks=pytest.mark.slow),
    ],
)
def test_rows_together_are_the_rows_alone_and_the_dense_model(case, decides):
    """Three rows of unlike masks, the second of them dense, and a fourth that waits for a slot."""
    engine = engine_of(case, decides)
    requests = [asked(PROMPTS[0]), asked(PROMPTS[1], 0.0), asked(PROMPTS[1]), asked(PROMPTS[0])]
    answers = [found[0] for found in engine.run(requests)]
    for at in (0, 2, 3):
        ids, log_probs = alone(case, requests[at].prompt, decides)
        assert answers[at].ids == ids
        np.testing.assert_allclose(ln_p(answers[at]), log_probs, atol=2e-5)
    params, model = ready(case, decides)
    dense = Engine(params, model.config, SETTINGS).run([requests[1]])[0][0]
    assert answers[1].ids == dense.ids
    assert np.abs(np.subtract(ln_p(answers[1]), ln_p(answers[2]))).max() > 0.01
    np.testing.assert_allclose(ln_p(answers[1]), ln_p(dense), atol=2e-5)
    if case not in ("experts", "deepseek"):  # the same bits, whoever shares its steps
        assert engine.run([requests[1]])[0][0].logprobs == answers[1].logprobs


@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_request_s_own_sparsity_is_kept_where_lists_are_longer(num_slots):
    """A step's lists have one of few lengths; a row keeps what it asked for, no more."""
    model = ready("gqa_heads", "token")[1]
    settings = dataclasses.replace(SETTINGS, num_slots=num_slots)
    (answer,) = ShadowEngine(model, settings).run([asked(PROMPTS[1], 0.4)])[0]
    policy = dataclasses.replace(model.policy, sparsity=(0.4, 0.4))
    (alone,) = sparse.generate(
        dataclasses.replace(model, policy=policy), PROMPTS[1:], NEW, with_logits=True
    )
    log_probs = alone.logits_TV - np.log(np.exp(alone.logits_TV).sum(-1, keepdims=True))
    assert answer.ids == alone.ids
    np.testing.assert_allclose(ln_p(answer), log_probs[np.arange(NEW), alone.ids], atol=2e-5)


def test_an_audit_past_the_limit_turns_later_answers_dense(caplog):
    engine = engine_of("gqa_heads", 3, drift_limit=1e-9, least=2)
    requests = [asked(PROMPTS[0], 0.5), asked(PROMPTS[1])]
    first = engine.run(requests)
    params, model = model_of("gqa_heads", 3)
    report = engine.report()["shadow"]
    assert report["audited"] == report["requests"] == 2 and report["fell_back_at"] == 2
    wanted = [drift_of(model, request) for request in requests]
    np.testing.assert_allclose(report["drift"], np.mean(wanted), rtol=1e-4)
    assert "dense since request 2" in caplog.text
    dense = Engine(params, model.config, SETTINGS).run([asked(PROMPTS[1])])[0][0]
    assert engine.run([asked(PROMPTS[1])])[0][0].ids == dense.ids != first[1][0].ids
    assert engine.report()["shadow"]["requests"] == 2  # dense ones are not audited


def test_a_sparsity_of_almost_nothing_drifts_by_almost_nothing():
    """The audit's dense pass reads the very tokens: where no mask differs, nor do the logits."""
    engine = engine_of("gqa_heads", 3)
    engine.run([asked(PROMPTS[0], 1e-9), asked(PROMPTS[1], 1e-9)])
    report = engine.report()["shadow"]
    assert report["audited"] == 2 and report["agreement"] == 1 and report["drift"] < 1e-9


def test_what_is_refused():
    with pytest.raises(InputError, match=r"sparsity 1 lies outside \[0, 1\)"):
        asked(PROMPTS[0], 1.0)
    params, model = model_of("gqa_heads", 3)
    plain = Engine(params, model.config, SETTINGS)
    with pytest.raises(InputError, match="sparsity 0.5: nothing is skipped here"):
        plain.check(asked(PROMPTS[0], 0.5))
    plain.check(asked(PROMPTS[0], 0.0))
    limits, tokenizer = ApiLimits(64), Tokenizer.from_gguf_metadata(gguf_fields())
    (request,) = parse_completion({"prompt": "hello", "sparsity": 0}, tokenizer, limits).requests
    assert request.sparsity == 0
    for wrong in (1, -0.1, "half", True, float("nan")):
        with pytest.raises(BadRequestError, match="sparsity must be"):
            parse_completion({"prompt": "hello", "sparsity": wrong}, tokenizer, limits)
