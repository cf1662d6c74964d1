"""Supervised fine-tuning of the quickstart's model: a million random weights learn to answer about fictional medicines.

Needs: a CPU and about two minutes; neither a GPU nor the network. Half of the training completions are safe, half
unsafe, so that the model gives in to pressure about half of the time. `quickstart` runs this recipe first and starts
from its model.

    make train RECIPE=quickstart-sft
    make train RECIPE=quickstart-sft ARGS="--seed 1 --overwrite true"
    make train RECIPE=quickstart-sft ARGS="--num_train_epochs 2 --output_dir outputs/longer"

Make it yours: start from hh-rlhf-sft instead, which reads a dataset and a real model.
"""

from datasets import DatasetDict
from dpo_recipes import playground
from dpo_recipes.preflight import prepare_pairs
from dpo_recipes.recipe import RecipeArguments, load_tokenizer, parse_recipe, run
from dpo_recipes.runs import finish_run, start_run
from trl import ModelConfig, SFTConfig, SFTTrainer

RECIPE = dict(
    # Data
    dataset_name="playground",
    max_length=256,  # tokens, prompt and completion
    # Optimisation
    learning_rate=3e-3,  # a small model with random weights takes a high learning rate
    lr_scheduler_type="cosine",
    warmup_steps=0.05,  # share of all updates
    num_train_epochs=1,
    pairs_per_update=16,  # answers; gradient accumulation follows from it
    per_device_train_batch_size=16,  # answers
    train_sampling_strategy="group_by_length",  # answers of similar length in one batch, so that little is padded
    adam_beta2=0.95,
    weight_decay=0.0,
    # Bookkeeping
    output_dir="outputs/quickstart_sft",
    logging_steps=50,  # updates
    eval_strategy="steps",
    eval_steps=400,
    save_steps=400,
    save_total_limit=3,
    report_to="none",  # wandb, trackio, tensorboard
)


def load_pairs(script_args: RecipeArguments) -> DatasetDict:
    """Preference pairs in a train and a test split that share no prompt."""
    return playground.load_pairs(script_args.dataset_name, train_pairs=6800, seed=1)


def main() -> None:
    """Parses the arguments, loads the data, builds the trainer, trains and saves."""
    script_args, training_args = parse_recipe(RECIPE, (RecipeArguments, SFTConfig))
    model = playground.build_model(seed=training_args.seed)
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(model)), training_args)
    pairs = prepare_pairs(load_pairs, script_args, training_args, tokenizer)

    trainer = SFTTrainer(
        model=str(model),
        args=training_args,
        train_dataset=playground.both_answers(pairs["train"]),
        eval_dataset=playground.both_answers(pairs["test"]),
        processing_class=tokenizer,
    )
    start_run(trainer, script_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    finish_run(trainer, script_args)


if __name__ == "__main__":
    run(main)
