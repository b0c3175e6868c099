"""A decoding layer that skips half of its heads and neurons, counted by the TPU's compiler."""

import pytest

from launch import bench_shadow


def test_a_layer_computes_while_it_reads():
    bytes_bound = {"cycles": 0.0, "bytes": 8.19e5}
    assert bench_shadow.layer_s(bytes_bound) == pytest.approx(1e-6)
    assert bench_shadow.layer_s(bytes_bound | {"cycles": 3e3}) == pytest.approx(2e-6)


@pytest.mark.aot
def test_half_a_llama_layer_takes_less_than_the_goal_on_a_v5e():
    (row,) = bench_shadow.tpu_rows(False, lambda figure: "llama" in figure)
    assert row.reached, row
    dense, sparse = (bench_shadow._count(kind, "llama-3.2-1b") for kind in ("dense", "sparse"))
    # Half of all but what makes keys and values; 1% of the model, in float32, for the predictor.
    assert 0.5 < sparse["bytes"] / dense["bytes"] < 0.56
