"""A folder's files say what it holds: every command opens it as that, or refuses it in a sentence."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import (
    LoraConfig,
    PeftModel,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoConfig,
    GPTNeoForCausalLM,
)
from trl import DPOConfig, DPOTrainer, ModelConfig, RewardConfig

from dpo_recipes.cli import main
from dpo_recipes.doctor.miniature import CHAT_TEMPLATE
from dpo_recipes.errors import RecipeError
from dpo_recipes.health.guards import add_guards
from dpo_recipes.models.open import check_weights, identify, open_model
from dpo_recipes.models.rewards import load_reward_model, read_reward_config
from dpo_recipes.recipe import check_start, load_tokenizer

INPUTS = torch.arange(40).reshape(2, 20) + 5
MACHINE = dict(use_cpu=True, bf16=False, activation_checkpointing=False)
SHORT = ["--max_new_tokens", "4", "--temperature", "0"]
RANKED = ["--max_new_tokens", "4", "--num_samples", "2"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Number {index}?"}) + "\n" for index in range(4)))
    return tmp_path


def save_adapter(folder, model, config, base):
    """A folder with an adapter of random weights, which names the base, and the base's tokenizer; and the model."""
    torch.manual_seed(2)
    tuned = get_peft_model(model, config)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(weight, std=0.2)
    tuned.peft_config["default"].base_model_name_or_path = base and str(base)
    tuned.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base or model.name_or_path).save_pretrained(folder)
    return tuned.eval()


def lora(**changes):
    return LoraConfig(**dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") | changes)


def tuned_adapter(tiny_model, name="tuned", config=None):
    return save_adapter(name, AutoModelForCausalLM.from_pretrained(tiny_model), config or lora(), tiny_model)


def scoring_adapter(base, name="scores", **changes):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=changes.pop("num_labels", 1))
    model.config.pad_token_id = 0
    return save_adapter(name, model, lora(task_type="SEQ_CLS", **changes), base)


def change_json(file, **changes):
    held = json.loads(Path(file).read_text()) | changes
    Path(file).write_text(json.dumps({key: value for key, value in held.items() if value != "left out"}))


@torch.no_grad()
def logits(model):
    return model(input_ids=INPUTS, attention_mask=torch.ones_like(INPUTS)).logits.float()


# Reward models' adapters


@pytest.mark.parametrize(("dtype", "labels"), [("float32", 1), ("bfloat16", 1), ("float32", 2)])
def test_a_reward_adapter_is_merged_with_its_trained_head(dtype, labels, tiny_model):
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).save_pretrained("base")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained("base")
    expected = logits(scoring_adapter("base", num_labels=labels))
    assert main(["merge", "scores"]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained("scores_merged")
    assert merged.config.architectures == ["LlamaForSequenceClassification"]
    assert merged.dtype == getattr(torch, dtype)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4 if dtype == "float32" else 0.05, rtol=1e-2)
    assert expected.std() > 0.05


def test_a_reward_adapter_whose_head_was_not_saved_is_refused(tiny_model, capsys):
    scoring_adapter(tiny_model)
    weights = load_file("scores/adapter_model.safetensors")
    save_file({key: value for key, value in weights.items() if "score" not in key}, "scores/adapter_model.safetensors")
    assert main(["merge", "scores"]) == 2
    assert "scores was not saved whole: it lacks score. Copy" in capsys.readouterr().err
    assert not Path("scores_merged").exists()


def test_every_command_knows_a_reward_adapter_and_its_advice_is_taken_by_the_others(tiny_model, capsys):
    scoring_adapter(tiny_model)
    sample = ["sample", "--dataset_name", "prompts.jsonl", *SHORT]
    for command in (["try", "scores", "Hello?", *SHORT], [*sample, "scores"]):
        assert main(command) == 2
        assert "scores is a reward model" in capsys.readouterr().err
    ranked = [*sample[:3], *RANKED, str(tiny_model), "--judge"]
    assert main([*ranked, "scores"]) == 2
    advice = "Make one: dpo-recipes merge scores --output_dir scores_merged."
    assert advice in capsys.readouterr().err
    with pytest.raises(RecipeError, match=advice):  # of --reward_model_name_or_path
        read_reward_config("scores")
    assert main(["merge", "scores", "--output_dir", "scores_merged"]) == 0
    assert main([*ranked, "scores_merged"]) == 0


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("reward", DPOConfig, "that of a reward model; a full model is needed. Name a language model"),
        ("reward", RewardConfig, "Make one: dpo-recipes merge adapter"),
        ("language", DPOConfig, "Make one: dpo-recipes merge adapter"),
        ("prompt", DPOConfig, "PROMPT_TUNING adapter alone; .* cannot be merged"),
    ],
)
def test_an_adapter_is_no_start_and_the_way_out_is_one(kind, settings, message, tiny_model):
    if kind == "reward":
        scoring_adapter(tiny_model, "adapter")
    else:
        prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        tuned_adapter(tiny_model, "adapter", prompt if kind == "prompt" else None)
    with pytest.raises(RecipeError, match=message):
        load_tokenizer(ModelConfig(model_name_or_path="adapter"), settings(**MACHINE))


# Folders of adapters


def test_an_adapter_beside_its_bases_config_is_an_adapter(tiny_model):
    expected = logits(tuned_adapter(tiny_model))
    shutil.copy(tiny_model / "config.json", "tuned")
    assert identify("tuned").base == str(tiny_model)
    torch.testing.assert_close(logits(open_model("tuned")[0]), expected)
    assert main(["merge", "tuned"]) == 0
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained("tuned_merged")), expected, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("base", [None, "", "outputs/moved"])
def test_a_base_that_is_not_named_or_not_there_can_be_named(base, tiny_model, capsys):
    tuned_adapter(tiny_model)
    change_json("tuned/adapter_config.json", base_model_name_or_path=base)
    for command in (["merge", "tuned"], ["sample", "tuned", "--dataset_name", "prompts.jsonl", *SHORT]):
        assert main(command) == 2
        assert "Name the base: dpo-recipes merge tuned --base MODEL" in capsys.readouterr().err
    assert main(["merge", "tuned", "--base", str(tiny_model)]) == 0
    assert main(["sample", "tuned_merged", "--dataset_name", "prompts.jsonl", *SHORT]) == 0


def test_a_base_that_the_adapter_does_not_name_is_that_of_its_run(tiny_model):
    tuned_adapter(tiny_model, "run/checkpoint-2")
    change_json("run/checkpoint-2/adapter_config.json", base_model_name_or_path=None)
    Path("run/settings.json").write_text(json.dumps({"model_name_or_path": str(tiny_model)}))
    assert identify("run/checkpoint-2").base == str(tiny_model)


@pytest.mark.parametrize("how", ["in full", "saved by PEFT", "output alone"])
@pytest.mark.parametrize("rows", [261, 320, 250])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")  # PEFT, where it saves them
def test_an_adapter_with_another_vocabulary_is_opened_on_a_base_of_its_size(how, rows, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(5)
    model.resize_token_embeddings(rows, mean_resizing=False)
    whole = {"in full": ["embed_tokens", "lm_head"], "output alone": ["lm_head"]}.get(how)
    tuned = save_adapter("tuned", model, lora(modules_to_save=whole), tiny_model)
    opened, _ = open_model("tuned")
    assert opened.get_input_embeddings().weight.shape[0] == rows
    known = min(rows, 258)
    torch.testing.assert_close(logits(opened)[..., :known], logits(tuned)[..., :known])
    assert main(["merge", "tuned"]) == 0
    merged = AutoModelForCausalLM.from_pretrained("tuned_merged")
    torch.testing.assert_close(logits(merged), logits(opened), atol=1e-4, rtol=0)


def other_base(kind, tiny_model):
    config = AutoConfig.from_pretrained(tiny_model)
    if kind == "another architecture":
        sizes = dict(hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global"], 2]])
        return GPTNeoForCausalLM(GPTNeoConfig(vocab_size=config.vocab_size, **sizes)), ["q_proj"]
    config.num_hidden_layers = {"more layers": 3, "fewer layers": 1}[kind]
    return AutoModelForCausalLM.from_config(config), ["q_proj"]


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("another architecture", "has no place for transformer.h.0.attn.attention.q_proj.lora_A.weight"),
        ("more layers", "has no place for model.layers.2.self_attn.q_proj.lora_A.weight"),
        ("fewer layers", "lacks model.layers.1.self_attn.q_proj.lora_A.default.weight"),
    ],
)
def test_an_adapter_of_another_base_is_refused_with_the_names_that_do_not_fit(kind, named, tiny_model, capsys):
    model, target = other_base(kind, tiny_model)
    get_peft_model(model, lora(target_modules=target)).save_pretrained("tuned")
    change_json("tuned/adapter_config.json", base_model_name_or_path=str(tiny_model))
    assert main(["merge", "tuned"]) == 2
    said = capsys.readouterr().err
    assert f"tuned was trained on another base than {tiny_model}: " in said
    assert named in said
    assert not Path("tuned_merged").exists()
    assert main(["try", "tuned", "Hello?", *SHORT]) == 2
    with pytest.raises(RecipeError, match="was trained on another base"):  # without reading a weight of the base
        check_weights(identify("tuned"), trust_remote_code=False)


def test_an_adapter_on_an_adapter_or_of_the_other_kind_is_refused(tiny_model, reward_model):
    tuned_adapter(tiny_model)
    tuned_adapter(tiny_model, "second")
    with pytest.raises(RecipeError, match=r"tuned, the base of second, is an adapter itself.*dpo-recipes merge tuned"):
        identify("second", base="tuned")
    with pytest.raises(RecipeError, match=r"is an adapter of a language model, and .* is a reward model"):
        identify("second", base=str(reward_model))


PROMPTS = [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig]


@pytest.mark.parametrize("kind", PROMPTS)
def test_an_adapter_of_the_prompt_answers_and_is_not_merged(kind, tiny_model, capsys):
    tuned_adapter(tiny_model, config=kind(task_type="CAUSAL_LM", num_virtual_tokens=2))
    name = json.loads(Path("tuned/adapter_config.json").read_text())["peft_type"]
    assert main(["merge", "tuned"]) == 2
    assert f"of the kind {name}, which cannot be merged into its base" in capsys.readouterr().err
    assert isinstance(open_model("tuned")[0], PeftModel)


def test_an_adapter_that_needs_a_task_with_each_text_is_refused(tiny_model, capsys):
    tuned_adapter(tiny_model, config=PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for command in (["merge", "tuned"], ["try", "tuned", "Hello?", *SHORT]):
        assert main(command) == 2
        assert "POLY, which needs a task with each text" in capsys.readouterr().err


@pytest.mark.parametrize("kind", PROMPTS)
def test_dpo_of_a_prompt_is_refused_by_name(kind, tiny_model, tmp_path):
    pairs = Dataset.from_dict({"prompt": ["One", "Two"], "chosen": [" is.", " are."], "rejected": [" was.", " were."]})
    trainer = DPOTrainer(
        str(tiny_model),
        args=DPOConfig(output_dir=str(tmp_path / "run"), report_to="none", **MACHINE),
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        peft_config=kind(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    name = trainer.model.active_peft_config.peft_type.value
    with pytest.raises(RecipeError, match=f"{name} puts trained vectors before the prompt"):
        add_guards(trainer)


# Full models that cannot be read


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder):
    model = type(AutoModelForCausalLM.from_pretrained(folder)).from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    return sorted(folder.glob("model-*.safetensors"))


def pickle(folder, held):
    (folder / "model.safetensors").unlink()
    torch.save(held, folder / "pytorch_model.bin")


FAULTS = {
    "cut short": (lambda f: os.truncate(f / "model.safetensors", 5000), "cut short or broken"),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), "cut short or broken"),
    "a pointer": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs\n"), "cut short or broken"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    "no shard": (lambda f: shard(f)[1].unlink(), "model-00002-of"),
    "a shard cut short": (lambda f: os.truncate(shard(f)[1], 100), "cut short or broken"),
    "no list of shards": (lambda f: (shard(f), (f / "model.safetensors.index.json").write_text("{}")), "weight_map"),
    "code in a pickle": (lambda f: pickle(f, {"weight": Code()}), "pickled with more than tensors"),
    "a weight is missing": (lambda f: edit_weights(f, lambda w: w.pop("model.norm.weight")), "lacks model.norm.weight"),
    "fewer layers": (lambda f: change_json(f / "config.json", num_hidden_layers=1), "no place for model.layers.1"),
    "no vocab_size": (lambda f: change_json(f / "config.json", vocab_size="left out"), "[258, 64], not [32000, 64]"),
    "vocab_size is text": (lambda f: change_json(f / "config.json", vocab_size="many"), "expected int"),
    "unknown type": (lambda f: change_json(f / "config.json", model_type="llama_9"), "model type `llama_9`"),
    "no type": (lambda f: change_json(f / "config.json", model_type="left out"), "model_type"),
    "code of its own": (
        lambda f: change_json(f / "config.json", model_type="own", auto_map={"AutoConfig": "code.Own"}),
        "brings code of its own. Read it, and let it run with --trust_remote_code true",
    ),
    "images": (
        lambda f: change_json(f / "config.json", model_type="vit", architectures=["ViTForImageClassification"]),
        "is a ViTForImageClassification, neither a language model nor a reward model",
    ),
    "configuration cut short": (lambda f: os.truncate(f / "config.json", 50), "not a valid JSON file"),
}


def start_from(name, training_args):
    """What a recipe does with the model it starts from, before it loads it."""
    load_tokenizer(ModelConfig(model_name_or_path=name), training_args)
    check_start({"model_name_or_path": name}, training_args)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_cannot_be_read_is_refused_in_a_sentence_before_data_is(fault, tiny_model):
    folder = Path(shutil.copytree(tiny_model, "broken"))
    break_it, message = FAULTS[fault]
    break_it(folder)
    for opening in (
        lambda: start_from("broken", DPOConfig(**MACHINE)),
        lambda: start_from("broken", RewardConfig(**MACHINE)),
        lambda: open_model("broken"),
    ):
        with pytest.raises(RecipeError) as caught:
            opening()
        assert message in str(caught.value)
        assert str(caught.value).count("\n") == 0
    assert not Path("ran").exists()


def test_a_configuration_without_architectures_is_refused_where_trl_needs_them(tiny_model):
    shutil.copytree(tiny_model, "broken")
    change_json("broken/config.json", architectures=None)
    with pytest.raises(RecipeError, match=r'Add to it: "architectures": ."LlamaForCausalLM"'):
        start_from("broken", DPOConfig(**MACHINE))


@pytest.mark.parametrize("fault", ["cut short", "no weights", "head is missing"])
def test_a_reward_model_that_cannot_be_read_is_refused_before_answers_are_made(fault, tiny_model, reward_model, capsys):
    folder = Path(shutil.copytree(reward_model, "broken"))
    if fault == "head is missing":
        edit_weights(folder, lambda weights: weights.pop("score.weight"))
    else:
        FAULTS[fault][0](folder)
    assert main(["sample", str(tiny_model), "--dataset_name", "prompts.jsonl", *RANKED, "--judge", "broken"]) == 2
    said = capsys.readouterr()
    assert "broken" in said.err
    assert "answers" not in said.out
    with pytest.raises(RecipeError):
        load_reward_model("broken")


def test_pickled_tensors_are_read_as_transformers_reads_them(tiny_model):
    folder = Path(shutil.copytree(tiny_model, "pickled"))
    expected = logits(open_model("pickled")[0])
    pickle(folder, load_file(tiny_model / "model.safetensors"))
    assert (
        load_tokenizer(ModelConfig(model_name_or_path="pickled"), DPOConfig(**MACHINE)).chat_template == CHAT_TEMPLATE
    )
    torch.testing.assert_close(logits(open_model("pickled")[0]), expected)


@pytest.mark.parametrize("held", ["code", "tensors", "nothing"])
def test_the_code_in_a_pickled_adapter_does_not_run(held, tiny_model, capsys):
    expected = logits(tuned_adapter(tiny_model))
    weights = load_file("tuned/adapter_model.safetensors")
    Path("tuned/adapter_model.safetensors").unlink()
    torch.save({"weight": Code()} if held == "code" else weights, "tuned/adapter_model.bin")
    if held == "nothing":
        os.truncate("tuned/adapter_model.bin", 0)
    assert main(["try", "tuned", "Hello?", *SHORT]) == (0 if held == "tensors" else 2)
    assert not Path("ran").exists()
    if held == "tensors":
        torch.testing.assert_close(logits(open_model("tuned")[0]), expected)
    else:
        assert "Cannot load tuned: " in capsys.readouterr().err


# Places for results


@pytest.mark.parametrize("place", ["file/below", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_is_found_before_the_work(place, tiny_model, capsys):
    Path("file").touch()
    tuned_adapter(tiny_model)
    for command in (
        ["merge", "tuned", "--output_dir", f"{place}/merged"],
        ["sample", str(tiny_model), "--dataset_name", "prompts.jsonl", "--output", f"{place}/answers.jsonl"],
    ):
        assert main(command) == 2
        said = capsys.readouterr()
        assert f"Cannot write into {place}: " in said.err
        assert "Merging" not in said.out
        assert "prompts" not in said.out
