"""Which functions the watchdog counts as waiting."""

from __future__ import annotations

import inspect

from kdrl_mcore.parallel.platform import prepare_platform
from kdrl_mcore.resilience.waiting import is_marked, waits_for_others

COLLECTIVES = {"all_reduce", "all_gather_object", "broadcast_object_list"}


def test_a_marked_function_stays_as_it_is() -> None:
    def work() -> int:
        return 1

    def wait() -> int:
        return 2

    assert waits_for_others(wait) is wait
    assert is_marked(wait.__code__) and not is_marked(work.__code__)


def test_every_small_collective_is_marked() -> None:
    prepare_platform()
    from kdrl_mcore.parallel import collect

    functions = [function for _, function in inspect.getmembers(collect, inspect.isfunction)]
    own = [function for function in functions if function.__module__ == collect.__name__]
    talking = {function.__name__ for function in own if COLLECTIVES & set(function.__code__.co_names)}
    assert talking and talking == {function.__name__ for function in own if is_marked(function.__code__)}
