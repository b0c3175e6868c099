"""What predictors gain from 400,000 tokens, as DejaVu's were published: all layers, on a GPU.

    python -m tests.methods.measure_dejavu pack RUN JOB     # what the next one reads, 9 MB
    python -m tests.methods.measure_dejavu judge JOB OUT    # trains and judges: minutes on a GPU
    python -m tests.methods.measure_dejavu compare RUN OUT

RUN is one of configs/shadow/smollm2.py that is evaluated: its predictors learned from 32,640
tokens, DejaVu's in batches of 256 for 10 epochs (narrow ones' heads 60), as two cores have time
for. Published are 400,000 tokens (here all but the first of each text, of the same sources in
the same shares; never of texts that RUN held out), batches of 1,024 and 20 epochs. The token
predictor learns from the same tokens here, so that the two differ in nothing but what they are.
Judged are RUN's windows and questions; dense and RUN's own token predictor are judged again, which
says what another device does to a figure. All layers' rows take 33 GB of the device's memory. What
is judged is not judged again, and nothing is trained again that was trained to its end.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.shadow.smollm2 import get_config
from launch import shadow_data as data
from launch.shadow_arms import Decider, arms_of
from launch.shadow_evaluate import Judged, judge, read, sets_of
from launch.shadow_train import DEJAVU, FOLDERS
from moejax.core.errors import InputError
from moejax.evals import bootstrap
from moejax.io import atomic
from moejax.methods import shadow_dejavu, shadow_predictor
from moejax.methods.shadow_mask import Mask
from moejax.methods.shadow_measure import Text, slots_for
from moejax.methods.shadow_order import reordered
from moejax.methods.shadow_training import FitConfig, fit
from moejax.models.inserted import Inserted
from moejax.models.masked import seen_of
from moejax.models.transformer import ForwardOptions, forward

TOKENS, BATCH, EPOCHS = 400_000, 1024, 20
TOKEN_BATCH, TOKEN_EPOCHS = 256, 10  # of the token predictor, as many steps as RUN's and half more
ROWS, BATCH_TOKENS = 32, 1 << 16  # texts of a batch; tokens of a batch that is judged
SLOTS = 256  # of a text, by which batches of texts are as wide as they need
CONTROLS = ("dense", "predicted_token")
JUDGED = ("dejavu", "dejavu_equal", "dejavu_token", "dejavu_equal_token", "dejavu_token_single")
FIT = "fit.json"  # losses; written when all are trained
FILES = ("wikitext2_test.tokens.txt", "piqa.jsonl", "arc_easy.jsonl")
Rows = dict[str, jax.Array]


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
    return found


def pack(run: Path, job: Path) -> None:
    """Texts as tokens (the standard library is another elsewhere), and what RUN made."""
    config = get_config()
    model = data.load_model(config)
    held = [s.text for s in data.load_samples(config, model.tokenizer) if s.heldout]
    texts = {"train": texts_of(config, model), "heldout": held}
    arrays = {f"{name}/ids": np.concatenate([t.tokens for t in of]) for name, of in texts.items()}
    arrays |= {f"{name}/sizes": np.array([len(t.tokens) for t in of]) for name, of in texts.items()}
    for name in FILES:
        (job / "data").mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(config.data.folder) / name, job / "data" / name)
    shutil.copytree(run / FOLDERS["token"], job / FOLDERS["token"])
    atomic.write_npz(job / "texts.npz", arrays)


def collect(model: data.Model, texts: list[np.ndarray], part: str, order: Any) -> Rows:
    """Of all tokens but each text's first, on the device.

    "inputs" [L, N, D] and "labels" [L, N, U] of a part; of heads also "context" [1, N, E], of
    neurons "blocks" [L, N, M], the share of each that a token uses.
    """
    texts = sorted(texts, key=len)
    total = sum(map(len, texts)) - len(texts)
    index = shadow_dejavu.in_order(order, model.sizes)
    found: Rows = {}
    end = 0
    for start in range(0, len(texts), ROWS):
        some = texts[start : start + ROWS]
        slots = slots_for(max(map(len, some)), SLOTS)
        tokens, segments = np.zeros((2, ROWS, slots), np.int32)
        for row, ids in enumerate(some):
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        wanted = segments.astype(bool)
        wanted[:, 0] = False
        first = np.argsort(~wanted.ravel(), kind="stable")  # tokens that count, then all others
        how = (part, model.loaded.config, model.sizes)
        made = _rows(how, model.loaded.params, tokens, segments, first, index)
        if not found:
            found = {n: jnp.zeros((len(a), total, a.shape[2]), a.dtype) for n, a in made.items()}
        at = np.arange(end, end + len(first))
        end += int(wanted.sum())
        found = _put(found, made, np.where(at < end, at, total).astype(np.int32))
    assert end == total
    return found


@functools.partial(jax.jit, static_argnums=0)
def _rows(how, params, tokens_BT, segments_BT, first, index_LF) -> Rows:
    part, config, sizes = how
    place = shadow_dejavu.INPUT[part]
    see: dict[str, Any] = {place: lambda part, x: (x, x.astype(jnp.float16))}
    see[part] = lambda _, x: (x, x if part == "heads" else jnp.abs(x))
    inserted, options = Inserted(**see), ForwardOptions(attention="dense")
    out = forward(
        params, config, tokens_BT, segment_ids_BT=segments_BT, options=options, inserted=inserted
    )
    seen = seen_of(config, out.seen)

    def flat(x_LBTU: jax.Array) -> jax.Array:
        return x_LBTU.reshape(len(x_LBTU), -1, x_LBTU.shape[-1])[:, first]

    values = seen[part] if part == "neurons" else jnp.linalg.norm(seen[part], axis=-1)
    keep = max(1, round(shadow_dejavu.TOP_SHARE * values.shape[-1]))
    labels = flat(values >= shadow_dejavu._nth(values, keep))
    found = {"inputs": flat(seen[place]), "labels": labels}
    if part == "neurons":
        moved = jnp.take_along_axis(labels, index_LF[:, None], axis=-1)
        shares = moved.reshape(*moved.shape[:-1], sizes.blocks, sizes.block).mean(-1)
        found["blocks"] = shares.astype(jnp.float16)  # of 32: exact
    else:
        found["context"] = flat(seen["heads"].reshape(*values.shape[:-1], -1)[:1])
    return found


@functools.partial(jax.jit, donate_argnums=0)
def _put(into: Rows, rows: Rows, at_N: Any) -> Rows:
    """Rows to their places; past the end: nowhere."""
    return {n: array.at[:, at_N].set(rows[n], mode="drop") for n, array in into.items()}


def train(model: data.Model, config: Any, job: Path, out: Path) -> None:
    """Writes OUT/predictor_dejavu, _dejavu_equal and _token, and OUT/fit.json with their losses."""
    arrays = atomic.read_npz(job / "texts.npz")
    texts = {
        name: np.split(arrays[f"{name}/ids"], np.cumsum(arrays[f"{name}/sizes"])[:-1])
        for name in ("train", "heldout")
    }
    ours = shadow_predictor.load(job / FOLDERS["token"], model.loaded.config, model.sha256)
    order, shape = ours.order_LF, model.loaded.config
    units = shape.num_heads + shape.d_ff
    budget = shadow_predictor.num_params(ours.params)
    equal = shadow_dejavu.hidden_within(budget, shape.num_layers, shape.d_model, units)
    widths = {"dejavu": config.train.dejavu_hidden, "dejavu_equal": equal}
    made: dict[str, Any] = {name: {} for name in widths}
    losses: dict[str, Any] = {}
    for_token: dict[str, Rows] = {name: {} for name in texts}
    for part in shadow_dejavu.INPUT:
        began = time.perf_counter()
        rows = {name: collect(model, of, part, order) for name, of in texts.items()}
        for name, of in rows.items():
            if part == "heads":
                for_token[name] = {"heads": np.asarray(of["labels"])}
            for_token[name] |= {n: np.asarray(of.pop(n)) for n in ("context", "blocks") if n in of}
        labels = rows["train"]["labels"]
        shares = [float(jnp.mean(labels[layer], dtype=jnp.float32)) for layer in range(len(labels))]
        used = f"{min(shares):.4f} to {max(shares):.4f} of units used"
        _say(f"{part}: {labels.shape[1]:,} tokens collected, {used}", began)
        del labels
        for name, hidden in widths.items():
            how = shadow_dejavu.DejavuConfig(hidden, EPOCHS, BATCH, seed=config.data.seed)
            held = losses[f"{name}/{part}"] = []
            with jax.default_matmul_precision("tensorfloat32"):
                made[name][part] = _fit_dejavu(rows, part, how, held)
        del rows
    for name, params in made.items():
        info = dataclasses.replace(ours.info, variant=shadow_predictor.PER_LAYER)
        info = dataclasses.replace(info, hidden=widths[name])
        whole = dataclasses.replace(ours, info=info, params=params)
        shadow_predictor.save(out / DEJAVU[name], whole, overwrite=True)
    losses["predicted_token"] = _fit_token(ours, for_token, model, config, out)
    atomic.write_json(out / FIT, losses)


def _fit_dejavu(rows: dict[str, Rows], part: str, how, held: list[float]) -> Any:
    began, unseen = time.perf_counter(), rows["heldout"]

    def say(epoch: int, loss: float, params: Any) -> None:
        if epoch % 5 and epoch != how.epochs - 1:
            return
        held.append(shadow_dejavu.loss_of(params, unseen["inputs"], unseen["labels"], part))
        words = f"loss {loss:.4f}, of unseen {held[-1]:.4f}"
        _say(f"{how.hidden} wide, {part}, epoch {epoch + 1} of {how.epochs}: {words}", began)

    return shadow_dejavu.fit(rows["train"]["inputs"], rows["train"]["labels"], part, how, say)


def _fit_token(ours, rows: dict[str, Rows], model: data.Model, config, out: Path) -> list[float]:
    """Writes OUT/predictor_token. Squared errors of unseen texts, of RUN's and of its heads and
    blocks; 1 is the static mean's."""
    t, sizes, began = config.train, model.sizes, time.perf_counter()
    context = {name: of["context"][0].astype(np.float32) for name, of in rows.items()}
    scores = {
        name: Mask(*(np.moveaxis(of[n], 1, 0).astype(np.float32) for n in ("heads", "blocks")))
        for name, of in rows.items()
    }
    how = FitConfig(
        *(ours.info.hidden, TOKEN_EPOCHS, TOKEN_BATCH, t.lr, t.weight_decay, config.data.seed),
        rows=BATCH,  # what is held back to choose an epoch lies together
    )

    def say(epoch: int, loss: float, held: float) -> None:
        _say(f"token predictor, epoch {epoch + 1}: loss {loss:.4f}, of held {held:.4f}", began)

    params = fit(context["train"], scores["train"], sizes, "token", how, say)
    shadow_predictor.save(
        out / FOLDERS["token"], dataclasses.replace(ours, params=params), overwrite=True
    )
    found = []
    for network in (ours.params, params):
        errors = []
        for start in range(0, len(context["heldout"]), BATCH):
            at = slice(start, start + BATCH)
            guess = shadow_predictor.predict(network, context["heldout"][at], sizes)
            for part in ("heads", "blocks"):
                truth = getattr(scores["heldout"], part)[at]
                gap = np.square(np.asarray(getattr(guess, part)) - truth)
                errors.append([part, float(gap.sum()), gap.size])
        for part in ("heads", "blocks"):
            mine = [e[1:] for e in errors if e[0] == part]
            spread = np.square(
                getattr(scores["heldout"], part) - getattr(scores["train"], part).mean(0)
            ).mean()
            found.append(sum(e[0] for e in mine) / sum(e[1] for e in mine) / float(spread))
    _say(
        f"squared error of unseen over that of the static mean: {found[0]:.4f} of heads and "
        f"{found[1]:.4f} of blocks of RUN's token predictor, {found[2]:.4f} and {found[3]:.4f} of "
        "the one here",
        began,
    )
    return found


def judge_all(model: data.Model, config: Any, job: Path, out: Path) -> None:
    """OUT/evaluation, as RUN has it; RUN's own token predictor in OUT/control/evaluation."""
    order = shadow_predictor.load(job / FOLDERS["token"], model.loaded.config).order_LF
    params = jax.jit(lambda p: reordered(p, model.loaded.config, order))(model.loaded.params)
    whole = dataclasses.replace(model, loaded=dataclasses.replace(model.loaded, params=params))

    def of_set(one: Judged) -> None:
        for folder, workdir, methods in (
            (out / "control", job, CONTROLS),
            (out, out, ("predicted_token", *JUDGED)),
        ):
            arms = [arm for arm in arms_of(config, one.gold is None) if arm.method in methods]
            decider = Decider(whole, config, workdir, order)
            judge(one, arms, decider, config, folder / "evaluation" / one.name, ranking=False)

    with ThreadPoolExecutor() as pool:  # most of the time goes to compilers
        list(pool.map(of_set, sets_of(config, whole)))


def compare(run: Path, out: Path) -> None:
    """Figures of RUN's predictors and of those in OUT, and paired differences, of whole sets."""
    of_run, here, control = (
        {(n, r["arm"]): r for n, r in read(folder) if r["judged"] == r["total"]}
        for folder in (run, out, out / "control")
    )
    print("RUN's judged again, nats per token (of questions of margin) minus RUN's:")
    for key, record in control.items():
        print(f"  {key[0]:9} {key[1]:36} {_differ(record, of_run[key])}")
    print("trained on 400,000 tokens minus RUN's:")
    for key, record in here.items():
        print(f"  {key[0]:9} {key[1]:36} {_figure(of_run[key])} -> {_figure(record)}"
              f"  {_differ(record, of_run[key])}")  # fmt: skip
    print("token predictor minus DejaVu's, both trained on 400,000 tokens, and as in RUN:")
    for key, record in here.items():
        method, _, rest = key[1].partition("-")
        if method in ("dejavu_token", "dejavu_equal_token"):
            ours = key[0], f"predicted_token-{rest}"
            said = f"{_differ(here[ours], record)}, {_differ(of_run[ours], of_run[key])}"
            print(f"  {key[0]:9} {key[1]:36} {said}")


def _figure(record: dict[str, Any]) -> str:
    if "passed" in record:
        return f"{np.mean(record['passed']):6.1%}"
    return f"{np.exp(sum(record['nats']) / sum(record['counts'])):8.2f}"


def _differ(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Of texts nats per token, of questions the gold answer's margin, with a 95% interval."""
    if "passed" in a:
        d = bootstrap.paired_mean(np.array(a["gold_margin"]), np.array(b["gold_margin"]))
    else:
        d = bootstrap.paired_ratio(
            np.array(a["nats"]), np.array(b["nats"]), np.array(a["counts"], float)
        )
    return f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"


def _say(words: str, began: float) -> None:
    print(f"{words} ({time.perf_counter() - began:.0f} s)", flush=True)


def main(command: str, first: str, second: str) -> None:
    if command in ("pack", "compare"):
        {"pack": pack, "compare": compare}[command](Path(first), Path(second))
        return
    if command != "judge":
        raise SystemExit(__doc__)
    job, out, config = Path(first), Path(second), get_config()
    config.data.folder = str(job / "data")
    config.evaluate.batch_tokens = BATCH_TOKENS
    began = time.perf_counter()
    model = data.load_model(config)
    _say("model", began)
    if not (out / FIT).exists():
        train(model, config, job, out)
    judge_all(model, config, job, out)
    _say("all", began)


if __name__ == "__main__":
    main(*sys.argv[1:])
