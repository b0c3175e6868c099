"""What is compared: methods that decide a mask from a prompt, at a sparsity, under a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.shadow_collect import pooled
from launch.shadow_data import Model, load_samples
from launch.shadow_train import DEJAVU, FOLDERS, load_dejavu, static_scores
from moejax.core.errors import InputError
from moejax.evals import masked
from moejax.methods import shadow_dejavu, shadow_predictor, shadow_rivals
from moejax.methods.shadow_mask import BUDGETS, Mask, Sizes, check_sparsity, full_mask, select
from moejax.methods.shadow_measure import Asked, Text, measure
from moejax.methods.shadow_scores import CRITERIA, FOR_HEADS, FOR_NEURONS

# What each method is: README has it for users.
METHODS: tuple[str, ...] = (
    "static",
    "predicted",
    "predicted_per_layer",
    "dejavu",
    "dejavu_equal",
    "oracle",
)
METHODS += ("random",)
PLACES = ("both", "heads", "neurons")
SINGLE = ("static_single", "oracle_single")  # neurons chosen one by one, not in blocks
RIVALS = ("griffin", "cats", "teal")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method at a sparsity of heads, neurons or both, under a budget."""

    method: str
    place: str = "both"
    sparsity: float = 0.0
    budget: str = "local"

    @property
    def name(self) -> str:
        """For a file, as "predicted-both-0.5-local"."""
        return f"{self.method}-{self.place}-{self.sparsity:g}-{self.budget}"

    @property
    def shares(self) -> tuple[float, float]:
        """Sparsity of heads and of neurons."""
        heads = self.sparsity if self.place in ("both", "heads") else 0.0
        return heads, self.sparsity if self.place in ("both", "neurons") else 0.0


def arms_of(config: Any, texts: bool) -> Iterator[Arm]:
    """Every arm for texts, or for multiple choice, dense first.

    InputError for a sparsity outside [0, 1), a place, budget or criterion that is none.
    """
    judged = config.evaluate
    for sparsity in judged.sparsities:
        check_sparsity(sparsity)
    known = {"places": PLACES, "task_places": PLACES, "budgets": BUDGETS}
    for key, names in (known | {"static_criteria": CRITERIA}).items():
        for name in judged[key]:
            if name not in names:
                raise InputError(f"evaluate.{key}: {name!r} is unknown: use {', '.join(names)}")
    places = judged.places if texts else judged.task_places
    yield Arm("dense")
    for sparsity in judged.sparsities:
        for place in places:
            for method in METHODS:
                yield Arm(method, place, sparsity)
    for budget in judged.budgets:
        for method in METHODS:
            yield Arm(method, "both", 0.5, budget)
    for sparsity in judged.sparsities:
        yield Arm("griffin", "neurons", sparsity)
        yield Arm("cats", "neurons", sparsity)
        yield Arm("teal", "both", sparsity)
    if texts:
        for name in judged.static_criteria:
            heads, neurons = name in FOR_HEADS, name in FOR_NEURONS
            place = "both" if heads and neurons else "heads" if heads else "neurons"
            yield Arm(f"static_{name}", place, 0.5)
        for method in (*SINGLE, "static", "oracle", "predicted"):
            arm = Arm(method, "neurons", 0.5)
            if method in SINGLE or "neurons" not in places or 0.5 not in judged.sparsities:
                yield arm


class Decider:
    """Scores and masks of every method for batches of rows; neurons are in the order of blocks."""

    def __init__(self, model: Model, config: Any, workdir: Path, order: np.ndarray):
        self.model, self.config, self.order = model, config, order
        loaded = model.loaded
        self.predictors = {
            variant: shadow_predictor.load(workdir / name, loaded.config, model.sha256)
            for variant, name in FOLDERS.items()
        }
        self.dejavu = {name: load_dejavu(workdir / file) for name, file in DEJAVU.items()}
        samples = load_samples(config, model.tokenizer)
        self.pooled = pooled(workdir / "traces", samples, config.collect.part)
        self.samples = [sample.text for sample in samples if not sample.heldout]
        self.oracle: Mask | None = None  # heads [N, L, H'], neurons one by one [N, L, F]
        self._limits: dict[tuple[str, float], Any] = {}
        self._values: dict[str, Any] = {}
        self.single = dataclasses.replace(
            model.sizes, block=1, blocks=model.sizes.blocks * model.sizes.block
        )

    def nll(self, arm: Arm, batch: masked.Batch, signal: dict[str, Any]):
        """Nats per token [B, T], and the shares of rows that keep each head and block."""
        params, config = self.model.loaded.params, self.model.loaded.config
        if arm.method in shadow_rivals.PLACES:
            limits = self._thresholds(arm)
            kept = [np.array(1 - share) for share in arm.shares]  # by the quantile it was set to
            return masked.thresholded_nll(params, config, batch, limits), kept
        mask, sizes = self.mask(arm, batch, signal)
        first = sizes.first
        real = slice(0, len(batch.rows))
        shares = [np.asarray(m)[real, first:].mean(0) for m in (mask.heads, mask.blocks)]
        return masked.masked_nll(params, config, batch, mask, sizes), shares

    def mask(self, arm: Arm, batch: masked.Batch, signal: dict[str, Any]) -> tuple[Mask, Sizes]:
        """Bool [B, L, units] of a batch, and of which units."""
        sizes, count = self.model.sizes, len(batch.tokens_BT)
        if arm.method == "dense":
            full = full_mask(sizes)
            return jax.tree.map(lambda m: jnp.broadcast_to(m, (count, *m.shape)), full), sizes
        sizes = self.single if arm.method in SINGLE else sizes
        return select(self._scores(arm, batch, signal), sizes, arm.shares, arm.budget), sizes

    def _scores(self, arm: Arm, batch: masked.Batch, signal: dict[str, Any]) -> Mask:
        method, sizes, count = arm.method, self.model.sizes, len(batch.tokens_BT)
        if method in ("predicted", "predicted_per_layer"):
            variant = "unified" if method == "predicted" else "per_layer_normalised"
            return shadow_predictor.predict(
                self.predictors[variant].params, signal["context"], sizes
            )
        if method in self.dejavu:
            return shadow_dejavu.predict(self.dejavu[method], signal, self.order, sizes)
        if method.startswith("oracle"):
            assert self.oracle is not None
            rows = np.zeros(count, int)
            rows[: len(batch.rows)] = batch.rows
            heads, neurons = self.oracle.heads[rows], self.oracle.blocks[rows]
            return Mask(heads, neurons if method in SINGLE else _summed(neurons, sizes))
        if method == "random":
            draws = [np.random.default_rng([7, row]) for row in (*batch.rows, *range(count))]
            shapes = [(sizes.num_layers, n) for n in (sizes.heads, sizes.blocks)]
            return Mask(*(np.stack([d.random(s) for d in draws[:count]]) for s in shapes))
        if method == "griffin":
            heads = np.zeros((count, sizes.num_layers, sizes.heads))
            return Mask(heads, _summed(np.swapaxes(signal["griffin"], 0, 1), sizes))
        return self._static(method, count)

    def _static(self, method: str, count: int) -> Mask:
        t = self.config.train
        names = (t.heads, t.neurons)
        if method.removeprefix("static_") in CRITERIA:
            name = method.removeprefix("static_")
            # Of a criterion of one kind only, the other kind is not pruned: any score will do.
            names = (
                name if name in FOR_HEADS else t.heads,
                name if name in FOR_NEURONS else t.neurons,
            )
        if method == "static_single":
            flat = self.pooled.mean(f"neurons/{names[1]}")
            singles = shadow_dejavu.in_blocks(flat, self.order, self.single)
            whole = static_scores(self.pooled, names, self.order, self.model)
            static = Mask(whole.heads, singles)
        else:
            static = static_scores(self.pooled, names, self.order, self.model)
        return jax.tree.map(lambda m: np.broadcast_to(m, (count, *m.shape)), static)

    def measure_oracle(self, pairs, gold, item, path: Path) -> None:
        """The true scores of every row; of a question those of its right answer, for all its rows.

        Read back if `path` has them.
        """
        if path.exists():
            with np.load(path) as arrays:
                self.oracle = Mask(arrays["heads"], arrays["neurons"].astype(np.float32))
            return
        t, loaded, sizes = self.config.train, self.model.loaded, self.model.sizes
        asked = Asked(tuple(dict.fromkeys((t.heads, t.neurons))))
        chosen = range(len(pairs)) if gold is None else gold
        slots = -(-max(sum(map(len, pairs[row])) for row in chosen) // 64) * 64
        heads, neurons = [], []
        for row in chosen:
            prompt, rest = pairs[row]
            tokens = np.array([*prompt, *rest], np.int32)
            text = Text(tokens, np.arange(len(tokens)) >= len(prompt), len(prompt))
            width = min(slots, -(-len(tokens) // 64) * 64)
            one = jax.device_get(measure(loaded.params, loaded.config, text, asked, width))
            of_heads = one["heads"][t.heads]
            heads.append(of_heads.reshape(sizes.num_layers, sizes.heads, -1).sum(-1))
            neurons.append(one["neurons"][t.neurons])
        back = slice(None) if item is None else item
        found = Mask(np.stack(heads)[back], np.stack(neurons)[back])
        with open(path.with_suffix(".part"), "wb") as file:
            np.savez(file, heads=found.heads, neurons=found.blocks)
        path.with_suffix(".part").replace(path)
        self.oracle = found

    def _thresholds(self, arm: Arm) -> dict[str, jax.Array]:
        key = (arm.method, arm.sparsity)
        if key not in self._limits:
            if arm.method not in self._values:
                self._values[arm.method] = self._calibrated(arm.method)
            found = shadow_rivals.thresholds(self._values[arm.method], arm.sparsity)
            self._limits[key] = jax.tree.map(jnp.asarray, found)
        return self._limits[key]

    def _calibrated(self, rule: str) -> dict[str, np.ndarray]:
        """Absolute values of some training texts at a rule's places, every few tokens."""
        loaded = self.model.loaded
        texts = self.samples[: self.config.evaluate.calibration_texts]
        width = min(64, *(len(text.tokens) for text in texts))
        tokens = np.stack([text.tokens[:width] for text in texts])
        values = shadow_rivals.sizes_at(loaded.params, loaded.config, jnp.asarray(tokens), rule)
        return {place: np.asarray(v)[:, :, 1::4] for place, v in values.items()}


def _summed(neurons_BLF: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Neurons that are in order already, by block."""
    shape = (*neurons_BLF.shape[:-1], sizes.blocks, sizes.block)
    return neurons_BLF.reshape(shape).sum(-1)
