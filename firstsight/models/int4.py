"""Store the matrices of a language model in 4 bits, and multiply by them as they are stored.

A row's weights have a scale for each group of neighbours, and each weight is one of 16 levels, -8 to 7.
Folders have compressed-tensors' format "pack-quantized" (https://github.com/vllm-project/compressed-tensors), which
transformers and vLLM load. Of these layers, a token reads 27% of what it reads in 16 bits; on a GPU one kernel
(`firstsight.models.int4_kernel`) multiplies by the levels, while many tokens together, and the CPU, take the weights
that the levels stand for.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from firstsight.core.errors import UserError
from firstsight.core.stage import log
from firstsight.models.rounding import HIGHEST, LOWEST

# The packed levels of a matrix, int32 [N, K / 8], and their scales, float [N, K / group].
Rounding = tuple[Tensor, Tensor]
# Weights that share a scale: the most of these that divides all rows.
GROUPS = (64, 32, 16)
# Levels in an int32.
PACKED = 8
# Tokens, of all sequences of a batch, up to which the kernel multiplies; more compute rather than read.
_MOST_TOKENS, _TRIED_TOKENS = 64, (1, 17, 64)
# How far the kernel's products may be from those by restored weights, which are rounded to 16 bits before.
_TOLERANCE = 0.02
_METHOD, _FORMAT = "compressed-tensors", "pack-quantized"
# Under which name transformers finds this file.
_LOADER = "firstsight_int4"
# What is stored of a layer, beside its bias.
_STORED = ("weight_packed", "weight_scale", "weight_shape")


class Int4Linear(nn.Linear):
    """Multiply by a matrix [N, K] in 4 bits, and add a bias [N] if there is one.

    Buffers:
        weight_packed: int32 [N, K / 8], eight levels each, from the lowest bits up, to which 8 was added.
        weight_scale: float [N, K / group].
        weight_shape: int64 [2], N and K.

    `kernel` multiplies few tokens; None: the weights are restored for them, too (`take_kernel`).
    """

    kernel: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor

    def __init__(self, packed: Tensor, scale: Tensor, bias: nn.Parameter | None):
        rows, columns = len(packed), PACKED * packed.shape[1]
        super().__init__(columns, rows, bias=False, device="meta")
        del self.weight
        self.register_parameter("bias", bias)
        for name, tensor in zip(_STORED, (packed, scale, torch.tensor([rows, columns])), strict=True):
            self.register_buffer(name, tensor)

    @classmethod
    def of(cls, layer: nn.Linear, group: int, rounding: Rounding | None = None) -> "Int4Linear":
        """Return a layer with its weights rounded as given, or to the nearest; its scales have the layer's dtype."""
        if rounding is None:
            levels, scale = rounded(layer.weight.detach(), group)
            rounding = packed(levels), scale
        stored, scale = (tensor.to(layer.weight.device) for tensor in rounding)
        return cls(stored, scale, layer.bias)

    @classmethod
    def empty(cls, layer: nn.Linear, group: int) -> "Int4Linear":
        """Return a layer of the same shape and device, whose weights are still to be loaded."""
        rows, columns = layer.out_features, layer.in_features
        stored = layer.weight.new_empty(rows, columns // PACKED, dtype=torch.int32)
        return cls(stored, layer.weight.new_empty(rows, columns // group), layer.bias)

    def weights(self, dtype: torch.dtype) -> Tensor:
        """Return the weights [N, K] that the levels stand for."""
        # In place, and exact up to the rounding of the product: all levels are numbers of any float type.
        levels = unpacked(self.weight_packed).to(dtype).sub_(-LOWEST)
        levels.view(*self.weight_scale.shape, -1).mul_(self.weight_scale[..., None])
        return levels

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the products [..., N] of inputs [..., K]."""
        few = inputs.numel() <= _MOST_TOKENS * self.in_features
        if self.kernel is not None and few and not torch.is_grad_enabled():
            return self.kernel(inputs, self.weight_packed, self.weight_scale, self.bias)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return linear(inputs, self.weights(inputs.dtype), bias)


def rounded(weights: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round weights [N, K] to the nearest levels int8 [N, K]; return these, and the scales [N, K / group].

    A group's largest weight becomes the lowest level, so that the scale has the opposite sign of it.
    """
    groups = weights.float().unflatten(1, (-1, group))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    scale = (largest / LOWEST).to(weights.dtype)
    scale = torch.where(scale == 0, 1, scale)  # where all weights are zero
    levels = (groups / scale[..., None].float()).round().clamp(LOWEST, HIGHEST)
    return levels.flatten(1).to(torch.int8), scale


def packed(levels: Tensor) -> Tensor:
    """Pack levels int8 [N, K] into int32 [N, K / 8], each plus 8."""
    pairs = (levels - LOWEST).view(torch.uint8).unflatten(1, (-1, 2))
    return (pairs[..., 0] | pairs[..., 1] << 4).view(torch.int32)


def unpacked(stored: Tensor) -> Tensor:
    """Return the levels of packed ones [N, K / 8], each plus 8: uint8 [N, K]."""
    pairs = stored.view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(1)


def quantize(model: PreTrainedModel, prefix: str, device: str, roundings: Mapping[str, Rounding]) -> None:
    """Round all linear layers whose names begin with `prefix`, in place, and say so in the model's config.

    Those that `roundings` has by name are rounded as it says, others to the nearest. Layers are rounded on `device`,
    one after the other, and stay there. A model on the CPU therefore takes no more of a GPU's memory than its rounded
    weights and one layer.

    Raises:
        UserError: it cannot be done (`misfit`).
    """
    layers = rounded_layers(model, prefix)
    group = group_size(layers)
    for name, layer in layers.items():
        model.set_submodule(name, Int4Linear.of(layer.to(device), group, roundings.get(name)))
    kept = [name for name, one in _linear(model).items() if not isinstance(one, Int4Linear)]
    model.config.quantization_config = _config(group, kept)


def misfit(model: PreTrainedModel, prefix: str) -> str | None:
    """Return why the linear layers whose names begin with `prefix` cannot be rounded, or None; weights do not matter.

    There are none in GPT-2, whose layers are of another class.
    """
    layers = _within(model, prefix)
    if layers and group_size(layers):
        return None
    widths = {layer.in_features for layer in layers.values()}
    odd = [f"{width} inputs" for width in sorted(widths) if width % GROUPS[-1]]
    return (
        f"expected a language model of linear layers (nn.Linear) with a multiple of {GROUPS[-1]} inputs, found "
        f"{model.config.model_type} with {odd[0] if odd else 'none'}"
    )


def rounded_layers(model: PreTrainedModel, prefix: str) -> dict[str, nn.Linear]:
    """Return the layers that `quantize` rounds, by name.

    Raises:
        UserError: they cannot be rounded (`misfit`).
    """
    if reason := misfit(model, prefix):
        raise UserError(f"int4: {reason}; leave int4 out")
    return _within(model, prefix)


def group_size(layers: Mapping[str, nn.Linear]) -> int:
    """Return how many weights share a scale: the largest of `GROUPS` that divides all rows; 0 if none does."""
    return next((group for group in GROUPS if not any(one.in_features % group for one in layers.values())), 0)


@contextmanager
def loading(config: PretrainedConfig) -> Iterator[None]:
    """Within the block, have `from_pretrained` with this config of a stored folder make layers of this file.

    compressed-tensors, which it would call, restores all weights for good before it multiplies by them.
    """
    declared = config.quantization_config
    (group,) = declared["config_groups"].values()
    config.quantization_config = {
        "quant_method": _LOADER,
        "group": group["weights"]["group_size"],
        "kept": declared["ignore"],
    }
    try:
        yield
    finally:
        config.quantization_config = declared


def loaded(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Have a model that was loaded so say of itself what its folder's config says, so that it is saved as it was."""
    model.config.quantization_config = config.quantization_config
    del model.hf_quantizer


@register_quantization_config(_LOADER)
class _LoaderConfig(QuantizationConfigMixin):
    def __init__(self, group: int, kept: list[str], quant_method: Any = _LOADER):
        self.quant_method, self.group, self.kept = quant_method, group, kept


@register_quantizer(_LOADER)
class _Loader(HfQuantizer):
    is_trainable = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for name, layer in _linear(model).items():
            if name not in self.quantization_config.kept:
                model.set_submodule(name, Int4Linear.empty(layer, self.quantization_config.group))

    def is_serializable(self) -> bool:
        return True


def is_int4(quantized: dict[str, Any]) -> bool:
    """Return whether a folder's `quantization_config` is such as `quantize` makes."""
    try:
        (group,), kept = quantized["config_groups"].values(), quantized["ignore"]
        # Those of other makers may have other layers, zero points, an order of columns, or patterns of names.
        ours = _config(group["weights"]["group_size"], [name for name in kept if not name.startswith("re:")])
        return quantized == ours
    except (KeyError, ValueError, TypeError, AttributeError):
        return False


def _config(group: int, kept: list[str]) -> dict[str, Any]:
    """Return what config.json says: the layers that are `kept` are not quantized."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    return {
        "quant_method": _METHOD,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": kept,
    }


def _within(model: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in _linear(model).items() if name.startswith(prefix)}


def _linear(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear)}


@torch.no_grad()
def take_kernel(model: nn.Module) -> None:
    """Have a model's products of few tokens computed by the kernel, if it computes those of one layer as it should.

    It is tried with as many tokens as have it compiled in each of its sizes. Where it computes something else, or does
    not run (without Triton or a C compiler), the log says so.
    """
    layers = [one for one in model.modules() if isinstance(one, Int4Linear)]
    packed, scale = layers[0].weight_packed, layers[0].weight_scale
    weights = layers[0].weights(scale.dtype)
    try:
        from firstsight.models.int4_kernel import multiply

        for tokens in _TRIED_TOKENS:
            numbers = torch.linspace(-1, 1, tokens * weights.shape[1], device=scale.device)
            inputs = numbers.sin().to(scale.dtype).view(tokens, -1)
            expected, found = linear(inputs, weights).float(), multiply(inputs, packed, scale, None).float()
            if not (found - expected).norm() <= _TOLERANCE * expected.norm():
                off = (found - expected).norm() / expected.norm()
                raise RuntimeError(f"its products of {tokens} tokens are off by {off:.1g}")
    except Exception as error:  # of several kinds: Triton is missing, or its compiler
        log.warning("int4: weights are restored for every product, because its kernel fails: %s", _first_line(error))
        return
    for layer in layers:
        layer.kernel = multiply


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
