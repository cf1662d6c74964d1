"""DPO against PPO on the same data: runs the stages, judges their answers alike, and reports what came of it."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset

from dpo_recipes.compare.budget import budget_in_words, check_match, samples_of, updates_within
from dpo_recipes.compare.plan import ALGORITHMS, ONLINE, Recipe, Stage, plan_stages, read_recipes
from dpo_recipes.compare.report import write_report
from dpo_recipes.compare.results import NAMES, collect, stage_cost, verdict
from dpo_recipes.compare.stages import Clock, run_stages
from dpo_recipes.estimates import Estimate
from dpo_recipes.evaluate.answers import Entry, Sampling, answer_all, draw_prompts, exact_judge, records
from dpo_recipes.evaluate.measures import columns
from dpo_recipes.files import read_json, write_json, write_jsonl
from dpo_recipes.launch.launch import prepare
from dpo_recipes.launch.sweep import STOPPED
from dpo_recipes.loading import digest, prompt_hashes
from dpo_recipes.manifest import claim, refuse_strangers
from dpo_recipes.models.rewards import check_reward_model, model_judge, read_reward_config
from dpo_recipes.preflight.prepare import measure_pairs
from dpo_recipes.recipe import load_tokenizer
from dpo_recipes.runs.model_card import LIBRARIES
from dpo_recipes.terminal import say

SHOWN = 4  # prompts with their answers side by side
ORDER = "The judge scores each answer by itself, so that the order of two answers plays no part."


@dataclass
class Comparison:
    """What is compared, and how."""

    root: Path
    recipes: Mapping[str, Recipe]
    kinds: Sequence[str]
    seeds: Sequence[int]
    betas: Sequence[str]
    budget: str
    prompts: int
    judge: Callable[[Any, str], float] | str | None  # the exact reward, or a model's name; None: one is trained
    updates: dict[str, int] = field(default_factory=dict)  # of the online algorithms
    parts: dict[str, Dataset] = field(default_factory=dict)

    @property
    def start(self) -> str:
        """The model that all start from."""
        return str(self.recipes["dpo"].model_args.model_name_or_path)

    @property
    def sampling(self) -> Sampling:
        """That of the online algorithms' training; they have the same."""
        online = next((self.recipes[kind].training_args for kind in ONLINE if kind in self.kinds), None)
        return Sampling(getattr(online, "temperature", 1.0), getattr(online, "max_completion_length", 256))


def compare(
    name: str,
    *,
    profile: str | None = None,
    accelerate: str | None = None,
    flags: Sequence[str] = (),
    stages: Sequence[str] = ("dpo", "ppo"),
    seeds: Sequence[int] = (0, 1, 2),
    betas: Sequence[str] = (),
    quick: bool = False,
    budget: str = "samples",
    prompts: int = 200,
    judge: str | None = None,
    output_dir: str | None = None,
) -> int:
    """Trains what is missing, and writes results.json, records.jsonl, report.html, report.md and the plots.

    Args:
        name: A DPO recipe, beside which are those of the reward model and of PPO.
        profile: As in `train`.
        accelerate: As in `train`.
        flags: As `read_recipes` reads them.
        stages: Kinds of stages; what these need is added.
        seeds: Everything but the SFT model and the judge is trained with each.
        betas: Each algorithm is trained with each; by default the DPO recipe's own.
        quick: The first beta and the first seed alone.
        budget: `samples` or `compute`, as `updates_within` reads it.
        prompts: To answer, of the test split.
        judge: A reward model, or a classifier with two labels; by default the recipe's own judge.
        output_dir: `outputs/compare/RECIPE` by default.

    Returns:
        0; 1 if a stage failed, after the others; 128 + n if signal n came.

    Raises:
        RecipeError: If the call or the data is wrong.
    """
    launch = prepare(name, profile=profile, accelerate=accelerate)
    recipes = read_recipes(launch, stages, flags=flags, judge=judge)
    some = slice(1 if quick else None)
    comparison = Comparison(
        root=Path(output_dir or f"outputs/compare/{launch.recipe.stem}"),
        recipes=recipes,
        kinds=[kind for kind in (*ALGORITHMS, "reward", "judge") if kind in recipes],
        seeds=list(seeds)[some],
        betas=list(betas or [str(recipes["dpo"].training_args.beta)])[some],
        budget=budget,
        prompts=prompts,
        judge=judge or recipes["dpo"].namespace.get("judge"),
    )
    if isinstance(comparison.judge, str):
        check_reward_model(*read_reward_config(comparison.judge), [], labels=(1, 2))
    clock, root = Clock(), comparison.root
    stages_with = partial(plan_stages, recipes, betas=comparison.betas, seeds=comparison.seeds, root=root)
    planned = stages_with(updates=dict.fromkeys(ONLINE, 0))  # the budget needs the tokenizer that SFT leaves
    refuse_strangers(root)
    say("\n".join([f"{len(planned)} stages:", *(f"  {stage.name:<16} {stage.folder}" for stage in planned)]))
    claim(root, "answers", *(stage.name for stage in planned))
    before = run_stages([stage for stage in planned if stage.kind == "sft"], clock, total=len(planned))
    if status := next(iter(before.values()), 0):
        return status if status in STOPPED else 1
    comparison.parts = _divide(recipes["dpo"], with_judge=comparison.judge is None)
    learn = len(comparison.parts["learn"])
    online = [recipes[kind] for kind in ONLINE if kind in recipes]
    comparison.updates = {each.kind: updates_within(each, kind=budget, recipes=recipes, pairs=learn) for each in online}
    planned = stages_with(updates=comparison.updates)
    statuses = before | run_stages(planned[len(before) :], clock, done=len(before), total=len(planned))
    if stopped := [status for status in statuses.values() if status in STOPPED]:
        return stopped[0] or 1
    failed = {name: status for name, status in statuses.items() if status != 0}
    if "judge" in failed:
        say("The judge could not be trained, and there is nobody to judge: no report.")
        return 1
    _report(comparison, [stage for stage in planned if stage.name not in failed], failed)
    return int(bool(failed))


def _divide(dpo: Recipe, *, with_judge: bool) -> dict[str, Dataset]:
    """The parts: pairs to `learn` from, pairs for the `judge`, and the `test` pairs, whose prompts are answered.

    Raises:
        RuntimeError: If two of them share a prompt.
    """
    tokenizer = load_tokenizer(dpo.model_args, dpo.training_args)
    parts: dict[str, Dataset] = {}
    for part in ("learn", "judge") if with_judge else (None,):
        script_args = replace(dpo.script_args, part=part)
        pairs = measure_pairs(dpo.namespace["load_pairs"], script_args, dpo.training_args, tokenizer).pairs
        parts |= {part or "learn": pairs["train"], "test": pairs["test"]}
    check_parts(parts)
    return parts


def check_parts(parts: Mapping[str, Dataset]) -> None:
    """Nothing, if no prompt is in two of the parts.

    Raises:
        RuntimeError: If one is.
    """
    hashes = {name: set(prompt_hashes(pairs)) for name, pairs in parts.items()}
    for name, other in (("learn", "judge"), ("learn", "test"), ("judge", "test")):
        if shared := hashes.get(name, set()) & hashes.get(other, set()):
            raise RuntimeError(f"{len(shared)} prompts are in the parts {name} and {other}, which must share none.")


def _report(comparison: Comparison, finished: Sequence[Stage], failed: Mapping[str, int | None]) -> None:
    """Answers, records, results and report of the stages that are finished."""
    root, parts = comparison.root, comparison.parts
    prompts = draw_prompts(parts["test"], start=comparison.start, most=comparison.prompts)
    made_by = next((stage.key() for stage in finished if stage.kind == "sft"), comparison.start)
    entries = [Entry(f"sft-{seed}", comparison.start, seed, made_by) for seed in comparison.seeds]
    runs = [stage for stage in finished if stage.kind in ALGORITHMS]
    entries += [Entry(stage.name, str(stage.folder), int(stage.seed or 0), stage.key()) for stage in runs]
    found = answer_all(
        entries,
        comparison.start,
        prompts=prompts,
        pairs=parts["test"],
        sampling=comparison.sampling,
        folder=root / "answers",
        trust_remote_code=comparison.recipes["dpo"].training_args.trust_remote_code,
    )
    judge = comparison.judge or root / "judge"
    optimised = {stage.seed: model_judge(stage.folder) for stage in finished if stage.kind == "reward"}
    rows = records(
        found,
        prompts=prompts,
        judge=exact_judge(judge) if callable(judge) else model_judge(judge),
        rewards={entry.name: optimised[entry.seed] for entry in entries if entry.seed in optimised},
    )
    write_jsonl(root / "records.jsonl", ({"run": name} | row for name, each in rows.items() for row in each))
    results = _about(comparison, finished, failed) | {"prompts": len(prompts)}
    costs = {stage.name: stage_cost(stage, samples_of(stage)) for stage in finished}
    measured = {name: columns(rows[name], found[name]) for name in found}
    results |= collect(runs, measured, costs, betas=comparison.betas)
    results["verdict"] = verdict(results)
    results["samples"] = _side_by_side(results, rows, prompts)
    paths = [write_json(root / "results.json", results), *write_report(root, results)]
    say("\n".join(["", *results["verdict"], "", *map(str, paths)]))


def _about(comparison: Comparison, finished: Sequence[Stage], failed: Mapping[str, int | None]) -> dict[str, Any]:
    """What was compared, and how: everything but the numbers."""
    parts, sampling = comparison.parts, asdict(comparison.sampling)
    judge = {"name": "the exact reward", "detail": "The judge is the recipe's exact reward, not a model."}
    accuracies = {
        stage.name: read_json(stage.folder / "metrics.json")["reward_accuracy"]["all"]
        for stage in finished
        if stage.kind in ("judge", "reward")
    }
    if isinstance(comparison.judge, str):
        said = f"The judge is {comparison.judge}, a model that was not trained here."
        judge = {"name": comparison.judge, "detail": said}
    elif comparison.judge is None:
        right = Estimate(**accuracies["judge"])
        judge = {
            "name": "a reward model of its own",
            "detail": "The judge is a reward model, trained by another seed on prompts that no learner saw. It finds "
            f"chosen better in {right} of the {right.n} held-out pairs.",
        }
    hashes = {part: digest(parts[part]) if part in parts else None for part in ("learn", "judge")}
    learn = len(parts["learn"])
    not_online = [] if comparison.updates else [NAMES["sft"]]
    return {
        "title": " against ".join([NAMES[kind] for kind in comparison.kinds if kind in ALGORITHMS] + not_online),
        "recipe": comparison.recipes["dpo"].launch.recipe.stem,
        "made": datetime.now(UTC).isoformat(timespec="minutes"),
        "start": comparison.start,
        "seeds": list(comparison.seeds),
        "betas": list(comparison.betas),
        "budget": {
            "kind": comparison.budget,
            "detail": budget_in_words(comparison.budget, comparison.recipes, learn, comparison.updates),
        },
        "sampling": sampling,
        "judge": judge | {"order": ORDER},
        "reward_accuracy": accuracies,
        "failed": [
            f"{name} ({'not begun' if status is None else f'exit {status}'})" for name, status in failed.items()
        ],
        "parts": {
            part: {"pairs": len(pairs), "prompts": len(set(prompt_hashes(pairs)))} for part, pairs in parts.items()
        },
        "fairness": check_match(finished, betas=comparison.betas, prompts=hashes, sampling=sampling),
        "hardware": ", ".join(sorted({read_json(stage.folder / "done.json")["hardware"] for stage in finished})),
        "versions": [f"{library} {version(library)}" for library in LIBRARIES],
    }


def _side_by_side(
    results: Mapping[str, Any], rows: Mapping[str, Any], prompts: Sequence[Any], *, seed: int = 0
) -> list[dict[str, Any]]:
    """A few prompts, drawn by seed, with each algorithm's answer by the first seed of its chosen beta."""
    labels = [duel[side] for duel in results["duels"] for side in ("one", "other")]
    labels = labels or [pair["one"] for pair in results["against_start"]]
    shown = [model for model in results["models"] if model["algorithm"] == "sft" or model["label"] in labels]
    samples = []
    for number in sorted(random.Random(seed).sample(range(len(prompts)), min(SHOWN, len(prompts)))):
        prompt = prompts[number]
        answers = [
            {"label": model["label"], "algorithm": model["algorithm"]}
            | {key: rows[next(iter(model["names"].values()))][number][key] for key in ("text", "judge", "ended")}
            for model in shown
        ]
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        samples.append({"number": number, "prompt": asked, "answers": answers})
    return samples
