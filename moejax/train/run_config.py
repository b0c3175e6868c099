"""What a training run is told and what it gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.train.log import Record
from moejax.train.optim import OptimConfig
from moejax.train.peak import Peak

# Settings of TrainConfig that may change between two starts of one run: its steps stay the same.
_SAVING = ("log_every", "save_every", "eval_every", "keep_last", "keep_every")
FREE = (*_SAVING, "hang_s", "prefetch", "overlap")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run.

    Attributes:
      steps: updates in all. optim: the optimizer. seed: of all randomness.
      accumulation: microbatches per update; divides the rows of a batch.
      accumulation_dtype: of the sum of their gradients.
      grad_dtype, overlap: as `moejax.train.step.StepOptions` has them.
      max_skipped: steps in a row whose loss or gradient may be not finite: they change nothing
        and are counted. One more ends the run. 0 ends it at the first. Each has its step of the
        schedule, which ends at the last step whatever was skipped.
      log_every: steps between console lines (every step is in metrics.jsonl); losses are fetched,
        and checked to be finite, as often.
      save_every: steps between checkpoints; 0 saves at the end and when interrupted only.
      keep_last: newest checkpoints kept. keep_every: also those of every so manyth step.
      eval_every: steps between evaluations; 0 evaluates at the end only (if there is an eval_fn).
      best_metric: name of the evaluation result whose smallest value is kept in best/; "" keeps
        none.
      hang_s: seconds after which a step that has not ended has the stacks of all threads dumped;
        0 never.
      prefetch: batches made ahead by a thread.
    """

    steps: int
    optim: OptimConfig = OptimConfig()
    accumulation: int = 1
    accumulation_dtype: str = "float32"
    grad_dtype: str | None = None
    overlap: bool = True
    max_skipped: int = 0
    seed: int = 0
    log_every: int = 1
    save_every: int = 0
    keep_last: int = 1
    keep_every: int = 0
    eval_every: int = 0
    best_metric: str = ""
    hang_s: float = 0.0
    prefetch: int = 0

    def __post_init__(self):
        for name in ("steps", "accumulation", "log_every", "keep_last"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("save_every", "keep_every", "eval_every", "max_skipped", "hang_s", "prefetch"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be 0 or more, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What is known of a run beside its settings.

    Attributes:
      title: shown before console lines. quiet: no console.
      identity: what else makes this run this run (model, data), JSON; kept in config.json.
      flops_per_step: of one update, for GFLOP/s (`moejax.models.flops.train_flops` says what
        counts); peak: what they are held against, for MFU.
      donate: the caller hands `trainable` over (its arrays are gone afterwards) and saves a copy.
      on_policy: `batches` is also given the parameters as they are before the step.
      mesh: the devices that share the work; None is one device. A run may go on on another mesh.
      before: of folders made before identity had some of its keys, see `moejax.train.folder`.
    """

    title: str = ""
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    flops_per_step: float = 0.0
    peak: Peak | None = None
    quiet: bool = False
    donate: bool = False
    on_policy: bool = False
    mesh: Mesh | None = None
    before: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class FitResult:
    """params: after the last step; best_step, best_value: None unless best_metric is set; records:
    all of metrics.jsonl."""

    params: tree.Tree
    step: int
    best_step: int | None
    best_value: float | None
    records: list[Record]

    @property
    def wall_s(self) -> float:
        """Seconds of training steps, over all starts of the run, without evaluation and saving."""
        return sum(r.get("step_s", 0.0) for r in self.records)

    @property
    def last_loss(self) -> float | None:
        """Of the last step; the records behind it may be of an evaluation."""
        return next((r["loss"] for r in reversed(self.records) if "loss" in r), None)

    @property
    def train_tokens(self) -> int:
        """Tokens trained on, padding excluded."""
        return round(sum(r.get("token_count", 0.0) for r in self.records))

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing, their loss or gradient not being finite."""
        return round(sum(r.get("skipped_count", 0.0) for r in self.records))
