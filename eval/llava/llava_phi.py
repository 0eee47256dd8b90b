"""LLaVA with Phi-2 as its language model, as transformers loads it from an exported folder.

The export copies this file, so it imports nothing of the project. transformers' own classes would
drop the bias of Phi's output layer, load tower and projector in another precision than they were
trained with, and crop some pictures a pixel from where the features' pictures were cropped.

Letters: B images, P patches, D width of the vision tower, H width of the language model;
C channels, I and J height and width of a picture.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration
from transformers.image_utils import ChannelDimension, SizeDict
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector


class Float32Projector(LlavaMultiModalProjector):  # type: ignore[misc]
    """A projector that computes in float32, independent of the vision tower's dtype."""

    def forward(self, image_features: Tensor) -> Tensor:
        """Map [B, P, D] to [B, P, H]."""
        projected: Tensor = super().forward(image_features.to(self.linear_1.weight.dtype))
        return projected


class LlavaPhiForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA with a bias in the output layer, and a projector that stays in float32.

    The vision tower stays in float32 too if the config has `vision_in_float32`.
    """

    def __init__(self, config: LlavaConfig) -> None:
        self._keep_in_fp32_modules_strict = {"multi_modal_projector"}
        if config.vision_in_float32:
            self._keep_in_fp32_modules_strict.add("vision_tower")
        super().__init__(config)
        self.model.multi_modal_projector = Float32Projector(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=True)
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """The language model's dtype."""
        return self.lm_head.weight.dtype


class UprightImageProcessor(CLIPImageProcessorPil):  # type: ignore[misc]
    """CLIP's Pillow image processor with upright pictures."""

    def convert_to_rgb(
        self,
        image: Image.Image | NDArray[np.generic],
        input_data_format: str | ChannelDimension | None = None,
    ) -> NDArray[np.generic]:
        """Rotate a picture by its EXIF orientation, and convert it to RGB."""
        if isinstance(image, Image.Image):
            image = ImageOps.exif_transpose(image)
        converted: NDArray[np.generic] = super().convert_to_rgb(image, input_data_format)
        return converted

    def to_dict(self) -> dict[str, object]:
        """Return the settings; without trust in remote code transformers' own class is loaded."""
        return {**super().to_dict(), "image_processor_type": "CLIPImageProcessor"}


class PatchcacheImageProcessor(UprightImageProcessor):
    """The same with open_clip's crop."""

    def center_crop(
        self, image: NDArray[np.generic], size: SizeDict, **_: object
    ) -> NDArray[np.generic]:
        """Crop the middle of [C, I, J]; half a pixel is rounded to even as in torchvision."""
        top, left = (
            round((side - wanted) / 2)
            for side, wanted in zip(image.shape[1:], (size.height, size.width), strict=True)
        )
        return image[:, top : top + size.height, left : left + size.width]
