"""The command `tensorkv`."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from tensorkv.errors import InvalidArgument

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # errors as plain lines, which can be searched and piped; and no import of rich
    help="A parameter server for PyTorch.",
)


def main() -> None:
    """Run the command line of this process; raises SystemExit at the end."""
    _open_closed_streams()
    try:
        app(prog_name="tensorkv")
    except OSError as exc:  # a full disk, for example
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # drop the remaining output instead of retrying it
        sys.exit(_fail(str(exc), 1))
    finally:
        _drop_errors_that_cannot_be_written()


def _drop_errors_that_cannot_be_written() -> None:
    """Let the interpreter not retry, at its end, what stderr has not taken: the status would be 120 then."""
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _open_closed_streams() -> None:
    """Redirect standard streams that the caller has closed (`>&-`) to /dev/null.

    Otherwise the next files to be opened would get their numbers.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(null, True)
            setattr(sys, name, open(null, mode))  # noqa: SIM115  # for as long as this process


def _count(number: int) -> int:
    """Check a number of processes; the parser prefixes the error with the option."""
    if number < 1:
        raise typer.BadParameter(f"{number} is too few; at least one is needed.")
    return number


def _seconds(number: float | None) -> float | None:
    if number is not None and not number > 0:
        raise typer.BadParameter(f"{number:g} is no time to wait; more than 0 seconds are needed.")
    return number


NumWorkers = Annotated[int, typer.Option("--workers", "-n", callback=_count, help="Number of workers.")]
NumServers = Annotated[int, typer.Option("--servers", "-s", callback=_count, help="Number of servers.")]
"""Options that are the same in every command; `_known` accepts their names in `tensorkv.spawn`, too."""

_OPTION_NAMES = {
    "num_workers": ("-n", "--workers", "--num-workers"),
    "num_servers": ("-s", "--servers", "--num-servers"),
}


def _known(name: str) -> str:
    """Return the canonical name of an option: --num-workers is --workers."""
    return {"num-workers": "workers", "num-servers": "servers"}.get(name, name)


class _Run(TyperCommand):
    """Keeps the words of the command line as typed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["tensorkv.words"] = list(args)
        return super().parse_args(ctx, args)


def misplaced(command: Sequence[str]) -> list[tuple[str, str]]:
    """Find words in `command` that look like a number of workers or servers: parameter, option as typed."""
    found = []
    for name, options in _OPTION_NAMES.items():
        for place, word in enumerate(command[1:], 1):
            option, equals, value = word.partition("=")
            if not equals:
                value = command[place + 1] if place + 1 < len(command) else ""
            if option in options and value.isdecimal():
                found.append((name, word if equals else f"{word} {value}"))
            elif re.fullmatch(f"{options[0]}[0-9]+", word):
                found.append((name, word))
    return found


def _warn_of_misplaced(ctx: typer.Context, command: Sequence[str]) -> None:
    """Warn of options after the command, which receives them although the user may mean the launcher."""
    words: list[str] = ctx.meta["tensorkv.words"]
    if words[: -len(command)][-1:] == ["--"]:
        return  # the user marked where the command begins
    for name, written in misplaced(command):
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "DEFAULT":
            _tell(
                f"{written} stands after {command[0]!r} and goes to that; if it is meant for the launcher, "
                f"put it before the command: tensorkv run {written} {command[0]} ..."
            )


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


@app.command(
    cls=_Run,
    context_settings={"allow_interspersed_args": False, "token_normalize_func": _known},
    short_help="Run a job: a scheduler, servers, and a command as each worker.",
)
def run(
    ctx: typer.Context,
    command: Annotated[list[str], typer.Argument(metavar="COMMAND", help="What each worker runs.")],
    num_workers: NumWorkers = 1,
    num_servers: NumServers = 1,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="HOST",
            help="Address that all processes bind to: IPv4, IPv6 (::1) or a name; localhost if not given.",
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", callback=_seconds, help="Deadline of a waiting call; 1800 if not given."
        ),
    ] = None,
    peer_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            callback=_seconds,
            help="A host that is silent so long counts as lost; 10 if not given.",
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
    torch_env: Annotated[
        bool,
        typer.Option(
            "--torch-env",
            help="Also set RANK, WORLD_SIZE, MASTER_ADDR and so on as torchrun does, for scripts that make a "
            "process group.",
        ),
    ] = False,
) -> None:
    """Run a job on this machine: a scheduler, servers, and COMMAND as each worker.

    Options go before the command; what follows belongs to it:

    \b
        tensorkv run -n 4 -s 2 python train.py --epochs 3

    Ends with the status of the first process that failed (128 + signal number for a signal, 1 for a
    server), or 0. A worker that fails where stores say on_worker_loss="continue" does not count if others
    succeed. Ctrl-C ends the whole job, a second one at once.
    """
    from tensorkv.config import check_transport
    from tensorkv.launch.local import CommandNotFound, JobOptions, run_local

    _warn_of_misplaced(ctx, command)
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
            torch_env=torch_env,
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
        from tensorkv.transport.memorylimits import with_the_way_out

        status = _fail(f"the job could not be started: {with_the_way_out(exc)}", 1)
    raise typer.Exit(status)


@app.command(context_settings={"token_normalize_func": _known}, short_help="Measure what a step costs.")
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
    num_workers: NumWorkers = 2,
    num_servers: NumServers = 2,
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

    \b
        tensorkv bench --model bert-base --optimizer adam
        tensorkv bench --sizes 4KB..256MB --plot bandwidth.png

    Starts jobs of its own on this machine. In a job that is there it measures that one, as each worker:

    \b
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
    _tell(text)
    return status


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # stderr cannot be written
        typer.echo(f"tensorkv: {text}", err=True)
