"""Hugging Face folders, in and out, by a family's name table: no code per family."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import atomic, card, host, lineage, prompt_forms, stream
from moejax.io.loaded import Loaded, Progress, Reading, main_dtype
from moejax.io.safetensors import SafetensorsFolder, TensorSource, dtype_named, write_folder
from moejax.io.tokenizer import Tokenizer
from moejax.models.config import ModelConfig
from moejax.models.families import Weight, by_architecture, by_name

MAX_SHARD_BYTES = 5 * 10**9
_TRAINING_ONLY = (
    *("balance", "balance_scope", "balance_weight", "z_weight", "count_padding"),
    *("load_estimator", "jitter", "jitter_experts", "bias_rate"),
)
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def import_folder(folder: str | os.PathLike[str], reading: Reading = Reading()) -> Loaded:
    """Reads a Hugging Face folder; parameters are numpy arrays, tensor by tensor, near one copy.

    Args:
      folder: has config.json and model.safetensors, or shards with their index.
      reading: dtype and the like.

    Errors: InputError, one line, for whatever is missing, broken or does not fit.
    """
    folder = Path(folder)
    fields = read_fields(folder)
    config = read_config(fields, folder)
    _refuse_pickles(folder)
    source = SafetensorsFolder(folder)
    params = import_params(source, config, str(folder), reading)
    has_tokenizer = any((folder / name).exists() for name in TOKENIZER_FILES)
    tokenizer = Tokenizer.from_folder(folder) if has_tokenizer else None
    if tokenizer is not None:
        tokenizer.check_fits(config.vocab_size)
    return Loaded(
        params,
        config,
        tokenizer,
        _generation(folder, fields),
        lineage.read(folder),
        str(folder),
        card.read_license(folder),
        source if reading.abstract else None,
        prompt_forms.read(folder),
    )


def read_fields(folder: Path) -> dict[str, Any]:
    """The fields of config.json."""
    fields = atomic.read_json(folder / "config.json")
    if not isinstance(fields, dict):
        raise InputError(f"{folder / 'config.json'} is not a JSON object: fetch the file again")
    return fields


def read_config(fields: dict[str, Any], place: str | os.PathLike[str]) -> ModelConfig:
    """The model that config.json's fields describe; InputError for an unknown architecture."""
    names = fields.get("architectures") or ()
    if not isinstance(names, (list, tuple)) or len(names) != 1:
        raise InputError(f"{place}: config.json must name one architecture, it names {names!r}")
    family = by_architecture(names[0])
    if fields.get("quantization_config"):
        raise InputError(f"{place}: config.json says that the weights are quantised: not read")
    try:
        return family.config_from_hf(fields)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{place}: a field of config.json has a wrong type ({error})") from error


def import_params(
    source: TensorSource, config: ModelConfig, place: str, reading: Reading
) -> tree.Tree:
    """Reads every tensor of a model into our tree, each straight into its stacked leaf."""
    family = by_name(config.family)
    table = family.name_table(config)
    _check_tensors(source, table, config, place, family.computed)
    leaves: dict[str, Any] = dict(_abstract_leaves(source, table, reading.dtype))
    total, done = tree.num_bytes(leaves), 0
    if reading.abstract:
        return tree.unflatten(leaves)
    for weight in table:
        value = source.read(weight.hf_name)
        part = leaves[weight.path]
        if not weight.index:
            part = leaves[weight.path] = host.aligned(weight.from_hf(value), part.dtype)
        else:
            if isinstance(part, jax.ShapeDtypeStruct):  # the first of its stack
                part = leaves[weight.path] = host.empty(part.shape, part.dtype)
            part = part[weight.index]
            with np.errstate(over="ignore"):
                part[...] = weight.from_hf(value)
        stream.check_finite(value, part, f"{place}: tensor {weight.hf_name}")
        done += part.nbytes
        if reading.progress is not None:
            reading.progress(done, total)
    return tree.unflatten(leaves)


def _abstract_leaves(
    source: TensorSource, table: list[Weight], dtype: str
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every leaf; parts stored in several types meet in the widest."""
    stacks: dict[str, list[Weight]] = {}
    for weight in table:
        stacks.setdefault(weight.path, []).append(weight)
    leaves = {}
    for path, stack in stacks.items():
        leading = tuple(1 + last for last in max(weight.index for weight in stack))
        stored = {source.infos[weight.hf_name].dtype for weight in stack}
        kept = stored.pop() if len(stored) == 1 else np.dtype(jnp.promote_types(*stored))
        kept = kept if dtype == "keep" else dtype_named(dtype)
        leaves[path] = jax.ShapeDtypeStruct((*leading, *stack[0].shape), kept)
    return leaves


def _check_tensors(
    source, table: list[Weight], config: ModelConfig, place: str, computed: str
) -> None:
    infos = source.infos
    for weight in table:
        if weight.hf_name not in infos:
            raise InputError(f"{place}: tensor {weight.hf_name} is missing")
        shape = infos[weight.hf_name].shape
        if shape != weight.hf_shape:
            raise InputError(
                f"{place}: tensor {weight.hf_name} has shape {list(shape)}, "
                f"config.json asks for {list(weight.hf_shape)}"
            )
    extra = sorted(infos.keys() - {weight.hf_name for weight in table})
    extra = [name for name in extra if not re.fullmatch(computed, name)]
    if extra == ["lm_head.weight"] and config.tie_embeddings:
        embedding = next(weight for weight in table if weight.path == "embed/tokens")
        if not _is_same(source, "lm_head.weight", embedding.hf_name):
            raise InputError(
                f"{place}: lm_head.weight differs from the embedding, but config.json ties them: "
                "set tie_word_embeddings to false"
            )
        return
    if extra:
        raise InputError(
            f"{place}: tensor {extra[0]} has no place in the model of config.json"
            + (f" (nor have {len(extra) - 1} more)" if extra[1:] else "")
        )


def _is_same(source: TensorSource, first: str, second: str) -> bool:
    return source.infos[first] == source.infos[second] and all(
        np.array_equal(source.read(first, rows), source.read(second, rows))
        for rows in stream.row_ranges(source.infos[first])
    )


def _refuse_pickles(folder: Path) -> None:
    if any(folder.glob("*.safetensors")) or (folder / "model.safetensors.index.json").exists():
        return
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pth"))
    if pickles:
        raise InputError(
            f"{folder} has only pickled weights ({pickles[0].name}), which can run code: "
            "save it as safetensors first"
        )


def _generation(folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    generation = {name: fields[name] for name in SPECIAL_TOKENS if fields.get(name) is not None}
    path = folder / "generation_config.json"
    if path.exists():
        generation |= atomic.read_json(path)
    return generation


def export_folder(
    target: str | os.PathLike[str],
    loaded: Loaded,
    dtype: str = "keep",
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
    finish: Callable[[Loaded], Loaded] = lambda loaded: loaded,
) -> None:
    """Writes a folder that transformers loads (vLLM was not tried): all of it, or nothing.

    Args:
      target: the folder to make.
      loaded: a model that `config_fields` has a class for; InputError for any other.
      dtype: of the tensors; "keep" leaves each as it is.
      max_shard_bytes: above it the weights are sharded, with an index.
      overwrite: replace a model folder that is there.
      progress: told after every part of a tensor.
      finish: gives the model the lineage to write, when the weights have been.
    """
    config = loaded.config
    fields = config_fields(config)
    if loaded.tokenizer is not None:
        loaded.tokenizer.check_fits(config.vocab_size)
    table = by_name(config.family).name_table(config)
    entries = list(stream.entries(tensors_of(loaded, table), table, dtype))
    atomic.check_target(target, overwrite)
    atomic.require_disk(target, sum(entry.num_bytes for entry in entries) + (16 << 20))
    with atomic.atomic_dir(target, overwrite) as folder:
        write_folder(folder, entries, max_shard_bytes, progress)
        stored = main_dtype(loaded.params) if dtype == "keep" else dtype_named(dtype)
        special = {n: loaded.generation[n] for n in SPECIAL_TOKENS if n in loaded.generation}
        atomic.write_json(folder / "config.json", fields | special | {"torch_dtype": stored.name})
        if loaded.generation:
            atomic.write_json(folder / "generation_config.json", loaded.generation)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save(folder)
        prompt_forms.write(folder, loaded.prompt_forms)
        loaded = finish(loaded)
        lineage.write(folder, loaded.lineage)
        card.write_license(folder, loaded.license)
        name = Path(target).name
        atomic.write_text(folder / "README.md", card.model_card(loaded, name, stored.name))


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields; InputError for what the family's class in transformers cannot be."""
    family = by_name(config.family)
    fields = family.config_to_hf(config)
    again = function_of(family.config_from_hf(fields))
    if again["moe"] is None and config.moe is not None:
        raise InputError(
            "a mixture of experts of this kind has no class in transformers: use --format=orbax"
        )
    for name, value in function_of(config).items():
        if again[name] != value:
            raise InputError(
                f"{family.architecture} has no place for {name}={value}: it would be read back as "
                f"{again[name]}"
            )
    return {"architectures": [family.architecture], "model_type": family.model_type} | fields


def has_class(config: ModelConfig) -> bool:
    """Whether transformers has a class for it: dense, or with experts of the family's own kind."""
    if config.moe is None:
        return True
    try:
        config_fields(config)
    except InputError:
        return False
    return True


def function_of(config: ModelConfig) -> dict[str, Any]:
    """The config's fields but those of its experts that act in training only."""
    fields = config.to_json()
    if fields["moe"] is not None:
        fields["moe"] = {k: v for k, v in fields["moe"].items() if k not in _TRAINING_ONLY}
    return fields


def tensors_of(loaded: Loaded, table: list[Weight]) -> TensorSource:
    """The model's tensors in Hugging Face's layout: on disk where they still are, or in memory."""
    if loaded.tensors is not None:
        return loaded.tensors
    return stream.TreeSource(loaded.params, table)
