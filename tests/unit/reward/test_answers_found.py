r"""Where a response's answer is searched: which boxes count, thoughts, references, and `reward.extract=anywhere`."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_mcore.errors import DataError
from kdrl_mcore.reward.answers import MAX_ANSWER_CHARS, answer_text, boxed_answer, free_answer, reference_answer
from kdrl_mcore.reward.equivalence import equivalent
from kdrl_mcore.reward.extraction import equivalent_anywhere
from kdrl_mcore.reward.golds import check_answers


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{1} and \boxed{2}.", "1; 2"),
        (r"\boxed{1}, \boxed{2}, and \boxed{3}", "1; 2; 3"),
        (r"\[ \boxed{(1, 2)}, \boxed{(3, 4)} \]", "(1, 2); (3, 4)"),
        (r"\boxed{1} papers and \boxed{2} bins", "1; 2"),
        (r"$x = \boxed{1}$ or $x = \boxed{2}$", "1; 2"),
        (r"so $\boxed 5$", "5"),
        (r"so \boxed 12.", "12"),
        (r"\boxed{\text{Answer: } \boxed{3}}", "3"),
        # A response must not gain by listing candidates: boxes elsewhere are not part of the answer.
        (r"Maybe \boxed{1}. Or \boxed{2}.", "2"),
        ("\\boxed{1}\n\n\\boxed{2}", "2"),
        (r"\boxed{1}\boxed{2}", "2"),
        (r"\boxed{1}, no, \boxed{2}", "2"),
        (r"\boxed{1}, wait, \boxed{2}", "2"),
        (r"\boxed{1} and so \boxed{2}", "2"),
        (r"from \boxed{1} we get \boxed{2}", "2"),
        (r"\boxed{5} and \boxed{}", ""),
        (r"\boxed{5}\boxed{}", ""),
        (r"\boxed{5} and \boxed{6", None),
        ("no box", None),
        # Thoughts.
        (r"<think>\boxed{7}</think> \boxed{5}", "5"),
        (r"\boxed{7}</think> \boxed{5}", "5"),
        (r"<think>\boxed{7}</think> It is 7.", "7"),
        (r"<think>\boxed{7} wait", None),
        (r"\boxed{7} <think>or \boxed{8}", "7"),
    ],
)
def test_boxes_that_make_the_answer(response: str, answer: str | None) -> None:
    assert boxed_answer(response) == answer


def test_an_answer_of_many_boxes_is_bounded() -> None:
    assert boxed_answer(r"\boxed{1}, " * 20_000 + r"\boxed{2}") == "; ".join(["1"] * 49 + ["2"])
    assert boxed_answer(", ".join([rf"\boxed{{{'1' * 500}}}"] * 5)) is None


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("#### 42", "42"),
        ("Ron has 3 eggs.\nHe sells 2.\n#### 1,080", "1,080"),
        (r"\(\boxed{1}\) and \(\boxed{-2}\).", "1; -2"),
        (r"$\boxed{1}\boxed{2}$", "1; 2"),
        (r"First \boxed{1}. Then \boxed{2}.", "2"),
        (r"$\fbox{2}$", "2"),
        ('["42"]', "42"),
        (r'["\\frac{1}{2}", "3"]', r"\frac{1}{2}, 3"),
        ("$$", "$$"),
        ("(A)", "(A)"),
        ("[1, 2]", "[1, 2]"),
        (" 0.5 ", "0.5"),
    ],
)
def test_forms_of_a_reference(gold: str, answer: str) -> None:
    assert reference_answer(gold) == answer


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("42", "42"), (42, "42"), (42.0, "42"), (0.5, "0.5"), (1e-7, "1e-07"), (-3, "-3"), (2**60, str(2**60)),
        ([1, 2], "1, 2"), (["a", "b"], "a, b"), ([0.5], "0.5"), ([[1, 2], [3]], "(1, 2), 3"),
        ([{"call": "f()", "output": "1"}], '[{"call": "f()", "output": "1"}]'),
        ("", None), (" ", None), (None, None), (True, None), ([], None), ([None], None), ({"a": 1}, None), (["", "a"], None),
    ],
)  # fmt: skip
def test_values_of_an_answer_column(value: object, text: str | None) -> None:
    assert answer_text(value) == text


@pytest.mark.parametrize(
    ("kind", "gold"),
    [
        (kind, gold)
        for kind in ("math_verify", "exact_match")
        for gold in ("42", "#### 42", "0.5", "1e-07", "(A)", "A,C", "1, 2")
    ]
    + [("math_verify", gold) for gold in (r"\boxed{1} and \boxed{2}", r"$\frac{1}{2}$", '["42"]', r"\text{no solution}")]
    + [("multiple_choice", gold) for gold in ("A", "(A)", "A,C", "b", "B. Paris")]
    + [("python_code", '[{"call": "f()", "output": "1"}]'), ("format", "anything"), ("remote_model", "anything")],
)
def test_a_verifier_takes_the_known_forms_of_its_references(kind: str, gold: str) -> None:
    check_answers([gold], "some.jsonl", kind)


@pytest.mark.parametrize(
    ("kind", "gold", "reason"),
    [
        ("math_verify", "She sold half as many eggs in May, and so both months together give it. " * 3, "a text rather than"),
        ("math_verify", r"\frac{1}{2", "braces are not balanced"),
        ("math_verify", "1" * (MAX_ANSWER_CHARS + 1), "more than 2000 characters"),
        ("math_verify", r"\boxed{}", "it is empty"),
        ("multiple_choice", "2", "names no choice"),
        ("multiple_choice", "Paris", "names no choice"),
        ("python_code", "42", "not a list of tests"),
    ],
)  # fmt: skip
def test_a_reference_that_no_response_can_match_is_refused(kind: str, gold: str, reason: str) -> None:
    with pytest.raises(DataError, match=rf"some.jsonl row 2: no response can match the answer .*{reason}"):
        check_answers(["A" if kind == "multiple_choice" else '[{"call": "f()", "output": "1"}]', gold], "some.jsonl", kind)


def test_all_refused_answers_are_counted() -> None:
    with pytest.raises(DataError, match=r"row 2: .* 'Paris' .* \(and 2 more of 5, the last in row 5\)$"):
        check_answers(["A", "Paris", "B", "12", "none"], "some.jsonl", "multiple_choice")


@pytest.mark.parametrize(
    ("reference", "response", "correct"),
    [
        ("25", "The answer is 25.", True),
        ("25", "so we get $25$", True),
        ("25", r"so \(5^2 = 25\)", True),
        ("1/2", "Final answer: 0.5", True),
        ("25", r"It is \boxed{25}", True),
        ("1,2", r"\boxed{1} and \boxed{2}", True),
        ("25", "The answer is 26.", False),
        ("25", r"25 \boxed{26}", False),
        ("25", r"The answer is 25, that is \boxed{", False),
        ("25", "<think>The answer is 25", False),
        ("0.0000001", "The answer is 0.0000002.", False),
        ("25", "", False),
        # A box is judged as strictly as without `anywhere`, and so is the text that a response calls its answer.
        ("12", r"\boxed{13 = 12}", False),
        ("HHT", r"\boxed{THH}", False),
        ("5", r"\boxed{5 \text{ or more}}", False),
        ("2516_8", r"\boxed{2516_7}", False),
        ("12", "The answer is $13 = 12$.", False),
        ("HHT", "The answer is $THH$.", False),
        ("5", "The answer is at least 5.", False),
        ("5", r"The answer is $\ge 5$.", False),
        ("72", "The answer is 72. No, the answer is 73.", False),
        ("73", "The answer is 72. No, the answer is 73.", True),
        ("1.6e-19", "The answer is 1.6e-19.", True),
        ("B", "The answer is (B).", True),
        ("yes", "The answer is yes.", True),
        ("yes", "The answer is no.", False),
        ("1,2", "The answers are 1 and 2.", True),
        ("(1,2)", "The answer is (1,2).", True),
        ("73", "**Final Answer:** 73", True),
        ("12", "The answer: twelve.", True),
        ("42", "Answer: 42 (since 6*7=42)", True),
        ("34", "Final Answer: The largest n is 34.", True),
        ("5.20", r"The answer is \$5.20", True),
    ],
)
def test_an_answer_anywhere(reference: str, response: str, correct: bool) -> None:
    answer = free_answer(response)
    assert bool(answer and equivalent_anywhere(reference, answer)) == correct


NUMBERS = st.one_of(
    st.integers(-(10**12), 10**12).map(str),
    st.decimals(-(10**6), 10**6, allow_nan=False, places=4).map(str),
    st.tuples(st.integers(-999, 999), st.integers(1, 999)).map(lambda pair: rf"\frac{{{pair[0]}}}{{{pair[1]}}}"),
    st.tuples(st.integers(1, 99), st.integers(1, 8)).map(lambda pair: f"{pair[0]} {pair[1]}/9"),
    st.tuples(st.integers(1, 99), st.integers(-30, 30)).map(lambda pair: f"{pair[0]}e{pair[1]}"),
    st.integers(1, 10**9).map(lambda value: f"{value:,}"),
)
FORMS = st.one_of(
    NUMBERS,
    st.lists(NUMBERS.filter(lambda text: "," not in text), min_size=2, max_size=4).map("; ".join),
    st.lists(NUMBERS.filter(lambda text: "," not in text), min_size=2, max_size=4).map(lambda items: f"({', '.join(items)})"),
    NUMBERS.map(lambda number: f"x = {number}"),
    NUMBERS.map(lambda number: rf"{number}\text{{ cm}}"),
)


@given(FORMS)
@settings(max_examples=50, deadline=None)
def test_an_answer_equals_itself(answer: str) -> None:
    assert equivalent(answer, answer)
    assert equivalent(f" ${answer}$ ", answer)


@given(st.integers(-(10**6), 10**6), st.integers(-40, 40), st.sampled_from([-3, -1, 1, 2]))
@settings(max_examples=50, deadline=None)
def test_a_number_changed_in_its_last_digit_is_another_at_any_size(digits: int, exponent: int, change: int) -> None:
    reference, changed = f"{digits}e{exponent}", f"{digits + change}e{exponent}"
    assert equivalent(reference, rf"{digits} \times 10^{{{exponent}}}")
    assert not equivalent(reference, changed)
    assert not equivalent(reference, rf"{digits + change} \times 10^{{{exponent}}}")


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=5, unique=True), st.randoms())
@settings(max_examples=40, deadline=None)
def test_a_list_has_no_order_and_no_spare_items(items: list[int], random: object) -> None:
    reference = ", ".join(map(str, items))
    assert equivalent(reference, ", ".join(map(str, reversed(items))))
    assert not equivalent(reference, ", ".join(map(str, [*items, 100])))
    assert not equivalent(reference, ", ".join(map(str, items[:-1])))
    assert not equivalent(f"({reference})", f"({', '.join(map(str, reversed(items)))})")
    assert not any(equivalent(str(item), reference) for item in items)  # a list of candidates is not an answer


@given(st.text(max_size=60))
@settings(max_examples=40, deadline=None)
def test_no_text_breaks_the_comparison(text: str) -> None:
    boxed_answer(rf"\boxed{{{text}}}")
    assert not equivalent("31.4159", text) or "31" in text or any(not character.isascii() for character in text)


def test_preflight_names_the_row(tmp_path: Path) -> None:
    from kdrl_mcore.config import load_config
    from kdrl_mcore.preflight.configuration import check_data
    from tests.support.tokenizers import byte_level, save_tokenizer

    model = save_tokenizer(tmp_path / "model", byte_level())
    path = tmp_path / "golds.jsonl"
    path.write_text('{"prompt": "a", "answer": "A"}\n{"prompt": "b", "answer": "3"}\n')
    config = load_config(
        [f"data.train={path}", "data.template=plain", f"student.path={model}", "teacher.path=x", "reward=multiple_choice"]
    )
    with pytest.raises(DataError, match=r"golds.jsonl row 2: no response can match the answer '3' with reward=multiple_choice"):
        check_data(config)
    path.write_text('{"prompt": "a", "answer": "A"}\n{"prompt": "b", "answer": "(C)"}\n')
    assert check_data(config) == f"{path} (2 prompts)"
