"""An exported ONNX model as a torch module, for code that has torch anyway."""

from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from fleetfit.runs.onnx_model import OnnxModel


class OnnxModule(nn.Module):
    """inputs -> logits, computed by ONNX Runtime on one CPU thread; there are no gradients.

    Args:
        path: The ONNX file.

    Raises:
        ImportError: ONNX Runtime is not installed.
        ValueError: the file is corrupt, or not from fleetfit; names it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.model = OnnxModel(path)

    def forward(self, inputs: Shaped[Tensor, "sample *shape"]) -> Float[Tensor, "sample class"]:
        """Logits, on the CPU."""
        return torch.from_numpy(self.model.logits(inputs.detach().cpu().numpy()))
