r"""Finding the boxed answer, and plain comparison."""

from __future__ import annotations

import random

import pytest

from kdrl_mcore.reward.answers import MAX_ANSWER_CHARS, compare_plainly, count_boxes, last_boxed, reference_answer
from kdrl_mcore.reward.equivalence import equivalent


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{25}", "25"),
        (r"\boxed{1} no, \boxed{ 2 }.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\boxed{3}}", "3"),
        ("no box", None),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed{" + "1" * (MAX_ANSWER_CHARS + 1) + "}", None),
        (r"\boxed{" + "1" * MAX_ANSWER_CHARS + "}", "1" * MAX_ANSWER_CHARS),
    ],
)
def test_last_boxed(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


def test_count_boxes() -> None:
    assert [count_boxes(text) for text in ("", r"\boxed{1}", r"\boxed{1}\boxed {2", r"\boxed 3")] == [0, 1, 2, 0]


@pytest.mark.parametrize("gold", ["25", " 25 ", r"\boxed{25}", r"$\boxed{25}$", "$25$", "$$25$$", r"It is \boxed{25}."])
def test_reference_answer_may_be_wrapped(gold: str) -> None:
    assert reference_answer(gold) == "25"


def test_reference_answer_keeps_what_is_not_one_formula() -> None:
    assert reference_answer("$1$ and $2$") == "$1$ and $2$"
    assert reference_answer(r"\$18") == r"\$18"


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        ("25", "25", True),
        ("25", "26", False),
        ("-25", "25", False),
        ("007", "7", True),
        ("-0", "0", True),
        ("0.5", "0.5", True),
        ("0.5", "0.50", None),
        ("1/2", "0.5", None),
        ("25", "\uff12\uff15", None),
        ("1" * 16, "2" * 16, None),
    ],
)
def test_compare_plainly(reference: str, answer: str, verdict: bool | None) -> None:
    assert compare_plainly(reference, answer) is verdict


def test_compare_plainly_agrees_with_math_verify_on_integers() -> None:
    draw = random.Random(0)
    for _ in range(60):
        reference = draw.randrange(-(10**15) + 1, 10**15) if draw.random() < 0.5 else draw.randrange(-99, 99)
        answer = reference + draw.choice([0, 0, 1, -1, 10, -2 * reference])
        pair = (str(reference).zfill(draw.randrange(1, 4)), str(answer))
        plain = compare_plainly(*pair)
        if plain is not None:
            assert plain == equivalent(*pair), pair
