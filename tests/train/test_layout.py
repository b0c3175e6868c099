"""Which mesh is chosen, and where optimizer slots lie on it."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.mesh import AXES
from moejax.core.sharding import param_spec, slot_spec
from moejax.models.config import ModelConfig
from moejax.models.params import abstract_params
from moejax.moe.config import MoEConfig
from moejax.train import layout
from moejax.train.optim import OptimConfig, make_optimizer
from moejax.train.state import init_state, named

DENSE = ModelConfig("llama", 96, 2, 16, 24, 4, 2, 4, max_position=64)
MOE = dataclasses.replace(DENSE, moe=MoEConfig(4, 2))
P = PartitionSpec
WIDE = ("fsdp", "expert")


def chosen(monkeypatch, model, num, rows, accumulation=1, **wanted):
    """The sizes chosen for `num` devices that are not there."""
    monkeypatch.setattr(layout, "make_mesh", lambda *sizes, devices: sizes)
    devices = [None] * num
    return layout.choose_mesh(wanted, model, rows, accumulation, devices)


@pytest.mark.parametrize(
    "model, num, rows, wanted, sizes",
    [
        (DENSE, 1, 1, {}, (1, 1, 1, 1)),
        (DENSE, 8, 8, {}, (1, 8, 1, 1)),
        (DENSE, 8, 4, {}, (1, 4, 1, 2)),  # 4 rows are no work for 8
        (DENSE, 8, 8, {"data": 2}, (2, 4, 1, 1)),
        (DENSE, 32, 32, {}, (2, 16, 1, 1)),  # D is 16
        (MOE, 8, 8, {}, (1, 2, 4, 1)),
        (MOE, 8, 8, {"expert": 1, "tensor": 2}, (1, 4, 1, 2)),
    ],
)
def test_sizes(monkeypatch, model, num, rows, wanted, sizes):
    assert chosen(monkeypatch, model, num, rows, **wanted) == sizes


@dataclasses.dataclass
class Named:
    device_kind: str


@pytest.mark.parametrize(
    "kind, width, heads, sizes",
    [
        ("TPU v5", 2048, 16, (16, 16, 1, 1)),  # 128 of 2,048 each, the rest are copies
        ("TPU v5", 512, 16, (64, 4, 1, 1)),
        ("TPU v5 lite", 32_768, 256, (1, 256, 1, 1)),  # 26 GB of state in a 128th: no room
        ("NVIDIA H100 80GB HBM3", 2048, 16, (1, 256, 1, 1)),  # no tiles
        ("cpu", 2048, 16, (1, 256, 1, 1)),
    ],
)
def test_a_tpu_gets_whole_tiles_where_memory_allows(monkeypatch, kind, width, heads, sizes):
    model = ModelConfig("llama", 4096, 16, width, 4 * width, heads, heads, width // heads)
    monkeypatch.setattr(layout, "make_mesh", lambda *sizes, devices: sizes)
    assert layout.choose_mesh({}, model, 256, 1, [Named(kind)] * 256) == sizes


@pytest.mark.parametrize(
    "wanted, rows, words",
    [
        ({"fsdp": 3}, 8, "mesh {'fsdp': 3} and 8 devices"),
        ({"tensor": 8}, 8, r"dim 2, a size of (2|4), does not divide by the 8 devices.*tensor"),
        ({}, 3, "a batch of 3 rows in 1 microbatch.*multiple of 8"),
        ({"row": 2}, 8, "sizes are 1 or more"),
    ],
)
def test_what_does_not_fit(monkeypatch, wanted, rows, words):
    with pytest.raises(InputError, match=words):
        chosen(monkeypatch, DENSE, 8, rows, **wanted)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_every_slot_lies_as_its_parameter_does(name):
    params = abstract_params(MOE)
    optimizer = make_optimizer(OptimConfig(name, clip_norm=1.0, weight_decay=0.1), 3)
    slots = named(jax.eval_shape(lambda p: init_state(p, optimizer), params).opt_state)
    shapes = {path: leaf.shape for path, leaf in tree.flatten(params).items()}
    mesh = AbstractMesh((1, 2, 2, 2), AXES)
    held = total = 0
    for path, leaf in tree.flatten(slots).items():
        spec = slot_spec(path, leaf.shape, shapes, mesh)
        part = NamedSharding(mesh, spec).shard_shape(leaf.shape)  # raises if it does not divide
        held, total = held + math.prod(part), total + leaf.size
        if leaf.shape in shapes.values() and name == "adamw" and leaf.ndim > 1:
            parameter = path.partition("/mu/")[2] or path.partition("/nu/")[2]
            assert spec == param_spec(parameter, leaf.shape, mesh), path
    assert held < (0.25 if name == "adamw" else 0.6) * total


def test_the_sums_of_a_factored_matrix():
    mesh = AbstractMesh((1, 2, 2, 2), AXES)
    shapes = {"layers/0/attn/w_o": (3, 4, 5, 16), "layers/0/moe/experts/w_up": (3, 4, 16, 24)}
    where = "0/moments/layers/0/"

    def spec(slot, *shape):
        return slot_spec(where + slot, shape, shapes, mesh)

    assert spec("attn/w_o/row", 3, 20) == P(None, "tensor")  # heads are split, [H, C] read as one
    assert spec("attn/w_o/col", 3, 16) == P(None, WIDE)
    assert spec("moe/experts/w_up/row", 3, 4, 16) == P(None, "expert", "fsdp")
    assert spec("moe/experts/w_up/col", 3, 4, 24) == P(None, "expert", "tensor")
    assert slot_spec("2/count", (), shapes, mesh) == P()


def test_a_slot_of_an_optimizer_that_is_not_ours():
    params = {"embed": {"tokens": jnp.zeros((96, 16))}}
    slots = named(optax.sgd(0.1, momentum=0.9).init(params))
    (path,) = tree.flatten(slots)
    found = slot_spec(path, (96, 16), {"embed/tokens": (96, 16)}, AbstractMesh((1, 2, 2, 2), AXES))
    assert found == P("tensor", WIDE)
