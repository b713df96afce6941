"""Measure the memory of a model's weights."""

from collections.abc import Iterable, Iterator
from itertools import chain

from torch import Tensor, nn
from transformers import PreTrainedModel

from firstsight.models.int4 import Int4Linear


def weights_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers, with the scales and code books of quantized ones.

    Tensors that share memory count once.
    """
    return _bytes(chain(model.parameters(), model.buffers()))


def parameters(model: PreTrainedModel) -> int:
    """Return the number of weights, also where 4-bit storage packs several in a number."""
    packed = [one for one in model.modules() if isinstance(one, Int4Linear)]
    return model.num_parameters() + sum(one.in_features * one.out_features for one in packed)


def token_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the weights that are read for each token of an answer: those of language model and head.

    Of an embedding that is not also the head, a token reads one row, which does not count.
    """
    embedding = model.get_input_embeddings().weight
    language = [*model.get_decoder().parameters(), *model.get_decoder().buffers()]
    head = model.get_output_embeddings()
    return _bytes([*(one for one in language if one is not embedding), *head.parameters(), *head.buffers()])


def _bytes(weights: Iterable[Tensor]) -> int:
    tensors = {tensor.data_ptr(): tensor for one in weights for tensor in _with_quantization_state(one)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _with_quantization_state(weight: Tensor) -> Iterator[Tensor]:
    """Yield the tensor and those that bitsandbytes sets as its attributes, which are neither parameters nor buffers."""
    yield weight
    if (scales := getattr(weight, "SCB", None)) is not None:
        yield scales
    if (state := getattr(weight, "quant_state", None)) is not None:
        yield from (value for value in state.as_dict().values() if isinstance(value, Tensor))
