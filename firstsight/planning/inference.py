"""List the tensors that are on the GPU at once in a forward pass without training, as transformers allocates them.

A moment is the bytes of tensors that are alive together, in the order in which they are allocated, as the allocator
(`firstsight.planning.allocator`) takes them. The largest sum of a moment is the peak of live bytes, which tests compare
with what is alive on the CPU. P patches have e numbers in the vision tower and m in its MLP; B samples of S tokens, T
in all, have h, and i in the MLP; a number has 2 bytes, 4 with float32.

Inputs     pixels as float32, and the mask, B S^2 numbers; while it is made, its truth values and their negation as well
Rotation   Qwen's tower turns queries and keys in float32: 16-bit pixels, cosines and sines of P head sizes, its input
           and norm, P e each, q, k and v, 3 P e, and six times P e float32 numbers (q, k, the turned q, three terms of
           k); the most for videos
Tower      its input, sum and norm, P e each, and of its MLP input, activation and product, P m each; SigLIP has no
           product, 8 P e in attention, the embeddings for all the time, and P h three times in its projector
Language   input, sum and norm, T h each, and of the MLP activation, second input and product, T i each; attention
           6 T h. Beside them, embeddings, visual features twice, and the tower's output (SigLIP's also before its norm)
LLM.int8   bitsandbytes computes the second input in int32 and converts it to float16, then to the model's precision:
           4, 2 and 2 bytes per number, beside the codes of its own input, of 1 byte. It looks for outliers in the
           product, with a float16 copy, its absolute values, codes, and truth values. What outliers add is not counted
NF4        the largest layer's weights in 16 bits

Answers keep the keys and values of each layer.
"""

from firstsight.loss.products import CHUNK
from firstsight.planning.model_shape import Shape
from firstsight.planning.workload import Sizes, patches_and_tokens, visual_tokens

Moment = list[float]


def peak(moments: list[Moment]) -> float:
    """Return the most bytes that are alive at once."""
    return max(map(sum, moments), default=0)


def forward_pass(
    shape: Shape, precision: str, batch_size: float, sizes: Sizes, new_tokens: float | None = None
) -> list[Moment]:
    """Return the moments of a forward pass over a batch of samples of these sizes.

    Keys and values are kept for an answer of `new_tokens`; None: they are not kept.
    """
    patches, tokens = (batch_size * one for one in patches_and_tokens(shape.model, sizes))
    number = 4 if precision == "float32" else 2
    pixels, truths = 4 * patches * shape.patch_values, tokens**2 / batch_size
    embedded = [pixels, number * truths, number * tokens * shape.hidden]
    features = number * batch_size * visual_tokens(shape.model, sizes) * shape.hidden
    outputs = [number * patches * shape.vision_hidden] * (1 if shape.vision_rotary else 2)
    held = [*embedded, *outputs, features, features]
    if new_tokens is not None:
        kept = number * (tokens + batch_size * new_tokens) * shape.kv_width
        held += [kept] * (2 * shape.layers)
    return [
        [pixels, truths / batch_size, truths, number * truths, truths],
        *(embedded + moment for moment in vision_tower(shape, number, patches, sizes.kind)),
        *(held + moment for moment in language_layer(shape, precision, tokens)),
    ]


def vision_tower(shape: Shape, number: int, patches: float, kind: str) -> list[Moment]:
    """Return the moments of the vision tower over so many patches, without the model's inputs."""
    if not patches:
        return []
    e, m = number * patches * shape.vision_hidden, number * patches * shape.vision_intermediate
    pixels = patches * shape.patch_values
    if shape.vision_rotary:
        angles, wide = 4 * patches * shape.vision_head, 4 * patches * shape.vision_hidden
        held = [number * pixels, angles, angles]
        return [
            [*held, e, e, 3 * e, *[wide] * 4, wide / 2, wide],
            [*held, e, e, 3 * e, *[wide] * 6],
            [*held, e, e, e, m, m, m],
        ]
    # The tiles of images are copied without those that pad a batch.
    held = [e] if kind == "video" else [e, 4 * pixels]
    projected = number * patches * shape.hidden
    return [[*held, *[e] * 7], [*held, e, e, e, m, m], [*held, *[projected] * 3]]


def language_layer(shape: Shape, precision: str, tokens: float) -> list[Moment]:
    """Return the moments of a layer of the language model."""
    number = 4 if precision == "float32" else 2
    h, i, kv = (number * tokens * width for width in (shape.hidden, shape.intermediate, shape.kv_width))
    wide = 4 * tokens * shape.hidden
    norm, attention = [h, wide, wide], [*[h] * 6, kv, kv]
    if precision == "int8":
        up, down = [h, h, h, i, h / 2, 2 * i, i, i], [h, h, h, i, i, i / 2, i, i / 2]
        return [norm, attention, up, down]
    # Of a matrix, where many tokens are multiplied: of int4, its levels in a byte each beside its weights.
    unpacked = {"nf4": [2.0 * shape.largest_linear], "int4": [3.0 * shape.largest_linear]}.get(precision, [])
    return [norm, attention, [h, h, h, i, i, i, *unpacked]]


def stored_targets(kind: str, answers: float, rows: int, width: int) -> list[Moment]:
    """Return the moments of making targets at so many answer tokens, with a 16-bit head [rows, width].

    For "hidden", `isfinite` compares the head with itself, and its absolute values with infinity, before it is stored.
    For "topk", the logits in float32, those rebuilt from the top k, and three terms of the divergence between them are
    alive at once.
    """
    if kind == "hidden":
        truths = rows * width
        return [[truths, 2.0 * truths, truths, truths]]
    return [[4 * min(CHUNK["cuda"], answers) * rows] * 5]
