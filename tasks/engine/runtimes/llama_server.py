"""llama.cpp's own server (xllamacpp) on a GGUF, in a child process: it is loud, and ends itself on what it dislikes.

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
from tasks.engine.runtimes.llama_logits import last_words, llama_environment


class Server(NamedTuple):
    """A running server, reached on this host only, with a random key."""

    url: str
    key: str
    log: Path

    def post(self, route: str, **body: Any) -> Any:
        """The JSON answer; raises GateFailed with the server's words when it refuses or dies."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(self.url + route, json.dumps(body).encode(), headers)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
                return json.load(response)
        except (urllib.error.URLError, ConnectionError) as error:
            said = error.read().decode() if isinstance(error, urllib.error.HTTPError) else last_words(self.log)
            raise GateFailed(f"llama.cpp did not answer {route} ({error}): {said}") from error


@contextmanager
def llama_server(
    gguf: Path, log: Path, context: int = 2048, slots: int = 1, threads: int | None = None
) -> Iterator[Server]:
    """A server on a free port, with `slots` conversations of `context` tokens each at the same time.

    `threads` is half of the CPUs by default. Raises GateFailed when llama.cpp cannot load the file.
    """
    settings = {
        "gguf": str(gguf), "context": context, "slots": slots, "key": secrets.token_hex(16),
        "threads": threads or max(1, len(os.sched_getaffinity(0)) // 2),
    }  # fmt: skip
    command, pipe = [sys.executable, "-m", "tasks.engine.runtimes.llama_server"], subprocess.PIPE
    with log.open("a") as messages:
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=messages, env=llama_environment())
    assert child.stdin and child.stdout
    try:
        child.stdin.write(json.dumps(settings).encode() + b"\n")
        child.stdin.flush()
        url = child.stdout.readline().decode().strip()
        if not url:
            raise GateFailed(f"llama.cpp could not load {gguf.name}: {last_words(log)}")
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
    params.n_parallel, params.n_ctx = settings["slots"], settings["slots"] * settings["context"]
    params.use_jinja = True
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = settings["threads"]
    params.n_ctx_checkpoints = params.cache_ram_mib = 0  # prompts are seen once: nothing to keep
    params.fit_params = params.warmup = params.ui = params.endpoint_slots = False
    server = xllamacpp.Server(params)
    url.write(server.listening_address + "\n")
    url.flush()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve()
