"""How a user's function or optimizer class travels to a server: by its name, never as code.

`describe` turns it into a `CodeRef` on the worker and refuses objects that a server could not find again;
`load` finds it on the server. Nothing is ever unpickled. A name is looked up in one of two places:

    a module        torch.optim, tensorkv, and modules that the launcher allowed with --allow-import
    the script      the job's `__main__` file, which the server reads; it executes only the definitions
                    (see `definitions`), since most scripts train when they are run

This module does without torch.
"""

from __future__ import annotations
import __future__

import functools
import hashlib
import importlib
import inspect
import os
import re
import sys
import traceback
import types
from collections.abc import Collection
from typing import Any

import msgspec

from tensorkv.errors import NotShippable
from tensorkv.updaters.definitions import Definitions

ALWAYS_ALLOWED = ("torch.optim", "tensorkv")
"""Modules from which servers always load."""

MAX_SCRIPT_BYTES = 16 << 20
_SCRIPT_MODULES = ("__main__", "__mp_main__")
_DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_HINT_MODULE = (
    "write it as a function or class at the top level of the script, or of a module that servers may "
    "import (`tensorkv run --allow-import MODULE`)"
)


class CodeRef(msgspec.Struct, frozen=True, kw_only=True):
    """Where to find a function or class.

    `name`, without dots, is looked up in `module`. If `script` is set, `module` is "__main__" and the top
    level of that file defines the name: `script` is its absolute path, `sha256` the hash of its bytes in hex,
    `package` the base of its relative imports. `adapter`, "module:class" of TensorKV, is called with the
    object found, and its result is used instead.
    """

    module: str
    name: str
    script: str = ""
    sha256: str = ""
    package: str = ""
    adapter: str = ""


# ---- on the worker -------------------------------------------------------------------------------


def describe(obj: Any) -> CodeRef:
    """Return the name under which servers find `obj`, a function or class.

    An object whose class has `__tensorkv_adapter__`, "module:class" of TensorKV, is described by its
    attribute `function`; servers call the adapter with that function.

    Raises:
        NotShippable: it is a lambda, a nested function, a method, a partial, another callable object;
            it was defined in a notebook, with `-c` or in an interactive session; its name refers to
            something else; or the script's definitions lack a name it uses. The text says what to do.
    """
    adapter = getattr(type(obj), "__tensorkv_adapter__", "")
    if adapter:
        return msgspec.structs.replace(describe(obj.function), adapter=adapter)
    module_name, name = _full_name(obj)
    module = sys.modules.get(module_name)
    if module_name in _SCRIPT_MODULES:
        return _describe_in_script(obj, name, module)
    if getattr(module, name, None) is not obj:
        raise NotShippable(
            f"{module_name}.{name} is not the {_kind(obj)} that was passed: servers would find something "
            "else, or nothing, under this name"
        )
    return CodeRef(module=module_name, name=name)


def _full_name(obj: Any) -> tuple[str, str]:
    """Return the module and name of `obj`. Raises NotShippable if servers cannot find it by name."""
    if not isinstance(obj, (types.FunctionType, types.BuiltinFunctionType, type)):
        raise NotShippable(f"servers cannot find {_describe_object(obj)} by a name; {_HINT_MODULE}")
    name, module_name = obj.__qualname__, obj.__module__
    if obj.__name__ == "<lambda>":
        raise NotShippable(f"servers cannot find a lambda by a name; {_HINT_MODULE}, with `def`")
    if "<locals>" in name:
        outer = name.rpartition(".<locals>")[0]
        free = obj.__code__.co_freevars if isinstance(obj, types.FunctionType) else ()
        of_outer = f" and uses {', '.join(free)} of it" if free else ""
        raise NotShippable(f"{obj.__name__} is defined inside {outer}(){of_outer}; {_HINT_MODULE}")
    if "." in name or not module_name:
        raise NotShippable(f"{name} belongs to a class or object; {_HINT_MODULE}")
    return module_name, name


def _describe_in_script(obj: Any, name: str, main: types.ModuleType | None) -> CodeRef:
    path = getattr(main, "__file__", None)
    if path is None or not os.path.isfile(path):
        raise NotShippable(
            f"{name} was defined in a notebook, an interactive session or with -c, and servers have no "
            f"file to find it in; {_HINT_MODULE}. In a `local` or embedded store any function will do"
        )
    path = os.path.abspath(path)
    _check_defined_in(obj, name, path)
    source, sha256 = _read_script(path)
    found = _definitions(source, path)
    known = vars(main) if main is not None else ()
    lacking = found.missing(name, known)
    if lacking:
        listed = "\n  ".join(lacking)
        raise NotShippable(
            f"servers execute only the definitions of {path} (imports, def, class, assigned literals), "
            f"and {name} needs names that those do not provide:\n  {listed}\n"
            f"Define them so, pass them otherwise, or move {name} to a module"
        )
    if not found.provides(name) or getattr(main, name, None) is not obj:
        raise NotShippable(f"{name} in {path} is not the {_kind(obj)} that was passed; {_HINT_MODULE}")
    spec = getattr(main, "__spec__", None)  # set for `python -m package.script` only
    return CodeRef(
        module="__main__",
        name=name,
        script=path,
        sha256=sha256,
        package=spec.parent if spec is not None and spec.parent else "",
    )


def _check_defined_in(obj: Any, name: str, path: str) -> None:
    """Refuse a function that was typed in after the script ran (`python -i`, a debugger)."""
    plain = inspect.unwrap(obj) if isinstance(obj, types.FunctionType) else obj
    if isinstance(plain, types.FunctionType):
        where = plain.__code__.co_filename
        if os.path.realpath(where) != os.path.realpath(path):
            raise NotShippable(f"{name} was defined in {where}, not in the script {path}; {_HINT_MODULE}")


def _describe_object(obj: Any) -> str:
    if isinstance(obj, types.MethodType):
        return f"the method {obj.__qualname__}"
    if isinstance(obj, functools.partial):
        return f"the partial of {getattr(obj.func, '__qualname__', obj.func)!s}"
    return f"an object of class {type(obj).__qualname__}"


def _kind(obj: Any) -> str:
    return "class" if isinstance(obj, type) else "function"


# ---- on the server -------------------------------------------------------------------------------


def load(ref: CodeRef, allowed_modules: Collection[str]) -> Any:
    """Return the function or class that `ref` names.

    Args:
        ref: from a worker of this job; it is checked like anything a peer sends.
        allowed_modules: modules that may be imported besides `ALWAYS_ALLOWED`; a package allows its
            submodules.

    Raises:
        NotShippable: the module is not allowed (then nothing was imported), or cannot be imported; the
            script cannot be read, differs from the worker's, or its definitions fail; or there is no such
            function or class.
    """
    if not ref.name.isidentifier():
        raise NotShippable(f"{ref.name!r} is not the name of a function or class")
    if ref.script:
        found = _load_from_script(ref)
    else:
        found = _load_from_module(ref.module, ref.name, allowed_modules)
    return _adapter(ref.adapter)(found) if ref.adapter else found


def _load_from_module(module_name: str, name: str, allowed_modules: Collection[str]) -> Any:
    allowed = (*ALWAYS_ALLOWED, *allowed_modules)
    if not _is_allowed(module_name, allowed):
        raise NotShippable(
            f"servers do not import {module_name!r}, which {name} is from; "
            f"start the job with `tensorkv run --allow-import {module_name}` to let them"
        )
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as exc:  # a module may raise anything while it is imported
        raise NotShippable(f"the server cannot import {module_name}: {type(exc).__name__}: {exc}") from exc
    found = getattr(module, name, None)
    origin = getattr(found, "__module__", None)
    if not _is_code(found) or not isinstance(origin, str) or not _is_allowed(origin, allowed):
        raise NotShippable(f"{module_name}.{name} is not a function or class of a module servers may import")
    return found


def _is_allowed(module_name: str, allowed: Collection[str]) -> bool:
    if not _DOTTED_NAME.fullmatch(module_name) or "__main__" in module_name.split("."):
        return False
    return any(module_name == each or module_name.startswith(each + ".") for each in allowed)


def _adapter(adapter: str) -> Any:
    """Return the class of TensorKV that declares itself to be this adapter."""
    module_name, _, name = adapter.partition(":")
    found = _load_from_module(module_name, name, ()) if _is_allowed(module_name, ("tensorkv",)) else None
    if not isinstance(found, type) or getattr(found, "__tensorkv_adapter__", None) != adapter:
        raise NotShippable(f"{adapter!r} is not an adapter of TensorKV")
    return found


_scripts: dict[tuple[str, str], types.ModuleType] = {}


def _load_from_script(ref: CodeRef) -> Any:
    module = _scripts.get((ref.script, ref.sha256))
    if module is None:  # two servers in threads of one process may both get here; the first wins
        module = _scripts.setdefault((ref.script, ref.sha256), _execute_definitions(ref))
    found = getattr(module, ref.name, None)
    if not _is_code(found) or found.__module__ != module.__name__:
        raise NotShippable(f"{ref.name} is not a function or class that the definitions of {ref.script} make")
    return found


def _execute_definitions(ref: CodeRef) -> types.ModuleType:
    """Execute the definitions of a script in a new module, registered like an imported one."""
    source, sha256 = _read_script(ref.script)
    if sha256 != ref.sha256:
        raise NotShippable(
            f"{ref.script} differs on the server from what the worker runs; all hosts of a job need the "
            "same script, and it must not be edited while the job starts"
        )
    tree = _definitions(source, ref.script).tree
    digest = hashlib.sha256(f"{ref.script}\0{sha256}".encode()).hexdigest()
    module = types.ModuleType(f"tensorkv_script_{digest[:16]}")
    module.__file__ = ref.script
    module.__package__ = ref.package
    folder = os.path.dirname(ref.script)
    if not ref.package and folder not in sys.path:
        sys.path.insert(0, folder)  # as `python script.py` does for modules beside it
    # Annotations stay text: names for type checkers only are not needed.
    flags = __future__.annotations.compiler_flag
    sys.modules[module.__name__] = module  # dataclasses and pickle look up a class's module
    try:
        exec(compile(tree, ref.script, "exec", flags=flags, dont_inherit=True), vars(module))
    except (Exception, SystemExit) as exc:  # the user's definitions may raise anything
        sys.modules.pop(module.__name__, None)
        text = "".join(traceback.format_exception(exc)).rstrip()
        raise NotShippable(f"the definitions of {ref.script} fail on the server: {exc}\n{text}") from exc
    return module


def _is_code(obj: Any) -> bool:
    return isinstance(obj, (types.FunctionType, types.BuiltinFunctionType, type))


# ---- on both -------------------------------------------------------------------------------------


def _read_script(path: str) -> tuple[bytes, str]:
    """Return the bytes of a script and their hash."""
    try:
        if not os.path.isabs(path) or not os.path.isfile(path):
            raise FileNotFoundError(f"{path!r} is not the absolute path of a file")
        with open(path, "rb") as file:
            source = file.read(MAX_SCRIPT_BYTES + 1)
        if len(source) > MAX_SCRIPT_BYTES:
            raise ValueError(f"{path} has more than {MAX_SCRIPT_BYTES} bytes")
    except (OSError, ValueError) as exc:
        raise NotShippable(f"cannot read the job's script: {exc}; servers need it at the same path") from exc
    return source, hashlib.sha256(source).hexdigest()


def _definitions(source: bytes, path: str) -> Definitions:
    try:
        return Definitions(source, path)
    except (SyntaxError, ValueError) as exc:  # ValueError: null bytes
        raise NotShippable(f"{path} is not a Python script: {exc}") from exc
