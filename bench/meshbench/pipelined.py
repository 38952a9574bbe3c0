"""The broker's limit: messages published by pika alone, confirmed by the broker, so many of them on their way."""

from __future__ import annotations

from typing import Any

import pika
from pika.channel import Channel
from pika.frame import Method

WINDOW = 500


class Pipeline:
    """Publishes the same message again and again to one exchange until so many are confirmed."""

    def __init__(self, amqp_url: str, *, exchange: str, routing_key: str, body: bytes, messages: int) -> None:
        self._address = (exchange, routing_key, body, pika.BasicProperties(delivery_mode=2))
        self._left = messages
        self._open: set[int] = set()
        self._sent = 0
        self._channel: Channel | None = None
        self._connection = pika.SelectConnection(
            pika.URLParameters(amqp_url),
            on_open_callback=lambda connection: connection.channel(on_open_callback=self._opened),
        )

    def run(self) -> None:
        """Return when the broker has confirmed the last message."""
        self._connection.ioloop.start()

    def _opened(self, channel: Channel) -> None:
        self._channel = channel
        channel.confirm_delivery(self._confirmed, callback=lambda _: self._publish())

    def _publish(self) -> None:
        assert self._channel
        exchange, routing_key, body, properties = self._address
        while self._left and len(self._open) < WINDOW:
            self._channel.basic_publish(exchange, routing_key, body, properties)
            self._left -= 1
            self._sent += 1
            self._open.add(self._sent)

    def _confirmed(self, frame: Method[Any]) -> None:
        tag = frame.method.delivery_tag
        self._open -= {each for each in self._open if each <= tag} if frame.method.multiple else {tag}
        # Refilled when half of it is free: pika writes what comes together at once.
        if len(self._open) <= WINDOW // 2:
            self._publish()
        if not self._open and not self._left:
            self._connection.add_on_close_callback(lambda *_: self._connection.ioloop.stop())
            self._connection.close()
