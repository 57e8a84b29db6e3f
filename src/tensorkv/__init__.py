"""TensorKV: a parameter server for PyTorch. Workers push tensors under keys, the store adds them up,
an updater combines the sum with the stored value where the value lives, and anyone pulls the result.

    kv = tensorkv.create("local")          # or "dist_sync" in a job with servers; the rest is the same
    kv.init("w", torch.zeros(10))
    kv.push("w", torch.ones(10))
    w = kv.pull("w")

General layout, from the bottom; an import goes to a lower line or stays on its own:

    errors config plain work              what everything uses; no torch
    store bound keys arrays partition     the contract (KVStore), its arguments, where a value lives
    updaters/ checkpoint/                 what a push does to a value; what is saved of a store, and how
    wire/                                 messages and frames
    transport/                            moves frames: sockets, shared memory
    peer/                                 what all processes of a job share: handshake, deadlines
    server/ scheduler/ worker/            the three roles: their pure state machines, and their threads
    launch/                               starting the processes of a job, or finding it
    stores/                               the kinds of store, and `create`
    training/                             a torch optimizer whose steps the servers make
    compat/ cli/ testing/                 MXNet's names, the command line, the conformance suite
    this file                             the public names, resolved when first used

Importing tensorkv does not import torch: the launcher and the scheduler do without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tensorkv import errors
from tensorkv.errors import (
    AddressUnavailable,
    AuthenticationError,
    CommitMismatch,
    DtypeMismatch,
    DuplicateKey,
    InvalidArgument,
    InvalidKey,
    InvalidOption,
    InvalidOut,
    InvalidValue,
    JobBroken,
    JobFailed,
    KeyAlreadyInitialized,
    KeyDeleted,
    KeyNotInitialized,
    LengthMismatch,
    LoadError,
    MemoryLimitReached,
    NotElementwise,
    NotInJob,
    NotPicklable,
    NotShippable,
    NotSupported,
    PeerLostError,
    ProtocolError,
    ProtocolVersionError,
    RankTaken,
    SaveError,
    SettingMismatch,
    ShapeMismatch,
    StoreClosed,
    StoreMismatch,
    TensorKVError,
    TransportUnavailable,
    UncommittedPush,
    UnknownKind,
    UnknownUpdater,
    UnsupportedOptimizer,
    UpdaterError,
    UsageError,
    WaitTimeout,
)

if TYPE_CHECKING:
    from tensorkv.bound import BoundStep
    from tensorkv.keys import ABSENT
    from tensorkv.launch.place import num_workers, rank
    from tensorkv.launch.spawn import spawn
    from tensorkv.store import CommitResult, KeyInfo, KVStore
    from tensorkv.stores.registry import create, register
    from tensorkv.training.averaging import average
    from tensorkv.training.optimizer import DistributedOptimizer
    from tensorkv.training.sharding import shard
    from tensorkv.work import Work

__version__ = "0.1.0.dev0"

__all__ = [
    "ABSENT",
    "AddressUnavailable",
    "AuthenticationError",
    "BoundStep",
    "CommitMismatch",
    "CommitResult",
    "DistributedOptimizer",
    "DtypeMismatch",
    "DuplicateKey",
    "InvalidArgument",
    "InvalidKey",
    "InvalidOption",
    "InvalidOut",
    "InvalidValue",
    "JobBroken",
    "JobFailed",
    "KVStore",
    "KeyAlreadyInitialized",
    "KeyDeleted",
    "KeyInfo",
    "KeyNotInitialized",
    "LengthMismatch",
    "LoadError",
    "MemoryLimitReached",
    "NotElementwise",
    "NotInJob",
    "NotPicklable",
    "NotShippable",
    "NotSupported",
    "PeerLostError",
    "ProtocolError",
    "ProtocolVersionError",
    "RankTaken",
    "SaveError",
    "SettingMismatch",
    "ShapeMismatch",
    "StoreClosed",
    "StoreMismatch",
    "TensorKVError",
    "TransportUnavailable",
    "UncommittedPush",
    "UnknownKind",
    "UnknownUpdater",
    "UnsupportedOptimizer",
    "UpdaterError",
    "UsageError",
    "WaitTimeout",
    "Work",
    "__version__",
    "average",
    "create",
    "errors",
    "num_workers",
    "rank",
    "register",
    "shard",
    "spawn",
]

_MODULE_OF = {
    "ABSENT": "tensorkv.keys",
    "CommitResult": "tensorkv.store",
    "DistributedOptimizer": "tensorkv.training.optimizer",
    "BoundStep": "tensorkv.bound",
    "KVStore": "tensorkv.store",
    "KeyInfo": "tensorkv.store",
    "Work": "tensorkv.work",
    "average": "tensorkv.training.averaging",
    "create": "tensorkv.stores.registry",
    "num_workers": "tensorkv.launch.place",
    "rank": "tensorkv.launch.place",
    "register": "tensorkv.stores.registry",
    "shard": "tensorkv.training.sharding",
    "spawn": "tensorkv.launch.spawn",
}
"""Where the names live that are imported only when somebody asks for them."""

if not TYPE_CHECKING:  # type checkers would take every name for one that exists

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'tensorkv' has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
