"""Hold the sizes of a model that its memory and time depend on, and the bytes of its weights.

Bytes per parameter:
    float32 4, bfloat16 2; "auto" is bfloat16
    int8    1 for the linear layers of the language model (Dettmers et al., 2022, arXiv:2208.07339), 2 for the rest
    nf4     0.516 for those: half a byte, an 8-bit scale per 64 weights, and a float32 per 256 scales (double
            quantization, Dettmers et al., 2023, arXiv:2305.14314, 4.127 bits); 2 for the rest
    int4    0.531 for those: half a byte, and a 16-bit scale per 64 weights; 2 for the rest

Not counted: INT8's scales (about 0.1%).

Exported, a matrix takes 4 bytes per parameter, 1.0625 in 8 bits and 0.5625 in 4 bits, where 64 parameters share a
float32 scale. Embeddings take 1 in both, and what is no matrix takes 4. The output head is a matrix of its own, also
where it is the embedding.
"""

import math

from transformers import PreTrainedModel

from firstsight.core.errors import UserError
from firstsight.core.params import Optimisation
from firstsight.models.architecture import is_encoder, linear_layers, sides

_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
_LINEAR = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "nf4": _NF4, "int4": 0.5 + 2 / 64}
_EXPORTED = {"float32": 4, "int8": 1 + 4 / 64, "w4a8": 1 / 2 + 4 / 64}
_KEPT = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 2, "nf4": 2, "int4": 2}


def on_gpu(precision: str) -> str:
    """Return the precision that weights have on CUDA: that of "auto" by name."""
    return "bfloat16" if precision == "auto" else precision


class Shape:
    """Hold the sizes of a model on the meta device that memory and time depend on."""

    def __init__(self, name: str, model: PreTrainedModel):
        self.name, self.model = name, model
        text, vision = model.config.get_text_config(), getattr(model.config, "vision_config", None)
        self.hidden, self.layers, self.rows = text.hidden_size, text.num_hidden_layers, text.vocab_size
        # GPT-2's n_inner may be null, for four times its width, and all its heads have keys and values of their own.
        self.intermediate = (
            getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * self.hidden
        )
        heads = text.num_attention_heads
        self.kv_width = (getattr(text, "num_key_value_heads", None) or heads) * (text.hidden_size // heads)
        self.vision_hidden = self.vision_intermediate = self.vision_layers = 0
        if vision is not None:
            # In Qwen2-VL embed_dim is the tower's width, and hidden_size the width that it projects to.
            self.vision_hidden = getattr(vision, "embed_dim", vision.hidden_size)
            self.vision_intermediate = (
                getattr(vision, "intermediate_size", None) or vision.mlp_ratio * self.vision_hidden
            )
            self.vision_layers = getattr(vision, "depth", None) or vision.num_hidden_layers
        # Numbers per patch: those of the pixels, and of two frames where patches are pairs.
        self.patch_values = self.vision_head = 0
        if vision is not None:
            self.patch_values = 3 * vision.patch_size**2 * getattr(vision, "temporal_patch_size", 1)
            heads = getattr(vision, "num_heads", None) or vision.num_attention_heads
            self.vision_head = self.vision_hidden // heads

        encoder = is_encoder(model.config.model_type)
        # All of an encoder counts as the language model; its head is small.
        decoder = model if encoder else model.get_decoder()
        self.language_linears = linear_layers(decoder)
        head = None if encoder else model.get_output_embeddings()
        inside = {id(m) for m in self.language_linears.values()} | {id(head)}
        sees = {name: m for name, m in linear_layers(model).items() if id(m) not in inside}
        self.vision_linears = list(sees.values())
        self.vision_gated = any(name.endswith("gate_proj") for name in sees)
        in_decoder = {id(m) for m in decoder.modules()}
        self.vision_rotary = any("rotary" in name and id(m) not in in_decoder for name, m in model.named_modules())

        self.parameters = model.num_parameters()
        self.stored_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self.head = 0 if head is None else head.weight.numel()
        self.tied = head is not None and head.weight is model.get_input_embeddings().weight
        self.language = sum(p.numel() for p in decoder.parameters()) + (0 if self.tied else self.head)
        self.vision = self.parameters - self.language
        self.embedding = model.get_input_embeddings().weight.numel()
        self.linear = sum(m.weight.numel() for m in self.language_linears.values())
        self.largest_linear = max(m.weight.numel() for m in self.language_linears.values())

    def weights_bytes(self, precision: str) -> float:
        """Return the bytes of the weights loaded in `precision`."""
        precision = on_gpu(precision)
        return self.linear * _LINEAR[precision] + (self.parameters - self.linear) * _KEPT[precision]

    def exported_bytes(self, weights: str) -> float:
        """Return the bytes of the model's ONNX graphs, whose weights are "float32", "int8" or "w4a8"."""
        layers = self.linear + sum(module.weight.numel() for module in self.vision_linears)
        rest = self.parameters - layers - self.embedding - (0 if self.tied else self.head)
        embeddings = 4 * self.embedding if weights == "float32" else self.embedding + 4 * self.rows
        return (layers + self.head) * _EXPORTED[weights] + embeddings + 4 * rest

    def trained(self, settings: Optimisation) -> int:
        """Return the number of parameters that `settings` train.

        Raises:
            UserError: an adapter's target is not a linear layer of the language model, or its rank exceeds the layers'.
        """
        if settings.method == "full":
            return self.parameters if settings.train_vision else self.language
        last = {name: name.rsplit(".", 1)[-1] for name in self.language_linears}
        targets = settings.adapter.target_modules or sorted(set(last.values()))
        if absent := sorted(set(targets) - set(last.values())):
            raise UserError(
                f"adapter.target_modules: expected linear layers of {self.name}'s language model "
                f"({', '.join(sorted(set(last.values())))}), found {absent[0]}; correct it"
            )
        adapted = [module for name, module in self.language_linears.items() if last[name] in targets]
        if settings.train_vision:
            adapted += self.vision_linears
        if settings.adapter.rank > (most := max(min(sides(layer)) for layer in adapted)):
            raise UserError(
                f"adapter.rank: expected at most {most}, the smaller side of the largest layer of {self.name} that is "
                f"adapted, found {settings.adapter.rank}; lower it"
            )
        if settings.method == "adalora":
            rank = math.ceil(1.5 * settings.adapter.rank)
            return sum(rank * (sum(sides(layer)) + 1) for layer in adapted)
        return sum(settings.adapter.rank * sum(sides(layer)) for layer in adapted)
