"""Let Qwen2-VL's and Qwen2.5-VL's vision towers attend within many images of one size in a single call.

transformers calls attention once for each image, or pair of a video's frames, in each layer: 8 calls a layer for a
video of 16 frames, each too small to keep a GPU busy. `attend` gives the same results in one.
"""

from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

# transformers passes all images and their boundaries at once to implementations whose name has "flash" in it.
NAME = "flash_images"
ARCHITECTURES = ("qwen2_vl", "qwen2_5_vl")


# A layer that torch.compile compiles is left for it: how many images there are is read from a tensor.
@torch.compiler.disable
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **options: object,
) -> tuple[Tensor, None]:
    """Attend within each of N images, in the interface of transformers' attention functions.

    Args:
        query, key, value: [1, heads, patches, head size], the patches of all images one after the other.
        scaling: what products of queries and keys are multiplied by.
        cu_seq_lens_q: int32 [N + 1], where each image starts, and the end.
        options: what concerns other implementations alone; towers of these architectures have no dropout.

    Returns:
        [1, patches, heads, head size] in query's dtype, and None, for weights that are not kept.
    """
    found, start = [], 0
    for length, count in _runs(cu_seq_lens_q):
        run = slice(start, start + length * count)
        images = (tensor[0, :, run].unflatten(1, (count, length)).transpose(0, 1) for tensor in (query, key, value))
        found.append(scaled_dot_product_attention(*images, scale=scaling).transpose(1, 2).flatten(0, 1))
        start = run.stop
    return torch.cat(found)[None], None


def attend_by_size(model: PreTrainedModel) -> None:
    """Let the model's vision tower use `attend`, if it is of an architecture that calls attention for each image."""
    if model.config.model_type in ARCHITECTURES and model.config._attn_implementation == "sdpa":
        model.config.vision_config._attn_implementation = NAME


def _runs(boundaries: Tensor) -> list[tuple[int, int]]:
    """Return the lengths of images with the number of images of that length, for each run of equal ones."""
    # Kept with the tensor, which all layers of a forward pass share: reading it makes the CPU wait for the GPU.
    if not hasattr(boundaries, "runs"):
        lengths = boundaries.diff().tolist()
        boundaries.runs = [(length, sum(1 for _ in group)) for length, group in groupby(lengths)]
    return boundaries.runs


AttentionInterface.register(NAME, attend)
