"""Functions of the user's that score an answer, named as FILE.py:FUNCTION."""

import pytest

from dpo_recipes.errors import RecipeError
from dpo_recipes.models.functions import columns_of, names_function, read_function


def test_arguments_after_prompt_and_answer_without_a_default_are_columns():
    def check(prompt, answer, reference, least=1, *rest, unit, most=2, **more):
        return 0.0

    assert columns_of(check) == ["reference", "unit"]
    assert columns_of(lambda prompt, answer: 0.0) == []


def test_a_function_that_needs_columns_is_refused_where_there_are_none(tmp_path):
    (tmp_path / "check.py").write_text("def check(prompt, answer, reference): return 0.0\n")
    name = f"{tmp_path}/check.py:check"
    assert names_function(name)
    assert read_function(name, columns=True)("", "", "") == 0.0
    with pytest.raises(
        RecipeError, match="needs reference besides the prompt and the answer, and only the verb sample has"
    ):
        read_function(name)
