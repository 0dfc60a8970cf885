"""Operators as pure functions of tensors: reference, chunked torch, Triton. One public function each."""

from kernels.attention import attention
from kernels.cca import cca
from kernels.cross_entropy import linear_cross_entropy
from kernels.delta_rule import delta_rule
from kernels.experts import experts
from kernels.gated_linear_attention import gated_linear_attention
from kernels.newton_schulz import newton_schulz
from kernels.norm import add_rms_norm, gated_rms_norm, l2_norm, rms_norm
from kernels.rational import rational
from kernels.rotary import rotary
from kernels.short_conv import short_convolution
from kernels.state_space import selective_scan
from kernels.swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "attention",
    "cca",
    "delta_rule",
    "experts",
    "gated_linear_attention",
    "gated_rms_norm",
    "l2_norm",
    "linear_cross_entropy",
    "newton_schulz",
    "rational",
    "rms_norm",
    "rotary",
    "selective_scan",
    "short_convolution",
    "swiglu",
]
