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

    What was added to the two vocabularies may differ after their last common token, as `<image>` of LLaVA-OneVision
    and `<|object_ref_start|>` of Qwen2-VL do: such tokens stand for no text, and no answer has them.

    Raises:
        UserError: an id means different tokens, and one of the vocabularies has text at or after it, or the token that
            ends an answer differs; names the first.
    """
    theirs, ours = tokens(teacher), tokens(student)
    shared = min(len(theirs), len(ours))
    for index, (expected, found) in enumerate(zip(theirs, ours, strict=False)):
        if expected != found:
            if index <= max(_last_of_text(teacher, theirs), _last_of_text(student, ours)):
                raise UserError(
                    f"models.student: expected the teacher's vocabulary, where token {index} is {expected!r}, "
                    f"found {found!r} in {student.name_or_path}; take a teacher and a student that share a tokenizer"
                )
            shared = index
            break
    ends = teacher.eos_token_id, student.eos_token_id
    if ends[0] != ends[1] or ends[0] >= shared:
        raise UserError(
            f"models.student: expected an answer to end with the teacher's {teacher.eos_token!r} ({ends[0]}), found "
            f"{student.eos_token!r} ({ends[1]}) in {student.name_or_path}; take models that end an answer alike"
        )
    return shared


def _last_of_text(tokenizer: PreTrainedTokenizerBase, ordered: list[str]) -> int:
    """The last id whose token was not added to the vocabulary."""
    added = tokenizer.added_tokens_decoder
    return max(index for index in range(len(ordered)) if index not in added)


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase, shared: int) -> str:
    """Fingerprint of the first `shared` tokens."""
    return fingerprint(tokens(tokenizer)[:shared])
