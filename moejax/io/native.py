"""moejax's own folder, for any model and above all for what has no class in transformers.

moejax.json              format_version, config (ModelConfig), dtype, num_params, license
params/                  orbax checkpoint of the parameter tree, by path
tokenizer.json, ...      as in a Hugging Face folder
generation_config.json   special token ids and sampling defaults
prompt_forms.json        per task, how the model wants to be asked
lineage.json             the operations that made the model
LICENSE                  of the weights, where its text is known
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import atomic, card, host, lineage, native_parts, orbax, prompt_forms
from moejax.io.loaded import License, Loaded, Progress, Reading, main_dtype
from moejax.io.safetensors import dtype_named
from moejax.io.tokenizer import Tokenizer
from moejax.models.config import ModelConfig
from moejax.models.transformer import abstract_params

FILE = "moejax.json"
PARAMS = "params"
FORMAT_VERSION = 1


def export_folder(
    target: str | os.PathLike[str],
    loaded: Loaded,
    dtype: str = "keep",
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    finish: Callable[[Loaded], Loaded] = lambda loaded: loaded,
) -> None:
    """Writes our own folder: all of it, or nothing on a failure. Inverse: `import_folder`.

    A model that was left on disk (`loaded.tensors`) is written part by part.

    dtype: of the parameters; "keep" leaves each as it is. finish: gives the model the lineage to
    write, when the weights have been.
    """
    wanted = None if dtype == "keep" else dtype_named(dtype)
    if loaded.tensors is not None:
        params = native_parts.abstract(loaded, wanted)
    else:
        params = tree.map_with_path(lambda path, x: _cast_leaf(path, x, wanted), loaded.params)
    if loaded.tokenizer is not None:
        loaded.tokenizer.check_fits(loaded.config.vocab_size)
    atomic.check_target(target, overwrite)
    atomic.require_disk(target, tree.num_bytes(params) + (16 << 20))
    with atomic.atomic_dir(target, overwrite) as folder:
        if loaded.tensors is not None:
            native_parts.write(folder / PARAMS, loaded, params, progress)
        else:
            orbax.save_tree(folder / PARAMS, params, native_parts.CHUNK_BYTES)
            _tell(progress, params)
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
        prompt_forms.write(folder, loaded.prompt_forms)
        card.write_license(folder, loaded.license)
        lineage.write(folder, finish(loaded).lineage)


def import_folder(folder: str | os.PathLike[str], reading: Reading = Reading()) -> Loaded:
    """Reads our own folder; parameters are numpy arrays. Inverse: `export_folder`."""
    folder = Path(folder).absolute()
    about = _read_about(folder)
    config = ModelConfig.from_json(about["config"])
    params = _read_params(folder / PARAMS, config, reading)
    tokenizer = None
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_folder(folder)
        tokenizer.check_fits(config.vocab_size)
    generation_path = folder / "generation_config.json"
    return Loaded(
        params,
        config,
        tokenizer,
        atomic.read_json(generation_path) if generation_path.exists() else {},
        lineage.read(folder),
        str(folder),
        License(about.get("license"), card.read_license(folder).text),
        native_parts.source(folder / PARAMS, config, params) if reading.abstract else None,
        prompt_forms.read(folder),
    )


def read_sharded(
    folder: str | os.PathLike[str], params: tree.Tree, shardings: tree.Tree
) -> tree.Tree:
    """Our own folder's parameters as sharded arrays; each process reads the chunks it needs.

    params: abstract, as `import_folder` gives them; a leaf stored in another dtype is cast.
    """
    path = Path(folder).absolute() / PARAMS
    stored = orbax.read_abstract(path)
    wanted = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        stored,
        shardings,
    )
    read = tree.flatten(orbax.load_tree(path, wanted))

    def cast(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        value = read.pop(name)
        found = value if value.dtype == leaf.dtype else value.astype(leaf.dtype)
        if found.dtype != value.dtype and not bool(jnp.isfinite(found).all()):
            raise InputError(f"{name} does not fit {leaf.dtype}: use --dtype=bfloat16 or float32")
        return found

    return tree.map_with_path(cast, params)


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


def _read_params(path: Path, config: ModelConfig, reading: Reading) -> tree.Tree:
    if not path.is_dir():
        raise InputError(f"{path} is missing: the folder is broken")
    stored = tree.flatten(orbax.read_abstract(path))
    wanted = tree.flatten(abstract_params(config))
    # A leaf comes back in the dtype it was stored in, so the template has that dtype.
    template = {
        name: jax.ShapeDtypeStruct(leaf.shape, stored.get(name, leaf).dtype)
        for name, leaf in wanted.items()
    }
    dtype = None if reading.dtype == "keep" else dtype_named(reading.dtype)
    if reading.abstract:
        orbax.check_fits(path, tree.unflatten(template))
        return tree.map_with_path(
            lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype),
            tree.unflatten(template),
        )
    read = tree.flatten(
        orbax.load_tree(path, jax.tree.map(orbax.on_host, tree.unflatten(template)))
    )
    _tell(reading.progress, read)
    # One leaf at a time, and each let go at once: no second copy of the whole.
    return tree.unflatten({name: _cast_leaf(name, read.pop(name), dtype) for name in list(read)})


def _tell(progress: Progress | None, params: tree.Tree) -> None:
    """Orbax reads and writes all at once: there is only an end to tell of."""
    if progress is not None:
        progress(tree.num_bytes(params), tree.num_bytes(params))


def _cast_leaf(path: str, leaf: Any, dtype: np.dtype | None) -> np.ndarray:
    """A host array that jax can use in place, cast; None keeps the dtype."""
    cast = host.aligned(np.asarray(leaf), dtype)
    if cast.dtype != leaf.dtype and not np.isfinite(cast).all():
        raise InputError(f"{path} does not fit {dtype}: use --dtype=bfloat16 or float32")
    return cast
