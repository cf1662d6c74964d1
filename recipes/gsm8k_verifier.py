"""A verifier of GSM8K: a reward model that tells right solutions of a question from wrong ones (Cobbe et al. 2021).

Needs: math-verify (pip install 'dpo-recipes[maths]'), marked solutions (OpenAI's example_model_solutions.jsonl, or your
own: docs/verifier.md), and a GPU with 24 GB for Qwen2.5-1.5B at 1,024 tokens (an estimate: 3 GB of frozen bfloat16
weights, the rest activations; it has not been measured on such a card). The run leaves a full model with one output.

    make train RECIPE=gsm8k-verifier
    make train RECIPE=gsm8k-verifier ARGS="--dataset_name outputs/gsm8k_samples.jsonl --output_dir outputs/own_verifier"
    make train RECIPE=gsm8k-verifier PROFILE=cpu ARGS="--model_name_or_path SMALL --max_length 256 --max_steps 100"

Make it yours: `dpo-recipes copy gsm8k-verifier`, then change RECIPE, and `load_questions` for solutions of your own.
"""

from datasets import DatasetDict
from dpo_recipes.dataset_adapters import marked_solutions, right_against_wrong
from dpo_recipes.loading import load_rows, split_pairs
from dpo_recipes.preflight import prepare_pairs
from dpo_recipes.presets import LORA
from dpo_recipes.recipe import RecipeArguments, load_tokenizer, parse_recipe, run
from dpo_recipes.runs import finish_run, start_run
from trl import ModelConfig, RewardConfig, RewardTrainer, get_peft_config, get_quantization_config

RECIPE = dict(
    # Data
    dataset_name="example_model_solutions.jsonl",  # OpenAI's, of GSM8K's test questions; or your own: docs/verifier.md
    held_out=0.2,  # of the questions: 5 % would be too few for the intervals
    max_length=1024,  # tokens, prompt and completion; oldest turns go first, a completion is never cut
    # Model
    model_name_or_path="Qwen/Qwen2.5-1.5B-Instruct",
    **LORA,
    lora_task_type="SEQ_CLS",  # the score head is trained in full, and saved
    # Optimisation
    center_rewards_coefficient=0.01,  # pulls the mean score to 0 (Eisenstein et al. 2023)
    learning_rate=1e-4,  # higher than for DPO: the score head starts from random weights
    lr_scheduler_type="cosine",
    warmup_steps=0.1,  # share of all updates
    num_train_epochs=1,  # a question has up to 8 pairs, so that its solutions are seen several times
    pairs_per_update=64,  # gradient accumulation follows from it
    per_device_train_batch_size=4,  # pairs; the machine's profile may change it
    adam_beta2=0.95,
    weight_decay=0.0,
    # Bookkeeping
    output_dir="outputs/gsm8k_verifier",
    logging_steps=10,  # updates
    eval_strategy="steps",
    eval_steps=200,
    save_steps=200,
    save_total_limit=3,
    report_to="none",  # wandb, trackio, tensorboard
)


def load_pairs(script_args: RecipeArguments) -> DatasetDict:
    """A right and a wrong solution of one question in each pair; no question is in both splits."""
    return right_against_wrong(load_questions(script_args))


def load_questions(script_args: RecipeArguments) -> DatasetDict:
    """Questions with marked solutions, in a train and a test split that share no question."""
    marked = {split: marked_solutions(rows) for split, rows in load_rows(script_args).items()}
    return split_pairs(marked, script_args.held_out)


def main() -> None:
    """Parses the arguments, loads the data, builds the trainer, trains and saves."""
    script_args, training_args, model_args = parse_recipe(RECIPE, (RecipeArguments, RewardConfig, ModelConfig))
    tokenizer = load_tokenizer(model_args, training_args)
    pairs = prepare_pairs(load_pairs, script_args, training_args, tokenizer)
    questions = load_questions(script_args)[
        "test"
    ]  # also those without a right or a wrong solution, which make no pair

    trainer = RewardTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    start_run(trainer, script_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    finish_run(trainer, script_args, merge=True, candidates=questions)  # best of N, against chance and a majority vote


if __name__ == "__main__":
    run(main)
