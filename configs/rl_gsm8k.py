"""Claim: GRPO on verifiable answers raises the reward of a tuned model, best of launch.wise's.

Command:  python -m launch.rl --config=configs/rl_gsm8k.py --config.model.source=runs/wise \\
              --config.data.path=gsm8k_train.jsonl --workdir=runs/rl
Hardware: a model of 0.5 to 2B wants a TPU or GPU; on two CPU cores SmolLM2-135M takes minutes per
          iteration with the sizes below.
Expected: not known yet; nobody has run it to the end.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "source": "",  # model folder, .gguf file or hub id; also the KL's reference
                "dtype": "float32",
            },
            "data": {
                "task": "gsm8k",  # of moejax/evals/tasks; its grader is the reward
                "path": "",  # problems: a file or a hub data set; "" is the task's own
                "form": "",  # prompt form, "" the task's first
                "limit": 0,  # most problems read, 0 for all
                "heldout": 64,  # last problems, evaluated greedily and never trained on
            },
            "rl": {
                "iterations": 100,
                "prompts": 8,  # problems per iteration
                "answers": 8,  # to each: a group
                "epochs": 1,  # passes over an iteration's answers
                "minibatches": 1,  # updates per pass
                "max_answer": 256,  # tokens
                "clip_low": 0.2,
                "clip_high": 0.2,
                "kl_weight": 0.04,  # distance from the model it started with; 0 keeps no copy of it
                "scale": True,  # divide advantages by their group's deviation
                "mean": "answer",  # or "token": what counts alike
                "seed": 0,
            },
            "train": {
                "optimizer": "adamw",
                "lr": 1e-6,
                "clip_norm": 1.0,
                "accumulation": 1,  # microbatches per update
                "save_every": 5,  # iterations between checkpoints
                "eval_every": 10,  # and between evaluations on held-out problems; 0: at the end
                "keep_last": 2,
                "log_every": 1,  # updates
            },
            "compute": {"dtype": "float32", "remat": "dots", "batch_size": 64},
        }
    )
