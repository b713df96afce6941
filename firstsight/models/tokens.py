"""Compare the tokens of two tokenizers."""

from transformers import PreTrainedTokenizerBase

from firstsight.core.errors import UserError


def tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokenizer's tokens in the order of their ids, up to the first id without a token."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    ordered = []
    while (token := by_id.get(len(ordered))) is not None:
        ordered.append(token)
    return ordered


def common_tokens(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> int:
    """Return the number of common tokens: ids below it mean the same to both.

    Added tokens may differ after the last common one, as `<image>` of LLaVA-OneVision and `<|object_ref_start|>` of
    Qwen2-VL do: they are special tokens, which no answer contains.

    Raises:
        UserError: the tokens of an id differ and one of the vocabularies has text tokens at or after it.
    """
    teacher_tokens, student_tokens = tokens(teacher), tokens(student)
    for index, (expected, found) in enumerate(zip(teacher_tokens, student_tokens, strict=False)):
        if expected != found:
            if index <= max(_last_text_token(teacher, teacher_tokens), _last_text_token(student, student_tokens)):
                raise UserError(
                    f"models.student: expected the teacher's vocabulary, where token {index} is {expected!r}, "
                    f"found {found!r} in {student.name_or_path}; take a teacher and a student that share a tokenizer"
                )
            return index
    return min(len(teacher_tokens), len(student_tokens))


def _last_text_token(tokenizer: PreTrainedTokenizerBase, ordered: list[str]) -> int:
    """Return the last id whose token is not an added token."""
    added = tokenizer.added_tokens_decoder
    return max(index for index in range(len(ordered)) if index not in added)
