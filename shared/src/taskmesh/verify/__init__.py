"""Which tasks of a worker service are not idempotent: each is delivered twice in a sandbox, and its effects compared.

The ways in which a second delivery really happens: the acknowledgement was lost after the commit; the process died
right before its last commit; the connection was lost in mid-task, so that two copies run at once. docs/verify.md says
how a team points this at its own worker, and what a verdict means.
"""

from __future__ import annotations
