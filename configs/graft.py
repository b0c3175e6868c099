"""Every key of `python -m launch.graft`; others start from here.

Claim:    a small model with a bridge to a frozen large one reads more than its own size knows.
Command:  python -m launch.graft --stage=train --config=configs/graft.py \\
              --config.source.model=SOURCE --config.target.model=TARGET \\
              --config.data.path=texts.jsonl --workdir=runs/graft
Expected: depends on the pair; "The bridge's study" in BUILD.md has a small one.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "source": {
                "model": "",  # Knowledge Source, never trained: folder, .gguf file or hub id
                "dtype": "float32",
                "mesh": "",  # devices to split it over, as "tensor=4"; the rest stays on one
                "layers": (-1,),  # whose states are read: number of the block, -1 the final one
            },
            "target": {
                "model": "",  # Generation Module
                "train": "all",  # or "lora", "none": the bridge alone
                "lora_rank": 8,
            },
            "bridge": {
                "placement": "inside",  # or "before", "paper"
                "every": 4,  # blocks per layer of the bridge (inside)
                "num_heads": 8,
                "bottleneck": 256,
                "gate": "channel",  # or "token", "scalar"
                "start": "tanh",  # or "zero_output" (both leave the target as it is), "sigmoid"
                "distance_bias": True,
                "alignment": "settled",  # or "cut"; "same" with one tokenizer
                "prefix": False,  # the source reads the prompt alone
            },
            # What is trained: "bridge", or a rival of as many parameters and tokens: "shuffled" (a
            # bridge with another text's states), "adapter", and by distillation into a target with
            # adapters "forward", "reverse" (KL), "gkd" (on the student's own texts), "hidden".
            "method": "bridge",
            "distill": {
                "weight": 0.5,  # of the distance to the source; the rest is the usual loss
                "beta": 0.5,  # of gkd's JSD
                "on_policy": 0.5,  # gkd: share of the steps on texts that the student wrote
                "prompt": 32,  # gkd: their first tokens come from the data
                "length": 0,  # gkd: tokens of such a row, 0 is data.target_len
            },
            "data": {
                "path": "",  # rows of "text", or conversations: .jsonl, .parquet or a hub data set
                "limit": 0,
                "target_len": 256,  # tokens of a row
                "source_len": 256,
                "drop_long": False,  # leave longer texts out; they are never cut
                "heldout": 64,  # last texts, never trained on
                "seed": 0,
            },
            "cache": {
                "dtype": "bfloat16",  # of states on disk
                "use": True,  # False runs the source in every step
            },
            "train": {
                "steps": 200,
                "epochs": 0,  # over the training texts, instead of steps
                "batch_size": 8,
                "optimizer": "adamw",
                "lr": 1e-4,  # of the bridge
                "target_lr": 5e-5,
                "weight_decay": 0.01,
                "clip_norm": 1.0,
                "schedule": "constant",
                "warmup_share": 0.02,
                "seed": 0,
                "save_every": 100,
                "eval_every": 0,
                "log_every": 10,
            },
            "compute": {"dtype": "float32", "remat": "nothing"},
        }
    )
