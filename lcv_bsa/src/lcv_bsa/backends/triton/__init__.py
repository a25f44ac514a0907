"""Block sparse attention in Triton: sm_80 and up, gfx942, and any machine under TRITON_INTERPRET=1."""

from torch import Tensor

from lcv_bsa.backends.triton import backward as backward_pointer
from lcv_bsa.backends.triton import backward_fused, backward_tma, eight_bits, forward_tma, pairs, quantised
from lcv_bsa.backends.triton import forward as forward_pointer
from lcv_bsa.backends.triton.common import interpreted, refusal
from lcv_bsa.backends.triton.descriptors import tma_refusal
from lcv_bsa.kernels import Kernels
from lcv_bsa.selection import BlockSelection


def forward(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    """With TMA descriptors where the GPU has them and they take the inputs, else with pointers."""
    chosen = forward_pointer if _wants_pointers(q, k, v, selection) else forward_tma
    return chosen.forward(q, k, v, selection, scale)


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor, selection: BlockSelection,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `forward` chooses. Two runs agree to the bit."""
    chosen = backward_pointer if _wants_pointers(q, k, v, selection) else backward_tma
    return chosen.backward(q, k, v, o, lse, do, dlse, selection, scale)


def _wants_pointers(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> bool:
    # the interpreter has descriptors but no use for them: pointers take every head dim and block
    return interpreted() or tma_refusal(q, k, v, selection) is not None


# The sets of kernels, by the name of their backend.
KERNELS: dict[str, Kernels] = {
    "triton": Kernels(forward, backward, refusal),
    "triton_pointer": Kernels(forward_pointer.forward, backward_pointer.backward, refusal),
    "triton_tma": Kernels(forward_tma.forward, backward_tma.backward, tma_refusal),
    "triton_fused": Kernels(forward, backward_fused.backward, refusal),
    "triton_pair": Kernels(pairs.forward, backward, pairs.refusal),
    "triton_int8": Kernels(quantised.int8_forward, quantised.backward, quantised.refusal),
    "triton_fp8": Kernels(quantised.fp8_forward, quantised.backward, quantised.fp8_refusal),
    "triton_int8_fp8": Kernels(eight_bits.forward, quantised.backward, eight_bits.refusal),
}
