"""The training loop: resumes by default, evaluates, keeps the best, stops cleanly.

A run lives in a work directory: config.json (what it is), env.json, metrics.jsonl, tb/, ckpt/, lock
and, if asked for, best/. Batches and randomness are functions of the step, so a run that was killed
and started again equals, bit for bit on the same mesh, one that never was. On several processes all
of them call `fit` with a directory that they share; process 0 keeps the records.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.memory import give_back
from moejax.io import processes
from moejax.io.atomic import read_json, write_json
from moejax.io.checkpoint import Checkpoints
from moejax.train.feed import Batches, Feed
from moejax.train.folder import alone_in, claim_folder
from moejax.train.log import (
    Record,
    RunLog,
    environment,
    load_imbalance,
    read_metrics,
    truncate_metrics,
)
from moejax.train.optim import make_optimizer, make_schedule
from moejax.train.placement import step_program
from moejax.train.run_config import FREE, FitResult, RunInfo, TrainConfig
from moejax.train.state import TrainState, init_state, named, renamed
from moejax.train.step import Adjust, LossFn, StepOptions, make_train_step
from moejax.train.stopping import Agreement, Watchdog, stop_on_signal

__all__ = ["FREE", "Batches", "EvalFn", "FitResult", "RunInfo", "TrainConfig"]
__all__ += ["claim_folder", "fit", "load_best", "load_params"]

EvalFn = Callable[[tree.Tree, tree.Tree], Mapping[str, float]]


def fit(
    config: TrainConfig,
    loss_fn: LossFn,
    trainable: tree.Tree,
    frozen: tree.Tree,
    batches: Batches,
    workdir: str | os.PathLike[str],
    eval_fn: EvalFn | None = None,
    info: RunInfo = RunInfo(),
    adjust: Adjust | None = None,
) -> FitResult:
    """Trains `trainable` from where `workdir` stands to `config.steps`.

    Args:
      config: the run's settings.
      loss_fn: see `moejax.train.step.LossFn`.
      trainable: start values; untouched unless `info.donate`. With `info.mesh`, arrays on it.
      frozen: parameters that loss_fn only reads.
      batches: step (0-based) -> batch of arrays with equal leading dims; of (step, parameters)
        where `info.on_policy` says so. See `moejax.train.feed.Batches`.
      workdir: made if missing.
      eval_fn: (trainable, frozen) -> {name: float}; of a step that is saved, after it was.
      info: what to say of the run, and the mesh it has.
      adjust: see `moejax.train.step.make_train_step`.

    Errors: InputError for a work directory of another config or one that another process is at,
    on-policy batches on a mesh, rows that `accumulation` does not divide, more steps in a row than
    `max_skipped` without a finite loss. KeyboardInterrupt after ctrl-C and
    `moejax.train.stopping.Preempted` after SIGTERM, once the state is saved.
    """
    workdir = Path(workdir)
    if info.on_policy and info.mesh is not None:
        raise InputError(
            f"batches that are sampled from the policy are made on one device, and this run has a "
            f"mesh of {info.mesh.size}: start it without a mesh"
        )
    identity = {"train": dataclasses.asdict(config), **info.identity}
    free = [f"train.{name}" for name in FREE]
    with alone_in(workdir):
        claim_folder(workdir, identity, free=free, before=info.before)
        run = _Run(config, eval_fn, workdir, info)
        ahead = 0 if info.on_policy else config.prefetch
        with Feed(batches, config.steps, info.mesh, ahead) as feed:
            run.prepare(loss_fn, (trainable, frozen), feed, adjust)
            state = run.start(trainable)
            del trainable
            if run.step < config.steps or run.owes_evaluation():
                with RunLog(workdir, info.title, config.steps, run.step, info.quiet) as log:
                    if run.step:
                        log.say(f"resuming at step {run.step} of {config.steps} from {workdir}")
                    try:
                        state = run.train(state, frozen, feed, log)
                    finally:
                        run.settle()
    best, params, step = run.best(), state.params, run.step
    del state, run  # with what they hold: the optimizer's state
    give_back()
    return FitResult(params, step, best.get("step"), best.get("value"), read_metrics(workdir))


def load_best(workdir: str | os.PathLike[str], like: tree.Tree) -> tree.Tree:
    """The parameters that evaluated best in a run; `like` gives shapes, dtypes and shardings."""
    wanted = jax.tree.map(_abstract, like)
    return _load(Checkpoints(Path(workdir) / "best", keep_last=1), None, wanted)


def load_params(
    workdir: str | os.PathLike[str], like: tree.Tree, step: int | None = None
) -> tree.Tree:
    """The trained parameters of a run's checkpoint (None: its newest), without the optimizer's
    state; `like` gives shapes, dtypes and, for another mesh, shardings."""
    wanted = {"params": jax.tree.map(_abstract, like)}
    return Checkpoints(Path(workdir) / "ckpt").restore(step, wanted, partial=True)["params"]


class _Run:
    """One start of a run: its checkpoints, its compiled step, how far it is."""

    def __init__(self, config: TrainConfig, eval_fn, workdir: Path, info: RunInfo):
        self._config, self._eval_fn, self._workdir, self._info = config, eval_fn, workdir, info
        self._optimizer = make_optimizer(config.optim, config.steps)
        self._schedule = make_schedule(config.optim, config.steps)
        self._checkpoints = Checkpoints(
            workdir / "ckpt", keep_last=config.keep_last, keep_every=config.keep_every
        )
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._bad_in_a_row = 0
        self.step = 0

    def prepare(self, loss_fn: LossFn, params: tuple, feed: Feed, adjust: Adjust | None) -> None:
        """Finds the newest checkpoint and builds the step, before anything is read or compiled."""
        config, mesh = self._config, self._info.mesh
        self._latest = self._checkpoints.latest_step()
        self.step = self._latest or 0
        options = StepOptions(
            config.accumulation,
            config.accumulation_dtype,
            config.max_skipped > 0,
            mesh,
            grad_dtype=config.grad_dtype,
            overlap=config.overlap,
        )
        if self._latest is not None:
            feed.resume(self._latest, self._checkpoints.data(self._latest))
        self._state_of_data = feed.state
        self._update: Any
        if mesh is None:
            if self.step < config.steps and not self._info.on_policy:
                feed.check(self.step, config.accumulation)
            self._like = jax.eval_shape(lambda p: init_state(p, self._optimizer), params[0])
            self._update = make_train_step(loss_fn, self._optimizer, options, adjust)
            return
        first = feed.check(min(self.step, config.steps - 1), config.accumulation)
        program = step_program(loss_fn, self._optimizer, params, first, options, adjust)
        self._like, self._update = program.state, program.step

    def start(self, trainable: tree.Tree) -> TrainState:
        """The latest checkpoint's state, or a fresh one."""
        if processes.is_first():
            write_json(self._workdir / "env.json", environment())
            truncate_metrics(self._workdir, self.step)
        if self._latest is not None:
            if self._info.donate:
                jax.tree.map(lambda leaf: leaf.delete(), trainable)
            return _load(self._checkpoints, self._latest, self._like)
        if self._info.mesh is None:
            # The step donates its state; the caller's arrays are the caller's.
            params = trainable if self._info.donate else jax.tree.map(_copy, trainable)
            return init_state(params, self._optimizer)
        places = jax.tree.map(lambda leaf: leaf.sharding, self._like)
        fresh = jax.jit(
            lambda params: init_state(params, self._optimizer),
            out_shardings=places,
            donate_argnums=0 if self._info.donate else (),
        )
        return fresh(trainable)

    def train(self, state, frozen, feed: Feed, log: RunLog) -> TrainState:
        """Steps to the end; saves there, every save_every steps, and before an interrupt.

        A step is saved before it is evaluated: whatever an evaluation ends in, the steps stay. One
        that a start did not come to is made up for by the next.
        """
        config, key = self._config, jax.random.key(self._config.seed)
        agreement = Agreement(self._info.mesh)
        stacks = self._workdir / "stacks" / f"process_{jax.process_index()}.txt"
        with stop_on_signal(log.say) as stop, Watchdog(config.hang_s, stacks) as watchdog:
            if self.owes_evaluation():
                self._evaluate(state, frozen, log)
                watchdog.beat(self.step)
            self._since = time.perf_counter()
            asked: type[KeyboardInterrupt] | None = None
            running: Any = None
            while self.step < config.steps and not asked:
                seen = (state.params,) if self._info.on_policy else ()
                batch = feed.get(self.step, *seen)
                state, metrics = self._update(state, frozen, batch, key)
                self.step += 1
                self._pending.append((self.step, metrics))
                # The step before has to end: with one in flight no device waits, and a signal or
                # the watchdog sees no more than that one, however seldom losses are fetched.
                jax.block_until_ready(running)
                running = metrics["loss"]
                asked = agreement.reached(stop.error)
                last = self.step == config.steps
                evaluate = self._evaluates() and (last or not asked)
                save = last or asked is not None or _due(self.step, config.save_every)
                if evaluate or save or _due(self.step, config.log_every):
                    self._flush(log)
                if save:
                    self._save(state)
                if evaluate:
                    watchdog.beat(self.step)
                    self._evaluate(state, frozen, log)
                if evaluate or save:
                    self._since = time.perf_counter()
                watchdog.beat(self.step)
            if asked and self.step < config.steps:
                self._interrupted(asked)
            self._checkpoints.wait()
        return state

    def _interrupted(self, error: type[KeyboardInterrupt]) -> None:
        """Waits for the checkpoint and raises what stopped the run."""
        self._checkpoints.wait()
        raise error(
            f"interrupted: step {self.step} of {self._config.steps} is saved in "
            f"{self._workdir}; the same command goes on from there"
        )

    def _evaluates(self) -> bool:
        """Whether the step just done is one to evaluate."""
        last = self.step == self._config.steps
        return self._eval_fn is not None and (last or _due(self.step, self._config.eval_every))

    def owes_evaluation(self) -> bool:
        """Whether the step that this start goes on from was to be evaluated and has no record."""
        if not self.step or not self._evaluates():
            return False
        names = [name for r in read_metrics(self._workdir) if r["step"] == self.step for name in r]
        return not processes.from_first(any(name.startswith("eval/") for name in names))

    def settle(self) -> None:
        """Lets a checkpoint that is being written be finished, whatever ended the steps."""
        self._checkpoints.settle()

    def best(self) -> dict[str, Any]:
        """{"step", "value"} of the best evaluation so far, or nothing."""
        path = self._workdir / "best.json"
        return read_json(path) if self._config.best_metric and path.exists() else {}

    def _flush(self, log: RunLog) -> None:
        """Waits for the pending steps, checks their losses, records them."""
        fetched = jax.device_get(self._pending)
        now = time.perf_counter()
        step_s = (now - self._since) / max(1, len(fetched))
        self._since, self._pending = now, []
        for step, metrics in fetched:
            record = self._record(step, step_s, metrics)
            fine = math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])
            self._bad_in_a_row = 0 if fine else self._bad_in_a_row + 1
            if self._bad_in_a_row > self._config.max_skipped:
                raise InputError(self._not_finite(step, record))
            log.train(record, show=step == fetched[-1][0])
            if not fine:
                found = f"loss {record['loss']}, gradient norm {record['grad_norm']}"
                log.say(f"step {step} is skipped, it changed nothing: {found}")

    def _record(self, step: int, step_s: float, metrics: dict[str, np.ndarray]) -> Record:
        lr = float(self._schedule(step - 1))
        record: Record = {"step": step, "step_s": step_s, "lr": lr}
        record |= {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
        if "token_count" in record:
            record["tokens_per_s"] = record["token_count"] / step_s
        if "expert_count" in metrics:
            record["expert_count"] = metrics["expert_count"].astype(int).tolist()
            record["load_max"] = load_imbalance(metrics["expert_count"])
        if self._info.flops_per_step:
            record["gflops"] = self._info.flops_per_step / step_s / 1e9
            # A step that beats the peak shows that others had the machine when that was measured.
            if self._info.peak and record["gflops"] <= self._info.peak.gflops:
                record["mfu"] = record["gflops"] / self._info.peak.gflops
        return record

    def _not_finite(self, step: int, record: Record) -> str:
        self._checkpoints.wait()
        latest = self._checkpoints.latest_step()
        where = f"the last checkpoint is step {latest}" if latest else "nothing was saved"
        many = f" and {self._bad_in_a_row - 1} before it" if self._bad_in_a_row > 1 else ""
        return (
            f"the loss is {record['loss']} and the gradient norm {record['grad_norm']} at step "
            f"{step}{many} with lr {record['lr']:.2e}: lower the learning rate, lengthen the "
            f"warm-up or clip gradients ({where} in {self._workdir})"
        )

    def _evaluate(self, state: TrainState, frozen, log: RunLog) -> None:
        assert self._eval_fn is not None
        results = {k: float(v) for k, v in self._eval_fn(state.params, frozen).items()}
        name = self._config.best_metric
        if name and name not in results:
            raise InputError(f"best_metric {name!r} is not evaluated: use {', '.join(results)}")
        if name and results[name] < self.best().get("value", math.inf):
            self._keep_best(state, {name: results[name]})
        # The record comes last: killed before it, the next start evaluates again.
        log.evaluation({"step": self.step} | {f"eval/{k}": v for k, v in results.items()})

    def _keep_best(self, state: TrainState, found: dict[str, float]) -> None:
        # best.json follows the weights: killed in between, the weights are written again.
        best = Checkpoints(self._workdir / "best", keep_last=1)
        best.save(self.step, named(state.params), found)
        if processes.is_first():
            (value,) = found.values()
            write_json(self._workdir / "best.json", {"step": self.step, "value": value})
        processes.agree()  # nobody reads it before it is there

    def _save(self, state: TrainState) -> None:
        data = self._state_of_data(self.step)
        self._checkpoints.start(self.step, named(state), data=data)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _copy(leaf) -> jax.Array:
    return jnp.array(leaf, copy=True)


def _abstract(leaf) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _load(checkpoints: Checkpoints, step: int | None, like: Any) -> Any:
    """Inverse of saving `named`: the pytree of `like` with the checkpoint's arrays."""
    return renamed(checkpoints.restore(step, named(like)), like)
