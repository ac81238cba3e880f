"""The table of base architectures that image prompts can be added to."""

from imprompt.adapter.backbones.base import Backbone
from imprompt.adapter.backbones.flux import FLUX
from imprompt.adapter.backbones.sd3 import SD3
from imprompt.adapter.backbones.unet import UNET

BACKBONES: tuple[Backbone, ...] = (UNET, FLUX, SD3)
