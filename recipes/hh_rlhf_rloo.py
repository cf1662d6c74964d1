r"""RLOO with a LoRA adapter against a reward model of Anthropic's helpful and harmless dialogues (hh-rlhf).

Needs: a GPU with 80 GB for Qwen2.5-1.5B (an estimate: 3 GB each of frozen bfloat16 weights for policy and reward model,
8 GB of keys and values while 256 answers are sampled, the rest activations; it has not been measured). This is TRL's
RLOOTrainer (Ahmadian et al. 2024), not PPO: one advantage an answer, no critic, one update a rollout. A missing
reward model is trained first.

    make train RECIPE=hh-rlhf-rloo
    make train RECIPE=hh-rlhf-rloo ARGS="--reward_model_name_or_path NAME_OF_A_REWARD_MODEL --output_dir outputs/rloo"
    make train RECIPE=hh-rlhf-rloo PROFILE=cpu ARGS="--model_name_or_path SMALL --max_steps 8 \
      --reward_model_name_or_path ITS_JUDGE --max_prompt_length 128 --max_completion_length 128"

Make it yours: `dpo-recipes copy hh-rlhf-rloo`, then change RECIPE, and `load_pairs` for data of your own.
"""

from datasets import DatasetDict
from dpo_recipes.dataset_adapters import hh_rlhf
from dpo_recipes.loading import load_rows, split_pairs
from dpo_recipes.ppo import RLOOTrainer
from dpo_recipes.preflight import prepare_prompts
from dpo_recipes.presets import LORA
from dpo_recipes.recipe import OnlineArguments, load_tokenizer, parse_recipe, run
from dpo_recipes.runs import finish_run, start_run
from trl import ModelConfig, RLOOConfig, get_peft_config, get_quantization_config

RECIPE = dict(
    # Data
    dataset_name="Anthropic/hh-rlhf",  # or a file, a folder, NAME:20000 for a sample
    max_prompt_length=768,  # tokens; oldest turns go first
    max_completion_length=256,  # tokens
    eval_pairs=128,  # prompts of held-out pairs, answered at every evaluation
    # Model
    model_name_or_path="Qwen/Qwen2.5-1.5B-Instruct",
    reward_model_name_or_path="outputs/hh_rlhf_reward",  # made by the recipe of that name
    **LORA,
    # Optimisation
    beta=0.05,  # KL coefficient; higher stays closer to the reference model
    num_generations=4,  # answers to a prompt: each is compared with the mean of the others
    num_generations_eval=1,
    generation_batch_size=256,  # answers of a rollout
    learning_rate=1e-5,  # LoRA takes about ten times the learning rate of full fine-tuning
    lr_scheduler_type="cosine",
    warmup_steps=0.1,  # share of all updates
    num_train_epochs=1,
    pairs_per_update=256,  # answers; gradient accumulation follows from it
    per_device_train_batch_size=4,  # answers; the machine's profile may change it
    adam_beta2=0.95,
    weight_decay=0.0,
    # Bookkeeping
    output_dir="outputs/hh_rlhf_rloo",
    logging_steps=10,  # updates
    eval_strategy="steps",
    eval_steps=200,
    save_steps=200,
    save_total_limit=3,
    report_to="none",  # wandb, trackio, tensorboard
)


def load_pairs(script_args: OnlineArguments) -> DatasetDict:
    """Preference pairs in a train and a test split that share no prompt; the policy answers their prompts."""
    return split_pairs({split: hh_rlhf(rows) for split, rows in load_rows(script_args).items()})


def main() -> None:
    """Parses the arguments, loads the data, builds the trainer, trains and saves."""
    script_args, training_args, model_args = parse_recipe(RECIPE, (OnlineArguments, RLOOConfig, ModelConfig))
    tokenizer = load_tokenizer(model_args, training_args)
    prompts = prepare_prompts(load_pairs, script_args, training_args, tokenizer)

    trainer = RLOOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=script_args.reward_model_name_or_path,
        args=training_args,
        train_dataset=prompts["train"],
        eval_dataset=prompts["test"],
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    start_run(trainer, script_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    finish_run(trainer, script_args, max_new_tokens=training_args.max_completion_length)


if __name__ == "__main__":
    run(main)
