"""Every family against transformers, live: logits, loss, gradients, decoding, bfloat16, export."""

import pytest

from tests.parity.cases import CASES, decodes_alike
from tests.parity.measure import MAX_BFLOAT16_RATIO, MAX_FLOAT32, measure


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_what_transformers_computes(name, tmp_path):
    found = measure(name, tmp_path)
    assert found.logits < MAX_FLOAT32
    assert found.loss < MAX_FLOAT32
    assert found.gradient < MAX_FLOAT32
    assert (found.decoded is not None) == decodes_alike(name)
    if found.decoded is not None:
        assert found.decoded < MAX_FLOAT32
        assert found.tokens_equal == found.tokens_compared > 40
    assert found.routed_equal == found.routed_compared
    assert found.bfloat16 <= MAX_BFLOAT16_RATIO
