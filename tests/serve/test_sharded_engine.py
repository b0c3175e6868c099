"""An engine on a mesh answers what it answers on one device."""

import json
import subprocess
import sys

import numpy as np

from tests import fake_devices


def test_sharded_equals_one_device(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.serve.sharded_engine", str(tmp_path)],
        env=fake_devices.environment(8),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for (ids, log_probs), (one_ids, one_log_probs) in zip(
        found["sharded"], found["one"], strict=True
    ):
        assert ids == one_ids
        np.testing.assert_allclose(log_probs, one_log_probs, atol=2e-5)
    assert found["devices"] == 8 and found["parts_of_heads"] == 2
