"""An endpoint of chat completions on loopback, which misbehaves as it is told to."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-secret-0123456789"


class Misbehaving(ThreadingHTTPServer):
    """An endpoint on loopback. `plan` says what each call gets: a status, headers, seconds to wait, or raw bytes.

    After the plan every call is answered by `answer`, a function of its messages to a text.
    """

    daemon_threads = True

    def __init__(self, answer=lambda messages: "Rating: [[7]]", plan=(), key=KEY):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.plan, self.key, self.calls, self.lock = answer, list(plan), key, [], threading.Lock()

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
        if "raw" in event or event.get("status", 200) != 200:
            return self.send(event.get("status", 200), event.get("raw", b"{}"), event.get("headers", {}))
        message = {"role": "assistant", "content": self.server.answer(body["messages"])}
        reply = {
            "model": "judge-1",
            "choices": [{"message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1000, "completion_tokens": 100},
        }
        return self.send(200, json.dumps(reply).encode())

    def send(self, status, raw, headers=()):
        try:
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(raw)))
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
