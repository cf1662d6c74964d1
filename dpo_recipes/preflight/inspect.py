"""`dpo-recipes inspect`: an account of a recipe's data, what to beware of in it, and what training on it will cost."""

import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from trl import DPOConfig, ModelConfig

from dpo_recipes.catalog import read_yaml
from dpo_recipes.dataset_adapters import recognise
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import write_json
from dpo_recipes.loading import load_rows, split_pairs
from dpo_recipes.models.rewards import context_length
from dpo_recipes.preflight import off_distribution, page, signals
from dpo_recipes.preflight.cost import cost_findings, cost_lines, estimate_cost, task_of
from dpo_recipes.preflight.decide import decide
from dpo_recipes.preflight.findings import judge, judged, refuse_failures, show_findings
from dpo_recipes.preflight.memory import load_config
from dpo_recipes.preflight.prepare import measure_pairs, tokenizer_to_measure
from dpo_recipes.preflight.tokens import as_rendered
from dpo_recipes.recipe import RecipeArguments, argument_classes, load_tokenizer, parse_recipe
from dpo_recipes.terminal import say

PRECISION = ("bf16", "fp16", "use_cpu")  # what a profile for a card says, and a machine without one refuses


def inspect(
    name: str,
    *,
    recipe: Path | None,
    profile: Path,
    flags: Sequence[str],
    card: tuple[str, int] | None,
    with_model: bool,
) -> None:
    """Writes `preflight.json` and `preflight.html`, and prints the summary.

    Args:
        name: The recipe or dataset, as the user named it.
        recipe: The recipe's file; None where `name` is a dataset, whose columns tell its dataset adapter.
        profile: The machine's settings.
        flags: Settings, as `dpo-recipes train` takes them.
        card: Name and bytes of the card that the run is to fit; None: this machine.
        with_model: Load the model, and measure how likely it finds the completions.

    Raises:
        RecipeError: If the settings are refused, the data cannot be had, or a finding is a failure.
    """
    namespace = _recipe_of_pairs(name, recipe)
    script = recipe or Path(re.sub(r"\W+", "_", Path(name).stem))
    script_args, training_args, model_args = parse_namespace(namespace, script, profile=profile, flags=flags)
    tokenizer, model = load_tokenizer(model_args, training_args), str(model_args.model_name_or_path)
    given = {flag.partition("=")[0].removeprefix("--") for flag in flags}
    if recipe is None and "max_length" not in given:  # the default of 1,024 may be more than the model takes
        context = context_length(load_config(model, script_args.settings))
        training_args.max_length = min(training_args.max_length, context)
    measured = measure_pairs(namespace["load_pairs"], script_args, training_args, tokenizer)
    read_by, seed = tokenizer_to_measure(tokenizer, pairs=measured.pairs["train"]), training_args.seed
    rendered = DatasetDict({split: as_rendered(rows, read_by) for split, rows in measured.pairs.items()})
    found = signals.find_signals(rendered, seed=seed)
    off = None
    if with_model:
        off = off_distribution.measure(measured.pairs, model, read_by, revision=model_args.model_revision, seed=seed)
    script_args.settings |= _precision_on_device(profile, given)
    rows, task = measured.pairs["train"], task_of(training_args)
    decided = decide(script_args, training_args, rows, name=model, task=task, card=card)
    cost = estimate_cost(rows, script_args, training_args, card)
    thresholds = measured.data["thresholds"]
    findings = [*measured.findings, *cost_findings(cost, thresholds)]
    findings += judge("off_distribution", off["rejected"]["far"], 1, thresholds) if off else []
    findings += signals.signal_findings(found, thresholds)
    part = "the first rows of each split" if script_args.dataset_streaming else None
    more = {"recipe": recipe and recipe.stem, "part": part, "cost": cost, "signals": found, "off_distribution": off}
    data = measured.data | more | judged(findings)
    head = ", ".join(filter(None, (f"{script_args.dataset_name} for {model}", part)))
    folder = Path(training_args.output_dir)
    files = write_json(folder / "preflight.json", data), page.write_page(folder / "preflight.html", data)
    decision = [f"decided   {decided}"] if decided else []
    say("\n".join([head, *measured.lines, "", *cost_lines(cost), *decision, ""]))
    show_findings(findings)
    say(f"Verdict: {data['verdict']}. The whole account: {files[0]}, {files[1]}", always=True)
    refuse_failures(findings)


def _recipe_of_pairs(name: str, recipe: Path | None) -> dict[str, Any]:
    """The names of the recipe's file, or what they would be for the dataset.

    Raises:
        RecipeError: If the file is no recipe, or its recipe learns from prompts alone.
    """
    namespace = runpy.run_path(str(recipe)) if recipe else dataset_recipe(name)
    if not {"RECIPE", "load_pairs"} <= set(namespace):
        raise RecipeError(f"{recipe} lacks RECIPE or load_pairs. Start from a recipe: dpo-recipes copy hh-rlhf-lora.")
    if "prepare_prompts" in namespace:
        raise RecipeError(
            f"{name} learns from prompts alone, which its training accounts for (--dry_run true). Inspect the "
            "pairs by a recipe that learns from them."
        )
    return namespace


def _precision_on_device(profile: Path, given: set[str]) -> dict[str, Any]:
    """The precision that the profile sets for its card. Settings given as flags are left out.

    Without that card these settings would be refused on this machine, so that the parsed settings do not hold them.
    """
    on_device = {"use_cpu": False} | {key: value for key, value in read_yaml(profile).items() if key in PRECISION}
    return {key: value for key, value in on_device.items() if key not in given}


def dataset_recipe(name: str) -> dict[str, Any]:
    """The names that a recipe file for this dataset would hold."""

    def load_pairs(script_args: RecipeArguments) -> DatasetDict:
        rows = load_rows(script_args)
        return split_pairs({split: recognise(rows["train"])(part) for split, part in rows.items()})

    classes = {part.__name__: part for part in (RecipeArguments, DPOConfig, ModelConfig)}
    return {"RECIPE": {"dataset_name": name, "report_to": "none"}, "load_pairs": load_pairs, **classes}


def parse_namespace(namespace: dict[str, Any], script: Path, *, profile: Path, flags: Sequence[str]) -> tuple[Any, ...]:
    """RecipeArguments, the TRL config and ModelConfig, parsed as the recipe itself would."""
    words = ["--output_dir", f"outputs/inspect/{script.stem}"]
    words += [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    argv = [str(script), "--config", str(profile), *words, *flags]  # a flag of the user's comes later, and wins
    return parse_recipe(namespace["RECIPE"], argument_classes(namespace), argv=argv, to_train=False)
