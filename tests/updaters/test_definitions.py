"""What of a script counts as a definition."""

from __future__ import annotations

import ast
from textwrap import dedent

import pytest

from tensorkv.updaters.definitions import Definitions


def read(source: str) -> Definitions:
    return Definitions(dedent(source).encode(), "script.py")


def kept(source: str) -> str:
    return ast.unparse(read(source).tree)


@pytest.mark.parametrize(
    "statement",
    [
        "import os",
        "import os.path as p",
        "from os import path",
        "from os import *",
        "def f(a, b=1):\n    return a",
        "async def f():\n    pass",
        "class C(Exception):\n    x = 1",
        "A = 1",
        "A = B = -1.5",
        "A: int = 3",
        "A, (B, C) = (1, ('x', None))",
        "A = {'a': [1, 2, {3}], 'b': (True, b'x')}",
        "A = 60 * 60 - 2 ** 3 + 1j",
        "A = []",
    ],
)
def test_definitions_are_kept_as_they_are(statement: str) -> None:
    assert kept(statement) == statement


@pytest.mark.parametrize(
    "statement",
    [
        "print('hello')",
        "A = f()",
        "A = [f() for _ in range(3)]",
        "A = {**B}",
        "A = f'{x}'",
        "A = B",
        "A: int",
        "A += 1",
        "x.y = 1",
        "for i in range(3):\n    import os",
        "while True:\n    A = 1",
        "with open('x') as f:\n    A = 1",
        "assert True",
        "del A",
        "raise ValueError",
        "'only a docstring'",
        "if __name__ == '__main__':\n    A = 1",
        "if '__main__' == __name__:\n    import os",
        "if __name__ == '__main__' and True:\n    def f(): pass\nelse:\n    A = 2",
        "if main():\n    A = 1",
        "if unknown:\n    A = 1",
        "if (A := 3):\n    B = 1",
        "if True:\n    main()",
        "try:\n    main()\nexcept KeyboardInterrupt:\n    A = 1",
        "match 1:\n    case 1:\n        A = 1",
    ],
)
def test_everything_else_is_left_out(statement: str) -> None:
    assert kept(statement) == ""
    assert not read(statement).provides("A")


def test_try_keeps_its_shape() -> None:
    text = kept(
        """
        try:
            import fast
            train()
        except ImportError:
            fast = None
            print("slow")
        else:
            HAVE = True
        finally:
            stop()
        """
    )
    assert text == "try:\n    import fast\nexcept ImportError:\n    fast = None\nelse:\n    HAVE = True"


def test_an_if_is_kept_where_its_condition_only_looks() -> None:
    source = "import sys\nif sys.version_info >= (3, 12):\n    import a as m\nelse:\n    import b as m"
    assert kept(source) == source
    called = "import torch\nif torch.cuda.is_available():\n    D = 'cuda'\nelse:\n    D = 'cpu'"
    assert kept(called) == called
    elif_ = "X = 1\nif X == 2:\n    A = 1\nelif hasattr(X, 'real'):\n    A = 2"
    assert kept(elif_) == elif_


def test_an_if_under_an_imported_call_is_not_evaluated() -> None:
    found = read("import job\nif job.start():\n    A = 1")
    assert found.missing("A") == [
        "A: line 2: it is bound under an `if` whose condition servers do not evaluate"
    ]


@pytest.mark.parametrize(
    "again",
    [
        "A = compute()",
        "A += 1",
        "for A in range(3):\n    pass",
        "with open('x') as A:\n    pass",
        "A['x'] = 1",
        "del A['x']",
        "if __name__ == '__main__':\n    A = 2",
        "(A := 5)",
        "def A(x=unknown): pass",
    ],
)
def test_a_name_bound_again_by_another_statement_is_not_provided(again: str) -> None:
    found = read(f"A = {{}}\ndef f():\n    return A\n{again}")
    assert not found.provides("A")
    (line,) = found.missing("f")
    assert line.startswith("A: line 4: ")


@pytest.mark.parametrize(
    "body",
    [
        "return missing",
        "return [missing for _ in range(3)]",
        "return [x for x in missing]",
        "return lambda: missing",
        "def g():\n        return missing",
        "class C(missing): pass",
        "class C:\n        y = missing",
        "class C:\n        def g(self): return missing",
        "global z; z = missing",
        "import os\n    return missing.path",
        "return f'{missing}'",
    ],
)
def test_names_are_found_wherever_a_function_uses_them(body: str) -> None:
    assert read(f"def f():\n    {body}").missing("f") == ["missing: the script does not define it"]


def test_local_names_builtins_and_annotations_need_nothing() -> None:
    found = read(
        """
        def f(a, *rest: Unknown, key=None, **more) -> Unknown:
            import os
            from sys import path as p
            local: Unknown = 1
            try:
                print(len(rest), __name__, __file__)
            except OSError as exc:
                raise ValueError(exc)
            for i, (j, k) in enumerate(more):
                with open(key) as file, (lambda q: q)(a):
                    file.write([x + i + j + k for x in p] + [os, local])
            def g(b):
                nonlocal local
                local = b
                return f(b)
            return g
        """
    )
    assert found.missing("f") == []


def test_names_are_followed_through_functions_and_classes_of_the_script() -> None:
    source = """
        import numpy as np
        def f(): return Helper().run()
        class Helper:
            def run(self): return deep()
        def deep(): return np.zeros(size)
        size = choose()
        def other(): return lost
    """
    assert read(source).missing("f") == [
        "size: line 7: a statement that servers do not execute binds or changes it"
    ]


def test_what_a_def_needs_at_once_must_come_from_definitions() -> None:
    source = """
        app = App()
        @app.command()
        def main(): pass
        def f(x=app): pass
        class C(app.Base): pass
        def g(): return main, C
    """
    found = read(source)
    assert kept(source) == "def g():\n    return (main, C)"
    assert found.missing("f") == ["f: line 5: its decorators, defaults or bases need app, which servers lack"]
    assert [line.partition(":")[0] for line in found.missing("g")] == ["C", "main"]


def test_decorators_of_the_script_and_of_modules_are_definitions() -> None:
    source = """
        import torch
        def twice(f): return f
        @twice
        @torch.no_grad()
        def g(): pass
    """
    assert read(source).missing("g") == []


def test_a_global_that_only_the_worker_changes_is_missing() -> None:
    source = """
        rate = 1
        count = 0
        def update():
            global count
            count += 1
            return rate
        def main():
            global rate
            rate = 2
    """
    assert read(source).missing("update") == ["rate: line 8: main changes it, and only on the worker"]
    assert read(source).missing("main") == []


def test_a_star_import_provides_what_is_known_to_be_there() -> None:
    found = read("from torch.nn import *\nclass Net(Module): pass\ndef f(): return Net, Linear, Lost")
    assert found.has_star
    assert found.missing("f", known={"Module", "Linear"}) == ["Lost: the script does not define it"]
    assert read("def f(): return Linear").missing("f", known={"Linear"}) != []


def test_a_script_that_is_not_python() -> None:
    with pytest.raises(SyntaxError):
        read("def f(:")
