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


def moe_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Spec of a parameter of one MoE layer; InputError if a size does not divide by its axes.

    path: as in `moejax.moe.layer.moe_shapes`, with anything before it.
    """
    spec = next((spec for pattern, spec in MOE_RULES if re.search(pattern, path)), None)
    if spec is None:
        raise InputError(f"{path!r} with {len(shape)} dims fits none of {len(MOE_RULES)} rules.")
    for size, axes in zip(shape, spec, strict=False):
        names = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            raise InputError(
                f"{path}: a size of {size} does not divide by the {parts} devices of mesh axes "
                f"{'+'.join(names)}: choose axes whose product divides {size}."
            )
    return spec
