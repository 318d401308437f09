"""The families of models that a job may name: what they read, and the sizes that are taken where a job says none.

How a family is built and cut is in ``models/families.py``; no library is needed to know what there is.
"""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class FamilyFacts:
    """What a job needs to know of a family.

    Attributes:
        kind: What its models read.
        small: Configuration of a small model, which a job's own keys go over.
        profiled: Configuration of what ``fleetfit profile`` measures where no job is given: a small model as its
            authors publish it, but for texts' vocabularies: only looking a row up takes time.
    """

    kind: Literal["image", "text"]
    small: dict[str, Any]
    profiled: dict[str, Any]


SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "initializer_range": 0.1,
}
SMALL_TEXT: dict[str, Any] = {
    "vocab_size": 1000,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
SMALL_BERT: dict[str, Any] = {
    **SMALL_TEXT,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "type_vocab_size": 1,
}
PROFILED: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 224}
FAMILIES: dict[str, FamilyFacts] = {
    "vit": FamilyFacts(
        kind="image",
        small={**SMALL, "intermediate_size": 128},
        profiled={**PROFILED, "intermediate_size": 1536, "patch_size": 16},
    ),
    "deit": FamilyFacts(
        kind="image",
        small={**SMALL, "intermediate_size": 128},
        profiled={**PROFILED, "intermediate_size": 1536, "patch_size": 16},
    ),
    "dinov2": FamilyFacts(
        kind="image",
        small={**SMALL, "mlp_ratio": 2},
        profiled={**PROFILED, "mlp_ratio": 4, "patch_size": 14},
    ),
    "bert": FamilyFacts(
        kind="text",
        small=SMALL_BERT,
        profiled={"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048},
    ),
    "roberta": FamilyFacts(
        kind="text",
        small={**SMALL_BERT, "pad_token_id": 1, "max_position_embeddings": 34},  # rows 0 and 1 are no positions
        profiled={"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 3072},
    ),
    "distilbert": FamilyFacts(
        kind="text",
        small={**SMALL_TEXT, "dim": 64, "n_layers": 4, "n_heads": 4, "hidden_dim": 128},
        profiled={"dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072},
    ),
}


def names_of(kind: str) -> str:
    """The families that read this, for a person."""
    return ", ".join(name for name, facts in FAMILIES.items() if facts.kind == kind)
