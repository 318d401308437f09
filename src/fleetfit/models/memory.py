"""What a forward pass holds in memory at a time (Beyond): counted, operation by operation, not read from the system."""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that operations make while they live; views of a tensor are no more than it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._live_bytes = 0
        self._sizes: dict[int, int] = {}
        self._owners: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                if key in given:  # of a weight or an input
                    continue
                self._sizes[key] = storage.nbytes()
                self._live_bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self._live_bytes)
            self._owners[key] += 1
            weakref.finalize(tensor, self._gone, key)
        return result

    def _gone(self, key: int) -> None:
        self._owners[key] -= 1
        if not self._owners[key]:
            self._live_bytes -= self._sizes.pop(key)


@torch.no_grad()
def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that the tensors made by ``run`` take at a time; weights and inputs are not counted."""
    live = LiveTensors()
    with live:
        run()
    return live.peak_bytes
