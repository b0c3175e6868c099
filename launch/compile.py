"""What a training step takes of a TPU pod or a GPU host that is not here, compiled for it.

    python -m launch.compile --config=configs/xft_deepseek_1b.py:moe --topology=v5p:2x2x2
    python -m launch.compile --config=configs/esft_deepseek_v2_lite.py --topology=v5p:2x2x2
    python -m launch.compile --config=configs/esft/deepseek_v2_lite.py --topology=v5p:2x2x2
    python -m launch.compile --config=configs/mixtral_8x7b_sft.py --topology=v5p:4x4x4 \\
        --out=plan.json
    python -m launch.compile --config=... --topology=v6e:4x4 --sweep

Prints the memory of one device and what holds it, FLOPs, collectives, and the least time a step can
take; where the step does not fit, what to change, in order. With --sweep it tries meshes, batch
sizes, remat and expert strategies, the config's own among them: all by estimate, the best
--compiles of them compiled. Nothing runs. Needs the extra [aot], which .venv-aot has.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from launch import cli
from moejax.core.errors import InputError

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, or one like them.")
TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:AxB, v5p:AxBxC, v6e:AxB or h100xN.")
OUT = flags.DEFINE_string("out", None, "JSON file for the plan.")
SWEEP = flags.DEFINE_bool("sweep", False, "Try other meshes, batches, remat and strategies.")
COMPILES = flags.DEFINE_integer("compiles", 5, "With --sweep, how many candidates to compile.", 1)
EFFORT = flags.DEFINE_float(
    "effort",
    0.0,
    "XLA's effort: -1 compiles in less than half the time to a program that is slower and takes "
    "more memory; 0 is what a run gets.",
    -1.0,
    1.0,
)
TEXT = flags.DEFINE_string("hlo", None, "File for the compiled program's text.")


def main(argv) -> None:
    del argv
    from launch.settings import checked

    like = None
    if CONFIG.value is not None and "method" in CONFIG.value:
        from configs.esft import base

        like = base.get_config()
    config = checked(CONFIG.value, like)
    name = TOPOLOGY.value
    if not name:
        raise InputError("--topology is missing: e.g. v5p:2x2x2, v5e:4x4, v6e:8x8 or h100x8")
    for flag in (OUT, TEXT):
        if flag.value and not Path(flag.value).absolute().parent.is_dir():
            raise InputError(f"--{flag.name}={flag.value}: its folder is missing; make it first")
    _restart_for(name)
    import jax

    # A program for other devices is not kept: read back, it would have no text to read.
    jax.config.update("jax_enable_compilation_cache", False)
    from launch.planning import model_of
    from moejax.aot import topology

    model, config = model_of(config)
    devices = topology.devices(name)
    if SWEEP.value:
        record = _sweep(config, model, devices)
    else:
        record = _plan(config, model, devices)
    if OUT.value:
        from moejax.io.atomic import write_json

        write_json(OUT.value, record)
        print(f"written  {OUT.value}")


def _restart_for(name: str) -> None:
    """libtpu reads its environment as it is loaded: this process begins anew if that is another."""
    from moejax.aot import topology

    wanted = topology.environment(name)
    if any(os.environ.get(key) != value for key, value in wanted.items()):
        arguments = [sys.executable, "-m", "launch.compile", *sys.argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, **wanted})


def _plan(config, model, devices) -> dict:
    from launch.planning import plan
    from moejax.aot.plan import describe
    from moejax.aot.remedies import describe as describe_remedies
    from moejax.aot.remedies import remedies
    from moejax.core.chips import chip_of

    chip = chip_of(TOPOLOGY.value or "")
    if cli.DRY_RUN.value:
        return _estimated(config, model, devices, chip)
    print("compiling: a minute or two for a large model", flush=True)
    found, setup, text = plan(config, model, devices, chip, EFFORT.value)
    _print_head(config, model, setup)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    quick = f", with XLA's effort at {EFFORT.value:g}" if EFFORT.value else ""
    print(f"compiled in {found.compile_s:.0f} s, {used:.1f} GiB of this machine's memory{quick}")
    for line in describe(found):
        print(line)
    changes = []
    if not found.fits and not found.refused:
        changes = remedies(setup, found.required_bytes or found.hbm.used)
        _print_remedies(describe_remedies(changes, chip.hbm_bytes), setup)
    if TEXT.value:
        Path(TEXT.value).write_text(text)
    record = {"topology": TOPOLOGY.value, "mesh": dict(setup.mesh), "plan": found.to_dict()}
    record |= {"config": config.to_dict()}
    return record | {"effort": EFFORT.value, "remedies": list(map(dataclasses.asdict, changes))}


def _estimated(config, model, devices, chip) -> dict:
    """The table of --dry_run: nothing is compiled."""
    from launch.planning import setup_of
    from launch.program import make_mesh_of
    from moejax.aot.estimate import estimate
    from moejax.aot.plan import describe_hbm

    setup = setup_of(config, model, make_mesh_of(config, model, devices).shape, chip)
    _print_head(config, model, setup)
    found = estimate(setup)
    print("\n".join(describe_hbm(found)))
    print("dry run: nothing compiled")
    return {"topology": TOPOLOGY.value, "mesh": dict(setup.mesh), "hbm": dataclasses.asdict(found)}


def _print_head(config, model, setup) -> None:
    from launch.planning import describe_exchange
    from moejax.models import flops

    active = flops.active_params(model) / 1e9
    name = config.model.preset or config.model.source
    mesh = " x ".join(f"{axis} {size}" for axis, size in setup.mesh.items())
    print(f"model    {name}: {flops.num_params(model) / 1e9:.2f}B parameters, {active:.2f}B active")
    print(f"devices  {TOPOLOGY.value}: {mesh} = {setup.num_devices}")
    if how := describe_exchange(setup):
        print(f"experts  {how}")
    print(
        f"step     {setup.batch_size} x {setup.seq_len} tokens in {setup.accumulation} part(s), "
        f"{setup.rows_per_device} row(s) per device and part; {setup.optim.name}, "
        f"{setup.param_dtype} state, {setup.compute_dtype} arithmetic, remat {setup.remat}"
    )


def _print_remedies(lines: list[str], setup) -> None:
    from moejax.aot.remedies import least_devices

    print("it does not fit. Change, one after the other, until it does (reckoned, not compiled):")
    for line in lines:
        print(f"  {line}")
    least = least_devices(setup)
    print(f"  or more devices: the state alone, evenly split over all, takes {least} of these")


def _sweep(config, model, devices) -> dict:
    from launch.planning import (
        candidates,
        changed,
        chosen_candidates,
        free_memory,
        plan,
    )
    from launch.sweep_table import row_of, table
    from moejax.aot.estimate import estimate
    from moejax.core.chips import chip_of

    chip = chip_of(TOPOLOGY.value or "")
    start = time.perf_counter()
    found = candidates(config, model, TOPOLOGY.value or "", len(devices))
    if not found:
        raise InputError(f"no mesh of {len(devices)} devices divides this model and batch")
    print(f"{len(found)} candidates reckoned in {time.perf_counter() - start:.0f} s", flush=True)
    rows, start, most = [], time.perf_counter(), 0 if cli.DRY_RUN.value else COMPILES.value

    def compiled(keys, setup) -> float:
        result, setup, _ = plan(changed(config, keys), model, devices, chip, EFFORT.value)
        rows.append(row_of(keys, setup, result))
        eta = (time.perf_counter() - start) / len(rows) * (most - len(rows))
        print(f"compiled {len(rows)} of {most}, {eta:.0f} s left", flush=True)
        free_memory()
        return rows[-1]["used"] / estimate(setup).used

    chosen = chosen_candidates(found, compiled, most)
    rows.sort(key=lambda row: row["order"])
    rest = [each for number, each in enumerate(found) if number not in chosen][:15]
    rows += [row_of(keys, setup, estimate(setup).used) for keys, setup in rest]
    print(table(rows))
    return {"topology": TOPOLOGY.value, "config": config.to_dict(), "rows": rows}


if __name__ == "__main__":
    cli.run(main, freed="returned")
