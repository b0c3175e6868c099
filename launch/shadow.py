"""ShadowLLM: compute only the heads and neurons that this input needs (arXiv 2406.16635).

    python -m launch.shadow --stage=collect  --config=configs/shadow/smollm2.py --workdir=RUN
    python -m launch.shadow --stage=train    --config=configs/shadow/smollm2.py --workdir=RUN
    python -m launch.shadow --stage=evaluate --config=configs/shadow/smollm2.py --workdir=RUN
    python -m launch.shadow --stage=bench    --config=configs/shadow/smollm2.py --workdir=RUN
    python -m launch.shadow --stage=report   --config=configs/shadow/smollm2.py --workdir=RUN
    python -m launch.shadow --stage=generate --config=configs/shadow/smollm2.py --workdir=RUN \\
        --prompt="Why is the sky blue?" --sparsity=0.5

collect   per example, the importance of every head and neuron under each criterion, and what the
          predictor reads; RUN/traces. Goes on where it stopped.
train     orders neurons by co-activation, trains the unified predictor and DejaVu's, and measures
          them on held-out examples; RUN/predictor, RUN/predictor_*, RUN/heldout.json.
evaluate  perplexity and multiple choice under masks decided from the prompt: static, predicted,
          oracle, random; and at every token: DejaVu, and rivals without training. RUN/evaluation.
          Goes on where it stopped.
bench     tokens per second under the masks that evaluate judges, beside dense decoding and with
          --peer transformers, in turns; RUN/bench.json, where rows of another --predictor or
          --refresh_every stay. `launch.bench --suite=shadow` times models of random weights.
report    tables, paired intervals and plots of all that is there; RUN/report.html. Beside a row of
          RUN/bench.json stands what its mask costs in quality, where it was timed with one of RUN's
          own predictors that decides by the prompt or at every token, as evaluate judges.
generate  continues prompts: the prompt dense, then with what RUN/predictor (--predictor) says that
          it needs; RUN/predictor_token decides at every token, RUN/predictor_dejavu* in every layer
          at every token. --audit_share of the requests are compared with the dense model, which
          takes over once their mean drift passes --audit_limit.

`configs/shadow/smollm2.py:tiny` goes through all stages in a few minutes.
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
    "bench": "launch.shadow_bench",
    "report": "launch.shadow_report",
    "generate": "launch.shadow_generate",
}

STAGE = flags.DEFINE_enum("stage", None, list(STAGES), "What to do.", required=True)
CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/shadow/.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; resumed if it is there.")
flags.DEFINE_string("predictor", None, "bench, generate: its folder; default WORKDIR/predictor.")
flags.DEFINE_integer(
    "refresh_every", 0, "bench, generate: decide anew after so many tokens; 0: by the prompt alone."
)
flags.DEFINE_bool("peer", False, "bench: also time transformers on torch.")
flags.DEFINE_multi_string("prompt", [], "generate: a text to continue; may be repeated.")
flags.DEFINE_bool("raw", False, "generate: without the model's chat template.")
flags.DEFINE_string("policy", "predicted", "generate: predicted, static or dense.")
flags.DEFINE_float("sparsity", 0.5, "generate: share of heads and of neurons not computed, [0, 1).")
flags.DEFINE_float("audit_share", 0.01, "generate: share of requests that also run dense.")
flags.DEFINE_float("audit_limit", 0.5, "generate: drift, nats per token, past which all run dense.")
flags.DEFINE_integer("max_new_tokens", 128, "generate: per answer.", lower_bound=1)
flags.DEFINE_integer("batch_size", 1, "generate: prompts decoded together.", lower_bound=1)
flags.DEFINE_float("temperature", 0.0, "generate: 0 is greedy.", lower_bound=0)
flags.DEFINE_integer("seed", 0, "generate: of the draws, and of which requests are audited.")


def main(argv) -> None:
    del argv
    values = {name: flags.FLAGS[name].value for name in flags.FLAGS if not name.startswith("_")}
    if values["config"] is None:
        raise InputError(
            f"--stage={values['stage']} needs --config: a file of configs/shadow/, as "
            "configs/shadow/smollm2.py"
        )
    needs_none = values["dry_run"] or (values["stage"] == "generate" and values["predictor"])
    if not values["workdir"] and not needs_none:
        raise InputError(f"--stage={values['stage']} needs --workdir: the folder of the run")
    from launch.shadow_data import check_counts  # after the flags: it takes seconds to import

    check_counts(values["config"])
    importlib.import_module(STAGES[str(STAGE.value)]).main(values)


if __name__ == "__main__":
    cli.run(main)
