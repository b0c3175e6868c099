"""One Adafactor run, done by us and by transformers' torch Adafactor: shared by test and golden.

``python -m tests.train.adafactor_case`` (torch and transformers needed) writes the golden file.
Every leaf of ours is cut into the matrices that torch would hold, laid out as torch has them
([out, in]), so that the comparison also covers heads, experts and transposition.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import optax

from moejax.core import tree
from moejax.train.optim import OptimConfig, make_optimizer

GOLDEN = "adafactor_golden.json"
STEPS, LR, WARMUP, WEIGHT_DECAY = 5, 1e-2, 2, 0.1
# L = 2, D = 4, H = 3, C = 2, E = 3, F = 8, J = 2
SHAPES = {
    "embed/tokens": (7, 4),
    "final_norm/scale": (4,),
    "layers/0/attn_norm/scale": (2, 4),
    "layers/0/attn/w_q": (2, 4, 3, 2),
    "layers/0/attn/w_o": (2, 3, 2, 4),
    "layers/0/attn/b_q": (2, 3, 2),
    "layers/0/mlp/w_down": (2, 8, 4),
    "layers/0/moe/experts/w_up": (2, 3, 4, 8),
    "layers/0/moe/experts/b_up": (2, 3, 8),
    "layers/0/moe/router/w_out": (2, 2, 2),
    "0/alpha": (2, 2),
    "0/lam_logit": (2,),
}


def parameters() -> tree.Tree:
    rng = np.random.default_rng(0)
    return tree.unflatten({p: rng.normal(size=s).astype(np.float32) for p, s in SHAPES.items()})


def gradients(step: int) -> tree.Tree:
    """Of very different sizes from leaf to leaf and layer to layer, so that clipping shows."""
    rng = np.random.default_rng(100 + step)
    flat = {}
    for i, (path, shape) in enumerate(SHAPES.items()):
        scale = 10.0 ** (i - 4 - step)
        grad = scale * rng.normal(size=shape)
        if shape[0] == 2:
            grad[1] *= 50.0
        flat[path] = grad.astype(np.float32)
    return tree.unflatten(flat)


def run_ours() -> tree.Tree:
    config = OptimConfig(lr=LR, warmup_steps=WARMUP, weight_decay=WEIGHT_DECAY)
    optimizer = make_optimizer(config, STEPS)
    params = parameters()
    state = optimizer.init(params)

    @jax.jit
    def update(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(STEPS):
        params, state = update(gradients(step), state, params)
    return params


def pieces(path: str, value: np.ndarray) -> np.ndarray:
    """[number of torch tensors, *torch's shape] of one leaf."""
    stacked = 2 if "experts" in path else int(path.startswith(("layers/", "0/")))
    flat = value.reshape(-1, *value.shape[stacked:])
    name = path.rsplit("/", 1)[-1]
    if name == "w_q":
        flat = flat.reshape(len(flat), 4, 6)
    elif name == "w_o":
        flat = flat.reshape(len(flat), 6, 4)
    elif name == "b_q":
        flat = flat.reshape(len(flat), 6)
    return flat.swapaxes(1, 2) if flat.ndim == 3 else flat


def whole(path: str, parts: np.ndarray) -> np.ndarray:
    """Inverse of `pieces`."""
    return (parts.swapaxes(1, 2) if parts.ndim == 3 else parts).reshape(SHAPES[path])


def run_torch() -> tree.Tree:
    import torch
    from transformers import get_linear_schedule_with_warmup
    from transformers.optimization import Adafactor

    tensors = {
        path: [torch.nn.Parameter(torch.tensor(x.copy())) for x in pieces(path, value)]
        for path, value in tree.flatten(parameters()).items()
    }
    everything = [p for group in tensors.values() for p in group]
    settings = {"scale_parameter": False, "relative_step": False, "weight_decay": WEIGHT_DECAY}
    optimizer = Adafactor(everything, lr=LR, **settings)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    for step in range(STEPS):
        for path, grad in tree.flatten(gradients(step)).items():
            for tensor, piece in zip(tensors[path], pieces(path, grad), strict=True):
                tensor.grad = torch.tensor(piece.copy())
        optimizer.step()
        schedule.step()
    return tree.unflatten(
        {
            path: whole(path, np.stack([p.detach().numpy() for p in group]))
            for path, group in tensors.items()
        }
    )


def main() -> None:
    import torch
    import transformers

    golden = {
        "made_by": "python -m tests.train.adafactor_case",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "params": {k: v.ravel().tolist() for k, v in tree.flatten(run_torch()).items()},
    }
    path = Path(__file__).parent / GOLDEN
    path.write_text(json.dumps(golden, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
