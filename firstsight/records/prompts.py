"""Turn a record into a model's input: the chat messages that ask it, and its images or video for the processor."""

from typing import Any

from firstsight.records.sample import Record, Sample


def messages(record: Record, sample: Sample) -> list[dict[str, Any]]:
    """Return the messages that ask one record, for `apply_chat_template`: images or video first, then the question."""
    media = [{"type": "video"}] if sample.media_kind == "video" else [{"type": "image"} for _ in sample.frames]
    return [{"role": "user", "content": [*media, {"type": "text", "text": record.prompt()}]}]


def media_inputs(sample: Sample) -> dict[str, Any]:
    """Return a sample's images or video as arguments of a processor, which does not resample a video's frames."""
    if sample.media_kind == "none":
        return {}
    frames = sample.images()
    if sample.media_kind != "video":
        return {"images": frames}
    metadata = {"fps": sample.fps, "total_num_frames": len(frames), "frames_indices": list(range(len(frames)))}
    return {"videos": [frames], "video_metadata": [metadata], "videos_kwargs": {"do_sample_frames": False}}
