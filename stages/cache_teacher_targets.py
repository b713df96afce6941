"""Run the teacher once over every answer of the train and validation splits and keep what it knows of each token.

    python -m stages.cache_teacher_targets

reads  models/teacher-finetuned, the train and validation splits, the student's tokenizer, by `targets` in params.yaml
writes data/teacher-targets
"""

from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from firstsight.core import params
from firstsight.core.files import fingerprint_files, whole_folder
from firstsight.core.stage import log, main
from firstsight.data.dataset import PackedDataset
from firstsight.data.packing import IGNORE
from firstsight.data.records import Split
from firstsight.distillation.targets import Index, SplitTargetsWriter, write_index
from firstsight.models.loading import load_model, load_processor, pick_device
from firstsight.models.packed import last_hidden_states
from firstsight.models.vocabulary import shared_vocabulary, vocabulary_fingerprint

TEACHER, OUTPUT = Path("models/teacher-finetuned"), Path("data/teacher-targets")
SPLITS = {split: Path(f"data/egoqa/{split}.parquet") for split in ("train", "validation")}


@torch.inference_mode()
def run() -> None:
    loaded = params.load()
    settings, runtime = loaded.targets, loaded.runtime
    processor = load_processor(TEACHER)
    shared = shared_vocabulary(processor.tokenizer, load_processor(Path("models/student")).tokenizer)
    splits = {split: PackedDataset(Split(path), processor) for split, path in SPLITS.items()}
    device = pick_device(runtime.device)
    teacher = load_model(TEACHER, settings.precision, device)
    head = teacher.get_output_embeddings().weight[:shared]

    with whole_folder(OUTPUT) as folder:
        tokens = {}
        for split, dataset in splits.items():
            writer = SplitTargetsWriter(folder, split)
            batches = DataLoader(
                dataset, settings.batch_size, collate_fn=dataset.collate, num_workers=runtime.data_workers
            )
            for batch in tqdm(batches, desc=f"cache-teacher-targets: {split}", unit=" batches"):
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                hidden = last_hidden_states(teacher, batch)
                write_records(writer, hidden, batch["labels"], batch["segment_ids"])
            tokens[split] = writer.close()
        write_index(
            folder,
            Index(
                kind=settings.kind,
                teacher=fingerprint_files(sorted(TEACHER.glob("*.safetensors"))),
                data={split: fingerprint_files([path]) for split, path in SPLITS.items()},
                vocabulary=vocabulary_fingerprint(processor.tokenizer, shared),
                shared_vocabulary=shared,
                dtype=str(hidden.dtype).removeprefix("torch."),
                hidden_size=hidden.shape[-1],
                answer_tokens=tokens,
            ),
            head,
        )
    size = sum(path.stat().st_size for path in OUTPUT.iterdir())
    log.info("wrote %s: %s answer tokens, %.1f MB", OUTPUT, f"{sum(tokens.values()):,}", size / 1e6)


def write_records(
    writer: SplitTargetsWriter, hidden: torch.Tensor, labels: torch.Tensor, segments: torch.Tensor
) -> None:
    """Cut a batch's hidden states [B, S, H] into its records, in order; the state before a token predicts it."""
    for row in range(len(labels)):
        answered = labels[row, 1:] != IGNORE
        states, tokens = hidden[row, :-1][answered], labels[row, 1:][answered]
        owners = segments[row, 1:][answered]
        lengths = torch.unique_consecutive(owners, return_counts=True)[1].tolist()
        for state, token in zip(states.split(lengths), tokens.split(lengths), strict=True):
            writer.write(state, token)


if __name__ == "__main__":
    main(run)
