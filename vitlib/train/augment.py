"""Augment: settings of the augmentation of photos in training.

The arithmetic is in augment_photo.py. MixUp and CutMix, which need two photos, are in mix.py; their
settings are here, so that one object describes all augmentation. Nothing here imports NumPy or
Pillow before a photo is augmented, so that `--help` is fast.

Shapes: H W height and width of the photo, h w of the result, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vitlib.errors import ConfigError, is_number
from vitlib.train.settings import option

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

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


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Changes of a photo in training, applied in the order of the fields; 0 disables a change.

    The crop is that of Szegedy 1409.4842 (section 6); RandAugment is Cubuk 1909.13719, random
    erasing Zhong 1708.04896, MixUp Zhang 1710.09412, CutMix Yun 1905.04899.

    Attributes:
        crop_scale, crop_ratio: Ranges of a random crop's area and width over height; None for none.
        horizontal_flip, vertical_flip: Probabilities.
        brightness, contrast, saturation, hue, color_jitter_prob: Colour jitter.
        rand_augment_ops, rand_augment_magnitude: RandAugment.
        grayscale_prob, blur_prob: Probabilities.
        random_erasing, erasing_scale, erasing_ratio, erasing_fill: Random erasing.
        mixup_alpha, cutmix_alpha, mix_prob, mix_switch_prob: MixUp and CutMix.

    Raises:
        ConfigError: A number is out of range.
    """

    crop_scale: tuple[float, float] | None = option(
        (0.35, 1.0), "Area of a random crop, as shares of the photo's; null: no crop."
    )
    crop_ratio: tuple[float, float] = option((3 / 4, 4 / 3), "Width over height of the crop.")
    horizontal_flip: float = option(0.5, "Probability of swapping left and right.")
    vertical_flip: float = option(0.0, "Probability of swapping top and bottom.")
    brightness: float = option(0.0, "Colour jitter: multiply brightness by 1 - x to 1 + x.")
    contrast: float = option(0.0, "Colour jitter: multiply contrast by 1 - x to 1 + x.")
    saturation: float = option(0.0, "Colour jitter: multiply saturation by 1 - x to 1 + x.")
    hue: float = option(0.0, "Colour jitter: shift hue by up to this share of a turn, 0 to 0.5.")
    color_jitter_prob: float = option(1.0, "Probability of colour jitter.")
    rand_augment_ops: int = option(0, "RandAugment: number of operations, of a list of 14.")
    rand_augment_magnitude: float = option(9.0, "RandAugment: strength of each, 0 to 10.")
    grayscale_prob: float = option(0.0, "Probability of removing all colour.")
    blur_prob: float = option(0.0, "Probability of a Gaussian blur of 0.1 to 2 pixels.")
    random_erasing: float = option(0.0, "Probability of erasing a rectangle.")
    erasing_scale: tuple[float, float] = option((0.02, 1 / 3), "Area of the erased rectangle.")
    erasing_ratio: tuple[float, float] = option((0.3, 10 / 3), "Height over width of it.")
    erasing_fill: Literal["mean", "noise"] = option(
        "mean", "Fill it with the mean colour, or with noise around it."
    )
    mixup_alpha: float = option(0.0, "MixUp: weights are drawn from Beta(alpha, alpha).")
    cutmix_alpha: float = option(0.0, "CutMix: areas are drawn from Beta(alpha, alpha).")
    mix_prob: float = option(1.0, "Probability that a photo is mixed, if MixUp or CutMix is on.")
    mix_switch_prob: float = option(0.5, "Probability of CutMix rather than MixUp, if both are on.")

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
        """Return a preset that changes nothing: the pixels of evaluation."""
        return cls(crop_scale=None, horizontal_flip=0.0)

    @classmethod
    def light(cls) -> Augment:
        """Return a preset for few photos: a wide crop, a flip, a little colour jitter."""
        return cls(brightness=0.2, contrast=0.2, saturation=0.2)

    @classmethod
    def strong(cls) -> Augment:
        """Return DeiT's recipe for long runs and training from scratch (2012.12877, table 9)."""
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
        """Return the preset of Azure ML's model card: crop, flip and strong colour jitter."""
        return cls(
            crop_scale=(0.08, 1.0),
            brightness=0.4,
            contrast=0.4,
            saturation=0.4,
            hue=0.4,
            color_jitter_prob=0.5,
        )

    @classmethod
    def from_preset(cls, name: str) -> Augment:
        """Return a preset by its name.

        Args:
            name: "none", "light", "strong" or "card".

        Returns:
            The preset.

        Raises:
            ConfigError: There is no preset of this name.
        """
        presets = {"none": cls.none, "light": cls.light, "strong": cls.strong, "card": cls.card}
        if name not in presets:
            raise ConfigError(f"augment={name!r}: expected one of {', '.join(presets)}")
        return presets[name]()

    @property
    def changes_photo(self) -> bool:
        """True if apply() changes anything; erasing and mixing come after it."""
        jitter = self.color_jitter_prob > 0 and max(
            self.brightness, self.contrast, self.saturation, self.hue
        )
        others = (self.horizontal_flip, self.vertical_flip, self.grayscale_prob, self.blur_prob)
        return self.crop_scale is not None or bool(jitter or max(others) or self.rand_augment_ops)

    @property
    def mixes(self) -> bool:
        """True if pairs of photos are mixed."""
        return self.mix_prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def apply(
        self,
        photo: npt.NDArray[Any],
        size: tuple[int, int],
        rng: np.random.Generator,
        *,
        resample: int = 2,
        fill: tuple[int, ...] | None = None,
    ) -> npt.NDArray[Any]:
        """Augment a photo: (H, W, C) -> (h, w, C) of the same dtype.

        A photo of one channel gets only brightness and contrast jitter. A photo of neither one nor
        three channels keeps its colours.

        Args:
            photo: Pixels (H, W, C), uint8, or float32 for a photo deeper than 8 bits.
            size: (h, w), pixels of the result.
            rng: Source of every draw.
            resample: Pillow's code of the resize filter.
            fill: One value a channel, 0 to 255, for area that a rotation or shift uncovers; None
                for mid-gray.

        Returns:
            The augmented photo (h, w, C).

        Raises:
            ImageError: The array is no photo; or it is deeper than 8 bits under RandAugment, blur
                or hue, which are defined for 8 bits.
        """
        from vitlib.train.augment_photo import augment_photo

        return augment_photo(self, photo, size, rng, resample=resample, fill=fill)

    def erase(self, pixels: npt.NDArray[np.float32], rng: np.random.Generator) -> None:
        """Erase a rectangle of normalised pixels in place (1708.04896, algorithm 1).

        Args:
            pixels: (C, h, w), changed in place with the probability of random_erasing.
            rng: Source of every draw.
        """
        from vitlib.train.augment_photo import erase_rectangle

        erase_rectangle(self, pixels, rng)
