"""Floating-point operations of training steps, counted as they run.

Promise: what is counted is what the kernels of matrix products and attention do, by torch's own formulas, for any
model. A multiply and an add are two operations. Norms, activations and rotations are left out. Cost: a look-up for
each operation while the counter is on.

`needed` leaves out what gradient checkpointing runs again, and the scores that fused attention computes again in its
backward pass: over samples without padding it is the numerator of model FLOPs utilisation (MFU, Chowdhery et al. 2022,
arXiv 2204.02311, appendix B).
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_LIKE = {  # the CPU's kernels have no formula in torch, but arguments in the same order
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _aten._scaled_dot_product_flash_attention_backward,
}
_BACKWARD_PRODUCTS, _AGAIN = 5, 1  # of attention, in a fused kernel; one is that of the scores


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts within its `with` block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.computed = self.needed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # the operations that it is made of come here again
        result = func(*args, **kwargs)
        if func.namespace == "prim":  # such as asking for a device
            return result
        kernel = getattr(func, "overloadpacket", func)
        formula = flop_registry.get(_LIKE.get(kernel, kernel))
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=result)
            self.computed += flops
            if not _recomputing():
                fused = "attention" in str(kernel) and "backward" in str(kernel)
                self.needed += flops * (_BACKWARD_PRODUCTS - _AGAIN) // _BACKWARD_PRODUCTS if fused else flops
        return result


def _recomputing() -> bool:
    """Whether a forward pass runs inside a backward pass: that of gradient checkpointing, with gradients enabled."""
    return torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()
