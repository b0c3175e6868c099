"""Answers prompts, or chats on the terminal.

  python -m launch.generate --model=MODEL --prompt='What is a mixture of experts?'
  python -m launch.generate --model=MODEL --prompts=prompts.jsonl --out=answers.jsonl
  echo 'Name three birds.' | python -m launch.generate --model=model.gguf --temperature=0.8
  python -m launch.generate --model=MODEL                  (a chat; /reset forgets, /quit ends)

MODEL is a model folder, a .gguf file or a hub id. A line of a prompts file is a JSON text, an
object with "prompt" or with "messages" ([{"role": ..., "content": ...}, ...]); of piped input every
line that is not blank is one prompt. Prompts go through the model's chat template unless --raw.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch import cli
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import atomic
from moejax.io.load import Loaded, load_any
from moejax.models.transformer import ForwardOptions
from moejax.serve import generate as serve
from moejax.serve.generate import GenerateConfig
from moejax.serve.sampling import SamplingConfig
from moejax.serve.text import stream_text

MODEL = flags.DEFINE_string("model", None, "Model folder, .gguf file or hub id.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
PROMPTS = flags.DEFINE_string("prompts", None, "JSONL file of prompts.")
OUT = flags.DEFINE_string("out", None, "JSONL file to write answers to, instead of printing them.")
SYSTEM = flags.DEFINE_string("system", None, "System message put before every conversation.")
RAW = flags.DEFINE_bool("raw", False, "Continue the text itself, without the chat template.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Most tokens of an answer.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 always takes the likeliest token.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest tokens; 0: from all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens that hold this mass.")
MIN_P = flags.DEFINE_float("min_p", 0.0, "Least probability, as a share of the likeliest token's.")
SEED = flags.DEFINE_integer("seed", 0, "Decides what is drawn.", -(2**31), 2**31 - 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Most prompts decoded at a time.")
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Type of weights, arithmetic and cache."
)

Conversation = list[dict[str, str]]
Prompt = str | Conversation


def main(argv: Sequence[str]) -> None:
    del argv
    if MODEL.value is None:
        raise InputError("--model is missing: name a model folder, a .gguf file or a hub id")
    settings = _settings()
    _check_flags()
    from_stdin = not PROMPT.value and PROMPTS.value is None
    chatting = from_stdin and sys.stdin.isatty()
    if chatting and OUT.value is not None:
        raise InputError("--out is for prompts, and a chat has none: give --prompt or --prompts")
    # A dry run waits for nobody: what will be piped in is not read.
    prompts = [] if from_stdin and (chatting or cli.DRY_RUN.value) else read_prompts()
    if cli.DRY_RUN.value:
        _show_plan(load_any(MODEL.value, abstract=True), prompts, settings)
        return
    model = _Model.load(MODEL.value, settings)
    if chatting:
        chat(model)
    elif len(prompts) == 1 and OUT.value is None:
        model.say(model.encode(prompts[0]))
    else:
        answer_all(model, prompts)


def _settings() -> GenerateConfig:
    return GenerateConfig(
        max_new_tokens=MAX_NEW_TOKENS.value,
        sampling=SamplingConfig(TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value),
        seed=SEED.value,
        batch_size=BATCH_SIZE.value,
        options=ForwardOptions(compute_dtype=DTYPE.value),
    )


def _check_flags() -> None:
    if PROMPT.value and PROMPTS.value is not None:
        raise InputError("--prompt and --prompts are both given: choose one")
    if RAW.value and SYSTEM.value is not None:
        raise InputError("--raw has no messages, so --system has no place: leave one out")
    if OUT.value is not None and not Path(OUT.value).absolute().parent.is_dir():
        raise InputError(f"--out={OUT.value}: its folder is missing, make it first")


@dataclasses.dataclass(frozen=True)
class _Model:
    """A model ready to decode: weights laid out for it, stop ids known."""

    loaded: Loaded
    params: Any
    settings: GenerateConfig

    @classmethod
    def load(cls, source: str, settings: GenerateConfig) -> _Model:
        loaded = load_any(source, DTYPE.value)
        if loaded.tokenizer is None:
            raise InputError(f"{source} has no tokenizer: prompts cannot be read")
        settings = dataclasses.replace(settings, stop_ids=tuple(loaded.tokenizer.eos_ids))
        params = serve.prepare(loaded.params, DTYPE.value)
        return cls(dataclasses.replace(loaded, params=None), params, settings)

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt; InputError for one that the model cannot read."""
        ids = self._ids(prompt)
        serve.check_prompts(self.loaded.config, [ids])
        return ids

    def _ids(self, prompt: Prompt) -> list[int]:
        tokenizer = self.loaded.tokenizer
        assert tokenizer is not None
        if RAW.value:
            if not isinstance(prompt, str):
                raise InputError("--raw continues texts, and a prompt here is a conversation")
            return tokenizer.encode(prompt, add_special=True)
        return tokenizer.encode_prompt(_as_conversation(prompt))

    def decode(self, ids: Sequence[int]) -> str:
        assert self.loaded.tokenizer is not None
        return self.loaded.tokenizer.decode(ids)

    def say(self, ids: list[int], may_stop: bool = False) -> str:
        """Prints an answer while it is made and returns it; `may_stop`: ctrl-C only ends it."""
        shown: list[str] = []
        chunks = serve.stream(self.params, self.loaded.config, ids, self.settings)
        try:
            for piece in stream_text(self.decode, chunks):
                shown.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not may_stop:
                raise
        finally:
            print(flush=True)
        return "".join(shown)


def _as_conversation(prompt: Prompt) -> Conversation:
    if isinstance(prompt, list):
        return prompt
    system = [] if SYSTEM.value is None else [{"role": "system", "content": SYSTEM.value}]
    return [*system, {"role": "user", "content": prompt}]


def read_prompts() -> list[Prompt]:
    """Prompts from --prompt, --prompts or piped input; InputError where there is none."""
    prompts: list[Prompt]
    if PROMPT.value:
        prompts = list(PROMPT.value)
        where = "--prompt"
    elif PROMPTS.value is not None:
        where = f"--prompts={PROMPTS.value}"
        text = Path(PROMPTS.value).read_text(encoding="utf-8")
        lines = enumerate(text.splitlines(), start=1)
        prompts = [_parse_line(line, f"{where}, line {n}") for n, line in lines if line.strip()]
    else:
        where = "standard input"
        prompts = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"{where} holds no prompt: give at least one line")
    for prompt in prompts:
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise InputError(f"{where}: a prompt is empty, say something")
    return prompts


def _parse_line(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    if isinstance(value, dict):
        value = value.get("messages", value.get("prompt"))
    is_conversation = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    )
    if not isinstance(value, str) and not is_conversation:
        raise InputError(
            f'{where} is no prompt: a JSON text, {{"prompt": text}} or '
            '{"messages": [{"role": text, "content": text}, ...]}'
        )
    return value


class _Told:
    """Says on stderr, every ten seconds, how far the answers are."""

    def __init__(self, started: float, every_s: float = 10.0):
        self._started, self._every_s, self._next = started, every_s, started + every_s

    def __call__(self, done: int, total: int, num_tokens: int) -> None:
        now = time.perf_counter()
        if now < self._next or done == total:
            return
        self._next = now + self._every_s
        elapsed_s = now - self._started
        left = f"about {elapsed_s * (total - done) / done:.0f} s left" if done else "none yet"
        print(
            f"{done} of {total} answers, {num_tokens / elapsed_s:.1f} tokens/s, {left}",
            file=sys.stderr,
            flush=True,
        )


def answer_all(model: _Model, prompts: list[Prompt]) -> None:
    """Answers all prompts in batches, to --out or to the standard output."""
    ids = [model.encode(prompt) for prompt in prompts]
    started = time.perf_counter()
    completions = serve.generate(
        model.params, model.loaded.config, ids, model.settings, progress=_Told(started)
    )
    elapsed_s = time.perf_counter() - started
    records = [
        {
            "prompt": prompt,
            "answer": model.decode(completion.ids),
            "finished": completion.finished,
            "num_prompt_tokens": len(prompt_ids),
            "num_tokens": len(completion.ids),
        }
        for prompt, prompt_ids, completion in zip(prompts, ids, completions, strict=True)
    ]
    if OUT.value is not None:
        lines = (json.dumps(record, ensure_ascii=False) for record in records)
        atomic.write_text(OUT.value, "\n".join(lines) + "\n")
    else:
        for number, record in enumerate(records):
            print(f"--- {number}\n{record['answer']}")
    num_tokens = sum(len(completion.ids) for completion in completions)
    where = f", written to {OUT.value}" if OUT.value is not None else ""
    print(
        f"{len(records)} answers, {num_tokens} tokens in {elapsed_s:.1f} s "
        f"({num_tokens / elapsed_s:.1f} tokens/s, compiling included){where}",
        file=sys.stderr,
    )


def chat(model: _Model) -> None:
    """Talks on the terminal until /quit or the end of input; ctrl-C ends an answer."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history in input())
    print(f"{MODEL.value}: /reset forgets the conversation, /quit ends, ctrl-C stops an answer")
    history = _as_conversation("")[:-1]
    turn = 0
    while True:
        try:
            said = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if said == "/quit":
            return
        if said == "/reset":
            history = _as_conversation("")[:-1]
            continue
        if not said:
            continue
        asked: Prompt = said if RAW.value else [*history, {"role": "user", "content": said}]
        try:
            ids = model.encode(asked)
        except InputError as error:
            print(f"error: {error} (/reset starts anew)", file=sys.stderr)
            continue
        # Another turn, other random numbers; the same conversation with the same seed is the same.
        settings = dataclasses.replace(model.settings, seed=model.settings.seed + turn)
        turn += 1
        answer = dataclasses.replace(model, settings=settings).say(ids, may_stop=True)
        if isinstance(asked, list):
            history = [*asked, {"role": "assistant", "content": answer}]


def _show_plan(loaded: Loaded, prompts: Sequence[Prompt], settings: GenerateConfig) -> None:
    """Prints what would be done and what it takes."""
    config = loaded.config
    itemsize = 4 if DTYPE.value == "float32" else 2
    rows = min(len(prompts) or 1, settings.batch_size)
    kept = sum(heads * size for heads, size in config.cache_shapes)
    per_token = config.num_layers * kept * itemsize
    num_params = tree.num_params(loaded.params)
    kind = f"{config.moe.num_experts} experts, top {config.moe.top_k}" if config.moe else "dense"
    print(
        f"model    {config.family}, {kind}: {config.num_layers} layers, width {config.d_model}, "
        f"vocabulary {config.vocab_size}, reads {serve.context_length(config)} tokens\n"
        f"weights  {num_params:,} in {DTYPE.value}, {num_params * itemsize / 1e9:.3f} GB, "
        "twice that while they are laid out\n"
        f"cache    {per_token / 1e3:.1f} kB a token\n"
        f"prompts  {len(prompts) or 'from the standard input'}, {rows} at a time, "
        f"up to {settings.max_new_tokens} new tokens each"
    )
    if prompts and loaded.tokenizer is not None:
        model = _Model(loaded, None, settings)
        lengths = [len(model.encode(prompt)) for prompt in prompts]
        slots = serve.bucket(max(lengths) + settings.max_new_tokens)
        print(
            f"lengths  {min(lengths)} to {max(lengths)} tokens: a cache of up to "
            f"{rows * slots * per_token / 1e9:.3f} GB"
        )
    print("dry run: nothing generated")


if __name__ == "__main__":
    cli.run(main)
