"""Tokens per second of the server's engines on SmolLM2-135M: dense, sparse, and sparse at 0.

    python -m tests.serve.measure_shadow_engine RUN/predictor NUM_ROWS [ROUNDS]

RUN is one of configs/shadow/smollm2.py; up to four rows are answered together. The engines answer
the same prompts in turns, greedily; medians of the rounds and of each round's ratio (its range).
"""

import sys
import time

import numpy as np

from launch.smollm2 import gguf_path
from moejax.io import lineage
from moejax.io.load import load_any
from moejax.methods import shadow_predictor
from moejax.serve.engine import Engine
from moejax.serve.request import EngineConfig, Request
from moejax.serve.shadow_engine import ShadowEngine
from moejax.serve.sparse import Policy, ready

TEXTS = ("Why is the sky blue?", "Name three birds.", "What is 17 plus 25?", "Write a sonnet.")
NUM_NEW, SPARSITIES = 64, (0.0, 0.3, 0.5)


def main(folder: str, num_rows: int, rounds: int) -> None:
    loaded = load_any(gguf_path(), "float32")
    predictor = shadow_predictor.load(folder, loaded.config, lineage.hash_params(loaded.params))
    policy = Policy(predictor.info.sizes, (0.5, 0.5))
    model = ready(loaded.params, loaded.config, predictor, policy)
    prompts = [
        tuple(loaded.tokenizer.encode_prompt([{"role": "user", "content": text}]))
        for text in TEXTS[:num_rows]
    ]
    settings = EngineConfig(num_slots=num_rows, max_length=256)
    dense = Engine(loaded.params, loaded.config, settings)
    sparse = ShadowEngine(model, settings)
    began = time.perf_counter()
    sparse.warm()
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    arms = {"dense": (dense, None)} | {f"{s:.0%}": (sparse, s) for s in SPARSITIES}
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for at in range(rounds + 1):  # the first one compiles
        for name, (engine, sparsity) in arms.items():
            asked = [Request(p, NUM_NEW, sparsity=sparsity) for p in prompts]
            began = time.perf_counter()
            engine.run(asked)
            if at:
                rates[name].append(num_rows * NUM_NEW / (time.perf_counter() - began))
    for name, found in rates.items():
        ratios = np.array(found) / np.array(rates["dense"])
        print(
            f"{num_rows} rows  {name:6} {np.median(found):6.1f} tokens/s  {np.median(ratios):.2f}x "
            f"dense ({ratios.min():.2f} to {ratios.max():.2f})"
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 5)
