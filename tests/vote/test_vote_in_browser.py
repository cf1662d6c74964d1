"""People vote in a browser: by mouse and keys, on a screen and a phone, across a reload and a kill of the server."""

import json
import os
import re
import signal
import subprocess
import time
from contextlib import contextmanager

import pytest
from browser import CHROMIUM
from hostile_pages import HOSTILE

from dpo_recipes.vote.log import read_votes, standing

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")]

PASSWORD = "correct horse battery"
MARKUP = HOSTILE + " **bold** ${7 * 7}"
SIZES = {"screen": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"model_name_or_path": "start"}))
    sides = {side: {"text": f"The {side} answer. {MARKUP} {'It goes on. ' * 40}"} for side in ("before", "after")}
    rows = [{"prompt": f"Why {number}? {MARKUP}", "temperature": 0.7, **sides} for number in range(12)]
    (folder / "samples.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@contextmanager
def server(dpo_recipes, run, *flags, port=0, **environment):
    """The command that a user types; yields its process and the address that it prints. Ends it with kill -9."""
    command = [str(part) for part in (dpo_recipes, "vote", run, "--port", port, *flags)]
    printed = run.parent / "printed"
    with printed.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **environment})
    try:
        for _ in range(1200):
            if found := re.search(r"http://[\w.]+:(\d+)", printed.read_text()):
                break
            assert process.poll() is None, printed.read_text()
            time.sleep(0.1)
        yield process, int(found[1])
    finally:
        process.kill()
        process.wait()


@contextmanager
def visitor(browser, size, **options):
    """A page in a browser of its own, and the addresses that it asks for."""
    context = browser.new_context(viewport=SIZES[size], **options)
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    yield page, asked
    assert asked
    ours = r"(https?|wss?)://(127\.0\.0\.1|localhost):\d+/|data:|blob:"
    assert [address for address in asked if not re.match(ours, address)] == []
    context.close()


def enter(page, port, name):
    page.goto(f"http://127.0.0.1:{port}/")
    page.fill("#name input, #name textarea", name)
    page.click("#start")
    done(page, 0)


def done(page, number):
    """Waits until the page says that the voter has judged so many pairs."""
    page.wait_for_function(f"document.querySelector('#stage header')?.innerText.startsWith('{number} of')")


def votes_of(run):
    votes, torn = read_votes(run / "votes" / "initial_model" / "votes.jsonl")
    assert torn == 0
    return votes


def shown_on_top(page, place):
    """The side of the answer that the page shows in a place."""
    text = page.inner_text(f"#stage .answer:nth-child({place})")
    return re.search(r"The (before|after) answer", text)[1]


def test_people_vote_by_mouse_and_keys_and_go_on_after_a_reload_and_a_kill(browser, dpo_recipes, run):
    with server(dpo_recipes, run) as (process, port), visitor(browser, "screen") as (page, _):
        enter(page, port, "ann")
        for answer in page.query_selector_all("#stage .answer .text"):
            assert MARKUP in answer.inner_text(), "as text"
        assert page.query_selector_all("#stage script, #stage img, #stage b, #stage strong") == []
        left, right = (page.locator(f"#stage .answer:nth-child({place})").bounding_box() for place in (1, 2))
        assert left["y"] == right["y"]
        meant = []
        for number, (press, place) in enumerate((("ArrowLeft", 1), ("ArrowRight", 2), ("#vote-first", 1))):
            meant.append(shown_on_top(page, place))
            page.click(press) if press.startswith("#") else page.keyboard.press(press)
            done(page, number + 1)
            assert len(votes_of(run)) == number + 1, "on the disk when the next pair is shown"
        page.click("#questions fieldset:first-of-type label:nth-of-type(2)")
        for number, key in enumerate(("t", "b", "s"), start=4):
            page.keyboard.press(key)
            done(page, number)
        page.keyboard.press("u")
        done(page, 5)
        assert [vote["vote"] for vote in votes_of(run)] == [*meant, "tie", "both bad", "skip", "undo"]
        assert votes_of(run)[3]["questions"] == {"helpful": "tie"}
        assert votes_of(run)[4]["questions"] == {}, "each pair is asked anew"
        prompt = page.inner_text("#stage .prompt")
        page.reload()
        done(page, 5)
        assert page.inner_text("#stage .prompt") == prompt

        with visitor(browser, "phone", has_touch=True, is_mobile=True) as (phone, _):
            enter(phone, port, "bob")
            for choice in ("first", "second", "tie", "both-bad", "skip", "undo"):
                box = phone.locator(f"#vote-{choice}").bounding_box()
                assert 0 <= box["x"] < box["x"] + box["width"] <= 390
                assert box["y"] + box["height"] <= 844, "within reach without scrolling"
            assert phone.evaluate("document.documentElement.scrollWidth") == 390
            assert phone.evaluate("document.documentElement.scrollHeight") > 844, "the answers are long"
            phone.tap("#vote-second")
            done(phone, 1)
            page.keyboard.press("ArrowLeft")
            done(page, 6)
            phone.keyboard.press("ArrowLeft")
            done(phone, 2)
            process.send_signal(signal.SIGKILL)
            process.wait()
            with server(dpo_recipes, run, port=port):
                for each, number in ((page, 6), (phone, 2)):
                    each.reload()
                    done(each, number)
                    each.keyboard.press("t")
                    done(each, number + 1)
    assert {name: sum(voter == name for voter, _ in standing(votes_of(run))) for name in ("ann", "bob")} == {
        "ann": 7,
        "bob": 3,
    }


def test_a_server_for_other_machines_asks_for_the_password_and_keeps_it_nowhere(browser, dpo_recipes, run):
    options = dict(DPO_RECIPES_VOTE_PASSWORD=PASSWORD)
    with server(dpo_recipes, run, "--host", "0.0.0.0", **options) as (process, port):
        with visitor(browser, "phone") as (page, _):
            page.goto(f"http://127.0.0.1:{port}/")
            for given, passed in (("wrong", False), (PASSWORD, True)):
                page.get_by_label("username").fill("ann")
                page.get_by_label("password").fill(given)
                page.get_by_role("button", name="Login").click()
                if passed:
                    done(page, 0)
                else:
                    page.get_by_text("Incorrect").first.wait_for()
            page.keyboard.press("ArrowLeft")
            done(page, 1)
            assert page.request.get(f"http://127.0.0.1:{port}/config").status == 200
            assert votes_of(run)[0]["voter"] == "ann"
        stranger = browser.new_context()
        path = f"http://127.0.0.1:{port}/"
        assert stranger.request.get(f"{path}config").status == 401
        body = {"data": ["eve", "", None, None, None], "fn_index": 4, "session_hash": "x"}
        assert stranger.request.post(f"{path}gradio_api/run/predict", data=body).status == 401
        assert "The before answer" not in stranger.request.get(path).text()
        stranger.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
    assert "Not known: win rate by votes" in (run.parent / "printed").read_text()
    assert (run / "report.html").exists()
    files = [path for path in run.parent.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if PASSWORD.encode() in path.read_bytes()]
