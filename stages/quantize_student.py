"""Quantise the distilled student's language model with bitsandbytes; vision tower and head keep their precision.

    python -m stages.quantize_student

reads  models/student-distilled, by `quantize` in params.yaml
writes models/student-quantized, a folder that `from_pretrained` loads quantised
"""

from pathlib import Path

from firstsight.core import params
from firstsight.core.files import whole_folder
from firstsight.core.stage import log, main
from firstsight.models.loading import pick_device
from firstsight.quantization.quantize import quantize_folder


def run() -> None:
    loaded = params.load()
    device = pick_device(loaded.runtime.device)
    with whole_folder(Path("models/student-quantized")) as folder:
        counts = quantize_folder(Path("models/student-distilled"), folder, loaded.quantize.method, device)
    log.info("quantised %(quantized_layers)d linear layers, kept %(kept_layers)d", counts)


if __name__ == "__main__":
    main(run)
