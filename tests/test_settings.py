"""Settings that make no sense, have no effect or need what is not there are refused; whatever makes sense is not."""

import sys

import pytest
from transformers import AttentionInterface
from trl import DPOConfig, ModelConfig, RewardConfig, RLOOConfig, SFTConfig

from dpo_recipes import settings
from dpo_recipes.errors import RecipeError
from dpo_recipes.ppo import PPOConfig
from dpo_recipes.presets import LORA, QLORA
from dpo_recipes.recipe import OnlineArguments, RecipeArguments, parse_recipe
from dpo_recipes.rounds import RoundsConfig

CONFIGS = {"dpo": DPOConfig, "sft": SFTConfig, "reward": RewardConfig, "rloo": RLOOConfig, "ppo": PPOConfig}


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Parses a small recipe of a trainer with flags and a profile, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)

    def parse(flags="", *, kind="dpo", profile="", **recipe):
        (tmp_path / "profile.yaml").write_text(
            f"use_cpu: true\nbf16: false\nactivation_checkpointing: false\n{profile}"
        )
        monkeypatch.setattr(sys, "argv", ["recipe.py", "--config", "profile.yaml", *flags.split()])
        common = dict(model_name_or_path="some/model", output_dir="outputs/x", report_to="none")
        online = {"num_generations": 2} if kind in ("rloo", "ppo") else {}
        script = OnlineArguments if online else RecipeArguments
        task = {"lora_task_type": "SEQ_CLS"} if kind == "reward" else {}
        return parse_recipe(common | online | task | recipe, (script, CONFIGS[kind], ModelConfig))

    return parse


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("dpo", name) for name in ("beta", "learning_rate", "num_train_epochs", "weight_decay", "adam_epsilon")),
        *(("dpo", name) for name in ("adam_beta1", "adam_beta2", "ld_alpha", "lora_dropout", "label_smoothing")),
        *(("dpo", name) for name in ("warmup_steps", "eval_delay", "ref_model_mixup_alpha", "neftune_noise_alpha")),
        *(("ppo", name) for name in ("gamma", "lam", "vf_coef", "temperature", "top_p", "min_p", "beta")),
        *(("ppo", name) for name in ("critic_learning_rate", "repetition_penalty")),
        ("reward", "center_rewards_coefficient"),
    ],
)
def test_a_number_that_is_none_infinite_or_negative_is_refused_by_name(parse, kind, name, value):
    with pytest.raises(RecipeError, match=f"Got {name}={float(value)}, which must lie in"):
        parse(f"--{name} {value}", kind=kind)


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        *(("dpo", f"--{name} 0") for name in ("beta", "max_steps", "num_train_epochs", "max_length")),
        *(("dpo", f"--per_device_{split}_batch_size 0") for split in ("train", "eval")),
        *(("dpo", flags) for flags in ("--max_steps -5", "--seed -1", "--seed 4294967296", "--max_grad_norm nan")),
        *(("dpo", flags) for flags in ("--lora_r 0", "--lora_alpha 0", "--lora_dropout 1.5", "--adam_beta2 1")),
        *(("dpo", f"--loss_type sigmoid sft --loss_weights {weights}") for weights in ("nan 1", "inf 1", "-1 1")),
        *(("dpo", f"--loss_type robust --label_smoothing {share}") for share in ("0.5", "0.9")),
        *(("dpo", f"--held_out {share}") for share in ("0", "1", "-0.1", "nan")),
        *(("dpo", flags) for flags in ("--loss_type exo_pair", "--eval_pairs -5", "--save_total_limit -1")),
        *(("ppo", f"--{name} 0") for name in ("temperature", "top_p", "num_iterations", "num_generations", "epsilon")),
        *(("ppo", flags) for flags in ("--gamma 1.5", "--max_completion_length 0", "--missing_eos_penalty nan")),
        *(("rloo", f"--{name} 0") for name in ("generation_batch_size", "max_prompt_length")),
    ],
)
def test_a_number_outside_its_range_is_refused_with_the_range(parse, kind, flags):
    with pytest.raises(RecipeError, match=r"Got \w+=\S+, which must lie in [\[(]\S+, \S+[\])]"):
        parse(flags, kind=kind, use_peft=True)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        *((f"{name}: null", f"Got {name}=null") for name in ("beta", "learning_rate", "optim", "seed", "use_peft")),
        ("beta: [0.1]", r"Got beta=\[0.1\], where a number is needed"),
        ("beta: true", "Got beta=True, where a number is needed"),
        ("max_steps: 1.5", "Got max_steps=1.5, where a whole number is needed"),
        ("seed: .nan", "Got seed=nan, where a whole number is needed"),
        ("loss_weights: 1", "Got loss_weights=1, where a list with a number is needed"),
        ("loss_type: []", r"There is no loss_type \[\]"),
        ("eval_strategy: no", "Got eval_strategy=False: YAML reads a bare no"),
        ("health: off", "Got health=False: YAML reads a bare no, off"),
        ("dtype: bfloat", "There is no dtype bfloat. There are: auto, bfloat16"),
        ("beta: 0.1\nbeta: 0.2", "beta stands twice"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}", "a stands twice"),
    ],
)
def test_a_value_that_only_a_file_can_hold_is_refused_by_name(parse, profile, message):
    with pytest.raises(RecipeError, match=message):
        parse(profile=profile)


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("dpo", "--loss_type sigmod", "There is no loss_type sigmod. There are: sigmoid, hinge"),
        ("dpo", "--loss_type sigmoid other", "There is no loss_type other"),
        ("ppo", "--loss_type sapo", "There is no loss_type sapo"),
        ("dpo", "--f_divergence_type kl", "There is no f_divergence_type kl"),
        ("dpo", "--attn_implementation flash", "There is no attn_implementation flash. There are: eager"),
        ("dpo", "--loss_type sigmoid sft --loss_weights 0 0", "All loss_weights of sigmoid sft are 0"),
        ("dpo", "--warmup_steps 100 --max_steps 10", "warmup_steps=100.0 with max_steps=10: the warm-up would never"),
        ("ppo", "--critic_warmup_steps 9 --max_steps 8", "critic_warmup_steps=9 with max_steps=8"),
    ],
)
def test_unknown_names_and_numbers_that_contradict_each_other_are_refused(parse, kind, flags, message):
    with pytest.raises(RecipeError, match=message):
        parse(flags, kind=kind)


@pytest.mark.parametrize(
    ("kind", "flags", "reason"),
    [
        ("dpo", "--label_smoothing_factor 0.1", "DPO reads label_smoothing"),
        ("reward", "--label_smoothing_factor 0.1", "only SFT has labels"),
        ("sft", "--label_smoothing_factor 0.1 --loss_type dft", "needs loss_type nll"),
        ("dpo", "--label_smoothing 0.1", "needs loss_type robust or exo_pair"),
        ("dpo", "--label_smoothing 0.1 --loss_type robust sigmoid --loss_weights 0 1", "needs loss_type robust"),
        ("dpo", "--beta 0.5 --loss_type sft", "the sft loss alone has no reference"),
        ("dpo", "--discopop_tau 0.1", "needs loss_type discopop"),
        ("dpo", "--f_divergence_type forward_kl --loss_type bco_pair", "does not read it"),
        ("dpo", "--f_alpha_divergence_coef 0.3", "needs f_divergence_type alpha_divergence"),
        ("dpo", "--use_weighting true --loss_type aot", "does not read it"),
        ("dpo", "--lora_r 8", "needs use_peft true"),
        ("dpo", "--use_peft false --lora_target_modules q_proj v_proj", "needs use_peft true"),
        ("dpo", "--bnb_4bit_quant_type fp4", "needs load_in_4bit true"),
        ("dpo", "--eval_steps 5", "needs eval_strategy steps"),
        ("dpo", "--save_steps 5 --save_strategy no", "needs save_strategy steps"),
        ("dpo", "--precompute_ref_batch_size 4", "needs precompute_ref_log_probs true"),
        ("dpo", "--sync_ref_model true --precompute_ref_log_probs true", "needs precompute_ref_log_probs false"),
        ("dpo", "--sync_ref_model true --use_peft true", "needs use_peft false"),
        ("dpo", "--ref_model_sync_steps 5", "needs sync_ref_model true"),
        ("dpo", "--hub_model_id someone/model", "dpo-recipes publish RUN"),
        ("dpo", "--dataloader_persistent_workers true", "dataloader_num_workers=0 does not read it"),
        ("dpo", "--lr_scheduler_type constant --warmup_steps 5", "lr_scheduler_type=constant does not read it"),
        ("dpo", "--optim sgd --adam_beta2 0.9", "optim=sgd does not read it"),
        ("sft", "--packing_strategy wrapped", "needs packing true"),
        ("ppo", "--vllm_mode server", "needs use_vllm true"),
        ("rloo", "--log_unique_prompts true", "needs log_completions true"),
    ],
)
def test_a_flag_without_effect_is_refused_with_the_reason(parse, kind, flags, reason):
    with pytest.raises(RecipeError, match=rf"has no effect here: .*{reason}.*Leave it out"):
        parse(flags, kind=kind)


@pytest.mark.parametrize(
    ("kind", "flags", "recipe"),
    [
        ("dpo", "--use_peft false", LORA),  # RECIPE's own lora_r is no mistake of the call
        ("dpo", "--load_in_4bit false", QLORA),
        ("dpo", "--loss_type sft", dict(beta=0.2)),
        ("dpo", "--loss_type sft --beta 0", {}),
        ("dpo", "--lr_scheduler_type constant", dict(warmup_steps=0.1)),
        ("dpo", "--optim adafactor", dict(adam_beta2=0.95)),
        ("dpo", "--eval_strategy no --save_strategy no", dict(eval_steps=5, save_steps=5, save_total_limit=3)),
        ("dpo", "--max_steps 2", dict(warmup_steps=100)),  # a short trial of a long run
        ("dpo", "--max_steps 2 --num_train_epochs 3 --warmup_steps 2", {}),
        ("dpo", "--loss_type sigmoid sft --loss_weights 1 0", dict(beta=0.1)),
        ("dpo", "--loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1.0", {}),  # TRL's documentation: MPO
        ("dpo", "--loss_type exo_pair --label_smoothing 1e-3", {}),
        ("dpo", "--loss_type robust --label_smoothing 0.1", {}),
        ("dpo", "--loss_type sigmoid_norm --ld_alpha 0.5 --f_divergence_type js_divergence", {}),
        ("dpo", "--f_divergence_type reverse_kl --loss_type nca_pair", {}),
        ("dpo", "--label_smoothing 0 --label_smoothing_factor 0 --use_weighting true", {}),
        ("dpo", "--sync_ref_model true --ref_model_mixup_alpha 0.6 --ref_model_sync_steps 512", {}),
        ("dpo", "--precompute_ref_log_probs true --precompute_ref_batch_size 8", {}),
        ("dpo", "--max_grad_norm inf --learning_rate 0 --num_train_epochs 0.5 --adam_beta1 0", {}),
        ("dpo", "--logging_steps 0.1 --save_steps 0.2 --save_total_limit 1 --seed 0", {}),
        ("dpo", "--dataloader_num_workers 2 --dataloader_prefetch_factor 4", {}),
        ("dpo", "--held_out 0.2", {}),
        ("sft", "--packing true --packing_strategy wrapped", {}),
        ("reward", "--center_rewards_coefficient 0.01 --max_length 2048", {}),  # TRL's documentation
        ("rloo", "--num_generations 4 --temperature 0.7 --top_p 0.9 --top_k 50", {}),
        ("ppo", "--vf_coef 0 --beta 0 --cliprange_value inf --critic_learning_rate 1e-4", {}),
    ],
)
def test_what_makes_sense_is_taken(parse, kind, flags, recipe):
    assert parse(flags, kind=kind, **recipe)


@pytest.mark.parametrize(
    "profile",
    [
        "max_length: null",
        "save_total_limit: null",
        "learning_rate: 5e-6",
        "lora_r: 8.0\nuse_peft: true",
        "shared_prefix: true",
    ],
)
def test_what_makes_sense_in_a_file_is_taken(parse, profile):
    assert parse(profile=profile)


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        ("--attn_implementation flash_attention_2", "flash-attn"),
        ("--attn_implementation kernels-community/flash-attn2", "kernels"),
        ("--use_liger_kernel true", "liger-kernel"),
        ("--optim galore_adamw --optim_target_modules all-linear", "galore-torch"),
        ("--optim schedule_free_radam", "schedulefree"),
        ("--optim paged_adamw_8bit", "bitsandbytes"),
        ("--load_in_8bit true", "bitsandbytes"),
        ("--deepspeed zero3.json", "deepspeed"),
    ],
)
def test_a_package_that_is_missing_is_named_before_anything_is_loaded(parse, flags, package):
    with pytest.raises(RecipeError, match=f"needs a package that is not installed: pip install {package}"):
        parse(flags)


def test_an_attention_function_of_ones_own_is_known(parse):
    AttentionInterface.register("mine_of_the_tests", lambda *_: None)
    assert parse("--attn_implementation mine_of_the_tests")


def test_an_upload_during_the_training_is_refused_and_the_command_for_later_named(parse):
    later = "dpo-recipes publish [^ ]+ --hub_id someone/some-model"
    with pytest.raises(RecipeError, match=f"push_to_hub would upload.*Leave it out.*{later}"):
        parse("--push_to_hub true --hub_model_id someone/some-model")


def test_every_setting_of_the_table_is_a_field(parse):
    known = {name for kind in CONFIGS.values() for name in kind.__dataclass_fields__}
    parts = (OnlineArguments, ModelConfig, RoundsConfig)
    known |= {name for kind in parts for name in kind.__dataclass_fields__}
    rows = [row for kind in ("ranges", "names", "effects", "limits") for row in settings.TABLE[kind]]
    named = {name for row in rows for name in row["settings"].split()}
    named |= {name for row in rows for key in ("when", "needs", "unless") for name in row.get(key, ())}
    assert len(named) > 100
    assert named <= known
