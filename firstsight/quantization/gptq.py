"""Round a language model to 4 bits by what its matrices are multiplied with (GPTQ, `firstsight.models.rounding`).

Tokens of images and videos are counted apart from those of text, and both weigh the same, however many there are of
each: a rounding that is good for the one can be poor for the other (arXiv 2412.19509).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from firstsight.core.progress import progress
from firstsight.core.stage import log
from firstsight.generation.answering import answers
from firstsight.models import int4
from firstsight.models.quantized import language_model_prefix
from firstsight.models.rounding import gptq, parts
from firstsight.packing.forward import last_hidden_states
from firstsight.packing.pack import collate, encode, pack
from firstsight.packing.vision_tower import placeholders
from firstsight.records.sample import Sample

# Questions that the model answers at once, and the most tokens of an answer.
_BATCH, _TOKENS = 8, 16


@dataclass
class _Moments:
    """Hold the sums of x x^T, float32 [2, K, K], over the inputs x [K] of a layer: of text, and of visual tokens."""

    sums: Tensor
    tokens: list[int]

    def balanced(self) -> np.ndarray:
        """Return the mean of x x^T [K, K], in which visual and text tokens weigh the same."""
        means = [total.cpu().numpy() / count for total, count in zip(self.sums, self.tokens, strict=True) if count]
        return np.mean(means, axis=0)


class InputRounding:
    """Round the linear layers of a language model by their inputs as it reads samples with their answers.

    A question without an answer gets the model's own.

    Raises:
        UserError: the model's layers cannot be rounded (`int4.misfit`).
    """

    def __init__(self, model: PreTrainedModel, processor: Any, samples: Sequence[Sample]):
        self._model, self._processor = model, processor
        self._layers = int4.rounded_layers(model, language_model_prefix(model))
        self._group = int4.group_size(self._layers)
        self._samples = self._answered(samples)

    def layers(self) -> dict[str, int4.Rounding]:
        """Return the roundings by the layers' names, on the CPU.

        A layer that fewer tokens pass than it has inputs is left out: they say too little of it.
        """
        found: dict[str, int4.Rounding] = {}
        sharing = self._sharing_inputs()
        widths = {first: self._layers[first].in_features for first in sharing}
        with progress(total=len(widths), desc="quantize-student: rounding", unit="inputs") as bar:
            for part in parts(widths):
                for first, moment in self._moments(part).items():
                    if moment is not None:
                        found |= self._rounded(sharing[first], moment)
                    bar.update()
        if left := len(self._layers) - len(found):
            log.warning(
                "int4: %d of %d layers are rounded to the nearest, because fewer tokens pass them than they have "
                "inputs; raise quantize.rounding_samples",
                left,
                len(self._layers),
            )
        return found

    def _answered(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples with the model's own answers to the questions that have none."""
        asked = [(sample, record) for sample in samples for record in sample.records if not record.answer]
        given = iter(answers(self._model, self._processor, asked, _BATCH, _TOKENS))
        return [
            replace(
                sample, records=tuple(one if one.answer else replace(one, answer=next(given)) for one in sample.records)
            )
            for sample in samples
        ]

    def _sharing_inputs(self) -> dict[str, list[str]]:
        """Return the layers that have the same inputs, as those of queries, keys and values, by the first of them."""
        found: dict[str, list[str]] = {}
        last: Tensor | None = None

        def note(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
                nonlocal last
                if inputs[0] is last:
                    found[next(reversed(found))].append(name)
                else:
                    found[name], last = [name], inputs[0]

            return hook

        self._read({name: note(name) for name in self._layers}, self._samples[:1])
        return found

    def _moments(self, names: Sequence[str]) -> dict[str, np.ndarray | None]:
        """Return the balanced moment of each layer's inputs; None where fewer tokens pass it than it has inputs."""
        device = self._model.device
        found = {}
        for name in names:
            width = self._layers[name].in_features
            found[name] = _Moments(torch.zeros(2, width, width, device=device), [0, 0])

        def count(moments: _Moments) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
                for kind, chosen in enumerate((~self._visual, self._visual)):
                    rows = inputs[0].flatten(0, -2)[chosen].float()
                    moments.sums[kind].addmm_(rows.T, rows)
                    moments.tokens[kind] += len(rows)

            return hook

        self._read({name: count(moments) for name, moments in found.items()}, self._samples)
        enough = {name: sum(one.tokens) >= self._layers[name].in_features for name, one in found.items()}
        return {name: moments.balanced() if enough[name] else None for name, moments in found.items()}

    @torch.inference_mode()
    def _read(self, hooks: dict[str, Callable[..., None]], samples: Sequence[Sample]) -> None:
        """Have the model read the samples, with a hook before each of some layers."""
        handles = [self._layers[name].register_forward_pre_hook(hook) for name, hook in hooks.items()]
        for sample in samples:
            packed = pack(self._processor, sample, encode(self._processor, sample, sample.records))
            batch = {name: value.to(self._model.device) for name, value in collate([packed], 0).items()}
            ids = batch["input_ids"].flatten()
            self._visual = placeholders(self._model.config, ids) if sample.frames else torch.zeros_like(ids).bool()
            last_hidden_states(self._model, batch)
        for handle in handles:
            handle.remove()

    def _rounded(self, names: Sequence[str], moment: np.ndarray) -> dict[str, int4.Rounding]:
        """Round layers with the same inputs, whose second moment is `moment` [K, K]."""
        weights = [self._layers[name].weight.detach() for name in names]
        dtype = weights[0].dtype

        def as_stored(scale: np.ndarray) -> np.ndarray:
            stored = torch.from_numpy(scale).to(dtype).float()
            return torch.where(stored == 0, 1, stored).numpy()

        levels, scales = gptq(torch.cat(weights).float().cpu().numpy().T, moment, self._group, as_stored)
        rows = [len(one) for one in weights]
        found = (torch.from_numpy(one.T.copy()).split(rows) for one in (levels, scales))
        return {name: (int4.packed(own), scale.to(dtype)) for name, own, scale in zip(names, *found, strict=True)}
