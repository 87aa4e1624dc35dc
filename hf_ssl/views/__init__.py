# SPDX-License-Identifier: Apache-2.0
"""Augmentation (layer 0): makes views of images for self-supervised training.

There are three steps. `sample_parameters` samples the augmentation parameters on the host, as a pure function
of one seed per image, so nothing has to be saved or synchronized. `crop` (stage one, optional) crops large
images in a loader worker. `augment` (stage two) does the rest in batches on the device of the pixels. Both
stages are pure functions of the pixels and the parameters. Nothing here depends on methods, files or models.

`ViewPreset` contains the settings. A new augmentation goes into `hf_ssl/views/operations.py`.

The names below are loaded at their first use, because recipes and configs need only `ViewPreset` and must not
wait for torch. No module has the same name as one of these functions, because the imported module would
replace the function.
"""

from typing import TYPE_CHECKING

from hf_ssl.names import lazy_names

if TYPE_CHECKING:
    from hf_ssl.views.color_spaces import (
        COLOR_SPACES,
        ColorSpace,
        ColorViews,
        gradient_magnitude,
        rgb_mean,
        to_color_space,
    )
    from hf_ssl.views.cropping import Crops, crop
    from hf_ssl.views.parameters import ViewParameters, sample_parameters
    from hf_ssl.views.patches import (
        PatchLayout,
        cut_patches,
        enlarged,
        grid_layout,
        jigsaw_layout,
        reduced,
        sample_patches,
    )
    from hf_ssl.views.pipeline import Views, augment, montage
    from hf_ssl.views.preset import ViewOverrides, ViewPreset, ViewSettings

_RENAMED = {
    "FOR_METHODS": "hf_ssl.random.FIRST_METHOD_NUMBER",
    "apply": "hf_ssl.views.augment",
    "draw": "hf_ssl.views.sample_parameters",
    "seeds": "hf_ssl.random.image_seeds",
    "uniforms": "hf_ssl.random.uniforms",
}

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__, renamed=_RENAMED)
