"""Quantize a model folder into another that `from_pretrained` loads quantized.

CONTRIBUTING.md says how to add a method.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from firstsight.core.params import Quantize
from firstsight.core.progress import progress
from firstsight.generation.answering import Question, model_inputs
from firstsight.models.footprint import weights_bytes
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.models.quantized import check_quantized, quantized_layers
from firstsight.quantization.gptq import InputRounding
from firstsight.records.sample import Sample


def quantize_folder(
    source: Path,
    target: Path,
    method: str,
    settings: Quantize,
    device: str,
    questions: Sequence[Question],
    samples: Sequence[Sample] = (),
) -> dict[str, Any]:
    """Quantize the model in `source` by a method, save it with its processor in `target`, and measure it.

    Weights of "int4" are rounded by what they are multiplied with on `samples`; without samples, to the nearest.

    Returns, as JSON: the numbers of quantized and of other linear layers, and of those rounded by their inputs; the
    bytes of all weights in memory before and after; and the `layer_errors` on the `questions`.
    """
    processor, roundings = load_processor(source), {}
    if method == "int4" and samples:
        roundings = InputRounding(load_model(source, "auto", device), processor, samples).layers()
    quantized = load_model(
        source, method, device, settings.double_quantization, settings.compute_dtype, roundings=roundings
    )
    counts = check_quantized(quantized)
    quantized.save_pretrained(target)
    processor.save_pretrained(target)
    original = load_model(source, "auto", device)
    sizes = {"original_bytes": weights_bytes(original), "bytes": weights_bytes(quantized)}
    counts["rounded_by_inputs"] = len(roundings)
    return {"method": method, **counts, **sizes, "errors": layer_errors(original, quantized, processor, questions)}


@torch.inference_mode()
def layer_errors(
    original: PreTrainedModel, quantized: PreTrainedModel, processor: ProcessorMixin, questions: Sequence[Question]
) -> dict[str, float]:
    """Return the relative error |quantized(x) - original(x)| / |original(x)| of each quantized layer, by name.

    x are the layer's inputs in the original model on the questions, so that errors of earlier layers do not count; the
    norms are Frobenius norms over all tokens.
    """
    counterparts = quantized_layers(quantized)
    squares = {name: torch.zeros(2, dtype=torch.float64) for name in counterparts}

    def compare(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            difference = counterparts[name](inputs[0]).float() - output.float()
            squares[name] += torch.stack([difference.square().sum(), output.float().square().sum()]).double().cpu()

        return hook

    layers = dict(original.named_modules())
    hooks = [layers[name].register_forward_hook(compare(name)) for name in counterparts]
    for question in progress(questions, desc="quantize-student: errors", unit="questions", total=len(questions)):
        original(**model_inputs(processor, [question], original.device))
    for hook in hooks:
        hook.remove()
    return {name: float((difference / output).sqrt()) for name, (difference, output) in squares.items()}
