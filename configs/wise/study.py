"""Claim: tuning a small model on one derivation a problem loses Pass@k; interpolation restores it.

Command:  python -m launch.wise_study --config=configs/wise/study.py --workdir=runs/wise_study
Hardware: 2 CPU cores, 4 GiB. Resumable: what is done is not done again.
Expected: late in the tuning Pass@32 has fallen from 0.72 to 0.42; the interpolation has 0.71, and
          0.17 of Pass@1 where the late model has 0.13 (BUILD.md, "WiSE-FT's study": three seeds).
          About 45 minutes of pre-training, then 50 a seed. `--config=configs/wise/study.py:tiny`
          goes through every stage in a few minutes and shows nothing but that they work.
"""

from ml_collections import ConfigDict


def get_config(size: str = "full") -> ConfigDict:
    config = ConfigDict(
        {
            "seeds": (0, 1, 2),
            "model": {"layers": 4, "width": 256, "ffn": 704, "heads": 8},
            "problems": {
                "numbers": 4,
                "largest": 12,
                "noise": 0.35,  # share of derivations in pre-training that miss the target
                "tune": 2000,  # problems of SFT, each with one derivation
                "validation": 100,
                "test": 300,
            },
            "pretrain": {"steps": 2500, "batch_size": 64, "lr": 1e-3},
            "sft": {"epochs": 20, "batch_size": 50, "lr": 2e-4},
            "trajectory": 6,  # checkpoints of SFT, log-spaced
            "sweep": {
                "num_samples": 64,
                "validation_samples": 32,  # of each problem to choose on
                "k": (1, 2, 4, 8, 16, 32),
                "criterion": "pass@16",
                "deltas": (0.3, 0.5, 0.7),
                "temperatures": (0.6, 1.3, 1.6),  # of the late model, besides 1
                "chosen_temperatures": (1.3, 1.6),  # of the chosen one, besides 1
                "batch_size": 256,
            },
            "rl": {"iterations": 40, "prompts": 16, "answers": 16, "lr": 2e-5, "kl_weight": 0.0},
        }
    )
    if size == "tiny":
        config.seeds = (0,)
        config.trajectory = 3
        changes = {
            "model": {"layers": 1, "width": 32, "ffn": 64, "heads": 2},
            "problems": {"numbers": 3, "tune": 40, "validation": 12, "test": 16},
            "pretrain": {"steps": 40, "batch_size": 32},
            "sft": {"epochs": 4, "batch_size": 20},
            "sweep": {
                "num_samples": 8,
                "validation_samples": 4,
                "k": (1, 4),
                "criterion": "pass@4",
                "batch_size": 64,
                "deltas": (0.5,),
                "temperatures": (0.7,),
                "chosen_temperatures": (1.3,),
            },
            "rl": {"iterations": 2, "prompts": 4, "answers": 4},
        }
        for section, fields in changes.items():
            config[section].update(fields)
    elif size != "full":
        raise ValueError(f"size {size!r} is unknown: use full or tiny")
    return config
