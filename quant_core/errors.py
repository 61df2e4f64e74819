"""The engine's error type, and text from files made fit for one line of a terminal."""


def printable(text: str) -> str:
    """The text without line breaks, terminal escape codes and lone surrogates: shown as Python writes them."""
    return "".join(c if c.isprintable() or c == "\N{NO-BREAK SPACE}" else ascii(c)[1:-1] for c in text)


class CalibQuantError(Exception):
    """A problem with an input or output that the user can act on.

    The message is one line (whatever was put into it) and names the file, the layer where there is one, and the remedy.
    The command line prints it as ``error: …`` and exits with 1; the nodes show it as it is.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class OptionError(CalibQuantError):
    """A value of an option that makes no sense: wrong usage, so the command line exits with 2."""
