"""Steps of a preprocessing and their numbers, read from and written to each library's files.

configs/ knows the forms of the files. processor.py does the steps.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

from vitlib.errors import ConfigError
from vitlib.image import configs
from vitlib.image.depth import Levels, is_8_bit_factor
from vitlib.source.locate import Source

Config = TypeVar("Config", bound="PreprocessConfig")


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Steps of a preprocessing, in the order in which they are done.

    Attributes:
        size: Resize to this (height, width), as `fit` says; None for no such resize.
        shortest_edge: Or resize the shorter side to this, keeping the aspect ratio.
        fit: "squash" resizes to `size` itself. "cover" and "contain" keep the aspect ratio, and the
            result covers `size` or lies within it: timm for oblong models, and crop_mode="border".
        multiple_of: With shortest_edge: round the sides to multiples of these.
        max_patches: Or resize to the most patches of `multiple_of` up to this number, keeping the
            aspect ratio: SigLIP 2 NaFlex.
        resample: Pillow's code of the filter, 0..5.
        float_resize: Rescale first, then resize floats by torch, as DINOv3 does.
        crop_size: Then crop this (height, width) from the centre.
        crop_rounding: Rounding of a centre that is half a pixel off: "floor" as transformers'
            Pillow processors, "even" as torchvision's CenterCrop (timm, open_clip, DINO), "zero" as
            transformers on tensors (DINOv3).
        fill: Value 0..255 of each channel around an image that is smaller than the crop; None: 0.
        rescale_factor: Then multiply by this; None for no rescale.
        image_mean: Then subtract this from each channel; None for no normalisation.
        image_std: And divide each channel by this.
        in_channels: Channels of the model.
        levels: Range of images deeper than 8 bits and of floats: the value of white, if black is 0,
            or (black, white), beyond which values are clipped; None: as the file or dtype says.
    """

    size: tuple[int, int] | None = None
    shortest_edge: int | None = None
    fit: str = "squash"
    multiple_of: tuple[int, int] | None = None
    max_patches: int | None = None
    resample: int = 2
    float_resize: bool = False
    crop_size: tuple[int, int] | None = None
    crop_rounding: str = "floor"
    fill: tuple[int, ...] | None = None
    rescale_factor: float | None = 1 / 255
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    in_channels: int = 3
    levels: Levels = None

    def __post_init__(self) -> None:
        for name, value in configs.check_fields(self._fields()).items():
            object.__setattr__(self, name, value)

    @property
    def raw_values(self) -> bool:
        """True if deeper images and floats keep the values that they have in the file.

        That holds for a rescale factor that is not for 8-bit values, for none, and for other than 1
        or 3 channels.
        """
        return self.levels is None and (
            self.in_channels not in (1, 3) or not is_8_bit_factor(self.rescale_factor)
        )

    @classmethod
    def load(
        cls: type[Config],
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Config:
        """Load the preprocessing of a checkpoint of any library.

        It is in preprocessor_config.json, processor_config.json, timm's config.json or
        open_clip_config.json; the first file that has one is read.

        Args:
            source: A hub id, a folder, or a weights file with these files beside it.
            revision: Branch, tag or commit on the hub; None for the default branch.
            token: Access token of the hub; None for the stored one.
            cache_dir: Folder of downloads; None for huggingface_hub's.
            local_files_only: True never connects to the hub.

        Returns:
            The preprocessing.

        Raises:
            SourceError: There is no such checkpoint.
            ConfigError: It has no preprocessing, or steps that vitlib does not do.
        """
        return cls.from_source(
            Source(
                source,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )

    @classmethod
    def from_source(cls: type[Config], source: Source) -> Config:
        """Load the preprocessing of a checkpoint.

        Args:
            source: The checkpoint.

        Returns:
            The preprocessing.

        Raises:
            ConfigError: It has none, or steps that vitlib does not do.
        """
        try:
            values = configs.find_fields(source.json)
            if values is not None:
                return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{source.name!r}: {error}") from error
        raise ConfigError(
            f"no preprocessor_config.json in {source.name!r}, nor preprocessing of timm or "
            "open_clip: put one there, or give image_processor=ImageProcessor(...)"
        )

    @classmethod
    def from_dict(cls: type[Config], rule: Mapping[str, Any], model_type: object = None) -> Config:
        """Parse a Hugging Face preprocessor_config.json of any version.

        Args:
            rule: The content of the file.
            model_type: The model's, which decides where the file names no class.

        Returns:
            The preprocessing.

        Raises:
            ConfigError: It has steps that vitlib does not do, or impossible values.
        """
        return cls(**configs.hf_fields(rule, model_type))

    @classmethod
    def from_timm(cls: type[Config], rule: Mapping[str, Any]) -> Config:
        """Parse timm's `pretrained_cfg`.

        Args:
            rule: The content of `pretrained_cfg`.

        Returns:
            The preprocessing.

        Raises:
            ConfigError: It has steps that vitlib does not do, or impossible values.
        """
        return cls(**configs.timm_fields(rule))

    @classmethod
    def from_openclip(cls: type[Config], config: Mapping[str, Any]) -> Config:
        """Parse an open_clip_config.json.

        Args:
            config: The content of the file.

        Returns:
            The preprocessing.

        Raises:
            ConfigError: It has steps that vitlib does not do, or impossible values.
        """
        return cls(**configs.openclip_fields(config))

    @classmethod
    def from_profile(
        cls: type[Config], profile: str, family: str, image_size: int | tuple[int, int]
    ) -> Config:
        """Return the preprocessing of a library for a family, for checkpoints that state none.

        Args:
            profile: Library: "hf", "timm", "original", "jax" or "torchvision".
            family: model_type of transformers, or "deit3", "dino", "siglip2".
            image_size: Image size of the model, or its (height, width).

        Returns:
            The preprocessing; checkpoint/families/ has that of each family.

        Raises:
            ConfigError: There is no such profile.
        """
        # The family's file is below this one in the order of imports, because it makes its
        # transforms by functions of this package. A name of a family leads to it from here alone.
        from vitlib.checkpoint.families import get_transform

        return cls(**configs.transform_fields(get_transform(profile, family), image_size))

    @property
    def equal_channels(self) -> bool:
        """True if all channels have the same mean and std."""
        return len(set(self.image_mean or ())) < 2 and len(set(self.image_std or ())) < 2

    def with_image_size(
        self: Config,
        image_size: tuple[int, int] | Literal["keep"],
        patch_size: tuple[int, int] | None = None,
    ) -> Config:
        """Return the preprocessing for another image size; a crop keeps its share of the image.

        Args:
            image_size: (height, width) of the pixels. "keep" resizes the whole image in its own
                aspect ratio: its shorter side as before, both sides rounded to whole patches. With
                `max_patches` that number stays.
            patch_size: (height, width) of a patch; needed for "keep".

        Returns:
            The preprocessing with that size.

        Raises:
            ConfigError: "keep" without patch_size.
        """
        return replace(self, **configs.resize_fields(self._fields(), image_size, patch_size))

    def with_squash(self: Config) -> Config:
        """Return the preprocessing that squashes the whole image to its sides, without a crop.

        Returns:
            A copy of this one with `fit="squash"` and no crop.
        """
        return replace(self, **configs.squash_fields(self._fields()))

    def with_channels(
        self: Config, in_channels: int, band_map: Sequence[int | None] | None = None
    ) -> Config:
        """Return the preprocessing for another number of channels.

        Args:
            in_channels: Channels of the new model.
            band_map: Old channel whose mean and std each new channel gets, or None for the average
                of all; without a map the old channels repeat, or are averaged for one channel.

        Returns:
            The preprocessing with that many channels.
        """
        changes = configs.convert_channels(self._fields(), in_channels, band_map)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return a preprocessor_config.json that transformers 4 and 5 read.

        Returns:
            The keys and values of the file.
        """
        return configs.hf_config(self._fields())

    def to_timm(self) -> dict[str, Any]:
        """Return keys of timm's `pretrained_cfg`.

        Returns:
            The keys of preprocessing alone, and their values.
        """
        return configs.timm_config(self._fields())

    def to_openclip(self) -> dict[str, Any]:
        """Return open_clip's `preprocess_cfg`.

        Returns:
            Its keys and values.
        """
        return configs.openclip_config(self._fields())

    def unsupported_fields(self, layout: str) -> list[str]:
        """List the fields that a library's file cannot store.

        Args:
            layout: "hf", "timm" or "openclip".

        Returns:
            A line for each field, with the value that its reader will get instead.

        Raises:
            ConfigError: Another layout.
        """
        return configs.unsupported_fields(self._fields(), layout)

    def _fields(self) -> configs.Fields:
        # Of this class alone: a field of ImageProcessor says how it works, and is in no file.
        return {field.name: getattr(self, field.name) for field in fields(PreprocessConfig)}

    def describe(self) -> str:
        """Return the steps in one line."""
        return configs.describe_fields(self._fields())
