"""ShadowLLM: compute only the heads and neurons that this input needs (arXiv 2406.16635).

    python -m launch.shadow --stage=collect  --config=configs/shadow/smollm2.py --workdir=RUN
    python -m launch.shadow --stage=train    --config=configs/shadow/smollm2.py --workdir=RUN
    python -m launch.shadow --stage=evaluate --config=configs/shadow/smollm2.py --workdir=RUN
    python -m launch.shadow --stage=report   --config=configs/shadow/smollm2.py --workdir=RUN

collect   per example, the importance of every head and neuron under each criterion, and what the
          predictor reads; RUN/traces. Goes on where it stopped.
train     orders neurons by co-activation, trains the unified predictor and DejaVu's, and measures
          them on held-out examples; RUN/predictor, RUN/dejavu*, RUN/heldout.json.
evaluate  perplexity and multiple choice under masks decided from the prompt: static, predicted,
          DejaVu, oracle, random, and training-free rivals; RUN/evaluation. Goes on where it
          stopped.
report    tables, paired intervals and plots of all that is there; RUN/report.html. Speed is read
          from RUN/bench.json, {"rows": [{"model", "sparsity", "against_dense", "bound", ...}]};
          beside a row with "same_predictor" stands what RUN/predictor costs in quality.

`configs/shadow/smollm2.py:tiny` goes through all stages in about two minutes.
"""

from __future__ import annotations

import importlib

from absl import flags
from ml_collections import config_flags

from launch import cli
from moejax.core.errors import InputError

# Stage -> the module whose `main(flags by name)` does it; imported when it runs.
STAGES = {
    "collect": "launch.shadow_collect",
    "train": "launch.shadow_train",
    "evaluate": "launch.shadow_evaluate",
    "report": "launch.shadow_report",
}

STAGE = flags.DEFINE_enum("stage", None, list(STAGES), "What to do.", required=True)
CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/shadow/.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; resumed if it is there.")


def main(argv) -> None:
    del argv
    values = {name: flags.FLAGS[name].value for name in flags.FLAGS if not name.startswith("_")}
    if values["config"] is None:
        raise InputError(
            f"--stage={values['stage']} needs --config: a file of configs/shadow/, as "
            "configs/shadow/smollm2.py"
        )
    if not values["workdir"] and not values["dry_run"]:
        raise InputError(f"--stage={values['stage']} needs --workdir: the folder of the run")
    importlib.import_module(STAGES[str(STAGE.value)]).main(values)


if __name__ == "__main__":
    cli.run(main)
