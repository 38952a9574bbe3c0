"""Whoever talks to the broker by TLS asks for a certificate that an authority they know has made out to its host."""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest
import trustme

from taskmesh.testing.proxy import TcpProxy

CLIENTS = {
    "publisher": "from taskmesh import amqp; import pika; pika.BlockingConnection(amqp.parameters(amqp_url, name='test')).close()",
    "worker": (
        "from celery import Celery; from taskmesh.settings import WorkerSettings; from taskmesh.worker.app import configuration;"
        "settings = WorkerSettings(database_url='postgresql://x', amqp_url=amqp_url);"
        "app = Celery(); app.conf.update(configuration('orders', settings, listens=False));"
        "app.connection_for_read().connect()"
    ),
    "setup": "from taskmesh.management import Management; Management(management_url).overview()",
}


@dataclass
class Tls:
    """A broker behind TLS, and two authorities: the one that made its certificate, and another."""

    amqp_url: str
    management_url: str
    known: Path
    other: Path

    async def connects(self, client: str, *, authority: Path, host: str = "localhost") -> bool:
        program = f"import sys; amqp_url, management_url = sys.argv[1:]; {CLIENTS[client]}"
        urls = (_with_host(url, host) for url in (self.amqp_url, self.management_url))
        environment = {name: value for name, value in os.environ.items() if name != "SSL_CERT_DIR"}
        answer = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", program, *urls],
            env=environment | {"SSL_CERT_FILE": str(authority)},
            capture_output=True,
            check=False,
            timeout=100,
        )
        return answer.returncode == 0


def _with_host(url: str, host: str) -> str:
    parts = urlsplit(url)
    scheme = {"amqp": "amqps", "http": "https"}[parts.scheme]
    return urlunsplit(parts._replace(scheme=scheme, netloc=parts.netloc.replace("127.0.0.1", host)))


@pytest.fixture
async def tls(broker, tmp_path) -> AsyncIterator[Tls]:
    known, other = trustme.CA(), trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    known.issue_cert("localhost").configure_cert(context)
    for name, authority in (("known.crt", known), ("other.crt", other)):
        (tmp_path / name).write_bytes(authority.cert_pem.bytes())
    async with TcpProxy(broker.amqp_url, tls=context) as amqp, TcpProxy(broker.management_url, tls=context) as api:
        yield Tls(amqp.url, api.url, tmp_path / "known.crt", tmp_path / "other.crt")


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_client_takes_only_the_brokers_own_certificate(tls: Tls, client: str):
    assert await tls.connects(client, authority=tls.known)
    assert not await tls.connects(client, authority=tls.other)
    # A certificate of the right authority that is made out to another host is another host's.
    assert not await tls.connects(client, authority=tls.known, host="127.0.0.1")
