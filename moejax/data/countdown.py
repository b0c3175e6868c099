"""Countdown problems made up by the thousand: reach a target from given numbers, each used once.

    3 7 10 4 = 47  ->  7*4=28 28+10=38 ...            one step a time, the last result is the target

Most problems have many derivations, and a guess is seldom right: what a study of diversity needs.
A derivation is graded by doing its arithmetic, never by comparing it with another one.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

OPERATORS = ("+", "-", "*")
_STEP = re.compile(r"(\d+)([+*-])(\d+)=(\d+)")


@dataclasses.dataclass(frozen=True)
class Countdown:
    """numbers: given, in the order shown.  target: what the last step has to give."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        """As the model reads it: "3 7 10=47:"."""
        return f"{' '.join(map(str, self.numbers))}={self.target}:"


Step = tuple[int, str, int, int]


def apply(a: int, operator: str, b: int) -> int | None:
    """a operator b for whole numbers; None where it would be below 0."""
    result = {"+": a + b, "-": a - b, "*": a * b}[operator]
    return result if result >= 0 else None


def parse(text: str) -> list[Step] | None:
    """The steps of a derivation "3*7=21 21+4=25"; None if anything else stands there."""
    steps = []
    for word in text.split():
        found = _STEP.fullmatch(word)
        if found is None or len(word) > 24:
            return None
        steps.append((int(found[1]), found[2], int(found[3]), int(found[4])))
    return steps or None


def solves(problem: Countdown, text: str) -> bool:
    """Whether a derivation uses each number once, computes right and ends at the target."""
    steps = parse(text)
    if steps is None:
        return False
    left = Counter(problem.numbers)
    for a, operator, b, result in steps:
        used = Counter([a, b])
        if used - left or apply(a, operator, b) != result:
            return False
        left = left - used + Counter([result])
    return left == Counter([problem.target])


def normalised(text: str) -> str | None:
    """What two equal derivations have in common: steps with the smaller operand first where it
    does not matter, in order of the text; None for a text that is no derivation."""
    steps = parse(text)
    if steps is None:
        return None
    words = []
    for a, operator, b, result in steps:
        if operator != "-" and a > b:
            a, b = b, a
        words.append(f"{a}{operator}{b}={result}")
    return " ".join(words)


def draw_problem(rng: np.random.Generator, num_numbers: int, largest: int = 12) -> Countdown:
    """A problem that some derivation solves, its target between 10 and 999."""
    while True:
        numbers = tuple(int(n) for n in rng.integers(2, largest + 1, num_numbers))
        steps = random_steps(rng, numbers)
        if steps is not None and 10 <= steps[-1][3] <= 999 and steps[-1][3] not in numbers:
            return Countdown(numbers, steps[-1][3])


def random_steps(rng: np.random.Generator, numbers: Sequence[int]) -> list[Step] | None:
    """Uniform choices of two numbers and an operator until one is left; None at a dead end."""
    left, steps = list(numbers), []
    while len(left) > 1:
        i, j = rng.permutation(len(left))[:2]
        a, b = left[i], left[j]
        operator = OPERATORS[int(rng.integers(len(OPERATORS)))]
        result = apply(a, operator, b)
        if result is None or result > 999:
            return None
        steps.append((a, operator, b, result))
        left = [n for at, n in enumerate(left) if at not in (i, j)] + [result]
    return steps


def derivations(problem: Countdown) -> list[str]:
    """Every derivation that solves a problem, as texts, up to the order of equal operands."""
    found: dict[str | None, str] = {}
    for steps in _all_steps(tuple(sorted(problem.numbers))):
        if steps[-1][3] == problem.target:
            text = write(steps)
            found.setdefault(normalised(text), text)
    return list(found.values())


def _all_steps(numbers: tuple[int, ...]) -> Iterator[list[Step]]:
    seen = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        for operator in OPERATORS:
            a, b = numbers[i], numbers[j]
            if (a, operator, b) in seen or (operator != "-" and a > b):
                continue
            seen.add((a, operator, b))
            result = apply(a, operator, b)
            if result is None or result > 999:
                continue
            left = [n for at, n in enumerate(numbers) if at not in (i, j)]
            if not left:
                yield [(a, operator, b, result)]
                continue
            for rest in _all_steps(tuple(sorted([*left, result]))):
                yield [(a, operator, b, result), *rest]


def write(steps: Sequence[Step]) -> str:
    """A derivation as text."""
    return " ".join(f"{a}{operator}{b}={result}" for a, operator, b, result in steps)


def guess_rate(problems: Sequence[Countdown], num_guesses: int, seed: int = 0) -> float:
    """Pass@1 of uniform guessing with right arithmetic: the baseline that a model has to beat."""
    rng = np.random.default_rng(seed)
    hits = 0
    for problem in problems:
        for _ in range(num_guesses):
            steps = random_steps(rng, problem.numbers)
            hits += steps is not None and steps[-1][3] == problem.target
    return hits / (len(problems) * num_guesses)
