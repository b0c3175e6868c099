"""Claim: ESFT learns a domain as well as full fine-tuning does and forgets less of the others.

Command:  python -m launch.esft_study --config=configs/esft/study.py --workdir=runs/esft_study
Hardware: 2 CPU cores, 6 GiB; pre-training takes an hour, 55 runs of three to five minutes follow.
          Resumable by arm, rate and seed: what is done is not done again, and several processes
          share what is left.
Expected: the target needs a third of the experts that an even router would (0.34). The claim holds
          in part (BUILD.md): chosen experts learn more and forget less than random ones, and more
          than LoRA where 0.1 nats of the others may be lost (0.17 against 0.14), but full
          fine-tuning at a low rate learns 0.23 there. `:tiny` goes through every stage in a few
          minutes and shows nothing but that they work.

A mixture of experts is pre-trained on standard-library source, C++, GSM8K (the target, 5 %),
WikiText and Debian's manual pages in German, French and Japanese. Its experts have to specialise
before anything is adapted: experts needed for a token score of 0.2 against an even router's.
"""

from ml_collections import ConfigDict


def get_config(size: str = "full") -> ConfigDict:
    config = ConfigDict(
        {
            "seeds": (0, 1, 2),
            "target": "gsm8k",
            "target_share": 0.05,  # of the rows in pre-training; the others share the rest evenly
            "data": {
                "folder": "../shared/data",
                "man": "/usr/share/man",
                "languages": ("de", "fr", "ja"),
                "vocab_size": 4096,
                "seq_len": 256,
                "max_chars": 6_000_000,  # of each domain
                "heldout_rows": 64,  # of each domain, to choose on and again to report on
            },
            "model": {
                "layers": 5,
                "width": 256,
                "heads": 4,
                "experts": 32,
                "top_k": 4,
                "expert_ffn": 128,
                "balance_weight": 0.001,
            },
            "pretrain": {"steps": 2400, "batch_size": 16, "lr": 1e-3},
            # Largest share of an even router's experts that the target may need on average.
            "specialised_below": 0.85,
            "adapt": {"steps": 150, "batch_size": 16},
            "rates": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3),  # tried for every method, on seed 0
            "thresholds": {"token": 0.2, "gate": 0.1},
            "draws": 5,  # random controls
        }
    )
    if size == "tiny":
        config.seeds = (0, 1)
        config.rates = (1e-3, 3e-3)
        config.draws = 1
        config.specialised_below = 2.0
        config.data.update(vocab_size=512, seq_len=64, max_chars=60_000, heldout_rows=4)
        config.model.update(layers=2, width=32, heads=2, experts=8, top_k=2, expert_ffn=16)
        config.pretrain.update(steps=12, batch_size=8)
        config.adapt.update(steps=3, batch_size=4)
    elif size != "full":
        raise ValueError(f"size {size!r} is unknown: use full or tiny")
    return config
