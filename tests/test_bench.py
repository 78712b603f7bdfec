"""Bench: the count of operations, the measured forms, and the printed table; no timed assertion."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fixtures import references
from vitlib import ImageProcessor, ViT, ViTConfig, VitlibError, bench, optimize
from vitlib.bench import AS_LOADED, flops, measure, random_model
from vitlib.bench.model import _in_8_bits
from vitlib.bench.turns import summarise_turns, time_turns
from vitlib.fast import onednn_ops
from vitlib.fast.report import fast_report

Run = Callable[..., tuple[int, str, str]]
TINY = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 4, "depth": 3}
HERE = [item.precision for item in fast_report().precisions if not item.error]


def tiny(**changes: object) -> ViT:
    return ViT(ViTConfig(**{**TINY, "num_classes": 5, **changes})).eval()  # type: ignore[arg-type]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call a turn."""
    monkeypatch.setattr(bench, "measure", partial(measure, turn_seconds=0.0))


# GFLOP an image: the table of reference/performance.md, section 2.
@pytest.mark.parametrize(
    ("size", "image_size", "gflop"),
    [
        ("Ti/16", 224, 2.51),
        ("S/16", 224, 9.20),
        ("B/16", 224, 35.13),
        ("B/16", 384, 111.0),
        ("L/16", 224, 123.1),
        ("H/14", 224, 334.6),
        ("B/14", 518, 303.1),
    ],
)
def test_flops_of_paper_sizes(size: str, image_size: int, gflop: float) -> None:
    cfg = ViTConfig.named(size, image_size=image_size, num_classes=1000)
    assert flops(cfg) / 1e9 == pytest.approx(gflop, rel=0.005)


@pytest.mark.parametrize(
    "changes",
    [
        {"pool": "mean"},
        {"pool": "mean", "activation": "swiglu", "num_registers": 2, "mlp_dim": 40},
        {"pool": "cls+mean", "patch_size": (8, 16)},
        {"pool": "map", "attention_pool": True, "class_token": False},
        {"pool": "mean", "projection_dim": 20, "num_classes": 0},
    ],
)
def test_flops_equal_torch_flop_counter(changes: dict[str, object]) -> None:
    """Take models whose head reads every token, so that the forward skips none."""
    with torch.device("meta"):
        model = tiny(**changes)
    model.requires_grad_(False)  # of whose graph the counter would ask
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.empty(1, 3, 32, 32, device="meta"))
    assert flops(model.config) == counter.get_total_flops()


def test_flops_include_second_head_and_pooler() -> None:
    unmodified = flops(ViTConfig(**TINY, num_classes=5, dist_token=True))  # type: ignore[arg-type]
    both = flops(ViTConfig(**TINY, num_classes=5, dist_token=True, dist_head=True))  # type: ignore[arg-type]
    assert both - unmodified == 2 * 48 * 5
    pooler = ViTConfig(**TINY, pooler_dim=16, pool="pooler")  # type: ignore[arg-type]
    assert flops(pooler) - flops(ViTConfig(**TINY)) == 2 * 48 * 16  # type: ignore[arg-type]


def test_measure_times_every_precision() -> None:
    result = measure(tiny(), "tiny", batch_sizes=(1, 3), rounds=2, turn_seconds=0.0)
    measured = [(t.batch_size, t.precision) for t in result.timings]
    assert measured == [(size, name) for size in (1, 3) for name in [AS_LOADED, *HERE]]
    assert set(result.optimize_seconds) == set(HERE)
    assert set(result.left_out) == {"fp32", "bf16", "fp16", "int8", "fp8"} - set(HERE)
    assert "fp32" in result.gemm
    assert ("int8" in result.gemm) == onednn_ops.has_int8_linear()
    for timing in result.timings:
        assert timing.images_per_second > 0
        assert 0 < timing.p50_ms <= timing.p99_ms
        assert timing.gemm_share is not None
        work = result.gflop * timing.images_per_second
        assert work / timing.gemm_share > 0
        assert timing.precision != AS_LOADED or timing.times_as_loaded == 1
    if "int8" in HERE:
        assert result.in_8_bits is not None
        count, total = result.in_8_bits
        assert 0 <= count <= total == 4 * 3
    assert result.gflop == flops(tiny().config) / 1e9
    assert json.loads(json.dumps(result.as_dict()))["timings"][0]["precision"] == AS_LOADED


def test_measure_times_chosen_precisions() -> None:
    model = tiny()
    result = measure(model, "tiny", precisions=["fp32", "fp32"], rounds=1, turn_seconds=0.0)
    assert [t.precision for t in result.timings] == [AS_LOADED, "fp32"] * 2
    assert result.left_out == {}
    assert result.in_8_bits is None
    with pytest.raises(VitlibError, match="fp8 needs a GPU"):
        measure(model, "tiny", precisions=["fp8"], rounds=1)
    half = measure(
        model.to(torch.bfloat16), "half", precisions=[], batch_sizes=[1], rounds=1, turn_seconds=0.0
    )
    assert half.dtype == "bfloat16"
    assert half.arithmetic == {AS_LOADED: "bf16"}


def test_rounds_alternate_direction() -> None:
    noted: list[str] = []
    calls = {name: partial(noted.append, name) for name in ("a", "b")}
    taken = time_turns(calls, 2, 0.0, torch.device("cpu"), lambda _: None)
    assert noted == ["b", "a", "a", "b", "b", "a"]
    assert [len(turns) for turns in taken.values()] == [2, 2]  # the first does not count
    assert all(len(turn) == 1 and turn[0] >= 0 for turns in taken.values() for turn in turns)


def test_turn_waits_for_the_device_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another GPU may be the current one, and has nothing to do."""
    waits: list[object] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *devices: waits.append(devices))
    second = torch.device("cuda", 1)
    time_turns({"only": lambda: None}, 1, 0.0, second, lambda _: None)
    assert waits == [(second,)] * 2


def test_timings_of_turns() -> None:
    turns = {AS_LOADED: [[0.2, 0.2], [0.4]], "fp32": [[0.1], [0.1]]}
    runs_in = {AS_LOADED: "fp32", "fp32": "fp32"}
    loaded, fast = summarise_turns(turns, 3, 2.0, runs_in, {"gemm fp32": 100.0}, 2)
    assert loaded.images_per_second == pytest.approx((15 + 7.5) / 2)
    assert (loaded.p50_ms, loaded.p99_ms) == pytest.approx((200, 396))
    assert fast.images_per_second == pytest.approx(30)
    assert fast.gemm_share == pytest.approx(0.6)  # 30 images of 2 GFLOP beside 100
    assert fast.times_as_loaded == pytest.approx(30 / 11.25)
    assert summarise_turns(turns, 3, 2.0, runs_in, {}, 2)[0].gemm_share is None


def test_measure_rejects_wrong_arguments() -> None:
    model = tiny()
    for wrong in ({"rounds": 0}, {"batch_sizes": ()}, {"batch_sizes": (1, 0)}):
        with pytest.raises(VitlibError, match="expected 1 or more"):
            measure(model, "tiny", **wrong)  # type: ignore[arg-type]
    with pytest.raises(VitlibError, match="in eval mode"):
        measure(tiny().train(), "tiny")
    with torch.device("meta"), pytest.raises(VitlibError, match="with weights"):
        measure(tiny(), "tiny")
    with pytest.raises(VitlibError, match="no ViT is called 'Q/3'"):
        random_model("Q/3")
    with pytest.raises(VitlibError, match="device='nowhere' cannot be had"):
        random_model("Ti/16", "nowhere")


def test_random_model_can_be_calibrated() -> None:
    model = random_model("Ti/16")
    assert isinstance(model.image_processor, ImageProcessor)
    assert model.image_processor.crop_size == (224, 224)
    assert not model.training


@pytest.mark.skipif("int8" not in HERE, reason="this CPU has no int8")
def test_measure_calibrates_with_photos(tmp_path: Path, photo: Path) -> None:
    model = tiny()
    model.image_processor = ImageProcessor(shortest_edge=32, crop_size=(32, 32))
    arguments = {"batch_sizes": [1], "rounds": 1, "turn_seconds": 0.0}
    result = measure(model, "tiny", precisions=["int8"], calibrate=[photo], **arguments)  # type: ignore[arg-type]
    assert result.calibrated
    fast = optimize(model, "int8", calibrate=[photo])
    assert result.in_8_bits == _in_8_bits(fast)
    (tmp_path / "no photo.txt").write_text("no photo")
    with pytest.raises(VitlibError, match="photo 0"):
        measure(model, "tiny", calibrate=[tmp_path / "no photo.txt"], **arguments)  # type: ignore[arg-type]


@pytest.mark.usefixtures("quick")
def test_bench_command(run_cli: Run, tmp_path: Path) -> None:
    references.save_model("vit", tmp_path)
    options = ("bench", "--model", tmp_path, "--rounds", 1, "--batch-size", 2, "--device", "cpu")
    status, out, err = run_cli(*options)
    assert (status, err) == (0, "")
    above, below = out.split("\n\n")
    table = dict(re.split(r"  +", line, maxsplit=1) for line in above.splitlines())
    assert table["model"].startswith(f"{tmp_path}: 0.00 GFLOP an image of 32x32")
    assert table["GEMM GFLOP/s"].startswith("fp32 ")
    head, loaded, *fast = (re.split(r"  +", line) for line in below.strip().splitlines())
    assert head[:3] == ["batch", "precision", "img/s"]
    assert loaded[:2] == ["2", "as loaded (float32)"]
    assert [line[1].split()[0] for line in fast] == HERE
    assert all(len(line) == len(head) for line in fast)
    status, out, err = run_cli(*options, "--precision", "fp32", "--batch-size", 1, "--json")
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert [(t["batch_size"], t["precision"]) for t in result["timings"]] == [
        (size, name) for size in (2, 1) for name in (AS_LOADED, "fp32")
    ]
    assert result["gemm_shape"] == [1576, 768, 3072]


def test_bench_command_rejects_wrong_arguments(run_cli: Run, tmp_path: Path) -> None:
    for wrong in (
        ("--model", "x", "--size", "S/16"),
        ("--precision", "fp64"),
        ("--batch-size", 0),
        ("--rounds", 0),
        ("--calibrate", tmp_path / "nowhere"),
        ("--precision", "fp32", "--calibrate", tmp_path),
    ):
        assert run_cli("bench", *wrong)[0] == 2, wrong
    for wrong, why in (
        (("--model", tmp_path / "nowhere"), "nowhere"),
        (("--size", "Q/3"), "no ViT is called 'Q/3'"),
        (("--size", "Ti/16", "--device", "nowhere"), "device='nowhere' cannot be had"),
        (("--size", "Ti/16", "--device", "cpu", "--precision", "fp8"), "fp8 needs a GPU"),
    ):
        status, out, err = run_cli("bench", *wrong)
        assert (status, out) == (1, "")
        assert err.startswith("vitlib: error: ")
        assert why in err
        assert err.count("\n") == 1


@pytest.mark.usefixtures("quick", "fake_compiler")
def test_compiled_models_are_timed_beside_the_others(run_cli: Run) -> None:
    options = ("bench", "demo", "--device", "cpu", "--rounds", 1, "--precision", "fp32")
    options = (*options, "--batch-size", 1, "--batch-size", 3, "--compile")
    status, out, err = run_cli(*options, "--json")
    assert (status, err.count("\n")) == (0, 1)
    assert "compiling the model for each precision and batch size" in err
    result = json.loads(out)
    assert [(row["batch_size"], row["precision"]) for row in result["timings"]] == [
        (size, name) for size in (1, 3) for name in (AS_LOADED, "fp32", "fp32 compiled")
    ]
    assert result["compiled"] == {"fp32": [2, 2]}  # of 1 image and of 2
    assert result["arithmetic"]["fp32 compiled"] == result["arithmetic"]["fp32"]
    assert set(result["optimize_seconds"]) == {"fp32"}
    out = run_cli(*options)[1]
    assert "compiled      fp32 2 of 2 programs are faster, and used" in out
    assert re.search(r"^3 +fp32 compiled +[0-9.]+ ", out, re.MULTILINE)
    assert run_cli(*options[:-1], "--json")[1].count("compiled") == 1
    assert "1x3x28x28 on 1 thread compiled in 0 s: 2.00x as fast" in run_cli("-v", *options)[2]


@pytest.mark.usefixtures("quick", "fake_compiler")
def test_bench_says_why_nothing_is_compiled(
    run_cli: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("vitlib.fast.compiled.trace_whole", fail)
    options = ("--device", "cpu", "--rounds", 1, "--precision", "fp32", "--batch-size", 1)
    status, out, _ = run_cli("bench", "demo", *options, "--compile")
    assert (status, "fp32 0 of 1 programs" in out) == (0, True)
    assert "is not compiled, and slower: RuntimeError: no C++ compiler" in caplog.text


@pytest.mark.usefixtures("quick", "fake_compiler")
def test_compiling_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def compile_slowly(function: Callable[..., object]) -> Callable[..., object]:
        compiled.append(1)
        time.sleep(2)
        return function

    monkeypatch.setattr("vitlib.fast.compiled.trace_whole", compile_slowly)
    model, chosen = tiny(), {"precisions": ["fp32"], "batch_sizes": [1], "rounds": 1}
    result = measure(model, "tiny", compile=True, turn_seconds=0.0, **chosen)  # type: ignore[arg-type]
    assert compiled == [1]
    assert result.timings[-1].precision == "fp32 compiled"
    assert result.timings[-1].p99_ms < 2000
    assert measure(model, "tiny", turn_seconds=0.0, **chosen).compiled == {}  # type: ignore[arg-type]


@pytest.mark.usefixtures("quick")
def test_threads_are_timed_in_turn(run_cli: Run) -> None:
    before = torch.get_num_threads()
    arguments = ("bench", "demo", "--rounds", "1", "--precision", "fp32", "--batch-size", "2")
    status, out, _ = run_cli(*arguments, "--threads", "1", "--threads", "3", "--json")
    assert (status, torch.get_num_threads()) == (0, before)
    result = json.loads(out)
    assert result["threads"] == [1, 3]
    timed = [(row["precision"], row["threads"]) for row in result["timings"]]
    assert timed == [("as loaded", 1), ("fp32", 1), ("as loaded", 3), ("fp32", 3)]
    status, out, _ = run_cli(*arguments, "--threads", "1", "--threads", "3")
    assert "1, 3 threads" in out
    table = [line.split() for line in out.splitlines() if line.startswith("2 ")]
    assert [row[1] for row in table] == ["1", "1", "3", "3"]
    assert [row[-1] for row in table[:2]] == ["1.00", "1.00"]
    with pytest.raises(VitlibError, match="threads=0: expected a whole number of at least 1"):
        measure(tiny(), "tiny", threads=[0])
