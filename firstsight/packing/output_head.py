"""The output head as one matrix, from which the distillation loss makes logits chunk by chunk."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from firstsight.core.errors import UserError


def head_weight(model: PreTrainedModel) -> Tensor:
    """Return the output head's weight [V, H] plus LoRA's update; differentiable where the head or its adapter is.

    Raises:
        UserError: the head is quantized, has a bias, or has an adapter that cannot be written as one weight.
    """
    head, updates = model.get_output_embeddings(), []
    if hasattr(head, "base_layer") or hasattr(head, "original_module"):
        head, updates = _unwrap(model, head)
    if type(head) is not nn.Linear:
        raise _refused(model, f"a {type(head).__name__}")
    if head.bias is not None:
        raise _refused(model, "one with a bias")
    weight = head.weight
    for update in updates:
        weight = weight + update
    return weight


def _unwrap(model: PreTrainedModel, head: nn.Module) -> tuple[nn.Module, list[Tensor]]:
    """Return the layer inside peft's wrapper, and the updates that the wrapper adds to its weight."""
    from peft.tuners.lora import Linear as LoraLinear  # takes seconds to import, and few heads are wrapped
    from peft.utils import ModulesToSaveWrapper

    if isinstance(head, ModulesToSaveWrapper):
        return head.modules_to_save[head.active_adapters[0]], []
    if not isinstance(head, LoraLinear):
        raise _refused(model, f"a {type(head).__name__}")
    active = [] if head.disable_adapters or head.merged else head.active_adapters
    for name in active:
        if head.lora_variant.get(name) or head.lora_bias.get(name) or isinstance(head.lora_dropout[name], nn.Dropout):
            raise _refused(model, "LoRA with dropout, a bias or a variant such as DoRA")
    return head.get_base_layer(), [head.get_delta_weight(name) for name in active]


def _refused(model: PreTrainedModel, found: str) -> UserError:
    return UserError(
        f"{model.name_or_path}: expected an output head that is a plain linear layer without bias, or plain LoRA over "
        f"one, because the loss computes logits from its weight; found {found}; keep lm_head out of quantization "
        "and adapters"
    )
