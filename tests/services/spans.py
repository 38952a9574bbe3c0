"""A process that makes spans when it is told to: one command a line on standard input.

make N   end N spans
fork     end one span in a process that is forked off, which ends as a program does
stop     end as a role does
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from taskmesh import logs, telemetry
from taskmesh.metrics import catalogue, instruments
from taskmesh.metrics.instruments import Instrument
from taskmesh.settings import ServiceSettings


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Printed:
    """In place of an exporter of metrics."""

    def measure(self, instrument: Instrument, value: float, attributes: Mapping[str, str], origin: object) -> None:
        if instrument is catalogue.TELEMETRY_DROPPED and attributes["signal"] == "traces":
            say(f"dropped {value:g}")


def make(name: str) -> None:
    with telemetry.tracer().start_as_current_span(name):
        pass


def main() -> None:
    logs.configure("json", "INFO", "spans", "test")
    telemetry.start("spans", "test", ServiceSettings(database_url="postgresql://", amqp_url="amqp://"))
    instruments.send_to(Printed())
    for line in sys.stdin:
        match line.split():
            case ["make", count]:
                for number in range(int(count)):
                    make(f"span {number}")
            case ["fork"]:
                if (child := os.fork()) == 0:
                    make("span of the child")
                    telemetry.stop()
                    os._exit(0)
                os.waitpid(child, 0)
            case ["stop"]:
                break
        say("done")
    telemetry.stop()


if __name__ == "__main__":
    main()
