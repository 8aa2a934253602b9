"""A Hub on this machine with one private repository, which what is downloaded comes from."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
from huggingface_hub import constants

COMMIT = "4" * 40


class Requests(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks of a repository, to those who have the token."""

    def do_GET(self):  # noqa: N802  the name is the base class's
        files, path = self.server.files, unquote(urlsplit(self.path).path)
        api, resolve = f"/api/models/{self.server.repo_id}", f"/{self.server.repo_id}/resolve/"
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith(f"{api}/tree/"):
            tree = [
                {"type": "file", "path": name, "oid": digest(content), "size": len(content)}
                for name, content in files.items()
            ]
            self.answer(200, json.dumps(tree).encode())
        elif path.startswith(api):
            about = {"id": self.server.repo_id, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
            self.answer(200, json.dumps(about).encode())
        elif path.startswith(resolve) and (name := path.removeprefix(resolve).split("/", 1)[1]) in files:
            content = files[name]
            self.answer(200, content, {"ETag": f'"{digest(content)}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Nothing is printed."""


def digest(content: bytes) -> str:
    """As git has it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def hub_with(repo_id: str, files: dict[str, bytes], token: str) -> Iterator[None]:
    """Where this process finds the Hub: online, with these files in a repository that asks for the token."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
    server.repo_id, server.files, server.token = repo_id, files, token
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    huggingface_hub.model_info.__self__.endpoint = url
    constants.ENDPOINT, constants.HF_HUB_OFFLINE = url, False
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = True
        server.shutdown()
