"""What a model makes of a text: how improbable it finds its tokens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextLoss:
    """Hold the loss of a text: `nats`, the sum of -log p over its `tokens`, each given those before.

    The tokens are those after the begin token, the end token among them unless the text is `cut`; `bytes` are those of
    the text in UTF-8, as far as it is read.
    """

    nats: float
    tokens: int
    bytes: int
    cut: bool
