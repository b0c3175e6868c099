"""Final answers in worked solutions: found, normalised and compared.

What counts as the final answer, the first of these that is there:

    1. what follows the last "####" (GSM8K's own mark)
    2. the last \\boxed{...}
    3. what follows the last "the answer is", "answer:", "A:" and their like
    4. for numbers only, the last number of the text

A number is compared as an exact fraction: $1,000.00 is 1000, 3/4 is 0.75, 50% is 50.
"""

from __future__ import annotations

import re
from fractions import Fraction

_MARK = re.compile(
    r"(?:\b(?:final\s+)?answers?\s*(?:\*\*|:\*\*)?\s*(?:is|are|was|=|:)|^\s*A:|\btherefore\s*,?\s*=)"
    r"[\s:*$]*",
    re.I | re.M,
)
_NUMBER = re.compile(
    r"(?P<sign>[-\u2212\u2013+]?)(?:(?P<money>[$\u20ac\u00a3])\s?)?(?P<sign2>[-\u2212]?)"
    r"(?P<whole>\d{1,3}(?:[,\u202f\u00a0]\d{3})+(?!\d)|\d+)?(?P<part>\.\d+)?"
    r"(?P<power>(?:[eE]|\s?(?:\u00d7|\\times|\*|x)\s?10\^\{?)[-+]?\d+\}?)?"
    r"(?:\s?/\s?(?P<below>\d[\d,]*(?:\.\d+)?))?"
)
_LATEX_FRACTION = re.compile(r"(-?)\\[dt]?frac\s*\{?\s*(-?\d+)\s*\}?\s*\{?\s*(\d+)\s*\}?")
_MIXED = re.compile(r"(?<![\d.])(-?\d+)\s+(\d+)\s?/\s?(\d+)(?!\d)")
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def boxed(text: str) -> str | None:
    """What the last ``\\boxed{...}`` (or ``\\fbox``) holds, braces matched; None without one."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].split("{", 1)
    if len(rest) < 2 or rest[0].strip() not in ("\\boxed", "\\fbox"):
        word = re.match(r"\\f?box(?:ed)?\s+(\S+)", text[start:])
        return word.group(1).rstrip("$.") if word else None
    depth = 1
    for i, letter in enumerate(rest[1]):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return rest[1][:i].strip()
    return None


def marked(text: str) -> str | None:
    """The text of the final answer after a mark (1 to 3 above), None without one."""
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().split("\n")[0].strip()
    inside = boxed(text)
    if inside is not None:
        return inside
    places = list(_MARK.finditer(text))
    if places:
        return text[places[-1].end() :].strip().split("\n")[0].strip()
    return None


def final_number(text: str) -> Fraction | None:
    """The final answer as a number, None where there is none.

    After a mark it is the first number; else the text's last. A calculator's notes (``<<2+3=5>>``)
    are no answers.
    """
    text = _CALCULATOR.sub("", text)
    said = marked(text)
    if said is not None:
        found = numbers(_after_equals(said))
        if found or "####" in text or boxed(text) is not None:
            return found[0] if found else None
    found = numbers(text)
    return found[-1] if found else None


def _after_equals(text: str) -> str:
    """Of "5 + 3 = 8 apples" the part after the last equals sign, where a number follows it."""
    head, equals, tail = text.rpartition("=")
    return tail if equals and re.match(r"\s*[-$\u2212]*\d", tail) else text


def numbers(text: str) -> list[Fraction]:
    """All numbers of a text, in order."""
    text = _LATEX_FRACTION.sub(r" \1\2/\3 ", text.replace("\\$", "$").replace("{,}", ","))
    text = text.replace("\\!", "").replace("\\,", "")
    text = _MIXED.sub(lambda m: str(_mixed(*m.groups())), text)
    found = []
    for match in _NUMBER.finditer(text):
        value = _value(match, text)
        if value is not None:
            found.append(value)
    return found


def _mixed(whole: str, above: str, below: str) -> str:
    if int(below) == 0:
        return f"{whole} {above}/{below}"
    value = abs(int(whole)) + Fraction(int(above), int(below))
    return f"{'-' if whole.startswith('-') else ''}{value.numerator}/{value.denominator}"


def _value(match: re.Match[str], text: str) -> Fraction | None:
    whole, part = match["whole"], match["part"]
    if whole is None and part is None:
        return None
    first = match.start("whole") if whole is not None else match.start("part")
    if re.match(r"[A-Za-z_]", text[first - 1 : first]):
        return None  # x2, H2O
    digits = re.sub(r"[^\d]", "", whole or "0")
    if len(digits) > 400:
        return None
    value = Fraction(f"{digits}{part or ''}")
    if match["power"]:
        exponent = int(re.sub(r"^.*10\^|[eE{}]", "", match["power"]))
        if abs(exponent) > 400:
            return None
        value *= Fraction(10) ** exponent
    if match["below"]:
        below = Fraction(match["below"].replace(",", "").rstrip("."))
        if not below:
            return None
        value /= below
    signs = (match["sign"] + match["sign2"]).replace("+", "")
    # Between two numbers a dash is a range or a subtraction, and no sign.
    start = match.start()
    return -value if signs and not re.match(r"[\w)%]", text[start - 1 : start]) else value


def as_text(value: Fraction) -> str:
    """A number in one way of writing: what votes are counted by."""
    return str(value)


def same_number(text: str, gold: Fraction) -> bool:
    """Whether the final answer is `gold`, exactly or, for decimals, to 1e-6 of it."""
    value = final_number(text)
    if value is None:
        return False
    return value == gold or abs(value - gold) <= abs(gold) * Fraction(1, 10**6)
