"""Linear layers in 8-bit floats: twice the matrix rate of bf16 on GPUs that have them, for a little of the score.

What it costs is measured on data, not assumed: `sella-train precision`.

Shapes: T tokens, X input and Y output width.
"""

import torch
from torch import Tensor, nn

LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Fp8Linear(nn.Module):
    """A linear layer; weight rows and input tokens are scaled to the type's range, each by its own largest value."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_XY, scale_1Y = _quantize(linear.weight.detach())
        self.register_buffer("weight_XY", weight_XY.t())
        self.register_buffer("scale_1Y", scale_1Y.t())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self._out_dtype = linear.weight.dtype

    weight_XY: Tensor
    scale_1Y: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Return the product in the weights' former type."""
        x_TX, scale_T1 = _quantize(x.flatten(0, -2))
        out_TY: Tensor = torch._scaled_mm(
            x_TX, self.weight_XY, scale_a=scale_T1, scale_b=self.scale_1Y, out_dtype=self._out_dtype
        )
        if self.bias is not None:
            out_TY = out_TY + self.bias
        shaped: Tensor = out_TY.unflatten(0, x.shape[:-1])
        return shaped


def use_fp8(module: nn.Module) -> None:
    """Replace every linear layer within a module."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Fp8Linear(child))
        else:
            use_fp8(child)


def _quantize(rows_RX: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows in fp8 and the scale (R, 1), fp32, that gives them back."""
    scale_R1 = rows_RX.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / LARGEST
    return (rows_RX / scale_R1).to(torch.float8_e4m3fn), scale_R1
