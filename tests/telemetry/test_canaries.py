"""Nothing that a caller confides to the mesh is in what the mesh says about itself.

Unique words are sent by every path, in every place where a secret may be. Then everything is searched that leaves the
processes without being asked for by somebody who may read payloads.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import uuid4

import httpx
import pika
import pytest

from running_mesh import Mesh, running_mesh
from taskmesh.parts.postgres import create_database, drop_database
from taskmesh.testing.otlp import OtlpSink
from taskmesh.testing.smtp import SmtpSink
from taskmesh.testing.waiting import eventually

QUOTING = Path(__file__).parents[1] / "services" / "quoting_orders.py"
ROLES = ("api", "relay", "projector", "scheduler", "reconciler")
TROUBLE = re.compile('"level": "(WARNING|ERROR)"')
QUICKLY = {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_METRIC_EXPORT_INTERVAL": "500"}


@dataclass
class Canaries:
    """Unique words, by the place where each was put."""

    words: dict[str, str] = field(default_factory=dict)

    def new(self, place: str) -> str:
        self.words[place] = f"canary{uuid4().hex}"
        return self.words[place]

    def found_in(self, text: str) -> list[str]:
        """The places whose words are in a text."""
        return [place for place, word in self.words.items() if word in text]


@dataclass
class Aftermath:
    """What was sent, and what came out."""

    canaries: Canaries
    mesh: Mesh
    logs: dict[str, str]
    bodies: dict[str, list[bytes]]
    problems: list[str]


class Story:
    """Sends secrets by every path."""

    def __init__(self, mesh: Mesh, smtp: SmtpSink) -> None:
        self.canaries = Canaries()
        self.problems: list[str] = []
        self._mesh = mesh
        self._smtp = smtp

    def tell(self) -> None:
        self._tasks_end()
        self._requests_are_refused()
        self._messages_are_malformed()
        self._letters_are_replayed()
        self._a_task_is_cancelled()
        self._a_schedule_fires()
        self._a_mail_is_refused()
        self._secrets_do_not_fit()

    def _post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self._mesh.http.post(path, json=body, **options)

    def _submit(self, type_name: str, **payload: Any) -> str:
        return self._mesh.submit(type_name, payload)

    def _end(self, *task_ids: str) -> None:
        for task_id in task_ids:
            self._mesh.gateway.outcome(task_id)

    def _tasks_end(self) -> None:
        new = self.canaries.new
        whole = {
            "type": "orders.order.place",
            "payload": {"name": new("payload"), "mode": "emit"},
            "tags": [new("tag")],
        }
        headers = {
            "Idempotency-Key": new("idempotency key"),
            "Cookie": f"session={new('cookie')}",
            "X-Secret": new("header"),
            "Baggage": f"user={new('baggage')}",
        }
        accepted = self._post(f"/v1/tasks?token={new('query')}", whole, headers=headers).raise_for_status().json()
        replayed = self._post("/v1/tasks", whole, headers=headers)
        assert replayed.headers["Idempotent-Replayed"] == "true"
        self._end(accepted["id"])
        eventually(lambda: len(self._mesh.gateway.rows("select id from tasks where type = 'orders.order.placed'")))
        batch = [{"type": "orders.order.place", "payload": {"name": new("batch")}}] * 3
        self._post("/v1/tasks:batchCreate", {"tasks": batch}).raise_for_status()
        for kind in ("value", "permanent", "statement", "retry", "result", "poison"):
            self._end(self._submit(f"orders.quotes.{kind}", secret=new(f"{kind} error")))

    def _requests_are_refused(self) -> None:
        new = self.canaries.new
        place = {"type": "orders.order.place", "payload": {"name": "Ada"}}
        taken = {"Idempotency-Key": new("taken idempotency key")}
        self._post("/v1/tasks", place, headers=taken).raise_for_status()
        bodies: list[tuple[Any, dict[str, str]]] = [
            (place | {"payload": {"name": [new("wrong type")]}}, {}),
            (place | {"payload": {"name": "Ada", "mode": new("no such choice")}}, {}),
            (place | {"payload": {"name": "Ada", "times": new("no number")}}, {}),
            (place | {"payload": new("no object")}, {}),
            (place | {"due_at": new("no time")}, {}),
            (place | {"payload": {"name": new("other request")}}, taken),
            (place, {"Authorization": f"Bearer tm_{uuid4().hex}_{new('wrong key')}"}),
            (place, {"Authorization": f"Basic {new('no key')}"}),
            (place, {"Idempotency-Key": new("long key") * 20}),
        ]
        for body, headers in bodies:
            self._refused(self._post("/v1/tasks", body, headers=headers))
        text = f'{{"type": "orders.order.place", "payload": {new("no JSON")}'
        self._refused(self._mesh.http.post("/v1/tasks", content=text, headers={"Content-Type": "application/json"}))
        for query in ("cursor", "created_after", "limit", "state"):
            self._refused(self._mesh.http.get("/v1/tasks", params={query: new(f"query {query}")}))

    def _refused(self, answer: httpx.Response) -> None:
        assert answer.is_client_error, (answer.request.content, answer.text)
        self.problems.append(f"{answer.headers}\n{answer.text}")

    def _messages_are_malformed(self) -> None:
        new = self.canaries.new
        good = {"lang": "py", "task": "orders.order.place", "id": str(uuid4())}
        messages: list[tuple[dict[str, Any], bytes]] = [
            (good, json.dumps(new("body that is text")).encode()),
            (good, new("body that is no JSON").encode()),
            (good, json.dumps([[], {"name": [new("broken contract")]}, {}]).encode()),
            (good | {"id": new("id")}, b"[[], {}, {}]"),
            (good | {"task": f"no type: {new('type')}"}, b"[[], {}, {}]"),
            (good | {"retries": new("retries")}, b"[[], {}, {}]"),
            (good | {"eta": new("eta")}, b"[[], {}, {}]"),
            (good | {"traceparent": new("traceparent")}, json.dumps([[], {"name": new("plain")}, {}]).encode()),
            (good | {"argsrepr": new("argsrepr"), "x-more": new("own header")}, b"{"),
            ({}, new("no headers").encode()),
        ]
        before = len(self._letters())
        with pika.BlockingConnection(pika.URLParameters(self._mesh.orders.amqp_url)) as connection:
            for headers, body in messages:
                mine = headers | ({"id": str(uuid4())} if headers.get("id") == good["id"] else {})
                properties = pika.BasicProperties(
                    headers=mine, content_type="application/json", content_encoding="utf-8"
                )
                connection.channel().basic_publish("taskmesh.commands", "orders.order.place", body, properties)
            report = json.dumps([{"task_id": new("report"), "state": new("state")}]).encode()
            connection.channel().basic_publish("taskmesh.lifecycle", "task.succeeded.orders", report)
            control = json.dumps({"kind": new("control kind"), "task_id": new("control")}).encode()
            connection.channel().basic_publish("taskmesh.direct", "orders.control", control)
        # The one whose traceparent is none is run all the same.
        eventually(lambda: len(self._letters()) >= before + len(messages) - 1 + 2)

    def _letters(self) -> list[dict[str, Any]]:
        return self._mesh.gateway.rows("select * from dead_letters")

    def _letters_are_replayed(self) -> None:
        new = self.canaries.new
        broken = self._mesh.orders.send("orders.order.place", name=[new("sent by plain Celery")])
        [letter] = eventually(lambda: self._mesh.gateway.letters(broken))
        url = f"/v1/dead-letters/{letter['id']}"
        self._refused(self._post(f"{url}:replay", {"payload": {"name": {"is": new("bad edit")}}}))
        edited = {"payload": {"name": new("good edit")}}
        self._end(self._post(f"{url}:replay", edited).raise_for_status().json()["task"]["id"])
        self._post("/v1/dead-letters:discard", {"filter": {}, "note": "done"}).raise_for_status()
        failed = self._submit("orders.quotes.value", secret=new("failed and retried"))
        self._end(failed)
        retried = self._post(f"/v1/tasks/{failed}:retry", {"payload": {"secret": new("retry's payload")}})
        self._end(retried.raise_for_status().json()["id"])

    def _a_task_is_cancelled(self) -> None:
        new = self.canaries.new
        task_id = self._submit("orders.quotes.hold", secret=new("held"))
        eventually(lambda: (task := self._mesh.gateway.task(task_id)) and task["state"] == "running")
        self._post(f"/v1/tasks/{task_id}:cancel", {"force": True, "reason": new("reason")}).raise_for_status()
        self._end(task_id)

    def _a_schedule_fires(self) -> None:
        new = self.canaries.new
        schedule = {
            "name": "soon",
            "type": "orders.order.place",
            "payload": {"name": new("schedule")},
            "tags": [new("tag of a schedule")],
            "interval_seconds": 1,
        }
        made = self._post("/v1/schedules", schedule).raise_for_status().json()["id"]
        statement = "select id from tasks where schedule_id = %s"
        [first, *_] = eventually(lambda: self._mesh.gateway.rows(statement, made))
        self._mesh.http.delete(f"/v1/schedules/{made}").raise_for_status()
        self._end(str(first["id"]))

    def _a_mail_is_refused(self) -> None:
        self._mesh.wait_until_announced("email.message.send")
        for answer in ("550 5.1.1", "451 4.3.0"):
            address = f"{self.canaries.new(f'address, {answer}')}@customer.example"
            subject, text = self.canaries.new(f"subject, {answer}"), self.canaries.new(f"text, {answer}")
            self._smtp.reply("RCPT", f"{answer} <{address}>: {self.canaries.new(f'reply, {answer}')}")
            payload = {"to": {"address": address, "name": self.canaries.new(f"name, {answer}")}}
            task_id = self._submit("email.message.send", **payload, subject=subject, text=text)
            eventually(lambda task_id=task_id: self._mesh.gateway.task(task_id)["state"] in {"failed", "retrying"})

    def _secrets_do_not_fit(self) -> None:
        """Processes whose database and broker are away, or whose settings are wrong, keep passwords to themselves."""
        new = self.canaries.new
        nowhere = {
            "TASKMESH_DATABASE_URL": f"postgresql://mesh:{new('database password')}@127.0.0.1:1/mesh",
            "TASKMESH_AMQP_URL": f"amqp://mesh:{new('broker password')}@127.0.0.1:1/mesh",
        }
        wrong = {"TASKMESH_DATABASE_URL": f"mysql://mesh:{new('wrong database url')}@127.0.0.1/mesh"}
        orders, gateway = self._mesh.orders.environment, self._mesh.gateway.environment
        failing = [
            self._fail(orders | nowhere, str(QUOTING), "relay"),
            self._fail(orders | nowhere, str(QUOTING), "worker"),
            self._fail(orders | wrong, str(QUOTING), "relay"),
            self._fail(gateway | nowhere, "-m", "gateway", "projector"),
            self._fail(gateway | nowhere, "-m", "gateway", "scheduler"),
            self._fail(gateway | wrong, "-m", "gateway", "relay"),
        ]
        try:
            for process, log in failing:
                eventually(
                    lambda process=process, log=log: process.poll() is not None or TROUBLE.search(log.read_text()),
                    seconds=180,
                    explain=log.read_text,
                )
        finally:
            for process, _ in failing:
                process.terminate()
            for process, _ in failing:
                process.wait(60)

    def _fail(self, environment: dict[str, str], *words: str) -> tuple[subprocess.Popen[bytes], Path]:
        log = self._mesh.orders.health / f"failing-{uuid4().hex}.log"
        with log.open("wb") as output:
            return subprocess.Popen([sys.executable, *words], env=environment, stdout=output, stderr=output), log


@dataclass
class EmailWorker:
    """The email service's processes, in the virtual host of a mesh."""

    environment: dict[str, str]
    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, role: str) -> None:
        with (self.folder / f"email-{role}.log").open("wb") as log:
            words = [sys.executable, "-m", "email_worker", role]
            self.processes.append(subprocess.Popen(words, env=self.environment, stdout=log, stderr=log))
        eventually((self.folder / f"email-{role}.ready").exists)

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(60)


@pytest.fixture(scope="module")
def aftermath(postgres: str, rabbitmq: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aftermath]:
    """Everything was sent, everything has ended, and every process has said its last."""
    folder = tmp_path_factory.mktemp("mesh")
    name = f"email_{uuid4().hex[:12]}"
    with (
        OtlpSink() as otlp,
        SmtpSink() as smtp,
        running_mesh(postgres, rabbitmq, folder, *ROLES, endpoint=otlp.endpoint, script=QUOTING, **QUICKLY) as mesh,
    ):
        environment = mesh.orders.environment | {
            "TASKMESH_DATABASE_URL": create_database(postgres, name),
            "TASKMESH_SMTP_URL": smtp.url,
            "TASKMESH_MAIL_DOMAIN": "mail.example.com",
            "TASKMESH_MAIL_FROM": "Example Ltd <billing@example.com>",
            "TASKMESH_OBJECT_STORE_URL": (folder / "objects").as_uri(),
        }
        subprocess.run([sys.executable, "-m", "email_worker", "setup"], env=environment, check=True)
        email = EmailWorker(environment, mesh.orders.health)
        story = Story(mesh, smtp)
        try:
            email.start("worker")
            email.start("relay")
            mesh.wait_until_announced("orders.quotes.value")
            story.tell()
            before = len(otlp.bodies["/v1/traces"])
            eventually(lambda: len(otlp.bodies["/v1/traces"]) > before)
        finally:
            email.stop()
        yield Aftermath(story.canaries, mesh, mesh.output(), otlp.bodies, story.problems)
    drop_database(postgres, name)


def test_no_log_line_has_a_secret(aftermath):
    """Of any process, also of libraries, on standard output and standard error."""
    key = aftermath.mesh.http.headers["Authorization"].rpartition("_")[2]

    assert {name: found for name, text in aftermath.logs.items() if (found := aftermath.canaries.found_in(text))} == {}
    assert not [name for name, text in aftermath.logs.items() if key in text]
    passwords = {urlsplit(url).password for url in (aftermath.mesh.orders.amqp_url, aftermath.mesh.orders.database_url)}
    for password in filter(lambda password: password and len(password) > 8, passwords):
        assert not [name for name, text in aftermath.logs.items() if password in text or quote(password) in text]
    for name in ("relay.log", "worker.log", "gateway-api.log", "gateway-projector.log", "gateway-scheduler.log"):
        assert aftermath.logs[name]


@pytest.mark.parametrize("path", ["/v1/traces", "/v1/metrics"])
def test_no_span_and_no_metric_has_a_secret(aftermath, path):
    """Neither in names nor in attributes, events, links, states or resources."""
    exported = b"\n".join(aftermath.bodies[path]).decode(errors="replace")

    assert aftermath.canaries.found_in(exported) == []
    assert aftermath.mesh.http.headers["Authorization"].rpartition("_")[2] not in exported


def test_no_problem_document_quotes_what_was_wrong(aftermath):
    """It says where, and what is asked for there."""
    assert {found for text in aftermath.problems for found in aftermath.canaries.found_in(text)} == set()
    assert len(aftermath.problems) > 10


@pytest.mark.parametrize("path", ["/v1/dead-letters", "/v1/dead-letters/groups"])
def test_no_list_of_dead_letters_shows_what_is_in_them(aftermath, path):
    """The page of a single one does, to who may read dead letters."""
    shown = aftermath.mesh.http.get(path, params={"limit": 200}).raise_for_status()

    assert aftermath.canaries.found_in(shown.text) == []
    assert len(shown.json()["items"]) > 3


def test_a_single_dead_letter_shows_its_body(aftermath):
    """Or nobody could mend it: so the words were there to be found."""
    items = aftermath.mesh.http.get("/v1/dead-letters", params={"limit": 200}).json()["items"]
    letters = [aftermath.mesh.http.get(f"/v1/dead-letters/{item['id']}").text for item in items]

    found = {place for letter in letters for place in aftermath.canaries.found_in(letter)}
    assert {"sent by plain Celery", "poison error", "no headers", "own header", "report"} <= found


def test_a_list_of_tasks_has_tags_and_no_idempotency_keys(aftermath):
    """Tags are there to find tasks by; a key is between its caller and the gateway."""
    page = aftermath.mesh.http.get("/v1/tasks", params={"limit": 200}).raise_for_status().text

    found = aftermath.canaries.found_in(page)
    assert {"tag", "tag of a schedule"} <= set(found)
    assert not [place for place in found if "idempotency" in place]
