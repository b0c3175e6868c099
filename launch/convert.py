"""Converts a model between formats: a Hugging Face folder, a hub id, a GGUF file, moejax's own.

    python -m launch.convert --source=model.gguf --target=out/hf
    python -m launch.convert --source=org/name --target=out/model --format=orbax --dtype=bfloat16
    python -m launch.convert --source=folder --target=out/model.gguf --format=gguf --dtype=q8_0
    python -m launch.convert --source=folder --describe          (or --source=preset:NAME)

The target is written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from launch import cli
from launch.progress import bars
from launch.settings import PRESET, preset_named
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import atomic, gguf_write, stream
from moejax.io.describe import describe, with_exports
from moejax.io.hf import config_fields
from moejax.io.load import FORMATS, Loaded, load_any, main_dtype, save_any
from moejax.io.safetensors import dtype_named
from moejax.models.families import by_name

SOURCE = flags.DEFINE_string("source", None, "Model folder, .gguf file or hub id.", required=True)
TARGET = flags.DEFINE_string("target", None, "Folder (gguf: file) to make.")
FORMAT = flags.DEFINE_enum(
    "format", "hf", FORMATS, "hf: for transformers; gguf: for llama.cpp; orbax: moejax's own."
)
MAX_SHARD_GB = flags.DEFINE_float(
    "max_shard_gb", None, "GB (10^9 bytes) above which weights are split into files; hf only."
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    "keep",
    ["keep", "bfloat16", "float16", "float32", "q8_0"],
    "Type of the written parameters; q8_0 in GGUF files only.",
)
VERIFY = flags.DEFINE_bool("verify", False, "Compare logits of what was written, in float32.")
FORMS = flags.DEFINE_list(
    "prompt_forms", [], "How the model wants to be asked, as gsm8k=chat,humaneval=fence."
)
DESCRIBE = flags.DEFINE_bool("describe", False, "Say what the source is and costs, then stop.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a model folder at the target.")

# Ids compared by --verify: as many as show every position-dependent part, few enough for a CPU.
_VERIFY_TOKENS = 32


def main(argv) -> None:
    del argv
    started = time.perf_counter()
    if DESCRIBE.value:
        _describe()
        return
    if TARGET.value is None:
        raise InputError("--target is missing: name the folder (gguf: the file) to make")
    if FORMAT.value == "gguf":
        gguf_write.check_target(TARGET.value, OVERWRITE.value)
    else:
        atomic.check_target(TARGET.value, OVERWRITE.value)
    max_shard_bytes, forms = _max_shard_bytes(), _forms()
    print(f"read     {SOURCE.value}", flush=True)
    plan = load_any(SOURCE.value, abstract=True)
    if FORMAT.value == "hf":
        config_fields(plan.config)  # InputError where transformers has no class for the model
    atomic.require_disk(TARGET.value, _show_plan(plan))
    if cli.DRY_RUN.value:
        print("dry run: nothing written")
        return
    with bars() as (reading, writing):
        if plan.tensors is not None:  # streamed: all that can be wrong with it is looked for first
            table = by_name(plan.config.family).name_table(plan.config)
            stream.check_all(plan.tensors, table, _cast_to(), reading)
        loaded = plan if plan.tensors is not None else load_any(SOURCE.value, progress=reading)
        loaded = dataclasses.replace(loaded, prompt_forms=loaded.prompt_forms | forms)
        save_any(
            loaded,
            TARGET.value,
            FORMAT.value,
            DTYPE.value,
            OVERWRITE.value,
            writing,
            max_shard_bytes,
        )
    print(f"written  {TARGET.value} in {time.perf_counter() - started:.1f} s", flush=True)
    if VERIFY.value:
        print(_verify(loaded, TARGET.value), flush=True)


def _cast_to() -> str:
    return "keep" if DTYPE.value == "q8_0" else DTYPE.value


def _forms() -> dict[str, str]:
    pairs = [part.partition("=") for part in FORMS.value]
    wrong = next((part for part in pairs if not (part[0] and part[2])), None)
    if wrong is not None:
        raise InputError(f"--prompt_forms={','.join(FORMS.value)}: write task=form")
    return {task: form for task, _, form in pairs}


def _max_shard_bytes() -> int | None:
    size = MAX_SHARD_GB.value
    if size is None:
        return None
    if FORMAT.value != "hf":
        raise InputError(f"--max_shard_gb is of --format=hf only, got {FORMAT.value}: leave it out")
    if not 0 < size < math.inf:
        raise InputError(f"--max_shard_gb must be above 0, got {size}")
    return max(1, round(size * 1e9))


def _describe() -> None:
    """Prints the description, a line per number, option and use."""
    source = SOURCE.value
    named = source.startswith(PRESET)
    found = with_exports(preset_named(source)) if named else describe(source)
    for name, value in dataclasses.asdict(found).items():
        if isinstance(value, dict):
            print(name if value else f"{name:26} not read")
            for key, item in value.items():
                parts = item if isinstance(item, dict) else {}
                shown = ", ".join(f"{part}={number}" for part, number in parts.items())
                print(f"  {key:24} {shown or ('defaults' if item == {} else item)}")
        else:
            print(f"{name:26} {f'{value:,.0f}' if isinstance(value, int | float) else value}")


def _show_plan(loaded: Loaded) -> int:
    """Prints what the model is and what will be written; returns the bytes of its parameters."""
    config, num_params = loaded.config, tree.num_params(loaded.params)
    stored = main_dtype(loaded.params)
    quantised = DTYPE.value == "q8_0"
    if quantised and FORMAT.value != "gguf":
        raise InputError("--dtype=q8_0 is a type of GGUF files: use it with --format=gguf")
    kept = stored if DTYPE.value == "keep" or quantised else dtype_named(DTYPE.value)
    dtype = "q8_0" if quantised else kept.name
    # Of q8_0 34 bytes hold 32 values.
    num_bytes = num_params * 34 // 32 if quantised else num_params * kept.itemsize
    kind = f"{config.moe.num_experts} experts, top {config.moe.top_k}" if config.moe else "dense"
    print(
        f"model    {config.family}, {kind}: {config.num_layers} layers, width {config.d_model}, "
        f"ffn {config.d_ff}, {config.num_heads}/{config.num_kv_heads} heads of "
        f"{config.head_size}, vocabulary {config.vocab_size}"
    )
    print(f"params   {num_params:,} in {stored}, {tree.num_bytes(loaded.params) / 1e9:.3f} GB")
    tokenizer = "none" if loaded.tokenizer is None else f"{loaded.tokenizer.vocab_size} tokens"
    print(f"comes with tokenizer: {tokenizer}; licence: {loaded.license.name or 'not stated'}")
    print(
        f"write    {TARGET.value} as {FORMAT.value}, {dtype}, {num_bytes / 1e9:.3f} GB", flush=True
    )
    return num_bytes


def _verify(loaded: Loaded, target: str) -> str:
    """Reads the target back and compares its logits with the reference's, in float32."""
    again = load_any(target, "float32")
    ids = np.random.default_rng(0).integers(0, again.config.vocab_size, (1, _VERIFY_TOKENS))
    ours = _logits(again, ids)
    if FORMAT.value == "hf" and all(map(importlib.util.find_spec, ("torch", "transformers"))):
        reference, name = _transformers_logits(Path(target), ids), "transformers"
    else:
        if loaded.tensors is not None:
            loaded = load_any(SOURCE.value)
        source = dataclasses.replace(loaded, params=_as_written(loaded))
        reference, name = _logits(source, ids), "the source in moejax"
        why = "torch is not installed" if FORMAT.value == "hf" else f"{FORMAT.value} is read by us"
        print(f"verify   against the source only: {why}")
    gap = float(np.max(np.abs(ours - reference)))
    largest = float(np.max(np.abs(reference)))
    return f"verify   largest logit difference from {name}: {gap:.3g} of {largest:.3g}" + (
        f" ({gap / largest:.2e} relative)" if math.isfinite(gap) and largest else ""
    )


def _as_written(loaded: Loaded) -> tree.Tree:
    """The source's parameters rounded as the target's are, in float32."""
    if DTYPE.value in ("keep", "q8_0"):
        return tree.map_with_path(lambda _, leaf: leaf.astype(np.float32), loaded.params)
    dtype = dtype_named(DTYPE.value)
    return tree.map_with_path(lambda _, x: x.astype(dtype).astype(np.float32), loaded.params)


def _logits(loaded: Loaded, ids: np.ndarray) -> np.ndarray:
    import jax  # only --verify computes anything

    from moejax.models import transformer

    fn = jax.jit(transformer.logits, static_argnums=1)
    return np.asarray(fn(loaded.params, loaded.config, ids.astype(np.int32)))


def _transformers_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    loader: Any = transformers.AutoModelForCausalLM  # its types leave out the loading info
    model, info = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    unfit = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if unfit:
        raise InputError(f"transformers finds that {unfit[0]} does not fit its model")
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


if __name__ == "__main__":
    cli.run(main, freed="parts")
