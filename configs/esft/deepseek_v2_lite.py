"""ESFT on DeepSeek-V2-Lite (arXiv 2407.01906) with expert parallelism: selected experts only.

Claim:    the state of training 6 of 64 experts a layer is a quarter of training all parameters.
Command:  python -m launch.compile --config=configs/esft/deepseek_v2_lite.py --topology=v5p:2x2x2
          With a selection: --config.method.experts=EXPERTS.json, as --stage=select writes it.
Hardware: v5p:2x2x2, planned and never run.
Expected: BUILD.md, "Planned"; configs/esft_deepseek_v2_lite.py, which trains all, is the control.

Six evenly spread experts of each layer stand for a selection: the paper's at token score 0.2 have
5 to 15 % of the experts. Bfloat16 weights at rest, float32 masters and moments of what is trained.
"""

from ml_collections import ConfigDict

from configs.esft import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.update(
        source="deepseek-ai/DeepSeek-V2-Lite", preset="deepseek-v2-lite", dtype="bfloat16"
    )
    config.data.seq_len = 4096
    config.train.update(steps=500, batch_size=32, accumulation=4, save_every=100, eval_every=100)
    config.compute.update(dtype="bfloat16", remat="full", moe_strategy="chunked")
    config.method.experts = "spread:6"
    return config
