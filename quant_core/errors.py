"""The one error type of the engine."""


class CalibQuantError(Exception):
    """A problem with an input or output that the user can act on.

    The message is one line and names the file, the layer where there is one, and the remedy.
    The command line prints it as ``error: …`` and exits with 1; the nodes show it as it is.
    """


class OptionError(CalibQuantError):
    """A value of an option that makes no sense: wrong usage, so the command line exits with 2."""
