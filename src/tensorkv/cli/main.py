"""The command `tensorkv`."""

from __future__ import annotations

import os
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
    app(prog_name="tensorkv")


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
    host: Annotated[str, typer.Option(help="Address that all processes bind to.")] = "127.0.0.1",
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


def _fail(text: str, status: int) -> int:
    typer.echo(f"tensorkv: {text}", err=True)
    return status
