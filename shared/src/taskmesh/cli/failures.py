"""What the command says and returns when something went wrong.

Exit codes are part of the interface: 0 all is well, 1 a task did not succeed, 2 the command was used wrongly, 3 the
gateway refused, 4 the gateway cannot be reached, 5 the waiting was over before the task was.
"""

from __future__ import annotations

from enum import IntEnum

from taskmesh.client import (
    ClientError,
    GatewayUnreachable,
    NotConfigured,
    TaskmeshProblem,
    Unauthenticated,
    UnknownType,
    WaitTimeout,
)

ERRORS_SHOWN = 10


class ExitCode(IntEnum):
    OK = 0
    TASK_FAILED = 1
    USAGE = 2
    REFUSED = 3
    UNREACHABLE = 4
    TIMEOUT = 5


class UsageError(Exception):
    """The command line, or a file it names, cannot be understood."""


def describe(error: ClientError | UsageError) -> tuple[ExitCode, list[str]]:
    """The exit code of an error, and the lines that tell what happened and what to do."""
    match error:
        case UsageError():
            return ExitCode.USAGE, [str(error)]
        case NotConfigured():
            return ExitCode.USAGE, [f"{error}. For the local mesh: `. .taskmesh/env`"]
        case WaitTimeout():
            return ExitCode.TIMEOUT, [f"{error}. It goes on: `taskmesh wait {error.task.id}`"]
        case TaskmeshProblem():
            return ExitCode.REFUSED, _describe_problem(error)
        case GatewayUnreachable():
            return ExitCode.UNREACHABLE, [str(error), "Is TASKMESH_URL right, and the mesh up? `make status` tells."]
    return ExitCode.UNREACHABLE, [str(error)]


def _describe_problem(problem: TaskmeshProblem) -> list[str]:
    lines = [f"{problem.detail} ({problem.code}, {problem.status})"]
    lines += [f"  {error.pointer or '/'}: {error.detail}" for error in problem.errors[:ERRORS_SHOWN]]
    if len(problem.errors) > ERRORS_SHOWN:
        lines.append(f"  and {len(problem.errors) - ERRORS_SHOWN} more")
    match problem:
        case UnknownType() if problem.nearest:
            lines.append(f"Did you mean {' or '.join(problem.nearest)}? `taskmesh types` shows all.")
        case UnknownType():
            lines.append("`taskmesh types` shows all.")
        case Unauthenticated():
            lines.append("Check TASKMESH_API_KEY.")
        case TaskmeshProblem() if problem.status >= 500 and problem.trace_id:
            lines.append(f"The gateway's operators find the reason under trace {problem.trace_id}.")
    return lines
