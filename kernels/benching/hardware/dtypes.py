"""The dtypes of matrix products by their names in the field, and which of them the device at hand has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.architecture import architecture
from kernels.common import products


@dataclass(frozen=True)
class Kind:
    """storage: of the operands. precision: of fp32 products, in torch's words. tolerance: relative root mean square error."""

    name: str
    storage: torch.dtype
    tolerance: float
    precision: str = "highest"

    @property
    def scaled(self) -> bool:
        return self.storage.itemsize == 1

    def multiply(self, a: Tensor, b: Tensor, out: Tensor | None, one: Tensor | None) -> Tensor:
        """a [m, k] times b [k, n]. out: [m, n], or None for fp8, whose result is bf16. one: fp32 scale, for fp8."""
        if self.scaled:
            assert one is not None
            return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
        return torch.mm(a, b, out=out)


# The result is rounded to the storage's mantissa (bf16: 8 bits), tf32 operands to 11 bits; fp8 sums are kept short on Hopper.
TOLERANCES = {"bf16": 8e-3, "fp16": 2e-3, "fp32": 1e-5, "tf32": 2e-3, "fp8": 2e-2}
NAMES = tuple(TOLERANCES)
USUAL_CPU = ("bf16", "fp32")
USUAL_GPU = NAMES


def kind(name: str, device: torch.device) -> Kind:
    """Raises ValueError for a name that is not one, or a dtype that the device does not have."""
    if name not in TOLERANCES:
        raise ValueError(f"{name!r} is not a dtype; choose among {', '.join(NAMES)}")
    tolerance = TOLERANCES[name]
    if name == "fp8":
        # MI300 has the variant of e4m3 without negative zero, everybody else that of the OCP standard.
        fnuz = device.type == "cuda" and architecture(device) == "gfx942"
        found = Kind(name, torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn, tolerance)
        _probe(found, device)
        return found
    if name == "tf32":
        if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
            raise ValueError("tf32 is a mode of NVIDIA GPUs since compute capability 8.0; leave it out here")
        return Kind(name, torch.float32, tolerance, precision="high")
    storage = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    return Kind(name, storage, tolerance)


def _probe(fp8: Kind, device: torch.device) -> None:
    try:
        a = torch.zeros(64, 64, device=device).to(fp8.storage)
        fp8.multiply(a, a.t(), None, torch.ones((), device=device))
    except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(f"torch has no fp8 product for this device ({reason}); leave fp8 out here") from None


@contextlib.contextmanager
def precision(chosen: Kind) -> Iterator[None]:
    """Within this context fp32 products have the kind's precision."""
    with products.kept():
        torch.set_float32_matmul_precision(chosen.precision)
        yield
