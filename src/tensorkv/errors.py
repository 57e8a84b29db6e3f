"""Every error TensorKV raises, in one tree.

    TensorKVError
    ├── UsageError                            a mistake in the call; nothing was changed by it
    │   ├── InvalidKey (TypeError)            a key that is not an int or str, or mixes the two
    │   ├── DuplicateKey (ValueError)         one key twice in one init
    │   ├── KeyNotInitialized (KeyError)      nobody has initialised the key
    │   ├── KeyAlreadyInitialized (ValueError)
    │   ├── KeyDeleted (KeyError)             this worker has deleted the key during the call
    │   ├── InvalidValue (TypeError)          not a tensor or array, or one that cannot be added
    │   ├── InvalidOut (ValueError)           `out` cannot be written
    │   ├── ShapeMismatch (ValueError)
    │   ├── DtypeMismatch (TypeError)         the dtypes differ and are not both floating point
    │   ├── LengthMismatch (ValueError)       lists of keys and values differ in length, or are empty
    │   ├── InvalidArgument (ValueError)      any other argument out of its range
    │   ├── UnknownKind (ValueError)          no such kind of store
    │   ├── UnknownUpdater (ValueError)       no such named updater or optimizer
    │   ├── UnsupportedOptimizer (ValueError) an optimizer that a store cannot run
    │   ├── InvalidOption (ValueError, TypeError)   the optimizer refuses an option
    │   ├── NotShippable (ValueError)         a function that servers cannot find by name
    │   ├── NotElementwise (ValueError)       the updater needs whole values and the key is sliced
    │   ├── SettingMismatch (ValueError)      ranks disagree on an init or a setting
    │   ├── StoreMismatch (ValueError)        ranks disagree on the terms of a store, its kind say
    │   ├── UncommittedPush (RuntimeError)    the key was pushed with apply=False and awaits commit
    │   ├── CommitMismatch (ValueError)       ranks disagree on what to commit
    │   ├── StoreClosed (RuntimeError)        the store was closed, or belongs to the parent process
    │   ├── NotInJob (RuntimeError)           a distributed store outside a job
    │   ├── RankTaken (RuntimeError)          another process has this rank of the job
    │   ├── AddressUnavailable (OSError)      an address to listen at that this host does not have
    │   ├── NotPicklable (TypeError)          a store was pickled or copied
    │   └── NotSupported (NotImplementedError)
    ├── JobFailed (RuntimeError)              a process of a job that `spawn` started has failed
    ├── UpdaterError (RuntimeError)           the updater raised; its traceback is in the text
    ├── SaveError (OSError)                   a save could not be written; the one before it is whole
    ├── LoadError (ValueError)                there is no save, or it is corrupt; the store is as before
    ├── WaitTimeout (TimeoutError)            a deadline passed; the text names who is missing
    ├── MemoryLimitReached (MemoryError)      there is no memory, or it would exceed a limit of the system's
    ├── TransportUnavailable (ConnectionError)   the transport that was asked for cannot be had here
    └── JobBroken (ConnectionError)           the job cannot go on
        ├── PeerLostError                     a process of the job is gone
        ├── AuthenticationError               wrong or missing token
        ├── ProtocolVersionError              the peer speaks another version
        └── ProtocolError                     the peer sent something malformed

Catch `UsageError` for every mistake in a call and `JobBroken` for the end of a job. Each leaf is also the
standard error a caller would expect, and survives pickle and the wire:
`to_wire` and `from_wire` carry an error as its class name and text, nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import final


class TensorKVError(Exception):
    """Base of all errors raised by TensorKV. `str(error)` is the text, also for KeyError leaves."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class UsageError(TensorKVError):
    """A mistake in the call, which changed nothing. Base class, to catch all such mistakes."""


class JobBroken(TensorKVError, ConnectionError):
    """The job, or this process's part in it, cannot go on. Base class, to catch all such errors."""


class InvalidKey(UsageError, TypeError):
    """A key is not an int or str, or a store is used with both."""


class DuplicateKey(UsageError, ValueError):
    """The same key occurs twice in one init."""


class KeyNotInitialized(UsageError, KeyError):
    """The key has not been initialised."""


class KeyAlreadyInitialized(UsageError, ValueError):
    """The key has been initialised before and was not deleted."""


class KeyDeleted(UsageError, KeyError):
    """The key was deleted by another thread of this worker, or after it was bound to a step."""


class InvalidValue(UsageError, TypeError):
    """A value is not a tensor or array, or cannot be stored."""


class InvalidOut(UsageError, ValueError):
    """A destination cannot be written."""


class ShapeMismatch(UsageError, ValueError):
    """Two shapes that must be equal differ."""


class DtypeMismatch(UsageError, TypeError):
    """Two dtypes differ and are not both floating point."""


class LengthMismatch(UsageError, ValueError):
    """Lists that belong together differ in length, or are empty."""


class InvalidArgument(UsageError, ValueError):
    """An argument is out of its range or contradicts another."""


class UnknownKind(UsageError, ValueError):
    """No such kind of store; the text lists the known ones."""


class UnknownUpdater(UsageError, ValueError):
    """No such named updater or optimizer; the text lists the known ones."""


class UnsupportedOptimizer(UsageError, ValueError):
    """The optimizer needs something that a store lacks, such as a closure."""


class InvalidOption(UsageError, ValueError, TypeError):
    """The optimizer does not take this option, or not this value."""


class NotShippable(UsageError, ValueError):
    """A function or class that the servers cannot find by its name."""


class NotElementwise(UsageError, ValueError):
    """The updater needs whole values, and the key is sliced over servers."""


class SettingMismatch(UsageError, ValueError):
    """An init or setting differs from that of the setting rank."""


class StoreMismatch(UsageError, ValueError):
    """A store of this name is open with another kind, reduction or on_worker_loss."""


class UncommittedPush(UsageError, RuntimeError):
    """The key was pushed with `apply=False` and must be committed first."""


class CommitMismatch(UsageError, ValueError):
    """Workers disagree on the keys or arguments of a commit."""


class StoreClosed(UsageError, RuntimeError):
    """The store was closed, or is used in a forked child."""


class NotInJob(UsageError, RuntimeError):
    """A distributed store was created outside a job."""


class RankTaken(UsageError, RuntimeError):
    """Another process has this rank of the job, and keeps it; the text says which, if that is known."""


class AddressUnavailable(UsageError, OSError):
    """This host cannot listen at the address it was told; the text names it and says what to set."""


class NotPicklable(UsageError, TypeError):
    """A store was pickled or copied; the text says what to do instead."""


class NotSupported(UsageError, NotImplementedError):
    """The call is part of the contract but not built, or not for this kind of store."""


class JobFailed(TensorKVError, RuntimeError):
    """A process of a job that `spawn` started has failed. The text ends with its traceback."""


class UpdaterError(TensorKVError, RuntimeError):
    """The updater raised. The stored value is unchanged; the text ends with the traceback."""


class SaveError(TensorKVError, OSError):
    """A save could not be written. The previous save is intact."""


class LoadError(TensorKVError, ValueError):
    """There is no save, or it is corrupt or incomplete. The store is unchanged."""


class WaitTimeout(TensorKVError, TimeoutError):
    """A call did not finish within its deadline."""


class TransportUnavailable(TensorKVError, ConnectionError):
    """The requested transport is not available between two processes; the text says why."""


class MemoryLimitReached(TensorKVError, MemoryError):
    """A process lacks the memory for a call, or a limit forbids it; the text has the numbers."""


class PeerLostError(JobBroken):
    """A process of the job is gone; the text names role, rank, host and cause."""


class AuthenticationError(JobBroken):
    """The peer does not hold the token of this job, or we do not."""


class ProtocolVersionError(JobBroken):
    """The peer speaks another version of the protocol."""


class ProtocolError(JobBroken):
    """The peer sent bytes that are not a valid frame or message."""


def again(error: TensorKVError) -> TensorKVError:
    """Return a copy of an error that several calls raise: a single one would collect their tracebacks."""
    return type(error)(*error.args)


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """Return "; did you mean 'x'?" if a known name is close to `name`, else ""."""
    names = {str(each).lower(): str(each) for each in known}
    close = difflib.get_close_matches(str(name).lower(), names, n=1)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


MAX_HINTS = 16
"""Maximum number of times that a store looks for keys similar to a missing one: some programs ask for each
key before they create it, and the cost of a look grows with the number of keys."""

MAX_LIKELY = 50
"""Maximum number of keys, by beginning and by end, that are compared with a mistyped one letter by letter."""


@final
class Hints:
    """Finds the keys of a store that a mistyped one may mean."""

    def __init__(self) -> None:
        self._left = MAX_HINTS

    def near(self, key: object, known: Iterable[object]) -> list[str]:
        """Return the keys among `known` that are most similar to `key`, best first, at most three."""
        if not isinstance(key, str) or self._left == 0:
            return []
        self._left -= 1
        names = [name for name in known if isinstance(name, str)]
        by_head = _sharing(names, key, str.startswith, lambda length: key[:length])
        by_tail = _sharing(names, key, str.endswith, lambda length: key[-length:])
        likely = dict.fromkeys([*by_head[:MAX_LIKELY], *by_tail[:MAX_LIKELY]])
        rated = sorted(((_likeness(key, name), name) for name in likely), key=lambda each: -each[0])
        return [name for rate, name in rated[:3] if rate >= 0.6]


def _sharing(
    names: list[str], key: str, has: Callable[[str, str], bool], part: Callable[[int], str]
) -> list[str]:
    """Return the names that share the longest beginning, or end, with a key; [] if none shares any."""
    found: list[str] = []
    for length in range(1, len(key) + 1):
        names = [name for name in names if has(name, part(length))]
        if not names:
            break
        found = names
    return found


def _likeness(key: str, name: str) -> float:
    if key.endswith("." + name) or name.endswith("." + key):  # one of two models is wrapped
        return 1.0
    return difflib.SequenceMatcher(None, key, name).ratio()


def not_initialized(key: object, near: Sequence[str] = ()) -> KeyNotInitialized:
    """Return the error of a call on a key that does not exist; `near` are similar keys that do."""
    meant = f"did you mean {' or '.join(map(repr, near))}? Else " if near else ""
    return KeyNotInitialized(f"key {key!r} is not initialised; {meant}call init({key!r}, value) first")


def deleted_here(key: object, ranks: Sequence[int]) -> KeyNotInitialized:
    """Return the error of a call on a key that this worker has deleted, and these ranks have not."""
    return KeyNotInitialized(
        f"key {key!r} is not initialised: this worker has deleted it, and ranks {list(ranks)} have not yet; "
        f"call init({key!r}, value) to make it anew, which waits for them"
    )


def already_initialized(key: object, shape: tuple[int, ...]) -> KeyAlreadyInitialized:
    """Return the error of an init of a key that exists, with `shape`."""
    return KeyAlreadyInitialized(
        f"key {key!r} is already initialised, with shape {tuple(shape)}; call put to replace its value, "
        "or delete it first"
    )


def not_elementwise(updater: str, key: object, shape: tuple[int, ...], num_slices: int) -> NotElementwise:
    """Return the error of an updater that needs whole values but is set for a sliced key."""
    return NotElementwise(
        f"updater {updater!r} needs whole values, but key {key!r} of shape {tuple(shape)} is kept in "
        f"{num_slices} slices; set the updater before init, or use init(..., whole=True), or "
        "set_updater(..., elementwise=True)"
    )


def closed_meanwhile(what: str = "") -> StoreClosed:
    """Return the error of a call (`what`, if known) whose store another thread has closed."""
    text = "the store was closed by another thread during the call"
    return StoreClosed(f"{what}: {text}" if what else text)


_BY_NAME: dict[str, type[TensorKVError]] = {
    cls.__name__: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, TensorKVError)
}


def to_wire(error: BaseException) -> tuple[str, str]:
    """Return the class name and text under which `error` travels."""
    if isinstance(error, TensorKVError):
        return type(error).__name__, str(error)
    return "TensorKVError", f"{type(error).__name__}: {error}"


def from_wire(name: str, text: str) -> TensorKVError:
    """Build the error that `to_wire` described. An unknown name gives a plain TensorKVError."""
    return _BY_NAME.get(name, TensorKVError)(text)
