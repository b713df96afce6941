"""Train with the language model's forward and backward pass replayed as CUDA graphs.

A training step launches thousands of kernels, one after the other from Python, which takes longer than a fast GPU needs
to compute them unless the batch is large. A CUDA graph holds all launches of a pass, which are replayed with a single
one. Its shapes and addresses are fixed: there is a graph for each shape of a batch, whose sequences are padded to a
multiple of `_MULTIPLE` tokens, so that a few graphs serve all batches. Vision tower, embeddings and loss are launched
as always.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from firstsight.core.params import Optimisation
from firstsight.core.stage import log
from firstsight.models.architecture import draws_random_numbers, is_encoder
from firstsight.models.cuda_graph import is_out_of_memory, record
from firstsight.training.comparison import alike, random_gradient

_MULTIPLE = 64
# Shapes that are recorded; batches of others are computed as without graphs.
_SHAPES = 32
# How often in a row graphs are released in vain, for batches of shapes that are not recorded: before each has been
# replayed this often.
_RELEASES, _REPLAYS = 4, 8
# The tensors that a language model takes of a packed batch: embeddings or tokens, and those that place them.
_PLACES = {"position_ids", "attention_mask"}
_INPUTS = {"inputs_embeds", "input_ids", "mm_token_type_ids", *_PLACES}


def can_record(model: PreTrainedModel, settings: Optimisation) -> bool:
    """Return whether a model's passes can be recorded, as it is trained by these settings; it may lack its adapters.

    Encoders' are not, products of NF4 weights wait for the CPU, and layers that are computed twice save the state of
    random numbers if they have dropout.
    """
    drops = draws_random_numbers(model) or (settings.method != "full" and settings.adapter.dropout > 0)
    again = settings.gradient_checkpointing and drops
    return settings.method != "qlora" and not again and not is_encoder(model.config.model_type)


class GraphedLanguageModel:
    """Replace the `forward` of a model's language model by one that replays graphs in training.

    The first batch of a shape is computed as without graphs, the second one is recorded. Calls other than those of
    training on packed batches with an additive mask [B, 1, R, S] are passed on. Gradients of weights are summed where
    the graphs expect them, in tensors that become the weights' `grad`.
    """

    def __init__(self, model: PreTrainedModel):
        self._module = getattr(model.base_model, "language_model", model.base_model)
        self._forward: Callable[..., Any] = self._module.forward
        self._body = _Body(self._module, self._forward)
        self._trained = {name: one for name, one in self._body.named_parameters() if one.requires_grad}
        # The same weights as parameters of the graphs' own: autograd adds a gradient on the stream on which it first
        # met a parameter, and only those of the stream that records can be recorded. Made for the first recording.
        self._weights: dict[str, nn.Parameter] = {}
        # What makes autograd call `_Replay.backward` where the inputs have no gradient.
        self._anchor = torch.zeros((), device=model.device, requires_grad=True)
        # The graphs of each shape that has been met; None before they are recorded.
        self._recorded: dict[object, _Recording | None] = {}
        # The fewest tokens of a batch for whose graph memory did not suffice.
        self._too_many = math.inf
        self._enabled = self._records = True
        # Whether graphs were found to compute what is computed without.
        self._checked = False
        # The memory of all graphs, of which one is in use at a time; its bytes, and the tokens of the largest shape.
        self._pool: Any = None
        self._pool_bytes = self._most_tokens = 0
        # Replays since the last release, and releases in vain.
        self._replayed = self._vain = 0
        self._module.forward = self

    def clear(self) -> None:
        """Begin anew: release the graphs and their memory, gradients included, and record later batches."""
        self._release()
        self._recorded, self._too_many = {}, math.inf
        self._weights = {}  # their gradients are kept where they are attached to the model's weights
        self._enabled, self._checked, self._vain = True, False, 0

    def stop(self) -> bool:
        """Release the graphs and record no others, until `clear`; return whether there were any."""
        held = any(self._recorded.values())
        self.clear()
        self._enabled = False
        return held

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Compute all batches as the first of their shape, and record none."""
        self._records = False
        try:
            yield
        finally:
            self._records = True

    def __call__(self, *arguments: Any, **inputs: Any) -> Any:
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        others = (value for name, value in inputs.items() if name not in tensors)
        trains = self._module.training and torch.is_grad_enabled() and self._enabled
        packed = _PLACES <= tensors.keys() <= _INPUTS and all(one in (None, False) for one in others)
        if not trains or arguments or not packed:
            return self._forward(*arguments, **inputs)
        length = tensors["position_ids"].shape[-1]
        padded = _padded(tensors, -length % _MULTIPLE)
        shape = tuple((tuple(one.shape), one.dtype, one.requires_grad) for one in padded.values())
        # Without autocast's cache, whose copies of weights a graph would leave in its own memory.
        device = self._anchor.device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        with torch.autocast(device, autocast[1], enabled=autocast[0], cache_enabled=False):
            if self._moved():
                self.clear()
            recording = self._recorded.get(shape)
            met = shape in self._recorded and _tokens(padded) < self._too_many
            if recording is None and met and self._records:
                recording = self._record(shape, padded)
            if recording is None:
                self._make_room(shape, padded)
                if self._weights:  # otherwise there would be gradients twice
                    self._attach_gradients()
                states = self._body(**padded)[:, :length]
            else:
                self._replayed += 1
                embeddings = tensors.get("inputs_embeds")
                states = _Replay.apply(embeddings, self._anchor, padded, length, recording, self._attach_gradients)
        return BaseModelOutputWithPast(last_hidden_state=states)

    def _record(self, shape: object, inputs: dict[str, Tensor]) -> "_Recording | None":
        """Record the passes over inputs of this shape; None where that fails, and no more graphs if it is for good."""
        tokens = _tokens(inputs)
        if tokens > self._most_tokens and not self._has_room_for(tokens):
            # While it is recorded, nothing is given back to the GPU: recorded from short to long, the shapes would take
            # the sum of their memory. Those of shorter ones fit into that of a longer one.
            self._release()
        try:
            if not self._weights:
                weights = {name: nn.Parameter(one.detach()) for name, one in self._trained.items()}
                for weight in weights.values():
                    weight.grad = torch.zeros_like(weight)
                self._weights = weights
            before = _bytes_in_use()
            recording = _Recording(self._body, self._weights, inputs, self._record_work)
            if not self._checked and not self._is_right(recording, inputs):
                raise RuntimeError("a graph computes something else")
        except Exception as error:  # memory does not suffice, or a layer waits for the CPU, or of other kinds
            if is_out_of_memory(error):
                log.warning("training: batches of %d tokens are not replayed: memory does not suffice", tokens)
                self._too_many = min(tokens, self._too_many)
                self._recorded.pop(shape)
                self._release()
                self._weights = {}  # with their gradients, where these are not the model's by now
            else:
                log.warning("training: without CUDA graphs, because recording failed: %s", _first_line(error))
                self.stop()
            return None
        if not self._checked:
            log.info("training: the language model's passes are replayed as CUDA graphs")
        self._checked = True
        self._recorded[shape] = recording
        self._most_tokens = max(tokens, self._most_tokens)
        self._pool_bytes += _bytes_in_use() - before
        return recording

    def _make_room(self, shape: object, inputs: dict[str, Tensor]) -> None:
        """Release the graphs if they leave too little memory to compute a batch of another shape without.

        They are recorded anew. A shape that is new is recorded at its next batch, and releases them once; shapes that
        are never recorded could do so at every batch, and end graphs if that happens again and again.
        """
        tokens = _tokens(inputs)
        never = tokens >= self._too_many or (shape not in self._recorded and len(self._recorded) >= _SHAPES)
        if self._records and not never:
            self._recorded.setdefault(shape)
        if not any(self._recorded.values()) or self._has_room_for(tokens):
            return
        if never:
            graphs = sum(one is not None for one in self._recorded.values())
            self._vain = 0 if self._replayed >= _REPLAYS * graphs else self._vain + 1
        self._release()
        if self._vain == _RELEASES:
            log.warning("training: without CUDA graphs from here on, because they leave too little memory for others")
            self.stop()

    def _has_room_for(self, tokens: int) -> bool:
        """Return whether there is memory for a batch of so many tokens beside the graphs, by what these take."""
        return _has_room(2 * self._pool_bytes * tokens / max(1, self._most_tokens))

    def _release(self) -> None:
        """Release the graphs and their memory."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # none is being replayed
        self._recorded = dict.fromkeys(self._recorded)
        self._pool, self._pool_bytes, self._most_tokens, self._replayed = None, 0, 0, 0

    def _moved(self) -> bool:
        """Return whether weights are no longer where the graphs read them, as after `accelerate` has moved a model."""
        return any(one.data_ptr() != self._trained[name].data_ptr() for name, one in self._weights.items())

    def _record_work(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what a function launches on the GPU, without computing it; return a function that launches it."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        return record(work, self._pool).replay

    def _is_right(self, recording: "_Recording", inputs: dict[str, Tensor]) -> bool:
        """Return whether a recording, the first, gives the states and gradients that are computed without it.

        Gradients are those of a few weights, for a random one of the states. Those of the graphs' weights are not the
        model's yet.
        """
        own = {name: weight.grad for name, weight in self._weights.items()}
        torch._foreach_zero_(list(own.values()))
        # Matrices alone: the gradient of some biases, of keys without rotary embeddings, is nothing but rounding.
        names = [name for name, weight in self._weights.items() if weight.ndim > 1]
        names = sorted({names[len(names) * part // 4] for part in range(4)} | {names[-1]})
        device = self._anchor.device
        devices = [device] if device.type == "cuda" else []
        # From the same random numbers, so that dropout drops the same.
        with torch.random.fork_rng(devices):
            # Embeddings with a gradient where they have one: layers that are compiled have code for this.
            leaves = {name: one.detach().requires_grad_(one.requires_grad) for name, one in inputs.items()}
            states = self._body(**leaves)
            trained, gradient = [self._trained[name] for name in names], random_gradient(states)
            with torch.autocast(device.type, enabled=False):
                gradients = torch.autograd.grad(states, trained, gradient, allow_unused=True)
        with torch.random.fork_rng(devices):
            found = recording.forward(inputs)
            recording.backward(gradient)
        pairs = [(found, states)]
        pairs += [(own[name], one) for name, one in zip(names, gradients, strict=True) if one is not None]
        right = all(alike(one, other) for one, other in pairs)
        torch._foreach_zero_(list(own.values()))
        return right

    def _attach_gradients(self) -> None:
        """Make the gradients of the graphs' weights those of the model's, with what is summed in these so far."""
        own = {name: weight.grad for name, weight in self._weights.items()}
        if fresh := [own[name] for name, one in self._trained.items() if one.grad is None]:
            torch._foreach_zero_(fresh)
        for name, one in self._trained.items():
            if one.grad is not None and one.grad is not own[name]:
                own[name].copy_(one.grad)
            one.grad = own[name]


class _Body(nn.Module):
    """Call a language model by its own `forward`, as a module whose parameters can be exchanged for a call."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]):
        super().__init__()
        self.module, self._forward = module, forward

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return the final hidden states [B, S, H]."""
        # Copies, because code of compiled layers is for views or for others, for leaves or others: a recording, whose
        # inputs are leaves, must not need code that the batch before it did not.
        copies = {name: one.clone(memory_format=torch.contiguous_format) for name, one in inputs.items()}
        return self._forward(**copies, use_cache=False).last_hidden_state


class _Recording:
    """Hold the graphs of a forward and a backward pass, with the tensors that they read and write.

    The backward pass adds to the `grad` of `weights`.
    """

    def __init__(
        self,
        body: nn.Module,
        weights: dict[str, nn.Parameter],
        inputs: dict[str, Tensor],
        record: Callable[[Callable[[], None]], Callable[[], None]],
    ):
        self._body, self._weights = body, weights
        self._inputs = {name: one.detach().clone().requires_grad_(one.requires_grad) for name, one in inputs.items()}
        self._embeddings = self._inputs.get("inputs_embeds")
        if self._embeddings is not None and self._embeddings.requires_grad:
            self._embeddings.grad = torch.zeros_like(self._embeddings)
        self._states = self._gradient = Tensor()
        self._replay_forward = record(self._compute)
        self._gradient = torch.zeros_like(self._states)
        self._replay_backward = record(self._differentiate)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the final hidden states [B, S, H] of inputs, which the next call overwrites."""
        with torch.no_grad():
            for name, one in inputs.items():
                self._inputs[name].copy_(one)
        self._replay_forward()
        return self._states.detach()

    def backward(self, gradient: Tensor) -> Tensor | None:
        """Add to the weights' gradients, from that [B, s, H] of the first s states; return the embeddings' or None."""
        length = gradient.shape[1]
        self._gradient[:, :length].copy_(gradient)
        self._gradient[:, length:].zero_()
        own = None if self._embeddings is None else self._embeddings.grad
        if own is not None:
            own.zero_()
        self._replay_backward()
        return None if own is None else own[:, :length]

    def _compute(self) -> None:
        with torch.enable_grad():
            self._states = functional_call(self._body, self._weights, kwargs=self._inputs)

    def _differentiate(self) -> None:
        # As training does it; layers that are computed again do so as in their forward pass.
        with torch.autocast(self._states.device.type, enabled=False):
            self._states.backward(self._gradient)


class _Replay(torch.autograd.Function):
    """Replay a recorded pass, as a step of autograd."""

    @staticmethod
    def forward(ctx, embeddings, anchor, inputs, length, recording, attach_gradients):
        ctx.recording, ctx.attach_gradients = recording, attach_gradients
        return recording.forward(inputs)[:, :length]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        ctx.attach_gradients()
        return ctx.recording.backward(gradient), None, None, None, None, None


def _tokens(inputs: dict[str, Tensor]) -> int:
    """Return how many tokens all sequences of a batch have, padding included."""
    return inputs["position_ids"].shape[-2:].numel()


def _has_room(size: float) -> bool:
    """Return whether so many bytes of the current GPU are free, or kept by PyTorch for tensors to come."""
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] >= size:
        return True
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] >= size


def _bytes_in_use() -> int:
    """Return the bytes of the current GPU that PyTorch holds, after it has given back those that nothing needs."""
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def _first_line(error: Exception) -> str:
    """Return the first line of what an error is about, and of the one that led to it."""
    lines = [str(one).splitlines()[0] for one in (error.__context__, error) if one is not None and str(one)]
    return "; ".join(dict.fromkeys(lines))


def _padded(inputs: dict[str, Tensor], more: int) -> dict[str, Tensor]:
    """Return the inputs with `more` tokens at the end of each sequence, to which none of the others attends."""
    if not more:
        return inputs
    length, rows = inputs["position_ids"].shape[-1], inputs["attention_mask"].shape[2]
    # A mask of no tokens stays one: each token attends to all earlier ones, and padding comes after all of them.
    widths = {"inputs_embeds": (0, 0, 0, more), "attention_mask": (0, more, 0, more if rows else 0)}
    padded = {name: pad(one, widths.get(name, (0, more))) for name, one in inputs.items()}
    padded["attention_mask"][..., :rows, length:] = torch.finfo(padded["attention_mask"].dtype).min
    return padded
