"""The command line, ``fleetfit``: one module of commands for each thing that a person wants to do.

The only place that prints; results on stdout, all else on stderr.

Exit codes: 0 done, 1 an error that is said in a sentence, 2 wrong usage, 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

import sys

try:
    import contextlib
    import os
    from typing import Annotated, Any

    import typer

    from fleetfit.cli import (
        adapt,
        cache,
        doctor,
        evaluate,
        export,
        fleet,
        init,
        plan,
        predict,
        pretrain,
        profile,
        recipes,
        run,
    )
except KeyboardInterrupt:
    sys.stderr.write("stopped\n")
    raise SystemExit(130) from None

app = typer.Typer(
    name="fleetfit",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start here: [bold]fleetfit run digits[/bold]. Trouble? [bold]fleetfit doctor[/bold].",
)

app.command(no_args_is_help=True)(run.run)
app.command(no_args_is_help=True)(plan.plan)
app.command(no_args_is_help=True)(run.report)
app.command(no_args_is_help=True)(export.export)
app.command(no_args_is_help=True)(predict.predict)
app.command(no_args_is_help=True)(evaluate.evaluate)
app.command(no_args_is_help=True)(adapt.adapt)
app.command(no_args_is_help=True)(pretrain.pretrain)
app.command()(recipes.recipes)
app.command()(cache.cache)
app.command()(init.init)
app.command()(profile.profile)
app.command(no_args_is_help=True)(fleet.provision)
app.command(no_args_is_help=True)(fleet.start)
app.command()(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        import fleetfit

        typer.echo(f"fleetfit {fleetfit.__version__}")
        raise typer.Exit


@app.callback()
def fleetfit_(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fit one big Transformer to every device of a fleet.

    Each device gets a model of its own: small enough for its storage, frugal with
    its energy, fitted to its private data, which never leaves it.
    The method is ACME (arXiv 2507.14802).
    """


def main() -> None:
    """The program ``fleetfit``."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a sign is no reason to fail
    code: Any = 1
    try:
        app()
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        code = 130
    except BrokenPipeError:
        code = 1
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        code = 1
    except OSError as error:
        typer.echo(f"error: stdout: {error.strerror}", err=True)
        _discard_stdout()
        code = 1
    sys.exit(code)


def _discard_stdout() -> None:
    """Nobody reads it any more: let Python's own flush at exit go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
