"""TrainConfig: values, aliases and settings without effect."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest

from vitlib.errors import ConfigError
from vitlib.train.config import TrainConfig
from vitlib.train.settings import Tuning


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"learning_rat": 1}, "did you mean learning_rate"),
        ({"learning_rate": -1}, "learning_rate=-1"),
        ({"optim": {"learning_rate": "fast"}}, "expected a number"),
        ({"num_train_epochs": 1.5}, "expected a whole number"),
        ({"optim": "lion"}, "expected one of adamw, sgd"),
        ({"number_of_epochs": 3, "num_train_epochs": 4}, "given twice"),
        ({"augment": "wild"}, "expected one of none"),
        ({"head_only": True, "lora_r": 4}, "head_only trains no block"),
    ],
)
def test_config_rejects_bad_values(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        TrainConfig.from_dict(values)


def test_config_rejects_settings_as_parts() -> None:
    for arguments, match in (
        ({"num_train_epochs": 1}, r"TrainConfig\.from_dict\(\{'num_train_epochs': \.\.\.\}\)"),
        ({"number_of_epochs": 1}, r"TrainConfig\.from_dict\(\{'number_of_epochs': \.\.\.\}\)"),
        ({"learning_rat": 1}, "did you mean learning_rate"),
        ({"optim": "sgd"}, r"optim='?sgd.*expected Optimizer.*TrainConfig\.from_dict"),
    ):
        with pytest.raises(ConfigError, match=match):
            TrainConfig(**arguments)
    config = TrainConfig(tune=Tuning(head_only=True))
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"momentum": 0.5, "nesterov": False}, ["momentum", "nesterov"]),
        ({"optim": "sgd", "beta1": 0.5}, ["adam_beta1"]),
        ({"optim": "sgd", "momentum": 0.5}, []),
        ({"lr_power": 3}, ["lr_power"]),
        ({"lr_scheduler_type": "constant", "lr_end": 0.1}, ["lr_end"]),
        ({"lora_alpha": 8}, ["lora_alpha"]),
        ({"lora_alpha": 8, "lora_r": 2}, []),
    ],
)
def test_list_unused_names_settings_without_effect(
    values: dict[str, Any], names: list[str]
) -> None:
    assert [line.split("=")[0] for line in TrainConfig.from_dict(values).list_unused()] == names


@pytest.mark.parametrize("augment", ["none", "light", "strong", "card"])
def test_config_round_trip(augment: str) -> None:
    config = TrainConfig.from_dict({"augment": augment, "drop_path": 0.1, "class_weights": "1 2"})
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert TrainConfig.from_dict(TrainConfig().to_dict()) == TrainConfig()


def test_config_accepts_azure_names() -> None:
    config = TrainConfig.from_dict(
        {"number_of_epochs": 4, "training_batch_size": 72, "optimizer": "adamw_hf",
         "learning_rate_scheduler": "warmup_cosine", "random_seed": 7, "precision": 32,
         "apply_augmentations": True, "image_width": -1, "image_height": -1,
         "learning_rate": "5e-5"}
    )  # fmt: skip
    assert config.run.num_train_epochs == 4
    assert config.run.per_device_train_batch_size == 72
    assert config.optim.learning_rate == 5e-5
    assert config.augment.crop_scale == (0.08, 1.0)
    assert config.run.precision == "fp32"
