"""Each pair of values of two axes is compared with the dense reference (tests/parallel/test_objective_axes.py), or refused in
one line and listed in docs/method.md."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path

import pytest

from kdrl_mcore.config import Config, load_config
from kdrl_mcore.config.checks import check_config
from kdrl_mcore.errors import ConfigError
from tests.support.agreement import JOINT
from tests.support.axes import AXES, AXIS_OF, CASES, pairs, pairs_of, settings_of
from tests.support.training import OBJECTIVE_KEYS

PAGE = Path(__file__).parents[3] / "docs" / "method.md"


@pytest.fixture(scope="module")
def base() -> Config:
    return load_config(["objective=kdrl", "student.path=s", "teacher.path=t", "rollout=replay", "rollout.path=r"])


def refusal(base: Config, names: list[str]) -> str | None:
    """Why a configuration with these values is refused."""
    config, settings = deepcopy(base), settings_of(names, JOINT)
    for name, key in OBJECTIVE_KEYS.items():
        *groups, last = key.split(".")
        node = config
        for group in groups:
            node = getattr(node, group)
        setattr(node, last, getattr(settings, name))
    config.batch.updates_per_step = 2 if "two-updates" in names else 1
    try:
        check_config(config)
    except ConfigError as error:
        return str(error)
    return None


def documented() -> set[frozenset[str]]:
    """The pairs in the table of docs/method.md: a row has a value and the values of other axes that it cannot be combined
    with."""
    table = PAGE.read_text().partition("<!-- pairs -->")[2].partition("<!-- end -->")[0]
    rows = [re.findall(r"`([a-z0-9-]+)`", line) for line in table.splitlines() if line.startswith("| `")]
    return {frozenset((first, other)) for first, *others in rows for other in others}


def test_every_pair_of_values_is_a_case_or_is_refused_and_documented(base: Config) -> None:
    covered = set().union(*map(pairs_of, CASES))
    told = {pair: refusal(base, list(pair)) for pair in pairs()}
    refused = {pair for pair, message in told.items() if message is not None}
    assert {pair for pair in told if pair not in covered} == refused
    assert not any("\n" in (message or "") for message in told.values())
    assert {frozenset(pair) for pair in refused} == documented()


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_one_that_can_be_run(base: Config, case: str) -> None:
    assert refusal(base, case.split()) is None


def test_values_have_names_of_their_own() -> None:
    assert len(AXIS_OF) == sum(len(values) for values in AXES.values())
