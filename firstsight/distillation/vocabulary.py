"""Check that teacher and student mean the same by a token id, and find the vocabulary that they share.

Their embeddings may differ in rows (152,064 in Qwen2-VL-7B, 151,936 in 2B) while their tokens are the same; rows beyond
a tokenizer's tokens are unused. The loss compares the models over the tokens that both tokenizers have.
"""

from transformers import PreTrainedTokenizerBase

from firstsight.core.errors import UserError
from firstsight.core.files import fingerprint


def tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokenizer's tokens in the order of their ids, up to the first id without a token."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    ordered = []
    while (token := by_id.get(len(ordered))) is not None:
        ordered.append(token)
    return ordered


def shared_vocabulary(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> int:
    """Return V, the number of shared tokens: ids 0 to V - 1 mean the same to both.

    Added tokens may differ after the last common one, as `<image>` of LLaVA-OneVision and `<|object_ref_start|>` of
    Qwen2-VL do: they are special tokens, which no answer contains.

    Raises:
        UserError: the tokens of an id differ and one of the vocabularies has text tokens at or after it, or the
            end-of-answer tokens differ; names the first.
    """
    teacher_tokens, student_tokens = tokens(teacher), tokens(student)
    shared = min(len(teacher_tokens), len(student_tokens))
    for index, (expected, found) in enumerate(zip(teacher_tokens, student_tokens, strict=False)):
        if expected != found:
            if index <= max(_last_text_token(teacher, teacher_tokens), _last_text_token(student, student_tokens)):
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
            f"{student.eos_token!r} ({ends[1]}) in {student.name_or_path}; take models that share this token"
        )
    return shared


def _last_text_token(tokenizer: PreTrainedTokenizerBase, ordered: list[str]) -> int:
    """Return the last id whose token is not an added token."""
    added = tokenizer.added_tokens_decoder
    return max(index for index in range(len(ordered)) if index not in added)


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase, shared: int) -> str:
    """Return the fingerprint of the first `shared` tokens."""
    return fingerprint(tokens(tokenizer)[:shared])
