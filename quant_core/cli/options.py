"""Values of options, checked while the command line is parsed."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..errors import OptionError

PARTS_HELP = "of an all-in-one checkpoint: some of model,te,vae (default model); all else is copied as it is"


def path(text: str) -> Path:
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("is no name of a file or folder")
    return Path(text)


def number(text: str) -> float:
    value = float(text)
    if value != value:
        raise argparse.ArgumentTypeError("nan is no number to compare with")
    return value


def above_zero(text: str) -> float:
    value = number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def split_amount(text: str) -> str:
    from ..planning.splitting import amount

    try:
        amount(text)
    except OptionError as e:
        raise argparse.ArgumentTypeError(str(e)) from e
    return text


def regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as e:
        raise argparse.ArgumentTypeError(f"no regular expression: {e}") from e
    return text


def parts(text: str) -> tuple[str, ...]:
    from ..models.parts import KINDS

    wanted = tuple(word.strip() for word in text.split(","))
    if unknown := [word for word in wanted if word not in KINDS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: use some of {','.join(KINDS)}")
    return wanted


def layer_format(text: str) -> str:
    from ..planning.costs import OPTIONS

    pattern, _, option = text.rpartition("=")
    if not pattern or option not in OPTIONS:
        raise argparse.ArgumentTypeError(f"{text!r}: write LAYER=FORMAT, FORMAT one of {', '.join(OPTIONS)}")
    regex(pattern)
    return text
