"""An accelerator that is not there: tensors that say they are elsewhere, and compute on the CPU.

What a real one forbids is an error here too: tensors of two places in one operation. What makes a program wait for a
real one is counted: numbers and tensors that come back, and rows that are looked up by numbers of the CPU.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

THERE = torch.device("meta", 7)  # PyTorch lets autograd run on it anywhere; "meta" without a number stays what it is
FETCHES = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")


class Remote(Tensor):
    """A tensor on the pretended accelerator."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Remote":
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=THERE, requires_grad=False
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"Remote({self.inner})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{function}: outside of PretendedAccelerator")


class PretendedAccelerator(TorchDispatchMode):
    """While this is entered, ``THERE`` is an accelerator; ``waits`` counts what it would be waited for, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = function._schema.name
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        remote = [t for t in tensors if isinstance(t, Remote)]
        stays_there = bool(remote)
        if name in FETCHES and remote:
            self.waits[name] += 1
            stays_there = name == "aten::nonzero"
        if kwargs.get("device") is not None:
            stays_there = torch.device(kwargs["device"]) == THERE
            self.waits["fetched"] += bool(remote) and not stays_there
            if stays_there:
                kwargs["device"] = torch.device("cpu")
        elif name == "aten::copy_":
            stays_there = isinstance(args[0], Remote)
            self.waits["fetched"] += bool(remote) and not stays_there
        elif remote:
            local = [t for t in tensors if not isinstance(t, Remote) and t.ndim]
            if local and name in ("aten::index", "aten::index_put_"):
                self.waits["looked up by numbers of the CPU"] += 1
            elif local:
                raise RuntimeError(f"{name}: tensors in two places, {[tuple(t.shape) for t in local]} on the CPU")
        out = function(*tree_map(_local, args), **tree_map(_local, kwargs))
        if not stays_there:
            return out
        same = {id(t.inner): t for t in remote}
        return tree_map(lambda t: same.get(id(t), Remote(t)) if isinstance(t, Tensor) else t, out)


def _local(value: Any) -> Any:
    return value.inner if isinstance(value, Remote) else value
