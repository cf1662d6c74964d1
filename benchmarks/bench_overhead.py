"""Cost of a recipe compared with a bare TRL script: seconds of a training and of a start-up, in turn in one run.

    python benchmarks/bench_overhead.py [--updates 30] [--repeats 5]

Both train the playground's model on the same pairs with the same settings. The recipe's trainer also has the guards,
the progress lines and the health rules, without their probe, because there is no evaluation. The aim is an overhead
under 2 % of a training.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import ProgressCallback, logging
from trl import DPOConfig, DPOTrainer, ModelConfig, get_peft_config

from dpo_recipes import playground
from dpo_recipes.health import HealthCallback
from dpo_recipes.health.guards import add_guards
from dpo_recipes.presets import LORA
from dpo_recipes.runs.callbacks import ProgressLines

BARE = "import datasets; from trl import DPOConfig, DPOTrainer, ModelConfig, TrlParser, get_peft_config"
RECIPE = f"import runpy; runpy.run_path({str(Path(__file__).parent.parent / 'recipes' / 'hh_rlhf_lora.py')!r})"


def train(*, recipe: bool, updates: int, folder: str) -> float:
    """Seconds of `trainer.train`."""
    args = DPOConfig(
        output_dir=folder,
        max_steps=updates,
        per_device_train_batch_size=8,
        logging_steps=5,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
        report_to="none",
    )
    trainer = DPOTrainer(
        model=str(playground.build_model()),
        args=args,
        train_dataset=playground.load_pairs("playground", train_pairs=400)["train"],
        peft_config=get_peft_config(ModelConfig(**LORA)),
    )
    if recipe:
        add_guards(trainer)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressLines())
        trainer.add_callback(HealthCallback(trainer))
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


def start_up(code: str) -> float:
    """Seconds of CPU time that a Python process with these imports takes."""
    timed = f"import time\n{code}\nprint(time.process_time())"
    return float(subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Alternates the two and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    logging.set_verbosity_error()
    seconds: dict[str, list[float]] = {"bare TRL": [], "recipe": []}
    start_ups: dict[str, list[float]] = {"bare TRL": [], "recipe": []}
    with tempfile.TemporaryDirectory() as folder:
        train(recipe=False, updates=2, folder=folder)  # warm-up
        for repeat in range(options.repeats):
            for name in list(seconds)[:: 1 if repeat % 2 else -1]:
                seconds[name].append(train(recipe=name == "recipe", updates=options.updates, folder=folder))
                start_ups[name].append(start_up(RECIPE if name == "recipe" else BARE))
    for what, times in ((f"training, {options.updates} updates", seconds), ("start-up, CPU time", start_ups)):
        medians = {name: statistics.median(values) for name, values in times.items()}
        pairs = [after / before - 1 for before, after in zip(times["bare TRL"], times["recipe"], strict=True)]
        spread = f"median of {options.repeats} pairs, {min(pairs):+.1%} to {max(pairs):+.1%}"
        print(
            f"{what}: bare TRL {medians['bare TRL']:.2f} s, recipe {medians['recipe']:.2f} s, overhead "
            f"{statistics.median(pairs):+.1%} ({spread})"
        )


if __name__ == "__main__":
    main()
