"""The geometry of images: what Transformers' image processors make of real pictures, to one grey level."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import AutoImageProcessor, ViTConfig, ViTModel

from fleetfit.config.sections import ModelConfig
from fleetfit.data.image_forms import image_form, image_processor
from fleetfit.data.pixels import decode
from fleetfit.data.preprocessing import Preprocessing
from fleetfit.data.sample_files import read_samples

PHOTOS = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # two photographs of 427 x 640
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PROCESSORS: dict[str, dict[str, Any]] = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "resample": 2},
    "vit of old": {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 3},
    "deit": {
        "image_processor_type": "DeiTImageProcessor",
        "size": {"height": 40, "width": 40},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
        "image_mean": MEAN,
        "image_std": STD,
    },
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 37},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
        "image_mean": MEAN,
        "image_std": STD,
    },
    "not normalised": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "resample": 1,
        "do_normalize": False,
    },
    "to -1..1 by rescaling": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "resample": 2,
        "rescale_factor": 1 / 127.5,
        "image_mean": [1.0, 1.0, 1.0],
        "image_std": [1.0, 1.0, 1.0],
    },
    "not rescaled": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "resample": 2,
        "do_rescale": False,
        "image_mean": [120.0, 110.0, 100.0],
        "image_std": [60.0, 58.0, 57.0],
    },
}


def folder_of(folder: Path, processor: dict[str, Any] | None, side: int = 32) -> ModelConfig:
    """A pre-trained model of this side, with an image processor."""
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=side, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return ModelConfig(pretrained=str(folder))


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_become_what_transformers_makes_of_them(name: str, tmp_path: Path) -> None:
    form = image_form(folder_of(tmp_path, PROCESSORS[name]))
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for photo in (*PHOTOS, PHOTOS[0].rotate(90, expand=True), PHOTOS[1].resize((50, 33)), PHOTOS[0].resize((20, 45))):
        expected = theirs(photo, return_tensors="np")["pixel_values"]
        pixels = decode(photo, form).pixels
        found = form.apply(pixels[None])
        assert found.shape == expected.shape == (1, 3, 32, 32)
        one_level = 1 / 255 / min(form.std)
        photo.save(tmp_path / "x.png")
        assert np.abs(form.apply(read_samples(tmp_path / "x.png", form)[0]) - found).max() <= 1e-5, (
            "predict sees another"
        )
        assert np.abs(found - expected).max() <= one_level * 1.01
        assert np.abs(found - expected).mean() <= one_level / 50
        assert torch.allclose(form.to_inputs(torch.tensor(pixels[None])), torch.from_numpy(found), atol=1e-6)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_form_is_written_as_the_processor_that_it_was_read_from(name: str, tmp_path: Path) -> None:
    model = folder_of(tmp_path, PROCESSORS[name])
    form = image_form(model)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image_processor(form)))
    again = image_form(model)
    assert again == form
    assert again.words == form.words


def test_the_model_says_the_size_and_the_processor_is_scaled_to_it(tmp_path: Path) -> None:
    """DINOv2 is stored for 518 pixels, its processor makes 224 of 256."""
    form = image_form(folder_of(tmp_path, PROCESSORS["dinov2"], side=64))
    assert (form.size, form.resize) == ((64, 64), 74)
    assert decode(PHOTOS[0], form).pixels.shape == (3, 64, 64)
    form = image_form(folder_of(tmp_path, PROCESSORS["deit"], side=16))
    assert (form.size, form.resize) == ((16, 16), (20, 20))
    assert form.words.endswith("; images are resized (bicubic, to 20 x 20) and their middle is cut out")


def test_without_a_processor_pixels_become_minus_one_to_one(tmp_path: Path) -> None:
    expected = Preprocessing(
        size=(32, 32), channels=3, maximum=255, mean=(0.5,) * 3, std=(0.5,) * 3, resample="bilinear"
    )
    assert image_form(folder_of(tmp_path, None)) == expected
    config = {"image_size": 32, "num_channels": 3}
    assert image_form(ModelConfig.model_validate({"config": config})) == expected
    assert image_form(ModelConfig.model_validate({"config": {"image_size": 16}})).shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "preprocessor_config.json cannot be read: It looks like the config file"),
        ({**PROCESSORS["vit"], "size": {"longest_edge": 5}}, "size must be height and width, or shortest_edge, got"),
        ({**PROCESSORS["dinov2"], "do_center_crop": False}, "only the shorter side has a size, and nothing is cut out"),
        ({**PROCESSORS["deit"], "size": {"height": 20, "width": 20}}, r"resize must be at least the size \[32, 32\]"),
        ({**PROCESSORS["vit"], "image_mean": [0.5, 0.5]}, "mean must have one number for each of 3 channels, got 2"),
    ],
)
def test_a_processor_that_cannot_be_followed(content: Any, says: str, tmp_path: Path) -> None:
    model = folder_of(tmp_path, None)
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"model\.pretrained = .*{says}"):
        image_form(model)
