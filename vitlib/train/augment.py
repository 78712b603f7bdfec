"""What training changes in a photo: crop, flip, colours, RandAugment, erasing.

A photo of 8-bit levels goes in and levels of the size that the model takes come out, by Pillow; a
rectangle is erased after normalisation. MixUp and CutMix, which need two photos, are in mix.py;
their numbers are here too, as one value says all that is done to a photo.

Every number is drawn from the generator that is given and from nothing else, so that what becomes
of a sample depends on (seed, epoch, sample) alone: see rng_for.

Shapes: H W height and width of the photo, h w of what comes out, C channels. Levels are 0..255.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageFilter

from vitlib.config import is_number
from vitlib.errors import ConfigError, ImageError
from vitlib.train.augment_ops import crop_box, even_in_log, luma, planes_of, rand_augment, turn_hue

_PROBABILITIES = (
    "horizontal_flip",
    "vertical_flip",
    "color_jitter_prob",
    "grayscale_prob",
    "blur_prob",
    "random_erasing",
    "mix_prob",
    "mix_switch_prob",
)
_STREAM = 0  # sets these numbers apart from all others drawn from the same seed: see mix.py
_ATTEMPTS = 10  # at a rectangle that fits, before nothing is erased


def option(default: Any, about: str) -> Any:
    """A field with what it means, for the command line too."""
    return field(default=default, metadata={"help": about})


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What training changes in a photo, in the order of its fields; 0 leaves a change out.

    The crop is that of Szegedy 1409.4842 (section 6); RandAugment is Cubuk 1909.13719, random
    erasing Zhong 1708.04896, MixUp Zhang 1710.09412, CutMix Yun 1905.04899.

    Raises ConfigError for a number that cannot be.
    """

    crop_scale: tuple[float, float] | None = option(
        (0.35, 1.0), "Shares of the photo's area that a random crop has; null: no crop."
    )
    crop_ratio: tuple[float, float] = option((3 / 4, 4 / 3), "Widths over heights that it has.")
    horizontal_flip: float = option(0.5, "Probability that left and right are swapped.")
    vertical_flip: float = option(0.0, "Probability that top and bottom are swapped.")
    brightness: float = option(0.0, "Colour jitter: multiplied by 1 - x to 1 + x.")
    contrast: float = option(0.0, "The same of contrast.")
    saturation: float = option(0.0, "The same of saturation.")
    hue: float = option(0.0, "Turned by up to this share of the colour circle, 0 to 0.5.")
    color_jitter_prob: float = option(1.0, "Probability that these four are done.")
    rand_augment_ops: int = option(0, "RandAugment: so many operations of its list of 14.")
    rand_augment_magnitude: float = option(9.0, "How strong each is, 0 to 10.")
    grayscale_prob: float = option(0.0, "Probability that a photo loses its colours.")
    blur_prob: float = option(0.0, "Probability of a Gaussian blur of 0.1 to 2 pixels.")
    random_erasing: float = option(0.0, "Probability that a rectangle is erased.")
    erasing_scale: tuple[float, float] = option((0.02, 1 / 3), "Shares of the area that it has.")
    erasing_ratio: tuple[float, float] = option((0.3, 10 / 3), "Heights over widths that it has.")
    erasing_fill: Literal["mean", "noise"] = option(
        "mean", "Filled with the mean colour, or with noise around it."
    )
    mixup_alpha: float = option(0.0, "MixUp: shares are drawn from Beta(alpha, alpha).")
    cutmix_alpha: float = option(0.0, "CutMix: the same.")
    mix_prob: float = option(1.0, "Probability that a photo is mixed, where one of both is on.")
    mix_switch_prob: float = option(0.5, "Probability that it is by CutMix, where both are on.")

    def __post_init__(self) -> None:
        if self.crop_scale is not None:
            self._check_range("crop_scale", 1.0)
        self._check_range("crop_ratio")
        self._check_range("erasing_scale", 1.0)
        self._check_range("erasing_ratio")
        for name in _PROBABILITIES:
            self._check_number(name, 1.0)
        for name in ("brightness", "contrast", "saturation", "mixup_alpha", "cutmix_alpha"):
            self._check_number(name, 1e3)
        self._check_number("hue", 0.5)
        self._check_number("rand_augment_magnitude", 10.0)
        if type(self.rand_augment_ops) is not int or not 0 <= self.rand_augment_ops <= 14:
            raise ConfigError(
                f"rand_augment_ops={self.rand_augment_ops!r}: expected a whole number in 0..14"
            )
        if self.erasing_fill not in ("mean", "noise"):
            raise ConfigError(f"erasing_fill={self.erasing_fill!r}: expected 'mean' or 'noise'")

    def _check_number(self, name: str, most: float) -> None:
        value = getattr(self, name)
        if not is_number(value) or not 0 <= value <= most:
            raise ConfigError(f"{name}={value!r}: expected a number in 0..{most:g}")

    def _check_range(self, name: str, most: float = 1e3) -> None:
        value = getattr(self, name)
        if (
            not isinstance(value, list | tuple)
            or len(value) != 2
            or not all(map(is_number, value))
            or not 0 < value[0] <= value[1] <= most
        ):
            raise ConfigError(
                f"{name}={value!r}: expected two numbers, the smaller first, above 0 and at most "
                f"{most:g}"
            )
        object.__setattr__(self, name, (float(value[0]), float(value[1])))  # YAML gives a list

    @classmethod
    def none(cls) -> Augment:
        """Nothing: the pixels of evaluation."""
        return cls(crop_scale=None, horizontal_flip=0.0)

    @classmethod
    def light(cls) -> Augment:
        """For fine-tuning on few photos: a wide crop, a flip, a little colour jitter."""
        return cls(brightness=0.2, contrast=0.2, saturation=0.2)

    @classmethod
    def strong(cls) -> Augment:
        """For long runs and training from scratch: DeiT's recipe, Touvron 2012.12877 table 9."""
        return cls(
            crop_scale=(0.08, 1.0),
            rand_augment_ops=2,
            rand_augment_magnitude=9.0,
            random_erasing=0.25,
            erasing_fill="noise",
            mixup_alpha=0.8,
            cutmix_alpha=1.0,
        )

    @classmethod
    def card(cls) -> Augment:
        """The original model card's: a crop of 8 % or more, a flip, colour jitter of half."""
        return cls(
            crop_scale=(0.08, 1.0),
            brightness=0.4,
            contrast=0.4,
            saturation=0.4,
            hue=0.4,
            color_jitter_prob=0.5,
        )

    @classmethod
    def named(cls, name: str) -> Augment:
        """One of the above by its name. Raises ConfigError for another name."""
        presets = {"none": cls.none, "light": cls.light, "strong": cls.strong, "card": cls.card}
        if name not in presets:
            raise ConfigError(f"augment={name!r}: expected one of {', '.join(presets)}")
        return presets[name]()

    @property
    def changes_levels(self) -> bool:
        """Whether apply() does anything; erasing and mixing come after it."""
        jitter = self.color_jitter_prob > 0 and max(
            self.brightness, self.contrast, self.saturation, self.hue
        )
        others = (self.horizontal_flip, self.vertical_flip, self.grayscale_prob, self.blur_prob)
        return self.crop_scale is not None or bool(jitter or max(others) or self.rand_augment_ops)

    @property
    def mixes(self) -> bool:
        """Whether pairs of photos are mixed."""
        return self.mix_prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def apply(
        self,
        levels: npt.NDArray[Any],
        size: tuple[int, int],
        rng: np.random.Generator,
        *,
        resample: int = 2,
        fill: tuple[int, ...] | None = None,
    ) -> npt.NDArray[Any]:
        """A photo as training sees it this once: (H, W, C) -> (h, w, C), size (h, w), uint8 or, of
        a photo deeper than 8 bits, float32.

        Of one channel only brightness and contrast are jittered; of other than one or three no
        colour is touched. `resample` is Pillow's code of the filter, `fill` the level a channel
        that comes in where the photo is turned or moved away: mid-gray unless given.

        Raises ImageError for an array that is no such photo, and for a deep one under RandAugment,
        blur or hue, which are made for 8 bits.
        """
        self._check_levels(levels)
        if self.crop_scale is not None:
            height, width = levels.shape[:2]
            box = crop_box(height, width, self.crop_scale, self.crop_ratio, rng)
            levels = levels[box[0] : box[2], box[1] : box[3]]
        planes = planes_of(levels)
        if planes[0].size != (size[1], size[0]):
            how = Image.Resampling(resample)
            planes = [plane.resize((size[1], size[0]), how) for plane in planes]
        if rng.random() < self.horizontal_flip:
            planes = [plane.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for plane in planes]
        if rng.random() < self.vertical_flip:
            planes = [plane.transpose(Image.Transpose.FLIP_TOP_BOTTOM) for plane in planes]
        if levels.dtype != np.uint8:
            return self._deep_jittered(np.stack([np.asarray(p) for p in planes], axis=2), rng)
        if len(planes) == 1:
            planes = [self._jittered(planes[0], rng)]
        for _ in range(self.rand_augment_ops):
            planes = rand_augment(planes, self.rand_augment_magnitude / 10, fill, rng)
        if planes[0].mode == "RGB" and rng.random() < self.grayscale_prob:
            planes = [planes[0].convert("L").convert("RGB")]
        if rng.random() < self.blur_prob:
            blur = ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0))
            planes = [plane.filter(blur) for plane in planes]
        if len(planes) == 1:
            return np.atleast_3d(np.asarray(planes[0]))
        return np.stack([np.asarray(plane) for plane in planes], axis=2)

    def _check_levels(self, levels: npt.NDArray[Any]) -> None:
        if levels.dtype not in (np.uint8, np.float32) or levels.ndim != 3 or 0 in levels.shape:
            raise ImageError(
                f"an array of shape {levels.shape} and {levels.dtype}: expected (height, width, "
                "channels) of uint8 or float32"
            )
        names = ("rand_augment_ops", "blur_prob", "hue")
        shallow = [name for name in names if getattr(self, name)]
        if shallow and levels.dtype != np.uint8:
            raise ImageError(
                f"a photo deeper than 8 bits, and {shallow[0]}={getattr(self, shallow[0])} is for "
                f"8 bits: set {', '.join(f'{name}=0' for name in shallow)}"
            )

    def _deep_jittered(
        self, levels: npt.NDArray[np.float32], rng: np.random.Generator
    ) -> npt.NDArray[np.float32]:
        """(H, W, C) float32 with other colours: Pillow's arithmetic, not rounded."""
        strengths = (self.brightness, self.contrast, self.saturation)
        colours = {1: 2, 3: 3}.get(levels.shape[2], 0)  # of how many of them it has
        if colours and any(strengths) and rng.random() < self.color_jitter_prob:
            for which in rng.permutation(colours):
                strength = strengths[which]
                factor = np.float32(rng.uniform(max(0.0, 1 - strength), 1 + strength))
                gray = luma(levels)
                towards = (np.float32(0), gray.mean(dtype=np.float32), gray)[which]
                levels = (towards + (levels - towards) * factor).astype(np.float32)
        if levels.shape[2] == 3 and rng.random() < self.grayscale_prob:
            levels = np.repeat(luma(levels), 3, axis=2)
        return levels

    def _jittered(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """One RGB or L image, its colours changed or not."""
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        if rng.random() >= self.color_jitter_prob or not any(strengths):
            return image
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for which in rng.permutation(4 if image.mode == "RGB" else 2):
            strength = strengths[which]
            if not strength:
                continue
            if which == 3:
                image = turn_hue(image, rng.uniform(-strength, strength))
            else:
                factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
                image = enhance[which](image).enhance(factor)
        return image

    def erase(self, pixels: npt.NDArray[np.float32], rng: np.random.Generator) -> None:
        """Erases a rectangle of normalised pixels (C, h, w), in place (1708.04896, algorithm 1)."""
        if rng.random() >= self.random_erasing:
            return
        height, width = pixels.shape[1:]
        for _ in range(_ATTEMPTS):
            area = height * width * rng.uniform(*self.erasing_scale)
            ratio = even_in_log(self.erasing_ratio, rng)
            down, across = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if not (0 < down < height and 0 < across < width):
                continue
            top = int(rng.integers(height - down + 1))
            left = int(rng.integers(width - across + 1))
            inside = pixels[:, top : top + down, left : left + across]
            inside[:] = 0.0  # the mean colour, once it has been subtracted
            if self.erasing_fill == "noise":
                inside[:] = rng.standard_normal(inside.shape, dtype=np.float32)
            return


def rng_for(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """What a sample's augmentation draws from in an epoch: the same in any batch or process.

    All three are whole numbers of at least 0.
    """
    sequence = np.random.SeedSequence((seed, epoch, sample), spawn_key=(_STREAM,))
    return np.random.Generator(np.random.PCG64(sequence))
