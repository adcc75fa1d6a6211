"""The effect of each key of a family's `config.json`, found by changing the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig

from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families import FAMILIES

Effect = Literal["used", "checked", "ignored"]

IGNORED = {
    "the tokenizer's and generation config's": ("bos_token_id", "eos_token_id", "pad_token_id"),
    "of other tasks": ("id2label", "label2id", "problem_type"),
    "what a forward pass of `transformers` returns, and how": (
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "use_cache",
        "chunk_size_feed_forward",
    ),
    "of initialisation and pretraining; this trainer has no dropout and no auxiliary loss of routers": (
        "initializer_range",
        "attention_dropout",
        "residual_dropout",
        "router_aux_loss_coef",
    ),
    "`model.dtype` replaces it": ("dtype",),
    "another key says it (`layer_types`, `no_rope_layers`, `rope_parameters`)": (
        "sliding_window",
        "use_sliding_window",
        "no_rope_layer_interval",
        "original_max_position_embeddings",
    ),
}
"""The keys that may have no effect, by reason."""

_NOT_OF_A_FAMILY = {"transformers_version", "architectures", "model_type", "_name_or_path"}


def effects(folder: Path) -> dict[str, Effect]:
    """The effect of every key that `transformers` has in a config of this model's family.

    `used`: another value gives another model. `checked`: another value is refused. `ignored`: the value makes no difference.
    """
    config = AutoConfig.from_pretrained(folder)
    hf: dict[str, Any] = {**config.to_dict(), "architectures": config.architectures}
    read = FAMILIES[config.architectures[0]].read
    plain = read(hf, "here")

    def effect(key: str) -> Effect:
        seen: set[Effect] = set()
        for other in _others(hf[key]):
            try:
                seen.add("ignored" if read({**hf, key: other}, "here") == plain else "used")
            except ModelError:
                seen.add("checked")
        return next(each for each in ("used", "checked", "ignored") if each in seen)

    return {key: effect(key) for key in sorted(hf.keys() - _NOT_OF_A_FAMILY)}


def markdown(found: dict[str, dict[str, Effect]]) -> str:
    """The table of the docs: the keys that each family uses and checks in addition to the common ones, and the ignored keys."""

    def having(effect: Effect, keys: dict[str, Effect]) -> set[str]:
        return {key for key, each in keys.items() if each == effect}

    shared = {effect: set.intersection(*(having(effect, keys) for keys in found.values())) for effect in ("used", "checked")}
    lines = ["| family | used | refused if changed |", "|---|---|---|"]
    for family, keys in {"all": None, **found}.items():
        cells = []
        for effect in ("used", "checked"):
            names = shared[effect] if keys is None else having(effect, keys) - shared[effect]  # type: ignore[arg-type]
            cells.append(", ".join(f"`{name}`" for name in sorted(names)))
        lines.append(f"| {family} | {cells[0]} | {cells[1]} |")
    lines += ["", "Keys of published configs that make no difference:", ""]
    lines += [f"- {reason}: {', '.join(f'`{key}`' for key in keys)}" for reason, keys in IGNORED.items()]
    return "\n".join(lines)


def _others(value: Any) -> list[Any]:
    """Other values that the key could have."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value * 2, value + 1, 0.3]
    if isinstance(value, str):
        return ["other"]
    if isinstance(value, list):
        return [value[::-1], value[:-1], [*value, 0], [1 - each if each in (0, 1) else each for each in value]]
    if isinstance(value, dict):
        nested = [{**value, key: {**each, "rope_theta": 77.0}} for key, each in value.items() if isinstance(each, dict)]
        return nested or [{**value, "rope_theta": 77.0}]
    return [7, True, 0.3, "other", [1]]
