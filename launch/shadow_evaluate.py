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
from launch import shadow_ranking
from launch.shadow_arms import Arm, Decider, arms_of
from launch.shadow_data import Model, identity, load_model
from launch.shadow_train import SECTIONS, read_order
from moejax.core.errors import InputError
from moejax.evals import masked
from moejax.io import atomic
from moejax.methods.shadow_order import reordered
from moejax.methods.shadow_rivals import PLACES as THRESHOLDS
from moejax.train.folder import claim_folder

WINDOWS, SET, PART = "wikitext", "set.json", "part_{:05d}.json"
# What may differ when a run goes on: it changes no figure of an arm.
_FREE = ("sparsities", "budgets", "places", "task_places", "tasks", "static_criteria")
FREE = tuple(f"evaluate.{name}" for name in _FREE)


@dataclasses.dataclass(frozen=True)
class Judged:
    """A set to judge on: rows of (prompt, what is scored), and of multiple choice whose they are.

    groups: rows of one question, or of one text. gold: per question the number of its right row.
    """

    name: str
    pairs: list[masked.Pair]
    groups: list[list[int]]
    gold: list[int] | None = None


def main(values: dict[str, Any]) -> None:
    """Judges every arm on every batch that RUN/evaluation does not have yet."""
    config = values["config"]
    plans = {texts: list(arms_of(config, texts)) for texts in (True, False)}
    model = load_model(config)
    sets = sets_of(config, model)
    for one in sets:
        tokens = sum(len(a) + len(b) for a, b in one.pairs)
        arms = plans[one.gold is None]
        print(f"{one.name:9} {len(one.pairs)} rows, {tokens:,} tokens, {len(arms)} arms")
    if values["dry_run"]:
        print("dry run: nothing judged, nothing written")
        return
    workdir = Path(values["workdir"])
    samples = data.load_samples(config, model.tokenizer)
    data.claim(workdir, "train.json", identity(config, SECTIONS, model), samples)
    mine = identity(config, ("evaluate",), model)
    claim_folder(workdir / "evaluation", mine, "evaluate.json", FREE)
    order = read_order(workdir, config, model)
    params = jax.jit(lambda p: reordered(p, model.loaded.config, order))(model.loaded.params)
    loaded = dataclasses.replace(model.loaded, params=params)
    model = dataclasses.replace(model, loaded=loaded)
    decider = Decider(model, config, workdir, order)
    decider.load()
    for one in sets:
        judge(one, plans[one.gold is None], decider, config, workdir / "evaluation" / one.name)
    for name, record in read(workdir):
        if record["budget"] == "local":
            print(f"{name:9} {record['arm']:36} {_figure(record)}")
    print(f"written  {workdir}/evaluation; --stage=report makes tables and plots of it")


def sets_of(config, model: Model) -> list[Judged]:
    """The windows, and each task's questions."""
    return [_windows(config, model), *(_choices(config, model, n) for n in config.evaluate.tasks)]


def _windows(config, model: Model) -> Judged:
    pairs = data.pairs_of(data.load_windows(config, model.tokenizer))
    return Judged(WINDOWS, pairs, [[row] for row in range(len(pairs))])


def _choices(config, model: Model, name: str) -> Judged:
    encoding = data.encoding(model)
    pairs: list[masked.Pair] = []
    groups, gold = [], []
    for one in data.load_items(config, name):
        gold.append(len(pairs) + one.gold)
        groups.append(list(range(len(pairs), len(pairs) + len(one.contexts))))
        for context, continuation in zip(one.contexts, one.continuations, strict=True):
            pairs.append(encoding.pair(context, " " + continuation))
    return Judged(name, pairs, groups, gold)


def judge(
    one: Judged, arms: list[Arm], decider: Decider, config, folder: Path, ranking: bool = True
) -> None:
    """All arms on a batch, then the next batch: a run cut short has all arms on the same rows.

    ranking: whether scores are also held against the true ones (`shadow_ranking`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {"counts": [len(rest) for _, rest in one.pairs], "groups": one.groups}
    about |= {"gold": one.gold, data.TEXTS: data.hash_pairs(one.pairs)}
    there = atomic.read_json(folder / SET) if (folder / SET).exists() else {}
    if there.get(data.TEXTS, about[data.TEXTS]) != about[data.TEXTS]:
        raise InputError(f"{folder} was judged on other texts: take another --workdir")
    atomic.write_json(folder / SET, about)
    batches = masked.batches(one.pairs, config.evaluate.batch_tokens, one.groups)
    began, judged, left = time.perf_counter(), 0, len(batches)
    gold = {row: g for rows, g in zip(one.groups, one.gold or [], strict=False) for row in rows}
    for number, batch in enumerate(batches):
        path = folder / PART.format(number)
        done: dict[str, Any]
        done = atomic.read_json(path) if path.exists() else {"rows": batch.rows, "arms": {}}
        if list(done["rows"]) != list(batch.rows):
            raise InputError(f"{path} was judged in other batches: take another --workdir")
        missing = [arm for arm in arms if arm.name not in done["arms"]]
        ranked = folder / shadow_ranking.FILE.format(number)
        to_rank = ranking and not ranked.exists()
        if not missing and not to_rank:
            left -= 1
            continue
        read = decider.read(batch)
        oracle = None
        if to_rank or any(arm.method.startswith("oracle") for arm in missing):
            oracle = decider.oracle(batch, one.pairs, gold)
        if to_rank:
            assert oracle is not None
            shadow_ranking.write(ranked, decider, batch, read, oracle, gold)
        for arm in missing:
            nats, kept = decider.judge(arm, batch, read, oracle)
            done["arms"][arm.name] = _entry(arm, nats[: len(batch.rows)], kept)
            atomic.write_json(path, done)
        judged += 1
        each = (time.perf_counter() - began) / judged
        print(
            f"{one.name:9} batch {number + 1}/{len(batches)}: {len(batch.rows)} rows, "
            f"{len(missing)} arms, {each / max(1, len(missing)):.1f} s an arm, "
            f"{each * (left - judged) / 60:.0f} min left",
            flush=True,
        )


def _entry(arm: Arm, nats: np.ndarray, kept: list[np.ndarray]) -> dict[str, Any]:
    entry: dict[str, Any] = dataclasses.asdict(arm) | {"nats": nats.tolist()}
    entry |= {"kept_heads": float(kept[0].mean()), "kept_neurons": float(kept[1].mean())}
    if arm.name in ("predicted-both-0.5-local", "oracle-both-0.5-local"):
        entry["kept_maps"] = [k.round(3).tolist() for k in kept]  # how often each unit is kept
    return entry


def read(workdir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A record of each set and arm, over the rows that all arms of the set have.

    "nats" and "counts" per row; of questions "passed" and "gold_margin" in nats; "judged" and
    "total" of texts or questions.
    """
    for folder in sorted(path.parent for path in (workdir / "evaluation").glob(f"*/{SET}")):
        about = atomic.read_json(folder / SET)
        parts = [atomic.read_json(path) for path in sorted(folder.glob("part_*.json"))]
        names = dict.fromkeys(name for part in parts for name in part["arms"])
        parts = [part for part in parts if len(part["arms"]) == len(names)]
        for name in names if parts else ():
            yield folder.name, _record(name, parts, about)


def incomplete(workdir: Path) -> list[str]:
    """A line for each set of which a part is judged, or nothing under all arms."""
    judged = {name: (r["judged"], r["total"]) for name, r in read(workdir)}
    lines = []
    for folder in sorted(path.parent for path in (workdir / "evaluation").glob(f"*/{SET}")):
        total = len(atomic.read_json(folder / SET)["groups"])
        done = judged.get(folder.name, (0, total))[0]
        if done < total:
            lines.append(
                f"{folder.name}: {done} of {total} are judged under all arms, the longest first; "
                "--stage=evaluate goes on"
            )
    return lines


def _record(name: str, parts: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    entries = [part["arms"][name] for part in parts]
    rows = [row for part in parts for row in part["rows"]]
    nats = dict(zip(rows, (n for entry in entries for n in entry["nats"]), strict=True))
    fields = ("method", "place", "sparsity", "budget")
    record: dict[str, Any] = {"arm": name} | {f: entries[0][f] for f in fields}
    weights = [len(part["rows"]) for part in parts]
    for field in ("kept_heads", "kept_neurons"):
        shares = [entry[field] for entry in entries]
        rule = entries[0]["method"] in THRESHOLDS  # cuts values, of no heads, and of every token
        record[field] = None if rule else float(np.average(shares, weights=weights))
    if "kept_maps" in entries[0]:
        maps = [
            np.average([np.array(e["kept_maps"][i]) for e in entries], axis=0, weights=weights)
            for i in range(2)
        ]
        record["kept_maps"] = {"heads": maps[0].tolist(), "blocks": maps[1].tolist()}
    order = sorted(rows)
    record |= {"judged": sum(group[0] in nats for group in about["groups"])}
    record |= {"total": len(about["groups"])}
    record |= {"nats": [nats[r] for r in order], "counts": [about["counts"][r] for r in order]}
    if about["gold"] is not None:
        record["passed"], record["gold_margin"] = [], []
        for group, gold in zip(about["groups"], about["gold"], strict=True):
            if gold in nats:
                best = min(group, key=lambda row: nats[row])
                others = min(nats[row] for row in group if row != gold)
                record["passed"].append(best == gold)
                record["gold_margin"].append(others - nats[gold])
    return record


def _figure(record: dict[str, Any]) -> str:
    if "passed" in record:
        passed, margin = np.mean(record["passed"]), np.mean(record["gold_margin"])
        return f"accuracy {passed:.3f}, gold margin {margin:+.3f} nats"
    return f"perplexity {np.exp(np.sum(record['nats']) / np.sum(record['counts'])):.3f}"
