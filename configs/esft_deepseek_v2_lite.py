"""ESFT's setting (arXiv 2407.01906) on DeepSeek-V2-Lite with expert parallelism: all parameters.

Claim:    training every parameter, the memory that ESFT is compared with, fits 8 v5p chips.
Command:  python -m launch.compile --config=configs/esft_deepseek_v2_lite.py --topology=v5p:2x2x2
Hardware: v5p:2x2x2, planned and never run.
Expected: BUILD.md, "Planned".

Batch 32 of 4,096 tokens and AdamW with betas 0.9 and 0.95, weight decay 0.1 and clipping at 1 are
the paper's and its code's; the learning rate, 3e-5, is theirs for training everything. One row per
device at a time: 4 parts of 8 rows.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.source = "deepseek-ai/DeepSeek-V2-Lite"
    config.model.preset = "deepseek-v2-lite"
    config.data.seq_len = 4096
    config.train.steps = 500
    config.train.batch_size = 32
    config.train.accumulation = 4
    config.train.optimizer = "adamw"
    config.train.lr = 3e-5
    config.train.schedule = "constant"
    config.train.weight_decay = 0.1
    config.train.clip_norm = 1.0
    config.train.save_every = 100
    config.train.eval_every = 100
    config.compute.dtype = "bfloat16"
    config.compute.remat = "full"
    config.save.dtype = "bfloat16"
    return config
