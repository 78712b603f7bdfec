"""Libraries that take any module: PEFT, Grad-CAM, Captum, torchinfo, Lightning, Accelerate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vitlib
from fixtures.families import pixels, tiny

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("default")]
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(pixels(8), LABELS), batch_size=4)


def test_lora_of_peft_is_saved_and_loaded(tmp_path: Path) -> None:
    import peft

    model, images = tiny("dinov2_registers", depth=2), pixels(2)
    expected = model(images)
    config = peft.LoraConfig(r=4, target_modules=["q", "v"], modules_to_save=["head"])
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    assert torch.allclose(adapted(images), expected, atol=1e-6)  # the update is zero
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):
        F.cross_entropy(adapted(images), LABELS[:2]).backward()
        optimizer.step()
    result = adapted.eval()(images)
    assert (result - expected).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert torch.allclose(again(images), result, atol=1e-6)
    merged = again.merge_and_unload()
    assert isinstance(merged, vitlib.ViT)
    assert torch.allclose(merged(images), result, atol=1e-5)


def reshape_transform(tokens: Tensor) -> Tensor:
    """As on the page of pytorch-grad-cam on transformers: without the class token."""
    return tokens[:, 1:].reshape(len(tokens), 4, 4, -1).permute(0, 3, 1, 2)


def normalize(maps: Tensor) -> Tensor:
    """Scale each map to 0..1, as pytorch-grad-cam does before and after it resizes."""
    maps = maps - maps.amin((2, 3), keepdim=True)
    return maps / (1e-7 + maps.amax((2, 3), keepdim=True))


def test_grad_cam_is_that_of_its_formula() -> None:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, images = tiny("vit", depth=3), pixels(2)
    layer = model.blocks[-1].norm1
    targets = [ClassifierOutputTarget(1), ClassifierOutputTarget(2)]
    with GradCAM(model, [layer], reshape_transform=reshape_transform) as cam:
        maps = cam(input_tensor=images, targets=targets)
    tape: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, __, output: tape.append(output))
    logits = model(images)
    hook.remove()
    (slope,) = torch.autograd.grad(logits[0, 1] + logits[1, 2], tape[0])
    weights = slope[:, 1:].mean(1, keepdim=True)
    own = (tape[0][:, 1:] * weights).sum(2).relu().reshape(2, 1, 4, 4)
    own = normalize(F.interpolate(normalize(own), (32, 32), mode="bilinear"))[:, 0]
    assert maps.shape == (2, 32, 32)
    assert (torch.from_numpy(maps) - own.detach()).abs().max() < 0.02
    assert not layer._forward_hooks


def test_attributions_of_captum_add_up() -> None:
    from captum.attr import IntegratedGradients, LayerActivation, LayerIntegratedGradients, Saliency

    model, images = tiny("vit", depth=2), pixels(1)
    parts, error = IntegratedGradients(model).attribute(
        images, target=2, n_steps=64, return_convergence_delta=True
    )
    change = (model(images) - model(torch.zeros_like(images)))[0, 2]
    assert abs(parts.sum() - change) < 0.02 * change.abs() + 1e-3
    assert abs(error) < 0.02
    slope = Saliency(model).attribute(images, target=2, abs=False)
    leaf = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf)[0, 2], leaf)
    assert torch.allclose(slope, expected, atol=1e-6)
    state = LayerActivation(model, model.blocks[0]).attribute(images)
    (tokens,) = model.forward_intermediates(images, [0])
    assert torch.equal(state[:, 1:], tokens)
    layered = LayerIntegratedGradients(model, model.blocks[0].norm1).attribute(images, target=2)
    assert layered.shape == (1, 17, 32)


def test_summary_of_torchinfo_counts_parameters() -> None:
    import torchinfo

    model = tiny("dinov3", depth=2)
    stats = torchinfo.summary(model, input_size=(2, 3, 32, 32), verbose=0)
    assert stats.total_params == sum(p.numel() for p in model.parameters())
    assert "Attention" in str(stats)
    assert "[2, 21, 32]" in str(stats)


def test_trainer_of_lightning_fits(tmp_path: Path) -> None:
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny("vit", depth=2)
            self.losses: list[float] = []

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            groups = vitlib.parameter_groups(self.model, lr=1e-2, layer_decay=0.8)
            return torch.optim.AdamW(groups)

    module = Classifier()
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, loader())
    assert len(module.losses) == 8
    assert sum(module.losses[-2:]) < sum(module.losses[:2])
    (path,) = tmp_path.rglob("*.ckpt")
    again = Classifier.load_from_checkpoint(path)
    assert torch.equal(again.model.eval()(pixels(2)), module.model.eval()(pixels(2)))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_as_a_plain_loop(precision: str) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # it is of the process
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = tiny("vit", depth=2).train()
    optimizer = torch.optim.AdamW(vitlib.parameter_groups(model, lr=1e-2, layer_decay=0.8))
    model, optimizer, data = accelerator.prepare(model, optimizer, loader())
    losses = run(model, optimizer, data, accelerator.backward)
    other = tiny("vit", depth=2).train()
    groups = vitlib.parameter_groups(other, lr=1e-2, layer_decay=0.8)
    expected = run(other, torch.optim.AdamW(groups), loader(), Tensor.backward)
    bound = 1e-5 if precision == "no" else 0.05
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < bound
    assert isinstance(accelerator.unwrap_model(model), vitlib.ViT)


def run(model: nn.Module, optimizer: Any, data: Any, backward: Any) -> list[float]:
    losses = []
    for _ in range(2):
        for images, labels in data:
            loss = F.cross_entropy(model(images).float(), labels)
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses
