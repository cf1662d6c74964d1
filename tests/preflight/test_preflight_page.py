"""The page of a preflight shows the data as text; no text of the data becomes markup or code."""

import copy
import html
import re
from html.parser import HTMLParser

import pytest

from dpo_recipes.preflight.page import write_page

HOSTILE = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>&{{ 7 * 7 }}{% raw %}"


def histogram(total=60):
    return {"mean": 5.0, "p50": 5, "p90": 8, "p99": 9, "max": 9, "total": total} | {
        "histogram": {"edges": [1.0, 5.0, 9.0], "counts": [4, 2]}
    }


def rule(accuracy, label):
    numbers = {"accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "decided": 0.5, "n": 300}
    return {"label": label, **numbers, "rows": [1, 2]}


def preflight():
    """The contents of preflight.json, with every section."""
    account = {"rows": 10, "in_pairs": 0, "pairs_made": 0, "moved": -2, "not_sampled": 1, "kept": 4, "shortened": 1}
    dropped = {"too_long": {"count": 3, "counted_by": "preflight", "first": [11, 22, 33]}}
    side = {"tokens": ["Us", "er", ":\n", "Hi", "<eos>"], "ids": [7, 8, 9, 10, 1], "trained": [0, 0, 0, 1, 1]}
    quantiles = {"logp_per_token": {"p5": -4.0, "p50": -2.5, "p95": -1.0}, "surplus": {}, "far": 0.25}
    none = {"count": 0, "of": 300, "rows": []}
    return {
        "dataset": "some/pairs",
        "part": "the first rows of each split",
        "recipe": "hh_rlhf_lora",
        "model": "a-model",
        "max_length": 512,
        "thresholds": {"longer": 0.7, "too_long": 0.05},
        "reasons": {"too_long": "over max_length"},
        "splits": {
            "train": account | {"dropped": dropped},
            "test": account | {"dropped": {}, "rows": 3, "moved": 2, "kept": 4, "shortened": 0},
        },
        "total": account | {"dropped": dropped, "rows": 13, "kept": 8},
        "tokens": {
            split: {side: histogram() for side in ("prompt", "chosen", "rejected")}
            | {"cut_from": {"prompt": 77, "chosen": 0, "rejected": 0}}
            | {"shortened": 1, "without_eos": 2, "completion_at_risk": 3}
            for split in ("train", "test")
        },
        "rendered": [
            {
                "split": "train",
                "row": 5,
                "sides": {name: side | {"prompt_tokens": 3} for name in ("chosen", "rejected")},
            }
        ],
        "signals": {
            "pairs": 300,
            "prompts": 290,
            "baselines": {"longer": rule(0.8, "The longer answer"), "list": rule(0.5, "The answer with a list")},
            "openers": [{"word": "certainly", "chosen": 0.3, "rejected": 0.01}],
            "duplicates": {"count": 9, "of": 300, "rows": [[40, 4], [50, 5]]},
            **dict.fromkeys(("near_duplicates", "contradictions", "near_leaks"), none),
            "frequent_prompt": {"count": 17, "of": 300, "rows": [3, 4], "text": "What is the time?"},
        },
        "off_distribution": {
            **{"n": 256, "far_from": 1.0, "agrees": 0.55, "rows": [8, 9]},
            **{"chosen": quantiles, "rejected": quantiles | {"far": 0.61}},
        },
        "cost": {
            **{"pairs_per_epoch": 300, "updates": 38, "padded_tokens": 2000, "real_tokens": 1000},
            **{"padding_share": 0.5, "prefix_share": 0.4, "shared_prefix_speedup": 3.3},
            **{"memory": {"frozen weights": 3e9, "activations": 2e9}, "memory_total": 5e9},
            "fits": {"name": "the 24GB card", "bytes": 24e9, "fits": True},
        },
        "findings": [
            {"name": "longer", "level": "warning", "text": "The longer answer wins 80%.", "remedy": "Balance them."}
        ],
        "verdict": "warnings",
    }


class Page(HTMLParser):
    """The tags, attributes and text of a page; raises on a tag that is not closed."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.text += " "
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    @property
    def words(self):
        text = self.text.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "none").replace("\xa0", " ")
        return " ".join(text.split())


@pytest.fixture
def page_of(tmp_path):
    def write(data):
        path = write_page(tmp_path / "new" / "preflight.html", data)
        return Page(path.read_text(encoding="utf-8"))

    return write


def test_every_section_says_what_the_data_hold(page_of):
    page = page_of(preflight())
    for said in (
        "Preflight of some/pairs, the first rows of each split.",
        "A run would start, but look at this first. Longer warning",
        *("The longer answer wins 80%.", "Balance them.", "longer warning above longer=0.7"),
        *("8 of 13 rows", "over max_length -3 none", "train 11, 22, 33", "= pairs 4 4"),
        *("moved between the splits -2 +2", "left out by drawing a sample -1 -1"),
        *("median 5 · 90 % ≤ 8", "1 pairs lost their oldest turns, 77 tokens in all.", "2 pairs do not end in EOS."),
        *("The longer answer 80.0 %", "“certainly” begins 30.0 % of chosen and 1.0 % of rejected"),
        *("word for word rows 40 and 4, 50 and 5 … 9 3.0 %", "What is the time? 17 5.7 %"),
        *("61 % of the rejected and 25 % of the chosen", "In 55 % of the pairs", "rows 8, 9"),
        *("38 updates", "30 % needed once", "20 % second copies of prompts", "50 % padding", "3.3 times fewer"),
        *("about 5.0 GB, of 24.0 GB (the 24GB card)", "activations 2.0 GB"),
        "train 5",
    ):
        assert said.lower() in page.words.lower(), said


def test_tokens_are_boxes_with_their_ids_and_the_trained_ones_marked(page_of):
    boxes = [
        attributes for tag, attributes in page_of(preflight()).tags if "token" in attributes.get("class", "").split()
    ]
    assert len(boxes) == 10
    assert [box["title"].split(",")[0] for box in boxes[:5]] == ["id 7", "id 8", "id 9", "id 10", "id 1"]
    assert ["trained" in box["class"] for box in boxes[:5]] == [False, False, False, True, True]
    assert ["odd" in box["class"] for box in boxes[:5]] == [False, True, False, True, False]


def test_only_rules_beyond_their_threshold_stand_out(page_of):
    rules = [
        attributes["class"] for _, attributes in page_of(preflight()).tags if "rule" in attributes.get("class", "")
    ]
    assert [name == "rule beyond" for name in rules[:2]] == [True, False]


@pytest.mark.parametrize(
    ("sections", "heading"),
    [
        (["off_distribution"], "Would the model write"),
        (["cost"], "What it will cost"),
        (["signals"], "Repeats"),
        (["rendered"], "What the model will really see"),
        (["tokens"], "How long"),
        (["splits", "total", "reasons"], "What became"),
        (["findings"], "Balance them"),
    ],
)
def test_what_is_missing_is_left_out(sections, heading, page_of):
    assert heading in page_of(preflight()).text
    data = preflight() | dict.fromkeys(sections)
    assert heading not in page_of(data).text
    assert heading not in page_of({name: data[name] for name in data if name not in sections}).text


@pytest.mark.parametrize(("verdict", "said"), [("ok", "Nothing stands in the way"), ("failures", "would not start")])
def test_the_verdict_is_in_plain_words(verdict, said, page_of):
    assert said in page_of(preflight() | {"verdict": verdict, "findings": []}).text


def hostile(value):
    """The data with every text, key and token made hostile."""
    if isinstance(value, str):
        return value if value in ("warning", "warnings") else value + HOSTILE
    if isinstance(value, list):
        return [hostile(item) for item in value]
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    return value


def test_hostile_texts_stay_texts(page_of, tmp_path):
    data = hostile(preflight())
    data["reasons"] = {HOSTILE: HOSTILE}
    data["cost"]["memory"] = {HOSTILE: 1e9}
    for account in (*data["splits"].values(), data["total"]):
        account["dropped"] = {HOSTILE: {"count": 3, "counted_by": HOSTILE, "first": [1]}}
    harmless, attacked = page_of(preflight()), page_of(data)
    assert {tag for tag, _ in attacked.tags} <= {tag for tag, _ in harmless.tags}
    assert {name for _, attributes in attacked.tags for name in attributes} <= {
        name for _, attributes in harmless.tags for name in attributes
    }
    assert attacked.text.count("<script>alert('x')</script>") > 15
    assert "{{ 7 * 7 }}" in attacked.text
    source = (tmp_path / "new" / "preflight.html").read_text()
    assert "<script" not in source
    assert html.escape("<script>").lower() in source


def test_the_page_needs_nothing_but_itself(page_of, tmp_path):
    page = page_of(preflight())
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "a"}
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("href", "src")]
    assert links == ["data:,"]
    source = (tmp_path / "new" / "preflight.html").read_text()
    assert not re.search(r"url\(|@import|https?://", source)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    for query in ("prefers-color-scheme: dark", "@media print", "max-width: 40rem"):
        assert query in source


def test_the_page_depends_on_the_data_alone(tmp_path):
    data = preflight()
    before = copy.deepcopy(data)
    pages = [write_page(tmp_path / name, data).read_bytes() for name in ("one.html", "two.html")]
    assert pages[0] == pages[1]
    assert data == before
