"""Let language models take masks of the last tokens alone: the tokens before attend to all earlier ones.

A mask for each pair of tokens keeps PyTorch's fastest attention kernels from being used, which know "causal" and no
other mask, and makes the others compute what the mask then removes. In a packed sequence (`firstsight.packing.pack`)
most tokens need none: those of the images or video and of the first question attend to all that come before.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "causal_then_masked"
# The `model_type` of language models whose layers pass the mask on unchanged.
ARCHITECTURES = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2", "gpt2")


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: object
) -> tuple[Tensor, None]:
    """Attend as transformers' "sdpa" does, with a mask that may be of the last R of Q tokens alone.

    Args:
        query: [B, heads, Q, head size].
        key, value: [B, key-value heads, S, head size], S = Q where R < Q.
        attention_mask: [B, 1, R, S], added to the scores of the last R tokens, R from 0 to Q; where R = Q, also any
            other that "sdpa" takes.
        options: those of transformers' attention functions, passed on.

    Returns:
        [B, Q, heads, head size] in query's dtype, and None, for weights that are not kept.
    """
    causal = 0 if attention_mask is None else query.shape[2] - attention_mask.shape[2]
    if causal == 0:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    first, keys, values = (tensor[:, :, :causal] for tensor in (query, key, value))
    found = [sdpa_attention_forward(module, first, keys, values, None, **options | {"is_causal": True})[0]]
    if causal < query.shape[2]:
        found += sdpa_attention_forward(module, query[:, :, causal:], key, value, attention_mask, **options)[:1]
    return torch.cat(found, 1) if len(found) > 1 else found[0], None


def attend_causally_first(model: PreTrainedModel) -> None:
    """Let the language model use `attend`, if it is of an architecture whose layers take masks of fewer tokens."""
    config = model.config.get_text_config()
    if config.model_type in ARCHITECTURES and config._attn_implementation == "sdpa":
        config._attn_implementation = NAME


def takes_masks_of_the_last_tokens(model: nn.Module) -> bool:
    """Return whether the model's layers use `attend`."""
    return model.config.get_text_config()._attn_implementation == NAME


AttentionInterface.register(NAME, attend)
# For masks of [B, S], which transformers expands.
AttentionMaskInterface.register(NAME, sdpa_mask)
# PyTorch prefers cuDNN's kernels on an H100, whose gradients of queries can be NaN where there is a mask and the number
# of tokens is 64 more than a multiple of 128 (pytorch#196678).
torch.backends.cuda.enable_cudnn_sdp(False)
