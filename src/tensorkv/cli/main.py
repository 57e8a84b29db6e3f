"""The command `tensorkv`."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated

import typer

from tensorkv.errors import InvalidArgument

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # errors as plain lines, which can be searched and piped; and no import of rich
    help="A parameter server for PyTorch.",
)


def main() -> None:
    """Run the command line of this process; ends by SystemExit."""
    _open_closed_streams()
    try:
        app(prog_name="tensorkv")
    except OSError as exc:  # of a disk that is full, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to write is dropped, not tried again
        sys.exit(_fail(str(exc), 1))


def _open_closed_streams() -> None:
    """Have streams that the caller has closed (`>&-`) lead nowhere.

    Their numbers would be given to the next files that are opened.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(null, True)
            setattr(sys, name, open(null, mode))  # noqa: SIM115  # for as long as this process


def _print_version(wanted: bool) -> None:
    if wanted:
        from tensorkv import __version__

        typer.echo(f"tensorkv {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A parameter server for PyTorch."""


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND", help="What each worker runs.")],
    num_workers: Annotated[int, typer.Option("--num-workers", "-n", help="Number of workers.")] = 1,
    num_servers: Annotated[int, typer.Option("--num-servers", "-s", help="Number of servers.")] = 1,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="HOST",
            help="Address that all processes bind to: IPv4, IPv6 (::1) or a name; localhost if not given.",
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Deadline of a waiting call; 1800 if not given."),
    ] = None,
    peer_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="A host that is silent so long counts as lost; 10 if not given."
        ),
    ] = None,
    allow_import: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="Let servers import this module. May be repeated."),
    ] = None,
    transport: Annotated[
        str | None,
        typer.Option(
            metavar="auto|shm|tcp",
            help="How workers reach servers: shared memory, TCP, or whichever can be had; auto if not given.",
        ),
    ] = None,
    prefix: Annotated[
        bool, typer.Option("--prefix/--no-prefix", help="Name the process before each line.")
    ] = True,
) -> None:
    """Run a job on this machine: a scheduler, servers, and COMMAND as each worker.

    Options go before the command; what follows belongs to it:

        tensorkv run -n 4 -s 2 python train.py --epochs 3

    Ends with the status of the first process that failed (128 + signal number for a signal, 1 for a
    server), or 0. Ctrl-C ends the whole job, a second one at once.
    """
    from tensorkv.config import check_transport
    from tensorkv.launch.local import CommandNotFound, JobOptions, run_local

    try:
        options = JobOptions(
            command=tuple(command),
            num_workers=num_workers,
            num_servers=num_servers,
            host=host,
            timeout_s=timeout,
            peer_timeout_s=peer_timeout,
            allow_import=tuple(allow_import or ()),
            transport=None if transport is None else check_transport("transport", transport),
            prefix=prefix,
        )
    except InvalidArgument as exc:
        raise typer.BadParameter(str(exc)) from exc
    try:
        status = run_local(options, os.environ)
    except CommandNotFound as exc:
        status = _fail(str(exc), exc.status)
    except InvalidArgument as exc:
        status = _fail(str(exc), 2)
    except OSError as exc:
        status = _fail(f"the job could not be started: {exc}", 1)
    raise typer.Exit(status)


@app.command()
def bench(
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="resnet50 (if nothing is given), vgg16, bert-base, gpt2, llama-7b-layer; tiny: 1000 keys of "
            "64 floats; one: one key of 64. May be repeated.",
        ),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(metavar="4KB..256MB", help="One key of each size, fourfold each; or a list: 4KB,1MB."),
    ] = None,
    store: Annotated[str, typer.Option(help="The kind of store.")] = "dist_sync",
    transport: Annotated[
        list[str] | None,
        typer.Option(metavar="shm|tcp", help="shm and tcp if not given. May be repeated."),
    ] = None,
    num_workers: Annotated[int, typer.Option("--workers", "-n", help="Number of workers.")] = 2,
    num_servers: Annotated[int, typer.Option("--servers", "-s", help="Number of servers.")] = 2,
    optimizer: Annotated[
        str,
        typer.Option(help="assign, or one of torch on the servers: sgd (with momentum), adam..."),
    ] = "assign",
    dtype: Annotated[str, typer.Option(help="float32, float64, float16 or bfloat16.")] = "float32",
    steps: Annotated[int, typer.Option(help="Steps of each kind; 0: as many as fill --seconds.")] = 0,
    seconds: Annotated[float, typer.Option(help="Time for each kind of step.")] = 2.0,
    floor: Annotated[
        bool, typer.Option("--floor/--no-floor", help="Measure what it costs when only the bytes move.")
    ] = True,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write the figures as JSON.")] = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Draw bandwidth over size; needs matplotlib.")
    ] = None,
) -> None:
    """Measure what a step costs: every worker pushes and pulls all values.

        tensorkv bench --model bert-base --optimizer adam
        tensorkv bench --sizes 4KB..256MB --plot bandwidth.png

    Starts jobs of its own on this machine. In a job that is there it measures that one, as each worker:

        tensorkv run -n 4 -s 2 tensorkv bench --model resnet50

    Every result is checked.
    """
    from rich.console import Console

    from tensorkv.bench.command import run_bench
    from tensorkv.bench.options import BadOption, make_options

    try:
        options = make_options(
            models=model or [],
            sizes=sizes,
            kind=store,
            transports=transport or [],
            num_workers=num_workers,
            num_servers=num_servers,
            optimizer=optimizer,
            dtype=dtype,
            steps=steps,
            seconds=seconds,
            with_floor=floor,
            json=json,
            plot=plot,
        )
    except BadOption as exc:
        raise typer.BadParameter(str(exc)) from exc
    raise typer.Exit(run_bench(options, Console(width=None if sys.stdout.isatty() else 100)))


def _fail(text: str, status: int) -> int:
    with contextlib.suppress(OSError):  # nothing can be told
        typer.echo(f"tensorkv: {text}", err=True)
    return status
