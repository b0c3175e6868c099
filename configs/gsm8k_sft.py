"""SFT of SmolLM2-135M-Instruct on GSM8K, dense or upcycled: one recipe for any devices.

Claim:    the same losses, step by step, on one device, on 8 devices and on 2 processes of 4.
Command:  python -m launch.train --config=configs/gsm8k_sft.py --workdir=runs/gsm8k \\
              --config.model.source=SmolLM2-135M-Instruct.Q4_1.gguf
          For the MoE: --config.model.source=runs/upcycled, which is made by
          python -m launch.upcycle --source=SmolLM2-135M-Instruct.Q4_1.gguf --experts=4 --top_k=3 \\
              --balance_scope=global --target=runs/upcycled
          8 CPU devices: XLA_FLAGS=--xla_force_host_platform_device_count=8 before the command;
          2 processes: --multihost=127.0.0.1:9876,2,0 in one shell, ...,2,1 in another.
          A file for the data: --config.data.source=gsm8k_train.jsonl
          All of it, in three steps of short rows: python -m tests.recipe DIR
Hardware: anything from 2 CPU cores (4 GiB; the MoE 6 GiB) to a pod: rows divide by 8.
Expected: BUILD.md, "Training on a mesh": losses equal in all three places, dense and MoE, the
          routers' noise on. (With balance_scope "local", the default of upcycling, an MoE's balance
          loss is another function on each mesh.) A whole epoch in bfloat16 took an H200 28 s dense
          and 49 s the MoE; 1.384 nats per answer token of GSM8K's test set become 0.665 and 0.667
          (BUILD.md, "On an NVIDIA GPU").
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.data.source = "openai/gsm8k:main"
    config.data.seq_len = 512
    config.data.heldout_share = 0.02
    config.data.num_heldout = 64
    config.train.epochs = 1.0
    config.train.batch_size = 8
    config.train.optimizer = "adafactor"
    config.train.lr = 5e-5
    config.train.schedule = "cosine"
    config.train.warmup_share = 0.03
    config.train.clip_norm = 1.0
    config.train.save_every = 50
    config.train.keep_last = 2
    return config
