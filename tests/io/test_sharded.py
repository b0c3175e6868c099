"""A model read onto a mesh: the same numbers where the rules want them, and no byte too many."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import moejax as mj
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.mesh import AXES, make_mesh
from moejax.core.precision import TOLERANCE
from moejax.core.sharding import param_spec
from moejax.models.families import FAMILIES
from moejax.models.transformer import abstract_params
from tests.fake_devices import on_two_processes, results, start
from tests.io import sharded_cases
from tests.tiny_llama import fields_of, tensors_of, write_llama

PROGRAM = "io/sharded_cases.py"


def test_eight_devices_get_their_slices_and_nothing_else_is_read(tmp_path):
    *found, native = results(start(PROGRAM, 8, str(tmp_path)))
    assert native == {"name": "native"} and len(found) == len(sharded_cases.CASES)
    for one in found:
        assert one["read"] == one["needed"], one
        assert one.get("logits", 0) <= TOLERANCE["float32"], one
    assert sum("logits" in one for one in found) == 2


def test_each_of_two_processes_reads_only_its_own_bytes(tmp_path):
    folder = sharded_cases.write(sharded_cases.CASES[0], tmp_path / "model")
    for (one,) in on_two_processes(PROGRAM, str(folder)):
        assert one["read"] == one["needed"] < 0.6 * one["all"], one


def mesh_of(*sizes: int) -> AbstractMesh:
    return AbstractMesh(sizes, AXES)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_parameter_of_every_preset_has_a_rule(family):
    """And all but norms, biases, routers and the gate of a shared network are split."""
    whole = ("scale", "bias", "delta", "b_", "router/", "w_mix", "_down")
    for config in family.presets.values():
        for path, leaf in tree.flatten(abstract_params(config)).items():
            spec = param_spec(path, leaf.shape, mesh_of(1, 1, 1, 1))
            assert len(spec) <= len(leaf.shape), path
            if path.startswith("layers/"):
                assert not spec or spec[0] is None, path
            if not any(spec):
                assert any(name in path for name in whole), path


def test_sixteen_devices_divide_large_presets():
    """Per device of fsdp 2 x expert 4 x tensor 2 no more than a sixteenth and the small leaves."""
    for name in ("llama", "gemma2", "qwen3_moe", "deepseek_v2"):
        family = next(family for family in FAMILIES if family.name == name)
        config = list(family.presets.values())[-1]
        mesh = mesh_of(1, 2, 4, 2)
        held = total = 0.0
        for path, leaf in tree.flatten(abstract_params(config)).items():
            parts = 1
            for axes in param_spec(path, leaf.shape, mesh):
                for axis in (axes,) if isinstance(axes, str) else axes or ():
                    parts *= mesh.shape[axis]
            total += leaf.size
            held += leaf.size / parts
        assert held < 1.1 * total / 16, (name, held / total)


def test_what_cannot_be_split_says_which_rule_and_which_numbers():
    with pytest.raises(InputError) as caught:
        param_spec("layers/0/attn/w_k", (4, 32, 2, 6), mesh_of(1, 1, 1, 4))
    for part in ("layers/0/attn/w_k [4, 32, 2, 6]", "dim 2", "size of 2", "4 devices", "tensor"):
        assert part in str(caught.value)
    assert "attn/w_(q|k|v|q_up|kv_up)$" in str(caught.value)
    with pytest.raises(InputError, match="size of 30.*8 devices of mesh axes fsdp.expert"):
        param_spec("lm_head/w", (30, 96), mesh_of(1, 2, 4, 1))
    with pytest.raises(InputError, match="fits none of"):
        param_spec("layers/0/attn/w_new", (4, 4), mesh_of(1, 1, 1, 1))


def test_bad_places_are_refused(tmp_path):
    mesh = make_mesh(data=len(jax.devices()))
    with pytest.raises(InputError, match="give one of them"):
        mj.load(tmp_path, mesh=mesh, sharding=lambda path, leaf: None)
    with pytest.raises(InputError, match="lacks"):
        mj.load(tmp_path, mesh=jax.sharding.Mesh(np.array(jax.devices()[:1]), ("fsdp",)))


def test_nan_is_found_in_the_slice_that_has_it(tmp_path):
    tensors = tensors_of(fields_of("plain"))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    folder = write_llama(tmp_path, fields_of("plain"), tensors)
    with pytest.raises(InputError, match="layers.1.mlp.up_proj.weight has 1 values that are NaN"):
        mj.load(folder, mesh=make_mesh(data=len(jax.devices())))
