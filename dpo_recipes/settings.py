"""Refuses settings that make no sense or have no effect, by the table in settings.toml, and compares runs' settings."""

import hashlib
import importlib.util
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from dpo_recipes.errors import RecipeError

TABLE: dict[str, list[dict[str, Any]]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
OFF: tuple[Any, ...] = (None, False, 0, "", [], "no", "none")
"""Values that switch a setting off: a setting that has one of them is never refused for lack of effect."""
BOOKKEEPING = (
    *("request", "output_dir", "overwrite", "dry_run", "threshold", "health", "resume_from_checkpoint"),
    *("run_name", "report_to", "project", "logging_", "log_", "save_", "eval_", "hub_", "push_to_hub", "disable_tqdm"),
    *("dataloader_num_", "tokens_per_step", "activation_checkpointing", "gradient_checkpointing"),
)
"""Beginnings of the names of settings that do not change what is trained. Two runs may differ in these settings."""
FINITE = {"is": "(-inf, inf)", "say": "Give a finite number, or leave the setting out."}


def check_settings(values: Mapping[str, Any], kinds: Sequence[type], given: Mapping[str, int]) -> None:
    """Raises RecipeError unless every setting is in its range, is known, has an effect and finds its package.

    A setting without effect is refused where it was given in the same place as what switches it off, or in a later
    one: `--lora_r 8` is a mistake in full fine-tuning, and RECIPE's own `lora_r` beside `--use_peft false` is not.

    Args:
        values: The values of all settings, before the dataclasses are built.
        kinds: The dataclasses: RecipeArguments, a TRL config, ModelConfig.
        given: The settings that were given, each with its place: 0 RECIPE, 1 profile, 2 flags.
    """
    known = {entry.name: entry for kind in kinds for entry in fields(kind) if entry.init and entry.name in values}
    classes = {base.__name__ for kind in kinds for base in kind.__mro__}
    values = {name: values[name] for name in known}
    # A field's own `type` is no longer its hint: the parser has changed it.
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    for name in sorted(given.keys() & known):
        _check_type(name, values[name], hints[name], known[name].metadata.get("choices"))
    if "loss_weights" in values:
        values["loss_type"] = _losses_that_count(values["loss_type"], values["loss_weights"])
    ranges = list(_rows("ranges", values, classes))
    ranged = {name for name, _ in ranges}
    for name, row in [*ranges, *((name, FINITE) for name in known if name not in ranged)]:
        _check_range(name, row, values[name])
    for name, row in _rows("names", values, classes):
        for value in _as_list(values[name]) or ["[]"]:
            if value is not None and value not in row["are"]:
                raise RecipeError(f"There is no {name} {value}. There are: {', '.join(row['are'])}.")
    for name, row in _rows("effects", values, classes):
        _check_effect(name, row, values, given)
    for name, row in _rows("limits", values, classes):
        most = values[row["most"]]
        if 0 < most < values[name] and given.get(name, -1) >= given.get(row["most"], -1):
            raise RecipeError(f"Got {name}={values[name]} with {row['most']}={most}: {row['say']}. Lower {name}.")
    _check_packages(values)


def effective_settings(parsed: Sequence[Any]) -> dict[str, Any]:
    """The values of all fields of the dataclasses, by name, as JSON has them."""
    settings: dict[str, Any] = {}
    for args in parsed:
        values = args.to_dict() if isinstance(args, TrainingArguments) else asdict(args)
        settings |= {entry.name: values[entry.name] for entry in fields(args) if entry.init and entry.name in values}
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def settings_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The settings in which two runs differ, as `name: one -> other`; bookkeeping does not count."""
    return [
        f"{name}: {one.get(name)} -> {other.get(name)}"
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name) and not name.startswith(BOOKKEEPING)
    ]


def settings_hash(settings: Mapping[str, Any]) -> str:
    """A hash of what determines the result; bookkeeping does not count."""
    return hashlib.sha256("\n".join(settings_differences({}, settings)).encode()).hexdigest()[:16]


def _check_type(name: str, value: Any, hint: Any, choices: Sequence[Any] | None) -> None:
    """Raises RecipeError for a value that only YAML can hold: null, a bare `no`, a list in place of a number."""
    kinds = {*get_args(hint)} if get_origin(hint) in (Union, UnionType) else {hint}
    named = choices or any(isinstance(kind, type) and issubclass(kind, Enum) for kind in kinds)
    if value is None:
        if NoneType not in kinds:
            raise RecipeError(f"Got {name}=null, and it needs a value. Leave the line out for the default.")
        return
    if named and isinstance(value, bool) and str(value).lower() not in (choices or ()):
        raise RecipeError(f"Got {name}={value}: YAML reads a bare no, off, yes and on so. Put the word into quotes.")
    if choices and str(value) not in choices and not isinstance(value, bool):
        raise RecipeError(f"There is no {name} {value}. There are: {', '.join(map(str, choices))}.")
    if not kinds <= {int, float, NoneType, list[int], list[float]}:
        return
    listed, whole = bool(kinds & {list[int], list[float]}), not kinds & {float, list[float]}
    fits = isinstance(value, list) == listed and all(map(_is_number, _as_list(value)))
    if not fits or (whole and any(part % 1 != 0 for part in _as_list(value))):  # NaN % 1 is NaN
        what = f"a {'list with a ' if listed else ''}{'whole ' if whole else ''}number"
        raise RecipeError(f"Got {name}={value!r}, where {what} is needed.")


def _losses_that_count(losses: Any, weights: Any) -> list[Any]:
    """The losses of a mixture whose weight is not 0."""
    names, factors = _as_list(losses), _as_list(weights)
    if factors == [None] or len(factors) != len(names):  # TRL refuses another number of weights
        return names
    if not any(factors):
        raise RecipeError(f"All loss_weights of {' '.join(names)} are 0: nothing would be learned. Raise one of them.")
    return [loss for loss, weight in zip(names, factors, strict=True) if weight]


def _rows(kind: str, values: Mapping[str, Any], classes: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each setting of this call that has a row of that kind in the table, with the row."""
    for row in TABLE[kind]:
        if classes & set(row.get("of", classes)) and _matches(values, row.get("when", {}), default=True):
            yield from ((name, row) for name in row["settings"].split() if name in values)


def _matches(values: Mapping[str, Any], wanted: Mapping[str, list[Any]], *, default: bool) -> bool:
    """Returns True if one of the settings has a wanted value; `default` if this call has none of the settings."""
    there = [name for name in wanted if name in values]
    if not there:
        return default
    return any(value in wanted[name] for name in there for value in _as_list(values[name]))


def _check_range(name: str, row: Mapping[str, Any], value: Any) -> None:
    for part in _as_list(value):
        if _is_number(part) and part not in row.get("or", ()) and not _is_inside(part, row["is"]):
            besides = "".join(f", or {other}" for other in row.get("or", ()))
            raise RecipeError(f"Got {name}={part}, which must lie in {row['is']}{besides}. {row['say']}")


def _is_inside(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)  # NaN is inside of nothing


def _check_effect(name: str, row: Mapping[str, Any], values: Mapping[str, Any], given: Mapping[str, int]) -> None:
    needs, unless = row.get("needs", {}), row.get("unless", {})
    effective = _matches(values, needs, default=True) and not _matches(values, unless, default=False)
    if (effective and (needs or unless)) or name not in given or values[name] in (*OFF, *row.get("off", ())):
        return
    place = given[name]
    if place < max((given.get(switch, -1) for switch in needs | unless), default=-1) or place == row.get("left_over"):
        return  # RECIPE may keep how often it would evaluate while it does not, and a profile is for all recipes
    reasons = [f"it needs {switch} {_either(wanted)}" for switch, wanted in needs.items() if switch in values]
    reasons += [f"{switch}={values[switch]} does not read it" for switch in unless if switch in values]
    raise RecipeError(f"{name} has no effect here: {row.get('say') or ', or '.join(reasons)}. Leave it out.")


def _either(values: Sequence[Any]) -> str:
    return " or ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)


def _check_packages(values: Mapping[str, Any]) -> None:
    for row in TABLE["packages"]:
        for name, value in values.items():
            used = re.fullmatch(row["setting"], name) and re.fullmatch(row["like"], str(getattr(value, "value", value)))
            if used and value and not any(importlib.util.find_spec(module) for module in row["modules"]):
                raise RecipeError(
                    f"{name}={value} needs a package that is not installed: pip install {row['install']}. Or leave "
                    f"{name} out."
                )


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
