"""Run the model over the next token of every branch; keys and values grow, or have their room from the start.

With room from the start, every step has the same shapes and addresses, so that on a GPU one CUDA graph is recorded and
replayed: a token then costs what its weights cost to read, instead of a thousand launches of kernels.
"""

from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache

from firstsight.core.stage import log
from firstsight.models.cuda_graph import is_out_of_memory, record
from firstsight.packing.forward import branch_mask

# Models whose step could not be recorded; later batches do not try again.
_unrecordable: WeakSet[PreTrainedModel] = WeakSet()


class GrowingDecoder:
    """Append the keys and values of each step to the `kept` ones of the packed sequence, and to its `segments` [B, S].

    `branches` [B, N] are the segments of the tokens of a step; -1 where a row has fewer branches.
    """

    def __init__(self, model: PreTrainedModel, kept: Cache, segments: Tensor, branches: Tensor):
        self._model, self._cache, self._segments, self._branches = model, kept, segments, branches

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the final hidden states [B, N, H] after `tokens` [B, N] at `positions` [B, N] or [3, B, N]."""
        self._segments = torch.cat([self._segments, self._branches], 1)
        mask = branch_mask(self._branches, self._segments, self._model.dtype)
        return _states(self._model, tokens, positions, mask, self._cache)


class StaticDecoder:
    """Do the same with room for `steps` steps, and on CUDA by a graph, which is recorded in the second step.

    `kept` is emptied. Where the graph cannot be recorded, the steps are computed one by one, and the log says why.
    """

    def __init__(self, model: PreTrainedModel, kept: Cache, segments: Tensor, branches: Tensor, steps: int):
        self._model = model
        self._end, self._width = segments.shape[1], branches.shape[1]
        length = self._end + steps * self._width
        self._cache = _with_room(model, kept, length)
        own = branch_mask(branches, torch.cat([segments, branches], 1), model.dtype)
        # What has not been written yet is not attended to.
        self._mask = torch.full(
            (*own.shape[:3], length), torch.finfo(model.dtype).min, dtype=model.dtype, device=model.device
        )
        self._mask[..., : self._end] = own[..., : self._end]
        self._own = own[..., self._end :]
        self._tokens = self._positions = Tensor()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded = Tensor()
        self._records = model.device.type == "cuda" and model not in _unrecordable

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """As `GrowingDecoder.step`."""
        self._mask[..., self._end : self._end + self._width] = self._own
        self._end += self._width
        if not self._tokens.numel():
            # This step also sets up what libraries make at their first call, which cannot be recorded.
            self._tokens, self._positions = tokens.clone(), positions.clone()
            return self._compute()
        self._tokens.copy_(tokens)
        self._positions.copy_(positions)
        if self._records and self._graph is None:
            self._record()
        if self._graph is None:
            return self._compute()
        self._graph.replay()
        return self._recorded.clone()

    def _compute(self) -> Tensor:
        return _states(self._model, self._tokens, self._positions, self._mask, self._cache)

    def _record(self) -> None:
        """Record a step without computing it."""

        def work() -> None:
            self._recorded = self._compute()

        try:
            self._graph = record(work)
        except Exception as error:  # memory does not suffice, or a layer waits for the CPU, or of other kinds
            self._records = False
            until = "for this batch"
            if not is_out_of_memory(error):  # a smaller batch may fit
                _unrecordable.add(self._model)
                until = "from here on"
            log.warning(
                "%s: decoding: step by step %s, because recording a CUDA graph failed (%s)",
                self._model.name_or_path,
                until,
                " ".join(str(error).split())[:120],
            )


def _states(model: Any, tokens: Tensor, positions: Tensor, mask: Tensor, kept: Cache) -> Tensor:
    return model.base_model(
        input_ids=tokens, position_ids=positions, attention_mask=mask, past_key_values=kept, use_cache=True
    ).last_hidden_state


def _with_room(model: PreTrainedModel, kept: Any, length: int) -> StaticCache:
    """Move the keys and values of `kept`, layer by layer, to the start of a cache with room for `length` tokens."""
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=length)
    layers: Any = static.layers
    for layer, source in zip(layers, kept.layers, strict=True):
        layer.update(source.keys, source.values)
        source.keys = source.values = None
    return static


def records_steps(model: PreTrainedModel) -> bool:
    """Return whether the steps of answers are replayed as a CUDA graph; on CUDA, log why not, or that they are."""
    return _chosen(model, "answers replay a CUDA graph", _obstacle(model))


def compiles_steps(model: PreTrainedModel) -> bool:
    """Return whether transformers compiles the steps of timed answers; on CUDA, log why not, or that it does."""
    obstacle = _obstacle(model)
    if obstacle is None and model.device.type == "cuda":
        obstacle = _compiler_failure()
    return _chosen(model, "timed answers are compiled", obstacle)


def _chosen(model: PreTrainedModel, way: str, obstacle: str | None) -> bool:
    """Return whether steps are decoded over a static cache: on CUDA, unless there is an obstacle.

    Not on the CPU, which has no launches to save.
    """
    if model.device.type != "cuda":
        return False
    _say(model.name_or_path, way if obstacle is None else f"step by step, because {obstacle}")
    return obstacle is None


def _obstacle(model: PreTrainedModel) -> str | None:
    """Return why the model's steps can neither be recorded nor compiled, or None."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return "the products of its quantized weights wait for the CPU"
    if "sliding_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        return "it has layers of sliding attention"
    return None


@cache
def _compiler_failure() -> str | None:
    """Return why torch.compile makes no kernels for the GPU here (it needs Triton and a C compiler), or None."""
    try:
        torch.compile(lambda one: one + 1)(torch.zeros(1, device="cuda"))
    except Exception as error:  # of several kinds: Triton is missing, or its compiler
        return f"torch.compile fails here ({str(error).splitlines()[0][:120]})"
    return None


@cache
def _say(model: str, how: str) -> None:
    """Log how a model decodes, once, for its answers are asked batch by batch."""
    log.info("%s: decoding: %s", model, how)
