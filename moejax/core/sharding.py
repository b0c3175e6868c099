"""Path rules -> PartitionSpec: the only place that says how a leaf lies on the mesh."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from moejax.core.errors import InputError

P = PartitionSpec
_WIDE = ("fsdp", "expert")  # what is no expert's is split over the expert axis too
_ALL = ("data", "fsdp", "expert")  # masters of chosen experts: even, whichever were chosen

# Of one layer, by the end of the path; the first rule that fits counts.
MOE_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"experts/w_(gate|up)$", P("expert", "fsdp", "tensor")),
    (r"experts/w_down$", P("expert", "tensor", "fsdp")),
    (r"experts/b_(gate|up)$", P("expert", "tensor")),
    (r"experts/b_down$", P("expert")),
    (r"shared/w_(gate|up)$", P(_WIDE, "tensor")),
    (r"shared/w_down$", P("tensor", _WIDE)),
    (r"shared/b_(gate|up)$", P("tensor")),
    (r"shared/(b_down|w_mix)$", P()),
    (r"router/", P()),
)
# Heads, widths and the vocabulary over "tensor"; D, and the ranks of latent attention, are wide.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    *MOE_RULES,
    (r"(^experts/[^/]+|experts/tuned)/w_(gate|up)$", P(None, _ALL, "tensor")),
    (r"(^experts/[^/]+|experts/tuned)/w_down$", P(None, "tensor", _ALL)),
    (r"(^experts/[^/]+|experts/tuned)/b_(gate|up)$", P(None, "tensor")),
    (r"(^experts/[^/]+|experts/tuned)/b_down$|/ids_M$|^pairs/|(^|/)lora/", P()),
    (r"attn/w_(q|k|v|q_up|kv_up)$", P(_WIDE, "tensor")),
    (r"attn/w_o$", P("tensor", None, _WIDE)),
    (r"attn/w_(q|kv)_down$", P(_WIDE)),
    (r"attn/b_[qkv]$", P("tensor")),
    (r"attn/b_(o|q_down|kv_down)$", P()),
    (r"mlp/w_(gate|up)$", P(_WIDE, "tensor")),
    (r"mlp/w_down$", P("tensor", _WIDE)),
    (r"mlp/b_(gate|up)$", P("tensor")),
    (r"mlp/b_down$", P()),
    (r"norm/(scale|bias|delta)$", P()),
    (r"embed/tokens$", P("tensor", _WIDE)),
    (r"embed/(positions|w_in|w_out)$", P(None, _WIDE)),
    (r"lm_head/w$", P(_WIDE, "tensor")),
)
_STACKED = re.compile(r"layers/[^/]+/")  # has a leading dim of layers, which no axis splits


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Spec of one parameter; InputError if no rule fits or a size does not divide by its axes.

    path: as in `moejax.models.params.abstract_params`, where layers are stacked, or of one layer
    (`moejax.moe.layer.moe_shapes`) with anything but "layers/" before it.
    """
    found = next(((rule, spec) for rule, spec in RULES if re.search(rule, path)), None)
    if found is None:
        raise InputError(f"{path!r} with {len(shape)} dims fits none of {len(RULES)} rules.")
    rule, spec = found
    if _STACKED.match(path):
        spec = P(None, *spec)
    for dim, (size, axes) in enumerate(zip(shape, spec, strict=False)):
        names = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            raise InputError(
                f"{path} {list(shape)}: dim {dim}, a size of {size}, does not divide by the "
                f"{parts} devices of mesh axes {'+'.join(names)} (rule {rule!r}): choose axes "
                f"whose product divides {size}."
            )
    return spec


def at_use(path: str, w: jax.Array, mesh: Mesh) -> jax.Array:
    """A weight as a layer uses it: what "fsdp" and "expert" split is put together (all-gather).

    Its gradient goes back to where the weight lies (reduce-scatter), so no device ever holds the
    whole gradient of the model. For all weights but experts', whose rows travel to them instead.
    """
    spec = param_spec(path, w.shape, mesh)
    whole = NamedSharding(mesh, P(*("tensor" if axes == "tensor" else None for axes in spec)))
    split = NamedSharding(mesh, spec)

    @jax.custom_vjp
    def gather(w):
        return jax.lax.with_sharding_constraint(w, whole)

    gather.defvjp(
        lambda w: (gather(w), None),
        lambda _, grad: (jax.lax.with_sharding_constraint(grad, split),),
    )
    return gather(w)


def everywhere(values: Any, mesh: Mesh | None) -> Any:
    """Within jit: a tree of results that every device, so every process, can read whole."""
    if mesh is None:
        return values
    return jax.lax.with_sharding_constraint(values, NamedSharding(mesh, P()))


def slot_spec(
    slot: str,
    shape: tuple[int, ...],
    params: Mapping[str, tuple[int, ...]],
    mesh: Mesh | AbstractMesh,
) -> PartitionSpec:
    """Spec of a leaf of an optimizer's state: that of the parameter in its path.

    A slot of the parameter's own shape lies as the parameter does. Adafactor's sums over columns or
    rows keep the axes of the dims that are left (dims that it reads as one stay split if only the
    first of them is). What belongs to no parameter, such as a counter, is on every device.

    slot: its path, with the parameter's path in it ("0/mu/layers/0/attn/w_q"); params: the shapes.
    """
    keys = slot.split("/")
    ends = range(len(keys), 0, -1)
    spans = [(keys[i:j], keys[j:]) for j in ends for i in range(j)]
    found = next(((span, rest) for span, rest in spans if "/".join(span) in params), None)
    if found is None:
        return P()
    path = "/".join(found[0])
    whole = params[path]
    spec = param_spec(path, whole, mesh)
    if shape == whole:
        return spec
    axes = tuple(spec) + (None,) * (len(whole) - len(spec))
    return _of_sum(axes, whole, shape, last="col" in found[1])


def _of_sum(spec: tuple, whole: tuple[int, ...], shape: tuple[int, ...], last: bool):
    """Spec of dims [stacked ..., M], where M is one or more dims after the stacked ones.

    The dims that M stands for are the last ones of the leaf (columns) or those that follow the
    stacked ones (rows); their sizes tell which.
    """
    if not shape or math.prod(shape) <= 1:
        return P()
    stacked = len(shape) - 1
    rest = whole[stacked:]
    for count in range(1, len(rest) + 1):
        dims = rest[-count:] if last else rest[:count]
        if math.prod(dims) == shape[-1]:
            first = len(whole) - count if last else stacked
            inner = spec[first + 1 : first + count]
            return P(*spec[:stacked], spec[first] if not any(inner) else None)
    return P()
