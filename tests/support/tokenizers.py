"""Tokenizers in the form that a model directory has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

END = "<|end|>"

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    tokenizer_class: str = "PreTrainedTokenizerFast",
    model_type: str = "qwen2",
    eos: str | None = END,
    chat_template: str | None = None,
) -> Path:
    """Write a tokenizer into a model directory."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": tokenizer_class, "eos_token": eos, "chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in settings.items() if value is not None})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def byte_level(
    added: Sequence[str] = (END,), merges: Sequence[tuple[str, str]] = (), swap: tuple[str, str] | None = None
) -> Tokenizer:
    """A byte-level BPE: 256 bytes, then the merges, then the added tokens. `swap` exchanges the ids of two bytes."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    if swap:
        left, right = (pieces.index(piece) for piece in swap)
        pieces[left], pieces[right] = pieces[right], pieces[left]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(added))
    return tokenizer


TURNS = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_model(folder: Path, template: str | None = TURNS, **generation: Any) -> Path:
    """A base model's tokenizer that adds a beginning of sequence to a text. Its chat template ends turns with a token other
    than its end of sequence."""
    tokenizer = byte_level((END, "<s>", "<|turn|>", "<|user|>", "<|assistant|>"))
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    save_tokenizer(folder, tokenizer, chat_template=template)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<s>"}))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
