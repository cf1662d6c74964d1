"""Plain TRL against shared prompts, on one batch: what the tests compare, and the tables of docs/shared_prefix.md.

.venv/bin/python tests/helpers/equivalence.py   # writes the tables anew; a few minutes
"""

import copy
import math
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import DPOTrainer

from dpo_recipes.doctor import compute
from dpo_recipes.doctor.compute import ARCHITECTURES, BATCH, ROWS, lora, stir, tiny
from dpo_recipes.shared_prefix.trainer import PLAN, SharedPrefixDPOTrainer

DOCUMENT = Path(__file__).parents[2] / "docs" / "shared_prefix.md"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
METHODS = ["full", "LoRA", "LoRA with modules_to_save", "LoRA from LoRA (ref)", "LoRA on 4 bits"]

LOSSES = {
    "sigmoid": {},
    "hinge": dict(loss_types=["hinge"]),
    "ipo": dict(loss_types=["ipo"]),
    "exo_pair": dict(loss_types=["exo_pair"], label_smoothing=1e-3),
    "nca_pair": dict(loss_types=["nca_pair"]),
    "robust": dict(loss_types=["robust"], label_smoothing=0.1),
    "bco_pair": dict(loss_types=["bco_pair"]),
    "sppo_hard": dict(loss_types=["sppo_hard"]),
    "aot": dict(loss_types=["aot"]),
    "aot_unpaired": dict(loss_types=["aot_unpaired"]),
    "apo_zero": dict(loss_types=["apo_zero"]),
    "apo_down": dict(loss_types=["apo_down"]),
    "discopop": dict(loss_types=["discopop"]),
    "sft": dict(loss_types=["sft"]),
    "sigmoid_norm": dict(loss_types=["sigmoid_norm"]),
    "sigmoid + bco_pair + sft": dict(loss_types=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    "label smoothing": dict(label_smoothing=0.2),
    "forward_kl": dict(f_divergence_type="forward_kl"),
    "js_divergence": dict(f_divergence_type="js_divergence"),
    "alpha_divergence": dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7),
    "ld_alpha": dict(ld_alpha=0.4),
    "WPO weights": dict(use_weighting=True),
}
LOSS_DEFAULTS = dict(loss_types=["sigmoid"], label_smoothing=0.0, f_divergence_type="reverse_kl", ld_alpha=None)
LOSS_DEFAULTS |= dict(use_weighting=False)


@contextmanager
def everything_in(dtype):
    """Norms, rotations and TRL's head compute in float32 whatever the model's type: here in the model's."""
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            for name in ("float32", "float"):
                patch.setattr(torch, name, torch.float64)
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def step(trainer, pairs=BATCH, *, train=True, **losses):
    """Loss, metrics and gradients of a batch, under a loss that is set on the built trainer."""
    for name, value in losses.items():
        setattr(trainer, name, value)
    mode = "train" if train else "eval"
    trainer.model.train(train)
    trainer.model.zero_grad()
    trainer._metrics[mode].clear()
    trainer._total_train_tokens = 0
    batch = trainer.data_collator(pairs)
    with everything_in(trainer.model.dtype), torch.set_grad_enabled(train):
        with trainer.accelerator.autocast():  # which `train` wraps the model's forward in
            loss = trainer.compute_loss(trainer.model, batch)
        if train:
            loss.backward()
    if getattr(trainer, "sharing", False) and batch["completion_mask"][:, 1:].any():
        assert PLAN in batch
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), copy.deepcopy(trainer._metrics[mode]), gradients


def error(plain, shared):
    """The largest ||g - g'|| / ||g|| of a parameter; where g is next to nothing, against 1e-6 of all gradients."""
    assert plain.keys() == shared.keys()
    norms = {name: float(g.double().norm()) for name, g in plain.items()}
    least = 1e-6 * math.hypot(*norms.values()) or 1.0
    return max(
        float((g.double() - shared[name].double()).norm()) / max(norms[name], least) for name, g in plain.items()
    )


def assert_same(plain, shared, dtype=torch.float32, *, times=1):
    tolerance = times * TOLERANCE[dtype]
    assert shared[0] == pytest.approx(plain[0], rel=tolerance, abs=tolerance)
    assert shared[1].keys() == plain[1].keys() > {"entropy", "logits/chosen", "mean_token_accuracy", "rewards/margins"}
    for name, values in plain[1].items():
        assert shared[1][name] == pytest.approx(values, rel=10 * tolerance, abs=10 * tolerance), name
    assert error(plain[2], shared[2]) <= tolerance if plain[2] else not shared[2]


def model_for(model_type, method, dtype=torch.float32):
    """The architecture's tiny model, as the method needs it."""
    if method == "LoRA on 4 bits":
        return in_4_bits(tiny(model_type))
    return tiny(model_type, dtype=dtype, **(dict(tie_word_embeddings=False) if method.endswith("_to_save") else {}))


def examples(lengths, *, same_start=0, **options):
    """The doctor's tokenised pairs, whose completions begin with the same tokens."""
    pairs = compute.examples(lengths, **options)
    for pair in pairs:
        same = min(same_start, len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        pair["rejected_ids"][:same] = pair["chosen_ids"][:same]
    return pairs


def in_4_bits(model):
    """The model with 4-bit weights and float32 products."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)


def build(kind, model, method, folder, *, shared_prefix="true", rows=ROWS, **settings):
    """The doctor's trainer of a copy of the model, by one of METHODS."""
    given = ("ref_model", "peft_config", "callbacks")
    arguments = {name: settings.pop(name) for name in given if name in settings}
    if kind is not DPOTrainer:
        arguments["shared_prefix"] = shared_prefix
    if method == "full" and not settings.get("precompute_ref_log_probs"):
        arguments.setdefault("ref_model", copy.deepcopy(model))
    elif method == "LoRA from LoRA (ref)":
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(model), lora(model))
        stir(model, seed=2)
    elif method != "full":
        head = "embed_out" if model.config.model_type == "gpt_neox" else "lm_head"
        saved = {"modules_to_save": [head]} if method.endswith("_to_save") else {}
        arguments.setdefault("peft_config", lora(model, **saved))
    return compute.build(kind, model, arguments, rows, output_dir=str(folder), **settings)


def settings_of(loss):
    given = LOSSES[loss]
    return LOSS_DEFAULTS | {"loss_weights": [1.0] * len(given.get("loss_types", "1"))} | given


def trainers(model, method, folder, **settings):
    """Plain TRL's and ours."""
    both = (
        build(DPOTrainer, model, method, folder, **settings),
        build(SharedPrefixDPOTrainer, model, method, folder, **settings),
    )
    assert both[1].sharing
    return both


def largest_errors(model_type, method, losses):
    """By loss, the largest relative error of a gradient in float64 and in float32; 4 bits know no float64."""
    errors = {}
    for dtype in [torch.float32] if method == "LoRA on 4 bits" else [torch.float64, torch.float32]:
        with tempfile.TemporaryDirectory() as folder:
            both = trainers(model_for(model_type, method, dtype), method, folder, use_weighting=True)
            for loss in losses:
                plain, shared = (step(each, **settings_of(loss)) for each in both)
                assert_same(plain, shared, dtype)
                errors.setdefault(loss, []).append(error(plain[2], shared[2]))
    return {loss: " / ".join(f"{x:.0e}" for x in pair) for loss, pair in errors.items()}


def table(corner, rows, columns, cells):
    """Markdown."""
    lines = [f"| {corner} | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    return "\n".join(lines + [f"| {row} | {' | '.join(cells[row, column] for column in columns)} |" for row in rows])


def main():
    """Write the tables into the document."""
    cells = {}
    for model_type in ARCHITECTURES:
        for method in METHODS:
            cells[model_type, method] = largest_errors(model_type, method, ["sigmoid"])["sigmoid"]
            sys.stderr.write(f"{model_type}, {method}: {cells[model_type, method]}\n")
    for method in METHODS:
        cells |= {(loss, method): value for loss, value in largest_errors("llama", method, LOSSES).items()}
    tables = [table("model_type", ARCHITECTURES, METHODS, cells), table("loss (llama)", LOSSES, METHODS, cells)]
    before, rest = DOCUMENT.read_text().split("<!-- tables -->\n")
    after = rest.split("<!-- end of tables -->\n")[1]
    written = "\n\n".join(tables)
    DOCUMENT.write_text(f"{before}<!-- tables -->\n\n{written}\n\n<!-- end of tables -->\n{after}")


if __name__ == "__main__":
    main()
