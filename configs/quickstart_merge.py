"""Claim: merging the tuned mixture gives a dense model back at a held-out loss near the mixture's.

Command:  python -m launch.merge --config=configs/quickstart_merge.py --source=runs/moe/model \\
              --target=runs/merged --workdir=runs/merge
          and its control, the same with --mode=uniform and another --target
Hardware: 2 CPU cores, 8 GiB.
Expected: no claim that learning beats equal coefficients; the launcher prints how far it moved.

The paper's learning rate, 1e-5, moves no coefficient by more than 2% in its whole stage; 0.05 moves
them visibly in a few steps.
"""

from ml_collections import ConfigDict

from configs import quickstart_sft


def get_config() -> ConfigDict:
    config = quickstart_sft.get_config()
    config.train.steps = 4
    config.train.lr = 0.05
    config.train.save_every = 0
    return config
