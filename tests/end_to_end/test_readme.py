"""The README files and the manual in docs/ are true: their commands, examples, tables, messages and links."""

import ast
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
import trl
from commands import RECIPES, REPOSITORY, run_command, run_forked
from lora_runs import save_lora_run
from manual import (
    DOCS,
    NOT_RUN,
    NOTEBOOKS,
    README,
    RECIPES_README,
    as_run,
    blocks,
    check_command,
    check_flags,
    check_message,
    commands,
    commands_in_messages,
    docstring_commands,
    inline_commands,
    messages,
    shown_output,
    text_of,
    why_not_run,
    words_of,
)
from trl import DPOConfig, ModelConfig, RLOOConfig

from dpo_recipes import playground
from dpo_recipes.catalog import recipe_setting
from dpo_recipes.dataset_adapters import DROP_REASONS
from dpo_recipes.dataset_adapters.ledger import Ledger
from dpo_recipes.doctor import miniature
from dpo_recipes.errors import RecipeError
from dpo_recipes.preflight.findings import CHECKS
from dpo_recipes.recipe import OnlineArguments, RecipeArguments

SETTINGS, ERRORS, OUTPUTS, INSPECTING = (
    DOCS / f"{name}.md" for name in ("settings", "errors", "outputs", "inspecting")
)
DOCUMENTS = [
    README,
    RECIPES_README,
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "CHANGELOG.md",
    *sorted(DOCS.glob("*.md")),
]
ELSEWHERE = [  # other people's messages that the table of common errors quotes
    Path(transformers.__file__).parent / "hf_argparser.py",
    Path(transformers.__file__).parent / "training_args.py",
    Path(trl.__file__).parent / "scripts" / "utils.py",
]


PLACES = [*DOCUMENTS, RECIPES / "data/pharma/README.md", *NOTEBOOKS]
COMMANDS = [(document.relative_to(REPOSITORY), line) for document in PLACES for line in commands(document)]
INLINE = [
    (document.relative_to(REPOSITORY), line)
    for document in PLACES
    if document.name != "CHANGELOG.md"  # its commands are those of their time
    for line in inline_commands(text_of(document))
]
IN_RECIPES = [
    (path.name, line)
    for path in sorted(RECIPES.glob("[!_]*.py"))
    for line in [*docstring_commands(path), *inline_commands(ast.get_docstring(ast.parse(path.read_text())))]
]
PRINTED = {command: place for place, command in reversed([*COMMANDS, *INLINE, *IN_RECIPES])}
RUN = [command for command in PRINTED if not why_not_run(command)]


def section(document: Path, heading: str) -> str:
    """The text under a heading of a document."""
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", document.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{document.name} has no {heading}"
    return found[1]


def rows_of(text: str) -> list[list[str]]:
    """Cells of the Markdown tables in a text, row by row, without headers."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rules = [number for number, line in enumerate(lines) if set(line) <= set("|- ")]
    headers = {number - 1 for number in rules}
    kept = [line for number, line in enumerate(lines) if number not in headers and number not in rules]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in kept]


# ------------------------------------------------------------------------------------------- commands


def test_there_are_commands():
    documented = [command for _, command in COMMANDS]
    assert len(documented) > 12
    assert len(INLINE) > 12
    assert {path.suffix for path in PLACES} == {".md", ".ipynb"}
    for expected in ("make train", "make train RECIPE=hh-rlhf-lora", ".venv/bin/dpo-recipes copy hh-rlhf-lora mine.py"):
        assert expected in commands(README)
    assert any("PROFILE=" in command and "ARGS=" in command for command in documented)


def test_each_recipe_gives_three_commands():
    for recipe in RECIPES.glob("[!_]*.py"):
        assert len(docstring_commands(recipe)) == 3, recipe.name


@pytest.mark.parametrize("command", PRINTED, ids=str)
def test_documented_command_could_run(command):
    check_command(command)


def test_every_reason_for_not_running_a_command_is_that_of_one():
    lines = [command.partition("#")[0].strip() for command in PRINTED]
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, line) for line in lines)] == []


def test_commands_in_messages_are_whole():
    """Each verb is there, and has its arguments. Nobody can know the folders that a message will name."""
    files = [file for file in (REPOSITORY / "dpo_recipes").rglob("*") if file.suffix in {".py", ".toml", ".jinja"}]
    texts = [text for file in files for text in (messages(file) if file.suffix == ".py" else [file.read_text()])]
    found = {command for text in texts for command in commands_in_messages(text)}
    assert len(found) > 15
    assert "dpo-recipes train preference-lora --dataset_name FILE" in found
    for command in sorted(found):
        check_message(command)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_model, reward_model):
    """A folder with the runs, models and files that documented commands name, and what replaces the Hub's names."""
    root = tmp_path_factory.mktemp("workplace")
    stand_ins = {"model": tiny_model, "model_reward": reward_model}
    for name, start in (("small", tiny_model), ("small_reward", reward_model)):
        stand_ins[name] = Path(shutil.copytree(start, root / name))
        config = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    for name, file in miniature.write_rows(root / "rows").items():
        # A folder, since a part of a dataset is a subfolder; ten times the rows, for a rollout of a thousand prompts.
        (root / name / "askculinary").mkdir(parents=True)
        times = 1 if name == "oasst1" else 10  # no online recipe reads it, and its messages take long
        more = [re.sub(r"(Question|Film) (\d+)", rf"\1 {part}\2", file.read_text()) for part in range(1, 1 + times)]
        (root / name / "askculinary" / "train.jsonl").write_text("".join(more))
        stand_ins[name] = root / name
    here = root / "here"
    of_playground = playground.build_model(root / "playground")
    for first, model in (("hh_rlhf", tiny_model), ("imdb_sentiment", tiny_model), ("quickstart", of_playground)):
        rewards = miniature.tiny_reward_model(root / f"{first}_reward", model)
        for name, start in ((f"{first}_sft", model), (f"{first}_reward", rewards)):
            shutil.copytree(start, here / "outputs" / name)
            (here / "outputs" / name / "done.json").write_text('{"finished": "2026-11-28"}')
    pairs = [json.loads(line) for line in (root / "rows" / "preference_jsonl.jsonl").read_text().splitlines()]
    rows = [{**pair, "question": pair["prompt"], "good": pair["chosen"], "bad": pair["rejected"]} for pair in pairs]
    asked = [{"question_id": 1, "category": "writing", "turns": ["Why?"], "instruction": "Why?"}]
    for name, lines in (("pairs", pairs), ("mine", pairs), ("rows", rows), ("question", asked)):
        (here / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (here / "alpaca_eval.json").write_text(json.dumps(asked))
    cells = [[*rows[0]], *([row[name] for name in rows[0]] for row in rows)]
    (here / "rows.csv").write_text("".join(f"{','.join(line)}\n" for line in cells))
    (here / "template.jinja").write_text(miniature.CHAT_TEMPLATE)
    shutil.copy(RECIPES / "preference_lora.py", here / "mine.py")
    return here, stand_ins


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN, ids=str)
def test_documented_command_runs(command, workplace, tmp_path, tiny_model):
    """As it is printed; of `train` the dry run. Local data and tiny models stand in for the Hub's: see STAND_INS."""
    here, stand_ins = workplace
    words = as_run(command, stand_ins)
    shutil.copytree(here, tmp_path, dirs_exist_ok=True)
    if words[1] not in ("train", "inspect"):
        for run in ("hh_rlhf_lora", "mine"):
            save_lora_run(tmp_path / "outputs" / run, tiny_model)
        merged = run_forked("merge", "outputs/hh_rlhf_lora", cwd=tmp_path)
        assert merged.returncode == 0, merged.stderr
    else:
        shutil.copytree(tiny_model, tmp_path / "outputs" / "hh_rlhf_lora_merged")
    if words[1] == "train":  # its own run is not there yet
        shutil.rmtree(tmp_path / "outputs" / words[2].replace("-", "_"), ignore_errors=True)
    for made in {"copy": ["mine.py"], "sample": ["pairs.jsonl"]}.get(words[1], []):
        (tmp_path / made).unlink()
    if words[0] == ".venv/bin/dpo-recipes":
        result = run_forked(*words[1:], cwd=tmp_path)
    else:
        result = run_command(sys.executable, *words[1:], cwd=REPOSITORY)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "would not start" not in result.stdout
    if words[1] == "train":
        assert "Nothing was started (dry_run)" in result.stdout


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("make trane", "No rule to make target"),
        ("make train RECIPE=nope", "There is no recipe nope"),
        ("make train RECIPE=hh-rlhf-lora PROFILE=tpu", "recipes/profiles has no tpu"),
        ('make train RECIPE=hh-rlhf-lora ARGS="--betta 0.3"', "--betta"),
        (".venv/bin/dpo-recipes train hh-rlhf-lora --accelerate zero9", "recipes/accelerate has no zero9"),
        ('make compare ARGS="--ppo.betta 1"', "--ppo.betta"),
        (".venv/bin/dpo-recipes tune hh-rlhf-lora", "how to check"),
        (".venv/bin/dpo-recipes merge outputs/x --into y", "2"),
        ("dpo-recipes try", "2"),
        ("dpo-recipes train nope", "There is no recipe nope"),
        ("hf auth login", "how to check"),
        ('make train RECIPE=hh-rlhf-lora ARGS="--sweep betta=0.1,0.2"', "--betta"),
        (
            ".venv/bin/accelerate launch --config_file recipes/no.yaml recipes/hh_rlhf_lora.py --config x.yaml",
            "no.yaml",
        ),
    ],
)
def test_a_wrong_command_would_be_noticed(wrong, reason):
    with pytest.raises((AssertionError, RecipeError, ValueError, SystemExit, pytest.fail.Exception), match=reason):
        check_command(wrong)


@pytest.mark.parametrize(
    "wrong", ["dpo-recipes try", "dpo-recipes inspect", "dpo-recipes merge X --into Y", "make train"]
)
def test_a_wrong_command_in_a_message_would_be_noticed(wrong):
    [found] = commands_in_messages(f"It failed: {wrong}. Then go on.")
    assert found == wrong
    with pytest.raises((AssertionError, SystemExit)):
        check_message(found)


def test_flags_named_in_the_tables_are_known():
    text = section(SETTINGS, "Settings and their ranges") + section(ERRORS, "Common errors")
    quoted = [code for code in re.findall(r"`(--[^`]+)`", text) if " " in code]
    assert len(quoted) >= 5
    for flags in quoted:
        check_flags(RECIPES / "hh_rlhf_lora.py", shlex.split(flags))
    names = set(re.findall(r"`--(\w+)`", text)) - {"chat_template_path"}  # SFTConfig's
    assert names
    for name in names:
        parts = (OnlineArguments, DPOConfig, RLOOConfig, ModelConfig)
        assert any(name in part.__dataclass_fields__ for part in parts), name


def test_list_and_copy_do_what_the_readme_says(tmp_path, dpo_recipes):
    copied = [command for command in commands(README) if " copy " in command]
    assert copied
    for command in [".venv/bin/dpo-recipes list", *copied]:
        result = run_command(dpo_recipes, *shlex.split(command)[1:], cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "mine.py").read_text() == (RECIPES / "hh_rlhf_lora.py").read_text()


def test_the_readme_shows_a_real_run():
    assert "<!-- quickstart output -->" not in README.read_text(), "put the last lines of `make train` here"
    table = [line for line in shown_output().splitlines() if re.search(r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", line)]
    assert table, "the table before and after belongs to them"
    picture = REPOSITORY / "docs" / "quickstart.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 150_000


# ------------------------------------------------------------------------------- tables and messages


def test_the_table_of_recipes_is_the_folder():
    table = rows_of(RECIPES_README.read_text().partition("\n## ")[0])
    files = sorted(path.name for path in RECIPES.glob("[!_]*.py"))
    assert files
    linked = [re.fullmatch(r"\[([a-z0-9-]+)\]\((\w+\.py)\)", row[0]) for row in table]
    assert all(linked)
    assert sorted(link[2] for link in linked) == files
    for link, (_, data, base, *numbers) in zip(linked, table, strict=True):
        assert link[1].replace("-", "_") + ".py" == link[2]
        for cell, key in ((data, "dataset_name"), (base, "model_name_or_path")):
            assert recipe_setting(RECIPES / link[2], key) in (cell, None), f"{link[1]}: {key}"
        assert len(numbers) == 4
        assert all(cell == "not measured" or re.search(r"\d", cell) for cell in numbers)


def test_profiles_and_accelerate_files_are_all_named():
    linked = set(re.findall(r"\]\(((?:profiles|accelerate)/\w+\.yaml)\)", section(RECIPES_README, "Run one")))
    there = {
        str(path.relative_to(RECIPES)) for kind in ("profiles", "accelerate") for path in (RECIPES / kind).iterdir()
    }
    assert there
    assert linked == there


def test_settings_given_as_the_recipes_values_are_theirs():
    values = {
        setting: value
        for setting, value, _ in rows_of(section(SETTINGS, "Settings and their ranges"))
        if setting[0] == "`"
    }
    lora, full, sft = (
        {
            **{name: entry.default for name, entry in RecipeArguments.__dataclass_fields__.items()},
            **runpy.run_path(str(RECIPES / f"hh_rlhf_{name}.py"))["RECIPE"],
        }
        for name in ("lora", "full", "sft")
    )
    special = {
        "`learning_rate`, all weights": [full["learning_rate"]],
        "`learning_rate`, LoRA": [lora["learning_rate"]],
        "`learning_rate`, SFT with LoRA": [sft["learning_rate"]],
    }
    assert len(values) >= 12
    for setting, value in values.items():
        expected = special.get(setting) or [lora[name] for name in re.findall(r"`(\w+)`", setting) if name in lora]
        for wanted, given in zip(expected, value.split(", "), strict=True):
            assert str(wanted) == given or float(wanted) == float(given), setting


def quoted_messages() -> list[str]:
    return [row[0].strip("`") for row in rows_of(section(ERRORS, "Common errors")) if row[0].startswith("`")]


def test_quoted_messages_are_what_the_source_says():
    quotes = quoted_messages()
    assert len(quotes) > 15
    ours = [text for file in (REPOSITORY / "dpo_recipes").rglob("*.py") for text in messages(file)]
    others = [*DROP_REASONS.values(), *(text for file in ELSEWHERE for text in messages(file))]
    with pytest.raises(RuntimeError) as refused:
        torch.nn.functional.linear(torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1))
    for quote in quotes:
        assert len(quote.replace("...", "")) > 10, f"{quote} could be anything"
        beginning = quote.removesuffix("...")
        said = [text for text in [*ours, *others, str(refused.value)] if text.startswith(beginning)]
        assert said, f"no message begins with: {quote}"


def test_every_check_is_in_the_table_with_its_thresholds():
    table = {
        name: row[2] for row in rows_of(section(INSPECTING, "The checks")) for name in re.findall(r"`(\w+)`", row[0])
    }
    for name, check in CHECKS.items():
        for level in ("warning", "failure"):
            assert (f"{level} above {check.get(level, -1):g}" in table[name]) == (level in check), name


def test_the_sentences_for_each_common_trouble_are_there():
    text = section(ERRORS, "Common errors").lower()
    troubles = ["columns", "out of memory", "repeat themselves", "dtype", "reference model", "truncation"]
    troubles += ["chat template", "no network", "holds another run", "disk is full"]
    assert [trouble for trouble in troubles if trouble not in text] == []


def test_todays_arguments_exist_and_the_older_ones_do_not():
    table = dict(rows_of(section(ERRORS, "Arguments of older tutorials")))
    fields = {name for part in (DPOConfig, ModelConfig, RecipeArguments) for name in part.__dataclass_fields__}
    for older in ("max_prompt_length", "warmup_ratio", "torch_dtype", "evaluation_strategy", "bnb_4bit_compute_dtype"):
        row = next(row for row in table if f"`{older}" in row)
        assert older not in fields
        today = re.findall(r"`(\w+)[`=]", table[row])
        assert today
        assert set(today) <= fields | {"ModelConfig"}
    trainer = trl.DPOTrainer.__init__.__annotations__
    assert "`tokenizer=` of a trainer" in table
    assert "tokenizer" not in trainer
    assert "processing_class" in trainer


def headings(document):
    lines = [line for line in document.read_text().splitlines() if line.startswith("#")]
    return {re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines}


def test_links_lead_somewhere():
    documents = [*DOCUMENTS, *sorted((DOCS / "results").rglob("*.md"))]
    assert len(documents) > len(DOCUMENTS) + 2
    for document in documents:
        text = document.read_text()
        links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
        assert links or document not in DOCUMENTS or document.name == "CHANGELOG.md"
        assert "@@" not in text, "a place that was left to fill"
        for link in links:
            file, _, anchor = link.partition("#")
            target = document.parent / file if file else document
            assert target.exists(), f"{document.name}: {link}"
            assert not anchor or anchor in headings(target), f"{document.name}: {link}"


def test_the_manual_lists_its_pages():
    listed = set(re.findall(r"\]\(([a-z_]+\.md)\)", (DOCS / "README.md").read_text()))
    assert listed == {page.name for page in DOCS.glob("*.md")} - {"README.md"}


def test_the_readme_shows_every_room():
    shown = set(re.findall(r"^  ([a-z_]+)/ ", README.read_text(), re.MULTILINE))
    assert shown == {folder.parent.name for folder in (REPOSITORY / "dpo_recipes").glob("*/__init__.py")}


def test_pages_that_the_package_and_the_recipes_name_are_there():
    files = [file for folder in (REPOSITORY / "dpo_recipes", RECIPES) for file in folder.rglob("*")]
    texts = [file.read_text() for file in files if file.suffix in {".py", ".toml", ".jinja"}]
    named = {page for text in texts for page in re.findall(r'((?:docs|recipes)/[\w/]+\.md)(?:, "([\w ]+)")?', text)}
    assert {("recipes/README.md", "Your own data"), ("docs/doctor.md", "")} <= named
    for page, heading in named:
        assert (REPOSITORY / page).is_file(), page
        assert not heading or section(REPOSITORY / page, heading)


# --------------------------------------------------------------------------------- data of one's own


def test_the_dataset_adapter_of_the_example_keeps_and_counts_its_rows(tmp_path):
    [example] = blocks(RECIPES_README, "python")
    (tmp_path / "mine.py").write_text(example)
    (tmp_path / "rows.jsonl").write_text(blocks(RECIPES_README, "jsonl")[1])
    with Ledger() as ledger:
        pairs = runpy.run_path(str(tmp_path / "mine.py"))["load_pairs"](
            RecipeArguments(dataset_name=str(tmp_path / "rows.jsonl"))
        )
    total = ledger.total()
    assert total.rows == 3
    assert {reason: dropped.count for reason, dropped in total.dropped.items()} == {"too_few_votes": 1}
    assert len(pairs["train"]) == len(pairs["test"]) == 1
    assert pairs["train"][0]["chosen"][0]["role"] == "assistant"


@pytest.mark.slow
def test_the_first_command_for_own_data_trains_on_the_rows_above_it(tmp_path, tiny_model):
    """As it is printed, but for the model, which it would download."""
    own = section(RECIPES_README, "Your own data")
    first = words_of(re.search(r"^```sh\n(.*)$", own, re.MULTILINE)[1])
    assert first[1:3] == ["train", "preference-lora"]
    (tmp_path / "pairs.jsonl").write_text(blocks(RECIPES_README, "jsonl")[0])
    model = ["--model_name_or_path", tiny_model]
    result = run_forked(*first[1:], *model, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^  chosen and rejected say the same +-1 ", result.stdout, re.MULTILINE)
    assert (tmp_path / "outputs/preference_lora/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_own_rows_train_as_described_and_leave_what_is_listed(tmp_path, tiny_model, dpo_recipes):
    """Runs the two commands of "Your own data" that copy a recipe, on the rows shown there."""
    [block] = [block for block in blocks(RECIPES_README, "sh") if " copy " in block]
    copy, train = (shlex.split(line)[1:] for line in block.splitlines())
    assert run_command(dpo_recipes, *copy, cwd=tmp_path).returncode == 0
    (tmp_path / "pairs.jsonl").write_text(blocks(RECIPES_README, "jsonl")[0])
    small = ["--pairs_per_update", "1", "--per_device_train_batch_size", "1", "--max_steps", "1", "--save_steps", "1"]
    small += ["--profile", "cpu", "--model_name_or_path", tiny_model]
    result = run_command(dpo_recipes, *train, *small, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^  chosen and rejected say the same +-1 ", result.stdout, re.MULTILINE)
    listed = {
        name for row in rows_of(section(OUTPUTS, "What a run leaves")) for name in re.findall(r"`([^`]+)`", row[0])
    }
    left = {re.sub(r"^checkpoint-\d+$", "checkpoint-*", path.name) for path in (tmp_path / "outputs/mine").iterdir()}
    of_others = {"model.safetensors", "config.json", "generation_config.json", "critic.safetensors"}
    of_others |= {"round-1", "round-2", "log.json"}
    assert left == listed - of_others
    samples = [json.loads(line) for line in (tmp_path / "outputs/mine/samples.jsonl").read_text().splitlines()]
    assert '"ended": true' in section(ERRORS, "Common errors")
    assert "ended" in samples[0]["after"]
    page = (tmp_path / "outputs/mine/report.html").read_text()
    assert f"DPO of {tiny_model} on pairs.jsonl, finished 20" in page
    for heading in (
        "summed",
        "KL to the reference",
        "Curves",
        "Answers before and after",
        "Rows kept and dropped",
        "Settings",
        "health rules",
    ):
        assert heading in page
    assert samples[0]["prompt"][-1]["content"] in page
    verdict = json.loads((tmp_path / "outputs/mine/metrics.json").read_text())["verdict"]["sentence"]
    assert verdict.partition(": ")[2].split(" (")[0] in page.replace("→", "->")
    assert "preference accuracy, summed" in (tmp_path / "outputs/mine/README.md").read_text()
