"""The command line: a group that imports a command's module only when it runs."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import click

from . import __version__
from .errors import Id3pmError

_COMMANDS = {
    "demo": "Photo to identity to engine to pictures to parity page, in one go.",
    "train": "Train a CHECKPOINT on folders of faces.",
    "wipe": "Remove the faces and vectors that a training run has kept.",
    "import": "Import a guided-diffusion or diffusers model as a CHECKPOINT.",
    "embed": "Turn photos into identity vectors with a face recognition model.",
    "export": "Export a CHECKPOINT to an ONNX step graph in a BUNDLE.",
    "build-engine": "Compile a CHECKPOINT or a BUNDLE into an engine for a target.",
    "sample": "Make pictures of an identity.",
    "control": "Sheets: guidance, identities between people, directions, noise.",
    "evaluate": "Measure whose faces a model makes, and how diverse they are.",
    "audit": "Report how invertible the templates of an FR model are.",
    "parity": "Compare an engine with the PyTorch reference, step by step.",
    "benchmark": "Measure how fast a BUNDLE runs, beside what else could run it.",
    "bisect": "Find which modules have to stay in float32 in half precision.",
    "inspect": "Show what a CHECKPOINT, BUNDLE, picture or identity file holds.",
    "verify-mark": "Say whether pictures are marked as generated, and unchanged.",
    "cache": "List or remove the TensorRT plans that are kept for the next build.",
    "bundle": "Pack, unpack, verify, sign or migrate a BUNDLE; say whom you trust.",
    "doctor": "Show what is installed for each tier, and how to get what is missing.",
}

_MODULES = {"import": "import_checkpoint"}
"""Where a command's name cannot be a module's."""


class _Stopped(BaseException):
    """A signal asks the process to end; what it has begun is tidied up first."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


@contextlib.contextmanager
def _tidy_end() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command the way Ctrl-C does.

    Python would die of them on the spot. Whoever set something else for them, as
    ``nohup`` does, is left alone, and so are threads and forked children.
    """
    process, before = os.getpid(), {}

    def stop(number: int, _: FrameType | None) -> NoReturn:
        if os.getpid() != process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise _Stopped(number)

    try:
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                with contextlib.suppress(ValueError):  # not the main thread
                    before[number] = signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LazyGroup(click.Group):
    """A click group whose commands are imported when they are called.

    The list of commands with their one-line helps stands in this file, so that
    ``--help`` needs no import at all.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which people use them."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of ``cmd_name`` and return its ``command``."""
        if cmd_name not in _COMMANDS:
            return None
        name = _MODULES.get(cmd_name, cmd_name.replace("-", "_"))
        module = importlib.import_module(f".commands.{name}", __package__)
        command: click.Command = module.command
        return command

    def format_commands(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def main(self, *args: Any, **rest: Any) -> Any:
        """Run the command line; what the terminal has no characters for is escaped."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **rest)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; our own errors become a message and an exit status."""
        try:
            with _tidy_end():
                return super().invoke(ctx)
        except Id3pmError as error:
            _say(f"error: {error}")
            ctx.exit(error.exit_status)
        except BrokenPipeError:
            raise  # the reader has enough, as `head` does; click ends quietly
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            _say(f"error: cannot use{where}: {error.strerror or error}")
            _say("  fix: check the path and its permissions")
            ctx.exit(1)
        except MemoryError:
            _say("error: there is not enough memory")
            _say("  fix: make fewer or smaller pictures at once")
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("\ninterrupted; nothing half-written was left", err=True)
            ctx.exit(130)
        except _Stopped as stop:
            name = signal.Signals(stop.number).name
            _say(f"stopped by {name}; nothing half-written was left")
            ctx.exit(128 + stop.number)


def _say(message: str) -> None:
    """Print a message; what it quotes from a file cannot steer the terminal."""
    from .commands.options import printable

    for line in message.split("\n"):
        click.echo(printable(line), err=True)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88},
)
@click.version_option(__version__, prog_name="id3pm-deploy")
def main() -> None:
    """Put identity-conditioned diffusion models into production.

    A CHECKPOINT is a folder with a trained PyTorch model, a BUNDLE a folder with what
    a device needs to run it. `id3pm-deploy demo` shows the whole way.
    """


def run() -> None:
    """Entry point of ``python -m id3pm_deploy``."""
    sys.exit(main())


if __name__ == "__main__":
    run()
