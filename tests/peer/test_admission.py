"""Who has not yet proved itself: not too many at one time, and the newest get in."""

from __future__ import annotations

import threading
from typing import Any

from tensorkv.peer.admission import Admission

DEADLINE_S = 20.0


class Stranger:
    """A connection that only knows whether it was shut down; `on_shutdown` is what its thread does then."""

    def __init__(self, newcomers: Admission, leaves: bool = True) -> None:
        self._newcomers = newcomers
        self._leaves = leaves
        self.down = threading.Event()

    def shutdown(self) -> None:
        if not self.down.is_set() and self._leaves:
            threading.Thread(target=self._newcomers.remove, args=(self,)).start()
        self.down.set()


def test_the_oldest_goes_where_there_are_too_many() -> None:
    newcomers = Admission(2)
    strangers: list[Any] = [Stranger(newcomers) for _ in range(5)]
    assert all(newcomers.add(each) for each in strangers)
    assert [each.down.is_set() for each in strangers] == [True, True, True, False, False]
    newcomers.remove(strangers[3])
    late: Any = Stranger(newcomers)
    assert newcomers.add(late)
    assert not strangers[4].down.is_set()


def test_the_end_shuts_all_down_and_wakes_who_waits_for_room() -> None:
    newcomers = Admission(1)
    first: Any = Stranger(newcomers, leaves=False)
    second: Any = Stranger(newcomers)
    assert newcomers.add(first)
    answers: list[bool] = []
    waiting = threading.Thread(target=lambda: answers.append(newcomers.add(second)))
    waiting.start()
    assert first.down.wait(DEADLINE_S)
    newcomers.end()
    waiting.join(DEADLINE_S)
    assert answers == [False]
    assert not newcomers.add(second)
