"""`synthlong VERB`: registers the verbs and turns errors into one line and an exit code."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
import time
import traceback
import warnings
from typing import Any

import typer

from . import (
    atlas,
    augment,
    check,
    demo,
    detect,
    evaluate,
    export,
    fit,
    generate,
    prepare,
    replay,
    report,
    train,
    verify,
)
from .options import each_with

__all__ = ["app", "main"]

_AT_ONCE_S = 1.0

app = typer.Typer(
    name="synthlong",
    help="Synthetic longitudinal MS lesion data from single-visit FLAIR scans.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("check")(check.check)
app.command("prepare")(prepare.prepare)
app.command("generate")(generate.generate)
app.command("verify")(verify.verify)
app.command("report")(report.report)
app.command("export")(export.export)
app.command("replay")(replay.replay)
app.command("augment")(augment.augment)
app.command("atlas")(atlas.atlas)
app.command("fit")(fit.fit)
app.add_typer(train.app, name="train")
app.command("detect")(detect.detect)
app.command("evaluate")(evaluate.evaluate)


@app.callback(invoke_without_command=True)
def options(version: bool = typer.Option(False, "--version", help="Show the version and exit.")) -> None:
    """Synthetic longitudinal MS lesion data from single-visit FLAIR scans."""
    if version:
        from synthlong import __version__

        typer.echo(__version__)
        raise typer.Exit


class _Terminated(BaseException):
    """SIGTERM, so that `finally` blocks run."""


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if category.__name__ == "InputWarning":
        print(f"warning: {message}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code (0 done, 1 some failed, 2 usage, 3 environment, 130, 143)."""
    ours = arguments is None  # the process, that is, and not only the call
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    terminated = False

    def on_sigterm(_signal: int, _frame: Any) -> None:
        nonlocal terminated
        terminated = True
        raise _Terminated

    interrupted = -math.inf

    def on_sigint(_signal: int, _frame: Any) -> None:
        nonlocal interrupted
        before, interrupted = interrupted, time.monotonic()
        if interrupted - before > _AT_ONCE_S:  # a second one would only disturb what the first has begun
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, on_sigterm)
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the caller has it ignored
        signal.signal(signal.SIGINT, on_sigint)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        words = each_with(arguments, "--weights", ".safetensors")
        result = app(words, prog_name="synthlong", standalone_mode=False)
        if result == 130:  # the argument parser's word for Ctrl-C
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would only disturb what libraries do at exit
        _say(f"stopped{_way_on(arguments)}")
        return 130
    except (_Terminated, Exception) as error:
        if terminated:  # whatever a library has made of it
            _say(f"terminated{_way_on(arguments)}")
            return 143
        if debug:
            traceback.print_exc()
        return _explain(error)


def _say(text: str) -> None:
    """Print to stderr, once for all processes of a training."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr)


def _way_on(arguments: list[str]) -> str:
    return (
        f"; go on with: {shlex.join(['synthlong', *arguments])}"
        if arguments[:1] in (["generate"], ["fit"], ["train"], ["prepare"])
        else ""
    )


def _explain(error: BaseException) -> int:
    from synthlong.errors import SynthlongError, short

    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
        return 2
    if hasattr(error, "format_message"):  # a usage error of the argument parser
        hint = getattr(getattr(error, "ctx", None), "command_path", "synthlong")
        print(f"error: {error.format_message().rstrip('.')}; see `{hint} --help`", file=sys.stderr)
        return 2
    if isinstance(error, SynthlongError):
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, OSError):
        where = f"{short(error.filename)}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; check path, permission and free space", file=sys.stderr)
        return 3
    print(f"error: {type(error).__name__}: {error}; run again with --debug for the traceback", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
