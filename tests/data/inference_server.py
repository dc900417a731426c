"""An author's inference server whose manners are chosen by its arguments.

inference_server.py PORT OUTPUT [manner ...]
"""

import http.client
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

PORT, OUTPUT, MANNERS = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
invocations = 0


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, status, **headers):
        if "garbage" in MANNERS:
            self.wfile.write(b"\x00\x01 this is no HTTP\r\n\r\n")
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def stream(self):
        """Send the status at once, then a heartbeat every 50 ms, and the outputs before the end."""
        self.wfile.write(b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(10**9 if "stream-for-ever" in MANNERS else 10):
            self.wfile.write(b"5\r\nbeat\n\r\n")
            time.sleep(0.05)
            if number == 5 and "break-off" in MANNERS:
                return
        with open(f"{OUTPUT}/result.json", "w") as file:
            file.write("{}")
        print("what failed", file=sys.stderr, flush=True)
        self.wfile.write(b"0\r\n\r\n")

    def ask_for_tasks(self, port):
        """Ask the shim for a task of one's own, as long as this server lives."""
        body = b'{"pk":"mine","inputs":[],"output_bucket_name":"b","output_prefix":"p"}'
        while True:
            try:
                client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                client.request("POST", "/invocations", body)
                print(f"got {client.getresponse().status}", flush=True)
                client.request("GET", "/ping")
                print(f"ping {client.getresponse().status}", flush=True)
            except OSError:
                pass
            time.sleep(0.02)

    def do_GET(self):
        if "hang-health" in MANNERS:
            time.sleep(600)
        if "redirect" in MANNERS:
            self.answer(302, Location="http://127.0.0.1:1/")
        else:
            self.answer(404 if "404" in MANNERS or self.path != "/health" else 200)

    def do_POST(self):
        global invocations
        invocations += 1
        print(f"out {invocations}", flush=True)
        print(f"err {invocations}", file=sys.stderr, flush=True)
        if "hang" in MANNERS:
            time.sleep(600)
        if "die" in MANNERS:
            print("last words", file=sys.stderr, flush=True)
            os._exit(9)
        if "stream" in MANNERS:
            return self.stream()
        for manner in MANNERS:
            if manner.startswith("attack=") and invocations == 1:
                port = int(manner.partition("=")[2])
                threading.Thread(target=self.ask_for_tasks, args=[port], daemon=True).start()
        with open(f"{OUTPUT}/n", "w") as file:
            file.write(str(invocations))
        if "lines" in MANNERS:
            sys.stderr.write("".join(f"line {i}\n" for i in range(1000)))
            sys.stderr.flush()
        if "500" in MANNERS:
            print("the reason", file=sys.stderr, flush=True)
        self.answer(500 if "500" in MANNERS else 201)
        if "die-after" in MANNERS:
            os._exit(9)


if "die-at-start" in MANNERS:
    print("cannot load the model", file=sys.stderr)
    sys.exit(7)
if "never" in MANNERS:
    time.sleep(600)
if "slow" in MANNERS:
    time.sleep(1)
if "child" in MANNERS:
    subprocess.Popen(["setsid", "sleep", f"600.{PORT}"])
print("started", flush=True)
HTTPServer(("127.0.0.1", PORT + ("other-port" in MANNERS)), Handler).serve_forever()
