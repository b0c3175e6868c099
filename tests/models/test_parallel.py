"""A model on a mesh is the model on one device: loss, statistics, gradient, decoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from moejax.core.errors import InputError
from moejax.core.mesh import AXES
from moejax.core.precision import TOLERANCE
from moejax.moe.expert_parallel import Parallel, split_rows
from tests.fake_devices import results, start


def test_models_on_eight_devices_equal_one_device():
    found = results(start("models/parallel_cases.py", 8))
    assert [one.pop("name") for one in found] == ["upcycled", "mixtral", "deepseek"]
    assert "decode" in found[1]
    for one in found:
        assert max(one.values()) <= TOLERANCE["float32"], found


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="batch of 3 rows does not divide by the 2 devices"):
        mesh = jax.sharding.AbstractMesh((1, 2, 1, 1), AXES)
        split_rows(jnp.zeros((3, 2, 4)), mesh)  # type: ignore[arg-type]
    whole = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES)
    assert split_rows(jnp.ones((3, 2, 4)), Parallel(whole).mesh).shape == (3, 2, 4)
