"""The evaluate and report stages of `launch.graft`: what the source's knowledge is worth."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.graft_loss import BRIDGED, adapter_every
from launch.graft_setup import Setup, state_identity, states_of
from launch.graft_train import load_trained, rows_of, shuffle
from moejax.core.errors import InputError
from moejax.data.grafting import GraftExample
from moejax.evals import bootstrap
from moejax.io import atomic
from moejax.io.load import load_any
from moejax.io.states import States
from moejax.methods import bottleneck
from moejax.methods.graft_forward import grafted, inspect, make_reading
from moejax.models.transformer import forward, split_layers
from moejax.report import graft_plots
from moejax.serve.likelihood import log_likelihoods
from moejax.train.loss import targets, token_nll

Say = Callable[[str], None]


def evaluate(
    setup: Setup, num_train: int, examples: Sequence[GraftExample], workdir: Path, say: Say
) -> None:
    """Bits per byte of the held-out answers for every arm, and paired differences."""
    heldout = examples[num_train:]
    bridge, target = load_trained(setup, workdir)
    states = _states(setup, examples, workdir)
    original = jax.device_put(load_any(setup.config.target.model, "float32").params)
    arms: dict[str, np.ndarray] = {}
    if setup.config.method in BRIDGED:
        names = ["bridge", "target as it came", "shuffled states"]
        names += ["causal"] if setup.joined.paper else ["bridge shut", "all states in sight"]
    else:
        names = ["adapters", "target as it came"]
    for name in names:
        params = original if name == "target as it came" else target
        arms[name] = _arm(setup, heldout, states, num_train, params, bridge, name)
    arms["source alone"] = _source_alone(setup, heldout)
    num_bytes = np.array([e.num_bytes for e in heldout], np.float64)
    result: dict[str, Any] = {"bytes": int(num_bytes.sum()), "texts": len(heldout)}
    result |= {"arms": {}, "differences": {}}
    for name, bits in arms.items():
        found = bootstrap.ratio(bits, num_bytes)
        result["arms"][name] = {"bits_per_byte": found.mean, "low": found.low, "high": found.high}
        say(f"{name:20} {found.mean:.4f} [{found.low:.4f}, {found.high:.4f}] bits per byte")
        if name != names[0]:
            gap = bootstrap.paired_ratio(arms[names[0]], bits, num_bytes)
            result["differences"][f"{names[0]} - {name}"] = {
                "bits_per_byte": gap.mean,
                "low": gap.low,
                "high": gap.high,
                "verdict": bootstrap.verdict(gap, lower_is_better=True),
            }
    atomic.write_json(workdir / "evaluation.json", result)
    say(f"written  {workdir}/evaluation.json")


def _states(setup: Setup, examples: Sequence[GraftExample], workdir: Path) -> States | None:
    if not setup.config.cache.use:
        return None
    return States(workdir / "states", state_identity(setup, examples), len(examples))


def _arm(setup, heldout, states, first, params, bridge, name: str) -> np.ndarray:
    """Bits of every held-out answer, its end token not counted, in one arm."""
    size = min(setup.config.train.batch_size, len(heldout))
    source = setup.source_params() if states is None else None
    kind = {"bridge shut": "plain", "target as it came": "plain", "adapters": "adapters"}
    bits: list[float] = []
    for at in range(0, len(heldout), size):
        numbers = [min(at + i, len(heldout) - 1) for i in range(size)]
        rows = rows_of(setup, heldout, numbers, states, first)
        if source is not None:
            rows["states"] = np.asarray(states_of(setup, source, rows.pop("source_tokens")))
        if name == "shuffled states" and setup.config.method != "shuffled":
            shuffle(rows, [heldout[n] for n in numbers])
        if name == "all states in sight":
            rows["limits"] = _all([heldout[n] for n in numbers], rows["limits"])
        if name == "causal":
            rows["limits"] = np.broadcast_to(
                np.arange(1, rows["limits"].shape[1] + 1, dtype=np.int32), rows["limits"].shape
            )
        rows["loss_mask"] = _without_end(rows["loss_mask"], [heldout[n] for n in numbers])
        models = (setup.graft, setup.target.config, setup.options)
        static = (adapter_every(setup), *models, kind.get(name, "open"))
        found = np.asarray(_bits(static, params, bridge, rows))
        bits += found[: len(heldout) - at].tolist()
    return np.array(bits)


def _all(examples: Sequence[GraftExample], limits: np.ndarray) -> np.ndarray:
    lengths = np.array([len(e.source_ids) for e in examples], np.int32)
    return np.broadcast_to(lengths[:, None], limits.shape)


def _without_end(mask: np.ndarray, examples: Sequence[GraftExample]) -> np.ndarray:
    mask = mask.copy()
    for row, example in enumerate(examples):
        mask[row, len(example.target_ids) - 1] = False
    return mask


@functools.partial(jax.jit, static_argnums=0)
def _bits(static, params, bridge, rows) -> jax.Array:
    every, graft, config, options, kind = static
    more = {"positions_BT": rows["positions"], "segment_ids_BT": rows["segment_ids"]}
    if kind != "open":
        inserted = bottleneck.inserted(bridge, every) if kind == "adapters" else None
        hidden = forward(
            params, config, rows["tokens"], options=options, inserted=inserted, **more
        ).hidden_BTD
    else:
        reading = make_reading(
            bridge, graft, rows["states"], rows["limits"], None, options.compute_dtype
        )
        hidden = grafted(
            params, config, rows["tokens"], {"source": reading}, options=options, **more
        ).hidden_BTD
    target_BT, weight_BT = targets(rows)
    nll_BT = token_nll(params, config, hidden, target_BT)
    return jnp.sum(nll_BT * weight_BT, axis=1) / math.log(2)


def _source_alone(setup: Setup, heldout: Sequence[GraftExample]) -> np.ndarray:
    """Bits that the source itself needs for the same answers, in its own tokens."""
    source, pairs = setup.joined.source, []
    bos = source.bos_id if source.bos_id is not None else source.eos_ids[0]
    for example in heldout:
        ids = [i for i in example.source_ids if i != source.bos_id]
        text = setup.joined.target.decode(example.target_ids)
        whole = source.encode(text) if setup.joined.prefix else ids
        answer_bytes, cut = example.num_bytes, len(whole)
        while cut > 0 and len(source.decode(whole[cut - 1 :]).encode()) <= answer_bytes:
            cut -= 1
        pairs.append(([bos, *whole[:cut]], whole[cut:]))
    found = log_likelihoods(
        setup.source_params(), setup.source.config, pairs, options=setup.options
    )
    return np.array([-row.log_prob / math.log(2) for row in found])


# -- report ----------------------------------------------------------------------------------------


def report(setup: Setup, heldout: Sequence[GraftExample], workdir: Path, say: Say) -> None:
    """plots/: arms, gates per layer and token, one text's attention, each layer left out."""
    path = workdir / "evaluation.json"
    if not path.is_file():
        raise InputError(f"{path} is missing: run the evaluate stage first")
    folder = workdir / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    arms = json.loads(path.read_text())["arms"]
    graft_plots.arms_plot(arms).savefig(folder / "bits_per_byte.png", dpi=130)
    if setup.joined.paper or setup.config.method not in BRIDGED:
        say("paper mode and adapters have no gates that start closed: the arms alone are drawn")
        return
    bridge, target = load_trained(setup, workdir)
    example = max(heldout[:8], key=lambda e: len(e.target_ids))
    rows = setup.batch([example])
    states = states_of(setup, setup.source_params(), rows["source_tokens"])
    size = len(example.target_ids)
    tokens, limits = (jnp.asarray(rows[n][:, :size]) for n in ("tokens", "limits"))
    reading = make_reading(bridge, setup.graft, states, limits)
    split = split_layers(target)
    looks = inspect(split, setup.target.config, tokens, reading, options=setup.options)
    words = [setup.joined.target.id_to_text(i) for i in example.target_ids]
    source_words = [setup.joined.source.id_to_text(i) for i in example.source_ids]
    gates = np.stack([np.abs(np.asarray(x.gate[0], np.float32)).mean(-1) for x in looks])
    graft_plots.gates_plot(gates, words).savefig(folder / "gates.png", dpi=130)
    for number, seen in enumerate(looks):
        weights = np.asarray(seen.weights_BHTS[0].mean(0), np.float32)[:, : len(source_words)]
        figure = graft_plots.attention_plot(weights, words, source_words, number)
        figure.savefig(folder / f"attention_{number}.png", dpi=130)
    effects = _left_out(setup, split, reading, tokens, rows, len(looks))
    graft_plots.layers_plot(effects).savefig(folder / "layers.png", dpi=130)
    atomic.write_json(workdir / "report.json", {"gates": gates.tolist(), "left_out": effects})
    say(f"written  {folder}")


def _left_out(setup: Setup, params, reading, tokens, rows, num: int) -> dict[str, float]:
    """Mean nats per token of one text with each layer of the bridge left out, and with all."""
    size = tokens.shape[1]
    cut: dict[str, Any] = {n: rows[n][:, :size] for n in ("tokens", "segment_ids", "loss_mask")}
    found = {}
    for name, skip in [("none", ()), *((str(i), (i,)) for i in range(num))]:
        one = dataclasses.replace(reading, skip=skip)
        hidden = grafted(
            params, setup.target.config, tokens, {"source": one}, options=setup.options
        ).hidden_BTD
        target_BT, weight_BT = targets(cut)
        nll_BT = token_nll(params, setup.target.config, hidden, target_BT)
        found[name] = float(jnp.sum(nll_BT * weight_BT) / jnp.maximum(jnp.sum(weight_BT), 1))
    return found
