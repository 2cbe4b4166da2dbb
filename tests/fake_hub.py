"""A hub on loopback: one repository of a model, as the libraries of the hub ask for it."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

COMMIT: Final = "0123456789abcdef0123456789abcdef01234567"
NAME: Final = "owner/tiny"


@dataclass
class Hub:
    """A repository of the files of a folder; `gated`: nobody is let in."""

    folder: Path
    gated: bool = False
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and content."""
        self.asked.append(path)
        path = path.partition("?")[0]
        if NAME not in path:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if path.startswith("/api/"):
            return self._listed(path)
        if self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        revision, _, name = path.partition("/resolve/")[2].partition("/")
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        known, file = {"X-Repo-Commit": COMMIT}, self.folder / name
        if not file.is_file():
            return 404, {**known, "X-Error-Code": "EntryNotFound"}, b""
        content = file.read_bytes()
        return 200, {**known, "ETag": f'"{_digest(content)}"'}, content

    def _listed(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """What the repository has, as a list or as a part of what is known of it."""
        files = sorted(self.folder.iterdir())
        found: object = {
            "id": NAME,
            "sha": COMMIT,
            "siblings": [{"rfilename": p.name} for p in files],
        }
        revision = path.rpartition("/")[2]
        if revision not in ("main", COMMIT):
            kind = "Entry" if "/tree/" in path else "Revision"
            return 404, {"X-Error-Code": f"{kind}NotFound"}, b""
        if "/tree/" in path:
            found = [
                {
                    "type": "file",
                    "path": p.name,
                    "size": p.stat().st_size,
                    "oid": _digest(p.read_bytes()),
                }
                for p in files
            ]
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve it on a free port, whose address it then has."""

    class Handler(BaseHTTPRequestHandler):
        def _reply(self, *, whole: bool) -> None:
            status, headers, content = hub.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if whole:
                self.wfile.write(content)

        def do_GET(self) -> None:
            """Answer with the content."""
            self._reply(whole=True)

        def do_HEAD(self) -> None:
            """Answer without it."""
            self._reply(whole=False)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
