"""Put one model into models/: from the hub, from a local folder, or freshly initialised.

    python -m stages.download_models teacher|student

reads  what `models.teacher` or `models.student` names in params.yaml
writes models/teacher or models/student, a plain Hugging Face folder (EgoGPT's own checkpoints are converted into one),
       with source.json in it: where the model came from, its licence, architecture and size; for a teacher that is
       null, left-out.json instead, and null as source.json
"""

from pathlib import Path

from firstsight.acquisition import checks, egogpt_conversion, hub_client
from firstsight.core import params
from firstsight.core.errors import UserError
from firstsight.core.files import whole_folder, write_json
from firstsight.core.stage import log, main
from firstsight.core.variants import LEFT_OUT, NO_TEACHER
from firstsight.models.quantized import stored_method


def run(role: str) -> None:
    model = getattr(params.load().models, role)
    with whole_folder(Path("models") / role) as folder:
        if model is None:
            write_json(folder / LEFT_OUT, NO_TEACHER)
            write_json(folder / "source.json", None)
            log.info("there is no teacher: %s", NO_TEACHER)
            return
        commit = None
        if model.source == "init":
            # Imported here, because it imports Qwen2-VL and its processors, which other sources do not need.
            from firstsight.acquisition.initialise import initialise

            initialise(model.init, folder)
        elif Path(model.source).is_dir():
            hub_client.copy(Path(model.source), folder)
        else:
            commit = hub_client.download(model.source, model.revision, folder)
            if model.revision != commit:
                log.info(
                    "%s can move to another commit; to pin it, set models.%s.revision: %s",
                    model.revision or "main",
                    role,
                    commit,
                )
        if egogpt_conversion.is_original(folder / "config.json"):
            log.info("converting EgoGPT's own layout")
            with whole_folder(folder) as converted:
                egogpt_conversion.convert(folder, converted, model.source)
        if role == "student" and (method := stored_method(folder)):
            raise UserError(
                f"models.student: expected weights that can be trained, found weights quantized to {method} in "
                f"{model.source}; name the model that it was quantized from"
            )
        origin = {"source": model.source, "revision": model.revision, "commit": commit}
        write_json(folder / "source.json", origin | checks.facts(folder))
    log.info("wrote models/%s from %s", role, model.source)


if __name__ == "__main__":
    main(run, ("teacher", "student"))
