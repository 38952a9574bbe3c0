"""The object store: bytes that are too large for a message, kept under their own SHA-256.

An object's name is its content, so storing it twice is harmless, nothing is ever changed in place, and whoever reads
it can tell whether it is still what was written. A local folder by default; anything that speaks S3 by its URL.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn
from urllib.parse import parse_qs, unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, S3Store
from pydantic import AfterValidator, SecretStr

from taskmesh.errors import NotFound, ObjectStoreUnavailable, PermanentError

MAX_BYTES = 25 * 1024 * 1024
"""The default limit of one object: above what most mail servers take as an attachment."""

SHA256 = re.compile(r"[0-9a-f]{64}")

S3_OPTIONS = frozenset({"endpoint", "region", "virtual_hosted_style_request"})


class ObjectCorrupt(PermanentError):
    """The stored bytes are not those that were put: the store, or somebody in it, has changed them."""

    code: ClassVar[str] = "object_corrupt"


class ObjectTooLarge(PermanentError):
    """The object is larger than this store takes."""

    code: ClassVar[str] = "object_too_large"


@dataclass(frozen=True, slots=True)
class StoredObject:
    """The reference that travels in messages in place of the bytes."""

    sha256: str
    size_bytes: int


class ObjectStore:
    """Puts and gets whole objects by their SHA-256; safe to share between threads, not across a fork.

    The client runs threads of its own that do not survive a fork: open the store in the process that uses it.
    """

    def __init__(self, store: LocalStore | S3Store, *, max_bytes: int = MAX_BYTES) -> None:
        self._store = store
        self._max_bytes = max_bytes
        # A folder has nowhere to keep a media type.
        self._keeps_media_type = not isinstance(store, LocalStore)

    @classmethod
    def open(cls, url: SecretStr | str, *, max_bytes: int = MAX_BYTES) -> ObjectStore:
        """Open the store that a URL names; nothing is contacted yet, but a local folder is created.

        Args:
            url: `file:///absolute/folder`, or `s3://bucket/prefix?endpoint=...&region=...`. S3 credentials are the
                URL's user and password, or else what AWS clients look for: environment, web identity, metadata.
            max_bytes: Larger objects are refused, both ways.

        Raises:
            ValueError: The URL is of another kind; see `StoreUrl`.
            ObjectStoreUnavailable: The folder cannot be made.
        """
        plain = url.get_secret_value() if isinstance(url, SecretStr) else url
        check_url(plain)
        if plain.startswith("s3:"):
            return cls(_s3(plain), max_bytes=max_bytes)
        folder = Path(unquote(urlsplit(plain).path))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return cls(LocalStore(folder), max_bytes=max_bytes)
        except (BaseError, OSError) as error:
            raise ObjectStoreUnavailable(f"cannot open the object store's folder: {type(error).__name__}") from error

    def put(self, data: bytes, media_type: str) -> StoredObject:
        """Store the bytes, and return what they are called. Repeating it changes nothing, and heals a damaged copy.

        Raises:
            ObjectTooLarge: There are more bytes than the limit.
            ObjectStoreUnavailable: The store could not be reached, or refused.
        """
        if len(data) > self._max_bytes:
            raise ObjectTooLarge(f"object of {len(data)} bytes is larger than the limit of {self._max_bytes}")
        sha256 = hashlib.sha256(data).hexdigest()
        attributes = {"Content-Type": media_type} if self._keeps_media_type else None
        try:
            obstore.put(self._store, _path(sha256), data, attributes=attributes, use_multipart=False)
        except (BaseError, OSError) as error:
            _unavailable("put", sha256, error)
        return StoredObject(sha256=sha256, size_bytes=len(data))

    def get(self, sha256: str) -> bytes:
        """The bytes of that name, proven to be those that were put.

        Raises:
            NotFound: There is no such object.
            ObjectCorrupt: The bytes do not have that hash.
            ObjectTooLarge: There are more bytes than the limit; they were not read.
            ObjectStoreUnavailable: The store could not be reached, or refused.
        """
        if not SHA256.fullmatch(sha256):
            raise NotFound("an object's name is 64 lower-case hexadecimal digits")
        try:
            answer = obstore.get(self._store, _path(sha256))
            if answer.meta["size"] > self._max_bytes:
                raise ObjectTooLarge(f"object {sha256} is larger than the limit of {self._max_bytes} bytes")
            data = bytes(answer.bytes())
        except FileNotFoundError as error:
            raise NotFound(f"object {sha256} is not in the store") from error
        except (BaseError, OSError) as error:
            _unavailable("get", sha256, error)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ObjectCorrupt(f"object {sha256} was changed after it was stored")
        return data


def _path(sha256: str) -> str:
    # Two levels, so that no folder of a local store grows beyond what file systems and people like.
    return f"{sha256[:2]}/{sha256[2:4]}/{sha256}"


def _unavailable(verb: str, sha256: str, error: Exception) -> NoReturn:
    # Refused credentials are here too: a person mends them, and the work waits meanwhile.
    # The library's own message may quote the URL and its credentials, so only its class is passed on.
    raise ObjectStoreUnavailable(f"could not {verb} object {sha256}: {type(error).__name__}") from error


def check_url(url: str) -> None:
    """Refuse what names no object store.

    Raises:
        ValueError: With what is wrong, without the URL, which may hold credentials.
    """
    parts = urlsplit(url)
    match parts.scheme:
        case "file":
            if parts.netloc not in {"", "localhost"} or not parts.path.startswith("/"):
                raise ValueError("an object store in a folder reads file:///absolute/path")
        case "s3":
            if not parts.hostname:
                raise ValueError("an object store in S3 reads s3://bucket/prefix?endpoint=...&region=...")
            unknown = sorted(parse_qs(parts.query).keys() - S3_OPTIONS)
            if unknown:
                raise ValueError(f"unknown S3 option {', '.join(unknown)}; there are {', '.join(sorted(S3_OPTIONS))}")
        case _:
            raise ValueError("an object store URL starts with file:// or s3://")


def _checked(url: SecretStr) -> SecretStr:
    check_url(url.get_secret_value())
    return url


StoreUrl = Annotated[SecretStr, AfterValidator(_checked)]
"""The type of a setting that names an object store: a wrong one stops the process at start."""


def _s3(url: str) -> S3Store:
    parts = urlsplit(url)
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    config: dict[str, Any] = dict(options)
    if parts.username and parts.password:
        config["access_key_id"] = unquote(parts.username)
        config["secret_access_key"] = unquote(parts.password)
    return S3Store(
        parts.hostname or "",
        prefix=parts.path.strip("/") or None,
        # Retries over minutes are the task's; the client only rides out a hiccup.
        client_options={
            "allow_http": options.get("endpoint", "").startswith("http://"),
            "timeout": "30s",
            "connect_timeout": "5s",
        },
        retry_config={"max_retries": 2},
        config=config,  # type: ignore[arg-type]  # a TypedDict whose keys are only known at run time
    )
