"""Sources: samples are what scikit-learn has, in the range the models expect, and can be picked by row."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from fleetfit.config.job import Job
from fleetfit.data.samples import Inputs, Samples
from fleetfit.data.sources import load_samples

torch.set_num_threads(1)


def test_digits_are_scikit_learns_in_minus_one_to_one() -> None:
    samples, digits = load_samples(Job()), load_digits()
    assert len(samples) == 1797
    assert samples.inputs[:].shape == (1797, 1, 8, 8)
    assert samples.inputs[:].dtype == torch.float32
    assert np.array_equal((samples.inputs[:][:, 0].numpy() + 1) * 8, digits.images)
    assert (float(samples.inputs[:].min()), float(samples.inputs[:].max())) == (-1.0, 1.0)
    assert samples.labels.dtype == torch.long
    assert samples.labels.tolist() == digits.target.tolist()
    assert samples.label_names == tuple("0123456789")
    assert samples.num_classes == 10
    assert samples.raw_bytes_per_sample == 64  # one byte a pixel at rest


def test_loading_twice_is_the_same() -> None:
    one, two = load_samples(Job()), load_samples(Job())
    assert torch.equal(one.inputs[:], two.inputs[:])
    assert torch.equal(one.labels, two.labels)


def test_rows_keep_inputs_with_their_labels_and_all_class_names() -> None:
    samples = Samples(Inputs.of(torch.arange(6.0).reshape(6, 1, 1, 1)), torch.arange(6) // 2, ("a", "b", "c"), 5)
    some = samples.rows(torch.tensor([4, 0, 4]))
    assert len(some) == 3
    assert some.inputs[:].flatten().tolist() == [4, 0, 4]
    assert some.labels.tolist() == [2, 0, 2]
    assert (some.num_classes, some.raw_bytes_per_sample) == (3, 5)
    none = samples.rows(torch.zeros(0, dtype=torch.long))
    assert len(none) == 0
    assert none.num_classes == 3
    assert none.inputs[:].shape == (0, 1, 1, 1)
