"""XFT's run on DeepSeek-Coder-1.3B (arXiv 2404.15247), one of its stages: sft, moe, merge.

Claim:    a 1.3B dense model made by upcycling, tuning and merging solves more of HumanEval than the
          same model tuned directly on the same data: 67.1 (HumanEval) and 64.6 (HumanEval+) are the
          paper's numbers. Not reproduced here yet.
Command:  python -m launch.train --config=configs/xft_deepseek_1b.py:sft --workdir=runs/sft
          python -m launch.upcycle --source=deepseek-ai/deepseek-coder-1.3b-base --experts=8 \\
              --top_k=6 --target=runs/upcycled
          python -m launch.train --config=configs/xft_deepseek_1b.py:moe --workdir=runs/moe
          python -m launch.merge --config=configs/xft_deepseek_1b.py:merge --lam=0.75 \\
              --source=runs/moe/model --target=runs/merged --workdir=runs/merge
          Sizes only: --config.model.source=preset:deepseek-coder-1.3b --dry_run. On TPUs that are
          not here: python -m launch.compile --config=configs/xft_deepseek_1b.py:moe \\
              --topology=v5p:2x2x2
Hardware: the paper's was 2 GPUs for the dense model and 4 for the MoE; `--dry_run` prints ours.
Expected: the same data passes for both: 5 epochs of SFT against 4 of the MoE and 1 of the merge.

Differs from the paper's run: rows are packed (theirs are padded, one conversation each), so an
epoch has fewer updates; the rotary base is carried over (theirs falls back to 10000 in the MoE);
parameters at rest are float32 in both stages (theirs are bfloat16 in the MoE's); conversations are
in the tokenizer's own chat form, not the paper's.
"""

from ml_collections import ConfigDict

from configs import base

STAGES = {
    "sft": {"source": "deepseek-ai/deepseek-coder-1.3b-base", "epochs": 5.0, "lr": 5e-5},
    "moe": {"source": "runs/upcycled", "epochs": 4.0, "lr": 5e-5},
    "merge": {"source": "runs/moe/model", "epochs": 1.0, "lr": 1e-5},
}


def get_config(stage: str = "moe") -> ConfigDict:
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is not one of {', '.join(STAGES)}")
    config = base.get_config()
    config.model.source = STAGES[stage]["source"]
    config.model.preset = "deepseek-coder-1.3b"
    if stage == "moe":
        config.model.experts, config.model.top_k = 8, 6
    config.data.source = "ise-uiuc/Magicoder-Evol-Instruct-110K"
    config.data.seq_len = 1024
    config.data.heldout_share = 0.005
    config.data.num_heldout = 500
    config.train.epochs = STAGES[stage]["epochs"]
    config.train.batch_size = 64
    config.train.accumulation = 8
    config.train.optimizer = "adafactor"
    config.train.lr = STAGES[stage]["lr"]
    config.train.schedule = "linear"
    config.train.warmup_share = 0.0728  # theirs: 625 of 8,590 updates, 500 of 6,872, 125 of 1,718
    config.train.log_every = 10
    config.train.save_every = 500
    config.train.eval_every = 500
    config.compute.dtype = "bfloat16"
    config.save.dtype = "bfloat16"
    return config
