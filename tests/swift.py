"""A real S3 server for tests: OpenStack Swift with s3api on loopback, from PyPI, in a virtual environment of its own.

    python -m tests.swift install      # once, 10 s; tests do it themselves
    python -m tests.swift DIR          # serve until Ctrl-C, and print the environment that boto3 wants

Swift checks signatures and checksums as S3 does. It does not store checksums, and `If-None-Match` is not atomic.
"""

import fcntl
import getpass
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from string import Template
from typing import Any

from tests.waiting import wait_until

VERSION = "2.38.3"
VENV = Path(__file__).parents[1] / ".venv-swift"
SERVERS = ("account", "container", "object", "proxy")
KEY, SECRET = "test:tester", "testing"

DEFAULT = """[DEFAULT]
bind_ip = 127.0.0.1
bind_port = $port
workers = 0
user = $user
swift_dir = $root
devices = $root/devices
mount_check = false
log_address = /nonexistent
log_level = WARNING
fallocate_reserve = 0
"""
STORAGE = """[pipeline:main]
pipeline = $server-server
[app:$server-server]
use = egg:swift#$server
"""
PROXY = """[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats bulk s3api tempauth slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = $secret .admin
[filter:slo]
use = egg:swift#slo
rate_limit_after_segment = 10000
[filter:dlo]
use = egg:swift#dlo
"""
# What swift-ring-builder does, in one process: one device, 16 partitions, one replica.
RINGS = """
import os, sys
from swift.common.ring import RingBuilder
for server, port in (text.split("=") for text in sys.argv[2:]):
    ring = RingBuilder(4, 1, 0)
    ring.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "disk", "weight": 1.0})
    ring.rebalance()
    ring.get_ring().save(os.path.join(sys.argv[1], server + ".ring.gz"))
"""
# Swift's own starter scripts want /etc/swift; this finds swift.conf anywhere, and ends with the tests.
SERVE = """
import ctypes, importlib, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
from swift.common import utils
utils.SWIFT_CONF_FILE = sys.argv[2]
from swift.common.wsgi import run_wsgi
callback = {}
if sys.argv[3] == "object":
    callback["global_conf_callback"] = importlib.import_module("swift.obj.server").global_conf_callback
sys.exit(run_wsgi(sys.argv[1], sys.argv[3] + "-server", **callback))
"""


def install() -> Path:
    """The python of the virtual environment that has Swift, made if it is not there."""
    VENV.mkdir(exist_ok=True)
    (VENV / ".gitignore").write_text("*\n")
    venv, done = VENV / VERSION, VENV / f"{VERSION}.done"
    with (VENV / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
            pip = [str(venv / "bin/python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            subprocess.run([*pip, f"swift=={VERSION}"], check=True)
            done.touch()
    return venv / "bin/python"


class Swift:
    """An S3 server that keeps its data in `root` (a file system with user xattrs) and can be stopped and started."""

    def __init__(self, root: Path) -> None:
        self.root = root
        os.setxattr(root, "user.stillhouse", b"yes")  # where this fails, run pytest with --basetemp on ext4 or xfs
        self._python = install()
        self._ports = dict(zip(SERVERS, _free_ports(len(SERVERS)), strict=True))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._configure()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports['proxy']}"

    @property
    def environment(self) -> dict[str, str]:
        """What boto3 wants to hear, with nothing of the machine's own settings left."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    @property
    def running(self) -> bool:
        return bool(self._processes)

    def start(self) -> None:
        """Starts the servers and waits until they answer."""
        with (self.root / "log").open("ab") as log:
            for server in SERVERS:
                arguments = [str(self.root / f"{server}.conf"), str(self.root / "swift.conf"), server]
                self._processes.append(
                    subprocess.Popen([self._python, "-c", SERVE, *arguments], stdout=log, stderr=log)
                )
        for port in self._ports.values():
            self._wait_for(port)

    def stop(self) -> None:
        """Ends the servers at once, in the middle of whatever they do; their data stays."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._processes = []

    def objects(self) -> list[Path]:
        """The files in which Swift keeps objects, to damage one."""
        return sorted((self.root / "devices").rglob("*.data"))

    def _wait_for(self, port: int) -> None:
        wait_until(lambda: _listens(port) or any(process.poll() is not None for process in self._processes))
        if not _listens(port):
            self.stop()
            raise RuntimeError(f"Swift did not start:\n{(self.root / 'log').read_text()[-4000:]}")

    def _configure(self) -> None:
        (self.root / "devices/disk").mkdir(parents=True)
        (self.root / "swift.conf").write_text(
            "[swift-hash]\nswift_hash_path_suffix = s\n[storage-policy:0]\nname = gold\ndefault = yes\n"
        )
        for server, port in self._ports.items():
            text = DEFAULT + (PROXY if server == "proxy" else STORAGE)
            values: dict[str, Any] = {"port": port, "user": getpass.getuser(), "root": self.root, "secret": SECRET}
            (self.root / f"{server}.conf").write_text(Template(text).substitute(values, server=server))
        storage = [f"{server}={port}" for server, port in self._ports.items() if server != "proxy"]
        subprocess.run([self._python, "-c", RINGS, str(self.root), *storage], check=True)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    if sys.argv[1:] == ["install"]:
        print(install())
    else:
        server = Swift(Path(sys.argv[1]).absolute())
        server.start()
        print("\n".join(f"export {name}={value}" for name, value in server.environment.items()), flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
        server.stop()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
