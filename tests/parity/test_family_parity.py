"""Every family against transformers, live: logits, loss, gradients, decoding, bfloat16, export.

Every case's logits are also compared with goldens (`tests/io/test_goldens.py`), so that by default
one case of a family runs here, and those that no other case resembles; all with --slow.
"""

import pytest

from tests.parity.cases import CASES, decodes_alike
from tests.parity.measure import MAX_BFLOAT16_RATIO, MAX_FLOAT32, measure

UNLIKE_OTHERS = {
    "llama-llama3_biases_odd_head",
    "qwen2-layer_types_yarn",
    "opt-after_projected",
    "qwen3_moe-dense_between",
    "deepseek_v2-q_rank_groups_scaled_biases",
}
FIRST = {name.split("-")[0]: name for name in reversed(CASES)}.values()


def _case(name: str):
    by_default = name in UNLIKE_OTHERS or name in FIRST
    return pytest.param(name, marks=() if by_default else pytest.mark.slow)


def test_what_runs_by_default_exists():
    assert set(CASES) >= UNLIKE_OTHERS


@pytest.mark.parametrize("name", [_case(case) for case in CASES])
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
