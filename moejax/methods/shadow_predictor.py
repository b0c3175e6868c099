"""The unified predictor: one small network that scores every head and block from one vector.

ShadowLLM (arXiv 2406.16635, section 4): x is what layer 0's attention mixed at the prompt's last
token, before its output projection, min-max normalised per example;

    scores = W_out relu(W_in x + b_in) + b_out        for all layers at once.

Heads and blocks share W_in here, and the network has outputs per block of neurons, not per neuron.
The reference's two networks add 4 to 16 % to a model.

Predictors of DejaVu (`moejax.methods.shadow_dejavu`, variant "dejavu") have the same folder with
other weights: two networks per layer that read that layer's own input at every token.

The folder:
  shadow.json             what it is of: see `PredictorInfo`
  predictor.safetensors   w_in [E, hidden], b_in, w_out_heads [hidden, L * heads], b_out_heads,
                          w_out_blocks [hidden, L * blocks], b_out_blocks; or of DejaVu's
                          heads/w_1 and neurons/w_1 [L, D, hidden], heads/w_2 [L, hidden, H],
                          neurons/w_2 [L, hidden, F] or [.., E * F], of neurons in the order that
                          the model named by the hash has; and of both static_heads [L, heads],
                          static_blocks [L, blocks]: float32; order_LF int32 [L, F] or [L, E, F]:
                          neuron j of the model that is run is neuron order[l, j] of the one named
                          by the hash (`moejax.methods.shadow_order.reordered`)
  modeling_shadow.py      the same masks on a model of transformers, by hooks
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import atomic
from moejax.methods import shadow_transformers
from moejax.methods.shadow_mask import Mask, Sizes, sizes_of
from moejax.methods.shadow_order import checked_order
from moejax.models.config import ModelConfig
from moejax.models.masked import one_neuron_shape

MODELING = "modeling_shadow.py"
# 2: variant "token" scores the token that it reads; in 1 it scored the next one.
INFO, WEIGHTS, FORMAT_VERSION = "shadow.json", "predictor.safetensors", 2
PER_LAYER = "dejavu"  # the variant that every layer asks
OF_FIRST_LAYER = ("unified", "per_layer_normalised", "token")  # what they read
VARIANTS = (*OF_FIRST_LAYER, PER_LAYER)
IN_STEP = ("token", PER_LAYER)  # decide at every token what that token computes
# What identifies a model's shape, of `ModelConfig`.
FIELDS = ("num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads", "head_size", "vocab_size")


@dataclasses.dataclass(frozen=True)
class PredictorInfo:
    """What a predictor is of.

    Attributes:
      model_sha256: `moejax.io.lineage.hash_params` of the model before its neurons are reordered.
      fields: of its config, `FIELDS` and the number of experts.
      sizes: units per layer, block size, layers never pruned.
      criterion: which importance it predicts. variant: a name of VARIANTS, what it learned from:
        scores of texts, scaled over all layers or in each, or what the token itself uses, of all
        layers ("token") or of the layer that is asked ("dejavu").
      budget: the rule that K of a sparsity s follows; "local" keeps units - floor(s * units).
      hidden: width of the network, of DejaVu's each. num_examples: it was trained on.
    """

    model_sha256: str
    fields: dict[str, int]
    sizes: Sizes
    criterion: str
    variant: str
    hidden: int
    budget: str = "local"
    num_examples: int = 0


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A predictor: its weights by the names above, without order and static scores, and those.

    Of DejaVu's as `shadow_dejavu.fit` gives them per part.
    """

    info: PredictorInfo
    params: dict[str, Any]
    order_LF: np.ndarray
    static: Mask


def fields_of(config: ModelConfig) -> dict[str, int]:
    """What a predictor's `fields` must be for this model."""
    found = {name: int(getattr(config, name)) for name in FIELDS}
    return found | {"num_experts": config.moe.num_experts if config.moe else 0}


def normalised(context_BE: jax.Array) -> jax.Array:
    """Each row moved and scaled to [0, 1]; a constant row gives zeros."""
    x = jnp.asarray(context_BE, jnp.float32)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    return (x - low) / jnp.maximum(high - low, 1e-30)


def predict(params: dict[str, Any], context_BE: jax.Array, sizes: Sizes) -> Mask:
    """Scores [B, L, heads] and [B, L, blocks] from layer 0's context, as it is, [B, H * C]."""
    hidden = jax.nn.relu(normalised(context_BE) @ params["w_in"] + params["b_in"])

    def out(name: str, num_units: int) -> jax.Array:
        y = hidden @ params[f"w_out_{name}"] + params[f"b_out_{name}"]
        return y.reshape(*y.shape[:-1], sizes.num_layers, num_units)

    return Mask(out("heads", sizes.heads), out("blocks", sizes.blocks))


def init(key: jax.Array, input_size: int, hidden: int, static: Mask) -> dict[str, jax.Array]:
    """A network whose output is the static scores whatever it reads: training starts there."""
    w_in = jax.random.normal(key, (input_size, hidden)) * (2 / input_size) ** 0.5
    params = {"w_in": w_in, "b_in": jnp.zeros(hidden)}
    for name in ("heads", "blocks"):
        flat = jnp.asarray(getattr(static, name), jnp.float32).reshape(-1)
        params |= {f"w_out_{name}": jnp.zeros((hidden, flat.size)), f"b_out_{name}": flat}
    return params


def hidden_within(config: ModelConfig, sizes: Sizes, share: float, num_params: int) -> int:
    """The widest network, in steps of 8, of at most `share` of the model's parameters."""
    outputs = sizes.num_layers * (sizes.heads + sizes.blocks)
    inputs = config.num_heads * value_size(config)
    hidden = int((share * num_params - outputs) / (inputs + 1 + outputs)) // 8 * 8
    if hidden < 8:
        raise InputError(
            f"a predictor of {outputs} outputs has no room in {share:.2%} of {num_params:,} "
            f"parameters: take blocks larger than {sizes.block}"
        )
    return hidden


def value_size(config: ModelConfig) -> int:
    """Channels of what one head mixes."""
    return config.head_size if config.mla is None else config.mla.v_size


def save(folder: str | os.PathLike[str], predictor: Predictor, overwrite: bool = False) -> None:
    """Writes a predictor's folder: all of it, or nothing. Inverse: `load`."""
    flat = tree.flatten(predictor.params)
    arrays = {name: np.asarray(w, np.float32) for name, w in flat.items()}
    arrays["static_heads"] = np.asarray(predictor.static.heads, np.float32)
    arrays["static_blocks"] = np.asarray(predictor.static.blocks, np.float32)
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(f"the predictor's {name} is not finite: nothing is written")
    arrays["order_LF"] = checked_order(predictor.order_LF)
    about = {"format_version": FORMAT_VERSION} | dataclasses.asdict(predictor.info)
    atomic.check_target(folder, overwrite)
    with atomic.atomic_dir(folder, overwrite) as made:
        atomic.write_json(made / INFO, about)
        safetensors.numpy.save_file(arrays, made / WEIGHTS)
        # What others need to run it: no import of ours in it.
        atomic.write_text(made / MODELING, Path(shadow_transformers.__file__).read_text())


def load(
    folder: str | os.PathLike[str], config: ModelConfig, model_sha256: str | None = None
) -> Predictor:
    """Reads a predictor for a model.

    model_sha256: the model's hash, where the caller has it; then it must be the very model.
    InputError: a folder that is none or is cut, another format, another model's sizes or weights.
    """
    folder = Path(folder)
    if not (folder / INFO).is_file():
        raise InputError(f"{folder} has no {INFO}: name the folder of a predictor")
    about = atomic.read_json(folder / INFO)
    version = about.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise InputError(
            f"{folder}: format version {version!r}, this reads {FORMAT_VERSION}: train it anew "
            "(--stage=collect and --stage=train into another --workdir)"
        )
    try:
        info = PredictorInfo(**about | {"sizes": Sizes(**about["sizes"])})
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder}/{INFO} is not of this version: {error}") from None
    if info.variant not in VARIANTS:
        raise InputError(
            f"{folder}/{INFO}: variant {info.variant!r} is none of {', '.join(VARIANTS)}"
        )
    own = fields_of(config)
    for name, value in own.items():
        if info.fields.get(name) != value:
            raise InputError(
                f"{folder} is a predictor for another model: its {name} is "
                f"{info.fields.get(name)}, this model's {value}"
            )
    if model_sha256 is not None and model_sha256 != info.model_sha256:
        raise InputError(
            f"{folder} is a predictor for other weights: of {info.model_sha256[:12]}..., this "
            f"model's hash is {model_sha256[:12]}...; train one for this model"
        )
    arrays = _arrays(folder, config, info)
    static = Mask(arrays.pop("static_heads"), arrays.pop("static_blocks"))
    order = checked_order(arrays.pop("order_LF"))
    return Predictor(info, tree.unflatten(arrays), order, static)


def _arrays(folder: Path, config: ModelConfig, info: PredictorInfo) -> dict[str, np.ndarray]:
    try:
        arrays = safetensors.numpy.load_file(folder / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{folder}/{WEIGHTS} is missing or broken: {error}") from None
    s = info.sizes
    if s != sizes_of(config, s.block, s.unit, s.first):
        raise InputError(f"{folder}: {s} are not the sizes of this model")
    neurons, shapes = one_neuron_shape(config), _shapes(config, info)
    shapes |= {f"static_{n}": (s.num_layers, getattr(s, n)) for n in ("heads", "blocks")}
    shapes["order_LF"] = (s.num_layers, *neurons)
    for name, shape in shapes.items():
        if name not in arrays or arrays[name].shape != shape:
            found = list(arrays[name].shape) if name in arrays else "missing"
            raise InputError(f"{folder}/{WEIGHTS}: {name} is {found}, expected {list(shape)}")
        if not np.isfinite(arrays[name]).all():
            raise InputError(f"{folder}/{WEIGHTS}: {name} holds NaN or infinity")
    return {name: arrays[name] for name in shapes}


def _shapes(config: ModelConfig, info: PredictorInfo) -> dict[str, tuple[int, ...]]:
    """Of the networks' weights."""
    s, width, shapes = info.sizes, info.hidden, dict[str, tuple[int, ...]]()
    if info.variant == PER_LAYER:
        units = {"heads": config.num_heads, "neurons": math.prod(one_neuron_shape(config))}
        for part, count in units.items():
            shapes[f"{part}/w_1"] = s.num_layers, config.d_model, width
            shapes[f"{part}/w_2"] = s.num_layers, width, count
        return shapes
    shapes |= {"w_in": (config.num_heads * value_size(config), width), "b_in": (width,)}
    for name in ("heads", "blocks"):
        count = s.num_layers * getattr(s, name)
        shapes |= {f"w_out_{name}": (width, count), f"b_out_{name}": (count,)}
    return shapes


def hash_folder(folder: str | os.PathLike[str]) -> str:
    """sha256 of all in a predictor's folder that decides a mask."""
    parts = [(Path(folder) / name).read_bytes() for name in (INFO, WEIGHTS)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def num_params(params: dict[str, Any]) -> int:
    """Parameters of the network."""
    return tree.num_params(params)
