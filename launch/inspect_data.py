"""Shows what a model would be trained on: every token, and which of them the loss counts.

  python -m launch.inspect_data --tokenizer=MODEL --data=stdlib
  python -m launch.inspect_data --tokenizer=model.gguf --data=train.jsonl --num=5 --nocolor
  python -m launch.inspect_data --tokenizer=MODEL --data=train.jsonl --num=0 --measure_s=5

Tokens are separated by |. On a terminal those that the loss counts are green and the end of a turn
is inverted; in plain text they stand between [[ and ]].
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from absl import flags
from rich.console import Console
from rich.text import Text

from launch import cli
from moejax.core.errors import InputError
from moejax.data.examples import Example, encode_records
from moejax.data.load import DataConfig, load_data
from moejax.data.loader import batches
from moejax.data.packing import ON_LONG as ON_LONGS
from moejax.data.packing import pack
from moejax.io.tokenizer import Tokenizer, load_tokenizer

TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Model folder or .gguf file whose tokenizer and chat template are used."
)
DATA = flags.DEFINE_string(
    "data", "stdlib", "stdlib, a .jsonl, .jsonl.gz or .parquet file, or a hub data set owner/name."
)
NUM = flags.DEFINE_integer("num", 3, "Number of examples to show.", lower_bound=0)
SEQ_LEN = flags.DEFINE_integer("seq_len", 128, "Tokens per packed row.", lower_bound=2)
ON_LONG = flags.DEFINE_enum(
    "on_long", "split", ON_LONGS, "What becomes of examples longer than --seq_len."
)
LIMIT = flags.DEFINE_integer("limit", None, "Most rows to read of a file or hub data set.")
SPLIT = flags.DEFINE_string("split", "train", "Part of a hub data set.")
MEASURE_S = flags.DEFINE_float(
    "measure_s", 0.0, "Seconds to draw batches for, to see how many tokens/s the pipeline gives."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Rows of a drawn batch.", lower_bound=1)
COLOR = flags.DEFINE_bool("color", None, "Colours; by default where the output is a terminal.")


def main(argv: Sequence[str]) -> None:
    del argv
    if TOKENIZER.value is None:
        raise InputError("--tokenizer is missing: name a model folder or a .gguf file")
    console = Console(no_color=COLOR.value is False, highlight=False, soft_wrap=True)
    color = console.is_terminal if COLOR.value is None else COLOR.value
    if COLOR.value:
        console = Console(force_terminal=True, highlight=False, soft_wrap=True)
    tokenizer = load_tokenizer(TOKENIZER.value)
    start = time.perf_counter()
    data = load_data(DataConfig(source=DATA.value, split=SPLIT.value, limit=LIMIT.value))
    examples = encode_records(data.train, tokenizer)
    read_s = time.perf_counter() - start
    if not cli.DRY_RUN.value:
        for example in examples[: NUM.value]:
            console.print(show(example, tokenizer, color))
    for line in describe(examples, tokenizer, SEQ_LEN.value, data.summary, ON_LONG.value):
        console.print(line, markup=False)
    if MEASURE_S.value > 0:
        console.print(measure(examples, tokenizer.pad_id, read_s), markup=False)


def measure(examples: Sequence[Example], pad_id: int, read_s: float) -> str:
    """Tokens/s of the pipeline alone, one process and nothing trained; padding is no token."""
    packed = pack(examples, SEQ_LEN.value, pad_id, ON_LONG.value)
    num_read = sum(len(example.ids) for example in examples)
    draw = batches(packed, min(BATCH_SIZE.value, len(packed.ids)))
    start, step, drawn = time.perf_counter(), 0, 0
    while (spent := time.perf_counter() - start) < MEASURE_S.value:
        drawn += int((draw(step)["segment_ids"] > 0).sum())
        step += 1
    return (
        f"pipeline: {num_read / read_s:,.0f} tokens/s read and tokenised, once; "
        f"{drawn / spent:,.0f} tokens/s in {step} shuffled batches of {BATCH_SIZE.value} rows"
    )


def show(example: Example, tokenizer: Tokenizer, color: bool) -> Text:
    """One example's tokens with their mask."""
    text = Text()
    text.append(
        f"--- {example.id}: {len(example.ids)} tokens, {example.loss_mask.sum()} in the loss\n",
        style="bold",
    )
    counted = False
    for token, in_loss in zip(example.ids, example.loss_mask, strict=True):
        if not color and in_loss != counted:
            text.append("[[" if in_loss else "]]")
        counted = in_loss
        style = "dim"
        if in_loss:
            style = "reverse green" if int(token) in tokenizer.eos_ids else "green"
        text.append(visible(tokenizer.id_to_text(int(token))), style=style)
        text.append("|", style="bright_black")
    text.append("]]\n" if counted and not color else "\n")
    return text


def visible(token: str) -> str:
    """A token's text with control characters written out; lines still break after a newline."""
    lines = token.split("\n")
    shown = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines]
    return "\\n\n".join(shown)


def describe(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    seq_len: int,
    summary: dict,
    on_long: str = "split",
) -> list[str]:
    """Counts over all examples, and warnings about what would train badly."""
    stats = pack(examples, seq_len, tokenizer.pad_id, on_long).stats
    lengths = np.array([len(e.ids) for e in examples])
    median, ninety = (int(q) for q in np.percentile(lengths, (50, 90)))
    share = stats.num_answer_tokens / stats.num_tokens
    lines = [
        f"{key}: {value}" for key, value in summary.items() if not isinstance(value, (list, dict))
    ]
    lines += [
        f"template: {'of the model' if tokenizer.chat_template else 'none, plain form used'}",
        f"example length: median {median}, 90% up to {ninety}, longest {lengths.max()} tokens",
        f"packed into {stats.num_rows} rows of {seq_len}: {stats.num_tokens} tokens, "
        f"{stats.padding_share:.1%} padding, {share:.1%} of the tokens in the loss",
        f"too long (--on_long={on_long}): {stats.num_split} examples split over rows "
        f"({stats.num_repeated} tokens repeated), {stats.num_truncated} truncated "
        f"({stats.num_tokens_cut} tokens cut), {stats.num_dropped} dropped",
    ]
    within = None if on_long == "split" else seq_len
    unended = sum(not _ends(e, within, tokenizer.eos_ids) for e in examples)
    if unended == len(examples):
        lines.append(
            "WARNING: no example has its end-of-turn token in the loss: the tuned model "
            "will not learn to stop; raise --seq_len"
        )
    elif unended > stats.num_truncated + stats.num_dropped:
        lines.append(f"WARNING: {unended} examples end with a token generation does not stop at")
    elif unended:
        lines.append(f"note: {unended} examples lose their end-of-turn token to the row length")
    return lines


def _ends(example: Example, within: int | None, eos_ids: Sequence[int]) -> bool:
    counted = np.flatnonzero(example.loss_mask)
    return bool(
        (within is None or counted[-1] < within) and int(example.ids[counted[-1]]) in eos_ids
    )


if __name__ == "__main__":
    cli.run(main)
