"""Run a model's vision tower by itself, to keep its outputs for trainings that leave it frozen."""

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from firstsight.core.errors import UserError
from firstsight.models.device import has_bfloat16

# The `model_type` of models that take visual tokens as embeddings at placeholders, and in no other way: others take
# more from their tower, such as states of its inner layers.
_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "llava_onevision", "egogpt")


def placeholders(config: PretrainedConfig, ids: Tensor) -> Tensor:
    """Return which of the tokens `ids` are placeholders of visual tokens, as truth values of the same shape."""
    images = ids == config.image_token_id
    # Some architectures read no videos.
    return images | (ids == config.video_token_id) if hasattr(config, "video_token_id") else images


class VisionTower:
    """Run the vision tower and its projector over samples, one at a time, in the precision of training.

    Raises:
        UserError: the language model takes something else from the tower than visual tokens.
    """

    def __init__(self, model: PreTrainedModel, device: str):
        if model.config.model_type not in _FAMILIES:
            raise UserError(
                f"{model.name_or_path}: expected a model of one of the types {', '.join(_FAMILIES)}, whose visual "
                f"tokens can be kept, found {model.config.model_type}; set train.visual_tokens to computed"
            )
        # As the Trainer computes.
        self._model, self._device, self._autocast = model, device, has_bfloat16(device)

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of a visual token; LLaVA-OneVision's may be twice as many under autocast."""
        size = 2 if self._autocast else self._model.dtype.itemsize
        return size * self._model.config.get_text_config().hidden_size

    def count(self, expanded: dict[str, Tensor]) -> int:
        """Return the number of visual tokens of what `firstsight.packing.pack.expand` returned."""
        return int(placeholders(self._model.config, expanded["prefix"]).sum())

    @torch.inference_mode()
    def tokens(self, expanded: dict[str, Tensor]) -> Tensor | None:
        """Return the visual tokens [n, H] of a sample that was expanded, in the order of their placeholders.

        None for a sample without images and videos.

        Raises:
            UserError: there are more or fewer visual tokens than placeholders.
        """
        if not (count := self.count(expanded)):
            return None
        kind = "image" if "pixel_values" in expanded else "video"
        # second_per_grid_ts is for the positions of Qwen2.5-VL's language model, not for its tower.
        left = ("prefix", "prefix_types", "replaced", "second_per_grid_ts")
        inputs = {name: tensor.to(self._device) for name, tensor in expanded.items() if name not in left}
        with torch.autocast(self._device, torch.bfloat16, enabled=self._autocast):
            features = getattr(self._model.model, f"get_{kind}_features")(**inputs, return_dict=True)
        tokens = torch.cat(list(features.pooler_output))
        if len(tokens) != count:
            raise UserError(
                f"{self._model.name_or_path}: expected a visual token for each of {count} placeholders, found "
                f"{len(tokens)}; take processor and weights of one checkpoint"
            )
        return tokens
