"""The relay of the orders service, which kills itself between the broker's confirm and the deletion of its rows."""

from __future__ import annotations

import os
import signal
from typing import Any

from fragile_orders import app
from taskmesh.relay import Relay
from taskmesh.worker import main

settle = Relay._settle


async def die(self: Relay, connection: Any, expired: Any, fates: Any) -> Any:
    if fates.confirmed:
        os.kill(os.getpid(), signal.SIGKILL)
    return await settle(self, connection, expired, fates)


Relay._settle = die  # type: ignore[method-assign]
main(app)
