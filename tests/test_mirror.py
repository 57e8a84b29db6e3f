"""Every module has its tests where one looks for them: src/tensorkv/a/b.py in tests/a/test_b.py."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "tensorkv"

ELSEWHERE = {
    "__init__.py": "test_exports.py",
    "peer/shm.py": "server/test_shm.py",  # both ends, over a real connection
    **dict.fromkeys(
        ("training/servers.py", "training/steps.py", "training/workers.py"),
        "training/test_optimizer.py",  # the face of them
    ),
    "compat/gluon.py": "frameworks/test_gluon.py",
    "testing/makers.py": "conformance/test_stores.py",
    **dict.fromkeys(
        (
            "testing/bad_inputs.py",
            "testing/checks_agreement.py",
            "testing/checks_alone.py",
            "testing/checks_calls.py",
            "testing/checks_numbers.py",
            "testing/checks_policies.py",
            "testing/checks_rounds.py",
            "testing/checks_state.py",
            "testing/checks_updaters.py",
            "testing/checks_values.py",
        ),
        "testing/test_conformance.py",  # every check passes on the model, and finds the fault it is for
    ),
    **dict.fromkeys(
        ("wire/checkpoint.py", "wire/common.py", "wire/control.py", "wire/data.py", "wire/handshake.py"),
        "wire/test_messages.py",  # every message of each comes back as it was
    ),
    "store.py": "conformance",  # the contract: the suite runs it on every kind of store
}
"""Modules whose tests have another place, and which."""

MODULES = [
    path.relative_to(PACKAGE)
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py" or path.parent == PACKAGE
]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_module_has_tests(module: Path) -> None:
    place = ELSEWHERE.get(module.as_posix(), (module.parent / f"test_{module.name}").as_posix())
    assert (ROOT / "tests" / place).exists(), f"src/tensorkv/{module} should have its tests in tests/{place}"


def test_no_exception_is_stale() -> None:
    assert set(ELSEWHERE) <= {module.as_posix() for module in MODULES}


def test_packages_hold_only_a_docstring() -> None:
    """`__init__.py` of a folder has no code, so there is nothing in it to test."""
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE:
            lines = [
                line
                for line in path.read_text(encoding="utf-8").split('"""')[-1].splitlines()
                if line.strip()
            ]
            assert lines == [], f"{path.relative_to(ROOT)} has code"
