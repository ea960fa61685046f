"""The entry point: runs one command, and turns an error into one line and an exit code."""

import shlex
import sys

import typer

from chanscale.commands import UnfinishedRun, app
from chanscale.compare_command import compare
from chanscale.cross_validate_command import cross_validate
from chanscale.delta_commands import restore, verify
from chanscale.deploy_commands import export, latency
from chanscale.display import complain, program
from chanscale.errors import ChanscaleError, lacks_memory
from chanscale.explain_command import explain
from chanscale.files import describe_refusal
from chanscale.followers import is_follower, sign
from chanscale.leaks_command import leaks
from chanscale.learning_curve_command import learning_curve
from chanscale.report_command import report
from chanscale.stability_command import stability
from chanscale.tune_command import tune
from chanscale.weights_commands import weights_app

FAILED, INTERRUPTED = 2, 130

for command in (
    compare,
    cross_validate,
    explain,
    export,
    latency,
    leaks,
    learning_curve,
    report,
    restore,
    stability,
    tune,
    verify,
):
    app.command()(command)
app.add_typer(weights_app, name="weights")


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
        return _fail(describe_refusal(error))
    except UnfinishedRun as stop:
        complain(f"{stop}; go on after the last whole epoch with: {_resume(arguments)}")
        return INTERRUPTED if isinstance(stop.__cause__, KeyboardInterrupt) else FAILED
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        return _fail("out of memory; use a smaller --image-size or --micro-batch, or another --device")
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED and not is_follower():
        complain("interrupted; nothing half-written is left")
    return code if isinstance(code, int) else 0


def _fail(message: object) -> int:
    complain(f"{sign()}error: {message}")
    return FAILED


def _describe_usage(error: typer.TyperException) -> str:
    message = error.format_message().rstrip(".") if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    return f"{message}; see `{context.command_path} --help`" if context else message


def _resume(arguments: list[str]) -> str:
    again = arguments if "--resume" in arguments else [*arguments, "--resume"]
    return f"{program()} {shlex.join(again)}"
