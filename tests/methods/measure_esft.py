"""What ESFT saves against full fine-tuning, measured on this machine's CPU.

    python -m tests.methods.measure_esft time [PAIRS] [REMAT]  # a step, and its parts, in turns
    python -m tests.methods.measure_esft memory [REMAT]        # anonymous memory above the model's
    python -m tests.methods.measure_esft visits SCORES         # tiles of the experts' backward pass

One fine-grained model of random weights (4 layers, 64 experts, top 6, D 512; 188 M parameters),
AdamW in float32, 4,096 tokens a step, the same REMAT for both ("nothing" if not given). Experts:
token score 0.2 of the batch's own routing, which is nearly even, so about 0.2 of the experts and
not the 0.08 of a model that has specialised. Memory is as commands have it: what they free they
keep, unless MOEJAX_KEEP_FREED is 0. SCORES: a folder or summary.json; whose loads the tiles are
counted at.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from launch.bench_tpu import visits
from moejax.core import tree
from moejax.core.memory import give_back, keep_freed
from moejax.methods import expert_scores, score_files
from moejax.methods.adaptation import adapt
from moejax.methods.expert_selection import select_by_threshold
from moejax.models import flops, transformer
from moejax.models.config import ModelConfig
from moejax.moe.config import CONVENTIONS, MoEConfig
from moejax.train.loss import lm_loss
from moejax.train.optim import OptimConfig, make_optimizer
from moejax.train.state import init_state
from moejax.train.step import make_train_step

MOE = MoEConfig(64, 6, **CONVENTIONS["deepseek_v2"], expert_ffn=448, shared_ffn=896)
CONFIG = ModelConfig("deepseek_v2", 8192, 4, 512, 1024, 8, 8, 64, moe=MOE)
ROWS, LENGTH = 8, 512
THRESHOLD = 0.2


def make_batch() -> dict[str, np.ndarray]:
    shape = (ROWS, LENGTH)
    return {
        "tokens": np.random.default_rng(0).integers(0, 8192, shape).astype(np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape),
        "loss_mask": np.ones(shape, np.float32),
    }


def make_arm(method: str, params, batch, remat: str):
    """(state, frozen, loss, optimizer, share of choices that chosen experts get, share of them)."""
    chosen, choices, share = None, 1.0, 1.0
    if method == "esft":
        counted = expert_scores.count(params, CONFIG, [batch], num_segments=1)
        scores = counted.scores()
        chosen = select_by_threshold(scores, "token", THRESHOLD)
        share = len(chosen.pairs) / scores.values["token"].size
        values = scores.values["token"]
        choices = float(np.mean([sum(values[i, list(chosen.experts[n])])
                                 for i, n in enumerate(scores.layers)]))
    made = adapt(method, params, CONFIG, chosen=chosen)
    optimizer = make_optimizer(OptimConfig("adamw", 1e-4, "constant", weight_decay=0.1), 10)

    def loss(trainable, frozen, batch, rng):
        options = transformer.ForwardOptions(remat=remat)
        return lm_loss(made.assemble(trainable, frozen), CONFIG, batch, options=options)

    trainable = jax.tree.map(jnp.asarray, made.trainable)
    return init_state(trainable, optimizer), made.frozen, loss, optimizer, choices, share


def flop_bound(choices: float) -> float:
    """ESFT's products over full fine-tuning's: forward, gradients to inputs, dW of the chosen."""
    forward = flops.forward_flops_per_token(CONFIG, LENGTH)
    stacks, _ = tree.split(transformer.abstract_params(CONFIG), "**/experts/w_*")
    experts = 2.0 * tree.num_params(stacks) * MOE.top_k / MOE.num_experts
    return (2 * forward + choices * experts) / (3 * forward)


def measure_time(pairs: int, remat: str) -> None:
    """Medians of the ratio over pairs run in turns, of time and of the processors' seconds."""
    batch, key = make_batch(), jax.random.key(0)
    runs: dict[str, dict[str, Callable[[], object]]] = {}
    bound = 0.0
    for method in ("full", "esft"):
        # Each its own: a step gives its state's memory away.
        params = transformer.init_params(CONFIG, key)
        state, frozen, loss, optimizer, choices, share = make_arm(method, params, batch, remat)
        if method == "esft":
            bound = flop_bound(choices)
            print(f"experts  {share:.1%} of them chosen, with {choices:.1%} of the choices")
        value = jax.jit(loss)
        both = jax.jit(jax.grad(loss, has_aux=True))
        step = make_train_step(loss, optimizer)

        def update(state, grads, optimizer=optimizer):
            changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
            return jax.tree.map(jnp.add, state.params, changes), opt_state

        grads = both(state.params, frozen, batch, key)[0]
        holder = [state]

        def whole(holder=holder, step=step, frozen=frozen):
            holder[0], metrics = step(holder[0], frozen, batch, key)
            return metrics

        runs[method] = {
            "forward": lambda f=value, s=holder, z=frozen: f(s[0].params, z, batch, key),
            "forward+backward": lambda f=both, s=holder, z=frozen: f(s[0].params, z, batch, key),
            "optimizer": lambda f=jax.jit(update), s=holder, g=grads: f(s[0], g),
            "step": whole,
        }
    print(f"bound    {bound:.3f} of the FLOPs of full fine-tuning's forward and backward pass")
    for part in ("step", "forward+backward", "optimizer", "forward"):
        times: dict[str, list[float]] = {"full": [], "esft": []}
        used: dict[str, list[float]] = {"full": [], "esft": []}
        for number in range(pairs + 1):
            for method in ("full", "esft") if number % 2 else ("esft", "full"):
                started, before = time.perf_counter(), time.process_time()
                jax.block_until_ready(runs[method][part]())
                if number:  # the first compiles
                    times[method].append(time.perf_counter() - started)
                    used[method].append(time.process_time() - before)
        ratios = [a / b for a, b in zip(times["esft"], times["full"], strict=True)]
        seconds = {method: statistics.median(found) for method, found in times.items()}
        cpu = {method: statistics.median(found) for method, found in used.items()}
        print(
            f"{part:17} full {seconds['full']:.2f} s, esft {seconds['esft']:.2f} s, ratio "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}); of the "
            f"processors {cpu['full']:.2f} s, {cpu['esft']:.2f} s, {cpu['esft'] / cpu['full']:.3f}",
            flush=True,
        )


def anonymous_bytes() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def memory_of(method: str, remat: str) -> None:
    """Prints, as JSON, the peak of anonymous memory of three steps above the model's."""
    if os.environ.get("MOEJAX_KEEP_FREED") != "0":
        keep_freed()  # as every command does
    batch = make_batch()
    params = transformer.init_params(CONFIG, jax.random.key(0))
    jax.block_until_ready(params)
    give_back()
    base, peak, stop = anonymous_bytes(), [0], threading.Event()

    def watch():
        while not stop.is_set():
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    state, frozen, loss, optimizer, _, share = make_arm(method, params, batch, remat)
    if method == "full":
        del params  # the run takes it over
    step = make_train_step(loss, optimizer)
    for _ in range(3):
        state, metrics = step(state, frozen, batch, jax.random.key(0))
        jax.block_until_ready(metrics)
    held = tree.num_bytes(state.params) + tree.num_bytes(state.opt_state)
    stop.set()
    watcher.join()
    print(json.dumps({"above": peak[0] - base, "state": held, "share": share}))


def measure_memory(remat: str) -> None:
    found = {}
    for method in ("full", "esft"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.methods.measure_esft", "memory_of", method, remat],
            capture_output=True, text=True, check=True,
        )
        found[method] = json.loads(done.stdout.splitlines()[-1])
        figures = {name: f"{value / 1e9:.2f} GB" for name, value in found[method].items()}
        print(f"{method:5} peak {figures['above']} above the model, state {figures['state']}")
    print(f"ratio {found['esft']['above'] / found['full']['above']:.3f}, with "
          f"{found['esft']['share']:.1%} of the experts")


def measure_visits(path: str) -> None:
    """Backward tiles (gradients to inputs, dW) of ESFT over full fine-tuning's, all layers."""
    scores = score_files.read_scores(path)[0].rounded(4)
    chosen = select_by_threshold(scores, "token", THRESHOLD)
    for tokens in (4096, 32768):
        for tile in (128, 256, 512):
            ours = whole = 0
            for i, layer in enumerate(scores.layers):
                sizes = np.round(scores.values["token"][i] * tokens * 6).astype(int)
                wanted = np.isin(scores.experts, chosen.experts[layer])
                backward = visits(sizes, tile)
                whole += 2 * backward
                ours += backward + visits(sizes, tile, wanted)
            print(f"{tokens:6} tokens, tiles of {tile}: {ours / whole:.3f} ({ours} / {whole})")


if __name__ == "__main__":
    actions = {
        "time": lambda rest: measure_time(int([*rest, 4][0]), [*rest[1:], "nothing"][0]),
        "memory": lambda rest: measure_memory((*rest, "nothing")[0]),
        "memory_of": lambda rest: memory_of(*rest),
        "visits": lambda rest: measure_visits(rest[0]),
    }
    functools.partial(actions[sys.argv[1]], sys.argv[2:])()
