"""DPO with a LoRA adapter makes a small pharmacy chatbot safe: the whole of preference tuning, in minutes on a CPU.

Needs: a CPU and about one minute, after two for `quickstart_sft`, which is run first; neither a GPU nor the network.
The medicines are fictional. An exact reward scores every answer; the last table shows it before and after training.

    make train
    make train ARGS="--beta 0.5 --output_dir outputs/beta05"
    make train ARGS="--loss_weights 1 0 --output_dir outputs/broken"   # good accuracy, bad text

Make it yours: start from hh-rlhf-lora instead, which reads a dataset and a real model.
"""

from datasets import DatasetDict
from dpo_recipes import playground
from dpo_recipes.preflight import prepare_pairs
from dpo_recipes.presets import LORA
from dpo_recipes.recipe import RecipeArguments, load_tokenizer, parse_recipe, run
from dpo_recipes.runs import finish_run, start_run
from dpo_recipes.shared_prefix import SharedPrefixDPOTrainer
from trl import DPOConfig, ModelConfig, get_peft_config, get_quantization_config

RECIPE = dict(
    # Data
    dataset_name="playground",
    max_length=256,  # tokens, prompt and completion
    # Model
    model_name_or_path="outputs/quickstart_sft",  # made by the recipe of that name
    **LORA,
    # Optimisation
    beta=0.1,  # higher stays closer to the reference model
    loss_type=["sigmoid", "sft"],  # sft keeps the text intact at a learning rate this high
    loss_weights=[1.0, 5.0],
    learning_rate=1.5e-3,  # a model this small takes a high learning rate
    lr_scheduler_type="cosine",
    warmup_steps=0.1,  # share of all updates
    num_train_epochs=2,
    pairs_per_update=16,  # gradient accumulation follows from it
    per_device_train_batch_size=16,  # pairs; the machine's profile may change it
    adam_beta2=0.95,
    weight_decay=0.0,
    # Bookkeeping
    output_dir="outputs/quickstart",
    logging_steps=4,  # updates
    eval_strategy="steps",
    eval_steps=44,
    save_steps=44,
    save_total_limit=3,
    report_to="none",  # wandb, trackio, tensorboard
)


judge = playground.reward  # exact, so that a comparison trains no reward model to judge


def load_pairs(script_args: RecipeArguments) -> DatasetDict:
    """Preference pairs in a train and a test split that share no prompt."""
    return playground.load_pairs(script_args.dataset_name)


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
    finish_run(
        trainer,
        script_args,
        strata="faults",  # accuracy by fault of the rejected completion
        score=playground.scores,
        prompts=playground.evaluation_prompts(),
        max_new_tokens=playground.MAX_NEW_TOKENS,
        temperatures=(0.7, 0.0),
    )


if __name__ == "__main__":
    run(main)
