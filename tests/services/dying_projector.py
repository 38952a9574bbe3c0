"""The gateway's projector, which kills itself between its commit and its acknowledgement."""

from __future__ import annotations

import os
import signal
from typing import Any

from gateway.__main__ import main
from taskmesh import consuming


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


consuming._Intake.settle = die  # type: ignore[method-assign]
main()
