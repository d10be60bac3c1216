"""The generated mathematics is right, checked by sympy and by evaluating both sides, and never changes."""

import hashlib
import itertools
import re
from fractions import Fraction

import pytest
import sympy
from sympy.parsing.sympy_parser import parse_expr

from moe.data.maths import TOPICS, Draw, maths_documents, number, polynomial

GOLDEN = "b2097b3f93cc852abe82491697b396ad330e96755b2aae76150cf947f792965c"


def _expression(latex: str) -> sympy.Expr:
    """Read the LaTeX that the generator writes."""
    text = latex.replace("\\cdot", "*").replace("\\times", "*").replace(":", "/")
    text = re.sub(r"\\frac\{(.+?)\}\{(.+?)\}", r"((\1)/(\2))", text)
    text = re.sub(r"\\binom\{(\d+)\}\{(\d+)\}", r"binomial(\1,\2)", text)
    text = re.sub(r"\\(gcd|mathrm\{lcm\})\((\d+), (\d+)\)", lambda m: f"{m[1][-4:].strip('{}')}({m[2]},{m[3]})", text)
    text = re.sub(r"\^\{(\d+)\}", r"**\1", text)
    text = re.sub(r"(\d|\))\s*(?=[a-z(](?!cd|cm|inomial))", r"\1*", text)
    return parse_expr(text, local_dict={letter: sympy.Symbol(letter) for letter in "xyztuvnk"})


def _samples(topic: str, pattern: str, count: int = 25) -> list[re.Match[str]]:
    """Return matches in exercises of a topic that begin as the pattern says."""
    draw = Draw(7)
    texts = (template(draw) for _ in itertools.count() for template in TOPICS[topic])
    found = (match for text in texts if (match := re.fullmatch(pattern, text)))
    return list(itertools.islice(found, count))


@pytest.mark.parametrize("topic", sorted(TOPICS))
def test_all_sides_of_every_numeric_equation_are_equal(topic: str) -> None:
    draw, num_equations = Draw(11), 0
    for template in TOPICS[topic]:
        for _ in range(15):
            for formula in re.findall(r"\$([^$]*)\$", template(draw).partition("Solution:")[2]):
                sides = formula.split(" = ")
                if (
                    len(sides) < 2
                    or re.search(r"[a-z]", re.sub(r"\\[a-z]+(\{lcm\})?", "", formula))
                    or "\\sum" in formula
                ):
                    continue
                if re.search(r"\\(int|left|begin|det|pmod|%)", formula):
                    continue
                values = {sympy.Rational(_expression(side)) for side in sides}
                assert len(values) == 1, formula
                num_equations += 1
    assert num_equations >= {"Calculus": 0, "Algebra": 0}.get(topic, 15)


def test_linear_equations_are_solved() -> None:
    for match in _samples(
        "Algebra", r"Solve \$(.+?) = (.+?)\$\. Solution: .* get \$(.+?) = (.+?)\$, hence \$(.) = (.+?)\$\."
    ):
        left, right, moved_left, moved_right, letter, value = match.groups()
        solution = sympy.solve(_expression(left) - _expression(right))
        assert solution == [int(value)] == sympy.solve(_expression(moved_left) - _expression(moved_right)), match[0]
        assert letter in left


def test_quadratic_equations_are_factored_and_solved() -> None:
    pattern = r"Solve \$(.+?) = 0\$\. Solution: \$(.+?) = (.+?)\$, which gives (.+)\."
    for match in _samples("Algebra", pattern):
        left, again, factors, roots = match.groups()
        assert left == again
        assert sympy.expand(_expression(factors) - _expression(left)) == 0, match[0]
        named = {int(value) for value in re.findall(r"= (-?\d+)\$", roots)}
        assert named == set(sympy.solve(_expression(left))), match[0]


def test_products_are_expanded() -> None:
    for match in _samples("Algebra", r"Expand \$(.+?)\$\. Solution: \$(.+?)\$\."):
        assert sympy.expand(_expression(match[1]) - _expression(match[2])) == 0, match[0]


def test_derivatives_are_right() -> None:
    pattern = r"Differentiate \$f\((.)\) = (.+?)\$\. Solution: \$\\frac\{d\}\{d.\} f\(.\) = (.+?)\$\."
    for match in _samples("Calculus", pattern):
        letter, f, slope = match.groups()
        assert sympy.expand(sympy.diff(_expression(f), sympy.Symbol(letter)) - _expression(slope)) == 0, match[0]


def test_integrals_are_right() -> None:
    task = r"Evaluate \$\\int_\{(.+?)\}\^\{(.+?)\} \\left\((.+?)\\right\) d(.)\$\."
    pattern = task + r" Solution: \$\\left\[(.+?)\\right\].* = (.+?)\$\."
    for match in _samples("Calculus", pattern):
        low, high, f, letter, anti, value = match.groups()
        symbol = sympy.Symbol(letter)
        assert sympy.integrate(_expression(f), (symbol, int(low), int(high))) == _expression(value), match[0]
        assert sympy.expand(sympy.diff(_expression(anti), symbol) - _expression(f)) == 0, match[0]


def test_sums_are_right() -> None:
    pattern = r"Find \$\\sum_\{k=(\d)\}\^\{(\d+)\} (.+?)\$\. .*= (-?\d+)\$\."
    for match in _samples("Linear algebra and counting", pattern):
        term = _expression(re.sub(r"\^\{k\}", "**k", match[3]))
        total = sum(term.subs(sympy.Symbol("k"), k) for k in range(int(match[1]), int(match[2]) + 1))
        assert total == int(match[4]), match[0]


def test_matrix_exercises_are_right() -> None:
    four = r"\\begin\{pmatrix\} (\S+) & (\S+) \\\\ (\S+) & (\S+) \\end\{pmatrix\}"
    two = r"\\begin\{pmatrix\} (\S+) \\\\ (\S+) \\end\{pmatrix\}"
    for match in _samples("Linear algebra and counting", rf"Find the determinant of \$A = {four}\$\..* = (\S+)\$\."):
        a, b, c, d, value = map(int, match.groups())
        assert sympy.Matrix([[a, b], [c, d]]).det() == value, match[0]
    for match in _samples("Linear algebra and counting", rf"Compute \${four} {two}\$\. Solution: \${two}\$\."):
        a, b, c, d, x, y, u, v = map(int, match.groups())
        assert sympy.Matrix([[a, b], [c, d]]) * sympy.Matrix([x, y]) == sympy.Matrix([u, v]), match[0]


def test_numbers_called_prime_are_prime_and_factors_are_prime() -> None:
    for match in _samples("Number theory", r"Factor \$(\d+)\$ into primes\. Solution: \$(.+)\$(.*)\.", count=150):
        if match[3]:
            assert sympy.isprime(int(match[1])), match[0]
            continue
        bases = [int(factor.split("^")[0]) for factor in match[2].split(" = ")[1].split(" \\cdot ")]
        assert all(sympy.isprime(base) for base in bases), match[0]
        assert len(set(bases)) == len(bases)


def test_percentages_and_remainders_are_right() -> None:
    for match in _samples("Arithmetic", r"What is \$(\d+)\\,\\%\$ of \$(\d+)\$\?.* = (.+?)\$\."):
        assert Fraction(int(match[1]) * int(match[2]), 100) == Fraction(str(_expression(match[3]))), match[0]
    for match in _samples("Arithmetic", r"Divide \$(\d+)\$ by \$(\d+)\$.*\\equiv (\d+) .*"):
        assert int(match[1]) % int(match[2]) == int(match[3])


@pytest.mark.parametrize(
    ("coefficients", "latex"),
    [
        ((0, 0), "0"),
        ((-1, -1), "-x - 1"),
        ((0, 1, -2), "-2x^{2} + x"),
        ((Fraction(1, 2), 3), "3x + \\frac{1}{2}"),
        ((5,), "5"),
    ],
)
def test_polynomials_are_written_as_people_write_them(coefficients: tuple[int, ...], latex: str) -> None:
    assert polynomial(coefficients, "x") == latex


def test_negative_fractions_carry_their_sign_in_front() -> None:
    assert number(Fraction(-3, 6)) == "-\\frac{1}{2}"


def test_draws_reach_both_ends_and_nothing_beyond() -> None:
    draw = Draw(1)
    assert {draw(-2, 2) for _ in range(500)} == {-2, -1, 0, 1, 2}
    assert {draw.nonzero(2) for _ in range(500)} == {-2, -1, 1, 2}


def test_text_is_the_same_on_every_machine_for_ever() -> None:
    sheets = itertools.islice(maths_documents(), 200)
    assert hashlib.sha256("".join(sheet.text for sheet in sheets).encode()).hexdigest() == GOLDEN
