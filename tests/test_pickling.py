"""Objects that are copied, pickled or sent to another process give equal results, to the bit."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import joblib
import numpy as np
import pytest
import torch
from PIL import Image

import vitlib
from fixtures.families import pixels, tiny
from vitlib import ImageProcessor, Prediction, Predictor
from vitlib.errors import ConfigError
from vitlib.fast import cpu, onednn_ops
from vitlib.fast.cpu import Machine, kernel_plan
from vitlib.fast.linears import FastLinear, PackedLinear

RULE = ImageProcessor(size=(32, 32), image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
LEVELS = np.random.default_rng(0).integers(0, 256, (12, 40, 50, 3), np.uint8)
PHOTOS = [Image.fromarray(levels) for levels in LEVELS]
INT8 = pytest.mark.skipif(kernel_plan("int8") is None, reason="this CPU has no VNNI")


def through_torch(sent: Any) -> Any:
    file = io.BytesIO()
    torch.save(sent, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_joblib(sent: Any) -> Any:
    file = io.BytesIO()
    joblib.dump(sent, file)
    file.seek(0)
    return joblib.load(file)


def pickle_copy(sent: Any, protocol: int) -> Any:
    return pickle.loads(pickle.dumps(sent, protocol))


def cloudpickle_copy(sent: Any) -> Any:
    return pickle.loads(cloudpickle.dumps(sent))


METHODS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {number}": partial(pickle_copy, protocol=number)
        for number in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
    "torch": through_torch,
    "joblib": through_joblib,
}


def model(family: str = "vit") -> vitlib.ViT:
    made = tiny(family, depth=2)  # int8 leaves the first block out
    made.image_processor = RULE
    return made


def answer(sent: Any) -> Any:
    """Return the results of an object for the same images."""
    if isinstance(sent, Predictor):
        return sent.probabilities(PHOTOS[:3])
    if isinstance(sent, torch.nn.Module):
        with torch.no_grad():
            return sent(pixels(3)).numpy()
    return sent(PHOTOS[:3]).numpy() if isinstance(sent, ImageProcessor) else sent


OBJECTS: dict[str, Callable[[], Any]] = {
    "config": lambda: model().config,
    "image processor": lambda: RULE,
    "prediction": lambda: Prediction("tabby", 0.5, 3),
    "model": model,
    "fp32": lambda: vitlib.optimize(model("dinov3")),
    "fp32, off the grid": lambda: vitlib.optimize(tiny("beit", image_size=(48, 48))),
    "bf16": lambda: vitlib.optimize(model("siglip_map"), "bf16"),
    "int8": lambda: vitlib.optimize(model("dinov2_swiglu"), "int8"),
    "int8, calibrated": lambda: vitlib.optimize(model("vit"), "int8", calibrate=pixels(8)),
    "predictor": lambda: Predictor(model(), RULE),
    "predictor in bf16": lambda: Predictor(model(), RULE, precision="bf16"),
    "predictor by photos": lambda: Predictor(model(), RULE, precision="auto", calibrate=PHOTOS),
    "predictor of optimized": lambda: Predictor(vitlib.optimize(model()), RULE),
}


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=INT8 if n.startswith("int8") else ()) for n in OBJECTS]
)
def test_unpickled_object_gives_equal_results(name: str, used: bool) -> None:
    exact = answer(OBJECTS[name]())
    sent = OBJECTS[name]()
    if used:
        answer(sent)
    for how, send in METHODS.items():
        assert np.array_equal(answer(send(sent)), exact), how
    assert np.array_equal(answer(sent), exact)


@pytest.mark.parametrize("name", ["predictor", "fp32", "image processor"])
def test_cloudpickle_takes_a_used_object(name: str) -> None:
    sent = OBJECTS[name]()
    exact = answer(sent)
    assert np.array_equal(answer(cloudpickle_copy(sent)), exact)


class Storages(pickle.Pickler):
    """Notes the memory of every tensor that is pickled."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), 5)
        self.starts: list[int] = []
        self.tensors: list[torch.Tensor] = []  # which stay alive, so that no memory comes twice

    def reducer_override(self, sent: Any) -> Any:
        if type(sent) is torch.Tensor and sent.numel():  # a Parameter's is one, too
            self.starts.append(sent.untyped_storage().data_ptr())
            self.tensors.append(sent)
        return NotImplemented


@pytest.mark.parametrize(
    "precision", ["fp32", "bf16", pytest.param("int8", marks=INT8), pytest.param("", marks=INT8)]
)
@pytest.mark.parametrize("family", ["vit", "dinov2_swiglu", "beit", "siglip_map"])
def test_pickled_tensors_share_no_memory(family: str, precision: str) -> None:
    """Which multiprocessing refuses as arguments of a spawned process."""
    calibrate = None if precision else pixels(8)
    fast = vitlib.optimize(model(family), precision or "int8", calibrate=calibrate)
    answer(fast)
    storages = Storages()
    storages.dump(fast)
    assert len(storages.starts) == len(set(storages.starts)) > 10


def answers_elsewhere(queue: Any, sent: list[Any]) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    queue.put([answer(item) for item in sent])


def test_spawned_process_gives_equal_results(tmp_path: Path) -> None:
    """Also of a model whose weights are a mapped file."""
    vitlib.save(model(), tmp_path, image_processor=RULE)
    opened = Predictor.load(tmp_path)
    used = OBJECTS["predictor"]()
    sent = [opened, used, OBJECTS["fp32"](), model(), RULE, model().config]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        exact = [answer(item) for item in sent[1:]]
    finally:
        torch.set_num_threads(before)
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    process = context.Process(target=answers_elsewhere, args=(queue, sent))
    process.start()
    result = queue.get(timeout=120)
    process.join(60)
    assert process.exitcode == 0
    assert all(np.array_equal(a, b) for a, b in zip(result[1:], exact, strict=True))
    assert np.array_equal(result[0], answer(opened))


def test_pickle_of_a_mapped_model_is_its_size(tmp_path: Path) -> None:
    vitlib.save(tiny("vit", embed_dim=128, depth=3), tmp_path, image_processor=RULE)
    predictor = Predictor.load(tmp_path)
    predictor.probabilities(PHOTOS[:2])
    size = (tmp_path / "model.safetensors").stat().st_size
    for sent in (predictor, predictor.model, predictor.fast()):
        assert size * 0.9 < len(pickle.dumps(sent)) < size * 1.4 + 50_000, type(sent)


def test_optimized_copy_is_made_again_after_it_was_sent() -> None:
    sent = pickle_copy(OBJECTS["predictor by photos"](), 5)
    before = sent.probabilities(PHOTOS[:2])
    again = pickle_copy(sent, 5)
    assert again._optimized_cache.entry is not None  # made with images, so it is sent
    with torch.no_grad():
        again.model.head.weight.mul_(-1)
    assert not np.array_equal(again.probabilities(PHOTOS[:2]), before)
    assert np.array_equal(sent.probabilities(PHOTOS[:2]), before)


def test_optimized_copy_follows_the_preprocessing() -> None:
    predictor = OBJECTS["predictor"]()
    predictor.probabilities(PHOTOS[:2])
    predictor.image_processor = ImageProcessor(size=(32, 32))
    exact = Predictor(model(), predictor.image_processor).probabilities(PHOTOS[:2])
    assert np.array_equal(predictor.probabilities(PHOTOS[:2]), exact)


def test_packed_model_runs_without_the_packed_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = vitlib.optimize(model())
    sent, exact = pickle.dumps(fast), answer(fast)
    monkeypatch.setattr(onednn_ops, "has_packed_linear", lambda _: False)
    opened = pickle.loads(sent)
    kinds = {type(m) for m in opened.modules() if isinstance(m, FastLinear)}
    assert kinds == {FastLinear}
    assert PackedLinear not in kinds
    assert np.abs(answer(opened) - exact).max() <= 5e-6 * np.abs(exact).max()


@INT8
@pytest.mark.parametrize("calibrate", [None, pixels(8)])
def test_int8_is_refused_by_a_cpu_without_it(
    monkeypatch: pytest.MonkeyPatch, calibrate: torch.Tensor | None
) -> None:
    sent = pickle.dumps(vitlib.optimize(model(), "int8", calibrate=calibrate))
    old = Machine("x86_64", "intel", "old", avx512=True)
    monkeypatch.setattr(cpu, "this_machine", lambda: old)
    with pytest.raises(ConfigError, match=r"int8 needs a CPU with AVX-512 VNNI.*fp32 or bf16"):
        pickle.loads(sent)
