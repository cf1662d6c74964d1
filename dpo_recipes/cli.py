"""The command `dpo-recipes`; only the verbs that need torch import it, so that it answers at once."""

import argparse
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from dpo_recipes import __version__
from dpo_recipes.catalog import as_table, find_recipe, find_settings, list_recipes
from dpo_recipes.doctor import add_parser as add_doctor
from dpo_recipes.doctor import doctor
from dpo_recipes.errors import RecipeError
from dpo_recipes.launch.launch import BFLOAT16, card_memory, default_profile, gpu_cards, prepare, set_environment
from dpo_recipes.launch.sweep import spelling, sweep
from dpo_recipes.secrecy import hide, hide_flags, secrets_of
from dpo_recipes.terminal import outlive_the_terminal, say, shown

DATASET_FLAGS = ("dataset_name", "dataset_config", "dataset_train_split", "columns")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 the work failed, 2 the call was wrong, 128 + a signal."""
    # trl 1.16 and peft 0.21 read the old name of what transformers 5.23 calls activation checkpointing.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    outlive_the_terminal()
    parser = _parser()
    options, flags = parser.parse_known_args(arguments)
    if options.command == "try" and options.prompt is None and flags and not flags[0].startswith("-"):
        options.prompt = flags.pop(0)  # argparse takes no optional word behind a flag
    if flags and options.command not in ("train", "inspect", "compare", "evaluate"):
        parser.error(f"unrecognized arguments: {' '.join(hide_flags(flags))}")
    given = {name: value for name, value in vars(options).items() if name != "command" and value is not None}
    if "trust_remote_code" in given:
        given["trust_remote_code"] = given["trust_remote_code"] == "true"
    secrets = secrets_of(sys.argv if arguments is None else arguments)
    try:
        if options.command in ("merge", "try", "sample", "answer"):  # the others first see to their words
            set_environment()
        match options.command:
            case "list":
                say(as_table(list_recipes()))
            case "copy":
                say(copy_recipe(options.recipe, options.destination))
            case "train":
                launch = prepare(options.recipe, profile=options.profile, accelerate=options.accelerate, flags=flags)
                return sweep(launch, options.sweep) if options.sweep else launch.run()
            case "compare":
                return compare_recipe(given, flags)
            case "evaluate":
                return evaluate_model(given, flags)
            case "merge":
                from dpo_recipes.models.merge import merge

                merge(**given)
            case "page":
                from dpo_recipes.runs.page import remake

                remake(options.run)
            case "try":
                from dpo_recipes.models.chat import try_run

                try_run(**given)
            case "sample" | "answer":
                from dpo_recipes.recipe import RecipeArguments
                from dpo_recipes.sample.benchmarks import answer
                from dpo_recipes.sample.sampling import sample

                dataset = RecipeArguments(**{name: given.pop(name) for name in DATASET_FLAGS if name in given})
                if options.command == "answer":
                    answer(given.pop("model"), dataset, **given)
                else:
                    sample(given.pop("model"), dataset, **{"output": None} | given)
            case "inspect":
                return inspect_data(options, flags)
            case "doctor":
                return doctor(options)
            case _:
                parser.print_help()
    except RecipeError as error:
        sys.stderr.write(f"dpo-recipes: {shown(hide(str(error), secrets))}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def compare_recipe(given: dict[str, Any], flags: Sequence[str]) -> int:
    """The exit status of a comparison, called as a recipe is: what is wrong ends in one line."""
    set_environment()
    from dpo_recipes.compare.compare import compare  # imports torch and TRL
    from dpo_recipes.recipe import run

    statuses: list[int] = []
    run(lambda: statuses.append(compare(given.pop("recipe"), flags=flags, **given)))
    return statuses[0]


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
            f"{copy} exists already, and it may hold your changes. Name another file: copy {name} FILE.py."
        )
    try:
        shutil.copyfile(recipe, copy)
    except OSError as error:
        raise RecipeError(f"Cannot write {copy}: {error.strerror}.") from error
    return f"{copy} is yours to change. Train it with: dpo-recipes train {copy}"


def inspect_data(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Inspects a recipe's data, or a dataset: what is a file, or has a slash or a dot in its name, is a dataset."""
    name = options.data
    recipe = _as_recipe(name)
    card = card_memory(options.gpu) if options.gpu else 0
    profile = options.profile or default_profile([(card, BFLOAT16)] if card else gpu_cards())
    profile_file = find_settings("profiles", profile, recipe=recipe or Path(name))
    set_environment()
    from dpo_recipes.preflight.inspect import inspect  # imports torch and TRL
    from dpo_recipes.recipe import run

    device = (f"the {options.gpu} card", card * 2**20) if card else None
    with_model = options.with_model == "true"
    run(lambda: inspect(name, recipe=recipe, profile=profile_file, flags=flags, card=device, with_model=with_model))
    return 0


def evaluate_model(given: dict[str, Any], flags: Sequence[str]) -> int:
    """Evaluates a recipe's run, or a model."""
    name = given.pop("model")
    recipe = _as_recipe(name)
    chosen = given.pop("profile", None) or default_profile(gpu_cards())
    profile = find_settings("profiles", chosen, recipe=recipe or Path(name))
    judging = [key for key in given if key.startswith("judge_")]
    endpoint = {key.removeprefix("judge_"): given.pop(key) for key in judging}
    set_environment()
    from dpo_recipes.evaluate.evaluate import evaluate  # imports torch and TRL
    from dpo_recipes.recipe import run

    run(partial(evaluate, name, recipe=recipe, profile=profile, flags=flags, endpoint=endpoint, **given))
    return 0


def _as_recipe(name: str) -> Path | None:
    """The file of a recipe; None for a file, a folder, or what has a slash or a dot in its name."""
    is_other = not name.endswith(".py") and (Path(name).exists() or "/" in name or "." in name)
    return None if is_other else find_recipe(name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dpo-recipes", description="Preference tuning with TRL.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dpo-recipes {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    commands.add_parser("list", help="the recipes there are")

    copy = commands.add_parser("copy", help="copy a recipe here, to make it yours")
    copy.add_argument("recipe", metavar="RECIPE", help="a name from `dpo-recipes list`")
    copy.add_argument("destination", nargs="?", metavar="DEST", help="file or folder; by default the current folder")

    training = commands.add_parser(
        "train",
        help="train a recipe, and the stages it starts from",
        usage="%(prog)s RECIPE [--profile P] [--accelerate A] [--beta 0.3 --max_steps 100 ...] [--sweep beta=0.05,0.1]",
        epilog="Every other flag is a TRL argument and goes to the recipe, where it beats the profile and RECIPE.",
        allow_abbrev=False,
    )
    training.add_argument("recipe", metavar="RECIPE", help="a name from `dpo-recipes list`, or the path of your own")
    training.add_argument(
        "--profile", metavar="P", help="cpu, turing, local, gpu or a YAML file; by default what the machine has"
    )
    training.add_argument("--accelerate", metavar="A", help="cpu2, multi_gpu, fsdp2, zero3, ... or a YAML file")
    training.add_argument("--sweep", nargs="+", metavar="KEY=A,B", help="train with every combination of these values")

    comparing = commands.add_parser(
        "compare",
        help="train a recipe and its rivals on the same data, and report which is better",
        usage="%(prog)s RECIPE [--quick] [--stages dpo,ppo,rloo] [--seeds 0,1,2] [--betas 0.05,0.1] [--budget samples]",
        epilog="Every other flag is a TRL argument: --max_length 512 for all recipes, --ppo.learning_rate 1e-5 for one",
        allow_abbrev=False,
    )
    comparing.add_argument("recipe", metavar="RECIPE", help="a DPO recipe; NAME_reward and NAME_ppo stand beside it")
    comparing.add_argument("--quick", action="store_true", help="one beta, one seed")
    comparing.add_argument("--stages", type=_listed(str), metavar="A,B", help="dpo,ppo; there is rloo, too")
    comparing.add_argument("--seeds", type=_listed(int), metavar="N,N", help="0,1,2")
    comparing.add_argument("--betas", type=_listed(spelling), metavar="X,Y", help="by default the DPO recipe's own")
    comparing.add_argument("--budget", choices=("samples", "compute"), help="what is equal; by default samples")
    comparing.add_argument("--prompts", type=_at_least(2), help="to answer, of the test split: 200")
    comparing.add_argument("--judge", metavar="MODEL", help="a reward model or classifier; by default the recipe's own")
    comparing.add_argument("--output_dir", metavar="DIR", help="by default outputs/compare/RECIPE")
    comparing.add_argument("--profile", metavar="P", help="as in train")
    comparing.add_argument("--accelerate", metavar="A", help="as in train")

    evaluating = commands.add_parser(
        "evaluate",
        help="a run, or any model, beside the model that it was trained from",
        usage="%(prog)s RECIPE_OR_MODEL [--base MODEL] [--dataset_name D] [--judge J] [--prompts 200] [--beta 0.1 ...]",
        epilog="Every other flag is one of those that `train` takes; a model needs --dataset_name.",
        allow_abbrev=False,
    )
    evaluating.add_argument(
        "model", metavar="RECIPE_OR_MODEL", help="a recipe, whose run it is, a folder or a Hub name"
    )
    evaluating.add_argument("--base", metavar="MODEL", help="the start; by default what the recipe or the run names")
    evaluating.add_argument("--judge", metavar="J", help="FILE.py:FUNCTION, a reward model, or https://HOST/v1")
    evaluating.add_argument("--judge_model", metavar="NAME", help="of an endpoint; its key is $OPENAI_API_KEY")
    evaluating.add_argument(
        "--judge_price", nargs=2, type=_at_least(0.0), metavar=("IN", "OUT"), help="of a million tokens"
    )
    evaluating.add_argument("--judge_workers", type=_at_least(1), metavar="N", help="requests at a time: 8")
    evaluating.add_argument("--judge_options", type=_json_object, metavar="JSON", help="further fields of a request")
    evaluating.add_argument("--yes", action="store_true", help="spend what an endpoint costs without asking")
    evaluating.add_argument("--prompts", type=_at_least(2), default=200, help="to answer, of the held-out pairs: 200")
    evaluating.add_argument("--tasks", type=_listed(str), metavar="A,B", help="of lm-evaluation-harness, on both")
    evaluating.add_argument("--tasks_path", metavar="DIR", help="task files of your own, in its format")
    evaluating.add_argument("--output_dir", metavar="DIR", help="a recipe's run; of a model, where the results go")
    evaluating.add_argument("--profile", metavar="P", help="as in train")

    merging = commands.add_parser("merge", help="make a full model of a run's LoRA adapter", allow_abbrev=False)
    merging.add_argument("run", metavar="RUN", help="the folder of a run that left a LoRA adapter")
    merging.add_argument("--output_dir", metavar="DIR", help="by default RUN_merged")
    merging.add_argument("--base", metavar="MODEL", help="where the model that it was trained on is elsewhere now")

    paging = commands.add_parser("page", help="write a run's curves, model card and page again", allow_abbrev=False)
    paging.add_argument("run", metavar="RUN", help="a run's folder")

    sampling = commands.add_parser(
        "sample", help="write a model's answers to the prompts of a dataset", allow_abbrev=False
    )
    sampling.add_argument("model", metavar="MODEL", help="a folder, a Hub name, or a run that left a LoRA adapter")
    sampling.add_argument("--output", metavar="FILE", help="samples.jsonl, or pairs.jsonl with --pairs")
    sampling.add_argument("--pairs", action="store_true", help="write pairs: the answer as rejected, chosen as it was")
    sampling.add_argument(
        "--judge", metavar="MODEL", help="write pairs: answers ranked by a reward model or classifier"
    )
    words = "plain text to go on with: the first A to B words of each prompt"
    sampling.add_argument("--first_words", nargs=2, type=_at_least(1), metavar=("A", "B"), help=words)
    sampling.add_argument("--num_samples", type=_at_least(1), default=1, help="answers to each prompt: 1")

    answering = commands.add_parser("answer", help="write answers for AlpacaEval or MT-Bench", allow_abbrev=False)
    answering.add_argument("model", metavar="MODEL", help="as in sample")
    answering.add_argument("--benchmark", required=True, choices=("alpaca_eval", "mt_bench"), help="who is to judge")
    answering.add_argument("--name", help="of the model in the benchmark; by default that of its folder")
    answering.add_argument("--output_dir", metavar="DIR", help="by default outputs/BENCHMARK")

    trying = commands.add_parser(
        "try", help="ask a run's model and the one it started from, side by side", allow_abbrev=False
    )
    trying.add_argument("run", metavar="RUN", help="a run's folder")
    trying.add_argument("prompt", nargs="?", metavar="PROMPT", help="without it each line typed or piped in")
    trying.add_argument("--base", metavar="MODEL", help="the start; by default what the run names")
    trying.add_argument("--system", metavar="TEXT", help="a system message in front of the prompt")
    for verb in (merging, sampling, answering, trying):
        verb.add_argument(
            "--trust_remote_code",
            nargs="?",
            choices=("true", "false"),
            const="true",
            help="let code that comes with the model run; no file can allow that",
        )
    for verb in (sampling, answering):
        verb.add_argument("--batch_size", type=_at_least(1), default=16, help="answers at a time: 16")
        for name in DATASET_FLAGS:
            verb.add_argument(f"--{name}", required=name == "dataset_name", help="as for a recipe")
    by_category = "0.7, and for MT-Bench that of the category"
    warmths = ((sampling, 1.0, "1.0"), (evaluating, 1.0, "1.0"), (trying, 0.7, "0.7"), (answering, None, by_category))
    for verb, warmth, words in warmths:
        most = 1024 if verb is answering else 256
        verb.add_argument("--temperature", type=_at_least(0.0), default=warmth, help=f"{words}; 0 is greedy")
        verb.add_argument("--max_new_tokens", type=_at_least(1), default=most, help=f"where an answer is cut: {most}")
        verb.add_argument("--seed", type=_at_least(0), default=0, help="of the sampling: 0")

    inspecting = commands.add_parser(
        "inspect",
        help="look at a recipe's data, or at any preference pairs, before training",
        usage="%(prog)s RECIPE_OR_DATASET [--gpu 24GB] [--with_model true] [--profile P] [--max_length 512 ...]",
        epilog="Every other flag is one of those that `train` takes; a dataset needs --model_name_or_path.",
        allow_abbrev=False,
    )
    inspecting.add_argument("data", metavar="RECIPE_OR_DATASET", help="a recipe, a file, a folder or a hub name")
    inspecting.add_argument("--gpu", metavar="24GB", help="the card to fit; by default this machine")
    inspecting.add_argument(
        "--with_model",
        nargs="?",
        choices=("true", "false"),
        const="true",
        help="load the model for off-distribution pairs",
    )
    inspecting.add_argument("--profile", metavar="P", help="as in train; by default what the machine or --gpu has")
    add_doctor(commands)
    return parser


def _listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Reads different values with commas between them."""

    def values(text: str) -> list[Any]:
        found = [kind(word.strip()) for word in text.split(",")]
        if len({*found}) < len(found):
            raise ValueError
        return found

    return values


def _json_object(text: str) -> dict[str, Any]:
    """Reads a JSON object."""
    with suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise argparse.ArgumentTypeError('a JSON object is needed: {"max_tokens": 300}')  # the text may hold a key


def _at_least(least: float) -> Callable[[str], float]:
    """Reads a number of the same type as `least`, and no smaller."""

    def number(text: str) -> float:
        value = type(least)(text)
        if not value >= least:
            raise ValueError
        return value

    return number


if __name__ == "__main__":
    sys.exit(main())
