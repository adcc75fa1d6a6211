"""The copy of a model for responses of equal length has a single stop token, which is never sampled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.peers import endless
from kdrl_mcore.data.tokenizers import load_tokenizer
from kdrl_mcore.errors import ConfigError
from tests.reference.tiny_models import EOS, make_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ message['content'] + '"
    + EOS
    + "' }}{% endfor %}{% if add_generation_prompt %}A{% endif %}"
)


@pytest.mark.parametrize("extra, refused", [(("<spare>",), False), ((), True)])
def test_neither_the_end_of_sequence_nor_that_of_a_turn_ends_a_response(
    extra: tuple[str, ...], refused: bool, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    spare = make_tokenizer(source, extra_tokens=extra) - 1
    (source / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    assert load_tokenizer(str(source)).eos_ids == {0}
    if refused:
        with pytest.raises(ConfigError, match="no special token"):
            endless(source, tmp_path / "copy")
    else:
        assert load_tokenizer(str(endless(source, tmp_path / "copy"))).eos_ids == {spare}
