"""The entry point: runs one command, and turns an error into one line and an exit code."""

import shlex
import sys

import typer

from chanscale.commands import app
from chanscale.display import complain, program
from chanscale.errors import ChanscaleError

FAILED, INTERRUPTED = 2, 130
RESUMABLE = ("fit", "demo")


def main() -> None:
    """Run the command that the process was started with, and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code. The one place where an error becomes a line."""
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments or ["--help"], prog_name="chanscale", standalone_mode=False)
    except ChanscaleError as error:
        return _fail(error)
    except typer.TyperException as error:
        return _fail(_describe_usage(error))
    except OSError as error:
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        complain(_describe_interrupt(arguments))
    return code if isinstance(code, int) else 0


def _fail(message: object) -> int:
    complain(f"error: {message}")
    return FAILED


def _describe_usage(error: typer.TyperException) -> str:
    message = error.format_message().rstrip(".") if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    return f"{message}; see `{context.command_path} --help`" if context else message


def _describe_interrupt(arguments: list[str]) -> str:
    if arguments[:1] and arguments[0] in RESUMABLE:
        again = arguments if "--resume" in arguments else [*arguments, "--resume"]
        return f"interrupted; go on after the last whole epoch with: {program()} {shlex.join(again)}"
    return "interrupted; nothing was written"
