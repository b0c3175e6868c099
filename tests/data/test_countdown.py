"""Countdown problems: graded by arithmetic, solved in every way that there is."""

from __future__ import annotations

import numpy as np
import pytest

from moejax.data import countdown
from moejax.data.countdown import Countdown, derivations, normalised, parse, solves

EASY = Countdown((3, 7, 4), 25)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("3*7=21 21+4=25", True),
        ("7*3=21 4+21=25", True),
        ("3*7=22 22+3=25", False),  # a sum that is wrong, and a number that is not there
        ("3*7=21", False),  # stops before all numbers are used
        ("3*7=21 21+4=25 25+4=29", False),  # uses 4 twice
        ("7*4=28 28-3=25", True),
        ("25", False),
        ("", False),
        ("3*7=21 21+4=25 and so on", False),
        ("3*7=21  21+4=25", True),  # spaces do not matter
        ("3*7=021 21+4=25", True),  # nor leading zeros
        ("3-7=-4 29+-4=25", False),
        ("3*7=" + "2" * 5000, False),
    ],
)
def test_grading(text, right):
    assert solves(EASY, text) is right


def test_every_derivation_solves_and_mutants_do_not():
    rng = np.random.default_rng(0)
    for _ in range(20):
        problem = countdown.draw_problem(rng, 3)
        found = derivations(problem)
        assert found and all(solves(problem, text) for text in found)
        assert len({normalised(text) for text in found}) == len(found)
        other = Countdown(problem.numbers, problem.target + 1)
        assert not any(solves(other, text) for text in found)


def test_derivations_are_all_there_are():
    """Against every order of operands and operators, tried one by one."""
    rng = np.random.default_rng(1)
    for _ in range(5):
        problem = countdown.draw_problem(rng, 3)
        brute = set()
        for _ in range(6000):
            steps = countdown.random_steps(rng, problem.numbers)
            if steps is not None and steps[-1][3] == problem.target:
                brute.add(normalised(countdown.write(steps)))
        assert brute == {normalised(text) for text in derivations(problem)}


def test_equal_derivations_are_one():
    assert normalised("7*3=21 4+21=25") == normalised("3*7=21 21+4=25")
    assert normalised("9-3=6") != normalised("3-9=6")
    assert normalised("no") is None and parse("3*7=21 x") is None


def test_guessing_earns_what_it_earns():
    problem = Countdown((2, 3), 5)  # 2+3 or 3+2, 2 of 12 ordered choices; 2-3 is a dead end
    assert countdown.guess_rate([problem], 4000) == pytest.approx(1 / 3, abs=0.03)
    assert problem.prompt == "2 3=5:"
