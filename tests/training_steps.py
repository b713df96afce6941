"""Train a tiny model for a few steps, and compare its losses and gradients with those that were computed otherwise."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from firstsight.loss.products import tf32
from firstsight.training.comparison import alike
from firstsight.training.distillation_model import DistillationModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def adapted(model):
    """The model with adapters, whose second matrices are not zero, as they would be at first: all have a gradient."""
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).get_base_model()
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator(DEVICE).manual_seed(number))
    return model


def steps(model, batches, rounds: int, dtype: torch.dtype | None = None) -> list:
    """Losses and gradients of optimizer steps, each of them of all batches, by autocast to a dtype."""
    training = DistillationModel(model)
    tokens = torch.tensor(sum(int((batch["labels"] >= 0).sum()) for batch in batches))
    optimizer, found = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05), []
    for _ in range(rounds):
        optimizer.zero_grad()
        losses = []
        for batch in batches:
            with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
                loss = training(**batch, num_items_in_batch=tokens)["loss"]
            with tf32(True):  # as the loss does on a GPU, which leaves its mark on what code is compiled for
                pass
            loss.backward()
            losses.append(loss.item())
        found.append((losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        optimizer.step()
    return found


def assert_same(found: list, expected: list, rounded: bool = False) -> None:
    """Losses and gradients of `steps` are those of others, up to rounding in float32; in bfloat16 where `rounded`."""
    for (losses, gradients), (other_losses, others) in zip(found, expected, strict=True):
        assert losses == pytest.approx(other_losses, rel=2e-2 if rounded else 1e-4)
        assert gradients.keys() == others.keys()
        for name, gradient in gradients.items():
            if not rounded:
                torch.testing.assert_close(gradient, others[name], rtol=1e-3, atol=1e-5)
            elif gradient.ndim > 1:  # those of some biases are nothing but rounding
                assert alike(gradient, others[name]), name
