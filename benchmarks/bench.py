"""Speed and memory in comparison with plain TRL and other baselines: prints one table.

    make bench [ARGS="--only step,update --rounds 5 --out docs/results"]

Each row compares two ways to do the same work, in one process. They take turns round by round, in an order that
rotates, so that another program slows both down. A ratio is the median over the rounds; its range stands beside it.
Every part runs in a process of its own, in the environment that `dpo-recipes train` gives a training on a CPU.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from dpo_recipes.launch.launch import KEEP_MEMORY
from dpo_recipes.machine import ENVIRONMENT, free_threads, processor

PARTS = {  # with the module that holds the function of that name
    "step": "training",
    "memory": "training",
    "update": "training",
    "ppo": "training",
    "guards": "training",
    "adapting": "data",
    "tokenising": "data",
    "inspecting": "data",
    "start_up": "data",
}
HEADER = ("what", "compared with", "ours", "theirs", "theirs / ours", "rounds")
OURS = "ours"
HERE = Path(__file__).parent


@dataclass
class Row:
    """One way to do a piece of work compared with another way; of both, less is better.

    Attributes:
        what: The work.
        baseline: The other way.
        values: Ours and the baseline's, of each round.
        unit: Unit of the values.
    """

    what: str
    baseline: str
    values: list[tuple[float, float]]
    unit: str = "s"

    def cells(self) -> list[str]:
        """The row's cells, in the order of HEADER."""
        ours, theirs = (median(column) for column in zip(*self.values, strict=True))
        ratios = sorted(theirs / ours for ours, theirs in self.values)
        ratio = f"{median(ratios):.2f} x ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        return [self.what, self.baseline, *(f"{x:,.3g} {self.unit}" for x in (ours, theirs)), ratio, str(len(ratios))]


@dataclass
class Part:
    """The rows of a part, and what they were measured on."""

    rows: list[Row]
    conditions: str
    seconds: float = field(default=0.0)


def rounds_of(options: argparse.Namespace, usual: int) -> int:
    """The number of rounds."""
    return int(options.rounds or (1 if options.quick else usual))


def in_turn(ways: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """The value that each way gives in each round, called with the round's number, in an order that rotates."""
    results: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds):
        for name in list(ways)[:: -1 if index % 2 else 1]:
            results[name].append(ways[name](index))
            print(f"  round {index + 1} of {rounds}, {name}: {results[name][-1]:.3g}", file=sys.stderr, flush=True)
    return results


def compare(what: str, results: dict[str, list[float]], baselines: dict[str, str], unit: str = "s") -> list[Row]:
    """A row for each baseline, which is shown under another name, against the results of OURS."""
    return [
        Row(what, shown, list(zip(results[OURS], results[name], strict=True)), unit)
        for name, shown in baselines.items()
    ]


def measure(part: str, options: argparse.Namespace) -> Part | None:
    """The part's rows, measured in a process of its own; None if that process failed."""
    environment = ENVIRONMENT | {
        "OMP_NUM_THREADS": str(options.threads),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
    }
    if part != "memory":  # a step's memory shows where what was free is given back to the kernel
        environment |= KEEP_MEMORY
    flags = [*(["--quick"] if options.quick else []), *(["--rounds", str(options.rounds)] if options.rounds else [])]
    flags += ["--rows", str(options.rows)] if options.rows else []
    start = time.monotonic()
    command = [sys.executable, __file__, "--part", part, *flags]
    done = subprocess.run(command, env=environment | os.environ, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return None
    held = json.loads(done.stdout.splitlines()[-1])
    return Part([Row(**row) for row in held["rows"]], held["conditions"], time.monotonic() - start)


def as_markdown(parts: dict[str, Part], threads: int) -> str:
    """The table, and what each of its parts was measured on."""
    lines = [list(HEADER), *(row.cells() for part in parts.values() for row in part.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    table = ["| " + " | ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)) + " |" for cells in lines]
    versions = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch", "datasets"))
    where = f"{time.strftime('%Y-%m-%d')}; {processor()}, {os.cpu_count()} cores, {threads} thread(s); {versions}."
    seconds = sum(part.seconds for part in parts.values())
    notes = ["Medians of the rounds, and the range of the ratio. Above 1 ours needs less.", ""]
    notes += [f"- {name}: {part.conditions}" for name, part in parts.items()]
    load = f"Load averages at the end: {', '.join(f'{x:.1f}' for x in os.getloadavg())}. {seconds / 60:.0f} minutes."
    return "\n".join([*table, "", *notes, "", where, load, ""])


def main() -> None:
    """Measures the parts one after the other and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PART,...", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, help="by default 2 to 5, by the part's time")
    parser.add_argument("--rows", type=int, help="rows of data to adapt, tokenise and inspect")
    parser.add_argument("--quick", action="store_true", help="small models, one round: shows that it works")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write bench.md there, as to docs/results")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        sys.path.insert(0, str(HERE))
        found: Any = getattr(importlib.import_module(f"rows_of_{PARTS[options.part]}"), options.part)(options)
        print("\n" + json.dumps(asdict(found)))
        return
    chosen = options.only.replace("-", "_").split(",")
    if unknown := {*chosen} - {*PARTS}:
        parser.error(f"--only {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    options.threads = int(os.environ.get("OMP_NUM_THREADS") or free_threads(1))
    parts, failed = {}, []
    for part in chosen:
        print(f"{part} ...", file=sys.stderr, flush=True)
        if found := measure(part, options):
            parts[part] = found
        else:
            failed.append(part)
    if parts:
        print(text := as_markdown(parts, options.threads))
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            command = "make bench" + (f' ARGS="--only {options.only}"' if len(chosen) < len(PARTS) else "")
            (options.out / "bench.md").write_text(f"# Speed and memory\n\n    {command}\n\n{text}")
    sys.exit(f"These parts failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
