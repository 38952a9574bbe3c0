"""Connections to RabbitMQ: every foreign error becomes one of ours, and nobody waits for ever."""

from __future__ import annotations

import inspect
import ssl

import pika.exceptions
import pytest
import trustme
from pika.adapters.utils import connection_workflow

from taskmesh import amqp
from taskmesh.errors import BrokerUnavailable, PermanentError, TaskmeshError
from taskmesh.testing.proxy import TcpProxy


def _pika_errors():
    found = [
        kind
        for module in (pika.exceptions, connection_workflow)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, Exception) and kind.__module__.startswith("pika")
    ]
    return sorted(set(found), key=lambda kind: kind.__name__)


def _example(kind):
    error = kind.__new__(kind)
    error.args = (320, "CONNECTION_FORCED")
    return error


@pytest.mark.parametrize("kind", _pika_errors(), ids=lambda kind: kind.__name__)
def test_every_error_of_pika_is_translated(kind):
    """Raised inside `translating`, none of pika's errors gets out as it is."""
    with pytest.raises(TaskmeshError) as caught, amqp.translating():
        raise _example(kind)

    assert isinstance(caught.value, BrokerUnavailable)
    assert isinstance(caught.value.__cause__, kind)


@pytest.mark.parametrize("code", [403, 404, 405, 406])
def test_a_refusal_is_permanent_and_keeps_its_code(code):
    refusal = amqp.translate(pika.exceptions.ChannelClosedByBroker(code, "ACCESS_REFUSED - no"))

    assert isinstance(refusal, PermanentError)
    assert refusal.reply_code == code


async def test_a_port_where_nobody_listens_is_an_unavailable_broker_without_its_address():
    async with TcpProxy("amqp://user:secret@127.0.0.1:1/vhost") as proxy:
        url = proxy.url
        await proxy.refuse()

        with pytest.raises(BrokerUnavailable) as caught:
            await amqp.Connection.open(url, name="test")

    assert "127.0.0.1" not in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_wrong_credentials_are_an_unavailable_broker(broker):
    """They may be rotating at this moment, so it is worth trying again."""
    async with TcpProxy(broker.amqp_url) as proxy:
        wrong = "amqp://nobody:x@" + proxy.url.rpartition("@")[2]

        with pytest.raises(BrokerUnavailable):
            await amqp.Connection.open(wrong, name="test")


async def test_a_server_that_accepts_and_says_nothing_is_given_up(broker, monkeypatch):
    monkeypatch.setattr(amqp, "CONNECT_TIMEOUT_SECONDS", 0.3)
    async with TcpProxy(broker.amqp_url) as proxy:
        proxy.stall()

        with pytest.raises(BrokerUnavailable):
            await amqp.Connection.open(proxy.url, name="test")


@pytest.mark.parametrize("trusted", [True, False])
async def test_amqps_speaks_tls_and_believes_no_unknown_certificate(broker, tmp_path, monkeypatch, trusted):
    authority = trustme.CA()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    trust = authority if trusted else trustme.CA()
    trust.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))

    async with TcpProxy(broker.amqp_url, tls=tls) as proxy:
        url = proxy.url.replace("amqp://", "amqps://")
        if trusted:
            connection = await amqp.Connection.open(url, name="test")
            await connection.channel()
            await connection.close()
        else:
            with pytest.raises(BrokerUnavailable):
                await amqp.Connection.open(url, name="test")


def test_waits_grow_up_to_the_longest_and_start_small_again():
    backoff = amqp.Backoff(first_seconds=1.0, longest_seconds=4.0)

    waits = [backoff.next() for _ in range(5)]
    backoff.reset()

    assert all(
        low <= wait <= high for wait, (low, high) in zip(waits, [(0.5, 1), (1, 2), (2, 4), (2, 4), (2, 4)], strict=True)
    )
    assert backoff.next() <= 1.0
