"""The documentation of the configuration is complete and correct."""

from __future__ import annotations

from kdrl_mcore.config import REWARD_KINDS, conf_dir
from kdrl_mcore.config.help import documented_keys, markdown
from tests.support import ROOT

DOCS = ROOT / "docs" / "configuration.md"


def test_every_key_says_what_it_means() -> None:
    assert [key.name for key in documented_keys() if not key.meta.meaning] == []


def test_the_page_lists_every_key_and_default() -> None:
    assert DOCS.read_text().endswith(markdown()), "rewrite docs/configuration.md from kdrl_mcore.config.help.markdown()"


def test_the_page_names_every_choice_of_every_group() -> None:
    text = DOCS.read_text()
    for group in ("experiment", "rollout", "reward", "prompt", "dataset"):
        for path in (conf_dir() / group).glob("*.yaml"):
            assert f"`{path.stem}`" in text, f"{group}={path.stem}"


def test_the_page_on_evaluation_names_every_benchmark() -> None:
    text = (DOCS.parent / "evaluation.md").read_text()
    for path in (conf_dir() / "benchmark").glob("*.yaml"):
        assert f"`{path.stem}`" in text, path.stem


def test_the_page_on_rewards_names_every_kind() -> None:
    text = (DOCS.parent / "rewards.md").read_text()
    for kind in REWARD_KINDS:
        assert f"| `{kind}` |" in text, kind
