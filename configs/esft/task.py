"""Claim: a mixture of experts learns a task by its own few experts (ESFT, arXiv 2407.01906).

Command:  python -m launch.esft --stage=train --config=configs/esft/task.py \\
              --config.model.source=MODEL --config.data.source=task.jsonl --workdir=runs/task
Hardware: whatever holds the model, and 12 bytes for each chosen parameter on top (float32 master
          and two moments).
Expected: WORKDIR/delta with the experts that the first 131,072 training tokens select at token
          score 0.2: 5 to 15 % of a fine-grained model's.
"""

from ml_collections import ConfigDict

from configs.esft import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.data.update(seq_len=4096)
    config.train.update(steps=500, batch_size=32, accumulation=32, eval_every=100, save_every=100)
    config.train.keep_best = True
    config.compute.remat = "full"
    return config
