"""Our Adafactor against transformers' torch one, live."""

import numpy as np

from moejax.core import tree
from tests.train.adafactor_case import run_ours, run_torch


def test_adafactor_equals_transformers_adafactor():
    ours, theirs = tree.flatten(run_ours()), tree.flatten(run_torch())
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-5, atol=1e-7, err_msg=path)
