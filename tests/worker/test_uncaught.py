"""What a worker tells of the exception that ends it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import tensorkv
from tensorkv.errors import PeerLostError, ProtocolError
from tensorkv.worker import uncaught
from tensorkv.worker.uncaught import described, install

FOLDED = "  ... {} of tensorkv (TENSORKV_TRACEBACK=full shows all)"


def caught(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except Exception as error:  # noqa: BLE001  # any
        return error
    raise AssertionError("nothing was raised")


def lines_of(error: BaseException) -> list[str]:
    text = described(error)
    assert text.endswith("\n")
    return [line for line in text.splitlines() if "^" not in line and "~" not in line]


def wrong_push() -> None:
    with tensorkv.create("local") as kv:
        kv.init("w", torch.ones(3))
        kv.push("w", torch.ones(4))


def fail(error: BaseException) -> None:
    raise error


def test_frames_above_an_error_of_ours_are_folded() -> None:
    lines = lines_of(caught(wrong_push))
    assert lines[0] == "Traceback (most recent call last):"
    assert "in wrong_push" in lines[3]
    assert lines[4] == '    kv.push("w", torch.ones(4))'
    assert lines[5].startswith("  ... ")
    assert lines[6].startswith("tensorkv.errors.ShapeMismatch: ")
    assert len(lines) == 7


def of_the_package(call: Callable[[], None]) -> None:
    """Make a call from a file of the package."""
    code = compile("call()", uncaught._PACKAGE + "anything.py", "exec")
    exec(code, {"call": call})


def test_frames_around_a_function_of_the_user_are_folded() -> None:
    lines = lines_of(caught(lambda: of_the_package(lambda: fail(ValueError("no luck")))))
    assert lines[-1] == "ValueError: no luck"
    assert FOLDED.format("1 frame") in lines
    assert not any("anything.py" in line for line in lines)


@pytest.mark.parametrize("error", [TypeError("a fault of ours"), ProtocolError("malformed")])
def test_a_fault_of_ours_is_shown_whole(error: Exception) -> None:
    code = compile("raise error", uncaught._PACKAGE + "anything.py", "exec")
    lines = lines_of(caught(lambda: exec(code, {"error": error})))
    assert any("anything.py" in line for line in lines)
    assert not any("..." in line for line in lines)


def test_an_innocent_is_one_line_with_its_place() -> None:
    error = PeerLostError("worker 1 was lost: ValueError: no luck\nand more")
    (line,) = lines_of(caught(lambda: fail(error)))
    assert line.startswith("tensorkv.errors.PeerLostError: worker 1 was lost: ValueError: no luck (")
    assert line.endswith(" in fail)")
    assert "test_uncaught.py:" in line


def test_a_loss_while_another_error_was_handled_shows_both() -> None:
    def both() -> None:
        try:
            fail(ValueError("no luck"))
        except ValueError:
            fail(PeerLostError("worker 1 was lost"))

    lines = lines_of(caught(both))
    assert "ValueError: no luck" in lines
    assert lines[-1] == "tensorkv.errors.PeerLostError: worker 1 was lost"


def test_all_of_it_for_who_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORKV_TRACEBACK", "full")
    lines = lines_of(caught(wrong_push))
    assert any("store.py" in line for line in lines)
    assert len(lines_of(caught(lambda: fail(PeerLostError("worker 1 was lost"))))) > 1


HOOK = """
import sys
from tensorkv.errors import PeerLostError
from tensorkv.worker.uncaught import install
calls = []
if "own" in sys.argv:
    sys.excepthook = lambda *error: print("own", calls)
install(lambda: calls.append("told"))
if "print" in sys.argv:
    print(sys.excepthook.__module__)
raise PeerLostError("worker 1 was lost")
"""


def run(*arguments: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", HOOK, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    return done.stdout, done.stderr


def test_the_hook_of_a_process() -> None:
    expected = "tensorkv.errors.PeerLostError: worker 1 was lost (<string>:11 in <module>)\n"
    assert run() == ("", expected)


def test_a_hook_of_the_user_stays() -> None:
    assert run("own") == ("own []\n", "")


def test_who_installs_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    install(lambda: calls.append("told"))
    error = caught(lambda: fail(ValueError("no luck")))
    sys.excepthook(type(error), error, error.__traceback__)
    assert calls == ["told"]
    assert capsys.readouterr().err.endswith("ValueError: no luck\n")
