"""The reward model of PPO and RLOO, trained on the pairs of Anthropic's helpful and harmless dialogues (hh-rlhf).

Needs: a GPU with 24 GB for Qwen2.5-1.5B at 1,024 tokens (an estimate: 3 GB of frozen bfloat16 weights, the rest
activations; it has not been measured on such a card). The run leaves a full model with one output, the score;
the LoRA adapter is merged into it.

    make train RECIPE=hh-rlhf-reward
    make train RECIPE=hh-rlhf-reward ARGS="--load_in_4bit true --dtype bfloat16 --output_dir outputs/four_bit_reward"
    make train RECIPE=hh-rlhf-reward PROFILE=cpu ARGS="--model_name_or_path SMALL --max_length 256 --max_steps 100"

Make it yours: `dpo-recipes copy hh-rlhf-reward`, then change RECIPE, and `load_pairs` for data of your own.
"""

from datasets import DatasetDict
from dpo_recipes.dataset_adapters import hh_rlhf
from dpo_recipes.loading import load_rows, split_pairs
from dpo_recipes.preflight import prepare_pairs
from dpo_recipes.presets import LORA
from dpo_recipes.recipe import RecipeArguments, load_tokenizer, parse_recipe, run
from dpo_recipes.runs import finish_run, start_run
from trl import ModelConfig, RewardConfig, RewardTrainer, get_peft_config, get_quantization_config

RECIPE = dict(
    # Data
    dataset_name="Anthropic/hh-rlhf",  # or a file, a folder, NAME:20000 for a sample
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
    num_train_epochs=1,  # a second epoch mostly overfits
    pairs_per_update=64,  # gradient accumulation follows from it
    per_device_train_batch_size=4,  # pairs; the machine's profile may change it
    adam_beta2=0.95,
    weight_decay=0.0,
    # Bookkeeping
    output_dir="outputs/hh_rlhf_reward",
    logging_steps=10,  # updates
    eval_strategy="steps",
    eval_steps=200,
    save_steps=200,
    save_total_limit=3,
    report_to="none",  # wandb, trackio, tensorboard
)


def load_pairs(script_args: RecipeArguments) -> DatasetDict:
    """Preference pairs in a train and a test split that share no prompt."""
    return split_pairs({split: hh_rlhf(rows) for split, rows in load_rows(script_args).items()})


def main() -> None:
    """Parses the arguments, loads the data, builds the trainer, trains and saves."""
    script_args, training_args, model_args = parse_recipe(RECIPE, (RecipeArguments, RewardConfig, ModelConfig))
    tokenizer = load_tokenizer(model_args, training_args)
    pairs = prepare_pairs(load_pairs, script_args, training_args, tokenizer)

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
    finish_run(trainer, script_args, merge=True)


if __name__ == "__main__":
    run(main)
