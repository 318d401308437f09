"""Where attention heads, MLP neurons and layers live in each Hugging Face family. Adding a family is one entry here."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import nn

from fleetfit.models.features import FeatureShape
from fleetfit.records import JsonDict

# Sizes that Transformers does not check: some below 1 build a model that fails, or fails to run, in obscure ways.
SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "mlp_ratio", "head_dim"),
    *("image_size", "patch_size", "num_channels"),
)
# No field of their classes: read by the attention of all families; the neurons of dinov2, see ``_dinov2``; a note.
MORE_KEYS = ("head_dim", "intermediate_size", "model_type")


def own_keys(config_class: Any) -> tuple[str, ...]:
    """Configuration keys that shape a model; those that all of Transformers has, like label names, do not."""
    from transformers import PreTrainedConfig

    shared = {field.name for field in fields(PreTrainedConfig)}
    own = [field.name for field in fields(config_class) if field.name not in shared and field.name[0] != "_"]
    return (*own, *MORE_KEYS)


def own_config(config: Any) -> JsonDict:
    """A configuration object as a plain mapping, with what rebuilds the model and no more."""
    keys = own_keys(type(config))
    return {key: value for key, value in config.to_diff_dict().items() if key in keys}


def _checked(config_class: Any, config: JsonDict) -> Any:
    """A configuration object; Transformers itself would swallow a misspelt key.

    Raises:
        ValueError: an unknown key; names the nearest. A size that is no integer above 0, a patch larger than the image.
    """
    known = own_keys(config_class)
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"model.config.{key} is an unknown key of {config_class.__name__}{hint}")
    for key in SIZES:
        if key in config and (type(config[key]) is not int or config[key] < 1):
            raise ValueError(f"model.config.{key} must be an integer >= 1, got {config[key]!r}")
    try:
        checked = config_class(**config)
    except Exception as error:  # Transformers raises classes of its own
        raise ValueError(f"model.config is not a valid {config_class.__name__}: {error}") from error
    if checked.image_size < checked.patch_size:
        raise ValueError(
            f"model.config.patch_size must be <= image_size {checked.image_size}, got {checked.patch_size}"
        )
    return checked


def _model(model_class: Any, config: JsonDict, **options: bool) -> Any:
    checked = _checked(model_class.config_class, config)
    try:
        return model_class(checked, **options)
    except Exception as error:  # an activation that is not there is a KeyError
        raise ValueError(f"model.config builds no {model_class.__name__}: {error!r}") from error


def _vit(config: JsonDict) -> nn.Module:
    from transformers import ViTModel

    return _model(ViTModel, config, add_pooling_layer=False)  # type: ignore[no-any-return]


def _deit(config: JsonDict) -> nn.Module:
    from transformers import DeiTModel

    return _model(DeiTModel, config, add_pooling_layer=False)  # type: ignore[no-any-return]


def _dinov2(config: JsonDict) -> nn.Module:
    """DINOv2 without its mask token, which only its pre-training uses.

    Its class knows the MLP's size as a whole multiple of the embedding only (``mlp_ratio``), which a cut MLP is not.
    ``intermediate_size``, a key of our own that wins over ``mlp_ratio``, says the number of neurons.
    """
    from transformers import Dinov2Model

    if config.get("use_swiglu_ffn"):
        raise ValueError("model.config.use_swiglu_ffn must be false: only DINOv2 with the plain MLP can be cut")
    model = _model(Dinov2Model, {**config, "use_mask_token": False})
    hidden_size, neurons = model.config.hidden_size, config.get("intermediate_size")
    if neurons is None:
        model.config.intermediate_size = hidden_size * model.config.mlp_ratio
        return model  # type: ignore[no-any-return]
    for layer in model.encoder.layer:
        layer.mlp.fc1, layer.mlp.fc2 = nn.Linear(hidden_size, neurons), nn.Linear(neurons, hidden_size)
        for linear in (layer.mlp.fc1, layer.mlp.fc2):
            nn.init.trunc_normal_(linear.weight, std=model.config.initializer_range)
            nn.init.zeros_(linear.bias)
    return model  # type: ignore[no-any-return]


def _image_features(config: Any, num_prefix_tokens: int = 1) -> FeatureShape:
    side = config.image_size // config.patch_size
    return FeatureShape(config.hidden_size, (side, side), num_prefix_tokens)


def _image_inputs(config: Any) -> tuple[int, ...]:
    return (config.num_channels, config.image_size, config.image_size)


@dataclass(frozen=True)
class Family:
    """Names of modules and configuration keys of one family.

    Attributes:
        build: Configuration -> a base model without a task head.
        feature_shape: Configuration object -> the shape of the tokens.
        input_shape: Configuration object -> the shape of one input.
        layers: Path of the list of layers; the other module paths are inside a layer.
        query_key_value: Projections whose rows are heads.
        attention_output: Projection whose columns are heads; its input is O_h of Eq. 8.
        mlp_in: Linear layer whose rows are neurons.
        mlp_out: Linear layer whose columns are neurons; its input is the hidden activation.
        num_layers, num_heads, num_neurons: Configuration keys.
    """

    build: Callable[[JsonDict], nn.Module]
    feature_shape: Callable[[Any], FeatureShape] = _image_features
    input_shape: Callable[[Any], tuple[int, ...]] = _image_inputs
    layers: str = "layers"
    query_key_value: tuple[str, ...] = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    attention_output: str = "attention.o_proj"
    mlp_in: str = "mlp.fc1"
    mlp_out: str = "mlp.fc2"
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    num_neurons: str = "intermediate_size"


FAMILIES: dict[str, Family] = {
    "vit": Family(build=_vit),
    "deit": Family(build=_deit, feature_shape=partial(_image_features, num_prefix_tokens=2)),  # [CLS], distillation
    "dinov2": Family(build=_dinov2, layers="encoder.layer"),
}


def family_of(name: str) -> Family:
    """The family's entry.

    Raises:
        ValueError: not supported; names those that are.
    """
    if name not in FAMILIES:
        raise ValueError(f"model.family must be one of {', '.join(FAMILIES)}, got {name!r}")
    return FAMILIES[name]
