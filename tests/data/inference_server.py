"""An author's inference server whose manners are chosen by its arguments.

inference_server.py PORT OUTPUT [manner ...]
"""

import os
import subprocess
import sys
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
        with open(f"{OUTPUT}/n", "w") as file:
            file.write(str(invocations))
        if "lines" in MANNERS:
            sys.stderr.write("".join(f"line {i}\n" for i in range(1000)))
            sys.stderr.flush()
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
HTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
