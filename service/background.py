"""Background tasks: one that dies is heard of."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog


def begin(work: Coroutine[Any, Any, None], name: str, *, vital: bool = True) -> "asyncio.Task[None]":
    """Start a task whose exception goes to the event loop's handler as soon as it is raised.

    The service cannot go on without a `vital` one: /readyz then tells so.
    """
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(lambda ended: _report(ended, vital=vital))
    return task


def _report(task: "asyncio.Task[None]", *, vital: bool) -> None:
    if task.cancelled() or (error := task.exception()) is None:
        return
    context = {"message": "a background task died", "exception": error, "task": task, "vital": vital}
    task.get_loop().call_exception_handler(context)


def listen(log: structlog.stdlib.BoundLogger, died: list[str]) -> None:
    """Log background tasks of the running loop that die, and add the names of the vital ones to `died`."""
    loop = asyncio.get_running_loop()

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "vital" not in context:
            loop.default_exception_handler(context)
            return
        name = context["task"].get_name()
        log.error("task_died", task=name, exc_info=context["exception"])
        if context["vital"] and name not in died:
            died.append(name)

    loop.set_exception_handler(handle)
