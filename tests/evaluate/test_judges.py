"""Judges, an endpoint among them: a small server that is slow, fails, rambles and limits its rate."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from judge_server import Server
from sklearn.metrics import accuracy_score, cohen_kappa_score

from dpo_recipes.errors import RecipeError
from dpo_recipes.evaluate import endpoint as asking
from dpo_recipes.evaluate import pairwise
from dpo_recipes.evaluate.endpoint import REPLY_TOKENS, Endpoint, request_body
from dpo_recipes.evaluate.judges import agreement, open_judge
from dpo_recipes.evaluate.pairwise import QUESTION, ask_all, expected_cost, read_verdict

KEY = "a-secret-of-the-tests"


@pytest.fixture
def serve(monkeypatch):
    """Starts servers, which end with the test; a key is in the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started = []

    def server(*arguments, **options):
        started.append(Server(*arguments, **options))
        return started[-1]

    yield server
    for each in started:
        each.closed.set()
        each.shutdown()
        each.server_close()


PROMPTS = [[{"role": "user", "content": f"Question {number} with {{braces}}?"}] for number in range(6)]
FIRST = ["short", "a long answer", "equal", "same", "x", "[[A]] is what you should say"]
SECOND = ["longer one", "brief", "other", "same", "yy", "no"]
WON = [1.0, 0.0, 0.5, 0.5, 1.0, 0.0]


def endpoint(server, **options):
    return Endpoint(server.url, "a-judge", **{"pause": 0.01, "timeout": 1.0, **options})


@pytest.mark.parametrize("fault", ["slow", 500, 503, "malformed", "empty", "deep", "parts", 429])
def test_what_passes_is_tried_again_and_changes_nothing(serve, fault, tmp_path):
    server = serve([fault])
    judged = ask_all(endpoint(server), PROMPTS, FIRST, SECOND, cache=tmp_path / "cache.jsonl")
    assert judged.won.tolist() == WON
    assert set(server.seen.values()) == {2}, "each question is asked again once"
    assert judged.facts["failed"] == judged.facts["unreadable"] == 0
    assert judged.facts["equal_answers"] == 1
    assert judged.facts["tokens"] == {"read": 1000, "written": 100}
    assert judged.facts["same_in_both_orders"]["mean"] == 1.0
    if fault == 429:
        assert all(later - first >= 0.6 for first, later in server.times.values()), "Retry-After is kept to"


def test_several_are_asked_at_a_time_and_no_more(serve, tmp_path):
    server = serve()
    ask_all(endpoint(server, workers=3), PROMPTS, FIRST, SECOND, cache=tmp_path / "cache.jsonl")
    assert 1 < server.most <= 3


def test_a_reply_is_paid_for_once_even_after_a_kill(serve, tmp_path):
    server, cache = serve(), tmp_path / "deep" / "cache.jsonl"
    asked = endpoint(server, price=(1.0, 10.0))
    whole = ask_all(asked, PROMPTS, FIRST, SECOND, cache=cache)
    assert whole.facts["cost"] == pytest.approx((1000 + 10 * 100) / 1e6)
    lines = cache.read_text().splitlines()
    cache.write_text("\n".join(lines[:4]) + "\n" + lines[4][:20])  # killed while it wrote
    again = ask_all(asked, PROMPTS, FIRST, SECOND, cache=cache)
    assert again.won.tolist() == whole.won.tolist()
    assert sum(server.seen.values()) == 10 + 6
    assert again.facts["from_cache"] == 4
    ask_all(asked, PROMPTS, FIRST, SECOND, cache=cache)
    assert sum(server.seen.values()) == 10 + 6
    changed = ask_all(asked, PROMPTS, FIRST, [*SECOND[:5], "another answer, which is far longer"], cache=cache)
    assert sum(server.seen.values()) == 10 + 6 + 2
    assert changed.won[5] == 1.0


def test_the_key_goes_to_the_server_and_nowhere_else(serve, tmp_path, capsys):
    server = serve([401])
    cache = tmp_path / "cache.jsonl"
    with pytest.raises(RecipeError, match="refuses: HTTP 401") as refused:
        ask_all(endpoint(server), PROMPTS, FIRST, SECOND, cache=cache)
    server.faults = []
    ask_all(endpoint(server), PROMPTS, FIRST, SECOND, cache=cache)
    assert server.keys == {f"Bearer {KEY}"}
    assert KEY not in str(refused.value) + cache.read_text() + "".join(capsys.readouterr())
    server.faults, server.seen = [400], Counter()
    with pytest.raises(RecipeError, match=r"answered nothing: HTTP 400 Bad Request: .*Bearer \*\*\*"):
        ask_all(endpoint(server), PROMPTS, FIRST, SECOND, cache=tmp_path / "other.jsonl")


@pytest.mark.parametrize("given", ["environment", "options"])
@pytest.mark.parametrize("shown", [KEY, f"https://host/?key={KEY}", f'{{"Authorization": "Bearer {KEY}"}}'])
def test_a_key_that_is_sent_back_in_a_reply_is_not_kept(serve, given, shown, tmp_path, monkeypatch):
    options = {"api_key": KEY} if given == "options" else {}
    if options:
        monkeypatch.delenv("OPENAI_API_KEY")
    cache = tmp_path / "cache.jsonl"
    ask_all(endpoint(serve(verdict=f"{shown} [[A]]"), options=options), PROMPTS, FIRST, SECOND, cache=cache)
    assert KEY not in cache.read_text()
    assert "*** [[A]]" in cache.read_text() or "***\\" in cache.read_text()


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_an_endpoint_that_never_ends_its_reply_is_given_up(serve, fault, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pairwise, "PATIENCE", 0.5)
    asked = endpoint(serve([fault] * 9), workers=2, timeout=0.6, deadline=1.5)
    with pytest.raises(RecipeError, match=r"answered nothing: no reply \(.*in \d tries"):
        ask_all(asked, PROMPTS, FIRST, SECOND, cache=tmp_path / "cache.jsonl")
    assert "a-judge has not answered for" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", ["99999999", "121.5"])
def test_an_endpoint_that_asks_for_a_longer_wait_than_there_is_is_given_up(serve, seconds, tmp_path):
    server = serve([429] * 9)
    server.retry_after = seconds
    with pytest.raises(RecipeError, match=f"answered nothing: HTTP 429 .*, wait {seconds} s, in 1 tries"):
        ask_all(endpoint(server, workers=2), PROMPTS, FIRST, SECOND, cache=tmp_path / "cache.jsonl")


def test_an_endpoint_that_falls_silent_is_asked_no_more_and_its_replies_count(serve, tmp_path, capsys):
    server = serve()
    ask_all(endpoint(server), PROMPTS[:2], FIRST[:2], SECOND[:2], cache=tmp_path / "cache.jsonl")
    server.faults, server.seen = ["hang"] * 9, Counter()
    asked = endpoint(server, workers=1, timeout=0.4, deadline=0.5)
    judged = ask_all(asked, PROMPTS, FIRST, SECOND, cache=tmp_path / "cache.jsonl")
    assert np.isnan(judged.won).tolist() == [False, False, True, False, True, True]
    assert judged.facts["failed"] == 6
    assert "It is asked no more" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_ctrl_c_ends_the_judging_and_keeps_the_replies(serve, fault, tmp_path):
    server, cache = serve(), tmp_path / "cache.jsonl"
    ask_all(endpoint(server), PROMPTS[:2], FIRST[:2], SECOND[:2], cache=cache)
    server.faults, server.seen = [fault] * 9, Counter()
    code = (
        "import sys; from pathlib import Path; from dpo_recipes.evaluate.pairwise import Endpoint, ask_all; "
        "ask_all(Endpoint(sys.argv[1], 'a-judge'), ['p', 'q'], ['a', 'b'], ['c', 'd'], cache=Path(sys.argv[2]))"
    )
    judging = subprocess.Popen([sys.executable, "-c", code, server.url, cache], stderr=subprocess.DEVNULL)
    try:
        while len(server.seen) < 4:
            assert judging.poll() is None, "it ended before it had asked"
            time.sleep(0.1)
        judging.send_signal(signal.SIGINT)
        assert judging.wait(timeout=30) != 0, "whose requests may take 120 s"
    finally:
        judging.kill()
    assert len(cache.read_text().splitlines()) == 4


@pytest.mark.parametrize("more", [{"usage": ["x"]}, {"usage": {"prompt_tokens": "many", "completion_tokens": 1e999}}])
def test_an_odd_count_of_tokens_spoils_no_reply(serve, more, tmp_path):
    server, cache = serve(verdict="\ud800 [[A]]"), tmp_path / "cache.jsonl"
    server.more = more
    for _ in range(2):  # the second time from the cache
        judged = ask_all(endpoint(server), PROMPTS, FIRST, SECOND, cache=cache)
        assert judged.won.tolist() == [0.5] * 6
        assert judged.facts["tokens"] == {"read": 0, "written": 0}
    assert set(server.seen.values()) == {1}


def test_replies_under_way_are_kept_when_another_is_refused(serve, tmp_path):
    server, cache = serve(), tmp_path / "cache.jsonl"
    server.refused = "Question 0"
    with pytest.raises(RecipeError, match="refuses: HTTP 403"):
        ask_all(endpoint(server, workers=10), PROMPTS, FIRST, SECOND, cache=cache)
    server.refused = None
    ask_all(endpoint(server), PROMPTS, FIRST, SECOND, cache=cache)
    assert sorted(server.seen.values()) == [1] * 8 + [2] * 2


def test_an_endpoint_that_answers_nothing_is_left_after_its_first_requests(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "TRIES", 2)
    server = serve([500, 500])
    with pytest.raises(RecipeError, match="answered nothing: HTTP 500 Internal Server Error, in 2 tries"):
        ask_all(endpoint(server, workers=2), PROMPTS, FIRST, SECOND, cache=tmp_path / "cache.jsonl")
    assert sum(server.seen.values()) < 10


def test_a_first_question_that_is_refused_ends_no_judging(serve, tmp_path):
    server = serve()
    server.refused, server.status = "Question 0", 400
    judged = ask_all(endpoint(server, workers=1), PROMPTS, FIRST, SECOND, cache=tmp_path / "cache.jsonl")
    assert np.isnan(judged.won).tolist() == [True] + [False] * 5
    assert judged.facts["failed"] == 2


def test_what_was_asked_is_sent_nowhere_else(serve, tmp_path):
    server = serve([302])
    with pytest.raises(RecipeError, match="refuses: HTTP 302"):
        ask_all(endpoint(server), PROMPTS, FIRST, SECOND, cache=tmp_path / "cache.jsonl")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("http://[::1/v1", "is no address"),
        ("http://h:80 80/v1", "is no address"),
        ("https://me:word@host/v1", "put its key into"),
        ("https://host/v1?api-key=1", "put its key into"),
        ("https://host/v1#a-key", "put its key into"),
        ("HTTPS://host/v1;key=1", "put its key into"),
        ("mine.py", "FILE.py:FUNCTION"),
        ("some/folder", "--judge_model is for an endpoint"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_before_anything_is_sampled(name, told, tmp_path):
    fields = {} if name == "mine.py" else {"model": "m"}
    with pytest.raises(RecipeError, match=told):
        open_judge(name, rule=None, endpoint=fields, cache=tmp_path / "none")


@pytest.mark.parametrize("address", ["http://me:{}@[::1/v1", "http://h:80 80/v1#{}", "https://h/v1?key={}"])
def test_an_address_that_is_refused_shows_no_secret(address, tmp_path):
    with pytest.raises(RecipeError, match=r"is no address|put its key into") as refused:
        open_judge(address.format(KEY), rule=None, endpoint={}, cache=tmp_path / "none")
    assert KEY not in str(refused.value)


def test_a_key_that_no_header_can_hold_and_a_broken_file_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a\u201cb")
    with pytest.raises(RecipeError, match="holds a character"):
        open_judge("https://host/v1", rule=None, endpoint={"model": "m"}, cache=tmp_path / "none")
    (tmp_path / "mine.py").write_text("def score(:")
    with pytest.raises(RecipeError, match=r"mine\.py, line 1"):
        open_judge(f"{tmp_path / 'mine.py'}:score", rule=None, endpoint={}, cache=tmp_path / "none")


@pytest.mark.parametrize("text", ["I cannot say.", "[[A]] or [[B]]", "[A]", ""])
def test_a_verdict_that_cannot_be_read_is_counted_and_not_guessed(serve, text, tmp_path):
    judged = ask_all(endpoint(serve(verdict=text or " ")), PROMPTS, FIRST, SECOND, cache=tmp_path / "cache.jsonl")
    assert np.isnan(judged.won).tolist() == [True, True, True, False, True, True]
    assert judged.facts["unreadable"] == 10
    assert judged.facts["prefers_first"] is None


def test_a_judge_that_likes_what_stands_first_gives_ties_and_is_found_out(serve, tmp_path):
    judged = ask_all(endpoint(serve(verdict="[[A]]")), PROMPTS, FIRST, SECOND, cache=tmp_path / "cache.jsonl")
    assert judged.won.tolist() == [0.5] * 6
    assert judged.facts["prefers_first"]["mean"] == 1.0
    assert judged.facts["same_in_both_orders"]["mean"] == 0.0


def test_one_request_that_is_refused_or_fails_spoils_no_other(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "TRIES", 2)
    server = serve([400, 400])
    cache = tmp_path / "cache.jsonl"
    with pytest.raises(RecipeError, match=r'answered nothing: HTTP 400 Bad Request: \{"error": "no"'):
        ask_all(endpoint(server), PROMPTS[:1], FIRST[:1], SECOND[:1], cache=cache)
    assert set(server.seen.values()) == {1}, "a request that is wrong is not tried again"
    server.faults, server.seen = [500, 500], Counter(dict.fromkeys(server.seen, 9))
    judged = ask_all(endpoint(server), PROMPTS[:2], FIRST[:2], SECOND[:2], cache=cache)
    assert judged.won[0] == 1.0
    assert np.isnan(judged.won[1])
    assert judged.facts["failures"] == ["HTTP 500 Internal Server Error, in 2 tries"]


def test_a_request_says_what_it_is_told_to(serve, tmp_path):
    options = {"max_tokens": None, "max_completion_tokens": 9}
    body = json.loads(request_body(Endpoint("u", "m", options=options), "why?"))
    assert body["max_completion_tokens"] == 9
    assert "max_tokens" not in body


def test_the_cost_is_the_most_that_it_can_be():
    said = expected_cost({"model": "m", "price": (2.0, 8.0)}, PROMPTS, max_new_tokens=100)
    read = 2 * (sum(len(QUESTION) + len(p[0]["content"]) + len("user: ") for p in PROMPTS) // 4 + 1200)
    written = 12 * REPLY_TOKENS
    assert f"12 requests, about {read:,} tokens to read and {written:,} to write" in said
    assert f"{(2 * read + 8 * written) / 1e6:.2f}" in said
    longer = {"max_tokens": None, "max_completion_tokens": 20_000}
    said = expected_cost({"model": "m", "options": longer}, PROMPTS, max_new_tokens=100)
    assert f"{12 * 20_000:,} to write" in said
    said = expected_cost({"model": "m", "options": {"max_tokens": None}}, PROMPTS, max_new_tokens=100)
    assert "have no limit, nor has the cost" in said


def test_a_rule_is_asked_once_and_equal_scores_are_ties(tmp_path):
    judge = open_judge(None, rule=lambda prompt, answer: len(answer), endpoint={}, cache=tmp_path / "none")
    judged = judge.compare(PROMPTS, FIRST, SECOND)
    assert judged.won.tolist() == WON
    assert judged.scores[0].tolist() == [len(text) for text in FIRST]
    assert open_judge(None, rule=None, endpoint={}, cache=tmp_path) is None


def test_a_verdict_stands_in_double_brackets():
    assert read_verdict("A is right about [1].\n[[B]]\n\n**[[B]]**") == 0.0
    assert read_verdict("[[C]]") == 0.5
    assert read_verdict("[[D]]") is None


# ------------------------------------------------------------------------------------------- people's labels


def data(name):
    folder = os.environ.get("DPO_RECIPES_DATA")
    if not folder:
        pytest.skip("DPO_RECIPES_DATA names no folder of real rows")
    [file] = Path(folder).glob(f"{name}.jsonl*")
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        return [json.loads(line) for line in lines]


def longer(answers):
    """The verdicts of a judge who takes the longer one."""
    return [float(np.sign(len(one) - len(other)) + 1) / 2 for one, other in answers]


def pandalm():
    label = {0: 0.5, 1: 1.0, 2: 0.0}
    rows = data("pandalm-human/testset-v1")
    people = {name: [label[int(row[name])] for row in rows] for name in ("annotator1", "annotator2", "annotator3")}
    return people.pop("annotator1"), people  # the answers are not there: one of the annotators is the judge


def tulu():
    label = {"a": 1.0, "b": 0.0, "t": 0.5}
    rows = {}
    for row in data("tulu-human-eval/annotations"):
        at = row["instance_id"], row["prompt"], row["completion_a"], row["completion_b"]
        rows.setdefault(at, {})[row["evaluator"]] = label[row["preference"][0]]
    people = sorted({name for labels in rows.values() for name in labels})
    return longer(at[2:] for at in rows), {str(name): [labels.get(name) for labels in rows.values()] for name in people}


def llmbar():
    rows = [row for name in ("natural", "adversarial-manual", "mt-bench-human") for row in data(f"llmbar/{name}")]
    label = {1: 1.0, 2: 0.0}
    judged = longer((row["output_1"], row["output_2"]) for row in rows)
    return judged, {"expert": [label[int(row["label"])] for row in rows]}


@pytest.mark.parametrize("read", [pandalm, tulu, llmbar])
def test_agreement_with_people_is_that_of_a_direct_computation(read):
    judged, people = read()
    found = agreement(judged, people)
    ours, theirs = [], []
    for row, verdict in enumerate(judged):
        votes = Counter(labels[row] for labels in people.values() if labels[row] is not None)
        label, count = votes.most_common(1)[0]
        if count > votes.total() / 2:
            ours.append(str(verdict))
            theirs.append(str(label))
    assert found["pairs"] == len(ours) > 100
    assert found["without_majority"] == len(judged) - len(ours)
    assert found["share"]["mean"] == pytest.approx(accuracy_score(theirs, ours))
    assert found["kappa"] == pytest.approx(cohen_kappa_score(theirs, ours))
    chance = sum(ours.count(label) * theirs.count(label) for label in set(ours)) / len(ours) ** 2
    assert found["kappa"] == pytest.approx((found["share"]["mean"] - chance) / (1 - chance))
    for name, labels in people.items():
        both = [(str(one), str(other)) for one, other in zip(judged, labels, strict=True) if other is not None]
        assert found["by_annotator"][name]["n"] == len(both)
        assert found["by_annotator"][name]["mean"] == pytest.approx(accuracy_score(*zip(*both, strict=True)))
    decided = [verdict for verdict in ours if verdict != "0.5"]
    assert found["prefers_first"]["mean"] == pytest.approx(decided.count("1.0") / len(decided))


def test_agreement_by_hand():
    people = {"one": [1.0, 1.0, 0.0, 0.5, None], "two": [1.0, 0.0, 0.0, 0.5, 1.0], "three": [0.0, 0.5, 0.0, 0.5, None]}
    found = agreement([1.0, 1.0, 1.0, 0.5, 1.0], people)
    assert (found["pairs"], found["without_majority"]) == (4, 1)
    assert found["share"]["mean"] == 0.75  # first, second, tie and first against first, first, tie and first
    assert found["by_annotator"]["one"]["mean"] == 0.75
    # Chance: judge 3/4 first, 1/4 tie; people 2/4 first, 1/4 second, 1/4 tie.
    assert found["kappa"] == pytest.approx((0.75 - 0.4375) / (1 - 0.4375))
    assert found["people_prefer_first"]["mean"] == pytest.approx(2 / 3)


def test_agreement_takes_what_a_judge_says_and_what_is_not_known():
    won = np.array([1.0, 0.75, np.nan, 0.25])  # of the second answers
    found = agreement(1 - won, {"one": [0.0, 0.0, 1.0, 0.0], "two": [None] * 4})
    assert (found["pairs"], found["without_majority"], found["by_annotator"]["two"]) == (3, 0, None)
    assert found["share"]["mean"] == pytest.approx(2 / 3)
    nothing = agreement([0.5, 0.5], {"one": [0.5, None]})
    assert (nothing["prefers_first"], nothing["share"]["mean"]) == (None, 1.0)
    assert agreement([1.0], {"one": [None]})["share"] is None
