"""llama.cpp's server (xllamacpp) on a GGUF in a child process, because it aborts on errors and prints to the terminal.

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
from tasks.engine.runtimes.llama_logits import llama_environment, log_tail


class Server(NamedTuple):
    """A running server, bound to this host, with a random API key."""

    url: str
    key: str
    log: Path

    def post(self, route: str, **body: Any) -> Any:
        """The JSON response. Raises GateFailed with the server's message when it refuses or crashes."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(self.url + route, json.dumps(body).encode(), headers)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
                return json.load(response)
        except (urllib.error.URLError, ConnectionError) as error:
            answer = error.read().decode() if isinstance(error, urllib.error.HTTPError) else log_tail(self.log)
            raise GateFailed(f"llama.cpp did not answer {route} ({error}): {answer}") from error


@contextmanager
def llama_server(
    gguf: Path, log: Path, context: int = 2048, slots: int = 1, threads: int | None = None
) -> Iterator[Server]:
    """Starts a server on a free port, for `slots` concurrent conversations of `context` tokens each.

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
            raise GateFailed(f"llama.cpp could not load {gguf.name}: {log_tail(log)}")
        yield Server(url, str(settings["key"]), log)
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def _serve() -> None:
    """The child: reads settings as a JSON line on stdin, writes the server's URL to stdout, runs until stdin closes."""
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
