"""Estimate the GPU memory of each stage on CUDA from shapes.

Weights are in `firstsight.planning.model_shape`.

Training, for n trained parameters (mixed precision; 18 bytes per parameter including the float32 weights, as in
Hugging Face's "Model training anatomy"):
    full            float32 weights 4, gradient 4, AdamW's two moments 8, and autocast's 16-bit copies of trained
                    linear weights 2; frozen weights stay in float32. With adamw_8bit the moments take 2.03, but for
                    those of the embedding, and are in paged memory
    lora, adalora   the same for n = sum rank x (in + out) over adapted layers; the frozen model in bfloat16. AdaLoRA
                    starts with half as many ranks again, each with a singular value
    qlora           the same over NF4, plus one layer's weights in 16 bits at a time

Activations saved for the backward pass, in bytes, for B samples of S tokens and P patches (counted from what autograd
saves under bfloat16 autocast with PyTorch's fused attention, which saves no S x S scores; cf. Korthikanti et al., 2022,
arXiv:2205.05198). h, i, L: hidden, intermediate, layers of the language model; e, m, D: those of the vision tower.
    language layer  B S (34 h + 8 i) for full: float32 residuals and norms 16 h, inputs of five linear layers 10 h,
                    attention's q, k, v and result 8 h, MLP 8 i; 28 h + 8 i for adapters, whose residuals are 16-bit,
                    and (24 h + 4 i) more for adapters with dropout
    its mask        B S^2 x 2, in each layer for full (autocast casts it again in each), once for adapters; at most,
                    for tokens that attend to all earlier ones need none (`firstsight.models.text_attention`)
    vision block    P (26 e + 6 m) for full, P (22 e + 6 m) for adapters, none if the tower is frozen; Qwen2.5-VL's,
                    with RMS norms and a gated MLP, P (6 e + 2 m) more, without its windowed attention, for which
                    autograd saved a quarter more than this on a tiny model
    checkpointing   only the layers' inputs are saved, B S 4 h (2 h) L + P 4 e (2 e) D, and one layer at a time
Where a frozen tower's outputs are cached, neither it nor its weights are on the GPU; cache-visual-tokens takes the
whole student, and the tower's tensors for one sample.

In addition, the mask added to attention scores, B S^2 x 4 (2 for a 16-bit model), one layer's gradients, and what a
frozen tower takes if that is more than the layer.

Without training: the tensors that are alive at once (`firstsight.planning.inference`), in the segments that the
allocator takes for them and keeps (`firstsight.planning.allocator`). For cached hidden states, the check that the
teacher's head is finite, 5 V h_t; for the top k, five times the logits of 640 answer tokens. Evaluation answers one
question, then batches of all sizes, and keeps keys and values, B (S + new) x 2 x kv heads x head size x L x 2.

Loss: logits of 640 answer tokens of student and of teacher, 2 x 640 x V x 4, which its Triton kernel overwrites; if the
head is trained, its gradient V h x 4 before it is added to that of earlier micro-batches. The cached teacher's head is
V h_t x 2.

CUDA graphs of training keep the language model's activations of a batch, where there is room for those of another
beside them (`firstsight.training.cuda_graphs`).

Every stage needs another 1 GiB for CUDA's context, library workspaces and, in training, fragmentation. Not counted:
outliers of LLM.int8, and cuDNN's workspaces.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from firstsight.core.params import Optimisation, Params, Quantize
from firstsight.loss.products import CHUNK
from firstsight.models.device import TRAINING_PRECISIONS
from firstsight.models.rounding import MOST_BYTES
from firstsight.planning import inference
from firstsight.planning.allocator import reserved
from firstsight.planning.model_shape import Shape
from firstsight.planning.workload import Sizes, patches_and_tokens
from firstsight.training.cuda_graphs import can_record
from firstsight.training.optimizer import moments_bytes

OVERHEAD = 1 << 30


@dataclass(frozen=True)
class Memory:
    """Hold bytes on the GPU.

    `training` is gradients, optimizer state and autocast's copies of weights; `cached` is what gives way when memory
    runs out: that of freed tensors, which PyTorch's allocator keeps until then; CUDA graphs of training; and paged
    moments, which move to the host's.
    """

    weights: float
    training: float = 0.0
    activations: float = 0.0
    cached: float = 0.0
    overhead: float = OVERHEAD

    @property
    def needed(self) -> float:
        """Return the bytes without which the stage fails."""
        return self.weights + self.training + self.activations + self.overhead

    @property
    def total(self) -> float:
        """Return the bytes that are taken where there is room."""
        return self.needed + self.cached


def finetuning(shape: Shape, settings: Optimisation, sizes: Sizes) -> Memory:
    """Estimate the peak GPU memory of finetune-teacher."""
    return Memory(
        weights=_trained_weights(shape, settings),
        training=_optimisation(shape, settings),
        activations=training_activations(shape, settings, sizes) + _loss(shape, settings, None, sizes),
        cached=_paged(shape, settings) + graphs(shape, settings, sizes),
    )


def caching(student: Shape, teacher: Shape, params: Params, sizes: Sizes) -> Memory:
    """Estimate the peak GPU memory of cache-teacher-targets, for targets that are not online."""
    settings = params.targets
    generated = sizes.questions * settings.max_answer_tokens if params.data.unanswered == "teacher" else None
    moments = inference.forward_pass(teacher, settings.precision, settings.batch_size, sizes, generated)
    answers = settings.batch_size * sizes.questions * sizes.answer_tokens
    moments += inference.stored_targets(settings.kind, answers, shared_rows(student, teacher), teacher.hidden)
    return _without_training(teacher.weights_bytes(settings.precision), moments)


def looking(student: Shape, settings: Optimisation, sizes: Sizes) -> Memory:
    """Estimate the peak GPU memory of cache-visual-tokens, whose tower sees one sample at a time."""
    patches, _ = patches_and_tokens(student.model, sizes)
    pixels = 4 * patches * student.patch_values
    moments = inference.vision_tower(student, _stream(settings), patches, sizes.kind)
    weights = student.weights_bytes(TRAINING_PRECISIONS[settings.method])
    return _without_training(weights, [[pixels, *moment] for moment in moments])


def distilling(student: Shape, teacher: Shape, params: Params, sizes: Sizes) -> Memory:
    """Estimate the peak GPU memory of distill, with the teacher for online targets, or its head for hidden states."""
    settings, targets = params.train, params.targets
    weights, activations = _trained_weights(student, settings), training_activations(student, settings, sizes)
    if targets.kind == "online":
        weights += teacher.weights_bytes(targets.precision)
        activations += inference.peak(inference.forward_pass(teacher, targets.precision, settings.batch_size, sizes))
    elif targets.kind == "hidden":
        weights += head_bytes(student, teacher)
    activations += _loss(student, settings, teacher, sizes)
    cached = _paged(student, settings) + graphs(student, settings, sizes)
    return Memory(weights, _optimisation(student, settings), activations, cached=cached)


def quantizing(shape: Shape, method: str, settings: Quantize, sizes: Sizes) -> Memory:
    """Estimate the peak GPU memory of quantize-student: 16-bit and quantized weights at the same time.

    To round int4 by its inputs, before there are quantized weights, takes moments of these and a pass over a sample.
    """
    weights, quantized = shape.weights_bytes("bfloat16"), shape.weights_bytes(method)
    if method == "int4" and settings.rounding_samples:
        largest = 8 * shape.intermediate**2
        moments = max(largest, min(MOST_BYTES, shape.layers * (24 * shape.hidden**2 + largest)))
        rounding = moments + inference.peak(inference.forward_pass(shape, "bfloat16", 1, sizes))
        return Memory(weights, activations=max(quantized, rounding))
    return Memory(weights + quantized)


def answering(shape: Shape, precision: str, batch_sizes: Sequence[int], new_tokens: int, sizes: Sizes) -> Memory:
    """Estimate the peak GPU memory of evaluate for one variant, which answers batches of these sizes in this order."""
    alone = sizes.alone()
    moments = [
        moment
        for batch_size in batch_sizes
        for moment in inference.forward_pass(shape, precision, batch_size, alone, new_tokens)
    ]
    return _without_training(shape.weights_bytes(precision), moments)


def _without_training(weights: float, moments: list[inference.Moment]) -> Memory:
    alive = inference.peak(moments)
    return Memory(weights, activations=alive, cached=max(0, reserved(moments) - alive))


def shared_rows(student: Shape, teacher: Shape) -> int:
    """Return the rows of the teacher's head over the shared vocabulary, at most."""
    return min(student.rows, teacher.rows)


def head_bytes(student: Shape, teacher: Shape) -> int:
    """Return the bytes of the teacher's 16-bit head over the shared vocabulary, stored with cached hidden states."""
    return shared_rows(student, teacher) * teacher.hidden * 2


def _trained_weights(shape: Shape, settings: Optimisation) -> float:
    adapters = 0 if settings.method == "full" else 4 * shape.trained(settings)
    left_out = _stream(settings) * shape.vision if settings.caches_visual_tokens else 0
    return shape.weights_bytes(TRAINING_PRECISIONS[settings.method]) + adapters - left_out


def _optimisation(shape: Shape, settings: Optimisation) -> float:
    """Return the bytes of gradients, moments not paged, autocast's copies, and qlora's layer in 16 bits."""
    trained = shape.trained(settings)
    always = 4 * trained + moments(shape, settings) - _paged(shape, settings)
    if settings.method == "full":
        vision = sum(m.weight.numel() for m in shape.vision_linears) if settings.train_vision else 0
        return always + 2 * (shape.linear + vision)
    return always + 2 * trained + (2 * shape.largest_linear if settings.method == "qlora" else 0)


def moments(shape: Shape, settings: Optimisation) -> float:
    """Return the bytes of AdamW's two moments, which are float32 or, but for the embedding's, 8 bits with scales."""
    return moments_bytes(
        settings.optimizer, shape.trained(settings), shape.embedding if settings.method == "full" else 0
    )


def _paged(shape: Shape, settings: Optimisation) -> float:
    return moments(shape, settings) if settings.optimizer == "adamw_8bit" else 0


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
    patches, _ = (settings.batch_size * one for one in patches_and_tokens(shape.model, sizes))
    saved, working = _language_model(shape, settings, sizes)
    if settings.train_vision:
        _, block = layer_bytes(shape, settings, sizes)
        working = max(working, block * _passes(settings))
        saved += shape.vision_layers * (
            _stream(settings) * patches * shape.vision_hidden if settings.gradient_checkpointing else block
        )
    elif not settings.caches_visual_tokens:
        # A frozen tower computes as without training.
        working = max(working, reserved(inference.vision_tower(shape, _stream(settings), patches, sizes.kind)))
    return saved + working


def graphs(shape: Shape, settings: Optimisation, sizes: Sizes) -> float:
    """Return the bytes that CUDA graphs keep of the language model's passes, beside those of one without a graph."""
    return sum(_language_model(shape, settings, sizes)) if can_record(shape.model, settings) else 0


def _language_model(shape: Shape, settings: Optimisation, sizes: Sizes) -> tuple[float, float]:
    """Return the bytes of the language model's saved activations, and of its layer that is being computed."""
    _, tokens = (settings.batch_size * one for one in patches_and_tokens(shape.model, sizes))
    layer, _ = layer_bytes(shape, settings, sizes)
    saved = _stream(settings) * tokens * shape.hidden if settings.gradient_checkpointing else layer
    mask = tokens**2 / settings.batch_size * _stream(settings)
    return saved * shape.layers + mask, layer * _passes(settings)


def _passes(settings: Optimisation) -> int:
    """Return how often the layer being computed is there: with checkpointing, recomputed and differentiated."""
    return 2 if settings.gradient_checkpointing else 1


def _stream(settings: Optimisation) -> int:
    """Return the bytes per element of the residual stream."""
    return 4 if settings.method == "full" else 2


def _loss(shape: Shape, settings: Optimisation, teacher: Shape | None, sizes: Sizes) -> float:
    """Return the bytes of the loss's buffers; `teacher` is None for supervised fine-tuning."""
    answers = settings.batch_size * sizes.questions * sizes.answer_tokens
    models = 1 if teacher is None else 2
    logits = models * min(CHUNK["cuda"], answers) * shape.rows * 4
    return logits + (shape.head * 4 if settings.method == "full" else 0)
