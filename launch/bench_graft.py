"""Rows of LLM Modules on the CPU: an epoch from states on disk, and a token with the bridge.

The source is SmolLM2-135M, the target a Llama of random weights with 8,192 ids of its own or with
SmolLM2's 49,152, bridge and target below 24M trained parameters. Times are taken in turns, one step
(or stretch of tokens) of each candidate after the other; ratios are medians over the pairs.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import graft as graft_config
from launch.bench_row import Row, Wanted
from launch.graft_loss import make_loss, trained_parts
from launch.graft_setup import Setup, states_of
from launch.graft_train import optim_config, rows_of
from launch.smollm2 import gguf_path
from moejax.core import tree
from moejax.data.grafting import GraftExample, Joined
from moejax.io.load import load_any
from moejax.io.loaded import Loaded
from moejax.io.states import States, write_states
from moejax.methods.graft import GraftConfig, init_bridge
from moejax.models import transformer
from moejax.models.cache import init_cache
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions, forward, unembed
from moejax.serve.grafted import Grafted, GraftedText, Lender
from moejax.serve.prepare import prepare
from moejax.serve.sampling import SamplingConfig
from moejax.train.optim import make_optimizer
from moejax.train.state import init_state
from moejax.train.step import make_train_step

ROWS, LENGTH, PAIRS = 8, 256, 5
EPOCH = "cpu f32 SmolLM2-135M -> {:.1f}M trained ({:,} ids), cached epoch / uncached"
DECODE = "cpu f32 SmolLM2-135M -> {:.1f}M target, token with bridge / (source + 1.25 target)"
PROMPT, DRAWN = 64, 32


def rows(peer: bool, wanted: Wanted) -> Iterator[Row]:
    """The two ratios; there is no peer."""
    del peer
    for num_ids in (8192, 0):
        setup, params = _setup(num_ids)
        trained = tree.num_params(trained_parts(setup, params)[0]) / 1e6
        figure = EPOCH.format(trained, setup.target.config.vocab_size)
        if wanted(figure):
            yield _epoch(setup, params, figure)
    size = tree.num_params(params) / 1e6
    if wanted(DECODE.format(size)):
        yield _decode(setup, params, DECODE.format(size))


def _setup(num_ids: int) -> tuple[Setup, tree.Tree]:
    source = load_any(str(gguf_path()), "float32", abstract=True)
    assert source.tokenizer is not None
    target = ModelConfig(
        "llama", num_ids or source.config.vocab_size, 6, 256, 704, 4, 4, 64, max_position=1024,
        tie_embeddings=True,
    )
    config = graft_config.get_config()
    config.source.model = str(gguf_path())
    config.data.update(target_len=LENGTH, source_len=LENGTH)
    config.train.batch_size = ROWS
    graft = GraftConfig(source.config.d_model, target.d_model, every=2)
    joined = Joined(source.tokenizer, source.tokenizer, "same")
    setup = Setup(config, source, Loaded(None, target, source.tokenizer), graft, joined)
    return setup, transformer.init_params(target, jax.random.key(0))


def _epoch(setup: Setup, params: tree.Tree, figure: str) -> Row:
    """A training step with states from disk against one that runs the source first.

    Every step of an epoch has one shape, so the ratio of steps is that of epochs.
    """
    rng = np.random.default_rng(0)
    size = setup.target.config.vocab_size
    examples = []
    for _ in range(ROWS * PAIRS):
        ids = rng.integers(0, size, LENGTH).tolist()
        examples.append(GraftExample(ids, [True] * LENGTH, ids, list(range(1, LENGTH + 1)), 4))
    source = setup.source_params()

    def compute(numbers) -> list[np.ndarray]:
        tokens = setup.batch([examples[n] for n in numbers])["source_tokens"]
        return list(np.asarray(states_of(setup, source, tokens)))

    trainable, _ = trained_parts(setup, params)
    optimizer = make_optimizer(optim_config(setup, 100), 100)
    step = make_train_step(make_loss(setup), optimizer)
    state = init_state(jax.tree.map(jnp.array, trainable), optimizer)
    key = jax.random.key(0)
    with tempfile.TemporaryDirectory() as folder:
        identity = {"size": setup.graft.read_size, "dtype": "bfloat16"}
        lengths = [LENGTH] * len(examples)
        write_states(Path(folder), identity, lengths, compute)
        kept = States(folder, identity, len(examples))
        times: dict[bool, list[float]] = {True: [], False: []}
        for number in range(PAIRS + 1):  # the first pair compiles
            for cached in (True, False):
                began = time.perf_counter()
                numbers = range((number % PAIRS) * ROWS, (number % PAIRS + 1) * ROWS)
                batch = rows_of(setup, examples, numbers, kept if cached else None)
                frozen = {} if cached else {"source": source}
                state, _ = step(state, frozen, batch, key)
                jax.block_until_ready(state)
                times[cached].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(times[True][1:], times[False][1:], strict=True)]
    with_states, without = (statistics.median(times[c][1:]) for c in (True, False))
    how = (
        f"steps of {ROWS} x {LENGTH} tokens in turns, reading states from disk included, "
        f"{with_states:.2f} and {without:.2f} s; median of {PAIRS} ratios ({min(ratios):.2f} to "
        f"{max(ratios):.2f}); load average {os.getloadavg()[0]:.1f}"
    )
    return Row(figure, statistics.median(ratios), "x", "<= 0.35", how=how)


def _decode(setup: Setup, params: tree.Tree, figure: str) -> Row:
    """Seconds per token of the pair, of the source alone and of the target alone, in turns."""
    source = prepare(setup.source_params())
    target = prepare(params)
    bridge = init_bridge(jax.random.key(1), setup.graft, setup.target.config)
    lender = Lender(setup.source.config, source, setup.graft, bridge, setup.joined)
    pair = Grafted(setup.target.config, target, {"source": lender}, ForwardOptions())
    ids = np.random.default_rng(0).integers(1000, 20000, PROMPT).tolist()
    prompt = setup.joined.target.decode(ids)
    candidates: dict[str, Callable[[], Callable[[], Any]]] = {
        "pair": lambda: _pair(pair, prompt),
        "source": lambda: _alone(source, setup.source.config, ids),
        "target": lambda: _alone(target, setup.target.config, ids),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(PAIRS + 1):
        for name, start in candidates.items():
            token = start()
            token()
            began = time.perf_counter()
            for _ in range(DRAWN):
                token()
            if number:  # the first round compiles
                times[name].append((time.perf_counter() - began) / DRAWN)
    ratios = [
        p / (s + 1.25 * t)
        for p, s, t in zip(times["pair"], times["source"], times["target"], strict=True)
    ]
    each = ", ".join(f"{n} {1e3 * statistics.median(t):.2f} ms" for n, t in times.items())
    how = (
        f"{DRAWN} tokens after {PROMPT} in turns, heads included: {each}; median of {PAIRS} ratios "
        f"({min(ratios):.2f} to {max(ratios):.2f}); load average {os.getloadavg()[0]:.1f}"
    )
    return Row(figure, statistics.median(ratios), "x", "<= 1", how=how)


def _pair(model: Grafted, prompt: str) -> Callable[[], Any]:
    drawn = GraftedText(model, prompt, 4 * DRAWN).draw(SamplingConfig(), jax.random.key(0))

    def token():
        found = next(drawn, None)
        assert found is not None, "the random target drew its end token"
        return found

    return token


def _alone(params: tree.Tree, config: ModelConfig, ids: list[int]) -> Callable[[], int]:
    """A loop that reads and draws greedily, as the pair's does."""
    step = _STEPS.setdefault(id(config), jax.jit(
        lambda params, cache, tokens: _step(params, config, cache, tokens), donate_argnums=1
    ))
    cache = init_cache(config, jnp.zeros(1, jnp.int32), PROMPT + 4 * DRAWN, split=True)
    last, cache = step(params, cache, jnp.asarray([ids]))
    held = [int(last), cache]

    def token() -> int:
        found, held[1] = step(params, held[1], jnp.asarray([[held[0]]]))
        held[0] = int(found)
        return held[0]

    return token


_STEPS: dict[int, Any] = {}


def _step(params, config: ModelConfig, cache, tokens_1T):
    output = forward(params, config, tokens_1T, cache=cache)
    return jnp.argmax(unembed(params, config, output.hidden_BTD[0, -1])), output.cache
