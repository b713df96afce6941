"""The output head as one matrix, which is how the distillation loss wants it."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from firstsight.core.errors import UserError


def head_weight(model: PreTrainedModel) -> Tensor:
    """The output head's weight [V, H], with what LoRA adds to it; differentiable where the head or its adapter is.

    Raises:
        UserError: the head is quantized, has a bias, or is wrapped in what cannot be written as one weight.
    """
    head, adapters = model.get_output_embeddings(), []
    if hasattr(head, "base_layer") or hasattr(head, "original_module"):
        head, adapters = _unwrap(model, head)
    if type(head) is not nn.Linear:
        raise _refused(model, f"a {type(head).__name__}")
    if head.bias is not None:
        raise _refused(model, "one with a bias")
    weight = head.weight
    for delta in adapters:
        weight = weight + delta
    return weight


def _unwrap(model: PreTrainedModel, head: nn.Module) -> tuple[nn.Module, list[Tensor]]:
    """What is inside peft's wrapper, and what the wrapper adds to its weight."""
    from peft.tuners.lora import Linear as LoraLinear  # seconds to import, for the few heads that are wrapped
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
        f"one, because the loss works from its weight; found {found}; keep lm_head out of quantization and adapters"
    )
