"""Block sparse attention in Triton: sm_80 and up, gfx942, and any machine under TRITON_INTERPRET=1."""

from lcv_bsa.backends.triton.backward import backward
from lcv_bsa.backends.triton.common import refusal
from lcv_bsa.backends.triton.forward import forward
from lcv_bsa.ops import Kernels

# The sets of kernels, by the name of their backend.
KERNELS: dict[str, Kernels] = {"triton": Kernels(forward, backward, refusal)}
