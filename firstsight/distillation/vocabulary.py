"""Find the vocabulary that teacher and student share, and fingerprint it.

Their embeddings may differ in rows (152,064 in Qwen2-VL-7B, 151,936 in 2B) while their tokens are the same; rows beyond
a tokenizer's tokens are unused. The loss compares the models over the tokens that both tokenizers have. Each model ends
an answer with its own end token: where these differ, as DeepSeek's does from Qwen2.5's, they count as one.
"""

from transformers import PreTrainedTokenizerBase

from firstsight.core.files import fingerprint
from firstsight.loss.vocabulary import SharedVocabulary
from firstsight.models.tokens import common_tokens, tokens


def shared_vocabulary(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> SharedVocabulary:
    """Return the vocabulary that both have. Raises UserError as `common_tokens` does."""
    common, ends = common_tokens(teacher, student), (teacher.eos_token_id, student.eos_token_id)
    same = ends[0] == ends[1] and ends[0] < common
    return SharedVocabulary(common, None if same else ends)


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase, common: int) -> str:
    """Return the fingerprint of the first `common` tokens."""
    return fingerprint(tokens(tokenizer)[:common])
