"""A model that answers in a dozen words, taught within seconds: what goes wrong with it goes wrong for a reason."""

import random

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

THINGS = [f"thing{number}" for number in range(12)]
FILL = ["really", "very", "so"]
WORDS = ["<pad>", "<eos>", "ask", "answer", "is", "good", "bad", "fine", "poor", "junk", *FILL, *THINGS]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}answer {% generation %}{{ m['content'] }} {{ eos_token }}"
    "{% endgeneration %}{% else %}ask {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}answer {% endif %}"
)
MACHINE = dict(use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", disable_tqdm=True)
SMALL = dict(per_device_train_batch_size=16, logging_steps=1, lr_scheduler_type="constant", save_strategy="no")
FEW = dict(max_steps=30, eval_strategy="steps", eval_steps=10)


def answer(thing, good, rng, length=None):
    """`thing3 is very so good fine`: some words in between, and two that judge it."""
    fill = rng.choices(FILL, k=rng.randint(1, 5) if length is None else length)
    return " ".join([thing, "is", *fill, *(["good", "fine"] if good else ["bad", "poor"])])


def write_pairs(count, *, seed=0, chosen=None, rejected=None):
    """Pairs of a good and a bad answer of like length, or of what `chosen` and `rejected` make of (thing, rng)."""
    rng = random.Random(seed)
    make = {"chosen": chosen or (lambda *both: answer(both[0], True, both[1]))}
    make["rejected"] = rejected or (lambda *both: answer(both[0], False, both[1]))
    rows = []
    for _ in range(count):
        thing = rng.choice(THINGS)
        asked = " ".join([*rng.choices(FILL, k=rng.randint(0, 6)), thing])
        said = {side: [{"role": "assistant", "content": write(thing, rng)}] for side, write in make.items()}
        rows.append({"prompt": [{"role": "user", "content": asked}], **said})
    return Dataset.from_list(rows)


def shuffle_labels(pairs, *, seed=0):
    """Chosen and rejected exchanged in half of the pairs."""
    rng = random.Random(seed)
    rows = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if rng.random() < 0.5 else row for row in pairs
    ]
    return Dataset.from_list(rows)


def teach(folder):
    """The folder of a model that gives good and bad answers by halves."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    tokens = dict(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, bos_token_id=None)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **tokens, num_key_value_heads=4, max_position_embeddings=128))
    trainer = sft(model, folder / "sft", write_pairs(400), tokenizer=tokenizer, max_steps=150, logging_steps=50)
    trainer.train()
    trainer.save_model(str(folder))
    return folder


def sft(start, output_dir, pairs, *, tokenizer=None, **settings):
    """A trainer of both answers of the pairs."""
    sides = [(pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")]
    rows = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in sides])
    args = SFTConfig(output_dir=str(output_dir), **MACHINE, **SMALL | dict(learning_rate=5e-3) | settings)
    return _quiet(SFTTrainer(start, args, train_dataset=rows, processing_class=tokenizer))


def dpo(start, output_dir, pairs, *, model=None, ref_model=None, peft_config=None, **settings):
    """A trainer of the taught model."""
    args = DPOConfig(output_dir=str(output_dir), **MACHINE, **SMALL | FEW | dict(learning_rate=3e-4) | settings)
    model = AutoModelForCausalLM.from_pretrained(start) if model is None else model
    data = dict(train_dataset=pairs, eval_dataset=write_pairs(64, seed=9))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
    return _quiet(DPOTrainer(model, ref_model, args, **data, processing_class=tokenizer, peft_config=peft_config))


def reward(start, output_dir, pairs, **settings):
    """A trainer of a reward model from the taught model."""
    args = RewardConfig(output_dir=str(output_dir), **MACHINE, **SMALL | FEW | dict(learning_rate=1e-3) | settings)
    data = dict(train_dataset=pairs, eval_dataset=write_pairs(64, seed=9))
    return _quiet(
        RewardTrainer(str(start), args, **data, processing_class=PreTrainedTokenizerFast.from_pretrained(start))
    )


def _quiet(trainer):
    trainer.remove_callback(PrinterCallback)
    return trainer
