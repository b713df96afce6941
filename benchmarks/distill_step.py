"""Compare training steps: from cached targets and with the teacher beside the student; and what the bodies run on.

    python -m benchmarks.distill_step      on CUDA where there is any, else on the CPU

On CUDA the models have the true sizes of Qwen2-VL-7B and 2B, with random weights; on the CPU all widths and the
vocabulary are divided by eight and the depth stays the same, which keeps the ratio of parameters (8.3 to 2.2). A step
is forward pass, loss, backward pass and AdamW, fused on CUDA and under bfloat16 autocast there, on samples of one image
with six questions; data loading is not measured. The student is trained in full with float32 weights, with its vision
tower frozen, or by rank-16 adapters of its language model over bfloat16 weights (float32 on the CPU), with the tower
run in the step or its outputs cached. The teacher is loaded as `targets.precision` would load it. The student's layers
run one operation after the other, by Liger's kernels, replayed as CUDA graphs, or compiled and replayed, which is how
`distill` runs them.

Each case runs in its own process, most important first; the file is written after each, and a case that fails is left
out with a warning. Memory is the peak of everything allocated after the imports: weights, gradients, optimizer state,
activations. `of_peak` is the share of the GPU's peak that the products of a step reach, by PyTorch's count of them.
Writes benchmarks/distill-step-cpu.csv or -cuda.csv, with the ratios to the reference: the first case of the same
student and number of samples with cached targets and layers that run one operation after the other.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen2VLConfig

from benchmarks.measuring import alone, environment, write
from firstsight.acquisition.initialise import build_processor, train_tokenizer
from firstsight.core import params
from firstsight.core.stage import log, main
from firstsight.loss.products import fill_tiles
from firstsight.loss.vocabulary import SharedVocabulary
from firstsight.models.loading import load_model
from firstsight.models.text_attention import attend_causally_first
from firstsight.models.vision_attention import attend_by_size
from firstsight.packing.output_head import head_weight
from firstsight.packing.pack import IGNORE, collate, encode, pack
from firstsight.packing.vision_tower import placeholders
from firstsight.planning import hours
from firstsight.planning.shapes import QWEN2_VL_2B, QWEN2_VL_7B
from firstsight.profiling.peak_memory import PeakMemory
from firstsight.records.sample import LETTERS, Record, Sample
from firstsight.scenes.rendering import render
from firstsight.scenes.scene import sample_scene
from firstsight.scenes.templates import Draw
from firstsight.training.compiled_layers import compile_layers
from firstsight.training.cuda_graphs import GraphedLanguageModel
from firstsight.training.distillation_model import DistillationModel

# Divisor of widths and vocabulary, and the side of an image in pixels (28 per visual token).
SCALE = {"cpu": (8, 224), "cuda": (1, 448)}
# Its tokenizer, scenes and training settings are used.
PRESET = Path(__file__).parents[1] / "presets/from-scratch.yaml"
# Size of the shared vocabulary, at true size.
SHARED = 151_657
# Those of a step, and of one whose samples have together about 8,192 tokens on CUDA.
SAMPLES, MANY = 4, 21
STEPS = {"cpu": 3, "cuda": 10}
BODIES = ("transformers", "graphs", "compiled", "liger")


@dataclass(frozen=True)
class Case:
    """Name what is measured: how the student is trained, where targets and visual tokens come from, and on what.

    `student` is full, frozen or lora; `teacher` cached, or online with its precision; `visual_tokens` computed or
    cached; `body` one of `BODIES`; `samples` the number of samples of a step.
    """

    student: str
    teacher: str = "cached"
    visual_tokens: str = "computed"
    body: str = "transformers"
    samples: int = SAMPLES

    def missing(self) -> str | None:
        """Return the library that the case needs and the machine lacks, or None."""
        needed = [
            *(["bitsandbytes"] if self.teacher.endswith("int8") else []),
            *(["liger_kernel"] if self.body == "liger" else []),
        ]
        return next((library for library in needed if not find_spec(library)), None)


CASES = {
    "cpu": (
        Case("full"),
        Case("full", "online, float32"),
        Case("full", "online, int8"),
        Case("lora"),
        Case("lora", visual_tokens="cached"),
        Case("lora", "online, float32"),
        Case("lora", "online, int8"),
    ),
    "cuda": (
        Case("lora", visual_tokens="cached"),
        Case("lora", visual_tokens="cached", body="compiled"),
        Case("full"),
        Case("full", body="compiled"),
        Case("frozen", visual_tokens="cached", samples=MANY),
        Case("frozen", visual_tokens="cached", body="compiled", samples=MANY),
        Case("lora", "online, int8"),
        Case("full", "online, int8"),
        Case("frozen", visual_tokens="cached"),
        Case("frozen", visual_tokens="cached", body="compiled"),
        Case("frozen", "online, int8"),
        Case("full", samples=MANY),
        Case("full", body="compiled", samples=MANY),
        Case("lora", visual_tokens="cached", body="graphs"),
        Case("full", body="graphs"),
        Case("frozen", visual_tokens="cached", body="graphs"),
        Case("full", body="liger"),
        Case("lora", visual_tokens="cached", body="liger"),
        Case("lora"),
        Case("frozen"),
        Case("full", "online, bfloat16"),
    ),
}


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


def scenes(data: params.Data, side: int, count: int) -> list[Sample]:
    """Render samples of one image, `side` x `side` pixels, with `data.synthetic.questions_per_scene` questions each."""
    draw, settings, found = Draw(), data.synthetic, []
    for number in range(count):
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


def measure(case: Case, device: str) -> dict[str, Any]:
    """Return the median seconds of a step, the peak bytes, the operations of its products, and sizes."""
    divisor, side = SCALE[device]
    loaded = params.load(PRESET)
    corpus = Path(loaded.models.student.init.corpus).read_text(encoding="utf-8").splitlines()
    tokenizer = train_tokenizer(corpus, loaded.models.student.init.vocabulary_size)
    processor = build_processor(tokenizer, side * side)
    samples = scenes(loaded.data, side, case.samples)
    features = [pack(processor, one, encode(processor, one, one.records)) for one in samples]
    batch = {name: one.to(device) for name, one in collate(features, tokenizer.pad_token_id).items()}
    answers = int((batch["labels"] != IGNORE).sum())

    student_config, teacher_config = (config(sizes, divisor, tokenizer) for sizes in (QWEN2_VL_2B, QWEN2_VL_7B))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    # Random targets and visual tokens: their values affect neither time nor memory.
    seen = dict(batch)
    if case.visual_tokens == "cached":
        count = int(placeholders(student_config, batch["input_ids"]).sum())
        width = student_config.text_config.hidden_size
        seen |= {"visual_tokens": torch.randn(count, width, device=device).to(dtype)}
        del seen["pixel_values"]

    with tempfile.TemporaryDirectory() as folder:
        if case.teacher != "cached":
            with torch.device(device):
                AutoModelForImageTextToText.from_config(teacher_config, dtype=dtype).save_pretrained(folder)
        memory = PeakMemory(device)
        if case.teacher == "cached":
            width, teacher = teacher_config.text_config.hidden_size, None
            head = fill_tiles(torch.randn(SHARED // divisor, width, device=device).to(dtype))
            known = {"hidden": torch.randn(answers, width, device=device).to(dtype)}
        else:
            teacher = load_model(Path(folder), case.teacher.removeprefix("online, "), device).requires_grad_(False)
            head, known = head_weight(teacher), batch
        student = fresh_student(case, loaded.train, student_config, device)
        settings = loaded.train.model_copy(update={"method": "full" if case.student == "frozen" else case.student})
        model = DistillationModel(
            student, settings, teacher_head=head, teacher=teacher, vocabulary=SharedVocabulary(SHARED // divisor)
        )
        prepare(student, case.body, seen, device)
        # Products of a teacher in 8 bits are not counted, nor are those in compiled layers.
        counts = case.teacher == "cached" and case.body == "transformers"
        seconds, operations = steps(model, seen, known, device, counts)
    return {
        "seconds": statistics.median(seconds),
        "bytes": memory.peak(),
        "operations": operations,
        "tokens": batch["input_ids"].numel(),
        "answer_tokens": answers,
        "student_parameters": sum(parameter.numel() for parameter in student.parameters()),
    }


def fresh_student(case: Case, settings: params.Train, student_config: Qwen2VLConfig, device: str) -> PreTrainedModel:
    """Return a student with random weights, whose weights or adapters are trained as the case says."""
    if case.body == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2_vl  # absent on machines without it

        apply_liger_kernel_to_qwen2_vl(cross_entropy=False, fused_linear_cross_entropy=False)
    dtype = torch.bfloat16 if device == "cuda" and case.student == "lora" else torch.float32
    with torch.device(device):
        student = AutoModelForImageTextToText.from_config(student_config, dtype=dtype).train()
    attend_by_size(student)
    attend_causally_first(student)
    if case.student == "lora":
        adapter = settings.adapter
        targets = rf".*language_model.*\.({'|'.join(adapter.target_modules)})"
        student = get_peft_model(
            student, LoraConfig(r=adapter.rank, lora_alpha=adapter.lora_alpha, target_modules=targets)
        ).get_base_model()
    elif case.student == "frozen":
        student.model.visual.requires_grad_(False)
    if case.visual_tokens == "cached":
        student.model.visual = None
    return student


def prepare(student: PreTrainedModel, body: str, batch: dict[str, Tensor], device: str) -> None:
    """Let the student's passes be replayed as graphs, and compile its layers, as `firstsight.training.fit` does."""
    graphs = GraphedLanguageModel(student) if device == "cuda" and body in ("graphs", "compiled") else None
    if body == "compiled":
        torch.set_autocast_cache_enabled(False)
        dtype = torch.bfloat16 if device == "cuda" else None
        with graphs.unrecorded() if graphs else nullcontext():
            if not compile_layers(student, batch, dtype):
                raise RuntimeError("expected layers that can be compiled")


def steps(
    model: DistillationModel, batch: dict[str, Tensor], known: dict[str, Tensor], device: str, counts: bool
) -> tuple[list[float], int | None]:
    """Train; return the seconds of each step after the first three and, if asked to, the operations of its products."""
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device == "cuda")
    answers, seconds = (batch["labels"] != IGNORE).sum(), []

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(**batch, teacher=known, num_items_in_batch=answers)["loss"]
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device

    counter = FlopCounterMode(display=False)
    # Keys and values repeated for all heads, because torch 2.11 counts no attention of grouped heads.
    repeated = patch("transformers.integrations.sdpa_attention.use_gqa_in_sdpa", lambda *_: False)
    with counter if counts else nullcontext(), repeated if counts else nullcontext():
        step()  # compiles
    for _ in range(2):  # records graphs
        step()
    for _ in range(STEPS[device]):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return seconds, counter.get_total_flops() if counts else None


def row(
    case: Case, found: dict[str, Any], reference: dict[str, Any] | None, operations: int | None, device: str
) -> dict[str, Any]:
    """Return a row of the CSV file, with the ratios to the reference: none where that could not be measured.

    `operations` are those of the products of a step.
    """
    card = hours.known(torch.cuda.get_device_name()) if device == "cuda" else None
    of_peak = operations / found["seconds"] / card.operations if card and operations else None
    return {
        **asdict(case),
        "seconds": round(found["seconds"], 4),
        "memory_mb": round(found["bytes"] / 1e6),
        "time_ratio": reference and round(found["seconds"] / reference["seconds"], 2),
        "memory_ratio": reference and round(found["bytes"] / reference["bytes"], 2),
        "of_peak": of_peak and round(of_peak, 3),
        "tokens": found["tokens"],
        "answer_tokens": found["answer_tokens"],
        "student_parameters": found["student_parameters"],
        **environment(device),
    }


def run() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(measure(Case(**json.loads(sys.argv[1])), sys.argv[2])))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, references, operations = [], {}, {}
    for case in CASES[device]:
        if missing := case.missing():
            log.warning("%s: left out, because %s is not installed", case, missing)
            continue
        try:
            found = alone("distill_step", json.dumps(asdict(case)), device)
        except subprocess.CalledProcessError as failure:
            log.warning("%s: left out, because %s", case, failure)
            continue
        if case.teacher == "cached" and case.body == "transformers":
            references.setdefault((case.student, case.samples), found)
        reference = references.get((case.student, case.samples))
        # Counted once for all bodies of the layers.
        work = case.student, case.teacher, case.visual_tokens, case.samples
        counted = operations.setdefault(work, found["operations"])
        rows.append(row(case, found, reference, counted, device))
        write(f"distill-step-{device}", rows)
        log.info("%s: %.3f s a step, %d MB", case, rows[-1]["seconds"], rows[-1]["memory_mb"])


if __name__ == "__main__":
    main(run)
