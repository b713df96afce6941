"""Estimate the GPU memory of each stage on CUDA from shapes.

Weights, in bytes per parameter:
    float32 4, bfloat16 2; "auto" is bfloat16
    int8    1 for the linear layers of the language model (Dettmers et al., 2022, arXiv:2208.07339), 2 for the rest
    nf4     0.516 for those: half a byte, an 8-bit scale per 64 weights, and a float32 per 256 scales (double
            quantization, Dettmers et al., 2023, arXiv:2305.14314, 4.127 bits); 2 for the rest

Training, for n trained parameters (mixed precision; 18 bytes per parameter including the float32 weights, as in
Hugging Face's "Model training anatomy"):
    full            float32 weights 4, gradient 4, AdamW's two moments 8, and autocast's 16-bit copies of trained
                    linear weights 2; frozen weights stay in float32
    lora, adalora   the same for n = sum rank x (in + out) over adapted layers; the frozen model in bfloat16. AdaLoRA
                    starts with half as many ranks again, each with a singular value
    qlora           the same over NF4, plus one layer's weights in 16 bits at a time

Activations saved for the backward pass, in bytes, for B samples of S tokens and P patches (counted from what autograd
saves under bfloat16 autocast with PyTorch's fused attention, which saves no S x S scores; cf. Korthikanti et al., 2022,
arXiv:2205.05198). h, i, L: hidden, intermediate, layers of the language model; e, m, D: those of the vision tower.
    language layer  B S (34 h + 8 i) for full: float32 residuals and norms 16 h, inputs of five linear layers 10 h,
                    attention's q, k, v and result 8 h, MLP 8 i; 28 h + 8 i for adapters, whose residuals are 16-bit,
                    and (24 h + 4 i) more for adapters with dropout
    its mask        B S^2 x 2, in each layer for full (autocast casts it again in each), once for adapters
    vision block    P (26 e + 6 m) for full, P (22 e + 6 m) for adapters, none if the tower is frozen; Qwen2.5-VL's,
                    with RMS norms and a gated MLP, P (6 e + 2 m) more, without its windowed attention, for which
                    autograd saved a quarter more than this on a tiny model
    checkpointing   only the layers' inputs are saved, B S 4 h (2 h) L + P 4 e (2 e) D, and one layer at a time
Without training, as much as one layer: B S (16 h + 6 i) + B S^2 x 2, or P (16 e + 4 m) (6 m with a gate), whichever is
larger. In addition, the mask added to attention scores, B S^2 x 4 (2 for a 16-bit model), and one layer's gradients.

Loss: logits of 512 answer tokens of student and of teacher, 2 x 512 x V x 4, which its Triton kernel overwrites; if the
head is trained, its gradient V h x 4 before it is added to that of earlier micro-batches. The cached teacher's head is
V h_t x 2.

Answering adds keys and values, B (S + new) x 2 x kv heads x head size x L x 2.

Every stage needs another 1 GiB for CUDA's context, library workspaces and fragmentation. Not counted: INT8's scales
(about 0.1%) and outliers.
"""

import math
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from firstsight.core.errors import UserError
from firstsight.core.params import Optimisation, Params
from firstsight.loss.products import CHUNK
from firstsight.models.loading import AUTO, TRAINING_PRECISIONS
from firstsight.planning.workload import Sizes, patches_and_tokens

OVERHEAD = 1 << 30
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
_LINEAR = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "nf4": _NF4}
_KEPT = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 2, "nf4": 2}


def on_gpu(precision: str) -> str:
    """Return the precision that weights have on CUDA: that of "auto" by name."""
    return AUTO["cuda"] if precision == "auto" else precision


class Shape:
    """Hold the sizes of a model on the meta device that memory and time depend on."""

    def __init__(self, name: str, model: PreTrainedModel):
        self.name, self.model = name, model
        text, vision = model.config.get_text_config(), getattr(model.config, "vision_config", None)
        self.hidden, self.intermediate, self.layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
        self.rows = text.vocab_size
        self.kv_width = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
        self.vision_hidden = self.vision_intermediate = self.vision_layers = 0
        if vision is not None:
            # In Qwen2-VL embed_dim is the tower's width, and hidden_size the width that it projects to.
            self.vision_hidden = getattr(vision, "embed_dim", vision.hidden_size)
            self.vision_intermediate = (
                getattr(vision, "intermediate_size", None) or vision.mlp_ratio * self.vision_hidden
            )
            self.vision_layers = getattr(vision, "depth", None) or vision.num_hidden_layers

        decoder = model.get_decoder()
        self.language_linears = {name: m for name, m in decoder.named_modules() if isinstance(m, nn.Linear)}
        head = model.get_output_embeddings()
        inside = {id(m) for m in self.language_linears.values()} | {id(head)}
        sees = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in inside}
        self.vision_linears = list(sees.values())
        self.vision_gated = any(name.endswith("gate_proj") for name in sees)

        self.parameters = model.num_parameters()
        self.stored_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self.head = head.weight.numel()
        self.tied = head.weight is model.get_input_embeddings().weight
        self.language = sum(p.numel() for p in decoder.parameters()) + (0 if self.tied else self.head)
        self.vision = self.parameters - self.language
        self.embedding = model.get_input_embeddings().weight.numel()
        self.linear = sum(m.weight.numel() for m in self.language_linears.values())
        self.largest_linear = max(m.weight.numel() for m in self.language_linears.values())

    def weights_bytes(self, precision: str) -> float:
        """Return the bytes of the weights loaded in `precision`."""
        precision = on_gpu(precision)
        return self.linear * _LINEAR[precision] + (self.parameters - self.linear) * _KEPT[precision]

    def trained(self, settings: Optimisation) -> int:
        """Return the number of parameters that `settings` train.

        Raises:
            UserError: an adapter's target is not a linear layer of the language model, or its rank exceeds the layers'.
        """
        if settings.method == "full":
            return self.parameters if settings.train_vision else self.language
        targets = settings.adapter.target_modules
        last = {name: name.rsplit(".", 1)[-1] for name in self.language_linears}
        if absent := sorted(set(targets) - set(last.values())):
            raise UserError(
                f"adapter.target_modules: expected linear layers of {self.name}'s language model "
                f"({', '.join(sorted(set(last.values())))}), found {absent[0]}; correct it"
            )
        adapted = [module for name, module in self.language_linears.items() if last[name] in targets]
        if settings.train_vision:
            adapted += self.vision_linears
        if settings.adapter.rank > (most := max(min(m.in_features, m.out_features) for m in adapted)):
            raise UserError(
                f"adapter.rank: expected at most {most}, the smaller side of the largest layer of {self.name} that is "
                f"adapted, found {settings.adapter.rank}; lower it"
            )
        if settings.method == "adalora":
            rank = math.ceil(1.5 * settings.adapter.rank)
            return sum(rank * (m.in_features + m.out_features + 1) for m in adapted)
        return sum(settings.adapter.rank * (m.in_features + m.out_features) for m in adapted)


@dataclass(frozen=True)
class Memory:
    """Hold bytes on the GPU; `training` is gradients, optimizer state and autocast's copies of weights."""

    weights: float
    training: float = 0.0
    activations: float = 0.0
    overhead: float = OVERHEAD

    @property
    def total(self) -> float:
        return self.weights + self.training + self.activations + self.overhead


def finetuning(shape: Shape, settings: Optimisation, sizes: Sizes) -> Memory:
    """Estimate the peak GPU memory of finetune-teacher."""
    return Memory(
        weights=_trained_weights(shape, settings),
        training=_optimisation(shape, settings),
        activations=training_activations(shape, settings, sizes) + _loss(shape, settings, None, sizes),
    )


def caching(shape: Shape, params: Params, sizes: Sizes) -> Memory:
    """Estimate the peak GPU memory of cache-teacher-targets, for targets that are not online."""
    settings = params.targets
    return Memory(
        weights=shape.weights_bytes(settings.precision),
        activations=_inference(shape, settings.precision, settings.batch_size, sizes),
    )


def distilling(student: Shape, teacher: Shape, params: Params, sizes: Sizes) -> Memory:
    """Estimate the peak GPU memory of distill, with the teacher for online targets, or its head for hidden states."""
    settings, targets = params.train, params.targets
    weights, activations = _trained_weights(student, settings), training_activations(student, settings, sizes)
    if targets.kind == "online":
        weights += teacher.weights_bytes(targets.precision)
        activations += _inference(teacher, targets.precision, settings.batch_size, sizes)
    elif targets.kind == "hidden":
        weights += head_bytes(student, teacher)
    return Memory(weights, _optimisation(student, settings), activations + _loss(student, settings, teacher, sizes))


def quantizing(shape: Shape, method: str) -> Memory:
    """Estimate the peak GPU memory of quantize-student: 16-bit and quantized weights at the same time."""
    return Memory(shape.weights_bytes("bfloat16") + shape.weights_bytes(method))


def answering(shape: Shape, precision: str, batch_size: int, new_tokens: int, sizes: Sizes) -> Memory:
    """Estimate the peak GPU memory of evaluate for one variant."""
    alone = sizes.alone()
    _, tokens = patches_and_tokens(shape.model, alone)
    keys_and_values = batch_size * (tokens + new_tokens) * 2 * shape.kv_width * shape.layers * 2
    return Memory(
        shape.weights_bytes(precision), activations=_inference(shape, precision, batch_size, alone) + keys_and_values
    )


def head_bytes(student: Shape, teacher: Shape) -> int:
    """Return the bytes of the teacher's 16-bit head over the shared vocabulary, stored with cached hidden states."""
    return min(student.rows, teacher.rows) * teacher.hidden * 2


def _trained_weights(shape: Shape, settings: Optimisation) -> float:
    adapters = 0 if settings.method == "full" else 4 * shape.trained(settings)
    return shape.weights_bytes(TRAINING_PRECISIONS[settings.method]) + adapters


def _optimisation(shape: Shape, settings: Optimisation) -> float:
    """Return the bytes of gradients, AdamW's moments, autocast's copies, and qlora's layer in 16 bits."""
    trained = shape.trained(settings)
    if settings.method == "full":
        vision = sum(m.weight.numel() for m in shape.vision_linears) if settings.train_vision else 0
        return 12 * trained + 2 * (shape.linear + vision)
    return 14 * trained + (2 * shape.largest_linear if settings.method == "qlora" else 0)


def layer_bytes(shape: Shape, settings: Optimisation, sizes: Sizes) -> tuple[float, float]:
    """Return the bytes that autograd saves per micro-batch of one language layer and of one trained vision block."""
    patches, tokens = (settings.batch_size * one for one in patches_and_tokens(shape.model, sizes))
    h, i, e, m = shape.hidden, shape.intermediate, shape.vision_hidden, shape.vision_intermediate
    gate = 6 * e + 2 * m if shape.vision_gated else 0
    if settings.method == "full":
        mask = 2 * tokens**2 / settings.batch_size
        return tokens * (34 * h + 8 * i) + mask, patches * (26 * e + 6 * m + gate)
    dropout = 24 * h + 4 * i if settings.adapter.dropout else 0
    return tokens * (28 * h + 8 * i + dropout), patches * (22 * e + 6 * m + gate)


def training_activations(shape: Shape, settings: Optimisation, sizes: Sizes) -> float:
    """Return the bytes of a micro-batch's saved activations and of the layer being computed."""
    patches, tokens = (settings.batch_size * one for one in patches_and_tokens(shape.model, sizes))
    layer, block = layer_bytes(shape, settings, sizes)
    # A frozen tower computes as without training.
    working = max(layer, block if settings.train_vision else _block(shape, patches))
    mask = tokens**2 / settings.batch_size * _stream(settings)
    if settings.gradient_checkpointing:
        # The current layer is both recomputed and differentiated.
        working *= 2
        layer, block = (_stream(settings) * one for one in (tokens * shape.hidden, patches * shape.vision_hidden))
    return layer * shape.layers + (block * shape.vision_layers if settings.train_vision else 0) + mask + working


def _stream(settings: Optimisation) -> int:
    """Return the bytes per element of the residual stream."""
    return 4 if settings.method == "full" else 2


def _block(shape: Shape, patches: float) -> float:
    """Return the bytes of a vision block's activations without training."""
    mlp = 6 if shape.vision_gated else 4
    return patches * (16 * shape.vision_hidden + mlp * shape.vision_intermediate)


def _inference(shape: Shape, precision: str, batch_size: int, sizes: Sizes) -> float:
    """Return the bytes of the activations alive at once in a forward pass without training."""
    patches, tokens = (batch_size * one for one in patches_and_tokens(shape.model, sizes))
    mask = 2 * tokens**2 / batch_size
    language = tokens * (16 * shape.hidden + 6 * shape.intermediate) + mask
    dequantized = 2 * shape.largest_linear if precision == "nf4" else 0
    return (max(language, _block(shape, patches)) + mask) * (2 if precision == "float32" else 1) + dequantized


def _loss(shape: Shape, settings: Optimisation, teacher: Shape | None, sizes: Sizes) -> float:
    """Return the bytes of the loss's buffers; `teacher` is None for supervised fine-tuning."""
    answers = settings.batch_size * sizes.questions * sizes.answer_tokens
    models = 1 if teacher is None else 2
    logits = models * min(CHUNK["cuda"], answers) * shape.rows * 4
    return logits + (shape.head * 4 if settings.method == "full" else 0)
