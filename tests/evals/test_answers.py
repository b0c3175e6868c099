"""Over a hundred ways to give an answer, and what each of them says."""

from fractions import Fraction

import pytest

from moejax.evals.answers import boxed, final_number, marked, numbers, same_number

F = Fraction
FORMS = [
    # GSM8K's mark
    ("#### 18", 18), ("so it is 18\n#### 18", 18), ("#### 1,000", 1000), ("#### -2", -2),
    ("####18", 18), ("#### $18", 18), ("#### 18 dollars", 18), ("#### 18.0", 18),
    ("#### 18.50", F("18.5")), ("#### 50%", 50), ("#### 3/4", F(3, 4)), ("#### 0", 0),
    ("#### 1\n#### 2", 2), ("#### 7\nQuestion: 9 + 9", 7), ("#### 12 and 15", 12),
    ("#### 2.", 2), ("#### none", None), ("#### ", None), ("9 eggs\n####", None),
    ("#### 1,234,567", 1234567), ("#### \u22125", -5), ("#### .5", F(1, 2)), ("#### +4", 4),
    # boxed
    (r"\boxed{18}", 18), (r"so $\boxed{18}$.", 18), (r"\boxed{1{,}000}", 1000),
    (r"\boxed{-2}", -2), (r"\boxed{\frac{3}{4}}", F(3, 4)), (r"\boxed{\dfrac{3}{4}}", F(3, 4)),
    (r"\boxed{-\frac{1}{2}}", F(-1, 2)), (r"\boxed{\$1,000.00}", 1000), (r"\boxed{50\%}", 50),
    (r"\boxed{1} and then \boxed{2}", 2), (r"\boxed{18 \text{ eggs}}", 18),
    (r"\boxed{\text{none}}", None), (r"\boxed 18", 18), (r"\fbox{18}", 18),
    (r"\boxed{x = 5}", 5), (r"\boxed{\frac34}", F(3, 4)), (r"\boxed{0.75}", F(3, 4)),
    (r"\boxed{10\,000}", 10000), (r"\boxed{3 \times 10^{4}}", 30000), (r"\boxed{", None),
    # said in words
    ("The answer is 18.", 18), ("The answer is: 18", 18), ("The final answer is $18.", 18),
    ("Answer: 18", 18), ("answer = 18", 18), ("A: 18", 18), ("5 eggs\nA: 18", 18),
    ("**Answer:** 18", 18), ("The answer is **18**.", 18), ("The answers are 3 and 4.", 3),
    ("The answer is 3/4 of a cup.", F(3, 4)), ("The answer is -2.", -2),
    ("The answer is $1,000.00.", 1000), ("The answer is 50%.", 50),
    ("The answer is 5 + 3 = 8 apples.", 8), ("The answer is $5 + $3 = $8.", 8),
    ("The answer is unknown.", None), ("the answer is x = -4", -4),
    ("The answer is 12 apples, not 15.", 12), ("Wait. The answer is 4. No, the answer is 5.", 5),
    ("The answer is 1 1/2 cups.", F(3, 2)), ("The answer is 18 (not 20).", 18),
    ("Final Answer: $\\frac{7}{2}$", F(7, 2)), ("The answer is 1.5e3.", 1500),
    ("The answer is 2 x 10^3", 2000), ("The answer is \u00a320.", 20),
    ("The answer is 20\u20ac", 20),
    # the last number
    ("She has 18", 18), ("She has 18 eggs.", 18), ("16 - 3 - 4 = 9", 9), ("9 * 2 = $18", 18),
    ("She makes $18 every day", 18), ("That costs $1,000.00.", 1000), ("It fell by -2", -2),
    ("about 3/4 of it", F(3, 4)), ("a share of 12.5%", F("12.5")), ("in total 1,234 of them", 1234),
    ("between 3 and 5", 5), ("pages 3-5", 5), ("16-3-4=9", 9), ("he ran 2.5 km", F("2.5")),
    ("no number here", None), ("", None), ("   ", None), ("eighteen", None), ("x2 and H2O", None),
    ("<<9*2=18>>", None), ("9 * 2 = <<9*2=18>>18 dollars", 18), ("it is <<1=1>>7 now", 7),
    ("costs $.50", F(1, 2)), ("costs $-3", -3), ("costs -$3", -3), ("-7", -7), ("007", 7),
    ("3.14159", F("3.14159")), ("1/0", None), ("1 / 4", F(1, 4)), ("2 1/4", F(9, 4)),
    ("1e3", 1000), ("on day 5 he gives 12", 12), ("12,5", 5), ("1,23", 23), ("10,000,000", 10**7),
    ("10\u00a0000", 10000), ("18!", 18), ("(18)", 18), ("[18]", 18), ("18;", 18), ("'18'", 18),
    ("18\n\n", 18), ("$18$", 18), ("= 18", 18), ("\u2248 18", 18), ("18\u00b0", 18), ("18cm", 18),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), FORMS)
def test_forms(text, value):
    assert final_number(text) == value


def test_there_are_a_hundred_of_them():
    assert len(FORMS) >= 100 and len({text for text, _ in FORMS}) == len(FORMS)


def test_equality_is_of_numbers_and_not_of_texts():
    for text in ("$1,000.00", "1000", "1e3", "1000.0000001", "2000/2"):
        assert same_number(f"#### {text}", F(1000)), text
    for text in ("1001", "100", "999.9", "-1000", "1000000", "none"):
        assert not same_number(f"#### {text}", F(1000)), text
    assert not same_number("0.5", F(50)) and same_number("50%", F(50))
    assert same_number("0.333333333", F(1, 3))


def test_the_text_after_a_mark():
    assert boxed(r"\boxed{\frac{1}{2}} is it") == r"\frac{1}{2}"
    assert boxed("none") is None and boxed(r"\boxed{{{") is None
    assert marked("The answer is $x^2 + 1$.\nBye") == "x^2 + 1$."
    assert marked("nothing said") is None
    assert numbers("1 2 3") == [1, 2, 3]


def test_hostile_texts_take_no_time():
    assert final_number("9" * 100_000) is None
    assert final_number("1e999999999") is None
    assert final_number("-" * 50_000 + "1") is not None
    assert final_number("1," * 50_000) == 1
