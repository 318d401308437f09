"""Hidden groups of devices whose data means, or looks, otherwise: settings to see collaboration in.

The first group has the data as it is. Nothing here is known to an edge or a device; the groups are kept with the run,
for its report and for ``refine.similarity = "oracle"``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fleetfit.config.sections import DataConfig
from fleetfit.core.randomness import derive_seed, named_generator
from fleetfit.data.preprocessing import Preprocessing, TextPreprocessing
from fleetfit.data.samples import Inputs, Samples

SWAPPED = 2 / 3  # of the classes, in each group but the first
MOST_KINDS = 3  # of shifts of inputs; groups beyond them combine two or three
TYPO_SHARE = 0.5  # of the words of at least three letters
VOWELS = str.maketrans("", "", "aeiouAEIOU")
DIGITS_FOR_LETTERS = str.maketrans("aeiostbg", "43105789")


def hidden_groups(config: DataConfig, cluster: str, devices: Sequence[str], seed: int) -> dict[str, int]:
    """The group of each device of a cluster, by the seed; sizes as equal as can be. Without groups, nothing.

    Raises:
        ValueError: more groups than there are kinds of inputs.
    """
    if config.split != "groups" and config.shift == "none":
        return {}
    if config.shift == "inputs" and config.groups > 2**MOST_KINDS:
        raise ValueError(f'data.groups must be <= {2**MOST_KINDS} with data.shift = "inputs", got {config.groups}')
    order = torch.randperm(len(devices), generator=named_generator(seed, "groups", cluster))
    return {device: int(place) % config.groups for device, place in zip(devices, order, strict=True)}


def classes_of_groups(config: DataConfig, num_classes: int, seed: int) -> Int[Tensor, " class"]:
    """With ``split = "groups"``: the group that has each class; dealt out evenly by the seed.

    Raises:
        ValueError: fewer classes than groups.
    """
    if num_classes < config.groups:
        rule = f'must be <= the {num_classes} classes with data.split = "groups"'
        raise ValueError(f"data.groups {rule}, got {config.groups}")
    order = torch.randperm(num_classes, generator=named_generator(seed, "groups", "classes"))
    groups = torch.empty(num_classes, dtype=torch.long)
    groups[order] = torch.arange(num_classes) % config.groups
    return groups


def shifted(samples: Samples, config: DataConfig, group: int, seed: int) -> Samples:
    """A device's samples as its group has them."""
    if group == 0 or config.shift == "none":
        return samples
    if config.shift == "labels":
        return replace(samples, labels=swapped_classes(samples.num_classes, group, seed)[samples.labels])
    kinds = _kinds(group)
    form = samples.inputs.form
    if isinstance(form, TextPreprocessing):
        return replace(samples, inputs=_shifted_texts(samples.inputs, form, kinds, seed))
    values = samples.inputs.store[samples.inputs.index]
    for kind in kinds:
        values = _shifted_images(values, kind, _ends(samples.inputs))
    return replace(samples, inputs=Inputs.of(values, form))


def swapped_classes(num_classes: int, group: int, seed: int) -> Int[Tensor, " class"]:
    """What each class is called in a group: some two thirds are swapped in pairs, each group's own."""
    order = torch.randperm(num_classes, generator=named_generator(seed, "groups", "labels", group))
    pairs = order[: max(2, int(num_classes * SWAPPED) // 2 * 2)]
    names = torch.arange(num_classes)
    names[pairs[0::2]], names[pairs[1::2]] = pairs[1::2], pairs[0::2]
    return names


def _kinds(group: int) -> tuple[int, ...]:
    """Each alone, then two together, then all."""
    combinations = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    return combinations[group - 1]


def _ends(inputs: Inputs) -> float:
    """The smallest and the largest value that pixels can have, added up; of ready inputs, that they do have."""
    if isinstance(inputs.form, Preprocessing):
        return inputs.form.maximum  # the smallest is 0
    return float(inputs.store.min()) + float(inputs.store.max())


def _shifted_images(images: Tensor, kind: int, ends: float) -> Tensor:
    """0: turned by a quarter (upside down if not square); 1: inverted; 2: colours swapped, grey ones upside down."""
    if kind == 0:
        return images.rot90(1, (-2, -1)) if images.shape[-1] == images.shape[-2] else images.flip((-2, -1))
    if kind == 1:
        return (ends - images.float()).to(images.dtype)
    return images.roll(1, 1) if images.shape[1] > 1 else images.flip(-2)


def _shifted_texts(inputs: Inputs, form: TextPreprocessing, kinds: Sequence[int], seed: int) -> Inputs:
    """0: neighbouring letters are swapped in half of the words; 1: no vowels; 2: digits for letters.

    Texts are read back from their tokens, so they are as the model saw them: cut, and perhaps without capitals.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(form.tokenizer)
    rows = inputs.store[inputs.index]
    texts = tokenizer.decode_batch([[t for t in row if t != form.pad_id] for row in rows.tolist()])
    generator = np.random.default_rng(derive_seed(seed, "groups", "typos"))
    ways: Mapping[int, Callable[[str], str]] = {
        0: lambda text: _with_typos(text, generator),
        1: lambda text: text.translate(VOWELS).strip() or text,
        2: lambda text: text.lower().translate(DIGITS_FOR_LETTERS),
    }
    for kind in kinds:
        texts = [ways[kind](text) for text in texts]
    if not texts:
        return inputs
    return Inputs.of(torch.from_numpy(form.apply(texts).astype(np.int32)), form)


def _with_typos(text: str, generator: np.random.Generator) -> str:
    words = text.split(" ")
    for i, word in enumerate(words):
        if len(word) > 2 and generator.random() < TYPO_SHARE:
            at = int(generator.integers(len(word) - 1))
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)
