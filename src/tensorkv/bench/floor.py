"""The floor: what one synchronous step costs on this machine when nothing but the bytes is paid for.

In a step every worker hands its gradients to the servers, the servers sum them into the stored values,
and every worker has the new values in its own tensors. No keys, errors, membership or updaters. Ways:

  shm    Gradients are gathered into memory that worker and server both map. The server adds them up
         there, and the workers copy the sums out. A byte on a socket says "ready" and "done".
  tcp    Blocking sockets carry 1 MiB chunks, received straight into place; reading, adding and writing
         overlap between chunks. The values lie in one piece, so nothing is gathered.
  local  One process with --devices sets of tensors: bare torch, which sums (or steps its fused SGD with
         --updater sgd) and copies.

A figure from another day or machine means nothing: measure it beside the store, in the same minutes.

    python -m tensorkv.bench.floor --set resnet50 --way shm --workers 2 --servers 2
"""

from __future__ import annotations

from tensorkv.bench.floorjob import Floor
from tensorkv.bench.floorlocal import measure_local
from tensorkv.bench.floorshm import measure_shm
from tensorkv.bench.floortcp import measure_tcp
from tensorkv.bench.steps import Plan, parse_plan, plan_parser, print_result

WAYS = ("shm", "tcp", "local")


def measure(way: str, plan: Plan, *, num_workers: int, num_servers: int) -> list[float]:
    """Return the seconds of each step of one way, seen by worker 0."""
    if way == "local":
        return measure_local(plan)
    floor = Floor(
        shapes=plan.shapes,
        num_workers=num_workers,
        num_servers=num_servers,
        warmup=plan.warmup,
        steps=plan.steps,
    )
    return measure_shm(floor) if way == "shm" else measure_tcp(floor)


def main() -> None:
    """Measure the ways asked for and print their result."""
    parser = plan_parser(__doc__)
    parser.add_argument("--way", action="append", choices=WAYS, help="may be repeated; shm by default")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--servers", type=int, default=2)
    arguments = parser.parse_args()
    plan, ways = parse_plan(arguments), arguments.way or ["shm"]
    if ways != ["local"] and (plan.updater != "assign" or plan.num_devices != 1):
        parser.error("only --way local has an updater and devices")
    if plan.dtype != "float32":
        parser.error("a floor moves float32; ask for a size")
    print_result(
        {
            way: measure(way, plan, num_workers=arguments.workers, num_servers=arguments.servers)
            for way in ways
        }
    )


if __name__ == "__main__":
    main()
