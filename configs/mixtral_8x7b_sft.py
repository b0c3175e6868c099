"""Supervised fine-tuning of every parameter of Mixtral-8x7B, planned at its real size.

Claim:    the step fits 64 v5p chips with float32 state and AdamW.
Command:  python -m launch.compile --config=configs/mixtral_8x7b_sft.py --topology=v5p:4x4x4
Hardware: v5p:4x4x4, planned and never run.
Expected: BUILD.md, "Planned".
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.source = "mistralai/Mixtral-8x7B-Instruct-v0.1"
    config.model.preset = "mixtral-8x7b"
    config.data.seq_len = 4096
    config.train.steps = 1000
    config.train.batch_size = 64
    config.train.optimizer = "adamw"
    config.train.lr = 1e-5
    config.train.schedule = "cosine"
    config.train.warmup_share = 0.03
    config.train.clip_norm = 1.0
    config.train.save_every = 200
    config.compute.dtype = "bfloat16"
    config.compute.remat = "dots"  # "full" takes half of the memory and a fifth more time
    config.save.dtype = "bfloat16"
    return config
