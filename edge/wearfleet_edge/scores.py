"""Accuracy before and after: the released model and the personal one on the same later windows of the wearer."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from wearfleet_edge.runtime import Evaluation, Recogniser

if TYPE_CHECKING:
    from wearfleet_edge.models import ActiveModel
    from wearfleet_edge.wearer import Wearer

__all__ = ["Scores"]


class Scores:
    """Measures each model once.

    Args:
        active: the model in use.
        wearer: whose later windows are used; never the windows that were learnt from.
    """

    def __init__(self, active: ActiveModel, wearer: Wearer) -> None:
        self._active = active
        self._wearer = wearer
        self._lock = threading.Lock()
        self._base_of = ""
        self._base: Evaluation | None = None
        self._personal_of: Recogniser | None = None
        self._personal: Evaluation | None = None

    @property
    def measurable(self) -> bool:
        """False when the agent was started without recordings."""
        return self._wearer.has_recordings

    def base(self) -> Evaluation:
        """The model as released.

        Raises:
            NotFoundError: there is no model yet.
            DataError: there are no recordings to measure on.
        """
        with self._lock:
            recogniser, installed = self._active.recogniser, self._active.installed
            if installed is None or self._base is None or self._base_of != installed.manifest_digest:
                holdout = self._wearer.training_data(recogniser.manifest.contract).holdout
                if installed is not None and recogniser.personalised:
                    recogniser = Recogniser(installed.model, installed.manifest)
                self._base = recogniser.evaluate(holdout)
                self._base_of = installed.manifest_digest if installed else ""
            return self._base

    def personal(self) -> Evaluation | None:
        """The personal model; None when none is in use."""
        with self._lock:
            recogniser = self._active.recogniser
            if not recogniser.personalised:
                return None
            if self._personal is None or self._personal_of is not recogniser:
                holdout = self._wearer.training_data(recogniser.manifest.contract).holdout
                self._personal = recogniser.evaluate(holdout)
                self._personal_of = recogniser
            return self._personal
