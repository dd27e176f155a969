"""What an adapter package offers for discovery, and the way from there to the adapter."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from kuea_mllm.adapters.base.adapter import MLLMAdapter
from kuea_mllm.errors import UserError


@dataclass(frozen=True)
class AdapterManifest:
    """What an adapter package offers for discovery; light enough to be listed.

    Attributes:
        name: Short name, the one given to `--mllm`.
        summary: One line for listings, e.g. of `kuea-mllm doctor`.
        factory: "module:Class" of the adapter, imported only by `load`.
        is_fallback: Whether the adapter is only for models that no other adapter recognises.
    """

    name: str
    summary: str
    factory: str
    is_fallback: bool = False

    def load(self) -> MLLMAdapter:
        """Import the factory and make the adapter.

        Raises:
            UserError: If the factory cannot be imported or does not make an adapter.
        """
        module, _, attribute = self.factory.partition(":")
        try:
            adapter = getattr(importlib.import_module(module), attribute)()
        # A third party's code runs here, so any kind of failure has to end in a line with its name.
        except Exception as error:
            raise UserError(
                f"adapter {self.name!r} cannot be loaded from {self.factory!r}: "
                f"{type(error).__name__}: {error}.",
                "Repair or uninstall the package that provides it.",
            ) from error
        if not isinstance(adapter, MLLMAdapter):
            raise UserError(
                f"adapter {self.name!r}: {self.factory!r} does not provide what "
                "kuea_mllm.adapters.base.MLLMAdapter asks for.",
                "Run kuea_mllm.adapters.conformance on it to see what is missing.",
            )
        return adapter
