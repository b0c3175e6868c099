"""What all stages of `launch.graft` share: the two models, the bridge, texts, states on disk."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from launch.mesh_text import parse_mesh
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.data.alignment import ALIGNMENTS
from moejax.data.grafting import (
    GraftExample,
    Joined,
    batch_of,
    check_lengths,
    make_example,
    read_texts,
)
from moejax.io import atomic, lineage
from moejax.io.load import Loaded, find_source, load_any
from moejax.io.sharded import on_mesh
from moejax.io.states import States, texts_hash, write_states
from moejax.methods.graft import GraftConfig, bridge_shapes, check_fits, init_bridge
from moejax.methods.graft_forward import source_states
from moejax.models.transformer import ForwardOptions

BRIDGE, TARGET = "bridge", "target"


@dataclasses.dataclass(frozen=True)
class Setup:
    """Two models (weights on disk until they are asked for) and the bridge between them."""

    config: ConfigDict
    source: Loaded
    target: Loaded
    graft: GraftConfig
    joined: Joined

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of a row, target and source."""
        return self.config.data.target_len, self.config.data.source_len

    @property
    def options(self) -> ForwardOptions:
        """How to compute."""
        return ForwardOptions(self.config.compute.dtype, self.config.compute.remat)

    def source_params(self) -> tree.Tree:
        """The source's weights, on the device or split over all of them (source.mesh)."""
        source = self.config.source
        if source.mesh:
            place = on_mesh(parse_mesh(source.mesh))
            return load_any(source.model, source.dtype, place=place).params
        return jax.device_put(load_any(source.model, source.dtype).params)

    def batch(self, examples: Sequence[GraftExample]) -> dict[str, np.ndarray]:
        """Rows of both models."""
        pads = (self.joined.target.pad_id, self.joined.source.pad_id)
        return batch_of(examples, self.lengths, pads)


def make_setup(config: ConfigDict) -> Setup:
    """Reads both models' configs and tokenizers; InputError where they cannot be joined."""
    loaded = {}
    for role in ("source", "target"):
        name = config[role].model
        if not name:
            raise InputError(f"--config.{role}.model is missing: a folder, .gguf file or hub id")
        loaded[role] = load_any(name, "float32", abstract=True)
        if loaded[role].tokenizer is None:
            raise InputError(f"{name} has no tokenizer: texts cannot be read")
    if config.source.mesh and not config.cache.use:
        raise InputError("a source on a mesh is read from its states: leave cache.use on")
    source, target, b = loaded["source"], loaded["target"], config.bridge
    paper = b.placement == "paper"
    sizes = (source.config.d_model, target.config.d_model)
    graft = GraftConfig.paper(*sizes) if paper else GraftConfig(
        *sizes, b.placement, b.every, 2, tuple(config.source.layers), b.num_heads, b.bottleneck,
        b.gate, b.start, b.distance_bias,
    )
    check_fits(graft, source.config, target.config)
    if b.alignment not in ALIGNMENTS:
        raise InputError(
            f"bridge.alignment {b.alignment!r} is unknown: use {', '.join(ALIGNMENTS)}"
        )
    how = "same" if paper else b.alignment
    assert source.tokenizer is not None and target.tokenizer is not None
    if paper and config.data.target_len != config.data.source_len:
        raise InputError(
            f"placement 'paper' reads one state per token: data.target_len="
            f"{config.data.target_len} and data.source_len={config.data.source_len} must be equal"
        )
    joined = Joined(target.tokenizer, source.tokenizer, how, b.prefix, paper)
    for role, length, model in (
        ("target", config.data.target_len, target.config),
        ("source", config.data.source_len, source.config),
    ):
        if length > model.max_position:
            raise InputError(
                f"data.{role}_len={length} is more than the {model.max_position} positions that "
                f"the {role} has: lower it (texts are never cut)"
            )
    return Setup(config, source, target, graft, joined)


def load_examples(setup: Setup, say=print) -> tuple[list[GraftExample], list[GraftExample]]:
    """(training, held out): the last texts of the file are held out, the same in every run."""
    data = setup.config.data
    if not data.path:
        raise InputError("--config.data.path is missing: a file of texts or conversations")
    texts = read_texts(data.path, data.limit or None)
    examples = [make_example(text, setup.joined) for text in texts]
    kept = check_lengths(examples, setup.lengths, data.drop_long)
    if len(kept) < len(examples):
        say(f"left out {len(examples) - len(kept)} of {len(examples)} texts: too long")
    if not 1 <= data.heldout < len(kept):
        raise InputError(f"data.heldout={data.heldout} of {len(kept)} texts: hold out fewer")
    return kept[: -data.heldout], kept[-data.heldout :]


# -- source states ---------------------------------------------------------------------------------


def state_identity(setup: Setup, examples: Sequence[GraftExample]) -> dict[str, Any]:
    """What states on disk are of."""
    source = setup.joined.source
    vocabulary = json.dumps(sorted(source.backend.get_vocab().items()))
    return {
        "model": lineage.hash_path(find_source(setup.config.source.model)),
        "tokenizer": texts_hash([[ord(c) for c in vocabulary]]),
        "layers": list(setup.graft.taps),
        "texts": texts_hash([e.source_ids for e in examples]),
        "size": setup.graft.read_size,
        "dtype": setup.config.cache.dtype,
    }


def cache_states(
    setup: Setup, examples: Sequence[GraftExample], folder: Path, progress=lambda done, of: None
) -> None:
    """Runs the source once over all texts that are not on disk yet."""
    params: list[tree.Tree] = []
    size = setup.config.train.batch_size

    def compute(numbers: Sequence[int]) -> list[np.ndarray]:
        if not params:  # the source is loaded only if something is missing
            params.append(setup.source_params())
        rows: list[np.ndarray] = []
        for at in range(0, len(numbers), size):
            part = [examples[n] for n in numbers[at : at + size]]
            filled = part + part[-1:] * (size - len(part))
            states = states_of(setup, params[0], setup.batch(filled)["source_tokens"])
            rows += [np.asarray(states[i, : len(e.source_ids)]) for i, e in enumerate(part)]
        return rows

    lengths = [len(e.source_ids) for e in examples]
    write_states(folder, state_identity(setup, examples), lengths, compute, progress)


def states_of(setup: Setup, params: tree.Tree, tokens_BS) -> jax.Array:
    """What the bridge reads of the source [B, S, R]."""
    return _states((setup.source.config, setup.graft.taps, setup.options), params, tokens_BS)


@functools.partial(jax.jit, static_argnums=0)
def _states(static, params, tokens_BS):
    config, taps, options = static
    return source_states(params, config, taps, tokens_BS, options=options)[0]


def state_rows(setup: Setup, states: States, numbers: Sequence[int]) -> np.ndarray:
    """States of some examples, padded [B, S, R]."""
    shape = (len(numbers), setup.lengths[1], setup.graft.read_size)
    rows = np.zeros(shape, np.float32)
    for row, number in enumerate(numbers):
        found = states[number]
        rows[row, : len(found)] = found
    return rows


# -- the bridge on disk ----------------------------------------------------------------------------


def fresh_bridge(setup: Setup) -> tree.Tree:
    """The bridge before training."""
    key = jax.random.key(setup.config.train.seed)
    return init_bridge(key, setup.graft, setup.target.config)


def save_bridge(setup: Setup, bridge: tree.Tree, folder: Path) -> None:
    """bridge.safetensors and bridge.json: what to attach, and to which models (by hash).

    Adapters of a rival method are kept the same way. Only moejax loads them: neither transformers
    nor vLLM has such a layer.
    """
    flat = {path: np.asarray(leaf) for path, leaf in tree.flatten(bridge).items()}
    described = {
        "method": setup.config.method,
        "graft": dataclasses.asdict(setup.graft),
        "alignment": setup.joined.how,
        "prefix": setup.joined.prefix,
        "source": lineage.input_of(setup.config.source.model),
        "target": lineage.input_of(setup.config.target.model),
    }
    with atomic.atomic_dir(folder, overwrite=True) as part:
        save_file(flat, part / "bridge.safetensors")
        atomic.write_json(part / "bridge.json", described)


def check_bridge(folder: Path) -> None:
    """InputError unless a run has written its bridge there."""
    if not (folder / "bridge.json").is_file():
        raise InputError(f"{folder} holds no bridge: run the train stage first")


def load_bridge(setup: Setup, folder: Path) -> tree.Tree:
    """Inverse of `save_bridge`; InputError for a bridge between other models or of other shapes."""
    check_bridge(folder)
    described = atomic.read_json(folder / "bridge.json")
    wanted = json.loads(json.dumps(dataclasses.asdict(setup.graft)))
    if described["method"] != setup.config.method:
        raise InputError(
            f"{folder} was trained by method {described['method']!r}, not {setup.config.method!r}"
        )
    if described["graft"] != wanted:
        keys = [k for k in wanted if described["graft"].get(k) != wanted[k]]
        raise InputError(f"{folder} is a bridge with another {', '.join(keys)} than the config's")
    for role in ("source", "target"):
        found = lineage.hash_path(find_source(setup.config[role].model))
        if found != described[role].get("xxh3"):
            raise InputError(
                f"{folder} was trained with another {role} ({described[role]['path']}) than "
                f"{setup.config[role].model}: their hashes differ"
            )
    found = tree.unflatten(dict(load_file(folder / "bridge.safetensors")))
    if "w_in" in found:  # adapters
        return jax.tree.map(jax.numpy.asarray, found)
    shapes = bridge_shapes(setup.graft, setup.target.config)
    if {p: tuple(x.shape) for p, x in tree.flatten(found).items()} != shapes:
        raise InputError(f"{folder}/bridge.safetensors does not have the shapes of its config")
    return jax.tree.map(jax.numpy.asarray, found)


