"""The verbs `list` and `copy`; finds recipes, profiles and accelerate files, and reads them without running them."""

import ast
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import yaml

from dpo_recipes.errors import RecipeError
from dpo_recipes.flags import did_you_mean
from dpo_recipes.terminal import say


def add_parser(commands: Any) -> None:
    """Adds the verbs to the subparsers of `dpo-recipes`."""
    listing = commands.add_parser("list", help="list the recipes", examples=["list"])
    listing.set_defaults(call=lambda options, flags: say(as_table(list_recipes())))

    examples = ["copy hh-rlhf-lora", "copy hh-rlhf-lora mine.py"]
    copying = commands.add_parser("copy", help="copy a recipe here, to make it yours", examples=examples)
    copying.add_argument("recipe", metavar="RECIPE", help="a name from `dpo-recipes list`")
    copying.add_argument("destination", nargs="?", metavar="DEST", help="file or folder; by default the current folder")
    copying.set_defaults(call=lambda options, flags: say(copy_recipe(options.recipe, options.destination)))


def copy_recipe(name: str, destination: str | None = None) -> str:
    """Copies a recipe to a file or folder, by default here, and returns what to run next.

    Raises:
        RecipeError: If there is no such recipe, or the copy would replace a file.
    """
    recipe = find_recipe(name)
    copy = Path(destination or recipe.name)
    if copy.is_dir():
        copy = copy / recipe.name
    if copy.suffix != ".py":
        raise RecipeError(f"Got {copy} as the copy's name, which must end in .py, or be a folder that exists.")
    if copy.exists():
        raise RecipeError(
            f"{copy} exists already, and it may hold your changes. Name another: dpo-recipes copy {name} FILE.py."
        )
    try:
        shutil.copyfile(recipe, copy)
    except OSError as error:
        raise RecipeError(f"Cannot write {copy}: {error.strerror}.") from error
    return f"{copy} is yours to change. Train it with: dpo-recipes train {shlex.quote(str(copy))}"


def recipe_folders() -> list[Path]:
    """The folders of recipes: ./recipes of the current folder first, then the folder that came with the package."""
    package = Path(__file__).parent
    packaged = package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"
    return [folder for folder in (Path("recipes"), packaged) if folder.is_dir()]


def list_recipes() -> dict[str, str]:
    """Each recipe's name as typed on the command line, with the first line of its docstring."""
    files = {path.stem: path for folder in reversed(recipe_folders()) for path in folder.glob("[!_]*.py")}
    return {name.replace("_", "-"): _first_line(files[name]) for name in sorted(files)}


def find_recipe(name: str, *, beside: Path | None = None) -> Path:
    """The recipe's file: `name` itself if it is a path, else NAME.py in `beside` or one of the recipe folders.

    Raises:
        RecipeError: If there is none; the message lists what there is.
    """
    if name.endswith(".py") or os.sep in name:
        if Path(name).is_file():
            return Path(name)
        raise RecipeError(f"There is no file {name}. Give the path of a recipe, or a name from `dpo-recipes list`.")
    for folder in ([beside] if beside else []) + recipe_folders():
        if (path := folder / f"{name.replace('-', '_')}.py").is_file():
            return path
    known = list_recipes()
    meant = did_you_mean(name.replace("_", "-"), known)
    raise RecipeError(f"There is no recipe {name}.{meant} There are:\n{as_table(known)}")


def as_recipe(name: str) -> Path | None:
    """The file of the recipe; None if the name is a file, a folder, or has a slash or a dot, as data and models have.

    Raises:
        RecipeError: If it is none of these, and there is no such recipe.
    """
    is_other = not name.endswith(".py") and (Path(name).exists() or "/" in name or "." in name)
    return None if is_other else find_recipe(name)


def find_settings(kind: str, name: str, *, recipe: Path) -> Path:
    """The YAML file `name`: a path, or NAME.yaml in the folder `kind` beside the recipe or in a recipe folder.

    Raises:
        RecipeError: If there is none; the message lists what there is.
    """
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    for folder in (recipe.parent, *recipe_folders()):
        if (path := folder / kind / f"{name}.yaml").is_file():
            return path
    known = names_of(kind, recipe.parent)
    meant = did_you_mean(name, known)
    raise RecipeError(
        f"recipes/{kind} has no {name}.{meant} Give the path of a YAML file, or one of: {', '.join(known)}."
    )


def names_of(kind: str, *folders: Path) -> list[str]:
    """Names of the YAML files in the folder `kind` of these folders and of the recipe folders."""
    return sorted({path.stem for folder in (*folders, *recipe_folders()) for path in folder.glob(f"{kind}/*.yaml")})


def recipe_setting(recipe: Path, key: str) -> str | None:
    """The string that `RECIPE = dict(...)` gives to `key`; None if the key is missing or its value is computed."""
    for statement in _parse(recipe).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="RECIPE")], value=ast.Call(keywords=keywords)):
                match {keyword.arg: keyword.value for keyword in keywords}.get(key):
                    case ast.Constant(value=str(value)):
                        return value
    return None


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a profile or an accelerate file.

    Raises:
        RecipeError: If the file is not a YAML mapping, or a key stands in it twice.
    """
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise RecipeError(f"{path} holds a {type(settings).__name__}, where `name: value` lines are needed.")
    return settings


class _Loader(yaml.SafeLoader):
    """yaml's safe loader, which refuses a key that stands twice instead of taking the later value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping, whose keys differ."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(
                "in a mapping", node.start_mark, f"{twice[0]} stands twice: remove one of the lines", node.start_mark
            )
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def as_table(rows: dict[str, str]) -> str:
    """Names with their meaning, one to a line."""
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {name:<{width}}  {meaning}".rstrip() for name, meaning in rows.items())


def _parse(recipe: Path) -> ast.Module:
    try:
        return ast.parse(recipe.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise RecipeError(f"{recipe} cannot be read as Python: {error}.") from error


def _first_line(recipe: Path) -> str:
    try:
        return (ast.get_docstring(_parse(recipe)) or "").partition("\n")[0]
    except RecipeError as error:
        return str(error)
