"""create and register: exact names, options that make sense, errors that list what there is."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from tensorkv.config import DEFAULT_TIMEOUT_S
from tensorkv.errors import InvalidArgument, NotSupported, UnknownKind
from tensorkv.store import KVStore
from tensorkv.stores import registry
from tensorkv.stores.local import LOCAL_KINDS, LocalStore
from tensorkv.stores.registry import create, open_next, register


@pytest.fixture
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test register kinds that are gone afterwards."""
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))


@pytest.mark.parametrize("kind", LOCAL_KINDS)
def test_local_kinds(kind: str) -> None:
    with create(kind, store="mine", reduction="mean", timeout_s=3) as kv:
        assert isinstance(kv, LocalStore)
        assert (kv.kind, kv.name, kv.reduction) == (kind, "mine", "mean")


def test_local_is_the_default() -> None:
    with create() as kv:
        assert (kv.kind, kv.name, kv.reduction) == ("local", "default", "sum")


def test_the_next_store_of_a_name_has_a_number() -> None:
    options = [{}, {"reduction": "mean"}, {"store": "mine"}, {"embedded": True}]
    stores = [open_next("auto", "numbered", **each) for each in options]
    found = [(kv.kind, kv.name, kv.reduction) for kv in stores]
    for kv in stores:
        kv.close()
    assert found == [
        ("local", "numbered", "sum"),
        ("local", "numbered.2", "mean"),
        ("local", "mine", "sum"),
        ("dist_sync", "numbered.4", "sum"),
    ]


@pytest.mark.parametrize("kind", ["LOCAL", "distx_syncc", "local ", "", "device_local", None, 3, ["local"]])
def test_an_unknown_kind_lists_the_known(kind: Any) -> None:
    with pytest.raises(UnknownKind, match="'device', 'dist', 'dist_async', .*'local'") as caught:
        create(kind)
    assert repr(kind) in str(caught.value)


@pytest.mark.parametrize("kind", ["dist_device_sync", "dist_sync_device"])
def test_collectives_say_not_yet(kind: str) -> None:
    with pytest.raises(NotSupported, match="not built yet"):
        create(kind)


@pytest.mark.parametrize(
    "option",
    [
        {"embedded": True},
        {"num_servers": 2},
        {"on_worker_loss": "fail"},
        {"transport": "shm"},
        {"staleness": 1},
        {"quorum": 1},
        {"grace_s": 1.0},
        {"late": "carry"},
    ],
)
def test_options_of_a_job_are_refused_by_a_local_kind(option: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=f"{next(iter(option))}=.*'local'"):
        create("local", **option)


@pytest.mark.parametrize(
    "option",
    [
        {"reduction": "max"},
        {"store": ""},
        {"store": None},
        {"store": "\ud800"},
        {"timeout_s": 0},
        {"timeout_s": -1},
        {"timeout_s": "x"},
        {"timeout_s": 10**400},
        {"num_servers": "2"},
        {"num_servers": 1.5},
        {"num_servers": None},
        {"embedded": 1},
        {"embedded": "no"},
        {"transport": "udp"},
        {"transport": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["local", "dist_sync"])
def test_options_out_of_range(kind: str, option: dict[str, Any]) -> None:
    """Also of a distributed kind before anything is started."""
    with pytest.raises(InvalidArgument, match=next(iter(option))):
        create(kind, **{"embedded": kind == "dist_sync", **option})


@pytest.mark.parametrize("kind", ["dist", "dist_sync", "dist_async"])
def test_distributed_kinds_are_opened_with_every_option(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    opened = object()

    def open_dist(kind: str, **options: Any) -> Any:
        calls.append((kind, options))
        return opened

    module = types.ModuleType("tensorkv.stores.dist")
    monkeypatch.setattr(module, "open_dist", open_dist, raising=False)
    monkeypatch.setitem(sys.modules, "tensorkv.stores.dist", module)
    found: Any = create(kind, embedded=True, num_servers=3)
    assert found is opened
    expected = {
        "store": "default",
        "reduction": "sum",
        "timeout_s": DEFAULT_TIMEOUT_S,
        "embedded": True,
        "num_servers": 3,
        "on_worker_loss": None,
        "staleness": None,
        "quorum": None,
        "grace_s": 0.0,
        "late": "drop",
        "transport": None,
    }
    assert calls == [(kind, expected)]


@pytest.mark.usefixtures("_own_table")
class TestRegister:
    def make(self, kind: str, **options: Any) -> KVStore:
        return LocalStore(
            kind, store=options["store"], reduction=options["reduction"], timeout_s=options["timeout_s"]
        )

    def test_a_kind_of_ones_own(self) -> None:
        register("mine", self.make)
        with create("mine", store="s") as kv:
            assert (kv.kind, kv.name) == ("mine", "s")
        with pytest.raises(UnknownKind, match="'mine'"):
            create("yours")

    def test_a_taken_name(self) -> None:
        with pytest.raises(InvalidArgument, match="'local' already"):
            register("local", self.make)

    @pytest.mark.parametrize("kind", ["", None, 3])
    def test_what_is_no_name(self, kind: Any) -> None:
        with pytest.raises(InvalidArgument, match="not a name"):
            register(kind, self.make)

    def test_what_cannot_be_called(self) -> None:
        wrong: Any = "local"
        with pytest.raises(InvalidArgument, match="cannot be called"):
            register("mine", wrong)
