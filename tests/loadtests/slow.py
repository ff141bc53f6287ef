"""A small HTTP server that answers when it is told to, or as fast as it can serve: what generators are tested on."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

RESPONSE = "HTTP/1.1 {status} Any\r\ncontent-length: 2\r\nserver-timing: forward;dur=1.5, total;dur=2.25\r\n\r\n{{}}"


@dataclass
class SlowServer:
    """Answers every request with `status` once `gate` is open."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    status: int = 200
    url: str = ""
    bodies: list[bytes] = field(default_factory=list)  # in order of arrival
    headers: list[str] = field(default_factory=list)
    connections: set["asyncio.Task[None]"] = field(default_factory=set)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (connection := asyncio.current_task()) is not None:
            self.connections.add(connection)
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                length = next(
                    int(line.split(":")[1]) for line in head.splitlines() if line.lower().startswith("content-length")
                )
                self.headers.append(head.lower())
                self.bodies.append(await reader.readexactly(length))
                await self.gate.wait()
                writer.write(RESPONSE.format(status=self.status).encode())
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def slow_server() -> AsyncIterator[SlowServer]:
    slow = SlowServer()
    server = await asyncio.start_server(slow.answer, "127.0.0.1", 0)
    slow.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield slow
    finally:
        server.close()
        slow.gate.set()
        if slow.connections:  # they end with their clients, who have gone by now
            await asyncio.wait(slow.connections, timeout=5)
