"""Compares small products, attention and gradients on this machine with more exact computations of them.

The equivalence tests use the same tiny trainers.
"""

import copy
import itertools
import math
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from dpo_recipes.doctor.report import Finding, Part
from dpo_recipes.health.guards import add_guards
from dpo_recipes.shared_prefix.packing import attend, plan_pairs
from dpo_recipes.shared_prefix.trainer import SharedPrefixDPOTrainer
from dpo_recipes.trl_patches import prepare_inputs

WORDS = 258
COMMON: dict[str, Any] = dict(vocab_size=WORDS, pad_token_id=0, eos_token_id=1, bos_token_id=None)
TINY = COMMON | dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
TINY |= dict(max_position_embeddings=128)
GROUPED = TINY | dict(num_key_value_heads=2, head_dim=16)
ARCHITECTURES: dict[str, dict[str, Any]] = {  # windows are shorter than the sequences, so that they have an effect
    "gemma2": GROUPED | dict(sliding_window=6, final_logit_softcapping=3.0, attn_logit_softcapping=2.0),
    "gemma3_text": GROUPED | dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "gpt2": COMMON | dict(n_embd=64, n_layer=2, n_head=4, n_positions=128),
    "gpt_neo": COMMON
    | dict(hidden_size=64, num_layers=2, num_heads=4, max_position_embeddings=128)
    | dict(attention_types=[[["global", "local"], 1]], window_size=6),
    "gpt_neox": TINY | dict(tie_word_embeddings=False),
    "llama": GROUPED,
    "mistral": GROUPED | dict(sliding_window=6),
    "phi3": GROUPED | dict(sliding_window=6),
    "qwen2": GROUPED | dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": GROUPED | dict(tie_word_embeddings=True),
}
ROWS = [{"prompt": chr(300 + n) * n, "chosen": "ĆĄ" * n, "rejected": "ĈĊĎ" * (12 - n)} for n in range(1, 9)]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest relative error ||x - x'|| / ||x|| of a product, by dtype, that rounding explains."""
EXACT = 1e-4
"""Largest relative difference between our float32 gradients and plain TRL's; on one H200 it was up to 3e-5."""
SLACK = (1.5, 0.005)
"""Our 16-bit gradients may be SLACK[0] times as far from float32 as plain TRL's, plus SLACK[1]."""


def tiny(model_type: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of an architecture whose biases and norms differ from the identity."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**ARCHITECTURES.get(model_type, TINY), **changes})
    model = AutoModelForCausalLM.from_config(config)
    stir(model, scale=0.1, seed=0)
    return model.to(dtype)


def stir(model: Any, *, scale: float = 0.05, seed: int = 1) -> None:
    """Adds noise to all trained weights, so that a policy differs from its reference model."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * scale)


def lora(model: Any, **settings: Any) -> LoraConfig:
    """LoRA settings for every linear layer except the head."""
    kinds = ("Linear", "Conv1D", "Linear4bit")
    names = {name.split(".")[-1] for name, module in model.named_modules() if type(module).__name__ in kinds}
    settings = dict(r=4, target_modules=sorted(names - {"lm_head", "embed_out"})) | settings
    return LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=model.config.model_type == "gpt2", **settings)


def examples(lengths: Sequence[tuple[int, int, int]], *, seed: int = 0) -> list[dict[str, list[int]]]:
    """Tokenised pairs with the given lengths of prompt, chosen and rejected."""
    draw, sides = random.Random(seed), ("chosen_ids", "rejected_ids", "prompt_ids")
    return [
        {side: [draw.randrange(2, WORDS) for _ in range(n)] for side, n in zip(sides, (c, r, p), strict=True)}
        for p, c, r in lengths
    ]


BATCH = examples([(9, 5, 12), (3, 14, 2), (17, 1, 7), (6, 8, 8)])


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that makes each character one token."""
    words = {"<pad>": 0, "<eos>": 1} | {chr(256 + index): index for index in range(2, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def build(kind: type, model: Any, arguments: Mapping[str, Any], rows: Sequence[Any] = ROWS, **settings: Any) -> Any:
    """A trainer of a copy of the model. Trainers with equal arguments differ only in their class.

    Args:
        kind: DPOTrainer or a class derived from it.
        model: A model of `tiny`.
        arguments: Further ones of the trainer, such as its reference model.
        rows: Pairs of text, from which the trainer makes its dataset.
        settings: Of DPOConfig.
    """
    tiny_run: dict[str, Any] = dict(activation_checkpointing=False, max_length=64, per_device_train_batch_size=4)
    tiny_run |= dict(beta=0.5, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    trainer = kind(
        model=copy.deepcopy(model),
        args=DPOConfig(**tiny_run | settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=character_tokenizer(),
        **arguments,
    )
    add_guards(trainer, reference_is_start=False)
    stir(trainer.model)
    return trainer


def distance(exact: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Relative error ||x - x'|| / ||x|| over all tensors together."""
    off = math.hypot(*(float((x.double() - other[name].double()).norm()) for name, x in exact.items()))
    return off / math.hypot(*(float(x.double().norm()) for x in exact.values()))


def gradients(trainer: Any, pairs: Sequence[Mapping[str, Any]], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Loss of one batch under "loss", and its gradients under the names of the weights.

    Args:
        trainer: A built DPOTrainer.
        pairs: Tokenised pairs.
        start: Values of the trained weights, so that trainers of different dtypes have equal weights.
    """
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(start.get(name, weight))
    trainer.model.train()
    trainer.model.zero_grad()
    batch = prepare_inputs(trainer, trainer.data_collator(list(pairs)))
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, batch)
    scale = 2**10 if trainer.args.fp16 else 1  # scales the loss against underflow, as GradScaler does
    (loss * scale).backward()
    return {"loss": loss.detach()} | {n: w.grad.float() / scale for n, w in trained.items() if w.grad is not None}


def gradient_errors(architecture: str, method: str, dtype: torch.dtype, *, use_cpu: bool) -> dict[str, float]:
    """Relative distances of loss and gradients from plain TRL in float32.

    Args:
        architecture: One of ARCHITECTURES.
        method: "LoRA" or "full".
        dtype: Dtype of the frozen weights and the products.
        use_cpu: Compute on the CPU even if there is a card.

    Returns:
        - `ours, float32`: distance of SharedPrefixDPOTrainer in float32
        - `TRL`, `ours`: distances of plain TRL and of SharedPrefixDPOTrainer in `dtype`, unless it is float32
    """
    model = tiny(architecture).to(dtype).float()  # the same weights in both dtypes
    with tempfile.TemporaryDirectory() as folder:

        def trainer(kind: type, **settings: Any) -> Any:
            arguments = {"ref_model": copy.deepcopy(model)} if method == "full" else {"peft_config": lora(model)}
            arguments |= {} if kind is DPOTrainer else {"shared_prefix": "true"}
            return build(kind, model, arguments, output_dir=folder, use_cpu=use_cpu, **settings)

        plain = trainer(DPOTrainer)
        start = {name: w.detach().clone() for name, w in plain.model.named_parameters() if w.requires_grad}
        exact = gradients(plain, BATCH, start)
        errors = {"ours, float32": distance(exact, gradients(trainer(SharedPrefixDPOTrainer), BATCH, start))}
        if dtype != torch.float32:
            model = model.to(dtype) if method != "full" else model
            mixed = dict(bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)
            for name, kind in (("TRL", DPOTrainer), ("ours", SharedPrefixDPOTrainer)):
                errors[name] = distance(exact, gradients(trainer(kind, **mixed), BATCH, start))
    return errors


def product_error(dtype: torch.dtype, device: str) -> float:
    """Relative error of a matrix product compared with float64."""
    torch.manual_seed(0)
    a, b = (torch.randn(512, 512, device=device).to(dtype) for _ in range(2))
    return distance({"": a.double() @ b.double()}, {"": a @ b})


def four_bit_error(dtype: torch.dtype, device: str) -> float:
    """Relative error of a 4-bit layer's output and input gradient, compared with dequantised weights in float32."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(256, 128, bias=False, compute_dtype=dtype, quant_type="nf4").to(device)
    x, above = (torch.randn(64, width, device=device, dtype=dtype) for width in (256, 128))
    x.requires_grad_()
    output = layer(x)
    output.backward(above)
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    exact = {"output": x.detach().float() @ weight.T, "gradient": above.float() @ weight}
    assert x.grad is not None
    return distance(exact, {"output": output.detach(), "gradient": x.grad})


def attention_error(dtype: torch.dtype, device: str, *, window: int | None) -> float:
    """Relative error of packed attention, compared with one SDPA call per segment in float64.

    Packed attention is variable-length FlashAttention in 16 bits on a card, otherwise SDPA.
    """
    torch.manual_seed(0)
    plan = plan_pairs([(90, 50, 120), (30, 140, 20), (17, 1, 7)], 256)
    plan |= {name: value.to(device) for name, value in plan.items() if isinstance(value, Tensor)}
    tokens = len(plan["sources"])
    q, k, v = (torch.randn(1, heads, tokens, 64, device=device).to(dtype) for heads in (8, 2, 2))
    exact = attend(q.double(), k.double(), v.double(), plan, scale=0.125, window=window, softcap=None)
    return distance({"": exact}, {"": attend(q, k, v, plan, scale=0.125, window=window, softcap=None)})


def check_compute(
    dtype: torch.dtype, *, use_cpu: bool, architectures: Sequence[str], say: Callable[[str], None]
) -> Part:
    """Compares computations of training on this machine with more exact ones.

    Args:
        dtype: The profile's dtype.
        use_cpu: Compute on the CPU even if there is a card.
        architectures: Keys of ARCHITECTURES, whose trainers are compared.
        say: Shows progress.
    """
    device = "cpu" if use_cpu else "cuda"
    low = torch.bfloat16 if dtype == torch.float32 else dtype  # 4-bit recipes compute in 16 bits on a CPU too
    update = "Install the pinned torch and a driver that fits it, then run the doctor again."
    shared = "Train with --shared_prefix false, which is plain TRL, and report this table as an issue."
    four = "Run: pip install -c constraints.txt bitsandbytes; or train without --load_in_4bit."

    def one_line(error: Callable[..., float], kind: torch.dtype, **options: Any) -> Callable[[], Iterable[Line]]:
        return lambda: [(kind, error(kind, device, **options), LIMITS[kind], None)]

    checks = [
        ("matrix product", update, one_line(product_error, torch.float32)),
        ("matrix product", update, one_line(product_error, low)),
        ("4-bit layer, forward and backward", four, one_line(four_bit_error, low)),
        ("packed attention", shared, one_line(attention_error, dtype, window=None)),
        ("packed attention, window of 32", shared, one_line(attention_error, dtype, window=32)),
    ]
    for names in itertools.product(architectures, ("LoRA", "full")):
        lines = partial(_trainer_lines, *names, dtype, use_cpu=use_cpu)
        checks.append((f"shared prompts, {', '.join(names)}", shared, lines))
    part = Part(f"Does it compute ({device})", ["what", "error", "limit", "TRL's own", ""])
    part.note = (
        "An error is ||x - x'|| / ||x||, where x is computed more exactly: in float64 for products and attention, "
        "with dequantised float32 weights for 4 bits, as plain TRL's float32 loss and gradients for a trainer."
    )
    for name, remedy, lines_of in checks:
        say(name)
        _add(part, name, remedy, lines_of)
    return part


Line = tuple[torch.dtype, float, float, float | None]
"""Columns of a check: dtype, error, limit, TRL's own error."""


def _trainer_lines(architecture: str, method: str, dtype: torch.dtype, *, use_cpu: bool) -> Iterator[Line]:
    errors = gradient_errors(architecture, method, dtype, use_cpu=use_cpu)
    yield torch.float32, errors["ours, float32"], EXACT, None
    if "ours" in errors:
        yield dtype, errors["ours"], SLACK[0] * errors["TRL"] + SLACK[1], errors["TRL"]


def _add(part: Part, name: str, remedy: str, lines: Callable[[], Iterable[Line]]) -> None:
    """Adds the lines of a check, and a finding for an error above its limit or a check that fails."""
    try:
        for dtype, error, limit, own in lines():
            right, full = error <= limit, f"{name}, {str(dtype).removeprefix('torch.')}"  # NaN counts as wrong
            own_text = "" if own is None else f"{own:.1e}"
            part.rows.append([full, f"{error:.1e}", f"{limit:.1e}", own_text, "ok" if right else "wrong"])
            if not right:
                part.findings.append(Finding(f"{full}: error {error:.1e}, at most {limit:.1e} is right", remedy))
    except Exception as failure:  # any error that a driver or a library raises
        part.rows.append([name, "", "", "", "failed"])
        text = (str(failure).strip() or "no message").splitlines()[0]
        part.findings.append(Finding(f"{name} fails with {type(failure).__name__}: {text}", remedy))
