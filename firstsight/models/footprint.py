"""Measure the memory of a model's weights."""

from collections.abc import Iterator
from itertools import chain

from torch import Tensor, nn


def weights_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers, with the scales and code books of quantized ones.

    Tensors that share memory count once.
    """
    tensors = {
        tensor.data_ptr(): tensor
        for one in chain(model.parameters(), model.buffers())
        for tensor in _with_quantization_state(one)
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _with_quantization_state(weight: Tensor) -> Iterator[Tensor]:
    """Yield the tensor and those that bitsandbytes sets as its attributes, which are neither parameters nor buffers."""
    yield weight
    if (scales := getattr(weight, "SCB", None)) is not None:
        yield scales
    if (state := getattr(weight, "quant_state", None)) is not None:
        yield from (value for value in state.as_dict().values() if isinstance(value, Tensor))
