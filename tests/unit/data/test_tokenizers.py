"""A tokenizer is loaded as its `tokenizer.json` says, and a student's is compared with a teacher's."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from kdrl_mcore.data.tokenizers import (
    PROBE,
    _first_difference,
    check_same_tokenizer,
    different_added_tokens,
    eos_token_ids,
    load_tokenizer,
)
from kdrl_mcore.errors import DataError
from tests.support.tokenizers import CHAT_TEMPLATE, END, byte_level, chat_model, save_tokenizer


def character_level() -> Tokenizer:
    """One token per character, newline included, which transformers rebuilds wrongly as a Qwen2 tokenizer."""
    characters = sorted(set(PROBE))
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(["<unk>", END, *characters])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def test_a_tokenizer_that_agrees_is_taken(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "m", byte_level(), tokenizer_class="Qwen2Tokenizer"))
    (ids,) = tokenizer.encode([PROBE], special_tokens=False)
    assert len(ids) == len(PROBE.encode())
    assert tokenizer.decode_response(ids) == PROBE
    assert tokenizer.vocab_size == 257
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (256, {256})
    assert not tokenizer.has_chat_template


def test_a_tokenizer_that_transformers_rebuilds_wrongly_is_read_from_its_file(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "m", character_level(), tokenizer_class="Qwen2Tokenizer", chat_template=CHAT_TEMPLATE)
    rebuilt = AutoTokenizer.from_pretrained(folder)
    assert "\n" not in rebuilt.decode(rebuilt.encode(PROBE, add_special_tokens=False)), "the trap this test is about is gone"
    tokenizer = load_tokenizer(folder)
    (ids,) = tokenizer.encode([PROBE], special_tokens=False)
    assert len(ids) == len(PROBE)
    assert tokenizer.decode_response(ids) == PROBE
    assert tokenizer.eos_id == 1
    assert tokenizer.chat_text([{"role": "user", "content": "1+1"}], datetime(2024, 7, 26)) == "<user>1+1\n<assistant>"


def test_decode_response_leaves_out_the_end_and_special_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "m", byte_level([END, "<|pad|>"])))
    (ids,) = tokenizer.encode(["4\n2"], special_tokens=False)
    assert tokenizer.decode_response([*ids, 256]) == "4\n2"
    assert tokenizer.decode_response([ids[0], 257, *ids[1:]]) == "4\n2"
    assert tokenizer.decode_response([]) == ""


def test_an_end_of_sequence_that_is_not_a_special_token_is_left_out_too(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "m", byte_level())
    semicolon = byte_level().token_to_id(";")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [semicolon]}))
    tokenizer = load_tokenizer(folder)
    (ids,) = tokenizer.encode(["a;b;"], special_tokens=False)
    assert tokenizer.eos_ids == {256, semicolon}
    assert tokenizer.decode_response(ids) == "a;b"


@pytest.mark.parametrize(("listed", "ids"), [(None, {7}), (3, {3, 7}), ([3, 4], {3, 4, 7}), ([], {7})])
def test_eos_token_ids_joins_tokenizer_and_generation_config(tmp_path: Path, listed: object, ids: set[int]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    assert eos_token_ids(tmp_path, 7) == ids


def test_eos_token_ids_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="defines no end of sequence: set eos_token"):
        eos_token_ids(tmp_path, None)
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(DataError, match=r"generation_config\.json is not a JSON object"):
        eos_token_ids(tmp_path, 1)


def test_without_an_end_of_sequence_nothing_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="defines no end of sequence"):
        load_tokenizer(save_tokenizer(tmp_path / "m", byte_level(), eos=None))


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    folder = save_tokenizer(tmp_path / "m", byte_level())
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(DataError, match=r"tokenizer\.json is not a readable tokenizer"):
        load_tokenizer(folder)


def test_a_token_that_transformers_invents_is_left_out(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "m", byte_level(), tokenizer_class="Qwen2Tokenizer")
    assert len(AutoTokenizer.from_pretrained(folder)) == 258, "the trap this test is about is gone"
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 257
    assert max(tokenizer.encode(["<|endoftext|>"], special_tokens=False)[0]) < 256


def test_when_no_loader_agrees_the_first_difference_is_named(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "m", byte_level())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "[PAD]"}))
    with pytest.raises(
        DataError,
        match=r"cannot be loaded so that it agrees with tokenizer\.json: .*has '\[PAD\]' instead of no token at id 257",
    ) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_the_guard_sees_every_kind_of_difference(tmp_path: Path) -> None:
    backend = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "m", byte_level(), model_type="llama"))
    assert _first_difference(backend, byte_level()) is None
    assert "has '0' instead of 'S' at id" in str(_first_difference(backend, byte_level(swap=("0", "S"))))
    other_text = byte_level()
    other_text.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("3x", "4x")])
    assert (
        _first_difference(backend, other_text)
        == "decodes to different text: '3x + 14 = 2,025.75 f' instead of '4x + 14 = 2,025.75 f'"
    )
    other_cut = byte_level()
    other_cut.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    assert "differently: token 0 is 'S' instead of 'Ġ'" in str(_first_difference(backend, other_cut))
    for side in ("lstrip", "rstrip"):
        swallowing = byte_level([])
        swallowing.add_special_tokens([AddedToken(END, **{side: True})])
        assert "splits '<|end|> user" in str(_first_difference(backend, swallowing))


def load(folder: Path, tokenizer: Tokenizer, **settings: str) -> object:
    return load_tokenizer(save_tokenizer(folder, tokenizer, **settings))


def test_equal_tokenizers_share_every_id(tmp_path: Path) -> None:
    assert check_same_tokenizer(load(tmp_path / "s", byte_level()), load(tmp_path / "t", byte_level())) == 257


def test_tokens_added_behind_the_shared_vocabulary_are_no_difference(tmp_path: Path) -> None:
    small, large = load(tmp_path / "s", byte_level()), load(tmp_path / "t", byte_level([END, "<think>"]))
    assert check_same_tokenizer(small, large) == check_same_tokenizer(large, small) == 257


def test_the_first_different_token_is_named(tmp_path: Path) -> None:
    student, teacher = load(tmp_path / "s", byte_level()), load(tmp_path / "t", byte_level(swap=("A", "Z")))
    index = byte_level().token_to_id("A")
    expected = re.escape(f"at id {index}, {tmp_path / 's'} has 'A' and {tmp_path / 't'} has 'Z'")
    with pytest.raises(DataError, match=expected):
        check_same_tokenizer(student, teacher)


def test_another_added_token_at_a_shared_id_is_a_difference(tmp_path: Path) -> None:
    student = load(tmp_path / "s", byte_level([END, "<a>"]))
    teacher = load(tmp_path / "t", byte_level(["<b>", END, "<c>"]))
    with pytest.raises(DataError, match="at id 256"):
        check_same_tokenizer(student, teacher)


def test_added_tokens_may_differ_where_that_is_asked_for(tmp_path: Path) -> None:
    student = load(tmp_path / "s", byte_level([END, "<a>", "<c>"]))
    teacher = load(tmp_path / "t", byte_level(["<b>", END, "<c>"]))
    assert different_added_tokens(student, teacher) == {256, 257}
    assert check_same_tokenizer(student, teacher, {256, 257}) == 259
    assert different_added_tokens(student, load(tmp_path / "u", byte_level(swap=("A", "Z")))) == frozenset()


def test_the_student_must_be_able_to_end_within_the_shared_vocabulary(tmp_path: Path) -> None:
    student = load(tmp_path / "s", byte_level(["<a>", END]))
    teacher = load(tmp_path / "t", byte_level(["<a>"]), eos="<a>")
    with pytest.raises(DataError, match=r"the student ends with token 257 \('<\|end\|>'\), which the teacher lacks"):
        check_same_tokenizer(student, teacher)


def test_equal_vocabularies_that_cut_text_differently_are_different(tmp_path: Path) -> None:
    merges = [("S", "o"), ("l", "v")]
    merged, unmerged = byte_level(merges=merges), byte_level(merges=merges)
    lines = json.loads(unmerged.to_str())
    lines["model"]["merges"] = lines["model"]["merges"][1:]
    student, teacher = load(tmp_path / "s", merged), load(tmp_path / "t", Tokenizer.from_str(json.dumps(lines)))
    with pytest.raises(DataError, match="tokenize the same text differently: token 0 is 'So' and 'S'"):
        check_same_tokenizer(student, teacher)


def test_a_response_ends_with_each_of_the_models_end_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(chat_model(tmp_path, eos_token_id=[257, 7]))
    names = {tokenizer.tokens[index] for index in tokenizer.eos_ids}
    assert {END, "<|turn|>"} < names and {7, 257} < tokenizer.eos_ids
    assert tokenizer.turn_end_id is not None and tokenizer.tokens[tokenizer.turn_end_id] == "<|turn|>"
    for end in tokenizer.eos_ids:
        assert tokenizer.decode_response([*tokenizer.encode(["ab"], special_tokens=False)[0], end]) == "ab"


@pytest.mark.parametrize(
    "template",
    [
        None,
        CHAT_TEMPLATE,  # ends a turn with only a line break
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('none') }}{% endif %}{% endfor %}",
        "{% for m in messages %}{{ m.content }}. {% endfor %}",
        "{{ messages[-1].role }}",
    ],
)
def test_a_template_without_an_end_of_turn_adds_no_stop_token(template: str | None, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(chat_model(tmp_path, template))
    assert tokenizer.turn_end_id is None and tokenizer.eos_ids == {tokenizer.eos_id}


@pytest.mark.parametrize("listed", ["7", [7, "8"], [[7]], 7.5, True, -1, {"a": 1}])
def test_end_tokens_that_are_none_are_named(listed: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"generation_config\.json: eos_token_id is .*, not a token id or a list of them"):
        load_tokenizer(chat_model(tmp_path, eos_token_id=listed))


def test_a_prompt_has_one_beginning_of_sequence(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(chat_model(tmp_path))
    texts = ["ab", "<s>ab", "", "<s>", "a<s>b"]
    shown = [tokenizer.show(ids) for ids in tokenizer.encode_prompts(texts)]
    assert shown == ["'<s>ab'", "'<s>ab'", "'<s>'", "'<s>'", "'<s>a<s>b'"]
    chat = tokenizer.chat_text([{"role": "user", "content": "1+1"}], datetime(2024, 7, 26))
    assert tokenizer.show(tokenizer.encode([chat], special_tokens=False)[0]) == "'<s><|user|>1+1<|turn|>\\n<|assistant|>'"


def test_a_prompt_does_not_end_with_an_end_of_sequence(tmp_path: Path) -> None:
    backend = byte_level((END, "<s>"))
    ids = [(token, backend.token_to_id(token)) for token in (END, "<s>")]
    backend.post_processor = processors.TemplateProcessing(single=f"<s> $A {END} {END}", special_tokens=ids)
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, backend))
    shown = [tokenizer.show(row) for row in tokenizer.encode_prompts(["1+1", "", f"a{END}"])]
    assert shown == ["'<s>1+1'", "'<s>'", f"'<s>a{END}'"]
