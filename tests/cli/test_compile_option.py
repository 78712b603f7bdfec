"""--compile of serve, batch and bench, and compile= of Predictor, with a compiler that is none."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from fixtures.batch_runs import read_rows
from fixtures.command_line import Run, save_tiny_classifier
from fixtures.exported import tiny_predictor, write_pt2
from fixtures.fast_models import BASE
from vitlib import ImageProcessor, Predictor, ViT, optimize
from vitlib.batch.manifest import Settings, describe_operations
from vitlib.batch.options import make_worker_factory
from vitlib.errors import ConfigError
from vitlib.fast import FastViT
from vitlib.fast.compiled import CompiledViT
from vitlib.predict.optimized_model import count_programs
from vitlib.serve.core import Core, _sizes_to_compile
from vitlib.system.parallel import ParallelCompute

pytestmark = pytest.mark.usefixtures("fake_compiler")


def make_predictor(changes: dict[str, Any] | None = None, **more: Any) -> Predictor:
    torch.manual_seed(0)
    model = ViT(replace(BASE, **changes or {}))
    torch.nn.init.normal_(model.head.weight)
    return Predictor(model, ImageProcessor(size=(32, 32)), **more)


def make_photos(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(count)]


def programs_of(predictor: Predictor) -> dict[Any, Any]:
    fast = predictor.fast()
    assert isinstance(fast, CompiledViT)
    return fast.programs.functions


@pytest.fixture
def predictors(monkeypatch: pytest.MonkeyPatch) -> list[Predictor]:
    """The predictors that a verb makes."""
    made: list[Predictor] = []
    real = Predictor.__init__

    def note(self: Predictor, *arguments: Any, **more: Any) -> None:
        real(self, *arguments, **more)
        made.append(self)

    monkeypatch.setattr(Predictor, "__init__", note)
    return made


def test_predictor_compiles_and_gives_the_same_labels() -> None:
    photos = make_photos(3)
    expected = make_predictor().probabilities(photos)
    predictor = make_predictor(compile=True)
    assert np.allclose(predictor.probabilities(photos), expected, atol=1e-6)
    assert [key[2][0] for key in programs_of(predictor)] == [2, 1]
    vectors = predictor.embed(photos)
    assert np.allclose(vectors, make_predictor().embed(photos), atol=1e-5)
    assert {key[1] for key in programs_of(predictor)} == {"embed"}  # for labels too
    assert not isinstance(make_predictor().fast(), CompiledViT)


def test_second_head_has_a_program_of_its_own() -> None:
    """A distillation head reads another token than the embedding."""
    photos, changes = make_photos(1), {"dist_token": True, "dist_head": True}
    expected = make_predictor(changes).probabilities(photos)
    predictor = make_predictor(changes, compile=True)
    assert np.allclose(predictor.probabilities(photos), expected, atol=1e-6)
    assert {key[1] for key in programs_of(predictor)} == {"forward"}


def test_predictor_compiles_what_is_optimized_already(tmp_path: Path) -> None:
    predictor = make_predictor()
    fast = optimize(predictor.model)  # type: ignore[arg-type]
    assert isinstance(Predictor(fast, predictor.image_processor, compile=True).model, CompiledViT)
    compiled = optimize(predictor.model, compile=True)  # type: ignore[arg-type]
    assert Predictor(compiled, predictor.image_processor, compile=True).model is compiled
    fast.save(tmp_path, image_processor=predictor.image_processor)
    assert isinstance(Predictor.load(tmp_path, compile=True).fast(), CompiledViT)
    assert not isinstance(Predictor.load(tmp_path).fast(), CompiledViT)


def test_auto_compiles_the_precision_that_it_chooses() -> None:
    predictor = make_predictor(compile=True, precision="auto", calibrate=make_photos(4))
    assert programs_of(predictor) == {}  # none for the photos that choose
    assert "auto chose" in predictor.precision_note


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_gpu_compiles_while_it_optimizes(
    monkeypatch: pytest.MonkeyPatch, precision: Literal["fp32", "auto"]
) -> None:
    calls: list[dict[str, Any]] = []
    fast = optimize(make_predictor().model)  # type: ignore[arg-type]
    monkeypatch.setattr(FastViT, "device", property(lambda _: torch.device("cuda", 0)))
    monkeypatch.setattr(
        "vitlib.fast.auto_precision.choose_precision", lambda *_: (fast, "auto chose fp32")
    )

    def note(*_: object, **more: Any) -> FastViT:
        calls.append(more)
        return fast

    monkeypatch.setattr("vitlib.predict.optimized_model.optimize", note)
    predictor = make_predictor(compile=True, precision=precision)
    assert predictor.fast() is fast
    assert [call["compile"] for call in calls] == [True]
    with pytest.raises(ConfigError, match="this model was optimized on a GPU: leave it out"):
        Predictor(fast, predictor.image_processor, compile=True)


def test_change_of_compile_makes_another_copy() -> None:
    predictor = make_predictor()
    predictor.fast()
    predictor.compile = True
    assert programs_of(predictor) == {}


def test_exported_file_is_refused(run_cli: Run, tmp_path: Path) -> None:
    write_pt2(tmp_path / "model.pt2", tiny_predictor())
    with pytest.raises(ConfigError, match=r"model\.pt2 is an exported file"):
        Predictor.load(tmp_path / "model.pt2", compile=True)
    for verb in (
        ("serve", tmp_path / "model.pt2"),
        ("batch", tmp_path, "-m", tmp_path / "model.pt2", "-o", tmp_path / "out"),
        ("bench", tmp_path / "model.pt2"),
    ):
        status, out, err = run_cli(*verb, "--compile")
        assert (status, out) == (2, "")
        assert "is an exported file, which its own runtime computes" in err


def test_shapes_of_their_own_and_workers_are_refused(run_cli: Run) -> None:
    status, _, err = run_cli("serve", "demo", "--compile", "--image-size", "keep")
    assert status == 2
    assert "--compile is for one size of photos" in err
    status, _, err = run_cli("serve", "demo", "--compile", "--workers", 2, "--device", "cpu")
    assert status == 2
    assert "--compile is for one process" in err


@pytest.mark.parametrize("max_batch", [1, 2, 3, 5, 8, 13, 16, 64])
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_warm_up_sizes_run_every_program(max_batch: int, threads: int) -> None:
    """Compare with the programs of every batch that can come."""

    def programs(sizes: Any) -> set[tuple[int, int]]:
        found: set[tuple[int, int]] = set()
        for size in sizes:
            shared = threads == 1 or size < 2 * threads
            parts = [size] if shared else {len(p) for p in torch.empty(size).tensor_split(threads)}
            for part in parts:
                bits = {1 << bit for bit in range(part.bit_length()) if part >> bit & 1}
                found |= {(bit, threads if shared else 1) for bit in bits}
        return found

    sizes = _sizes_to_compile(max_batch, threads)
    assert programs(sizes) == programs(range(1, max_batch + 1))
    assert max(sizes) == max_batch


@pytest.mark.usefixtures("two_threads")
def test_server_compiles_before_it_is_ready(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "vitlib")
    core = Core(make_predictor(compile=True), max_pixels=10**6)
    core.warm_up(6)
    programs = programs_of(core.predictor)
    shapes = {(key[2][0], key[3]) for key in programs}
    assert shapes == {(1, 2), (2, 2), (1, 1), (2, 1)}
    assert "4 of 4 programs are used" in caplog.text
    # No later request waits for the compiler, whatever it brings.
    image = core.blank_image()
    for size in range(1, 7):
        core.answer("classify", [image] * size)
    assert count_programs(core.engine.model) == (4, 4)
    core.answer("classify", [image.float()])
    assert count_programs(core.engine.model) == (4, 4)


def test_warm_up_without_compiling_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(make_predictor(), max_pixels=10**6)
    monkeypatch.setattr(Core, "answer", lambda *_: pytest.fail("computed"))
    core.warm_up(4)


def test_serve_verb_says_that_it_compiles(
    run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, predictors: list[Predictor]
) -> None:
    pytest.importorskip("uvicorn", reason="serving needs pip install 'vitlib[serve]'")
    model = save_tiny_classifier(tmp_path / "model")
    monkeypatch.setattr("vitlib.serve.run._serve_here", lambda *_: None)
    for option in ((), ("--compile",)):
        status, _, err = run_cli(
            "serve", model, "--port", 0, "--device", "cpu", "--max-batch", 2, *option
        )
        assert status == 0, err
        assert ("compiling the model for every size of batch" in err) == bool(option)
    before, after = predictors
    assert not isinstance(before.fast(), CompiledViT)
    assert {key[2][0] for key in programs_of(after)} == {1, 2}


def test_batch_verb(run_cli: Run, tmp_path: Path, predictors: list[Predictor], photo: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(5):
        (folder / f"{index}.jpg").write_bytes(photo.read_bytes())
    model = save_tiny_classifier(tmp_path / "model")
    rows = []
    for option in ((), ("--compile",)):
        out = tmp_path / f"out{len(option)}"
        status, _, err = run_cli(
            "batch", folder, "-m", model, "-o", out, "--device", "cpu", "--batch-size", 4, *option
        )
        assert status == 0, err
        assert ("compiling the model at the first batch" in err) == bool(option)
        rows.append(read_rows(out))
    assert [row["labels"] for row in rows[0]] == [row["labels"] for row in rows[1]]
    assert {(key[2][0], key[3]) for key in programs_of(predictors[-1])} == {(4, 1), (1, 1)}
    settings = json.loads((out / "manifest.json").read_text())["settings"]
    assert settings["operations"]["compiler"] == "inductor"
    assert "compiler" not in describe_operations(predictors[0])


def test_batch_processes_compile(tmp_path: Path) -> None:
    predictor = make_predictor(compile=True)
    settings = Settings(
        (), None, None, "", "", "classify", 1, "jsonl", "fp32", None, 4, 8, 1, {}, (), 0
    )
    factory = make_worker_factory(predictor, settings, tmp_path)
    assert isinstance(factory(0).engine.model, CompiledViT)
    predictor.compile = False
    factory = make_worker_factory(predictor, settings, tmp_path)
    assert not isinstance(factory(0).engine.model, CompiledViT)


@pytest.mark.usefixtures("two_threads")
def test_parts_of_a_batch_share_a_program() -> None:
    """Both threads need the same program at once: one compiles it, the other waits for it."""
    predictor = make_predictor(compile=True)
    engine = predictor.engine()
    together = threading.Barrier(2)

    def scores(part: torch.Tensor) -> torch.Tensor:
        together.wait(timeout=10)
        return engine.scores(part)

    batch = torch.stack([engine.preprocess(photo) for photo in make_photos(8)])
    with ParallelCompute(2) as parallel:
        rows = parallel.run(scores, batch)
    assert torch.allclose(rows, make_predictor().engine().scores(batch), atol=1e-6)
    assert {(key[2][0], key[3]) for key in programs_of(predictor)} == {(4, 1)}
