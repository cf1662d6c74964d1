"""Trivial rules and comparisons find each fault that was planted in the pairs, and no fault in clean pairs."""

import os
import random
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_recipes.dataset_adapters import recognise
from dpo_recipes.loading import load_rows, split_pairs
from dpo_recipes.preflight.findings import THRESHOLDS
from dpo_recipes.preflight.near_duplicates import sketch
from dpo_recipes.preflight.signals import find_signals, signal_findings
from dpo_recipes.recipe import RecipeArguments

DATA = os.environ.get("DPO_RECIPES_DATA")
FIRST, SECOND = "ba ce di fe gu ha je ki lo mu", "dan fer gil hom jun kas lev mip nor pud"
WORDS = [a + b for a in FIRST.split() for b in SECOND.split()]


def text(seed, words=30):
    return " ".join(random.Random(seed).choices(WORDS, k=words)).capitalize() + "."


def pair(prompt, chosen, rejected):
    speakers = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    texts = zip(speakers.items(), (prompt, chosen, rejected), strict=True)
    return {side: [{"role": role, "content": content}] for (side, role), content in texts}


def plain(count=300, start=0):
    return [pair(text(f"{n} p"), text(f"{n} c"), text(f"{n} r")) for n in range(start, start + count)]


def signals_of(train, test=None):
    splits = {"train": train, "test": test or plain(20, start=10_000)}
    return find_signals(DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()}))


def names(signals):
    return {finding.name for finding in signal_findings(signals, THRESHOLDS)}


def change(row, **sides):
    """The pair with some texts changed by a function of the text."""
    return {side: [{**turns[0], "content": sides.get(side, str)(turns[0]["content"])}] for side, turns in row.items()}


def test_random_pairs_show_nothing():
    signals = signals_of(plain())
    assert names(signals) == set()
    assert (signals["pairs"], signals["prompts"]) == (300, 300)
    for rule in signals["baselines"].values():
        assert rule["low"] <= 0.5 <= rule["high"]
    for name in ("duplicates", "near_duplicates", "contradictions", "near_leaks"):
        assert signals[name]["count"] == 0


BIASES = {
    "longer": lambda chosen: f"{chosen} {text(chosen, 5)}",
    "list": lambda chosen: f"- {chosen}\n- {chosen}",
    "refusal": lambda chosen: f"I'm sorry, but {chosen}",
    "formatting": lambda chosen: f"**{chosen}**",
    "full_stop": lambda chosen: chosen.rstrip("."),
    "first_word": lambda chosen: f"Certainly! {chosen}",
    "bag_of_words": lambda chosen: f"{chosen} {text(chosen, 9)} Let me elaborate further on that.",
}


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_give_away_is_found_whichever_side_has_it(name, side):
    rows = [change(row, **{side: BIASES[name]}) if n % 3 else row for n, row in enumerate(plain())]
    signals = signals_of(rows)
    assert name in names(signals)
    has = signals["baselines"][name]["accuracy"]
    learned = name in ("first_word", "bag_of_words")  # they learn which side has it
    assert has > 0.7 if learned or (side == "chosen") != (name == "full_stop") else has < 0.3
    [finding] = [finding for finding in signal_findings(signals, THRESHOLDS) if finding.name == name]
    assert ("loses" in finding.text) == (has < 0.5)
    rows_named = signals["baselines"][name]["rows"]
    assert len(rows_named) == 5
    if not learned and name != "longer":  # these decide on the other pairs too, by chance
        assert all((int(row.split()[1]) - 1) % 3 for row in rows_named)


def test_a_length_bias_names_the_remedies():
    signals = signals_of([change(row, chosen=lambda chosen: chosen * 2) for row in plain(60)])
    [finding] = [finding for finding in signal_findings(signals, THRESHOLDS) if finding.name == "longer"]
    assert finding.text == "The longer answer wins 100% of 60 training pairs; a tie counts one half."
    assert "--loss_type sigmoid_norm" in finding.remedy
    assert "--ld_alpha" in finding.remedy


def test_a_rule_that_a_coin_could_match_is_no_finding():
    signals = signals_of([change(row, chosen=lambda text: text * 2) for row in plain(3)])
    assert signals["baselines"]["longer"]["accuracy"] == 1
    assert signals["baselines"]["longer"]["low"] < 0.5
    assert names(signals) == set()


@pytest.mark.parametrize("seed", range(8))
def test_a_handful_of_pairs_can_be_looked_at(seed):
    found = find_signals(
        DatasetDict(train=Dataset.from_list(plain(6)), test=Dataset.from_list(plain(1, 50))), seed=seed
    )
    assert found["baselines"]["bag_of_words"]["n"] == 6


def test_rules_count_a_tie_one_half():
    rows = [pair(f"prompt {n}", "aaaa" if n < 3 else "aa", "bb") for n in range(4)]
    rule = signals_of(rows)["baselines"]["longer"]
    assert (rule["accuracy"], rule["decided"], rule["n"]) == (3.5 / 4, 0.75, 4)
    assert rule["rows"] == ["row 1", "row 2", "row 3"]


def test_copies_and_contradictions_are_named_by_their_rows():
    rows = plain(200)
    rows[50], rows[60] = rows[10], rows[10]
    rows[70] = {"prompt": rows[20]["prompt"], "chosen": rows[20]["rejected"], "rejected": rows[20]["chosen"]}
    signals = signals_of(rows)
    assert signals["duplicates"] == {"count": 2, "of": 200, "rows": [["row 51", "row 11"], ["row 61", "row 11"]]}
    assert signals["contradictions"] == {"count": 2, "of": 200, "rows": [["row 21", "row 71"], ["row 71", "row 21"]]}
    assert signals["near_duplicates"]["count"] == 0, "neither is a near-duplicate"
    assert "contradictions" in names(signals)


def test_ranked_answers_to_one_prompt_are_no_duplicates():
    ranked = [text(f"answer {n}") for n in range(4)]
    rows = plain(100) + [pair("Which?", ranked[a], ranked[b]) for a in range(4) for b in range(a + 1, 4)]
    signals = signals_of(rows)
    assert [signals[name]["count"] for name in ("duplicates", "near_duplicates", "contradictions")] == [0, 0, 0]
    rows_named = [f"row {number}" for number in range(101, 106)]
    assert signals["frequent_prompt"] == {"count": 6, "of": 106, "rows": rows_named, "text": "Which?"}
    assert names(signals) == set()


def test_one_prompt_in_many_pairs_is_found():
    rows = plain(200) + [pair("Which?", text(f"c{n}"), text(f"r{n}")) for n in range(30)]
    assert names(signals_of(rows)) == {"frequent_prompt"}


def reword(content, edits, seed):
    drawn, words = random.Random(seed), content.split()
    for place in drawn.sample(range(len(words)), edits):
        words[place] = drawn.choice(WORDS)
    return " ".join(words)


def recall(edits, *, words=30):
    """Share of 200 pairs, copied with so many words of each text exchanged, that are found among 400 others."""
    rows = [pair(*(text(f"{n} {side}", words) for side in "pcr")) for n in range(400)]
    edited = [change(row, **dict.fromkeys(row, lambda t, n=n: reword(t, edits, n))) for n, row in enumerate(rows[:200])]
    return signals_of(rows + edited)["near_duplicates"]["count"] / 200


def test_near_duplicates_are_found_by_how_much_was_edited():
    assert recall(0) == 0, "exact copies are counted as such"
    # Of 30 words, one exchanged changes three runs of about 31 and leaves a resemblance of 0.82, two one of 0.68.
    found = {edits: recall(edits) for edits in (1, 2, 4)}
    assert found[1] > 0.6
    assert found[2] < 0.2
    assert found[4] == 0
    assert recall(1, words=90) > 0.99  # 0.94
    assert recall(3, words=90) > 0.6  # 0.82


def test_case_and_punctuation_make_no_difference():
    rows = plain(100)
    shouted = [change(row, **dict.fromkeys(row, lambda t: t.upper().replace(" ", ",  ", 5))) for row in rows[:20]]
    assert signals_of(rows + shouted)["near_duplicates"]["count"] == 20


def test_an_edited_test_prompt_is_found_in_training():
    train = plain(300)
    leaked = [
        change(row, prompt=lambda p: p.upper().replace(" ", ", "), chosen=text, rejected=text) for row in train[:10]
    ]
    signals = signals_of(train, plain(90, start=10_000) + leaked)
    assert (signals["near_leaks"]["count"], signals["near_leaks"]["of"]) == (10, 100)
    assert ["row 91", "row 1"] in signals["near_leaks"]["rows"]
    assert names(signals) == {"near_leaks"}


texts = st.text(st.characters(codec="utf-8"), max_size=40)


@settings(max_examples=40, deadline=None)
@given(st.lists(texts, min_size=1, max_size=6))
def test_a_sketch_depends_on_its_own_text_alone(drawn):
    together = sketch(drawn)
    assert together.shape == (len(drawn), 16)
    for text_of, of_all in zip(drawn, together, strict=True):
        assert (sketch([text_of])[0] == of_all).all()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=8))
def test_any_texts_are_read_as_plain_text_and_as_conversations(drawn):
    def of(rows):
        return find_signals(DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows)))

    strings = of([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in drawn])
    assert strings == of([pair(*row) for row in drawn])
    assert strings["near_leaks"]["count"] == len(drawn)


def test_the_same_pairs_give_the_same_signals():
    assert signals_of(plain(150)) == signals_of(plain(150))


@pytest.mark.skipif(DATA is None, reason="DPO_RECIPES_DATA names no folder of real data")
@pytest.mark.parametrize(
    ("dataset", "found"),
    [
        ("oasst2-sample/messages.jsonl.gz", {"longer"}),
        ("hh-rlhf/harmless-base", set()),
        ("ultrafeedback-binarized-sample", set()),
    ],
)
def test_what_is_said_of_real_pairs(dataset, found):
    rows = load_rows(RecipeArguments(dataset_name=str(Path(DATA or "", dataset))))
    pairs = split_pairs({split: recognise(rows["train"])(part) for split, part in rows.items()})
    assert names(find_signals(pairs)) == found
