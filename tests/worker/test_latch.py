"""A latch opens once, for all who wait and all who come later."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from tensorkv.worker.latch import OPEN, Latch


def test_it_opens_at_the_last() -> None:
    latch = Latch(2)
    calls: list[str] = []
    latch.then(lambda: calls.append("before"))
    latch.down()
    assert not latch.open
    assert not latch.wait(0.0)
    latch.down()
    assert latch.open
    latch.then(lambda: calls.append("after"))
    assert calls == ["before", "after"]
    assert latch.wait(0.0)


def test_nothing_to_wait_for() -> None:
    for latch in (Latch(0), OPEN):
        assert latch.open
        assert latch.wait(0.0)
        calls: list[int] = []
        latch.then(lambda calls=calls: calls.append(1))  # type: ignore[misc]
        assert calls == [1]


def test_threads_that_wait_are_woken() -> None:
    for _ in range(50):
        latch = Latch(3)
        waiting = threading.Barrier(5)

        def wait(latch: Latch = latch, waiting: threading.Barrier = waiting) -> bool:
            waiting.wait(20)
            return latch.wait(20)

        def down(latch: Latch = latch, waiting: threading.Barrier = waiting) -> None:
            waiting.wait(20)
            latch.down()

        with ThreadPoolExecutor(5) as pool:
            woken = [pool.submit(wait) for _ in range(2)]
            for _ in range(3):
                pool.submit(down)
            assert all(each.result(20) for each in woken)
