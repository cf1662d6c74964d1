"""DPO with a LoRA adapter on GPT-2-large for positive film reviews: the DPO paper's sentiment task (section 6.1).

Needs: a GPU with 24 GB (an estimate; it has not been run on one), the model of `imdb_sentiment_sft`, and pairs of that
model's own texts: docs/imdb_sentiment.md has the commands in order and the differences from the paper.

    make train RECIPE=imdb-sentiment-lora
    make train RECIPE=imdb-sentiment-lora ARGS="--sweep beta=0.05,0.1,1,5"
    make compare RECIPE=imdb-sentiment-lora ARGS="--betas 0.05,0.1,1,5"

Make it yours: `dpo-recipes copy imdb-sentiment-lora`, then change RECIPE, and `load_pairs` for data of your own.
"""

from datasets import DatasetDict
from dpo_recipes.dataset_adapters import plain_text
from dpo_recipes.loading import load_rows, split_pairs
from dpo_recipes.preflight import prepare_pairs
from dpo_recipes.presets import LORA
from dpo_recipes.recipe import RecipeArguments, load_tokenizer, parse_recipe, run
from dpo_recipes.runs import finish_run, start_run
from dpo_recipes.shared_prefix import SharedPrefixDPOTrainer
from trl import DPOConfig, ModelConfig, get_peft_config, get_quantization_config

RECIPE = dict(
    # Data
    dataset_name="outputs/imdb_sentiment_pairs.jsonl",  # written by `dpo-recipes sample`: docs/imdb_sentiment.md
    max_length=128,  # tokens, prompt and completion
    # Model
    model_name_or_path="outputs/imdb_sentiment_sft",  # made by the recipe of that name
    **LORA,
    # Optimisation
    beta=0.1,  # higher stays closer to the reference model
    learning_rate=1e-5,  # LoRA takes about ten times the learning rate of full fine-tuning, 1e-6 in the paper
    lr_scheduler_type="cosine",
    warmup_steps=0.1,  # share of all updates
    num_train_epochs=1,  # a second epoch mostly overfits
    pairs_per_update=64,  # gradient accumulation follows from it
    per_device_train_batch_size=4,  # pairs; the machine's profile may change it
    adam_beta2=0.95,
    weight_decay=0.0,
    # Bookkeeping
    output_dir="outputs/imdb_sentiment_lora",
    logging_steps=10,  # updates
    eval_strategy="steps",
    eval_steps=200,
    save_steps=200,
    save_total_limit=3,
    report_to="none",  # wandb, trackio, tensorboard
)


judge = "siebert/sentiment-roberta-large-english"  # exact: the classifier that ranked the pairs


def load_pairs(script_args: RecipeArguments) -> DatasetDict:
    """Preference pairs in a train and a test split that share no prompt."""
    return split_pairs({split: plain_text(rows) for split, rows in load_rows(script_args).items()})


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
