"""The rules of the house: who may import whom, and what stays out of which layer."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "tensorkv"

LAYERS = {
    **dict.fromkeys(("errors", "addresses", "config", "plain", "interrupts", "work"), 0),
    **dict.fromkeys(
        ("store", "bound", "arguments", "keys", "arrays", "reduce", "norms", "partition", "tracers"), 1
    ),
    **dict.fromkeys(("updaters", "checkpoint"), 1),
    "wire": 2,
    "transport": 3,
    "peer": 4,
    **dict.fromkeys(("server", "scheduler", "worker"), 5),
    "launch": 6,
    "stores": 7,
    **dict.fromkeys(("bench", "compat", "testing", "training"), 8),
    "cli": 9,
    **dict.fromkeys(("__init__", "__main__"), 10),
}
"""The layer of each module or folder of the package. docs/architecture.md has the same table."""

SHARED_LAYER = 1
"""In this layer parts may import each other; in every other one a folder imports lower ones and itself."""

PURE_PARTS = [name for name, layer in LAYERS.items() if layer in (1, 2)]
"""Parts without a socket, thread or clock. Files are for those of `checkpoint` that are named for it."""

ROLES = ("peer", "server", "scheduler", "worker")
SHELLS = {
    *("peer.handshake", "peer.admission", "peer.deadlines", "peer.shm"),
    *("server.loop", "server.shm", "server.statefiles"),
    "scheduler.loop",
    *("worker.session", "worker.link", "worker.control", "worker.interleave", "worker.hold"),
    *("worker.driver", "worker.pusher", "worker.backpressure", "worker.pullcall"),
    *("worker.window", "worker.lending", "worker.latch"),
    *("worker.signals", "worker.uncaught", "worker.checkpoint"),
}
"""Files with threads, sockets, shared memory or a clock. The roles' other files are pure, and import none."""

IMPURE_MODULES = {"threading", "socket", "time", "asyncio", "selectors", "signal", "subprocess"}
FILE_MODULES = {"os", "io", "pathlib", "shutil", "tempfile", "fcntl"}
FILE_MODULES |= {"tensorkv.checkpoint.files", "tensorkv.checkpoint.folder", "tensorkv.checkpoint.tensorfile"}
SOCKET_FOLDERS = {"transport", "launch", "bench"}
ENVIRONMENT_PLACES = {"config", "launch", "cli", "bench"}

TENSOR_MAKERS = (
    r"torch\.(empty|zeros|ones|full|tensor|as_tensor|asarray|scalar_tensor|eye|arange|linspace|rand\w*)"
)

TORCH_FREE = [
    "tensorkv",
    "tensorkv.errors",
    "tensorkv.addresses",
    "tensorkv.config",
    "tensorkv.plain",
    "tensorkv.interrupts",
    "tensorkv.work",
    "tensorkv.updaters.spec",
    "tensorkv.checkpoint.records",
    "tensorkv.updaters.functions",
    "tensorkv.launch.local",
    "tensorkv.launch.place",
    "tensorkv.launch.sidecar",
    "tensorkv.launch.spawn",
    "tensorkv.launch.torchrun",
    "tensorkv.scheduler.loop",
    "tensorkv.cli.main",
    "tensorkv.bench.command",
]
"""What launchers and the scheduler load. `import torch` takes over a second and 220 MB."""


def _modules() -> dict[str, Path]:
    """Return every module of the package: its name below `tensorkv`, and its file."""
    found: dict[str, Path] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


MODULES = _modules()


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def _imports(module: str) -> Iterator[tuple[int, str]]:
    """Yield line and full name of everything a module imports, also inside its functions."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute"
            assert node.module is not None
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _inside(name: str) -> str | None:
    """Return the part of the package that an imported name belongs to; None if it is another package."""
    parts = name.split(".")
    if parts[0] != "tensorkv":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "__init__"


def _part(module: str) -> str:
    return module.split(".", 1)[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_or_stay_in_the_folder(module: str) -> None:
    own = _part(module)
    assert own in LAYERS, f"{own} has no layer: enter it in LAYERS of {Path(__file__).name}"
    for line, name in _imports(module):
        target = _inside(name)
        if target is None or target == own or name == "tensorkv.__version__":
            continue
        allowed = LAYERS[target] < LAYERS[own] or LAYERS[target] == LAYERS[own] in (0, SHARED_LAYER)
        assert allowed, f"{module}:{line}: imports {name} of layer {LAYERS[target]} from layer {LAYERS[own]}"


def test_every_layer_entry_exists() -> None:
    parts = {_part(module) for module in MODULES}
    assert sorted(set(LAYERS) - parts) == []


def test_architecture_has_the_same_table() -> None:
    page = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", page, re.M)
    told = {
        name.rstrip("/"): int(layer) for layer, names in rows for name in re.findall(r"`([\w/]+)`", names)
    }
    assert told == LAYERS


def test_transport_knows_no_message() -> None:
    for module in (each for each in MODULES if _part(each) == "transport"):
        for line, name in _imports(module):
            assert not name.startswith("tensorkv.wire.messages"), f"{module}:{line}: imports {name}"


def _is_pure(module: str) -> bool:
    part = _part(module)
    return part in PURE_PARTS or (part in ROLES and module not in SHELLS)


@pytest.mark.parametrize("module", [each for each in MODULES if _is_pure(each)])
def test_the_core_is_pure(module: str) -> None:
    for line, name in _imports(module):
        assert name.split(".")[0] not in IMPURE_MODULES, f"{module}:{line}: imports {name}"
        shell = name.startswith("tensorkv.transport") or _module_of(name) in SHELLS
        assert not shell, f"{module}:{line}: imports {name}, which is not pure"


def test_every_shell_exists() -> None:
    assert sorted(SHELLS - set(MODULES)) == []


def _module_of(name: str) -> str:
    """Return the module an imported name is or is of: "server.shm" for "tensorkv.server.shm.Sharing"."""
    below = name.removeprefix("tensorkv.")
    return below if below in MODULES else below.rpartition(".")[0]


@pytest.mark.parametrize("module", [each for each in MODULES if _part(each) in ROLES and _is_pure(each)])
def test_the_core_opens_no_files(module: str) -> None:
    for line, name in _imports(module):
        found = [each for each in FILE_MODULES if f"{name}.".startswith(f"{each}.")]
        assert found == [], f"{module}:{line}: imports {name}"
    for node in ast.walk(_tree(module)):
        opened = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open"
        assert not opened, f"{module}:{node.lineno}: opens a file"


@pytest.mark.parametrize("module", MODULES)
def test_sockets_and_environment_have_their_places(module: str) -> None:
    if _part(module) not in SOCKET_FOLDERS:
        for line, name in _imports(module):
            assert name.split(".")[0] != "socket", f"{module}:{line}: sockets are for transport/"
    if _part(module) not in ENVIRONMENT_PLACES:
        for node in ast.walk(_tree(module)):
            read = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
            assert not read, f"{module}:{node.lineno}: environment variables are for config.py"


def test_nothing_is_unpickled() -> None:
    refused = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    for module in MODULES:
        for line, name in _imports(module):
            assert name.split(".")[0] not in refused, f"{module}:{line}: imports {name}"


def _on_a_device(node: ast.AST) -> bool:
    """Whether a node is `with torch.device(...)`, or a call that says on which device its tensor is."""
    if isinstance(node, ast.With):
        return any(ast.unparse(item.context_expr).startswith("torch.device(") for item in node.items)
    return isinstance(node, ast.Call) and "device" in {keyword.arg for keyword in node.keywords}


def _made_on_the_default_device(node: ast.AST) -> Iterator[ast.Call]:
    if _on_a_device(node):
        return
    if isinstance(node, ast.Call) and re.fullmatch(TENSOR_MAKERS, ast.unparse(node.func)):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _made_on_the_default_device(child)


@pytest.mark.parametrize("module", [each for each in MODULES if _part(each) != "testing"])
def test_no_tensor_is_made_on_the_default_device(module: str) -> None:
    """A script may have set it to anything: `torch.set_default_device`, `with torch.device("cuda")`."""
    for call in _made_on_the_default_device(_tree(module)):
        asks_which_it_is = module == "updaters.optimizer" and ast.unparse(call) == "torch.empty(0)"
        if not asks_which_it_is:
            pytest.fail(f"{module}:{call.lineno}: say on which device: {ast.unparse(call)}")


def test_no_cycles_between_modules() -> None:
    """No module needs itself to be loaded, by way of others."""
    graph = {module: _needed_at_import(module) for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join((*path, module))}"
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def _needed_at_import(module: str) -> set[str]:
    needed: set[str] = set()
    for node in _tree(module).body:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            below = name.removeprefix("tensorkv.")
            for candidate in (below, below.rpartition(".")[0]):
                if name != below and candidate in MODULES and candidate != module:
                    needed.add(candidate)
                    break
    return needed


def test_launcher_and_scheduler_do_without_torch() -> None:
    missing = [name for name in TORCH_FREE if _spec_missing(name)]
    assert missing == [], "rename them in TORCH_FREE too"
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    command = [sys.executable, "-c", script, *TORCH_FREE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr


def test_a_worker_imports_neither_servers_nor_progress_bars() -> None:
    """They would make up half of what `import tensorkv` takes beside torch, in every worker of a job."""
    script = (
        "import sys, tensorkv.stores.registry, tensorkv.stores.dist\n"
        "needless = {'rich', 'tensorkv.server.loop', 'tensorkv.scheduler.loop'}\n"
        "sys.exit(str(sorted(found)) if (found := needless & set(sys.modules)) else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr


def _spec_missing(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:
        return True
