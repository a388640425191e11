"""Whether paths `msc://profile/path` are read with the package multi-storage-client."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


class MultiStorageClientSwitch:
    """On unless somebody turned it off; the package is looked for when the first path needs it."""

    def __init__(self) -> None:
        self._is_on = True

    def is_enabled(self) -> bool:
        """Whether `msc://` paths can be read: the package is there, and nobody turned it off."""
        return self._is_on and importlib.util.find_spec("multistorageclient") is not None

    def enable(self) -> None:
        """Read `msc://` paths where the package is there."""
        self._is_on = True

    def disable(self) -> None:
        """Refuse `msc://` paths."""
        self._is_on = False

    def import_package(self) -> ModuleType:
        """The package.

        Raises:
            RuntimeError: it is not installed, or was turned off.
        """
        if not self._is_on:
            raise RuntimeError("msc:// paths cannot be read: the multi-storage client is turned off (--disable-msc)")
        try:
            return importlib.import_module("multistorageclient")
        except ImportError as error:
            raise RuntimeError(
                f"msc:// paths need the package multi-storage-client: pip install multi-storage-client ({error})"
            ) from None


MultiStorageClientFeature = MultiStorageClientSwitch()
"""The one switch of this process."""
