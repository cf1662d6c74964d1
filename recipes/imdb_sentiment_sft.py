"""Supervised fine-tuning of GPT-2-large on IMDb's reviews: stage 1 of the DPO paper's sentiment task (section 6.1).

Needs: a GPU with 24 GB at 512 tokens (an estimate; it has not been run on one). The run leaves a full model, with the
LoRA adapter merged into it. The next step, in docs/imdb_sentiment.md, samples this model's continuations of reviews
and ranks them by a classifier. The other imdb_sentiment recipes learn from these pairs.

    make train RECIPE=imdb-sentiment-sft
    make train RECIPE=imdb-sentiment-sft ARGS="--dataset_name stanfordnlp/imdb:5000 --output_dir outputs/small"
    make train RECIPE=imdb-sentiment-sft PROFILE=cpu ARGS="--model_name_or_path SMALL --max_length 256 --max_steps 100"

Make it yours: `dpo-recipes copy imdb-sentiment-sft`, then change RECIPE, and `load_pairs` for texts of your own.
"""

from datasets import DatasetDict
from dpo_recipes.dataset_adapters import plain_text, prompts_alone
from dpo_recipes.loading import load_rows, split_pairs
from dpo_recipes.preflight import prepare_prompts
from dpo_recipes.presets import LORA
from dpo_recipes.recipe import RecipeArguments, load_tokenizer, parse_recipe, run
from dpo_recipes.runs import finish_run, start_run
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

RECIPE = dict(
    # Data
    dataset_name="stanfordnlp/imdb",  # or a file, a folder, NAME:20000 for a sample
    columns="prompt=text",  # a review is read as a prompt without completions
    max_length=512,  # tokens, the end token included; longer reviews are dropped and counted
    # Model
    model_name_or_path="openai-community/gpt2-large",
    **LORA,
    # Optimisation
    learning_rate=1e-4,  # LoRA takes about ten times the learning rate of full fine-tuning
    lr_scheduler_type="cosine",
    warmup_steps=0.1,  # share of all updates
    num_train_epochs=1,  # as in the paper
    pairs_per_update=64,  # reviews; gradient accumulation follows from it
    per_device_train_batch_size=4,  # reviews; the machine's profile may change it
    adam_beta2=0.95,
    weight_decay=0.0,
    # Bookkeeping
    output_dir="outputs/imdb_sentiment_sft",
    logging_steps=10,  # updates
    eval_strategy="steps",
    eval_steps=200,
    save_steps=200,
    save_total_limit=3,
    report_to="none",  # wandb, trackio, tensorboard
)


def load_pairs(script_args: RecipeArguments) -> DatasetDict:
    """Reviews as prompts with placeholder completions, in a train and a test split that share no review."""
    return split_pairs({split: plain_text(prompts_alone(rows)) for split, rows in load_rows(script_args).items()})


def main() -> None:
    """Parses the arguments, loads the data, builds the trainer, trains and saves."""
    script_args, training_args, model_args = parse_recipe(RECIPE, (RecipeArguments, SFTConfig, ModelConfig))
    tokenizer = load_tokenizer(model_args, training_args)
    texts = prepare_prompts(load_pairs, script_args, training_args, tokenizer).rename_column("prompt", "text")

    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=texts["train"],
        eval_dataset=texts["test"],
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    start_run(trainer, script_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    finish_run(trainer, script_args, merge=True)


if __name__ == "__main__":
    run(main)
