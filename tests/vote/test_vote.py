"""Votes are kept line by line, count once for each voter and pair, and become a win rate and pairs that train."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from browser import seen
from hostile_pages import HOSTILE, Page
from lora_runs import save_lora_run

from dpo_recipes import cli
from dpo_recipes.errors import RecipeError
from dpo_recipes.estimates import two_way
from dpo_recipes.manifest import claim, strangers
from dpo_recipes.vote import vote as voting
from dpo_recipes.vote.answers import load_answers, read_pairs
from dpo_recipes.vote.booth import Booth, draw
from dpo_recipes.vote.log import VoteLog, read_votes, repeats, standing
from dpo_recipes.vote.results import agreement, measure, next_pairs, verdict, write_result

NAN = float("nan")


def pair(number, prompt="Why?"):
    return {"pair": str(number), "prompt": f"{prompt} {number}", "before": f"bad {number}", "after": f"good {number}"}


def cast(voter, pair, choice, **questions):
    return {"voter": voter, "pair": str(pair), "vote": choice, "first": "after", "questions": questions}


def sample(number, before="Yes.", after="No.", temperature=0.7):
    sides = {"before": {"text": before}, "after": {"text": after}}
    return {"prompt": [{"role": "user", "content": f"May I? {number}"}], "temperature": temperature, **sides}


def write_run(folder, samples):
    claim(folder)
    (folder / "settings.json").write_text(json.dumps({"model_name_or_path": "start", "dataset_name": "some/pairs"}))
    (folder / "samples.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in samples))
    return folder


@pytest.fixture
def log(tmp_path):
    return VoteLog(tmp_path / "votes.jsonl")


@pytest.fixture
def booth(log):
    return Booth([pair(number) for number in range(40)], log)


# ------------------------------------------------------------------------------------------ the log


def test_a_line_that_a_kill_cut_short_is_counted_and_the_next_vote_begins_a_line(tmp_path):
    path = tmp_path / "votes.jsonl"
    path.write_bytes(json.dumps(cast("ann", 1, "tie")).encode() + b'\n{"voter": "ann", "pai')
    log = VoteLog(path)
    assert (len(log.votes), log.torn) == (1, 1)
    log.append(**cast("ann", 2, "after"))
    votes, torn = read_votes(path)
    assert ([vote["pair"] for vote in votes], torn) == (["1", "2"], 1)


def test_a_vote_that_does_not_fit_on_the_disk_leaves_the_file_as_it_was(log, tmp_path, monkeypatch):
    log.append(**cast("ann", 1, "tie"))
    before = (tmp_path / "votes.jsonl").read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:9]))
    with pytest.raises(OSError, match="full"):
        log.append(**cast("ann", 2, "after"))
    monkeypatch.undo()
    assert (tmp_path / "votes.jsonl").read_bytes() == before
    assert len(log.votes) == 1


def test_a_second_process_cannot_write_the_same_votes(log, tmp_path):
    with pytest.raises(RecipeError, match="Another `vote` command writes"):
        VoteLog(tmp_path / "votes.jsonl")


def test_the_last_vote_counts_and_changes_are_counted():
    votes = [cast("ann", 1, "after"), cast("ann", 1, "before"), cast("ann", 1, "before"), cast("bob", 1, "tie")]
    votes += [cast("ann", 2, "skip"), {"voter": "ann", "pair": "2", "vote": "undo"}]
    assert {key: vote["vote"] for key, vote in standing(votes).items()} == {("ann", "1"): "before", ("bob", "1"): "tie"}
    assert repeats(votes) == {"changed": 1, "same": 1}


# ---------------------------------------------------------------------------------------- the booth


def test_sides_are_drawn_for_each_voter_and_stay(booth):
    for voter in ("ann", "bob"):
        drawn = [booth.sides(voter, key) for key in booth.pairs]
        assert drawn == [booth.sides(voter, key) for key in booth.pairs]
        assert 8 < Counter(drawn)[("before", "after")] < 32
    assert [booth.sides("ann", key) for key in booth.pairs] != [booth.sides("bob", key) for key in booth.pairs]


def test_a_click_on_a_place_is_a_vote_for_the_side_that_stood_there(booth):
    for key in booth.pairs:
        booth.cast("ann", key, "first", {"helpful": "Answer 2", "harmless": "Equal", "instructions": None})
        vote = booth.log.votes[-1]
        assert vote["vote"] == vote["first"] == booth.sides("ann", key)[0]
        assert vote["questions"] == {"helpful": booth.sides("ann", key)[1], "harmless": "tie"}


def test_undo_goes_back_pair_by_pair_and_a_voter_goes_on_after_a_restart(booth, tmp_path):
    order = list(booth.pairs)
    for choice in ("first", "skip", "both bad"):
        booth.cast("ann", booth.next("ann"), choice, {})
    assert booth.next("ann") == order[3]
    assert booth.next("bob") == order[0]
    for _ in range(2):
        booth.cast("ann", order[3], "undo", {})
    assert booth.next("ann") == order[1]
    again = Booth(list(booth.pairs.values()), booth.log)
    booth.log.votes = read_votes(tmp_path / "votes.jsonl")[0]
    assert again.next("ann") == order[1]
    booth.cast("bob", order[0], "undo", {})
    booth.cast("ann", "no such pair", "first", {})
    assert len(booth.log.votes) == 5


def test_texts_are_shown_as_text_and_the_page_does_not_tell_the_sides(log):
    sides = {"before": f"**x** {HOSTILE}", "after": "${7 * 7}<b>y</b>\x1b[1m"}
    turns = [{"role": "system", "content": HOSTILE}, {"role": "user", "content": "Why?"}]
    booth = Booth([{"pair": "1", "prompt": turns, **sides}], log)
    drawn = draw(booth, f"ann {HOSTILE}", "1")
    page = Page(drawn)
    assert {tag for tag, _ in page.tags} == {"header", "progress", "p", "div", "small", "section", "h2"}
    for text in (sides["before"], "${7 * 7}<b>y</b>\\x1b[1m", f"system{HOSTILE}"):
        assert " ".join(text.split()) in page.words
    assert "0 of 1" in page.words
    assert not {"{", "}", "$", "`"} & set(drawn), "signs that Gradio's templates read"
    assert not {"before", "after", "tuned"} & set(page.words.replace("**x**", "").split())


# --------------------------------------------------------------------------------------- the answers


def test_answers_are_those_of_the_run_at_one_temperature_without_equal_ones(tmp_path):
    rows = [sample(1), sample(2, after="Yes."), sample(3), sample(1, temperature=0.0)]
    run, file = write_run(tmp_path / "run", rows), tmp_path / "answers.json"
    load_answers(str(run), None, file, data={}, prompts=9, temperature=None)
    pairs, equal = read_pairs(file)
    assert [each["prompt"][0]["content"] for each in pairs] == ["May I? 1", "May I? 3"]
    assert equal == 1
    load_answers(str(run), None, file, data={}, prompts=9, temperature=0.0)
    assert len(read_pairs(file)[0]) == 1


def test_two_runs_are_compared_on_the_prompts_that_both_answered(tmp_path):
    run = write_run(tmp_path / "run", [sample(1, after="Mine."), sample(2)])
    other = write_run(tmp_path / "other", [sample(1, after="Theirs."), sample(3)])
    load_answers(str(run), str(other), tmp_path / "answers.json", data={}, prompts=9, temperature=None)
    [only] = read_pairs(tmp_path / "answers.json")[0]
    assert (only["before"], only["after"]) == ("Theirs.", "Mine.")


def test_both_models_answer_the_prompts_of_a_dataset_and_the_answers_are_kept(tiny_model, tmp_path, monkeypatch):
    run = save_lora_run(tmp_path / "run", tiny_model)
    rows = "".join(json.dumps({"prompt": f"Why {number}?"}) + "\n" for number in range(4))
    (tmp_path / "prompts.jsonl").write_text(rows)
    options = dict(data={"dataset_name": str(tmp_path / "prompts.jsonl")}, prompts=3, temperature=0.0)
    options |= dict(max_new_tokens=4, seed=0)
    load_answers(str(run), None, tmp_path / "answers.json", **options)
    pairs, equal = read_pairs(tmp_path / "answers.json")
    assert len(pairs) + equal == 3
    assert pairs
    monkeypatch.setattr("dpo_recipes.models.open.open_model", None)
    load_answers(str(run), None, tmp_path / "answers.json", **options)
    assert read_pairs(tmp_path / "answers.json") == (pairs, equal)


def test_a_run_without_answers_needs_prompts(tmp_path):
    run = write_run(tmp_path / "run", [])
    with pytest.raises(RecipeError, match=r"holds no samples.jsonl .* --dataset_name"):
        load_answers(str(run), None, tmp_path / "answers.json", data={}, prompts=9, temperature=None)


# ---------------------------------------------------------------------------------------- the result


def test_the_interval_holds_other_prompts_and_other_voters():
    import numpy as np

    one = two_way(np.array([[1.0]] * 30 + [[0.0]] * 10))
    assert one.mean == 0.75
    assert one.n == 40
    assert 0.55 < one.low < 0.63
    assert 0.85 < one.high < 0.90
    opposed = two_way(np.array([[1.0, 0.0]] * 40))
    assert (opposed.mean, opposed.low, opposed.high) == (0.5, 0.0, 1.0), "another two voters may both say 1"
    sure = two_way(np.array([[1.0, NAN], [NAN, 1.0], [NAN, NAN], [1.0, 1.0]]))
    assert (sure.mean, sure.n) == (1.0, 3)
    assert sure.low == pytest.approx(0.4385, abs=1e-3), "Wilson's interval of 3 of 3"


def test_votes_become_a_win_rate_with_the_verdict_of_their_interval():
    votes = [cast("ann", number, "after" if number % 4 else "both bad", helpful="before") for number in range(40)]
    votes += [cast("bob", 0, "skip"), cast("bob", 1, "tie"), cast("bob", 2, "after")]
    found = measure(votes)
    assert found["win_rate"]["mean"] == pytest.approx((30 + 5 + 0.5 + 1) / 42)
    assert found["votes"] == {"before": 0, "after": 31, "tie": 1, "both bad": 10, "skip": 1}
    assert found["voters"] == [40, 2]
    assert found["verdict"]["word"] == "better"
    assert found["left"]["mean"] == 1.0
    assert found["questions"]["helpful"]["after"]["mean"] == 0.0
    assert measure(votes[:20])["verdict"]["word"] == "not known", "too few prompts"
    split = [cast("ann", number, "after" if number % 2 else "before") for number in range(60)]
    assert measure(split)["verdict"]["word"] == "not known"
    assert "the interval is" in measure(split)["verdict"]["sentence"]
    assert verdict(None, 0)["sentence"] == "Not known: nobody has voted."


def test_agreement_is_known_only_where_voters_overlap_and_differ():
    ann = [cast("ann", 1, "after"), cast("ann", 2, "before")]
    assert agreement(ann) == (None, "it takes two voters")
    assert agreement([*ann, cast("bob", 3, "tie")])[1] == "no two voters judged the same pair"
    assert "are the same" in agreement([*ann, cast("bob", 1, "after")])[1]
    assert agreement([*ann, cast("bob", 1, "after"), cast("bob", 2, "before")]) == (1.0, "")
    alpha, _ = agreement([*ann, cast("bob", 1, "before"), cast("bob", 2, "after")])
    assert alpha == pytest.approx(-0.5)  # 1 - observed / expected disagreement: 1 - 1 / (2 / 3)


def test_pairs_go_by_majority_and_everything_else_is_counted():
    votes = [
        *(cast(voter, 1, "after") for voter in ("ann", "bob")),
        cast("cyd", 1, "before"),
        *(cast("ann", 2, "after"), cast("bob", 2, "before")),
        *(cast("ann", 3, "tie"), cast("bob", 3, "skip")),
        *(cast("ann", 4, "before"), cast("bob", 4, "both bad")),
        cast("ann", 5, "after"),
    ]
    pairs = [pair(number) for number in range(1, 7)]
    pairs[4]["after"] = " "
    made, account = next_pairs(pairs, votes)
    assert made == [
        {"prompt": "Why? 1", "chosen": "good 1", "rejected": "bad 1"},
        {"prompt": "Why? 4", "chosen": "bad 4", "rejected": "good 4"},
    ]
    counts = {"kept": 2, "overruled": 1, "no_preference": 1, "equal_split": 1, "unfit": 1, "votes_left_out": 3}
    assert account == counts


@pytest.fixture
def voted(tmp_path):
    """A run on whose 40 pairs one voter has voted, once on a pair that is gone."""
    run = write_run(tmp_path / "run", [sample(number, after=f"No {number}.") for number in range(40)])
    folder = run / "votes" / "initial_model"
    load_answers(str(run), None, folder / "answers.json", data={}, prompts=99, temperature=None)
    log = VoteLog(folder / "votes.jsonl")
    for key in [each["pair"] for each in read_pairs(folder / "answers.json")[0]]:
        log.append(**cast("ann", key, "after"))
    log.append(**cast("ann", "gone", "after"))
    claim(run, "votes")
    return run


def test_the_votes_on_the_page_fit_a_screen_and_a_phone(voted):
    write_result(voted, "initial_model", "outputs/" + "unbroken" * 20)
    for width in (1280, 390):
        laid_out = seen(voted / "report.html", width)
        assert laid_out["cut"] == []
        assert laid_out["width"] == width


def test_the_result_is_on_the_page_and_in_a_file_and_its_pairs_are_for_training(voted, capsys):
    run, folder = voted, voted / "votes" / "initial_model"
    assert cli.main(["vote", str(run), "--result"]) == 0
    printed = capsys.readouterr().out
    for told in ("Better: win rate by votes", "not known: it takes two voters", "1 votes are about answers that are"):
        assert told in printed
    found = json.loads((run / "votes.json").read_text())["initial_model"]
    assert found["win_rate"]["mean"] == 1.0
    assert "ann" not in (run / "votes.json").read_text()
    words = Page((run / "report.html").read_text()).words
    assert "▲ Better win rate by votes 1.000" in words
    assert (
        "agreement of the voters, Krippendorff\N{RIGHT SINGLE QUOTATION MARK}s alpha it takes two voters not known"
        in words
    )
    assert strangers(run) == ["samples.jsonl", "settings.json"], "the files that this test has written by itself"
    made = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(made) == 40
    assert {each["rejected"] for each in made} == {"Yes."}


# ------------------------------------------------------------------------------------------ the call


def test_other_machines_are_served_only_with_a_password(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", [sample(1)])
    monkeypatch.delenv("DPO_RECIPES_VOTE_PASSWORD", raising=False)
    for host in ("0.0.0.0", "::", "some.host"):
        assert cli.main(["vote", str(run), "--host", host]) == 2
        assert "voters need a password" in capsys.readouterr().err
    assert not (run / "votes").exists()
    assert all(voting._is_loopback(host) for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"))


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", [sample(1)])
    monkeypatch.setattr(voting, "find_spec", lambda name: None)
    assert cli.main(["vote", str(run)]) == 2
    assert "pip install 'dpo-recipes[vote]'" in capsys.readouterr().err


def test_a_folder_without_a_run_or_without_votes_is_refused(tmp_path, capsys):
    assert cli.main(["vote", str(tmp_path)]) == 2
    assert "holds no settings.json" in capsys.readouterr().err
    assert cli.main(["vote", str(write_run(tmp_path / "run", [sample(1)])), "--result"]) == 2
    assert "holds no votes" in capsys.readouterr().err


def test_the_parser_imports_neither_gradio_nor_torch():
    code = "import sys, dpo_recipes.cli; print({'torch', 'gradio', 'krippendorff'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
