"""The ledger of prompts: each prompt ends in one way, once, and none is lost through a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest

from kdrl_mcore.data.stream import Domain, PromptStream
from kdrl_mcore.rollout.ledger import Draw, Entry, Ledger
from kdrl_mcore.types import Prompt, Rollout
from tests.support.sources import through_json


def ledger_of() -> Ledger:
    """A stream over two domains, the second of which gives one prompt in three; three prompts per step."""

    def domain(name: str, count: int, weight: float) -> Domain:
        prompts = [Prompt(f"{name}{i}", "q", np.array([i]), "a", domain=name, columns={"i": i}) for i in range(count)]
        return Domain(name, prompts, weight)

    return Ledger(PromptStream.of([domain("a", 7, 2.0), domain("b", 5, 1.0)], 3, 1, shuffle=True))


def names(entries: list[Entry]) -> list[str]:
    return [entry.prompt.prompt_id for entry in entries]


def answered(ledger: Ledger, entries: list[Entry]) -> list[Entry]:
    """Give two responses to each prompt; the engine numbers the groups of a batch."""
    return ledger.sampled(entries, [response_to(e, group) for group, e in enumerate(entries) for _ in range(2)])


def response_to(entry: Entry, group: int) -> Rollout:
    ids, log_probs = np.array([7, 8]), np.array([-1 / 3, -0.1], np.float32)
    return Rollout(
        entry.prompt.prompt_id, group, entry.prompt.token_ids, ids, log_probs, "stop", 0, columns=entry.prompt.columns
    )


def test_a_prompt_comes_to_one_end_once() -> None:
    ledger = ledger_of()
    first, second, third = ledger.draw(1)
    ledger.train([first])
    ledger.drop([second], "no signal")
    for ended in (first, second):
        with pytest.raises(ValueError, match="not in list"):
            ledger.train([ended])
        with pytest.raises(ValueError, match="not in list"):
            ledger.drop([ended], "surplus")
    assert ledger.waiting == [third] and ledger.dropped == {"no signal": 1}
    ledger.check()
    assert ledger.counts() == {"prompts_drawn": 3, "prompts_trained": 1, "prompts_dropped": 1, "prompts_waiting": 1}


def test_a_lost_prompt_is_noticed() -> None:
    ledger = ledger_of()
    ledger.draw(1)
    del ledger.waiting[1]
    with pytest.raises(AssertionError, match="3 prompts drawn, 0 ended, 2 wait"):
        ledger.check()


def test_groups_are_numbered_in_the_order_in_which_they_are_trained_on() -> None:
    ledger = ledger_of()
    first, second, third = answered(ledger, ledger.draw(1))
    rollouts = ledger.train([third, first])
    assert [(each.prompt_id, each.group_id) for each in rollouts] == [
        (entry.prompt.prompt_id, group) for group, entry in enumerate((third, first)) for _ in range(2)
    ]
    assert second in ledger.waiting


def test_draws_are_keyed_by_step_and_round() -> None:
    ledger = ledger_of()
    first, further = ledger.draw(4), ledger.draw(4, 2)
    assert {entry.draw.key for entry in first if entry.draw} == {(4,)}
    assert [entry.draw for entry in further] == [Draw(4, 2, index) for index in range(3)]


def test_what_waits_goes_through_a_checkpoint() -> None:
    before, after = ledger_of(), ledger_of()
    before.train(answered(before, before.draw(1)))
    complete, begun = answered(before, before.draw(2)), before.draw(3)
    before.drop(before.draw(4)[1:], "surplus")
    after.load_state_dict(through_json(before.state_dict()))
    after.check()
    assert after.counts() == before.counts() and after.dropped == before.dropped
    assert [(e.position, e.prompt.prompt_id, e.draw) for e in after.waiting] == [
        (e.position, e.prompt.prompt_id, e.draw) for e in before.waiting
    ]
    assert names(after.due(2)) == names(complete) and names(after.due(3)) == names(complete + begun)
    for ours, theirs in zip(after.train(after.due(2)), before.train(complete), strict=True):
        assert ours.sampler_log_probs.tolist() == theirs.sampler_log_probs.tolist() and ours.columns == theirs.columns
    assert names(after.draw(5)) == names(before.draw(5))


def test_prompts_are_drawn_once_for_a_step() -> None:
    ledger = ledger_of()
    ledger.draw_until(6, first=5)
    ledger.draw_until(7, first=5)
    assert [entry.draw.step for entry in ledger.waiting if entry.draw] == [5] * 3 + [6] * 3 + [7] * 3


def test_prompts_whose_responses_are_forgotten_come_first() -> None:
    ledger = ledger_of()
    waiting = answered(ledger, ledger.draw(1)) + ledger.draw(2)
    ledger.train(waiting[:1])
    ledger.forget_responses()
    assert ledger.draw(7) == waiting[1:4]
    later = ledger.draw(8)
    assert later[:2] == waiting[4:] and [entry.draw for entry in later] == [Draw(8, 0, index) for index in range(3)]
    ledger.check()
