"""Reads a function of the user's that scores an answer, named as FILE.py:FUNCTION."""

import inspect
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_recipes.errors import RecipeError


def names_function(name: str) -> bool:
    """Returns True for the name of a function in a file, also for one that lacks the function."""
    return ".py:" in name or name.endswith(".py")


def read_function(name: str, *, columns: bool = False) -> Callable[..., Any]:
    """Returns the function that FILE.py:FUNCTION names; it is called with a prompt and an answer.

    Args:
        name: The file and the function.
        columns: Whether the caller gives it columns of the dataset too: see `columns_of`.

    Raises:
        RecipeError: If there is no such function, or it needs columns and the caller has none.
    """
    file, _, function = name.rpartition(":")
    if not function or not Path(file).is_file():
        raise RecipeError(f"There is no file {file or name}, or no function is named: --judge FILE.py:FUNCTION.")
    try:
        found: Callable[..., Any] | None = runpy.run_path(file).get(function)
    except SyntaxError as error:
        raise RecipeError(f"{file}, line {error.lineno}: {error.msg}.") from error
    if found is None or not callable(found):
        raise RecipeError(f"{file} has no function {function}. Write def {function}(prompt, answer) -> float there.")
    if not columns and (more := columns_of(found)):
        raise RecipeError(
            f"{function} in {file} needs {', '.join(more)} besides the prompt and the answer, and only the verb sample "
            "has columns of the dataset. Name a function of two arguments."
        )
    return found


def columns_of(function: Callable[..., Any]) -> list[str]:
    """Returns the names of the arguments after prompt and answer that have no default: columns of the dataset."""
    arguments = list(inspect.signature(function).parameters.values())[2:]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [each.name for each in arguments if each.default is each.empty and each.kind in named]
