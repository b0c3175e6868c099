"""Every key of `python -m launch.esft --stage=train`: those of launch.train, and `method`.

train.freeze has to stay empty: `method` says what is trained. Patterns of train.no_decay and
train.lr_scale have to fit what that is.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Defaults: the paper's optimizer at its learning rate (arXiv 2407.01906, section 4.1)."""
    config = base.get_config()
    config.model.dtype = "keep"
    config.train.update(optimizer="adamw", lr=1e-5, schedule="constant", clip_norm=1.0)
    config.train.weight_decay = 0.1
    config.method = ConfigDict(
        {
            "name": "esft",  # or "full", "lora", "frozen"
            # esft: a file of --stage=select. Empty: score the first num_tokens training tokens,
            # then select, within the run.
            "experts": "",
            "score": "token",
            "threshold": 0.2,
            "num_tokens": 131072,
            "shared_experts": False,  # of a selection within the run
            "non_expert_modules": False,
            # Whether the router's losses are added. With a frozen router they reach only experts
            # of earlier layers, through what those hand on.
            "balance_loss": False,
            "router_noise": False,  # of routers that learn with noise (XFT's)
            "lora_rank": 8,
            "lora_alpha": 16.0,
            # Patterns of a layer's weights.
            "lora_targets": ("attn/w_*", "mlp/w_*", "moe/experts/w_*", "moe/shared/w_*"),
            "whole_model": False,  # esft: write the whole model too, not the delta alone
        }
    )
    return config
