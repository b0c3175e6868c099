"""moejax's own folder, for any model and above all for what has no class in transformers.

moejax.json              format_version, config (ModelConfig), dtype, num_params, license
params/                  orbax checkpoint of the parameter tree, by path
tokenizer.json, ...      as in a Hugging Face folder
generation_config.json   special token ids and sampling defaults
lineage.json             the operations that made the model
LICENSE                  of the weights, where its text is known
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import atomic, card, lineage
from moejax.io.loaded import License, Loaded, main_dtype
from moejax.io.safetensors import dtype_named
from moejax.io.tokenizer import Tokenizer
from moejax.models.config import ModelConfig
from moejax.models.transformer import abstract_params

FILE = "moejax.json"
PARAMS = "params"
FORMAT_VERSION = 1


def export_folder(
    target: str | os.PathLike[str], loaded: Loaded, dtype: str = "keep", *, overwrite: bool = False
) -> None:
    """Writes our own folder: all of it, or nothing on a failure. Inverse: `import_folder`.

    dtype: of the parameters; "keep" leaves each as it is.
    """
    wanted = None if dtype == "keep" else dtype_named(dtype)
    params = _cast(loaded.params, wanted)
    if loaded.tokenizer is not None:
        loaded.tokenizer.check_fits(loaded.config.vocab_size)
    atomic.check_target(target, overwrite)
    atomic.require_disk(target, tree.num_bytes(params) + (16 << 20))
    with atomic.atomic_dir(target, overwrite) as folder:
        ocp.save(folder / PARAMS, params)
        about = {
            "format_version": FORMAT_VERSION,
            "config": loaded.config.to_json(),
            "dtype": main_dtype(params).name,
            "num_params": tree.num_params(params),
            "license": loaded.license.name,
        }
        atomic.write_json(folder / FILE, about)
        if loaded.generation:
            atomic.write_json(folder / "generation_config.json", loaded.generation)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save(folder)
        card.write_license(folder, loaded.license)
        lineage.write(folder, loaded.lineage)


def import_folder(folder: str | os.PathLike[str], dtype: str = "keep") -> Loaded:
    """Reads our own folder; parameters are numpy arrays. Inverse: `export_folder`."""
    folder = Path(folder).absolute()
    about = _read_about(folder)
    config = ModelConfig.from_json(about["config"])
    params = _read_params(folder / PARAMS, config)
    tokenizer = None
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_folder(folder)
        tokenizer.check_fits(config.vocab_size)
    generation_path = folder / "generation_config.json"
    return Loaded(
        _cast(params, None if dtype == "keep" else dtype_named(dtype)),
        config,
        tokenizer,
        atomic.read_json(generation_path) if generation_path.exists() else {},
        lineage.read(folder),
        str(folder),
        License(about.get("license"), card.read_license(folder).text),
    )


def _read_about(folder: Path) -> dict[str, Any]:
    about = atomic.read_json(folder / FILE)
    if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
        raise InputError(f"{folder / FILE} has no model config: the folder is broken")
    version = about.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{folder / FILE} has format version {version}, this moejax reads {FORMAT_VERSION}: "
            "use the version that wrote it"
        )
    return about


def _read_params(path: Path, config: ModelConfig) -> tree.Tree:
    if not path.is_dir():
        raise InputError(f"{path} is missing: the folder is broken")
    try:
        stored = jax.tree.map(_as_shape, ocp.metadata(path).metadata)
        found = tree.flatten(stored)
        for leaf_path, wanted in tree.flatten(abstract_params(config)).items():
            leaf = found.pop(leaf_path, None)
            if leaf is None:
                raise InputError(f"{path}: {leaf_path} is missing")
            if leaf.shape != wanted.shape:
                raise InputError(
                    f"{path}: {leaf_path} has shape {list(leaf.shape)}, "
                    f"{FILE} asks for {list(wanted.shape)}"
                )
        if found:
            raise InputError(f"{path}: {min(found)} has no place in the model of {FILE}")
        return ocp.load(path, jax.tree.map(host_template, stored))
    except InputError:
        raise
    except (ValueError, OSError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is broken ({first[:200]}): copy it again") from error


def _as_shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def host_template(leaf: Any) -> np.ndarray:
    """Asks orbax for a numpy array of this shape, at no memory: one element, broadcast."""
    return np.broadcast_to(np.empty((), leaf.dtype), leaf.shape)


def _cast(params: tree.Tree, dtype: np.dtype | None) -> tree.Tree:
    """Casts every leaf; None keeps them."""
    if dtype is None:
        return jax.tree.map(np.asarray, params)
    return tree.map_with_path(lambda path, leaf: _cast_leaf(path, np.asarray(leaf), dtype), params)


def _cast_leaf(path: str, leaf: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = leaf.astype(dtype, copy=False)
    if cast is not leaf and not np.isfinite(cast).all():
        raise InputError(f"{path} does not fit {dtype}: use --dtype=bfloat16 or float32")
    return cast
