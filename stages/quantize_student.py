"""Quantize the trained student's language model; vision tower and head keep their precision.

    python -m stages.quantize_student int8        (or nf4, both by bitsandbytes; or int4)

reads  models/student-distilled, or without a teacher models/student-finetuned, the train split (by whose tokens int4 is
       rounded), the validation split, `quantize` in params.yaml
writes models/student-{method}: a folder that `from_pretrained` loads quantized, with quantization.json: sizes and the
       error of each layer; for a method that `quantize.methods` does not list, or a student that it does not
       quantize, such as an encoder, only a note that it is left out
"""

from itertools import islice
from pathlib import Path

from firstsight.core import params
from firstsight.core.files import read_json, whole_folder, write_json
from firstsight.core.stage import log, main
from firstsight.core.variants import CONTROL, DISTILLED, LEFT_OUT, METHODS, VARIANTS, reason_left_out

TRAIN, VALIDATION = Path("data/egoqa/train.parquet"), Path("data/egoqa/validation.parquet")
MEASUREMENTS = "quantization.json"


def run(method: str) -> None:
    loaded = params.load()
    settings = loaded.quantize
    with whole_folder(VARIANTS[f"student-{method}"].model) as folder:
        if method not in settings.methods:
            write_json(folder / LEFT_OUT, f"quantize.methods is {settings.methods}, without {method}")
            write_json(folder / MEASUREMENTS, None)
            log.info("%s is left out: quantize.methods is %s", method, settings.methods)
            return
        # Imported here, because they take seconds, and a method that is left out needs none of them.
        from firstsight.models.device import pick_device
        from firstsight.quantization.quantize import quantize_folder
        from firstsight.records.parquet import Split
        from firstsight.records.sample import as_asked

        source = VARIANTS[CONTROL if reason_left_out(VARIANTS[DISTILLED].model) else DISTILLED].model
        if reason := reason_not_quantized(source, method):
            write_json(folder / LEFT_OUT, reason)
            write_json(folder / MEASUREMENTS, None)
            log.info("%s is left out: %s", method, reason)
            return
        device = pick_device(loaded.runtime.device)
        samples = islice(Split(VALIDATION), settings.calibration_samples)
        questions = [(sample, as_asked(sample.records[0])) for sample in samples]
        rounded_by = Split(TRAIN).spread(settings.rounding_samples if method == "int4" else 0)
        measured = quantize_folder(source, folder, method, settings, device, questions, rounded_by)
        write_json(folder / MEASUREMENTS, measured)
    log.info(
        "%s: %d linear layers quantized, %d not; %.1f MB in memory, %.1f MB before; largest error of a layer %.3f",
        method,
        measured["quantized_layers"],
        measured["kept_layers"],
        measured["bytes"] / 1e6,
        measured["original_bytes"] / 1e6,
        max(measured["errors"].values()),
    )


def reason_not_quantized(source: Path, method: str) -> str | None:
    """Return why the model in `source` cannot be quantized by the method, or None."""
    # Imported here, as in `run`.
    from firstsight.models.architecture import is_encoder
    from firstsight.models.loading import int4_misfit

    if is_encoder(kind := read_json(source / "config.json", "distill")["model_type"]):
        return f"the student is an encoder ({kind}); only language models are quantized"
    return int4_misfit(source) if method == "int4" else None


if __name__ == "__main__":
    main(run, METHODS)
