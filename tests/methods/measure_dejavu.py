"""What DejaVu's predictors gain from being trained as published, layer by layer.

    python -m tests.methods.measure_dejavu collect RUN OUT  # 400,000 tokens, 29 GB, all layers
    python -m tests.methods.measure_dejavu train RUN OUT LAYER [LAYER ...]
    python -m tests.methods.measure_dejavu judge RUN OUT

RUN is one of configs/shadow/smollm2.py that is trained: its predictors learned from 32,640 tokens
in batches of 256 for 10 epochs, narrow ones' heads for 60, in three hours. Published are 400,000
tokens (here all but the first of each text, of the same sources in the same shares; never of texts
that RUN held out), batches of 1,024 and 20 epochs: a quarter of an hour for each layer on two
cores. Layers' predictors do not depend on each other, so some layers tell what all would. They are
held against RUN's own on the tokens of RUN's held-out texts (what the network lowers, and which
share of the units that a token uses is in the better half that it names), and on the windows of
WikiText-2 test with these layers alone pruned. The first two go on where they stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.shadow.smollm2 import get_config
from launch import shadow_data as data
from launch.shadow_train import DEJAVU
from moejax.core.errors import InputError
from moejax.evals import bootstrap, masked
from moejax.io import atomic
from moejax.methods import shadow_dejavu, shadow_predictor, shadow_traces
from moejax.methods.shadow_measure import Text, slots_for
from moejax.methods.shadow_order import reordered
from moejax.models.inserted import Inserted
from moejax.models.masked import seen_of
from moejax.models.transformer import ForwardOptions, forward

TOKENS, BATCH, EPOCHS = 400_000, 1024, 20
PARTS = ("heads", "neurons")
ROWS = 8  # texts of a batch
DONE = "rows.json"


def texts_of(config: Any, model: data.Model) -> list[Text]:
    """Texts of TOKENS tokens, in RUN's shares of its sources, without those that it held out."""
    draw, sources, found, total = np.random.default_rng(config.data.seed), {}, [], 0
    for name in config.data.texts:
        sources[name] = enumerate(data._texts(name, config, model.tokenizer, draw))
    while total < TOKENS:
        drawn = 0
        for name, wanted in config.data.texts.items():
            held = range(wanted - round(config.data.heldout_share * wanted), wanted)
            for at, text in itertools.islice(sources[name], wanted // 100):
                drawn += 1
                if at not in held:
                    found.append(text)
                    total += len(text.tokens) - 1
        if not drawn:
            raise InputError(f"the sources hold {total:,} tokens, not {TOKENS:,}")
    return sorted(found, key=lambda text: len(text.tokens))


@functools.partial(jax.jit, static_argnames="config")
def _rows(params, config, tokens_BT, segments_BT) -> dict[str, jax.Array]:
    """What RUN/traces has of some tokens (`shadow_traces`), of all: [L, B, T, ...]."""
    inserted = Inserted(
        heads=lambda part, x: (x, jnp.linalg.norm(x, axis=-1)),
        neurons=lambda part, a: (a, jnp.abs(a)),
        attn_in=lambda part, x: (x, x.astype(jnp.float16)),
        mlp_in=lambda part, x: (x, x.astype(jnp.float16)),
    )
    options = ForwardOptions(attention="dense")
    out = forward(
        params, config, tokens_BT, segment_ids_BT=segments_BT, options=options, inserted=inserted
    )
    return seen_of(config, out.seen)


def collect(model: data.Model, config: Any, out: Path) -> None:
    """Writes OUT/PLACE_LL.npy, [tokens, ...] of every place and layer, as RUN/traces has them."""
    texts, shape = texts_of(config, model), model.loaded.config
    total = sum(len(text.tokens) - 1 for text in texts)
    widths = {"attn_in": (np.float16, shape.d_model), "mlp_in": (np.float16, shape.d_model)}
    widths |= {
        "heads": (np.uint8, -(-shape.num_heads // 8)),
        "neurons": (np.uint8, shape.d_ff // 8),
    }
    out.mkdir(parents=True, exist_ok=True)
    done = atomic.read_json(out / DONE) if (out / DONE).exists() else {"texts": 0, "rows": 0}
    arrays = {
        (name, layer): np.lib.format.open_memmap(
            _path(out, name, layer), "r+" if done["texts"] else "w+", dtype, (total, width)
        )
        for name, (dtype, width) in widths.items()
        for layer in range(shape.num_layers)
    }
    began, first = time.perf_counter(), done["rows"]
    for start in range(done["texts"], len(texts), ROWS):
        some = [text.tokens for text in texts[start : start + ROWS]]
        slots = slots_for(max(map(len, some)), config.data.slots)
        tokens, segments = np.zeros((2, ROWS, slots), np.int32)
        for row, ids in enumerate(some):
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        seen = jax.device_get(_rows(model.loaded.params, shape, tokens, segments))
        real = segments.astype(bool)
        real[:, 0] = False
        end = done["rows"] + int(real.sum())
        for name in widths:
            for layer, values in enumerate(seen[name]):
                mine = values[real]
                if name in PARTS:
                    mine = np.packbits(shadow_dejavu.labels(mine, False), axis=-1)
                arrays[name, layer][done["rows"] : end] = mine
        done = {"texts": start + ROWS, "rows": end, "total": total}
        if start // ROWS % 16 == 15 or end == total:
            for array in arrays.values():
                array.flush()
            atomic.write_json(out / DONE, done)
            left = (time.perf_counter() - began) / (end - first) * (total - end)
            print(f"collect  {end:,}/{total:,} tokens, {left / 60:.0f} min left", flush=True)


def _path(out: Path, name: str, layer: int) -> Path:
    return out / f"{name}_{layer:02d}.npy"


def train(model: data.Model, config: Any, run: Path, out: Path, layers: list[int]) -> None:
    """Trains what OUT has not of these layers, and says what it and RUN's are worth."""
    if not (out / DONE).exists() or (d := atomic.read_json(out / DONE))["rows"] < d["total"]:
        raise InputError(f"{out} is not complete: run collect to its end")
    runs = {name: _load(model, run / folder) for name, folder in DEJAVU.items()}
    heldout = np.array([s.heldout for s in data.load_samples(config, model.tokenizer)])
    for layer, (name, of_run), part in itertools.product(layers, runs.items(), PARTS):
        path = out / f"{name}_{part}_{layer:02d}.npz"
        unseen = _heldout(run, heldout, part, layer, model)
        if not path.exists():
            inputs = np.load(_path(out, shadow_dejavu.INPUT[part], layer))[None]
            bits = np.load(_path(out, part, layer))[None]
            labels = np.unpackbits(bits, axis=-1, count=unseen[1].shape[-1]).view(bool)
            hidden = of_run.params[part]["w_1"].shape[-1]
            how = shadow_dejavu.DejavuConfig(hidden, EPOCHS, BATCH, seed=config.data.seed)
            held, began = [], time.perf_counter()

            def say(epoch, loss, params, part=part, unseen=unseen, held=held, began=began):
                held.append(shadow_dejavu.loss_of(params, *unseen, part))
                each = (time.perf_counter() - began) / (epoch + 1)
                print(
                    f"  {part} epoch {epoch + 1}: loss {loss:.4f}, of unseen {held[-1]:.4f}, "
                    f"{each * (EPOCHS - epoch - 1) / 60:.0f} min left",
                    flush=True,
                )

            found = shadow_dejavu.fit(inputs, labels, part, how, say)
            found["unseen"] = np.array(held)
            atomic.write_npz(path, found)
        mine = atomic.read_npz(path)
        first = mine.pop("unseen")[0]
        theirs = {n: w[layer][None] for n, w in of_run.params[part].items()}
        figures = [_worth(p, unseen, part, layer, of_run, model) for p in (theirs, mine)]
        print(
            f"layer {layer:2} {name:12} {part:7} as in the study: "
            f"{figures[0]}; as published: {figures[1]} (loss after one epoch {first:.4f})",
            flush=True,
        )


def _load(model: data.Model, folder: Path) -> shadow_predictor.Predictor:
    return shadow_predictor.load(folder, model.loaded.config, model.sha256)


def _heldout(run: Path, heldout: np.ndarray, part: str, layer: int, model: data.Model):
    """Inputs [1, R, D] and labels [1, R, U] of a layer, of RUN's held-out texts."""
    shape = model.loaded.config
    units = shape.num_heads if part == "heads" else shape.d_ff
    found: dict[str, list[np.ndarray]] = {"in": [], "labels": []}
    for path in shadow_traces.parts(run / "traces"):
        wanted = ("text", f"rows/{shadow_dejavu.INPUT[part]}", f"rows/{part}")
        arrays = atomic.read_npz(path, wanted.__contains__)
        mine = heldout[arrays["text"]]
        for of, place in zip(found.values(), wanted[1:], strict=True):
            of.append(arrays[place][mine, layer])
    inputs, bits = (np.concatenate(x).reshape(1, -1, x[0].shape[-1]) for x in found.values())
    return inputs, np.unpackbits(bits, axis=-1, count=units).view(bool)


def _worth(params, unseen, part: str, layer: int, of_run, model: data.Model) -> str:
    """Loss; of the units that a token uses, the share in the better half, of blocks and singly."""
    inputs, used = unseen
    logits = inputs[0].astype(np.float32) @ params["w_1"][0] @ params["w_2"][0]
    scores, used = 1 / (1 + np.exp(-logits)), used[0]
    sizes, said = model.sizes, f"{shadow_dejavu.loss_of(params, *unseen, part):.4f}"
    counts = {"singly": scores.shape[-1]}
    if part == "neurons":
        counts["in blocks"] = sizes.blocks
        index = shadow_dejavu.in_order(of_run.order_LF, sizes)[layer]
        scores, used = scores[:, index], used[:, index]
    for name, count in counts.items():
        units = scores.reshape(len(scores), count, -1).sum(-1)
        keep = -(-count // 2)
        least = np.partition(units, -keep, axis=-1)[:, -keep, None]
        kept = np.repeat(units >= least, scores.shape[-1] // count, axis=-1)
        said += f", {name} {(kept & used).sum() / used.sum():.4f}"
    return said


def judge(model: data.Model, config: Any, run: Path, out: Path) -> None:
    """Nats per token of the windows where the layers that are trained in OUT alone are pruned."""
    pairs = data.pairs_of(data.load_windows(config, model.tokenizer))
    batches = masked.batches(pairs, config.evaluate.batch_tokens)
    counts, shape = np.array([len(rest) for _, rest in pairs]), model.loaded.config
    for name, folder in DEJAVU.items():
        of_run = _load(model, run / folder)
        there = [set(_trained(out, name, part)) for part in PARTS]
        layers = sorted(there[0] & there[1])
        if not layers:
            raise InputError(f"{out} has no layer of {name} of which both parts are trained")
        params = reordered(model.loaded.params, shape, of_run.order_LF)
        arms = {"study": of_run.params, "published": _with(of_run.params, out, name, layers)}
        found = {}
        for at, sparsity in itertools.product(arms, config.evaluate.sparsities):
            nats = np.zeros(len(pairs))
            for batch in batches:
                read = masked.read_prompts(params, shape, batch)
                how = arms[at], of_run.order_LF, model.sizes, (sparsity, sparsity)
                nats[list(batch.rows)] = _nats(params, shape, batch, read, how, layers)
            found[at, sparsity] = nats
        print(f"{name}, layers {', '.join(map(str, layers))} alone pruned:")
        for sparsity in config.evaluate.sparsities:
            a, b = found["published", sparsity], found["study", sparsity]
            d = bootstrap.paired_ratio(a, b, counts)
            perplexity = [float(np.exp(x.sum() / counts.sum())) for x in (b, a)]
            print(
                f"  {sparsity:.0%}: perplexity {perplexity[0]:.3f} as in the study, "
                f"{perplexity[1]:.3f} as published; nats {d.mean:+.4f} "
                f"[{d.low:+.4f}, {d.high:+.4f}]",
                flush=True,
            )


def _trained(out: Path, name: str, part: str) -> list[int]:
    return [int(path.stem[-2:]) for path in out.glob(f"{name}_{part}_[0-9][0-9].npz")]


def _with(params: Any, out: Path, name: str, layers: list[int]) -> Any:
    """RUN's parameters with those of OUT at these layers."""
    found = {part: {n: np.array(w) for n, w in params[part].items()} for part in PARTS}
    for part, layer in itertools.product(PARTS, layers):
        arrays = atomic.read_npz(out / f"{name}_{part}_{layer:02d}.npz")
        for n, w in found[part].items():
            w[layer] = arrays[n][0]
    return found


def _nats(params, config, batch, read, how, layers: list[int]) -> np.ndarray:
    dejavu, order, sizes, shares = how
    pruned = np.isin(np.arange(sizes.num_layers), layers)
    index = shadow_dejavu.in_order(order, sizes)
    places = batch.rest_BR, batch.length_B
    keep = shadow_dejavu.kept(sizes, shares)
    nats = _deciding(params, config, places, read, (dejavu, index, keep, pruned), sizes)
    return np.asarray(nats, np.float64)[: len(batch.rows)]


@functools.partial(jax.jit, static_argnames=("config", "sizes"))
def _deciding(params, config, places, read, how, sizes):
    dejavu, index_LF, keep, pruned_L = how
    inserted = shadow_dejavu.deciding(dejavu, config, index_LF, sizes, keep)
    (run,) = config.runs
    layers = {run.name: inserted.layers[run.name] | {"pruned": pruned_L}}
    inserted = dataclasses.replace(inserted, layers=layers)
    return masked._nats(params, config, places, read, inserted)


def main(command: str, run: str, out: str, *layers: str) -> None:
    config = get_config()
    model = data.load_model(config)
    if command == "collect":
        collect(model, config, Path(out))
    elif command == "train":
        train(model, config, Path(run), Path(out), [int(layer) for layer in layers])
    elif command == "judge":
        judge(model, config, Path(run), Path(out))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
