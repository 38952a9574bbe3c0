"""The demo against a small mesh made of one HTTP server: gateway, inbox and trace page."""

from __future__ import annotations

import itertools
import json
import re
import threading
import unicodedata
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import UUID

import pytest
from rich.cells import cell_len

from gateway.payloads import PayloadValidator
from taskmesh.contracts.billing import IssueInvoice
from taskmesh_local import demo, demo_invoices

NOW = "2026-11-22T10:00:00Z"


class SmallMesh:
    """Carries every invoice out at once, but for what a test breaks."""

    def __init__(self):
        self.url = ""
        self.keys = []
        self.broken_type = None
        self.lost_mails = 0
        self.second_mails = 0
        self.lenient = False
        self.attachments = [{"media_type": "application/pdf", "size_bytes": 1000}]
        self.outages = 0
        self._ids = (str(UUID(int=number)) for number in itertools.count(1))
        self._tasks = []
        self._mails = []
        self._validator = PayloadValidator(IssueInvoice.model_json_schema())

    def submit(self, key, body):
        errors = self._validator.errors(body["payload"])
        if errors and not self.lenient:
            problem = {"status": 422, "code": "contract_violation", "errors": [vars(error) for error in errors]}
            return 422, problem
        self.keys.append(key)
        number = f"INV-2026-{len(self.keys):06d}"
        total = {"amount_minor": 119000, "currency": "EUR"}
        root = self._add("billing.invoice.issue", None, {"number": number, "total": total})
        self._add("billing.document.render", root["id"], {})
        mailing = self._add("billing.document.ready", root["id"], None)
        mailing["result"] = {"message_id": mailing["id"]}
        mail = {
            "message_id": f"<{mailing['id']}.invoice@taskmesh.example>",
            "attachments": self.attachments,
        }
        self._mails += [mail] * (1 + (len(self.keys) <= self.second_mails)) * (len(self.keys) > self.lost_mails)
        return 202, {**root, "state": "queued"}

    def answer(self, method, path, key, body):
        if self.outages:
            self.outages -= 1
            return 503, {}
        match method, path:
            case "POST", "/v1/tasks":
                return self.submit(key, body)
            case "GET", "/v1/tasks":
                return 200, {"items": self._tasks, "next_cursor": None}
            case "GET", "/api/messages":
                return 200, {"items": self._mails}
            case _:
                number = int(path.rpartition("/")[2], 16)
                whole = {"orphans": 0, "services": ["gateway", "email-worker"], "duration_ms": float(number)}
                return 200, {**whole, "trace_id": path.rpartition("/")[2]}

    def _add(self, type_name, root_id, result):
        task_id = next(self._ids)
        failed = type_name == self.broken_type
        self._tasks.append(
            {
                "id": task_id,
                "type": type_name,
                "state": "failed" if failed else "succeeded",
                "error": {"code": "rejected", "message": "the press is broken"} if failed else None,
                "result": result,
                "root_id": root_id or task_id,
                "created_at": NOW,
                "trace_id": f"{UUID(task_id).int:032x}",
            }
        )
        return self._tasks[-1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    mesh: SmallMesh

    def handle_any(self):
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        body = json.loads(content) if content else None
        path = self.path.partition("?")[0]
        status, answer = self.mesh.answer(self.command, path, self.headers.get("idempotency-key"), body)
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if status < 400 else "application/problem+json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = handle_any  # noqa: N815 - the names http.server looks for

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def mesh(monkeypatch):
    small = SmallMesh()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"mesh": small}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    small.url = f"http://127.0.0.1:{server.server_port}"
    for name in ("TASKMESH_URL", "TASKMESH_INBOX_URL", "TASKMESH_TRACES_URL"):
        monkeypatch.setenv(name, small.url)
    monkeypatch.setenv("TASKMESH_API_KEY", "key")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(demo, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(demo, "TRACES_SECONDS", 0.1)
    yield small
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_summary_tells_numbers_refusals_and_the_slowest_trace(mesh, capsys):
    code = demo.main([])

    out = capsys.readouterr().out
    assert code == 0
    assert "30 submitted, 27 issued, 27 rendered, 27 mailed" in out
    assert "INV-2026-000027" in out
    assert "株式会社さくら物流" in out
    assert "27 invoices and 27 mails" in out
    for pointer in ("/payload/currency", "/payload/lines/0/unit_price", "/payload/buyer/email is required"):
        assert pointer in out
    assert f"{mesh.url}/traces/{27 * 3 - 2:032x}" in out


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_table_of_invoices_fits_the_terminal_and_keeps_every_column(mesh, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert demo.main([]) == 0

    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out).splitlines()
    [heading] = [line for line in lines if "INVOICE" in line]
    rows = [line for line in lines if line.startswith("INV-")]
    assert heading.split() == ["INVOICE", "CUSTOMER", "LINES", "TOTAL", "MAIL", "TO"]
    assert len(rows) == 27
    assert all(row.rstrip().endswith((".example", "…")) for row in rows)
    assert {cell_len(row) for row in rows} == {cell_len(heading)}
    assert cell_len(heading) <= width


def test_each_run_has_keys_of_its_own(mesh, capsys):
    assert demo.main([]) == 0
    assert demo.main([]) == 0

    assert len(set(mesh.keys)) == 54


def test_a_mesh_that_stumbles_only_takes_longer(mesh, capsys):
    mesh.outages = 3

    assert demo.main([]) == 0
    assert len(mesh.keys) == 27


def test_a_failed_task_ends_the_demo_with_its_reason(mesh, capsys):
    mesh.broken_type = "billing.document.render"

    code = demo.main([])

    assert code == 1
    assert (
        "billing.document.render of Bäckerei Grünwald & Söhne GmbH failed: the press is broken"
        in capsys.readouterr().err
    )


def test_a_mail_that_does_not_come_ends_the_demo_in_time(mesh, capsys):
    mesh.lost_mails = 2

    code = demo.main(["--timeout", "0.3"])

    assert code == 1
    assert "2 of 27 invoices were not mailed within 0.3 s; the first waits for its mail" in capsys.readouterr().err


def test_a_mail_that_was_sent_again_is_told_of(mesh, capsys):
    mesh.second_mails = 1

    assert demo.main([]) == 0
    out = capsys.readouterr().out
    assert "27 invoices and 28 mails" in out
    assert "Sent again under the same Message-ID, as a mail program can tell: INV-2026-000001" in out


def test_a_mail_without_its_document_is_a_failure(mesh, capsys):
    mesh.attachments = []

    assert demo.main([]) == 1
    assert "the mail of invoice INV-2026-000001 is without its document" in capsys.readouterr().err


def test_a_bad_invoice_that_is_accepted_is_a_failure(mesh, capsys):
    mesh.lenient = True

    assert demo.main([]) == 1
    assert "not refused as it should be: a currency that does not exist" in capsys.readouterr().err


def test_a_mesh_that_was_never_started_is_told_of(monkeypatch, capsys):
    monkeypatch.delenv("TASKMESH_URL", raising=False)

    assert demo.main([]) == 2
    assert "TASKMESH_URL is not set: start the mesh with `make up`" in capsys.readouterr().err


def test_the_good_invoices_are_varied_and_always_the_same():
    invoices = demo_invoices.good()

    assert invoices == demo_invoices.good()
    assert len(invoices) == 27
    assert {invoice.currency for invoice in invoices} == {"EUR", "JPY", "BHD"}
    assert [len(invoice.lines) for invoice in invoices if len(invoice.lines) > 10] == [300]
    scripts = {unicodedata.name(invoice.buyer.name[-1]).split()[0] for invoice in invoices}
    assert {"LATIN", "GREEK", "CJK", "ARABIC"} <= scripts
    assert len({invoice.buyer.email for invoice in invoices}) == 27
    assert len({(line.tax.category, line.tax.rate) for invoice in invoices for line in invoice.lines}) >= 12


def test_the_schema_takes_each_good_invoice_and_points_at_each_mistake():
    validator = PayloadValidator(IssueInvoice.model_json_schema())

    assert [validator.errors(invoice.payload()) for invoice in demo_invoices.good()] == [[]] * 27
    for mistake in demo_invoices.bad():
        assert [error.pointer for error in validator.errors(mistake.payload)] == [mistake.pointer]
