"""An endpoint that judges answers: a small server that is slow, fails, rambles and limits its rate."""

import json
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """A judge that prefers the longer answer.

    The replies to a question begin with `faults`, one fault a try. With `verdict` every reply is that text.
    """

    daemon_threads = True

    def __init__(self, faults=(), verdict=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.verdict, self.refused, self.status, self.more = list(faults), verdict, None, 403, {}
        self.retry_after = "0.6"
        self.seen, self.times, self.keys, self.busy, self.most = Counter(), {}, set(), 0, 0
        self.lock, self.closed = threading.Lock(), threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """Counts, times and answers the questions of a `Server`."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        with self.server.lock:
            tried = self.server.seen[question]
            self.server.seen[question] += 1
            self.server.times.setdefault(question, []).append(time.monotonic())
            self.server.keys.add(self.headers.get("Authorization"))
            self.server.busy += 1
            self.server.most = max(self.server.most, self.server.busy)
        time.sleep(0.05)
        fault = self.server.faults[tried] if tried < len(self.server.faults) else None
        with self.server.lock:
            self.server.busy -= 1
        if fault == "slow":
            time.sleep(1.5)  # longer than the endpoint's patience
        if self.server.refused and self.server.refused in question:
            time.sleep(0.2)  # the others are under way
            fault = self.server.status
        if fault == "hang":
            self.server.closed.wait(60)
            return
        if fault == "drip":
            self.send_response(200)
            self.end_headers()
            while not self.server.closed.wait(0.2):
                with suppress(OSError):
                    self.wfile.write(b" ")
            return
        if isinstance(fault, int):
            self.send_response(fault)
            if fault == 429:
                self.send_header("Retry-After", self.server.retry_after)
            if fault == 302:
                self.send_header("Location", f"{self.server.url}/elsewhere")
            self.end_headers()
            self.wfile.write(f'{{"error": "no", "sent": "{self.headers.get("Authorization")}"}}'.encode())
            return
        one, other = (question.split(f"<answer_{side}>\n")[1].split(f"\n</answer_{side}>")[0] for side in "AB")
        said = "C" if len(one) == len(other) else "A" if len(one) > len(other) else "B"
        text = self.server.verdict or f"I weighed both.\n[[{said}]]"
        reply = {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
        odd = {"malformed": '{"choices": [{"mess', "empty": '{"choices": []}', "deep": "[" * 200_000}
        odd["parts"] = json.dumps({"choices": [{"message": {"content": [{"text": text}]}}]})
        sent = odd.get(fault, json.dumps(reply | self.server.more)).encode()
        self.send_response(200)
        self.end_headers()
        try:
            self.wfile.write(sent)
        except OSError:
            assert fault == "slow"

    def log_message(self, *_):
        pass
