"""The choice that a response makes, in the many ways to say it, and what is no choice."""

from __future__ import annotations

import pytest

from kdrl_mcore.reward.choices import choice_of, chosen

RIGHT = [
    ("B", "\\boxed{\\text{(B)}}"),
    ("B", "\\boxed{(b)}"),
    ("B", "\\boxed{Answer: B}"),
    ("B", "\\boxed{\\text{Choice B}}"),
    ("B", "\\boxed{\\mathcal{B}}"),
    ("B", "\\boxed{\\boxed{B}}"),
    ("B", "\\boxed{[B]}"),
    ("B", "\\boxed{Ⓑ}"),
    ("B", "\\boxed{B. \\text{Paris}}"),
    ("B", "\\boxed{B }"),
    ("B", "$\\boxed{\\textbf{B}}$"),
    ("B", "\\boxed{\\mathbf{(B)}\\ 12}"),
    ("B", "\\boxed B"),
    ("B", "The answer is B."),
    ("B", "The answer is (B) Paris."),
    ("B", "the answer: B"),
    ("B", "Answer is B"),
    ("B", "**Answer:** B"),
    ("B", "**Answer: B**"),
    ("B", "Final answer: (B)"),
    ("B", "Final Answer: **B**"),
    ("B", "The correct option is B."),
    ("B", "The correct choice is (B)."),
    ("B", "Correct answer: B"),
    ("B", "So B is correct."),
    ("B", "Option B is correct."),
    ("B", "Option (B) is the correct answer."),
    ("B", "B is the answer"),
    ("B", "Therefore, the answer must be B."),
    ("B", "The answer should be B"),
    ("B", "The answer would be **B**."),
    ("B", "The best answer is B"),
    ("B", "The right answer is B."),
    ("B", "The answer is option (B)."),
    ("B", "The answer is choice B"),
    ("B", "The answer is letter B"),
    ("B", "The answer is thus B"),
    ("B", "The answer is \\(B\\)."),
    ("B", "The answer is $\\text{B}$"),
    ("B", "The answer is $\\boxed{B}$"),
    ("B", 'The answer is "B".'),
    ("B", "The answer is 'B'."),
    ("B", "The answer is B) Paris"),
    ("B", "The answer is: **B. Paris**"),
    ("B", "The answer is\n**B**"),
    ("B", "blah blah\n\nB"),
    ("B", "blah\n(B)"),
    ("B", "B) Paris"),
    ("B", "b"),
    ("B", "**B**"),
    ("B", "# Answer\n\nB"),
    ("B", "ANSWER: (B)"),
    ("B", "Answer - B"),
    ("B", "Answer = B"),
    ("AC", "The answer is A and C"),
    ("AC", "The answers are A, C."),
    ("AC", "\\boxed{A, C}"),
    ("AC", "\\boxed{C, A}"),
    ("AC", "\\boxed{A \\text{ and } C}"),
    ("AC", "\\boxed{\\text{A, C}}"),
    ("AC", "\\boxed{(A), (C)}"),
    ("AC", "\\boxed{A} and \\boxed{C}"),
    ("AC", "\\boxed{CA}"),
    ("ABD", "\\boxed{A, B, and D}"),
    ("ABD", "\\boxed{A,B,D}"),
    ("B", "<think>The answer is A.</think>The answer is B"),
    ("B", "<think>x</think>\n\nB"),
    ("D", "The answer is D, since the sum is 12."),
    ("D", "The total is \\boxed{12}, so the answer is (D)."),
    ("B", "Answer: The answer is B"),
    ("I", "The answer is I."),
    ("A", "The answer is A."),
    ("A", "The answer is A because..."),
    ("B", "I think the answer is probably B"),
    ("B", "My answer is B"),
    ("B", "The answer to the question is B."),
    ("B", "The answer is clearly B."),
    ("B", "Answer: `B`"),
    ("B", "Answer：B"),
    ("B", "The answer is Ｂ"),
    ("B", "答案是B"),
]
WRONG = [
    ("B", "\\boxed{A}"),
    ("B", "\\boxed{}"),
    ("B", "\\boxed{AB}"),
    ("B", "\\boxed{A or B}"),
    ("B", "\\boxed{A/B}"),
    ("B", "\\boxed{ABCD}"),
    ("B", "\\boxed{A, B, C, D}"),
    ("B", "The answer is A or B."),
    ("B", "The answer is B or C."),
    ("B", "The answer is either A or B"),
    ("B", "The answer is not B."),
    ("B", "The answer is A, not B."),
    ("B", "Is the answer B? No, the answer is A."),
    ("B", "B is not correct. The answer is C."),
    ("B", "A"),
    ("B", ""),
    ("B", "I like B movies a lot, but who knows"),
    ("A", "The answer is a number"),
    ("A", "A number of options are good"),
    ("B", "<think>The answer is B"),
    ("B", "<think>\\boxed{B}"),
    ("A", "The answer is an apple"),
    ("AC", "The answer is A"),
    ("AC", "\\boxed{A}"),
    ("AC", "\\boxed{A,B,C}"),
    ("B", "\\boxed{Bob}"),
    ("B", "\\boxed{Paris}"),
    ("B", "\\boxed{12}"),
    ("B", "\\boxed{(A) Because B is wrong}"),
    ("I", "The answer is obviously what I said"),
    ("B", "The answer is A. B is wrong."),
    ("B", "\\boxed{B}\\boxed{C}"),
    ("B", "\\boxed{B} or \\boxed{C}"),
    ("B", "Options: A B C D"),
    ("B", "(A) 1 (B) 2 (C) 3"),
    ("C", "The answer is (A) 1 (B) 2 (C) 3"),
]


@pytest.mark.parametrize(("reference", "response"), RIGHT)
def test_the_choice_is_found(reference: str, response: str) -> None:
    assert choice_of(response) == chosen(reference)


@pytest.mark.parametrize(("reference", "response"), WRONG)
def test_what_does_not_choose_the_reference(reference: str, response: str) -> None:
    assert choice_of(response) != chosen(reference)


@pytest.mark.parametrize(
    ("gold", "letters"),
    [
        (gold, "B")
        for gold in ("B", "b", "(B)", "B)", "B.", "B. Paris", "(B) 12", "$B$", r"\text{B}", r"\textbf{(B)}", "[B]", "**B**")
    ]
    + [(gold, "AC") for gold in ("A,C", "A, C", "C, A", "AC", "A and C", "(A)(C)", "A; C")]
    + [(gold, None) for gold in ("2", "0", "Paris", "", "A or B", "I am", "because")],
)
def test_forms_of_a_reference(gold: str, letters: str | None) -> None:
    assert chosen(gold) == letters
