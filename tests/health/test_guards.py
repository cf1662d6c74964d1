import copy
import math
import signal

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer

from dpo_recipes.errors import RecipeError, UnhealthyRunError
from dpo_recipes.health.guards import (
    InterruptCallback,
    ReferenceGuard,
    WrongReferenceError,
    add_guards,
    start_reference_at_policy,
)


def say(role, content):
    return [{"role": role, "content": content}]


@pytest.fixture
def pairs():
    return Dataset.from_list(
        [
            {
                "prompt": say("user", f"Question {index}?"),
                "chosen": say("assistant", f"A good answer, number {index}."),
                "rejected": say("assistant", "No."),
            }
            for index in range(8)
        ]
    )


@pytest.fixture
def build(tiny_model, tmp_path, pairs):
    def build(model=None, ref_model=None, peft_config=None, train_dataset=pairs, **settings):
        args = DPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=1,
            learning_rate=settings.pop("learning_rate", 1e-3),
            logging_steps=1,
            use_cpu=True,
            bf16=settings.pop("bf16", False),
            report_to="none",
            save_strategy="no",
            activation_checkpointing=False,
            disable_tqdm=True,
            **settings,
        )
        return DPOTrainer(
            model=model if model is not None else str(tiny_model),
            ref_model=ref_model,
            args=args,
            train_dataset=train_dataset,
            processing_class=AutoTokenizer.from_pretrained(tiny_model),
            peft_config=peft_config,
        )

    return build


def changed_in_memory(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn(model.lm_head.weight.shape, generator=torch.manual_seed(0)))
    return model


@pytest.mark.parametrize("peft_config", [None, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")])
def test_first_loss_is_log_two(build, peft_config):
    trainer = build(peft_config=peft_config)
    add_guards(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_plain_trl_starts_elsewhere_when_the_policy_was_changed_in_memory(build, tiny_model):
    trainer = build(model=changed_in_memory(tiny_model))
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - math.log(2)) > 0.01


def test_reference_follows_a_policy_changed_in_memory(build, tiny_model, caplog):
    policy = changed_in_memory(tiny_model)
    start = copy.deepcopy(policy.state_dict())
    trainer = build(model=policy)
    add_guards(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert "The policy was changed after it was loaded" in caplog.text
    reference = trainer.accelerator.unwrap_model(trainer.ref_model).state_dict()
    assert all(torch.equal(reference[name], value) for name, value in start.items())
    weight = "lm_head.weight"
    assert not torch.equal(trainer.model.state_dict()[weight], start[weight])


def test_reference_is_left_alone_when_it_is_the_start(build):
    assert start_reference_at_policy(build()) is False


@pytest.mark.parametrize("loss_type", [["sigmoid"], ["ipo"], ["sigmoid", "sft"]])
def test_a_wrong_reference_ends_the_run_before_the_first_update(build, tiny_model, loss_type):
    trainer = build(ref_model=changed_in_memory(tiny_model), loss_type=loss_type)
    start = copy.deepcopy(trainer.model.state_dict())
    add_guards(trainer)
    trainer.ref_model.load_state_dict(changed_in_memory(tiny_model).state_dict())  # behind the guard's back
    with pytest.raises(WrongReferenceError, match="does not start at the reference model"):
        trainer.train()
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in start.items())


def test_a_reference_given_on_purpose_is_left_alone(build, tiny_model):
    trainer = build(ref_model=changed_in_memory(tiny_model))
    add_guards(trainer, reference_is_start=False)
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - math.log(2)) > 0.01


def test_trained_weights_become_float32(build, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    trainer = build(model=model)
    add_guards(trainer)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.fixture
def quantised(tiny_model):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        tiny_model, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": "cpu"}
    )


@pytest.mark.parametrize("shift", [0.0, 1e-5, 3e-3])
def test_a_reference_that_is_slightly_off_is_noticed(build, tiny_model, shift):
    """The smallest of the shifts that must be noticed moves the log-probs by some hundredths of a nat."""
    trainer = build()
    add_guards(trainer)
    with torch.no_grad():
        direction = torch.randn(trainer.ref_model.lm_head.weight.shape, generator=torch.manual_seed(0))
        trainer.ref_model.lm_head.weight.add_(shift * direction)
    if shift < 1e-3:
        trainer.train()
    else:
        with pytest.raises(WrongReferenceError):
            trainer.train()


def test_full_fine_tuning_of_16_bit_weights_starts_at_log_two(build, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    trainer = build(model=model, beta=0.5)
    assert trainer.ref_model.dtype == torch.bfloat16
    add_guards(trainer)
    assert trainer.accelerator.unwrap_model(trainer.ref_model).dtype == torch.float32
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


LORA = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True},
        {"bf16": True, "precompute_ref_log_probs": True},
        {"label_smoothing": 0.1},
        {"precompute_ref_log_probs": True},
        {"neftune_noise_alpha": 5.0},
        {"disable_dropout": False, "peft_config": LoraConfig(**LORA.to_dict() | {"lora_dropout": 0.5})},
        {"sync_ref_model": True, "ref_model_sync_steps": 1},
    ],
    ids=str,
)
def test_the_guard_does_not_fire_on_a_right_reference(build, settings, caplog):
    trainer = build(**settings)
    add_guards(trainer)
    trainer.train()
    assert trainer.state.global_step == 1
    assert "has moved" not in caplog.text


@pytest.mark.parametrize("factor", [0.97, 1.1])
@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"precompute_ref_log_probs": True}], ids=str)
def test_a_reference_that_moves_both_sides_alike_is_noticed(build, tiny_model, pairs, factor, settings):
    """Chosen and rejected say the same but for one letter, so the loss stays at ln 2 to three digits."""
    alike = pairs.map(lambda pair: {"rejected": say("assistant", pair["chosen"][0]["content"].replace("good", "goof"))})
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        other.lm_head.weight *= 20
    policy = copy.deepcopy(other)
    with torch.no_grad():
        other.lm_head.weight *= factor
    trainer = build(model=policy, ref_model=other, train_dataset=alike, beta=0.001, **settings)
    trainer.add_callback(ReferenceGuard(trainer))
    with pytest.raises(WrongReferenceError, match="log-probs differ by"):
        trainer.train()
    trainer.callback_handler.callbacks.pop()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_weights_outside_the_adapter_are_refused_and_a_reference_that_moves_is_noticed(build, caplog):
    trainer = build(peft_config=LORA, learning_rate=0.1)
    trainer.model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(RecipeError, match=r"1 weights are trained outside the LoRA adapter \(.*model.norm.weight"):
        add_guards(trainer)
    trainer.add_callback(ReferenceGuard(trainer))
    trainer.train()
    assert "The reference model has moved by" in caplog.text


@pytest.mark.parametrize("beside", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4]}], ids=str)
def test_what_an_adapter_switches_off_with_itself_is_trained(build, beside, caplog):
    trainer = build(peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **beside))
    add_guards(trainer)
    trainer.train()
    assert "has moved" not in caplog.text


def test_a_model_of_nan_is_not_called_a_wrong_reference(build, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    trainer = build(model=model, ref_model=copy.deepcopy(model))
    add_guards(trainer)
    with pytest.raises(UnhealthyRunError, match="NaN or infinite before the first update"):
        trainer.train()


def test_lora_weights_on_a_4_bit_base_are_trained_in_float32(quantised, build):
    trainer = build(model=quantised, peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in trained.values()} == {torch.bfloat16}  # TRL's cast; the guard is needed
    add_guards(trainer)
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    assert {weight.dtype for weight in before.values()} == {torch.float32}
    trainer.train()
    moved = {name for name, weight in trained.items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in trained if "lora_B" in name}  # A has no gradient while B is zero


def test_gradients_pass_a_4_bit_base_after_an_evaluation(quantised, build):
    trainer = build(model=quantised, peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    add_guards(trainer)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])

    def gradients():
        trainer.model.train()
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, batch).backward()
        return {name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}

    before = gradients()
    trainer.model.eval()
    with torch.no_grad():
        trainer.compute_loss(trainer.model, batch)
    after = gradients()
    assert any(gradient.abs().sum() > 0 for name, gradient in before.items() if "layers.0" in name)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_precomputed_log_probs_of_another_model_are_refused_under_lora_too(build, pairs):
    """The base in memory is right; the log-probs in the dataset's columns are what the loss compares with."""
    wrong = pairs.add_column("ref_chosen_logps", [-1.0] * 8).add_column("ref_rejected_logps", [-2.0] * 8)
    trainer = build(peft_config=LORA, precompute_ref_log_probs=True, train_dataset=pairs)
    add_guards(trainer)
    columns = trainer.train_dataset.remove_columns(["ref_chosen_logps", "ref_rejected_logps"])
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        columns = columns.add_column(name, wrong[name][:])
    trainer.train_dataset = columns
    with pytest.raises(WrongReferenceError, match="log-probs differ by"):
        trainer.train()


def test_a_reference_is_compared_on_the_same_pairs_after_a_resume_with_smaller_batches(build, caplog):
    first = build(peft_config=LORA)
    add_guards(first)
    first.train()
    kept = next(log[ReferenceGuard.KEPT] for log in first.state.log_history if ReferenceGuard.KEPT in log)
    resumed = build(peft_config=LORA)
    resumed.args.per_device_train_batch_size = 1
    guard = ReferenceGuard(resumed)
    resumed.state.global_step, resumed.state.log_history = 1, first.state.log_history
    guard.on_train_begin(resumed.args, resumed.state, None)
    assert guard.at_start == kept
    assert guard.moved() is None
    with torch.no_grad():
        resumed.model.base_model.model.model.norm.weight.mul_(3)
    assert "has moved" in guard.moved()


def test_sigterms_that_come_together_are_one_and_a_later_one_ends_the_run_at_once():
    """A cluster signals every process, and the launcher passes its own signal on."""
    callback = InterruptCallback()
    for _ in range(3):
        callback._handle(signal.SIGTERM, None)
    assert callback.signal == signal.SIGTERM
    with pytest.raises(SystemExit) as ended:
        callback._handle(signal.SIGINT, None)
    assert ended.value.code == 130
    callback.since -= callback.TOGETHER
    with pytest.raises(SystemExit) as ended:
        callback._handle(signal.SIGTERM, None)
    assert ended.value.code == 143
