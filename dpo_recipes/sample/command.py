"""The verbs `sample` and `answer`."""

import argparse
from typing import Any

from dpo_recipes.flags import add_sampling, add_trust, at_least, given
from dpo_recipes.machine import set_environment

DATASET_FLAGS = ("dataset_name", "dataset_config", "dataset_train_split", "columns")


def add_parser(commands: Any) -> None:
    """Adds the verbs to the subparsers of `dpo-recipes`."""
    sampling = commands.add_parser(
        "sample",
        help="write a model's answers to the prompts of a dataset",
        usage="%(prog)s MODEL --dataset_name D [--pairs] [--judge MODEL] [--output FILE]",
        examples=[
            "sample outputs/hh_rlhf_lora --dataset_name Anthropic/hh-rlhf --pairs",
            "sample outputs/hh_rlhf_lora --dataset_name pairs.jsonl --judge A_REWARD_MODEL",
        ],
    )
    sampling.add_argument("model", metavar="MODEL", help="a folder, a Hub name, or a run that left a LoRA adapter")
    sampling.add_argument("--output", metavar="FILE", help="samples.jsonl, or pairs.jsonl with --pairs")
    sampling.add_argument("--pairs", action="store_true", help="write pairs: the answer as rejected, chosen as it was")
    judge = "write pairs, by a reward model, a classifier or FILE.py:FUNCTION"
    sampling.add_argument("--judge", metavar="J", help=judge)
    first = "plain text to go on with: the first A to B words of each prompt"
    sampling.add_argument("--first_words", nargs=2, type=at_least(1), metavar=("A", "B"), help=first)
    sampling.add_argument("--num_samples", metavar="N", type=at_least(1), default=1, help="answers to each prompt: 1")
    _add_shared(sampling)
    add_sampling(sampling, 1.0)
    sampling.set_defaults(call=_sample)

    answering = commands.add_parser(
        "answer",
        help="write answers for AlpacaEval or MT-Bench",
        usage="%(prog)s MODEL --benchmark alpaca_eval --dataset_name FILE [--output_dir DIR]",
        examples=["answer outputs/hh_rlhf_lora --benchmark mt_bench --dataset_name question.jsonl"],
    )
    answering.add_argument("model", metavar="MODEL", help="as in sample")
    names = ("alpaca_eval", "mt_bench")
    answering.add_argument("--benchmark", metavar="B", required=True, choices=names, help=" or ".join(names))
    answering.add_argument(
        "--name", metavar="NAME", help="of the model in the benchmark; by default that of its folder"
    )
    answering.add_argument("--output_dir", metavar="DIR", help="by default outputs/BENCHMARK")
    _add_shared(answering)
    add_sampling(answering, None, most=1024, words="0.7, and for MT-Bench that of the category")
    answering.set_defaults(call=_answer)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    add_trust(parser)
    parser.add_argument("--batch_size", metavar="N", type=at_least(1), default=16, help="answers at a time: 16")
    for name in DATASET_FLAGS:
        parser.add_argument(f"--{name}", metavar="VALUE", required=name == "dataset_name", help="as for a recipe")


def _sample(options: argparse.Namespace, flags: list[str]) -> None:
    arguments = _read(options)
    from dpo_recipes.sample.sampling import sample  # imports torch

    sample(**arguments)


def _answer(options: argparse.Namespace, flags: list[str]) -> None:
    arguments = _read(options)
    from dpo_recipes.sample.benchmarks import answer  # imports torch

    answer(**arguments)


def _read(options: argparse.Namespace) -> dict[str, Any]:
    """The options, of which those that name the dataset become its settings."""
    set_environment()
    from dpo_recipes.recipe import RecipeArguments  # imports torch

    arguments = given(options)
    named = {name: arguments.pop(name) for name in DATASET_FLAGS if name in arguments}
    return arguments | {"dataset": RecipeArguments(**named)}
