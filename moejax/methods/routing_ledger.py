"""What tuning did to the routing: who goes where, before and after, on the same tokens.

overlap   share of a token's K experts that it has in both models, mean over tokens
first     share of tokens whose best expert is the same
kl        sum_i p_i ln(p_i / q_i), p and q the shares of choices that experts get before and after
mass      mean mass of the chosen experts, before and after
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.sharding import everywhere
from moejax.methods.expert_config import moe_layers
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions


def routing_ledger(
    before: tree.Tree,
    after: tree.Tree,
    config: ModelConfig,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    options: ForwardOptions = ForwardOptions(),
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Compares two models' routing of packed batches, padding left out: per layer, and the means.

    With a frozen router only a changed hidden state can move a token, so the first layer of experts
    of an ESFT model has overlap 1 and kl 0.
    """
    if config.moe is None:
        raise InputError("the models are dense: there is no routing to compare")
    options = dataclasses.replace(options, trace_routing=True)

    @jax.jit
    def trace(params, batch):
        output = transformer.forward(
            params,
            config,
            batch["tokens"],
            positions_BT=batch["positions"],
            segment_ids_BT=batch["segment_ids"],
            options=options,
        )
        assert output.stats is not None and output.stats.trace is not None
        return everywhere(output.stats.trace, options.mesh)

    layers = moe_layers(config)
    sums = {name: np.zeros(len(layers)) for name in ("overlap", "first", "mass", "mass_after")}
    counts = np.zeros((2, len(layers), config.moe.num_experts))
    num_tokens = 0
    for done, batch in enumerate(batches, start=1):
        arrays = {name: batch[name] for name in ("tokens", "segment_ids", "positions")}
        real_BT = batch["segment_ids"] > 0
        old, new = (jax.device_get(trace(params, arrays)) for params in (before, after))
        a, b = old.experts_BTK[:, real_BT], new.experts_BTK[:, real_BT]
        same = (a[..., :, None] == b[..., None, :]).any(axis=-1)
        sums["overlap"] += same.mean(axis=-1).sum(axis=-1)
        sums["first"] += (a[..., 0] == b[..., 0]).sum(axis=-1)
        sums["mass"] += old.scores_BTK[:, real_BT].sum(axis=-1).sum(axis=-1)
        sums["mass_after"] += new.scores_BTK[:, real_BT].sum(axis=-1).sum(axis=-1)
        for side, ids in enumerate((a, b)):
            for i in range(len(layers)):
                counts[side, i] += np.bincount(ids[i].reshape(-1), minlength=counts.shape[2])
        num_tokens += int(real_BT.sum())
        progress(done)
    if not num_tokens:
        raise InputError("no token to compare the routing on: give data")
    shares = (counts + 1e-9) / (counts + 1e-9).sum(axis=2, keepdims=True)
    kl = np.sum(shares[0] * np.log(shares[0] / shares[1]), axis=1)
    columns = {name: value / num_tokens for name, value in sums.items()} | {"kl": kl}
    rows = [
        {"layer": layer, **{name: float(value[i]) for name, value in columns.items()}}
        for i, layer in enumerate(layers)
    ]
    means = {name: float(value.mean()) for name, value in columns.items()}
    return {"num_tokens": num_tokens, "mean": means, "layers": rows}
