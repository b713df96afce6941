"""Compare distillation with plain fine-tuning of the same student on the same data: alpha 0, 0.7 and 1, three seeds.

    python -m benchmarks.alpha [SEED ...]      after dvc repro; three students per seed, trained as `distill` does

Alpha 0 is plain fine-tuning, alpha 1 uses only the teacher. A seed determines the student's initial weights and the
order of the data; default seeds are 0, 1 and 2. Writes benchmarks/alpha-SEED.csv: exact match and F1 on the test split,
and the environment.
"""

import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measuring import environment, write
from firstsight.acquisition.initialise import initialise
from firstsight.core import params
from firstsight.core.stage import log, main
from firstsight.distillation.targets import read_head, read_index
from firstsight.evaluation.answer_limit import answer_limit
from firstsight.evaluation.quality import summarise
from firstsight.generation.answering import answers
from firstsight.models.loading import load_model, load_processor, pick_device
from firstsight.records.parquet import Split
from firstsight.training.distillation_model import DistillationModel
from firstsight.training.fit import train
from stages.distill import TARGETS, dataset

ALPHAS = (0.0, 0.7, 1.0)


def run() -> None:
    loaded = params.load()
    device = pick_device(loaded.runtime.device)
    test = Split(Path("data/egoqa/test.parquet"))
    questions = [(sample, record) for sample in test for record in sample.records]
    for seed in [int(seed) for seed in sys.argv[1:]] or [0, 1, 2]:
        rows = []
        for alpha in ALPHAS:
            started = time.perf_counter()
            quality = one_student(loaded, seed, alpha, device, questions)
            rows.append({
                "alpha": alpha,
                "temperature": loaded.train.temperature,
                "seed": seed,
                "exact_match": round(quality["exact_match"], 4),
                "f1": round(quality["f1"], 4),
                "seconds": round(time.perf_counter() - started),
                **environment(device),
            })  # fmt: skip
            log.info("seed %d, alpha %g: exact match %.3f", seed, alpha, quality["exact_match"])
        write(f"alpha-{seed}", rows)


def one_student(loaded: params.Params, seed: int, alpha: float, device: str, questions: list) -> dict:
    """Train a fresh student with this seed and alpha, otherwise as in params.yaml; return its quality figures."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "student"
        folder.mkdir()
        # Added to the pipeline's seed, so that seed 0 is the pipeline's student.
        init = loaded.models.student.init
        initialise(init.model_copy(update={"seed": init.seed + seed}), folder)
        student, processor = load_model(folder, "float32", device), load_processor(folder)
        settings = loaded.train.model_copy(update={"seed": loaded.train.seed + seed, "alpha": alpha})
        model = DistillationModel(
            student,
            settings,
            teacher_head=read_head(TARGETS, device),
            shared_vocabulary=read_index(TARGETS).shared_vocabulary,
        )
        train(
            model,
            dataset("train", processor, None),
            dataset("validation", processor, None),
            settings,
            Path(scratch) / "checkpoints",
            early_stopping_epochs=settings.early_stopping_epochs,
            device=device,
        )
        records = [record for _, record in questions]
        limit = answer_limit(processor.tokenizer, records, loaded.evaluate.max_new_tokens)
        given = list(answers(student.eval(), processor, questions, loaded.evaluate.batch_size, limit))
    groups = [sample.group for sample, _ in questions]
    return summarise(records, groups, given, 100, 0)


if __name__ == "__main__":
    main(run)
