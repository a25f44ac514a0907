"""What a job needs before it starts: bytes of weights, activations and caches from the configurations alone."""

from lcv_core.planning.advice import advice, size_text, verdict
from lcv_core.planning.job import Job, Refine
from lcv_core.planning.plan import Plan, Stage, make_plan
from lcv_core.planning.sampling import Sampling
from lcv_core.planning.sparse import Device, sparse_kernels
from lcv_core.planning.transformer import kv_cache_bytes

__all__ = [
    "Device", "Job", "Plan", "Refine", "Sampling", "Stage", "advice", "kv_cache_bytes", "make_plan", "size_text",
    "sparse_kernels", "verdict",
]  # fmt: skip
