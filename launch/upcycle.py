"""Turns a dense model into a mixture of experts that computes the same function.

    python -m launch.upcycle --source=MODEL --target=runs/upcycled --experts=8 --top_k=6
    python -m launch.upcycle --source=MODEL --target=runs/plain --weighting=selected --top_k=2

Every expert starts as a copy of the layer's feed-forward network. --experts and --top_k count the
shared expert, which every token gets; weighting=selected has none.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from absl import flags

from launch import cli
from moejax.core import tree
from moejax.io import atomic, lineage
from moejax.io.load import Loaded, load_any, main_dtype, save_any
from moejax.methods.upcycle import moe_config, upcycle
from moejax.models import flops, transformer
from moejax.models.config import ModelConfig
from moejax.moe.config import BALANCE_SCOPES, GATES, WEIGHTINGS, XFT_WEIGHTINGS, MoEConfig

SOURCE = flags.DEFINE_string(
    "source", None, "Dense model: folder, .gguf file or hub id.", required=True
)
TARGET = flags.DEFINE_string("target", None, "Folder to make, in our own format.", required=True)
EXPERTS = flags.DEFINE_integer("experts", 8, "Experts per layer, the shared one included.")
TOP_K = flags.DEFINE_integer("top_k", 6, "Experts per token, the shared one included.")
GATE = flags.DEFINE_enum("gate", "mlp", GATES, "The router: two matrices and a tanh, or one.")
WEIGHTING = flags.DEFINE_enum(
    "weighting",
    "normalized",
    WEIGHTINGS,
    "XFT's weights; its ablation whose weights sum to more than one; or without a shared expert: "
    "softmax over the chosen (plain sparse upcycling), or softmax over all experts as it is, or "
    "divided by the sum over the chosen.",
)
NOISE = flags.DEFINE_bool("noise", True, "Learned noise on the router's logits while training.")
BALANCE_SCOPE = flags.DEFINE_enum(
    "balance_scope",
    "local",
    BALANCE_SCOPES,
    "On several devices: the mean of each one's balance loss, or the loss of all tokens together, "
    "which no mesh changes.",
)
SEED = flags.DEFINE_integer("seed", 0, "Of the routers' first weights.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a model folder at the target.")


def main(argv) -> None:
    del argv
    moe = MoEConfig(
        num_experts=EXPERTS.value,
        top_k=TOP_K.value,
        num_shared=1 if WEIGHTING.value in XFT_WEIGHTINGS else 0,
        gate=GATE.value,
        weighting=WEIGHTING.value,
        noise=NOISE.value,
        balance_scope=BALANCE_SCOPE.value,
    )
    plan = load_any(SOURCE.value, abstract=True)
    config = moe_config(plan.config, moe)
    atomic.check_target(TARGET.value, OVERWRITE.value)
    num_bytes = show_plan(plan, config)
    if cli.DRY_RUN.value:
        print("dry run: nothing written")
        return
    atomic.require_disk(TARGET.value, num_bytes)
    save_any(
        upcycled(load_any(SOURCE.value), moe, SEED.value),
        TARGET.value,
        "orbax",
        overwrite=OVERWRITE.value,
    )
    print(f"written  {TARGET.value}")


def upcycled(loaded: Loaded, moe: MoEConfig, seed: int) -> Loaded:
    """The mixture of experts, with what came with the dense model."""
    params, config = upcycle(loaded.params, loaded.config, moe, jax.random.key(seed))
    operations = lineage.append(
        loaded.lineage,
        "upcycle",
        [lineage.input_of(loaded.source)],
        dataclasses.asdict(moe) | {"seed": seed},
    )
    params = jax.tree.map(np.asarray, params)
    return dataclasses.replace(loaded, params=params, config=config, lineage=operations)


def show_plan(source: Loaded, config: ModelConfig) -> int:
    """Prints both models' sizes and what a token costs; returns the bytes to be written."""
    assert config.moe is not None
    dtype = main_dtype(source.params)
    abstract = transformer.abstract_params(config, dtype)
    num_bytes = tree.num_bytes(abstract)
    print(f"dense    {SOURCE.value}: {tree.num_params(source.params):,} parameters, {dtype}")
    print(
        f"experts  {config.moe.num_experts} in each of {config.num_layers} layers, top "
        f"{config.moe.top_k} ({config.moe.num_shared} shared), gate {config.moe.gate}, weights "
        f"{config.moe.weighting}"
    )
    print(
        f"MoE      {tree.num_params(abstract):,} parameters, {flops.active_params(config):,} "
        f"active, {num_bytes / 1e9:.3f} GB; "
        f"{flops.forward_flops_per_token(config, 1) / 1e9:.3f} GFLOP a token, dense "
        f"{flops.forward_flops_per_token(source.config, 1) / 1e9:.3f}"
    )
    if not config.moe.has_unit_weights:
        print("note     these weights do not sum to one: step 0 is not the dense model")
    for path, leaf in tree.flatten(abstract).items():
        if "/moe/" in path and cli.DRY_RUN.value:
            print(f"         {path} {list(leaf.shape)}")
    return num_bytes


if __name__ == "__main__":
    cli.run(main, freed="parts")
