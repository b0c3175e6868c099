"""Path rules -> PartitionSpec: the only place that says how a parameter lies on the mesh."""

import math
import re

from jax.sharding import Mesh, PartitionSpec

from moejax.core.errors import InputError

P = PartitionSpec
_WIDE = ("fsdp", "expert")  # what is no expert's is split over the expert axis too

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


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
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
