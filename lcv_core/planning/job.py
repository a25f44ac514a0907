"""A job as the planner sees it: what is to be made, and how weights and activations are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from lcv_core.config import BSAConfig
from lcv_core.errors import InputError
from lcv_core.names import CachePlace, CacheStorage, CfgMode, Schedule, Streaming, check_name
from lcv_core.planning.sparse import Device, SparseKernels, sparse_kernels
from lcv_core.planning.vae import Convolutions
from lcv_core.refinement import RefinePlan, frames_after, plan_refine
from lcv_core.shapes import check_cond_frames, check_frames, check_size, num_latents
from lcv_core.vae.tiling import Tiling

WeightDtype = Literal[
    "fp32", "bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2", "fp8", "int8", "q8_0", "q5_k", "q4_k"
]  # fmt: skip
ComputeDtype = Literal["fp32", "bf16", "fp16"]
Guiding = Literal["off", CfgMode]
Adapters = Literal["runtime", "merged"]

# Bytes of an element. Of the GGUF kinds a little more than one, or less: a block's bytes over its elements.
ITEMSIZE = {
    "fp32": 4, "bf16": 2, "fp16": 2, "fp8_e4m3fn": 1, "fp8_e5m2": 1, "fp8": 1, "int8": 1,
    "q8_0": Fraction(34, 32), "q5_k": Fraction(176, 256), "q4_k": Fraction(144, 256),
}  # fmt: skip
SCALE_ITEMSIZE = {"fp8": 4, "int8": 4}  # bytes of the scale that each row has
SMALL_ITEMSIZE = 2  # bytes of what quantised files keep in half precision


@dataclass(frozen=True)
class Refine:
    """A refine pass over a clip, window by window.

    height, width: pixels of the refined video, multiples of 16.
    window: frames of the clip refined at once; None, or more than there are: the whole clip.
    overlap: frames that two windows share, where there are several.
    kv_cache: the shared frames are held as a KV cache.
    """

    height: int = 704
    width: int = 1280
    window: int | None = None
    overlap: int = 0
    spatial_only: bool = False
    kv_cache: bool = False
    bsa: BSAConfig | None = field(default_factory=BSAConfig)

    def __post_init__(self) -> None:
        check_size(self.height, self.width)

    def windows(self, num_frames: int) -> list[RefinePlan]:
        """Frame counts of the windows of a clip, each kind once: the first, and one that goes on from another."""
        window = min(self.window or num_frames, num_frames)
        first = plan_refine(window, spatial_only=self.spatial_only)
        if window == num_frames:
            return [first]
        shared = frames_after(self.overlap, spatial_only=self.spatial_only, time_mapping="stretch")
        return [first, plan_refine(window, shared, spatial_only=self.spatial_only)]


@dataclass(frozen=True)
class Job:
    """What is made: a clip from text, or from leading frames that are given, and maybe its refinement.

    height, width: pixels, multiples of 16. num_frames: 4k+1, given frames included; of a long video, one segment's.
    num_cond_frames: given frames, 4k+1; 1 is an image, 13 what continuations are trained with.
    batch_size: videos made at once. conditions: how many of them differ in the given frames.
    guidance: "off", or both branches one after the other ("sequential") or in one forward ("batched").
    schedule: "distilled" needs the distillation adapter; adapters: at run time, or merged into the weights.
    bsa: block sparse attention of the clip itself; None is dense. refine: None makes the clip alone.
    weight_dtype: of the transformer's large matrices; fp8 and fewer bits keep all else in half precision. "fp8" and
        "int8" have a scale for each row, "fp8_e4m3fn" and "fp8_e5m2" none.
    compute_dtype: of its activations. text_dtype: of the text encoder's weights. vae_dtype: of all in the VAE.
    weight_copies, cache_storage, cache_place: see `sampling.Sampling`. kv_cache: given frames are held as one.
    sparse: what block sparse attention runs on; None is what there is here.
    stream: where the transformer's blocks wait for their turn; unless "off" two of them are on the device.
    resident: bytes of blocks that stay on the device with streaming. extra_weights: bytes of adapters of the user's.
    text_device: "cpu" encodes the text there, whatever the rest runs on.
    together: transformer and VAE stay on the device side by side, and clips come and go frame by frame, as in
        `lcv_core.pipelines`; else each part has the device to itself and is given whole clips, as in ComfyUI.
    refine_only: the clip is given, and only refined. keeps_frames: a finished clip is in system memory as a whole.
    encoded_frames: of the given frames those that the VAE encodes; None: all. The others are handed over as latents.
    decoder_waits: the clip is one of several that are decoded as one video; the decoder's state is in system memory
        while the next one is sampled.
    vae_tile: pixels, a multiple of 32; 0 decodes and encodes whole frames.
    Raises InputError for sizes and counts that no pipeline takes.
    """

    height: int = 480
    width: int = 832
    num_frames: int = 93
    num_cond_frames: int = 0
    batch_size: int = 1
    conditions: int = 1
    guidance: Guiding = "sequential"
    schedule: Schedule = "base"
    adapters: Adapters = "runtime"
    bsa: BSAConfig | None = None
    refine: Refine | None = None
    weight_dtype: WeightDtype = "bf16"
    compute_dtype: ComputeDtype = "bf16"
    text_dtype: ComputeDtype = "bf16"
    vae_dtype: ComputeDtype = "bf16"
    weight_copies: int = 0
    vae_tile: int = 0
    device: Device = "gpu"
    kv_cache: bool = True
    cache_storage: CacheStorage = "model"
    cache_place: CachePlace = "device"
    sparse: SparseKernels | None = None
    stream: Streaming = "off"
    resident: int = 0
    extra_weights: int = 0
    text_device: Literal["same", "cpu"] = "same"
    together: bool = False
    refine_only: bool = False
    keeps_frames: bool = False
    encoded_frames: int | None = None
    decoder_waits: bool = False

    def __post_init__(self) -> None:
        check_size(self.height, self.width)
        check_frames(self.num_frames)
        if self.num_cond_frames:
            check_cond_frames(self.num_cond_frames, self.num_frames, self.num_cond_frames)
        if self.encoded_frames:
            check_frames(self.encoded_frames)
        if not 1 <= self.conditions <= self.batch_size:
            raise InputError(f"conditions must be 1..{self.batch_size} (batch_size), got {self.conditions}")
        if self.guidance != "off":
            check_name("guidance", self.guidance, CfgMode)
        check_name("schedule", self.schedule, Schedule)
        check_name("adapters", self.adapters, Adapters)
        check_name("weight_dtype", self.weight_dtype, WeightDtype)
        for name in ("compute_dtype", "text_dtype", "vae_dtype"):
            check_name(name, getattr(self, name), ComputeDtype)
        check_name("device", self.device, Device)
        check_name("cache_storage", self.cache_storage, CacheStorage)
        check_name("cache_place", self.cache_place, CachePlace)
        check_name("stream", self.stream, Streaming)
        self.tiling  # noqa: B018  (validates)

    @property
    def encoded_latents(self) -> int:
        """Latent frames that the VAE encodes before sampling."""
        frames = self.num_cond_frames if self.encoded_frames is None else self.encoded_frames
        return num_latents(frames) if frames else 0

    @property
    def tiling(self) -> Tiling | None:
        """The tiles of the VAE, a quarter of each shared with the next."""
        return Tiling(self.vae_tile, self.vae_tile * 3 // 4) if self.vae_tile else None

    @property
    def copies(self) -> int:
        """`weight_copies`, one at least where weights are cast."""
        cast = ITEMSIZE[self.weight_dtype] != ITEMSIZE[self.compute_dtype]
        return max(self.weight_copies, 1 if cast else 0)

    @property
    def sparse_kernels(self) -> SparseKernels:
        return self.sparse or sparse_kernels(self.device)

    @property
    def convolutions(self) -> Convolutions:
        """How the VAE convolves: a host's, which is not ours, is counted as a CPU's, which takes most."""
        if self.device == "cpu" or not self.together:
            return "taps"
        return "triton" if self.sparse_kernels == "triton" else "torch"

    @property
    def samples(self) -> int:
        """Of one forward."""
        return self.batch_size * (2 if self.guidance == "batched" else 1)
