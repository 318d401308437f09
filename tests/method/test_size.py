"""zeta, and the exact size of a safetensors file."""

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfit.core.records import BackboneShape
from fleetfit.method.size import SAFETENSORS_DTYPES, safetensors_size_bytes, zeta

# Valid Unicode without lone surrogates, which no JSON file can hold.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
entries = st.tuples(
    st.lists(st.integers(0, 12), max_size=4).map(tuple),
    st.sampled_from(list(SAFETENSORS_DTYPES)),
)


def test_zeta_by_hand():
    # w*d = 3, H = 4*8*8 = 256, 2*8*32 = 512.
    assert zeta(BackboneShape(width=0.5, depth=6), 8, 8, 32) == pytest.approx(3 * (256 + 512))
    # Heads narrower than the embedding: H = 4*8*4 = 128.
    assert zeta(BackboneShape(width=0.5, depth=6), 8, 4, 32) == pytest.approx(3 * (128 + 512))


def test_zeta_counts_the_matrices_of_a_real_layer():
    layer = torch.nn.TransformerEncoderLayer(24, nhead=3, dim_feedforward=56)
    matrices = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    assert zeta(BackboneShape(width=1.0, depth=5), 24, 24, 56) == 5 * matrices


def test_zeta_refuses_sizes_below_one():
    with pytest.raises(ValueError, match="num_neurons must be >= 1, got 0"):
        zeta(BackboneShape(width=1.0, depth=1), 8, 8, 0)


@settings(max_examples=300)
@given(
    st.dictionaries(texts.filter(lambda name: name != "__metadata__"), entries, max_size=8),
    st.none() | st.dictionaries(texts, texts, max_size=3),
)
def test_equals_the_file_that_safetensors_writes(shapes, metadata):
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    assert safetensors_size_bytes(shapes, metadata) == len(safetensors.torch.save(tensors, metadata))


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 3000), st.sampled_from(list(SAFETENSORS_DTYPES))), min_size=2, max_size=12))
def test_layout_decides_the_digits_of_the_offsets(rows):
    # Long tensors, so that a wrong order shows in how many digits the offsets have.
    shapes = {f"layer.{i}": ((length,), dtype) for i, (length, dtype) in enumerate(rows)}
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    assert safetensors_size_bytes(shapes) == len(safetensors.torch.save(tensors))


def test_layout_is_the_formats_own():
    tensors = {str(dtype): torch.zeros(1, dtype=dtype) for dtype in reversed(SAFETENSORS_DTYPES)}
    order = [name for name, _ in safetensors.deserialize(safetensors.torch.save(tensors))]
    assert sorted(order) == sorted(map(str, SAFETENSORS_DTYPES))
    blob = safetensors.torch.save(tensors)
    assert sorted(order, key=lambda name: blob.index(name.encode())) == [str(d) for d in SAFETENSORS_DTYPES]


def test_a_model_of_terabytes_costs_nothing_to_size():
    size = safetensors_size_bytes({"w": ((10**6, 10**6), torch.float32)}, {"format": "pt"})
    assert 0 < size - 4 * 10**12 < 200
    assert size % 8 == 0


def test_refuses_what_the_format_cannot_hold():
    with pytest.raises(ValueError, match=r"dtype of 'a' must be one of .*, got torch.qint8"):
        safetensors_size_bytes({"a": ((1,), torch.qint8)})
    with pytest.raises(ValueError, match="dimensions of 'a' must be >= 0"):
        safetensors_size_bytes({"a": ((-1,), torch.float32)})
    with pytest.raises(ValueError, match="must not be the format's own"):
        safetensors_size_bytes({"__metadata__": ((1,), torch.float32)})
