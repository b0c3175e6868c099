"""One call for whatever a model may come as: folder, hub id, GGUF file, our own format."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from moejax.core.errors import InputError
from moejax.io import card, hf, lineage, native, prompt_forms
from moejax.io.loaded import License, Loaded, Progress, Reading, main_dtype
from moejax.io.sharded import Place, load_sharded
from moejax.io.tokenizer import Tokenizer

FORMATS = ("hf", "orbax", "gguf")
__all__ = ["FORMATS", "License", "Loaded", "load_any", "main_dtype", "save_any"]

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "LICENSE*", "README.md"]


def load_any(
    source: str | os.PathLike[str],
    dtype: str = "keep",
    *,
    abstract: bool = False,
    progress: Progress | None = None,
    place: Place | None = None,
) -> Loaded:
    """Loads a model; its parameters are numpy arrays on the host, or lie as `place` says.

    Args:
      source: a Hugging Face folder, our own folder, a GGUF file (or a folder with one), or a hub
        id ("org/name").
      dtype: "keep" leaves parameters as they are stored (quantised ones become float32), or
        "float32", "bfloat16", "float16", "float64".
      abstract: check everything but read no weights; parameters are `jax.ShapeDtypeStruct` then.
      progress: called with (bytes done, bytes in all) after every tensor; not with `place`.
      place: the sharding of each leaf (`moejax.io.sharded.on_mesh` has the rules for a mesh); each
        process reads only the slices that its devices hold. Where there are several processes none
        reads the whole to hash it: the lineage says where the model came from, with no hash.

    Errors: InputError, one line, that names what is missing, broken or does not fit.
    """
    path = find_source(source)
    reading = Reading(dtype, abstract or place is not None, progress)
    loaded = _load_gguf(path, reading) if path.is_file() else _load_folder(path, reading)
    if place is not None and not abstract:
        loaded = load_sharded(loaded, place)
    loaded = dataclasses.replace(loaded, source=str(source))
    if not abstract and not loaded.lineage:
        several = place is not None and jax.process_count() > 1
        loaded = _imported(loaded, "" if several else lineage.hash_path(path), dtype)
    return loaded


def find_source(source: str | os.PathLike[str]) -> Path:
    """The folder or file that is meant, fetched from the hub when it is a hub id."""
    path = Path(source)
    if not path.exists() and _HUB_ID.fullmatch(str(source)):
        path = _download(str(source))
    if not path.exists():
        raise InputError(f"{source} is missing: name a model folder, a .gguf file or a hub id")
    return path


def _imported(loaded: Loaded, xxh3: str, dtype: str) -> Loaded:
    read = {"path": loaded.source, "xxh3": xxh3}
    operations = lineage.append((), "import", [read], {"dtype": dtype})
    return dataclasses.replace(loaded, lineage=operations)


def save_any(
    loaded: Loaded,
    target: str | os.PathLike[str],
    format: str = "hf",
    dtype: str = "keep",
    overwrite: bool = False,
    progress: Progress | None = None,
    max_shard_bytes: int | None = None,
    operations: Callable[[], lineage.Lineage] | None = None,
) -> None:
    """Saves a model as a Hugging Face folder ("hf"), a GGUF file, or in our own format ("orbax").

    A model whose weights were left on disk (`load_any(..., abstract=True)`) is streamed.
    max_shard_bytes: of "hf" only, above it the weights are split into several files; None:
    `hf.MAX_SHARD_BYTES`. operations: asked for the model's lineage when the weights are written
    (inputs may be hashed meanwhile); None: its own.
    """
    if max_shard_bytes is not None and format != "hf":
        raise InputError(f"a largest shard is of hf only, the format is {format}: leave it out")
    if format not in FORMATS:
        raise InputError(f"format {format!r} is unknown: use one of {', '.join(FORMATS)}")
    with ThreadPoolExecutor(1) as pool:
        # Beside the writing: hashing waits for the same bytes, and another core does it.
        unknown = loaded.tensors is not None and not loaded.lineage and operations is None
        digest = pool.submit(lineage.hash_path, find_source(loaded.source)) if unknown else None

        def finish(loaded: Loaded) -> Loaded:
            known = loaded if digest is None else _imported(loaded, digest.result(), "keep")
            if operations is not None:
                known = dataclasses.replace(known, lineage=operations())
            return _exported(known, format, dtype)

        writer: Callable[..., None] = {
            "hf": hf.export_folder,
            "orbax": native.export_folder,
        }.get(format) or _gguf_writer()
        if max_shard_bytes is not None:
            writer = functools.partial(writer, max_shard_bytes=max_shard_bytes)
        writer(target, loaded, dtype, overwrite=overwrite, progress=progress, finish=finish)


def _gguf_writer():
    from moejax.io.gguf_write import export_file  # the gguf package takes a while to import

    return export_file


def _exported(loaded: Loaded, format: str, dtype: str) -> Loaded:
    args = {"format": format, "dtype": dtype}
    return dataclasses.replace(loaded, lineage=lineage.append(loaded.lineage, "export", (), args))


def _load_folder(path: Path, reading: Reading) -> Loaded:
    if (path / native.FILE).exists():
        return native.import_folder(path, reading)
    if (path / "config.json").exists():
        return hf.import_folder(path, reading)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _load_gguf(files[0], reading)
    if files:
        raise InputError(f"{path} holds {len(files)} GGUF files: name one, as {files[0]}")
    raise InputError(
        f"{path} has no config.json, {native.FILE} or .gguf file: it is no model folder"
    )


def _load_gguf(path: Path, reading: Reading) -> Loaded:
    from moejax.io.gguf import GgufFile  # the gguf package takes a while to import

    file = GgufFile(path)
    config = hf.read_config(file.config, path)
    tokenizer = None
    if "tokenizer.ggml.model" in file.metadata:
        tokenizer = Tokenizer.from_gguf_metadata(file.metadata)
        tokenizer.check_fits(config.vocab_size)
    params = hf.import_params(file, config, str(path), reading)
    if not reading.abstract:
        file.close()
    generation = {name: file.config[name] for name in hf.SPECIAL_TOKENS if name in file.config}
    if tokenizer is not None and len(tokenizer.eos_ids) > 1:
        generation["eos_token_id"] = list(tokenizer.eos_ids)
    license = card.named_license(file.metadata.get("general.license"))
    tensors = file if reading.abstract else None
    operations = tuple(json.loads(file.metadata.get("moejax.lineage", "[]")))
    forms = prompt_forms.from_gguf(file.metadata, path)
    about = generation, operations, str(path), license, tensors, forms
    return Loaded(params, config, tokenizer, *about)


def _download(hub_id: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise InputError(
            f"{hub_id} is no folder here, and huggingface_hub, which would fetch it from the hub, "
            "is not installed: pip install huggingface_hub"
        ) from None
    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]
            )
        )
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"{hub_id} is no folder here and could not be fetched from the hub "
            f"({type(error).__name__}): check the name and the network, or name a folder"
        ) from error
