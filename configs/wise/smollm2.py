"""Claim: a demonstration, one seed: what interpolation does to SmolLM2-135M tuned on few problems.

Command:  python -m launch.train --config=configs/wise/smollm2.py --workdir=runs/smollm2 \\
              --config.model.source=SmolLM2-135M-Instruct.Q4_1.gguf \\
              --config.data.source=gsm8k_train.jsonl
          the same with --export_step=30, which writes runs/smollm2/model_step_30; then
          python -m launch.wise --stage=sweep --early=runs/smollm2/model_step_30 \\
              --late=runs/smollm2/model --task=gsm8k --data=gsm8k_test.jsonl --num=50 \\
              --num_samples=8 --k=1,2,4,8 --delta_grid=0,0.5,1 --max_new_tokens=160 \\
              --batch_size=96 --noscore_samples --sampling=temperature=0.7 \\
              --sampling=temperature=1 --out=runs/smollm2_sweep
Hardware: 2 CPU cores, 6 GiB.
Expected: hardly an answer is right: Pass@1 0.013 late, 0.025 early, 0.029 chosen, Pass@8 0.07,
          0.17 and 0.20; intervals hold one another. 25 minutes of tuning, 18 of sampling.
"""

from ml_collections import ConfigDict

from configs import gsm8k_sft


def get_config() -> ConfigDict:
    config = gsm8k_sft.get_config()
    config.data.limit = 160
    config.data.seq_len = 256
    config.data.on_long = "truncate"
    config.train.epochs = 6.0
    config.train.batch_size = 4
    config.train.lr = 1e-4
    config.train.schedule = "constant"
    config.train.keep_every = 30
    config.train.save_every = 30
    return config
