"""Each request leaves one whole trace."""

from __future__ import annotations

from .conftest import Mesh


def test_every_request_of_the_demo_leaves_one_whole_trace(mesh: Mesh) -> None:
    """Those that are refused, too; by hand it is a thousand of them."""
    printed = mesh.run("thousand", "--requests", "60")

    assert "60 traces, each whole, 2 shapes" in " ".join(printed.split())
