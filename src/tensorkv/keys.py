"""Parses the arguments of the verbs: checks and flattens one key, a list of keys or a dict, and their values.

Every verb takes `key` and `value` in the same three forms; only this module interprets them:

    push("w", grad)                push("w", [grad_gpu0, grad_gpu1])        one key, one value per device
    push(["w", "b"], [gw, gb])     push(["w", "b"], [[gw0, gw1], [gb0, gb1]])
    push({"w": gw, "b": gb})

A dict may also be given as pairs, such as `model.named_parameters()`, or as a module, which stands for its
parameters by name or, in a push of gradients, for their gradients.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from tensorkv.arrays import REFUSED_DTYPES, to_out, to_tensor
from tensorkv.errors import InvalidArgument, InvalidKey, InvalidValue, LengthMismatch
from tensorkv.plain import Key, may_travel

_traits = attrgetter("dtype", "requires_grad", "layout")
_PLAIN = (False, torch.strided)
_TENSORS = {torch.Tensor}
_PLAIN_OR_PARAMETERS = {torch.Tensor, torch.nn.Parameter}
_LISTS = {list, tuple}
_LOWEST_ADDRESS = 1 << 22
"""Minimum address of a program's memory; a lower one is an offset into a storage that was freed."""

_plain_seen: set[tuple[Any, ...]] = set()  # traits of tensors that need no preparation
_plain_outs_seen: set[tuple[Any, ...]] = set()  # of outs; complex ones may be conjugated when read


class _Absent(enum.Enum):
    ABSENT = "tensorkv.ABSENT"

    def __repr__(self) -> str:
        return self.value


ABSENT = _Absent.ABSENT
"""Pushed instead of a value: take part in this round of the key without adding anything."""


class Form(enum.Enum):
    """The form of an argument, one of three; a pull answers in the same form."""

    SINGLE = "single"
    LIST = "list"
    DICT = "dict"


Known = Callable[[tuple[Key, ...], list[Any]], Any]
"""Returns the plan by which a store knows keys and their values, or outs, from an earlier call, so that they
need not be checked one by one here; None if it does not know them."""


class PushBatch:
    """The contributions of one push call, one entry per distinct key, in order of first appearance.

    `tensors[i]` are the values of `keys[i]`, devices in list order; those of a repeated key follow each
    other; an empty list stands for ABSENT. `counts[i]` is the weight of the key in a mean.
    `singles`, if not None, has exactly one tensor per key and replaces the lists: a list for each of a
    thousand keys would keep Python's garbage collector busy. `known` is then the store's plan of an earlier
    call with tensors of the same dtypes and shapes, and nobody has checked whether these need preparation;
    `checked` does. If the caller sets `weight`, every key has that weight in a mean instead.
    """

    __slots__ = ("_counts", "_tensors", "keys", "known", "singles", "weight")

    def __init__(
        self,
        keys: tuple[Key, ...],
        tensors: list[list[torch.Tensor]] | None = None,
        counts: list[int] | None = None,
        singles: list[torch.Tensor] | None = None,
        known: Any = None,
    ) -> None:
        self.keys = keys
        self.singles = singles
        self.known = known
        self.weight: float | None = None
        self._tensors = tensors
        self._counts = counts

    def checked(self) -> PushBatch:
        """Return the same batch with every value checked. Raises what `push_batch` raises."""
        if self.known is None:
            return self
        batch = _push_of(self.keys, self.singles or [])
        batch.weight = self.weight
        return batch

    def weighted(self, weight: float) -> PushBatch:
        """Return the same batch with a weight; with 0 every key is absent."""
        batch = self if weight else PushBatch(self.keys, [[] for _ in self.keys])
        batch.weight = weight or None
        return batch

    @property
    def tensors(self) -> list[list[torch.Tensor]]:
        """The values of each key."""
        if self._tensors is None:
            self._tensors = _each_alone(self.singles)
        return self._tensors

    @property
    def counts(self) -> list[int]:
        """The weight of each key in a mean."""
        if self._counts is None:
            self._counts = list(map(len, self.tensors))
        return self._counts


class PullBatch:
    """The destinations of one pull call: `outs[i]` are those of `keys[i]`; empty means a new tensor.

    `keys` are in call order and may repeat. `given` is the caller's own `out`, to be returned. `singles` is
    as in `PushBatch`; with `known` they are the same tensors as in the earlier call.
    """

    __slots__ = ("_outs", "form", "given", "keys", "known", "singles")

    def __init__(
        self,
        keys: tuple[Key, ...],
        outs: list[list[torch.Tensor]] | None,
        form: Form,
        given: Any,
        singles: list[torch.Tensor] | None = None,
        known: Any = None,
    ) -> None:
        self.keys = keys
        self.form = form
        self.given = given
        self.singles = singles
        self.known = known
        self._outs = outs

    def checked(self) -> PullBatch:
        """Return the same batch with every destination checked. Raises what `pull_batch` raises."""
        if self.known is None:
            return self
        return _batch_into(self.keys, self.singles or [], self.form, self.given)

    @property
    def outs(self) -> list[list[torch.Tensor]]:
        """The destinations of each key."""
        if self._outs is None:
            self._outs = _each_alone(self.singles)
        return self._outs


def with_article(name: str) -> str:
    """Return "an int" for "int", and "a str" for "str"."""
    return f"{'an' if name[:1] in tuple('aeiouAEIO') else 'a'} {name}"


def check_keys(keys: Iterable[Any], known_type: type | None = None) -> tuple[Key, ...]:
    """Check that `keys` are all int or all str, and return them as a tuple.

    Args:
        keys: the keys of one call.
        known_type: the type of the store's keys, int or str, if it has any; all keys must have it.

    Raises:
        InvalidKey: a bool, None, or anything else that is not int or str; or a mix of the two.
        LengthMismatch: there are no keys.
    """
    checked = tuple(keys)
    if not checked:
        raise LengthMismatch("the list of keys is empty; pass at least one key")
    types = set(map(type, checked))
    if known_type in types and len(types) == 1:  # the common case first
        return checked
    if not types <= {int, str}:
        bad = next(key for key in checked if type(key) not in (int, str))
        raise InvalidKey(_no_key(bad))
    if len(types) > 1:
        raise InvalidKey(f"int and str keys are mixed in one call: {_some(checked)}; use one of the two")
    found = types.pop()
    if known_type is not None and found is not known_type:
        raise InvalidKey(
            f"key {checked[0]!r} is {with_article(found.__name__)}, but this store has "
            f"{known_type.__name__} keys; a store uses one of the two"
        )
    return checked


def _no_key(bad: Any) -> str:
    """Return why something is not a key, without printing the weights of a module or tensor."""
    if isinstance(bad, (torch.nn.Module, Mapping)):
        return (
            f"a key is an int or a str, not {with_article(type(bad).__name__)}; name its parameters one by "
            "one, or, to pull into its tensors, pass it as out"
        )
    if isinstance(bad, (np.integer, np.str_)):
        return (
            f"key {bad.item()!r} is a numpy.{type(bad).__name__}; a key is an int or a str: pass key.item()"
        )
    text = repr(bad) if isinstance(bad, (bool, float, complex, bytes, type(None))) else ""
    named = f"key {text} is " if text else "a key is "
    return f"{named}{with_article(type(bad).__name__)}; a key is an int or a str"


def check_new_keys(keys: Iterable[Key]) -> None:
    """Raise InvalidKey if a key cannot be sent to servers: an int of more than 64 bits, broken Unicode.

    Every kind of store refuses them, so that a program that works in one process works on several.
    """
    for key in keys:
        if may_travel(key):
            continue
        if isinstance(key, int):
            raise InvalidKey(f"key {key!r} does not fit in 64 bits; use a smaller int, or str keys")
        raise InvalidKey(f"key {key!r} is not valid Unicode: it holds half of a surrogate pair")


def named_values(given: Any, grads: bool = False) -> tuple[list[Any], list[Any]] | None:
    """Return the names and values of a dict, a module, or pairs; None if the argument is none of these.

    Args:
        given: the argument. An iterator is consumed.
        grads: a module stands for the gradients of its parameters, not for the parameters.

    Raises:
        LengthMismatch: a module has no parameters.
        InvalidValue: an iterator yields tensors without names.
    """
    if isinstance(given, Mapping):
        return list(given), list(given.values())
    if isinstance(given, torch.nn.Module):
        names, values = _unzipped(list(given.named_parameters()))
        if not names:
            raise LengthMismatch(f"{with_article(type(given).__name__)} has no parameters")
        return names, [each.grad if grads and not is_lazy(each) else each for each in values]
    if isinstance(given, (list, tuple)):
        return _unzipped(given) if given and all(map(_is_pair, given)) else None
    if not isinstance(given, (Iterator, ItemsView)):
        return None
    items = list(given)
    if all(map(_is_pair, items)):
        return _unzipped(items)
    if any(isinstance(item, torch.Tensor) for item in items):
        raise InvalidValue("an iterator of tensors has no keys; pass module.named_parameters(), or keys, too")
    return items, [None] * len(items)


def _is_pair(item: Any) -> bool:
    return type(item) is tuple and len(item) == 2 and type(item[0]) in (int, str)


def _unzipped(pairs: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [name for name, _ in pairs], [value for _, value in pairs]


def split_keys(key: Any, value: Any, grads: bool = False) -> tuple[list[Any], list[Any], Form]:
    """Return the keys and values of a call in any of the forms. Only checks their numbers.

    Raises:
        LengthMismatch: keys and values differ in number, or there are none.
        InvalidValue: `value` is missing, or is given besides a dict, module or pairs.
    """
    if type(key) in (int, str):
        return [key], [value], Form.SINGLE
    if type(key) is list and type(value) is list and len(key) == len(value) > 0:  # the common case first
        return key.copy(), value.copy(), Form.LIST
    holds_values = isinstance(key, (Mapping, torch.nn.Module))
    if holds_values and value is not None:
        what = "a dict of keys" if isinstance(key, Mapping) else "a module"
        raise InvalidValue(f"{what} already holds the values; leave the second argument away")
    named = named_values(key, grads) if value is None else None
    if named is not None:
        keys, values, form = *named, Form.DICT
    elif isinstance(key, (list, tuple)):
        if isinstance(value, Mapping) or not isinstance(value, Iterable) or isinstance(value, torch.Tensor):
            raise InvalidValue(
                f"a list of {len(key)} keys needs a list of {len(key)} values, not {type(value).__name__}"
            )
        keys, values, form = list(key), list(value), Form.LIST
    else:
        return [key], [value], Form.SINGLE
    if not keys:
        raise LengthMismatch("the list of keys is empty; pass at least one key")
    if len(keys) != len(values):
        raise LengthMismatch(f"{len(keys)} keys but {len(values)} values; pass one value (or list) per key")
    return keys, values, form


def push_batch(
    key: Any, value: Any, known_type: type | None, known: Known | None = None, *, grads: bool = False
) -> PushBatch:
    """Check and flatten the arguments of a push, but not shapes and dtypes.

    With `grads` a module stands for the gradients of its parameters.

    Raises:
        InvalidKey, InvalidValue, LengthMismatch.
    """
    raw_keys, values, _ = split_keys(key, value, grads)
    keys = check_keys(raw_keys, known_type)
    plan = None if known is None else known(keys, values)
    return _push_of(keys, values) if plan is None else PushBatch(keys, None, None, values, plan)


def _push_of(keys: tuple[Key, ...], values: list[Any]) -> PushBatch:
    if len(set(keys)) == len(keys):
        if _are_plain(values):
            return PushBatch(keys, None, None, values)
        tensors = _device_lists(keys, values)
        return PushBatch(keys, tensors, None, _singles(tensors))
    return _merge_repeated(keys, _device_lists(keys, values))


def pull_batch(key: Any, out: Any, known_type: type | None, known: Known | None = None) -> PullBatch:
    """Check and flatten the arguments of a pull, but not shapes and dtypes.

    Raises:
        InvalidKey, InvalidValue, InvalidOut, LengthMismatch.
    """
    named = named_values(out) if key is None and out is not None else None
    if named is not None:
        raw_keys, values, form = *named, Form.DICT
        out = dict(zip(*named, strict=True)) if isinstance(out, Iterator) else out
    elif out is None:
        form = Form.LIST if isinstance(key, (list, tuple)) else Form.SINGLE
        raw_keys = list(key) if form is Form.LIST else [key]
        keys = check_keys(raw_keys, known_type)
        return PullBatch(keys, [[] for _ in keys], form, None)
    else:
        raw_keys, values, form = split_keys(key, out)
    return _batch_of(check_keys(raw_keys, known_type), values, form, out, known)


def pull_batch_of(
    pushed: PushBatch, key: Any, out: Any, known_type: type | None, known: Known | None = None
) -> PullBatch:
    """Check and flatten the destinations of a pushpull; `key` is its argument, `pushed` the batch made of it.

    Raises:
        InvalidArgument: `out` is a dict with other keys.
        InvalidValue, InvalidOut, LengthMismatch.
    """
    if (
        type(out) is list
        and type(key) is list
        and len(out) == len(pushed.keys)
        and type(key[0]) in (int, str)
    ):  # the common case first
        return _batch_of(pushed.keys, out.copy(), Form.LIST, out, known)
    is_dict = not isinstance(key, (int, str)) and named_values(key) is not None
    holds_outs = isinstance(out, (Mapping, torch.nn.Module)) or (
        is_dict and (isinstance(out, Iterator) or named_values(out) is not None)
    )
    if holds_outs:
        batch = pull_batch(None, out, known_type, known)
        if batch.keys != pushed.keys and set(batch.keys) != set(pushed.keys):
            raise InvalidArgument("what is pulled is what is pushed; out has other keys than value")
        return batch
    batch = pull_batch(key if type(key) in (int, str) else list(pushed.keys), out, known_type, known)
    if is_dict and out is None:
        batch.form = Form.DICT
    return batch


def _batch_of(
    keys: tuple[Key, ...], values: list[Any], form: Form, given: Any, known: Known | None
) -> PullBatch:
    plan = None if known is None else known(keys, values)
    if plan is None:
        return _batch_into(keys, values, form, given)
    return PullBatch(keys, None, form, given, values, plan)


def _batch_into(keys: tuple[Key, ...], values: list[Any], form: Form, given: Any) -> PullBatch:
    if _are_plain_outs(values):
        return PullBatch(keys, None, form, given, values)
    if _PLAIN_OR_PARAMETERS.issuperset(map(type, values)):
        detached = [each.detach() if type(each) is torch.nn.Parameter else each for each in values]
        if _are_plain_outs(detached):
            return PullBatch(keys, None, form, given, detached)
    flat = _flat(values)
    if flat is not None and _are_plain_outs(flat):
        outs = list(map(list, values))
    else:
        outs = [_out_list(item, item_key) for item_key, item in zip(keys, values, strict=True)]
    return PullBatch(keys, outs, form, given, _singles(outs))


def answer(batch: PullBatch, tensors: list[torch.Tensor]) -> Any:
    """Return the result of a pull: the caller's `out`, or else `tensors` in the form of the keys."""
    if batch.given is not None:
        return batch.given
    if batch.form is Form.SINGLE:
        return tensors[0]
    if batch.form is Form.DICT:
        return dict(zip(batch.keys, tensors, strict=True))
    return tensors


def _each_alone(singles: list[torch.Tensor] | None) -> list[list[torch.Tensor]]:
    return [[each] for each in singles or ()]


def _singles(tensors: list[list[torch.Tensor]]) -> list[torch.Tensor] | None:
    if all(len(each) == 1 for each in tensors):
        return [each[0] for each in tensors]
    return None


def _are_plain(values: list[Any], outs: bool = False) -> bool:
    """Whether all are tensors that need no preparation. A few bulk operations, for long lists."""
    if set(map(type, values)) != _TENSORS:
        return False
    seen = _plain_outs_seen if outs else _plain_seen
    if seen.issuperset(map(_traits, values)):
        return _lie_in_memory(values)
    found = set(map(_traits, values))
    if any(traits[1:] != _PLAIN or traits[0] in REFUSED_DTYPES for traits in found):
        return False
    if outs and any(traits[0].is_complex for traits in found):
        return False
    seen.update(found)  # at most one per dtype
    return _lie_in_memory(values)


def _are_plain_outs(values: list[Any]) -> bool:
    """Whether all are tensors that can be written as they are."""
    return (
        _are_plain(values, outs=True)
        and all(map(torch.Tensor.is_contiguous, values))
        and not any(map(torch.Tensor.is_neg, values))
        and not any(map(torch.Tensor.is_inference, values))
    )


def _flat(values: list[Any]) -> list[Any] | None:
    """Flatten a list of lists, which have one value per device; None if it is anything else."""
    if values and _LISTS.issuperset(map(type, values)) and all(values):
        return list(chain.from_iterable(values))
    return None


def _lie_in_memory(tensors: list[torch.Tensor]) -> bool:
    """Whether all have an address: tensors that are empty, freed, meta, lazily zero or traced have none."""
    try:
        return min(map(torch.Tensor.data_ptr, tensors)) >= _LOWEST_ADDRESS
    except RuntimeError:
        return False


def _device_lists(keys: tuple[Key, ...], values: list[Any]) -> list[list[torch.Tensor]]:
    flat = _flat(values)
    if flat is not None and _are_plain(flat):
        return list(map(list, values))
    return [_device_list(item, key) for key, item in zip(keys, values, strict=True)]


def _device_list(value: Any, key: Key) -> list[torch.Tensor]:
    if value is ABSENT:
        return []
    if isinstance(value, (list, tuple)):
        if not value:
            raise LengthMismatch(f"the list of values for key {key!r} is empty; pass ABSENT to add nothing")
        return [to_tensor(item, key) for item in value]
    return [to_tensor(value, key)]


def _out_list(value: Any, key: Key) -> list[torch.Tensor]:
    if isinstance(value, (list, tuple)):
        if not value:
            raise LengthMismatch(f"the list of outs for key {key!r} is empty; pass one per device")
        return [to_out(item, key) for item in value]
    return [to_out(value, key)]


def _merge_repeated(keys: tuple[Key, ...], tensors: list[list[torch.Tensor]]) -> PushBatch:
    """Join the values of a repeated key; together they count as one push of it."""
    merged: dict[Key, list[torch.Tensor]] = {}
    counts: dict[Key, int] = {}
    for key, values in zip(keys, tensors, strict=True):
        merged.setdefault(key, []).extend(values)
        counts[key] = max(counts.get(key, 0), len(values))
    return PushBatch(tuple(merged), list(merged.values()), list(counts.values()))


def _some(keys: tuple[Any, ...], limit: int = 6) -> str:
    text = ", ".join(repr(key) for key in keys[:limit])
    return f"[{text}, ...]" if len(keys) > limit else f"[{text}]"
