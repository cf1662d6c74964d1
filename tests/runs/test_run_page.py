"""The page of a run holds what the run's files say, and nothing that they would have a browser do."""

import json
import re
import shutil

import pytest
from browser import seen
from hostile_pages import HOSTILE, Page, hostile
from preflight_contents import preflight

from dpo_recipes.health.rules import Finding
from dpo_recipes.runs.curves import plot_curves
from dpo_recipes.runs.page import write_run_page


def estimate(mean, n=400):
    return {"mean": mean, "low": mean - 0.05, "high": mean + min(0.02, abs(1 - mean)), "n": n}


def both(before, after):
    return {"before": estimate(before), "after": estimate(after)}


def finding(rule="loss_spike", **other):
    words = {"sign": "the loss is 9.1, and the median before was 0.5", "cause": "a batch is broken"}
    return {"rule": rule, "fatal": True, "step": 7, **words, "remedy": "halve the learning rate", **other}


LOGGED = [{"step": step, "loss": 1 / step, "grad_norm": 0.5, "rewards/chosen": 0.1 * step} for step in (1, 2, 3)]
SPENT = {
    "updates": 1888,
    "resumed_from_update": 44,
    "train_seconds": 7200.0,
    "tokens": 168048.0,
    "peak_memory_mib": 873,
}
PROBE = {"probe/answer_tokens": 37.5, "probe/ended": 1.0, "probe/repeated": 0.25, "step": 44}


def run():
    """The files of a DPO run that was evaluated, with every section."""
    answers = {
        side: {"text": text, "tokens": 9, "ended": side == "after", "scores": {"exact reward": score}}
        for side, text, score in (("before", "Yes, go ahead.", 0.25), ("after", "No, do not go ahead.", 1.0))
    }
    accuracy = {
        "all": {"summed": both(0.91, 0.97), "implicit reward": {"after": estimate(0.88)}},
        "faults = 1": {"summed": both(0.81, 0.82), "per token": both(0.111, 0.112)},
    }
    return {
        "settings": {"model_name_or_path": "a-start", "dataset_name": "some/pairs", "beta": 0.3, "seed": 5},
        "preflight": preflight(),
        "metrics": {
            "train": {"loss": 0.4321, "rewards/chosen": 0.0804, "step": 88},
            "held_out": {"eval_loss": 0.5432, "step": 88},
            "preference_accuracy": accuracy,
            "chosen_logps": {"before": -9.56, "after": -8.99},
            "kl": {"nats": 1.16, "standard_error": 0.21, "n": 64, "tokens": 2448},
            "verdict": {"word": "better", "sentence": "Better: exact reward: 0.440 -> 0.990 (40 prompts)."},
            "scores": {"greedy": {"exact reward": both(0.44, 0.99)}},
            "note": "(The reference model already ranks 91 % of them correctly.)",
            "warnings": ["No better than a coin.", str(Finding(**finding()))],
            "cost": SPENT,
        },
        "health": {
            **{"mode": "warn", "stopped": False, "updates": 1888, "rules": ["loss_spike", "no_end"]},
            **{"findings": [finding(), finding("no_end", fatal=False)], "probes": [PROBE | {"step": 0}, PROBE]},
        },
        "done": {
            **{"method": "DPO", "finished": "2026-01-02T03:45:54+00:00", "hardware": "a card"},
            **{"versions": {"trl": "1.16.0", "python": "3.11.7"}, **SPENT},
        },
        "eval": {
            **{"verdict": {"word": "better", "sentence": "Better: win rate 0.700 (77 prompts)."}},
            **{"pairs": 77, "prompts": 66, "judge": "a rule", "warnings": ["The same weights."]},
            **{"win_rate": estimate(0.7), "length_controlled": estimate(0.66), "ties": estimate(0.1), "judging": {}},
            **{
                "dataset": "some/pairs",
                "made": "2026-01-03",
                "hardware": "a card",
                "start": "a-start",
                "model": "beta03",
            },
            **{"sampling": {"temperature": 1.0, "max_new_tokens": 72, "seed": 0}, "versions": ["trl 1.16.0"]},
            **{"preference_accuracy": {"all": {"summed": both(0.71, 0.72)}}, "perplexity": both(4.1, 4.3)},
            **{"measures": {"tokens": both(30.0, 33.3)}, "labels": {"tokens": ["tokens of an answer", 1, ""]}},
            **{"samples": [{"prompt": "Why?", "won": 1.0, **answers}]},
        },
        "samples": [{"prompt": [{"role": "user", "content": "May I?"}], "temperature": 0.7, **answers}] * 9,
    }


@pytest.fixture
def page_of(tmp_path):
    def write(held, *, curves=True, widths=()):
        folder = tmp_path / "beta03"
        folder.mkdir()
        for name, data in held.items():
            lines = [json.dumps(row, ensure_ascii=False) for row in (data if name == "samples" else [data])]
            (folder / (f"{name}.jsonl" if name == "samples" else f"{name}.json")).write_text("\n".join(lines) + "\n")
        if curves:
            plot_curves(LOGGED, folder / "curves.png", title="beta03")
        page = Page(write_run_page(folder).read_text(encoding="utf-8"))
        page.laid_out = [seen(folder / "report.html", width) for width in widths]
        shutil.rmtree(folder)
        return page

    return write


def test_every_section_says_what_the_files_hold(page_of):
    page = page_of(run())
    for said in (
        "beta03: DPO of a-start on some/pairs, finished 2026-01-02 03:45 UTC",
        "▲ Better exact reward: 0.440 → 0.990 (40 prompts).",
        "✕ Broken run 2 of the 2 health rules were broken, 1 of them fatal.",
        "loss spike fatal, update 7: the loss is 9.1, and the median before was 0.5 Likely a batch is broken. halve",
        *("no end update 7", "No better than a coin.", "The same weights."),
        *("The first 6 of 9 in samples.jsonl", "May I? temperature 0.7 before exact reward 0.25 (cut) Yes, go ahead."),
        "after exact reward 1.00 No, do not go ahead.",
        "n = 400 before 0.910 [0.860, 0.930] after 0.970 [0.920, 0.990]",
        *("implicit-reward accuracy", "faults = 1 n = 400", "The reference model already ranks 91 %"),
        *("Scores of the answers, greedy", "exact reward n = 400 before 0.440"),
        "KL to the reference model, nats an answer",
        *("1.16 ± 0.21", "chosen log-prob, nats", "-9.56 → -8.99"),
        *("▲ Better win rate 0.700 (77 prompts).", "77 held-out pairs and 66 prompts of some/pairs", "judge a rule"),
        "win rate share of prompts on which the judge prefers the tuned model",
        *(
            "tokens of an answer n = 400 before 30.0 [29.9, 30.0] after 33.3",
            "Why? Won before exact reward 0.25 (cut) Yes, go ahead.",
        ),
        *("loss 0.4321 0.5432", "implicit reward of chosen 0.0804 none"),
        *("update answer tokens ended repeated", "44 37.50 1.00 0.25"),
        "over max_length -3 none pairs.jsonl, line 11; pairs.jsonl, line 22; pairs.jsonl, line 33",
        *("= pairs 4 4", "The longer answer wins 80%. Balance them."),
        *("beta 0.3", "seed 5", "updates 1,888 from 44 on", "training 2.0 h"),
        *("873 MiB", "hardware a card", "trl 1.16.0"),
    ):
        assert said in page.words, said
    assert page.words.count("the loss is 9.1") == 2, "once for each finding, and not again as a warning"
    assert "0.111" not in page.words, "of a stratum the summed log-probs are enough"


def test_the_result_comes_first_and_the_answers_come_before_the_numbers(page_of):
    words = page_of(run()).words
    order = ("▲ Better", "Broken run", "Answers before and after", "Measures before and after", "Evaluation", "Curves")
    places = [words.index(each) for each in (*order, "Rows kept and dropped", "Settings", "Cost, hardware")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("metrics", "headline"),
    [
        ({"scores": {"greedy": {"exact reward": both(0.44, 0.99)}}}, "exact reward, greedy: 0.440 → 0.990"),
        ({"preference_accuracy": {"all": {"summed": both(0.91, 0.97)}}}, "preference accuracy: 0.910 → 0.970"),
    ],
)
def test_the_page_of_a_run_without_a_verdict_shows_its_numbers(metrics, headline, page_of):
    page = page_of(run() | {"metrics": {"train": {}, "held_out": {}, "cost": SPENT} | metrics})
    assert headline in page.words
    assert page.words.count("Better") == 1, "the evaluation's"


def test_rows_of_strata_are_folded_and_so_are_all_but_five_measures_of_an_evaluation(page_of):
    held = run()
    held["eval"]["measures"] = {f"measure {number}": both(0.1, 0.2) for number in range(9)}
    folded, shown = page_of(held).folded
    assert "faults = 1" in folded
    assert "faults = 1" not in shown
    evaluation = shown[shown.index("Evaluation") :]
    assert evaluation.count("n = 400") == 5
    assert "measure 1" in evaluation
    assert "measure 2" not in evaluation
    assert all(f"measure {number}" in folded for number in range(2, 9))


def test_a_healthy_run_says_so_and_a_reward_model_shows_what_it_is_worth(page_of):
    held = run()
    fit = {"log_loss": 0.1191, "brier": 0.0391, "expected_calibration_error": 0.036}
    fit["reliability"] = [{"low": 0.5, "high": 0.55, "said": 0.526, "right": 0.333, "n": 12}]
    spread = {"margin": {"mean": 3.888, "std": 1.77}}
    held["metrics"] = {"train": {}, "held_out": {}, "reward_accuracy": {"all": estimate(0.93)}, "calibration": fit}
    held["metrics"] |= {"reward_scores": spread, "note": "", "warnings": [], "cost": SPENT}
    held["health"]["findings"] = []
    page = page_of({name: held[name] for name in ("settings", "metrics", "health", "done")})
    for said in (
        *("0.930 95 % interval 0.880 to 0.950", "reward-model accuracy n = 400 0.930 [0.880,"),
        "✓ Healthy 2 health rules watched 1,888 updates, and no rule was broken.",
        *("margin, mean ± std", "3.89 ± 1.77", "0 is perfect 0.119", "0.50 to 0.55 0.526 0.333 12"),
    ):
        assert said in page.words, said
    assert "before and after" not in page.words


@pytest.mark.parametrize(
    ("name", "heading"),
    [
        *(("settings", "Settings"), ("preflight", "Rows kept and dropped"), ("metrics", "Measures before and after")),
        *(("health", "Health probes"), ("done", "trl"), ("eval", "Evaluation"), ("samples", "Answers before")),
    ],
)
def test_what_is_missing_is_left_out(name, heading, page_of):
    held = run()
    assert heading in page_of(held).words
    assert heading not in page_of({each: held[each] for each in held if each != name}).words


def test_a_folder_without_results_says_that_the_run_has_not_finished(page_of):
    stopped = run()["health"] | {"stopped": True}
    page = page_of({"settings": run()["settings"], "health": stopped}, curves=False)
    assert "This run has not finished: a health rule stopped it." in page.words
    assert sum(tag == "h2" for tag, _ in page.tags) == 1, "settings"
    assert not [given for _, given in page.tags if given.get("role") == "img"]
    empty = page_of({}, curves=False)
    assert "This run has not finished" in empty.words


def test_an_evaluation_without_a_run_has_a_page_of_its_own(page_of):
    page = page_of({"eval": run()["eval"]}, curves=False)
    assert page.words.startswith("Evaluation: beta03 beta03: evaluation on some/pairs ▲ Better win rate 0.700")
    assert "tokens of an answer n = 400" in page.words
    assert "This run has not finished" not in page.words
    assert "health rule" not in page.words


def test_a_reader_sees_all_of_it_on_a_phone_and_on_a_screen(page_of):
    held = run()
    held["samples"][0]["after"]["text"] = "a" * 300
    held["settings"]["dataset_name"] = "an/" + "unbroken" * 20
    held["health"]["probes"] = [PROBE | {"probe/log_ratio": 123.25, "probe/kl": 1234.5}]
    phone, screen = page_of(held, widths=(390, 1280)).laid_out
    for laid_out, width, columns in ((phone, 390, 1), (screen, 1280, 2)):
        assert laid_out["cut"] == []
        assert laid_out["width"] == width
        assert laid_out["columns"]
        assert set(laid_out["columns"]) == {columns}
        verdict = held["metrics"]["verdict"]["sentence"].replace("->", "→").replace(": ", " ", 1)
        assert " ".join(laid_out["headline"].split()) == f"▲ {verdict}"


def test_shares_are_drawn_from_0_to_1_and_other_numbers_from_0(page_of):
    held = run()
    held["eval"]["measures"] = {"tokens": both(30.0, 33.3)}
    (laid_out,) = page_of(held, widths=(1280,)).laid_out
    share = ["0", "0.25", "0.5", "0.75", "1"]
    assert laid_out["axes"] == [share] * 4 + [["0", "10", "20", "30", "40"], share, ["0", "2", "4", "6"]]


def test_an_interval_is_drawn_inside_its_axis(page_of):
    page = page_of(run())
    boxes = [
        given for tag, given in page.tags if tag == "rect" and given.get("class") in ("interval", "mark", "length")
    ]
    assert len(boxes) > 30
    for box in boxes:
        assert 0 <= float(box["x"]) <= float(box["x"]) + float(box["width"]) <= 1000


def test_hostile_texts_stay_texts(page_of):
    """Whatever stands in the files: prompts and answers of any data, names of datasets, scores and strata."""
    attacked = {name: hostile(data) for name, data in run().items()}
    attacked["metrics"]["scores"] = {HOSTILE: {HOSTILE: both(0.4, 0.5)}}
    attacked["metrics"]["preference_accuracy"][HOSTILE] = {"summed": both(0.4, 0.5)}
    attacked["samples"][0]["before"]["scores"] = {HOSTILE: 1.0}
    attacked["samples"][1]["after"]["text"] = f"one\u2028line {HOSTILE}"
    harmless, page = page_of(run()), page_of(attacked)
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in harmless.tags}
    assert {name for _, given in page.tags for name in given} == {name for _, given in harmless.tags for name in given}
    assert page.text.count("<script>alert('x')</script>") > 30
    assert "{{ 7 * 7 }}" in page.text


def test_the_page_needs_nothing_but_itself_and_names_its_files(page_of):
    page = page_of(run())
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "form"}
    links = [value for _, given in page.tags for name, value in given.items() if name in ("href", "src")]
    links += re.findall(r"url\((.*?)\)", " ".join(given.get("style", "") for _, given in page.tags))
    assert [re.sub(r"base64,.*", "base64", link) for link in links] == ["data:,", "data:image/png;base64"]
