"""GGUF files written as llama.cpp's converter lays them out, part by part."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from moejax.core.errors import InputError
from moejax.io import atomic, gguf_rope, hf, host, prompt_forms, stream
from moejax.io.gguf import config_of, stored_rows
from moejax.io.gguf_layout import GgufLayout, Place, layout_of, places
from moejax.io.gguf_tokenizer import gguf_from_backend
from moejax.io.loaded import Loaded, Progress
from moejax.io.safetensors import Info, TensorSource
from moejax.models.config import ModelConfig
from moejax.models.families import by_name

DTYPES = ("keep", "float32", "float16", "bfloat16", "q8_0")
_TYPES = {
    "float64": Type.F32,
    "float32": Type.F32,
    "float16": Type.F16,
    "bfloat16": Type.BF16,
    "q8_0": Type.Q8_0,
}
_FILE_TYPES = {Type.F32: 0, Type.F16: 1, Type.Q8_0: 7, Type.BF16: 32}
# Where the operations that made the model stand, as JSON; other readers pass over it.
LINEAGE = "moejax.lineage"


class _Group:
    """One tensor of the file: a Hugging Face tensor, or all experts' in turn."""

    def __init__(self, names: list[str], place: Place, info: Info, dtype: str):
        self.names, self.place, self.info = names, place, info
        stacked = place.expert is not None
        vector = math.prod(info.shape) == info.shape[-1] and not stacked
        shape = info.shape[-1:] if vector else info.shape
        self.shape = (len(names), *shape) if stacked else shape
        if place.cut is not None:
            first, last, size, transposed = place.cut
            matrix = (last - first, shape[1])
            self.shape = (shape[0] // size, *(matrix[::-1] if transposed else matrix))
        # llama.cpp computes with vectors and routers in float32.
        exact = vector or ".ffn_gate_inp." in place.name
        self.type = Type.F32 if exact else _TYPES[info.dtype.name if dtype == "keep" else dtype]
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        if self.shape[-1] % block:
            raise InputError(
                f"tensor {names[0]} has rows of {self.shape[-1]} values, {self.type.name} needs a "
                f"multiple of {block}: use --dtype=float16"
            )
        self.num_bytes = math.prod(self.shape) // block * size

    def parts(self, source: TensorSource) -> Iterator[np.ndarray]:
        """The tensor's bytes in order."""
        head, cut = self.place.head_size, self.place.cut
        for name in self.names:
            # Parts hold whole heads.
            together = head or (cut.size if cut else 1)
            for value in stream.cast_parts(source, name, np.dtype(np.float32), together):
                if head:
                    # Row r comes from where r's place is r.
                    value = value[np.argsort(stored_rows(np.arange(len(value)), head))]
                if cut:
                    value = value.reshape(-1, cut.size, value.shape[1])[:, cut.first : cut.last]
                    value = np.swapaxes(value, 1, 2) if cut.transposed else value
                if self.place.plus_one:
                    value = value + np.float32(1)
                encoded = gguf.quants.quantize(host.row_major(value), self.type)
                if self.type == Type.F16 and not np.isfinite(encoded).all():
                    raise InputError(f"tensor {name} does not fit float16: use --dtype=bfloat16")
                yield encoded


class _Constant:
    """A tensor of the file that is no weight, in float32."""

    type = Type.F32

    def __init__(self, value: np.ndarray):
        self.value = value
        self.shape, self.num_bytes = value.shape, value.nbytes

    def parts(self, source: TensorSource) -> Iterator[np.ndarray]:
        """The tensor's bytes."""
        yield self.value


def export_file(
    target: str | os.PathLike[str],
    loaded: Loaded,
    dtype: str = "keep",
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    finish: Callable[[Loaded], Loaded] = lambda loaded: loaded,
) -> None:
    """Writes one GGUF file, all of it or nothing.

    Args:
      target: the file to make, named *.gguf.
      loaded: a model of a family in `moejax.io.gguf_layout.LAYOUTS`.
      dtype: of matrices: one of `DTYPES`; vectors and routers are float32, as llama.cpp has them.
      overwrite: replace a GGUF file that is there.
      progress: told after every part of a tensor.
      finish: gives the model the lineage to write.

    Errors: InputError for a model that a GGUF file cannot say, and for a tokenizer that it cannot.
    """
    target, config = Path(target), loaded.config
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown for gguf: use one of {', '.join(DTYPES)}")
    check_target(target, overwrite)
    layout = layout_of(config)
    table = by_name(config.family).name_table(config)
    source = hf.tensors_of(loaded, table)
    groups: dict[str, _Group] = {}
    for name, parts in places(layout, config, table).items():
        for place in parts:
            if place.name in groups:
                groups[place.name].names.append(name)
            else:
                groups[place.name] = _Group([name], place, source.infos[name], dtype)
    sizes: dict[str, _Group | _Constant] = {
        name: _Group(g.names, g.place, g.info, dtype) for name, g in groups.items()
    }
    metadata = _metadata(layout, loaded)
    factors = _factors(layout, config)
    if factors is not None:
        sizes[gguf_rope.FACTORS] = _Constant(factors)
    fields = config_of({**metadata}, groups.keys(), layout, target, factors)
    _check_says_it_all(config, fields, layout)
    atomic.require_disk(target, sum(g.num_bytes for g in sizes.values()) + (16 << 20))
    metadata[LINEAGE] = json.dumps(list(finish(loaded).lineage))
    if loaded.prompt_forms:
        metadata[prompt_forms.GGUF_KEY] = json.dumps(loaded.prompt_forms)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        with atomic.space_errors(target):
            _write(Path(temporary), layout, metadata, sizes, source, progress)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_fits(config: ModelConfig) -> None:
    """Raises InputError unless a GGUF file can hold such a model, and llama.cpp load it."""
    layout = layout_of(config)
    table = by_name(config.family).name_table(config)
    names = {place.name for parts in places(layout, config, table).values() for place in parts}
    metadata = _metadata(layout, Loaded(None, config))
    factors = _factors(layout, config)
    fields = config_of(metadata, names, layout, Path("the file"), factors)
    _check_says_it_all(config, fields, layout)


def _factors(layout: GgufLayout, config: ModelConfig) -> np.ndarray | None:
    """The tensor of frequency factors, where rope asks for one and llama.cpp takes it."""
    if not layout.factors or config.rope.kind != "llama3":
        return None
    return gguf_rope.factors_of(config.rope, config.rope_size)


def check_target(target: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raises InputError unless `target` names a .gguf file that is free or may be replaced."""
    target = Path(target)
    if target.suffix != ".gguf":
        raise InputError(f"target {target} must be a file named *.gguf")
    if not target.exists():
        return
    if not overwrite:
        raise InputError(f"target {target} exists: choose another or pass --overwrite")
    if target.is_dir() or target.read_bytes()[:4] != b"GGUF":
        raise InputError(f"target {target} is not a GGUF file: it will not be overwritten")


def _write(path, layout, metadata, groups, source, progress) -> None:
    writer = gguf.GGUFWriter(str(path), layout.architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    main = max(groups.values(), key=lambda group: group.num_bytes)
    writer.add_file_type(_FILE_TYPES[main.type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, group in groups.items():
        plain = group.type in (Type.F32, Type.F16)
        block, size = gguf.GGML_QUANT_SIZES[group.type]
        shape = group.shape if plain else (*group.shape[:-1], group.shape[-1] // block * size)
        kind = np.dtype(np.float32 if plain else np.uint8)
        writer.add_tensor_info(name, shape, kind, group.num_bytes, group.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file, done = writer.fout[0], 0
    total = sum(group.num_bytes for group in groups.values())
    writer.write_padding(file, file.tell())
    for group in groups.values():
        for part in group.parts(source):
            file.write(part.reshape(-1).view(np.uint8).data)
            done += part.nbytes
            if progress is not None:
                progress(done, total)
        writer.write_padding(file, group.num_bytes)
    file.flush()
    os.fsync(file.fileno())
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, str(value))


def _metadata(layout: GgufLayout, loaded: Loaded) -> dict[str, Any]:
    """Key-value fields: the config's, the tokenizer's, the licence."""
    config, prefix = loaded.config, layout.architecture
    fields = by_name(config.family).config_to_hf(config)
    found: dict[str, Any] = {"general.name": Path(loaded.source).stem or config.family}
    if loaded.license.name:
        found["general.license"] = loaded.license.name
    for field in layout.all_fields:
        if fields.get(field.hf) is not None:
            found[f"{prefix}.{field.key}"] = field.kind(fields[field.hf])
    more = {**gguf_rope.rope_fields(config.rope, layout.mscales), **layout.fields_out(fields)}
    found |= {f"{prefix}.{key}": value for key, value in more.items()}
    if layout.factors and config.rope.kind == "llama3":
        found[gguf_rope.NUMBERS] = json.dumps(gguf_rope.llama3_numbers(config.rope))
    if loaded.tokenizer is not None:
        loaded.tokenizer.check_fits(config.vocab_size)
        found |= gguf_from_backend(loaded.tokenizer, config.vocab_size)
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = loaded.generation.get(f"{ours}_token_id")
        token = token[0] if isinstance(token, list) else token
        if token is not None:
            found.setdefault(f"tokenizer.ggml.{theirs}_token_id", int(token))
    return found


def _check_says_it_all(config: ModelConfig, fields: dict[str, Any], layout: GgufLayout) -> None:
    """Raises InputError unless a file that says these fields would be read as the same model."""
    again = hf.function_of(by_name(config.family).config_from_hf(fields))
    for name, value in hf.function_of(config).items():
        if name != "initializer_range" and not _close(again[name], value):
            raise InputError(
                f"a GGUF file of {layout.architecture} has no place for {name}={value}: it would "
                f"be read back as {again[name]}"
            )


def _close(a: Any, b: Any) -> bool:
    """Equality, of numbers that were float32 once."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b
