"""A small Hub on this machine: it speaks the calls of an upload, keeps what arrives, and fails when it is told to."""

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Repositories with their files and commits.

    `faults` holds, by the name of a step (create, info, validate, preupload, batch, lfs, commit), what happens at its
    next calls: a status; "cut", the connection ends without a reply; "lost", the work is done and the reply is cut;
    "hangs", it sets `hung`, and the reply never comes; "dies", the server ends for good, in the middle of the body.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.blobs, self.faults, self.calls, self.tokens = {}, {}, {}, [], set()
        self.cards = {}  # of models that others published
        self.sent = 0  # bytes of large files
        self.lock, self.hung, self.closed = threading.Lock(), threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name, *, private=True, files=()):
        self.repositories[name] = {"private": private, "commits": 1, "files": dict.fromkeys(files, b"theirs")}

    def handle_error(self, request, client_address):
        pass  # the other side has gone


class Handler(BaseHTTPRequestHandler):
    """Answers the calls of huggingface_hub to a `Hub`."""

    protocol_version = "HTTP/1.1"

    def reply(self, status, held):
        body = json.dumps(held).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def fails(self, step):
        """Whether the step is told to fail, and has failed."""
        self.server.calls.append(step)
        self.server.tokens.add(self.headers.get("Authorization"))
        fault = next(iter(self.server.faults.get(step, [])), None)
        if fault is not None:
            self.server.faults[step].pop(0)
        if fault == "dies":
            self.rfile.read(10)
            threading.Thread(target=self.server.shutdown).start()
            self.server.socket.close()
        if fault == "hangs":
            self.server.hung.set()
            self.server.closed.wait(60)
        if fault in ("cut", "dies", "hangs"):
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return True
        if isinstance(fault, int):
            self.body()
            self.reply(fault, {"error": f"told to answer {fault}", "url": self.server.url})
            return True
        self.cuts = fault == "lost"
        return False

    def body(self):
        if not hasattr(self, "_body"):
            if self.headers.get("Transfer-Encoding") == "chunked":
                self._body = b""
                while size := int(self.rfile.readline(), 16):
                    self._body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return self._body

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        self.__dict__.pop("_body", None)
        super().handle_one_request()

    def card(self):
        """Answers a call for the card of a model."""
        text = self.server.cards.get(self.path.partition("/resolve/")[0][1:], "").encode()
        self.send_response(200 if text else 404)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.end_headers()
        self.wfile.write(text if self.command == "GET" else b"")

    do_HEAD = card

    def do_GET(self):
        if "/resolve/" in self.path:
            self.card()
            return
        name = self.path.removeprefix("/api/models/").partition("?")[0].removesuffix("/revision/main")
        if self.fails("info"):
            return
        if (held := self.server.repositories.get(name)) is None:
            self.reply(404, {"error": "Repository not found"})
            return
        siblings = [{"rfilename": file} for file in held["files"]]
        info = {"id": name, "private": held["private"], "sha": f"{held['commits']:040x}", "siblings": siblings}
        self.reply(200, info)

    def do_PUT(self):
        if self.fails("lfs"):
            return
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(self.body()).hexdigest() == oid
        self.server.blobs[oid] = self.body()
        self.server.sent += len(self.body())
        self.reply(200, {})

    def do_POST(self):
        with suppress(BrokenPipeError):
            if self.path == "/api/repos/create":
                self.create()
            elif self.path == "/api/validate-yaml":
                self.validate()
            elif found := re.fullmatch("/api/models/(.+)/preupload/main", self.path):
                self.preupload(self.server.repositories[found[1]])
            elif self.path.endswith(".git/info/lfs/objects/batch"):
                self.batch()
            elif found := re.fullmatch("/api/models/(.+)/commit/main", self.path):
                self.commit(found[1])
            else:
                self.reply(404, {"error": self.path})

    def create(self):
        if self.fails("create"):
            return
        asked = json.loads(self.body())
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        is_there = name in self.server.repositories
        if not is_there:
            self.server.add(name, private=asked.get("visibility") == "private")
        self.reply(409 if is_there else 200, {"url": f"{self.server.url}/{name}", "error": "You already have it"})

    def validate(self):
        if self.fails("validate"):
            return
        bad = "license: no-such-licence" in json.loads(self.body())["content"]
        errors = [{"message": '"license" must be one of apache-2.0, mit, ...'}] if bad else []
        self.reply(400 if bad else 200, {"errors": errors, "warnings": []})

    def preupload(self, repository):
        if self.fails("preupload"):
            return
        files = []
        for file in json.loads(self.body())["files"]:
            mode = "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"
            held = repository["files"].get(file["path"])
            git = hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest() if held is not None else None
            oid = hashlib.sha256(held).hexdigest() if held is not None and mode == "lfs" else git
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply(200, {"files": files})

    def batch(self):
        if self.fails("batch"):
            return
        objects = []
        for entry in json.loads(self.body())["objects"]:
            upload = {"href": f"{self.server.url}/lfs/{entry['oid']}", "header": {}}
            is_there = entry["oid"] in self.server.blobs
            objects.append(entry if is_there else entry | {"actions": {"upload": upload}})
        self.reply(200, {"transfer": "basic", "objects": objects})

    def commit(self, name):
        if self.fails("commit"):
            return
        repository = self.server.repositories[name]
        with self.server.lock:
            for line in map(json.loads, self.body().splitlines()):
                if line["key"] == "file":
                    repository["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    repository["files"][line["value"]["path"]] = self.server.blobs[line["value"]["oid"]]
            repository["commits"] += 1
        if self.cuts:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        oid = f"{repository['commits']:040x}"
        self.reply(200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})
