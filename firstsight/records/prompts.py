"""Present a record to a model: the conversation that asks it, and its media as a processor takes them."""

from typing import Any

from firstsight.records.sample import Record, Sample


def messages(record: Record, sample: Sample) -> list[dict[str, Any]]:
    """The conversation that asks one record, in the form of `apply_chat_template`: media first, then the question."""
    media = [{"type": "video"}] if sample.media_kind == "video" else [{"type": "image"} for _ in sample.frames]
    return [{"role": "user", "content": [*media, {"type": "text", "text": record.prompt()}]}]


def media_inputs(sample: Sample) -> dict[str, Any]:
    """The sample's decoded media as keyword arguments of a processor; a video keeps its frames as they were sampled."""
    if sample.media_kind == "none":
        return {}
    frames = sample.images()
    if sample.media_kind != "video":
        return {"images": frames}
    metadata = {"fps": sample.fps, "total_num_frames": len(frames), "frames_indices": list(range(len(frames)))}
    return {"videos": [frames], "video_metadata": [metadata], "videos_kwargs": {"do_sample_frames": False}}
