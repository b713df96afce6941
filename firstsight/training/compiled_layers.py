"""Compile the layers of a model that is trained on a GPU, so that it launches fewer kernels, which move less memory.

Between two matrix products, a layer launches a dozen small kernels (norms, rotary embeddings, activations), each of
which reads and writes all of the layer's activations. `torch.compile` makes a few of them. The code is the same for all
layers of a kind and all shapes, so it is compiled for one layer and used by all.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from firstsight.core.stage import log
from firstsight.packing.forward import last_hidden_states

# Micro-batches of a training from which on compiling pays: it took 10 to 100 s on an H100, where it saves the GPU 20 to
# 80 ms of each.
LEAST_BATCHES = 2_000
# How far states and gradients may be from those of layers that are not compiled, as a share of their norm. In bfloat16,
# gradients computed twice differ by 0.01, because sums are in another order.
_TOLERANCE = 0.1
# Of how many weights gradients are compared. The weights are an odd number of places apart, so that both matrices of an
# adapter, which come in turns, are among them.
_COMPARED = 16
# Kinds of inputs that the code is made for: by layer (text, vision), mask, size of the batch, and what has gradients.
_KINDS = 64
_BACKEND = "inductor"
# Without choosing kernels by timing them, which would round otherwise in another run; and with the random numbers that
# dropout draws without compiling.
_OPTIONS = {"deterministic": True, "fallback_random": True}


def compile_layers(model: PreTrainedModel, batch: dict[str, Tensor], dtype: torch.dtype | None) -> bool:
    """Compile the layers of language model and vision tower in place; return whether they are compiled.

    States and gradients of a packed batch are computed without and with compiled layers. Where they differ, or where
    compiling fails (it needs Triton and a C compiler), the layers are left as they were, and the log says why.

    Args:
        model: the model, in training mode.
        batch: a packed batch (`firstsight.packing.pack.collate`) on the model's device.
        dtype: that of autocast in the training; None without.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    torch._dynamo.config.recompile_limit = _KINDS
    log.info("training: compiling %d layers, which takes 10 to 100 s on a GPU", len(layers))
    options = {"options": _OPTIONS} if _BACKEND == "inductor" else {}
    try:
        expected = _states_and_gradients(model, batch, dtype)
        for layer in layers:
            layer.compile(backend=_BACKEND, dynamic=True, **options)
        found = _states_and_gradients(model, batch, dtype)
        if not all(_alike(one, other) for one, other in zip(found, expected, strict=True)):
            raise RuntimeError("compiled ones compute something else")
    except Exception as error:  # of many kinds: Triton or its compiler is missing, or memory
        for layer in layers:
            layer._compiled_call_impl = None
        log.warning("training: the layers are not compiled, because %s", " ".join(str(error).split())[:200])
        return False
    # What cannot be compiled later, such as a batch of another size, is computed without, and training goes on.
    torch._dynamo.config.suppress_errors = True
    log.info("training: the layers are compiled")
    return True


def _states_and_gradients(model: PreTrainedModel, batch: dict[str, Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """Return the final hidden states [B, S, H] and, for these as their gradient, the gradients of some weights."""
    trained = [one for one in model.parameters() if one.requires_grad]
    some = trained[:: (len(trained) // _COMPARED) | 1]
    device = model.device
    own = torch.get_autocast_dtype(device.type)
    # Both times from the same random numbers, of which training finds as many as before.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # With autocast as it is where graphs are recorded, without its cache: other settings need code of their own.
        with torch.autocast(device.type, dtype or own, enabled=dtype is not None, cache_enabled=False):
            states = last_hidden_states(model, batch)
        gradients = torch.autograd.grad(states, some, states.detach(), allow_unused=True)
    return [states.detach(), *(one for one in gradients if one is not None)]


def _alike(found: Tensor, expected: Tensor) -> bool:
    return bool((found.float() - expected.float()).norm() <= _TOLERANCE * expected.float().norm())
