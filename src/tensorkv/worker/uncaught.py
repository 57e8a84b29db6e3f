"""How a worker reports the exception that ends it: what helps its user, and whether another process failed.

Frames of this package are folded where they explain nothing: around the user's own functions, and above an
error that was raised on purpose. A worker that ends because another process was lost writes one line: so do
the other workers of the job, and the report of the process that failed should stay visible.
"""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, final

from tensorkv.config import ENV_TRACEBACK, full_tracebacks
from tensorkv.errors import PeerLostError, ProtocolError, TensorKVError

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def install(on_uncaught: Callable[[], None]) -> None:
    """Report uncaught exceptions of the main thread, unless the user has a hook or wants full tracebacks.

    `on_uncaught` is called first, unless the user has a hook.
    """
    if sys.excepthook is not sys.__excepthook__:
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        on_uncaught()
        if full_tracebacks():
            sys.__excepthook__(kind, error, trace)
        elif sys.stderr is not None:
            sys.stderr.write(described(error))
            sys.stderr.flush()

    sys.excepthook = hook


def described(error: BaseException) -> str:
    """Return the text to write for an uncaught exception; it ends with a newline."""
    if full_tracebacks():
        return "".join(traceback.format_exception(error))
    if isinstance(error, PeerLostError) and _before(error) is None:
        return _one_line(error)
    found = traceback.TracebackException.from_exception(error)
    _fold(found, error)
    return "".join(found.format())


def _before(error: BaseException) -> BaseException | None:
    """Return the exception that is shown above this one."""
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _one_line(error: BaseException) -> str:
    kind = type(error)
    text = (str(error).splitlines() or [""])[0]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame)]
    place = f" ({frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    return f"{kind.__module__}.{kind.__qualname__}: {text}{place}\n"


def _is_ours(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith(_PACKAGE)


def _fold(found: traceback.TracebackException | None, error: BaseException | None) -> None:
    """Fold frames of an exception, and of those that are shown with it."""
    if found is None or error is None:
        return
    stack = found.stack
    on_purpose = not isinstance(error, Exception) or (
        isinstance(error, TensorKVError) and not isinstance(error, ProtocolError)
    )
    if stack and (on_purpose or not _is_ours(stack[-1])):  # otherwise it is our own bug
        found.stack = _Folded(stack)
    _fold(found.__cause__, error.__cause__)
    _fold(found.__context__, error.__context__)


@final
class _Folded(traceback.StackSummary):
    """A traceback in which frames of this package are only counted."""

    def format(self, **options: Any) -> list[str]:
        lines: list[str] = []
        for ours, found in itertools.groupby(self, _is_ours):
            frames = list(found)
            if ours:
                number = "1 frame" if len(frames) == 1 else f"{len(frames)} frames"
                lines.append(f"  ... {number} of tensorkv ({ENV_TRACEBACK}=full shows all)\n")
            else:
                lines += traceback.StackSummary.from_list(frames).format(**options)
        return lines
