"""Parts of tensors on their way: what is not finite is found, whatever is beside it."""

import ml_dtypes
import numpy as np
import pytest

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
