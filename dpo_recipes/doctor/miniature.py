"""Builds random tiny models, rows in every published schema, and the flags that train a recipe on them.

The models learn nothing useful. A miniature run shows that a recipe goes from its data to its page on this machine.
"""

import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any

from dpo_recipes.errors import RecipeError
from dpo_recipes.files import write_jsonl

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ 'Bot: ' + m['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ m['role'].capitalize() + ': ' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Bot:' }}{% endif %}"
)
ROWS = 120  # questions in each dataset
TOPICS = ("tea", "bread", "maps", "chess", "rivers", "birds", "clocks", "paint", "wool", "bridges")
STEPS: dict[str, Any] = dict(
    max_steps=2,
    logging_steps=1,
    warmup_steps=0,
    eval_pairs=4,
    pairs_per_update=16,  # a multiple of every per-device batch of the recipes and the profiles
)
ONLINE: dict[str, Any] = dict(
    generation_batch_size=16,
    num_iterations=1,
    max_prompt_length=200,  # tokens, which are bytes here
    max_completion_length=8,  # tokens
    num_rounds=2,
    num_prompts=24,  # of both rounds
)


def tiny_model(folder: Path) -> Path:
    """Folder of a random Llama with two layers, a byte tokenizer and a chat template, built if it is missing."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if folder.exists():
        return folder
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *alphabet])}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,  # a block of 4-bit weights
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_reward_model(folder: Path, model: Path) -> Path:
    """Folder of a reward model: backbone and tokenizer of `model`, random score head; built if it is missing."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if folder.exists():
        return folder
    torch.manual_seed(1)
    scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    torch.nn.init.normal_(scorer.score.weight)  # scores far enough apart to rank answers
    scorer.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def write_rows(folder: Path) -> dict[str, Path]:
    """Writes rows in published schemas; returns the jsonl files by the dataset adapter that reads them."""
    questions = [_rows(index) for index in range(ROWS)]
    written = {adapter: [row for rows in questions for row in rows[adapter]] for adapter in questions[0]}
    return {adapter: write_jsonl(folder / f"{adapter}.jsonl", rows) for adapter, rows in written.items()}


def _rows(index: int) -> dict[str, list[dict[str, Any]]]:
    """Rows about one question, by dataset adapter."""
    topic, question = TOPICS[index % len(TOPICS)], f"Question {index}?"
    good, bad = f"Gladly: answer {index}.", "No. Ask someone else."
    turns = [[{"role": "user", "content": question}, {"role": "assistant", "content": text}] for text in (good, bad)]
    context = f"\n\nHuman: Question {index}: tell me about {topic}.\n\nAssistant:"
    film = f"Film {index}, on {topic},"
    return {
        "hh_rlhf": [{"chosen": f"{context} Gladly, {topic} it is.", "rejected": f"{context} {bad}"}],
        "shp": [
            {"post_id": f"p{index}", "domain": "askscience_train", "history": f"Post {index}?", "labels": 0}
            | {"human_ref_A": bad, "human_ref_B": good, "score_A": 3, "score_B": 12}
        ],
        "oasst1": [
            _oasst_message(f"m{index}", None, question),
            *(_oasst_message(f"m{index}-{rank}", f"m{index}", (good, bad)[rank], rank) for rank in (1, 0)),
        ],
        "ultrafeedback_binarized": [
            {"source": "evol_instruct", "prompt": question}
            | {"chosen": turns[0], "chosen-rating": 4.5, "rejected": turns[1], "rejected-rating": 2.0}
        ],
        **{key: [{"prompt": question, "chosen": good, "rejected": bad}] for key in ("preference_jsonl", "recognise")},
        "plain_text": [{"prompt": film, "chosen": f" and {topic} alone, is a joy.", "rejected": " drags to its end."}],
        "marked_solutions": [
            {"question": question, "ground_truth": f"A: {index + 1}"}
            | {f"model_{mark}": {"is_correct": mark, "solution": f"A: {index + mark}"} for mark in (True, False)}
        ],
        "prompts_alone": [{"text": f"{film} is a joy from its beginning to its end.", "label": 1}],
    }


def _oasst_message(name: str, parent: str | None, text: str, rank: int | None = None) -> dict[str, Any]:
    states = {"deleted": False, "synthetic": False, "review_result": True, "tree_state": "ready_for_export"}
    role = "prompter" if rank is None else "assistant"
    ids = {"message_id": name, "parent_id": parent, "message_tree_id": name.partition("-")[0]}
    return {**ids, "text": text, "role": role, "lang": "en", "rank": rank, **states}


def miniature_flags(recipe: Path, folder: Path) -> list[str]:
    """Flags that train a recipe for two updates on tiny models and rows.

    The dataset adapters that a recipe imports choose the rows, its dataclasses the models. A recipe of the playground
    keeps its own data and starts from the playground's untrained model.

    Args:
        recipe: The recipe's file.
        folder: Folder of models and rows. A model that exists is not built again.

    Raises:
        RecipeError: If the file has no RECIPE.
    """
    from dpo_recipes import dataset_adapters, playground
    from dpo_recipes.recipe import OnlineArguments, argument_classes

    names, flags = runpy.run_path(str(recipe)), dict(STEPS)
    if (settings := names.get("RECIPE")) is None:
        raise RecipeError(f"{recipe.name} has no RECIPE. Write one as in recipes/hh_rlhf_lora.py, or move the file.")
    in_playground = settings.get("dataset_name") == "playground"
    files = write_rows(folder / "rows")
    read = [adapter for adapter in files if names.get(adapter) is getattr(dataset_adapters, adapter)]
    if "prompts_alone" in read:
        read = ["prompts_alone"]  # it prepares its rows for the other dataset adapter
    if read:
        flags["dataset_name"] = "+".join(str(files[adapter]) for adapter in read)
    start = playground.build_model(folder) if in_playground else tiny_model(folder / "model")
    kinds = argument_classes(names)
    if any(issubclass(kind, OnlineArguments) for kind in kinds):
        known = {entry.name for kind in kinds for entry in fields(kind)}  # rounds have no rollouts, PPO has no rounds
        flags |= {name: value for name, value in ONLINE.items() if name in known}
    if "model_name_or_path" in settings:
        flags["model_name_or_path"] = start
    if "reward_model_name_or_path" in settings:
        flags["reward_model_name_or_path"] = tiny_reward_model(start.with_name(f"{start.name}_reward"), start)
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]
