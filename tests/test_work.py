"""Work: the handle of a call that may still be going on."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import math
import threading
import weakref
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import pytest
import torch

from tensorkv.errors import InvalidArgument, PeerLostError, WaitTimeout
from tensorkv.work import Work


def test_a_completed_work_has_its_value() -> None:
    work = Work.completed(3, "pull")
    assert work.is_completed()
    assert work.wait() is True
    assert work.result() == 3
    assert work.exception() is None
    assert "completed" in repr(work)


def test_a_pending_work_can_be_waited_for_again() -> None:
    future: Future[Any] = Future()
    work = Work(future, "push of 'w'")
    assert not work.is_completed()
    assert "pending" in repr(work)
    with pytest.raises(WaitTimeout, match=r"push of 'w' is not complete after 0\.01 s"):
        work.wait(0.01)
    with pytest.raises(WaitTimeout):
        work.wait(timedelta(milliseconds=1))
    future.set_result("value")
    assert work.wait(timedelta(seconds=1)) is True
    assert work.result() == "value"


def test_wait_wakes_up_when_another_thread_completes_it() -> None:
    future: Future[Any] = Future()
    thread = threading.Thread(target=future.set_result, args=(1,))
    thread.start()
    assert Work(future, "pull").wait(30)
    thread.join(30)


def test_the_error_of_the_call_is_raised() -> None:
    future: Future[Any] = Future()
    future.set_exception(PeerLostError("server 1 is gone"))
    work = Work(future, "pull")
    assert work.is_completed()
    assert isinstance(work.exception(), PeerLostError)
    for call in (work.wait, work.result):
        with pytest.raises(PeerLostError, match="server 1"):
            call()


def test_a_timeout_of_the_call_itself_passes_as_it_is() -> None:
    future: Future[Any] = Future()
    future.set_exception(WaitTimeout("waiting for worker 3"))
    with pytest.raises(WaitTimeout, match="worker 3"):
        Work(future, "pull").wait(5)


def test_an_error_that_nobody_saw_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Also if it comes when the work is gone already; not one that was seen, or that every call raises."""
    for early in (True, False):
        for error in (WaitTimeout("waiting for worker 3"), PeerLostError("worker 3 was lost")):
            future: Future[None] = Future()
            work = Work(future, "push of 'w'")
            if early:
                future.set_exception(error)
            del work
            if not early:
                future.set_exception(error)
    text = "push of 'w' with async_op, whose Work nobody waited for: waiting for worker 3"
    assert caplog.messages == [text] * 2
    seen: Future[None] = Future()
    seen.set_exception(WaitTimeout("waiting for worker 3"))
    assert isinstance(Work(seen, "push of 'w'").exception(), WaitTimeout)
    assert len(caplog.messages) == 2


def test_at_its_own_deadline_a_work_says_whom_it_waits_for() -> None:
    """Not at a shorter one: asking takes a moment."""
    work = Work(Future(), "pull of 'w'", 0.01, lambda: "waiting for worker 3")
    with pytest.raises(WaitTimeout, match="^pull of 'w' is not complete after 0.01 s: waiting for worker 3$"):
        work.wait()
    with pytest.raises(WaitTimeout, match="^pull of 'w' is not complete after 0.02 s$"):
        work.wait(0.02)


# ---- in coroutines, and as a future --------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [math.inf, 1e300, timedelta(days=999_999_999)])
def test_any_time_may_be_waited(timeout: Any) -> None:
    work = Work.completed(3, "pull of 'w'")
    assert work.wait(timeout)
    assert work.result(timeout) == 3
    assert work.exception(timeout) is None


@pytest.mark.parametrize("timeout", ["x", math.nan, True, [1]])
def test_what_is_no_time_is_refused(timeout: Any) -> None:
    work = Work.completed(3, "pull of 'w'")
    for wait in (work.wait, work.result, work.exception):
        with pytest.raises(InvalidArgument, match="is neither a number of seconds"):
            wait(timeout)


def test_whoever_awaits_is_told_whom_the_call_waits_for() -> None:
    work = Work(concurrent.futures.Future(), "pull of 'w'", 0.01, lambda: "waiting for worker 1")

    async def program() -> None:
        await work

    with pytest.raises(WaitTimeout, match="not complete after 0.01 s: waiting for worker 1"):
        asyncio.run(program())


def test_it_can_be_awaited_before_and_after_it_is_complete() -> None:
    async def both() -> list[Any]:
        future: Future[Any] = Future()
        work = Work(future, "pull")
        asyncio.get_running_loop().call_soon(future.set_result, 7)
        return [await work, await work, await asyncio.wrap_future(work), await Work.completed(8, "push")]

    assert asyncio.run(both()) == [7, 7, 7, 8]


def test_several_coroutines_may_await_what_another_thread_completes() -> None:
    future: Future[Any] = Future()
    work = Work(future, "pull")

    async def all_of_them() -> list[Any]:
        waiting = asyncio.gather(*(asyncio.ensure_future(_value(work)) for _ in range(5)))
        await asyncio.sleep(0)
        thread = threading.Thread(target=future.set_result, args=(3,))
        thread.start()
        found = await waiting
        thread.join()
        return found

    before = threading.active_count()
    assert asyncio.run(all_of_them()) == [3] * 5
    assert threading.active_count() == before  # nobody polls


async def _value(work: Work) -> Any:
    return await work


def test_errors_travel_to_who_awaits(caplog: pytest.LogCaptureFixture) -> None:
    for error in (PeerLostError("server 1 is gone"), WaitTimeout("waiting for worker 3")):
        for wait in (_value, asyncio.wrap_future):
            future: Future[Any] = Future()
            work = Work(future, "pull", 30)

            async def catch(work: Work = work, future: Future[Any] = future) -> BaseException:
                asyncio.get_running_loop().call_soon(future.set_exception, error)  # noqa: B023
                try:
                    await wait(work)  # noqa: B023
                except Exception as exc:  # noqa: BLE001
                    return exc
                raise AssertionError("no error")

            assert str(asyncio.run(catch())) == str(error)
    assert not caplog.messages


def test_an_await_ends_where_the_blocking_call_would() -> None:
    future: Future[Any] = Future()
    work = Work(future, "pull of 'w'", 0.01)
    with pytest.raises(WaitTimeout, match=r"^pull of 'w' is not complete after 0\.01 s$"):
        asyncio.run(_value(work))
    future.set_result(2)
    assert asyncio.run(_value(work)) == 2


def test_who_stops_to_await_stops_nothing_else() -> None:
    future: Future[Any] = Future()
    work = Work(future, "pull")

    async def give_up() -> bool:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_value(work), 0.01)
        task = asyncio.ensure_future(_value(work))
        await asyncio.sleep(0)
        return task.cancel()

    assert asyncio.run(give_up())
    assert not work.cancel()
    assert not work.cancelled()
    assert work.running()
    future.set_result(5)
    assert work.result() == 5
    assert not work.running()
    assert not work.cancel()


def test_a_loop_that_is_closed_meanwhile_is_in_nobodys_way(caplog: pytest.LogCaptureFixture) -> None:
    future: Future[Any] = Future()
    work = Work(future, "pull")
    loop = asyncio.new_event_loop()
    task = loop.create_task(_value(work))
    loop.run_until_complete(asyncio.sleep(0))
    task.cancel()
    loop.close()
    future.set_result(5)
    assert work.result() == 5
    assert "never retrieved" not in caplog.text


def test_it_is_a_future_to_the_standard_library() -> None:
    futures: list[Future[Any]] = [Future() for _ in range(3)]
    works = [Work(future, f"push {n}") for n, future in enumerate(futures)]
    futures[1].set_result("b")
    assert concurrent.futures.wait(works, return_when="FIRST_COMPLETED").done == {works[1]}
    futures[0].set_result("a")
    futures[2].set_result("c")
    assert {work.result(timeout=0) for work in concurrent.futures.as_completed(works)} == {"a", "b", "c"}


def test_a_callback_gets_the_work_even_if_nobody_keeps_it() -> None:
    future: Future[Any] = Future()
    found: list[Any] = []
    work = Work(future, "pull")
    work.add_done_callback(lambda work: found.append((type(work), work.result())))
    del work
    gc.collect()
    assert not found
    future.set_result(4)
    assert found == [(Work, 4)]
    done = Work.completed(5, "pull")
    done.add_done_callback(lambda work: found.append(work is done))
    assert found[1:] == [True]


def test_a_work_is_freed_when_it_is_let_go() -> None:
    """Also one that called back: tensors would stay until the garbage collector comes by."""
    gc.disable()
    try:
        for calls_back in (False, True):
            future: Future[Any] = Future()
            work = Work(future, "pull")
            if calls_back:
                work.add_done_callback(lambda _: None)
            gone = weakref.ref(work)
            future.set_result(torch.zeros(1))
            del work
            assert gone() is None
    finally:
        gc.enable()
