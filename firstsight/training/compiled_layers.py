"""Compile the layers of a model that is trained on a GPU, so that it launches fewer kernels, which move less memory.

Between two matrix products, a layer launches a dozen small kernels (norms, rotary embeddings, activations), each of
which reads and writes all of the layer's activations. `torch.compile` makes a few of them. The code is the same for all
layers of a kind and all shapes, so it is compiled for one layer and used by all.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from firstsight.core.stage import log
from firstsight.packing.forward import last_hidden_states
from firstsight.training.comparison import alike, random_gradient

# Micro-batches of a training from which on compiling pays: it took 10 to 100 s on an H100, where it saves the GPU 20 to
# 80 ms of each.
LEAST_BATCHES = 2_000
# Of how many weights gradients are compared. The weights are an odd number of places apart, so that both matrices of an
# adapter, which come in turns, are among them.
_COMPARED = 16
# Kinds of inputs that the code is made for: by layer (text, vision), mask, size of the batch, and what has gradients.
_KINDS = 64


def compile_layers(model: PreTrainedModel, batch: dict[str, Tensor], dtype: torch.dtype | None) -> bool:
    """Compile the layers of language model and vision tower, for their training alone; return whether they are.

    States and gradients of a packed batch are computed without and with compiled layers. Where they differ, or where
    compiling fails (it needs Triton and a C compiler), the layers are left as they were, and the log says why. A layer
    that cannot be compiled later, for a batch of another kind, is computed without for that kind.

    Args:
        model: the model, in training mode.
        batch: a packed batch (`firstsight.packing.pack.collate`) on the model's device.
        dtype: that of autocast in the training; None without.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    torch._dynamo.config.recompile_limit = _KINDS
    # In several processes, layers would be split where DistributedDataParallel could send gradients meanwhile.
    torch._dynamo.config.optimize_ddp = False
    # The loss sets this and sets it back, which leaves it written out. Code is for the one state or for the other.
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = matmul.fp32_precision == "tf32"
    log.info("training: compiling %d layers, which takes 10 to 100 s on a GPU", len(layers))
    backend = _Backend()
    try:
        expected = _states_and_gradients(model, batch, dtype)
        for layer in layers:
            layer.forward = _InTraining(layer, backend)
        found = _states_and_gradients(model, batch, dtype)
        if not all(map(alike, found, expected)):
            raise RuntimeError("compiled ones compute something else")
    except Exception as error:  # of many kinds: Triton or its compiler is missing, or memory
        for layer in layers:
            vars(layer).pop("forward", None)
        log.warning("training: the layers are not compiled, because %s", _one_line(error))
        return False
    backend.must_compile = False
    log.info("training: the layers are compiled")
    return True


class _InTraining:
    """Replace the `forward` of a layer by one that is compiled, but not for evaluation, which would need other code.

    What gradient checkpointing computes again is the compiled layer. transformers 5.17 does so around `forward`, and
    5.23 within it, where it would be compiled too, and lost where that fails.
    """

    def __init__(self, layer: nn.Module, backend: "_Backend"):
        self._layer, self._forward = layer, layer.forward
        self._checkpoints = "__call__" not in vars(GradientCheckpointingLayer)
        inner = MethodType(type(layer).forward.__wrapped__, layer) if self._checkpoints else layer.forward
        self._compiled: Callable[..., Any] = torch.compile(inner, backend=backend, dynamic=True)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not self._layer.training or not torch.is_grad_enabled():
            return self._forward(*arguments, **named)
        if self._checkpoints and self._layer.gradient_checkpointing:
            return self._layer._gradient_checkpointing_func(partial(self._compiled, **named), *arguments)
        return self._compiled(*arguments, **named)


class _Backend:
    """Compile what `torch.compile` has traced; unless it must compile, a graph that fails is computed as it was traced.

    PyTorch's own way to go on without (`suppress_errors`) would also give up all code that has been compiled.
    """

    def __init__(self):
        self.must_compile = True

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            # Otherwise a backward pass that does not compile fails in the middle of training.
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                return _compile(graph, inputs)
        except Exception as error:
            if self.must_compile:
                raise
            log.warning("training: layers are not compiled for batches of another kind, because %s", _one_line(error))
            return graph.forward


def _compile(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx  # takes seconds to import, and only long trainings use it

    # With the random numbers that dropout draws without compiling.
    compiled: Any = compile_fx(graph, inputs, config_patches={"fallback_random": True})
    return compiled


def _states_and_gradients(model: PreTrainedModel, batch: dict[str, Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """Return the final hidden states [B, S, H] and, for a random gradient of these, the gradients of some weights."""
    # Matrices alone: the gradient of some biases, of keys without rotary embeddings, is nothing but rounding.
    trained = [one for one in model.parameters() if one.requires_grad and one.ndim > 1]
    some = trained[:: (len(trained) // _COMPARED) | 1]
    device = model.device
    own = torch.get_autocast_dtype(device.type)
    # Both times from the same random numbers, of which training finds as many as before.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # With autocast as it is where graphs are recorded, without its cache: other settings need code of their own.
        with torch.autocast(device.type, dtype or own, enabled=dtype is not None, cache_enabled=False):
            states = last_hidden_states(model, batch)
        gradients = torch.autograd.grad(states, some, random_gradient(states), allow_unused=True)
    return [states.detach(), *(one for one in gradients if one is not None)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
