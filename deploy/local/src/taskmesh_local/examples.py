"""`python -m taskmesh_local examples PAGE`: runs the console examples of a page, and writes what they print into it.

An example is a fenced block of `console` that begins with `$ command`; what follows in the block is its output.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

BLOCK = re.compile(r"```console\n\$ (?P<command>(?:[^\n]*\\\n)*[^\n]*)\n(?P<output>.*?)```", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Example:
    command: str
    output: str


def examples(page: Path) -> list[Example]:
    """The examples of a page, in their order."""
    return [Example(found["command"], found["output"]) for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def run(command: str, folder: Path) -> str:
    """What a command prints in this folder, with the programs of this Python's environment; errors, too."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout


def rewrite(page: Path, folder: Path) -> None:
    """Run every example of the page in this folder, and replace its output."""
    text = BLOCK.sub(
        lambda found: f"```console\n$ {found['command']}\n{run(found['command'], folder)}```",
        page.read_text(encoding="utf-8"),
    )
    page.write_text(text, encoding="utf-8")


def main(words: Sequence[str], console: Console) -> int:
    """Rewrite the pages that are named."""
    if not words:
        console.print("usage: python -m taskmesh_local examples PAGE ...", highlight=False)
        return 2
    for word in words:
        rewrite(Path(word), Path.cwd())
    return 0
