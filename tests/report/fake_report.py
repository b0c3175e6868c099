"""A report with made-up numbers, for tests and for looking at the plots:

python -m tests.report.fake_report DIR
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from moejax import report


def fake_report(num_layers: int = 30, num_routed: int = 3, seed: int = 0) -> dict[str, Any]:
    """Every optional part is there; merged_learned beats sft_dense in nll and nothing else."""
    rng = np.random.default_rng(seed)
    nll = dict(zip(report.MODELS, (2.257, 1.832, 1.851, 1.846, 1.8455, 1.861), strict=True))
    rows = [_row(name, nll[name]) for name in report.MODELS]
    differences = [
        {
            "model": "merged_learned",
            "minus": minus,
            "nll": report.difference("nll", *bounds),
            "pass_at_1": report.difference("pass_at_1", 0.033, -0.1, 0.167),
        }
        for minus, bounds in (
            ("sft_dense", (-0.0135, -0.024, -0.003)),
            ("merged_uniform", (-0.0005, -0.002, 0.001)),
            ("shared_only", (-0.0155, -0.031, 0.002)),
        )
    ]
    curves = {
        name: [
            {"tokens": 512 * (i + 1), "loss": float(2.3 - 0.025 * i + 0.1 * rng.normal())}
            for i in range(*steps)
        ]
        for name, steps in (("sft_dense", (0, 20)), ("moe", (0, 16)), ("merge", (16, 20)))
    }
    alpha_LJ = 1 + 0.05 * rng.normal(size=(num_layers, num_routed))
    routed_LJ = np.exp(alpha_LJ) / np.exp(alpha_LJ).sum(axis=1, keepdims=True)
    load_LJ = rng.dirichlet(np.full(num_routed, 30.0), size=num_layers) * 8192 * 2
    return {
        "rows": rows,
        "differences": differences,
        "curves": curves,
        "coefficients": {"lam": [0.75] * num_layers, "routed": routed_LJ.tolist()},
        "expert_load": load_LJ.tolist(),
        "run": {"seed": seed, "model": "made up <b>", "steps": 16},
    }


def _row(name: str, nll: float) -> dict[str, Any]:
    trained = name != "base"
    return {
        "model": name,
        "nll": nll,
        "nll_interval": [nll - 0.09, nll + 0.1],
        "nll_tokens": 5312,
        "pass_at_1": 8 / 30,
        "pass_at_1_n": 30,
        "pass_at_1_interval": [0.142, 0.444],
        "params": 316_000_000 if name == "moe" else 134_515_008,
        "active_params": 240_000_000 if name == "moe" else 134_515_008,
        "train_tokens": 9_800 if trained else 0,
        "train_flops": 1.7e13 if trained else 0.0,
        "wall_s": 161.4 if trained else 0.0,
    }


if __name__ == "__main__":
    for path in report.write(sys.argv[1], fake_report()):
        print(path)
