"""Multiple choice by log-likelihood: PIQA, COPA, OpenBookQA, WinoGrande, RTE, HellaSwag, ARC.

A choice's score is ln p(choice | context); length-normalised, it is divided by the choice's
characters (lm-evaluation-harness' acc_norm). Rows are read as the hub has them, or as
{"query", "choices", "gold"} and, where the contexts differ and not the continuation (WinoGrande),
{"context_options", "continuation", "gold"}. The texts are those of lm-evaluation-harness.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moejax.core.errors import InputError
from moejax.data.sources import rows

DELIMITER, SHOT_DELIMITER = " ", "\n\n"


@dataclasses.dataclass(frozen=True)
class ChoiceItem:
    """One question: choice i is `continuations[i]` after `contexts[i]`, `gold` the right one."""

    id: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int

    def solved(self) -> str:
        """The question with its right choice: how it is shown to a later one."""
        return self.contexts[self.gold] + DELIMITER + self.continuations[self.gold]


@dataclasses.dataclass(frozen=True)
class ChoiceTask:
    """A set: where the hub has it, where shots come from, how a row becomes an item."""

    name: str
    source: str
    shots: str
    read: Callable[[Mapping[str, Any]], tuple[str, Sequence[str], int] | ChoiceItem]
    checked: str = "real"


def _alike(context: str, choices: Sequence[str], gold: Any) -> ChoiceItem:
    return ChoiceItem("", (context,) * len(choices), tuple(choices), int(gold))


def _question(text: str) -> str:
    """ "Question: ...", newline, "Answer:", whatever of it the text has already."""
    text = text.strip()
    head = text if text.startswith("Question:") else f"Question: {text}"
    return f"{head}\nAnswer:"


def _piqa(row: Mapping[str, Any]) -> ChoiceItem:
    if "query" in row:
        return _alike(_question(row["query"]), row["choices"], row["gold"])
    return _alike(_question(row["goal"]), (row["sol1"], row["sol2"]), row["label"])


def _copa(row: Mapping[str, Any]) -> ChoiceItem:
    if "query" in row:
        return _alike(row["query"], row["choices"], row["gold"])
    joint = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [row[name][0].lower() + row[name][1:] for name in ("choice1", "choice2")]
    return _alike(f"{row['premise'].strip()[:-1]} {joint}", choices, row["label"])


def _openbook(row: Mapping[str, Any]) -> ChoiceItem:
    if "query" in row:
        return _alike(row["query"], row["choices"], row["gold"])
    choices = row["choices"]
    gold = list(choices["label"]).index(row["answerKey"].strip())
    return _alike(row["question_stem"], choices["text"], gold)


def _winogrande(row: Mapping[str, Any]) -> ChoiceItem:
    if "context_options" in row:
        contexts = tuple(row["context_options"])
        return ChoiceItem("", contexts, (row["continuation"],) * len(contexts), int(row["gold"]))
    head, gap, tail = row["sentence"].partition("_")
    if not gap:
        raise ValueError("'sentence' has no gap '_'")
    contexts = (head + row["option1"], head + row["option2"])
    return ChoiceItem("", contexts, (tail.strip(),) * 2, int(row["answer"]) - 1)


def _rte(row: Mapping[str, Any]) -> ChoiceItem:
    if "query" in row:
        return _alike(row["query"], row["choices"], row["gold"])
    first = row["sentence1"] if "sentence1" in row else row["premise"]
    second = row["sentence2"] if "sentence2" in row else row["hypothesis"]
    context = f"{first}\nQuestion: {second} True or False?\nAnswer:"
    return _alike(context, ("True", "False"), row["label"])


def _hellaswag(row: Mapping[str, Any]) -> ChoiceItem:
    if "query" in row:
        return _alike(row["query"], row["choices"], row["gold"])
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    choices = [_without_marks(ending) for ending in row["endings"]]
    return _alike(_without_marks(context), choices, row["label"])


def _without_marks(text: str) -> str:
    """HellaSwag's WikiHow half holds marks such as "[title]", which are no text."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _arc(row: Mapping[str, Any]) -> ChoiceItem:
    if "query" in row:
        return _alike(_question(row["query"]), row["choices"], row["gold"])
    choices = row["choices"]
    gold = list(choices["label"]).index(row["answerKey"])
    return _alike(_question(row["question"]), choices["text"], gold)


def _plain(row: Mapping[str, Any]) -> ChoiceItem:
    return _winogrande(row) if "context_options" in row else _alike(
        row["query"], row["choices"], row["gold"]
    )  # fmt: skip


CHOICE_TASKS = {
    task.name: task
    for task in (
        ChoiceTask("piqa", "baber/piqa#validation", "baber/piqa#train", _piqa),
        ChoiceTask("copa", "aps/super_glue:copa#validation", "aps/super_glue:copa#train", _copa),
        ChoiceTask(
            "openbookqa", "allenai/openbookqa:main", "allenai/openbookqa:main#train", _openbook
        ),
        ChoiceTask(
            "winogrande",
            "allenai/winogrande:winogrande_xl#validation",
            "allenai/winogrande:winogrande_xl#train",
            _winogrande,
        ),
        ChoiceTask(
            "rte", "nyu-mll/glue:rte#validation", "nyu-mll/glue:rte#train", _rte, "format only"
        ),
        ChoiceTask(
            "hellaswag",
            "Rowan/hellaswag#validation",
            "Rowan/hellaswag#train",
            _hellaswag,
            "format only",
        ),
        ChoiceTask("arc_easy", "allenai/ai2_arc:ARC-Easy", "allenai/ai2_arc:ARC-Easy#train", _arc),
        ChoiceTask(
            "arc_challenge",
            "allenai/ai2_arc:ARC-Challenge",
            "allenai/ai2_arc:ARC-Challenge#train",
            _arc,
            "format only",
        ),
        ChoiceTask("choice", "", "", _plain),
    )
}


def load_choices(
    task: ChoiceTask, data: str | None = None, limit: int | None = None
) -> list[ChoiceItem]:
    """Reads the items of `task` from a file or the hub.

    Raises:
      InputError: no such source, a row without the fields of a known form, a gold choice that is
        not among the choices, no rows.
    """
    name, _, split = (data or task.source).partition("#")
    if not name:
        raise InputError(f"task {task.name} has no set of its own: give --data=FILE.jsonl")
    items = []
    for number, (where, row) in enumerate(rows(name, split or "test")):
        if limit is not None and number >= limit:
            break
        items.append(_item(task, row, number, where))
    if not items:
        raise InputError(f"{name} is empty: one question per line is needed")
    twice = [key for key, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise InputError(
            f"{name}: {len(twice)} ids are there more than once, as {twice[0]!r}; ids must differ"
        )
    return items


def _item(task: ChoiceTask, row: Any, number: int, where: str) -> ChoiceItem:
    try:
        item = task.read(row)
    except KeyError as error:
        raise InputError(f"{where}: not a question of {task.name}: {error} is missing") from error
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{where}: not a question of {task.name}: {error}") from error
    assert isinstance(item, ChoiceItem)
    if not 0 <= item.gold < len(item.continuations) or len(item.continuations) < 2:
        raise InputError(
            f"{where}: the right choice is number {item.gold} of {len(item.continuations)}, "
            "counted from 0; at least 2 choices are needed"
        )
    if not all(item.continuations):
        raise InputError(f"{where}: a choice is empty")
    given = (row.get(key) for key in ("id", "idx"))
    identifier = next((name for name in given if name not in (None, "")), f"{task.name}/{number}")
    return dataclasses.replace(item, id=str(identifier))


def with_shots(
    items: Sequence[ChoiceItem], pool: Sequence[ChoiceItem], num_shots: int, seed: int
) -> list[ChoiceItem]:
    """Puts `num_shots` solved questions of `pool` before each, drawn anew for each by `seed`.

    Raises:
      InputError: too few questions to draw from.
    """
    if not num_shots:
        return list(items)
    if len(pool) <= num_shots:
        raise InputError(f"--shots={num_shots} needs more than {len(pool)} questions to draw from")
    shown = []
    for number, item in enumerate(items):
        drawn = random.Random(f"{seed}/{number}").sample(list(pool), num_shots + 1)
        others = [shot for shot in drawn if shot.contexts != item.contexts][:num_shots]
        before = "".join(shot.solved() + SHOT_DELIMITER for shot in others)
        contexts = tuple(before + context for context in item.contexts)
        shown.append(dataclasses.replace(item, contexts=contexts))
    return shown
