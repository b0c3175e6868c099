"""GSM8K, MATH / MATH-500 and AIME: worked solutions, judged by their final answer.

GSM8K: Cobbe et al. 2021, arXiv 2110.14168. MATH: Hendrycks et al. 2021, arXiv 2103.03874; MATH-500
and AIME as the hub has them. MATH's answers are compared by math-verify (the `eval` extra), the
others as exact numbers.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moejax.core.errors import InputError
from moejax.evals import answers
from moejax.evals.tasks.base import Grade, Grading, Item, Prompt, Task, text_id

_STOPS = ("\nQuestion:", "\nProblem:", "Question:", "<|im_end|>", "</s>")
_BOXED = "Reason step by step, and put your final answer within \\boxed{}."
_MAX_LATEX = 400  # longer "answers" are no answers, and computer algebra has no time limit


def gsm8k_item(row: Mapping[str, Any], number: int, where: str) -> Item:
    """Question and worked answer, which ends in "#### N"."""
    gold = answers.final_number(str(row["answer"]))
    if gold is None:
        raise InputError(f"{where}: 'answer' holds no number: {str(row['answer'])[-60:]!r}")
    fields = {"question": str(row["question"]), "gold": gold, "worked": str(row["answer"])}
    return Item(text_id(row, number, "gsm8k"), {**row, "exam": fields})


def math_item(row: Mapping[str, Any], number: int, where: str) -> Item:
    """A problem and its answer, or a solution that boxes it."""
    gold = row.get("answer")
    if gold is None:
        gold = answers.boxed(str(row["solution"]))
    if gold is None:
        raise InputError(f"{where}: no 'answer', and 'solution' boxes none")
    question = row.get("problem") or row.get("question")
    worked = row.get("solution") or f"\\boxed{{{gold}}}"
    fields = {"question": str(question), "gold": str(gold).strip(), "worked": str(worked)}
    return Item(text_id(row, number, "math"), {**row, "exam": fields})


def aime_item(row: Mapping[str, Any], number: int, where: str) -> Item:
    """A problem whose answer is an integer from 0 to 999."""
    folded = {name.lower(): value for name, value in row.items()}
    text = str(folded["answer"]).strip()
    if not re.fullmatch(r"\d{1,3}", text):
        raise InputError(f"{where}: an AIME answer is an integer from 0 to 999, not {text!r}")
    gold = answers.numbers(text)[0]
    question = folded.get("problem") or folded.get("question")
    fields = {"question": str(question), "gold": gold, "worked": f"\\boxed{{{text}}}"}
    return Item(text_id(folded, number, "aime"), {**folded, "exam": fields})


# -- how it is asked -------------------------------------------------------------------------------


def _plain(question: str, answer: str) -> Callable[[Item], Prompt]:
    def form(item: Item) -> Prompt:
        shots = "".join(
            f"{question}{shot.row['exam']['question']}{answer} {shot.row['exam']['worked']}\n\n"
            for shot in item.shots
        )
        return Prompt(None, f"{shots}{question}{item.row['exam']['question']}{answer}", _STOPS)

    return form


def chat(item: Item) -> Prompt:
    """A user's turn that asks for a boxed answer."""
    return Prompt(f"{item.row['exam']['question']}\n{_BOXED}", "")


question_form = _plain("Question: ", "\nAnswer:")
problem_form = _plain("Problem:\n", "\n\nSolution:")


def whole(item: Item, form: str, text: str) -> str:
    """The reply as it is: the answer is looked for when it is judged."""
    return text


# -- how it is judged ------------------------------------------------------------------------------


def grade_numbers(pairs: Sequence[tuple[Item, str]], grading: Grading) -> list[Grade]:
    """Compares the final number with the gold one."""
    grades = []
    for item, text in pairs:
        gold, found = item.row["exam"]["gold"], answers.final_number(text)
        if found is None:
            grades.append(Grade("no answer", "no number in the reply"))
        elif answers.same_number(text, gold):
            grades.append(Grade("pass", answer=answers.as_text(gold)))
        else:
            said = answers.as_text(found)
            grades.append(Grade("wrong", f"{said[:80]}, not {gold}", answer=said))
    return grades


def grade_math(pairs: Sequence[tuple[Item, str]], grading: Grading) -> list[Grade]:
    """Asks math-verify whether the final answer equals the gold one.

    Raises:
      InputError: math-verify is not installed.
    """
    try:
        import math_verify  # slow to import (sympy), and an extra
    except ImportError:
        raise InputError(
            "comparing mathematical answers needs math-verify: pip install 'moejax[eval]'"
        ) from None
    grades = []
    for item, text in pairs:
        began = time.perf_counter()
        gold, said = item.row["exam"]["gold"], answers.marked(text)
        if said is None:
            number = answers.final_number(text)
            said = None if number is None else answers.as_text(number)
        if said is None:
            grades.append(Grade("no answer", "no final answer in the reply"))
            continue
        same = _plain_text(said) == _plain_text(gold)
        if not same and len(said) <= _MAX_LATEX:
            golds = math_verify.parse(f"\\boxed{{{gold}}}")
            same = bool(math_verify.verify(golds, math_verify.parse(f"\\boxed{{{said}}}")))
        seconds = round(time.perf_counter() - began, 4)
        if same:
            grades.append(Grade("pass", "", seconds, answer=_plain_text(gold)))
        else:
            reason = f"{said[:80]}, not {gold[:80]}"
            grades.append(Grade("wrong", reason, seconds, answer=_plain_text(said)))
    return grades


def _plain_text(latex: str) -> str:
    """An answer without what does not change it: spaces, dollars, \\left, \\text."""
    text = re.sub(r"\\(?:left|right|displaystyle|,|!|;|\s)|\$|\s|\.$", "", latex.strip())
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
    return text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


GSM8K = Task(
    "gsm8k",
    "openai/gsm8k:main",
    (("question", "answer"),),
    gsm8k_item,
    {"question": question_form, "chat": chat},
    whole,
    grade_numbers,
    executes=False,
    shots="openai/gsm8k:main#train",
)
_MATH_FORMS = {"chat": chat, "problem": problem_form}
MATH = Task(
    "math",
    "EleutherAI/hendrycks_math:algebra",
    (("problem", "solution"), ("problem", "answer")),
    math_item,
    _MATH_FORMS,
    whole,
    grade_math,
    executes=False,
    checked="format only",
    shots="EleutherAI/hendrycks_math:algebra#train",
)
MATH_500 = Task(
    "math_500",
    "HuggingFaceH4/MATH-500",
    (("problem", "answer"), ("problem", "solution")),
    math_item,
    _MATH_FORMS,
    whole,
    grade_math,
    executes=False,
    checked="format only",
)
AIME = Task(
    "aime",
    "HuggingFaceH4/aime_2024#train",
    (("problem", "answer"), ("Problem", "Answer"), ("question", "answer")),
    aime_item,
    _MATH_FORMS,
    whole,
    grade_numbers,
    executes=False,
    checked="format only",
)
