"""load: find the tensors, map their names, check everything, and assign them to a model.

How data flows: source gives names and memory-mapped tensors; a layout says which of them is which
of the model's and what the model is; the model is built on the meta device and takes the tensors as
they lie in the file, so nothing is copied or drawn.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vitlib.checkpoint.adapt import BandMap, adapt_processor, rechannel, resize, unread_norm, widen
from vitlib.checkpoint.families import get_family, with_profile
from vitlib.checkpoint.layouts import detect, heads, networks, torchvision
from vitlib.checkpoint.layouts.facts import PREPROCESSING_REMEDY, Facts, remedy
from vitlib.checkpoint.layouts.hf_names import list_parts
from vitlib.checkpoint.layouts.infer import auxiliary_fields
from vitlib.checkpoint.layouts.layout import Layout, ParsedConfig, read_sidecar
from vitlib.checkpoint.layouts.problems import is_finite, list_problems
from vitlib.checkpoint.layouts.table import NameMatch, read_state
from vitlib.config import ViTConfig, to_pair
from vitlib.errors import CheckpointError, ConfigError, VitlibError, first_line
from vitlib.image import configs
from vitlib.image.processor import ImageProcessor
from vitlib.source.locate import Source
from vitlib.system.torch_state import isolate_torch_settings, outside_inference_mode
from vitlib.vit import ViT

logger = logging.getLogger("vitlib")
NOTHING_STATED = Facts()


@dataclass(frozen=True)
class Checkpoint:
    """What a source holds, read and mapped; `problems` is empty where it can be a model."""

    model: ViT  # on the meta device: the shapes, without memory
    layout: Layout
    state: dict[str, Tensor]  # by our names; memory-mapped
    files: tuple[str, ...]
    ignored: tuple[str, ...]  # tensors that no forward reads, and what lay beside
    assumed: tuple[str, ...]  # fields of the config that nothing in the checkpoint says
    doubtful: tuple[str, ...]  # those of them that can be wrong
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()  # what is there and not used, a line each
    architecture: str | None = None  # which the caller or the file's name states
    prefix: str = ""  # what all names of the network have before them
    by_names: dict[str, Tensor] | None = None  # the file's tensors, where names alone said layout
    square: bool = False  # the grid is taken to be square, as nothing says its size

    @property
    def also_fits(self) -> tuple[str, ...]:
        """Other layouts whose names these are too."""
        return detect.list_matching_layouts(self.by_names, self.layout) if self.by_names else ()


@isolate_torch_settings()
@outside_inference_mode()
def load(
    source: str | os.PathLike[str],
    *,
    config: ViTConfig | None = None,
    layout: str | None = None,
    profile: str | None = None,
    prefix: str | None = None,
    architecture: str | None = None,
    num_heads: int | None = None,
    activation: str | None = None,
    pool: str | None = None,
    revision: str | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    band_map: BandMap | None = None,
    image_processor: ImageProcessor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> ViT:
    """A checkpoint as a ViT in eval mode, its tensors memory-mapped wherever the file allows.

    source: a hub id, a folder or one weights file, in any layout of docs/checkpoints.md.
    config: instead of what the checkpoint says and what is assumed where it says nothing.
    layout: the one the file is in, where its names fit two: hf, timm, meta, torchvision, openclip,
        jax.
    profile: run the tensors as that library does: hf, timm, original, jax, torchvision (norm eps,
        GELU, position resize, preprocessing). None: as the file's own.
    prefix: of the names of the network to take, where the file holds several: "model_ema.", ….
    architecture, num_heads, activation, pool: what the model is where no file says it: its name in
        timm or open_clip, or the single fact as ViTConfig has it. One that contradicts a config is
        an error.
    num_classes: other than the checkpoint's: a new, untrained head; 0: no head.
    image_size: pixels, one side or (height, width): the positions are resampled to it, once, by the
        checkpoint's rule.
    in_channels: other than the checkpoint's: to 1 the patch kernel's channels are summed; to N they
        are repeated and scaled by old / N, or taken as `band_map` says: for each new channel the
        old one whose kernel it gets, or None for zeros.
    image_processor: the preprocessing, where another than the checkpoint's or none is in its files.
    dtype: None keeps the file's; tensors of several become the widest of them, told in the log.
    device: None is the CPU.
    revision, token, cache_dir, local_files_only: as in huggingface_hub.

    Raises SourceError where there is nothing to read, CheckpointError for a tensor that is missing,
    unknown, of the wrong shape or not finite and for a config that contradicts the tensors (every
    such problem in one message), ConfigError for numbers that no ViT can have.
    """
    src = Source(
        source,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    found = read_checkpoint(
        src,
        config,
        layout=layout,
        profile=profile,
        prefix=prefix,
        facts=Facts(
            architecture=architecture, num_heads=num_heads, activation=activation, pool=pool
        ),
        head_wanted=num_classes is None,
    )
    return build_model(
        src,
        found,
        profile=profile,
        num_classes=num_classes,
        image_size=image_size,
        in_channels=in_channels,
        band_map=band_map,
        given=image_processor,
        dtype=dtype,
        device=device,
    )


@isolate_torch_settings()
@outside_inference_mode()
def build_model(
    src: Source,
    found: Checkpoint,
    *,
    profile: str | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    band_map: BandMap | None = None,
    given: ImageProcessor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> ViT:
    """What read() found as a model: arguments and errors as load()'s; given: image_processor."""
    if found.problems:
        raise CheckpointError(f"{src.name!r}: {'; '.join(found.problems)}")
    narrow = next((t.dtype for t in found.state.values() if t.dtype.itemsize == 1), None)
    if narrow is not None and dtype is None:
        raise CheckpointError(f"{src.name!r}: torch computes nothing in {narrow}: give dtype=")
    said: list[str] = []
    state, cfg = dict(found.state), found.model.config
    if dtype is None:
        widen(state, said)
    left = [*src.ignored]
    if found.layout.name == "hf":
        left += list_parts(name for name in found.ignored if name not in src.ignored)
    if left:
        said += [f"read from under prefix={found.prefix!r}"] if found.prefix else []
        said.append(f"not loaded: {', '.join(left)}")
    said += found.notes
    if found.doubtful:
        values = ", ".join(f"{name}={getattr(cfg, name)!r}" for name in found.doubtful)
        said.append(
            f"assumed, for no file says it: {values}: where another is right, give "
            f"{remedy(found.doubtful)}"
        )
    if image_size is not None:
        pair = to_pair("image_size", image_size)
        cfg = resize(state, cfg, pair, said, guessed=found.square)
    if band_map is not None and in_channels is None:
        in_channels = len(band_map)
    if in_channels is not None:
        cfg = rechannel(state, cfg, in_channels, band_map, said)
    old = found.model.config
    model = found.model if cfg == old else _empty(cfg)
    _assign(model, state, found.layout, num_classes, said)
    model.loaded_labels = model.config.labels
    model.image_processor = given or _image_processor(src, found, profile, cfg, band_map, said)
    if said:
        logger.warning("%s: %s", src.name, "; ".join(said))
    model.eval()
    if device is None and dtype is None:
        return model
    try:
        return model.to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch's, for what it has not got
        reason = first_line(error)
        what = f"device={device}, dtype={dtype} cannot be had: {reason}"
        raise ConfigError(f"{what}: leave device= (--device) out for the CPU") from error


def read_checkpoint(
    src: Source,
    config: ViTConfig | None = None,
    *,
    layout: str | None = None,
    profile: str | None = None,
    prefix: str | None = None,
    facts: Facts = NOTHING_STATED,
    head_wanted: bool = True,
) -> Checkpoint:
    """Find and check all that a source holds, without building a model of it.

    Raises SourceError or CheckpointError where it cannot even be mapped; what is wrong with single
    tensors is listed in `problems`.
    """
    everything = src.tensors(prefix)
    try:
        tensors, start = networks.extract_network(src, everything, layout, prefix)
        chosen = networks.choose_layout(src, tensors, layout, start)
        tensors = chosen.prepare(tensors)
        name_match = chosen.find(tensors)
        notes = heads.attach_head(name_match, tensors)
        size = chosen.read_image_size(src.json) if config is None else config.image_size
        state = chosen.finish(read_state(tensors, name_match), size)
        heads.add_head_bias(state)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if chosen.name == "torchvision" and facts.architecture is None:
            name = torchvision.parse_file_name(src.weights()[0].name, shapes)
            facts = replace(facts, architecture=name)
        if config is not None:
            facts.check(config)
            reading = ParsedConfig(replace(config, **auxiliary_fields(shapes)))
        else:
            reading = _read(src, chosen, shapes, name_match, replace(facts, saved_as=src.arch))
        cfg = reading.config
        if profile is not None and profile != chosen.profile:
            cfg = with_profile(cfg, profile)
    except VitlibError as error:
        raise type(error)(f"{src.name!r}: {error}") from error
    if cfg.final_norm == "none" and "norm.weight" not in state:  # not read, and not in the file
        state |= unread_norm(state, cfg.embed_dim)
    model = _empty(cfg)
    not_finite = (
        [] if src.is_finite() else [n for n, tensor in state.items() if not is_finite(tensor)]
    )
    problems = list_problems(model, state, name_match, chosen, head_wanted, not_finite)
    said = {"position_resize": not cfg.pos_embed}
    said["activation"] = cfg.activation == "swiglu"  # which the shapes say
    assumed = tuple(name for name in reading.assumed if not said.get(name, False))
    return Checkpoint(
        model=model,
        layout=chosen,
        state=state,
        files=tuple(path.name for path in src.weights()),
        ignored=(*name_match.ignored, *src.ignored),
        assumed=assumed,
        doubtful=tuple(name for name in reading.doubtful if name in assumed),
        problems=tuple(problems),
        notes=(*reading.notes, *notes),
        prefix=(prefix or "") + start,
        architecture=facts.architecture,
        by_names=None if layout or src.json("config.json") else tensors,
        square=size is None and cfg.pos_embed,
    )


def _read(
    src: Source,
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    name_match: NameMatch,
    facts: Facts,
) -> ParsedConfig:
    """Read what the model is, with what save() wrote beside it and what the caller states.

    Raises ConfigError where a stated fact contradicts what the files say.
    """
    reading = layout.read(src.json, shapes, name_match, facts)
    extra = read_sidecar(src.json)
    stated = facts.to_fields()
    open_fields = set(reading.assumed) - extra.keys()
    of_files = {name: extra.get(name, getattr(reading.config, name)) for name in stated}
    clashes = [
        f"{name}={value!r}: the files say {of_files[name]!r}"
        for name, value in stated.items()
        if of_files[name] != value and name not in open_fields
    ]
    if clashes:
        raise ConfigError(f"{'; '.join(clashes)}: leave it out, or give config=ViTConfig(...)")
    extra = stated | extra
    config = replace(reading.config, **extra) if extra else reading.config
    if config.family != reading.config.family:
        spoken = reading.config.activation  # of the checkpoint, where its config says it
        config = replace(with_profile(config, layout.profile), activation=spoken)
    assumed = tuple(name for name in reading.assumed if name not in extra)
    doubtful = tuple(name for name in reading.doubtful if name not in extra)
    return ParsedConfig(config, assumed, doubtful, reading.notes)


def _empty(cfg: ViTConfig) -> ViT:
    with torch.device("meta"):
        return ViT(cfg)


def _assign(
    model: ViT,
    state: Mapping[str, Tensor],
    layout: Layout,
    num_classes: int | None,
    said: list[str],
) -> None:
    """Make the tensors the model's parameters; put in a new head where one is asked for."""
    old = model.config.num_classes
    keep_head = num_classes is None or (num_classes == old and (not old or "head.weight" in state))
    modules = dict(model.named_modules())
    for name, tensor in state.items():  # names and shapes were checked: no need to ask again
        owner, _, leaf = name.rpartition(".")
        if keep_head or not name.startswith("head"):
            module, was = modules[owner], getattr(modules[owner], leaf)
            if isinstance(was, nn.Parameter):
                learns = was.requires_grad  # a pooler does not
                module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=learns))
            else:
                module.register_buffer(leaf, tensor)
    if not keep_head and num_classes is not None:
        _new_head(model, layout, num_classes, said)
    model.norm.requires_grad_(model.config.final_norm != "none")  # what no forward reads learns not
    if model.attn_pool is not None:
        model.attn_pool.requires_grad_(model.config.pool == "map")


def _new_head(model: ViT, layout: Layout, num_classes: int, said: list[str]) -> None:
    """A new head, which reads what its family's classifier in transformers reads."""
    hf_type = get_family(model.config.family).hf
    fields = hf_type.head if hf_type is not None and layout.name == "hf" else None
    if fields is not None and num_classes and not model.num_classes:
        if model.config.projection_dim and "projection_dim" in fields:
            model.projection = nn.Identity()
            said.append("the projection is left out: the head reads the tokens")
        model.config = replace(model.config, **fields)
    model.reset_classifier(num_classes)
    if num_classes:
        said.append(f"a new, untrained head of {num_classes} classes")


def _image_processor(
    src: Source,
    found: Checkpoint,
    profile: str | None,
    new: ViTConfig,
    band_map: BandMap | None,
    said: list[str],
) -> ImageProcessor | None:
    """The checkpoint's preprocessing, following what was adapted; None where none is usable."""
    try:
        processor = read_image_processor(src, found, profile)
    except VitlibError as error:  # whoever asks for pixels gets this error; a model needs none
        logger.debug("%s: preprocessing not read: %s", src.name, error)
        return None
    if profile is None and has_assumed_preprocessing(src, found):
        said.append(
            f"preprocessing assumed, for no file says it: {processor.describe()}: "
            f"{PREPROCESSING_REMEDY}"
        )
    return adapt_processor(processor, found.model.config, new, band_map, said)


def has_assumed_preprocessing(src: Source, found: Checkpoint) -> bool:
    """Whether no file says the preprocessing, and it can be another than the profile's."""
    kind = found.layout.profile, found.model.config.family
    # Of torchvision's weights a note of the layout says which there are.
    alike = found.layout.name in ("jax", "torchvision") or kind in configs.UNIFORM_FAMILIES
    return not alike and configs.find_fields(src.json) is None


def read_image_processor(
    src: Source, found: Checkpoint, profile: str | None = None
) -> ImageProcessor:
    """The checkpoint's preprocessing; where no file says it, its layout's; or another profile's."""
    cfg, own = found.model.config, found.layout.profile
    if profile is not None and profile != own:
        return ImageProcessor.from_profile(profile, cfg.family, cfg.image_size)
    if found.layout.name == "hf" or configs.find_fields(src.json) is not None:
        return ImageProcessor.from_source(src)
    # A plain ViT of the original PyTorch code is DINO's or DeiT's; Google's own is in JAX.
    plain = found.layout.name == "meta" and cfg.family == "vit"
    kind = "dino" if plain else cfg.family
    if found.layout.name == "torchvision":
        kind = torchvision.choose_preprocessing(cfg, found.architecture)
    return ImageProcessor.from_profile(own, kind, cfg.image_size)
