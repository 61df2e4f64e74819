"""The command line: ``calibquant COMMAND …``. Results go to stdout, progress and warnings to stderr.

Exit codes: 0 done; 1 a problem with an input or output (one line ``error: …``); 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from types import ModuleType

from .. import __version__
from ..errors import CalibQuantError, OptionError
from ..files.disk import discard_unfinished, reason
from . import calibration, compare, convert, demo, inspect, lora, plan, probe, quantize, queue

COMMANDS: dict[str, ModuleType] = {  # each has HELP, options(parser) and run(arguments)
    "inspect": inspect,
    "probe": probe,
    "plan": plan,
    "quantize": quantize,
    "compare": compare,
    "convert": convert,
    "lora": lora,
    "calibration": calibration,
    "queue": queue,
    "demo": demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    restored = {}
    if threading.current_thread() is threading.main_thread():
        restored = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        discard_unfinished()
        print("interrupted: no unfinished file was left", file=sys.stderr)
        if argv is None:  # the process ends: let no late signal disturb it
            for number in restored:
                signal.signal(number, signal.SIG_IGN)
            restored.clear()
        return 130
    finally:
        for number, before in restored.items():
            signal.signal(number, before)


def _run(argv: Sequence[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a cp1252 pipe on Windows must not die of an arrow
            stream.reconfigure(encoding="utf-8", errors="replace")
    args = build_parser(argv).parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
        return 0
    except OptionError as e:
        print(f"usage error: {e} (see calibquant {args.command} --help)", file=sys.stderr)
        return 2
    except CalibQuantError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `calibquant inspect … | head`
        sys.stderr.close()
        return 0
    except OSError as e:  # of a path that nobody looked at before
        print(f"error: {CalibQuantError(f'{e.filename}: {reason(e)}')}", file=sys.stderr)
        return 1


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser. Only the command that is called gets its options: some need torch, which takes long to import."""
    parser = argparse.ArgumentParser(prog="calibquant", description="Turn a 16-bit diffusion model into a small file.")
    parser.add_argument("--version", action="version", version=f"calibquant {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    called = next((word for word in argv if not word.startswith("-")), None)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        command.set_defaults(run=module.run, command=name)
        if name == called:
            module.options(command)
    return parser


def _interrupt(*_: object) -> None:
    """The first signal unwinds the work; those that come while it cleans up are ignored."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return
        error = error.__context__
    raise KeyboardInterrupt
