"""The object store: a real folder, and an S3 double that speaks enough of the protocol."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from taskmesh.errors import NotFound, ObjectStoreUnavailable
from taskmesh.objects import ObjectCorrupt, ObjectStore, ObjectTooLarge

PDF = "application/pdf"


class S3Double(ThreadingHTTPServer):
    """Keeps what is PUT, gives it back on GET, and can be told to answer with a status."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), S3Requests)
        self.kept: dict[str, tuple[bytes, str | None]] = {}
        self.status = 200

    @property
    def url(self) -> str:
        port = self.server_address[1]
        return f"s3://key:secret@invoices/demo?endpoint=http://127.0.0.1:{port}&region=eu-central-1"


class S3Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3Double

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.status == 200:
            self.server.kept[self.path] = (body, self.headers["Content-Type"])
        self._answer(self.server.status, b"")

    def do_GET(self) -> None:
        if self.server.status != 200:
            self._answer(self.server.status, b"")
        elif self.path in self.server.kept:
            self._answer(200, self.server.kept[self.path][0])
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Sun, 01 Mar 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "not there yet" / "objects"


@pytest.fixture
def store(folder: Path) -> ObjectStore:
    return ObjectStore.open(folder.as_uri())


@pytest.fixture
def s3() -> Iterator[S3Double]:
    with S3Double() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@given(data=st.binary(max_size=5000))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_put_is_got(store: ObjectStore, data: bytes) -> None:
    stored = store.put(data, PDF)

    assert stored.size_bytes == len(data)
    assert stored.sha256 == hashlib.sha256(data).hexdigest()
    assert store.get(stored.sha256) == data


def test_an_object_is_filed_under_its_hash_once(store: ObjectStore, folder: Path) -> None:
    first, second = store.put(b"same", PDF), store.put(b"same", PDF)

    assert first == second
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert files == [Path(first.sha256[:2], first.sha256[2:4], first.sha256)]


def test_a_changed_object_is_not_handed_out_and_putting_it_again_heals_it(store: ObjectStore, folder: Path) -> None:
    stored = store.put(b"as it was", PDF)
    (folder / stored.sha256[:2] / stored.sha256[2:4] / stored.sha256).write_bytes(b"as it is not")

    with pytest.raises(ObjectCorrupt) as caught:
        store.get(stored.sha256)

    assert caught.value.code == "object_corrupt"
    store.put(b"as it was", PDF)
    assert store.get(stored.sha256) == b"as it was"


@pytest.mark.parametrize("name", ["0" * 64, "nonsense", "../../../etc/passwd", ""])
def test_an_unknown_name_is_not_found(store: ObjectStore, name: str) -> None:
    with pytest.raises(NotFound):
        store.get(name)


def test_the_limit_holds_both_ways(store: ObjectStore, folder: Path) -> None:
    small = ObjectStore.open(folder.as_uri(), max_bytes=10)
    stored = store.put(b"x" * 11, PDF)

    with pytest.raises(ObjectTooLarge):
        small.put(b"x" * 11, PDF)
    with pytest.raises(ObjectTooLarge):
        small.get(stored.sha256)


def test_a_folder_that_cannot_be_written_is_unavailable(store: ObjectStore, folder: Path) -> None:
    folder.rmdir()
    folder.write_text("a file stands where the folder was")

    with pytest.raises(ObjectStoreUnavailable):
        store.put(b"x", PDF)


def test_a_folder_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(ObjectStoreUnavailable):
        ObjectStore.open((tmp_path / "file" / "objects").as_uri())


def test_s3_keeps_objects_under_the_prefix_with_their_media_type(s3: S3Double) -> None:
    store = ObjectStore.open(SecretStr(s3.url))

    stored = store.put(b"%PDF", PDF)

    path = f"/invoices/demo/{stored.sha256[:2]}/{stored.sha256[2:4]}/{stored.sha256}"
    assert s3.kept == {path: (b"%PDF", PDF)}
    assert store.get(stored.sha256) == b"%PDF"
    with pytest.raises(NotFound):
        store.get("0" * 64)


@pytest.mark.parametrize("status", [403, 500])
def test_an_s3_that_refuses_or_fails_is_unavailable(s3: S3Double, status: int) -> None:
    s3.status = status
    store = ObjectStore.open(s3.url)

    with pytest.raises(ObjectStoreUnavailable) as put:
        store.put(b"x", PDF)
    with pytest.raises(ObjectStoreUnavailable):
        store.get("0" * 64)

    assert "secret" not in str(put.value)


@pytest.mark.parametrize(
    "url", ["ftp://host/x", "relative/path", "file://host/x", "s3:///prefix", "s3://bucket?endpiont=http://x"]
)
def test_a_url_that_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        ObjectStore.open(url)
