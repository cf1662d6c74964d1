"""A run at the Hub: what is uploaded, what is refused, and what is left when the upload fails half-way."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from hub_server import Hub
from huggingface_hub import ModelCard, constants
from lora_runs import save_lora_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_recipes.cli import main
from dpo_recipes.files import write_json
from dpo_recipes.manifest import NEW_FILES, claim, declare, settle
from dpo_recipes.models.merge import merge
from dpo_recipes.runs.model_card import BEGIN, END, write_model_card

# huggingface_hub 2.4 uploads large files by an old argument of its HTTP client (huggingface_hub/lfs.py).
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")

TOKEN = "hf_" + "aSecretOfTheTests" * 2
INTERVAL = "[+0.365, +0.504]"
NEVER = {
    "training_args.bin",
    "samples.jsonl",
    "report.html",
    "preflight.json",
    ".lock",
    ".dpo_recipes.json",
    "merge.json",
}


@pytest.fixture(scope="session")
def base(tiny_model, tmp_path_factory):
    """The tiny model with a card that names its licence."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("base") / "model")
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny\nlicense_link: https://a.b\n---\n# tiny\n"
    )
    return folder


@pytest.fixture(scope="session")
def finished(base, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    claim(folder)
    declare(folder, NEW_FILES)
    save_lora_run(folder, base)
    (folder / "README.md").unlink()  # PEFT's
    settings = {"model_name_or_path": str(base), "dataset_name": "us/pairs:200", "max_length": 64, "beta": 0.1}
    write_json(folder / "settings.json", settings | {"hub_token": "<HUB_TOKEN>"})
    verdict = {"word": "better", "sentence": f"Better: exact reward (95 % interval {INTERVAL})."}
    write_json(folder / "metrics.json", {"verdict": verdict, "table": "a table", "note": "a note"})
    write_json(folder / "health.json", {"rules": ["no_end", "leak"], "findings": []})
    done = {
        "method": "DPO",
        "training_rows": 7,
        "warnings": [],
        "seed": 42,
        "versions": {"trl": "1"},
        "hardware": "CPU",
    }
    write_json(folder / "done.json", done)
    for name in ("training_args.bin", "samples.jsonl", "report.html", "preflight.json", "environment.txt"):
        (folder / name).write_text("x")
    write_model_card(folder)
    settle(folder, NEW_FILES)
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of the finished run, in outputs/run of the current folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(finished, tmp_path / "outputs" / "run")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between two tries
    yield server
    server.closed.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def publish(monkeypatch, capsys):
    """Calls the command, and returns its status and what it printed."""

    def call(*words):
        words = ["publish", *map(str, words)]
        monkeypatch.setattr(sys, "argv", ["dpo-recipes", *words])
        status = main(words)
        printed = "".join(capsys.readouterr())
        assert TOKEN not in printed
        return status, printed

    return call


def test_a_merged_model_arrives_whole_and_answers_as_the_run_does(run, hub, publish, tmp_path):
    merge("outputs/run")
    status, printed = publish("outputs/run", "--hub_id", "me/safe", "--weights", "merged")
    assert status == 0, printed
    assert f"Published     {hub.url}/me/safe" in printed
    held = hub.repositories["me/safe"]
    assert held["private"]
    assert held["commits"] == 2, "all files appear at once"
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md", "settings.json"} <= {
        *held["files"]
    }
    assert not NEVER & {*held["files"]}
    assert hub.tokens == {f"Bearer {TOKEN}", None}  # the validator needs none
    for name, data in held["files"].items():
        (tmp_path / "got").mkdir(exist_ok=True)
        (tmp_path / "got" / name).write_bytes(data)
        assert str(tmp_path).encode() not in data
    got, mine = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("got", "outputs/run_merged"))
    inputs = torch.arange(20)[None] + 5
    assert torch.equal(got(inputs).logits, mine(inputs).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "got").chat_template.endswith("{# the run's #}")


def test_the_card_says_data_results_limits_and_licence(run, hub, publish):
    with (run / "README.md").open("a") as card:
        card.write(f"\n{BEGIN}\n## Evaluation\n\nwin rate 0.7\n{END}\n")
    settle(run, "README.md")
    status, printed = publish(run, "--hub_id", "me/safe", "--base", "us/base", "--public")
    assert status == 0, printed
    held = hub.repositories["me/safe"]
    assert not held["private"]
    card = ModelCard(held["files"]["README.md"].decode())
    assert card.data.license == "other"
    assert card.data.license_link == "https://a.b"
    assert (card.data.base_model, card.data.datasets) == ("us/base", ["us/pairs"])
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    for words in (
        "DPO of `us/base` on `us/pairs:200` (7 training rows)",
        INTERVAL,
        "a table",
        "beta: 0.1",
        "no_end, leak",
    ):
        assert words in card.text
    assert "licence (tiny) and the limits of the base model `us/base`" in card.text
    assert "win rate 0.7" in card.text
    assert "report.html" not in card.text
    assert json.loads(held["files"]["adapter_config.json"])["base_model_name_or_path"] == "us/base"


def test_a_dry_run_shows_files_sizes_and_card_and_sends_nothing(run, hub, publish):
    status, printed = publish(run, "--hub_id", "me/safe", "--base", "us/base", "--dry_run")
    assert status == 0
    assert f"{(run / 'adapter_model.safetensors').stat().st_size:,}  adapter_model.safetensors" in printed
    assert "DPO of `us/base`" in printed
    assert "Paths in settings.json are shortened" in printed
    assert hub.calls == ["validate"]


def test_without_the_hub_a_dry_run_checks_what_it_can(run, publish, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    status, printed = publish(run, "--hub_id", "me/safe", "--base", "us/base", "--dry_run")
    assert status == 0, printed
    assert "The card was not checked by the Hub, which cannot be asked" in printed
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    status, printed = publish(run, "--hub_id", "me/safe", "--base", "us/base")
    assert status == 2
    assert "HF_HUB_OFFLINE is set" in printed


def unfinished(run):
    (run / "done.json").unlink()


def fatal(run):
    finding = dict(rule="no_end", fatal=True, step=3, sign="it rambles", cause="x", remedy="y")
    write_json(run / "health.json", {"rules": ["no_end"], "findings": [finding]})


def destroyed(run):
    write_json(run / "metrics.json", {"verdict": {"word": "destroyed", "sentence": "Destroyed: no end."}})


def secret_setting(run):
    write_json(run / "settings.json", json.loads((run / "settings.json").read_text()) | {"api_key": "mine-alone"})


def secret_in_the_template(run):
    (run / "chat_template.jinja").write_text("{# sk-abcdefghijklmnopqrstuv #}")


def token_in_the_packages(run):
    (run / "environment.txt").write_text(f"thing @ https://{TOKEN}@host/thing\n")


def path_in_the_tokenizer(run):
    held = json.loads((run / "tokenizer_config.json").read_text())
    (run / "tokenizer_config.json").write_text(json.dumps(held | {"name_or_path": "/home/ann/models/base"}))


def path_in_a_card_of_ones_own(run):
    (run / "README.md").write_text("---\nlicense: mit\n---\n# mine\n\nTrained in /home/ann/work/run.\n")


def other_weights(run):
    shutil.copy(run / "tokenizer.json", run / "adapter_model.safetensors")


def broken_header(run):
    (run / "README.md").write_text("---\nlicense: [\n---\n# mine\n")


def bad_results(run):
    (run / "README.md").write_text("---\nmodel-index:\n- name: x\n  results: 3\n---\n# mine\n")


def unknown_licence(run):
    (run / "README.md").write_text("---\nlicense: no-such-licence\n---\n# mine\n")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (unfinished, "no finished run"),
        (fatal, "unhealthy: Health, fatal (no_end), update 3: it rambles"),
        (destroyed, "Destroyed: no end."),
        (secret_setting, "settings.json holds a secret"),
        (secret_in_the_template, "chat_template.jinja holds a secret"),
        (token_in_the_packages, "environment.txt holds a secret"),
        (path_in_the_tokenizer, "tokenizer_config.json holds a path of this machine, /home/ann/models/base"),
        (path_in_a_card_of_ones_own, "README.md holds a path of this machine"),
        (other_weights, "not as it was when it was checked"),
        (broken_header, "header of the model card is refused"),
        (bad_results, "header of the model card is refused"),
        (unknown_licence, "The Hub refuses the model card"),
    ],
)
def test_a_run_that_must_not_be_public_is_refused(spoil, says, run, hub, publish):
    spoil(run)
    status, printed = publish(run, "--hub_id", "me/safe", "--base", "us/base")
    assert status == 2
    assert says in printed
    assert {*hub.calls} <= {"validate"}


def test_an_unhealthy_run_is_published_only_on_purpose_and_its_card_says_so(run, hub, publish):
    destroyed(run)
    status, printed = publish(run, "--hub_id", "me/safe", "--base", "us/base", "--anyway")
    assert status == 0, printed
    assert "Destroyed: no end." in hub.repositories["me/safe"]["files"]["README.md"].decode()


def test_what_nobody_else_could_load_or_may_use_is_refused(run, base, hub, publish):
    status, printed = publish(run, "--hub_id", "me/safe")
    assert status == 2
    assert "name the base model at the Hub with --base" in printed
    (base / "README.md").rename(base / "elsewhere")
    try:
        status, printed = publish(run, "--hub_id", "me/safe", "--base", "us/base")
        assert "licence of the base model is not known" in printed
        assert publish(run, "--hub_id", "me/safe", "--base", "us/base", "--license", "mit")[0] == 0
        hub.cards["us/free"] = "---\nlicense: bsd\n---\n# free\n"
        assert "license: bsd" in publish(run, "--hub_id", "me/more", "--base", "us/free", "--dry_run")[1]
    finally:
        (base / "elsewhere").rename(base / "README.md")


@pytest.mark.parametrize("change", ["adapter", "weights", "weights missing", "nothing merged"])
def test_a_merge_that_is_not_proven_is_refused(change, run, hub, publish):
    if change != "nothing merged":
        target = merge("outputs/run")
        changed = run / "adapter_model.safetensors" if change == "adapter" else target / "model.safetensors"
        changed.write_bytes(changed.read_bytes()[:-4] + b"abcd")
        if change == "weights missing":
            changed.unlink()
    status, printed = publish("outputs/run", "--hub_id", "me/safe", "--weights", "merged")
    assert status == 2
    assert "dpo-recipes merge outputs/run" in printed
    assert "create" not in hub.calls


@pytest.mark.parametrize("words", [["--hub_token", TOKEN], ["--token", TOKEN]])
def test_no_flag_takes_the_token(words, run, publish, capsys):
    with pytest.raises(SystemExit, match="2"):
        publish(run, "--hub_id", "me/safe", *words)
    assert TOKEN not in capsys.readouterr().err


def test_without_a_login_nothing_is_sent(run, hub, publish, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    status, printed = publish(run, "--hub_id", "me/safe", "--base", "us/base")
    assert status == 2
    assert "hf auth login" in printed
    assert "create" not in hub.calls


@pytest.mark.parametrize(
    ("faults", "status", "says"),
    [
        ({"create": [500]}, 1, "did not end"),
        ({"create": ["cut"]}, 1, "did not end"),
        ({"create": [401], "info": [401]}, 2, "hf auth login"),
        ({"create": [403], "info": [404]}, 2, "may not write there"),
        ({"info": [500]}, 1, "shows no new file"),
        ({"preupload": ["cut"] * 6}, 1, "did not end"),
        ({"preupload": [403]}, 2, "may not write there"),
        ({"batch": [500] * 6}, 1, "did not end"),
        ({"lfs": ["cut"] * 6}, 1, "did not end"),
        ({"lfs": [403]}, 2, "may not write there"),
        ({"commit": [500]}, 1, "did not end"),
        ({"commit": ["cut"]}, 1, "did not end"),
        ({"commit": [409]}, 2, "somebody else changed"),
        ({"validate": [200, "cut"]}, 1, "did not end"),
    ],
    ids=str,
)
def test_an_upload_that_fails_leaves_nothing_and_says_how_to_finish(faults, status, says, run, hub, publish):
    call = (run, "--hub_id", "me/safe", "--base", "us/base")
    hub.faults = {step: [*happens] for step, happens in faults.items()}
    got, printed = publish(*call)
    assert (got, says in printed) == (status, True), printed
    assert f"dpo-recipes publish {run} --hub_id me/safe --base us/base" in printed
    held = hub.repositories.get("me/safe", {"files": {}, "private": True})
    assert (held["files"], held["private"]) == ({}, True)
    before = hub.sent
    hub.faults = {}
    got, printed = publish(*call)
    assert got == 0, printed
    assert "adapter_model.safetensors" in hub.repositories["me/safe"]["files"]
    if "commit" in faults:
        assert hub.sent == before, "what arrived is not sent again"


def test_a_reply_that_is_lost_after_the_last_step_is_told_apart(run, hub, publish):
    call = (run, "--hub_id", "me/safe", "--base", "us/base")
    hub.faults = {"commit": ["lost"]}
    status, printed = publish(*call)
    assert status == 1
    assert f"has changed meanwhile: look at {hub.url}/me/safe" in printed
    assert publish(*call)[0] == 0
    assert hub.repositories["me/safe"]["commits"] == 2, "the second call changes nothing"


def test_a_hub_that_dies_in_the_middle_of_the_weights_is_told(run, hub, publish):
    hub.faults = {"lfs": ["dies"]}
    status, printed = publish(run, "--hub_id", "me/safe", "--base", "us/base")
    assert status == 1
    assert "did not end" in printed
    assert "To finish, call the same command again" in printed
    assert hub.repositories["me/safe"]["files"] == {}


@pytest.mark.parametrize(
    ("there", "words", "says"),
    [
        (dict(private=False), [], "is there and public"),
        (dict(files=["model.safetensors"]), [], "weights of another model"),
        (dict(files=["README.md", ".gitattributes"]), [], None),
        (dict(private=False), ["--public"], None),
    ],
    ids=str,
)
def test_a_repository_that_is_there_is_taken_only_if_it_is_as_asked(there, words, says, run, hub, publish):
    hub.add("me/safe", **there)
    status, printed = publish(run, "--hub_id", "me/safe", "--base", "us/base", *words)
    assert status == (2 if says else 0), printed
    assert says is None or says in printed
    assert ("adapter_model.safetensors" in hub.repositories["me/safe"]["files"]) == (says is None)


@pytest.mark.slow
def test_ctrl_c_says_how_to_finish_and_the_same_command_finishes(run, hub, dpo_recipes):
    """The command as a user types it, with the variables that users set."""
    command = [str(dpo_recipes), "publish", "outputs/run", "--hub_id", "me/safe", "--base", "us/base"]
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    options = dict(env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    hub.faults = {"lfs": ["hangs"]}
    first = subprocess.Popen(command, **options)
    assert hub.hung.wait(120), first.communicate(timeout=10)[0]
    first.send_signal(signal.SIGINT)
    printed = first.communicate(timeout=60)[0]
    assert first.returncode == 130, printed
    assert "To finish, call the same command again" in printed
    assert "dpo-recipes publish outputs/run --hub_id me/safe --base us/base" in printed
    assert hub.repositories["me/safe"]["files"] == {}
    second = subprocess.run(command, **options, timeout=120)
    assert second.returncode == 0, second.stdout
    assert "adapter_model.safetensors" in hub.repositories["me/safe"]["files"]
    assert TOKEN not in printed + second.stdout
