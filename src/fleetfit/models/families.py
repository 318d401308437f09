"""Where attention heads, MLP neurons and layers live in each Hugging Face family. Adding a family is one entry here."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fleetfit.models.features import FeatureShape
from fleetfit.records import JsonDict

# Sizes that Transformers does not check: some below 1 build a model that fails, or fails to run, in obscure ways.
SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "head_dim"),
    *("image_size", "patch_size", "num_channels"),
)


def _checked(config_class: Any, config: JsonDict) -> Any:
    """A configuration object; Transformers itself would swallow a misspelt key.

    Raises:
        ValueError: an unknown key; names the nearest. A size that is no integer above 0.
    """
    known = {*vars(config_class()), "head_dim", "model_type"}
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"model.config.{key} is an unknown key of {config_class.__name__}{hint}")
    for key in SIZES:
        if key in config and (type(config[key]) is not int or config[key] < 1):
            raise ValueError(f"model.config.{key} must be an integer >= 1, got {config[key]!r}")
    try:
        return config_class(**config)
    except Exception as error:  # Transformers raises classes of its own
        raise ValueError(f"model.config is not a valid {config_class.__name__}: {error}") from error


def _vit(config: JsonDict) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    checked = _checked(ViTConfig, config)
    if checked.image_size < checked.patch_size:
        raise ValueError(
            f"model.config.patch_size must be <= image_size {checked.image_size}, got {checked.patch_size}"
        )
    try:
        return ViTModel(checked, add_pooling_layer=False)  # type: ignore[no-any-return]
    except Exception as error:  # an activation that is not there is a KeyError
        raise ValueError(f"model.config builds no ViTModel: {error!r}") from error


def _vit_features(config: Any) -> FeatureShape:
    side = config.image_size // config.patch_size
    return FeatureShape(config.hidden_size, (side, side), num_prefix_tokens=1)


@dataclass(frozen=True)
class Family:
    """Names of modules and configuration keys of one family.

    Attributes:
        build: Configuration -> a base model without a task head.
        feature_shape: Configuration object -> the shape of the tokens.
        layers: Path of the list of layers; the other module paths are inside a layer.
        query_key_value: Projections whose rows are heads.
        attention_output: Projection whose columns are heads; its input is O_h of Eq. 8.
        mlp_in: Linear layer whose rows are neurons.
        mlp_out: Linear layer whose columns are neurons; its input is the hidden activation.
        num_layers, num_heads, num_neurons: Configuration keys.
    """

    build: Callable[[JsonDict], nn.Module]
    feature_shape: Callable[[Any], FeatureShape]
    layers: str = "layers"
    query_key_value: tuple[str, ...] = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    attention_output: str = "attention.o_proj"
    mlp_in: str = "mlp.fc1"
    mlp_out: str = "mlp.fc2"
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    num_neurons: str = "intermediate_size"


FAMILIES: dict[str, Family] = {
    "vit": Family(build=_vit, feature_shape=_vit_features),
}


def family_of(name: str) -> Family:
    """The family's entry.

    Raises:
        ValueError: not supported; names those that are.
    """
    if name not in FAMILIES:
        raise ValueError(f"model.family must be one of {', '.join(FAMILIES)}, got {name!r}")
    return FAMILIES[name]
