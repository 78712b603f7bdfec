"""Settings chosen by the photos, where nobody gives any: layers, rate, epochs, augmentation.

Few photos say too little about all layers: a linear head on frozen features is then the whole
model (linear_probe.py). With more, that head is the start of a short training of all layers, which
Kumar et al. 2202.10054 (section 4) find better than either alone. The evaluation of the start takes
part in the choice of the best checkpoint, so that training which does not help is not kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vitlib.data import LabelledPhotos
from vitlib.errors import count_noun
from vitlib.train.config import TrainConfig

# Photos below which the head alone is fitted. On 67 photos of 4 classes training of all layers got
# 0.81 to 0.98 of held-out photos right, by its rate and epochs, and on 100 digits 0.13 to 0.87. So
# few photos cannot tell which: a seventh of them chose the start, and the head alone got 0.85.
FEW = 200
# Beyond it a short and gentle training, and a validation set that can refuse it. No augmentation:
# in three epochs it gains nothing, and flips are wrong for digits and text.
EPOCHS, RATE, HELD_OUT = 3, 5e-5, 0.1
# Share of the photos that show a class, below which it is rare among several labels.
RARE = 0.2


def choose_settings(
    training: LabelledPhotos, held_out: LabelledPhotos | None, config: TrainConfig
) -> tuple[TrainConfig, str]:
    """Choose the settings of a run by the number of photos, classes and labels.

    Args:
        training: The photos, before any are held out.
        held_out: The validation set, where there is one apart.
        config: Settings; those of NEUTRAL stay as they are.

    Returns:
        The settings, with auto=False, and what was chosen and why in a line.
    """
    count, outputs = len(training), len(training.labels)
    settled = replace(config, run=replace(config.run, auto=False))
    kind = count_noun(outputs, "number" if training.regression else "class")
    start = f"{count_noun(count, 'photo')} of {kind}"
    changes: dict[str, Any] = {"linear_probe": True}
    if count < FEW:
        changes |= {"head_only": True, "num_train_epochs": 0, "augment": "none"}
        reason = f"{start} are few: a linear head alone is fitted to frozen features"
        if held_out is None:
            changes["validation_split"] = 0.0
            reason += " of all photos, without a validation set"
    else:
        batch = 8 if count < 500 else 16
        changes |= {
            "num_train_epochs": EPOCHS,
            "per_device_train_batch_size": batch,
            "learning_rate": RATE,
            "augment": "none",
        }
        reason = (
            f"{start}: a linear head on frozen features, then {EPOCHS} epochs of all layers at "
            f"{RATE:g}"
        )
        if held_out is None:
            changes["validation_split"] = HELD_OUT
            reason += f"; {HELD_OUT:.0%} of the photos choose the best epoch, the start included"
    if training.multi_label:
        rare = sum(number < RARE * count for number in training.counts().values())
        if rare:
            changes["weighted_loss"] = 1
            reason += f"; {count_noun(rare, 'rare label')} weigh more"
    return settled.with_changes(changes), reason
