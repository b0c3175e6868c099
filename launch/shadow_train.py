"""`launch.shadow --stage=train`: order, predictors and DejaVu's, measured on held-out texts."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from launch.shadow_collect import SECTIONS as COLLECTED
from launch.shadow_collect import pooled
from launch.shadow_data import Model, Sample, claim, identity, load_model, load_samples
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import atomic
from moejax.methods import shadow_dejavu, shadow_metrics, shadow_predictor, shadow_traces
from moejax.methods.shadow_coactivation import coactivation_order, explained
from moejax.methods.shadow_dejavu import DejavuConfig, in_blocks
from moejax.methods.shadow_mask import Mask, num_kept
from moejax.methods.shadow_predictor import Predictor, PredictorInfo
from moejax.methods.shadow_scores import FOR_HEADS, FOR_NEURONS
from moejax.methods.shadow_training import FitConfig, fit
from moejax.models.masked import one_neuron_shape
from moejax.ops.sparse_matmul import MIN_TPU_COPY

FOLDERS = {
    "unified": "predictor",
    "per_layer_normalised": "predictor_per_layer",
    "token": "predictor_token",
}
# DejaVu's, as wide as published and with as many parameters in all as the unified predictor.
DEJAVU = {"dejavu": "predictor_dejavu", "dejavu_equal": "predictor_dejavu_equal"}
SECTIONS = (*COLLECTED, "mask", "train")


@dataclasses.dataclass(frozen=True)
class Collected:
    """What was collected, of the texts in the order of `load_samples`."""

    samples: list[Sample]
    folder: Path
    context_NE: np.ndarray
    heads_NLH: np.ndarray
    neurons_NLF: np.ndarray
    pooled: shadow_traces.Pooled

    @property
    def train(self) -> np.ndarray:
        """bool [N]."""
        return np.array([not sample.heldout for sample in self.samples])


def main(values: dict[str, Any]) -> None:
    """Trains what is missing of RUN and measures it."""
    config = values["config"]
    check_criteria(config)
    model = load_model(config)
    samples = load_samples(config, model.tokenizer)
    params = tree.num_params(model.loaded.params)
    hidden = shadow_predictor.hidden_within(
        model.loaded.config, model.sizes, config.train.share, params
    )
    print(f"predictor {hidden} wide, at most {config.train.share:.2%} of {params:,} parameters")
    copied = model.sizes.block * model.loaded.config.d_model * 2
    print(
        f"blocks   of {model.sizes.block} neurons, {copied / 1024:.0f} KiB of a matrix in bfloat16"
        + (": for a TPU take 64 KiB or more (mask.block)" if copied < MIN_TPU_COPY else "")
    )
    if values["dry_run"]:
        print("dry run: nothing trained, nothing written")
        return
    workdir = Path(values["workdir"])
    claim(workdir / "traces", "collect.json", identity(config, COLLECTED, model), samples)
    claim(workdir, "train.json", identity(config, SECTIONS, model), samples)
    got = collected(workdir / "traces", samples, config, model)
    order = _order(workdir / "order.npy", got, model, config)
    targets = in_units(got, order, model)
    report: dict[str, Any] = {"params": params, "hidden": hidden, "train": int(got.train.sum())}
    for variant, name in FOLDERS.items():
        began = time.perf_counter()
        if not (workdir / name / shadow_predictor.INFO).exists():
            made = _fit(variant, got, targets, order, (model, config, hidden))
            shadow_predictor.save(workdir / name, made)
        made = shadow_predictor.load(workdir / name, model.loaded.config, model.sha256)
        count = shadow_predictor.num_params(made.params)
        found = shadow_predictor.predict(made.params, got.context_NE[~got.train], model.sizes)
        report[variant] = {"params": count, "share": count / params}
        report[variant] |= _measured(found, targets, got, model)
        _say(variant, report[variant], began)
    for name, folder in DEJAVU.items():
        began = time.perf_counter()
        if not (workdir / folder / shadow_predictor.INFO).exists():
            budget = report["unified"]["params"]
            made = _fit_dejavu(name, got, order, (model, config, budget))
            shadow_predictor.save(workdir / folder, made)
        made = shadow_predictor.load(workdir / folder, model.loaded.config, model.sha256)
        report[name] = _measured_dejavu(made.params, got, targets, order, model)
        report[name]["share"] = report[name]["params"] / params
        _say(name, report[name], began)
    atomic.write_json(workdir / "heldout.json", report)
    names = ", ".join((*FOLDERS.values(), *DEJAVU.values()))
    print(f"written  {workdir}/heldout.json, {names}, order.npy")


def check_criteria(config) -> None:
    """InputError unless what is to be predicted is defined there and collected per text."""
    for part, table in (("heads", FOR_HEADS), ("neurons", FOR_NEURONS)):
        name = config.train[part]
        able = [n for n in table if table[n] != "curvature" and n in config.collect.criteria]
        if name not in able:
            raise InputError(
                f"train.{part} {name!r} has no scores of {part} per text: use one of "
                f"{', '.join(able)}"
            )


def collected(folder: Path, samples: list[Sample], config, model: Model) -> Collected:
    """Reads RUN/traces; InputError unless all texts are there."""
    total = pooled(folder, samples, config.collect.part)
    heads = f"heads/{config.train.heads}"
    arrays = shadow_traces.read_parts(folder, ["text", "context", heads])
    if len(arrays["text"]) != len(samples):
        raise InputError(
            f"{folder} has {len(arrays['text'])} of {len(samples)} texts: run --stage=collect to "
            "its end"
        )
    per_unit = model.loaded.config.num_heads // model.sizes.heads
    grouped = arrays[heads].reshape(*arrays[heads].shape[:2], -1, per_unit).sum(-1)
    neurons = shadow_traces.neurons(folder, config.train.neurons)
    return Collected(samples, folder, arrays["context"], grouped, neurons, total)


def _order(path: Path, got: Collected, model: Model, config) -> np.ndarray:
    """Neurons' order, made of the training texts; read back if it was made before."""
    shape = one_neuron_shape(model.loaded.config)
    plain = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), (model.sizes.num_layers, *shape))
    if config.train.order == "none":
        return plain.copy()
    if config.train.order != "coactivation":
        raise InputError(f"train.order {config.train.order!r} is unknown: coactivation or none")
    if path.exists():
        return atomic.read_npy(path)
    began, block = time.perf_counter(), model.sizes.block
    scores = got.neurons_NLF[got.train].reshape(-1, *plain.shape)
    order, share, before = plain.copy(), [], []
    for at in np.ndindex(*plain.shape[:-1]):
        of_layer = scores[(slice(None), *at)]
        order[at] = coactivation_order(of_layer, block)
        share.append(explained(of_layer, order[at], block))
        before.append(explained(of_layer, plain[at], block))
    with open(path.with_suffix(".part"), "wb") as file:
        np.save(file, order)
    path.with_suffix(".part").replace(path)
    print(
        f"order    variance over texts that blocks of {block} keep: {np.mean(share):.3f}, as the "
        f"model came {np.mean(before):.3f} ({time.perf_counter() - began:.0f} s)"
    )
    return order


def read_order(workdir: Path, config, model: Model) -> np.ndarray:
    """The order of neurons that training made; InputError if it has not run."""
    if config.train.order == "none":
        shape = one_neuron_shape(model.loaded.config)
        plain = np.arange(shape[-1], dtype=np.int32)
        return np.broadcast_to(plain, (model.sizes.num_layers, *shape)).copy()
    if not (workdir / "order.npy").exists():
        raise InputError(f"{workdir}/order.npy is missing: run --stage=train first")
    return atomic.read_npy(workdir / "order.npy")


def in_units(got: Collected, order: np.ndarray, model: Model) -> Mask:
    """Every text's true scores by unit: [N, L, heads] and [N, L, blocks]."""
    return Mask(got.heads_NLH, in_blocks(got.neurons_NLF, order, model.sizes))


def static_scores(pool: shadow_traces.Pooled, criterion: tuple[str, str], order, model) -> Mask:
    """Mean scores over texts, by unit, of (heads' criterion, neurons' criterion)."""
    heads = pool.mean(f"heads/{criterion[0]}")
    heads = heads.reshape(len(heads), model.sizes.heads, -1).sum(-1)
    return Mask(heads, in_blocks(pool.mean(f"neurons/{criterion[1]}"), order, model.sizes))


def _fit(variant: str, got: Collected, targets: Mask, order, rest) -> Predictor:
    model, config, hidden = rest
    t = config.train
    token = variant == "token"
    how = FitConfig(
        *(hidden, t.token_epochs if token else t.epochs, t.batch_size, t.lr, t.weight_decay),
        config.data.seed,
        rows=config.collect.rows if token else 1,
    )

    def progress(epoch, loss, held):
        if (epoch + 1) % max(1, how.epochs // 4) == 0:
            print(
                f"{variant} epoch {epoch + 1}: loss {loss:.3f}, of unseen {held:.3f} (static 1)",
                flush=True,
            )

    if token:
        context, mine = _token_rows(got, order, model)
    else:
        context = got.context_NE[got.train]
        mine = Mask(targets.heads[got.train], targets.blocks[got.train])
    params = fit(context, mine, model.sizes, variant, how, progress)
    criterion = t.heads if t.heads == t.neurons else f"{t.heads}+{t.neurons}"
    about = "labels of dejavu" if token else criterion, variant, hidden
    return _predictor(params, about, got, order, (model, config))


def _predictor(params, about: tuple[str, str, int], got: Collected, order, rest) -> Predictor:
    """What is saved of a network. about: what it predicts, its variant, its width."""
    model, config = rest
    static = static_scores(got.pooled, (config.train.heads, config.train.neurons), order, model)
    fields = shadow_predictor.fields_of(model.loaded.config)
    info = PredictorInfo(
        model.sha256, fields, model.sizes, *about, num_examples=int(got.train.sum())
    )
    return Predictor(info, params, order, static)


def _token_rows(got: Collected, order: np.ndarray, model: Model) -> tuple[np.ndarray, Mask]:
    """What "token" learns from: contexts [N * R, E], and what the token itself uses."""
    sizes = model.sizes
    context = shadow_traces.read_parts(got.folder, ["rows/context"])["rows/context"][got.train]
    heads = shadow_traces.row_labels(got.folder, "heads", model.loaded.config.num_heads)[got.train]
    of_neurons = shadow_traces.row_labels(got.folder, "neurons", got.neurons_NLF.shape[-1])
    blocks = [
        in_blocks(np.swapaxes(text, 0, 1), order, sizes).astype(np.float32) / sizes.block
        for text in of_neurons[got.train]
    ]
    per_unit = heads.shape[-1] // sizes.heads
    heads = np.swapaxes(heads, 1, 2).reshape(-1, sizes.num_layers, sizes.heads, per_unit)
    flat = context.reshape(-1, context.shape[-1]).astype(np.float32)
    return flat, Mask(heads.mean(-1, dtype=np.float32), np.concatenate(blocks))


def _measured(predicted: Mask, targets: Mask, got: Collected, model: Model) -> dict[str, Any]:
    """Means over held-out texts per layer, with those over layers that are pruned."""
    found: dict[str, Any] = {}
    for part in ("heads", "blocks"):
        truth = np.asarray(getattr(targets, part))
        static = truth[got.train].mean(0)
        keep = num_kept(truth.shape[-1], 0.5)
        guess = np.asarray(getattr(predicted, part))
        table = shadow_metrics.held_out(guess, truth[~got.train], static, keep)
        sources = [sample.source for sample in got.samples if sample.heldout]
        table["gain_in_source"] = shadow_metrics.gain_within(guess, truth[~got.train], sources)
        first = model.sizes.first
        found[part] = {name: float(v[:, first:].mean()) for name, v in table.items()}
        found[part]["per_layer"] = {name: v.mean(0).tolist() for name, v in table.items()}
        found[part]["per_text"] = {n: v[:, first:].mean(1).tolist() for n, v in table.items()}
    return found


def _rows(got: Collected, part: str, heldout: bool) -> np.ndarray:
    """What enters attention or the feed-forward layer, float16 [L, N, R, D] of these texts."""
    name = f"rows/{shadow_dejavu.INPUT[part]}"
    array = shadow_traces.read_parts(got.folder, [name])[name]
    return np.swapaxes(array[~got.train if heldout else got.train], 0, 1)


def _labels(got: Collected, part: str, count: int, heldout: bool) -> np.ndarray:
    """Which of so many units each row uses, bool [L, N, R, count]."""
    labels = shadow_traces.row_labels(got.folder, part, count)
    return np.swapaxes(labels[~got.train if heldout else got.train], 0, 1)


def _flat(array_LNRU: np.ndarray) -> np.ndarray:
    """All texts' rows behind each other, [L, N * R, U]."""
    return array_LNRU.reshape(len(array_LNRU), -1, array_LNRU.shape[-1])


def _fit_dejavu(name: str, got: Collected, order: np.ndarray, rest) -> Predictor:
    model, config, budget = rest
    shape = model.loaded.config
    units = {"heads": shape.num_heads, "neurons": got.neurons_NLF.shape[-1]}
    hidden, epochs = config.train.dejavu_hidden, (config.train.dejavu_epochs,) * 2
    if name == "dejavu_equal":
        epochs = config.train.dejavu_equal_epochs
        hidden = shadow_dejavu.hidden_within(
            budget, shape.num_layers, shape.d_model, sum(units.values())
        )
    params: dict[str, Any] = {}
    for part, num_epochs in zip(units, epochs, strict=True):
        how = DejavuConfig(hidden, num_epochs, config.train.dejavu_batch, seed=config.data.seed)
        rows, unseen = (
            [_flat(x) for x in (_rows(got, part, held), _labels(got, part, units[part], held))]
            for held in (False, True)
        )
        began = time.perf_counter()

        def progress(epoch, loss, params, part=part, how=how, unseen=unseen, began=began):
            if (epoch + 1) % max(1, how.epochs // 5) == 0:
                held = shadow_dejavu.loss_of(params, unseen[0], unseen[1], part)
                each = (time.perf_counter() - began) / (epoch + 1)
                print(
                    f"{name} {part} epoch {epoch + 1}: loss {loss:.4f}, of unseen {held:.4f}, "
                    f"{each * (how.epochs - epoch - 1) / 60:.0f} min left",
                    flush=True,
                )

        params[part] = shadow_dejavu.fit(rows[0], rows[1], part, how, progress)
    about = "labels of dejavu", shadow_predictor.PER_LAYER, hidden
    return _predictor(params, about, got, order, (model, config))


def _measured_dejavu(params, got: Collected, targets: Mask, order, model: Model):
    """Judged as the others are, by the prompt's last token: the first row of each text."""
    inputs = {
        place: _rows(got, part, True)[:, :, 0].astype(np.float32)
        for part, place in shadow_dejavu.INPUT.items()
    }
    predicted = jax.device_get(shadow_dejavu.predict(params, inputs, order, model.sizes))
    return {"params": tree.num_params(params)} | _measured(predicted, targets, got, model)


def _say(name: str, found: dict[str, Any], began: float) -> None:
    parts = [
        f"{part}: Spearman {m['spearman']:.3f} (static {m['static_spearman']:.3f}), best half "
        f"{m['overlap']:.3f} ({m['static_overlap']:.3f}), gain {m['gain']:+.3f} (in a source "
        f"{m['gain_in_source']:+.3f})"
        for part, m in ((part, found[part]) for part in ("heads", "blocks"))
    ]
    print(
        f"{name:9} {found['params']:,} parameters ({found['share']:.2%}); {'; '.join(parts)} "
        f"({time.perf_counter() - began:.0f} s)",
        flush=True,
    )
