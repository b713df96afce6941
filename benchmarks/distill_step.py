"""Compare a training step from cached targets with one that runs the teacher next to the student.

    python -m benchmarks.distill_step      on CUDA where there is any, else on the CPU

On CUDA the models have the true sizes of Qwen2-VL-7B and 2B, with random weights; on the CPU all widths and the
vocabulary are divided by eight and the depth stays the same, which keeps the ratio of parameters (8.3 to 2.2). A step
is forward pass, loss, backward pass and AdamW (bfloat16 autocast on CUDA), on samples of one image with six questions;
data loading is not measured. The student is trained in full with float32 weights, or by rank-16 adapters of its
language model over bfloat16 weights (float32 on the CPU). The teacher is loaded as `targets.precision` would load it.

Each case runs in its own process. Memory is the peak of everything allocated after the imports: weights, gradients,
optimizer state, activations. Writes benchmarks/distill-step-cpu.csv or -cuda.csv, with the ratios to cached targets for
the same student.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen2VLConfig

from benchmarks.measuring import alone, environment, write
from firstsight.acquisition.initialise import build_processor, train_tokenizer
from firstsight.core import params
from firstsight.core.stage import log, main
from firstsight.models.loading import load_model
from firstsight.packing.output_head import head_weight
from firstsight.packing.pack import IGNORE, collate, encode, pack
from firstsight.planning.shapes import QWEN2_VL_2B, QWEN2_VL_7B
from firstsight.profiling.peak_memory import PeakMemory
from firstsight.records.sample import LETTERS, Record, Sample
from firstsight.scenes.rendering import render
from firstsight.scenes.scene import sample_scene
from firstsight.scenes.templates import Draw
from firstsight.training.distillation_model import DistillationModel

# Divisor of widths and vocabulary, and the side of an image in pixels (28 per visual token).
SCALE = {"cpu": (8, 224), "cuda": (1, 448)}
# Its tokenizer, scenes and training settings are used.
PRESET = Path(__file__).parents[1] / "presets/from-scratch.yaml"
# Size of the shared vocabulary, at true size.
SHARED = 151_657
SAMPLES, STEPS = 4, {"cpu": 3, "cuda": 10}


def config(sizes: dict, divisor: int, tokenizer) -> Qwen2VLConfig:
    """Return a Qwen2-VL config with these sizes of the language model, widths and vocabulary divided by `divisor`."""
    token = tokenizer.convert_tokens_to_ids
    widths = {name: sizes[name] // divisor for name in ("vocab_size", "hidden_size", "intermediate_size")}
    return Qwen2VLConfig(
        text_config={
            **sizes,
            **widths,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16 // divisor, 24 // divisor, 24 // divisor],
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
        },
        vision_config={
            "depth": 32,
            "embed_dim": 1280 // divisor,
            # Rotary position embeddings need a head size that is a multiple of 4.
            "num_heads": 16 if divisor == 1 else 8,
            "hidden_size": widths["hidden_size"],
            "mlp_ratio": 4,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=sizes["tie_word_embeddings"],
    )


def scenes(data: params.Data, side: int) -> list[Sample]:
    """Render samples of one image, `side` x `side` pixels, with `data.synthetic.questions_per_scene` questions each."""
    draw, settings, found = Draw(), data.synthetic, []
    for number in range(SAMPLES):
        rng = random.Random(f"{data.seed}:{number}")
        scene = sample_scene(rng, 0.0, settings.max_clip_frames)
        jpeg = BytesIO()
        render(scene, rng, side)[0].save(jpeg, "JPEG")
        rng = random.Random(f"{data.seed}:{number}:questions")
        records = []
        for one in draw.questions(scene, rng, settings.questions_per_scene, settings.option_fraction):
            answer = LETTERS[one.options.index(one.answer)] if one.options else one.answer
            name, kind = f"{number}-{one.template.name}", one.template.question_type
            records.append(Record(name, one.question, answer, (answer,), kind, one.options))
        found.append(Sample(str(number), str(number), "synthetic", "image", (jpeg.getvalue(),), 0.0, tuple(records)))
    return found


def measure(case: str, method: str, device: str) -> dict[str, float]:
    """Return the median seconds of a step, the peak bytes, the tokens of a batch and the student's parameters."""
    divisor, side = SCALE[device]
    loaded = params.load(PRESET)
    corpus = Path(loaded.models.student.init.corpus).read_text(encoding="utf-8").splitlines()
    tokenizer = train_tokenizer(corpus, loaded.models.student.init.vocabulary_size)
    processor = build_processor(tokenizer, side * side)
    features = [pack(processor, one, encode(processor, one, one.records)) for one in scenes(loaded.data, side)]
    batch = {name: one.to(device) for name, one in collate(features, tokenizer.pad_token_id).items()}
    answers = int((batch["labels"] != IGNORE).sum())

    student_config, teacher_config = (config(sizes, divisor, tokenizer) for sizes in (QWEN2_VL_2B, QWEN2_VL_7B))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    with tempfile.TemporaryDirectory() as folder:
        if case != "cached":
            with torch.device(device):
                AutoModelForImageTextToText.from_config(teacher_config, dtype=dtype).save_pretrained(folder)
        memory = PeakMemory(device)
        if case == "cached":
            # Random targets: their values affect neither time nor memory.
            width, teacher = teacher_config.text_config.hidden_size, None
            head = torch.randn(SHARED // divisor, width, device=device).to(dtype)
            known = {"hidden": torch.randn(answers, width, device=device).to(dtype)}
        else:
            teacher = load_model(Path(folder), case.removeprefix("online, "), device).requires_grad_(False)
            head, known = head_weight(teacher), batch
        seconds, parameters = steps(
            loaded.train.model_copy(update={"method": method, "train_vision": method == "full"}),
            student_config, batch, teacher, head, known, SHARED // divisor, device,
        )  # fmt: skip
    return {
        "seconds": statistics.median(seconds),
        "bytes": memory.peak(),
        "tokens": batch["input_ids"].numel(),
        "answer_tokens": answers,
        "student_parameters": parameters,
    }


def steps(
    settings: params.Train,
    student_config: Qwen2VLConfig,
    batch: dict[str, Tensor],
    teacher: PreTrainedModel | None,
    head: Tensor,
    known: dict[str, Tensor],
    shared: int,
    device: str,
) -> tuple[list[float], int]:
    """Train a fresh student; return the seconds of each step after the first, and its number of parameters."""
    dtype = torch.bfloat16 if device == "cuda" and settings.method == "lora" else torch.float32
    with torch.device(device):
        student = AutoModelForImageTextToText.from_config(student_config, dtype=dtype).train()
    if settings.method == "lora":
        adapter = settings.adapter
        targets = rf".*language_model.*\.({'|'.join(adapter.target_modules)})"
        student = get_peft_model(
            student, LoraConfig(r=adapter.rank, lora_alpha=adapter.lora_alpha, target_modules=targets)
        ).get_base_model()
    model = DistillationModel(student, settings, teacher_head=head, teacher=teacher, shared_vocabulary=shared)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-5)
    answers, seconds = (batch["labels"] != IGNORE).sum(), []
    for _ in range(1 + STEPS[device]):
        started = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(**batch, teacher=known, num_items_in_batch=answers)["loss"]
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return seconds[1:], sum(parameter.numel() for parameter in student.parameters())


def run() -> None:
    if len(sys.argv) == 4:
        print(json.dumps(measure(*sys.argv[1:])))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = ["cached", "online, bfloat16" if device == "cuda" else "online, float32"]
    if find_spec("bitsandbytes"):
        cases.append("online, int8")
    rows = []
    for method in ("full", "lora"):
        measured = {case: alone("distill_step", case, method, device) for case in cases}
        reference = measured["cached"]
        for case, found in measured.items():
            rows.append({
                "student": method,
                "teacher": case,
                "seconds": round(found["seconds"], 3),
                "memory_mb": round(found["bytes"] / 1e6),
                "time_ratio": round(found["seconds"] / reference["seconds"], 2),
                "memory_ratio": round(found["bytes"] / reference["bytes"], 2),
                "tokens": found["tokens"],
                "answer_tokens": found["answer_tokens"],
                "student_parameters": found["student_parameters"],
                **environment(device),
            })  # fmt: skip
            log.info("%(student)s student, %(teacher)s: %(seconds).2f s a step, %(memory_mb)d MB", rows[-1])
    write(f"distill-step-{device}", rows)


if __name__ == "__main__":
    main(run)
