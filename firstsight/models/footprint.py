"""What a model's weights take in memory."""

from collections.abc import Iterator
from itertools import chain

from torch import Tensor, nn


def weights_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, quantized ones with their scales and code books; what is shared, once."""
    tensors = {
        tensor.data_ptr(): tensor for one in chain(model.parameters(), model.buffers()) for tensor in _parts(one)
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _parts(weight: Tensor) -> Iterator[Tensor]:
    """The tensor, and those that bitsandbytes hangs on it, which are neither parameters nor buffers."""
    yield weight
    if (scales := getattr(weight, "SCB", None)) is not None:
        yield scales
    if (state := getattr(weight, "quant_state", None)) is not None:
        yield from (value for value in state.as_dict().values() if isinstance(value, Tensor))
