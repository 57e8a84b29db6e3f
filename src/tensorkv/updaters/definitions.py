"""The definitions of a script: the parts of a training script that a server executes.

To find a function of a script, a server executes the script's definitions and nothing else, since most
scripts train when they are run. Definitions are:

    imports                                     also under `try` and `if`
    def and class                               if their decorators, defaults and bases are provided
    assignments of literals                     numbers, strings, None, containers and arithmetic of those

An `if` counts if its condition has no side effects, such as `sys.version_info >= (3, 12)`; the body of a
condition with `__name__` never does. A name that another statement binds as well is not provided: server and
worker would hold different values for it. The decisions depend on the text of the script alone, so that
worker and server agree. Nothing here imports or executes anything.
"""

from __future__ import annotations

import ast
import builtins
import symtable
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_MODULE_NAMES = frozenset({"__name__", "__file__", "__doc__", "__package__", "__spec__", "__builtins__"})
_BUILTIN_NAMES = frozenset(dir(builtins)) | _MODULE_NAMES
_COMPREHENSIONS = frozenset({"listcomp", "setcomp", "dictcomp", "genexpr"})

# Functions that the condition of an `if` may call: they have no side effects.
_QUIET_FUNCTIONS = frozenset({"bool", "callable", "getattr", "hasattr", "int", "isinstance", "len", "str"})
_QUIET_METHODS = frozenset({"endswith", "find_spec", "get", "getenv", "is_available", "startswith"})
_QUIET_NODES = (
    ast.Attribute,
    ast.BinOp,
    ast.BoolOp,
    ast.Call,
    ast.Compare,
    ast.Constant,
    ast.List,
    ast.Name,
    ast.Subscript,
    ast.Tuple,
    ast.UnaryOp,
    ast.boolop,
    ast.cmpop,
    ast.expr_context,
    ast.keyword,
    ast.operator,
    ast.unaryop,
)


@dataclass(slots=True)
class _Unit:
    """One def, class, import or assignment: the global names it binds, and those it touches.

    `at_once` are the names needed to execute the statement, `uses` all names that its code mentions, `sets`
    those that functions in it change by `global`.
    """

    line: int
    binds: set[str]
    at_once: set[str] = field(default_factory=set)
    uses: set[str] = field(default_factory=set)
    sets: set[str] = field(default_factory=set)


class Definitions:
    """The definitions of one script, found in its text.

    Attributes:
        tree: a module of the definitions, in the order of the script, ready to be compiled.
        has_star: whether the script says `from module import *`, so that its names are not all known.
    """

    def __init__(self, source: bytes, path: str) -> None:
        """Read `source`.

        Raises:
            SyntaxError: it is not Python.
        """
        self.has_star = False
        self._path = path
        self._provided: dict[str, list[_Unit]] = {}
        self._withheld: dict[str, str] = {}
        self._units: list[_Unit] = []
        parsed = ast.parse(source, filename=path)
        self.tree = ast.Module(body=self._keep(parsed.body), type_ignores=[])
        ast.fix_missing_locations(self.tree)

    def provides(self, name: str) -> bool:
        """Whether the definitions bind `name`, and no other statement of the script does."""
        return name in self._provided and name not in self._withheld

    def missing(self, name: str, known: Iterable[str] = ()) -> list[str]:
        """Return a line for each global name that `name` needs, directly or indirectly, and lacks.

        Args:
            name: a function or class of the script.
            known: names that exist although the text does not show it, from a star import.
        """
        known_names = frozenset(known)
        lacking: dict[str, str] = {}
        needed: list[_Unit] = []
        todo, seen = [name], {name}
        while todo:
            current = todo.pop()
            why = self._why_missing(current, known_names)
            if why is not None:
                lacking[current] = why
                continue
            for unit in self._provided.get(current, []):
                needed.append(unit)
                todo += sorted(unit.uses - seen)
                seen |= unit.uses
        lacking.update(self._set_elsewhere(needed, seen - lacking.keys()))
        return [f"{each}: {why}" for each, why in sorted(lacking.items())]

    def _why_missing(self, name: str, known: frozenset[str]) -> str | None:
        if name in self._withheld:
            return self._withheld[name]
        if name in self._provided or name in _BUILTIN_NAMES:
            return None
        if self.has_star and name in known:
            return None
        return "the script does not define it"

    def _set_elsewhere(self, needed: list[_Unit], names: set[str]) -> dict[str, str]:
        """Find names that are changed by `global` in functions that `needed` does not include."""
        inside = {id(unit) for unit in needed}
        return {
            name: f"line {unit.line}: {'/'.join(sorted(unit.binds))} changes it, and only on the worker"
            for unit in self._units
            if id(unit) not in inside
            for name in unit.sets & names
        }

    # ---- which statements are kept ---------------------------------------------------------------

    def _keep(self, statements: Iterable[ast.stmt]) -> list[ast.stmt]:
        return [kept for statement in statements for kept in self._keep_one(statement)]

    def _keep_one(self, node: ast.stmt) -> Iterator[ast.stmt]:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            self._provide(_Unit(node.lineno, self._imported(node)))
            yield node
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from self._keep_def(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and _is_literal_assignment(node):
            self._provide(_Unit(node.lineno, set(_assigned_names(node))))
            yield node
        elif isinstance(node, ast.Try):
            yield from self._keep_try(node)
        elif isinstance(node, ast.If):
            yield from self._keep_if(node)
        else:
            self._withhold(node, "a statement that servers do not execute binds or changes it")

    def _keep_def(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> Iterator[ast.stmt]:
        unit = _unit_of(node, self._path)
        self._units.append(unit)
        lacking = sorted(name for name in unit.at_once if not self._is_there(name))
        if lacking:
            self._withhold(
                node, f"its decorators, defaults or bases need {', '.join(lacking)}, which servers lack"
            )
        else:
            self._provide(unit)
            yield node

    def _keep_try(self, node: ast.Try) -> Iterator[ast.stmt]:
        body = self._keep(node.body)
        handlers = [
            ast.copy_location(
                ast.ExceptHandler(each.type, each.name, self._keep(each.body) or [ast.Pass()]), each
            )
            for each in node.handlers
        ]
        orelse, final = self._keep(node.orelse), self._keep(node.finalbody)
        if body:
            yield ast.copy_location(ast.Try(body, handlers, orelse, final), node)
        else:  # the statements that could fail are left out, and so are their handlers
            for handler in node.handlers:
                for each in handler.body:
                    self._withhold(each, "it is bound if a statement fails that servers do not execute")
            yield from orelse + final

    def _keep_if(self, node: ast.If) -> Iterator[ast.stmt]:
        if _mentions_name_of_module(node.test):
            self._withhold(node, "it is bound under `if __name__ ...`; move it out of that")
        elif not self._is_quiet(node.test):
            self._withhold(node, "it is bound under an `if` whose condition servers do not evaluate")
        else:
            body, orelse = self._keep(node.body), self._keep(node.orelse)
            if body or orelse:
                yield ast.copy_location(ast.If(node.test, body or [ast.Pass()], orelse), node)

    def _is_quiet(self, test: ast.expr) -> bool:
        """Whether a server can evaluate the condition without side effects."""
        for node in ast.walk(test):
            if not isinstance(node, _QUIET_NODES):
                return False
            if isinstance(node, ast.Name) and not self._is_there(node.id):
                return False
            if isinstance(node, ast.Call):
                called = node.func
                quiet = (isinstance(called, ast.Name) and called.id in _QUIET_FUNCTIONS) or (
                    isinstance(called, ast.Attribute) and called.attr in _QUIET_METHODS
                )
                if not quiet:
                    return False
        return True

    # ---- names -----------------------------------------------------------------------------------

    def _is_there(self, name: str) -> bool:
        if name in self._withheld:
            return False
        return name in self._provided or name in _BUILTIN_NAMES or self.has_star

    def _provide(self, unit: _Unit) -> None:
        for name in unit.binds:
            self._provided.setdefault(name, []).append(unit)

    def _withhold(self, node: ast.stmt, why: str) -> None:
        changed = {name for name, _ in _bound_symbols(node, self._path)}
        changed.update(_subscripted_names(node))
        for name in changed:
            self._withheld.setdefault(name, f"line {node.lineno}: {why}")

    def _imported(self, node: ast.Import | ast.ImportFrom) -> set[str]:
        if isinstance(node, ast.Import):
            return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        names = {alias.asname or alias.name for alias in node.names}
        self.has_star = self.has_star or "*" in names
        return names - {"*"}


def _unit_of(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, path: str) -> _Unit:
    unit = _Unit(node.lineno, {node.name})
    _collect(_table(node, path), unit, at_once=True)
    return unit


def _collect(table: symtable.SymbolTable, unit: _Unit, at_once: bool) -> None:
    """Add the global names that a scope and its inner scopes use and set."""
    is_module = table.get_type() == "module"
    for symbol in table.get_symbols():
        is_global = not symbol.is_assigned() if is_module else symbol.is_global()
        if is_global and symbol.is_referenced():
            unit.uses.add(symbol.get_name())
            if at_once:
                unit.at_once.add(symbol.get_name())
        if not is_module and symbol.is_declared_global() and symbol.is_assigned():
            unit.sets.add(symbol.get_name())
    for child in table.get_children():
        runs_later = child.get_type() == "function" and child.get_name() not in _COMPREHENSIONS
        _collect(child, unit, at_once and not runs_later)


def _table(node: ast.stmt, path: str) -> symtable.SymbolTable:
    # Annotations stay text on the server (see `functions`), so it does not need their names.
    return symtable.symtable("from __future__ import annotations\n" + ast.unparse(node), path, "exec")


def _bound_symbols(node: ast.stmt, path: str) -> Iterator[tuple[str, symtable.Symbol]]:
    for symbol in _table(node, path).get_symbols():
        name = symbol.get_name()
        if symbol.is_assigned() or (symbol.is_imported() and name != "annotations"):
            yield name, symbol


def _subscripted_names(node: ast.stmt) -> Iterator[str]:
    """Yield the names of containers in which the statement sets or deletes an item."""
    for each in ast.walk(node):
        match each:
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
                yield name


def _mentions_name_of_module(test: ast.expr) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "__name__" for node in ast.walk(test))


def _is_literal_assignment(node: ast.Assign | ast.AnnAssign) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return (
        node.value is not None
        and _is_literal(node.value)
        and all(_is_plain_target(target) for target in targets)
    )


def _is_plain_target(target: ast.expr) -> bool:
    if isinstance(target, (ast.Tuple, ast.List)):
        return all(_is_plain_target(each) for each in target.elts)
    return isinstance(target, ast.Name)


def _assigned_names(node: ast.Assign | ast.AnnAssign) -> Iterator[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    for target in targets:
        for each in ast.walk(target):
            if isinstance(each, ast.Name):
                yield each.id


def _is_literal(node: ast.expr) -> bool:
    match node:
        case ast.Constant():
            return True
        case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
            return all(_is_literal(item) for item in items)
        case ast.Dict(keys=keys, values=values):
            return all(key is not None and _is_literal(key) for key in keys) and all(map(_is_literal, values))
        case _:
            return _is_number(node)


def _is_number(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=int() | float() | complex()):
            return True
        case ast.UnaryOp(operand=operand):
            return _is_number(operand)
        case ast.BinOp(left=left, right=right):
            return _is_number(left) and _is_number(right)
        case _:
            return False
