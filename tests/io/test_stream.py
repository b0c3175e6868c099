"""Parts of tensors on their way: what is not finite is found, sums are what the formula says."""

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from moejax.io import mixed
from moejax.io.stream import is_finite


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_what_is_not_finite_is_found_in_every_company(dtype):
    values = np.random.default_rng(0).standard_normal(1001).astype(dtype)
    largest = ml_dtypes.finfo(values.dtype)
    values[3:5] = largest.max, largest.min
    for company in (values, abs(values), -abs(values)):
        assert is_finite(company) and is_finite(company[:0]) and is_finite(company[::2])
        for bad in (np.nan, -np.nan, np.inf, -np.inf):
            spoilt = company.copy()
            spoilt[17] = bad
            assert not is_finite(spoilt), (bad, company[:3])


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7, 9), (8, 8), (3, 5, 7)])
def test_a_mixture_is_the_sum_in_float32_bit_for_bit(monkeypatch, dtype, shape):
    monkeypatch.setattr(mixed, "_BLOCK", 16)
    rng, weights = np.random.default_rng(0), (0.3, 0.9, -0.2)
    arrays = [rng.standard_normal(shape).astype(dtype) for _ in weights]
    if arrays[0].size:
        arrays[0].reshape(-1)[-1] = np.nan
    wide = np.promote_types(arrays[0].dtype, np.float32)
    terms = [array.astype(wide) * wide.type(w) for array, w in zip(arrays, weights, strict=True)]
    wanted = (terms[0] + terms[1] + terms[2]).astype(dtype)
    with ThreadPoolExecutor(1) as pool:
        for turn in (np.ascontiguousarray, np.asfortranarray, _reversed):
            for given in (None, pool):
                found = mixed.linear([turn(a) for a in arrays], weights, given)
                assert found.dtype == dtype and found.shape == turn(wanted).shape
                assert found.tobytes() == turn(wanted).tobytes()


def _reversed(value: np.ndarray) -> np.ndarray:
    return value[..., ::-1] if value.ndim else value
