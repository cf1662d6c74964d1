"""PPO compared with TRL 1.9's experimental PPOTrainer, which it replaces, and TRL's RLOO and GRPO, on the quickstart.

    python benchmarks/bench_ppo.py --old_python ../trl-1.9/bin/python [--answers 512] [--parallel 2] [--quick]

TRL 1.9 needs a virtual environment of its own; without --old_python that trainer is left out, and the result says so:

    python3 -m venv ../trl-1.9
    ../trl-1.9/bin/pip install trl==1.9.2 transformers==5.23.0 torch==2.13.0 peft==0.21.2 datasets==5.2.0 \
        accelerate==1.15.0 numpy==2.4.6 jinja2

The protocol was fixed before the run that it describes, after trials of 64 to 512 answers (seeds 0, 7 and 100). The
trials showed that the middle of the grid learns and that its upper end is too high for TRL 1.9. They also showed that
256 answers bring greedy decoding to a reward of 1, which is why a training has no more than 512.

- All trainers start from `quickstart_sft` with the preset LORA, sample the same number of answers to the quickstart's
  training prompts, and get the playground's exact reward, so that optimisers are compared instead of judges. The shared
  settings are at the top of ppo_worker.py: answers a rollout, epochs over it, answers an update, KL coefficient, clip
  range, token limit, temperature 1, constant learning rate, AdamW. Both PPOs also share gamma, lambda, the value loss's
  weight and clip, a critic that starts from the SFT model with a score of 0, and no penalty for a missing end. RLOO and
  GRPO have 4 answers a prompt and otherwise TRL's defaults.
- Some differences belong to the trainers. Ours, RLOO and GRPO clip the gradient's norm to 1 and draw mini-batches
  once a rollout; TRL 1.9 does not clip, and draws them in each epoch. TRL 1.9 trains all weights of its critic (its
  example does too), ours a LoRA adapter and the score. TRL 1.9 gives the score one token after the end token, ours at
  it. GRPO has its KL in the loss, per token; RLOO in the reward, per answer.
- The learning rate of each trainer is chosen from the same grid, with seed 100 and as many answers, by the mean reward
  on 200 prompts of the quickstart's test split. Then the seeds 0, 1 and 2 are trained.
- Final reward is the mean exact reward of three answers at temperature 0.7 to each of the 200 evaluation prompts,
  which no pair has. Greedy answers are measured too. KL is log p(answer) - log p_reference(answer) of one answer at
  temperature 1 to each of them. All LoRA adapters are evaluated here, under one TRL.
- Ours is non-inferior to TRL 1.9 where the lower end of the 95 % interval of the difference in final reward is above
  -0.05, a twentieth of the reward's range. The interval is a bootstrap over prompts, the same for both, and over each
  one's seeds; Welch's t interval over seeds alone stands beside it, and is wide with three.
- Near the ceiling of 1 this difference says little. So the same difference is also given for the shorter trainings that
  are timed (with a constant learning rate they are the beginning of the others). It decides nothing.
- Seconds an answer are those of `train()`, with one thread, of trainings that run one at a time in an order that
  rotates; ratios are within a round, and their median says whether ours takes longer. CPU seconds are given too,
  because other processes may use the machine's other cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import numpy as np
import torch
import transformers
from bench_shared_prefix import hardware
from matplotlib.figure import Figure
from numpy.typing import NDArray
from peft import PeftModel
from ppo_worker import BETA, EPOCHS, GENERATIONS, GRPO, MINIBATCH, OLD, OURS, RLOO, ROLLOUT, Run
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_recipes import playground
from dpo_recipes.models.generation import generate, sample_tokens

ROOT = Path(__file__).resolve().parent.parent
NAMES = {OURS: "PPO, ours", OLD: "PPO, TRL 1.9", RLOO: "RLOO, TRL", GRPO: "GRPO, TRL"}
GRID = (3e-4, 1e-3, 3e-3)
TUNING_SEED = 100
SEEDS = (0, 1, 2)
MARGIN = 0.05
TEMPERATURE = 0.7
SAMPLES = 3  # answers to an evaluation prompt
ROUNDS = 3  # of timing


def train(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Runs a training in a process of its own and returns its result."""
    file = Path(run.folder, "result.json")
    if options.resume and file.is_file():
        return dict(json.loads(file.read_text()))
    python = options.old_python if run.trainer == OLD else sys.executable
    Path(run.folder).mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    worker = str(Path(__file__).with_name("ppo_worker.py"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, worker, json.dumps(asdict(run))], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{run} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return dict(json.loads(file.read_text()))


def load(start: str, folder: str | None) -> tuple[Any, Any]:
    """The initial model, with the LoRA adapter of a folder if one is given, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(start)
    return (PeftModel.from_pretrained(model, folder).eval() if folder else model), tokenizer


def rewards(model: Any, tokenizer: Any, prompts: list[Any], **options: Any) -> list[float]:
    """The exact reward of one answer to each prompt."""
    answers = generate(
        model, tokenizer, prompts, max_new_tokens=playground.MAX_NEW_TOKENS, batch_size=len(prompts), **options
    )
    return [playground.reward(prompt, answer["text"]) for prompt, answer in zip(prompts, answers, strict=True)]


def sampled_rewards(model: Any, tokenizer: Any, prompts: list[Any]) -> list[float]:
    """The mean reward of a few sampled answers to each prompt."""
    drawn = [rewards(model, tokenizer, prompts, temperature=TEMPERATURE, seed=seed) for seed in range(SAMPLES)]
    return [statistics.fmean(each) for each in zip(*drawn, strict=True)]


@torch.no_grad()
def answer_logps(model: Any, sampled: list[tuple[list[int], list[int]]]) -> NDArray[np.float64]:
    """Log-prob of each answer after its prompt, end token included. Shape (answers,)."""
    sums = []
    for prompt, answer in sampled:  # one at a time: nothing is padded
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        sums.append(logits.double().log_softmax(dim=-1).gather(1, torch.tensor(answer)[:, None]).sum().item())
    return np.array(sums)


def evaluate(start: str, folder: str | None, prompts: list[Any]) -> dict[str, Any]:
    """Rewards by prompt and their means, KL to the reference model in nats with its standard error, lengths."""
    model, tokenizer = load(start, folder)
    drawn = sampled_rewards(model, tokenizer, prompts)
    greedy = rewards(model, tokenizer, prompts)
    options = dict(max_new_tokens=playground.MAX_NEW_TOKENS, temperature=1.0, batch_size=len(prompts))
    sampled = [both for both in sample_tokens(model, tokenizer, prompts, **options) if both[1]]
    result = {
        "rewards": drawn,
        "reward": statistics.fmean(drawn),
        "greedy": float(np.mean(greedy)),
        "tokens": statistics.fmean(len(answer) for _, answer in sampled),
        "ended": statistics.fmean(answer[-1] == tokenizer.eos_token_id for _, answer in sampled),
    }
    if folder:
        ratios = answer_logps(model, sampled)
        with model.disable_adapter():
            ratios -= answer_logps(model, sampled)
        result |= {"kl": float(ratios.mean()), "kl_error": float(ratios.std(ddof=1) / len(ratios) ** 0.5)}
    return result


def interval(ours: NDArray[np.float64], old: NDArray[np.float64]) -> dict[str, Any]:
    """Mean difference with its 95 % bootstrap interval over prompts and seeds, and Welch's over seeds.

    Args:
        ours: Rewards. Shape (seeds, prompts).
        old: Rewards for the same prompts. Shape (seeds, prompts).
    """
    generator = np.random.default_rng(0)
    seeds, prompts = ours.shape
    means = []
    for _ in range(10_000):
        drawn = generator.integers(prompts, size=prompts)
        mine, theirs = (rows[generator.integers(seeds, size=seeds)][:, drawn].mean() for rows in (ours, old))
        means.append(mine - theirs)
    result = {"mean": float(ours.mean() - old.mean()), "bootstrap": np.percentile(means, [2.5, 97.5]).tolist()}
    if seeds > 1:
        by_seed = stats.ttest_ind(ours.mean(axis=1), old.mean(axis=1), equal_var=False).confidence_interval()
        result["welch"] = [float(by_seed.low), float(by_seed.high)]
    return result


class Bench:
    """The trainings, each followed by its measurements, and their folders."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.trainers = [name for name in NAMES if name != OLD or options.old_python]
        self.lock = threading.Lock()  # sampling seeds torch's one generator
        self.prompts = playground.evaluation_prompts(options.prompts)
        tested = playground.load_pairs("playground")["test"]["prompt"]
        self.validation = list({row[0]["content"]: row for row in tested}.values())[: options.prompts]
        self.started = time.perf_counter()

    def run(self, trainer: str, *, seed: int, learning_rate: float, answers: int, name: str) -> Run:
        """Settings of one training."""
        folder = self.options.folder / f"{trainer}-{name}"
        return Run(trainer, str(self.options.start), seed, learning_rate, answers, str(folder))

    def say(self, run: Run, result: dict[str, Any], what: str) -> None:
        """Prints one line of progress."""
        minutes = (time.perf_counter() - self.started) / 60
        settings = f"seed {run.seed}, learning rate {run.learning_rate:g}"
        print(f"{minutes:5.1f} min  {NAMES[run.trainer]}, {settings}: {result['seconds']:.0f} s, {what}", flush=True)

    def together(self, do: Any, runs: list[Run]) -> list[dict[str, Any]]:
        """Results of `do` for each of the runs, a few at a time."""
        with ThreadPoolExecutor(self.options.parallel) as pool:
            return list(pool.map(do, runs))

    def tune(self, run: Run) -> dict[str, Any]:
        """A training with its reward on the validation prompts."""
        result = train(run, self.options)
        with self.lock:
            drawn = rewards(*load(run.start, run.folder), self.validation, temperature=TEMPERATURE)
        self.say(run, result, f"validation reward {statistics.fmean(drawn):.3f}")
        return result | {"validation": statistics.fmean(drawn)}

    def final(self, run: Run) -> dict[str, Any]:
        """A training with its evaluation."""
        result = train(run, self.options)
        with self.lock:
            result |= evaluate(run.start, run.folder, self.prompts)
        self.say(run, result, f"reward {result['reward']:.3f}, greedy {result['greedy']:.3f}, KL {result['kl']:.1f}")
        return result

    def measure(self) -> dict[str, Any]:
        """All trainings, by stage."""
        options = self.options
        tuned = self.together(
            self.tune,
            [
                self.run(name, seed=TUNING_SEED, learning_rate=rate, answers=options.answers, name=f"tune-{rate:g}")
                for name in self.trainers
                for rate in options.grid
            ],
        )
        best = {
            name: max((row for row in tuned if row["trainer"] == name), key=lambda row: row["validation"])
            for name in self.trainers
        }
        chosen = {name: row["learning_rate"] for name, row in best.items()}
        finals = self.together(
            self.final,
            [
                self.run(name, seed=seed, learning_rate=chosen[name], answers=options.answers, name=f"seed-{seed}")
                for seed in options.seeds
                for name in self.trainers
            ],
        )
        timed = []
        for turn in range(options.rounds):
            for place in range(len(self.trainers)):
                name = self.trainers[(place + turn) % len(self.trainers)]
                run = self.run(
                    name,
                    seed=turn,
                    learning_rate=chosen[name],
                    answers=options.timed_answers,
                    name=f"time-{turn}",
                )
                result = train(run, options) | {"round": turn}
                self.say(run, result, f"{result['cpu_seconds']:.0f} CPU s, alone")
                timed.append(result)
        for row in timed:  # now that nothing is timed any more
            row["rewards"] = sampled_rewards(*load(row["start"], row["folder"]), self.prompts)
            row["reward"] = statistics.fmean(row["rewards"])
        start = evaluate(str(options.start), None, self.prompts)
        return {"start": start, "learning_rates": chosen, "tuned": tuned, "finals": finals, "timed": timed}


def ratios(timed: list[dict[str, Any]], field: str) -> list[float]:
    """TRL 1.9's seconds over ours, of each round."""
    of = {(row["trainer"], row["round"]): row[field] for row in timed}
    return [of[OLD, turn] / of[OURS, turn] for turn in sorted({row["round"] for row in timed})]


def described(found: dict[str, Any]) -> str:
    """A difference with its intervals."""
    low, high = found["bootstrap"]
    by_seed = "; t interval over seeds {:+.3f} to {:+.3f}".format(*found["welch"]) if "welch" in found else ""
    return f"{found['mean']:+.3f} (95 % interval {low:+.3f} to {high:+.3f}{by_seed})"


def margin_verdict(found: dict[str, Any]) -> str:
    """Conclusion from the interval about the margin, in words."""
    low, high = found["bootstrap"]
    shown = "non-inferior" if low > -MARGIN else "inferior" if high < -MARGIN else "not shown to be non-inferior"
    text = f"{shown} at the margin of {MARGIN}"
    if "welch" in found and (found["welch"][0] > -MARGIN) != (low > -MARGIN):
        text += ", but the t interval alone says otherwise"
    return text


def verdicts(held: dict[str, Any], trainers: list[str]) -> list[str]:
    """The findings as lines of text, for any outcome."""
    late, early = (
        {name: np.array([row["rewards"] for row in held[stage] if row["trainer"] == name]) for name in trainers}
        for stage in ("finals", "timed")
    )
    order = sorted(trainers, key=lambda name: -late[name].mean())
    lines = ["Final reward, best first: " + ", ".join(f"{NAMES[name]} {late[name].mean():.3f}" for name in order)]
    for name in trainers[1:]:
        found = held["differences"][name] = interval(late[OURS], late[name])
        verdict = f": {margin_verdict(found)}" if name == OLD else ""
        lines.append(f"Final reward, ours less {NAMES[name]}: {described(found)}{verdict}")
    for name in trainers[1:]:
        found = held["early_differences"][name] = interval(early[OURS], early[name])
        means = f"{early[OURS].mean():.3f} and {early[name].mean():.3f}"
        after = f"Early, after {held['timed'][0]['answers']} answers"
        lines.append(f"{after}, ours and {NAMES[name]} have {means}, difference {described(found)}")
    if OLD not in trainers:
        return [*lines, "TRL 1.9's PPO was left out: no --old_python was given"]
    for field, what in (("seconds", "Wall-clock an answer"), ("cpu_seconds", "CPU time an answer")):
        found = held["time_ratios"][field] = ratios(held["timed"], field)
        middle = statistics.median(found)
        spread = f"{min(found):.2f} to {max(found):.2f} over {len(found)} rounds"
        verdict = "not higher than TRL 1.9's" if middle >= 1 else "higher than TRL 1.9's"
        if min(found) < 1 < max(found):
            verdict += " by the median, but the rounds do not agree"
        lines.append(f"{what}: TRL 1.9 / ours is {middle:.2f} ({spread}): ours is {verdict}")
    return lines


def table(header: list[str], rows: list[list[Any]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]


def as_markdown(report: dict[str, Any]) -> str:
    """The report as text and tables."""
    settings, start = report["settings"], report["start"]
    out = ["# PPO compared with TRL 1.9's PPO, RLOO and GRPO", "", f"    {report['command']}", ""]
    out += [
        f"{report['date']}; {report['hardware']}; one thread a training, {settings['parallel']} trainings at a time "
        f"but for the timing; float32. Ours, RLOO and GRPO: {report['versions'][OURS]}. PPO of TRL 1.9: "
        f"{report['versions'].get(OLD, 'left out, no --old_python was given')}.",
        "",
        f"{settings['answers']:,} answers a training, {ROLLOUT} a rollout, {EPOCHS} epochs over each in updates of "
        f"{MINIBATCH}; KL coefficient {BETA}; RLOO and GRPO with {GENERATIONS} answers a prompt. The protocol is in "
        "the script's docstring.",
        "",
        *(f"- {line}." for line in report["verdicts"]),
        "",
        "## Final reward",
        "",
        f"Exact reward of {SAMPLES} answers at temperature {TEMPERATURE} to each of {settings['prompts']} evaluation "
        f"prompts; the initial model has {start['reward']:.3f} (greedy {start['greedy']:.3f}). KL in nats an answer, "
        "at temperature 1, with its standard error over prompts.",
        "",
    ]
    rows = []
    for name in report["trainers"]:
        for row in (row for row in report["finals"] if row["trainer"] == name):
            kl = f"{row['kl']:.2f} ± {row['kl_error']:.2f}"
            numbers = [f"{row[field]:.3f}" for field in ("reward", "greedy")]
            rows.append([NAMES[name], row["seed"], *numbers, kl, f"{row['tokens']:.1f}", f"{row['ended']:.3f}"])
    header = ["trainer", "seed", "reward", "greedy reward", "KL to the reference model", "tokens", "share that end"]
    out += [*table(header, rows), "", f"![Learning curves]({report['name']}.png)", "", "## Learning rates", ""]
    out += [f"Validation reward of seed {TUNING_SEED} at each of the grid; the best is the one used.", ""]
    rows = []
    for name in report["trainers"]:
        found = {row["learning_rate"]: row["validation"] for row in report["tuned"] if row["trainer"] == name}
        best = report["learning_rates"][name]
        rows.append(
            [NAMES[name], *(f"**{each:.3f}**" if rate == best else f"{each:.3f}" for rate, each in found.items())]
        )
    out += table(["trainer", *(f"{rate:g}" for rate in settings["grid"])], rows)
    out += ["", "## Time", ""]
    out += [f"`train()` of {settings['timed_answers']} answers, one training at a time, in rotating order.", ""]
    rows = []
    for name in report["trainers"]:
        timed = [row for row in report["timed"] if row["trainer"] == name]
        cells = []
        for field in ("seconds", "cpu_seconds"):
            each = [1000 * row[field] / row["answers"] for row in timed]
            cells.append(f"{statistics.median(each):.0f} ({min(each):.0f}-{max(each):.0f})")
        loads = ", ".join(f"{row['load_average'][0]:.1f}" for row in timed)
        rows.append([NAMES[name], *cells, loads])
    header = ["trainer", "ms an answer", "CPU ms an answer", "machine's load after it"]
    return "\n".join([*out, *table(header, rows), ""])


def plot(report: dict[str, Any], path: Path) -> None:
    """A PNG with the mean reward of each rollout's answers: mean, lowest and highest over the seeds."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name in report["trainers"]:
        scores = np.array([row["training_scores"] for row in report["finals"] if row["trainer"] == name])
        answers = ROLLOUT * np.arange(1, scores.shape[1] + 1)
        axes.plot(answers, scores.mean(axis=0), label=f"{NAMES[name]} ({report['learning_rates'][name]:g})")
        axes.fill_between(answers, scores.min(axis=0), scores.max(axis=0), alpha=0.15)
    seeds = ", ".join(map(str, report["settings"]["seeds"]))
    axes.set(xlabel="answers sampled", ylabel="exact reward of a rollout", ylim=(0, 1))
    axes.set_title(f"Quickstart: mean and range of seeds {seeds} (learning rate)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, format="png", dpi=100)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old_python", help="of the virtual environment with TRL 1.9")
    parser.add_argument("--start", type=Path, default=ROOT / "outputs" / "quickstart_sft")
    parser.add_argument("--answers", type=int, default=512, help=f"sampled in a training, a multiple of {ROLLOUT}")
    parser.add_argument("--timed_answers", type=int, default=192, help="sampled in a training that is timed")
    parser.add_argument("--parallel", type=int, default=2, help="trainings at a time, one core each")
    parser.add_argument("--quick", action="store_true", help="a few answers, one seed: shows that it works")
    parser.add_argument("--resume", action="store_true", help="take finished trainings of the folder as they are")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "bench_ppo", help="of the trainings")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "results")
    options = parser.parse_args()
    options.grid, options.seeds, options.rounds, options.prompts = GRID, SEEDS, ROUNDS, 200
    if options.quick:
        options.grid, options.seeds, options.rounds, options.prompts = GRID[1:2], (0,), 1, 40
        options.answers = options.timed_answers = 2 * ROLLOUT
        options.folder = options.folder.with_name(f"{options.folder.name}_quick")
    if not (options.start / "config.json").is_file():
        parser.error(f"no model in {options.start}: `make train RECIPE=quickstart-sft` makes it")
    if options.answers % ROLLOUT or options.timed_answers % ROLLOUT:
        parser.error(f"--answers and --timed_answers must be multiples of {ROLLOUT}")
    return options


def main() -> None:
    """Tunes, trains, times; prints the tables and writes them with the numbers and the plot."""
    options = parse()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bench = Bench(options)
    held = bench.measure()
    report: dict[str, Any] = {
        "name": "ppo_quick" if options.quick else "ppo",
        "command": f"python {' '.join(sys.argv)}",
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": {},
        "trainers": bench.trainers,
        "settings": {
            name: getattr(options, name)
            for name in ("answers", "timed_answers", "parallel", "grid", "seeds", "rounds", "prompts")
        },
        "differences": {},
        "early_differences": {},
        "time_ratios": {},
        **held,
    }
    for row in held["finals"]:
        report["versions"][row["trainer"]] = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    report["verdicts"] = verdicts(report, bench.trainers)
    for row in (report["start"], *report["tuned"], *report["finals"], *report["timed"]):
        for field in ("log", "rewards", "start", "folder", "versions"):
            row.pop(field, None)
    report["minutes"] = (time.perf_counter() - bench.started) / 60
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / report["name"]
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = as_markdown(report)
    stem.with_suffix(".md").write_text(text)
    plot(report, stem.with_suffix(".png"))
    print(text)
    print(f"Wrote {stem}.json, .md and .png after {report['minutes']:.0f} min.")


if __name__ == "__main__":
    main()
