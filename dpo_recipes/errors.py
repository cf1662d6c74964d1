"""The errors that end a run with one message and no traceback."""


class RecipeError(Exception):
    """The call or the data is wrong and nothing was started: one message, no traceback, exit status 2.

    The message says what was got, what is needed and what to do.
    """


class UnhealthyRunError(RuntimeError):
    """A finding of `--health stop` has ended the run: one message, no traceback, exit status 1."""
