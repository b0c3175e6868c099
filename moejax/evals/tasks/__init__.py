"""The tasks by name; one file per kind of task."""

from moejax.evals.tasks.base import Grade, Grading, Item, Prompt, Task
from moejax.evals.tasks.functions import FUNCTIONS
from moejax.evals.tasks.python_code import HUMANEVAL, HUMANEVAL_PLUS, MBPP, MBPP_PLUS
from moejax.evals.tasks.read import load_items

TASKS: dict[str, Task] = {
    task.name: task for task in (FUNCTIONS, HUMANEVAL, HUMANEVAL_PLUS, MBPP, MBPP_PLUS)
}

__all__ = ["TASKS", "Grade", "Grading", "Item", "Prompt", "Task", "load_items"]
