"""LongCat-Video in ComfyUI: the list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io


class LongCatVideoExtension(ComfyExtension):
    """What ComfyUI asks for the nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .attention import LongCatVideoSparseAttention, LongCatVideoSparseReport
        from .conditioning import LongCatVideoLatent
        from .continuation import LongCatVideoContinue
        from .host.paths import register
        from .loader import LongCatVideoLoader, LongCatVideoLoraLoader
        from .long_video import LongCatVideoLong
        from .plan import LongCatVideoPlan
        from .refine import LongCatVideoRefine
        from .sampler import LongCatVideoSampler
        from .schedule import LongCatVideoGuider, LongCatVideoScheduler
        from .text import LongCatVideoTextEncode

        register()  # on_load is not called by every supported ComfyUI
        return [
            LongCatVideoLoader,
            LongCatVideoLoraLoader,
            LongCatVideoTextEncode,
            LongCatVideoLatent,
            LongCatVideoScheduler,
            LongCatVideoGuider,
            LongCatVideoSampler,
            LongCatVideoContinue,
            LongCatVideoLong,
            LongCatVideoRefine,
            LongCatVideoSparseAttention,
            LongCatVideoSparseReport,
            LongCatVideoPlan,
        ]
