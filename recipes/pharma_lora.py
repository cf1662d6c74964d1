"""DPO with a LoRA adapter on pairs about pharmacy questions: the guides' pharmacy chatbot, with a real base model.

Not medical advice, not clinically reviewed. The 225 pairs were written for this project, to show preference tuning on
a domain of one's own. No model that was trained on them is fit to advise anyone. Data card of
the pairs: recipes/data/pharma/README.md.

Needs: a GPU with 24 GB for Qwen2.5-1.5B at 512 tokens (an estimate: 3 GB of frozen bfloat16 weights, the rest
activations; it has not been measured on such a card). The first run downloads the model, but no pairs.

    make train RECIPE=pharma-lora
    make train RECIPE=pharma-lora ARGS="--beta 0.3 --output_dir outputs/beta03"
    make train RECIPE=pharma-lora PROFILE=cpu ARGS="--model_name_or_path SMALL --max_length 256 --max_steps 100"

Make it yours: `dpo-recipes copy pharma-lora`, then change RECIPE, and `dataset_name` for pairs of your own.
"""

from datasets import DatasetDict
from dpo_recipes.catalog import recipe_folders
from dpo_recipes.dataset_adapters import preference_jsonl
from dpo_recipes.loading import load_rows, split_pairs
from dpo_recipes.preflight import prepare_pairs
from dpo_recipes.presets import LORA
from dpo_recipes.recipe import RecipeArguments, load_tokenizer, parse_recipe, run
from dpo_recipes.runs import finish_run, start_run
from dpo_recipes.shared_prefix import SharedPrefixDPOTrainer
from trl import DPOConfig, ModelConfig, get_peft_config, get_quantization_config

RECIPE = dict(
    # Data
    dataset_name=str(recipe_folders()[-1] / "data" / "pharma"),  # comes with the package; or a file, a folder
    max_length=512,  # tokens, prompt and completion; oldest turns go first, a completion is never cut
    # Model
    model_name_or_path="Qwen/Qwen2.5-1.5B-Instruct",
    **LORA,
    # Optimisation
    beta=0.1,  # higher stays closer to the reference model
    learning_rate=2e-5,  # higher than with 161,000 pairs, since there are some fifty updates in all
    lr_scheduler_type="cosine",
    warmup_steps=0.1,  # share of all updates
    num_train_epochs=4,  # so few pairs need several epochs; watch the held-out accuracy
    pairs_per_update=16,  # gradient accumulation follows from it
    per_device_train_batch_size=4,  # pairs; the machine's profile may change it
    adam_beta2=0.95,
    weight_decay=0.0,
    # Bookkeeping
    output_dir="outputs/pharma_lora",
    logging_steps=5,  # updates
    eval_strategy="steps",
    eval_steps=13,  # updates: one epoch
    save_steps=13,
    save_total_limit=3,
    report_to="none",  # wandb, trackio, tensorboard
)


def load_pairs(script_args: RecipeArguments) -> DatasetDict:
    """Preference pairs in a train and a test split that share no prompt."""
    return split_pairs({split: preference_jsonl(rows) for split, rows in load_rows(script_args).items()})


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
