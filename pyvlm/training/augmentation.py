"""Random distortions of small grey images, as one resampling; the randomness comes from outside.

Shapes: N images, h × w pixels, P random numbers an image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_SIDE = 8
BEND_SIDE = 3
_AFFINE, _BEND, _GAIN, _NOISE = 6, 2 * BEND_SIDE**2, 1, IMAGE_SIDE**2
NUMBERS_PER_IMAGE = _AFFINE + _BEND + _GAIN + _NOISE

# Standard deviations at strength 1, in radians, in factors, or in half image sides.
ROTATION, SHEAR, SCALE, SHIFT, BEND, GAIN, NOISE = 0.14, 0.12, 0.08, 0.1, 0.06, 0.12, 0.04


def augment(images_Nhw: Tensor, noise_NP: Tensor, strength: float) -> Tensor:
    """Rotates, shears, scales, shifts and bends images, changes their contrast, and adds noise.

    Args:
        images_Nhw: float32 [N, 8, 8] in [0, 1].
        noise_NP: standard normal numbers [N, NUMBERS_PER_IMAGE]; each image depends on its own row only.
        strength: multiplies every deviation; 0 leaves the images as they are, up to rounding.

    Returns:
        float32 [N, 8, 8] in [0, 1].
    """
    n = len(images_Nhw)
    affine, bend, gain, noise = (strength * noise_NP.clamp(-2, 2)).split(
        [_AFFINE, _BEND, _GAIN, _NOISE], dim=1
    )
    angle, shear, scale, stretch = (affine[:, i] for i in range(4))
    cos, sin = torch.cos(ROTATION * angle), torch.sin(ROTATION * angle)
    x_scale = 1 + SCALE * (scale + stretch)
    y_scale = 1 + SCALE * (scale - stretch)
    rows = [
        torch.stack([cos * x_scale, -sin * y_scale + SHEAR * shear, SHIFT * affine[:, 4]], dim=-1),
        torch.stack([sin * x_scale, cos * y_scale, SHIFT * affine[:, 5]], dim=-1),
    ]
    grid_Nhw2 = F.affine_grid(torch.stack(rows, dim=1), [n, 1, IMAGE_SIDE, IMAGE_SIDE], align_corners=False)
    bend_N2hw = F.interpolate(
        BEND * bend.view(n, 2, BEND_SIDE, BEND_SIDE), size=IMAGE_SIDE, mode="bicubic", align_corners=True
    )
    bent_N1hw = F.grid_sample(
        images_Nhw[:, None], grid_Nhw2 + bend_N2hw.permute(0, 2, 3, 1), align_corners=False
    )
    contrast_N11 = 1 + GAIN * gain[:, :, None]
    return (bent_N1hw[:, 0] * contrast_N11 + NOISE * noise.view(n, IMAGE_SIDE, IMAGE_SIDE)).clamp(0, 1)
