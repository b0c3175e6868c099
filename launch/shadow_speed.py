"""How fast decoding is that skips heads and neurons, beside dense decoding and transformers.

All candidates take turns: a round is a few tokens of each, one row, and a ratio is that of two
times of one round. What is timed is all that a token costs, with the predictor where lists are made
anew. The byte bound is what a machine would gain that does nothing but read weights.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.methods import shadow_decode as decode
from moejax.methods import shadow_dejavu
from moejax.methods import shadow_predictor as predictors
from moejax.methods.shadow_mask import Mask, Sizes, sizes_of
from moejax.models.config import ModelConfig
from moejax.models.families import by_name
from moejax.models.options import ForwardOptions
from moejax.models.params import init_params
from moejax.models.transformer import split_layers
from moejax.serve import sparse

NUM_TOKENS, NUM_ROUNDS, PROMPT = 8, 7, 64
SHARE = 0.01  # of the model's parameters, that a predictor of random weights takes at most


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model to be timed.

    plain: split layers, as dense decoding reads them; laid_out: by rows; predictor: its weights;
    asked, at_token: as of `moejax.serve.sparse.Sparse`; then refresh_every is 1.
    dtype: of the weights and of the arithmetic. num_tokens: of a round.
    """

    name: str
    config: ModelConfig
    plain: tree.Tree
    laid_out: tree.Tree
    sizes: Sizes
    predictor: dict[str, Any] | None
    refresh_every: int = 0
    asked: tuple[dict[str, Any], ...] | None = None
    at_token: bool = False
    dtype: str = "float32"
    num_tokens: int = NUM_TOKENS

    @property
    def between(self) -> int:
        """Tokens after which lists are made anew between steps; 0: never, or inside of them."""
        return 0 if self.asked is not None or self.at_token else self.refresh_every


@dataclasses.dataclass(frozen=True)
class Speed:
    """What was measured at one sparsity; ratios are the other's time by ours, one per round.

    read_bytes: weights read per token, the predictor's part included; bound: dense ones by these.
    """

    model: str
    sparsity: float
    block: int
    unit: str
    refresh_every: int
    tokens_per_s: float
    dense_tokens_per_s: float
    read_bytes: int
    bound: float
    against_dense: list[float]
    against_dense_by_rows: list[float]
    against_transformers: list[float]

    def to_json(self) -> dict[str, Any]:
        """A row for a report; medians beside the rounds."""
        row = dataclasses.asdict(self)
        for name in ("against_dense", "against_dense_by_rows", "against_transformers"):
            row[name] = statistics.median(row[name]) if row[name] else None
            row[f"{name}_rounds"] = getattr(self, name)
        row["share_of_bound"] = row["against_dense"] / self.bound
        return row


def random_setup(
    name: str,
    config: ModelConfig,
    distinct: int,
    block: int,
    refresh_every: int = 0,
    dtype: str = "float32",
) -> Setup:
    """A model of random weights whose layers repeat `distinct` ones: as much is read, less kept.

    The distinct layers have to be far larger than the processor's cache. It decides by one
    predictor; `asking` has the same model decide in every layer.
    """
    few = init_params(few_config(config, distinct), jax.random.key(0))
    unit = "query" if config.num_kv_heads == config.num_heads else "group"
    sizes = sizes_of(config, block, unit)
    few = split_layers(jax.tree.map(lambda w: w.astype(dtype), few))
    laid_out = decode.lay_out(
        few, few_config(config, distinct), dataclasses.replace(sizes, first=0)
    )

    def whole(part, first):
        (run,) = config.runs
        layers = [part["layers"][run.name][i % distinct] for i in range(config.num_layers)]
        layers[:first] = few["layers"][run.name][:first]
        return part | {"layers": {run.name: tuple(layers)}}

    predictor = random_predictor(config, sizes)
    trees = whole(few, 0), whole(laid_out, sizes.first)
    return Setup(name, config, *trees, sizes, predictor, refresh_every, dtype=dtype)


def few_config(config: ModelConfig, num_layers: int) -> ModelConfig:
    """The same model with so many layers."""
    return dataclasses.replace(config, num_layers=num_layers)


def asking(setup: Setup) -> Setup:
    """The setup whose layers decide at every token, by predictors of as many random weights."""
    config, sizes = setup.config, setup.sizes
    assert setup.predictor is not None
    units = {"heads": config.num_heads, "neurons": sizes.blocks * sizes.block}
    outputs = config.d_model, sum(units.values())
    count = tree.num_params(setup.predictor)
    hidden = shadow_dejavu.hidden_within(count, config.num_layers, *outputs)

    def drawn(units: int) -> dict[str, jax.Array]:
        shapes = {"w_1": (config.d_model, hidden), "w_2": (hidden, units)}
        return {n: 0.1 * jax.random.normal(jax.random.key(2), s) for n, s in shapes.items()}

    num_later = config.num_layers - sizes.first
    layers = tuple({part: drawn(n) for part, n in units.items()} for _ in range(num_later))
    return dataclasses.replace(setup, predictor=None, refresh_every=1, asked=layers)


def random_predictor(config: ModelConfig, sizes: Sizes) -> dict[str, Any]:
    """A network of the trained one's shape, as large as may be, of random weights."""
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    hidden = predictors.hidden_within(config, sizes, SHARE, tree.num_params(abstract))
    shapes = [(sizes.num_layers, n) for n in (sizes.heads, sizes.blocks)]
    zeros = Mask(*(jnp.zeros(shape) for shape in shapes))
    size = config.num_heads * predictors.value_size(config)
    params = predictors.init(jax.random.key(1), size, hidden, zeros)
    for part in ("w_out_heads", "w_out_blocks"):
        params[part] = jax.random.normal(jax.random.key(2), params[part].shape)
    return params


def measure(
    setup: Setup, sparsities: list[float], peer: bool, rounds: int = NUM_ROUNDS
) -> list[Speed]:
    """Times dense decoding, each sparsity, and with `peer` transformers, in turns."""
    runs: dict[Any, Callable[[], None]] = {
        "dense": ours(setup, None, setup.plain, rounds),
        "dense by rows": ours(setup, None, setup.laid_out, rounds),
    }
    runs |= {s: ours(setup, s, setup.laid_out, rounds) for s in sparsities}
    if peer:
        runs["transformers"] = transformers_run(setup)
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # compiled, and once warm
        run()
        run()
    for number in range(rounds):
        names = list(runs)
        for name in names if number % 2 else reversed(names):
            started = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - started)
    dense_bytes = decode.num_read_bytes(setup.plain, setup.config, None, setup.sizes)
    found = []
    for s in sparsities:
        read = read_bytes(setup, s)

        def against(name, s=s):
            return [a / b for a, b in zip(times.get(name, []), times[s], strict=False)]

        found.append(
            Speed(
                model=setup.name,
                sparsity=s,
                block=setup.sizes.block,
                unit=setup.sizes.unit,
                refresh_every=setup.refresh_every,
                tokens_per_s=setup.num_tokens / statistics.median(times[s]),
                dense_tokens_per_s=setup.num_tokens / statistics.median(times["dense"]),
                read_bytes=read,
                bound=dense_bytes / read,
                against_dense=against("dense"),
                against_dense_by_rows=against("dense by rows"),
                against_transformers=against("transformers"),
            )
        )
    return found


def read_bytes(setup: Setup, sparsity: float) -> int:
    """Bytes of weights that a token reads at this sparsity, with its part of the predictor's."""
    state_size = setup.config.num_heads * predictors.value_size(setup.config)
    plan = sparse.decide(_model(setup, sparsity, setup.laid_out), jnp.zeros((1, state_size)))
    read = decode.num_read_bytes(setup.laid_out, setup.config, plan, setup.sizes)
    if setup.between:
        read += tree.num_bytes(setup.predictor or {}) // setup.between
    return read


def ours(
    setup: Setup, sparsity: float | None, params: tree.Tree, rounds: int
) -> Callable[[], None]:
    """Decodes `setup.num_tokens` more tokens of one text at each call; None: dense."""
    model = _model(setup, sparsity, params)
    prompt = np.random.default_rng(0).integers(0, setup.config.vocab_size, PROMPT).tolist()
    held: dict[str, Any] = {}
    held["state"] = sparse.start(model, [prompt], setup.num_tokens * (rounds + 3))
    held["plan"] = sparse.decide(model, held["state"].context_BE)
    every = setup.num_tokens if sparsity is None else setup.between or setup.num_tokens
    keys = jax.random.split(jax.random.key(0), (every, 1))

    def run() -> None:
        for _ in range(setup.num_tokens // every):
            held["state"], ids, _ = sparse.advance(model, held["state"], held["plan"], keys)
            if sparsity is not None and setup.between:
                held["plan"] = sparse.decide(model, held["state"].context_BE)
        ids.block_until_ready()

    return run


def _model(setup: Setup, sparsity: float | None, params: tree.Tree) -> sparse.Sparse:
    shares = None if sparsity is None else (sparsity, sparsity)
    policy = sparse.Policy(setup.sizes, shares, setup.between)
    deciding: dict[str, Any] = {"asked": setup.asked, "at_token": setup.at_token}
    deciding |= {"options": ForwardOptions(compute_dtype=setup.dtype)}
    return sparse.Sparse(setup.config, params, policy, setup.predictor, **deciding)


def check_peer(config: ModelConfig) -> None:
    """InputError unless torch and transformers are there, and the model's layers are alike."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        raise InputError("--peer needs torch and transformers: pip install -e .[parity]")
    if len(config.runs) > 1:
        raise InputError(
            f"--peer times models whose layers are alike; this {config.family} has several kinds"
        )


def check_interval(refresh_every: int) -> None:
    """InputError unless a round holds whole intervals: what is counted has to be what is timed."""
    if refresh_every and NUM_TOKENS % refresh_every:
        fits = ", ".join(str(n) for n in range(1, NUM_TOKENS + 1) if NUM_TOKENS % n == 0)
        raise InputError(f"--refresh_every={refresh_every}: a bench times 0, {fits}")


def num_threads() -> int:
    """Of ours and of torch's."""
    return len(os.sched_getaffinity(0))


def transformers_run(setup: Setup) -> Callable[[], None]:
    """The same by transformers on torch, with as many threads, greedy, its own cache."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(num_threads())
    config, (run,) = setup.config, setup.config.runs
    distinct = len({id(layer) for layer in setup.plain["layers"][run.name]})
    family = by_name(config.family)
    fields = json.loads(json.dumps(family.config_to_hf(few_config(config, distinct))))
    fields.pop("model_type", None)
    with torch.no_grad():
        known = AutoConfig.for_model(family.model_type, **fields)
        model = AutoModelForCausalLM.from_config(known, dtype=torch.float32).eval()
        body = getattr(model.model, "decoder", model.model)
        layers = list(body.layers)
        for number in range(distinct, config.num_layers):
            layer = layers[number % distinct]
            shared = copy.deepcopy(layer, {id(p): p for p in layer.parameters()})
            shared.self_attn.layer_idx = number
            layers.append(shared)
        body.layers = torch.nn.ModuleList(layers)
        model.config.num_hidden_layers = config.num_layers
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, config.vocab_size, (1, PROMPT), generator=generator)
        out = model(ids, use_cache=True)
        held = {"cache": out.past_key_values, "ids": out.logits[:, -1:].argmax(-1)}

    def go_on() -> None:
        with torch.no_grad():
            for _ in range(setup.num_tokens):
                out = model(held["ids"], past_key_values=held["cache"], use_cache=True)
                held["cache"], held["ids"] = out.past_key_values, out.logits[:, -1:].argmax(-1)

    return go_on
