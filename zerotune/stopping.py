"""Being asked to stop: SIGTERM and SIGUSR1 are noted, and the ranks agree on when to heed them."""

import signal

from zerotune.errors import Preempted
from zerotune.launch import on_all_ranks


class StopSignal:
    """Notes SIGTERM and SIGUSR1 from its creation on."""

    def __init__(self):
        self.name = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        self.name = signal.Signals(number).name

    def raise_when_noted(self, accelerator) -> None:
        """Stop all ranks when one of them has been asked to; all ranks take part.

        Raises:
            Preempted: one was.
        """
        noted = [name for name in on_all_ranks(accelerator, self.name) if name]
        if noted:
            raise Preempted(f"stopped by {noted[0]} during an evaluation: the same command goes on from there")
