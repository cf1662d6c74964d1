"""Measures verifiers for docs/verifier.md: best of N in the quickstart's world, and a control for who wrote a solution.

    .venv/bin/python benchmarks/verifier.py outputs/quickstart_sft outputs/quickstart_reward
    .venv/bin/python benchmarks/verifier.py outputs/gsm8k_verifier --solutions example_model_solutions.jsonl

The first call samples 4 answers of the SFT model to each of the playground's 200 evaluation prompts; the exact reward
says which are right. The second call scores the questions that the run held out. OpenAI's four solutions come from four
models of different strength. The control is the accuracy on pairs of a right and a wrong solution, where each two
models weigh the same in both directions: a verifier that only knows the author of a solution has 0.5.
"""

import argparse
from itertools import combinations
from typing import Any

import numpy as np

from dpo_recipes import playground
from dpo_recipes.dataset_adapters import marked_solutions
from dpo_recipes.estimates import estimate, mean_with_interval
from dpo_recipes.loading import load_rows, split_pairs
from dpo_recipes.models.best_of import best_of
from dpo_recipes.models.generation import generate
from dpo_recipes.models.open import open_model, run_settings
from dpo_recipes.models.rewards import model_judge
from dpo_recipes.recipe import RecipeArguments


def quickstart(sft: str, verifier: str) -> dict[str, Any]:
    """Best of N of the SFT model's answers by the reward model; a vote goes to the whole text."""
    model, tokenizer = open_model(sft)
    asked = [prompt for prompt in playground.evaluation_prompts() for _ in range(4)]
    options = dict(max_new_tokens=playground.MAX_NEW_TOKENS, temperature=1.0, batch_size=64)
    texts = [answer["text"] for answer in generate(model, tokenizer, asked, **options)]
    right = [playground.reward(*both) == 1 for both in zip(asked, texts, strict=True)]
    scores = model_judge(verifier)(asked, texts)
    return best_of(*(np.reshape(each, (-1, 4)).tolist() for each in (scores, right, texts)))


def gsm8k(verifier: str, solutions: str) -> dict[str, Any]:
    """Shares of right solutions by author, mean scores by author, and the accuracy that authors do not help."""
    rows = load_rows(RecipeArguments(dataset_name=solutions))["train"]
    authors = [name for name, kind in rows.features.items() if isinstance(kind, dict)]
    held = split_pairs({"train": marked_solutions(rows)}, run_settings(verifier)["held_out"])["test"]
    asked = [(row["prompt"], text) for row in held for text in row["completions"]]
    scores = model_judge(verifier)(*zip(*asked, strict=True)).reshape(len(held), len(authors))
    right = np.array(held["right"][:])
    directed = []  # for each two authors, in both directions: the pairs that are ranked right, and all pairs
    for one, other in combinations(range(len(authors)), 2):
        for first, second in ((one, other), (other, one)):
            is_pair = right[:, first] & ~right[:, second]
            directed += [is_pair & (scores[:, first] > scores[:, second]), is_pair]

    def balanced(*columns: Any) -> float:
        return float(
            np.mean([won.sum() / max(pairs.sum(), 1) for won, pairs in zip(*[iter(columns)] * 2, strict=True)])
        )

    found = estimate(balanced, [[column.astype(float) for column in directed]])
    return {
        "right by author": {name: str(mean_with_interval(right[:, n])) for n, name in enumerate(authors)},
        "mean score by author": {name: round(float(scores[:, n].mean()), 3) for n, name in enumerate(authors)},
        "accuracy, each two authors balanced": {key: round(found[key], 3) for key in ("mean", "low", "high", "n")},
    }


def main() -> None:
    """Parses the arguments, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="SFT model and reward model, or a verifier alone")
    parser.add_argument("--solutions", metavar="FILE", help="OpenAI's marked solutions")
    options = parser.parse_args()
    found = gsm8k(options.models[0], options.solutions) if options.solutions else quickstart(*options.models)
    sizes = found.pop("by_size", {})
    lines = [f"{name}: {value}" for name, value in found.items()]
    lines += [
        f"N = {size}, {way}: {share['mean']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"
        for size, ways in sizes.items()
        for way, share in ways.items()
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
