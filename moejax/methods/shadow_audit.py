"""Is the sparse model still the dense one? A share of requests is run both ways and compared."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from moejax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    """When to look, and what is too much.

    Attributes:
      share: of requests that are run densely as well, in [0, 1].
      drift_limit: mean nats per token, KL(dense || sparse), above which all later requests run
        dense. window: the last audited requests that the mean is over. least: so many before
        anything is concluded, but for infinite drift.
      seed: which requests are audited.
    """

    share: float = 0.01
    drift_limit: float = 0.5
    window: int = 64
    least: int = 4
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise InputError(f"audit_share {self.share:g} lies outside [0, 1]")
        if not self.drift_limit > 0:
            raise InputError(f"audit drift_limit must be above 0, got {self.drift_limit:g}")
        if not 0 < self.least <= self.window:
            raise InputError(
                f"audit least {self.least} must lie between 1 and window {self.window}"
            )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Of one request: share of tokens with the same best next token, mean KL in nats per token."""

    agreement: float
    drift: float


def compare(dense_TV: Any, sparse_TV: Any) -> Comparison:
    """Logits of the same tokens by both models, at the positions that the sparse one decided.

    drift is the mean over positions of KL(p_dense || p_sparse). NaN of either counts as infinite
    drift.
    """
    if dense_TV.shape != sparse_TV.shape or dense_TV.ndim != 2:
        shapes = f"{dense_TV.shape}, {sparse_TV.shape}"
        raise ValueError(f"logits [T, V] of both are needed, got {shapes}")
    agreed = drift = 0.0
    num_tokens, step = len(dense_TV), 32  # a vocabulary in float64 is large
    for at in range(0, num_tokens, step):
        both = (np.asarray(x[at : at + step], np.float64) for x in (dense_TV, sparse_TV))
        dense, sparse = (_log_softmax(x) for x in both)
        drift += float(np.sum(np.exp(dense) * (dense - sparse)))
        agreed += float(np.sum(dense.argmax(-1) == sparse.argmax(-1)))
    drift = drift / num_tokens if np.isfinite(drift) else float("inf")
    return Comparison(agreed / num_tokens, drift)


class Audit:
    """Keeps what audited requests showed; `dense` says that the limit has been passed."""

    def __init__(self, config: AuditConfig = AuditConfig()):
        self.config = config
        self.seen: list[Comparison] = []
        self.num_requests = 0
        self.fell_back_at: int | None = None

    @property
    def dense(self) -> bool:
        """Whether requests are to be run densely from now on."""
        return self.fell_back_at is not None

    def wants(self, number: int) -> bool:
        """Whether request `number` is audited: a fixed choice of the seed, evenly spread."""
        self.num_requests = max(self.num_requests, number + 1)
        text = f"{self.config.seed}:{number}".encode()
        draw = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
        return draw < self.config.share

    def add(self, found: Comparison) -> None:
        """Takes in one audited request; past the limit it turns `dense` on, for good."""
        self.seen.append(found)
        recent = self.seen[-self.config.window :]
        enough = len(recent) >= self.config.least or not np.isfinite(found.drift)
        mean = np.mean([c.drift for c in recent])
        if enough and not self.dense and mean > self.config.drift_limit:
            self.fell_back_at = self.num_requests

    def report(self) -> dict[str, Any]:
        """Requests, how many were audited, mean agreement and drift, where it fell back."""
        found: dict[str, Any] = {"requests": self.num_requests, "audited": len(self.seen)}
        for name in ("agreement", "drift"):
            values = [getattr(c, name) for c in self.seen]
            found[name] = float(np.mean(values)) if values else None
        return found | {"drift_limit": self.config.drift_limit, "fell_back_at": self.fell_back_at}

    def __str__(self) -> str:
        r = self.report()
        if not self.seen:
            return f"audit    0 of {r['requests']} requests run dense as well"
        said = (
            f"audit    {r['audited']} of {r['requests']} requests run dense as well: "
            f"{r['agreement']:.1%} of tokens agree, drift {r['drift']:.4f} nats per token"
        )
        if self.dense:
            said += f"; past {self.config.drift_limit:g}: dense since request {self.fell_back_at}"
        return said


def _log_softmax(x_TV: np.ndarray) -> np.ndarray:
    x_TV = x_TV - x_TV.max(-1, keepdims=True)
    return x_TV - np.log(np.exp(x_TV).sum(-1, keepdims=True))
