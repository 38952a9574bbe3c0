"""Where the gateway is, and who is asking."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

import httpx

from taskmesh.client.problems import NotConfigured

URL_VARIABLE = "TASKMESH_URL"
API_KEY_VARIABLE = "TASKMESH_API_KEY"
SCHEMES = ("http://", "https://")


def address(http: httpx.Client | httpx.AsyncClient, url: str, api_key: str) -> None:
    """Point an HTTP client at a gateway, under an API key."""
    if not url.startswith(SCHEMES):
        raise ValueError("the gateway's address must start with http:// or https://")
    http.base_url = httpx.URL(url)
    http.headers["Authorization"] = f"Bearer {api_key}"
    http.headers["User-Agent"] = f"taskmesh-python/{_release()}"


def from_environment() -> tuple[str, str]:
    """The address and the API key that the environment names.

    Raises:
        NotConfigured: One of them is missing or wrong.
    """
    for variable in (URL_VARIABLE, API_KEY_VARIABLE):
        if not os.environ.get(variable):
            raise NotConfigured(f"{variable} is not set")
    url = os.environ[URL_VARIABLE]
    if not url.startswith(SCHEMES):
        raise NotConfigured(f"{URL_VARIABLE} must start with http:// or https://")
    return url, os.environ[API_KEY_VARIABLE]


def _release() -> str:
    try:
        return version("taskmesh")
    except PackageNotFoundError:
        return "unknown"
