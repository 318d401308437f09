"""Where attention heads, MLP neurons and layers live in each Hugging Face family. Adding a family is one entry here."""

import difflib
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import nn

from fleetfit.core.records import MAX_LAYERS, JsonDict
from fleetfit.models.features import FeatureShape

# Sizes that Transformers does not check: some below 1 build a model that fails, or fails to run, in obscure ways.
LARGEST_SIZE = 2**24  # of any of them but layers; a vocabulary is the largest that there is
SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "mlp_ratio", "head_dim"),
    *("image_size", "patch_size", "num_channels"),
    *("dim", "n_layers", "n_heads", "hidden_dim", "vocab_size", "max_position_embeddings", "type_vocab_size"),
)
# No field of their classes: the size of a head, of all families; the neurons of dinov2, see ``_dinov2``; a note.
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
        most = MAX_LAYERS if key in ("num_hidden_layers", "n_layers") else LARGEST_SIZE
        if key in config and config[key] > most:
            raise ValueError(f"model.config.{key} must be <= {most}, got {config[key]!r}")
    try:
        checked = config_class(**config)
    except Exception as error:  # Transformers raises classes of its own
        raise ValueError(f"model.config is not a valid {config_class.__name__}: {error}") from error
    if "image_size" in known and checked.image_size < checked.patch_size:
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


def _text_model(name: str, model_class: Any, config: JsonDict, **options: bool) -> Any:
    """An encoder of tokens whose attention may have any number of heads of any size (``head_dim``).

    The classes of Transformers know heads only that fill the embedding; fewer are put into a model of one head.
    Without a word on dropout there is none: it is a setting of a training, and draws from PyTorch's global generator.
    """
    family = FAMILIES[name]
    config = dict.fromkeys(family.dropouts, 0.0) | config
    checked = _checked(model_class.config_class, config)
    family.check_text(checked)
    heads, head_dim = getattr(checked, family.num_heads), config.get("head_dim")
    if head_dim is None or heads * head_dim == checked.hidden_size:
        return _model(model_class, config, **options)
    model = _model(model_class, config | {family.num_heads: 1}, **options)
    setattr(model.config, family.num_heads, heads)
    outer, inner = checked.hidden_size, heads * head_dim
    sizes = dict.fromkeys(family.query_key_value, (outer, inner)) | {family.attention_output: (inner, outer)}
    for layer in model.get_submodule(family.layers):
        attention = layer.get_submodule(family.query_key_value[0].rpartition(".")[0])
        attention.attention_head_size, attention.scaling = head_dim, head_dim**-0.5
        for key, value in (("num_attention_heads", heads), ("n_heads", heads), ("all_head_size", inner)):
            if hasattr(attention, key):
                setattr(attention, key, value)
        for path, size in sizes.items():
            linear = nn.Linear(*size)
            nn.init.normal_(linear.weight, std=checked.initializer_range)
            nn.init.zeros_(linear.bias)
            layer.set_submodule(path, linear)
    return model


def _bert(config: JsonDict) -> nn.Module:
    from transformers import BertModel

    return _text_model("bert", BertModel, config, add_pooling_layer=False)  # type: ignore[no-any-return]


def _distilbert(config: JsonDict) -> nn.Module:
    from transformers import DistilBertModel

    return _text_model("distilbert", DistilBertModel, config)  # type: ignore[no-any-return]


def _roberta(config: JsonDict) -> nn.Module:
    from transformers import RobertaModel

    return _text_model("roberta", RobertaModel, config, add_pooling_layer=False)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Family:
    """Names of modules and configuration keys of one family.

    Attributes:
        build: Configuration -> a base model without a task head.
        kind: What an input is: an image, or the numbers of a text's tokens, padded on the right.
        num_prefix_tokens: Tokens before the grid; the first is [CLS].
        layers: Path of the list of layers; the other module paths are inside a layer.
        query_key_value: Projections whose rows are heads.
        attention_output: Projection whose columns are heads; its input is O_h of Eq. 8.
        mlp_in: Linear layer whose rows are neurons.
        mlp_out: Linear layer whose columns are neurons; its input is the hidden activation.
        num_layers, num_heads, num_neurons: Configuration keys.
        token_embedding, position_embedding: Of a text model: paths of its tables.
        positions_after_padding: The first token's row of the position table is the one after number ``pad_token_id``.
        dropouts: Of a text model: configuration keys.
    """

    build: Callable[[JsonDict], nn.Module]
    kind: Literal["image", "text"] = "image"
    num_prefix_tokens: int = 1
    layers: str = "layers"
    query_key_value: tuple[str, ...] = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    attention_output: str = "attention.o_proj"
    mlp_in: str = "mlp.fc1"
    mlp_out: str = "mlp.fc2"
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    num_neurons: str = "intermediate_size"
    token_embedding: str = "embeddings.word_embeddings"
    position_embedding: str = "embeddings.position_embeddings"
    positions_after_padding: bool = False
    dropouts: tuple[str, ...] = ()

    def feature_shape(self, config: Any) -> FeatureShape:
        """The shape of the tokens, of a configuration object."""
        if self.kind == "text":
            return FeatureShape(config.hidden_size, (1, self.num_tokens(config) - 1), self.num_prefix_tokens)
        side = config.image_size // config.patch_size
        return FeatureShape(config.hidden_size, (side, side), self.num_prefix_tokens)

    def input_shape(self, config: Any) -> tuple[int, ...]:
        """The shape of one input: channels, rows and columns of an image, or the number of tokens of a text."""
        if self.kind == "text":
            return (self.num_tokens(config),)
        return (config.num_channels, config.image_size, config.image_size)

    def first_position(self, config: Any) -> int:
        """The row of the position table that a text's first token has."""
        return int(config.pad_token_id) + 1 if self.positions_after_padding else 0

    def num_tokens(self, config: Any) -> int:
        """How long texts can be, [CLS] included: as long as there are positions."""
        return int(config.max_position_embeddings) - self.first_position(config)

    def check_text(self, config: Any) -> None:
        """What Transformers does not check of a text model.

        Raises:
            ValueError: no number of the padding token, no position for a second token, or a decoder.
        """
        pad = config.pad_token_id
        if type(pad) is not int or not 0 <= pad < config.vocab_size:
            raise ValueError(
                f"model.config.pad_token_id must be in 0..vocab_size - 1 = {config.vocab_size - 1}, got {pad}"
            )
        least = self.first_position(config) + 2
        if config.max_position_embeddings < least:
            raise ValueError(
                f"model.config.max_position_embeddings must be >= {least}, for [CLS] and a token, "
                f"got {config.max_position_embeddings}"
            )
        for key in ("is_decoder", "add_cross_attention"):
            if getattr(config, key, False):
                raise ValueError(f"model.config.{key} must be false: only encoders are supported")


_BERT = Family(
    build=_bert,
    kind="text",
    layers="encoder.layer",
    query_key_value=("attention.self.query", "attention.self.key", "attention.self.value"),
    attention_output="attention.output.dense",
    mlp_in="intermediate.dense",
    mlp_out="output.dense",
    dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
)
FAMILIES: dict[str, Family] = {
    "vit": Family(build=_vit),
    "deit": Family(build=_deit, num_prefix_tokens=2),  # [CLS], distillation
    "dinov2": Family(build=_dinov2, layers="encoder.layer"),
    "bert": _BERT,
    "roberta": replace(_BERT, build=_roberta, positions_after_padding=True),
    "distilbert": Family(
        build=_distilbert,
        kind="text",
        layers="transformer.layer",
        query_key_value=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        attention_output="attention.out_lin",
        mlp_in="ffn.lin1",
        mlp_out="ffn.lin2",
        num_layers="n_layers",
        num_heads="n_heads",
        num_neurons="hidden_dim",
        dropouts=("dropout", "attention_dropout"),
    ),
}


def family_of(name: str) -> Family:
    """The family's entry.

    Raises:
        ValueError: not supported; names those that are.
    """
    if name not in FAMILIES:
        raise ValueError(f"model.family must be one of {', '.join(FAMILIES)}, got {name!r}")
    return FAMILIES[name]


def feature_shape_of(name: str, config: JsonDict) -> FeatureShape:
    """The shape of the tokens that a backbone of this configuration yields; no model is built.

    Raises:
        ValueError: not one of the family.
    """
    return _feature_shape_of(name, json.dumps(config, sort_keys=True))


@functools.lru_cache(maxsize=16)
def _feature_shape_of(name: str, config: str) -> FeatureShape:
    from transformers import CONFIG_MAPPING

    return family_of(name).feature_shape(_checked(CONFIG_MAPPING[name], json.loads(config)))


def text_config(
    name: str,
    config: JsonDict,
    *,
    num_tokens: int | None = None,
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
) -> JsonDict:
    """A text model's configuration for texts of so many tokens and a vocabulary of so many; None: as it is.

    The other special tokens are not named in it: a model does not need their numbers.

    Raises:
        ValueError: the family's models do not read text.
    """
    from transformers import CONFIG_MAPPING

    family = family_of(name)
    if family.kind != "text":
        raise ValueError(f"model.family = {name!r} reads images, which have no tokens of a vocabulary")
    old = CONFIG_MAPPING[name](**config)
    pad = old.pad_token_id if pad_token_id is None else pad_token_id
    first = pad + 1 if family.positions_after_padding else 0
    return {
        **config,
        "vocab_size": vocab_size or old.vocab_size,
        "max_position_embeddings": first + (num_tokens or family.num_tokens(old)),
        "pad_token_id": pad,
        "bos_token_id": None,
        "eos_token_id": None,
    }
