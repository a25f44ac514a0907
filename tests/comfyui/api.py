"""ComfyUI's HTTP and websocket interface, as far as the tests need it. Every call has a time limit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import struct
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import safetensors.torch
import torch

from .server import ComfyServer

Json = Any
Prompt = dict[str, dict[str, Json]]
CALL_SECONDS = 60
SUCCESS, ERROR, INTERRUPTED = "execution_success", "execution_error", "execution_interrupted"
REJECTED = "rejected"
PREVIEW, TEXT = 1, 3  # kinds of binary messages


@dataclass
class Result:
    """What became of a queued prompt.

    Attributes:
        event: execution_success, execution_error, execution_interrupted; "rejected" when the server did not queue it.
        outputs: node id -> what it showed ({"images": [...]}, {"latents": [...]}, ...).
        node_errors: node id -> what is wrong with it, from the validation before the run.
        ran: node ids in the order they ran; `cached`: those that did not have to.
        error: data of the execution_error event, or of the refusal.
        progress: (node id, value, maximum) of every report.
        texts: (node id, text) of every text that a node showed while it ran.
        previews: number of preview pictures; `last_preview` the last one, as a JPEG or PNG file's bytes.
    """

    prompt_id: str = ""
    event: str = ""
    outputs: dict[str, Json] = field(default_factory=dict)
    node_errors: dict[str, Json] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    error: dict[str, Json] = field(default_factory=dict)
    progress: list[tuple[str, float, float]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    previews: int = 0
    last_preview: bytes = b""

    @property
    def error_text(self) -> str:
        """The message a user reads: of the exception, or of the validation of every node."""
        if "exception_message" in self.error:
            return self.error["exception_message"].strip()
        errors = [error for node in self.node_errors.values() for error in node["errors"]]
        return "\n".join(f"{error['message']}: {error['details']}" for error in [self.error, *errors] if error)


class Job:
    """A queued prompt and the websocket that follows it."""

    def __init__(self, client: Client, prompt: Prompt, extra: dict[str, Json]) -> None:
        self._client = client
        self._events = Events(client.server.url)
        self._finished = False
        self.result_so_far = Result()
        try:
            answer = client.post("/prompt", {"prompt": prompt, "client_id": self._events.client_id, **extra})
        except HttpError as error:
            self._finish(REJECTED)
            self.result_so_far.error = error.body.get("error", {})
            self.result_so_far.node_errors = error.body.get("node_errors", {})
            if error.status != 400:
                raise
        else:
            self.result_so_far.prompt_id = answer["prompt_id"]
            self.result_so_far.node_errors = answer["node_errors"]

    def wait_for(self, event: str, *, timeout: float = 120) -> Json:
        """Data of the next websocket event of that name ("executing", "progress", "preview", ...).

        Raises:
            AssertionError: the job ended, or `timeout` seconds passed, without it.
        """
        deadline = time.monotonic() + timeout
        while not self._finished:
            name, data = self._next(deadline)
            if name == event:
                return data
        raise AssertionError(f"the job ended with {self.result_so_far.event} and without {event}\n{self._log()}")

    def result(self, *, timeout: float = 120) -> Result:
        """Wait until the job has ended."""
        deadline = time.monotonic() + timeout
        while not self._finished:
            self._next(deadline)
        return self.result_so_far

    def _next(self, deadline: float) -> tuple[str, Json]:
        while time.monotonic() < deadline:
            self._client.server.check_alive()
            try:
                name, data = self._events.get(timeout=1)
            except queue.Empty:
                continue
            if name == "closed":
                self._finish(name)
                raise AssertionError(f"the websocket closed: {data}\n{self._log()}")
            self._note(name, data)
            return name, data
        self._finish("timeout")
        raise AssertionError(f"the job did not end in time; the log ends with\n{self._log()}")

    def _note(self, name: str, data: Json) -> None:
        result = self.result_so_far
        if name == "preview":
            result.previews += 1
            result.last_preview = data
        elif name == "text":
            result.texts.append(data)
        elif name == "executing" and data["node"] is not None:
            result.ran.append(data["node"])
        elif name == "execution_cached":
            result.cached += data["nodes"]
        elif name == "executed":
            result.outputs[data["node"]] = data["output"]
        elif name == "progress":
            result.progress.append((data["node"], data["value"], data["max"]))
        elif name in (SUCCESS, ERROR, INTERRUPTED):
            result.error = data if name == ERROR else {}
            self._finish(name)

    def close(self) -> None:
        """Stop following the job; it goes on."""
        self._events.close()

    def _finish(self, event: str) -> None:
        self._finished = True
        self.result_so_far.event = event
        self.close()

    def _log(self) -> str:
        return self._client.server.log_tail()


class Client:
    """Calls to one server. A prompt is the API form: node id -> {"class_type": ..., "inputs": {...}}."""

    def __init__(self, server: ComfyServer) -> None:
        self.server = server

    def submit(self, prompt: Prompt, *, workflow: Json = None) -> Job:
        """Queue a prompt and return at once. `workflow` (the UI form) is written into what the job saves."""
        return Job(self, prompt, {"extra_data": {"extra_pnginfo": {"workflow": workflow}}} if workflow else {})

    def queue(
        self, prompt: Prompt, *, timeout: float = 120, allow_node_errors: bool = False, workflow: Json = None
    ) -> Result:
        """Queue a prompt and wait for its end, whatever that is.

        Raises:
            AssertionError: a node's inputs are wrong (unless allowed), or the job did not end in time.
        """
        job = self.submit(prompt, workflow=workflow)
        start = job.result_so_far
        try:
            assert allow_node_errors or (start.event != REJECTED and start.node_errors == {}), start.error_text
            return job.result(timeout=timeout)
        finally:
            job.close()

    def run(self, prompt: Prompt, *, timeout: float = 120, workflow: Json = None) -> Result:
        """As `queue`, and the job must succeed."""
        result = self.queue(prompt, timeout=timeout, workflow=workflow)
        assert result.event == SUCCESS, f"{result.event}: {result.error_text}\n{self.server.log_tail()}"
        return result

    def object_info(self, node: str | None = None) -> dict[str, Json]:
        """Node id -> its inputs and outputs, of one node or of all."""
        return self.get(f"/object_info/{node}" if node else "/object_info")

    def interrupt(self) -> None:
        """Stop what runs now."""
        self.post("/interrupt", {})

    def free(self) -> None:
        """Ask for models to be unloaded and caches to be dropped; happens soon after, when nothing runs."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def history(self, prompt_id: str) -> dict[str, Json]:
        """The record of a finished job (prompt, outputs, status). It is written just after the terminal event."""
        found: dict[str, Json] = {}

        def written() -> bool:
            found.update(self.get(f"/history/{prompt_id}"))
            return prompt_id in found

        wait_until(written, f"history of {prompt_id}")
        return found[prompt_id]

    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return self.get("/prompt")["exec_info"]["queue_remaining"] == 0

    def view(self, file: dict[str, str]) -> bytes:
        """The bytes of an output: an entry of Result.outputs[node]["images"], ["latents"], ..."""
        names = {name: file[name] for name in ("filename", "subfolder", "type")}
        return self._call(urllib.request.Request(f"{self.server.url}/view?{urllib.parse.urlencode(names)}"))

    def latents(self, result: Result, node: str) -> torch.Tensor:
        """What a stock SaveLatent node saved."""
        (file,) = result.outputs[node]["latents"]
        return safetensors.torch.load(self.view(file))["latent_tensor"]

    def upload_image(self, picture: Path, name: str | None = None) -> str:
        """Put a file into ComfyUI's input folder; returns the name by which nodes find it."""
        boundary = uuid.uuid4().hex
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name or picture.name}"\r\n\r\n'
        )
        body = head.encode() + picture.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        content = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        answer = self._call(urllib.request.Request(f"{self.server.url}/upload/image", body, content))
        return json.loads(answer)["name"]

    def system_stats(self) -> dict[str, Json]:
        """Versions, devices and memory as ComfyUI sees them."""
        return self.get("/system_stats")

    def rss(self) -> int:
        """Memory of the server process in bytes."""
        return self.server.rss()

    def get(self, path: str) -> Json:
        """GET, as JSON."""
        return json.loads(self._call(urllib.request.Request(self.server.url + path)))

    def post(self, path: str, body: Json) -> Json:
        """POST JSON; returns JSON, or None where the answer is empty.

        Raises:
            HttpError: the status is not 200.
        """
        request = urllib.request.Request(
            self.server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = self._call(request)
        return json.loads(answer) if answer else None

    def _call(self, request: urllib.request.Request) -> bytes:
        self.server.check_alive()
        try:
            with urllib.request.urlopen(request, timeout=CALL_SECONDS) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise HttpError(error.code, error.read()) from None


class HttpError(AssertionError):
    """The server answered with an error; `body` is its JSON, {} where it is none."""

    def __init__(self, status: int, content: bytes) -> None:
        super().__init__(f"{status}: {content[:2000]!r}")
        self.status = status
        try:
            self.body: dict[str, Json] = json.loads(content)
        except ValueError:
            self.body = {}


class Events:
    """A websocket with an id of its own, read by a thread into a queue. ComfyUI sends a job's events to its id."""

    def __init__(self, url: str) -> None:
        self.client_id = uuid.uuid4().hex
        self._url = f"{url}/ws?clientId={self.client_id}"
        self._events: queue.Queue[tuple[str, Json]] = queue.Queue()
        self._open = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._reader = self._loop.create_task(self._read())
        threading.Thread(target=self._run, daemon=True).start()
        if not self._open.wait(CALL_SECONDS):
            raise AssertionError(f"no websocket within {CALL_SECONDS} s")

    def get(self, *, timeout: float) -> tuple[str, Json]:
        """The next event; queue.Empty when none comes."""
        return self._events.get(timeout=timeout)

    def close(self) -> None:
        """Close the socket; its thread ends."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._reader.cancel)

    def _run(self) -> None:
        with contextlib.closing(self._loop), contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._reader)

    async def _read(self) -> None:
        try:
            timeout = aiohttp.ClientTimeout(total=None, connect=CALL_SECONDS)
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.ws_connect(self._url, max_msg_size=0) as socket,
            ):
                await self._receive(socket)
        except (aiohttp.ClientError, OSError) as error:
            self._events.put(("closed", str(error)))
        finally:
            self._open.set()

    async def _receive(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            if message.type == aiohttp.WSMsgType.TEXT:
                event = json.loads(message.data)
                self._open.set()  # the first message is the server's greeting: from here on nothing is missed
                self._events.put((event["type"], event["data"]))
            elif message.type == aiohttp.WSMsgType.BINARY:
                self._put_binary(message.data)
        self._events.put(("closed", "by the server"))

    def _put_binary(self, message: bytes) -> None:
        kind, second = struct.unpack(">II", message[:8])
        if kind == PREVIEW:  # second: JPEG or PNG
            self._events.put(("preview", message[8:]))
        elif kind == TEXT:  # second: length of the node's id
            node, text = message[8 : 8 + second], message[8 + second :]
            self._events.put(("text", (node.decode(), text.decode())))


def wait_until(condition: Callable[[], bool], what: str, *, timeout: float = 30) -> None:
    """Ask every 50 ms until it is true; AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s for {what}")
        time.sleep(0.05)
