"""What the ESFT study does: pre-train, see whether experts specialise, adapt arm by arm."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from launch.esft_domains import Domains
from moejax.core import tree
from moejax.io import atomic
from moejax.io.lock import locked
from moejax.methods import expert_scores, score_files
from moejax.methods import expert_selection as selection
from moejax.methods.adaptation import adapt
from moejax.methods.expert_config import ExpertConfig
from moejax.methods.expert_gradients import gradient_scores
from moejax.methods.expert_selection import ExpertScores
from moejax.methods.lora import LoraConfig, abstract_adapters
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.moe.config import CONVENTIONS, MoEConfig
from moejax.train.loop import RunInfo, TrainConfig, fit
from moejax.train.loss import example_nll, lm_loss
from moejax.train.optim import OptimConfig

BATCH = 16  # rows at a time where nothing is trained
FREE = ("seeds", "draws", "rates", "specialised_below")  # of the config: change no run
_WAIT_S = 5.0
Run = tuple[str, float, int]  # arm, rate, seed


def model_of(config: ConfigDict, vocab_size: int) -> ModelConfig:
    """A fine-grained mixture of experts of the study's size."""
    m = config.model
    moe = MoEConfig(
        m.experts,
        m.top_k,
        **CONVENTIONS["olmoe"] | {"balance_weight": m.balance_weight},
        expert_ffn=m.expert_ffn,
    )
    return ModelConfig(
        "olmoe",
        vocab_size,
        m.layers,
        m.width,
        m.expert_ffn,
        m.heads,
        m.heads,
        m.width // m.heads,
        max_position=config.data.seq_len,
        tie_embeddings=True,
        moe=moe,
    )


def identity(config: ConfigDict) -> dict[str, Any]:
    """What a run in the study's folder must share with the next: all but the keys in FREE."""
    return {key: value for key, value in config.to_dict().items() if key not in FREE}


def pretrained(config: ConfigDict, model: ModelConfig, domains: Domains, folder: Path) -> tree.Tree:
    """The base: trained on all domains, the target at most its share; resumed if it is there."""
    p, names = config.pretrain, list(domains.rows)
    rest = (1 - config.target_share) / (len(names) - 1)
    shares = [config.target_share if name == config.target else rest for name in names]

    def batches(step: int):
        draw = np.random.default_rng([7, step])
        which = draw.choice(len(names), p.batch_size, p=shares)
        trains = [domains.rows[names[i]]["train"] for i in which]
        return domains.batch(np.stack([rows[draw.integers(len(rows))] for rows in trains]))

    result = fit(
        TrainConfig(p.steps, OptimConfig("adamw", p.lr, "cosine", p.steps // 20, 1.0, 0.1),
                    save_every=max(1, p.steps // 6), log_every=max(1, p.steps // 60)),
        lambda params, frozen, batch, rng: lm_loss(params, model, batch),
        transformer.init_params(model, jax.random.key(0)),
        {},
        batches,
        folder,
        None,
        RunInfo("pretrain", {"config": identity(config)}),
    )
    return jax.device_get(result.params)


def specialisation(
    config: ConfigDict, model: ModelConfig, base: tree.Tree, domains: Domains
) -> dict[str, Any]:
    """Scores of every domain, overlap of their best experts, and what the target needs."""
    assert model.moe is not None
    found: dict[str, ExpertScores] = {}
    for name in domains.rows:
        parts = domains.parts(name, "validation", BATCH)
        found[name] = expert_scores.count(base, model, parts, num_segments=1).scores()
    pull = gradient_scores(
        lambda params, batch: lm_loss(params, model, batch)[1]["nll"],
        base,
        model,
        domains.parts(config.target, "validation", BATCH),
    )
    target = found[config.target]
    found[config.target] = dataclasses.replace(target, values={**target.values, "gradient": pull})
    best = {name: selection.select_by_count(s, "token", model.moe.top_k).experts
            for name, s in found.items()}
    overlap = [
        [float(np.mean([len(set(best[a][n]) & set(best[b][n])) for n in best[a]])) for b in found]
        for a in found
    ]
    threshold = config.thresholds.token
    needed = {
        name: len(selection.select_by_threshold(s, "token", threshold).pairs) / model.num_layers
        for name, s in found.items()
    }
    even = int(np.ceil(threshold * model.moe.num_routed - 1e-9))
    return {
        "domains": list(found),
        "overlap": overlap,
        "experts_needed": needed,
        "even_router": even,
        "relative": needed[config.target] / even,
        "scores": {name: score_files.summary_json(s, None) for name, s in found.items()},
    }


def arms_of(config: ConfigDict, target: ExpertScores) -> dict[str, ExpertConfig | None]:
    """Every arm that trains something, with its experts; None for full fine-tuning and LoRA."""
    arms: dict[str, ExpertConfig | None] = {"full": None, "lora": None}
    for score in ("token", "gate"):
        chosen = selection.select_by_threshold(target, score, config.thresholds[score])
        arms[f"esft_{score}"] = chosen
    token = arms["esft_token"]
    assert token is not None
    counts = selection.counts_of(token)  # the same budget for what follows
    arms["esft_gradient"] = selection.select_by_count(target, "gradient", counts)
    for draw in range(config.draws):
        arms[f"random_{draw}"] = selection.select_random(target, counts, draw)
    return arms


def equal_rank(params: tree.Tree, num_params: int) -> int:
    """LoRA's rank whose factors come nearest to so many parameters."""
    one = tree.num_params(abstract_adapters(params, LoraConfig(rank=1)))
    return max(1, round(num_params / one))


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all arms share."""

    config: ConfigDict
    model: ModelConfig
    domains: Domains
    base: tree.Tree
    rank: int
    folder: Path
    arms: Mapping[str, ExpertConfig | None]

    def run_all(self, runs: Sequence[Run], say: Callable[[dict], None]) -> list[dict[str, Any]]:
        """The results of all runs, in order. Those that another process is at are waited for."""
        found: dict[Run, dict[str, Any]] = {}
        while len(found) < len(runs):
            before = len(found)
            for run in runs:
                result = None if run in found else self.run(*run)
                if result is not None:
                    found[run] = result
                    say(result)
            if len(found) == before:
                time.sleep(_WAIT_S)
        return [found[run] for run in runs]

    def run(self, arm: str, rate: float, seed: int) -> dict[str, Any] | None:
        """One arm at one rate and seed: losses on every domain. Read back if it was done before.

        None while another process does it.
        """
        path = self.folder / arm / f"{rate:g}" / str(seed)
        with locked(path) as holder:
            if holder:
                return None
            if not (path / "result.json").exists():
                atomic.write_json(path / "result.json", self._measure(arm, rate, seed, path))
                shutil.rmtree(path / "run", ignore_errors=True)  # it only serves to go on
            return atomic.read_json(path / "result.json")

    def _measure(self, arm: str, rate: float, seed: int, path: Path) -> dict[str, Any]:
        chosen = self.arms[arm]
        started, config, model = time.monotonic(), self.config, self.model
        low_rank = LoraConfig(self.rank, 2.0 * self.rank, seed=seed)
        method = arm if arm in ("full", "lora", "frozen") else "esft"
        made = adapt(method, self.base, model, chosen=chosen, low_rank=low_rank)
        trained: Any = made.trainable
        if method != "frozen":
            rows = self.domains.rows[config.target]["train"]

            def batches(step: int):  # the same for every arm
                draw = np.random.default_rng([seed, step])
                taken = draw.choice(len(rows), config.adapt.batch_size)
                return self.domains.batch(rows[taken])

            def loss(trainable, frozen, batch, rng):
                return lm_loss(made.assemble(trainable, frozen), model, batch)

            optim = OptimConfig("adamw", rate, "constant", 0, 1.0, 0.1)
            steps = config.adapt.steps
            fitted = fit(
                TrainConfig(steps, optim, seed=seed, log_every=steps),
                loss,
                made.trainable,
                jax.device_put(made.frozen),
                batches,
                path / "run",
                None,
                RunInfo(arm, {"config": identity(config)}, quiet=True),
            )
            trained = fitted.params
        params = jax.jit(made.assemble)(trained, made.frozen)
        return {
            "arm": arm,
            "rate": rate,
            "seed": seed,
            "trained_params": tree.num_params(trained),
            "losses": {part: self.losses(params, part) for part in ("validation", "test")},
            "seconds": time.monotonic() - started,
        }

    def losses(self, params: tree.Tree, part: str) -> dict[str, list[float]]:
        """Nats per token of every row, by domain."""
        evaluate = _row_nll(self.model)
        found = {}
        for name in self.domains.rows:
            rows: list[float] = []
            for batch in self.domains.parts(name, part, BATCH):
                sums, counts = jax.device_get(evaluate(params, batch))
                real = counts[:, 0] > 0
                rows += (sums[real, 0] / counts[real, 0]).tolist()
            found[name] = rows
        return found


@functools.lru_cache(maxsize=2)
def _row_nll(model: ModelConfig):
    return jax.jit(lambda params, batch: example_nll(params, model, batch, num_segments=1))
