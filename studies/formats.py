"""Files in which images are published: for `python -m studies.guessed` files, or relearned."""
import io
from functools import partial

import numpy as np
from PIL import Image


def reread(image, **how):
    """The pixels of a picture after it was written and read; `how` is what Pillow is told."""
    content = io.BytesIO()
    image.save(content, **how)
    again = Image.open(content)
    return np.array(again.convert("RGB"))


def thumbnail(image):
    """Half of the size and back, by Pillow's default for both, which is bicubic."""
    width, height = image.size
    small = image.resize((width // 2, height // 2))
    return np.array(small.resize((width, height)))


# Functions of a Pillow image, for `ablation.by_pillow`
FORMATS = {
    "they are": np.array,
    "JPEG 95, 4:4:4": partial(reread, format="JPEG", quality=95, subsampling="4:4:4"),
    "JPEG 95, 4:2:0": partial(reread, format="JPEG", quality=95, subsampling="4:2:0"),
    "JPEG 75, 4:4:4": partial(reread, format="JPEG", quality=75, subsampling="4:4:4"),
    "JPEG 75, 4:2:0": partial(reread, format="JPEG", quality=75, subsampling="4:2:0"),
    "WebP 80": partial(reread, format="WEBP", quality=80),
    "AVIF 75": partial(reread, format="AVIF", quality=75),  # Pillow's default quality
    "AVIF 50": partial(reread, format="AVIF", quality=50),  # OpenCV's
    "a thumbnail": thumbnail}
