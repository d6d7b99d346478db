"""What a piece of PyTorch code holds at once, and how much it computes, without doing it.

The code runs on fake tensors (torch._subclasses.fake_tensor), which have a shape, a dtype and a device and no values;
`Live` sees every operator that autograd, autocast and the libraries really issue.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_ATEN = torch.ops.aten


@dataclass
class _Storage:
    size: int
    label: str
    reference: weakref.ref[Any]  # kept, or its callback would never come


class Live(TorchDispatchMode):
    """While it is active: bytes of all storages that are alive, the most there were at once and who had asked for them
    (`label`), and the floating-point operations of matrix products and attention, two for a multiply and add.

    Where code asks for values, it is told that every condition holds: all tokens are supervised, all numbers finite.
    """

    def __init__(self) -> None:
        super().__init__()
        self.label = ""
        self.now: Counter[str] = Counter()  # label → bytes
        self.peak: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()  # label → operations
        self._most = 0
        self._total = 0
        self._known: dict[int, _Storage] = {}

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Storages that appear in it are of `label`."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def begin(self) -> None:
        """The peak is of what follows."""
        self.peak, self._most = Counter(self.now), self._total

    def hold(self, tensors: Iterable[Tensor], label: str) -> None:
        """Tensors that are there already, or whose label is to be another one."""
        with self.labelled(label):
            for tensor in tensors:
                if (known := self._known.get(tensor.untyped_storage()._cdata)) is not None:
                    self.now[known.label] -= known.size
                    self.now[label] += known.size
                    known.label = label
                self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = _answer(func, args)
        if out is None:
            out = func(*args, **kwargs)
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self._see(each)
        self.flops[self.label] += _flops(func, args, kwargs, out)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size, label = storage.nbytes(), self.label
        self._known[key] = _Storage(size, label, weakref.ref(storage, partial(self._gone, key)))
        self.now[label] += size
        self._total += size
        if self._total > self._most:
            self._most, self.peak = self._total, Counter(self.now)

    def _gone(self, key: int, _: Any) -> None:
        gone = self._known.pop(key)
        self.now[gone.label] -= gone.size
        self._total -= gone.size


def _answer(func: Any, args: Any) -> Any:
    """In place of values that fake tensors do not have."""
    if func is _ATEN._local_scalar_dense.default:
        return args[0].dtype == torch.bool or args[0].dtype.is_floating_point * 1.0 or 1
    if func is _ATEN.nonzero.default:
        return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
    if func is _ATEN.equal.default:
        return True
    return None


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = func._overloadpacket
    if packet is _ATEN._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape)
    if packet is _ATEN._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape)
    count = flop_registry.get(_ATEN.addmm if packet is _ATEN.addmm_ else packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))
