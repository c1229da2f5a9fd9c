"""Generated arithmetic for the demo: word problems with worked steps, right by construction."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One problem; `steps` are lines such as `12 + 7 = 19`, and `key` is its kind and numbers,
    whatever their order and the story around them."""

    key: str
    question: str
    plan: str
    steps: tuple[str, ...]
    answer: int

    def worked(self) -> str:
        lines = [f"Question: {self.question}", self.plan, *self.steps, f"Answer: {self.answer}"]
        return "\n".join(lines)

    def short(self) -> str:
        return f"Question: {self.question}\nAnswer: {self.answer}"

    def bare(self) -> str:
        """The first step as a question; only for a problem of one step."""
        expression, result = self.steps[0].split(" = ")
        return f"Question: What is {expression}?\nAnswer: {result}"


@dataclass(frozen=True)
class _Template:
    """A kind of problem. A step is `left operator right`, each a number's name, a number, or
    `_` for the step before."""

    kind: str
    numbers: Callable[[random.Random], dict[str, int]]
    plan: str
    steps: tuple[str, ...]
    stories: tuple[str, ...]


def make_problem(rng: random.Random) -> Problem:
    template = rng.choice(_TEMPLATES)
    numbers = template.numbers(rng)
    name, other = rng.sample(_NAMES, 2)
    story = rng.choice(template.stories)
    steps, answer = _work(template.steps, numbers)
    return Problem(
        key=f"{template.kind} {sorted(numbers.values())}",
        question=story.format(name=name, other=other, things=rng.choice(_THINGS), **numbers),
        plan=template.plan,
        steps=steps,
        answer=answer,
    )


def _work(steps: tuple[str, ...], numbers: dict[str, int]) -> tuple[tuple[str, ...], int]:
    """The written steps and the last result; all are whole numbers by the choice of numbers."""
    result, written = 0, []
    for step in steps:
        left_name, operator, right_name = step.split()
        known = numbers | {"_": result, "100": 100}
        left, right = known[left_name], known[right_name]
        result = _OPERATORS[operator](left, right)
        written.append(f"{left} {operator} {right} = {result}")
    return tuple(written), result


_OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": int.__add__,
    "-": int.__sub__,
    "*": int.__mul__,
    "/": int.__floordiv__,
}

_NAMES = (
    *("Ada", "Amir", "Anna", "Ben", "Carla", "Chen", "Dana", "David", "Elif", "Emma", "Farid"),
    *("Grace", "Hugo", "Ines", "Ivan", "Jack", "Kofi", "Lena", "Liam", "Maria", "Mia", "Nadia"),
    *("Noah", "Olga", "Omar", "Paul", "Priya", "Rosa", "Sam", "Sara", "Tom", "Yuki"),
)

_THINGS = (
    *("apples", "balls", "beads", "books", "buttons", "cards", "coins", "cookies", "eggs"),
    *("flowers", "lemons", "marbles", "oranges", "pencils", "photos", "plums", "shells"),
    *("stamps", "stickers", "stones", "tickets", "toys"),
)


def _sum(rng: random.Random) -> dict[str, int]:
    return {"a": rng.randint(2, 99), "b": rng.randint(2, 99)}


def _difference(rng: random.Random) -> dict[str, int]:
    a = rng.randint(5, 99)
    return {"a": a, "b": rng.randint(2, a - 1)}


def _product(rng: random.Random) -> dict[str, int]:
    return {"a": rng.randint(2, 20), "b": rng.randint(2, 12)}


def _quotient(rng: random.Random) -> dict[str, int]:
    b = rng.randint(2, 12)
    return {"a": b * rng.randint(2, 20), "b": b}


def _sum_less(rng: random.Random) -> dict[str, int]:
    numbers = _sum(rng)
    return numbers | {"c": rng.randint(2, numbers["a"] + numbers["b"] - 1)}


def _product_more(rng: random.Random) -> dict[str, int]:
    return _product(rng) | {"c": rng.randint(2, 50)}


def _product_less(rng: random.Random) -> dict[str, int]:
    numbers = _product(rng)
    return numbers | {"c": rng.randint(2, numbers["a"] * numbers["b"] - 1)}


def _percentage(rng: random.Random) -> dict[str, int]:
    # 20 is the smallest number of which 5 % is whole; all shares are multiples of 5 %.
    return {"a": 20 * rng.randint(1, 25), "p": 5 * rng.randint(1, 19)}


def _equation_plus(rng: random.Random) -> dict[str, int]:
    a, b, x = rng.randint(2, 12), rng.randint(1, 50), rng.randint(1, 20)
    return {"a": a, "b": b, "c": a * x + b}


def _equation_minus(rng: random.Random) -> dict[str, int]:
    a, x = rng.randint(2, 12), rng.randint(1, 20)
    b = rng.randint(1, a * x)
    return {"a": a, "b": b, "c": a * x - b}


_NUMBERS = {
    "sum": _sum,
    "difference": _difference,
    "product": _product,
    "quotient": _quotient,
    "sum less": _sum_less,
    "product more": _product_more,
    "product less": _product_less,
    "percentage": _percentage,
    "discount": _percentage,
    "equation plus": _equation_plus,
    "equation minus": _equation_minus,
}

# kind | plan | steps, and below it the stories
_TEXT = """
sum | Add the two numbers. | a + b
{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?
{name} has {a} {things} and {other} has {b}. How many {things} do they have together?
A box has {a} {things}. {name} puts in {b} more. How many {things} does it hold?
{name} found {a} {things} on Monday and {b} on Tuesday. How many {things} in all?

difference | Take the second number from the first. | a - b
{name} has {a} {things} and gives {b} to {other}. How many {things} are left?
There were {a} {things} on the table. {name} took {b}. How many {things} stayed?
{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have?
{name} needs {a} {things} and has {b}. How many {things} are missing?

product | Multiply the two numbers. | a * b
{name} has {a} boxes with {b} {things} in each. How many {things} is that?
There are {a} rows of {b} {things}. How many {things} did {name} count?
{name} collects {b} {things} a day. How many {things} is that after {a} days?
{a} friends of {name} bring {b} {things} each. How many {things} do they bring?

quotient | Divide the first number by the second. | a / b
{name} shares {a} {things} equally among {b} friends. How many does each get?
{name} puts {a} {things} into bags of {b}. How many bags does {name} fill?
{b} equal boxes hold {a} {things}. How many {things} are in one box?

sum less | First add, then subtract. | a + b, _ - c
{name} has {a} {things}, gets {b} from {other} and loses {c}. How many are left?
A shop has {a} {things}. It gets {b} more and sells {c}. How many are left?
{name} found {a} {things} and {other} found {b}. They lost {c}. How many are left?

product more | First multiply, then add. | a * b, _ + c
{name} has {a} bags with {b} {things} each and {c} more on a shelf. How many is that?
{name} buys {a} packs of {b} {things}. {other} brings {c} more. How many are there?
{name} pays {b} dollars for each of {a} tickets, {c} for the bus. How many dollars?

product less | First multiply, then subtract. | a * b, _ - c
{name} has {a} boxes of {b} {things} and gives {c} to {other}. How many are left?
{name} picks {b} {things} a day for {a} days and sells {c}. How many remain?
There are {a} shelves with {b} {things} each. {c} are broken. How many are whole?

percentage | Multiply by the percentage, then divide by 100. | a * p, _ / 100
What is {p}% of {a}?
{name} has {a} {things}, and {p}% of them are red. How many {things} are red?
{p}% of the {a} {things} in the shop belong to {name}. How many {things} is that?

discount | Find the part that goes, then take it from the whole. | a * p, _ / 100, a - _
A coat costs {a} dollars. {name} gets {p}% off. How many dollars does {name} pay?
{name} had {a} {things} and gave away {p}% of them. How many {things} are left?

equation plus | Subtract the number without x, then divide by the number before x. | c - b, _ / a
Solve {a}x + {b} = {c} for x.
If {a}x + {b} = {c}, what is x?
{name} multiplies a number by {a}, adds {b} and gets {c}. What is the number?

equation minus | Add the number without x, then divide by the number before x. | c + b, _ / a
Solve {a}x - {b} = {c} for x.
If {a}x - {b} = {c}, what is x?
{name} multiplies a number by {a}, subtracts {b} and gets {c}. What is the number?
"""


def _templates() -> Iterator[_Template]:
    for block in _TEXT.strip().split("\n\n"):
        head, *stories = block.splitlines()
        kind, plan, steps = head.split(" | ")
        yield _Template(kind, _NUMBERS[kind], plan, tuple(steps.split(", ")), tuple(stories))


_TEMPLATES = tuple(_templates())
