"""Bodies of hand-made headers to compare with (Bakhtiarnia et al. 2021; DPT readouts): features in, one vector out.

Every body lays tokens on their grid by a transpose and attends over tokens, not over the batch. A classifier follows
each (models/header.py). Masked tokens (text padding) are zeroed before tokens mix, and left out of means.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, scaled_dot_product_attention

from fleetfit.models.features import Features, FeatureShape, tokens_to_grid
from fleetfit.models.pruning import MLP, ConvOp


def grid_tokens(
    features: Features, shape: FeatureShape
) -> tuple[Float[Tensor, "batch token channel"], Bool[Tensor, "batch token"] | None]:
    """The output's tokens without their prefix, and their mask."""
    prefix = shape.num_prefix_tokens
    return features.output[:, prefix:], None if features.mask is None else features.mask[:, prefix:]


def zero_masked(
    tokens: Float[Tensor, "batch token channel"], mask: Bool[Tensor, "batch token"] | None
) -> Float[Tensor, "batch token channel"]:
    """Tokens that are not there become zero."""
    return tokens if mask is None else tokens * mask.unsqueeze(-1).to(tokens.dtype)


def masked_mean(
    tokens: Float[Tensor, "batch token channel"], mask: Bool[Tensor, "batch token"] | None
) -> Float[Tensor, "batch channel"]:
    """Mean over the tokens that are there."""
    if mask is None:
        return tokens.mean(1)
    return zero_masked(tokens, mask).sum(1) / mask.sum(1, keepdim=True).clamp_min(1).to(tokens.dtype)


def class_token(features: Features, shape: FeatureShape) -> Float[Tensor, "batch channel"]:
    """[CLS] of the output; the mean token where a backbone has none."""
    if shape.num_prefix_tokens:
        return features.output[:, 0]
    return masked_mean(features.output, features.mask)


def mask_on_grid(features: Features, shape: FeatureShape) -> Float[Tensor, "batch 1 row column"] | None:
    """1 where the grid has a token, 0 where it is padding."""
    if features.mask is None:
        return None
    return tokens_to_grid(features.mask.unsqueeze(-1).to(features.output.dtype), shape)


def pool(
    grid: Float[Tensor, "batch channel row column"],
    mask: Float[Tensor, "batch 1 row1 column1"] | None,
    cells: tuple[int, int],
) -> Float[Tensor, "batch channel row2 column2"]:
    """Average to ``cells``; with a mask, over the tokens that are there (a cell without any is zero)."""
    if mask is None:
        return adaptive_avg_pool2d(grid, cells)
    here = adaptive_avg_pool2d(mask, (grid.shape[-2], grid.shape[-1]))
    return adaptive_avg_pool2d(grid * here, cells) / adaptive_avg_pool2d(here, cells).clamp_min(1e-6)


class ClassTokenBody(nn.Module):
    """[CLS] as it is: the classifier alone is the header (kinds "linear" and "mlp")."""

    def __init__(self, shape: FeatureShape) -> None:
        super().__init__()
        self.shape = shape
        self.num_features = shape.channels

    def forward(self, features: Features) -> Float[Tensor, "batch feature"]:
        """Read [CLS]."""
        return class_token(features, self.shape)


class ConvBody(nn.Module):
    """Two 3x3 convolutions on the grid of tokens, then pooling; [CLS] is left out.

    Subclasses differ in how [CLS] is read into the tokens (DPT: ignore, add, project).
    """

    def __init__(self, shape: FeatureShape, channels: int, pooling: int) -> None:
        super().__init__()
        self.shape = shape
        self.cells = (min(pooling, shape.grid[0]), min(pooling, shape.grid[1]))
        self.num_features = channels * self.cells[0] * self.cells[1]
        self.project = nn.Conv2d(shape.channels, channels, 1)
        self.convolutions = nn.ModuleList(ConvOp(channels, 3, shape.grid[0] == 1) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(1, channels) for _ in range(2))

    def readout(self, features: Features) -> Float[Tensor, "batch token channel"]:
        """All tokens, with [CLS] read into them or not."""
        return features.output

    def forward(self, features: Features) -> Float[Tensor, "batch feature"]:
        """Convolve on the grid, with a residual around each convolution, and pool."""
        mask = mask_on_grid(features, self.shape)
        grid = self.project(tokens_to_grid(self.readout(features), self.shape))
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            grid = grid if mask is None else grid * mask
            grid = norm(grid + convolution(grid))
        return pool(grid, mask, self.cells).flatten(1)


class ConvAddBody(ConvBody):
    """DPT "add": [CLS] is added to every token."""

    def readout(self, features: Features) -> Float[Tensor, "batch token channel"]:
        """Token + [CLS]."""
        return features.output + class_token(features, self.shape).unsqueeze(1)


class ConvProjectBody(ConvBody):
    """DPT "project": [CLS] is concatenated to every token, and both are projected back to the token's size."""

    def __init__(self, shape: FeatureShape, channels: int, pooling: int) -> None:
        super().__init__(shape, channels, pooling)
        self.read = nn.Linear(2 * shape.channels, shape.channels)

    def readout(self, features: Features) -> Float[Tensor, "batch token channel"]:
        """GELU(linear([token, CLS]))."""
        cls = class_token(features, self.shape).unsqueeze(1).expand_as(features.output)
        return nn.functional.gelu(self.read(torch.cat([features.output, cls], -1)))


class TransformerBody(nn.Module):
    """One pre-norm Transformer encoder layer over all tokens, then [CLS]."""

    def __init__(self, shape: FeatureShape, channels: int) -> None:
        super().__init__()
        size = 2 * channels
        self.shape = shape
        self.num_features = size
        self.num_attention_heads = 4 if size % 4 == 0 else 1
        self.project = nn.Linear(shape.channels, size)
        self.attention_norm = nn.LayerNorm(size)
        self.query_key_value = nn.Linear(size, 3 * size)
        self.attention_output = nn.Linear(size, size)
        self.mlp_norm = nn.LayerNorm(size)
        self.mlp = MLP(size, 2 * size, size)
        self.norm = nn.LayerNorm(size)

    def forward(self, features: Features) -> Float[Tensor, "batch feature"]:
        """Attend over the tokens that are there, and read [CLS]."""
        x = self.project(features.output)
        batch, tokens, size = x.shape
        heads = self.num_attention_heads
        qkv = self.query_key_value(self.attention_norm(x)).reshape(batch, tokens, 3, heads, size // heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mask = None if features.mask is None else features.mask[:, None, None, :]
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.attention_output(attended.transpose(1, 2).reshape(batch, tokens, size))
        x = self.norm(x + self.mlp(self.mlp_norm(x)))
        return x[:, 0] if self.shape.num_prefix_tokens else masked_mean(x, features.mask)


class MixerBody(nn.Module):
    """One MLP-mixer block over the grid's tokens: token mixing, channel mixing, mean pooling."""

    def __init__(self, shape: FeatureShape, channels: int) -> None:
        super().__init__()
        size, tokens = 2 * channels, shape.grid[0] * shape.grid[1]
        self.shape = shape
        self.num_features = size
        self.project = nn.Linear(shape.channels, size)
        self.token_norm = nn.LayerNorm(size)
        self.token_mlp = MLP(tokens, 2 * tokens, tokens)
        self.channel_norm = nn.LayerNorm(size)
        self.channel_mlp = MLP(size, 2 * size, size)
        self.norm = nn.LayerNorm(size)

    def forward(self, features: Features) -> Float[Tensor, "batch feature"]:
        """Mix tokens, mix channels, average."""
        tokens, mask = grid_tokens(features, self.shape)
        x = self.project(tokens)
        mixed = self.token_mlp(zero_masked(self.token_norm(x), mask).transpose(1, 2))
        x = x + mixed.transpose(1, 2)
        x = x + self.channel_mlp(self.channel_norm(x))
        return masked_mean(self.norm(x), mask)


class ResMLPBody(nn.Module):
    """One ResMLP block: linear token mixing, channel MLP, affine instead of LayerNorm, LayerScale, mean pooling."""

    def __init__(self, shape: FeatureShape, channels: int) -> None:
        super().__init__()
        size, tokens = 2 * channels, shape.grid[0] * shape.grid[1]
        self.shape = shape
        self.num_features = size
        self.project = nn.Linear(shape.channels, size)
        self.token_scale, self.token_shift = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.token_mixing = nn.Linear(tokens, tokens)
        self.token_layer_scale = nn.Parameter(torch.full((size,), 0.1))
        self.channel_scale, self.channel_shift = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.channel_mlp = MLP(size, 4 * size, size)
        self.channel_layer_scale = nn.Parameter(torch.full((size,), 0.1))
        self.norm = nn.LayerNorm(size)

    def forward(self, features: Features) -> Float[Tensor, "batch feature"]:
        """Mix tokens, mix channels, average."""
        tokens, mask = grid_tokens(features, self.shape)
        x = self.project(tokens)
        mixed = self.token_mixing(zero_masked(x * self.token_scale + self.token_shift, mask).transpose(1, 2))
        x = x + self.token_layer_scale * mixed.transpose(1, 2)
        x = x + self.channel_layer_scale * self.channel_mlp(x * self.channel_scale + self.channel_shift)
        return masked_mean(self.norm(x), mask)
