"""benchmarks/alpaca_eval_agreement.py, on a repository of AlpacaEval's layout whose every weight is known."""

import json
import subprocess
import sys

import numpy as np
import pytest
from commands import REPOSITORY, run_command
from scipy.special import expit

JUDGE, BASELINE = "weighted_alpaca_eval_gpt4_turbo", "gpt4_1106_preview"
INSTRUCTIONS = 150
LENGTH, DIFFICULTY = 0.6, 0.8  # weights that the models share
BIAS = {"weak": -0.9, "even": 0.1, "strong": 0.7}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture
def alpaca_eval(tmp_path):
    """A clone, and for each model the win rate and the length-controlled one that its weights give."""
    rng, folder = np.random.default_rng(0), tmp_path / "alpaca_eval"
    hard, lengths = rng.normal(size=INSTRUCTIONS), rng.integers(100, 900, size=INSTRUCTIONS)
    texts = [f"Do {number}." for number in range(INSTRUCTIONS)]
    biases = {**BIAS, f"{BASELINE}_verbose": 0.0, f"{BASELINE}_concise": 0.0}
    expected, weights, board = {}, [], []
    for name, bias in biases.items():
        written = lengths + rng.integers(-90, 400, size=INSTRUCTIONS)
        shorter = lengths - written
        equal = DIFFICULTY * hard + bias
        won = expit(LENGTH * np.tanh(shorter / shorter.std(ddof=1)) + equal)
        expected[name] = (100 * won.mean(), 100 * expit(equal).mean())
        weights.append(f"{name},{LENGTH},{DIFFICULTY},{bias}")
        answers = [
            {"instruction": text, "output": "o" * size} for text, size in zip(texts, written.tolist(), strict=True)
        ]
        write(folder / f"results/{name}/model_outputs.json", answers)
        if name not in BIAS:
            continue
        rows = [
            {"instruction": text, "output_1": "b" * size, "output_2": row["output"], "preference": 1 + float(share)}
            for text, size, row, share in zip(texts, lengths.tolist(), answers, won, strict=True)
        ]
        write(folder / f"results/{name}/{JUDGE}/annotations.json", rows)
        board.append("{},{},{}".format(name, *expected[name]))
        fitted = [row | {"glm_preference": float(share)} for row, share in zip(rows, expit(equal), strict=True)]
        write(folder / f"results/{name}/{JUDGE}/{JUDGE}/annotations.json", fitted)
    own = [{"instruction": text, "output": "b" * size} for text, size in zip(texts, lengths.tolist(), strict=True)]
    write(folder / f"results/{BASELINE}/model_outputs.json", own)
    source = folder / "src/alpaca_eval"
    header = ",np.tanh(std_delta_len),instruction_difficulty,not_gamed_baseline.astype(float)"
    table = source / f"metrics/weights/{JUDGE}/length_controlled_v1/baseline_{BASELINE}.csv"
    write(table, "\n".join([header, *weights]) + "\n")
    table = source / f"leaderboards/data_AlpacaEval_2/{JUDGE}_leaderboard.csv"
    write(table, "\n".join([",win_rate,length_controlled_winrate", *board]) + "\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a", "commit", "-qm", "Data"]):
        subprocess.run(["git", "-C", folder, *words], check=True)
    return folder, {name: expected[name] for name in BIAS}


def test_win_rates_and_the_regression_are_those_of_the_known_weights(alpaca_eval, tmp_path):
    folder, expected = alpaca_eval
    page = tmp_path / "page.md"
    script = REPOSITORY / "benchmarks" / "alpaca_eval_agreement.py"
    result = run_command(sys.executable, script, folder, "--out", page, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.read_text().splitlines()]
    rows = {row[0]: [float(cell) for cell in row[1:]] for row in rows if row[0] in expected}
    assert list(rows) == ["strong", "even", "weak"], "the best first"
    for name, (win_rate, controlled) in expected.items():
        count, theirs, ours, theirs_controlled, _, by_regression = rows[name]
        assert count == INSTRUCTIONS
        assert ours == theirs == pytest.approx(win_rate, abs=0.006)
        assert theirs_controlled == pytest.approx(controlled, abs=0.006)
        assert by_regression == pytest.approx(controlled, abs=0.02)
        assert abs(controlled - win_rate) > 1, "length counts"
