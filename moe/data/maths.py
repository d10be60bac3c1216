"""Generated mathematics: exercises in LaTeX with right solutions, the same on every machine.

Only `random.Random.random` is drawn from: Python promises its values for a seed, and nothing for `randint`.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import TypeVar

from moe.data.documents import Document

T = TypeVar("T")
SEED = 20260101
LETTERS = "xyztuvn"
EXERCISES = 10  # of one document, about 1.3 kB


class Draw:
    """Seeded choices."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def __call__(self, low: int, high: int) -> int:
        """Return a whole number from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def nonzero(self, limit: int) -> int:
        """Return a whole number from -limit to limit that is not 0."""
        return self(1, limit) * self.pick((-1, 1))

    def pick(self, options: Sequence[T]) -> T:
        """Return one of the options."""
        return options[self(0, len(options) - 1)]


def polynomial(coefficients: Sequence[int | Fraction], letter: str) -> str:
    """Return a polynomial in LaTeX; `coefficients[k]` belongs to the k-th power."""
    terms = ""
    for power in reversed(range(len(coefficients))):
        value = coefficients[power]
        if value == 0:
            continue
        sign = "-" if value < 0 else "+"
        size = "" if abs(value) == 1 and power else number(abs(value))
        base = "" if power == 0 else letter if power == 1 else f"{letter}^{{{power}}}"
        terms += f" {sign} {size}{base}" if terms else f"{'-' * (value < 0)}{size}{base}"
    return terms or "0"


def number(value: int | Fraction) -> str:
    """Return a whole number or a reduced fraction in LaTeX."""
    if value == int(value):
        return str(int(value))
    return f"{'-' * (value < 0)}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _addition(draw: Draw) -> str:
    a, b = draw(10, 9999), draw(10, 9999)
    if draw(0, 1):
        return f"Add ${a}$ and ${b}$. Solution: ${a} + {b} = {a + b}$."
    return f"Subtract ${b}$ from ${a}$. Solution: ${a} - {b} = {a - b}$."


def _multiplication(draw: Draw) -> str:
    a, b = draw(3, 99), draw(11, 99)
    tens, ones = b - b % 10, b % 10
    steps = f"{a} \\cdot {tens} + {a} \\cdot {ones} = {a * tens} + {a * ones}"
    return f"Multiply ${a}$ by ${b}$. Solution: ${a} \\times {b} = {steps} = {a * b}$."


def _division(draw: Draw) -> str:
    a, b = draw(100, 9999), draw(3, 60)
    q, r = divmod(a, b)
    solution = f"${a} = {b} \\cdot {q} + {r}$, so ${a} \\equiv {r} \\pmod{{{b}}}$"
    return f"Divide ${a}$ by ${b}$ with remainder. Solution: {solution}."


def _divisor(draw: Draw) -> str:
    shared = draw(2, 24)
    a, b = shared * draw(2, 30), shared * draw(2, 30)
    steps, x, y = [], a, b
    while y:
        steps.append(f"\\gcd({x}, {y})")
        x, y = y, x % y
    chain = " = ".join([*steps, str(x)])
    multiple = f"$\\mathrm{{lcm}}({a}, {b}) = {a * b // x}$"
    return f"Find the greatest common divisor of ${a}$ and ${b}$. Solution: ${chain}$, and {multiple}."


def _factors(draw: Draw) -> str:
    n = draw(60, 3000)
    powers, rest, prime = [], n, 2
    while rest > 1:
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        if count:
            powers.append(f"{prime}^{{{count}}}" if count > 1 else str(prime))
        prime += 1
    if powers == [str(n)]:
        return f"Factor ${n}$ into primes. Solution: ${n}$ is prime."
    product = " \\cdot ".join(powers)
    return f"Factor ${n}$ into primes. Solution: ${n} = {product}$."


def _fractions(draw: Draw) -> str:
    a, b = Fraction(draw.nonzero(15), draw(2, 12)), Fraction(draw(1, 15), draw(2, 12))
    sign, value = draw.pick((("+", a + b), ("-", a - b), ("\\cdot", a * b), (":", a / b)))
    left = f"{number(a)} {sign} {number(b)}"
    return f"Simplify ${left}$. Solution: ${left} = {number(value)}$."


def _percent(draw: Draw) -> str:
    share, whole = 5 * draw(1, 30), 20 * draw(1, 200)
    part = number(Fraction(share * whole, 100))
    return f"What is ${share}\\,\\%$ of ${whole}$? Solution: $\\frac{{{share}}}{{100}} \\cdot {whole} = {part}$."


def _linear(draw: Draw) -> str:
    a, x, b, v = draw.nonzero(15), draw(-20, 20), draw.nonzero(40), draw.pick(LETTERS)
    left, right = polynomial((b, a), v), a * x + b
    move = f"subtract ${b}$ on both sides" if b > 0 else f"add ${-b}$ on both sides"
    moved = f"${polynomial((0, a), v)} = {a * x}$"
    return f"Solve ${left} = {right}$. Solution: {move} to get {moved}, hence ${v} = {x}$."


def _quadratic(draw: Draw) -> str:
    r, s, v = draw.nonzero(12), draw.nonzero(12), draw.pick(LETTERS)
    square = polynomial((r * s, -r - s, 1), v)
    if r == s:
        factors, roots = f"({polynomial((-r, 1), v)})^{{2}}", f"the double root ${v} = {r}$"
    else:
        factors = f"({polynomial((-r, 1), v)})({polynomial((-s, 1), v)})"
        roots = f"${v}_{{1}} = {min(r, s)}$ and ${v}_{{2}} = {max(r, s)}$"
    return f"Solve ${square} = 0$. Solution: ${square} = {factors}$, which gives {roots}."


def _product(draw: Draw) -> str:
    (a, b, c, d), v = (draw.nonzero(9) for _ in range(4)), draw.pick(LETTERS)
    expanded = polynomial((b * d, a * d + b * c, a * c), v)
    return f"Expand $({polynomial((b, a), v)})({polynomial((d, c), v)})$. Solution: ${expanded}$."


def _derivative(draw: Draw) -> str:
    coefficients, v = [draw(-9, 9) for _ in range(draw(3, 5))], draw.pick(LETTERS)
    slope = [power * value for power, value in enumerate(coefficients)][1:]
    f, g = polynomial(coefficients, v), polynomial(slope, v)
    return f"Differentiate $f({v}) = {f}$. Solution: $\\frac{{d}}{{d{v}}} f({v}) = {g}$."


def _integral(draw: Draw) -> str:
    coefficients, v = [draw(-6, 6), draw(-6, 6), draw.nonzero(6)], draw.pick(LETTERS)
    low, high = draw(-3, 0), draw(1, 4)
    anti = [Fraction(0)] + [Fraction(value, power + 1) for power, value in enumerate(coefficients)]
    value = sum(c * (high**power - low**power) for power, c in enumerate(anti))
    integral = f"\\int_{{{low}}}^{{{high}}} \\left({polynomial(coefficients, v)}\\right) d{v}"
    limits = f"\\left[{polynomial(anti, v)}\\right]_{{{low}}}^{{{high}}}"
    return f"Evaluate ${integral}$. Solution: ${limits} = {number(value)}$."


def _series(draw: Draw) -> str:
    if draw(0, 1):
        a, d, n = draw(-9, 20), draw.nonzero(9), draw(4, 40)
        total = n * (2 * a + (n - 1) * d) // 2
        term = polynomial((a - d, d), "k")
        return (
            f"Find $\\sum_{{k=1}}^{{{n}}} ({term})$. Solution: they go from ${a}$ to ${a + (n - 1) * d}$, "
            f"so the sum is $\\frac{{{n}}}{{2}} ({a} + ({a + (n - 1) * d})) = {total}$."
        )
    q, n = draw(2, 5), draw(3, 8)
    return (
        f"Find $\\sum_{{k=0}}^{{{n}}} {q}^{{k}}$. Solution: "
        f"$\\frac{{{q}^{{{n + 1}}} - 1}}{{{q} - 1}} = {(q ** (n + 1) - 1) // (q - 1)}$."
    )


def _matrix(draw: Draw) -> str:
    a, b, c, d = (draw(-9, 9) for _ in range(4))
    matrix = f"\\begin{{pmatrix}} {a} & {b} \\\\ {c} & {d} \\end{{pmatrix}}"
    if draw(0, 1):
        steps = f"{a} \\cdot ({d}) - ({b}) \\cdot ({c})"
        return f"Find the determinant of $A = {matrix}$. Solution: $\\det A = {steps} = {a * d - b * c}$."
    x, y = draw(-9, 9), draw(-9, 9)
    vector = f"\\begin{{pmatrix}} {x} \\\\ {y} \\end{{pmatrix}}"
    image = f"\\begin{{pmatrix}} {a * x + b * y} \\\\ {c * x + d * y} \\end{{pmatrix}}"
    return f"Compute ${matrix} {vector}$. Solution: ${image}$."


def _binomial(draw: Draw) -> str:
    n = draw(4, 16)
    k = draw(2, n - 2)
    ratio = f"\\binom{{{n}}}{{{k}}} = \\frac{{{n}!}}{{{k}! \\cdot ({n} - {k})!}}"
    return f"In how many ways can ${k}$ of ${n}$ objects be chosen? Solution: ${ratio} = {math.comb(n, k)}$."


TOPICS: dict[str, tuple[Callable[[Draw], str], ...]] = {
    "Arithmetic": (_addition, _multiplication, _division, _percent),
    "Number theory": (_divisor, _factors, _division),
    "Fractions": (_fractions, _percent),
    "Algebra": (_linear, _quadratic, _product),
    "Calculus": (_derivative, _integral),
    "Linear algebra and counting": (_matrix, _series, _binomial),
}


def maths_documents() -> Iterator[Document]:
    """Yield exercise sheets without end."""
    draw, names, sheet = Draw(SEED), tuple(TOPICS), 0
    while True:
        sheet += 1
        topic = draw.pick(names)
        exercises = [f"{index}. {draw.pick(TOPICS[topic])(draw)}" for index in range(1, EXERCISES + 1)]
        text = f"\\section{{{topic}}}\n\n" + "\n".join(exercises) + "\n"
        yield Document(name=f"sheet {sheet}", text=text)
