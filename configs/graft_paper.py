"""LLM Modules as its reference trains: Bespoke-Stratos-17k, chat, 15 epochs, two learning rates.

Claim:    the published architecture and recipe (arXiv 2502.08213), for comparison: its layers see
          later text, which no generation can have, so its loss is no language model's.
Command:  python -m launch.graft --stage=train --config=configs/graft_paper.py \\
              --config.source.model=Qwen/Qwen2-1.5B --config.target.model=TARGET \\
              --workdir=runs/graft_paper
Hardware: one device of 16 GB (`launch.bench --suite=graft` has its memory and time).
Expected: not known; nobody has run it here at full size.

TARGET is a GPT-Neo-125M with the source's tokenizer. What differs from the reference: the loss is
on answers, the held-out conversations are fixed, longer ones are left out and counted, not cut.
"""

from ml_collections import ConfigDict

from configs import graft


def get_config() -> ConfigDict:
    config = graft.get_config()
    config.bridge.update(
        placement="paper", gate="channel", start="sigmoid", distance_bias=False, alignment="same"
    )
    config.data.update(
        path="bespokelabs/Bespoke-Stratos-17k", limit=5000, target_len=2048, source_len=2048,
        drop_long=True, heldout=500,
    )
    config.train.update(steps=0, epochs=15, batch_size=1, lr=1e-4, target_lr=5e-5)
    config.compute.dtype = "bfloat16"
    return config
