"""How near TensorKV comes to a link's own speed: a step over 1 Gbit/s, against the bytes alone.

Workers run in a network namespace of their own, joined to this one by a link that is limited in both
directions. All that the workers push crosses it one way, all that they pull the other way, so a step takes
at least as long as one of the two. That is measured by a bare socket through the same link.

    sudo python benchmarks/link.py
    sudo python benchmarks/link.py --mbit 1000 --workers 2 --set resnet50
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from harness import SOURCE, Process, run_job
from rich.console import Console

from tensorkv.bench.machine import this_machine
from tensorkv.bench.shapes import FLOAT_BYTES, num_elems, shapes_of

_NETWORK = ipaddress.ip_address("198.18.0.0") + 4 * (os.getpid() % (1 << 15))
HERE, THERE = str(_NETWORK + 1), str(_NETWORK + 2)
"""Addresses in the range for benchmarks (RFC 2544); unique per process, as several may run at once."""

QUEUE = "burst 128kb latency 20ms"
CHUNK_BYTES = 1 << 20
TIMEOUT_S = 300.0

SINK = f"""
import socket, sys
with socket.create_connection(({HERE!r}, int(sys.argv[1])), timeout={TIMEOUT_S}) as sock:
    buffer = bytearray({CHUNK_BYTES})
    left = int(sys.argv[2])
    while left:
        got = sock.recv_into(buffer, min(left, len(buffer)))
        if not got:
            raise SystemExit("the link ended")
        left -= got
    sock.sendall(b"x")
"""


class NoLink(Exception):
    """This machine cannot create a limited link; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A namespace behind a limited link."""

    namespace: str
    mbit: int

    def inside(self, command: Sequence[str]) -> list[str]:
        """Return a command that runs another behind the link."""
        return ["ip", "netns", "exec", self.namespace, *command]


@contextlib.contextmanager
def limited_link(mbit: int) -> Iterator[Link]:
    """Create a namespace at THERE, joined to HERE by a link of `mbit` Mbit/s each way; remove it on exit.

    Raises:
        NoLink: it needs root, `ip` and `tc` (of iproute2), and a kernel with namespaces, veth and tbf.
    """
    if os.geteuid() != 0:
        raise NoLink("making a network namespace needs root")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise NoLink(f"making a limited link needs `{tool}` (of iproute2)")
    name = f"tkvl{os.getpid() % 100_000}"
    limit = f"root tbf rate {mbit}mbit {QUEUE}"
    try:
        for command in (
            f"ip netns add {name}",
            f"ip link add {name} type veth peer name inner netns {name}",
            f"ip addr add {HERE}/30 dev {name}",
            f"ip link set {name} up",
            f"ip -n {name} addr add {THERE}/30 dev inner",
            f"ip -n {name} link set inner up",
            f"ip -n {name} link set lo up",
            f"tc qdisc add dev {name} {limit}",
            f"tc -n {name} qdisc add dev inner {limit}",
        ):
            done = _run(command)
            if done.returncode:
                raise NoLink(f"`{command}` failed: {done.stderr.strip()}")
        yield Link(namespace=name, mbit=mbit)
    finally:
        _run(f"ip link del {name}")
        _run(f"ip netns del {name}")


def _run(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command.split(), capture_output=True, text=True, timeout=20, check=False)


def one_way_s(link: Link, size_bytes: int) -> float:
    """Return the seconds that a bare socket takes for so many bytes, acknowledgement included."""
    with socket.create_server((HERE, 0)) as listener:
        port = str(listener.getsockname()[1])
        command = link.inside([sys.executable, "-c", SINK, port, str(size_bytes)])
        with subprocess.Popen(command):
            listener.settimeout(TIMEOUT_S)
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(TIMEOUT_S)
                chunk = memoryview(bytes(CHUNK_BYTES))
                start = time.perf_counter()
                for low in range(0, size_bytes, CHUNK_BYTES):
                    sock.sendall(chunk[: size_bytes - low])
                sock.recv(1)
                return time.perf_counter() - start


def steps_s(
    link: Link, tensors: str, num_workers: int, num_servers: int, steps: int
) -> dict[str, list[float]]:
    """Return the seconds of each step of workers behind the link, by way.

    Raises:
        JobFailed: the job failed.
    """
    worker = [sys.executable, "-m", "tensorkv.bench.worker", "--kind=dist_sync", f"--set={tensors}"]
    inside = link.inside([*worker, "--warmup=1", f"--steps={steps}"])
    size = ["-n", str(num_workers), "-s", str(num_servers), "--host", HERE, "--transport", "tcp"]
    launcher = [sys.executable, "-m", "tensorkv", "run", *size, "--", *inside]
    return run_job(
        [Process(name="tensorkv run", command=launcher, env={"PYTHONPATH": str(SOURCE)})], timeout_s=TIMEOUT_S
    )


@dataclass(slots=True)
class Result:
    """Seconds of all rounds."""

    one_way_s: list[float] = field(default_factory=list)
    steps_s: dict[str, list[float]] = field(default_factory=dict)

    def lines(self, size_bytes: int, mbit: int) -> list[str]:
        """Return the results, a line for each way."""
        alone_s = statistics.median(self.one_way_s)
        ideal_s = size_bytes * 8 / mbit / 1e6
        found = [
            f"bytes alone, one way   {alone_s * 1e3:7.0f} ms   ({ideal_s * 1e3:.0f} ms at {mbit} Mbit/s)"
        ]
        for way, times_s in self.steps_s.items():
            median_s = statistics.median(times_s)
            found.append(f"{way:<22} {median_s * 1e3:7.0f} ms   {median_s / alone_s:.2f} times as long")
        return found


def measure(arguments: argparse.Namespace, console: Console) -> Result:
    """Measure in turn, and return everything."""
    result = Result()
    size_bytes = arguments.workers * num_elems(shapes_of(arguments.tensors)) * FLOAT_BYTES
    with limited_link(arguments.mbit) as link:
        for number in range(1, arguments.rounds + 1):
            with console.status(f"round {number} of {arguments.rounds}"):
                result.one_way_s.append(one_way_s(link, size_bytes))
                sizes = (arguments.workers, arguments.servers, arguments.steps)
                for way, times_s in steps_s(link, arguments.tensors, *sizes).items():
                    result.steps_s.setdefault(way, []).extend(times_s)
    console.print(this_machine().text(), highlight=False)
    console.print(
        f"{arguments.tensors}: {size_bytes / 1e6:.0f} MB each way, {arguments.workers} worker(s) behind "
        f"{arguments.mbit} Mbit/s, {arguments.servers} server(s)",
        highlight=False,
    )
    for line in result.lines(size_bytes, arguments.mbit):
        console.print(line, highlight=False)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurements of the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", dest="tensors", default="resnet50", help="a model or a size (%(default)s)")
    parser.add_argument("--mbit", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    console = Console()
    try:
        measure(arguments, console)
    except NoLink as exc:
        console.print(f"not measured: {exc}", highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
