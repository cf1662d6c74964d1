"""A run replaces and removes the files that runs wrote, as they wrote them, and nothing else."""

import os

import pytest

from dpo_recipes import files
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import write_bytes, write_json, write_text
from dpo_recipes.manifest import NEW_FILES, claim, clear, declare, refuse_strangers, settle, strangers, was_cut_short


@pytest.fixture
def run(tmp_path):
    """A folder with a run's files, one checkpoint and a tracker's folder."""
    folder = tmp_path / "run"
    claim(folder, "wandb")
    write_json(folder / "settings.json", {"beta": 0.1})
    write_text(folder / "README.md", "draft")
    write_text(folder / "README.md", "card")
    declare(folder, "checkpoint-5")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"state")
    settle(folder, "checkpoint-5")
    declare(folder, NEW_FILES)
    (folder / "model.safetensors").write_bytes(b"weights")
    settle(folder, NEW_FILES)
    (folder / "wandb").mkdir()
    (folder / "wandb" / "log").write_text("log")
    return folder


def edit(folder):
    (folder / "README.md").write_text("mine")


def add(folder):
    (folder / "notes.txt").write_text("mine")


def add_to_a_checkpoint(folder):
    (folder / "checkpoint-5" / "notes.txt").write_text("mine")


def change_weights(folder):
    (folder / "model.safetensors").write_bytes(b"WEIGHTS")


def link(folder):
    (folder / "model.safetensors").rename(folder.parent / "weights")
    (folder / "model.safetensors").symlink_to(folder.parent / "weights")


def link_a_checkpoint(folder):
    (folder / "checkpoint-5").rename(folder.parent / "elsewhere")
    (folder / "checkpoint-5").symlink_to(folder.parent / "elsewhere")


def another_checkpoint(folder):
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "optimizer.pt").write_bytes(b"state")


CHANGES = {
    edit: "README.md",
    add: "notes.txt",
    add_to_a_checkpoint: "checkpoint-5/",
    change_weights: "model.safetensors",
    link: "model.safetensors",
    link_a_checkpoint: "checkpoint-5/",
    another_checkpoint: "checkpoint-7/",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_added_or_changed_is_named_and_outlives_the_run(run, change):
    assert strangers(run) == []
    change(run)
    assert strangers(run) == [CHANGES[change]]
    with pytest.raises(RecipeError, match=f"holds {CHANGES[change]}, which no run wrote or somebody changed"):
        refuse_strangers(run)
    kept = (run / CHANGES[change]).resolve()
    before = {path: path.read_bytes() for path in [kept, *kept.rglob("*")] if path.is_file()}
    clear(run, but="preflight.json")
    assert before
    assert {path: path.read_bytes() for path in before} == before
    assert not (run / "settings.json").exists()


def test_what_a_run_wrote_is_removed_and_a_trackers_folder_is_kept(run):
    write_text(run / "preflight.json", "{}")
    clear(run, but="preflight.json")
    assert sorted(path.name for path in run.iterdir()) == [files.MANIFEST, "preflight.json", "wandb"]
    assert strangers(run) == []


def test_a_list_that_names_files_outside_of_its_folder_removes_none(run):
    outside = run.parent / "precious"
    outside.write_text("mine")
    held = files.read_json(run / files.MANIFEST)
    for name in ("../precious", str(outside)):
        held["files"][name] = [files.fingerprint(outside)]
    held["open"] = ["..", "../precious"]
    write_json(run / files.MANIFEST, held)
    clear(run, but="")
    assert outside.read_text() == "mine"


def test_a_writer_that_was_killed_leaves_nothing_that_a_later_run_would_refuse(run, monkeypatch):
    declare(run, "checkpoint-9", "README.md")
    (run / "checkpoint-9").mkdir()
    (run / "checkpoint-9" / "optimizer.pt").write_bytes(b"ha")
    (run / "README.md").write_text("draft of TRL")
    assert was_cut_short(run / "checkpoint-9")
    assert not was_cut_short(run / "checkpoint-5")

    def killed(*_):
        raise KeyboardInterrupt

    (run / ".metrics.json.123.tmp").write_text("ha")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda old, new: killed() if "settings" in str(new) else os.rename(old, new))
        with pytest.raises(KeyboardInterrupt):
            write_json(run / "settings.json", {"beta": 0.2})
    assert strangers(run) == []
    add(run)
    declare(run, NEW_FILES)
    (run / "model-00001-of-00002.safetensors").write_bytes(b"ha")
    assert strangers(run) == ["notes.txt"]


def test_a_killed_save_owns_files_of_a_model_and_its_tokenizer_alone(run):
    declare(run, NEW_FILES)
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"):
        (run / name).write_text("ha")
    (run / "thesis.docx").write_text("mine")
    assert strangers(run) == ["thesis.docx"]


def test_answers_that_were_sampled_into_a_runs_folder_are_the_users(run):
    files.write_jsonl(run / "pairs.jsonl", [{"prompt": "Hm?"}], listed=False)
    assert strangers(run) == ["pairs.jsonl"]


def test_a_run_of_a_version_without_a_list_is_refused_as_such(tmp_path):
    (tmp_path / "done.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"holds done\.json, which a version left that kept no list"):
        refuse_strangers(tmp_path)


def test_a_copied_run_is_known_as_one(run, tmp_path):
    for path in sorted(run.rglob("*")):
        target = tmp_path / "copy" / path.relative_to(run)
        target.mkdir(parents=True) if path.is_dir() else write_bytes(target, path.read_bytes())
    assert strangers(tmp_path / "copy") == []


def test_a_file_that_differs_anywhere_in_its_first_or_last_mib_has_another_fingerprint(tmp_path):
    data = bytearray(3 * files.SAMPLED)
    (tmp_path / "file").write_bytes(data)
    before = files.fingerprint(tmp_path / "file")
    for place in (0, files.SAMPLED - 1, 2 * files.SAMPLED, len(data) - 1):
        (tmp_path / "file").write_bytes(data[:place] + b"x" + data[place + 1 :])
        assert files.fingerprint(tmp_path / "file") != before
    (tmp_path / "file").write_bytes(data + b"\0")
    assert files.fingerprint(tmp_path / "file") != before
