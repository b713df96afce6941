"""Do two models mean the same by a token id? Checked before any forward pass, never assumed.

Embeddings may differ in height (152,064 rows in Qwen2-VL-7B, 151,936 in 2B) while the tokens are the same; rows
beyond a tokenizer's tokens mean nothing. The loss compares the models over the tokens that both really have.
"""

from transformers import PreTrainedTokenizerBase

from firstsight.core.errors import UserError
from firstsight.core.files import fingerprint


def tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokenizer's tokens in the order of their ids, up to the first id without a token."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    ordered = []
    while (token := by_id.get(len(ordered))) is not None:
        ordered.append(token)
    return ordered


def shared_vocabulary(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> int:
    """V, the number of tokens both have: ids 0 to V - 1 mean the same to both.

    Raises:
        UserError: an id below the shorter vocabulary's length means different tokens; names the first.
    """
    theirs, ours = tokens(teacher), tokens(student)
    for index, (expected, found) in enumerate(zip(theirs, ours, strict=False)):
        if expected != found:
            raise UserError(
                f"models.student: expected the teacher's vocabulary, where token {index} is {expected!r}, "
                f"found {found!r} in {student.name_or_path}; take a teacher and a student that share a tokenizer"
            )
    return min(len(theirs), len(ours))


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase, shared: int) -> str:
    """Fingerprint of the first `shared` tokens."""
    return fingerprint(tokens(tokenizer)[:shared])
