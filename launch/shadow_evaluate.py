"""`launch.shadow --stage=evaluate`: perplexity and multiple choice under masks from the prompt."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from launch import shadow_data as data
from launch.shadow_arms import Arm, Decider, arms_of
from launch.shadow_data import Model, identity, load_model
from launch.shadow_train import SECTIONS, read_order
from moejax.evals import masked
from moejax.io import atomic
from moejax.methods.shadow_order import reordered
from moejax.train.folder import claim_folder

WINDOWS = "wikitext"


@dataclasses.dataclass(frozen=True)
class Judged:
    """A set to judge on: rows of (prompt, what is scored), and of multiple choice whose they are.

    item: per row the number of its question, and gold, per question, the number of its right row;
    None for texts.
    """

    name: str
    pairs: list[tuple[list[int], list[int]]]
    item: np.ndarray | None = None
    gold: np.ndarray | None = None


def main(values: dict[str, Any]) -> None:
    """Judges every arm that RUN/evaluation does not have yet."""
    config = values["config"]
    judged = config.evaluate
    model = load_model(config)
    sets = [_windows(config, model), *(_choices(config, model, name) for name in judged.tasks)]
    plan = {one.name: list(arms_of(config, one.name == WINDOWS)) for one in sets}
    for one in sets:
        tokens = sum(len(a) + len(b) for a, b in one.pairs)
        print(f"{one.name:9} {len(one.pairs)} rows, {tokens:,} tokens, {len(plan[one.name])} arms")
    if values["dry_run"]:
        print("dry run: nothing judged, nothing written")
        return
    workdir = Path(values["workdir"])
    claim_folder(workdir, identity(config, SECTIONS, model), "train.json")
    claim_folder(workdir / "evaluation", identity(config, ("evaluate",), model), "evaluate.json")
    order = read_order(workdir, config, model)
    params = jax.jit(lambda p: reordered(p, model.loaded.config, order))(model.loaded.params)
    loaded = dataclasses.replace(model.loaded, params=params)
    model = dataclasses.replace(model, loaded=loaded)
    for one in sets:
        _judge(one, plan[one.name], model, config, (workdir, order))
    print(f"written  {workdir}/evaluation; --stage=report makes tables and plots of it")


def _windows(config, model: Model) -> Judged:
    texts = data.load_windows(config, model.tokenizer)
    return Judged(
        WINDOWS, [(t.tokens[: t.prompt].tolist(), t.tokens[t.prompt :].tolist()) for t in texts]
    )


def _choices(config, model: Model, name: str) -> Judged:
    items = data.load_items(config, name)
    encoding = data.encoding(model)
    pairs: list[tuple[list[int], list[int]]] = []
    item, gold = [], []
    for number, one in enumerate(items):
        gold.append(len(pairs) + one.gold)
        for context, continuation in zip(one.contexts, one.continuations, strict=True):
            pairs.append(encoding.pair(context, " " + continuation))
            item.append(number)
    return Judged(name, pairs, np.array(item), np.array(gold))


def _judge(one: Judged, arms: list[Arm], model: Model, config, place) -> None:
    workdir, order = place
    folder = workdir / "evaluation" / one.name
    folder.mkdir(parents=True, exist_ok=True)
    missing = [arm for arm in arms if not (folder / f"{arm.name}.json").exists()]
    if not missing:
        return
    loaded = model.loaded
    batches = masked.batches(one.pairs, config.evaluate.batch_tokens)
    decider = Decider(model, config, workdir, order)
    began = time.perf_counter()
    said = [
        jax.device_get(
            masked.signals(loaded.params, loaded.config, batch.tokens_BT, batch.prompt_B)
        )
        for batch in batches
    ]
    if any(arm.method.startswith("oracle") for arm in missing):
        decider.measure_oracle(one.pairs, one.gold, one.item, folder / "oracle.npz")
    print(f"{one.name:9} prompts read and measured in {time.perf_counter() - began:.0f} s")
    for done, arm in enumerate(missing, 1):
        start = time.perf_counter()
        nll, kept = [], []
        for batch, signal in zip(batches, said, strict=True):
            nll_BT, share = decider.nll(arm, batch, signal)
            nll.append((batch, nll_BT))
            kept.append((share, len(batch.rows)))
        record = _record(one, arm, masked.nats(nll, len(one.pairs)), _mean_kept(kept))
        atomic.write_json(folder / f"{arm.name}.json", record)
        left = (time.perf_counter() - began) / done * (len(missing) - done)
        print(
            f"{one.name:9} {arm.name:44} {_figure(record)} "
            f"({time.perf_counter() - start:.1f} s, {left / 60:.0f} min left)",
            flush=True,
        )


def _mean_kept(kept: list) -> tuple[np.ndarray, np.ndarray]:
    """Per pruned layer and unit, the share of rows that kept it."""
    rows = sum(count for _, count in kept)
    heads, neurons = (sum(share[i] * n for share, n in kept) / rows for i in range(2))
    return heads, neurons


def _record(
    one: Judged, arm: Arm, nats: np.ndarray, kept: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    record: dict[str, Any] = {**dataclasses.asdict(arm), "nats": nats.tolist()}
    record["counts"] = [len(rest) for _, rest in one.pairs]
    record |= {"kept_heads": kept[0].mean(), "kept_neurons": kept[1].mean()}
    if arm.method in ("predicted", "oracle") and arm.place == "both":
        # How often each unit is kept, layer by layer.
        record["kept_maps"] = {
            "heads": kept[0].round(4).tolist(),
            "blocks": kept[1].round(4).tolist(),
        }
    if one.gold is not None:
        assert one.item is not None
        record["passed"], record["gold_margin"] = [], []
        for number, gold in enumerate(one.gold):
            rows = np.flatnonzero(one.item == number)
            others = [-nats[row] for row in rows if row != gold]
            record["gold_margin"].append(float(-nats[gold] - max(others)))
            record["passed"].append(bool(rows[np.argmax(-nats[rows])] == gold))
    return record


def _figure(record: dict[str, Any]) -> str:
    if "passed" in record:
        passed, margin = np.mean(record["passed"]), np.mean(record["gold_margin"])
        return f"accuracy {passed:.3f}, gold margin {margin:+.3f} nats"
    return f"perplexity {np.exp(np.sum(record['nats']) / np.sum(record['counts'])):.3f}"


def read(workdir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every record of RUN/evaluation, with its set."""
    for path in sorted((workdir / "evaluation").glob("*/*.json")):
        yield path.parent.name, atomic.read_json(path)
