r"""EgoGPT as a transformers model: LLaVA-OneVision with speech features, and with EgoGPT's pooling of videos.

EgoGPT puts speech features between the images and the question; without audio, they are those of 30 seconds of
silence. FirstSight has no audio, so these features depend on the weights alone:
`firstsight.acquisition.egogpt_conversion` computes them once and stores them as a parameter, and neither Whisper's
encoder nor its 635 M parameters are needed here. Importing this module registers EgoGPT with transformers' auto
classes, which then load what that conversion writes.

The order, `<image>\n<speech>\n\n`, is that of the authors' forward pass; only a function of theirs that nothing calls
puts speech first.
"""

from itertools import islice
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

IMAGE_TOKEN, VIDEO_TOKEN, SPEECH_TOKEN = "<image>", "<video>", "<speech>"

# `<image>\n<speech>\n\n{question}` in ChatML, the authors' prompt; the question alone without media.
CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- set media = message.content | rejectattr('type', 'equalto', 'text') | list -%}
{%- for part in media -%}{{ '<' ~ part.type ~ '>\n' }}{%- endfor -%}
{%- if media -%}{{ '<speech>\n\n' }}{%- endif -%}
{%- for part in message.content | selectattr('type', 'equalto', 'text') -%}{{ part.text }}{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


class EgoGptConfig(LlavaOnevisionConfig):
    """Extend LLaVA-OneVision's configuration by EgoGPT's layout of silence and videos.

    Args:
        speech_tokens: number of speech features of silence.
        speech_token_index: token id of their placeholder.
        newline_position: where the newline feature of a video is inserted, after each row of each frame ("grid") or
            once at the end ("one_token").
    """

    model_type = "egogpt"

    speech_tokens: int = 300
    speech_token_index: int = 151648
    newline_position: str = "grid"


class EgoGptModel(LlavaOnevisionModel):
    """Compute hidden states, without the output head; `silence` [speech_tokens, H] holds the features of silence."""

    config: EgoGptConfig

    def __init__(self, config: EgoGptConfig):
        super().__init__(config)
        self.silence = nn.Parameter(torch.zeros(config.speech_tokens, config.text_config.hidden_size))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run LLaVA-OneVision; input_ids [B, S] have a placeholder for each feature of silence, images and videos.

        Raises:
            ValueError: the numbers of placeholders and of features differ.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_with_silence(input_ids)
            features = {}
            if pixel_values is not None:
                images = self.get_image_features(
                    pixel_values, image_sizes, batch_num_images=batch_num_images, return_dict=True
                )
                features[self.config.image_token_index] = torch.cat(list(images.pooler_output))
            if pixel_values_videos is not None:
                videos = self.get_video_features(pixel_values_videos)
                features[self.config.video_token_index] = videos.pooler_output.flatten(0, 1)
            for token, values in features.items():
                inputs_embeds = _scatter_features(values, inputs_embeds, input_ids == token)
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)

    def embed_with_silence(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings [B, S, H] of tokens [B, S], with the features of silence at their placeholders.

        Raises:
            ValueError: the number of placeholders is no multiple of that of the features.
        """
        placeholders = input_ids == self.config.speech_token_index
        silences = int(placeholders.sum()) // self.config.speech_tokens
        return _scatter_features(self.silence.repeat(silences, 1), self.get_input_embeddings()(input_ids), placeholders)

    def get_video_features(self, pixel_values_videos: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return `pooler_output` [B, tokens, H], newlines included, of videos [B, frames, 3, height, width]."""
        batch = len(pixel_values_videos)
        tower: Any = self.vision_tower
        # The last layer's states, without the norm after it.
        patches = tower.embeddings(pixel_values_videos.flatten(0, 1))
        features = self.multi_modal_projector(tower.encoder(inputs_embeds=patches).last_hidden_state)
        side = isqrt(features.shape[1])
        grid = features.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        # 27 x 27 becomes 13 x 13: the last row and column are dropped.
        pooled = nn.functional.avg_pool2d(grid, 2).permute(0, 2, 3, 1)
        newline = self.image_newline.to(pooled)
        if self.config.newline_position == "grid":
            pooled = torch.cat([pooled, newline.expand(*pooled.shape[:2], 1, -1)], dim=2)
            return BaseModelOutputWithPooling(pooler_output=pooled.reshape(batch, -1, newline.shape[0]))
        pooled = pooled.reshape(batch, -1, newline.shape[0])
        return BaseModelOutputWithPooling(pooler_output=torch.cat([pooled, newline.expand(batch, 1, -1)], dim=1))


def _scatter_features(features: Tensor, embeddings: Tensor, placeholders: Tensor) -> Tensor:
    """Return `embeddings` [B, S, H] with `features` [n, H] at the n true entries of `placeholders` [B, S], in order."""
    if placeholders.sum() != len(features):
        raise ValueError(f"expected a placeholder for each of {len(features)} features, found {placeholders.sum()}")
    return embeddings.masked_scatter(placeholders[..., None], features.to(embeddings))


class EgoGptForConditionalGeneration(LlavaOnevisionForConditionalGeneration):
    """Add the output head to `EgoGptModel`."""

    config: EgoGptConfig

    def __init__(self, config: EgoGptConfig):
        # Not LLaVA-OneVision's own __init__, which builds a model of 8 B parameters.
        super(LlavaOnevisionForConditionalGeneration, self).__init__(config)
        self.model = EgoGptModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


class EgoGptProcessor(LlavaOnevisionProcessor):
    """Extend LLaVA-OneVision's processor by EgoGPT's token counts.

    `num_image_tokens` is the number of patches of a tile; `num_speech_tokens` and `newline_position` are as in
    `EgoGptConfig`.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 729,
        num_speech_tokens: int = 300,
        newline_position: str = "grid",
        vision_aspect_ratio: str = "anyres_max_9",
    ):
        self.num_speech_tokens = num_speech_tokens
        self.newline_position = newline_position
        super().__init__(
            image_processor,
            tokenizer,
            video_processor,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy="full",
            chat_template=chat_template,
            image_token=IMAGE_TOKEN,
            video_token=VIDEO_TOKEN,
            vision_aspect_ratio=vision_aspect_ratio,
        )

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> Any:
        """Run LLaVA-OneVision's processor; `images` are in the order of their placeholders in `text`.

        A single image of a prompt is split into tiles; of several images, each is one tile.
        """
        if isinstance(text, str):
            text = [text]
        if text is not None:
            text = [prompt.replace(SPEECH_TOKEN, SPEECH_TOKEN * self.num_speech_tokens) for prompt in text]
            if images is not None:
                remaining = iter(images)
                images = [list(islice(remaining, prompt.count(IMAGE_TOKEN))) for prompt in text]
        return super().__call__(images=images, text=text, videos=videos, **kwargs)

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        """Return the placeholders of one video."""
        frames = len(video_inputs["pixel_values_videos"][video_idx])
        side = isqrt(self.num_image_tokens) // 2
        tokens = frames * side * (side + 1) if self.newline_position == "grid" else frames * side * side + 1
        return self.video_token * tokens


AutoConfig.register(EgoGptConfig.model_type, EgoGptConfig, exist_ok=True)
AutoModelForImageTextToText.register(EgoGptConfig, EgoGptForConditionalGeneration, exist_ok=True)
AutoProcessor.register(EgoGptConfig, EgoGptProcessor, exist_ok=True)
