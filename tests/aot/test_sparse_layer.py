"""A decoding layer that skips half of its heads and neurons, counted by the TPU's compiler."""

import pytest

from launch import bench_shadow


def test_a_layer_computes_while_it_reads():
    bytes_bound = {"cycles": 0.0, "bytes": 8.19e5}
    assert bench_shadow.layer_s(bytes_bound) == pytest.approx(1e-6)
    assert bench_shadow.layer_s(bytes_bound | {"cycles": 3e3}) == pytest.approx(2e-6)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("shape", "least", "most"),  # bytes read, of the dense layer's
    [
        # Half of all but what makes keys and values; for the predictor 1% of the model, float32.
        ("llama-3.2-1b", 0.5, 0.56),
        # As many groups as heads: keys and values are a sixth of the layer.
        pytest.param("opt-1.3b", 0.58, 0.63, marks=pytest.mark.slow),
    ],
)
def test_half_a_layer_takes_less_than_the_goal_on_a_v5e(shape, least, most):
    (row,) = bench_shadow.tpu_rows(False, lambda figure: shape in figure)
    assert row.reached, row
    dense, sparse = (bench_shadow._count(kind, shape) for kind in ("dense", "sparse"))
    assert least < sparse["bytes"] / dense["bytes"] < most
