"""Finds every command that the manual, the recipes and the messages give, and checks it or runs it."""

import ast
import json
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
from commands import RECIPES, REPOSITORY
from transformers import TrainingArguments
from trl import ModelConfig, TrlParser

from dpo_recipes.catalog import find_recipe, find_settings
from dpo_recipes.cli import build_parser
from dpo_recipes.compare.plan import read_recipes
from dpo_recipes.launch.launch import prepare
from dpo_recipes.launch.sweep import read_grid
from dpo_recipes.preflight.findings import THRESHOLDS
from dpo_recipes.recipe import RecipeArguments

README = REPOSITORY / "README.md"
RECIPES_README = RECIPES / "README.md"
DOCS = REPOSITORY / "docs"
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
OURS = r"(?:make|dpo-recipes|\.venv/bin/[\w-]+) +[a-z./]"
"""Beginning of a command of ours within a text."""
VERB = r"dpo-recipes (?!list)[a-z]+"
"""A verb that a text names: `dpo-recipes compare` does that."""

NOT_RUN = {
    r"make (install|lint|typecheck|bench|docs|test\S*|help)\b": "installs, or is what runs these tests",
    r"make$|pre-commit": "changes the checkout that the tests run in",
    r"\bdoctor\b": "takes minutes; tests/doctor runs its parts",
    r"\bcompare\b": "trains for minutes; tests/compare and the second notebook run it",
    r"\bevaluate quickstart\b|make evaluate$": "needs the quickstart's run, which takes minutes",
    r"\bvotes?\b|merge outputs/quickstart": "needs a run that people have voted on; tests/vote votes on one",
    r"lm_eval": "is lm-evaluation-harness's own command, and its tasks are at the Hub",
    r"--judge https?:": "needs an endpoint; tests/evaluate runs one",
    r"accelerate launch": "starts two processes; tests/launch runs the same line on small data",
    r"python tests/|python benchmarks/": "takes an hour or more",
    r"\bpublish outputs/": "needs a finished run; tests/publish publishes one at a small Hub",
    r"transformers serve": "runs until it is ended; tests/publish serves a model by this command",
    r"--against (model|ollama)": "needs a file of another program; tests/publish checks such files",
    r"^(vllm|ollama|llama-\w+) |convert_hf_to_gguf": "is another program's command, and that program never ran here",
    r"sbatch": "needs SLURM; tests/launch/test_cluster.py runs the script where one is there",
    r"--machines": "needs two machines; tests/launch/test_machines.py runs two network namespaces",
    r"--accelerate (fsdp2|zero)": "needs cards; tests/launch/test_engines.py runs the same files on a CPU",
    r"\bpage RUN": "needs a finished run; tests/runs calls it on one",
    r"openai/gsm8k": "needs GSM8K's questions from the Hub; tests/sample runs such a judge",
    r"dpo-recipes .*--help$": "lists the settings; tests/test_cli.py runs it",
    r"--quiet": "does not print what the other tests of documented commands look for; tests/test_cli.py runs it",
    r"--report_to wandb": "needs wandb, which may be missing; tests/test_tracking.py runs it where it is installed",
}
"""Commands that no test runs as printed, by a pattern, with the reason. Their flags are checked all the same."""

STAND_INS = {  # data and models at the Hub, and words for the user's own, by the name of the file that replaces them
    "Anthropic/hh-rlhf": "hh_rlhf",
    "stanfordnlp/SHP": "shp",
    "OpenAssistant/oasst1": "oasst1",
    "OpenAssistant/oasst2": "oasst1",
    "argilla/ultrafeedback-binarized-preferences-cleaned": "ultrafeedback_binarized",
    "trl-lib/ultrafeedback_binarized": "ultrafeedback_binarized",
    "stanfordnlp/imdb": "prompts_alone",
    "outputs/imdb_sentiment_pairs.jsonl": "plain_text",
    **dict.fromkeys(("example_model_solutions.jsonl", "outputs/gsm8k_samples.jsonl"), "marked_solutions"),
    "outputs/gsm8k_pairs.jsonl": "preference_jsonl",
    str(RECIPES / "data" / "pharma"): "preference_jsonl",  # its pairs are too long for a model that reads bytes
    "siebert/sentiment-roberta-large-english": "model_reward",
    **dict.fromkeys(("A_REWARD_MODEL", "NAME_OF_A_REWARD_MODEL", "ITS_NAME"), "model_reward"),
    **dict.fromkeys(("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"), "model"),
    **dict.fromkeys(("openai-community/gpt2-large", "MODEL"), "model"),
    "SMALL": "small",
    "ITS_JUDGE": "small_reward",
}


# ------------------------------------------------------------------------------------ finds commands


def blocks(document: Path, language: str) -> list[str]:
    """Contents of the fenced blocks of one language."""
    return _blocks(text_of(document), language)


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def text_of(document: Path) -> str:
    """The Markdown of a document or of a notebook."""
    if document.suffix != ".ipynb":
        return document.read_text()
    cells = json.loads(document.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def commands(document: Path) -> list[str]:
    """Commands of a document, one a line of its sh blocks."""
    return [line for block in blocks(document, "sh") for line in block.splitlines() if line]


def inline_commands(text: str) -> list[str]:
    """Commands of ours in the running text of Markdown or of a docstring, each between backquotes; no verb alone."""
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    quoted = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", outside)]
    return [code for code in quoted if re.match(OURS, code) and not re.fullmatch(VERB, code)]


def docstring_commands(recipe: Path) -> list[str]:
    """The three commands of a recipe's docstring; a line that ends in a backslash goes on."""
    text = (ast.get_docstring(ast.parse(recipe.read_text())) or "").replace("\\\n", "")
    return [" ".join(line.split()) for line in re.findall(r"^    (make .*)$", text, re.MULTILINE)]


def messages(file: Path) -> list[str]:
    """Texts in a source file, with `...` for each value that an f-string or a logging call inserts; no docstrings."""
    texts = []
    tree = ast.parse(file.read_text())
    passed = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    passed |= {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
            texts.append(re.sub(r"(\.\.\.)+", "...", "".join(map(str, parts))))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in passed:
            texts.append(re.sub(r"%[sd]|\{0?\}", "...", node.value))
    return texts


def commands_in_messages(text: str) -> list[str]:
    """Commands that a message of the package names, up to a sign that ends a clause; X for each value."""
    begins = r"(?<![\w./-])((?:dpo-recipes|make(?= (?:train|inspect|evaluate|compare|doctor))) [a-z].*?)"
    return re.findall(begins + r"(?=[`;,)\n\"]|\.? *$|\.? [A-Z][a-z]|\. )", text.replace("...", "X"), re.MULTILINE)


def shown_output() -> str:
    """Last lines of the output of `make train`, as the README shows them."""
    found = blocks(README, "text")
    assert found, "README.md shows no output of a run"
    return found[0]


# ----------------------------------------------------------------------------------- checks commands


def from_make(command: str) -> str:
    """The last command that make would run."""
    dry = subprocess.run(
        ["make", "-n", "PYTHON=no-python", *shlex.split(command, comments=True)[1:]],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert dry.returncode == 0, f"{command}: {dry.stderr}"
    return dry.stdout.replace("\\\n", " ").strip().splitlines()[-1].strip().removeprefix("exec ")


def words_of(command: str) -> list[str]:
    """The words that a shell would run for the command."""
    if command.startswith("make "):
        command = from_make(command)
    return shlex.split(re.sub(r"^dpo-recipes\b", ".venv/bin/dpo-recipes", command))


def check_flags(recipe: Path, flags: list[str]) -> None:
    """Raises an error if the recipe would refuse a flag. Writes no file and loads no model."""
    namespace = runpy.run_path(str(recipe))
    classes = [value for value in namespace.values() if isinstance(value, type)]
    parts = [part for part in classes if issubclass(part, (TrainingArguments, RecipeArguments, ModelConfig))]
    assert 2 <= len(parts) <= 3
    parser = TrlParser(parts)
    assert parser.set_defaults_with_config(**namespace["RECIPE"]) == []
    cpu = ["--config", str(RECIPES / "profiles" / "cpu.yaml")] if len(parts) == 3 else []
    parser.parse_args_and_config([*cpu, *flags, "--use_cpu", "true", "--bf16", "false"])


def check_train(words: list[str]) -> None:
    """Raises an error unless the recipe, profile and accelerate file exist and the flags are known."""
    if words[-1] == "--help":
        assert len(words) < 2 or find_recipe(words[0]).is_file()
        return
    name, *flags = [word for word in words if word != "--quiet"]
    recipe = find_recipe("hh-rlhf-lora" if name == "mine.py" else name)
    for flag, kind in (("--profile", "profiles"), ("--accelerate", "accelerate")):
        if flag in flags:
            at = flags.index(flag)
            assert find_settings(kind, flags[at + 1], recipe=recipe).is_file()
            del flags[at : at + 2]
    for flag in ("--machines", "--rank", "--main"):
        if flag in flags:
            del flags[flags.index(flag) : flags.index(flag) + 2]
    if "--sweep" in flags:
        at = flags.index("--sweep")
        end = next((number for number in range(at + 1, len(flags)) if flags[number].startswith("--")), len(flags))
        grid = read_grid(flags[at + 1 : end], taken=set())
        flags[at:end] = [part for key, values in grid.items() for part in (f"--{key}", values[-1])]
    check_flags(recipe, flags)


def check_inspect(words: list[str]) -> None:
    """Raises an error unless a recipe, or a dataset with the name of a model, is given and the flags are known."""
    name, *flags = words
    for own in ("--gpu", "--with_model", "--profile"):
        if own in flags:
            del flags[flags.index(own) : flags.index(own) + 2]
    if name.endswith(".jsonl") or "/" in name:
        assert "--model_name_or_path" in flags
        name = "hh-rlhf-lora"
    if "--threshold" in flags:
        names = [word.partition("=")[0] for word in flags[flags.index("--threshold") + 1 :]]
        assert set(names) <= set(THRESHOLDS)
    check_flags(find_recipe(name), flags)


def check_compare(words: list[str]) -> None:
    """Raises an error unless the recipe and its siblings exist and one of them knows each flag."""
    options, flags = build_parser().parse_known_args(words)
    if options.recipe == "mine_lora.py":  # of a reader who has written it
        return
    launch = prepare(options.recipe, profile="cpu")
    recipes = read_recipes(launch, options.methods, flags=flags)
    assert {"dpo", "reward", "ppo"} <= {*recipes}


def check_launch(words: list[str]) -> None:
    """Raises an error unless the files of an `accelerate launch` exist and the recipe knows the flags."""
    at = next(number for number, word in enumerate(words) if word.endswith(".py"))
    assert words[0] == "--config_file"
    assert words[at + 1] == "--config"
    for file in (words[1], words[at], words[at + 2]):
        assert (REPOSITORY / file).is_file(), file
    check_flags(REPOSITORY / words[at], words[at + 3 :])


def check_command(command: str) -> None:
    """Raises an error if a documented command could not run."""
    words = words_of(command)
    match words:
        case [".venv/bin/dpo-recipes", "train", *rest]:
            check_train(rest)
        case [".venv/bin/dpo-recipes", "inspect", *rest]:
            check_inspect(rest)
        case [".venv/bin/dpo-recipes", "compare", *_]:
            check_compare(words[1:])
        case [".venv/bin/dpo-recipes", "evaluate", *_]:
            options, flags = build_parser().parse_known_args(words[1:])
            check_flags(find_recipe("hh-rlhf-lora" if "/" in options.model else options.model), flags)
        case [".venv/bin/dpo-recipes", "copy", name, *_]:
            assert find_recipe(name).is_file()
        case [
            ".venv/bin/dpo-recipes",
            "answer" | "completion" | "doctor" | "list" | "merge" | "page" | "sample" | "try" | "vote",
            *_,
        ] | [
            ".venv/bin/dpo-recipes",
            "publish" | "template",
            *_,
        ]:
            build_parser().parse_args(words[1:])
        case [".venv/bin/accelerate", "launch", *rest]:
            check_launch(rest)
        case [".venv/bin/python", file, *_] if file != "-m":
            assert (REPOSITORY / file).is_file()
        case ["python", "convert_hf_to_gguf.py", *_] | ["vllm" | "ollama" | "llama-server" | "llama-quantize", *_]:
            pass
        case ["sbatch", *rest]:
            check_train(rest[rest.index("recipes/cluster/slurm.sh") + 1 :])
        case [".venv/bin/pre-commit", "install"] | ["lm_eval", *_] | [".venv/bin/transformers", "serve", *_]:
            pass
        case _ if command.startswith("make "):
            assert len(words) > 1
        case _:
            pytest.fail(f"nothing here knows how to check: {command}")


def check_message(command: str) -> None:
    """Raises an error unless the parser of a command that a message names takes its words as they are."""
    assert not command.startswith("make "), f"where the package is installed there is no Makefile: {command}"
    words = shlex.split(command)
    options, flags = build_parser().parse_known_args(words[1:])
    assert options.takes_flags or not flags, command
    if words[1] in ("train", "copy", "inspect") and not (words[2].isupper() or "X" in words[2]):
        assert find_recipe(words[2]).is_file()
    check_flags(RECIPES / "hh_rlhf_lora.py", [word.lower() if word == "DATA" else word for word in flags])


# -------------------------------------------------------------------------------------- runs commands


def why_not_run(command: str) -> str | None:
    """The reason why no test runs the command; None for a command that `as_run` prepares."""
    line = command.partition("#")[0].strip()
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, line)), None)


def as_run(command: str, stand_ins: dict[str, Path]) -> list[str]:
    """The words to run for a documented command, with stand-ins for the Hub's names.

    `train` gets `--dry_run true`, and answers end after eight tokens.

    Args:
        command: As it is printed.
        stand_ins: The files and folders that STAND_INS names.
    """

    def own(word: str) -> str:
        names = sorted(STAND_INS, key=len, reverse=True)
        pattern = rf"(?<![\w/.-])({'|'.join(map(re.escape, names))})(?![\w/-])"
        return re.sub(pattern, lambda found: str(stand_ins[STAND_INS[found[1]]]), word)

    plain = words_of(command)
    words = [word if before == "--output" else own(word) for before, word in zip(["", *plain], plain, strict=False)]
    verb, name, *flags = [*words[1:], "", ""]
    if verb in ("train", "inspect", "evaluate") and (name == "mine.py" or re.fullmatch(r"[a-z0-9-]+", name)):
        recipe = runpy.run_path(str(find_recipe("preference-lora" if name == "mine.py" else name)))["RECIPE"]
        keys = ("dataset_name", "model_name_or_path", "reward_model_name_or_path")
        for key in keys[:1] if verb == "evaluate" else keys:  # the run itself names its models
            if f"--{key}" not in flags and own(theirs := str(recipe.get(key))) != theirs:
                words += [f"--{key}", own(theirs)]
    if verb in ("sample", "answer", "evaluate", "try") and "--max_new_tokens" not in words:
        words += ["--max_new_tokens", "8"]
    if verb == "train":
        words += [] if "--dry_run" in words else ["--dry_run", "true"]
        if "--profile" in words:  # of a card that is not here
            words[words.index("--profile") + 1] = "cpu"
    return words
