"""The model in use, shared by the threads of the agent: replaced as a whole, never in pieces."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from wearfleet_protos.errors import NotFoundError

from wearfleet_edge.memory import release_memory
from wearfleet_edge.runtime import Personal, Recogniser

if TYPE_CHECKING:
    from wearfleet_edge.slots import InstalledModel

__all__ = ["ActiveModel"]


class ActiveModel:
    """Which recogniser to use now, and which release it is."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._installed: InstalledModel | None = None
        self._recogniser: Recogniser | None = None

    def use(self, installed: InstalledModel, personal: Personal | None) -> None:
        """Load a model, warm it up, then let every thread use it.

        Raises:
            IntegrityError: the model is refused; the one before stays in use.
        """
        recogniser = Recogniser(installed.model, installed.manifest, personal)
        with self._changed:
            self._installed, self._recogniser = installed, recogniser
            self._changed.notify_all()
        release_memory()

    @property
    def installed(self) -> InstalledModel | None:
        """The release in use, None before the first."""
        return self._installed

    @property
    def recogniser(self) -> Recogniser:
        """The recogniser in use.

        Raises:
            NotFoundError: there is no model yet.
        """
        recogniser = self._recogniser
        if recogniser is None:
            raise NotFoundError(
                "this device has no model yet; publish one with: wearfleet-cloud models publish"
            )
        return recogniser

    def wait(self, timeout_s: float) -> bool:
        """Wait for the first model; True when there is one."""
        with self._changed:
            return self._changed.wait_for(lambda: self._recogniser is not None, timeout_s)
