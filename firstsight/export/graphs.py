"""Trace a model as three ONNX graphs: vision tower, embeddings, and decoder with a key-value cache; an encoder as one.

transformers' own vision tower splits its attention by lengths that are data, which torch.export cannot trace; and it is
traced on a clip here, because a graph that is traced on an image may be silently wrong on clips. The wrappers below
compute what the model's own forward pass computes, with its own modules.
"""

from ast import literal_eval
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from firstsight.engine.layout import DECODER, EMBEDDINGS, ENCODER, VISION

# The first in which attention, RMS norms and rotary embeddings are operators of their own, which run faster than their
# parts.
_OPSET = 23
# Shapes to trace with: none of them 1, and no two equal, so that no dimension is taken for a constant or for another.
_STEPS, _SIDE = 3, 4
_ROWS, _NEW, _PAST = 2, 5, 7
_ANY = Dim.DYNAMIC
# Under this key torch.onnx says in which modules a node's operation is, and the operation itself.
_SCOPES = "pkg.torch.onnx.name_scopes"


# The name under which transformers knows `_grouped_attention`.
_GROUPED = "grouped"


def _grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attend with the cached keys and values as they are; transformers would repeat them for each head of a group."""
    together = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return together.transpose(1, 2).contiguous(), None


AttentionInterface.register(_GROUPED, _grouped_attention)
AttentionMaskInterface.register(_GROUPED, sdpa_mask)


@contextmanager
def _grouped(language_model: nn.Module) -> Iterator[None]:
    """Compute the language model's attention by `_grouped_attention` in the block."""
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation(_GROUPED)
    try:
        yield
    finally:
        language_model.set_attn_implementation(before)


class VisionTower(nn.Module):
    """Compute the visual tokens of images and clips of one size; frames of other times attend to themselves alone."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor, positions: Tensor) -> Tensor:
        """Return visual tokens [T, n, H] of patches [T, h * w, D], which have row and column `positions` [h * w, 2]."""
        tower: Any = self.tower
        # A convolution whose stride is its kernel is a product with each patch.
        states = nn.functional.linear(pixels, tower.patch_embed.proj.weight.flatten(1))
        cos, sin = (angles[:, None] for angles in tower.rotary_pos_emb(states, positions))
        for block in tower.blocks:
            states = states + _attention(block.attn, block.norm1(states), cos, sin)
            states = states + block.mlp(block.norm2(states))
        merger = tower.merger
        return merger.mlp(merger.ln_q(states).reshape(pixels.shape[0], -1, merger.hidden_size))


def _attention(attention: nn.Module, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return what a vision tower's attention computes of states [T, n, E], for each of the T alone."""

    def rotated(one: Tensor) -> Tensor:
        first, second = one.chunk(2, dim=-1)
        return one * cos + torch.cat([-second, first], dim=-1) * sin

    query, key, value = attention.qkv(states).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
    heads = (one.transpose(1, 2) for one in (rotated(query), rotated(key), value))
    together = nn.functional.scaled_dot_product_attention(*heads, scale=attention.scaling)
    return attention.proj(together.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Compute the next token's logits and the extended key-value cache."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.language_model = getattr(model.model, "language_model", model.model)
        self.head = model.get_output_embeddings()

    def forward(
        self, embeddings: Tensor, positions: Tensor, mask: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return logits [B, V] after the last token, and keys and values [B, kv_heads, P + S, D] of each layer.

        Args:
            embeddings: [B, S, H] of the new tokens.
            positions: theirs, [3, B, S] for Qwen2-VL, else [B, S].
            mask: [B, P + S], 1 at tokens and 0 at padding, which is on the left.
            past: keys and values [B, kv_heads, P, D] of each layer.
        """
        outputs = self.language_model(
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=DynamicCache(past),
            use_cache=True,
        )
        present = [(layer.keys, layer.values) for layer in outputs.past_key_values.layers]
        return self.head(outputs.last_hidden_state[:, -1:])[:, 0], present


class Encoder(nn.Module):
    """Compute the classes' logits [B, C] of an encoder, for texts of one part."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return logits of tokens [B, S]; the mask [B, S] is 1 at tokens and 0 at padding, which is on the right."""
        return self.model(input_ids=tokens, attention_mask=mask).logits


def cache_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Return the number of layers, of key-value heads, and the width of a head, of the model's key-value cache."""
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, width


@torch.no_grad()
def write_graphs(model: PreTrainedModel, folder: Path) -> None:
    """Write the graphs of a float32 model on the CPU into `folder`, weights in a file beside each.

    Numbers of questions, tokens, frames and patches are free in each. A model of text alone has no vision graph.
    """
    hidden = model.config.get_text_config().hidden_size
    visual = getattr(model.model, "visual", None)
    if visual is not None:
        patch = visual.patch_embed.proj.weight[0].numel()
        example = (torch.zeros(_STEPS, _SIDE**2, patch), torch.zeros(_SIDE**2, 2, dtype=torch.long))
        shapes = ({0: _ANY, 1: _ANY}, {0: _ANY})
        _write(VisionTower(visual), example, shapes, ["pixels", "positions"], ["features"], folder / VISION)

    tokens = torch.zeros(_ROWS, _NEW, dtype=torch.long)
    shapes = ({0: _ANY, 1: _ANY},)
    _write(model.get_input_embeddings(), (tokens,), shapes, ["tokens"], ["embeddings"], folder / EMBEDDINGS)

    layers, heads, width = cache_shape(model)
    axes = (3,) if visual is not None else ()
    example = (
        torch.zeros(_ROWS, _NEW, hidden),
        torch.arange(_PAST, _PAST + _NEW).expand(*axes, _ROWS, _NEW),
        torch.ones(_ROWS, _PAST + _NEW, dtype=torch.long),
        [(torch.zeros(_ROWS, heads, _PAST, width), torch.zeros(_ROWS, heads, _PAST, width)) for _ in range(layers)],
    )
    cached = {0: _ANY, 2: _ANY}
    batch = len(axes)
    shapes = (
        {0: _ANY, 1: _ANY},
        {batch: _ANY, batch + 1: _ANY},
        {0: _ANY, 1: _ANY},
        [(cached, cached) for _ in range(layers)],
    )
    names = [f"{kind}.{layer}" for layer in range(layers) for kind in ("key", "value")]
    taken = ["embeddings", "positions", "mask", *(f"past.{name}" for name in names)]
    given = ["logits", *(f"present.{name}" for name in names)]
    decoder = Decoder(model)
    with _grouped(decoder.language_model):
        _write(decoder, example, shapes, taken, given, folder / DECODER)


@torch.no_grad()
def write_encoder(model: PreTrainedModel, folder: Path) -> None:
    """Write the graph of a float32 encoder with a head for classes on the CPU into `folder`, its weights beside it."""
    mask = torch.ones(_ROWS, _NEW, dtype=torch.long)
    tokens = torch.full_like(mask, model.config.pad_token_id + 1)
    shape = {0: _ANY, 1: _ANY}
    _write(Encoder(model), (tokens, mask), (shape, shape), ["tokens", "mask"], ["logits"], folder / ENCODER)


def _write(module: nn.Module, example: tuple, shapes: tuple, inputs: list[str], outputs: list[str], path: Path) -> None:
    program = torch.onnx.export(
        module.eval(),
        example,
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=inputs,
        output_names=outputs,
        verbose=False,
        opset_version=_OPSET,
    )
    for node in program.model.graph:
        # Matrices are called as in PyTorch, by the module that holds them.
        scopes = literal_eval(node.metadata_props.get(_SCOPES, "[]"))[:-1]
        if node.op_type == "MatMul" and scopes and scopes[-1]:
            node.name = scopes[-1]
        # Where each node comes from in Python takes more bytes than small graphs do.
        for one in (node, *node.outputs):
            one.metadata_props.clear()
            one.doc_string = None
    program.save(path, external_data=True)
