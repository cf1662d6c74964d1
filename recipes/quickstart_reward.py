"""The reward model of the quickstart: learns from preference pairs to score any answer about its medicines.

Needs: a CPU and about a minute, after two for `quickstart_sft`, which is run first; neither a GPU nor the network. The
run leaves a full model with one output, the score, which `quickstart_ppo` and `quickstart_rloo` raise.

    make train RECIPE=quickstart-reward
    make train RECIPE=quickstart-reward ARGS="--num_train_epochs 1 --output_dir outputs/weaker_reward"
    make train RECIPE=quickstart-ppo

Make it yours: start from hh-rlhf-reward instead, which reads a dataset and a real model.
"""

from datasets import DatasetDict
from dpo_recipes import playground
from dpo_recipes.preflight import prepare_pairs
from dpo_recipes.presets import LORA
from dpo_recipes.recipe import RecipeArguments, load_tokenizer, parse_recipe, run
from dpo_recipes.runs import finish_run, start_run
from trl import ModelConfig, RewardConfig, RewardTrainer, get_peft_config, get_quantization_config

RECIPE = dict(
    # Data
    dataset_name="playground",
    max_length=256,  # tokens, prompt and completion
    # Model
    model_name_or_path="outputs/quickstart_sft",  # made by the recipe of that name
    **LORA,
    lora_task_type="SEQ_CLS",  # the score head is trained in full, and saved
    # Optimisation
    center_rewards_coefficient=0.01,  # pulls the mean score to 0 (Eisenstein et al. 2023)
    learning_rate=1e-3,  # a model this small takes a high learning rate
    lr_scheduler_type="cosine",
    warmup_steps=0.1,  # share of all updates
    num_train_epochs=2,
    pairs_per_update=16,  # gradient accumulation follows from it
    per_device_train_batch_size=16,  # pairs; the machine's profile may change it
    adam_beta2=0.95,
    weight_decay=0.0,
    # Bookkeeping
    output_dir="outputs/quickstart_reward",
    logging_steps=4,  # updates
    eval_strategy="steps",
    eval_steps=44,
    save_steps=44,
    save_total_limit=3,
    report_to="none",  # wandb, trackio, tensorboard
)


def load_pairs(script_args: RecipeArguments) -> DatasetDict:
    """Preference pairs in a train and a test split that share no prompt."""
    return playground.load_pairs(script_args.dataset_name)


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
    finish_run(trainer, script_args, merge=True, strata="faults")  # accuracy by fault of the rejected completion


if __name__ == "__main__":
    run(main)
