"""The page of a preflight shows the data as text; no text of the data becomes markup or code."""

import copy
import html
import re

import pytest
from browser import seen
from hostile_pages import HOSTILE, Page, hostile
from preflight_contents import preflight

from dpo_recipes.preflight.page import write_page


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
        (["off_distribution"], "Likelihood of the completions"),
        (["cost"], "Estimated cost"),
        (["signals"], "Repeats"),
        (["rendered"], "Tokens that the model will see"),
        (["tokens"], "Lengths of the pairs"),
        (["splits", "total", "reasons"], "Rows kept and dropped"),
        (["findings"], "Balance them"),
    ],
)
def test_what_is_missing_is_left_out(sections, heading, page_of):
    assert heading in page_of(preflight()).text
    data = preflight() | dict.fromkeys(sections)
    assert heading not in page_of(data).text
    assert heading not in page_of({name: data[name] for name in data if name not in sections}).text


@pytest.mark.parametrize(
    ("verdict", "said"), [("ok", "A run can start: every check passed"), ("failures", "would not start")]
)
def test_the_verdict_is_in_plain_words(verdict, said, page_of):
    assert said in page_of(preflight() | {"verdict": verdict, "findings": []}).text


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


@pytest.mark.parametrize("width", [390, 1280])
def test_a_reader_sees_all_of_it_on_a_phone_and_on_a_screen(width, tmp_path):
    data = preflight()
    data["dataset"] = "an/" + "unbroken" * 20
    laid_out = seen(write_page(tmp_path / "preflight.html", data), width)
    assert laid_out["cut"] == []
    assert laid_out["width"] == width


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
