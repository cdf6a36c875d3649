"""An endpoint of chat completions on loopback, which misbehaves as it is told to."""

import json
import socket
import struct
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-secret-0123456789"


class Misbehaving(ThreadingHTTPServer):
    """An endpoint on loopback. `plan` says what each call gets: a status, headers, seconds to wait, or raw bytes.

    Or something worse: `cut` promises so many bytes more than it sends, `reset` ends the connection without an answer,
    and `drip` sends a byte each so many seconds, `of` its header or its body, for as long as anyone listens.

    After the plan every call is answered by `answer`, a function of its messages to a text.
    """

    daemon_threads = True

    def __init__(self, answer=lambda messages: "Rating: [[7]]", plan=(), key=KEY):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.plan, self.key, self.calls, self.lock = answer, list(plan), key, [], threading.Lock()
        self.left = 0  # drips that nobody listened to any more

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.calls.append(body | {"at": time.monotonic()})
            event = self.server.plan.pop(0) if self.server.plan else {}
        time.sleep(event.get("wait", 0))
        told = self.headers.get("Authorization")
        if told != (self.server.key and f"Bearer {self.server.key}"):
            return self.send(401, json.dumps({"error": {"message": f"Incorrect API key provided: {told}"}}).encode())
        if "reset" in event:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.connection.close()
        if "drip" in event:
            return self.drip(event["drip"], event["of"])
        if "raw" in event or event.get("status", 200) != 200:
            return self.send(event.get("status", 200), event.get("raw", b"{}"), event.get("headers", {}))
        message = {"role": "assistant", "content": self.server.answer(body["messages"])}
        reply = {
            "model": "judge-1",
            "choices": [{"message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1000, "completion_tokens": 100},
        }
        raw = json.dumps(reply).encode()
        return self.send(200, raw[: len(raw) - event.get("cut", 0)], cut=event.get("cut", 0))

    def drip(self, seconds, of):
        start = b"HTTP/1.0 200 OK\r\n" + (b"\r\n" if of == "body" else b"X-Header: ")
        try:
            self.wfile.write(start)
            while True:
                self.wfile.write(b" ")
                time.sleep(seconds)
        except OSError:
            self.server.left += 1

    def send(self, status, raw, headers=(), cut=0):
        try:
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(raw) + cut))
            self.end_headers()
            self.wfile.write(raw)
        except OSError:
            pass  # the judge has hung up


@contextmanager
def serving(*args, **options):
    server = Misbehaving(*args, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
