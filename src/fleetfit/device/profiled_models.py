"""What is measured on a machine: the model of a job, or a family's small one, and random inputs for it."""

import torch
from torch import Tensor

from fleetfit.config.families import FAMILIES
from fleetfit.config.sections import ModelConfig
from fleetfit.core.records import JsonDict
from fleetfit.data.text_forms import LONGEST, positions_of
from fleetfit.models.elastic import Backbone
from fleetfit.models.families import family_of, text_config
from fleetfit.models.pretrained import base_config

MOST_ROWS = 5000  # of a vocabulary; a model of every shape is in memory at once


def make_reference(model: ModelConfig | None, family: str = "vit", max_tokens: int | None = None) -> Backbone:
    """The model of a job, or the family's small one; weights do not matter, so none are trained or read.

    Neither does the vocabulary, which a text model only looks its tokens up in: the job's, trimmed to what its public
    texts use, cannot be known without them. How long texts are matters; see ``max_tokens``.

    Args:
        model: The job's; None: the family's.
        family: Where there is no job.
        max_tokens: Tokens of a text, as the job has it; None: as many as the job takes at most where it says nothing,
            128, or as there are positions.

    Raises:
        ValueError: an unknown family, a model that cannot be built or had, more tokens than it has positions for.
    """
    if model is None:
        if family not in FAMILIES:
            raise ValueError(f"--family must be one of {', '.join(FAMILIES)}, got {family!r}")
        # What is left out is as the family's class has it.
        fields: JsonDict = {"family": family, "pretrained": "", "config": FAMILIES[family].profiled}
        model = ModelConfig.model_construct(**fields)
    config = base_config(model.pretrained, model.family) if model.pretrained else dict(model.config)
    try:
        if family_of(model.family).kind == "text":
            positions = positions_of(model)
            if max_tokens is not None and max_tokens > positions:
                raise ValueError(f"data.max_tokens must be <= the {positions} positions of the model, got {max_tokens}")
            num_tokens = max_tokens or min(LONGEST, positions)
            config = text_config(model.family, config, num_tokens=num_tokens, vocab_size=MOST_ROWS, pad_token_id=0)
        return Backbone(model.family, config)
    except ValueError as error:
        if not model.pretrained or str(error).startswith("model.pretrained"):
            raise
        raise ValueError(f"model.pretrained = {model.pretrained!r}: {error}") from error


def make_inputs(backbone: Backbone, number: int) -> Tensor:
    """Random inputs; texts are as long as can be, without padding, which would not be computed."""
    generator, shape = torch.Generator().manual_seed(0), (number, *backbone.input_shape)
    if family_of(backbone.family).kind == "image":
        return torch.rand(shape, generator=generator)
    padding = backbone.config["pad_token_id"]
    tokens = torch.randint(backbone.config["vocab_size"] - 1, shape, generator=generator)
    others: Tensor = tokens + (tokens >= padding)
    return others
