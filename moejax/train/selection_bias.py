"""Where auxiliary-loss-free balancing happens: after a step, and not by its gradient."""

from __future__ import annotations

from moejax.core import tree
from moejax.models.config import ModelConfig
from moejax.moe.selection import update_selection_bias
from moejax.train.step import Adjust, Metrics


def selection_bias_update(config: ModelConfig) -> Adjust | None:
    """What `make_train_step` is to do after each step of this model; None without such a bias.

    Every router/b_select among what is trained becomes its value before the step plus bias_rate
    towards an even load (`moejax.moe.selection.update_selection_bias`), whatever the optimizer did
    to it. The load is that of the whole batch, all microbatches together.
    """
    moe = config.moe
    if moe is None or not moe.selection_bias:
        return None

    def adjust(before: tree.Tree, after: tree.Tree, metrics: Metrics) -> tree.Tree:
        old, new, layer = tree.flatten(before), tree.flatten(after), 0
        for run in config.runs:
            if run.kind != "moe":
                continue
            path = f"layers/{run.name}/moe/router/b_select"
            counts_LJ = metrics["expert_count"][layer : layer + run.num_layers]
            layer += run.num_layers
            if path in new:
                new[path] = update_selection_bias(old[path], counts_LJ, moe.bias_rate)
        return tree.unflatten(new)

    return adjust
