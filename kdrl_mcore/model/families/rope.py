"""Read the rotary position embedding from an HF config as `transformers` does, or refuse it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeGuard

from kdrl_mcore.errors import ModelError


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding and its scaling to longer contexts.

    Attributes:
        theta: the base.
        kind: default, linear, llama3 (https://arxiv.org/abs/2407.21783) or yarn (https://arxiv.org/abs/2309.00071).
        factor: the factor by which the context is extended.
        original_positions: the context length before the extension (llama3, yarn).
        low, high: llama3's low and high frequency factor; yarn's beta_slow and beta_fast.
        attention_factor: yarn's scale of cosine and sine.
        truncate: yarn: round the range of interpolated dimensions outwards to whole dimensions.
        share: the share of each head's dimensions, from the first, that is rotated.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    low: float = 1.0
    high: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    share: float = 1.0


def refuse(hf: dict, path: str, **supported: object) -> None:
    """Refuse a config in which a key is set to anything but the supported value (None counts as not set).

    Raises:
        ModelError: a key has another value; the message names the first.
    """
    for key, value in supported.items():
        if hf.get(key) is not None and hf[key] != value:
            raise ModelError(f"{path}/config.json: {key}={hf[key]} is not supported (only {value} is)")


def is_number(value: object) -> bool:
    """Whether a config value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_size(value: object) -> TypeGuard[int]:
    """Whether a config value is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
"""The supported kinds of scaling and the parameters that each requires."""
_NUMBERS = (
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)
_KNOWN = {*_NUMBERS, "rope_type", "truncate", "partial_rotary_factor", "finetuned"}


def read_rope(hf: dict, path: str, *, default_theta: float = 10000.0, partial: bool = False) -> Rope:
    """The rotary embedding, from the old (`rope_theta`, `rope_scaling`) and the new (`rope_parameters`) form of an HF config.

    Args:
        default_theta: the family's base, where the config has none.
        partial: the family supports `partial_rotary_factor`, the share of each head that is rotated.

    Raises:
        ModelError: two places contradict each other, or the scaling is not supported or lacks a parameter.
    """
    where = f"{path}/config.json"
    given = _settings(hf, where, default_theta)
    kind = given["rope_type"]
    shares = [each["partial_rotary_factor"] for each in (given, hf) if each.get("partial_rotary_factor") is not None]
    if len(set(shares)) > 1:
        raise ModelError(
            f"{where}: partial_rotary_factor={shares[0]}, but {shares[1]} outside of it: remove the one that is wrong"
        )
    share = shares[0] if shares else None
    if not partial:
        refuse({"partial_rotary_factor": share}, path, partial_rotary_factor=1.0)
    share = 1.0 if share is None else share
    if not is_number(share) or not 0 < share <= 1:
        raise ModelError(f"{where}: partial_rotary_factor={share} must be above 0 and at most 1")
    if kind not in _NEEDED:
        raise ModelError(f"{where}: rope scaling '{kind}' is not supported ({', '.join(_NEEDED)} are)")
    for key in _NEEDED[kind]:
        if key not in given:
            raise ModelError(f"{where}: rope scaling '{kind}' has no {key}")
    theta, factor = float(given["rope_theta"]), float(given.get("factor", 1.0))
    if theta <= 1 or factor <= 0:
        raise ModelError(f"{where}: rope_theta={theta:g} must be above 1, and factor={factor:g} above 0")
    if kind == "default":
        return Rope(theta, share=share)
    if kind == "linear":
        return Rope(theta, kind, factor, share=share)
    original = given.get("original_max_position_embeddings", hf.get("max_position_embeddings"))
    if not is_size(original):
        raise ModelError(f"{where}: rope scaling '{kind}' has no original_max_position_embeddings")
    if kind == "llama3":
        low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
    else:
        low, high = float(given.get("beta_slow") or 1), float(given.get("beta_fast") or 32)
    if low >= high:
        raise ModelError(f"{where}: rope scaling '{kind}' goes from {low:g} to {high:g}: the second must be the larger")
    if kind == "llama3":
        return Rope(theta, kind, factor, original, low, high, share=share)
    scale = _yarn_attention_factor(given, factor)
    return Rope(theta, kind, factor, original, low, high, scale, truncate=given.get("truncate", True), share=share)


def read_rope_of_kinds(
    hf: dict, path: str, *, default_theta: float, default_sliding_theta: float, sliding_theta: str | None = None
) -> tuple[Rope, Rope]:
    """The rotary embeddings of layers with full and with sliding attention.

    The new form of `rope_parameters` has a set for each of them. In the old form, `rope_theta` and `rope_scaling` apply only to
    full attention.

    Args:
        sliding_theta: the key of sliding attention's base in the old form.

    Raises:
        ModelError: as for `read_rope`, or only one of them has parameters.
    """
    given, kinds = hf.get("rope_parameters"), {"full_attention", "sliding_attention"}
    if isinstance(given, dict) and kinds & given.keys():
        if given.keys() != kinds:
            raise ModelError(
                f"{path}/config.json: rope_parameters must have exactly the keys full_attention and sliding_attention"
            )
        outside = {key: hf[key] for key in ("rope_theta", "rope_scaling", sliding_theta) if key and hf.get(key) is not None}
        if outside:
            raise ModelError(
                f"{path}/config.json: {next(iter(outside))} is set as well as rope_parameters of each kind: remove one of them"
            )
        full, sliding = ({**hf, "rope_parameters": given[kind]} for kind in ("full_attention", "sliding_attention"))
    else:
        full = hf
        sliding = {"rope_theta": hf.get(sliding_theta) if sliding_theta else None}
    return read_rope(full, path, default_theta=default_theta), read_rope(sliding, path, default_theta=default_sliding_theta)


def _settings(hf: dict, where: str, default_theta: float) -> dict[str, Any]:
    """All rotary settings of the config, each once, with `rope_type` and `rope_theta`.

    `transformers` silently prefers one place over another (`rope_scaling` over `rope_parameters`, the theta inside over the one
    outside, the original positions outside over those inside); vLLM and older versions prefer others. Where two places
    differ, nobody knows which value the model was trained with.
    """
    forms = {}
    for name in ("rope_parameters", "rope_scaling"):
        if hf.get(name):
            forms[name] = _one_form(hf, hf[name], f"{where}: {name}", default_theta)
    if len(forms) == 2 and forms["rope_parameters"] != forms["rope_scaling"]:
        raise ModelError(f"{where}: rope_scaling and rope_parameters contradict each other: remove the one that is wrong")
    return next(iter(forms.values())) if forms else _one_form(hf, {}, where, default_theta)


def _one_form(hf: dict, given: Any, where: str, default_theta: float) -> dict[str, Any]:
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise ModelError(f"{where} is not one set of parameters for all layers; nothing else is supported")
    settings = {key: value for key, value in given.items() if value is not None}
    old = settings.pop("type", None)
    kind = settings.setdefault("rope_type", old or "default")
    if old not in (None, kind):
        raise ModelError(f"{where}: rope_type={kind} and type={old} contradict each other: remove the one that is wrong")
    outside = ["rope_theta", *(["original_max_position_embeddings"] if kind in ("llama3", "yarn") else [])]
    for key in outside:
        if hf.get(key) is not None and settings.setdefault(key, hf[key]) != hf[key]:
            raise ModelError(f"{where}: {key}={settings[key]}, but {hf[key]} outside of it: remove the one that is wrong")
    settings.setdefault("rope_theta", default_theta)
    for key in settings:
        if key not in _KNOWN:
            raise ModelError(f"{where}: {key} is not supported")
        if key in _NUMBERS and not is_number(settings[key]):
            raise ModelError(f"{where}: {key}={settings[key]!r} is not a number")
    return settings


def _yarn_attention_factor(given: dict[str, Any], factor: float) -> float:
    if "attention_factor" in given:
        return float(given["attention_factor"])
    scale = math.log(factor) if factor > 1 else 0.0
    if given.get("mscale") and given.get("mscale_all_dim"):
        return (0.1 * given["mscale"] * scale + 1.0) / (0.1 * given["mscale_all_dim"] * scale + 1.0)
    return 0.1 * scale + 1.0
