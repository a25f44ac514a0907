"""One function per task: each takes Components and conditions, and returns frames or latents."""

from lcv_core.pipelines.base import Components
from lcv_core.pipelines.continuation import continue_video
from lcv_core.pipelines.image_to_video import image_to_video
from lcv_core.pipelines.long_refine import long_refine_segments
from lcv_core.pipelines.long_video import Segment, long_video, long_video_segments
from lcv_core.pipelines.refine import refine_video
from lcv_core.pipelines.text_to_video import text_to_video

__all__ = [
    "Components",
    "Segment",
    "continue_video",
    "image_to_video",
    "long_refine_segments",
    "long_video",
    "long_video_segments",
    "refine_video",
    "text_to_video",
]
