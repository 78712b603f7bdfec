"""The optimized copy of a model: made when it is needed, and again after the model changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from vitlib.fast.model import FastViT
from vitlib.fast.parts import as_they_are
from vitlib.vit import ViT


class Made(NamedTuple):
    """An optimized copy, and what it was made of."""

    copy: ViT | FastViT
    model: ViT
    state: object  # of the model: see state_of
    settings: Hashable
    by_photos: bool  # whether photos are needed to make it again


class CurrentCopy:
    """The optimized copy of a model, for any number of threads; it can be copied and pickled."""

    def __init__(self) -> None:
        self.made: Made | None = None
        self.lock = threading.Lock()

    def of(
        self, model: ViT, settings: Hashable, make: Callable[[], ViT | FastViT], by_photos: bool
    ) -> ViT | FastViT:
        """Return the copy of the model as it is now.

        Args:
            model: what is copied.
            settings: what else decides what the copy is.
            make: makes the copy.
            by_photos: whether it needs photos for that.

        Returns:
            The copy: the same one until the model or the settings change.
        """
        with self.lock:
            state, last = state_of(model), self.made
            if last is None or last.state != state or last.settings != settings:
                last = self.made = Made(make(), model, state, settings, by_photos)
            return last.copy

    def __getstate__(self) -> dict[str, Any]:
        """A copy that was made by photos goes along; any other is made again where it arrives, from
        the model, for the machine there: then the weights are written once."""
        if self.made is None or not self.made.by_photos:
            return {"sent": None}
        made = self.made
        is_current = made.state == state_of(made.model)
        return {"sent": (made.copy, made.model, made.settings) if is_current else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The state names tensors of this process: it is taken anew."""
        self.__init__()  # type: ignore[misc]
        if state["sent"] is not None:
            copy, model, settings = state["sent"]
            self.made = Made(copy, model, state_of(model), settings, True)


def state_of(model: ViT) -> object:
    """What an optimized copy is made of: another value after a change of weights or parts."""
    weights = tuple(
        (id(t), None if t.is_inference() else t._version)
        for t in (*model.parameters(), *model.buffers())
    )
    return weights, tuple(map(id, model.modules())), tuple(as_they_are(model)), model.config
