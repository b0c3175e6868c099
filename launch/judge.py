"""Judges models side by side: the same held-out tokens, the same tasks, results kept on disk."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from moejax.api import Model
from moejax.core.errors import InputError
from moejax.data.packing import Packed
from moejax.evals import nll, sandbox, scores
from moejax.evals.bootstrap import Interval
from moejax.evals.nll import NllResult
from moejax.evals.run import Record, RunConfig, answer_fn, run
from moejax.evals.tasks import Grading, load_items
from moejax.evals.tasks.functions import FUNCTIONS
from moejax.io.atomic import read_json, write_json
from moejax.report import difference
from moejax.serve.generate import GenerateConfig


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """max_new_tokens: of each program; execute: whether programs may be run (in the sandbox)."""

    max_new_tokens: int = 96
    execute: bool = False


class Judge:
    """Results of several models on one held-out set and one set of tasks.

    The first model judged is the base: the prompt form that suits it best is used for all.
    """

    def __init__(self, folder: Path, heldout: Packed, config: JudgeConfig, console: Console):
        self._folder, self._heldout, self._config = folder, heldout, config
        self._console = console
        self._items = load_items(FUNCTIONS)
        self.no_tasks = self._why_no_tasks()
        self.nll: dict[str, NllResult] = {}
        self.records: dict[str, list[Record]] = {}
        self.form: str | None = None

    def judge(self, name: str, get_model: Callable[[], Model]) -> None:
        """Judges a model, or reads what an earlier run found."""
        path = self._folder / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            began = time.perf_counter()
            model = get_model()
            found = nll.evaluate(_on_device(model), model.config, self._heldout)
            form, records = self._run_tasks(model)
            result = {"nll": found.records(), "tokens": found.tokens, "form": form}
            write_json(path, result | {"functions": records, "wall_s": time.perf_counter() - began})
        self._read(name, read_json(path))
        self._say(name)

    def minus(self, model: str, other: str) -> dict[str, Any]:
        """The paired differences of two models, for the report."""
        entry: dict[str, Any] = {"model": model, "minus": other, "pass_at_1": None}
        entry["nll"] = _difference("nll", self.nll[model].minus(self.nll[other]))
        if self.records[model]:
            passed = scores.minus(self.records[model], self.records[other])
            entry["pass_at_1"] = _difference("pass_at_1", passed)
        return entry

    def scores(self, name: str) -> dict[str, Any]:
        """A row's scores, for the report."""
        interval = self.nll[name].interval()
        row: dict[str, Any] = {
            "nll": interval.mean,
            "nll_interval": [interval.low, interval.high],
            "nll_tokens": self.nll[name].num_tokens,
        }
        if self.records[name]:
            found = scores.summary(self.records[name])
        else:
            found = dict.fromkeys(("pass_at_1", "pass_at_1_n", "pass_at_1_interval"))
        keys = ("pass_at_1", "pass_at_1_n", "pass_at_1_interval")
        return row | {key: found[key] for key in keys}

    def _why_no_tasks(self) -> str | None:
        """Why programs are not run, None if they are."""
        if not self._config.execute:
            return "generated code was not allowed to run"
        try:
            sandbox.working_mode()
        except InputError as error:
            return str(error)
        return None

    def _run_tasks(self, model: Model) -> tuple[str | None, list[Record]]:
        if self.no_tasks:
            return None, []
        if self.form is not None:
            return self.form, self._run_form(model, self.form)
        by_form = {form: self._run_form(model, form) for form in FUNCTIONS.forms}
        for form, records in by_form.items():
            passed = sum(record["passed"] for record in records)
            self._console.print(f"  prompt form {form!r}: {passed} of {len(records)} tasks")
        form = scores.choose_form(by_form)
        return form, by_form[form]

    def _run_form(self, model: Model, form: str) -> list[Record]:
        stop = tuple(model.tokenizer.eos_ids)
        drawing = GenerateConfig(self._config.max_new_tokens, stop_ids=stop)
        complete = answer_fn(_on_device(model), model.config, model.tokenizer, drawing)
        grading = Grading(allow_code_execution=self._config.execute)
        config = RunConfig(form, grading=grading)
        return run(complete, model.tokenizer, FUNCTIONS, self._items, config)

    def _read(self, name: str, result: dict[str, Any]) -> None:
        rows = result["nll"]
        ids = tuple(row["id"] for row in rows)
        sums = np.array([row["nll_sum"] for row in rows])
        counts = np.array([row["num_tokens"] for row in rows])
        self.nll[name] = NllResult(ids, sums, counts, result["tokens"])
        self.records[name] = result["functions"]
        self.form = self.form or result["form"]

    def _say(self, name: str) -> None:
        row = self.scores(name)
        text = f"[bold]{name}[/]: held-out nll {row['nll']:.4f}"
        if row["pass_at_1"] is not None:
            num = row["pass_at_1_n"]
            text += f", {round(row['pass_at_1'] * num)} of {num} tasks pass"
        self._console.print(text)


def _difference(metric: str, interval: Interval) -> dict[str, Any]:
    return difference(metric, interval.mean, interval.low, interval.high)


def _on_device(model: Model):
    return jax.device_put(model.params)
