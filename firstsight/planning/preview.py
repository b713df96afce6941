"""Read the first samples of a data source, without splitting and without writing a data set."""

from collections.abc import Iterator
from itertools import groupby, islice
from operator import attrgetter

from firstsight.assembly.sources import READERS
from firstsight.core.params import Data
from firstsight.readers.problems import Problems
from firstsight.readers.source_record import DecodedMedia
from firstsight.records.sample import Sample


def samples(data: Data, count: int) -> Iterator[Sample]:
    """Yield the samples of the first `count` images or videos, each with the consecutive questions about it."""
    asked = READERS[data.source](data, Problems("stop"))
    for media, same_media in islice(groupby(asked, key=attrgetter("media")), count):
        decoded = media.load(data) if media else DecodedMedia()
        key, kind = (media.key(), media.kind) if media else ("none", "none")
        records = tuple(one.record.to_record() for one in same_media)
        yield Sample(key, key, data.source, kind, decoded.frames, decoded.fps, records)
