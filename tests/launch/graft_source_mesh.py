"""Program: states of a dense and an MoE source on one device and on eight, in bfloat16 too."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np

from configs import graft as graft_config
from launch.graft_setup import make_setup, states_of
from moejax.io.load import save_any
from moejax.io.loaded import Loaded
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.moe.config import CONVENTIONS, MoEConfig
from tests.data.test_alignment import tokenizers


def main(folder: Path) -> None:
    tokenizer = tokenizers()[0]
    size = -(-tokenizer.vocab_size // 8) * 8
    moe = MoEConfig(4, 2, **CONVENTIONS["mixtral"])
    for name, more in {"llama": {}, "mixtral": {"moe": moe}}.items():
        config = ModelConfig(name, size, 2, 32, 64, 4, 4, 8, max_position=64, **more)
        params = jax.tree.map(np.asarray, transformer.init_params(config, jax.random.key(0)))
        save_any(Loaded(params, config, tokenizer), folder / name, "hf")
    for name, mesh in (("llama", "tensor=2,fsdp=4"), ("mixtral", "expert=4,fsdp=2")):
        for dtype in ("float32", "bfloat16"):
            found = {}
            for where in ("", mesh):
                config = graft_config.get_config()
                config.source.update(model=str(folder / name), mesh=where, dtype=dtype)
                config.target.model = str(folder / "llama")
                config.data.update(target_len=16, source_len=16)
                config.bridge.update(every=1, num_heads=2)
                config.source.layers = (0, -1)
                setup = make_setup(config)
                params = setup.source_params()
                tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
                found[where] = np.asarray(states_of(setup, params, tokens), np.float32)
                devices = {len(x.sharding.device_set) for x in jax.tree.leaves(params)}
            error = np.abs(found[mesh] - found[""]).max()
            largest = np.abs(found[""]).max()
            print(json.dumps({"source": name, "dtype": dtype, "error": float(error / largest),
                              "devices": max(devices)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
