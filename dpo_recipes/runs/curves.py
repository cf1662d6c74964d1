"""Shows a run: curves as a PNG, a table in columns, answers side by side."""

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from dpo_recipes.files import write_bytes
from dpo_recipes.health.rules import read_logs
from dpo_recipes.runs.metrics import NAMES, PANELS

COLOURS = ["#0072b2", "#d55e00", "#009e73"]  # of Okabe and Ito: the colour-blind tell them apart


def plot_curves(log_history: Sequence[Mapping[str, float]], path: str | Path, *, title: str) -> Path:
    """Draws a PNG with a panel for each group of metrics that the trainer logged, and returns its path.

    Args:
        log_history: `trainer.state.log_history`.
        path: The file to write.
        title: The line above the panels.
    """
    from matplotlib.figure import Figure  # a second that the first update need not wait for

    logged = read_logs(log_history)
    curves = {panel: {name: logged[name] for name in names if name in logged} for panel, names in PANELS.items()}
    curves = {panel: lines for panel, lines in curves.items() if lines}
    rows = max(1, -(-len(curves) // 3))
    figure = Figure(figsize=(12, 3.4 * rows + 0.4), layout="constrained")
    heading, body = figure.subfigures(2, 1, squeeze=False, height_ratios=[0.4, 3.4 * rows]).flat
    heading.suptitle(title, y=0.6, parse_math=False)  # a name may have two $
    cells = body.subfigures(rows, 3, squeeze=False).flat  # equal ones: the page shows each by itself
    for cell, (panel, lines) in zip(cells, curves.items(), strict=False):
        axes = cell.subplots()
        axes.set_prop_cycle(color=COLOURS, linestyle=["-", "--", ":"])
        for name, points in lines.items():
            label = "held out" if name.startswith("eval_") else "training" if f"eval_{name}" in lines else NAMES[name]
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 6 else None, markersize=3)
        axes.set_title(panel, fontsize=10)
        axes.set_xlabel("update", fontsize=9)
        axes.grid(alpha=0.3)
        if "accuracy" in panel or "share" in panel:
            axes.set_ylim(-0.02, 1.02)
        if len(lines) > 1:
            axes.legend(fontsize=8)
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=110, metadata={"panels": str(len(curves))})
    return write_bytes(path, drawn.getvalue())


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Text in columns, the first aligned left and the others right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    line = "  ".join([f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
    lines = [line.format(*row) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def side_by_side(answers: Sequence[Mapping[str, Any]]) -> str:
    """Prompts with both models' answers, wrapped for a terminal; of a conversation only the last message.

    Args:
        answers: As samples.jsonl holds them.
    """
    blocks = []
    for answer in answers:
        prompt = answer["prompt"] if isinstance(answer["prompt"], str) else answer["prompt"][-1]["content"]
        parts = {"Prompt": prompt, "Before": answer["before"]["text"], "After": answer["after"]["text"]}
        for name, text in parts.items():
            blocks.append(textwrap.fill(text, width=100, initial_indent=f"{name:<8}", subsequent_indent=" " * 8))
        blocks.append("")
    return "\n".join(blocks[:-1])
