"""llama.cpp's own server (xllamacpp) on a GGUF, in a child process: what applications will talk to.

with llama_server(Path("model.gguf"), Path("llama.log")) as server:
    server.post("/apply-template", messages=[...]); OpenAI(base_url=server.url + "/v1", api_key=server.key)
"""

import json
import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tasks.core.errors import GateFailed
from tasks.engine.llama import last_words, llama_environment


class Server(NamedTuple):
    """A running server, reached on this host only, with a random key."""

    url: str
    key: str
    log: Path

    def post(self, route: str, **body: Any) -> dict[str, Any]:
        """The JSON answer; raises GateFailed with the server's words."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(self.url + route, json.dumps(body).encode(), headers)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
                answer: dict[str, Any] = json.load(response)
        except (urllib.error.URLError, ConnectionError) as error:
            said = error.read().decode() if isinstance(error, urllib.error.HTTPError) else last_words(self.log)
            raise GateFailed(f"llama.cpp's server did not answer {route} ({error}): {said}") from error
        return answer


@contextmanager
def llama_server(gguf: Path, log: Path, context: int = 2048) -> Iterator[Server]:
    """A server for one conversation of `context` tokens at a time. Raises GateFailed when it cannot load the file."""
    settings = {"gguf": str(gguf), "context": context, "key": secrets.token_hex(16)}
    with log.open("a") as messages:
        child = subprocess.Popen(
            [sys.executable, "-m", "tasks.gguf.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            env=llama_environment(),
        )
    assert child.stdin and child.stdout
    try:
        child.stdin.write(json.dumps(settings).encode() + b"\n")
        child.stdin.flush()
        url = child.stdout.readline().decode().strip()
        if not url:
            raise GateFailed(f"llama.cpp's server could not load {gguf.name}: {last_words(log)}")
        yield Server(url, str(settings["key"]), log)
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def _serve() -> None:
    """The child: settings as a JSON line on stdin, the server's URL on stdout; it lives until stdin closes."""
    import xllamacpp  # noqa: PLC0415 - the parent must not load llama.cpp

    url = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints goes to the log
    settings = json.loads(sys.stdin.readline())
    params = xllamacpp.CommonParams()
    params.model.path = settings["gguf"]
    params.api_keys = [settings["key"]]
    params.n_parallel, params.n_ctx = 1, settings["context"]
    params.use_jinja = True
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = max(1, len(os.sched_getaffinity(0)) // 2)
    params.n_ctx_checkpoints = params.cache_ram_mib = 0
    params.fit_params = params.warmup = params.ui = params.endpoint_slots = False
    server = xllamacpp.Server(params)
    url.write(server.listening_address + "\n")
    url.flush()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve()
