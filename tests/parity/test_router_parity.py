"""Every family's MoE block against transformers' own, live; the goldens are what it computes."""

import numpy as np
import pytest

from moejax.core.precision import TOLERANCE
from tests.moe.test_routing_goldens import assert_equal_blocks, goldens
from tests.parity.make_router_goldens import balance_losses, computed
from tests.router_cases import CASES


@pytest.mark.parametrize("name", CASES)
def test_block_equals_transformers(name):
    found = computed(CASES[name])
    assert_equal_blocks(CASES[name], found)
    for key, value in found.items():
        wanted = goldens()[f"{name}/{key}"]
        atol = TOLERANCE["float32"] * np.abs(wanted).max()
        np.testing.assert_allclose(value, wanted, rtol=0, atol=atol)


def test_balance_losses_are_the_goldens():
    for name, value in balance_losses(goldens()["mixtral/logits"]).items():
        np.testing.assert_allclose(value, goldens()[f"balance/{name}"], rtol=1e-6)
