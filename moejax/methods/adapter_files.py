"""A delta as a folder, in the layout of the reference's released adapters.

expert_cfg.json       which experts (`moejax.methods.expert_config`)
model.safetensors     their weights by Hugging Face's names ("model.layers.1.mlp.experts.8...");
                      a model without a class there has our paths, ".<layer>.<expert>" behind
esft.json             hash of the base; absent in the reference's adapters
lineage.json          the operations that made it
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import atomic, hf, host, lineage
from moejax.io.safetensors import Entry, Info, SafetensorsFolder, write_folder
from moejax.methods import expert_config
from moejax.methods.esft import rest_paths
from moejax.methods.esft_delta import Delta, stack_paths
from moejax.models.config import ModelConfig
from moejax.models.families import Weight, by_name
from moejax.models.params import abstract_params

ABOUT = "esft.json"


def write(
    folder: str | os.PathLike[str],
    delta: Delta,
    config: ModelConfig,
    operations: lineage.Lineage = (),
    overwrite: bool = False,
) -> None:
    """Writes a delta's folder: all of it, or nothing. Inverse: `read`."""
    entries = [
        Entry(w.hf_name, Info(w.hf_shape, array.dtype), functools.partial(w.to_hf, array))
        for w, array in _places(delta, config)
    ]
    atomic.check_target(folder, overwrite)
    atomic.require_disk(folder, delta.num_bytes + (1 << 20))
    with atomic.atomic_dir(folder, overwrite) as made:
        write_folder(made, entries)
        expert_config.write(made / expert_config.ADAPTER_FILE, delta.chosen)
        about = {"format_version": 1, "base_sha256": delta.base_sha256}
        atomic.write_json(made / ABOUT, about)
        lineage.write(made, operations)


def read(folder: str | os.PathLike[str], config: ModelConfig) -> Delta:
    """Reads a delta for a model, ours or a released one; every tensor has to be there."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: a delta has {expert_config.ADAPTER_FILE} in it")
    chosen = expert_config.read(folder)
    chosen.check_fits(config, str(folder))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} has no .safetensors file: the delta is not whole")
    source = SafetensorsFolder(folder, files)
    names = {_modern(name): name for name in source.infos}
    weights = trained_weights(config, chosen)
    missing = [w.hf_name for w in weights if w.hf_name not in names]
    extra = sorted(set(names) - {w.hf_name for w in weights})
    for what, found in (("lacks", missing), ("has, and its config does not name,", extra)):
        if found:
            raise InputError(f"{folder} {what} tensor {found[0]}: it is cut or of another model")
    stacks: dict[str, list[np.ndarray]] = {}
    leaves: dict[str, list[np.ndarray]] = {}
    for weight in weights:
        shape = source.infos[names[weight.hf_name]].shape
        if shape != weight.hf_shape:
            raise InputError(
                f"{folder}: tensor {weight.hf_name} is {list(shape)} and the model's "
                f"{list(weight.hf_shape)}: it is of another model"
            )
        value = weight.from_hf(source.read(names[weight.hf_name]))
        (leaves if weight.expert is None else stacks).setdefault(weight.path, []).append(value)
    layered = {w.path for w in weights if w.layer is not None}
    about = atomic.read_json(folder / ABOUT) if (folder / ABOUT).exists() else {}
    return Delta(
        chosen,
        {path: host.aligned(np.stack(parts), None) for path, parts in stacks.items()},
        {p: np.stack(parts) if p in layered else parts[0] for p, parts in leaves.items()},
        str(about.get("base_sha256", "")),
    )


def trained_weights(config: ModelConfig, chosen: expert_config.ExpertConfig) -> list[Weight]:
    """A delta's tensors: per stack its pairs ascending, then whole leaves layer by layer."""
    flat = tree.flatten(abstract_params(config))
    table = by_name(config.family).name_table(config) if hf.has_class(config) else []
    named = {(w.path, w.layer, w.expert): w for w in table}
    found = []
    for path, run in stack_paths(flat, config, chosen).items():
        for row, expert in zip(run.rows.tolist(), run.ids.tolist(), strict=True):
            own = Weight(
                path, row, f"{path}.{run.layers[row]}.{expert}", flat[path].shape[2:], 0, expert
            )
            found.append(named.get((path, row, expert), own))
    for path in rest_paths(config, chosen):
        layered = path.startswith("layers/")
        shape = flat[path].shape
        rows: list[int | None] = [*range(shape[0])] if layered else [None]
        for row in rows:
            name = path if row is None else f"{path}.{row}"
            own = Weight(path, row, name, shape[1:] if layered else shape, 0)
            found.append(named.get((path, row, None), own))
    return found


def _places(delta: Delta, config: ModelConfig) -> Iterable[tuple[Weight, np.ndarray]]:
    """Every tensor with its values in our layout."""
    seen: dict[str, int] = {}
    for weight in trained_weights(config, delta.chosen):
        index = seen.get(weight.path, 0)
        seen[weight.path] = index + 1
        whole = delta.leaves[weight.path] if weight.expert is None else delta.stacks[weight.path]
        yield weight, np.asarray(whole if weight.layer is None else whole[index])


def _modern(name: str) -> str:
    """The reference's first adapters leave out "model."."""
    return f"model.{name}" if name.startswith("layers.") else name
