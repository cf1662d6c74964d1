"""Evaluates a tuned model against its reference model: held-out pairs, sampled answers, and a judge of them."""

import re
import runpy
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments
from trl import RewardConfig

from dpo_recipes.dataset_adapters.adapting import row_names
from dpo_recipes.dataset_adapters.ledger import HELD_OUT, Ledger
from dpo_recipes.errors import RecipeError
from dpo_recipes.evaluate.answers import Entry, answer_all, draw_prompts
from dpo_recipes.evaluate.judges import open_judge
from dpo_recipes.evaluate.pairwise import Judged, expected_cost
from dpo_recipes.evaluate.report import origin, write_report
from dpo_recipes.evaluate.results import SIDES, answer_pairs, judging, measures, preference, verdict
from dpo_recipes.files import MANIFEST, check_writable, read_json
from dpo_recipes.flags import grouped
from dpo_recipes.loading import keep_part, prompt_hashes
from dpo_recipes.machine import hardware
from dpo_recipes.manifest import claim
from dpo_recipes.models.open import changes_layers, check_weights, find_start, identify, read_adapter, run_settings
from dpo_recipes.models.rewards import Text
from dpo_recipes.preflight.findings import in_words
from dpo_recipes.preflight.inspect import dataset_recipe, parse_namespace
from dpo_recipes.preflight.prepare import measure_pairs
from dpo_recipes.recipe import DONE_FILE, load_tokenizer
from dpo_recipes.runs.model_card import weights_hash
from dpo_recipes.terminal import say

OF_ROWS = ("columns", "max_length")  # settings of a run that suit other data as well
OF_DATA = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", *OF_ROWS)
SHOWN = 4  # prompts with both answers


@dataclass
class Subject:
    """The model that is evaluated, its reference model, and the held-out pairs."""

    name: str
    model: str
    start: str  # the reference model
    dataset: str
    beta: float | None
    pairs: Dataset  # held out
    rule: Callable[[Text, str], float] | str | None  # the recipe's own judge
    folder: Path  # of the results
    trust_remote_code: bool  # whether code that comes with a model may run
    doubts: list[str]  # about the held-out pairs

    @property
    def models(self) -> dict[str, str]:
        """Both models by side."""
        return {"before": self.start, "after": self.model}


def evaluate(
    name: str,
    *,
    recipe: Path | None,
    profile: Path,
    flags: Sequence[str],
    base: str | None = None,
    output_dir: str | None = None,
    prompts: int = 200,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    judge: str | None = None,
    yes: bool = False,
    endpoint: Mapping[str, Any],
) -> Path:
    """Evaluates a model against its reference model, and returns the path of eval.json.

    The same call goes on where an earlier one was stopped: after the last model whose answers are kept, and after the
    last reply of a judge at an endpoint.

    Args:
        name: A recipe, or a model: a folder, a run's too, or a Hub name.
        recipe: The recipe's file; None for a model.
        profile: The machine's settings.
        flags: As `dpo-recipes train` takes them; a model needs `--dataset_name`. Data that the run was not trained on
            is held-out data: its test split, or else all of its rows.
        base: The reference model; by default the one that the recipe or the run names.
        output_dir: A recipe's run, as in `train`; for a model, the folder of the results.
        prompts: Number of prompts to answer, from the held-out pairs.
        temperature: Of the answers; 0 is greedy, which leaves the KL out.
        max_new_tokens: Most tokens of an answer.
        seed: Of the sampling.
        judge: As `open_judge` reads it.
        yes: Whether to spend what an endpoint costs without asking.
        endpoint: Fields of `Endpoint` except the URL.

    Raises:
        RecipeError: If the call or the data is wrong.
    """
    subject = _open_subject(name, recipe, profile=profile, flags=flags, base=base, output_dir=output_dir)
    kept = _prepare_folder(subject.folder)
    asked = draw_prompts(subject.pairs, start=subject.start, most=prompts)
    referee = open_judge(judge, rule=subject.rule, endpoint=endpoint, cache=kept / "judgements.jsonl", prompts=asked)
    if referee and referee.scorer is None:
        _confirm(expected_cost(endpoint, asked, max_new_tokens=max_new_tokens), yes=yes)
    hashes = {side: weights_hash(model) for side, model in subject.models.items()}
    sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    options: dict[str, Any] = dict(pairs=subject.pairs, sampling=sampling, trust_remote_code=subject.trust_remote_code)
    entries = _entries(subject.models, hashes, seed)
    found = answer_all(entries, subject.start, prompts=asked, folder=kept / "answers", **options)
    texts = [[answer["text"] for answer in found[side]["answers"]] for side in SIDES]
    judged = referee.compare(asked, *texts) if referee else None
    answers = answer_pairs(found, asked, judged)
    judgement, greedy = judging(found, subject.pairs, referee, judged), temperature == 0
    results = {
        **_about(subject),
        "verdict": verdict(found, judgement["win_rate"], greedy=greedy),
        "judge": referee.name if referee else None,
        "sampling": sampling | {"seed": seed},
        "prompts": len(asked),
        "hashes": hashes,
        "warnings": _warnings(subject, judge, judged, hashes),
        **judgement,
        **preference(found, subject.beta),
        **measures(found, judged, greedy=greedy),
        "samples": answers[:SHOWN],  # the prompts were drawn by seed
    }
    return write_report(subject.folder, results, answers)


def _open_subject(
    name: str, recipe: Path | None, *, profile: Path, flags: Sequence[str], base: str | None, output_dir: str | None
) -> Subject:
    """Checks the model and reads its held-out pairs."""
    named = dict(grouped(flags))
    data = next(iter(named.get("dataset_name", [])), "")
    namespace, model, folder = _find_run(name, recipe, output_dir, has_data=bool(data))
    given = _data_flags(name, model, OF_ROWS if data else OF_DATA) if recipe else []
    flags = [*given, *flags, "--model_name_or_path", base or find_start(model)]
    parsed = parse_namespace(namespace, recipe or Path(folder.name), profile=profile, flags=flags)
    script_args, training_args, model_args = parsed
    may_be_seen = _set_held_out(script_args, run_settings(model), data, named)
    if isinstance(training_args, RewardConfig):
        raise RecipeError(f"{name} makes a reward model, which its training measures: see metrics.json in {model}.")
    start, tokenizer = str(model_args.model_name_or_path), load_tokenizer(model_args, training_args)
    _check_related(model, tokenizer, start, trust_remote_code=training_args.trust_remote_code)
    _limit_length(training_args, start)
    measured = measure_pairs(namespace["load_pairs"], script_args, training_args, tokenizer)
    say("\n".join(measured.lines))
    return Subject(
        name=recipe.stem if recipe else name,
        model=model,
        start=start,
        dataset=str(script_args.dataset_name),
        beta=training_args.beta if "beta" in named else run_settings(model).get("beta"),  # None: not known
        pairs=measured.pairs["test"],
        rule=namespace.get("judge"),
        folder=folder,
        trust_remote_code=training_args.trust_remote_code,
        doubts=_seen(namespace, script_args, model) if may_be_seen else [],
    )


def _find_run(
    name: str, recipe: Path | None, output_dir: str | None, *, has_data: bool
) -> tuple[dict[str, Any], str, Path]:
    """The namespace of the recipe or of one for the named data, the tuned model, and the folder of the results."""
    if recipe:
        namespace = runpy.run_path(str(recipe))
        model = output_dir or str(namespace["RECIPE"]["output_dir"])
        return namespace, model, Path(model)
    if not has_data:
        raise RecipeError(
            f"{name} is a model, whose pairs are not known. Name them with --dataset_name, or evaluate its recipe "
            "(dpo-recipes list)."
        )
    own = Path(name) if run_settings(name) else Path("outputs/evaluate") / re.sub(r"\W+", "_", name.strip("/."))
    return dataset_recipe(""), name, Path(output_dir or own)


def _set_held_out(script_args: Any, trained: Mapping[str, Any], data: str, named: Collection[str]) -> bool:
    """Holds out all rows of other data than the run's own, and of the run's what it has held out itself.

    Returns:
        True if the run may have been trained on prompts of the pairs that are held out now.
    """
    is_apart = bool(data) and not _is_same(data, trained.get("dataset_name"))
    if is_apart:
        script_args.held_out = 1.0
        if Path(data).exists() and "eval_pairs" not in named:
            script_args.eval_pairs = None
    elif "held_out" not in named:
        script_args.held_out = trained.get("held_out", script_args.held_out)
    return bool(trained.get("dataset_name")) and (is_apart or "held_out" in named)


def _is_same(data: str, trained_on: str | None) -> bool:
    """Returns True for two names of one dataset, samples of it among them."""
    one, other = (Path(re.sub(r":\d+$", "", name or "")).expanduser().resolve() for name in (data, trained_on))
    return bool(trained_on) and one == other


def _seen(namespace: Mapping[str, Any], script_args: Any, model: str) -> list[str]:
    """A warning about held-out pairs whose prompt the run was trained on, or that cannot be compared with its data."""
    held = {"held_out": HELD_OUT} | run_settings(model)
    of_run = replace(
        script_args,
        **{key: held[key] for key in (*OF_DATA, "part", "held_out") if hasattr(script_args, key) and key in held},
    )
    try:
        with Ledger(of_run.held_out):
            train = keep_part(namespace["load_pairs"](of_run)["train"], of_run.part)
        with Ledger(script_args.held_out):
            test = namespace["load_pairs"](script_args)["test"]
    except RecipeError:
        return [f"The run's training data, {of_run.dataset_name}, cannot be read: its prompts are not looked for here."]
    known = set(prompt_hashes(train))
    rows = [name for name, key in zip(row_names(test), prompt_hashes(test), strict=True) if key in known]
    if not rows:
        return []
    first = f"{in_words(rows[:SHOWN])}{' and more' if len(rows) > SHOWN else ''}"
    return [
        f"The run was trained on the prompts of {len(rows)} of {len(test)} held-out pairs: {first}. Remove these rows."
    ]


def _data_flags(name: str, model: str, settings: Sequence[str]) -> list[str]:
    """Flags that repeat these settings of a recipe's run."""
    if not (read_adapter(model) or (Path(model) / "config.json").exists()):
        raise RecipeError(f"There is no trained model in {model}. Train it first: dpo-recipes train {name}")
    given = {key: value for key, value in run_settings(model).items() if key in settings and value is not None}
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def _check_related(model: str, tokenizer: PreTrainedTokenizerBase, start: str, **options: Any) -> None:
    """Raises RecipeError unless the model writes text in the tokens of the reference model."""
    artifact = identify(model, base=start, **options)
    if artifact.is_reward_model:
        merged = f"Merge it (dpo-recipes merge {model} --output_dir DIR), and DIR may judge: --judge DIR"
        way_out = merged if artifact.adapter else f"It may judge: --judge {model}"
        raise RecipeError(f"{model} is a reward model, which writes no answers. {way_out}.")
    if artifact.adapter and not changes_layers(artifact.adapter):
        raise RecipeError(
            f"{model} is an adapter of the kind {artifact.adapter['peft_type']}, which adds to the prompt: its "
            f"log-probs are not compared. See its answers: dpo-recipes try {model}."
        )
    check_weights(artifact, **options)
    if artifact.adapter or not (Path(model) / "tokenizer.json").exists():
        return  # it is used with the tokenizer of the reference model
    own, tokens = AutoTokenizer.from_pretrained(model, **options).get_vocab(), tokenizer.get_vocab()
    alike = sum(own.get(token) == number for token, number in tokens.items())
    if alike < 0.9 * len(tokens):  # special tokens may have other names
        raise RecipeError(
            f"{model} has other tokens than {tokenizer.name_or_path}: it was not trained from it. Name its reference "
            "model with --base."
        )


def _limit_length(training_args: TrainingArguments, start: str) -> None:
    """Lowers `max_length`, which a profile may set too high, to what the model takes."""
    code = training_args.trust_remote_code
    config = AutoConfig.from_pretrained(start, trust_remote_code=code).get_text_config()
    limits = getattr(training_args, "max_length", None), getattr(config, "max_position_embeddings", None)
    training_args.max_length = min(filter(None, limits), default=None)


def _prepare_folder(folder: Path) -> Path:
    """The folder that keeps answers and replies; a run that is trained again leaves it, since replies cost money."""
    kept = folder / "eval"
    if (folder / MANIFEST).exists():
        claim(folder, kept.name)
    check_writable(kept)
    return kept


def _confirm(cost: str, *, yes: bool) -> None:
    """Raises RecipeError unless the user accepts the estimated cost of the judge."""
    say(cost, always=not yes)
    if not yes and sys.stdin.isatty():
        with suppress(EOFError):
            say("Spend that? [y/N]", always=True)
            yes = input().strip().lower() in ("y", "yes")
    if not yes:
        raise RecipeError("Nothing was asked. To spend that, give --yes; fewer --prompts cost less.")


def _entries(models: Mapping[str, str], hashes: Mapping[str, str | None], seed: int) -> list[Entry]:
    """Both models. The reference model's hash counts for both, because its log-probs are kept with all answers."""
    reference = hashes["before"] or models["before"]
    return [Entry(side, model, seed, f"{reference}-{hashes[side] or model}") for side, model in models.items()]


def _about(subject: Subject) -> dict[str, Any]:
    """The models, the data and the machine of the results."""
    return {
        **{key: getattr(subject, key) for key in ("name", "model", "start", "dataset", "beta")},
        "pairs": len(subject.pairs),
        "hardware": hardware(torch.device(torch.accelerator.current_accelerator() or "cpu")),
        **origin(),
    }


def _warnings(
    subject: Subject, judge: str | None, judged: Judged | None, hashes: Mapping[str, str | None]
) -> list[str]:
    """Reasons to trust the numbers less than their intervals suggest."""
    said = [*subject.doubts]
    if judged and (unknown := int(np.isnan(judged.won).sum())):
        said.append(f"Of {len(judged.won)} prompts {unknown} have no verdict and are left out of the win rate.")
    judge = judge or (subject.rule if isinstance(subject.rule, str) else None)
    if hashes["before"] and hashes["before"] == hashes["after"]:
        said.append("The tuned model and the reference model have the same weights.")
    raised = read_json(Path(subject.model) / DONE_FILE).get("reward_model_hashes") or []
    if judge and Path(judge).is_dir() and weights_hash(judge) in raised:
        said.append("The judge is the reward model that this run optimised: its praise says little.")
    return said
