"""A folder like that of a run: a LoRA adapter that answers otherwise, a tokenizer with a template of its own."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def save_lora_run(folder, start, std=0.2):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(start)
    lora = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    lora.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.chat_template += "{# the run's #}"
    tokenizer.save_pretrained(folder)
    return folder
