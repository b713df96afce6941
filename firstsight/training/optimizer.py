"""Choose the implementation of AdamW: PyTorch's fused one, or that of bitsandbytes, whose moments have 8 bits.

With `adamw_8bit` (Dettmers et al., 2022, arXiv:2110.02861) the two moments of a weight take 2 bytes instead of 8, and
a float32 scale for each block of 256; on CUDA they are in paged memory, which moves to the host's where the GPU's is
short. The embedding's moments stay in float32, and those of tensors of fewer than 4,096 numbers.
"""

import torch

from firstsight.core.errors import UserError

# The Trainer's names. bitsandbytes has no paged memory on the CPU, and warns.
_NAMES = {
    "cuda": {"adamw": "adamw_torch_fused", "adamw_8bit": "paged_adamw_8bit"},
    "cpu": {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"},
}
# Bytes of a weight's two moments, in float32 and in 8 bits with their scales.
_FLOAT32, _EIGHT_BITS = 2 * 4, 2 * (1 + 4 / 256)


def trainer_name(optimizer: str, device: str) -> str:
    """Return the Trainer's name for the `optimizer` of params.yaml on `device`.

    Raises:
        UserError: bitsandbytes is not installed, or has no 8-bit AdamW for this device.
    """
    if optimizer == "adamw_8bit":
        _try_eight_bits(device)
    return _NAMES[device][optimizer]


def _try_eight_bits(device: str) -> None:
    """Take a step with bitsandbytes' 8-bit AdamW; without a library for the device, it imports and then fails here."""
    weight = torch.nn.Parameter(torch.zeros(1 << 12, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        from bitsandbytes.optim import AdamW8bit  # takes seconds to import, and few trainings use it

        AdamW8bit([weight]).step()
    except Exception as error:  # whatever it raises where its library is missing or does not fit the driver
        raise UserError(
            f"optimizer: expected adamw_8bit to run on {device}, found {' '.join(str(error).split())[:200]}; install a "
            "bitsandbytes made for this device, or set optimizer to adamw"
        ) from None


def moments_bytes(optimizer: str, trained: int, embedding: int) -> float:
    """Return the bytes of the moments of `trained` weights, `embedding` of which are in the embedding."""
    if optimizer == "adamw":
        return _FLOAT32 * trained
    return _FLOAT32 * embedding + _EIGHT_BITS * (trained - embedding)
