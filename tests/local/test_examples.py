"""The console examples of docs/scaling.md: what they print, and the pictures they draw, are those of this code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from taskmesh_local import examples

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scaling.md"


@pytest.mark.parametrize("example", examples.examples(PAGE), ids=lambda example: example.command.partition("|")[0][14:])
def test_the_page_shows_what_the_command_prints_and_draws(example, tmp_path):
    """`make scaling` mends the page and its pictures."""
    (tmp_path / "docs" / "scaling").mkdir(parents=True)

    printed = examples.run(example.command, tmp_path)

    assert printed == example.output
    for picture in re.findall(r"--plot (\S+)", example.command):
        assert (tmp_path / picture).read_text() == (ROOT / picture).read_text()


def test_every_picture_is_on_the_page():
    """None is left behind by an example that is gone, and none is too large to be kept with the code."""
    for picture in (ROOT / "docs" / "scaling").iterdir():
        assert f"](scaling/{picture.name})" in PAGE.read_text()
        assert picture.stat().st_size < 25_000


def test_a_page_gets_the_output_of_its_examples(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n```console\n$ echo one; \\\n  echo two\nold\n```\n\n```sh\n$ echo untouched\n```\n")

    examples.rewrite(page, tmp_path)

    assert page.read_text() == (
        "Before.\n\n```console\n$ echo one; \\\n  echo two\none\ntwo\n```\n\n```sh\n$ echo untouched\n```\n"
    )
