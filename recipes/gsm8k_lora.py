"""DPO with a LoRA adapter on right against wrong solutions of GSM8K: those of your own model, or OpenAI's.

Needs: math-verify (pip install 'dpo-recipes[maths]'), marked solutions or pairs (docs/verifier.md says how your model
writes them and `check` marks them), and a GPU with 24 GB for Qwen2.5-1.5B at 1,024 tokens (an estimate: 3 GB of frozen
bfloat16 weights, the rest activations; it has not been measured on such a card).

    make train RECIPE=gsm8k-lora
    make train RECIPE=gsm8k-lora ARGS="--dataset_name outputs/gsm8k_pairs.jsonl --output_dir outputs/gsm8k_own"
    make train RECIPE=gsm8k-lora PROFILE=cpu ARGS="--model_name_or_path SMALL --max_length 256 --max_steps 100"

Make it yours: `dpo-recipes copy gsm8k-lora`, then change RECIPE, and `check` for another kind of answers.
"""

from datasets import DatasetDict
from dpo_recipes.dataset_adapters import is_right, recognise
from dpo_recipes.loading import load_rows, split_pairs
from dpo_recipes.preflight import prepare_pairs
from dpo_recipes.presets import LORA
from dpo_recipes.recipe import RecipeArguments, load_tokenizer, parse_recipe, run
from dpo_recipes.runs import finish_run, start_run
from dpo_recipes.shared_prefix import SharedPrefixDPOTrainer
from trl import DPOConfig, ModelConfig, get_peft_config, get_quantization_config

RECIPE = dict(
    # Data
    dataset_name="example_model_solutions.jsonl",  # OpenAI's, of GSM8K's test questions; or your own: docs/verifier.md
    max_length=1024,  # tokens, prompt and completion; oldest turns go first, a completion is never cut
    # Model
    model_name_or_path="Qwen/Qwen2.5-1.5B-Instruct",
    **LORA,
    # Optimisation
    beta=0.1,  # higher stays closer to the reference model
    learning_rate=5e-6,  # LoRA takes about ten times the learning rate of full fine-tuning
    lr_scheduler_type="cosine",
    warmup_steps=0.1,  # share of all updates
    num_train_epochs=1,  # a second epoch mostly overfits
    pairs_per_update=64,  # gradient accumulation follows from it
    per_device_train_batch_size=4,  # pairs; the machine's profile may change it
    adam_beta2=0.95,
    weight_decay=0.0,
    # Bookkeeping
    output_dir="outputs/gsm8k_lora",
    logging_steps=10,  # updates
    eval_strategy="steps",
    eval_steps=200,
    save_steps=200,
    save_total_limit=3,
    report_to="none",  # wandb, trackio, tensorboard
)


def load_pairs(script_args: RecipeArguments) -> DatasetDict:
    """Preference pairs in a train and a test split that share no prompt."""
    dataset = load_rows(script_args)
    dataset_adapter = recognise(dataset["train"])  # pairs as they are, or right against wrong solutions
    return split_pairs({split: dataset_adapter(rows) for split, rows in dataset.items()})


def check(prompt: list[dict[str, str]], answer: str, reference: str) -> bool | None:
    """The judge of `sample`: True if the answer ends in the reference's number, None if the reference has none."""
    return is_right(answer, reference)


def main() -> None:
    """Parses the arguments, loads the data, builds the trainer, trains and saves."""
    script_args, training_args, model_args = parse_recipe(RECIPE, (RecipeArguments, DPOConfig, ModelConfig))
    tokenizer = load_tokenizer(model_args, training_args)
    pairs = prepare_pairs(load_pairs, script_args, training_args, tokenizer)

    trainer = SharedPrefixDPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        shared_prefix=script_args.shared_prefix,
    )
    start_run(trainer, script_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    finish_run(trainer, script_args)


if __name__ == "__main__":
    run(main)
