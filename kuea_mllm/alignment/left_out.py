"""Unreadable images of a whole run: all processes and all of its sessions together."""

from __future__ import annotations

from collections.abc import Mapping

from kuea_mllm.data.unreadable import UnreadableCounter, too_many_unreadable
from kuea_mllm.training.distributed import gather_objects, world_size


class LeftOut(UnreadableCounter):
    """A counter that survives an interruption and knows what other processes met."""

    def exchange(self) -> None:
        """Learn what the other processes met; all of them have to call it at the same step.

        Raises:
            UnreadableImage: In every process, if the limit is passed by all together.
        """
        if self.limit == 0 or world_size() == 1:
            return
        for names in gather_objects(self._names):
            self._names |= names
        if self.count > self.limit:
            raise too_many_unreadable(self.count, self.limit, list(self._names.values()))

    def state(self) -> dict[str, str]:
        """Return what a resumed run has to know; JSON values."""
        return {str(key): name for key, name in self._names.items()}

    def load_state(self, names: Mapping[str, str]) -> None:
        """Go on from `state`."""
        self._names = {int(key): name for key, name in names.items()}
