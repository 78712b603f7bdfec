"""Settings chosen by the photos, where nobody gives any: layers, rate, epochs, augmentation.

A linear head on frozen features is the start (linear_probe.py). A short and gentle training of all
layers follows, which Kumar et al. 2202.10054 (section 4) find better than either alone. Where
photos are many, a validation set chooses the best epoch, the start included. Where they are few, it
would take photos that training needs and choose by chance. There the last weights are an average
with the start (Wortsman et al. 2109.01903), which keeps much of what training gains and loses less
where it fails.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from vitlib.data import LabelledPhotos
from vitlib.errors import count_noun
from vitlib.train.config import TrainConfig

# Photos below which all are trained with. A tenth of 200 photos of 40 faces chose an epoch that got
# 0.950 of the others right, where the start of all of them got 0.970.
FEW = 500
# Photos of a class below which the head alone is trained. With 5 photos of each of 40 faces the
# head got 0.970 and 0.950 of the others right, and all layers trained after it 0.960 and 0.945.
SCARCE = 8
# No augmentation: in so few epochs it gains nothing, and flips are wrong for digits and text.
EPOCHS, RATE, HELD_OUT = 3, 5e-5, 0.1
# Without a validation set as much change in less time, since the head takes a share of it.
EPOCHS_OF_FEW, RATE_OF_FEW, BATCH_OF_FEW = 2.5, 6e-5, 8
# Share of the start. With DINOv2 on 32 photos training alone got 0.906 of the others right, an
# average 0.969. With DeiT averages gain less than training alone where that gains, and lose nothing
# where it loses.
START_SHARE = 0.5
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
    changes: dict[str, Any] = {"linear_probe": True, "augment": "none"}
    reason = f"{start}: a linear head is fitted to frozen features"
    is_few = held_out is None and count < FEW
    is_scarce = not training.multi_label and count < SCARCE * outputs
    # The size of numbers decides which rate is gentle, and nothing would show a wrong one.
    is_head_only = is_few and (training.regression or is_scarce)
    if is_head_only:
        changes |= {"head_only": True, "num_train_epochs": 0}
    else:
        epochs, rate = (EPOCHS_OF_FEW, RATE_OF_FEW) if is_few else (EPOCHS, RATE)
        changes |= {
            "num_train_epochs": math.ceil(epochs),
            "per_device_train_batch_size": BATCH_OF_FEW if count < FEW else 16,
            "learning_rate": rate,
        }
        if is_few:
            changes["max_steps"] = math.ceil(epochs * math.ceil(count / BATCH_OF_FEW))
        reason += f", then {epochs:g} epochs train all layers at {rate:g}"
    if is_few:
        changes["validation_split"] = 0.0
        changes["start_share"] = 0.0 if is_head_only else START_SHARE
        reason += "; all photos train, so that no validation set is left"
    elif held_out is None:
        changes["validation_split"] = HELD_OUT
        reason += f"; {HELD_OUT:.0%} of the photos choose the best epoch, the start included"
    if training.multi_label:
        rare = sum(number < RARE * count for number in training.counts().values())
        if rare:
            changes["weighted_loss"] = 1
            reason += f"; {count_noun(rare, 'rare label')} weigh more"
    return settled.with_changes(changes), reason
