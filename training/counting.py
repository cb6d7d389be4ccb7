"""Operations and memory of a step, counted by running it on tensors without data.

It runs as on a CUDA device: mixed precision keeps norms, softmax and sums in float32, and attention is fused.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One forward and backward pass, in operations and bytes."""

    forward: int  # operations
    backward: int  # with what is recomputed
    weights: int  # bytes of all parameters and buffers
    gradients: int  # of all parameters that learn
    saved: int  # what the forward pass leaves for the backward pass
    peak: int  # most at any time beside the weights: activations, their gradients, gradients made so far
    peak_gradients: int  # the parameters' share of the peak

    @property
    def operations(self) -> int:
        return self.forward + self.backward


def measure(module: nn.Module, step: Callable[[], Tensor], mixed: torch.dtype | None = None) -> Step:
    """Counts one step; `module` and what `step` uses were made under FakeTensorMode, or are real and small.

    Args:
        module: its parameters are the weights; those that require gradients learn. Their gradients are left as None.
        step: computes a loss, a scalar; called once.
        mixed: type of mixed precision.
    """
    held = [*module.parameters(), *module.buffers()]
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    live = Live()
    live.ignore(held)
    precision = nullcontext() if mixed is None else torch.autocast("cpu", mixed)
    with precision, live, _as_on_cuda():
        loss = step()
        forward, saved = live.flops, live.now
        loss.backward()
    gradients = [parameter.grad for parameter in learning if parameter.grad is not None]
    result = Step(
        forward=forward,
        backward=live.flops - forward,
        weights=sum(value.nbytes for value in held),
        gradients=sum(value.nbytes for value in learning),
        saved=saved,
        peak=live.peak,
        peak_gradients=sum(value.nbytes for value in gradients if live.born(value) <= live.peaked),
    )
    module.zero_grad(set_to_none=True)
    return result


class Live(TorchDispatchMode):
    """Operations, and bytes of all storages that they made and something still holds.

    Not FlopCounterMode, whose record of modules keeps alive what gradient checkpointing lets go of; its formulas.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = self.peaked = self.operations = 0
        self._births: dict[int, int] = {}
        self._ignored: set[int] = set()

    def ignore(self, tensors: list[Tensor]) -> None:
        self._ignored.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def born(self, tensor: Tensor) -> int:
        """Number of the operation that made the tensor's storage."""
        return self._births.get(tensor.untyped_storage()._cdata, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._births or key in self._ignored:
            return
        self._births[key] = self.operations
        weakref.finalize(storage, self._gone, key, size)
        self.now += size
        if self.now > self.peak:
            self.peak, self.peaked = self.now, self.operations

    def _gone(self, key: int, size: int) -> None:
        self._births.pop(key, None)
        self.now -= size


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    """Operations as a CUDA device does them, where the CPU, whose tensors stand in for its own, does otherwise."""

    def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            mixed = torch.is_autocast_enabled("cpu") and value.is_floating_point()
            return function(value.float() if mixed else value, *args, **kwargs)

        return wrapped

    def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not torch.is_autocast_enabled("cpu") or not torch.backends.cuda.flash_sdp_enabled():
            return attention(query, key, value)
        mixed = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(mixed) for tensor in (query, key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    attention = F.scaled_dot_product_attention
    # Patched instead of intercepted by a TorchFunctionMode, which is off during a backward pass that computes anew.
    with ExitStack() as stack:
        for owner, name in ((F, "layer_norm"), (F, "group_norm"), (torch, "softmax"), (Tensor, "sum")):
            stack.enter_context(mock.patch.object(owner, name, in_float32(getattr(owner, name))))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", fused))
        # The one number that the loss reads is how many samples go without a reference: none, the dearest case.
        stack.enter_context(mock.patch.object(Tensor, "__int__", lambda _: 0))
        yield
