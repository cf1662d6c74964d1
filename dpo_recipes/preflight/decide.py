"""Decides by the memory estimate: activation checkpointing, and with tokens_per_step=auto the budget of tokens."""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
from datasets import Dataset

from dpo_recipes.errors import RecipeError
from dpo_recipes.files import read_json
from dpo_recipes.machine import gpu_cards
from dpo_recipes.preflight.memory import count_weights, load_config, memory_parts, most_tokens, row_lengths, size_text
from dpo_recipes.recipe import SETTINGS_FILE

MARGIN = 0.25
"""Share of the device's memory to leave free: on one H200 steps took 1.2 to 1.3 times the estimate (docs/memory.md)."""
BUSY = 16_384
"""Tokens at a time that keep a large card busy. With a smaller budget, checkpointing costs less than it brings."""
STEP = 256
"""A budget that is decided is a multiple of these tokens, at most this number of them."""
MOST = 1 << 20


def decide(
    script_args: Any, training_args: Any, rows: Dataset, *, name: str, task: str, card: tuple[str, int] | None = None
) -> str:
    """Sets what is left to the memory estimate, in the arguments and in the settings, and returns a line about it.

    Left to the estimate are activation checkpointing where no value was given, and tokens_per_step=auto. A resumed run
    takes the values of the run that it continues. Without anything to decide the line is empty.

    Args:
        script_args: RecipeArguments of the recipe.
        training_args: TRL config of the recipe.
        rows: Training pairs or prompts, as `fit` returns them.
        name: The model: a folder or a Hub name.
        task: As `task_of` names it.
        card: Name and bytes of the device that the run is to fit; None: this machine.

    Raises:
        RecipeError: If a budget is to be found for a model whose configuration cannot be read.
    """
    settings = script_args.settings
    left = [key for key in ("activation_checkpointing", "tokens_per_step") if settings.get(key) == "auto"]
    if not left:
        for key, value in getattr(script_args, "decided", {}).items():  # for an earlier round of the same run
            setattr(training_args, key, value)
        return ""
    if training_args.resume_from_checkpoint:
        held = read_json(Path(training_args.output_dir) / SETTINGS_FILE)
        settings |= {key: held[key] for key in left if held.get(key, "auto") != "auto"}
    try:
        config = load_config(name, settings)
        weights = count_weights(config, settings, task=task)
    except (OSError, ValueError, ImportError) as error:
        if settings.get("tokens_per_step") == "auto":
            raise RecipeError(
                f"tokens_per_step=auto needs the configuration of {name}: {error} Give a number."
            ) from error
        settings["activation_checkpointing"] = training_args.activation_checkpointing  # as TRL has it
        return ""
    device, size = card or this_machine(training_args)
    given = settings | row_lengths(rows, settings, task) | {"world_size": training_args.world_size}
    checkpointing, budget, needs = fit(config, weights, given, size, task=task)
    _set(script_args, training_args, checkpointing, budget)
    return (
        f"activation checkpointing {'on' if checkpointing else 'off'}"
        + (f", tokens_per_step {budget:,}" if budget else "")
        + f": about {size_text(needs)} of the {size_text(size)} of {device}, {MARGIN:.0%} of which are to stay free"
    )


def fit(
    config: Any, weights: Mapping[str, int], settings: Mapping[str, Any], size: int, *, task: str
) -> tuple[bool, int | None, float]:
    """Activation checkpointing and the budget that `choose` finds for a device of this size, and the bytes needed.

    Args:
        config: The configuration of the model.
        weights: As `count_weights` returns them.
        settings: As `memory_parts` takes them. `activation_checkpointing` and `tokens_per_step` may be `auto`.
        size: Bytes of the device.
        task: As `task_of` names it.
    """

    def total(checkpointing: bool, budget: Any) -> float:
        asked = {"activation_checkpointing": checkpointing, "gradient_checkpointing": False, "tokens_per_step": budget}
        return sum(memory_parts(config, weights, {**settings, **asked}, task=task).values())

    most = most_tokens({**settings, "tokens_per_step": MOST}, task)  # tokens of a whole update
    chosen = choose(total, (1 - MARGIN) * size, settings, most=most)
    return *chosen, total(*chosen)


def choose(
    total: Callable[[bool, Any], float], have: float, settings: Mapping[str, Any], *, most: int
) -> tuple[bool, int | None]:
    """Activation checkpointing and the budget of tokens that fit into memory.

    Without checkpointing if the budget fits, and for `auto` if a budget of BUSY tokens or a whole update fits. Where
    nothing fits, the least that there is: the preflight then warns.

    Args:
        total: Bytes with or without checkpointing, at a budget.
        have: Bytes that may be used.
        settings: `activation_checkpointing` and `tokens_per_step`, each `auto` or a value.
        most: Tokens of a whole update.
    """
    asked, budget = settings["activation_checkpointing"], settings.get("tokens_per_step")
    sizes = range(STEP, most + STEP, STEP)
    size: Any = budget
    for checkpointing in [False, True] if asked == "auto" else [bool(asked)]:
        if budget == "auto":
            size = sizes[max(0, bisect_right(sizes, have, key=lambda n: total(checkpointing, n)) - 1)]
        enough = budget != "auto" or size >= min(BUSY, sizes[-1])
        if total(checkpointing, size) <= have and enough:
            break
    return checkpointing, size


def this_machine(training_args: Any) -> tuple[str, int]:
    """The device that the run would use, and its bytes: the smallest card, or a process's share of the main memory."""
    cards = [] if training_args.use_cpu else gpu_cards()
    if cards:
        return "this machine's card", min(mib for mib, _ in cards) * 2**20
    return "this machine", psutil.virtual_memory().total // training_args.world_size


def _set(script_args: Any, training_args: Any, checkpointing: bool, budget: int | None) -> None:
    """Puts the decision into the arguments and the settings."""
    decided: dict[str, Any] = dict.fromkeys(("activation_checkpointing", "gradient_checkpointing"), checkpointing)
    script_args.settings |= {**decided, "tokens_per_step": budget}
    decided |= {"tokens_per_step": budget, "budget_is_estimated": script_args.tokens_per_step == "auto"}
    script_args.decided, script_args.tokens_per_step = decided, budget
    for key, value in decided.items():
        setattr(training_args, key, value)
