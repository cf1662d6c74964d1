"""Offline DPO, DPO in 1, 2 and 4 rounds, PPO and RLOO in the quickstart's world, at equal samples and at matched KL.

The recipes run as they are, one after the other, from the same SFT model and with the same reward model. Every run
leaves some checkpoints. Each of them answers the same prompts, whose exact reward no run was trained on, so that a run
is a curve of the reward against the KL to the first model. Curves are compared where they have the same KL.

Usage: python benchmarks/online_or_offline.py [--seeds 0,1,2,3,4] [--samples 704] [--output_dir DIR]

It runs in a folder that holds outputs/quickstart_sft and outputs/quickstart_reward. What is finished is not repeated,
and seeds come one after the other, so that a run that is stopped leaves whole seeds. Results are results.json, table.md
and reward_kl.svg in the output folder.
"""

import argparse
import json
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from dpo_recipes import playground
from dpo_recipes.estimates import t_interval, wilson
from dpo_recipes.files import read_json, write_json, write_text
from dpo_recipes.models.checkpoints import checkpoints_of
from dpo_recipes.models.generation import sample_tokens
from dpo_recipes.models.likelihood import answer_logps
from dpo_recipes.models.open import open_model
from dpo_recipes.models.pair_ids import encode_pairs
from dpo_recipes.terminal import say

RECIPES = Path(__file__).parent.parent / "recipes"
START, REWARD = "outputs/quickstart_sft", "outputs/quickstart_reward"
CONTENDERS = ("offline DPO", "1 round", "2 rounds", "4 rounds", "PPO", "RLOO", "RLOO by 16")
COLOURS = ("#1f82c0", "#9d3df2", "#9d3df2", "#9d3df2", "#d55e00", "#009e73", "#009e73")
LINES = ("-", "-", "--", ":", "-", "-", "--")
GRID = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5)  # nats
ROLLOUTS = {"PPO": 64, "RLOO": 64, "RLOO by 16": 16}  # answers
POINTS = 4  # checkpoints of a run, about


def flags(contender: str, samples: int) -> tuple[str, dict[str, Any]]:
    """The recipe of a contender, and its settings for so many samples: pairs that it sees, or answers that it samples.

    Offline DPO sees its pairs once. A pair of a round is the best and the worst of four answers, and is seen four
    times, so that all kinds of DPO make about as many updates. RLOO makes one update a rollout, and so, by 16 answers a
    rollout, as many as DPO. PPO makes eight.
    """
    if contender == "offline DPO":
        updates = samples // 16
        return "quickstart", {"max_steps": updates, "num_train_epochs": 1, "save_steps": -(-updates // POINTS)}
    if contender.endswith(("round", "rounds")):
        rounds, prompts = int(contender[0]), samples // 4
        updates = 4 * -(-prompts // rounds // 16)
        more = {"num_rounds": rounds, "num_prompts": prompts, "num_train_epochs": 4}
        return "quickstart_rounds", more | {"save_steps": -(-updates * rounds // POINTS)}
    rollout = ROLLOUTS[contender]
    rollouts = -(-samples // rollout)
    if contender == "PPO":
        return "quickstart_ppo", {"max_steps": 8 * rollouts, "save_steps": 8 * -(-rollouts // POINTS)}
    settings = {"generation_batch_size": rollout, "pairs_per_update": rollout}
    return "quickstart_rloo", settings | {"max_steps": rollouts, "save_steps": -(-rollouts // POINTS)}


def train(contender: str, seed: int, samples: int, folder: Path) -> None:
    """Trains in a process of its own that has the libraries already, and goes on where an earlier one was stopped."""
    recipe, settings = flags(contender, samples)
    settings |= {"model_name_or_path": START, "seed": seed, "output_dir": folder, "eval_strategy": "no"}
    settings |= {"save_total_limit": 20, "eval_pairs": 16, "health": "off", "use_cpu": True, "bf16": False}
    settings |= {"activation_checkpointing": False, "disable_tqdm": True, "dataloader_pin_memory": False}
    if recipe != "quickstart":
        settings["reward_model_name_or_path"] = REWARD
    if (folder / "settings.json").exists():
        settings["resume_from_checkpoint"] = True
    if process := os.fork():
        if os.waitpid(process, 0)[1]:
            raise SystemExit(f"{contender}, seed {seed} failed; the same command goes on in {folder}.")
        return
    sys.argv = [str(RECIPES / f"{recipe}.py"), *(str(word) for pair in settings.items() for word in _flag(*pair))]
    few = playground.evaluation_prompts(8)
    playground.evaluation_prompts = lambda *_, **__: few  # the recipe's own measurements are not used here
    status = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    finally:
        sys.stdout.flush()
        os._exit(status)


def _flag(name: str, value: Any) -> tuple[str, str]:
    return f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)


class Measured:
    """Measures checkpoints on the same prompts and held-out pairs; numbers of the first model are asked once."""

    def __init__(self) -> None:
        self.first, self.tokenizer = open_model(START)
        self.prompts = playground.evaluation_prompts()
        pairs = playground.load_pairs("playground")["test"]
        texts = [
            [self.tokenizer.apply_chat_template(each["prompt"], tokenize=False, add_generation_prompt=True)]
            + [self.tokenizer.apply_chat_template(each["prompt"] + each[side], tokenize=False) for side in SIDES]
            for each in pairs
        ]
        encoded = encode_pairs([(one, two, three) for one, two, three in texts], self.tokenizer)
        self.sides = [[(ids.prompt, getattr(ids, side)) for ids in encoded] for side in SIDES]
        self.before = self._margins(self.first)

    def _margins(self, model: Any) -> Any:
        chosen, rejected = (answer_logps(model, side, batch_size=50) for side in self.sides)
        return chosen - rejected

    def measure(self, name: str, seed: int, *, pairs: bool) -> dict[str, Any]:
        """Exact reward and KL of answers at temperature 1; with `pairs` the accuracies on the held-out pairs."""
        model, _ = open_model(name)
        options: dict[str, Any] = dict(max_new_tokens=playground.MAX_NEW_TOKENS, temperature=1.0, batch_size=100)
        sampled = sample_tokens(model, self.tokenizer, self.prompts, seed=seed, **options)
        ratio = answer_logps(model, sampled, batch_size=50) - answer_logps(self.first, sampled, batch_size=50)
        texts = [self.tokenizer.decode(answer, skip_special_tokens=True).strip() for _, answer in sampled]
        found = {
            "reward": float(np.mean([playground.reward(*both) for both in zip(self.prompts, texts, strict=True)])),
            "kl": float(ratio.mean()),
        }
        if pairs:
            margins = self._margins(model)
            found["preference_accuracy"] = _ahead(margins)
            found["implicit_accuracy"] = _ahead(margins - self.before)
        return found


SIDES = ("chosen", "rejected")


def _ahead(margins: Any) -> float:
    return wilson(float((margins > 0).sum() + (margins == 0).sum() / 2), len(margins)).mean


def runs(seeds: list[int], samples: int, root: Path) -> Iterator[dict[str, Any]]:
    """Trains and measures every contender, seed by seed, and yields its curve; finished ones are read."""
    measured: Measured | None = None
    for seed in seeds:
        for contender in CONTENDERS:
            folder = root / f"{contender.replace(' ', '-')}-{seed}"
            if not (held := read_json(folder.with_suffix(".json"))):
                say(f"\n{contender}, seed {seed}")
                train(contender, seed, samples, folder)
                measured = measured or Measured()
                checkpoints = checkpoints_of(folder)[::-1]
                points = [measured.measure(str(each), seed, pairs=each == checkpoints[-1]) for each in checkpoints]
                spent = read_json(folder / "done.json")
                held = {"contender": contender, "seed": seed, "points": points, "seconds": spent["train_seconds"]}
                held["first"] = read_json(root / f"first-{seed}.json")
                if not held["first"]:
                    held["first"] = measured.measure(START, seed, pairs=False)
                    write_json(root / f"first-{seed}.json", held["first"])
                write_json(folder.with_suffix(".json"), held)
                say(f"{contender}, seed {seed}: {json.dumps(points[-1])}")
            yield held


def at_kl(run: dict[str, Any], kl: float) -> float | None:
    """The reward of a run at a KL, linear between its points; None beyond its largest KL."""
    points = sorted([(0.0, run["first"]["reward"]), *((each["kl"], each["reward"]) for each in run["points"])])
    xs, ys = zip(*points, strict=True)
    return float(np.interp(kl, xs, ys)) if kl <= xs[-1] else None


def _with_interval(values: list[float], *, share: bool = True) -> str:
    low, high = t_interval(values, (0.0, 1.0) if share else (-np.inf, np.inf))
    return f"{np.mean(values):.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a row for each contender, with t intervals over seeds."""
    seeds = len({run["seed"] for run in found})
    head = ["", "reward", "KL, nats", "implicit-reward accuracy", *(f"reward at KL {kl:g}" for kl in GRID), "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for contender in CONTENDERS:
        own = [run for run in found if run["contender"] == contender]
        last = [run["points"][-1] for run in own]
        keys = ("reward", "kl", "implicit_accuracy")
        cells = [_with_interval([each[key] for each in last], share=key != "kl") for key in keys]
        for kl in GRID:
            there = [reward for run in own if (reward := at_kl(run, kl)) is not None]
            cells.append(_with_interval(there) if len(there) == seeds else f"not reached by {seeds - len(there)}")
        lines.append(f"| {contender} | " + " | ".join(cells) + f" | {np.mean([run['seconds'] for run in own]):.0f} |")
    return "\n".join(lines) + "\n"


def differences(found: list[dict[str, Any]]) -> str:
    """Markdown: by how much each contender's reward is above offline DPO's, paired by seed."""
    lines = [f"| less offline DPO | at the end | {' | '.join(f'at KL {kl:g}' for kl in GRID)} |"]
    lines.append("|---" * (len(GRID) + 2) + "|")
    base = {run["seed"]: run for run in found if run["contender"] == CONTENDERS[0]}
    for contender in CONTENDERS[1:]:
        own = [run for run in found if run["contender"] == contender]
        ends = [(run["points"][-1]["reward"], base[run["seed"]]["points"][-1]["reward"]) for run in own]
        cells = [_with_interval([one - other for one, other in ends], share=False)]
        for kl in GRID:
            both = [(at_kl(run, kl), at_kl(base[run["seed"]], kl)) for run in own]
            there = [one - other for one, other in both if one is not None and other is not None]
            cells.append(_with_interval(there, share=False) if len(there) == len(own) else "not reached")
        lines.append(f"| {contender} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(found: list[dict[str, Any]], file: Path) -> None:
    """Draws the curves of all runs: a thin line a run, a mark at its end."""
    mpl.rcParams["svg.hashsalt"] = "0"
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for contender, colour, line in zip(CONTENDERS, COLOURS, LINES, strict=True):
        for number, run in enumerate(run for run in found if run["contender"] == contender):
            points = [(0.0, run["first"]["reward"]), *((each["kl"], each["reward"]) for each in run["points"])]
            style = dict(color=colour, linestyle=line, linewidth=1, label=contender if not number else None)
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, markevery=[-1], **style)
    axes.set(xlabel="KL to the first model, nats an answer", ylabel="exact reward", ylim=(None, 1))
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None}, bbox_inches="tight")


def main() -> None:
    """Parses the call, trains, measures, and writes the results after every whole seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--samples", type=int, default=704)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/online_or_offline"))
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for run in runs([int(seed) for seed in options.seeds.split(",")], options.samples, options.output_dir):
        found.append(run)
        if len(found) % len(CONTENDERS) == 0:
            write_json(options.output_dir / "results.json", {"samples": options.samples, "runs": found})
            write_text(options.output_dir / "table.md", f"{table(found)}\n{differences(found)}")
            draw(found, options.output_dir / "reward_kl.svg")
            say((options.output_dir / "table.md").read_text())


if __name__ == "__main__":
    main()
