"""The tasks by name; one file per kind of task."""

from moejax.evals.tasks.answer_tasks import AIME, GSM8K, MATH, MATH_500
from moejax.evals.tasks.base import Grade, Grading, Item, Prompt, Task
from moejax.evals.tasks.ds1000 import DS1000
from moejax.evals.tasks.functions import FUNCTIONS
from moejax.evals.tasks.other_code import MBXP, MULTIPL_E
from moejax.evals.tasks.python_code import HUMANEVAL, HUMANEVAL_PLUS, MBPP, MBPP_PLUS
from moejax.evals.tasks.read import load_items, with_shots

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        FUNCTIONS,
        HUMANEVAL,
        HUMANEVAL_PLUS,
        MBPP,
        MBPP_PLUS,
        MULTIPL_E,
        MBXP,
        DS1000,
        GSM8K,
        MATH,
        MATH_500,
        AIME,
    )
}

__all__ = ["TASKS", "Grade", "Grading", "Item", "Prompt", "Task", "load_items", "with_shots"]
