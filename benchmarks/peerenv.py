"""Virtual environments for other systems: MXNet needs a NumPy that nothing else here works with."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_INSTALL_S = 900.0
_CHECK_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A system in its own environment: module `name`, its version, and pip's requirements.

    `pythons` are the interpreters that `requirements` support, in order of preference.
    """

    name: str
    version: str
    requirements: tuple[str, ...]
    pythons: tuple[str, ...]

    @property
    def variable(self) -> str:
        """Environment variable that names an interpreter with this system."""
        return f"TENSORKV_BENCH_{self.name.upper()}_PYTHON"

    @property
    def option(self) -> str:
        """Command-line option that names one."""
        return f"--{self.name}-python"


MXNET = Peer(
    name="mxnet",
    version="1.9.1",
    requirements=("numpy==1.23.5", "mxnet==1.9.1"),
    pythons=("python3.11", "python3.10", "python3.9", "python3.8"),
)
RAY = Peer(
    name="ray",
    version="2.60.0",
    requirements=("numpy==2.4.6", "ray==2.60.0"),
    pythons=("python3.11", "python3.12", "python3.13"),
)
PEERS = (MXNET, RAY)


class NoPeer(Exception):
    """A peer cannot run here; the text says why and what to do."""


def default_cache() -> Path:
    """Return the default folder of the environments."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tensorkv-benchmarks"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `peer_pythons` reads to a parser."""
    for peer in PEERS:
        parser.add_argument(
            peer.option,
            metavar="PYTHON",
            help=f"an interpreter that has {peer.name} {peer.version} (or {peer.variable})",
        )
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        metavar="FOLDER",
        help="where an environment for each is made if none is named (%(default)s)",
    )


def peer_pythons(
    systems: Sequence[str], arguments: argparse.Namespace, on_missing: Callable[[Peer, NoPeer], None]
) -> dict[str, str]:
    """Return the interpreters of the peers among `systems`, by name.

    Omits an unavailable peer, and calls `on_missing` with it and the reason.
    """
    pythons: dict[str, str] = {}
    for peer in PEERS:
        if peer.name in systems:
            given = getattr(arguments, f"{peer.name}_python")
            try:
                pythons[peer.name] = peer_python(peer, given, arguments.cache)
            except NoPeer as missing:
                on_missing(peer, missing)
    return pythons


def peer_python(peer: Peer, given: str | None, cache: Path) -> str:
    """Return the path of an interpreter that can import the peer, creating an environment if needed.

    Args:
        peer: the peer.
        given: the interpreter to use; None means that of the peer's variable, else one in an
            environment under `cache`, which is created if missing.
        cache: a folder; PIP_ARGS in the environment is passed on to pip.

    Raises:
        NoPeer: it cannot be imported or installed.
    """
    given = given or os.environ.get(peer.variable)
    if given:
        return _checked(peer, given)
    folder = cache / f"{peer.name}-{peer.version}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        _make(peer, folder, python)
        _checked(peer, str(python))
        (folder / "complete").touch()
    return _checked(peer, str(python))


def _checked(peer: Peer, python: str) -> str:
    code = f"import {peer.name}; print({peer.name}.__version__)"
    env = {name: value for name, value in os.environ.items() if not name.startswith("DMLC_")}
    env.pop("PYTHONPATH", None)
    try:
        done = subprocess.run([python, "-c", code], env=env, capture_output=True, text=True, timeout=_CHECK_S)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise NoPeer(f"{python} cannot be run: {exc}") from exc
    if done.returncode != 0 or done.stdout.strip() != peer.version:
        text = f"{done.stdout[-500:]}{done.stderr[-1500:]}"
        raise NoPeer(f"{python} has no {peer.name} {peer.version}:\n{text}")
    return python


def _make(peer: Peer, folder: Path, python: Path) -> None:
    base = next((found for name in peer.pythons if (found := shutil.which(name))), None)
    if base is None:
        raise NoPeer(
            f"{peer.name} {peer.version} needs one of {', '.join(peer.pythons)}; install one, or name an "
            f"interpreter that has it with {peer.option} or {peer.variable}"
        )
    pip_args = shlex.split(os.environ.get("PIP_ARGS", ""))
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *pip_args]
    _run(peer, [base, "-m", "venv", "--clear", str(folder)])
    _run(peer, [*pip, *peer.requirements])


def _run(peer: Peer, command: list[str]) -> None:
    print("+", shlex.join(command), file=sys.stderr)
    try:
        subprocess.run(command, check=True, timeout=_INSTALL_S, stdout=sys.stderr)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as exc:
        raise NoPeer(f"an environment for {peer.name} could not be made: {exc}") from exc
