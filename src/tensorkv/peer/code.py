"""How a server makes an updater from a setting: by name or, inside one process, from the object itself."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, final

from tensorkv.errors import NotShippable
from tensorkv.updaters.base import Updater
from tensorkv.updaters.functions import CodeRef, describe, load
from tensorkv.updaters.settings import build
from tensorkv.wire.messages import SettingRecord

LoadUpdater = Callable[[SettingRecord], Updater]
"""Makes the updater of a setting that was received."""

_IN_PROCESS = "<this process>"


@final
class CodeTable:
    """Functions and classes of an embedded job. Its servers are threads of this process, so any will do."""

    def __init__(self) -> None:
        self._objects: list[Any] = []

    def describe(self, obj: Any) -> CodeRef:
        """Return a reference with which `find` returns `obj`; the same object has the same reference."""
        if obj not in self._objects:  # by equality: wrappers of one function are equal
            self._objects.append(obj)
        return CodeRef(module=_IN_PROCESS, name=f"_{self._objects.index(obj)}")

    def find(self, ref: CodeRef) -> Any:
        """Return the object of a reference, None if it is not in this table."""
        names = {f"_{number}": obj for number, obj in enumerate(self._objects)}
        return names.get(ref.name) if ref.module == _IN_PROCESS else None


def describe_code(obj: Any, table: CodeTable | None) -> CodeRef:
    """Return the servers' name for `obj`. Raises NotShippable if they could not find it."""
    return describe(obj) if table is None else table.describe(obj)


def updater_loader(allowed_modules: Collection[str], table: CodeTable | None = None) -> LoadUpdater:
    """Return the function with which a server makes updaters.

    Args:
        allowed_modules: modules that may be imported besides torch.optim and tensorkv.
        table: the worker's table, if server and worker are one process.
    """

    def load_updater(record: SettingRecord) -> Updater:
        if record.updater.type == "named":
            return build(record.updater)
        if record.code is None:
            raise NotShippable(f"updater {record.updater.name!r} came without saying where its code is")
        code = table.find(record.code) if table is not None else None
        return build(record.updater, load(record.code, allowed_modules) if code is None else code)

    return load_updater
