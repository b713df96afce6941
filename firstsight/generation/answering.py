"""Answer questions by greedy decoding, in batches: all questions about an image or video behind one shared prefix."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from firstsight.core.stage import log
from firstsight.generation.decoding import GrowingDecoder, StaticDecoder, compiles_steps, records_steps
from firstsight.packing.forward import last_hidden_states, position_ids
from firstsight.packing.pack import collate, encode_questions, pack, prompt_texts
from firstsight.records.prompts import media_inputs
from firstsight.records.sample import Record, Sample

Question = tuple[Sample, Record]

# What a generation_config.json may say that changes which tokens are chosen, and what greedy decoding has instead.
_GREEDY = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "do_sample": False, "min_length": 0}
# How many of an answer's first tokens no CUDA graph computes; and whether each model's graph, once it had computed
# some, gave the answers that are given without one.
_UNRECORDED = 2
_recorded_alike: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Answer:
    """Hold an answer as text without special tokens, and what the model computed for it.

    `tokens` are the n tokens of the answer, with the end token unless the answer was cut; `states` [n, H] are the final
    hidden states that predicted them, in the model's dtype.
    """

    text: str
    tokens: list[int]
    states: Tensor


def answers(
    model: PreTrainedModel, processor: Any, questions: Sequence[Question], batch_size: int, max_new_tokens: int
) -> Iterator[str]:
    """Yield the texts of what `generated_answers` yields."""
    for answer in generated_answers(model, processor, questions, batch_size, max_new_tokens):
        yield answer.text


def generated_answers(
    model: PreTrainedModel,
    processor: Any,
    questions: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
    static: bool | None = None,
) -> Iterator[Answer]:
    """Yield the model's answers, in the order of the questions.

    Each is the answer to the question asked alone, but questions about the same image or video that follow each other
    in a batch share one pass over it. Decoding is greedy, whatever the model's generation_config.json says. An answer
    ends at one of the file's end tokens, at the tokenizer's, or after `max_new_tokens` tokens. `static` says whether it
    is decoded over a static cache, which gives the same answers (None: where that is faster, if the first batch shows
    that it does).

    Raises:
        UserError: several questions share an image or video, and the chat template has it after the question.
    """
    if ignored := _ignored(model):
        _say_ignored(model.name_or_path, ignored)
    chosen = static is None
    static = _recorded_alike.get(model, records_steps(model)) if chosen else static
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        tokens, states = _decode(model, processor, batch, max_new_tokens, static)
        if chosen and static and model not in _recorded_alike and max(map(len, tokens)) > _UNRECORDED:
            expected = _decode(model, processor, batch, max_new_tokens, static=False)
            _recorded_alike[model] = static = _alike(tokens, expected[0])
            if not static:
                tokens, states = expected
                log.warning("%s: decoding: step by step, because the CUDA graph answers otherwise", model.name_or_path)
        for text, one, state in zip(answer_texts(model, processor, tokens), tokens, states, strict=True):
            yield Answer(text, one, state)


def _alike(tokens: Sequence[list[int]], expected: Sequence[list[int]]) -> bool:
    """Return whether at least half of the answers that a graph took part in are the same.

    In 16 bits a few differ by rounding; where the graph is wrong, all do.
    """
    pairs = [pair for pair in zip(tokens, expected, strict=True) if max(map(len, pair)) > _UNRECORDED]
    return 2 * sum(one == other for one, other in pairs) >= len(pairs)


def answer_texts(model: PreTrainedModel, processor: Any, tokens: Sequence[list[int]]) -> list[str]:
    """Return the answers whose tokens are given, with or without an end token, as text without special tokens."""
    stop = end_tokens(model, processor)
    contents = [answer[:-1] if answer and answer[-1] in stop else answer for answer in tokens]
    return [text.strip() for text in processor.batch_decode(contents, skip_special_tokens=True)]


@torch.inference_mode()
def _decode(
    model: PreTrainedModel, processor: Any, questions: Sequence[Question], max_new_tokens: int, static: bool
) -> tuple[list[list[int]], list[Tensor]]:
    """Return the `tokens` and the `states` of each question's `Answer`.

    The questions about a sample are the branches of a packed sequence (`firstsight.packing.pack`). Each step appends
    the next token of every branch to it, so that the keys and values of the shared prefix exist once.
    """
    by_sample = [list(group) for _, group in groupby(questions, key=lambda question: question[0].id)]
    packed = [
        pack(processor, group[0][0], encode_questions(processor, group[0][0], [record for _, record in group]))
        for group in by_sample
    ]
    batch = {name: value.to(model.device) for name, value in collate(packed, processor.tokenizer.pad_token_id).items()}
    segments = batch["segment_ids"]
    most = max(map(len, by_sample))
    numbers = torch.arange(1, most + 1, device=model.device)
    # The number of each row's branches, and where each of them ends in the packed sequence: [B, most].
    branches = torch.where(numbers <= segments.max(1).values[:, None], numbers, -1)
    places = torch.arange(segments.shape[1], device=model.device)
    ends = torch.where(segments[:, None] == branches[:, :, None], places, 0).max(2).values
    rows = torch.arange(len(segments), device=model.device)[:, None]

    cache = DynamicCache(config=model.config.get_text_config())
    hidden = last_hidden_states(model, batch, cache)
    positions = position_ids(model, batch)[..., rows, ends]
    head, stop = model.get_output_embeddings(), torch.tensor(sorted(end_tokens(model, processor)), device=model.device)
    states = [hidden[rows, ends]]
    token = head(states[0]).argmax(-1)
    chosen = [token]
    ended = torch.isin(token, stop) | (branches < 0)
    if static:
        decoder = StaticDecoder(model, cache, segments, branches, max_new_tokens - 1)
    else:
        decoder = GrowingDecoder(model, cache, segments, branches)
    while len(chosen) < max_new_tokens and not ended.all():
        positions = positions + 1
        states.append(decoder.step(token, positions))
        token = head(states[-1]).argmax(-1)
        chosen.append(token)
        ended |= torch.isin(token, stop)
    tokens = [
        _to_end(tokens, stop.tolist())
        for group, row in zip(by_sample, torch.stack(chosen, -1).tolist(), strict=True)
        for tokens in row[: len(group)]
    ]
    # A row's branches [most, steps, H], of which only its own questions count.
    by_row = torch.stack(states, 2)
    of_question = [state for group, row in zip(by_sample, by_row, strict=True) for state in row[: len(group)]]
    return tokens, [state[: len(one)] for state, one in zip(of_question, tokens, strict=True)]


def _to_end(tokens: list[int], stop: list[int]) -> list[int]:
    """Return the tokens up to the first that is in `stop`, which is kept."""
    return tokens[: next((place for place, token in enumerate(tokens, 1) if token in stop), len(tokens))]


def end_tokens(model: PreTrainedModel, processor: Any) -> set[int]:
    """Return the tokens that end an answer: the model's, and the tokenizer's end of turn."""
    named = model.generation_config.eos_token_id
    return {processor.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}


def _ignored(model: PreTrainedModel) -> str:
    """Return what the model's generation_config.json asks for and greedy decoding does not do, as text."""
    asked = model.generation_config.to_dict()
    return ", ".join(
        f"{name} {asked[name]}" for name, greedy in _GREEDY.items() if asked.get(name) not in (None, greedy)
    )


@cache
def _say_ignored(model: str, ignored: str) -> None:
    """Log what is ignored, once for each model, for the teacher's answers are asked batch by batch."""
    log.info("%s: answers are decoded greedily, without its generation_config.json's %s", model, ignored)


def model_inputs(processor: Any, questions: Sequence[Question], device: str | torch.device) -> dict[str, Tensor]:
    """Return the processor's tensors for a batch of questions, each asked alone, padded on the left, on `device`."""
    texts = [text for sample, record in questions for text in prompt_texts(processor, sample, [record])]
    media: dict[str, Any] = {}
    for sample, _ in questions:
        for name, value in media_inputs(sample).items():
            if isinstance(value, list):
                media.setdefault(name, []).extend(value)
            else:
                media[name] = value
    # A template has the begin token itself, if the model wants one.
    options = {"return_tensors": "pt", "padding": True, "padding_side": "left", "add_special_tokens": False}
    return processor(text=texts, **options, **media).to(device)


@torch.inference_mode()
def generate(model: PreTrainedModel, inputs: dict[str, Tensor], static: bool | None = None, **limits: int) -> Tensor:
    """Decode greedily with transformers, and return the new tokens [B, n], as an application would; for timing.

    Over a static cache (`static`; None: where that is faster), transformers compiles the step on CUDA, which takes
    tens of seconds at the first calls. `limits` are max_new_tokens and min_new_tokens.
    """
    static = compiles_steps(model) if static is None else static
    with _greedy(model):
        sequences = model.generate(**inputs, **limits, cache_implementation="static" if static else None)
    return sequences[:, inputs["input_ids"].shape[1] :]


@contextmanager
def _greedy(model: PreTrainedModel) -> Iterator[None]:
    """Set the model's generation settings aside: all but the end tokens would change which tokens are chosen."""
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    try:
        yield
    finally:
        model.generation_config = own
