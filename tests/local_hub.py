"""As much of the Hugging Face hub's interface as its client needs for small files, on loopback."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """Repositories by name: each a mapping of paths to contents, and the texts of its commits."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        """Its address, as HF_ENDPOINT takes it."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def revision(self, name: str) -> str:
        """Return the commit that a repository is at."""
        content = repr(sorted(self.files[name].items())).encode()
        return hashlib.sha1(content).hexdigest()


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        self.server.asked.append(format % arguments)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, hub = self.path.split("?")[0], self.server
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            hub.files.setdefault(name, {})
            self._json({"url": f"{hub.endpoint}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    hub.files[name][value["path"]] = base64.b64decode(value["content"])
            oid = hub.revision(name)
            url = f"{hub.endpoint}/{name}/commit/{oid}"
            self._json({"success": True, "commitOid": oid, "commitUrl": url})
        else:
            self._json({"error": "unknown"}, 404)

    def do_GET(self) -> None:
        self._read()

    def do_HEAD(self) -> None:
        self._read()

    def _read(self) -> None:
        path, hub = self.path.split("?")[0].strip("/"), self.server
        if path.startswith("api/models/"):
            name = "/".join(path.split("/")[2:4])
            if name not in hub.files:
                self._json({"error": "Repository Not Found"}, 404, "RepoNotFound")
            elif "/tree/" in path:
                files = hub.files[name].items()
                self._json([_listed(file, content) for file, content in files])
            else:
                siblings = [{"rfilename": file} for file in hub.files[name]]
                self._json({"id": name, "sha": hub.revision(name), "siblings": siblings})
            return
        name, _, rest = path.partition("/resolve/")
        content = hub.files.get(name, {}).get(rest.partition("/")[2])
        if content is None:
            self._json({"error": "Entry not found"}, 404, "EntryNotFound")
            return
        etag = hashlib.sha1(content).hexdigest()
        self._send(content, {"ETag": f'"{etag}"', "X-Repo-Commit": hub.revision(name)})

    def _json(self, content: Any, status: int = 200, error: str = "") -> None:
        headers = {"Content-Type": "application/json", **({"X-Error-Code": error} if error else {})}
        self._send(json.dumps(content).encode(), headers, status)

    def _send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _listed(path: str, content: bytes) -> dict[str, Any]:
    blob = b"blob %d\0" % len(content) + content
    oid = hashlib.sha1(blob).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": oid}


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve an empty hub."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
