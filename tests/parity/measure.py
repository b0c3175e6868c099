"""How far our numbers for a case are from transformers'."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.io.load import load_any, save_any
from moejax.models import transformer
from moejax.models.cache import init_cache
from moejax.models.config import ModelConfig
from moejax.models.families import by_name
from moejax.moe import layer
from moejax.moe.routing import route
from tests.parity import reference
from tests.parity.cases import NUM_DECODED, NUM_PREFILLED, TOKENS

# Largest differences that count as equal, relative to the largest value.
MAX_FLOAT32 = 2e-5
MAX_BFLOAT16_RATIO = 1.5
# A leaf's gradient is held against its own largest value, or this share of the largest of all: that
# of key biases is zero but for rounding, because a softmax ignores what is added to all scores.
SMALL_GRADIENT = 1e-2


@dataclasses.dataclass(frozen=True)
class Measured:
    """Differences of one case, float32 and relative to the largest value unless said otherwise.

    Attributes:
      logits, loss: of one forward pass.
      gradient: of the worst leaf.
      decoded: of logits decoded with a cache; None where a cache means something else.
      tokens_equal, tokens_compared: most likely tokens, where the best two are further apart than
        the tolerance.
      bfloat16: RMS error of bfloat16 logits against the float32 reference, over that of
        transformers' own.
      routed_equal, routed_compared: tokens, of every layer with experts, with the same experts.
    """

    logits: float
    loss: float
    gradient: float
    decoded: float | None
    tokens_equal: int
    tokens_compared: int
    bfloat16: float
    routed_equal: int
    routed_compared: int


@functools.partial(jax.jit, static_argnames="config")
def ours(params, config: ModelConfig, tokens_BT):
    """Logits, loss and its gradients, logits decoded with a cache, logits in bfloat16."""

    def loss(params):
        logits = transformer.logits(params, config, tokens_BT)
        logp = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(logp, tokens_BT[:, 1:, None], axis=-1)
        return -jnp.mean(picked), logits

    (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    cache = init_cache(config, jnp.zeros(tokens_BT.shape[0], jnp.int32), tokens_BT.shape[1])
    cache = transformer.forward(params, config, tokens_BT[:, :NUM_PREFILLED], cache=cache).cache

    def step(cache, token_B):
        out = transformer.forward(params, config, token_B[:, None], cache=cache)
        return out.cache, transformer.unembed(params, config, out.hidden_BTD[:, 0])

    _, decoded_NBV = jax.lax.scan(step, cache, tokens_BT[:, NUM_PREFILLED:].T)
    options = transformer.ForwardOptions(compute_dtype="bfloat16")
    half = transformer.logits(params, config, tokens_BT, options=options)
    return logits, value, gradients, jnp.swapaxes(decoded_NBV, 0, 1), half


def measure(name: str, folder: Path) -> Measured:
    """Saves a case's model with transformers, loads it with ours, compares, exports, compares.

    AssertionError where a byte of an exported tensor differs, or transformers misses a tensor of
    our folder, or finds one too many.
    """
    model, expected = reference.compute(name)
    model.save_pretrained(folder / "theirs")
    loaded = load_any(folder / "theirs")
    found = ours(loaded.params, loaded.config, TOKENS)
    logits, loss, gradients, decoded, half = jax.tree.map(np.asarray, found)
    _check_export(loaded, model, expected.logits_BTV, folder / "ours")
    routed = list(zip(_choices(loaded), expected.choices, strict=True))
    equal, compared = 0, 0
    gap = None
    if expected.decoded_BNV is not None:
        assert decoded.shape[1] == NUM_DECODED
        gap = relative(decoded, expected.decoded_BNV)
        equal, compared = _tokens(decoded, expected.decoded_BNV)
    return Measured(
        logits=relative(logits, expected.logits_BTV),
        loss=abs(float(loss) - expected.loss) / abs(expected.loss),
        gradient=_gradient_gap(loaded.config, gradients, expected.gradients),
        decoded=gap,
        tokens_equal=equal,
        tokens_compared=compared,
        bfloat16=_rms(half - expected.logits_BTV)
        / _rms(expected.bfloat16_BTV - expected.logits_BTV),
        routed_equal=sum(int(np.all(a == b, axis=1).sum()) for a, b in routed),
        routed_compared=sum(len(wanted) for wanted in expected.choices),
    )


def _choices(loaded) -> list[np.ndarray]:
    """The experts of each token, of each layer with experts: int [B * T, K], ascending."""
    if loaded.config.moe is None:
        return []
    found: list[np.ndarray] = []

    def record(experts_NK):
        found.append(np.sort(experts_NK, axis=1))

    def recording(*args, **kwargs):
        routing = route(*args, **kwargs)
        jax.debug.callback(record, routing.experts_NK, ordered=True)
        return routing

    with mock.patch.object(layer, "route", recording):
        run = jax.jit(lambda params: transformer.logits(params, loaded.config, TOKENS))
        jax.block_until_ready(run(loaded.params))
    jax.effects_barrier()
    return found


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest value."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def _tokens(found: np.ndarray, expected: np.ndarray) -> tuple[int, int]:
    best = np.sort(expected, axis=-1)
    clear = best[..., -1] - best[..., -2] > 2 * MAX_FLOAT32 * np.max(np.abs(expected))
    same = found.argmax(-1) == expected.argmax(-1)
    return int((same & clear).sum()), int(clear.sum())


def _gradient_gap(config: ModelConfig, gradients, expected: dict[str, np.ndarray]) -> float:
    flat = tree.flatten(gradients)
    largest = max(float(np.max(np.abs(g))) for g in expected.values())
    worst = 0.0
    for weight in by_name(config.family).name_table(config):
        wanted = weight.from_hf(expected[weight.hf_name])
        found = flat[weight.path][weight.index]
        size = max(float(np.max(np.abs(wanted))), SMALL_GRADIENT * largest)
        worst = max(worst, float(np.max(np.abs(found - wanted))) / size)
    return worst


def _check_export(loaded, theirs, logits: np.ndarray, folder: Path) -> None:
    """Our folder is one that transformers loads, and holds the bytes that were read."""
    import torch
    from transformers import AutoModelForCausalLM

    save_any(loaded, folder)
    assert tree.diff(load_any(folder).params, loaded.params) == []
    assert load_any(folder).config == loaded.config
    again, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    with torch.no_grad():
        assert np.array_equal(again.eval()(tokens).logits.numpy(), logits)
