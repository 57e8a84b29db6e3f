"""MXNet 1.9.1 in an environment of its own: it needs a NumPy that nothing else here would run with."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ENV_PYTHON = "TENSORKV_BENCH_MXNET_PYTHON"
REQUIREMENTS = ("numpy==1.23.5", "mxnet==1.9.1")
_PYTHONS = ("python3.11", "python3.10", "python3.9", "python3.8")  # those numpy 1.23.5 was built for

_INSTALL_S = 900.0
_CHECK_S = 120.0


class NoMXNet(Exception):
    """MXNet cannot be run here; the text says why and what to do."""


def default_cache() -> Path:
    """Return the folder in which the environment is made unless another is given."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tensorkv-benchmarks"


def mxnet_python(given: str | None, cache: Path) -> str:
    """Return the path of an interpreter that can import MXNet 1.9.1, making an environment if need be.

    Args:
        given: the interpreter to use; None means what TENSORKV_BENCH_MXNET_PYTHON says, or else one in
            an environment under `cache`, which is made if it is not there.
        cache: a folder; PIP_ARGS in the environment is passed on to pip.

    Raises:
        NoMXNet: it cannot be imported, or not be installed.
    """
    given = given or os.environ.get(ENV_PYTHON)
    if given:
        return _checked(given)
    folder = cache / "mxnet-1.9.1"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        _make(folder, python)
        _checked(str(python))
        (folder / "complete").touch()
    return _checked(str(python))


def _checked(python: str) -> str:
    code = "import mxnet; print(mxnet.__version__)"
    env = {name: value for name, value in os.environ.items() if not name.startswith("DMLC_")}
    env.pop("PYTHONPATH", None)
    try:
        done = subprocess.run([python, "-c", code], env=env, capture_output=True, text=True, timeout=_CHECK_S)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise NoMXNet(f"{python} cannot be run: {exc}") from exc
    if done.returncode != 0 or done.stdout.strip() != "1.9.1":
        raise NoMXNet(f"{python} has no MXNet 1.9.1:\n{done.stdout[-500:]}{done.stderr[-1500:]}")
    return python


def _make(folder: Path, python: Path) -> None:
    base = next((found for name in _PYTHONS if (found := shutil.which(name))), None)
    if base is None:
        raise NoMXNet(
            f"MXNet 1.9.1 needs one of {', '.join(_PYTHONS)}; install one, or name an interpreter that has "
            f"MXNet with --mxnet-python or {ENV_PYTHON}"
        )
    pip_args = shlex.split(os.environ.get("PIP_ARGS", ""))
    _run([base, "-m", "venv", "--clear", str(folder)])
    _run([str(python), "-m", "pip", "install", "--disable-pip-version-check", *pip_args, *REQUIREMENTS])


def _run(command: list[str]) -> None:
    print("+", shlex.join(command), file=sys.stderr)
    try:
        subprocess.run(command, check=True, timeout=_INSTALL_S, stdout=sys.stderr)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as exc:
        raise NoMXNet(f"an environment for MXNet could not be made: {exc}") from exc
