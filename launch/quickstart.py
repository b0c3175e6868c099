"""The whole lineage on a real language model, in minutes on two cores.

  launch/quickstart --out=runs/quickstart        (sets up its environment, then runs this)

SmolLM2-135M-Instruct is imported, upcycled into a mixture of experts, tuned on functions of the
Python standard library, and merged back into a dense model of the original size (XFT). Its rival is
the same dense model tuned on the same examples in the same order. Both are judged on held-out
functions and on small programming tasks; DIR/report.json, report.html and the merged model DIR/hf
are what is left. Run again with the same --out, it goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from configs import quickstart_merge, quickstart_moe, quickstart_sft
from launch import cli
from launch.judge import Judge, JudgeConfig
from launch.settings import forward_options, load_rows, train_config
from launch.smollm2 import gguf_path
from moejax import api, report
from moejax.api import Model
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.memory import GIB, require_memory
from moejax.data.loader import batches
from moejax.io.atomic import read_json, require_disk, write_json
from moejax.methods import merge as merging
from moejax.methods.merge import MergeConfig
from moejax.models import flops
from moejax.models.config import ModelConfig
from moejax.moe.config import MoEConfig
from moejax.train.log import environment
from moejax.train.loop import FitResult, RunInfo, claim_folder, fit
from moejax.train.loss import lm_loss
from moejax.train.peak import measure_gemm_peak

OUT = flags.DEFINE_string("out", "runs/quickstart", "Folder for everything the run leaves.")
STEPS = flags.DEFINE_integer("steps", 16, "Steps of the MoE stage.", lower_bound=1)
EXPERTS = flags.DEFINE_integer("experts", 4, "Experts in all, the shared one included.")
TOP_K = flags.DEFINE_integer("top_k", 3, "Experts a token uses, the shared one included.")
SEED = flags.DEFINE_integer("seed", 0, "Of the data's order, the routers and their noise.")
MODEL = flags.DEFINE_string("model", None, "Another dense model with a tokenizer; default SmolLM2.")
EXAMPLES = flags.DEFINE_integer("eval_examples", 64, "Held-out examples.", lower_bound=2)
NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 96, "Per programming task.", lower_bound=1)
EXECUTE = flags.DEFINE_bool(
    "allow_code_execution", True, "Run the generated functions in the sandbox; else no pass@1."
)

LAM = MergeConfig.lam
CONFIGS = {"sft_dense": quickstart_sft, "moe": quickstart_moe, "merge": quickstart_merge}
# Which stages a row's training tokens, FLOPs and seconds add up.
TRAINED_BY = {
    "base": (),
    "sft_dense": ("sft_dense",),
    "moe": ("moe",),
    "merged_uniform": ("moe",),
    "merged_learned": ("moe", "merge"),
    "shared_only": ("moe",),
}
RIVALS = ("sft_dense", "merged_uniform", "shared_only")
console = Console(highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Job:
    """What this run is; a folder holds one job only."""

    model: str
    steps: int
    experts: int
    top_k: int
    seed: int
    eval_examples: int
    max_new_tokens: int
    execute: bool

    @property
    def merge_steps(self) -> int:
        """A quarter of the MoE stage's, as the paper's 1 epoch to 4."""
        return max(1, self.steps // 4)

    @property
    def moe(self) -> MoEConfig:
        """The layer that upcycling makes."""
        return MoEConfig(self.experts, self.top_k)

    def config(self, stage: str) -> ConfigDict:
        """A stage's config, as `python -m launch.train` takes it, with this run's numbers."""
        config = CONFIGS[stage].get_config()
        config.data.seed = config.train.seed = self.seed
        config.data.num_heldout = self.eval_examples
        config.train.steps = {
            "sft_dense": self.steps + self.merge_steps,
            "moe": self.steps,
            "merge": self.merge_steps,
        }[stage]
        return config


def main(argv: Sequence[str]) -> None:
    del argv
    began = time.perf_counter()
    job = Job(
        MODEL.value or str(gguf_path()),
        STEPS.value,
        EXPERTS.value,
        TOP_K.value,
        SEED.value,
        EXAMPLES.value,
        NEW_TOKENS.value,
        EXECUTE.value,
    )
    out = Path(OUT.value)
    base = load_base(job)
    plan(job, base.config, out)
    if cli.DRY_RUN.value:
        return
    lineage = Lineage(job, out, base)
    settings = dataclasses.asdict(job) | {"model": Path(job.model).name}
    # Another Python has other functions: what it would learn and be judged by does not compare.
    claim_folder(out, settings | {"data_sha256": lineage.data_sha256}, "quickstart.json")
    lineage.run(began)


def load_base(job: Job) -> Model:
    """The dense model to start from, in float32."""
    base = api.load(job.model, dtype="float32")
    if base.tokenizer is None:
        raise InputError(f"{job.model} has no tokenizer: give a model with one")
    if base.config.moe is not None:
        raise InputError(f"{job.model} is a mixture of experts already: give a dense model")
    return base


def plan(job: Job, config: ModelConfig, out: Path) -> None:
    """Prints what will be done and how long it should take; refuses what cannot fit."""
    moe_config = dataclasses.replace(config, moe=job.moe)
    dense, moe = flops.num_params(config), flops.num_params(moe_config)
    # Parameters, gradients and updates of the MoE, and the base model beside them.
    require_memory(4 * (3 * moe + dense) + 2 * GIB, "use fewer --experts or a smaller --model")
    if not (out / "report.json").exists():
        require_disk(out, 4 * (3 * moe + 4 * dense))
    peak = measure_gemm_peak()
    lines = estimate(job, config, moe_config, peak.gflops * 1e9)
    console.print(f"[bold]{Path(job.model).name}[/]: {dense / 1e6:.1f} M parameters, as an MoE of "
                  f"{job.experts} experts (top {job.top_k}) {moe / 1e6:.1f} M, "
                  f"{flops.active_params(moe_config) / 1e6:.1f} M of them active")
    console.print(f"this machine: {peak.gflops:.0f} GFLOP/s in float32 matrix products")
    for name, seconds in lines.items():
        console.print(f"  {name:<34} about {report.table.duration(seconds)}")
    console.print(f"  {'in all':<34} about {report.table.duration(sum(lines.values()))}\n")


def estimate(job: Job, dense: ModelConfig, moe: ModelConfig, peak: float) -> dict[str, float]:
    """Seconds of each stage: its FLOPs at the share of the GEMM peak that was measured for it."""
    settings = job.config("sft_dense")
    seq_len = settings.data.seq_len
    tokens = settings.train.batch_size * seq_len
    both = job.steps + job.merge_steps
    compiling = 15.0
    step = {
        "dense": flops.train_flops(dense, tokens, seq_len) / (0.45 * peak),
        "moe": flops.train_flops(moe, tokens, seq_len) / (0.35 * peak),
        "merge": flops.merge_flops(moe, tokens, seq_len, 1) / (0.35 * peak),
    }
    # A held-out example takes about a row; decoding is bound by reading weights.
    heldout = job.eval_examples * seq_len
    forward = flops.forward_flops_per_token
    nll = (5 * forward(dense, seq_len) + forward(moe, seq_len)) * heldout / (0.4 * peak)
    decode = job.max_new_tokens * 4 * (5 * flops.num_params(dense) + flops.num_params(moe)) / 4e9
    return {
        f"dense SFT, {both} steps": both * step["dense"] + compiling,
        f"MoE SFT, {job.steps} steps": job.steps * step["moe"] + compiling,
        f"merge coefficients, {job.merge_steps} steps": job.merge_steps * step["merge"] + compiling,
        "held-out loss of six models": nll + 2 * compiling,
        "programming tasks of six models": decode + 2 * compiling if job.execute else 0.0,
        "reading and writing models": 30.0,
    }


class Lineage:
    """The stages in their order; each leaves a folder, and a folder that is there is not redone."""

    def __init__(self, job: Job, out: Path, base: Model):
        self._job, self._out, self._base = job, out, base
        config = job.config("sft_dense")
        self._rows = load_rows(config, base.loaded)
        if self._rows.heldout is None:
            raise InputError("no function is held out: this Python's library is too small")
        self._heldout = self._rows.heldout
        self._batch_size, self._seq_len = config.train.batch_size, config.data.seq_len
        self._batch_at = batches(self._rows.train, self._batch_size, job.seed)
        self.data_sha256 = self._rows.summary["sha256"]

    def run(self, began: float) -> None:
        """Everything, from the imported model to the report."""
        job = self._job
        settings = JudgeConfig(job.max_new_tokens, job.execute)
        judge = Judge(self._out / "eval", self._heldout, settings, console)
        judge.judge("base", lambda: self._base)

        dense = self._stage("sft_dense", lambda: self._sft("sft_dense", self._base))
        judge.judge("sft_dense", dense)
        del dense
        moe = self._stage("moe", lambda: self._sft("moe", self._upcycled()))
        judge.judge("moe", moe)
        coefficients = self._coefficients(moe)
        judge.judge("shared_only", lambda: api.merge(moe(), lam=1.0))
        judge.judge("merged_uniform", lambda: api.merge(moe(), lam=LAM))
        merged = self._export(moe, coefficients, judge.form)
        judge.judge("merged_learned", merged)
        self._report(judge, coefficients, time.perf_counter() - began)

    def _stage(self, name: str, make: Callable[[], Model]) -> Callable[[], Model]:
        """The stage's model, made now or read from the run before."""
        folder = self._out / "models" / name
        if folder.exists():
            console.print(f"{name}: done before, in {folder}")
            return functools.cache(lambda: api.load(folder))
        model = make()
        model.save(folder, format="orbax")
        shutil.rmtree(self._out / "runs" / name / "ckpt", ignore_errors=True)
        return lambda: model

    def _upcycled(self) -> Model:
        job = self._job
        return api.upcycle(self._base, job.experts, job.top_k, seed=job.seed)

    def _sft(self, name: str, model: Model) -> Model:
        """Tunes all parameters, from the first batch on."""
        config, options = model.config, forward_options(self._job.config(name))

        def loss(params, frozen, batch, rng):
            return lm_loss(params, config, batch, rng, options)

        step_flops = flops.train_flops(config, self._batch_size * self._seq_len, self._seq_len)
        result = self._fit(name, loss, (model.params, {}), 0, step_flops)
        results = self._keep(name, result, step_flops)
        settings = self._job.config(name).to_dict()
        return api.derive(model, result.params, config, "train", settings, results)

    def _coefficients(self, moe: Callable[[], Model]) -> tree.Tree:
        """Learns the merge on the batches that come after the MoE stage's."""
        path = self._out / "merge_coefficients.json"
        if not path.exists():
            config, merge = moe().config, MergeConfig(LAM)
            options = forward_options(self._job.config("merge"))
            loss = merging.merge_loss(config, merge, functools.partial(lm_loss, options=options))
            tokens = self._batch_size * self._seq_len
            step_flops = flops.merge_flops(config, tokens, self._seq_len, 1)
            trees = (merging.init_coefficients(config, merge), moe().params)
            result = self._fit("merge", loss, trees, self._job.steps, step_flops)
            self._keep("merge", result, step_flops)
            write_json(path, jax.tree.map(lambda x: np.asarray(x).tolist(), result.params))
        lists = read_json(path)
        return tree.unflatten({k: jnp.asarray(v) for k, v in tree.flatten(lists).items()})

    def _fit(self, name: str, loss, trees, first: int, step_flops: float) -> FitResult:
        """Runs a stage on the batches from `first` on; trees: what is trained, what is not."""
        info = RunInfo(
            name,
            {"data": self._rows.summary, "first_batch": first},
            step_flops,
            measure_gemm_peak(),
            donate=name != "merge",
        )
        trainable, frozen = jax.device_put(trees)
        return fit(
            train_config(self._job.config(name), None),
            loss,
            trainable,
            frozen,
            lambda step: self._batch_at(first + step),
            self._out / "runs" / name,
            info=info,
        )

    def _keep(self, name: str, result: FitResult, step_flops: float) -> dict:
        """Records what a stage cost, for the report."""
        cost = {
            "train_tokens": result.train_tokens,
            "train_flops": step_flops * result.step,
            "wall_s": result.wall_s,
        }
        path = self._out / "stats" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, cost | {"records": result.records})
        return cost | {"last_loss": result.last_loss, "data": self._rows.summary}

    def _export(
        self, moe: Callable[[], Model], coefficients: tree.Tree, form: str | None
    ) -> Callable[[], Model]:
        """Writes the merged model as a Hugging Face folder, and reads it back to be judged."""
        folder = self._out / "hf"
        if not folder.exists():
            merged = api.merge(moe(), coefficients, lam=LAM)
            if form is not None:  # as it was judged, so it wants to be asked
                loaded = dataclasses.replace(merged.loaded, prompt_forms={"functions": form})
                merged = dataclasses.replace(merged, loaded=loaded)
            merged.save(folder, format="hf")
            differing = tree.diff(api.load(folder).params, merged.params)
            if differing:
                raise RuntimeError(f"{folder} does not hold what was merged: {differing[0]}")
            console.print(f"{folder} read back: every parameter equal, bit for bit")
        shutil.copy(folder / "lineage.json", self._out / "lineage.json")
        return functools.cache(lambda: api.load(folder))

    def _report(self, judge: Judge, coefficients: tree.Tree, wall_s: float) -> None:
        """report.json, the plots, the page, and the table on the console."""
        base, out = self._base.config, self._out
        moe = dataclasses.replace(base, moe=self._job.moe)
        costs = {name: read_json(out / "stats" / f"{name}.json") for name in CONFIGS}
        rows = []
        for name, stages in TRAINED_BY.items():
            config = moe if name == "moe" else base
            spent = {
                key: sum(costs[stage][key] for stage in stages)
                for key in ("train_tokens", "train_flops", "wall_s")
            }
            sizes = {
                "params": flops.num_params(config),
                "active_params": flops.active_params(config),
            }
            rows.append({"model": name} | judge.scores(name) | sizes | spent)
        load = [r["expert_count"] for r in costs["moe"]["records"] if "expert_count" in r]
        alpha = {run: np.asarray(leaves["alpha"]) for run, leaves in coefficients.items()}
        routed = np.concatenate([np.asarray(jax.nn.softmax(a, axis=-1)) for a in alpha.values()])
        content = {
            "rows": rows,
            "differences": [judge.minus("merged_learned", other) for other in RIVALS],
            "curves": {
                # The merge goes on where the MoE's tokens end.
                stage: _curve(cost["records"], costs["moe"]["train_tokens"] * (stage == "merge"))
                for stage, cost in costs.items()
            },
            "coefficients": {"lam": [LAM] * len(routed), "routed": routed.tolist()},
            "run": self._record(judge, wall_s),
        }
        if load:
            content["expert_load"] = np.sum(load, axis=0).tolist()
        paths = report.write(out, content)
        console.print("\n" + report.render(content, color=console.is_terminal) + "\n")
        if judge.no_tasks:
            console.print(f"no pass@1: {judge.no_tasks}")
        for path in (*paths, out / "hf", out / "lineage.json"):
            console.print(f"  {path}")

    def _record(self, judge: Judge, wall_s: float) -> dict:
        """What was run on what."""
        peak = measure_gemm_peak()
        return {
            "settings": dataclasses.asdict(self._job) | {"model": Path(self._job.model).name},
            "data": self._rows.summary,
            "packing": {
                "train": self._rows.train.stats.to_json(),
                "heldout": self._heldout.stats.to_json(),
            },
            "prompt_form": judge.form,
            "no_pass_at_1": judge.no_tasks,
            "machine": environment() | {"gemm_peak_gflops": round(peak.gflops, 1)},
            "this_start_s": round(wall_s, 1),
            "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }


def _curve(records: Sequence[dict], before: int) -> list[dict]:
    """Training loss against tokens seen, those of earlier stages included."""
    seen = before + np.cumsum([record["token_count"] for record in records])
    return [
        {"tokens": int(tokens), "loss": record["nll"]}
        for tokens, record in zip(seen, records, strict=True)
    ]


if __name__ == "__main__":
    cli.run(main)
