"""The command line: `artemis demo | train | generate | info | export | bench | tune`.

Results go to standard output, progress and errors to standard error; the exit status is 0 only on
success. What a user can put right ends in one line; anything else is a fault of this program and
keeps its traceback.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from transformers.utils import logging

from artemis_kernels import Unavailable

from ..errors import AdapterError
from ..out_of_memory import is_out_of_memory
from ..version import __version__
from . import bench, demo, export, generate, info, train, tune

COMMANDS = (demo, train, generate, info, export, bench, tune)
INTERRUPTED = 130  # as shells report a process ended by Ctrl-C
UNREAD = 141  # and one whose reader went away, as `head` does


class _Parser(argparse.ArgumentParser):
    """Reports bad usage in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    args = _parser().parse_args(arguments)
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, args.command)
            try:
                args.run(args)
            finally:
                _flush_output()
    except KeyboardInterrupt:
        print("artemis: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return UNREAD
    except (AdapterError, Unavailable, OSError) as error:
        return _failed(args.command, error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return _failed(args.command, error)
    return 0


def _flush_output() -> None:
    """Have what cannot be written fail now; what is left goes nowhere, for Python tries again."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _failed(command: str, error: Exception) -> int:
    print(f"artemis {command}: {_one_line(error)}", file=sys.stderr)
    return 1


def _show_warning(command: str, message: Warning, *details) -> None:
    """What `warnings.warn` prints, without the place in the source."""
    print(f"artemis {command}: warning: {_one_line(message)}", file=sys.stderr)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="artemis", description="Hybrid adapters for transformer models.")
    parser.add_argument("--version", action="version", version=f"artemis {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Parser
    )
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.NAME,
            help=command.SUMMARY,
            description=f"{command.SUMMARY[0].upper()}{command.SUMMARY[1:]}.",
            epilog=f"example:\n{command.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser
