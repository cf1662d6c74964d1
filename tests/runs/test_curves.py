import pytest
from matplotlib.image import imread

from dpo_recipes.runs.curves import plot_curves, side_by_side, table


def test_curves_are_drawn_for_what_was_logged(tmp_path):
    history = [
        {"step": step, "loss": 1 / step, "rewards/chosen": step, "rewards/rejected": -step} for step in range(1, 9)
    ]
    small = imread(plot_curves(history, tmp_path / "small.png", title="two panels"))
    history.append({"step": 8, "eval_loss": 0.1, "grad_norm": 1.0, "logps/chosen": -3.0, "rewards/accuracies": 0.5})
    large = imread(plot_curves(history, tmp_path / "large.png", title="five panels"))
    assert large.shape[0] > small.shape[0]
    assert small.std() > 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["large.png", "small.png"]


def test_a_run_that_logged_nothing_still_has_its_picture(tmp_path):
    assert plot_curves([], tmp_path / "empty.png", title="nothing").exists()


def test_columns_line_up():
    lines = table(["", "before", "after"], [["accuracy", 0.5, "0.75"], ["x", "long value", 1]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["accuracy", "0.5", "0.75"]


@pytest.mark.parametrize("width", [100])
def test_long_answers_are_wrapped(width):
    conversation = [{"role": "user", "content": "Hello."}, {"role": "user", "content": "Why?"}]
    text = side_by_side([{"prompt": conversation, "before": {"text": "word " * 80}, "after": {"text": "Because."}}])
    assert max(map(len, text.splitlines())) <= width
    assert text.startswith("Prompt  Why?\nBefore  word")
    assert text.endswith("After   Because.")
