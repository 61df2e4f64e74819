"""The rows of the table of families, a module for each group of relatives. The first row that matches is the family."""

from __future__ import annotations

from . import encoders, flux, image, lumina, mmdit, other, qwen, unet, video, wan
from .row import Architecture

ROWS: tuple[Architecture, ...] = (
    *(lumina.ZIMAGE_PIXEL, lumina.ZIMAGE, lumina.LUMINA2),
    wan.WAN,
    *(flux.FLUX, flux.FLUX2, flux.CHROMA_RADIANCE, flux.CHROMA, flux.HUNYUAN_VIDEO, flux.HUNYUAN3D),
    *(unet.SDXL, unet.SD15),
    *(qwen.QWEN_IMAGE, qwen.MAGE_FLOW),
    *(mmdit.SD3, mmdit.AURAFLOW),
    *(video.LTXAV, video.LTXV, video.COSMOS, video.ANIMA, video.COSMOS_PREDICT2),
    *(video.KANDINSKY5, video.MOCHI, video.SEEDVR2),
    *(image.HIDREAM, image.HIDREAM_O1, image.BOOGU, image.OMNIGEN2, image.PIXART),
    *(image.KREA2, image.IDEOGRAM4, image.ERNIE_IMAGE),
    *(other.ACE, other.ACE15, other.HUNYUAN3D21),
)

# Files of their own beside the diffusion model, known by their keys as stored.
PARTS: tuple[Architecture, ...] = encoders.ROWS
