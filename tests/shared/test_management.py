"""The management client: idempotent calls, and errors of the mesh."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import urlsplit

import pytest

from taskmesh.errors import BrokerUnavailable, NotFound, PermanentError
from taskmesh.management import Management


@pytest.fixture
def management(broker):
    with Management(broker.management_url) as client:
        yield client


def test_putting_a_thing_twice_changes_nothing(management, broker):
    for _ in range(2):
        management.put_policy(
            broker.vhost, "p", pattern="^x$", definition={"max-length": 3}, apply_to="queues", priority=2
        )

    [policy] = management.policies(broker.vhost)
    assert (policy["name"], policy["definition"], policy["priority"]) == ("p", {"max-length": 3}, 2)


def test_a_missing_thing_is_not_found(management, broker):
    with pytest.raises(NotFound):
        management.queue(broker.vhost, "no/such queue")


def test_a_wrong_value_is_permanent_and_says_why(management, broker):
    with pytest.raises(PermanentError, match="not a valid maximum length"):
        management.put_policy(broker.vhost, "p", pattern="^x$", definition={"max-length": "many"}, apply_to="queues")


def test_wrong_credentials_are_permanent_and_not_repeated(broker):
    address = broker.management_url.rpartition("@")[2]

    with Management(f"http://nobody:hush@{address}") as client, pytest.raises(PermanentError) as caught:
        client.overview()

    assert "hush" not in str(caught.value)


def test_an_api_that_is_away_or_broken_is_an_unavailable_broker():
    class Broken(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(503)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Broken)
    url = f"http://a:b@127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    with Management(url) as client:
        with pytest.raises(BrokerUnavailable, match="503"):
            client.overview()
        thread.join()
        server.server_close()

        with pytest.raises(BrokerUnavailable):
            client.overview()


def test_a_user_s_name_and_password_may_hold_any_character(management, broker):
    password = "p@ss:w/rd ü%"
    management.put_user("odd user/1", password, tags=["management"])
    try:
        parts = urlsplit(broker.management_url)
        with Management(f"http://odd%20user%2F1:p%40ss%3Aw%2Frd%20%C3%BC%25@{parts.hostname}:{parts.port}") as client:
            assert client.overview()["rabbitmq_version"]
    finally:
        management.delete_user("odd user/1")
