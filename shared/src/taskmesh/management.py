"""A small client of RabbitMQ's management API, for what AMQP cannot say: policies, users, permissions, bindings.

Used at deploy time (`topology.declare`), by the gateway's reconciler, which only reads, by the local launcher and by
tests; no other run-time role talks to it.
See https://www.rabbitmq.com/docs/http-api-reference.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping
from functools import cache
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import httpx
from pydantic import SecretStr

from taskmesh.errors import BrokerUnavailable, NotFound, PermanentError


@cache
def _authorities() -> ssl.SSLContext:
    """Read once: it takes 25 ms, and the reconciler has a new client every few seconds."""
    # Without the environment httpx would know no authority of one's own; OpenSSL reads SSL_CERT_FILE by itself.
    return ssl.create_default_context()


class Management:
    """One client of one broker's management API; use it as a context manager.

    Every call is idempotent: what is there already is left or replaced.

    Args:
        url: `http://user:password@host:port`, or https.
        timeout_seconds: For each request.

    Raises:
        BrokerUnavailable: From every method, when the API cannot be reached or answers with a server error.
        PermanentError: From every method, when the API refuses: wrong credentials, missing right, wrong value.
        NotFound: From methods that get or delete one thing, when there is none.
    """

    def __init__(self, url: SecretStr | str, *, timeout_seconds: float = 10.0) -> None:
        parts = urlsplit(url.get_secret_value() if isinstance(url, SecretStr) else url)
        credentials = (unquote(parts.username or ""), unquote(parts.password or ""))
        address = parts.netloc.rpartition("@")[2]
        base_url = urlunsplit((parts.scheme, address, parts.path.rstrip("/") + "/api", "", ""))
        # A proxy meant for the outside world must not see the broker's credentials.
        self._http = httpx.Client(
            base_url=base_url, auth=credentials, timeout=timeout_seconds, trust_env=False, verify=_authorities()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        self._http.close()

    def overview(self) -> dict[str, Any]:
        """Return what the broker says about itself, among it `rabbitmq_version`."""
        return self._get("/overview")

    def nodes(self) -> list[dict[str, Any]]:
        """Return every node of the broker; `mem_alarm` and `disk_free_alarm` are some seconds old."""
        return self._list("/nodes")

    def put_vhost(self, vhost: str) -> None:
        """Make sure that the virtual host exists."""
        self._send("PUT", f"/vhosts/{_name(vhost)}", {})

    def delete_vhost(self, vhost: str) -> None:
        """Delete the virtual host and everything in it."""
        self._send("DELETE", f"/vhosts/{_name(vhost)}")

    def put_user(self, user: str, password: str, *, tags: Iterable[str] = ()) -> None:
        """Make sure that the user exists, with this password and these tags.

        Args:
            tags: Rights on the management API itself, such as `policymaker`; run-time users have none.
        """
        self._send("PUT", f"/users/{_name(user)}", {"password": password, "tags": ",".join(tags)})

    def delete_user(self, user: str) -> None:
        """Delete the user; its connections are closed."""
        self._send("DELETE", f"/users/{_name(user)}")

    def put_permissions(self, vhost: str, user: str, *, configure: str, write: str, read: str) -> None:
        """Set the names, as regular expressions, that the user may configure, write to and read from."""
        rights = {"configure": configure, "write": write, "read": read}
        self._send("PUT", f"/permissions/{_name(vhost)}/{_name(user)}", rights)

    def put_topic_permissions(self, vhost: str, user: str, *, exchange: str, write: str, read: str) -> None:
        """Set the routing keys that the user may publish to, and bind from, one topic exchange."""
        rights = {"exchange": exchange, "write": write, "read": read}
        self._send("PUT", f"/topic-permissions/{_name(vhost)}/{_name(user)}", rights)

    def put_policy(
        self, vhost: str, name: str, *, pattern: str, definition: Mapping[str, Any], apply_to: str, priority: int = 0
    ) -> None:
        """Set the policy; queues that exist already take it up within moments."""
        policy = {"pattern": pattern, "definition": dict(definition), "apply-to": apply_to, "priority": priority}
        self._send("PUT", f"/policies/{_name(vhost)}/{_name(name)}", policy)

    def policies(self, vhost: str) -> list[dict[str, Any]]:
        """Return every policy of the virtual host."""
        return self._list(f"/policies/{_name(vhost)}")

    def queue(self, vhost: str, name: str) -> dict[str, Any]:
        """Return one queue; its counts are some seconds old."""
        return self._get(f"/queues/{_name(vhost)}/{_name(name)}")

    def queues(self, vhost: str, *, columns: Iterable[str] = ()) -> list[dict[str, Any]]:
        """Return every queue of the virtual host; its counts are some seconds old, and missing at first.

        Args:
            columns: Only these; what the broker does not know of a queue is left out.
        """
        chosen = ",".join(columns)
        return self._list(f"/queues/{_name(vhost)}" + (f"?columns={chosen}" if chosen else ""))

    def bindings(self, vhost: str, queue: str) -> list[dict[str, Any]]:
        """Return the bindings of a queue, as `source`, `routing_key` and `arguments`; without the default one."""
        found = self._list(f"/queues/{_name(vhost)}/{_name(queue)}/bindings")
        return [binding for binding in found if binding["source"]]

    def connections(self, vhost: str) -> list[dict[str, Any]]:
        """Return the open connections; `client_properties.connection_name` is the name that the client chose.

        A new connection takes some seconds to appear.
        """
        return self._list(f"/vhosts/{_name(vhost)}/connections")

    def close_connection(self, name: str) -> None:
        """Cut one connection, by its `name` in `connections`."""
        self._send("DELETE", f"/connections/{_name(name)}")

    def _get(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = self._send("GET", path).json()
        return found

    def _list(self, path: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._send("GET", path).json()
        return found

    def _send(self, method: str, path: str, json: Mapping[str, Any] | None = None) -> httpx.Response:
        try:
            response = self._http.request(method, path, json=json)
        except httpx.TransportError as error:
            raise BrokerUnavailable(f"the management API did not answer: {type(error).__name__}") from error
        if response.is_success:
            return response
        message = f"the management API answered {response.status_code} to {method} {path}"
        if response.is_server_error:
            raise BrokerUnavailable(message)
        if response.status_code == httpx.codes.NOT_FOUND:
            raise NotFound(message)
        raise PermanentError(f"{message}: {_reason(response)}")


def _name(value: str) -> str:
    return quote(value, safe="")


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["reason"])
    except (ValueError, KeyError, TypeError):
        return response.reason_phrase
