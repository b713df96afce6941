"""The tokenizer of a text-only model: in the interface of a vision-language model's processor, or of an encoder."""

from typing import Any

from transformers import BatchEncoding, PretrainedConfig, PreTrainedTokenizerBase

from firstsight.core.errors import UserError

# For models without a chat template, which were never taught to converse: question, line feed, answer, end of text.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'user' %}{{ '\\n' }}{% else %}{{ eos_token }}{% endif %}{% endfor %}"
)


class TextProcessor:
    """Wrap a tokenizer; without a chat template it gets a plain one, and without a padding token its end token.

    `positions` is the number of tokens that the model has positions for; None if it has no limit. `begin_token` is the
    one that a text begins with: the tokenizer's bos_token; where it has none, that of the model's config, as Qwen2's,
    between whose texts `<|endoftext|>` was in training; where that has none either, the tokenizer's end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig):
        self.tokenizer, self.positions = tokenizer, getattr(config, "max_position_embeddings", None)
        begin = getattr(config, "bos_token_id", None)
        named = tokenizer.convert_ids_to_tokens(begin) if isinstance(begin, int) else None
        self.begin_token = tokenizer.bos_token or named or tokenizer.eos_token
        self.batch_decode, self.save_pretrained = tokenizer.batch_decode, tokenizer.save_pretrained
        if tokenizer.chat_template is None:
            # Where the tokenizer begins every text with a token, the model has seen no text without it.
            begins = tokenizer.bos_token is not None and tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
            tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(self, text: list[str], **options: Any) -> BatchEncoding:
        return self.tokenizer(text, **options)

    def apply_chat_template(self, conversations: list, **options: Any) -> Any:
        """Apply the tokenizer's template, with the parts of each turn joined to text, as text-only templates expect.

        Raises:
            UserError: a turn has images or a video.
        """
        single = isinstance(conversations[0], dict)
        plain = [
            [turn | {"content": self._text(turn["content"])} for turn in conversation]
            for conversation in ([conversations] if single else conversations)
        ]
        return self.tokenizer.apply_chat_template(plain[0] if single else plain, **options)

    def _text(self, content: list[dict[str, str]]) -> str:
        if media := [part["type"] for part in content if part["type"] != "text"]:
            raise UserError(
                f"{self.tokenizer.name_or_path}: expected records without media, because this model reads text alone, "
                f"found {media}; take a vision-language model, or data without media"
            )
        return "".join(part["text"] for part in content)


class EncoderProcessor:
    """Wrap the tokenizer of an encoder, which reads a record's prompt between its own special tokens.

    `positions` is the number of tokens that the model has positions for; None if it has no limit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, positions: int | None):
        self.tokenizer, self.positions = tokenizer, positions
        self.save_pretrained = tokenizer.save_pretrained

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of each text, with the special tokens around it, whatever its length."""
        return self.tokenizer(texts, truncation=False)["input_ids"]
