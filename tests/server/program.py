"""`python -m server` and its clients, each in a process of its own."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
_LISTENING = re.compile(r"listening on (https?://\S+) and, for gRPC, on (\S+)")
_END_SECONDS = 60


def environment(**variables):
    """Variables of this process without settings of jaxdual, and with these."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("JAXDUAL_")}
    return others | {"JAXDUAL_COMPILE_AHEAD": "false"} | variables  # most shapes would be compiled for nothing


def until(condition, what, seconds=60.0):
    """What `condition()` returns, once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for: {what}"
        time.sleep(0.03)
    return value


class Program:
    """A server on free ports, which are known when it is entered; leaving ends it.

    Args:
      folder: where its log goes.
      arguments: of `python -m server`.
      variables: of its environment.
    """

    def __init__(self, folder, *arguments, **variables):
        self._log = folder / "server.log"
        self._command = [sys.executable, "-m", "server", "--port", "0", "--grpc-port", "0", *map(str, arguments)]
        self._variables = variables

    def __enter__(self):
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, stdout=log, stderr=log, env=environment(**self._variables)
            )
        try:
            self.url, self.grpc = until(self._addresses, "the server to listen").groups()
            self.client = httpx.Client(base_url=self.url, timeout=60)
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(self, *_):
        self.client.close()
        if self.process.poll() is None:
            engines = self.engines()
            self.process.terminate()
            try:
                self.process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                for pid in (self.process.pid, *engines):
                    os.kill(pid, signal.SIGKILL)
                self.process.wait()
                raise

    def _addresses(self):
        assert self.process.poll() is None, self.log()
        return _LISTENING.search(self.log())

    def log(self):
        return self._log.read_text(errors="replace")

    def health(self):
        """Status of `/health`, over a connection of its own."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            return connection.getresponse().status

    def wait_until_serving(self, seconds=120.0):
        def serving():
            assert self.process.poll() is None, self.log()
            return self.health() == 200

        until(serving, "the server to serve", seconds)

    def metrics(self):
        """All samples by name, with the value of the label that is not the model's name: `name{length}`."""
        samples = {}
        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                labels = [value for name, value in sorted(sample.labels.items()) if name != "model_name"]
                name = sample.name.removeprefix("jaxdual:")
                samples[f"{name}{{{','.join(labels)}}}" if labels else name] = sample.value
        return samples

    def under_way(self):
        """Sequences that run or wait in the engine."""
        metrics = self.metrics()
        return metrics["num_requests_running"] + metrics["num_requests_waiting"]

    def is_idle(self):
        metrics = self.metrics()
        return not any(metrics[name] for name in ("num_requests_running", "num_requests_waiting", "kv_blocks_live"))

    def engines(self):
        """Process ids of the engines that are its children."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and b"jaxdual.engine" in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:  # gone meanwhile
                continue
        return found


class ClientProcess:
    """A stock client, in a process of its own; it is ready to send when entered, and ended when left.

    Args:
      module: "openai_client" or "triton_client".
      address: of the server.
    """

    def __init__(self, module, address):
        self._module, self._address = module, address

    def __enter__(self):
        command = [sys.executable, "-m", f"tests.server.{self._module}"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def send(self, requests):
        """Sends all requests at once, as soon as the client is up."""
        assert self._process.stdout.readline() == "ready\n"
        self._write(json.dumps({"address": self._address, "model": "small", "requests": requests}))

    def cancel(self):
        """Cancels what has no answer yet."""
        self._write("cancel")

    def outcomes(self):
        """What became of each request, in their order: see the clients."""
        line = self._process.stdout.readline()
        assert line, f"{self._module} has ended with status {self._process.wait()}"
        return json.loads(line)

    def _write(self, line):
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
