"""Measures how much of each benchmark stands in training data: shared n-grams of words.

  python -m launch.decontaminate --data=TRAIN[,TRAIN2] --benchmarks=humaneval,gsm8k=FILE \\
      --out=overlap.json
  python -m launch.evaluate ... --overlap=overlap.json

--data: stdlib, .txt, .jsonl, .jsonl.gz or .parquet files, hub data sets ("owner/name#split"). A
benchmark is a task of launch.evaluate, by its file or from the hub; "all" means every task with a
set of its own. The file that is written carries the shares into every record and result of an
evaluation, which then also reports the score on the problems that share nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from launch import cli
from launch.evaluate_settings import console
from moejax.core.errors import InputError
from moejax.data.load import STDLIB, DataConfig, load_data
from moejax.data.sources import rows
from moejax.evals import decontaminate
from moejax.evals.tasks import TASKS, load_items
from moejax.evals.tasks.choice import CHOICE_TASKS, load_choices
from moejax.io.atomic import write_json

DATA = flags.DEFINE_list("data", None, "Training data.")
BENCHMARKS = flags.DEFINE_list("benchmarks", ["all"], "TASK or TASK=FILE, or all.")
OUT = flags.DEFINE_string("out", None, "The JSON file to write.")
SIZE = flags.DEFINE_integer("n", 13, "Words per n-gram.", lower_bound=1)
LEAST = flags.DEFINE_integer("least", 6, "Fewest words of a shorter problem.", lower_bound=1)
# What of a row is the problem and its answer; tests and bookkeeping are not.
_FIELDS = (
    "prompt", "question", "problem", "text", "description", "canonical_solution", "code",
    "reference_code", "answer", "solution",
)  # fmt: skip


def main(argv: Sequence[str]) -> None:
    del argv
    if not DATA.value or not OUT.value:
        raise InputError("--data and --out are needed (--help says what they take)")
    problems, unread = _benchmarks()
    if cli.DRY_RUN.value:
        counts = ", ".join(f"{name} {len(texts)}" for name, texts in problems.items())
        console.print(f"problems: {counts}", markup=False)
        return
    counted = [0, 0]
    shares = decontaminate.overlaps(problems, _counting(counted), SIZE.value, LEAST.value)
    if not counted[0]:
        raise InputError(f"{', '.join(DATA.value)}: no text to look through")
    found = {name: {**decontaminate.summary(part), "shares": part} for name, part in shares.items()}
    method = {"n": SIZE.value, "least": LEAST.value, "data": DATA.value}
    size = {"num_texts": counted[0], "num_characters": counted[1]}
    Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
    write_json(OUT.value, {**method, **size, "benchmarks": found, "not_read": unread})
    for name, part in found.items():
        console.print(
            f"{name}: {part['num_overlapping']} of {part['num_problems']} problems share a "
            f"{SIZE.value}-gram with the data, {part['num_half_or_more']} share half or more",
            markup=False,
        )
    for name, why in unread.items():
        console.print(f"{name}: not read: {why}", markup=False)
    console.print(f"written: {OUT.value}", markup=False)


def _benchmarks() -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Texts by task and id; with "all", what could not be read is told and left out."""
    everything = BENCHMARKS.value == ["all"]
    own = [name for name, task in (TASKS | CHOICE_TASKS).items() if task.source]
    wanted = own if everything else BENCHMARKS.value
    problems, unread = {}, {}
    for part in wanted:
        name, _, path = part.partition("=")
        if name not in TASKS and name not in CHOICE_TASKS:
            known = ", ".join([*TASKS, *CHOICE_TASKS])
            raise InputError(f"--benchmarks: no task {name!r}; there are {known}")
        try:
            problems[name] = _texts(name, path or None)
        except InputError as error:
            if not everything:
                raise
            unread[name] = str(error)
    return problems, unread


def _texts(name: str, path: str | None) -> dict[str, str]:
    if name in CHOICE_TASKS:
        items = load_choices(CHOICE_TASKS[name], path)
        return {item.id: item.solved() for item in items}
    found = {}
    for item in load_items(TASKS[name], path):
        kept = [item.row.get(field) for field in _FIELDS]
        found[item.id] = "\n".join(text for text in kept if isinstance(text, str))
    return found


def _counting(counted: list[int]) -> Iterator[str]:
    for source in DATA.value or []:
        for text in _training_texts(source):
            counted[0] += 1
            counted[1] += len(text)
            yield text


def _training_texts(source: str) -> Iterator[str]:
    if source == STDLIB:
        for record in load_data(DataConfig(source=STDLIB)).train:
            yield "\n".join(message["content"] for message in record.messages)
    elif source.endswith(".txt"):
        if not Path(source).is_file():
            raise InputError(f"{source}: no such file")
        yield Path(source).read_text("utf-8", errors="replace")
    else:
        name, _, split = source.partition("#")
        for _, row in rows(name, split or "train"):
            yield "\n".join(decontaminate.texts_of(row))


if __name__ == "__main__":
    cli.run(main)
