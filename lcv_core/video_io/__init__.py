"""Video files through PyAV: probing, reading by timestamps, writing H.264, joining segments."""

from lcv_core.files import VIDEO_FORMATS, check_writable
from lcv_core.video_io.read import VideoInfo, count_frames, iter_video, probe_video, read_metadata, read_video
from lcv_core.video_io.write import VideoWriter, concat_videos, rewrite_metadata, write_video

__all__ = [
    "VIDEO_FORMATS",
    "VideoInfo",
    "VideoWriter",
    "check_writable",
    "concat_videos",
    "count_frames",
    "iter_video",
    "probe_video",
    "read_metadata",
    "read_video",
    "rewrite_metadata",
    "write_video",
]
