"""Say by which suffixes of their names images and videos are told."""

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".3gp", ".wmv", ".flv"}
)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
# What errors say of a file that is taken for an image.
VIDEOS = f"a video's name ends in {', '.join(sorted(VIDEO_SUFFIXES))}"
