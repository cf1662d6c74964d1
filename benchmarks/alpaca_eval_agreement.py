"""Win rates and length-controlled win rates of AlpacaEval 2, computed again from its annotations.

The script compares our win rates with those of AlpacaEval's leaderboard (Dubois et al. 2024), for every model whose
annotations by the default judge are available. Win rates are means of the judge's preference. Length-controlled win
rates are computed in two ways: by `length_controlled`, whose regression knows only the difference in length; and, in
this script only, with two further inputs of AlpacaEval's regression. These are the difficulty of an instruction, and
the answers of two baselines told to be verbose and concise, which its effects of length and difficulty have to fit too.

The repository holds neither input, but both can be computed from it. If annotations hold `glm_preference`, the
prediction of AlpacaEval's own fit, its log-odds are a bias plus a weight times the difficulty, and the table of weights
holds both. The lengths of the two baselines' answers are in the repository. The judge's preferences for them are
replaced by those that their own fits predict, because a logistic regression on the same columns gives the same result.
AlpacaEval chooses the strength of its L1 regularisation by cross-validation; the regularisation here is negligible.

Usage: python benchmarks/alpaca_eval_agreement.py PATH_OF_ALPACA_EVAL [--out docs/results/alpaca_eval.md]

PATH is a clone of github.com/tatsu-lab/alpaca_eval, bare or not. None of its data (CC BY-NC 4.0) is kept.
"""

import argparse
import csv
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, logit
from scipy.stats import kendalltau
from sklearn.linear_model import LogisticRegression

from dpo_recipes.estimates import length_controlled, mean

JUDGE, BASELINE = "weighted_alpaca_eval_gpt4_turbo", "gpt4_1106_preview"
LEADERBOARD = f"src/alpaca_eval/leaderboards/data_AlpacaEval_2/{JUDGE}_leaderboard.csv"
WEIGHTS = f"src/alpaca_eval/metrics/weights/{JUDGE}/length_controlled_v1/baseline_{BASELINE}.csv"
FITTED = f"{JUDGE}/{JUDGE}/annotations.json"  # annotations with AlpacaEval's own predictions
LAMBDA = 0.2  # the weight of an answer of either baseline together
KINDS = {
    "win_rate": "win rate",
    "length_controlled": "length-controlled",
    "with_difficulty": "by AlpacaEval's regression",
}


def show(repository: Path, file: str) -> str | None:
    """The text of a file in the repository's last commit, or None if there is no such file."""
    found = subprocess.run(
        ["git", "-C", repository, "show", f"HEAD:{file}"],
        capture_output=True,
        check=False,
        env={"GIT_NO_LAZY_FETCH": "1"},
    )
    return None if found.returncode else found.stdout.decode()


def read_table(text: str) -> dict[str, dict[str, float]]:
    """Numbers of a CSV file by the model's name, which is first in each line; cells that are no number are left out."""
    rows = {}
    for row in csv.DictReader(io.StringIO(text)):
        name = row.pop("")
        rows[name] = {key: float(value) for key, value in row.items() if value.replace(".", "").lstrip("-").isdigit()}
    return rows


def annotations(repository: Path, model: str, file: str) -> list[dict[str, Any]]:
    """The judge's annotations of one model, or an empty list if there are none."""
    return json.loads(show(repository, f"results/{model}/{file}") or "[]")


def recover_difficulty(repository: Path, weights: dict[str, dict[str, float]]) -> dict[str, float]:
    """Difficulty of each instruction by the predictions of AlpacaEval's own fits, as a mean over models with a fit."""
    found: dict[str, list[float]] = {}
    for model, of in weights.items():
        for row in annotations(repository, model, FITTED):
            if row.get("glm_preference") is not None:
                odds = logit(row["glm_preference"]) - of["not_gamed_baseline.astype(float)"]
                found.setdefault(row["instruction"], []).append(odds / of["instruction_difficulty"])
    spread = max((float(np.ptp(values)) for values in found.values()), default=0.0)
    print(f"{len(found)} difficulties, from up to {max(map(len, found.values()))} models, which differ by {spread:.1e}")
    return {instruction: float(np.mean(values)) for instruction, values in found.items()}


def told_to(repository: Path, weights: dict[str, dict[str, float]], difficulty: dict[str, float]) -> tuple[Any, Any]:
    """Features (rows, 3) and expected preferences (rows,) of the baselines that were told to be verbose and concise."""
    features, preferences = [], []
    own = {row["instruction"]: len(row["output"]) for row in outputs(repository, BASELINE)}
    for model in (f"{BASELINE}_verbose", f"{BASELINE}_concise"):
        rows = outputs(repository, model)
        shorter = np.array([own[row["instruction"]] - len(row["output"]) for row in rows], dtype=float)
        hard = np.array([difficulty[row["instruction"]] for row in rows])
        features.append(np.stack([np.tanh(shorter / shorter.std(ddof=1)), hard, np.ones(len(rows))], axis=1))
        preferences.append(expit(features[-1] @ np.array(list(weights[model].values()))))
        features[-1][:, 2] = 0.0  # the bias is the model's alone
    return np.concatenate(features), np.concatenate(preferences)


def outputs(repository: Path, model: str) -> list[dict[str, Any]]:
    """A model's answers."""
    return json.loads(show(repository, f"results/{model}/model_outputs.json") or "[]")


def with_difficulty(won: Any, longer: Any, hard: Any, *, told: tuple[Any, Any]) -> float:
    """Mean over instructions of the win rate that AlpacaEval's regression predicts at equal length."""
    own = np.stack([np.tanh(-longer / longer.std(ddof=1)), hard, np.ones(len(won))], axis=1)
    features, preferences = np.concatenate([own, told[0]]), np.concatenate([won, told[1]])
    counts = np.concatenate([np.ones(len(won)), np.full(len(told[1]), LAMBDA / 2)])
    outcomes, weights = (
        np.repeat([1, 0], len(counts)),
        np.concatenate([counts * preferences, counts * (1 - preferences)]),
    )
    fit = LogisticRegression(C=1e4, fit_intercept=False, solver="newton-cholesky", max_iter=1000)
    fit.fit(np.concatenate([features, features]), outcomes, sample_weight=weights)
    return float(np.mean(expit(own[:, 1:] @ fit.coef_[0, 1:])))


def main() -> None:
    """Computes the win rates, prints them and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/results/alpaca_eval.md"))
    options = parser.parse_args()
    leaderboard, weights = (read_table(show(options.repository, file) or "") for file in (LEADERBOARD, WEIGHTS))
    commit = subprocess.check_output(["git", "-C", options.repository, "rev-parse", "HEAD"], text=True).strip()
    difficulty = recover_difficulty(options.repository, weights)
    told = told_to(options.repository, weights, difficulty)
    rows: list[dict[str, Any]] = []
    for model, published in leaderboard.items():
        rated = annotations(options.repository, model, f"{JUDGE}/annotations.json")
        if not rated or model == BASELINE:
            continue
        # 0 and 1.5 are draws, 1 a win of the baseline, 2 one of the model; between them the judge's probability.
        won = np.array([row["preference"] or 1.5 for row in rated], dtype=float) - 1
        longer = np.array([len(row["output_2"]) - len(row["output_1"]) for row in rated], dtype=float)
        # By the number of the row, as AlpacaEval does it: where annotations are missing, those after it are shifted.
        hard = np.array(list(difficulty.values())[: len(rated)])
        row = {
            "model": model,
            "n": len(won),
            "theirs": published["win_rate"],
            "lc": published["length_controlled_winrate"],
        }
        row["win_rate"] = 100 * mean(won)
        row["length_controlled"] = 100 * length_controlled(won, longer)
        row["with_difficulty"] = 100 * with_difficulty(won, longer, hard, told=told)
        rows.append(row)
        print(
            "{model:<42}{theirs:>8.2f}{win_rate:>8.2f}{lc:>8.2f}{length_controlled:>8.2f}{with_difficulty:>8.2f}".format(
                **row
            )
        )
    options.out.write_text(as_markdown(rows, commit))
    print(f"{len(rows)} models: {options.out}")


def as_markdown(rows: list[dict[str, Any]], commit: str) -> str:
    """The numbers as a page."""
    published = {"win_rate": "theirs", "length_controlled": "lc", "with_difficulty": "lc"}
    lines = [
        "# AlpacaEval 2, computed again",
        "",
        f"Made by `benchmarks/alpaca_eval_agreement.py` from tatsu-lab/alpaca_eval at {commit[:12]}: the {len(rows)}",
        f"models of its leaderboard whose annotations by {JUDGE} are in the repository as it could be",
        "had (files under 4 MiB). Percentage points; the difference is ours less theirs.",
        "",
        "| | mean difference | mean absolute | largest absolute | Kendall's tau of the two rankings |",
        "|---|---|---|---|---|",
    ]
    for kind, label in KINDS.items():
        ours, theirs = (np.array([row[key] for row in rows]) for key in (kind, published[kind]))
        gap = ours - theirs
        tau = kendalltau(ours, theirs).statistic
        lines.append(f"| {label} | {gap.mean():+.4f} | {abs(gap).mean():.4f} | {abs(gap).max():.4f} | {tau:.3f} |")
    gap = {row["model"]: abs(row["with_difficulty"] - row["lc"]) for row in rows}
    plain = [abs(row["length_controlled"] - row["lc"]) for row in rows if 50 <= row["theirs"] <= 75]
    lines += [
        "",
        f"With AlpacaEval's regression {sum(by < 0.1 for by in gap.values())} of the {len(rows)} models are within a",
        "tenth of a point. (It finds an instruction's difficulty by the number of the row, which shifts the",
        "difficulties for the models that have fewer than 805 answers; this script does the same.)",
        "",
        f"Our regression knows only the length. For the {len(plain)} models that win 50 to 75 % it is at most",
        f"{max(plain):.1f} points from AlpacaEval's. For models that lose nearly all comparisons with much shorter",
        "answers, it is higher than AlpacaEval's. Most tuned models are of the first kind when they are compared",
        "with their initial model; for the others, trust the win rate.",
        "",
        "| model | n | win rate, theirs | ours | length-controlled, theirs | ours | by its regression |",
        "|---|---|---|---|---|---|---|",
    ]
    form = (
        "| {model} | {n} | {theirs:.2f} | {win_rate:.2f} | {lc:.2f} | {length_controlled:.2f} | {with_difficulty:.2f} |"
    )
    lines += [form.format(**row) for row in sorted(rows, key=lambda row: -row["lc"])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
