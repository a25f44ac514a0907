"""Block sparse attention in Triton: sm_80 and up, gfx942, and any machine under TRITON_INTERPRET=1."""

from lcv_bsa.backends.triton.attention import refusal, triton_attention

__all__ = ["refusal", "triton_attention"]
