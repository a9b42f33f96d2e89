"""What data workers do with the signals that stop a run: nothing, for the training process needs them to its end."""

from __future__ import annotations

import os
import signal
import threading


def leave_signals_to_training(worker_id: int) -> None:
    """Have this worker process ignore Ctrl-C, which a terminal sends to all processes of a command, and SIGTERM, which
    a service manager or a batch system does, unless its parent sent it: so torch ends a worker that is stuck.

    Called by torch's DataLoader in each worker. Where the sender can't be told (macOS, Windows), SIGTERM ends it.
    """
    del worker_id
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_if_parent_says, daemon=True).start()


def _end_if_parent_says() -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getppid():
            os._exit(0)
