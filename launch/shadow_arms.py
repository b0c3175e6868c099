"""What is compared: methods that decide a mask from a prompt, at a sparsity, under a budget."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.shadow_collect import pooled
from launch.shadow_data import Model, Sample, load_samples
from launch.shadow_train import DEJAVU, FOLDERS, static_scores
from moejax.core.errors import InputError
from moejax.evals import masked
from moejax.methods import shadow_dejavu, shadow_predictor, shadow_rivals
from moejax.methods.shadow_mask import BUDGETS, Mask, Sizes, check_sparsity, full_mask, select
from moejax.methods.shadow_measure import Asked, Text, measure, slots_for
from moejax.methods.shadow_scores import CRITERIA, FOR_HEADS, FOR_NEURONS
from moejax.methods.shadow_traces import Pooled
from moejax.report.shadow_plots import METHODS

PLACES = ("both", "heads", "neurons")
# Neurons chosen one by one, not in blocks: GRIFFIN as published, and what blocks cost the others.
SINGLE = ("griffin_single", "static_single", "oracle_single", "dejavu_token_single")
# Asked for the token that it reads: the one that learned from tokens, and the unified one. After
# every token for the next one, as --refresh_every=1 is: both again.
AT_TOKEN = {"predicted_token": "token", "predicted_now": "unified"}
AFTER_TOKEN = {"predicted_each": "unified", "predicted_late": "token"}
# DejaVu's that decide at every token, as published, and whose predictors they are.
PER_TOKEN = {
    "dejavu_token": "dejavu",
    "dejavu_equal_token": "dejavu_equal",
    "dejavu_token_single": "dejavu",
}


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

    Budgets over layers, and training-free rivals at another sparsity than 0.5, are for texts alone.
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
    for budget in judged.budgets if texts else ():
        for method in METHODS:
            yield Arm(method, "both", 0.5, budget)
    yield from _rivals(judged.sparsities, places, texts)
    if texts:
        for name in judged.static_criteria:
            heads, neurons = name in FOR_HEADS, name in FOR_NEURONS
            place = "both" if heads and neurons else "heads" if heads else "neurons"
            yield Arm(f"static_{name}", place, 0.5)
        yield Arm("static_single", "neurons", 0.5)
        yield Arm("oracle_single", "neurons", 0.5)
        if "neurons" not in places or 0.5 not in judged.sparsities:  # what those compare with
            for method in ("static", "oracle", "predicted"):
                yield Arm(method, "neurons", 0.5)


def _rivals(sparsities: Any, places: Any, texts: bool) -> Iterator[Arm]:
    """What decides in another way: at every token, or by thresholds and statistics."""
    everywhere = "predicted_each", "predicted_token", "dejavu_token", "dejavu_equal_token"
    for sparsity in sparsities:
        for place in places:
            for method in everywhere:
                yield Arm(method, place, sparsity)
        yield Arm("dejavu_token_single", "both", sparsity)
        if texts:
            yield Arm("predicted_now", "both", sparsity)
            yield Arm("predicted_late", "both", sparsity)
            yield Arm("dejavu_token_single", "neurons", sparsity)
        if texts or sparsity == 0.5:
            yield Arm("griffin", "neurons", sparsity)
            yield Arm("griffin_single", "neurons", sparsity)
            yield Arm("cats", "neurons", sparsity)
            yield Arm("teal", "both", sparsity)


class Decider:
    """Scores and masks of every method for batches of rows; neurons are in the order of blocks."""

    def __init__(self, model: Model, config: Any, workdir: Path, order: np.ndarray):
        self.model, self.config, self.workdir, self.order = model, config, workdir, order
        self._weights: dict[str, dict[str, Any]] = {}
        self._limits: dict[tuple[str, float], Any] = {}
        self._values: dict[str, Any] = {}
        # Of the batch judged last: arms at other sparsities and places ask for the same.
        self._found: tuple[masked.Read | None, dict[str, Any]] = (None, {})
        self.single = dataclasses.replace(
            model.sizes, block=1, blocks=model.sizes.blocks * model.sizes.block
        )

    @functools.cached_property
    def samples(self) -> list[Sample]:
        """What was collected on."""
        return load_samples(self.config, self.model.tokenizer)

    @functools.cached_property
    def pooled(self) -> Pooled:
        """Sums of scores over training texts."""
        return pooled(self.workdir / "traces", self.samples, self.config.collect.part)

    def load(self) -> None:
        """Reads what any arm may ask for; InputError for what is missing."""
        for name in FOLDERS | DEJAVU:
            self.weights(name)
        assert self.pooled is not None

    def weights(self, name: str) -> dict[str, Any]:
        """Of a predictor of FOLDERS or DEJAVU, read when it is first asked."""
        if name not in self._weights:
            folder, loaded = self.workdir / (FOLDERS | DEJAVU)[name], self.model.loaded
            read = shadow_predictor.load(folder, loaded.config, self.model.sha256)
            self._weights[name] = read.params
        return self._weights[name]

    def _once(self, read: masked.Read, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives for a batch, made when it is first asked for."""
        if self._found[0] is not read:
            self._found = read, {}
        known = self._found[1]
        if name not in known:
            known[name] = make()
        return known[name]

    def read(self, batch: masked.Batch) -> masked.Read:
        """A batch's prompts, read densely."""
        return masked.read_prompts(self.model.loaded.params, self.model.loaded.config, batch)

    def judge(
        self, arm: Arm, batch: masked.Batch, read: masked.Read, oracle: Mask | None
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Nats [B], and the shares of rows that keep each head and block of later layers."""
        params, config = self.model.loaded.params, self.model.loaded.config
        if arm.method in shadow_rivals.PLACES:
            nats = masked.thresholded_nats(params, config, batch, read, self._thresholds(arm))
            return nats, [np.array(1 - share) for share in arm.shares]  # as the quantile was set
        count = len(batch.length_B)
        sizes = self.single if arm.method in SINGLE else self.model.sizes
        if arm.method in PER_TOKEN:
            how = self.weights(PER_TOKEN[arm.method]), self.order, sizes, arm.shares
            keep = shadow_dejavu.kept(sizes, arm.shares)
            kept = [np.array(keep["heads"] / sizes.heads), np.array(keep["neurons"] / sizes.blocks)]
            return masked.deciding_nats(params, config, batch, read, how), kept
        if arm.method == "dense":
            full = full_mask(sizes)
            mask = jax.tree.map(lambda m: jnp.broadcast_to(m, (count, *m.shape)), full)
        else:
            scores = oracle if arm.method.startswith("oracle") else None
            if arm.method in AFTER_TOKEN or arm.method in AT_TOKEN:
                scores = self._of_tokens(arm.method, batch, read)
            elif scores is None:
                scores = self.scores(arm.method, batch, read)
            elif arm.method == "oracle":
                scores = Mask(scores.heads, summed(scores.blocks, sizes))
            mask = select(scores, sizes, arm.shares, arm.budget)
        real = slice(0, len(batch.rows))
        later = (np.asarray(m)[real, ..., sizes.first :, :] for m in (mask.heads, mask.blocks))
        kept = [m.mean(tuple(range(m.ndim - 2))) for m in later]
        return masked.masked_nats(params, config, batch, read, mask, sizes), kept

    def scores(self, method: str, batch: masked.Batch, read: masked.Read) -> Mask:
        """Scores of a method for every row of a batch, [B, L, units]."""
        return self._once(read, method, lambda: self._scores(method, batch, read.signals))

    def _scores(self, method: str, batch: masked.Batch, signal: dict[str, Any]) -> Mask:
        sizes, count = self.model.sizes, len(batch.length_B)
        if method in ("predicted", "predicted_per_layer"):
            variant = "unified" if method == "predicted" else "per_layer_normalised"
            params = self.weights(variant)
            return shadow_predictor.predict(params, signal["context"], sizes)
        if method in DEJAVU:
            return shadow_dejavu.predict(self.weights(method), signal, self.order, sizes)
        if method == "random":
            rows = [*batch.rows, *range(count)][:count]
            draws = [np.random.default_rng([7, row]) for row in rows]
            shapes = [(sizes.num_layers, n) for n in (sizes.heads, sizes.blocks)]
            return Mask(*(np.stack([d.random(s) for d in draws]) for s in shapes))
        if method.startswith("griffin"):
            heads = np.zeros((count, sizes.num_layers, sizes.heads))
            neurons = np.swapaxes(np.asarray(signal["griffin"]), 0, 1)
            return Mask(heads, neurons if method in SINGLE else summed(neurons, sizes))
        return self._static(method, count)

    def _of_tokens(self, method: str, batch: masked.Batch, read: masked.Read) -> Mask:
        """Scores for every token that follows but the last, [B, R - 1, L, units]."""
        loaded = self.model.loaded

        def make() -> Mask:
            context_BTE = self._once(
                read, "contexts", lambda: masked.contexts(loaded.params, loaded.config, batch, read)
            )
            if method in AFTER_TOKEN:
                before_B1E = read.signals["context"][:, None]
                context_BTE = jnp.concatenate([before_B1E, context_BTE[:, :-1]], axis=1)
            params = self.weights((AT_TOKEN | AFTER_TOKEN)[method])
            return shadow_predictor.predict(params, context_BTE, self.model.sizes)

        return self._once(read, method, make)

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

    def oracle(self, batch: masked.Batch, pairs: Any, gold: dict[int, int]) -> Mask:
        """The true scores of every row: heads [B, L, units], neurons one by one [B, L, F].

        gold: per row of a question the one with its right answer, whose scores all of them get:
        this knows the answer, as nothing else that decides a mask does.
        """
        t, loaded, sizes = self.config.train, self.model.loaded, self.model.sizes
        asked = Asked(tuple(dict.fromkeys((t.heads, t.neurons))), self.config.collect.parity)
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for row in {gold.get(row, row) for row in batch.rows}:
            prompt, rest = pairs[row]
            tokens = np.array([*prompt, *rest], np.int32)
            text = Text(tokens, np.arange(len(tokens)) >= len(prompt), len(prompt))
            width = slots_for(len(tokens), loaded.config.max_position, short=16)
            one = jax.device_get(measure(loaded.params, loaded.config, text, asked, width))
            heads = one["heads"][t.heads].reshape(sizes.num_layers, sizes.heads, -1).sum(-1)
            found[row] = heads, one["neurons"][t.neurons]
        rows = [gold.get(row, row) for row in batch.rows]
        rows += rows[:1] * (len(batch.length_B) - len(rows))
        return Mask(*(np.stack([found[row][i] for row in rows]) for i in range(2)))

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
        texts = [sample.text for sample in self.samples if not sample.heldout]
        texts = texts[: self.config.evaluate.calibration_texts]
        width = min(64, *(len(text.tokens) for text in texts))
        tokens = np.stack([text.tokens[:width] for text in texts])
        values = shadow_rivals.sizes_at(loaded.params, loaded.config, jnp.asarray(tokens), rule)
        return {place: np.asarray(v)[:, :, 1::4] for place, v in values.items()}


def summed(neurons_BLF: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Neurons that are in order already, by block."""
    shape = (*neurons_BLF.shape[:-1], sizes.blocks, sizes.block)
    return neurons_BLF.reshape(shape).sum(-1)
