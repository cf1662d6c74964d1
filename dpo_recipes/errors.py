"""The error that ends a run before it starts."""


class RecipeError(Exception):
    """The call or the data is wrong and nothing was started: one message, no traceback, exit status 2.

    The message says what was got, what is needed and what to do.
    """
