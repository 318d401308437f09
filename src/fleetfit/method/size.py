"""Size of a sub-network: the paper's zeta (below Eq. 3), and the exact bytes of a safetensors file (Beyond)."""

import json
import math
from collections.abc import Mapping

import torch

from fleetfit.core.records import BackboneShape

# In the order in which safetensors lays tensors out, all of one dtype together, then by name.
SAFETENSORS_DTYPES: dict[torch.dtype, str] = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def zeta(shape: BackboneShape, hidden_size: int, attention_size: int, num_neurons: int) -> float:
    """Number of weights in the layers of the sub-network (w, d): d*w*(H + 2*xi_h*xi_f), below Eq. 3.

    Biases, embeddings and header are not in it, so it is an objective, not a promise; see ``safetensors_size_bytes``.

    Reading: H, "parameters of all heads of a layer", is 4*hidden*attention (query, key, value and output projection);
    this is the paper's 4*xi_h^2 where the heads together are as wide as the embedding.

    Args:
        shape: (w, d), d in layers.
        hidden_size: xi_h, width of the embedding.
        attention_size: attention heads of a layer times their channels; xi_h in plain Transformers.
        num_neurons: xi_f, neurons of a layer's MLP.

    Raises:
        ValueError: a size is below 1.
    """
    sizes = {"hidden_size": hidden_size, "attention_size": attention_size, "num_neurons": num_neurons}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    attention_parameters = 4 * hidden_size * attention_size
    return shape.depth * shape.width * (attention_parameters + 2 * hidden_size * num_neurons)


def safetensors_size_bytes(
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str] | None = None
) -> int:
    """Exact size of the safetensors file that holds tensors of these shapes, without making them (Beyond).

    A file is 8 bytes of header length, a JSON header padded to a multiple of 8, and the data. The header holds offsets
    in decimal, so its length depends on how the tensors are laid out: wide dtypes first, then by name.

    Args:
        shapes: Name -> (shape, dtype).
        metadata: What is passed as ``metadata`` to ``safetensors.torch.save``.

    Raises:
        ValueError: a dtype that is not in ``SAFETENSORS_DTYPES``, a negative dimension, or a name the format reserves.
    """
    order = {dtype: place for place, dtype in enumerate(SAFETENSORS_DTYPES)}
    for name, (dimensions, dtype) in shapes.items():
        if dtype not in order:
            raise ValueError(f"dtype of {name!r} must be one of {', '.join(map(str, order))}, got {dtype}")
        if any(n < 0 for n in dimensions):
            raise ValueError(f"dimensions of {name!r} must be >= 0, got {dimensions}")
        if name == "__metadata__":
            raise ValueError("a tensor's name must not be the format's own, got '__metadata__'")
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name in sorted(shapes, key=lambda name: (order[shapes[name][1]], name)):
        dimensions, dtype = shapes[name]
        end = offset + math.prod(dimensions) * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(dimensions),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + math.ceil(len(text) / 8) * 8 + offset
