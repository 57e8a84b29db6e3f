"""What the reaper kills when the pipe to its launcher ends."""

from __future__ import annotations

import signal

import pytest

from tensorkv.launch.reaper import watch


@pytest.mark.parametrize(
    ("lines", "killed"),
    [
        ([], []),
        (["+10\n", "+20\n"], [10, 20]),
        (["+10\n", "+20\n", "-10\n"], [20]),
        (["+10\n", "-10\n", "+10\n"], [10]),
        (["+10\n", "-10\n", "-10\n"], []),
        (["+10\n", "+20"], [10]),
        (["+10\n", "-1"], [10]),
    ],
)
def test_what_is_still_listed_is_killed(lines: list[str], killed: list[int]) -> None:
    calls = list[tuple[int, int]]()
    watch(lines, lambda group, signum: calls.append((group, signum)))
    assert calls == [(group, signal.SIGKILL) for group in killed]


def test_a_group_that_is_gone_does_not_spare_the_others() -> None:
    calls = list[int]()

    def kill(group: int, signum: int) -> None:
        calls.append(group)
        if group == 10:
            raise ProcessLookupError

    watch(["+10\n", "+20\n"], kill)
    assert calls == [10, 20]
