"""Functions travel by name: what `describe` refuses, and what `load` will and will not execute."""

from __future__ import annotations

import builtins
import functools
import hashlib
import json
import os
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import msgspec
import pytest

from tensorkv.errors import NotShippable
from tensorkv.updaters.functions import CodeRef, describe, load

AsMain = Callable[[str], types.ModuleType]


@pytest.fixture(autouse=True)
def _keep_interpreter_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("tensorkv_script_"):
            del sys.modules[name]


@pytest.fixture
def as_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsMain:
    """Execute a script as `python script.py` would, in this process, and return its `__main__`."""

    def run(source: str) -> types.ModuleType:
        path = tmp_path / "script.py"
        path.write_text(dedent(source))
        main = types.ModuleType("__main__")
        main.__file__ = str(path)
        monkeypatch.setitem(sys.modules, "__main__", main)
        exec(compile(path.read_text(), str(path), "exec", dont_inherit=True), vars(main))
        return main

    return run


def script_ref(path: Path, name: str) -> CodeRef:
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return CodeRef(module="__main__", name=name, script=str(path), sha256=sha256)


def module_level(key: int, pushed: int, stored: int) -> int:
    return pushed + stored


# ---- describe --------------------------------------------------------------------------------------


def test_a_function_of_a_module_is_its_module_and_name() -> None:
    assert describe(module_level) == CodeRef(module=__name__, name="module_level")
    assert describe(OrderedDict) == CodeRef(module="collections", name="OrderedDict")


def test_a_ref_survives_msgpack() -> None:
    ref = CodeRef(module="__main__", name="f", script="/s.py", sha256="ab", package="p", adapter="a:b")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(ref), type=CodeRef) == ref


class Callable_:
    def __call__(self) -> None: ...

    def method(self) -> None: ...

    @staticmethod
    def static() -> None: ...

    class Inner: ...


def closure() -> Callable[[], int]:
    x = 1

    def inner() -> int:
        return x

    return inner


def nested() -> type:
    class Local: ...

    return Local


@pytest.mark.parametrize(
    ("obj", "text"),
    [
        (lambda: None, "a lambda"),
        (closure(), r"inner is defined inside closure\(\) and uses x of it"),
        (nested(), r"Local is defined inside nested\(\);"),
        (Callable_().method, "the method Callable_.method"),
        (Callable_.method, "Callable_.method belongs to a class"),
        (Callable_.static, "Callable_.static belongs to a class"),
        (Callable_.Inner, "Callable_.Inner belongs to a class"),
        (Callable_(), "an object of class Callable_"),
        (functools.partial(module_level, 1), "the partial of module_level"),
        ([].append, "list.append belongs to a class or object"),
        (None, "an object of class NoneType"),
        ("update", "an object of class str"),
    ],
)
def test_what_has_no_name_is_refused_with_advice(obj: Any, text: str) -> None:
    with pytest.raises(NotShippable, match=text) as info:
        describe(obj)
    assert "--allow-import" in str(info.value)


def test_a_name_that_stands_for_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    first = module_level
    monkeypatch.setitem(globals(), "module_level", closure())
    with pytest.raises(NotShippable, match="module_level is not the function that was passed"):
        describe(first)


def test_a_function_of_the_script(as_main: AsMain, tmp_path: Path) -> None:
    main = as_main("def update(key, pushed, stored): stored += pushed")
    assert describe(main.update) == script_ref(tmp_path / "script.py", "update")


def test_missing_names_of_the_script_are_all_listed(as_main: AsMain) -> None:
    main = as_main(
        """
        import math
        kv = dict(a=1)
        rates = [1, 2]
        def helper(): return kv, math
        def update(key, pushed, stored): return helper(), rates, undefined
        """
    )
    with pytest.raises(NotShippable) as info:
        describe(main.update)
    text = str(info.value)
    assert "kv: line 3:" in text
    assert "undefined: the script does not define it" in text
    assert "rates" not in text
    assert "math" not in text


def test_a_function_of_the_script_that_is_replaced_or_hidden_is_refused(as_main: AsMain) -> None:
    main = as_main(
        """
        def one(): pass
        first = one
        def one(): pass
        def two(): pass
        two = dict(f=two)["f"]
        if __name__ == "__main__":
            def three(): pass
        """
    )
    with pytest.raises(NotShippable, match=r"one in .* is not the function that was passed"):
        describe(main.first)
    with pytest.raises(NotShippable, match="two: line 6"):
        describe(main.two)
    with pytest.raises(NotShippable, match=r"three: line 7: it is bound under `if __name__"):
        describe(main.three)


def test_a_decorated_function_of_the_script(as_main: AsMain) -> None:
    main = as_main(
        """
        import functools
        def loud(f):
            @functools.wraps(f)
            def call(*args): return "loud", f(*args)
            return call
        @loud
        def update(x): return x
        """
    )
    assert load(describe(main.update), ())(3) == ("loud", 3)


def test_a_function_typed_after_the_script_is_refused(as_main: AsMain) -> None:
    main = as_main("def update(): pass")
    exec(compile("def update(): return 2", "<stdin>", "exec"), vars(main))
    with pytest.raises(NotShippable, match="was defined in <stdin>, not in the script"):
        describe(main.update)


def test_a_main_without_a_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    main = types.ModuleType("__main__")
    exec("def update(): pass", vars(main))
    monkeypatch.setitem(sys.modules, "__main__", main)
    with pytest.raises(NotShippable, match="notebook, an interactive session or with -c"):
        describe(main.update)


DESCRIBE = (
    "import json, msgspec, tensorkv.updaters.functions as F\n"
    "def update(): return 'found'\n"
    "try: print(json.dumps(msgspec.to_builtins(F.describe(update))))\n"
    "except F.NotShippable as e: print(json.dumps(str(e)))\n"
)


def run_python(arguments: list[str], folder: Path) -> str:
    """Run Python in `folder`, with DESCRIBE as its input, and return what it prints."""
    source = Path(sys.modules["tensorkv.updaters.functions"].__file__ or "").parents[2]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(source)},
        input=DESCRIBE,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=50,
    )
    return done.stdout


@pytest.mark.parametrize("how", ["-c", "-"])
def test_python_without_a_script(how: str) -> None:
    arguments = ["-c", DESCRIBE] if how == "-c" else ["-"]
    done = run_python(arguments, Path.cwd())
    assert "with -c" in json.loads(done)


def test_a_real_script_and_a_module_run_with_m(tmp_path: Path) -> None:
    package = tmp_path / "job"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "beside.py").write_text("VALUE = 'relative'\n")
    (package / "train.py").write_text(
        DESCRIBE.replace("def update", "from .beside import VALUE\ndef update").replace("'found'", "VALUE")
    )
    (tmp_path / "train.py").write_text(DESCRIBE)
    for arguments, package_name, answer in (
        (["train.py"], "", "found"),
        (["-m", "job.train"], "job", "relative"),
    ):
        done = run_python(arguments, tmp_path)
        ref = msgspec.convert(json.loads(done), CodeRef)
        assert (ref.module, ref.package) == ("__main__", package_name)
        sys.path.insert(0, str(tmp_path))
        assert load(ref, ())() == answer
    for name in [name for name in sys.modules if name.partition(".")[0] == "job"]:
        del sys.modules[name]


def test_functions_does_without_torch() -> None:
    code = "import sys, tensorkv.updaters.functions; print('torch' in sys.modules)"
    assert run_python(["-c", code], Path.cwd()) == "False\n"


# ---- load from the script --------------------------------------------------------------------------


def test_only_definitions_of_the_script_are_executed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    trace = tmp_path / "trace"
    script.write_text(
        dedent(
            f"""
            from __future__ import annotations
            import os, sys
            from typing import TYPE_CHECKING
            if TYPE_CHECKING:
                import no_such_module
            try:
                import another_missing_module
                open({str(trace)!r}, "a").write("after the import")
            except ImportError:
                another_missing_module = None
            def mark(what):
                with open({str(trace)!r}, "a") as file:
                    file.write(what)
            shape = (2, 3)
            rate: float = -0.5
            mark("top")
            os.environ["TENSORKV_TEST"] = "set"
            for _ in range(2): mark("loop")
            with open({str(trace)!r}, "a") as f: f.write("with")
            if mark("condition"): pass
            if True: mark("if")
            result = mark("assignment")
            listed = [mark("comprehension") for _ in range(1)]
            try: mark("try")
            finally: mark("finally")
            class Helper:
                def scale(self, x: no_such_module.T): return x * rate
            def update(key, pushed, stored):
                stored[0] += Helper().scale(pushed) + len(shape)
            if __name__ == "__main__": mark("main")
            sys.exit(mark("exit"))
            """
        )
    )
    stored = [1.0]
    load(script_ref(script, "update"), ())("w", 4, stored)
    assert stored == [1.0]  # 1 + 4 * -0.5 + 2
    assert not trace.exists()


def test_a_script_is_executed_once_in_a_module_of_its_own(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("count = [0]\ndef one(): count[0] += 1\ndef two(): return count[0]\n")
    one, two = load(script_ref(script, "one"), ()), load(script_ref(script, "two"), ())
    one()
    assert two() == 1
    assert one.__module__ not in ("__main__", "script")
    assert sys.modules[one.__module__].__file__ == str(script)


def test_a_script_finds_the_modules_beside_it_and_dataclasses_work(tmp_path: Path) -> None:
    (tmp_path / "beside_the_script.py").write_text("def add(a, b): return a + b\n")
    script = tmp_path / "script.py"
    script.write_text(
        "from dataclasses import dataclass\nfrom beside_the_script import add\n"
        "@dataclass\nclass Pair:\n    a: int\n    b: 'int' = 2\n"
        "def update(): p = Pair(1); return add(p.a, p.b)\n"
    )
    assert load(script_ref(script, "update"), ())() == 3
    del sys.modules["beside_the_script"]


def test_another_script_on_the_server_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("def update(): return 1\n")
    ref = script_ref(script, "update")
    script.write_text("def update(): return 2\n")
    with pytest.raises(NotShippable, match=r"script.py differs on the server"):
        load(ref, ())
    script.unlink()
    with pytest.raises(NotShippable, match="cannot read the job's script"):
        load(ref, ())


def test_a_script_path_must_be_an_absolute_file(tmp_path: Path) -> None:
    for path in ("script.py", str(tmp_path), "/dev/zero", "x\0y"):
        with pytest.raises(NotShippable, match="cannot read the job's script"):
            load(CodeRef(module="__main__", name="f", script=path, sha256=""), ())


@pytest.mark.parametrize(
    "name", ["system", "os", "VALUE", "print", "lost", "__builtins__", "update.__globals__"]
)
def test_only_functions_and_classes_made_by_the_script_are_found(tmp_path: Path, name: str) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os\nfrom os import system\nVALUE = 3\ndef update(): pass\n")
    with pytest.raises(NotShippable):
        load(script_ref(script, name), ())


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("import no_such_module_at_all\ndef update(): pass", "No module named 'no_such_module_at_all'"),
        ("@int\ndef update(): pass", "definitions of .* fail on the server"),
        ("def update(:", "is not a Python script"),
        ("def update(): pass\0", "is not a Python script"),
    ],
)
def test_definitions_that_fail_are_reported(tmp_path: Path, source: str, text: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(source)
    before = set(sys.modules)
    with pytest.raises(NotShippable, match=text):
        load(script_ref(script, "update"), ())
    assert set(sys.modules) == before


def test_an_exit_during_an_import_does_not_end_the_server(tmp_path: Path) -> None:
    (tmp_path / "module_that_exits.py").write_text("raise SystemExit(3)\n")
    script = tmp_path / "script.py"
    script.write_text("import module_that_exits\ndef update(): pass\n")
    with pytest.raises(NotShippable, match="SystemExit"):
        load(script_ref(script, "update"), ())
    with pytest.raises(NotShippable, match="cannot import module_that_exits: SystemExit"):
        load(CodeRef(module="module_that_exits", name="f"), ["module_that_exits"])


# ---- load from a module ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.optimizers", "x"),
        ("torch.optim_", "x"),
        ("tensorkv_evil", "x"),
        ("tensorkv.__main__", "main"),
        ("__main__", "main"),
        ("tensorkv/../os", "system"),
        ("tensorkv..os", "system"),
        (".tensorkv", "x"),
        ("tensorkv.", "x"),
        ("tensorkv.os:system", "x"),
        ("tensorkv\n", "x"),
        ("", "system"),
        ("my", "update"),
        ("mypackage", "update"),
    ],
)
def test_modules_that_are_not_allowed_are_not_imported(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    attempted: list[str] = []

    def record(name: str, *_: Any, **__: Any) -> None:
        attempted.append(name)

    text = ""
    with monkeypatch.context() as patch:  # pytest itself imports while it checks
        patch.setattr("importlib.import_module", record)
        patch.setattr(builtins, "__import__", record)
        try:
            load(CodeRef(module=module, name=name), ["mypackage.training"])
        except NotShippable as exc:
            text = str(exc)
    assert "--allow-import" in text
    assert attempted == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("tensorkv.config", "os"),  # a module
        ("tensorkv.config", "field"),  # of dataclasses
        ("tensorkv.config", "os.system"),
        ("tensorkv.config", "os:system"),
        ("tensorkv.updaters.functions", "_execute_definitions.__globals__"),
        ("tensorkv.config", "ENV_RANK"),  # text
        ("tensorkv.config", "no_such_name"),
        ("tensorkv.config", ""),
        ("tensorkv.config", "__builtins__"),
        ("tensorkv.no_such_module", "x"),
        ("tensorkv.updaters.functions", "__class__"),
        ("tensorkv.updaters.functions", "Any"),
    ],
)
def test_an_attribute_of_an_allowed_module_does_not_lead_out_of_it(module: str, name: str) -> None:
    with pytest.raises(NotShippable):
        load(CodeRef(module=module, name=name), ())


def test_optimizers_of_torch_and_functions_of_ours_are_found() -> None:
    import torch

    assert load(describe(torch.optim.SGD), ()) is torch.optim.SGD
    assert load(CodeRef(module="torch.optim", name="AdamW"), ()) is torch.optim.AdamW
    assert load(describe(describe), ()) is describe


def test_an_allowed_package_allows_its_submodules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "allowed_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "updates.py").write_text("from os import system\ndef update(): return 'here'\n")
    monkeypatch.syspath_prepend(tmp_path)
    ref = CodeRef(module="allowed_package.updates", name="update")
    with pytest.raises(NotShippable, match=r"--allow-import allowed_package\.updates"):
        load(ref, ["allowed", "allowed_package.other"])
    assert "allowed_package" not in sys.modules
    assert load(ref, ["allowed_package"])() == "here"
    assert load(ref, ["allowed_package.updates"])() == "here"
    with pytest.raises(NotShippable, match="not a function or class of a module servers may import"):
        load(CodeRef(module="allowed_package.updates", name="system"), ["allowed_package"])
    for name in ("allowed_package", "allowed_package.updates"):
        del sys.modules[name]


# ---- adapters --------------------------------------------------------------------------------------


class Adapter:
    __tensorkv_adapter__ = "tensorkv.test_adapter:Adapter"

    def __init__(self, function: Any) -> None:
        self.function = function


@pytest.fixture
def adapter_module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("tensorkv.test_adapter")
    monkeypatch.setattr(Adapter, "__module__", "tensorkv.test_adapter")
    vars(module).update(Adapter=Adapter, Other=type("Other", (), {"__module__": "tensorkv.test_adapter"}))
    monkeypatch.setitem(sys.modules, "tensorkv.test_adapter", module)
    return module


@pytest.mark.usefixtures("adapter_module")
def test_an_adapter_travels_by_name_with_its_function() -> None:
    ref = describe(Adapter(module_level))
    assert ref == CodeRef(module=__name__, name="module_level", adapter="tensorkv.test_adapter:Adapter")
    loaded = load(ref, [__name__])
    assert isinstance(loaded, Adapter)
    assert loaded.function is module_level
    with pytest.raises(NotShippable, match="lambda"):
        describe(Adapter(lambda: None))


@pytest.mark.usefixtures("adapter_module")
@pytest.mark.parametrize(
    "adapter",
    [
        "os:system",
        "tensorkv.updaters.functions:load",
        "tensorkv.test_adapter:Other",
        "tensorkv.test_adapter:lost",
        "tensorkv.test_adapter",
        ":",
        "tensorkv.updaters.functions:os:system",
    ],
)
def test_nothing_else_is_taken_for_an_adapter(adapter: str) -> None:
    with pytest.raises(NotShippable, match=r"not an adapter of TensorKV|not a function or class"):
        load(CodeRef(module=__name__, name="module_level", adapter=adapter), [__name__])


def test_a_script_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.py"
    with path.open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(NotShippable, match="more than 16777216 bytes"):
        load(CodeRef(module="__main__", name="f", script=str(path), sha256="0" * 64), ())
