"""One text through the model, once forward and once backward: everything `shadow_scores` needs."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.methods import shadow_scores as criteria_of
from moejax.models.config import ModelConfig
from moejax.models.masked import is_masked, one_neuron_shape, probing, seen_of
from moejax.models.transformer import ForwardOptions, forward, unembed

FFN = ("layers/*/mlp/w_*", "layers/*/moe/experts/w_*")
_LABELS = 128  # scored tokens that epenas reads at most


@dataclasses.dataclass(frozen=True)
class Text:
    """One text to measure on, as numpy arrays.

    Attributes:
      tokens: int32 [T]. scored: bool [T], whose tokens' cross-entropy is the loss; the first token
        has none. prompt: tokens before the first scored one.
    """

    tokens: np.ndarray
    scored: np.ndarray
    prompt: int


@dataclasses.dataclass(frozen=True)
class Asked:
    """What to measure: names of `shadow_scores.CRITERIA`, and whether as the reference does.

    rows: also what predictors that decide at every token train on, of so many tokens.
    """

    criteria: tuple[str, ...] = criteria_of.CRITERIA
    parity: bool = False
    rows: int = 0

    def __post_init__(self):
        for name in self.criteria:
            if name not in criteria_of.CRITERIA:
                known = ", ".join(criteria_of.CRITERIA)
                raise InputError(f"criterion {name!r} is unknown: use {known}")

    @property
    def needs(self) -> set[str]:
        """Of "values", "gradients", "weights", "curvature", "labels"."""
        tables = (criteria_of.FOR_HEADS, criteria_of.FOR_NEURONS)
        return {table[name] for table in tables for name in self.criteria if name in table}


def slots_for(length: int, most: int, short: int = 64) -> int:
    """Slots to pad a text to: the next multiple of 64, at most `most`; each is a program.

    short: of texts up to 64 tokens the next multiple of that.
    """
    step = short if length <= 64 else 64
    return min(-(-length // step) * step, most)


def measure(
    params: tree.Tree, config: ModelConfig, text: Text, asked: Asked, num_slots: int
) -> dict[str, Any]:
    """Scores of one text, on the device.

    Args:
      text: at most num_slots tokens; it is padded to that many (`slots_for`), so that one program
        serves texts of several lengths.
      asked: the criteria; all of them come from one forward and one backward pass, "grasp" takes
        another backward pass of those.

    Returns "heads": {criterion: [L, H]}, "neurons": {criterion: [L, F] or [L, E * F]}, "context"
    [H * C] of layer 0 at the prompt's last token, "loss", and with `asked.rows` "rows": attn_in and
    mlp_in [L, R, D], heads [L, R, H] (norms), neurons [L, R, F] (absolute values), and context
    [R, H * C] of layer 0 at the token before each.

    InputError: a text that is too long, and a criterion that needs the loss of a text without
    scored tokens.
    """
    length, gradient = len(text.tokens), sorted(asked.needs - {"values"})
    if length > num_slots:
        raise InputError(f"a text of {length} tokens, more than the {num_slots} asked for: cut it")
    if not 0 < text.prompt <= length:
        raise InputError(f"a prompt of {text.prompt} tokens, of a text of {length}")
    if gradient and not text.scored[1:].any():
        names = [n for n in asked.criteria if criteria_of.FOR_HEADS.get(n) != "values"]
        raise InputError(
            f"criterion {names[0]} needs labels, tokens whose loss counts, and a text has none"
        )
    room = num_slots - length
    tokens_T = np.pad(text.tokens, (0, room)).astype(np.int32)
    scored_T = np.pad(text.scored, (0, room)).astype(bool)
    scored_T[0] = False
    spread = np.linspace(text.prompt - 1, length - 2, max(1, asked.rows))
    rows_R = np.clip(np.round(spread), 0, length - 1).astype(np.int32)
    return _measure(params, config, tokens_T, scored_T, (length, text.prompt, rows_R), asked)


@functools.partial(jax.jit, static_argnames=("config", "asked"))
def _measure(params, config: ModelConfig, tokens_T, scored_T, places, asked: Asked):
    length, prompt, rows_R = places
    num_tokens, options = len(tokens_T), ForwardOptions(attention="dense")
    mask_T = jnp.arange(num_tokens) < length
    weights, rest = tree.split(params, FFN)
    value_size = config.head_size if config.mla is None else config.mla.v_size
    shape = (config.num_layers, 1, num_tokens)
    probes = (
        jnp.zeros((*shape, config.num_heads, value_size)),
        jnp.zeros((*shape, *one_neuron_shape(config))),
    )

    def loss(probes, weights):
        inserted = probing(config, *probes)
        if asked.rows:
            same = lambda part, x: (x, x)  # noqa: E731
            inserted = dataclasses.replace(inserted, attn_in=same, mlp_in=same)
        whole = tree.join(weights, rest)
        segments_1T = mask_T[None].astype(jnp.int32)
        out = forward(
            whole,
            config,
            tokens_T[None],
            segment_ids_BT=segments_1T,
            options=options,
            inserted=inserted,
        )
        logits_TV = unembed(whole, config, out.hidden_BTD[0, :-1])
        log_probs = jax.nn.log_softmax(logits_TV, axis=-1)
        nll_T = -jnp.take_along_axis(log_probs, tokens_T[1:, None], axis=-1)[:, 0]
        total = jnp.sum(jnp.where(scored_T[1:], nll_T, 0.0))
        return total / jnp.maximum(jnp.sum(scored_T[1:]), 1), seen_of(config, out.seen)

    grads: Any = (jax.tree.map(jnp.zeros_like, probes), None)
    if asked.needs == {"values"}:
        value, seen = loss(probes, weights)
    else:
        by = (0, 1) if "weights" in asked.needs else (0,)
        (value, seen), grads = jax.value_and_grad(loss, by, has_aux=True)(probes, weights)
    curved = None
    if "curvature" in asked.needs:

        def size(probes):  # its gradient is H g, with the g inside held still
            g = jax.grad(lambda p: loss(p, weights)[0])(probes)
            held = jax.lax.stop_gradient(g)
            return sum(jnp.vdot(a, b) for a, b in zip(g, held, strict=True))

        curved = jax.grad(size)(probes)
    of_text = _OfText(tokens_T, scored_T, mask_T, length, asked)
    x_LTHC = seen["heads"][:, 0] * mask_T[:, None, None]
    a_LTF = _flat(seen["neurons"][:, 0]) * mask_T[:, None]
    g_LTHC, ga_LTF = grads[0][0][:, 0], _flat(grads[0][1][:, 0])
    hg_LTHC, hga_LTF = (None, None) if curved is None else (curved[0][:, 0], _flat(curved[1][:, 0]))
    found = {
        "heads": of_text.heads(x_LTHC, g_LTHC, hg_LTHC),
        "neurons": of_text.neurons(a_LTF, ga_LTF, hga_LTF)
        | of_text.weights(config, weights, grads[1] if len(grads) > 1 else None),
        "context": x_LTHC[0, prompt - 1].reshape(-1),
        "loss": value,
    }
    if asked.rows:
        found["rows"] = {
            "attn_in": seen["attn_in"][:, 0, rows_R],
            "mlp_in": seen["mlp_in"][:, 0, rows_R],
            "heads": jnp.linalg.norm(x_LTHC[:, rows_R], axis=-1),
            "neurons": jnp.abs(a_LTF[:, rows_R]),
            "context": x_LTHC[0, rows_R].reshape(len(rows_R), -1),
        }
    return found


@dataclasses.dataclass(frozen=True)
class _OfText:
    """Turns what was recorded into scores, layer by layer."""

    tokens_T: Any
    scored_T: Any
    mask_T: Any
    length: Any
    asked: Asked

    def heads(self, x_LTHC, g_LTHC, hg_LTHC) -> dict[str, jax.Array]:
        parity = self.asked.parity
        num_rows = max(2, x_LTHC.shape[-1] // 2)
        first, end = self._predicting
        at_R = criteria_of.evenly(first, end, num_rows)
        new_R = jnp.concatenate([jnp.ones(1, bool), at_R[1:] != at_R[:-1]])
        size = min(_LABELS, len(self.tokens_T) - 1)
        labelled_R = jnp.nonzero(self.scored_T[1:], size=size, fill_value=-1)[0]
        labels_R = jnp.where(labelled_R < 0, -1, self.tokens_T[labelled_R + 1])
        table = {
            "l2_norm": lambda x, g, h: criteria_of.l2_norm(x),
            "plainact": lambda x, g, h: criteria_of.plainact_heads(x, g),
            "fisher": lambda x, g, h: criteria_of.fisher(x, g, self.length, parity),
            "grad_norm": lambda x, g, h: criteria_of.grad_norm_heads(g),
            "snip": lambda x, g, h: criteria_of.snip(x, g, parity),
            "grasp": lambda x, g, h: criteria_of.grasp(x, h),
            "nwot": lambda x, g, h: criteria_of.nwot(x, self.mask_T, parity),
            "jacov": lambda x, g, h: criteria_of.jacov(g[at_R], new_R),
            "epenas": lambda x, g, h: criteria_of.epenas(g[labelled_R], labels_R, parity),
        }
        return self._each(table, x_LTHC, g_LTHC, hg_LTHC)

    def neurons(self, a_LTF, ga_LTF, hga_LTF) -> dict[str, jax.Array]:
        parity = self.asked.parity
        table = {
            "l2_norm": lambda a, g, h: criteria_of.l2_norm(a),
            "act_grad": lambda a, g, h: criteria_of.act_grad(a, g),
            "fisher": lambda a, g, h: criteria_of.fisher(a, g, self.length),
            "snip": lambda a, g, h: criteria_of.snip(a, g, parity),
            "grasp": lambda a, g, h: criteria_of.grasp(a, h),
            "nwot": lambda a, g, h: criteria_of.nwot(a, self.mask_T, parity),
        }
        return self._each(table, a_LTF, ga_LTF, hga_LTF)

    def weights(self, config: ModelConfig, weights, grads) -> dict[str, jax.Array]:
        if grads is None:
            return {}
        found: dict[str, list[jax.Array]] = {"plainact": [], "grad_norm": []}
        for run in config.runs:
            if not is_masked(config, run):
                zeros = jnp.zeros((run.num_layers, math.prod(one_neuron_shape(config))))
                found = {name: [*parts, zeros] for name, parts in found.items()}
                continue
            below = ("mlp",) if run.kind == "dense" else ("moe", "experts")
            w, g = (_at(part["layers"][run.name], below) for part in (weights, grads))
            plainact = criteria_of.plainact_weights
            if self.asked.parity:
                plainact = criteria_of.plainact_weights_parity
            found["plainact"].append(plainact(w, g))
            found["grad_norm"].append(criteria_of.grad_norm_weights(g))
        return {
            name: jnp.concatenate([x.reshape(x.shape[0], -1) for x in parts])
            for name, parts in found.items()
            if name in self.asked.criteria
        }

    @property
    def _predicting(self) -> tuple[jax.Array, jax.Array]:
        """The tokens that predict scored ones, from the first to behind the last."""
        index_T = jnp.arange(len(self.scored_T))
        first = jnp.min(jnp.where(self.scored_T, index_T, len(self.scored_T)))
        return first - 1, jnp.max(jnp.where(self.scored_T, index_T, 1))

    def _each(self, table, x, g, h) -> dict[str, jax.Array]:
        chosen = {name: fn for name, fn in table.items() if name in self.asked.criteria}
        if h is None:
            chosen.pop("grasp", None)
            return {n: jax.vmap(lambda x, g, f=fn: f(x, g, None))(x, g) for n, fn in chosen.items()}
        return {name: jax.vmap(fn)(x, g, h) for name, fn in chosen.items()}


def _flat(x: jax.Array) -> jax.Array:
    """Experts' neurons in one row: [L, T, E, F] to [L, T, E * F]."""
    return x.reshape(*x.shape[:2], -1)


def _at(part: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        part = part[name]
    return part
