"""A fake Dropbox for the tests of a project, and the tests of dropbox_storage itself.

The first part, up to the second mark, is the fake: FakeAccount, FakeDropbox and
FakeDropboxMixin. A project that copies this file needs no more of it. The rest is the
module's own tests and the demo:

    python -m pytest
    python test_dropbox_storage.py demo FILE...

In another project, these tests run only if DROPBOX_STORAGE_TESTS=1 is in the environment.
"""

# ---- The fake Dropbox: from here to the second mark, this also works alone. ----

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import datetime
import functools
import gzip
import hashlib
import importlib
import io
import itertools
import json
import pathlib
import posixpath
import random
import re
import threading
import time
import unicodedata
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

import dropbox
import dropbox.files
import requests
import urllib3
from dropbox.stone_serializers import json_compat_obj_decode
from dropbox.stone_validators import ValidationError


def import_module() -> Any:
    """Return the storage's module: beside this file, under whatever name, or installed."""
    name = pathlib.Path(__file__).stem.replace("test_", "", 1)
    package = __name__.rpartition(".")[0]
    for candidate in (f"{package}.{name}" if package else name, "dropbox_storage"):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(candidate)
            if hasattr(module, "DropboxStorage"):
                return module
    raise ImportError(
        f"Neither {name}.py beside {__file__} nor dropbox_storage is there."
    )


MiB = 1024 * 1024
HASH_BLOCK = 4 * MiB
MAX_REQUEST = 150 * MiB
DISALLOWED_NAMES = ("desktop.ini", "thumbs.db", ".ds_store", "icon\r", ".dropbox")
DISALLOWED_NAMES += (".dropbox.attr",)

# What Dropbox may do, as documented, seen once, or not ruled out by any document.
QUIRKS = {
    "gzip": "a download is compressed where Accept-Encoding allows it",
    "surplus": "a ranged reply goes on for 100 bytes after the range",
    "empty_close": "an append that closes a session after data must hold data",
    "forgetful": "a refused files/upload keeps nothing: upload_session_id is empty",
    "strict_same": "strict_conflict refuses identical bytes, also for the right rev",
    "no_hash": "metadata has no content_hash",
    "no_paths": "metadata has no paths, as in a namespace that is not mounted",
    "empty_pages": "each listing begins with an empty page that has more",
    "bare_429": "429 says how long to wait in the Retry-After header alone",
    "paper": "files that end in .paper have no hash, no bytes and no links",
    "kept_sessions": "a session that was committed can be committed again",
    "busy": "a commit during another one is refused: too_many_write_operations",
}

# The refusals that fail() can cause: status, headers and body. VALUE is the value that
# fail() is given.
TEXT, HTML = {"content-type": "text/plain"}, {"content-type": "text/html"}
LATER = {"Retry-After": "VALUE"}
BUSY = {"reason": "too_many_requests", "retry_after": "VALUE"}
# fmt: off
REFUSALS = {
    "500": (500, TEXT, "unavailable"),
    "502": (502, TEXT, "unavailable"),
    "503": (503, TEXT, "unavailable"),
    "503_later": (503, {**TEXT, **LATER}, "unavailable"),
    "500_empty": (500, {"content-type": "application/grpc"}, ""),
    "html": (502, HTML, "<html>Bad gateway</html>"),
    "garbage": (200, HTML, "<html>Welcome</html>"),
    "redirect": (307, {**TEXT, "Location": "https://evil.example/"}, ""),
    "timeout": (408, TEXT, "request timeout"),
    "429": (429, LATER, BUSY),
    "429_body": (429, {}, BUSY),
    "429_text": (429, {**TEXT, **LATER}, "too_many_requests"),
    "429_new": (429, LATER, {"reason": "brand_new", "brand": {"new": [1]}}),
    "too_many_writes": (429, LATER, {"reason": "too_many_write_operations"}),
    "bad_input": (400, TEXT, "Error in call to API function: bad input"),
    "app_scope": (400, TEXT, "The app does not have the required scope 'files.x'."),
    "sandbox": (400, TEXT, "Path root is not supported for sandbox app"),
    "list": (400, {}, ["no object"]),
    "expired_token": (401, {}, "expired_access_token"),
    "invalid_token": (401, {}, "invalid_access_token"),
    "suspended": (401, {}, "user_suspended"),
    "select_user": (401, {}, "invalid_select_user"),
    "route_access": (401, {}, "route_access_denied"),
    "missing_scope": (401, {}, {".tag": "missing_scope", "required_scope": "files.x"}),
    "account_type": (403, {}, "invalid_account_type/feature"),
    "no_route": (404, TEXT, "Unknown API function"),
    "no_permission": (422, {}, "no_permission"),
}
# Faults of the network, and those that come after the request was carried out.
NETWORK = {
    "reset": lambda: urllib3.exceptions.ProtocolError("reset"),
    "tls": lambda: requests.exceptions.SSLError("bad record"),
    "stall": lambda: requests.ReadTimeout("stalled"),
}
AFTERWARDS = ("503_after", "reset_after", "misfit_after")
BODY_FAULTS = ("truncate", "short", "corrupt")

# fmt: on
SESSION = "files/upload_session"
FILES = "upload download get_metadata get_temporary_link delete_v2 move_v2 copy_v2"
ROUTES = {"*", "oauth2/token", "files/list_folder", "files/list_folder/continue"}
ROUTES |= {f"files/{name}" for name in FILES.split()}
ROUTES |= {f"{SESSION}/{name}" for name in ("start", "append_v2", "finish")}


@functools.lru_cache(maxsize=100)
def content_hash(data):
    """Straight from https://www.dropbox.com/developers/reference/content-hash."""
    blocks = [data[i : i + HASH_BLOCK] for i in range(0, len(data), HASH_BLOCK)]
    digests = b"".join(hashlib.sha256(block).digest() for block in blocks)
    return hashlib.sha256(digests).hexdigest()


class Refused(Exception):
    """Dropbox's answer to what it does not do: a status and a JSON or text body."""

    def __init__(self, status, body, **headers):
        self.status, self.body, self.headers = status, body, headers


def union(tags):
    """The JSON of a union's value, from its tags "a/b/c"."""
    *outer, inner = tags.split("/")
    error = {".tag": inner}
    for tag in reversed(outer):
        error = {".tag": tag, tag: error}
    return error


def tags_of(error):
    """The tags of a union's value, from the outside in."""
    while isinstance(error, dict) and ".tag" in error:
        yield error[".tag"]
        error = error.get(error[".tag"]) or error.get("reason")


def refusal(status, error, headers=None, **more):
    """As Dropbox refuses: with a summary that ends in a slash and up to three dots.

    error: the value of a union, or its tags.
    """
    error = union(error) if isinstance(error, str) else error
    tags = [*tags_of(error)] or [*tags_of(error["reason"])]
    body = {"error_summary": "/".join(tags) + "/" + "." * random.randrange(4), **more}
    return Refused(status, {**body, "error": error}, **(headers or {}))


def conflict(error):
    """The 409 of a route."""
    return refusal(409, error)


def bad_request(text):
    return Refused(400, f"Error in call to API function: {text}")


def check_argument(route, argument):
    """Refuse an argument that does not fit the specification, which the SDK knows."""
    kind = getattr(dropbox.files, route[len("files/") :].replace("/", "_")).arg_type
    try:
        json_compat_obj_decode(kind, argument, strict=True)
    except ValidationError as error:
        raise bad_request(str(error)) from None


def fold(path):
    """The path as Dropbox compares it: letter by letter."""
    return "".join(letter.lower() for letter in path)


@dataclasses.dataclass
class Entry:
    """A file, or a folder if data is None, at a path with the case it was made with."""

    path: str
    data: bytes = None
    rev: str = None
    modified: str = None
    client_modified: str = None
    id: str = None

    def metadata(self):
        """As in a union of Metadata, with a tag; see untagged()."""
        found = {".tag": "folder", "name": self.path.rpartition("/")[2]}
        found.update(id=self.id, path_display=self.path, path_lower=fold(self.path))
        if self.data is not None:
            found.update({".tag": "file"}, rev=self.rev, size=len(self.data))
            found["client_modified"] = self.client_modified or self.modified
            found["server_modified"] = self.modified
            found.update(content_hash=content_hash(self.data), is_downloadable=True)
        return found


def untagged(metadata):
    """As where the specification has FileMetadata, and no union."""
    return {name: value for name, value in metadata.items() if name != ".tag"}


@dataclasses.dataclass
class Session:
    """An upload session: what has been sent, by offset."""

    concurrent: bool
    pieces: dict = dataclasses.field(default_factory=dict)
    end: int = None  # where it was closed

    @property
    def data(self):
        return b"".join(self.pieces[offset] for offset in sorted(self.pieces))


class Clock:
    """Stands for the module's time: it passes in pauses alone, and at once."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


TOKENS = itertools.count(1)


class FakeAccount(requests.adapters.HTTPAdapter):
    """A Dropbox account in memory, in place of the network under the real SDK.

    It refuses what Dropbox refuses, counts the calls of each route, and fails on demand.
    page_size: entries of a page of a listing. quirks: keys of QUIRKS.
    """

    def __init__(self, page_size: int = 500, quirks: Sequence[str] = ()) -> None:
        super().__init__()
        self.page_size, self.quirks = page_size, quirks
        self.lock, self.committing = threading.RLock(), threading.Lock()
        self.entries, self.revisions, self.sessions = {}, {}, {}
        self.cursors, self.links, self.changes = {}, {}, []
        self.calls: collections.Counter[str] = collections.Counter()
        self.timeouts, self.faults = set(), []
        self.refused, self.expires_in, self.body = None, 14400, io.BytesIO
        self.last_headers = {}
        self.in_flight = self.most_in_flight = self.bytes_in = self.bytes_out = 0
        self.numbers = itertools.count(1)
        self.tokens, self.expired = {"valid-token"}, set()
        self.refresh_tokens = {"valid-refresh-token": ("app-key", "app-secret")}
        self.namespaces = {"1": "", "42": "/team"}
        scope = "files.metadata.read files.content.read"
        self.codes = {"valid-code": f"{scope} files.content.write", "read-only": scope}

    # What tests and the demo do with it

    @contextlib.contextmanager
    def replace_dropbox(self) -> Iterator[FakeAccount]:
        """Inside the block, all storages of the project use this account.

        That includes default_storage and those of FileFields, whatever credentials they
        have. Waiting before a request is repeated takes no time.
        """
        module = import_module()
        # Else, links of other accounts are cached.
        token = f"valid-token-{next(TOKENS)}"
        self.tokens.add(token)
        patch = unittest.mock.patch.object
        with patch(module.DropboxStorage, "client", FakeDropbox(self, token)):
            with patch(module, "time", Clock()):
                yield self

    def connect(self, storage: Any) -> Any:
        """Let the storage talk to this account, with its credentials of now; return it."""
        client = storage.client
        # Another account may have replaced Dropbox for all storages.
        client = FakeDropbox() if isinstance(client, FakeDropbox) else copy.copy(client)
        client._session = self.create_session()
        storage.client = client
        return storage

    def storage(self, **options: Any) -> Any:
        """Return a DropboxStorage on this account, which waits for no visible time."""
        options = {"oauth2_access_token": "valid-token", **options}
        storage = import_module().DropboxStorage(**options)
        storage.FIRST_WAIT = 0.001
        return self.connect(storage)

    def put(self, path: str, data: bytes = b"", modified: str | None = None) -> None:
        """Write a file as another device would. modified: as in 2024-07-01T12:00:00Z."""
        target = {"path": path, "mode": "overwrite", "client_modified": modified}
        self.commit(target, data)

    def files(self) -> dict[str, bytes]:
        """The bytes of each file by its path."""
        found = self.entries.values()
        return {entry.path: entry.data for entry in found if entry.data is not None}

    def follow(self, link: str) -> bytes:
        """The bytes to which a temporary link leads, as for a browser."""
        response = self.create_session().get(link)
        response.raise_for_status()
        content: bytes = response.content
        return content

    def fail(
        self,
        route: str,
        kind: str | Callable[[], object],
        nth: int = 1,
        times: int = 1,
        value: float = 0,
    ) -> None:
        """Misbehave at the nth call of the route ("*": any) from now, and after it.

        kind: a key of REFUSALS or NETWORK; one of AFTERWARDS or BODY_FAULTS; the tags of
        the route's own error, as in "/path/not_found"; or a function to call meanwhile.
        If that raises nothing, a 503 follows, and nothing has been done.
        """
        known = {*REFUSALS, *NETWORK, *AFTERWARDS, *BODY_FAULTS, "session_lost"}
        if route not in ROUTES:
            raise ValueError(f"Unknown route {route!r}; there are {sorted(ROUTES)}.")
        if not callable(kind) and kind not in known and kind[:1] != "/":
            raise ValueError(f"Unknown kind {kind!r}; there are {sorted(known)}.")
        calls = range(nth, nth + times)
        self.faults.append([route, kind, calls, itertools.count(1), value])

    def expire_tokens(self) -> None:
        self.expired |= self.tokens
        self.tokens.clear()

    def expire_links(self) -> None:
        """Let four hours pass for all temporary links."""
        self.links = dict.fromkeys(self.links)

    @contextlib.contextmanager
    def counting(self) -> Iterator[collections.Counter[str]]:
        """Yield a Counter that holds, after the block, the calls made inside it."""
        before = self.calls.copy()
        counted: collections.Counter[str] = collections.Counter()
        try:
            yield counted
        finally:
            counted.update(self.calls - before)

    def create_session(self, *args: Any, **kwargs: Any) -> requests.Session:
        """Return a session that reaches nothing but this account."""
        session = requests.Session()
        session.mount("https://", self)
        return session

    # HTTP

    def send(self, request, stream=False, timeout=None, **kwargs):
        path = urlsplit(request.url).path
        route = path[3:] if path.startswith("/2/") else path.lstrip("/")
        with self.lock:
            self.calls[route] += 1
            self.timeouts.add(timeout)
            self.last_headers = request.headers
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self.bytes_in += len(request.body or b"")
            fault, value = self.take_fault(route)
        try:
            status, headers, body = self.answer(route, request, fault, value)
        except Refused as refused:
            status, headers, body = refused.status, refused.headers, refused.body
        except urllib3.exceptions.ProtocolError as error:
            # As requests does, which keeps the request.
            raise requests.ConnectionError(error, request=request)  # noqa: B904
        finally:
            with self.lock:
                self.in_flight -= 1
        if not isinstance(body, bytes):
            kind = "text/plain" if isinstance(body, str) else "application/json"
            headers = {"content-type": kind, **headers}
            body = (body if isinstance(body, str) else json.dumps(body)).encode()
        numbers = {"x-dropbox-request-id": f"{next(self.numbers):x}"}
        headers = {"content-length": str(len(body)), **numbers, **headers}
        self.bytes_out += len(body)
        raw = urllib3.HTTPResponse(
            body=self.body(body),
            headers={name.replace("_", "-"): value for name, value in headers.items()},
            status=status,
            preload_content=False,
            decode_content=False,
        )
        return self.build_response(request, raw)

    def answer(self, route, request, fault, value):
        """The status, the headers and the body of Dropbox's answer."""
        headers = dict(request.headers)  # as a frame of urllib3's holds them
        self.fail_before(route, fault, value)
        if self.refused:
            raise self.refused
        if route == "oauth2/token":
            return 200, {}, self.token(parse_qs(request.body))
        if request.url in self.links:
            if self.links[request.url] is None:
                raise Refused(410, "the link has expired")
            return 200, {}, self.links[request.url]
        if route not in ROUTES or request.method != "POST":
            raise Refused(404, f"FakeAccount knows no route {route}")
        self.authenticate(headers.get("Authorization", ""))
        body = request.body or b""
        try:
            argument = json.loads(headers.get("Dropbox-API-Arg") or body)
        except ValueError:
            raise bad_request("could not decode input as JSON") from None
        check_argument(route, argument)
        self.locate_paths(route, argument, headers)
        if fault == "corrupt" and route != "files/download" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        if route == "files/download":
            return self.send_file(*self.files_download(argument), request, fault)
        with self.alone_if_busy(route), self.lock:
            result = getattr(self, route.replace("/", "_"))(argument, body)
        if fault == "503_after":
            raise Refused(503, "unavailable")
        if fault == "reset_after":
            raise urllib3.exceptions.ProtocolError("reset")
        return 200, {}, {} if fault == "misfit_after" else self.quirky(result)

    @contextlib.contextmanager
    def alone_if_busy(self, route):
        """The quirk "busy": an account makes one commit at a time."""
        commits = route.endswith(("upload", "finish", "_v2")) and "append" not in route
        if "busy" not in self.quirks or not commits:
            yield
        elif not self.committing.acquire(blocking=False):
            wait = "path/" if route == "files/upload" else ""
            raise conflict(f"{wait}too_many_write_operations")
        else:
            try:
                time.sleep(0.002)
                yield
            finally:
                self.committing.release()

    def locate_paths(self, route, argument, headers):
        """Let the paths begin at the account's root, not in a namespace or at an id."""
        root = json.loads(headers.get("Dropbox-API-Path-Root", '{"namespace_id": "1"}'))
        if root["namespace_id"] not in self.namespaces:
            raise refusal(422, "no_permission")
        missing = "path_lookup" if route == "files/delete_v2" else "path"
        target = argument.get("commit", argument)
        for name in ("path", "from_path", "to_path"):
            path = target.get(name, "rev:")
            number, rest = root["namespace_id"], path
            if path.startswith("rev:"):
                continue
            if path.startswith("ns:"):
                number, slash, rest = path[3:].partition("/")
                rest = slash + rest
            if path.startswith("id:"):
                found = [one.path for one in self.entries.values() if one.id == path]
                number, rest = "1", found[0] if found else None
            if rest is None or number not in self.namespaces:
                raise conflict(f"{missing}/not_found")
            target[name] = self.namespaces[number] + rest

    def quirky(self, result):
        """The result as some account may send it."""
        if isinstance(result, list):
            return [self.quirky(value) for value in result]
        if not isinstance(result, dict):
            return result
        result = {name: self.quirky(value) for name, value in result.items()}
        if "rev" in result and self.is_paper(result["name"]):
            result["is_downloadable"] = False
        if "no_hash" in self.quirks or result.get("is_downloadable") is False:
            result.pop("content_hash", None)
        if "no_paths" in self.quirks:
            result.pop("path_lower", None)
            result.pop("path_display", None)
        return result

    def is_paper(self, name):
        return "paper" in self.quirks and name.endswith(".paper")

    def send_file(self, metadata, data, request, fault):
        if self.is_paper(metadata["name"]):
            raise conflict("unsupported_file")
        metadata = json.dumps(self.quirky(metadata))
        status, headers = 200, {"dropbox-api-result": metadata}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
        if wanted and wanted[0] != "bytes=-":  # another Range is ignored, as in HTTP
            first, last = wanted.groups()
            if first:
                first, last = int(first), min(int(last or len(data)), len(data) - 1)
            else:  # a suffix
                first, last = max(0, len(data) - int(last)), len(data) - 1
            if first >= len(data):
                raise Refused(416, "range not satisfiable")
            headers["content-range"] = f"bytes {first}-{last}/{len(data)}"
            surplus = 100 if "surplus" in self.quirks else 0
            data, status = data[first : last + 1 + surplus], 206
        if "gzip" in self.quirks and "gzip" in request.headers["Accept-Encoding"]:
            data, headers["content-encoding"] = gzip.compress(data, 1), "gzip"
        headers["content-length"] = str(len(data))
        if fault in ("truncate", "short"):
            data = data[: len(data) // 2]
        if fault == "short":  # as old versions of urllib3 pass on what is truncated
            del headers["content-length"]
        if fault == "corrupt":
            data = bytes([data[0] ^ 1]) + data[1:]
        return status, headers, data

    def authenticate(self, authorization):
        token = authorization.partition("Bearer ")[2]
        if not token.strip():
            raise Refused(400, "The given OAuth 2 access token is malformed.")
        if token not in self.tokens:
            kind = "expired" if token in self.expired else "invalid"
            self.fail_before("", f"{kind}_token", 0)

    def token(self, form):
        form = {name: values[0] for name, values in form.items()}
        if "code" in form:
            return self.exchange(form)
        owner = self.refresh_tokens.get(form.get("refresh_token"))
        if not owner:
            raise Refused(400, {"error": "invalid_grant"})
        if owner != (form.get("client_id"), form.get("client_secret")):
            raise Refused(400, {"error": "invalid_client: bad app key or secret"})
        token = f"sl.fresh-{next(self.numbers)}"
        self.tokens.add(token)
        lives = {"expires_in": self.expires_in}
        return {"access_token": token, "token_type": "bearer", **lives}

    def exchange(self, form):
        """An authorization code for a refresh token, with PKCE. A code works once."""
        if form["client_id"] != "app-key":
            raise Refused(400, {"error": "invalid_client"})
        if form["code"] not in self.codes or "code_verifier" not in form:
            raise Refused(400, {"error": "invalid_grant"})
        scope = self.codes.pop(form["code"])
        self.refresh_tokens["pkce-refresh-token"] = ("app-key", None)
        answer = {"refresh_token": "pkce-refresh-token", "uid": "1", "scope": scope}
        return {"access_token": "sl.x", "account_id": "dbid:1", **answer}

    # Faults

    def take_fault(self, route):
        for wanted, kind, calls, count, value in self.faults:
            if wanted in ("*", route) and next(count) in calls:
                return kind, value
        return None, 0

    def fail_before(self, route, fault, value):
        """Raise the failure that comes before anything is done."""
        if callable(fault):
            fault()
            fault = "503"
        if fault in NETWORK:
            raise NETWORK[fault]()
        if fault == "session_lost":
            finish = route.endswith("finish")
            raise conflict("lookup_failed/not_found" if finish else "not_found")
        if fault and fault.startswith("/"):
            fault = fault[1:]
            if route == "files/upload" and fault.startswith("path/"):
                raise self.upload_error(conflict(fault[5:]), b"")
            raise conflict(fault)
        if fault in REFUSALS:
            raise self.refusal(*REFUSALS[fault], value)

    def refusal(self, status, headers, error, value):
        """A row of REFUSALS as an answer."""
        headers = {k: str(value) if v == "VALUE" else v for k, v in headers.items()}
        if "content-type" in headers or isinstance(error, list):
            return Refused(status, error, **headers)
        if status == 429:
            error = {**error, "reason": {".tag": error["reason"]}}
            if error.pop("retry_after", "") and "bare_429" not in self.quirks:
                error["retry_after"] = value
        return refusal(status, error, headers)

    def upload_error(self, refused, data):
        """A write error as files/upload has it: with a session that holds the data."""
        session = ""
        if "forgetful" not in self.quirks:
            session = f"session-{next(self.numbers)}"
            self.sessions[session] = Session(False, {0: data})
        failed = {"reason": refused.body["error"], "upload_session_id": session}
        return conflict({".tag": "path", **failed})

    # Routes

    def find(self, path, error="path"):
        if path in ("", "/"):
            raise bad_request("path: The root folder is unsupported.")
        if path.startswith("rev:"):
            entry = self.revisions.get(path[4:])
        elif self.malformed(path):
            raise conflict(f"{error}/malformed_path")
        else:
            entry = self.entries.get(fold(path))
        if not entry:
            raise conflict(f"{error}/not_found")
        return entry

    def find_file(self, path):
        entry = self.find(path)
        if entry.data is None:
            raise conflict("path/not_file")
        return entry

    def malformed(self, path):
        return "\\" in path or any(
            part in ("", ".", "..") or part.endswith(" ") or len(part) > 255
            or "\0" in part or "\x7f" in part
            for part in path[1:].split("/")
        )  # fmt: skip

    def commit(self, target, data):
        """Write a file; raises the 409 of a WriteError."""
        path = unicodedata.normalize("NFC", target["path"])
        if self.malformed(path):
            raise conflict("malformed_path")
        if posixpath.basename(path).lower() in DISALLOWED_NAMES:
            raise conflict("disallowed_name")
        mode = target.get("mode") or "add"
        mode = mode if isinstance(mode, dict) else {".tag": mode}
        strict = target.get("strict_conflict")
        found = self.entries.get(fold(path))
        if found and found.data is None:
            raise conflict("conflict/folder")
        if found and found.data == data and not strict:
            return found.metadata()
        if found and found.data == data and "strict_same" in self.quirks:
            raise conflict("conflict/file")
        known = mode[".tag"] == "overwrite" or (
            found and found.rev == mode.get("update")
        )
        if (found and not known) or (not found and "update" in mode and strict):
            if not target.get("autorename"):
                raise conflict("conflict/file")
            path = self.rename(path)
            found = None
        self.make_folders(path)
        now = datetime.datetime.now(datetime.timezone.utc)
        entry = Entry(found.path if found else path, data, f"{next(self.numbers):09x}")
        entry.id = found.id if found else self.new_id()
        entry.modified = now.strftime("%Y-%m-%dT%H:%M:%SZ")
        entry.client_modified = target.get("client_modified")
        self.entries[fold(path)] = self.revisions[entry.rev] = entry
        self.changes.append(entry.metadata())
        return entry.metadata()

    def rename(self, path):
        """Another path: with a number before the extension of the name."""
        folder, name = posixpath.split(path)
        root, extension = posixpath.splitext(name)
        for number in itertools.count(1):
            other = posixpath.join(folder, f"{root} ({number}){extension}")
            if fold(other) not in self.entries:
                return other

    def make_folders(self, path):
        *parents, _ = itertools.accumulate(path[1:].split("/"), "{}/{}".format)
        for parent in (f"/{parent}" for parent in parents):
            if getattr(self.entries.get(fold(parent)), "data", None) is not None:
                raise conflict("conflict/file_ancestor")
            if fold(parent) not in self.entries:
                self.entries[fold(parent)] = Entry(parent, id=self.new_id())
                self.changes.append(self.entries[fold(parent)].metadata())

    def new_id(self):
        return f"id:{next(self.numbers):022x}"

    def check_hash(self, argument, body):
        if len(body) > MAX_REQUEST:
            raise conflict("payload_too_large")
        if argument.get("content_hash") not in (None, content_hash(body)):
            raise conflict("content_hash_mismatch")

    def files_upload(self, argument, body):
        self.check_hash(argument, body)
        try:
            return untagged(self.commit(argument, body))
        except Refused as refused:
            raise self.upload_error(refused, body) from None

    def files_upload_session_start(self, argument, body):
        self.check_hash(argument, body)
        kind = argument.get("session_type") or "sequential"
        concurrent = "concurrent" in (kind, kind[".tag"] if ".tag" in kind else kind)
        if concurrent and body:
            raise conflict("concurrent_session_data_not_allowed")
        if concurrent and argument.get("close"):
            raise conflict("concurrent_session_close_not_allowed")
        session = f"session-{next(self.numbers)}"
        self.sessions[session] = Session(concurrent, {0: body})
        if argument.get("close"):
            self.sessions[session].end = len(body)
        return {"session_id": session}

    def append(self, cursor, body, close, error=""):
        """Add to a session; raises the 409 of an UploadSessionLookupError, in error."""
        session, offset = self.sessions.get(cursor["session_id"]), cursor["offset"]
        if not session:
            raise conflict(f"{error}not_found")
        length = len(session.data)
        if not session.concurrent and offset != length:
            tag = {".tag": "incorrect_offset", "correct_offset": length}
            lookup_failed = {".tag": "lookup_failed", "lookup_failed": tag}
            raise conflict(lookup_failed if error else tag)
        if session.concurrent and offset % HASH_BLOCK:
            raise conflict(f"{error}concurrent_session_invalid_offset")
        if session.concurrent and len(body) % HASH_BLOCK and not close:
            raise conflict(f"{error}concurrent_session_invalid_data_size")
        empty = close and offset and not body
        if session.concurrent and empty and "empty_close" in self.quirks:
            raise conflict(f"{error}concurrent_session_invalid_data_size")
        if session.end is not None and (session.concurrent or body or close):
            raise conflict(f"{error}closed")
        if body:
            session.pieces[offset] = body
        if close:
            session.end = offset + len(body)
        return session

    def files_upload_session_append_v2(self, argument, body):
        self.check_hash(argument, body)
        self.append(argument["cursor"], body, argument.get("close"))

    def files_upload_session_finish(self, argument, body):
        self.check_hash(argument, body)
        cursor, error = argument["cursor"], "lookup_failed/"
        session = self.sessions.get(cursor["session_id"])
        if session and session.concurrent:
            if body:
                raise conflict("concurrent_session_data_not_allowed")
            if session.end is None:
                raise conflict("concurrent_session_not_closed")
            if not len(session.data) == session.end == cursor["offset"]:
                raise conflict("concurrent_session_missing_data")
        else:
            session = self.append(cursor, body, False, error)
        try:
            metadata = self.commit(argument["commit"], session.data)
        except Refused as refused:
            raise conflict({".tag": "path", "path": refused.body["error"]}) from None
        if "kept_sessions" not in self.quirks:
            del self.sessions[cursor["session_id"]]
        return untagged(metadata)

    def files_download(self, argument):
        entry = self.find_file(argument["path"])
        return untagged(entry.metadata()), entry.data

    def files_get_metadata(self, argument, body):
        return self.find(argument["path"]).metadata()

    def below(self, path):
        """The keys of an entry, and of all that is in it."""
        start = f"{fold(path)}/"
        return [key for key in self.entries if f"{key}/".startswith(start)]

    def files_delete_v2(self, argument, body):
        entry = self.find(argument["path"], "path_lookup")
        for key in self.below(entry.path):
            del self.entries[key]
        gone = {**entry.metadata(), ".tag": "deleted"}
        kept = (".tag", "name", "path_lower", "path_display")
        self.changes.append({name: gone[name] for name in kept})
        return {"metadata": entry.metadata()}

    def files_move_v2(self, argument, body, moves=True):
        entry = self.find(argument["from_path"], "from_lookup")
        target = argument["to_path"]
        if self.malformed(target):
            raise conflict("to/malformed_path")
        if fold(target) in self.entries:
            if not argument.get("autorename"):
                raise conflict("to/conflict/file")
            target = self.rename(target)
        self.make_folders(target)
        for key in self.below(entry.path):
            one = copy.copy(self.entries[key])
            one.path = target + one.path[len(entry.path) :]
            one.id = one.id if moves else self.new_id()
            self.entries[fold(one.path)] = one
            if moves:
                del self.entries[key]
        return {"metadata": self.entries[fold(target)].metadata()}

    def files_copy_v2(self, argument, body):
        return self.files_move_v2(argument, body, moves=False)

    def files_list_folder(self, argument, body):
        folder, recursive = argument["path"], argument.get("recursive")
        if folder == "/":
            raise bad_request('path: Specify the root folder as "" rather than "/".')
        if folder and self.find(folder).data is not None:
            raise conflict("path/not_folder")
        start = f"{fold(folder)}/"

        def inside(metadata):
            path = metadata["path_lower"]
            below = path[len(start) :]
            return path.startswith(start) and (recursive or "/" not in below)

        found = [entry.metadata() for _, entry in sorted(self.entries.items())]
        size = min(argument.get("limit") or self.page_size, self.page_size)
        found = [*filter(inside, found)]
        return self.page(found, inside, len(self.changes), size, first=True)

    def files_list_folder_continue(self, argument, body):
        if argument["cursor"] not in self.cursors:
            raise conflict("reset")
        found, inside, known, size = self.cursors[argument["cursor"]]
        found = [*found, *filter(inside, self.changes[known:])]
        return self.page(found, inside, len(self.changes), size)

    def page(self, found, inside, known, size, first=False):
        """A page of what was found, and what has changed since known changes."""
        count = 0 if first and "empty_pages" in self.quirks else size
        cursor, rest = f"cursor-{next(self.numbers)}", found[count:]
        self.cursors[cursor] = (rest, inside, known, size)
        more = bool(rest) or not count
        return {"entries": found[:count], "cursor": cursor, "has_more": more}

    def files_get_temporary_link(self, argument, body):
        entry = self.find_file(argument["path"])
        if self.is_paper(entry.path):
            raise conflict("unsupported_file")
        link = f"https://content.example/apitl/{next(self.numbers)}"
        self.links[link] = entry.data
        return {"metadata": untagged(entry.metadata()), "link": link}


class FakeDropbox(dropbox.Dropbox):
    """A real client of the SDK on a fake account, to be assigned to storage.client."""

    def __init__(
        self, account: FakeAccount | None = None, token: str = "valid-token"
    ) -> None:
        self.account = account or FakeAccount()
        super().__init__(token, session=self.account.create_session())

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        """A plain client on the same account, as for with_path_root()."""
        client = copy.copy(self)
        client.__class__ = dropbox.Dropbox
        return client.clone(*args, **kwargs)


class FakeDropboxMixin:
    """For a TestCase: in each test, all storages use a new account, self.account."""

    def setUp(self) -> None:
        super().setUp()  # type: ignore[misc]
        self.account = FakeAccount()
        replaced = self.account.replace_dropbox()
        replaced.__enter__()
        self.addCleanup(replaced.__exit__, None, None, None)  # type: ignore[attr-defined]


# ---- The end of the fake Dropbox. ----
import _thread
import csv
import errno
import faulthandler
import gc
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import types
import unittest
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import django
from django import urls
from django.conf import global_settings, settings

if not settings.configured:
    if "DJANGO_SETTINGS_MODULE" not in os.environ:
        needed = ["django.contrib.auth", "django.contrib.contenttypes"]
        settings.configure(SECRET_KEY="for tests", INSTALLED_APPS=needed)
    django.setup()

from django.contrib.auth.decorators import login_required
from django.contrib.staticfiles.finders import get_finder
from django.contrib.staticfiles.storage import ManifestFilesMixin
from django.core.cache import cache, caches
from django.core.cache.backends.base import BaseCache
from django.core.exceptions import ImproperlyConfigured, SuspiciousFileOperation
from django.core.files import storage as django_storage
from django.core.files.base import ContentFile, File
from django.core.files.storage import FileSystemStorage
from django.core.files.uploadedfile import SimpleUploadedFile
from django.core.management import call_command
from django.db import models
from django.db.models.fields.files import FieldFile
from django.http import FileResponse, Http404
from django.templatetags.static import static
from django.test import RequestFactory, SimpleTestCase, override_settings
from django.utils.encoding import filepath_to_uri
from django.utils.module_loading import import_string

module = import_module()
DropboxStorage = module.DropboxStorage
DropboxStorageException = module.DropboxStorageException
BACKEND = f"{module.__name__}.DropboxStorage"
HAS_STORAGES = django.VERSION >= (4, 2)
HERE = pathlib.Path(__file__).resolve()
CONTENTTYPES = "django.contrib.contenttypes"
HAS_CONTENTTYPES = any(app.startswith(CONTENTTYPES) for app in settings.INSTALLED_APPS)

# A copy in another project adds no test to the runs of that project.
ASKED = "DROPBOX_STORAGE_TESTS" in os.environ
PROJECT = HERE.with_name("pyproject.toml")
ASKED |= PROJECT.exists() and '"dropbox_storage"' in PROJECT.read_text(encoding="utf-8")
__test__ = ASKED  # for pytest


def load_tests(loader, tests, pattern):
    """For unittest and manage.py test: discovery gives a pattern, a name does not."""
    return tests if ASKED or not pattern else unittest.TestSuite()


# The tests run without a network, without the settings of the project, in small sizes


class Network:
    """The way out of the process, which is shut while tests run."""

    def __init__(self):
        self.is_open, self.attempts = False, []
        self.connect = urllib3.util.connection.create_connection

    def shut(self):
        way = urllib3.util.connection
        return unittest.mock.patch.object(way, "create_connection", self.refuse)

    def refuse(self, address, *args, **kwargs):
        if self.is_open:
            return self.connect(address, *args, **kwargs)
        self.attempts.append(address)
        raise RuntimeError(
            f"A test has tried to reach {address[0]}: FakeAccount.connect() its storage."
        )


network = Network()

# Stands for 1 MiB in all tests but those that run at true size.
UNIT = 1024


def find_sizes(place):
    found = {name: getattr(place, name) for name in dir(place) if name.isupper()}
    return {name: n for name, n in found.items() if type(n) is int and n >= 128 * 1024}


PLACES = (module, sys.modules[__name__], DropboxStorage)
TRUE_SIZES = {place: find_sizes(place) for place in PLACES}


@contextlib.contextmanager
def sizes(unit):
    """Let the storage and the fake work with this many bytes in place of 1 MiB.

    That changes each constant of 128 KiB and more.
    """
    with contextlib.ExitStack() as stack:
        for place, found in TRUE_SIZES.items():
            for name, value in found.items():
                small = max(value * unit // MiB, 128)
                patch = unittest.mock.patch.object(place, name, small)
                stack.enter_context(patch)
        content_hash.cache_clear()
        stack.callback(content_hash.cache_clear)
        yield


def true_sizes():
    return sizes(MiB)


# What a project may have set, as Django has it by default.
NEUTRAL = "CACHES|LOGGING|MEDIA_|MIDDLEWARE|STATIC_|STATICFILES_[DF]|FILE_UPLOAD_|"
NEUTRAL += "ROOT_URLCONF|TIME_ZONE|"
NEUTRAL += "STORAGES" if HAS_STORAGES else ".*_STORAGE"
neutral_settings = override_settings(
    **{
        name: getattr(global_settings, name)
        for name in dir(global_settings)
        if re.match(NEUTRAL, name)
    },
    USE_TZ=True,
)
isolation = contextlib.ExitStack()


def setUpModule():
    faulthandler.dump_traceback_later(600, exit=True)  # a hang ends with a traceback
    isolation.callback(faulthandler.cancel_dump_traceback_later)
    isolation.enter_context(network.shut())
    isolation.enter_context(neutral_settings)
    isolation.enter_context(sizes(UNIT))
    for name in dir(settings):
        if name.startswith("DROPBOX_"):
            delattr(settings, name)
    isolation.callback(logging.disable, logging.root.manager.disable)
    logging.disable(logging.NOTSET)
    isolation.callback(setattr, module.logger, "disabled", module.logger.disabled)
    module.logger.disabled = False
    silent = logging.NullHandler()
    isolation.callback(module.logger.removeHandler, silent)
    module.logger.addHandler(silent)


def tearDownModule():
    isolation.close()
    expect(not network.attempts, f"Something asked for {network.attempts}.")


# Numbers of processes that have no client yet.
PROCESSES = itertools.count(1)
GETPID = os.getpid
START_NEW_THREAD = _thread.start_new_thread
REFRESHING = {
    "oauth2_access_token": None,
    "oauth2_refresh_token": "valid-refresh-token",
}
REFRESHING.update(app_key="app-key", app_secret="app-secret")


def expect(condition, message="not so"):
    """As an assert statement, which Python leaves out with -O."""
    if not condition:
        raise AssertionError(message)


def noise(size, seed=1):
    return random.Random(seed).randbytes(size)


LARGE, HUGE = noise(9 * UNIT, 6), noise(20 * UNIT, 7)


class UsesStorage:
    """What tests do with self.storage, or with another one."""

    def save(self, name, content=b"", storage=None):
        return (storage or self.storage).save(name, ContentFile(content))

    def write(self, name, content, mode="wb", storage=None):
        with (storage or self.storage).open(name, mode) as file:
            file.write(content)

    def read(self, name, storage=None, mode="rb"):
        with (storage or self.storage).open(name, mode) as file:
            return file.read()


class StorageTestCase(UsesStorage, SimpleTestCase):
    """Tests of one storage on one fake account."""

    def setUp(self):
        cache.clear()
        self.clock = Clock()
        patch = unittest.mock.patch.object
        self.enter(patch(module, "time", self.clock))
        self.other_threads = threading.enumerate()
        self.starting = []  # threads in which the module starts a Thread
        self.enter(patch(_thread, "start_new_thread", self.start))
        self.new_account()
        self.enter(self.mounted(self.account))

    def enter(self, context):
        """Enter the context until the end of the test."""
        context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)

    @contextlib.contextmanager
    def mounted(self, account):
        """Inside the block, the clients that the module makes talk to this account."""
        patch = unittest.mock.patch
        process = next(PROCESSES)
        with patch.object(os, "getpid", lambda: process * 10**9 + GETPID()):
            with patch.object(dropbox, "create_session", account.create_session):
                yield account

    def new_account(self, *args, **kwargs):
        self.account = FakeAccount(*args, **kwargs)
        self.storage = self.account.storage()

    def holds(self, files):
        """The account holds these files, by name, and no others."""
        found = self.account.files()
        expected = {f"/{name}": content for name, content in files.items()}
        self.assertEqual(found.keys(), expected.keys())
        self.assertTrue(found == expected, "other bytes")

    @contextlib.contextmanager
    def costs(self, *routes):
        """The block makes one call of each of these routes, and no others."""
        try:
            with self.account.counting() as counted:
                yield
        finally:  # also if the block raises what is expected around it
            self.assertEqual(counted, collections.Counter(routes))

    @contextlib.contextmanager
    def failing(self, route, kind, nth=1, times=1, value=0):
        """Inside the block, the route fails."""
        self.account.fail(route, kind, nth, times, value)
        try:
            yield
        finally:
            self.account.faults.clear()

    @contextlib.contextmanager
    def refused(self, route, kind, **options):
        """Inside the block the route fails, and the storage reports that."""
        with self.failing(route, kind, **options):
            with self.assertRaises(DropboxStorageException) as caught:
                yield caught

    def fails(self, words):
        return self.assertRaisesRegex(DropboxStorageException, words)

    def raises(self, error, message):
        """Expect an error whose whole message is this."""
        return self.assertRaisesRegex(error, f"^{re.escape(message)}$")

    def ends_its_threads(self):
        """Nobody waits for threads in the background, but they soon end."""
        end = time.monotonic() + 5
        while self.has_running_threads() and time.monotonic() < end:
            time.sleep(0.001)
        self.assertFalse(self.has_running_threads())

    def has_running_threads(self):
        """Whether a thread that the module has started has not ended."""
        named = {one for one in threading.enumerate() if one.name == "dropbox_storage"}
        return bool(self.starting) or not named.issubset(self.other_threads)

    def start(self, function, args):
        """As _thread.start_new_thread(). It notes which Thread is not running yet."""
        starting = object()
        self.starting.append(starting)

        def run(*args):
            function(*args)
            del args
            self.starting.remove(starting)

        try:
            return START_NEW_THREAD(run, args)
        except BaseException:
            self.starting.remove(starting)
            raise


class Unsized:
    """Content that knows no size, has no seek and cannot be read twice."""

    def __init__(self, *chunks, then=None):
        self.remaining, self.then = list(chunks), then

    def chunks(self):
        while self.remaining:
            yield self.remaining.pop(0)
        if self.then:
            self.then()


class Sizeless(Unsized):
    size = property(lambda self: 1 / 0)


class Broken(Unsized):
    def chunks(self):
        yield from super().chunks()
        raise ZeroDivisionError("half way")


class StallingAccount(FakeAccount):
    """Answers nothing of the routes that stall, for longer than any test waits."""

    def __init__(self):
        super().__init__()
        self.stalling, self.waiting = (), 0

    def answer(self, route, *args):
        if route in self.stalling:
            with self.lock:
                self.waiting += 1
            time.sleep(60)
        return super().answer(route, *args)


# -- The tests themselves: how they are kept apart, and what several use ---------------


class IsolationTests(unittest.TestCase):
    def test_a_storage_without_an_account_reaches_no_network(self):
        storage, attempts = DropboxStorage("token"), len(network.attempts)
        for act in (
            lambda: storage.save("a", ContentFile(LARGE)),
            lambda: requests.get("https://www.example.com/"),
        ):
            with self.assertRaisesRegex(RuntimeError, "A test has tried to reach"):
                act()
        self.assertEqual(len(network.attempts), attempts + 2)
        del network.attempts[attempts:]

    def test_the_projects_settings_are_not_seen(self):
        self.assertFalse([n for n in dir(settings) if n.startswith("DROPBOX_")])
        self.assertEqual(DropboxStorage().root_path, "/")
        default = type(django_storage.default_storage._wrapped or object())
        self.assertFalse(issubclass(default, DropboxStorage))

    def test_a_discovery_in_another_project_finds_no_test(self):
        tests, nothing = object(), unittest.TestSuite()
        here = sys.modules[__name__]
        with unittest.mock.patch.object(here, "ASKED", False):
            self.assertEqual(load_tests(None, tests, "test*.py"), nothing)
            self.assertIs(load_tests(None, tests, None), tests)


def run_python(code, folder=None, timeout=60):
    """What Python prints for the code, in a folder or where these tests are."""
    if not folder:
        name = HERE.stem if __name__ == "__main__" else __name__
        folder = HERE.parents[name.count(".")]
        small = "small = sizes(UNIT); small.__enter__()"
        code = f"from {name} import *\n{small}\n{code}"
    names = os.environ.keys() - {"DJANGO_SETTINGS_MODULE"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={name: os.environ[name] for name in names},
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    return done.stdout


# What is done: the storage's options, and the operation, whose result is compared.


def write(mode):
    def act(storage):
        with storage.open("a", mode) as file:
            file.write(b"written")

    return act


def read(name):
    def act(storage):
        with storage.open(name) as file:
            return hashlib.sha256(file.read()).hexdigest()

    return act


def save(name, content):
    return lambda storage: storage.save(name, ContentFile(content))


OVERWRITE, UPDATE = {"write_mode": "overwrite"}, {"write_mode": "update"}
OPERATIONS = {
    "save": ({}, save("new", b"new")),
    "save large": ({}, save("new", LARGE)),
    "save a taken name": ({}, lambda storage: storage.save("a", ContentFile(b"x"))[:2]),
    "overwrite": (OVERWRITE, save("a", b"new")),
    "update": (UPDATE, save("a", b"new")),
    "update large": (UPDATE, save("a", LARGE)),
    "write": ({}, write("wb")),
    "append": ({}, write("ab")),
    "read": ({}, read("a")),
    "read huge": ({}, read("huge")),
    "exists": ({}, lambda storage: (storage.exists("a"), storage.exists("none"))),
    "size": ({}, lambda storage: storage.size("a")),
    "time": ({}, lambda storage: storage.get_modified_time("a")),
    "list": ({}, lambda storage: storage.listdir("dir")),
    "delete": ({}, lambda storage: storage.delete("a")),
    "delete a folder": ({}, lambda storage: storage.delete("dir")),
    "link": ({}, lambda storage: storage.url("a")[:30]),
}


def filled_account():
    """With what these operations work on."""
    cache.clear()
    account = FakeAccount(page_size=2)
    account.put("/a", b"old")
    account.put("/huge", HUGE)
    for number in range(5):
        account.put(f"/dir/{number}")
    return account


TRANSIENT = tuple("500 500_empty 502 503 503_later 429 429_text 429_new".split())
TRANSIENT += ("too_many_writes", "reset", "reset_after", "503_after", "stall", "tls")
TRANSIENT += ("html", "garbage", "timeout", "expired_token")
CORE = ("503", "503_after", "reset_after", "429", "stall", "expired_token")
PERMANENT = ("invalid_token", "missing_scope", "suspended", "bad_input", "/brand_new")
PERMANENT += ("no_route", "account_type", "route_access", "redirect", "app_scope")
# Those that only some routes know.
BUSY_ERRORS = {
    "files/upload": "/path/too_many_write_operations",
    "files/upload_session/finish": "/too_many_write_operations",
    "files/delete_v2": "/too_many_write_operations",
}
ROUTE_REFUSALS = {
    "files/upload": ("/path/insufficient_space", "/path/malformed_path"),
    "files/upload_session/append_v2": ("session_lost", "/payload_too_large"),
    "files/upload_session/finish": ("session_lost", "/path/insufficient_space"),
    "files/delete_v2": ("/path_write/no_write_permission", "/too_many_files"),
    "files/download": ("/path/restricted_content",),
    "files/get_metadata": ("/path/restricted_content",),
    "files/get_temporary_link": ("/unsupported_file",),
}

# What is refused, and what the message says of it after the route and the path. The
# hint that follows is the module's own: one that fits these words.
PATH_ERRORS = "insufficient_space no_write_permission disallowed_name malformed_path "
PATH_ERRORS += "team_folder operation_suppressed restricted_content access_restricted "
PATH_ERRORS += "unsupported_file"
SAID = {
    **{f"/path/{tag}": f"path/{tag}" for tag in PATH_ERRORS.split()},
    "/too_many_files": "too_many_files",
    "/email_not_verified": "email_not_verified",
    "missing_scope": "missing_scope files.x",
    "app_scope": "HTTP 400 The app does not have the required scope 'files.x'.",
    "suspended": "user_suspended",
    "select_user": "invalid_select_user",
    "no_permission": "no_permission",
    "sandbox": "HTTP 400 Path root is not supported for sandbox app",
    "invalid_token": "invalid_access_token",
    "expired_token": "expired_access_token",
    "account_type": "invalid_account_type/feature",
    "route_access": "route_access_denied",
}
# Those without a hint.
SAID_ALONE = {
    "/brand/new/tags": "brand/new/tags",
    "/other": "other",
    "bad_input": "HTTP 400 Error in call to API function: bad input",
    "list": 'HTTP 400 ["no object"]',
    "redirect": "HTTP 307",
    "no_route": "HTTP 404 Unknown API function",
}


def answers(status, body, **headers):
    """A fault for fail(): this answer, whatever was asked."""

    def fail():
        raise Refused(status, body, **{"content-type": "application/json", **headers})

    return fail


def raised_by(name, error):
    """A fault for fail(): the error, raised by a function of the module of this name."""
    names = {"__name__": name, "error": error}
    exec("def fail(): raise error", names)
    return names["fail"]


# -- Options ---------------------------------------------------------------------------


class OptionTests(StorageTestCase):
    # fmt: off
    settings = {  # two values, and the default
        "oauth2_access_token": ("DROPBOX_OAUTH2_TOKEN", "token-1", "token-2", None),
        "oauth2_refresh_token": ("DROPBOX_OAUTH2_REFRESH_TOKEN", "token-1", "token-2", None),
        "app_key": ("DROPBOX_APP_KEY", "key-1", "key-2", None),
        "app_secret": ("DROPBOX_APP_SECRET", "secret-1", "secret-2", None),
        "root_path": ("DROPBOX_ROOT_PATH", "/one", "/two", "/"),
        "timeout": ("DROPBOX_TIMEOUT", 1, 2.5, 100),
        "max_wait": ("DROPBOX_MAX_WAIT", 30, 0, 60),
        "write_mode": ("DROPBOX_WRITE_MODE", "update", "overwrite", "add"),
        "base_url": ("DROPBOX_BASE_URL", "/one/", "/two/", None),
        "url_cache": ("DROPBOX_URL_CACHE", "other", "default", "default"),
        "url_cache_timeout": ("DROPBOX_URL_CACHE_TIMEOUT", 60, 0, 3600),
        "namespace_id": ("DROPBOX_NAMESPACE_ID", "1", "2", None),
        "team_member_id": ("DROPBOX_TEAM_MEMBER_ID", "dbmid:1", "dbmid:2", None),
    }
    seconds = "None or a number of seconds from"
    url = "a URL such as '/media/' or 'https://host/', or None"
    text = "printable ASCII without spaces, quotes and backslashes"
    blank = "a line break or a blank at its end"
    other = "another character, which is not shown"
    path = "a path without '..', NUL and half characters"
    old = "(django-storages put a relative one into the working directory)"
    wrong = [  # option, value, what it must be, what is said of the value, if not its repr
        ("root_path", "media", f"a path that begins with '/', such as '/media' {old}"),
        ("root_path", "", f"a path that begins with '/', such as '/' {old}"),
        ("root_path", "/a/../b", path),
        ("root_path", "/..", path),
        ("root_path", "/a\0b", path),
        ("root_path", "/a\ud800", path),
        ("write_mode", "append", "one of 'add', 'overwrite', 'update'"),
        ("timeout", 0, f"{seconds} 0.001 to 86400"),
        ("timeout", "9", f"{seconds} 0.001 to 86400"),
        ("timeout", True, f"{seconds} 0.001 to 86400"),
        ("timeout", 86401, f"{seconds} 0.001 to 86400"),
        ("max_wait", -1, f"{seconds} 0 to 86400"),
        ("max_wait", 86401, f"{seconds} 0 to 86400"),
        ("url_cache", "links", "one of 'default', 'other'"),
        ("url_cache_timeout", 10801, f"{seconds} 0 to 10800"),
        ("base_url", 7, url), ("base_url", "media/", url), ("base_url", "https:///a", url),
        ("base_url", "/a\n", url),
        ("namespace_id", 42, text, "a value of type int"),
        ("oauth2_refresh_token", "sl.x", "the refresh_token of Dropbox's answer", "an access token"),
    ]
    wrong_credentials = [
        ('"token"', other), ("'token'", other), ("to\\ken", other), ("to ken", other), ("t\xf6ken", other),
        ("token\n", blank), ("token\r\n", blank), ("token ", blank), (b"token", "a value of type bytes"),
        (7, "a value of type int"),
    ]
    right = [("root_path", "/"), ("timeout", 0.001), ("timeout", 86400), ("timeout", None), ("max_wait", 0),
             ("max_wait", None), ("max_wait", 86400), ("url_cache_timeout", 10800), ("url_cache_timeout", None),
             ("base_url", ""), ("base_url", "//host"), ("base_url", "https://host"), ("app_key", "")]
    # fmt: on

    def setUp(self):
        super().setUp()
        backend = {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}
        self.enter(override_settings(CACHES={"default": backend, "other": backend}))

    def test_argument_goes_before_class_attribute_before_setting_before_default(self):
        for option, (setting, first, second, default) in self.settings.items():
            with self.subTest(option):
                subclass = type("Subclass", (DropboxStorage,), {option: first})
                before = DropboxStorage()
                self.assertEqual(getattr(before, option), default)
                with override_settings(**{setting: second}):
                    self.assertEqual(getattr(before, option), second)
                    self.assertEqual(getattr(subclass(), option), first)
                    argument = subclass(**{option: second})
                    self.assertEqual(getattr(argument, option), second)
                    with unittest.mock.patch.object(argument, option, first):
                        self.assertEqual(getattr(argument, option), first)

    def test_wrong_values_are_named_with_what_would_do(self):
        wrong = [*self.wrong]
        for name, case in itertools.product(module.CREDENTIALS, self.wrong_credentials):
            wrong.append((name, case[0], self.text, case[1]))
        for option, value, wanted, *found in wrong:
            setting = self.settings[option][0]
            found = found[0] if found else repr(value)
            message = f"{option} (or {setting}) must be {wanted}: found {found}."
            with self.subTest(option=option, value=value):
                with self.raises(ImproperlyConfigured, message):
                    DropboxStorage(**{option: value})
                with override_settings(**{setting: value}):
                    with self.raises(ImproperlyConfigured, message):
                        DropboxStorage()
                with self.raises(ImproperlyConfigured, message):
                    type("Media", (DropboxStorage,), {option: value})()
        for option, value in self.right:
            self.assertEqual(getattr(DropboxStorage(**{option: value}), option), value)

    def test_names_of_django_storages_and_unknown_ones_are_refused(self):
        """Ignored, they would put files into another folder."""
        values = ("/media", lambda self: "/media", property(lambda self: 1 / 0))
        for name, advice in module.FOREIGN_HOOKS.items():
            ignored = "belongs to django-storages and would be ignored"
            for value in values:
                message = f"{name} of Media {ignored}: {advice}."
                with self.raises(ImproperlyConfigured, message):
                    type("Media", (DropboxStorage,), {name: value})()
        for option, message in (
            ("location", "^location of DropboxStorage belongs to .* rename it.$"),
            *((name, f"^Unknown option {name}; there are app_key, app_secret,")
              for name in ("token", "preload_metadata", "shared_links")),
        ):  # fmt: skip
            with self.assertRaisesRegex(ImproperlyConfigured, message):
                DropboxStorage(**{option: True})
        self.assertEqual(len(module.FOREIGN_HOOKS), 3)

    def test_the_constructor_asks_no_property(self):
        asks = ((lambda self: self.missing, AttributeError),
                (lambda self: [1], ImproperlyConfigured))  # fmt: skip
        for name, (ask, error) in itertools.product(self.settings, asks):
            storage = type("Computed", (DropboxStorage,), {name: property(ask)})()
            with self.subTest(name), self.assertRaises(error):
                storage._option(name)

    def test_each_way_to_configure_leads_to_the_folder(self):
        token = {"oauth2_access_token": "valid-token"}
        attributes = {**token, "root_path": "/r"}
        names = {"DROPBOX_OAUTH2_TOKEN": "valid-token", "DROPBOX_ROOT_PATH": "/r"}
        entries = {"remote": {"BACKEND": BACKEND, "OPTIONS": attributes}}
        for make, site in (
            (lambda: DropboxStorage("valid-token", root_path="/r"), {}),
            (lambda: type("Media", (DropboxStorage,), attributes)(), {}),
            (lambda: import_string(BACKEND)(), names),
            (lambda: django_storage.storages["remote"],
             {"STORAGES": {**settings.STORAGES, **entries}} if HAS_STORAGES else None),
        ):  # fmt: skip
            if site is not None:
                self.account.entries.clear()
                with override_settings(**site):
                    self.save("a", b"x", make())
                self.holds({"r/a": b"x"})
        roots = {"/a/": "/a", "//a//b/.": "/a/b", "/": "", "/e\u0301": "/\xe9"}
        for spelling, root in roots.items():
            self.account.entries.clear()
            for make in (lambda **options: DropboxStorage(**options),
                         lambda **options: type("Media", (DropboxStorage,), options)()):  # fmt: skip
                self.save("a", b"x", make(root_path=spelling, **token))
            self.assertIn(f"{root}/a", self.account.files())

    def test_what_a_request_carries(self):
        """The namespace, the member of a team and the time limits."""
        self.account.put("/team/r/a", b"x")
        storage = self.account.storage(namespace_id="42", root_path="/r")
        self.assertEqual(self.read("a", storage), b"x")
        with self.fails("no access to namespace_id"):
            self.account.storage(namespace_id="7").exists("a")
        self.account.storage(team_member_id="dbmid:1").exists("a")
        member = "Dropbox-API-Select-User"
        self.assertEqual(self.account.last_headers[member], "dbmid:1")
        self.storage.exists("a")
        self.assertNotIn(member, self.account.last_headers)
        for timeout, connect in ((7, 7), (100, 10), (None, 10), (0.5, 0.5)):
            self.account.timeouts.clear()
            storage = self.account.storage(timeout=timeout, **REFRESHING)
            self.save("big", LARGE, storage)
            self.read("big", storage)
            storage.listdir("")
            self.assertEqual(self.account.timeouts, {(connect, timeout)})
        self.account.timeouts.clear()
        self.storage.client._timeout = (3, 4)  # of a client of one's own
        self.storage.exists("a")
        self.assertEqual(self.account.timeouts, {(3, 4)})
        for number in (0, -1):
            storage.CONNECTIONS = storage.CHUNK_SIZE = number
            self.write("a", HUGE, storage=storage)
            self.assertTrue(self.read("a", storage) == HUGE)


class CallableStorage(DropboxStorage):
    root_path = "/callable"


ExportedStorage = CallableStorage


class AccountTests(StorageTestCase):
    """Whose account a storage uses: of the place nearest to it that names a token."""

    site = {
        "DROPBOX_OAUTH2_TOKEN": "site-token",
        "DROPBOX_OAUTH2_REFRESH_TOKEN": "site-refresh",
        "DROPBOX_APP_KEY": "app-key",
        "DROPBOX_APP_SECRET": "app-secret",
    }

    def setUp(self):
        super().setUp()
        self.account.tokens |= {"site-token", "near-token"}
        for name in ("site-refresh", "near-refresh"):
            self.account.refresh_tokens[name] = ("app-key", "app-secret")
        self.owners = {}
        token = self.account.token

        def note(form):
            answer = token(form)
            self.owners[answer["access_token"]] = form["refresh_token"][0]
            return answer

        self.account.token = note

    def owner(self, storage):
        """The token of the account that the storage uses, None if it uses none."""
        self.account.last_headers = {}
        try:
            storage.exists("a")
        except ImproperlyConfigured:
            self.assertEqual(self.account.last_headers, {})
            return None
        token = self.account.last_headers["Authorization"].replace("Bearer ", "")
        return self.owners.get(token, token)

    def test_the_nearest_place_that_names_a_token_decides(self):
        base = type("Base", (DropboxStorage,), {"oauth2_access_token": "near-token"})
        empty = type("Empty", (base,), {"oauth2_refresh_token": ""})
        full = type("Full", (empty,), {"oauth2_refresh_token": "near-refresh"})
        nothing = {"oauth2_access_token": property(lambda self: None)}
        computed = type("Computed", (DropboxStorage,), nothing)
        access = {"DROPBOX_OAUTH2_TOKEN": "site-token"}
        unset = {**access, "DROPBOX_OAUTH2_REFRESH_TOKEN": None}
        near = {"oauth2_refresh_token": "near-refresh"}
        # fmt: off
        for site, kind, args, kwargs, owner in (
            (self.site, DropboxStorage, (), {}, "site-refresh"),
            (access, DropboxStorage, (), {}, "site-token"),
            (unset, DropboxStorage, (), {}, "site-token"),
            ({}, DropboxStorage, (), {}, None),
            (self.site, DropboxStorage, ("near-token",), {}, "near-token"),
            (self.site, DropboxStorage, (None,), {}, None),
            (self.site, DropboxStorage, ("",), {}, None),
            (self.site, DropboxStorage, (), {"oauth2_access_token": None}, None),
            (self.site, DropboxStorage, (), {"oauth2_refresh_token": None}, None),
            (access, DropboxStorage, (), {"oauth2_refresh_token": ""}, None),
            (self.site, DropboxStorage, (), near, "near-refresh"),
            (self.site, DropboxStorage, ("near-token",), near, "near-refresh"),
            (self.site, DropboxStorage, ("near-token",), {"oauth2_refresh_token": None}, "near-token"),
            (self.site, base, (), {}, "near-token"),
            (self.site, empty, (), {}, None),
            (self.site, full, (), {}, "near-refresh"),
            (self.site, full, (None,), {}, None),
            (self.site, empty, ("near-token",), {}, "near-token"),
            (self.site, computed, (), {}, None),
            (self.site, computed, (), near, "near-refresh"),
        ):
            # fmt: on
            with self.subTest(kind=kind, args=args, kwargs=kwargs), override_settings(**site):
                self.assertEqual(self.owner(kind(*args, **kwargs)), owner)
        with override_settings(**self.site):
            storage = DropboxStorage()
            storage.oauth2_refresh_token = None
            self.assertEqual(self.owner(storage), None)

    def test_credentials_that_cannot_work_are_named_at_the_first_request(self):
        advice = (
            "not set or empty: set oauth2_refresh_token and app_key, as python -m "
            "dropbox_storage prints them, or else oauth2_access_token (DROPBOX_OAUTH2_TOKEN). A "
            "token that is empty in an argument or a class counts: no setting takes its place."
        )
        token = "oauth2_refresh_token (DROPBOX_OAUTH2_REFRESH_TOKEN)"
        key = "app_key (DROPBOX_APP_KEY)"
        refresh = {"oauth2_refresh_token": "r"}
        for options, missing in (
            ({}, f"{token} and {key}"),
            ({"oauth2_access_token": ""}, f"{token} and {key}"),
            (refresh, key),
            ({**refresh, "app_secret": "s"}, key),
            ({**refresh, "oauth2_access_token": "a"}, key),
            ({"app_key": "k"}, token),
            ({"app_key": "k", "app_secret": "s"}, token),
            ({"app_secret": "s"}, f"{token} and {key}"),
        ):
            names = {module.OPTIONS[name].setting: options[name] for name in options}
            storages = (({}, DropboxStorage(**options)), (names, DropboxStorage()))
            for site, storage in storages:
                with self.subTest(options), override_settings(**site):
                    with self.raises(ImproperlyConfigured, f"{missing} {advice}"):
                        storage.exists("a")

    @unittest.skipUnless(HAS_STORAGES, "STORAGES came with Django 4.2")
    def test_a_storage_that_is_built_again_uses_the_account_of_its_entry(self):
        """As in a task or a data migration, which has no credentials in its arguments."""
        backend = f"{__name__}.ExportedStorage"
        refresh = {"oauth2_refresh_token": "near-refresh"}
        for options, owner in (
            ({"oauth2_access_token": "near-token"}, "near-token"),
            (refresh, "near-refresh"),
            ({**refresh, "app_key": "app-key", "app_secret": "app-secret"}, "near-refresh"),
            ({"app_secret": "app-secret"}, "site-refresh"),
            ({}, "site-refresh"),
        ):  # fmt: skip
            options = {**options, "timeout": 9}
            entries = {"media": {"BACKEND": backend, "OPTIONS": options}}
            entries["missing"] = {"BACKEND": "not_installed.Storage"}
            every = {**settings.STORAGES, **entries}
            with self.subTest(options), override_settings(STORAGES=every, **self.site):
                storage = django_storage.storages["media"]
                path, args, kwargs = pickle.loads(pickle.dumps(storage.deconstruct()))
                hidden = {name: "***" for name in options if name != "timeout"}
                self.assertEqual((args, kwargs), ((), {**hidden, "timeout": 9}))
                rebuilt = import_string(path)(*args, **kwargs)
                self.assertEqual(self.owner(rebuilt), owner)
                self.assertEqual(rebuilt.deconstruct(), (path, args, kwargs))
                if hidden:  # no entry is like these
                    other = import_string(path)(*args, **{**kwargs, "timeout": 8})
                    self.assertEqual(self.owner(other), None)
                    self.assertEqual(self.owner(DropboxStorage(*args, **kwargs)), None)
                if "app_key" in hidden:  # a tenant's has the app of the entry alone
                    for token in ("site-refresh", "", None):
                        tenant = {**kwargs, "oauth2_refresh_token": token}
                        other = import_string(path)(*args, **tenant)
                        self.assertEqual(self.owner(other), None)

    @unittest.skipUnless(HAS_STORAGES, "STORAGES came with Django 4.2")
    def test_of_two_entries_none_is_guessed(self):
        backend = {"BACKEND": f"{__name__}.CallableStorage"}
        one, two, hidden = (
            {**backend, "OPTIONS": {"oauth2_access_token": token}}
            for token in ("near-token", "site-token", "***")
        )
        for entries, owner in (
            ({"one": one, "two": two}, None),
            ({"one": one, "two": one}, "near-token"),
            ({"one": hidden}, None),
            ({}, None),
        ):
            with override_settings(STORAGES={**settings.STORAGES, **entries}):
                rebuilt = CallableStorage(oauth2_access_token="***")
                self.assertEqual(self.owner(rebuilt), owner)
                with override_settings(**self.site):
                    self.assertEqual(self.owner(rebuilt), owner)

    def test_a_migration_is_built_wherever_it_runs(self):
        """With the app's key and secret in the settings, and the token left out."""
        app = {"DROPBOX_APP_KEY": "app-key", "DROPBOX_APP_SECRET": "app-secret"}
        lazy = urls.reverse_lazy("media", args=[""])
        for site, options in (
            (app, {"oauth2_access_token": "near-token", "base_url": lazy}),
            (app, {"oauth2_refresh_token": "near-refresh"}),
            ({"DROPBOX_APP_KEY": "app-key"}, {}),
            ({"DROPBOX_OAUTH2_REFRESH_TOKEN": "site-refresh"}, {}),
        ):
            with override_settings(**site):
                path, args, kwargs = DropboxStorage(**options, timeout=9).deconstruct()
                self.assertEqual(kwargs.keys(), {*options, "timeout"})
                self.assertIs(kwargs.get("base_url"), options.get("base_url"))
                rebuilt = import_string(path)(*args, **kwargs)
                self.assertEqual(rebuilt.deconstruct()[2].keys(), kwargs.keys())
                with self.assertRaises(ImproperlyConfigured):
                    rebuilt.exists("a")

    def test_one_token_for_one_set_of_credentials(self):
        """Whatever the timeout, the namespace and the member of a team."""
        credentials = {**REFRESHING, "oauth2_refresh_token": "near-refresh"}
        self.account.put("/team/a")
        for number in range(20):
            for options in (
                {"team_member_id": f"dbmid:{number}"},
                {"timeout": 1 + number / 7},
                {"namespace_id": "42"},
            ):
                storage = DropboxStorage(**credentials, **options)
                storage.exists("a")
                storage.client.files_list_folder("")
                headers = self.account.last_headers
                member = headers.get("Dropbox-API-Select-User")
                self.assertEqual(member, options.get("team_member_id"))
                in_team = "Dropbox-API-Path-Root" in headers
                self.assertEqual(in_team, "namespace_id" in options)
        self.assertEqual(self.account.calls["oauth2/token"], 1)
        storage = DropboxStorage(**REFRESHING)
        for _ in range(3):
            storage.client.files_list_folder("")  # its copies hand on the token
        storage.exists("a")
        other = DropboxStorage(**REFRESHING, namespace_id="42")
        other.client = storage.client  # is used as it is
        self.assertFalse(other.exists("x"))
        self.assertNotIn("Dropbox-API-Path-Root", self.account.last_headers)
        del other.client
        self.assertFalse(other.exists("x"))
        self.assertIn("Dropbox-API-Path-Root", self.account.last_headers)
        self.assertEqual(self.account.calls["oauth2/token"], 2)
        client = copy.copy(storage.client)
        client._session = FakeAccount().create_session()  # of somebody else
        client._oauth2_access_token_expiration = None
        storage.client = client
        storage.exists("a")
        self.assertEqual(self.account.calls["oauth2/token"], 2)
        with self.assertRaisesRegex(TypeError, "^client must be a dropbox.Dropbox"):
            storage.client = None

    def test_an_early_refresh_that_failed_is_not_repeated_at_once(self):
        storage = DropboxStorage(**REFRESHING)
        storage.exists("a")
        owner = storage.client.owner
        soon = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
        owner._oauth2_access_token_expiration = soon + datetime.timedelta(seconds=100)
        for asked, least in ((5, 30), (60, 60)):
            self.clock.now += 1000
            with self.failing("oauth2/token", "429", times=99, value=asked):
                for seconds, refreshes in ((0, 1), (least - 1, 1), (1, 2)):
                    self.clock.now += seconds
                    for _ in range(9):
                        storage.exists("a")
                        self.ends_its_threads()
                    self.assertEqual(self.account.calls["oauth2/token"] - 1, refreshes)
            self.account.calls["oauth2/token"] = 1
        self.clock.now += 1000
        storage.exists("a")
        self.ends_its_threads()
        later = soon + datetime.timedelta(hours=1)
        self.assertGreater(owner._oauth2_access_token_expiration, later)


# -- The storage: saving, looking, names -----------------------------------------------


class SavingTests(StorageTestCase):
    def test_every_size_around_the_chunks_is_stored_whole(self):
        """With the time of the commit, and each byte hashed once."""
        hashed = []

        class Counting(module._ContentHash):
            def update(self, data):
                hashed.append(len(data))
                super().update(data)

        chunk = self.storage.CHUNK_SIZE
        data = noise(5 * chunk + 1, 2)
        patch = unittest.mock.patch.object(module, "_ContentHash", Counting)
        for size in (0, 1, *(n * chunk + d for n in (1, 2, 3, 5) for d in (-1, 0, 1))):
            before = int(time.time())
            with self.subTest(size), self.account.counting() as calls, patch:
                self.assertEqual(self.save(f"{size}", data[:size]), f"{size}")
            entry = self.account.entries[f"/{size}"]
            self.assertTrue(entry.data == data[:size])
            form = "%Y-%m-%dT%H:%M:%SZ%z"
            modified = datetime.datetime.strptime(f"{entry.client_modified}+0000", form)
            self.assertTrue(before <= modified.timestamp() <= time.time())
            self.assertEqual(sum(hashed), size)
            hashed.clear()
            chunks = -(-size // chunk)
            self.assertEqual(calls["files/upload"], chunks <= 2)
            self.assertEqual(calls[f"{SESSION}/append_v2"], chunks * (chunks > 2))
            self.assertEqual(self.account.sessions, {})

    def test_the_stored_hash_is_compared(self):
        class Careless(FakeAccount):
            def commit(self, target, data):
                return super().commit(target, data[:-1])

        sizes = (5, 3 * self.storage.CHUNK_SIZE)
        for size, mode in itertools.product(sizes, module.WRITE_MODES):
            storage = Careless().storage(write_mode=mode)
            with self.fails("other bytes") as caught:
                storage.save("a", ContentFile(bytes(size)))
            self.assertEqual(caught.exception.reason, "content_hash_mismatch")

    def test_content_of_any_kind(self):
        with tempfile.TemporaryFile() as local:
            local.write(b"local")
            for content, expected in (
                (ContentFile("tw\xf6"), b"tw\xc3\xb6"),
                (ContentFile(b""), b""),
                (Unsized(), b""),
                (Unsized(b"", b"1", "tw\xf6", bytearray(b"3")), b"1tw\xc3\xb63"),
                (File(io.BytesIO(b"raw")), b"raw"),
                (io.BytesIO(b"plain"), b"plain"),
                (File(local), b"local"),
                (SimpleUploadedFile("u", b"uploaded"), b"uploaded"),
                (Unsized(HUGE[:5], HUGE[5:]), HUGE),
            ):
                name = self.storage.save("a", content)
                self.assertTrue(self.account.files()[f"/{name}"] == expected)
                self.assertFalse(getattr(content, "closed", False))
        name = self.storage.save(None, ContentFile(b"x", name="own-name"))
        self.assertEqual(name, "own-name")

    def test_content_that_breaks_half_way_is_not_stored(self):
        self.account.put("/a", b"old")
        for mode, size in itertools.product(module.WRITE_MODES, (1, 9 * UNIT)):
            storage = self.account.storage(write_mode=mode)
            for content, error in (
                (Broken(bytes(size)), ZeroDivisionError),
                (Unsized(bytes(size), "abc\ud800def"), UnicodeEncodeError),
                (Unsized(bytes(size), 7), TypeError),
            ):
                with self.subTest(mode=mode, size=size), self.assertRaises(error):
                    storage.save("a", content)
                self.holds({"a": b"old"})

    def test_what_a_save_costs(self):
        size = module.SMALL_FILE
        ask, send = "files/get_metadata", "files/upload"
        texts = Unsized(b"x")
        texts.size = "text"
        for content, routes in (
            (ContentFile(b"x" * size), [send]),
            (SimpleUploadedFile("u", b"x"), [send]),
            (io.BytesIO(b"x"), [send]),
            (ContentFile(b"x" * (size + 1)), [ask, send]),
            (Unsized(b"x"), [ask, send]),
            (texts, [ask, send]),
            (Sizeless(b"x"), [ask, send]),
        ):
            self.account.entries.clear()
            with self.subTest(content), self.costs(*routes):
                self.assertEqual(self.storage.save("a", content), "a")
        self.account.put("/a.txt", b"theirs")
        with self.costs(send, ask, send):
            self.save("a.txt", b"mine")
        for mode, routes in (("overwrite", [send]), ("update", [ask, send])):
            with self.costs(*routes):
                self.save("a.txt", b"new", self.account.storage(write_mode=mode))
            self.assertEqual(self.account.files()["/a.txt"], b"new")

    def test_names_are_those_that_django_gives(self):
        class Numbered:
            count = 0

            def get_alternative_name(self, file_root, file_ext):
                self.count += 1
                return f"{file_root}-{self.count}{file_ext}"

        names = ("a", "a.txt", "a.tar.gz", "dir/.b.c", "d.e/f", "g" * 30 + ".txt")
        plain = functools.partial(re.compile(r"_\w{7}").sub, "_RANDOM")
        with tempfile.TemporaryDirectory() as folder:
            for mixins in ((), (Numbered,)):
                local = type("Local", (*mixins, FileSystemStorage), {})(folder)
                remote = type("Remote", (*mixins, DropboxStorage), {})("valid-token")
                for name, size in itertools.product(names, (1, UNIT)):
                    self.account.entries.clear()
                    for _ in range(4):
                        content = ContentFile(bytes(size))
                        saved = [one.save(name, content, 30) for one in (local, remote)]
                        with self.subTest(name, size=size, mixins=mixins):
                            self.assertEqual(*map(plain, saved))
                    shutil.rmtree(folder)

    def test_max_length_holds_in_every_mode_and_after_a_refusal(self):
        for mode in module.WRITE_MODES:
            storage = self.account.storage(write_mode=mode)
            name = storage.save("x" * 30 + ".txt", ContentFile(b""), max_length=20)
            self.assertEqual(len(name), 20)
            self.assertTrue(name.endswith(".txt" if mode == "add" else "xxxxxx.txt"))
        with self.assertRaises(SuspiciousFileOperation):
            storage.save("x" * 30 + ".txt", ContentFile(b""), max_length=4)
        self.account.put("/d/abcdefghijkl.txt", b"theirs")
        name = self.storage.save("d/abcdefghijkl.txt", ContentFile(b"x"), max_length=18)
        self.assertRegex(name, r"^d/abcd_\w{7}\.txt$")
        self.account.put("/b.txt", b"theirs")
        with self.assertRaises(SuspiciousFileOperation):
            self.storage.save("b.txt", ContentFile(b"mine"), max_length=5)

    def test_a_storage_that_decides_on_names_itself_is_asked_first(self):
        for name, method in {
            "exists": lambda self, name: False,
            "get_available_name": lambda self, name, max_length=None: f"mine-{name}",
            "is_name_available": lambda self, name, max_length=None: True,
            "_save": lambda self, *args: DropboxStorage._save(self, *args),
        }.items():
            kind = type("Own", (DropboxStorage,), {})
            storage = self.account.connect(kind("valid-token"))
            expected = f"mine-{name}" if "available_name" in name else name
            for place in (kind, storage):
                own = types.MethodType(method, storage) if place is storage else method
                with unittest.mock.patch.object(place, name, own, create=True):
                    self.account.entries.clear()
                    self.assertEqual(self.save(name, b"x", storage), expected)

    def test_saving_uses_the_storage_itself(self):
        """No copy, whose state would be lost, and for which some have no way."""

        class Stateful(DropboxStorage):
            made = 0

            def __getstate__(self):
                raise TypeError("cannot pickle a lock")

            @functools.cached_property
            def client(self):
                self.made += 1
                return FakeDropbox(self.account)

        storage = Stateful()
        storage.account = self.account
        for size in (1, UNIT, 1):
            before = vars(storage).copy()
            storage.save("a", ContentFile(bytes(size)), max_length=100)
            before.setdefault("client", storage.client)
            self.assertEqual(vars(storage), {**before, "made": 1})

    def test_a_name_that_gets_taken_meanwhile(self):
        """As between the check and the write: also by the same bytes, sent only once."""
        large = 3 * self.storage.CHUNK_SIZE
        for size, route in ((5, "files/upload"), (large, f"{SESSION}/finish")):
            data = noise(size, size)
            for other in (b"other", data):
                self.new_account()
                self.account.put("/taken.txt", other)
                with self.subTest(size=size, same=other == data):
                    name = self.storage._save("taken.txt", ContentFile(data))
                    self.assertRegex(name, r"^taken_\w{7}\.txt$")
                    self.holds({"taken.txt": other, name: data})
                    self.assertLess(self.account.bytes_in, size + 9000)
            # A name that is free again, and is chosen without knowing that it was refused.
            self.new_account()
            self.account.put("/a", b"theirs")
            self.account.fail("files/get_metadata", self.account.entries.clear)
            self.assertEqual(self.storage._save("a", ContentFile(data)), "a")
            # Equal bytes of somebody else are not taken for one's own.
            self.new_account()
            old = "2020-01-01T00:00:00Z"
            theirs = functools.partial(self.account.put, "/a", data, old)
            with self.refused(route, theirs, times=99):
                self.account.storage(max_wait=0)._save("a", ContentFile(data))
            self.account.entries.clear()
            with self.failing(route, theirs):
                name = self.storage._save("a", ContentFile(data))
            self.holds({"a": data, name: data})
            self.assertNotEqual(name, "a")
        with ThreadPoolExecutor(8) as pool:
            saved = [*pool.map(lambda i: (self.save("b", b"%d" % i), i), range(40))]
        self.assertEqual(len({name for name, _ in saved}), 40)
        for name, number in saved:
            self.assertEqual(self.account.files()[f"/{name}"], b"%d" % number)

    def test_names_that_are_taken_again_and_again(self):
        class Counting(DropboxStorage):
            count, name = 0, "{}.txt"

            def get_available_name(self, name, max_length=None):
                self.count += 1
                return self.name.format(self.count)

        for number in range(1, 30):
            self.account.put(f"/{number}.txt", b"other")
        storage = self.account.connect(Counting("valid-token"))
        self.assertEqual(self.save("a", b"mine", storage), "30.txt")
        storage.name = "1.txt"  # which is refused for ever
        with self.assertRaises(FileExistsError), self.costs(*["files/upload"] * 2):
            self.save("a", b"mine", storage)

    def test_an_alternative_name_that_is_taken_meanwhile(self):
        class New(DropboxStorage):
            def get_alternative_name(self, file_root, file_ext):
                return f"{file_root}_new{file_ext}"

        for content in (b"small", LARGE):
            self.new_account()
            self.account.put("/a.txt")
            take = functools.partial(self.account.put, "/a_new.txt")
            commit = "files/upload" if content == b"small" else f"{SESSION}/finish"
            number = 2 if content == b"small" else 1
            self.account.fail(commit, take, nth=number)
            storage = self.account.connect(New("valid-token"))
            self.assertEqual(self.save("a.txt", content, storage), "a_new_new.txt")

    def test_folders_and_files_in_the_way(self):
        self.account.put("/dir/b")
        self.assertRegex(self.save("dir"), r"^dir_\w{7}$")
        with self.assertRaises(IsADirectoryError):
            self.save("dir", b"x", self.account.storage(write_mode="overwrite"))
        with self.assertRaises(NotADirectoryError):
            self.save("dir/b/c", b"x")

    def test_update_replaces_what_it_has_seen_and_nothing_else(self):
        storage = self.account.storage(write_mode="update")
        message = "'/a' has changed since it was looked at; it was left alone."
        for size in (1, 9 * UNIT):
            for content in (b"first", b"second"):
                self.assertEqual(self.save("a", content, storage), "a")
                self.holds({"a": content})
            theirs = functools.partial(self.account.put, "/a", b"theirs")
            content = Unsized(bytes(size), then=theirs)
            with self.raises(DropboxStorageException, message) as caught:
                storage.save("a", content)
            self.assertEqual(caught.exception.reason, "path/conflict/file")
            self.holds({"a": b"theirs"})

    def put(self, mode, content, storage):
        """Save "a" in a write mode, or write to it in a mode of open()."""
        if mode in module.WRITE_MODES:
            storage.write_mode = mode
            self.assertEqual(self.save("a", content, storage), "a")
        else:
            self.write("a", content, mode, storage)

    def test_a_lost_response_to_the_last_attempt_is_no_failure(self):
        """With max_wait=0, too: a task's retry would make a second file."""
        routes = ((5, "files/upload"), (len(LARGE), f"{SESSION}/finish"))
        modes = (*module.WRITE_MODES, "xb", "wb")
        for (size, route), mode in itertools.product(routes, modes):
            for kind in AFTERWARDS:
                self.new_account(quirks=["kept_sessions"] * (kind == "503_after"))
                storage = self.account.storage(max_wait=0)
                with self.subTest(f"{route} {kind} {mode}"), self.failing(route, kind):
                    self.put(mode, LARGE[:size], storage)
                self.holds({"a": LARGE[:size]})

    def test_only_the_request_that_commits_is_looked_up(self):
        """An empty file has the hash of what has been hashed before a chunk fails."""
        append = f"{SESSION}/append_v2"
        for mode in ("overwrite", "update", "wb", "ab"):
            self.new_account()
            self.account.put("/a", b"")
            storage = self.account.storage(max_wait=0)
            with self.subTest(mode), self.refused(append, "503", times=99):
                self.put(mode, LARGE, storage)
            self.holds({"a": b""})
            self.assertEqual(self.account.calls[f"{SESSION}/finish"], 0)


class LookingTests(StorageTestCase):
    def setUp(self):
        super().setUp()
        self.account.put("/a.txt", b"12345")
        self.account.put("/dir/Sub/b.txt", b"x")

    def test_what_each_look_says(self):
        get, listing = ("files/get_metadata",), ("files/list_folder",)
        missing, no_file = FileNotFoundError, IsADirectoryError
        everything = (["dir"], ["a.txt"])
        # fmt: off
        for act, routes, *cases in (
            ("exists", get, ("a.txt", True), ("A.TXT", True), ("dir", True), ("dir/sub/b.txt", True),
             ("b.txt", False), ("dir/b.txt", False), ("a.txt/b", False), ("none", False)),
            ("exists", (), ("", True), (".", True), ("/", True)),
            ("size", get, ("a.txt", 5), ("none", missing), ("dir", no_file)),
            ("get_modified_time", get, ("none", missing), ("dir", no_file)),
            ("size", (), ("", no_file)),
            ("listdir", listing, *((name, everything) for name in ("", ".", "/", pathlib.Path(""))),
             ("dir", (["Sub"], [])), ("DIR/sub/", ([], ["b.txt"])), ("none", missing), ("a.txt", NotADirectoryError)),
            ("url", ("files/get_temporary_link",), ("dir", no_file), ("none", "about:invalid#none")),
            ("path", (), ("a.txt", NotImplementedError)),
            ("get_accessed_time", (), ("a.txt", NotImplementedError)),
            ("get_created_time", (), ("a.txt", NotImplementedError)),
            ("delete", (), ("", ValueError), (None, ValueError), (".", no_file)),
            ("delete", ("files/delete_v2",), ("none", None), ("A.txt", None), ("a.txt", None)),
        ):
            # fmt: on
            for name, expected in cases:
                with self.subTest(act, name=name), self.costs(*routes):
                    if isinstance(expected, type):
                        with self.assertRaises(expected):
                            getattr(self.storage, act)(name)
                    else:
                        self.assertEqual(getattr(self.storage, act)(name), expected)
        self.holds({"dir/Sub/b.txt": b"x"})
        self.storage.delete("dir")
        self.assertEqual(self.account.entries, {})

    def test_a_listing_of_many_pages(self):
        """Later pages report what is gone, and what is new again; a cursor may expire."""

        class Changing(FakeAccount):
            def files_list_folder_continue(self, argument, body):
                if "/many/9" not in self.files():
                    self.put("/many/1", b"longer")
                    self.put("/many/9")
                    for path in ("/many/0", "/many/5", "/many/SUB"):
                        self.files_delete_v2({"path": path}, b"")
                    self.put("/many/5", b"again")
                return super().files_list_folder_continue(argument, body)

        for quirks in ((), ("no_paths",)):
            account = Changing(page_size=3, quirks=quirks)
            for i in range(6):
                account.put(f"/many/{i}")
                account.put(f"/many/Sub/deep/{i}")
            folders, files = account.storage().listdir("many")
            self.assertEqual((folders, sorted(files)), ([], [*"123459"]))
        self.account.page_size = 3
        for i in range(10):
            self.account.put(f"/many/{i}")
        names, route = [str(i) for i in range(10)], "files/list_folder/continue"
        with self.costs("files/list_folder", route, route, route):
            self.assertEqual(self.storage.listdir("many"), ([], names))
        for page in (1, 2, 3):
            with self.failing(route, "/reset", nth=page):
                self.assertEqual(self.storage.listdir("many"), ([], names))
        with self.refused(route, "/reset", times=99) as caught:
            with self.costs(*["files/list_folder", route] * 2):
                self.storage.listdir("many")
        self.assertEqual(caught.exception.reason, "reset")

    def test_a_root_that_does_not_exist_yet_is_empty(self):
        storage = self.account.storage(root_path="/new")
        self.assertEqual(storage.listdir(""), ([], []))
        self.assertEqual(FakeAccount().storage().listdir(""), ([], []))
        self.assertFalse(storage.exists("a.txt"))
        self.save("a.txt", b"x", storage)
        self.assertEqual(storage.listdir(""), ([], ["a.txt"]))

    def test_modified_time_is_aware_if_use_tz(self):
        self.account.entries["/a.txt"].modified = "2024-07-01T12:00:00Z"
        aware = self.storage.get_modified_time("a.txt")
        utc = datetime.timezone.utc
        self.assertEqual(aware, datetime.datetime(2024, 7, 1, 12, tzinfo=utc))
        self.assertEqual(aware.utcoffset(), datetime.timedelta())
        with override_settings(USE_TZ=False):
            naive = self.storage.get_modified_time("a.txt")
        self.assertIsNone(naive.tzinfo)
        self.assertEqual(naive.timestamp(), aware.timestamp())


class NameTests(StorageTestCase):
    def test_a_name_has_one_form(self):
        for spelling, name in {
            "e\u0301.txt": "\xe9.txt",
            "dir\\b.txt": "dir/b.txt",
            pathlib.PurePosixPath("dir/c.txt"): "dir/c.txt",
            "./dir//x/../d.txt": "dir/d.txt",
            "slash/": "slash",
        }.items():
            with self.subTest(spelling):
                self.assertEqual(self.storage._save(spelling, ContentFile(b"x")), name)
                self.assertEqual(self.account.files()[f"/{name}"], b"x")
                self.assertTrue(self.storage.exists(spelling))
                self.assertEqual(self.storage.open(spelling).read(), b"x")

    def every_method(self, storage, name):
        yield lambda: storage.save(name, ContentFile(b"x"))
        yield lambda: storage._save(name, ContentFile(b"x"))
        for mode in ("rb", "wb", "xb", "ab"):
            yield lambda: storage.open(name, mode)
        for method in "delete exists listdir size url get_modified_time".split():
            yield lambda: getattr(storage, method)(name)

    def test_no_method_leaves_the_root(self):
        self.account.put("/out", b"mine")
        calls = sum(self.account.calls.values())
        outside = ("../out", "a/../../out", "..", "a\0b", "a\udc80b", "a\0/../../b")
        cases = [*itertools.product(("/", "/root"), outside)]
        for absolute in ("/out", "/root/../a", "/root2/a", "/root/..", "/."):
            cases.append(("/root", absolute))
        for root, name in cases:
            storage = self.account.storage(root_path=root)
            for act in self.every_method(storage, name):
                with self.subTest(root=root, name=name):
                    with self.assertRaises(SuspiciousFileOperation):
                        act()
        cases = (("/", "/r"), module.WRITE_MODES, ("", ".", "a/..", "/"))
        for root, mode, name in itertools.product(*cases):
            storage = self.account.storage(root_path=root, write_mode=mode)
            with self.assertRaises(SuspiciousFileOperation):
                storage.save(name, ContentFile(b""))
            with self.assertRaisesRegex(SuspiciousFileOperation, "Could not derive"):
                storage.get_available_name(name)
            for act in (
                lambda: storage._save(name, ContentFile(b"")),
                lambda: storage.open(name),
                lambda: storage.size(name),
                lambda: storage.delete(name or "."),
            ):
                self.assertRaises(IsADirectoryError, act)
        self.assertEqual(sum(self.account.calls.values()), calls)
        self.holds({"out": b"mine"})

    def test_a_name_that_dropbox_cannot_hold_is_not_there(self):
        for name in ("scan ", "x" * 300, "dir /a", "a\x7fb"):
            with self.subTest(name):
                for act in (
                    lambda: self.storage.open(name),
                    lambda: self.storage.open(name, "r+b"),
                    lambda: self.storage.size(name),
                    lambda: self.storage.get_modified_time(name),
                    lambda: self.storage.listdir(name),
                ):
                    self.assertRaises(FileNotFoundError, act)
                self.assertFalse(self.storage.exists(name))
                self.storage.delete(name)
                link = self.storage.url(name)
                self.assertEqual(link, f"about:invalid#{filepath_to_uri(name)}")
                modes = itertools.product(module.WRITE_MODES, (b"x", LARGE))
                for mode, content in modes:
                    storage = self.account.storage(write_mode=mode)
                    with self.fails("a name must not"):
                        storage._save(name, ContentFile(content))
                for mode in ("wb", "xb", "ab"):
                    with self.fails("a name must not"):
                        self.storage.open(name, mode).close()
        with self.fails(r"get_valid_name\(\) mends it"):
            self.save("desktop.ini")
        self.holds({})

    def test_an_absolute_name_inside_the_root_is_that_name(self):
        """Rows of years hold them. FileSystemStorage takes them, too."""
        for root, name, relative in (
            ("/media", "/media/a.png", "a.png"),
            ("/media", "/media/dir//./b/../a.png", "dir/a.png"),
            ("/media", "/media/media/a", "media/a"),
            ("/media", "media/a", "media/a"),
            ("/", "/a.png", "a.png"),
            ("/", "/etc/passwd", "etc/passwd"),
            ("/e\u0301", "/\xe9/a", "a"),
            ("/media", "\\media\\a", "a"),
        ):
            with self.subTest(root=root, name=name):
                self.account.entries.clear()
                storage = self.account.storage(root_path=root)
                path = posixpath.join(storage._full_path("") or "/", relative)
                self.assertEqual(storage._full_path(name), path)
                self.assertEqual(storage._save(name, ContentFile(b"x")), relative)
                self.assertEqual(self.account.files(), {path: b"x"})
                self.assertTrue(storage.exists(name))
                with storage.open(name) as file:
                    self.assertEqual((file.name, file.read()), (name, b"x"))
                self.assertEqual(self.account.follow(storage.url(name)), b"x")
                served = self.account.storage(root_path=root, base_url="/files")
                self.assertEqual(served.url(name), f"/files/{relative}")
                storage.delete(name)
                self.assertFalse(storage.exists(name))
        storage = self.account.storage(root_path="/media")
        self.assertEqual(storage.listdir("/media"), storage.listdir(""))
        self.assertRaises(IsADirectoryError, storage.delete, "/media")

    def test_a_name_that_leaves_the_folder_reaches_no_override(self):
        class Tenant(DropboxStorage):
            def _full_path(self, name):
                return super()._full_path(f"ann/{name}")

        self.account.put("/bob/a", b"secret")
        storage = self.account.connect(Tenant("valid-token"))
        looks = (storage.open, storage.exists, storage.size, storage.url)
        for look in (*looks, storage.listdir, storage.delete):
            with self.subTest(look), self.assertRaises(SuspiciousFileOperation):
                look("../bob/a")
        with self.failing("files/get_metadata", "/path/not_folder"):
            self.assertFalse(storage.exists("a/b"))

    def test_full_path_is_the_one_place_that_makes_a_path(self):
        """Programs call it beside the client, and override it, as in django-storages."""

        class Windows(DropboxStorage):
            def _full_path(self, name):
                name = str(name).replace("C:", "").replace("\\", "/")
                return posixpath.join(self.root_path, name.lstrip("/"))

        for root, content in itertools.product(("/", "/r"), (b"small", LARGE)):
            self.account.entries.clear()
            storage = self.account.connect(Windows("valid-token", root_path=root))
            path = posixpath.join(root, "dir/a")
            storage._save("C:/dir/a", ContentFile(content))
            self.assertTrue(self.account.files() == {path: content})
            self.assertTrue(storage.exists("C:\\dir\\a"))
            self.assertEqual(storage.size("C:/dir/a"), len(content))
            self.assertEqual(storage.listdir("C:/dir"), ([], ["a"]))
            self.assertEqual(storage.listdir("/"), (["dir"], []))
            self.assertTrue(self.read("C:/dir/a", storage) == content)
            self.assertTrue(self.account.follow(storage.url("C:/dir/a")) == content)
            self.write("C:/dir/a", b"new", storage=storage)
            self.assertEqual(self.account.files(), {path: b"new"})
            storage.delete("C:/dir/a")
            self.assertEqual(self.account.files(), {})
            self.assertRaises(IsADirectoryError, storage.delete, "C:")
        for root, name, path in (
            ("/", "a", "/a"), ("/r", "a/../b/", "/r/b"), ("/r", "", "/r"), ("/", "", ""), ("/r", "/", "/r"),
        ):  # fmt: skip
            storage = self.account.storage(root_path=root)
            self.assertEqual(storage._full_path(name), path)
        old, new = storage._full_path("mine"), storage._full_path("moved")
        storage.client.files_upload(b"x", old)
        storage.client.files_move_v2(old, new)
        self.assertEqual(storage.listdir(""), (["dir"], ["moved"]))

    def test_valid_names_are_mended(self):
        self.assertEqual(set(DISALLOWED_NAMES), set(module.RESERVED_NAMES))
        for spelling, valid in {
            **{name: f"_{name}" for name in DISALLOWED_NAMES if "\r" not in name},
            "Desktop.INI": "_Desktop.INI",
            "Icon\r": "Icon",
            "trailing dots...": "trailing_dots",
            "...": "_",
            " spaces ": "spaces",
            "e\u0301": "\xe9",
            f"{'x' * 300}.jpeg": f"{'x' * 250}.jpeg",
            f"xz.{'y' * 300}": f"x.{'y' * 253}",
        }.items():
            with self.subTest(spelling):
                self.account.entries.clear()
                self.assertEqual(self.storage.get_valid_name(spelling), valid)
                self.assertEqual(self.save(valid), valid)
        long = "y" * 254
        for name in (f"{'x' * 250}.jpeg", f"x.{long[1:]}", f"x.{long[6:]}.jpeg", f".{long}"):  # fmt: skip
            self.save(name, b"1")
            saved = self.save(name, b"2")
            self.assertNotEqual(saved, name)
            self.assertEqual((len(saved), saved[0]), (255, name[0]))
            self.assertEqual(saved.endswith(name[-5:]), name[0] == "x")

    def test_folders_of_upload_to_are_mended_as_the_name_is(self):
        folder_of = "{}/{}".format  # of the instance and the name
        field = models.FileField(storage=self.storage, upload_to=folder_of)
        for folder, valid in {
            "ends in a space ": "ends in a space",
            "dots.. /e\u0301": "dots/\xe9",
            "desktop.ini/Icon\r": "_desktop.ini/_Icon\r",
            "dir\\desktop.ini": "dir/_desktop.ini",
            ".../x": "_/x",
            "x" * 300: "x" * 255,
            "x" * 254 + " y": "x" * 254,
            "del\x7f/a\\b ": "del/a/b",
            "./a": "a",
        }.items():
            with self.subTest(folder):
                name = field.generate_filename(folder, "a b.txt")
                self.assertEqual(name, f"{valid}/a_b.txt")
                if "\r" not in name:
                    self.assertEqual(self.save(name), name)
        with self.assertRaises(SuspiciousFileOperation):
            field.generate_filename("a/../..", "b.txt")


# -- Links -----------------------------------------------------------------------------


class LinkTests(StorageTestCase):
    def setUp(self):
        super().setUp()
        self.account.put("/a b.txt", b"12345")

    def leads_to(self, link, content):
        self.assertEqual(self.account.follow(link), content)

    def test_a_temporary_link_is_cached_for_all_spellings_of_a_name(self):
        link = self.storage.url("a b.txt")
        self.leads_to(link, b"12345")
        with self.costs():
            for name in ("a b.txt", "A B.TXT", "./a b.txt"):
                self.assertEqual(self.storage.url(name), link)
        key, mark = sorted(cache._cache)
        self.assertRegex(key, "^:1:dropbox_storage:[0-9a-f]{64}$")
        self.assertEqual(mark, f"{key}:request")
        self.assertEqual(cache.get(key.partition(":1:")[2]), link)
        self.assertRegex(cache.get(mark.partition(":1:")[2]), "^[0-9a-f]{32}$")
        # Two files, though equal under Python's lower().
        for name in ("ΝΙΚΟΣ", "νικος"):
            self.account.put(f"/{name}", name.encode())
        for name in ("ΝΙΚΟΣ", "νικος"):
            self.leads_to(self.storage.url(name), name.encode())

    def test_url_cache_timeout(self):
        for timeout in (0, None):
            storage = self.account.storage(url_cache_timeout=timeout)
            with unittest.mock.patch.object(module, "caches", None):
                self.assertNotEqual(storage.url("a b.txt"), storage.url("a b.txt"))
                storage.delete("none")
        storage = self.account.storage(url_cache_timeout=0.05)
        old = storage.url("a b.txt")
        time.sleep(0.1)
        self.assertNotEqual(storage.url("a b.txt"), old)

    def test_base_url_needs_no_call(self):
        lazy = urls.reverse_lazy("media", args=[""])
        later = DropboxStorage(base_url=lazy)
        with override_settings(ROOT_URLCONF=()), self.assertRaises(urls.NoReverseMatch):
            later.url("a b.txt")
        pattern = urls.re_path("^media/(.*)$", module.serve, name="media")
        with override_settings(ROOT_URLCONF=(pattern,)):
            plain = [DropboxStorage(base_url=url) for url in ("/media", "/media/")]
            for storage in (*plain, later):
                for name, url in {
                    "a b.txt": "/media/a%20b.txt",
                    "/dir\\\xe9.txt": "/media/dir/%C3%A9.txt",
                    "e\u0301.txt": "/media/%C3%A9.txt",
                    "./a//b/./c": "/media/a/b/c",
                    "css/": "/media/css/",
                    pathlib.PurePosixPath("a b"): "/media/a%20b",
                    "": "/media/",
                    None: "/media/",
                }.items():
                    self.assertEqual(storage.url(name), url)

    def test_what_changes_a_file_drops_its_link(self):
        """Also if it fails, as it may have been carried out; but not where it cannot."""
        add = self.account.storage(max_wait=0)
        overwrite = self.account.storage(write_mode="overwrite", max_wait=0)
        update = self.account.storage(write_mode="update", max_wait=0)
        upload = "files/upload"
        for act, route, drops in (
            (lambda: self.save("A b.txt", b"saved", overwrite), upload, True),
            (lambda: self.save("A b.txt", b"saved", update), upload, True),
            (lambda: self.write("a b.txt", b"1", storage=overwrite), upload, True),
            (lambda: overwrite.delete("a b.txt"), "files/delete_v2", True),
            (lambda: self.save("a b.txt", b"x", add), upload, False),
        ):
            for kind in ("reset", "bad_input", "/path_write/no_write_permission"):
                old = self.storage.url("a b.txt")
                with self.subTest(route=route, kind=kind):
                    with self.refused(route, kind, times=9):
                        act()
                self.assertEqual(self.storage.url("a b.txt") == old, not drops)
            if drops:
                old = self.storage.url("a b.txt")
                act()
                self.assertNotEqual(self.storage.url("a b.txt"), old)
                self.account.put("/a b.txt", b"12345")
                cache.clear()
        with self.refused("files/delete_v2", "503_after", times=9):
            overwrite.delete("a b.txt")
        self.assertEqual(overwrite.url("a b.txt"), "about:invalid#a%20b.txt")
        self.save("a b.txt", b"new")  # the name was free
        self.leads_to(self.storage.url("a b.txt"), b"new")

    def test_accounts_namespaces_members_and_roots_are_apart(self):
        self.account.tokens |= {"other-token"}
        self.account.put("/team/a b.txt")
        self.account.put("/root/a b.txt")
        options = ({}, {"oauth2_access_token": "other-token"}, {"namespace_id": "42"})
        options += ({"team_member_id": "dbmid:1"}, {"root_path": "/root"})
        links = {self.account.storage(**some).url("a b.txt") for some in options}
        own = DropboxStorage()
        own.client = FakeDropbox(self.account)
        own.client._headers = {"Dropbox-API-Select-User": "dbmid:2"}
        self.assertEqual(len({*links, own.url("a b.txt")}), 6)

    def test_a_missing_file_has_an_invalid_address_and_one_warning(self):
        for name, address in {
            "gone.jpg": "about:invalid#gone.jpg",
            "dir/a b#c?.jpg": "about:invalid#dir/a%20b%23c%3F.jpg",
        }.items():
            with self.assertLogs("dropbox_storage", "WARNING") as logs:
                self.assertEqual(self.storage.url(name), address)
            text = f"No link to {name!r}: it is not in '/'."
            self.assertEqual(logs.output, [f"WARNING:dropbox_storage:{text}"])
        for name in ("", None):
            with self.raises(ValueError, "The name must be given to url()."):
                self.storage.url(name)
        with self.refused("files/get_temporary_link", "bad_input"):
            self.storage.url("a b.txt")
        self.assertEqual(len(cache._cache), 0)

    def test_what_is_no_https_link_is_a_failed_answer(self):
        metadata = untagged(self.account.entries["/a b.txt"].metadata())
        bad = ("javascript:alert(1)", "http://169.254.169.254/", "https://a/\r\nB: c")
        for link in (*bad, "https://a b/", "https://", "https://\xe9/", "", "//a/"):
            body = json.dumps({"metadata": metadata, "link": link})
            fault = answers(200, body.encode())
            with self.subTest(link), self.failing("files/get_temporary_link", fault):
                self.leads_to(self.storage.url("a b.txt"), b"12345")
            uncached = self.account.storage(url_cache_timeout=0)
            with self.refused("files/get_temporary_link", fault, times=999) as caught:
                uncached.url("a b.txt")
            self.assertTrue(caught.exception.temporary)
            cache.clear()
        self.storage.url("a b.txt")
        key = min(cache._cache).partition(":1:")[2]
        for garbage in (*bad, 7, [], {"a": 1}, b"https://a", ("https://a", 1)):
            cache.set(key, garbage)
            link = self.storage.url("a b.txt")
            self.leads_to(link, b"12345")
            self.assertEqual(self.storage.url("a b.txt"), link)

    def test_another_cache_and_one_that_is_down(self):
        backend = "django.core.cache.backends.locmem.LocMemCache"
        kept = {
            "default": {"BACKEND": backend},
            "missing": {"BACKEND": "nowhere.Cache"},
        }
        kept["links"] = {"BACKEND": backend, "LOCATION": "links"}
        kept["down"] = {"BACKEND": f"{__name__}.BrokenCache"}
        with override_settings(CACHES=kept):
            caches["default"].clear()
            storage = self.account.storage(url_cache="links")
            self.assertEqual(storage.url("a b.txt"), storage.url("a b.txt"))
            found = [len(caches[alias]._cache) for alias in ("default", "links")]
            self.assertEqual(found, [0, 2])
            storage = self.account.storage(url_cache="down")
            with self.assertLogs("dropbox_storage", "WARNING") as logs:
                self.leads_to(storage.url("a b.txt"), b"12345")
            line = "WARNING:dropbox_storage:The cache of links failed: ConnectionError."
            self.assertEqual(logs.output, [line])
            self.save("b.txt", b"x", storage)
            storage.delete("b.txt")
            storage = self.account.storage(url_cache="missing")
            with self.assertRaises(ImproperlyConfigured):
                self.save("c", b"", storage)
            with self.assertRaises(ImproperlyConfigured):
                storage.delete("a b.txt")
            self.holds({"a b.txt": b"12345"})


class BrokenCache(BaseCache):
    def __init__(self, *args):
        super().__init__({})

    def get(self, *args, **kwargs):
        raise ConnectionError("redis://user:password@cache.example is down")

    add = set = delete = delete_many = get


# -- Files -----------------------------------------------------------------------------


class FileTests(StorageTestCase):
    def setUp(self):
        super().setUp()
        self.account.put("/a.txt", b"one\ntw\xc3\xb6\r\nthree")
        self.account.put("/dir/b")
        self.account.put("/big", HUGE)

    def test_a_file_reads_like_a_local_one(self):
        with self.costs("files/download"), self.storage.open("a.txt") as file:
            self.assertEqual((file.name, file.mode, file.size), ("a.txt", "rb", 15))
            self.assertEqual((len(file), bool(file), file.closed), (15, True, False))
            self.assertEqual(repr(file), "<DropboxFile: a.txt>")
            self.assertTrue(file.readable() and file.seekable())
            self.assertFalse(file.writable())
            self.assertEqual(file.read(2), b"on")
            self.assertEqual(file.tell(), 2)
            self.assertEqual(file.readline(), b"e\n")
            self.assertEqual(file.seek(-5, io.SEEK_END), 10)
            self.assertEqual((file.read(), file.read()), (b"three", b""))
            self.assertEqual([*file.chunks(4)][-1], b"ree")
            file.seek(0)
            self.assertEqual(file.readlines()[0], b"one\n")
            self.assertEqual([*file][1], b"tw\xc3\xb6\r\n")
            file.seek(100)
            self.assertEqual(file.read(), b"")
            for offset, whence in ((-1, 0), (0, 3), (0, -1), (0, 9)):
                self.assertRaises((OSError, ValueError), file.seek, offset, whence)
            self.assertEqual(file.tell(), 100)
            self.assertRaises(io.UnsupportedOperation, file.write, b"x")
        self.assertTrue(file.closed)
        with self.storage.open(pathlib.PurePosixPath("a.txt"), "r") as file:
            self.assertEqual((file.name, file.read()), ("a.txt", "one\ntw\xf6\nthree"))

    def test_what_cannot_be_opened(self):
        for mode in ("", *"U rU rw r+w rr bt r++ rbt z + b".split()):
            message = f"{mode!r} is not a mode of open(), such as 'rb'."
            with self.raises(ValueError, message):
                self.storage.open("a.txt", mode)
        for name, modes, error in (
            ("missing", ("r", "rb", "r+"), FileNotFoundError),
            ("dir", ("r", "rb", "r+", "ab"), IsADirectoryError),
            ("a.txt", ("x", "xb"), FileExistsError),
            ("dir", ("x",), FileExistsError),
        ):
            for mode in modes:
                self.assertRaises(error, self.storage.open, name, mode)

    def test_a_file_can_be_opened_again(self):
        file = self.storage.open("a.txt")
        self.assertEqual(file.read(3), b"one")
        with self.costs():
            self.assertIs(file.open(), file)
            self.assertEqual(file.read(3), b"one")
        file.close()
        self.assertRaises(ValueError, file.read)
        self.assertEqual(file.open().read(3), b"one")
        self.assertEqual(file.open("r").read(3), "one")
        self.assertRaises(ValueError, file.open, "nonsense")
        self.assertEqual((file.mode, file.closed), ("r", False))
        with file.open("wb"):
            file.write(b"new")
            self.assertEqual(file.open("rb").read(), b"new")  # ends the one before
            file.open("wb").write(b"again")
        self.assertEqual(self.read("a.txt"), b"again")
        for mode in ("w+b", "x+b"):  # is not emptied
            file = self.storage.open(f"new{mode[0]}", mode)
            file.write(b"written")
            file.close()
            self.assertEqual((file.open().read(), file.mode), (b"written", "r+b"))
            file.close()

    def test_a_reopening_that_fails_leaves_a_closed_file(self):
        self.storage.max_wait = 0
        for mode in ("r+b", "ab", "a", "r+"):
            file = self.storage.open("big")
            file.close()
            with self.subTest(mode):
                with self.failing("files/download", "truncate", times=99):
                    self.assertRaises(DropboxStorageException, file.open, mode)
                self.assertTrue(file.closed)
                self.assertRaises(ValueError, file.read, 1)
                file.close()
                self.assertTrue(file.open().read() == HUGE)
                file.close()

    def test_every_mode_is_that_of_a_local_file(self):
        """The same operations in every mode, on a local file and on one in Dropbox."""
        letters = ("r", "w", "a", "x", "r+", "w+", "a+", "x+")
        modes = [f"{letter}{kind}" for letter in letters for kind in ("", "b", "t")]
        modes += ["+rb", "b+r", "+wt", "tr", "bw", "+ab"]
        for mode, exists in itertools.product(modes, (True, False)):
            with self.subTest(mode=mode, exists=exists):
                found = self.in_mode(mode, exists, local=True)
                self.assertEqual(self.in_mode(mode, exists, local=False), found)
        with unittest.mock.patch.dict(sys.modules, fcntl=None):  # as on Windows
            self.write("a.txt", b"\nend", "ab")
        self.assertEqual(self.read("a.txt")[-9:], b"three\nend")

    def in_mode(self, mode, exists, local):
        """What the file holds afterwards, and the results of some operations."""
        results, text = [], "b" not in mode
        some, more = ("\xe9\n12", "Z") if text else (b"\xc3\xa9\n12", b"Z")
        old = b"old\xc3\xa9 text"
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "f")
            self.account.entries.pop("/f", None)
            if exists:
                path.write_bytes(old)
                self.account.put("/f", old)
            try:
                if local:
                    file = open(path, mode, encoding="utf-8" if text else None)
                else:
                    file = self.storage.open("f", mode)
            except OSError as error:
                return None, type(error)
            with file:
                for method, *args in (
                    ("readable",), ("writable",), ("seekable",), ("tell",), ("read", 3), ("seek", 0),
                    ("write", some), ("tell",), ("seek", 0), ("write", more), ("seek", 1), ("read",),
                    ("seek", 0, 2),
                ):  # fmt: skip
                    try:
                        results.append(getattr(file, method)(*args))
                    except (OSError, ValueError) as error:
                        results.append(type(error))
            if local:
                return path.read_bytes(), results
            return self.account.files()["/f"], results

    def test_writing_becomes_visible_when_closed_and_not_before(self):
        contents = ("new", "", "x" * len(HUGE))
        for mode, content in itertools.product(("w", "wb", "w+b"), contents):
            content = content.encode() if "b" in mode else content
            self.account.put("/a.txt", b"old")
            with tempfile.TemporaryDirectory() as folder:
                with override_settings(FILE_UPLOAD_TEMP_DIR=folder):
                    make = tempfile.TemporaryFile
                    with unittest.mock.patch.object(tempfile, "TemporaryFile") as made:
                        made.side_effect = make
                        file = self.storage.open("a.txt", mode)
                self.assertEqual(made.call_args.kwargs["dir"], folder)
            self.assertEqual(file.write(content), len(content))
            self.assertEqual(file.size, len(content))
            self.assertEqual(self.account.files()["/a.txt"], b"old")
            file.close()
            file.close()
            self.assertEqual((file.closed, file.size), (True, len(content)))
            self.assertRaises(ValueError, file.write, content)
            expected = content if "b" in mode else content.encode()
            self.assertTrue(self.account.files()["/a.txt"] == expected)
        self.assertEqual(self.account.calls[f"{SESSION}/finish"], 3)
        with self.storage.open("new", "w") as file:
            file.write("\xe9")
            self.assertEqual(file.size, 2)

    def test_each_mode_replaces_what_it_may_and_nothing_else(self):
        update = self.account.storage(write_mode="update")
        for storage, mode, old in (
            (self.storage, "xb", None), (self.storage, "x", None), (self.storage, "ab", None), (update, "wb", None),
            *((self.storage, mode, old) for mode in ("r+", "rb+", "a", "ab", "a+") for old in (b"old", HUGE)),
            (update, "wb", b"old"),
        ):  # fmt: skip
            self.account.entries.pop("/f", None)
            if old:
                self.account.put("/f", old)
            error = FileExistsError if "x" in mode else DropboxStorageException
            with self.subTest(mode, old=bool(old)):
                with self.assertRaises(error), storage.open("f", mode) as file:
                    file.write(b"mine" if "b" in mode else "mine")
                    self.account.put("/f", b"theirs")
                self.assertEqual(self.account.files()["/f"], b"theirs")

    def test_unchanged_files_are_not_uploaded(self):
        for content in (b"", b"old", HUGE):
            self.account.put("/a.txt", content)
            for mode in ("r+b", "ab", "a+b", "r+", "a")[: 3 if content is HUGE else 5]:
                blocks = -(-len(content) // (2 * UNIT)) if content is HUGE else 1
                with self.subTest(mode, size=len(content)):
                    with self.costs(*["files/download"] * blocks):
                        with self.storage.open("a.txt", mode) as file:
                            file.seek(0)
                            some = file.read(1) if "+" in mode else None
                            file.seek(0)
                            if "r" in mode and some:
                                file.write(some)
        for name in ("new", "new", "empty"):
            with self.costs("files/download", "files/upload"):
                with self.storage.open(name, "ab") as file:
                    file.write(b"" if name == "empty" else b"one")
        self.assertEqual((self.read("new"), self.read("empty")), (b"oneone", b""))

    def test_an_upload_that_fails_leaves_the_file_closed_and_dropbox_as_it_was(self):
        self.storage.max_wait = 0
        for content in (b"new", HUGE):
            file = self.storage.open("a.txt", "wb")
            file.write(content)
            before = self.account.files()
            with self.refused("*", "503", times=99):
                file.close()
            self.assertTrue(file.closed)
            file.close()
            self.assertEqual(self.account.files(), before)

    def test_archives_are_made_and_read_as_local_ones(self):
        def make(file):
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr(zipfile.ZipInfo("large"), HUGE)
                archive.writestr(zipfile.ZipInfo("small.txt"), b"found")

        local = io.BytesIO()
        make(local)
        for mode in ("w+b", "wb"):
            with self.storage.open("new", mode) as file:
                make(file)
            self.assertTrue(self.account.files()["/new"] == local.getvalue())
        with self.storage.open("new") as file, zipfile.ZipFile(file) as archive:
            self.assertEqual(archive.read("small.txt"), b"found")
            self.assertTrue(archive.read("large") == HUGE)

    def test_reading_anywhere(self):
        self.account.put("/small", HUGE[: 8 * UNIT])
        rand = random.Random(4)
        for name in ("big", "small"):
            data = self.account.files()[f"/{name}"]
            with self.account.counting() as calls, self.storage.open(name) as file:
                for _ in range(99):
                    start, size = rand.randrange(len(data)), rand.randrange(UNIT)
                    file.seek(start)
                    self.assertTrue(file.read(size) == data[start : start + size])
                file.seek(0)
                self.assertTrue(file.read() == data)
                self.ends_its_threads()
        self.assertEqual(calls, {"files/download": 1})

    def test_blocks_that_were_read_come_back_from_the_disk(self):
        """Those that are whole; none of a reader who goes on in order."""
        block = 2 * UNIT
        data = noise(40 * block, 12)
        self.account.put("/large", data)
        jumps, in_order = [*range(3, 40, 2)] * 2, [*range(3, 21)]
        full = OSError(errno.ENOSPC, "full")
        for numbers, least, most, fault in (
            (jumps, 19, 19, None), (jumps, 31, 38, full), (in_order, 18, 99, None)
        ):  # fmt: skip
            make = unittest.mock.Mock(side_effect=fault or tempfile.TemporaryFile)
            with self.subTest(numbers=numbers, fault=fault):
                with self.storage.open("large") as file:
                    calls = sum(self.account.calls.values())
                    sent = self.account.bytes_out
                    with unittest.mock.patch.object(tempfile, "TemporaryFile", make):
                        for number in numbers:
                            file.seek(block * number)
                            wanted = data[block * number :][:UNIT]
                            self.assertTrue(file.read(UNIT) == wanted)
                        self.ends_its_threads()
                calls = sum(self.account.calls.values()) - calls
                self.assertTrue(least <= calls <= most, calls)
                self.assertEqual(self.account.bytes_out - sent, calls * block)
                self.assertEqual(make.called, numbers is jumps)

    def test_a_block_that_is_still_loading_is_not_kept(self):
        data = noise(120 * UNIT, 13)
        go_on = threading.Event()
        slow = {}  # the begin of each block that nobody reads yet

        class Body(io.BytesIO):
            def read(self, *args):
                if self.tell() and self.getvalue()[:9] in slow:
                    go_on.wait(5)
                return super().read(*args)

        self.account.put("/large", data)
        block = 2 * UNIT
        numbers = range(3, 57, 4)
        for number in numbers:
            begin = (number + 2) * block
            slow[data[begin : begin + 9]] = begin
        with self.storage.open("large") as file:
            self.account.body = Body
            for number in numbers:
                file.seek(number * block)
                wanted = data[number * block :][: block + 1]
                self.assertTrue(file.read(block + 1) == wanted)
            go_on.set()
            for begin in slow.values():
                file.seek(begin)
                self.assertTrue(file.read(block) == data[begin : begin + block])

    def test_a_reader_goes_on_after_an_error_only_from_where_it_seeks_to(self):
        self.storage.max_wait = 0
        for read in (lambda: file.read(9 * UNIT), lambda: file.file.raw.readall()):
            file = self.storage.open("big")
            file.seek(4 * UNIT)
            file.read(1)
            self.ends_its_threads()
            file.seek(12 * UNIT)
            with self.refused("files/download", "503", times=99):
                read()
            for act in (lambda: file.read(1), file.tell, lambda: file.seek(0, 1)):
                self.assertRaises(DropboxStorageException, act)
            file.seek(4 * UNIT)
            self.assertTrue(file.read() == HUGE[4 * UNIT :])
            file.seek(0)
            self.assertTrue(file.read() == HUGE)
            file.close()
        with self.failing("files/download", "corrupt", times=2):
            file = self.storage.open("a.txt")
            for _ in range(2):
                self.assertRaises(DropboxStorageException, file.read)
                file.seek(0)
        self.assertEqual(file.read(3), b"one")

    def test_a_closed_file_sends_nothing_and_leaves_nothing(self):
        self.account.put("/text", b"x" * 20 * UNIT)
        for mode, size in itertools.product(("rb", "r"), (0, 5 * UNIT)):
            file = self.storage.open("text", mode)
            raw = file.file.raw if mode == "rb" else file.file.buffer.raw
            file.read(size)
            file.close()
            self.ends_its_threads()
            with self.costs():
                for act in (
                    lambda: file.read(1), lambda: file.seek(0), lambda: file.tell(), lambda: raw.read(1),
                    lambda: raw.readall(), lambda: raw.seek(0), lambda: raw.tell(),
                    lambda: raw.readinto(bytearray(1)),
                ):  # fmt: skip
                    self.assertRaises(ValueError, act)

    @unittest.skipIf(django.VERSION < (4, 0), "Django 3.2 has no length for such files")
    def test_a_file_response_knows_its_length_without_another_call(self):
        with self.costs("files/download"):
            response = FileResponse(self.storage.open("a.txt"))
            self.assertEqual(response["Content-Length"], "15")
            content = b"".join(response.streaming_content)
            response.close()
        self.assertEqual(content, b"one\ntw\xc3\xb6\r\nthree")


# Ways to leave a file that was opened for writing, each a function of one that opens it
# and one that writes to it.


def inner(file):
    """The DropboxFile, also of a FieldFile."""
    return file.file if isinstance(file, FieldFile) else file


class Saving:
    def close(open_file, write):
        file = open_file()
        write(file)
        file.close()

    def leave_block(open_file, write):
        with open_file() as file:
            write(file)

    def open_and_leave_block_in_a_handler(open_file, write):
        try:
            raise KeyError
        except KeyError:
            with inner(open_file()) as file:
                write(file)

    def close_finally(open_file, write):
        file = open_file()
        with contextlib.suppress(ZeroDivisionError):
            try:
                write(file)
                raise ZeroDivisionError
            finally:
                file.close()

    def open_again(open_file, write):
        file = open_file()
        write(file)
        file.open("rb").close()

    def close_wrapper_first(open_file, write):
        file = open_file()
        write(file)
        with io.TextIOWrapper(inner(file).file):
            pass
        file.close()

    def close_inner_first(open_file, write):
        with open_file() as file:
            write(file)
            inner(file).file.close()

    def collect_wrapper(open_file, write):
        with open_file() as file:
            io.TextIOWrapper(inner(file))
            gc.collect()
            write(file)

    def collect_wrapper_that_wrote(open_file, write):
        file = open_file()
        io.TextIOWrapper(inner(file)).write("new")
        gc.collect()
        file.close()

    def collect_wrapper_of_the_handle(open_file, write):
        file = open_file()
        write(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            csv.writer(io.TextIOWrapper(inner(file).file))
            gc.collect()
        file.close()


class AfterAnException:
    """The `with` of a FieldFile tells the file nothing of it, and saves."""

    def raise_in_block(open_file, write):
        with contextlib.suppress(ZeroDivisionError), open_file() as file:
            write(file)
            raise ZeroDivisionError

    def raise_in_wrapper(open_file, write):
        with contextlib.suppress(ZeroDivisionError), open_file() as file:
            with io.TextIOWrapper(inner(file).file) as wrapper:
                wrapper.write("new")
                raise ZeroDivisionError


class Forgetting:
    def forget(open_file, write):
        write(open_file())
        gc.collect()

    def forget_wrapper(open_file, write):
        wrapper = io.TextIOWrapper(inner(open_file()))
        wrapper.write("half")
        del wrapper
        gc.collect()


class Discarding:
    def discard(open_file, write):
        with open_file() as file:
            write(file)
            inner(file).discard()

    def discard_on_a_full_disk(open_file, write):
        file = inner(open_file())
        with unittest.mock.patch.object(file, "file") as full:
            full.close.side_effect = OSError(errno.ENOSPC, "full")
            file.discard()
        file.file.close()


WAYS = {
    Saving: None,
    AfterAnException: "'a' is not saved: an exception came first.",
    Forgetting: "'a' is not saved: nobody closed it.",
    Discarding: "",
}


class LeavingFileTests(StorageTestCase):
    def openers(self, mode):
        """Each way to open the file in the mode; the second one is that of a field."""
        field = models.FileField(storage=self.storage)
        yield lambda: self.storage.open("a", mode)
        yield lambda: FieldFile(None, field, "a").open(mode)

        def open_again():
            file = self.storage.open("a", mode)
            file.discard()
            return file.open(mode)

        yield open_again

    def test_a_file_that_could_not_be_flushed_has_the_size_that_was_known(self):
        file = self.storage.open("a", "w")
        with unittest.mock.patch.object(file, "file") as full:
            full.close.side_effect = OSError(errno.ENOSPC, "full")
            with self.assertRaises(OSError):
                file.close()
        self.assertEqual(file.size, 0)
        self.holds({})
        file.file.close()

    def test_each_way_to_leave_a_file_in_each_mode(self):
        modes = ("wb", "w", "xb", "r+b", "r+", "ab", "a", "w+b", "w+")
        ways = [(kind, name) for kind in WAYS for name in vars(kind) if name[0] != "_"]
        for (kind, name), mode in itertools.product(ways, modes):
            if "wrapper" in name and "b" not in mode:
                continue
            # The collector takes its time.
            is_slow = "collect" in name or kind is Forgetting
            if is_slow and mode not in ("wb", "r+b", "w"):
                continue
            for number, open_file in enumerate(self.openers(mode)):
                saves = kind is Saving or (kind is AfterAnException and number == 1)
                warning = None if saves else WAYS[kind]
                with self.subTest(name, mode=mode, opened=number):
                    self.check(vars(kind)[name], warning, mode, open_file)

    def check(self, leave, warning, mode, open_file):
        self.account.entries.clear()
        before = {} if "x" in mode else {"a": b"old"}
        for name, content in before.items():
            self.account.put(f"/{name}", content)
        new = b"new" if "b" in mode else "new"
        with unittest.mock.patch.object(module.logger, "warning") as warn:
            leave(open_file, lambda file: file.write(new))
        after = b"oldnew" if "a" in mode else b"new"
        self.holds({"a": after} if warning is None else before)
        messages = [call.args[0] % call.args[1:] for call in warn.call_args_list]
        self.assertEqual(messages, [warning] if warning else [])

    def test_what_was_only_read_is_given_up_without_a_warning(self):
        self.account.put("/a", b"old")
        for leave in (Forgetting.forget, AfterAnException.raise_in_block):
            with unittest.mock.patch.object(module.logger, "warning") as warn:
                leave(lambda: self.storage.open("a", "r+b"), lambda file: file.read())
            self.assertEqual(warn.call_args_list, [])

    def test_what_is_given_up_is_not_sent_and_has_its_size(self):
        with self.costs():
            for leave in (Discarding.discard, AfterAnException.raise_in_block):
                file = self.storage.open("a", "w")
                leave(lambda: file, lambda file: file.write("x" * 9 * UNIT))
                self.assertEqual((file.size, file.closed), (9 * UNIT, True))


# -- The way to Dropbox: waiting, tokens, faults ---------------------------------------


class WaitingTests(StorageTestCase):
    """How long a request is repeated, and what the log says of it."""

    def logs(self, act, level="INFO"):
        """What is logged while act() succeeds or fails, with its numbers as N."""
        with self.assertLogs("dropbox_storage", level) as logs:
            with contextlib.suppress(DropboxStorageException):
                act()
        return [re.sub(r"\d+\.\d+", "N", line) for line in logs.output]

    def waits(self, kind, pauses, value=0, **options):
        """exists() meets this fault as many times as there are pauses, and waits so long."""
        storage = self.account.storage(**options)
        storage.FIRST_WAIT = 0.5
        self.clock.pauses.clear()
        with self.failing("files/get_metadata", kind, times=len(pauses), value=value):
            self.assertFalse(storage.exists("a"))
        self.assertEqual(len(self.clock.pauses), len(pauses))
        for pause, (least, most) in zip(self.clock.pauses, pauses):
            self.assertTrue(least <= pause <= most, (pause, least, most))

    def test_pauses(self):
        growing = [(m / 2, m) for m in (0.5, 1, 2, 4, 8, *[15] * 1095)]
        for kind in "503 429 429_new reset html 500_empty too_many_writes".split():
            self.waits(kind, growing[:6])
        self.waits("503", growing, max_wait=None)  # no number is too large
        self.assertGreater(len({*self.clock.pauses}), 1090)
        asking = "429 429_body 429_text 429_new too_many_writes 503_later".split()
        for kind, value in itertools.product(asking, (1, 2.5, 20)):
            with self.subTest(kind, value=value):
                self.waits(kind, [(value, value)] * 2, value)
        for value in ("soon", "-1", "nan", "Wed, 25 Nov 2026 12:00:00 GMT"):
            self.waits("503_later", growing[:1], value)
        error = {"reason": {".tag": "too_many_requests"}, "retry_after": 7.0, "new": []}
        body = {"error_summary": "too_many_requests/..", "error": error}
        for headers in ({}, {"Retry_After": "3"}):  # the larger of two
            self.waits(answers(429, body, **headers), [(7, 7)])
        refreshing = {**REFRESHING, "max_wait": 0}
        for kind in ("expired_token", "invalid_token"):
            self.waits(kind, [(0, 0)], **refreshing)
        for reason in ("expired_access_token/more", "invalid_access_token/more"):
            fault = answers(401, {"error_summary": f"{reason}/.", "error": {}})
            self.waits(fault, [(0, 0)], **refreshing)
        self.waits("expired_token", [(0, 0), (0.5, 1)], **REFRESHING)

    def test_max_wait_bounds_what_follows_the_first_failure(self):
        for max_wait, kind, value, seconds in (
            (0, "503", 0, (0, 0)), (1, "503", 0, (0.2, 1)), (60, "503", 0, (44, 60)), (300, "reset", 0, (284, 300)),
            (60, "429", 300, (0, 0)), (60, "429", 59, (59, 59)), (60, "429", 60, (0, 0)),
        ):  # fmt: skip
            storage = self.account.storage(max_wait=max_wait)
            storage.FIRST_WAIT, begun = 0.5, self.clock.now
            with self.subTest(max_wait, kind=kind, value=value):
                with self.refused("*", kind, times=9999, value=value) as caught:
                    storage.exists("a")
                waited = self.clock.now - begun
                self.assertTrue(seconds[0] <= waited <= seconds[1], waited)
                self.assertTrue(caught.exception.temporary)
                self.assertEqual(caught.exception.retry_after, value)

        def slow():
            self.clock.now += 100

        with self.refused("*", slow, times=99), self.costs(*["files/get_metadata"] * 3):
            self.account.storage(max_wait=150).exists("a")  # what attempts take counts
        for kind in ("missing_scope", "invalid_token", "expired_token"):
            with self.refused("*", kind, times=9), self.costs("files/get_metadata"):
                self.storage.exists("a")
        with self.refused("files/get_metadata", "invalid_token", times=9):
            self.account.storage(**REFRESHING).exists("a")

    def test_what_the_error_says(self):
        start = "files/get_metadata of '/a' failed"
        for value, tried in ((300, "1 attempt, 0 s"), (40, "2 attempts, 40 s")):
            asked = f"Dropbox asks to wait {value} s, max_wait is 60 s"
            message = f"{start} ({tried}; {asked}): too_many_requests."
            with self.failing("*", "429", times=99, value=value):
                with self.raises(DropboxStorageException, message) as caught:
                    self.storage.exists("a")
            copied = pickle.loads(pickle.dumps(caught.exception))
            for error in (caught.exception, copied):
                found = (error.reason, error.temporary, error.retry_after)
                self.assertEqual(found, ("too_many_requests", True, value))
        self.assertNotIsInstance(caught.exception, OSError)  # collectstatic hides those
        plain = DropboxStorageException("text")
        found = (plain.reason, plain.temporary, plain.retry_after)
        self.assertEqual(found, ("", False, 0))

    def test_the_log(self):
        line = "dropbox_storage:files/get_metadata of '/a' failed"
        for kind, reason in {
            "503": "HTTP 503",
            "429": "too_many_requests",
            "reset": "ConnectionError",
            "stall": "ReadTimeout",
            "garbage": "AssertionError" if __debug__ else "JSONDecodeError",
        }.items():
            with self.failing("files/get_metadata", kind, times=999, value=29):
                lines = self.logs(lambda: self.storage.exists("a"))
            again = f"{reason}. Next attempt in N s."
            self.assertEqual(lines[0], f"INFO:{line} at attempt 1: {again}")
            self.assertEqual(lines[1], f"WARNING:{line} at attempt 2: {again}")
            gave_up = rf"^WARNING:dropbox_storage:Gave up: files.* \(\d+ attempts, \d+ s.*\): {reason}"
            self.assertRegex(lines[-1], gave_up)
        storage = self.account.storage(**REFRESHING)
        lines = self.logs(lambda: storage.exists("b"), "DEBUG")
        debug = "DEBUG:dropbox_storage:"
        expected = [f"{debug}/oauth2/token: HTTP 200 in N s."]
        expected.append(f"{debug}/2/files/get_metadata: HTTP 409 in N s.")
        self.assertEqual(lines, expected)
        with self.assertLogs("dropbox_storage", "DEBUG") as logs:
            with self.refused("*", "503", times=999):
                self.account.storage(max_wait=1).exists("a")
        for number, record in enumerate(logs.records):
            self.assertEqual(record.status, 503)
            self.assertGreaterEqual(record.seconds, 0)
            if record.levelname != "DEBUG":
                found = (record.route, record.path, record.attempt)
                self.assertEqual(found, ("files/get_metadata", "/a", number // 2 + 1))
        for kind, template in {
            "invalid_token": "invalid_access_token", "expired_token": "expired_access_token",
            "missing_scope": "missing_scope", "app_scope": "required scope", "suspended": "user_suspended",
            "select_user": "invalid_select_user", "account_type": "invalid_account_type",
            "no_permission": "no_permission", "/path/insufficient_space": "insufficient_space",
            "/path/no_write_permission": "no_write_permission", "bad_input": None, "/path/restricted_content": None,
        }.items():  # fmt: skip
            with self.assertLogs("dropbox_storage", "DEBUG") as logs:
                with self.refused("*", kind, times=9) as caught:
                    self.storage.exists("a")
            _, *more = logs.records  # the request itself comes first
            found = [(record.levelname, record.msg, *record.args) for record in more]
            expected = ("ERROR", f"{template}: %s", caught.exception)
            self.assertEqual(found, [expected] if template else [], kind)


class TokenTests(StorageTestCase):
    def setUp(self):
        super().setUp()
        self.storage = self.account.storage(**REFRESHING)

    def test_threads_refresh_once(self):
        """Those of all storages of the account."""
        token = self.account.token

        def slow(form):  # so that all threads wait for the first one
            time.sleep(0.5)
            return token(form)

        self.account.token = slow
        storages = [DropboxStorage(**REFRESHING) for _ in range(8)]
        for refused in (False, False, True):
            self.account.expire_tokens()
            if refused:
                self.account.refresh_tokens.clear()
            with self.account.counting() as calls, ThreadPoolExecutor(8) as pool:
                futures = [pool.submit(storage.exists, "a") for storage in storages]
                errors = [future.exception() for future in futures]
            self.assertEqual(calls["oauth2/token"], 1)
            reasons = {error and error.reason for error in errors}
            self.assertEqual(reasons, {"invalid_grant" if refused else None})
        self.assertEqual(len({id(error) for error in errors}), 8)

    def test_nonsense_of_the_token_endpoint_is_survived(self):
        tokens = (None, "a b", "x")
        for body in ([], *({"access_token": token} for token in tokens)):
            with self.subTest(body):
                storage = self.account.storage(**REFRESHING)
                with self.failing("oauth2/token", answers(200, body), times=3):
                    self.assertFalse(storage.exists("a"))

    def test_what_each_use_of_a_token_costs(self):
        ask, fetch = "files/get_metadata", "oauth2/token"
        self.account.expires_in = 0  # it hardly lives
        with self.costs(fetch, ask, fetch, ask):
            self.assertFalse(self.storage.exists("a") or self.storage.exists("a"))
        self.account.expires_in = 14400
        with self.costs(fetch, ask, ask):
            self.assertFalse(self.storage.exists("a") or self.storage.exists("a"))
        self.account.expire_tokens()
        with self.costs(ask, fetch, ask):
            self.assertFalse(self.storage.exists("a"))
        with self.refused(ask, "missing_scope"):
            self.storage.exists("a")
        with self.costs(fetch, ask):  # after each 401
            self.storage.exists("a")
        client = FakeDropbox(self.account)  # of one's own
        client._oauth2_refresh_token = "valid-refresh-token"
        client._app_key, client._app_secret = "app-key", "app-secret"
        self.storage.client, self.storage.max_wait = client, 0
        with self.refused(fetch, "503", times=99), self.costs(fetch):
            self.storage.exists("a")
        with self.costs(fetch, ask, ask):
            self.assertFalse(self.storage.exists("a") or self.storage.exists("a"))

    def test_what_a_refusal_says(self):
        start = "files/get_metadata of '/a' failed:"
        advice = "'sl.' tokens live four hours; set oauth2_refresh_token"
        self.account.expired.add("sl.short")
        grant = "invalid_grant (oauth2_refresh_token or the code is wrong, revoked or used)."
        client = (
            "invalid_client: bad app key or secret (app_key and app_secret must be of the app "
            "that was authorized)."
        )
        for options, said in (
            ({**REFRESHING, "oauth2_refresh_token": "revoked"}, grant),
            ({**REFRESHING, "app_secret": "wrong"}, client),
            ({**REFRESHING, "app_key": "wrong"}, client),
            ({"oauth2_access_token": "wrong"},
             "invalid_access_token (the token is wrong, revoked or of another app; authorize the app again)."),
            ({"oauth2_access_token": "sl.short"}, f"expired_access_token ({advice})."),
        ):  # fmt: skip
            storage = DropboxStorage(**options)
            short = options["oauth2_access_token"] == "sl.short"
            with self.subTest(said), contextlib.ExitStack() as stack:
                logs = stack.enter_context(self.assertLogs("dropbox_storage"))
                for _ in range(2):
                    with self.raises(DropboxStorageException, f"{start} {said}"):
                        storage.exists("a")
            warned = f"WARNING:dropbox_storage:oauth2_access_token: {advice}."
            self.assertEqual(logs.output.count(warned), short)


class FaultTests(StorageTestCase):
    """One operation, one fault: at each of its routes, first and later, once and more."""

    def run_one(self, operation, *faults):
        """The account afterwards, the result or the exception, and the calls."""
        options, act = OPERATIONS[operation]
        account = filled_account()
        for entry in account.entries.values():
            entry.modified = "2024-07-01T12:00:00Z"
        storage = account.storage(**REFRESHING, **options)
        for fault in faults:
            account.fail(*fault)
        try:
            result = act(storage)
        except Exception as error:
            result = error
        return account, result, account.calls

    def same(self, operation, account, expected):
        files, kept = account.files(), expected.files()
        if operation == "save a taken name":  # the other name is another one each time
            files, kept = sorted(files.values()), sorted(kept.values())
        self.assertTrue(files == kept, f"{[*account.files()]}")

    def cells(self):
        for operation in OPERATIONS:
            account, result, clean = self.run_one(operation)
            self.assertNotIsInstance(result, Exception)
            for route, count in [*clean.items()]:
                for nth in (1, count)[:count]:
                    yield operation, account, result, clean, route, nth

    def test_transient_faults_are_retried(self):
        for operation, expected, result, clean, route, nth in self.cells():
            every = operation in ("save", "read", "exists", "save large")
            faults = [*(TRANSIENT if every else CORE), BUSY_ERRORS.get(route)]
            faults += ["corrupt"] * route.startswith("files/upload")
            faults += ["truncate", "short"] * (route == "files/download")
            cells = [(fault, 1) for fault in faults if fault]
            for fault, times in [*cells, ("503", 3), ("reset_after", 3)]:
                with self.subTest(f"{operation}: {route} {nth} {fault} x {times}"):
                    fails = (route, fault, nth, times)
                    account, found, calls = self.run_one(operation, fails)
                    if isinstance(found, Exception):
                        raise found
                    self.assertEqual(found, result)
                    self.same(operation, account, expected)
                    left = len(account.sessions) - len(expected.sessions)
                    self.assertLessEqual(left, times)
                    more = sum(calls.values()) - sum(clean.values())
                    self.assertLessEqual(more, 2 * times + 1)

    def test_lasting_faults_are_reported_and_lose_nothing(self):
        """At once, if they do not pass by themselves, or come from elsewhere."""

        class TimeLimit(Exception):  # as that of a task queue, which a signal raises
            pass

        elsewhere = (TimeLimit("of the queue"), TypeError("a bug"))
        for operation, _, _, clean, route, nth in self.cells():
            faults = [*PERMANENT, *ROUTE_REFUSALS.get(route, ()), "503", "reset"]
            for fault in [*faults, *elsewhere]:
                if route == "oauth2/token" and fault == "/brand_new":
                    continue  # no route of the API, with no errors of its own
                kind = raised_by(__name__, fault) if fault in elsewhere else fault
                with self.subTest(f"{operation}: {route} {nth} {fault}"):
                    fails = (route, kind, nth, 999)
                    account, found, calls = self.run_one(operation, fails)
                    lasting = fault in ("503", "reset")
                    if fault in elsewhere:
                        self.assertIs(found, fault)
                    else:
                        self.assertIsInstance(found, DropboxStorageException)
                        self.assertEqual(found.temporary, lasting)
                    # Blocks that failed ahead of their reader are requested once more.
                    more = 1 + 6 * (operation == "read huge")
                    if not lasting:
                        self.assertLessEqual(calls[route], clean[route] + more)
                    self.assertEqual(account.files()["/a"], b"old")
                    self.assertNotIn("/new", account.files())
        self.ends_its_threads()

    def test_nonsense_is_reported_with_nothing_lost(self):
        """As a proxy or a broken server sends it, with status 200, at each request."""
        texts = ("null", "[]", "{}", "7", '{".tag": []}', '{"name": null}', "\xff", "{")
        for operation, _, _, _, route, nth in self.cells():
            for text in texts:
                fault = answers(200, text.encode(), **{"dropbox-api-result": text})
                fails = (route, fault, nth, 999)
                with self.subTest(f"{operation}: {route} {nth} {text}"):
                    account, found, _ = self.run_one(operation, fails)
                    if isinstance(found, Exception):
                        self.assertIsInstance(found, DropboxStorageException)
                    self.assertEqual(account.files()["/a"], b"old")
                    self.assertNotIn("/new", account.files())

    def test_wrong_bytes_are_never_taken_for_the_file(self):
        for operation in ("read", "read huge"):
            for nth in (1, self.run_one(operation)[2]["files/download"]):
                found = self.run_one(operation, ("files/download", "corrupt", nth))[1]
                self.assertIsInstance(found, DropboxStorageException)
                self.assertEqual(found.reason, "content_hash_mismatch")
                self.assertTrue(found.temporary)  # the next read may be right

    def test_a_lost_commit_that_failed_is_not_taken_for_done(self):
        """The response is lost, and then someone else's file is what is found."""
        for size in (5, len(LARGE)):
            self.new_account()
            storage = self.account.storage(write_mode="update")
            self.account.put("/a", b"old")
            self.account.fail("files/upload", "reset")
            self.account.fail(f"{SESSION}/finish", "reset")
            theirs = functools.partial(self.account.put, "/a", b"theirs")
            with self.assertRaises(DropboxStorageException):
                storage.save("a", Unsized(LARGE[:size], then=theirs))
            self.holds({"a": b"theirs"})
        for reason in ("/closed", "/incorrect_offset"):  # a chunk that was not lost
            with self.refused(f"{SESSION}/append_v2", reason):
                self.save("b", HUGE)
            self.ends_its_threads()

    def test_a_proxy_that_ignores_ranges_is_reported_at_once(self):
        class Whole(FakeAccount):
            def send_file(self, metadata, data, request, fault):
                request.headers.pop("Range", None)
                return super().send_file(metadata, data, request, fault)

        account = Whole()
        account.put("/huge", HUGE)
        with account.storage().open("huge") as file:
            file.seek(9 * UNIT)
            with self.fails("a proxy changes") as caught:
                file.read(5)
        self.assertFalse(caught.exception.temporary)
        self.assertLessEqual(account.calls["files/download"], 3)


# -- What a failure means --------------------------------------------------------------


class ErrorTests(StorageTestCase):
    def test_permanent_failures_say_what_to_do(self):
        for kind, told in {**SAID, **SAID_ALONE}.items():
            saves = "malformed" in kind  # only saving says what is wrong with a name
            route = "files/upload" if saves else "files/get_metadata"
            words = [words for words in module.ADVICE if words in told]
            self.assertEqual(len(words), kind in SAID, kind)
            advice = "".join(f" ({module.ADVICE[one]})" for one in words)
            message = f"{route} of '/a' failed: {told}{advice}."
            with self.subTest(kind), self.costs(route), self.failing(route, kind):
                with self.raises(DropboxStorageException, message) as caught:
                    self.save("a") if saves else self.storage.exists("a")
                error = caught.exception
                self.assertTrue(told.startswith(error.reason), error.reason)
                self.assertFalse(error.temporary)
                self.assertIsInstance(error.__cause__, dropbox.exceptions.HttpError)
                self.assertRegex(error.__cause__.request_id, "^[0-9a-f]+$")

    def test_reasons_of_odd_shapes(self):
        tags = '"error": {".tag": "path", "path": {".tag": "conflict", "conflict": {".tag": "x"}}}'
        for body, told in {
            "null": "HTTP 400 null",
            "7": "HTTP 400 7",
            '"text"': 'HTTP 400 "text"',
            '{"error_summary": 7}': 'HTTP 400 {"error_summary": 7}',
            '{"error_summary": ".."}': 'HTTP 400 {"error_summary": ".."}',
            '{"error": {".tag": "x"}}': "x",
            f'{{"error_summary": "path/..", {tags}}}': "path/conflict/x",
            '{"error_summary": "a/b", "error": {".tag": "c"}}': "a/b",
            '{"error": "x", "error_description": "y"}': "x y",
            '{"error_summary": "x/.", "error": {}, "user_message": {"text": "Ask\\nyour\\u001b admin."}}':
                "x Ask your  admin.",
            "a\x00b\u202ec": "HTTP 400 a b c",
            "word" * 1000: f"HTTP 400 {'word' * 1000}"[:500],
        }.items():  # fmt: skip
            self.account.refused = Refused(400, body)
            message = f"files/get_metadata of '/a' failed: {told}."
            with self.subTest(body[:30]), self.raises(DropboxStorageException, message):
                self.storage.exists("a")

    def test_reasons_become_errors_of_python(self):
        """There may be more words around them, but they are whole."""
        for reason, error in {
            "path/not_found": FileNotFoundError,
            "path/not_found/deleted": FileNotFoundError,
            "path_lookup/not_found/more": FileNotFoundError,
            "path/malformed_path/more": FileNotFoundError,
            "path/not_file/more": IsADirectoryError,
            "path/not_folder/more": NotADirectoryError,
            "path/conflict/folder/more": IsADirectoryError,
            "path/conflict/file_ancestor/more": NotADirectoryError,
            "path/conflict/file/more": FileExistsError,
            "path/conflict/file_new": DropboxStorageException,
            "lookup_failed/not_found": DropboxStorageException,
            "path/not_found_there": DropboxStorageException,
            "xpath/not_found": DropboxStorageException,
        }.items():
            with self.subTest(reason), self.failing("*", f"/{reason}"):
                with self.assertRaises((OSError, DropboxStorageException)) as caught:
                    self.storage.size("a")
                self.assertIs(type(caught.exception), error)
                if error is not DropboxStorageException:
                    said = f"(files/get_metadata: {reason}): '/a'"
                    self.assertTrue(str(caught.exception).endswith(said))

    def test_a_secret_that_is_a_word_of_dropbox_changes_no_meaning(self):
        """As placeholders in tests and settings are."""
        for word in ("path", "s", "not_found", "token", "expired", "a", "error"):
            for options in (
                {"oauth2_access_token": word, "app_key": word},
                {**REFRESHING, "app_key": word, "oauth2_refresh_token": f"{word}-1"},
            ):
                self.new_account()
                self.account.tokens.add(word)
                owner = (options["app_key"], options.get("app_secret"))
                self.account.refresh_tokens[f"{word}-1"] = owner
                storage = self.account.storage(**options)
                with self.subTest(word, options=[*options]):
                    self.assertFalse(storage.exists("x"))
                    if "oauth2_refresh_token" in options:
                        self.account.expire_tokens()
                        self.assertFalse(storage.exists("x"))
                    with self.failing("*", "503", times=2):
                        self.assertFalse(storage.exists("x"))
                    with self.refused("*", "/path/insufficient_space") as caught:
                        storage.exists("x")
                    reason = caught.exception.reason
                    self.assertEqual(reason, "path/insufficient_space")


# -- The view --------------------------------------------------------------------------


class ServeTests(StorageTestCase):
    def setUp(self):
        super().setUp()
        self.storage = self.account.storage(base_url="/media/")
        self.account.put("/dir/a b.jpg", b"12345")

    def get(self, path, method="GET", **options):
        request = RequestFactory().generic(method, "/media/")
        return module.serve(request, path, **{"storage": self.storage, **options})

    def test_it_redirects_to_a_cached_temporary_link(self):
        with self.costs("files/get_temporary_link"):
            for method in ("GET", "HEAD"):
                response = self.get("dir/a b.jpg", method)
                self.assertEqual(response.status_code, 302)
                self.assertEqual(self.account.links[response["Location"]], b"12345")

    def test_a_browser_keeps_the_redirect_for_less_than_the_link_lives(self):
        """It may have been in the cache for as long as it is kept there."""
        hour = 3600
        for timeout, age in {
            60: 60, hour: hour, 2 * hour: 2 * hour - 60, 3 * hour: hour - 60, 0: 0, None: 0
        }.items():  # fmt: skip
            self.storage.url_cache_timeout = timeout
            response = self.get("dir/a b.jpg")
            self.assertEqual(response["Cache-Control"], f"private, max-age={age}")

    def test_other_methods_are_not_allowed(self):
        response = self.get("dir/a b.jpg", "POST")
        self.assertEqual((response.status_code, response["Allow"]), (405, "GET, HEAD"))

    def browse(self, url):
        """What Django's test client gets from urlpatterns with these storages."""
        options = {"oauth2_access_token": "valid-token", "base_url": "/files/"}
        files = {"BACKEND": BACKEND, "OPTIONS": options}
        with override_settings(
            STORAGES={"default": {"BACKEND": BACKEND}, "files": files},
            DROPBOX_OAUTH2_TOKEN="valid-token",
            ROOT_URLCONF=__name__,
            LOGIN_URL="/login/",
            ALLOWED_HOSTS=["testserver"],
            MIDDLEWARE=[f"{__name__}.nobody_is_logged_in"],
        ):
            self.account.connect(django_storage.default_storage)
            self.account.connect(django_storage.storages["files"])
            return self.client.get(url)

    @unittest.skipUnless(HAS_STORAGES, "aliases came with Django 4.2")
    def test_it_serves_the_default_storage_and_those_named_by_an_alias(self):
        for url in ("/default/dir/a%20b.jpg", "/files/dir/a%20b.jpg"):
            response = self.browse(url)
            self.assertEqual(self.account.links[response["Location"]], b"12345")
        self.assertEqual(self.browse("/files/gone").status_code, 404)

    def test_while_dropbox_is_busy_the_answer_is_a_503(self):
        self.storage.max_wait = 0
        for kind, value, later in (
            ("429", 7, "7"), ("503", 0, None), ("reset", 0, None), ("503_later", 2.5, "3"),
        ):  # fmt: skip
            with self.failing("*", kind, times=99, value=value):
                response = self.get("dir/a b.jpg")
            self.assertEqual(response.status_code, 503)
            self.assertEqual(response.get("Retry-After"), later)
        for kind in ("missing_scope", "/path/restricted_content"):
            with self.refused("*", kind, times=99):
                self.get("dir/a b.jpg")
        limit = raised_by("celery", TimeoutError())  # of a signal handler: no 404
        self.account.fail("*", limit)
        self.assertRaises(TimeoutError, self.get, "dir/a b.jpg")

    @unittest.skipUnless(HAS_CONTENTTYPES, "the login needs contenttypes")
    @unittest.skipUnless(HAS_STORAGES, "aliases came with Django 4.2")
    def test_an_anonymous_visitor_is_sent_to_the_login(self):
        response = self.browse("/private/dir/a%20b.jpg")
        self.assertEqual(response["Location"], "/login/?next=/private/dir/a%2520b.jpg")
        self.assertEqual(self.account.calls["files/get_temporary_link"], 0)

    @unittest.skipIf(HAS_STORAGES, "aliases came with Django 4.2")
    def test_an_alias_before_there_are_any_is_refused(self):
        text = "Before Django 4.2 there is no alias 'old': pass the storage itself."
        with self.raises(ImproperlyConfigured, text):
            self.get("a", storage="old")

    def test_names_that_cannot_be_files_are_not_found(self):
        self.account.put("/private/x.jpg", b"secret")
        paths = ("gone.jpg", "dir", "", "../a", "/etc/passwd", "a\0b", "x" * 300)
        paths += ("dir/a b.jpg/x", "a\x7fb", "a\udc80")
        # Not in the one form that a view has checked.
        paths += ("dir/../private/x.jpg", "./private/x.jpg", "private//x.jpg")
        paths += ("private\\x.jpg", "private/./x.jpg", "private/x.jpg/", "e\u0301.jpg")
        self.account.put("/\xe9.jpg", b"x")
        for path in paths:
            with self.subTest(ascii(path)), self.assertRaises(Http404):
                self.get(path)
        self.assertEqual(self.get("\xe9.jpg").status_code, 302)


class CheckTests(StorageTestCase):
    """check() ends with one line, whatever is wrong."""

    def run_check(self, options, alias="checked"):
        """The line, and the status with which the command ends."""
        backend = f"{__name__}.CallableStorage"
        options = {"oauth2_access_token": "valid-token", "max_wait": 0, **options}
        entry = {"BACKEND": options.pop("backend", backend), "OPTIONS": options}
        if entry["BACKEND"] != backend:
            entry["OPTIONS"] = {}
        with override_settings(STORAGES={**settings.STORAGES, "checked": entry}):
            with contextlib.redirect_stdout(io.StringIO()) as shown:
                try:
                    module.check(alias)
                except SystemExit as error:
                    self.assertIs(error.__suppress_context__, True)
                    return str(error)
        return shown.getvalue()

    @unittest.skipUnless(HAS_STORAGES, "aliases came with Django 4.2")
    def test_each_end(self):
        works = r"It works: check-\w{16}\.txt was saved in Dropbox in %s, read and deleted\."
        apps = " An App folder is the root already: root_path begins inside it."
        refused = r"It does not work: files/upload of '/callable/check-\w+.txt' failed"
        upload, download, delete = "files/upload", "files/download", "files/delete_v2"
        for options, route, fault, line in (
            ({}, None, None, f"{works % '/callable'}\n"),
            ({"root_path": "/Apps/x"}, None, None, f"{works % '/Apps/x'}{apps}\n"),
            ({"write_mode": "update"}, None, None, f"{works % '/callable'}\n"),
            ({}, upload, "/path/insufficient_space", rf"{refused}: .*\(the account is full.*"),
            ({}, upload, "missing_scope", rf"{refused}: missing_scope .*authorize again\)\."),
            ({}, upload, "reset", rf"{refused} \(1 attempt, 0 s\): .*"),
            ({}, download, "corrupt", "It does not work: .* Dropbox has other bytes.*"),
            ({"oauth2_access_token": ""}, None, None, "Check the settings: oauth2_refresh_.*"),
            ({"oauth2_access_token": "'x'"}, None, None, "Check the settings: .* is not shown."),
            ({"tokn": 1}, None, None, "Check the settings: Unknown option tokn; there are .*"),
            ({"backend": "django.core.files.storage.FileSystemStorage"}, None, None,
             "Check the settings: The storage 'checked' is a FileSystemStorage, no .*"),
            ({"backend": "missing.Storage"}, None, None, "Check the settings: Could not find.*"),
            ({}, delete, "missing_scope", "It does not work: .*delete_v2 .* failed: missing_.*"),
        ):  # fmt: skip
            self.holds({})  # after the line before
            self.account.faults.clear()
            if fault:
                self.account.fail(route, fault, times=99)
            with self.subTest(options, fault=fault):
                self.assertRegex(self.run_check(options), f"^{line}$")
        found = self.run_check({}, "none")
        self.assertRegex(found, "^Check the settings: Could not find")


class AuthorizeTests(StorageTestCase):
    """The command that gets a refresh token."""

    def run_command(self, code, *arguments):
        """What is printed, and the line with which it ends."""
        ask = unittest.mock.patch("builtins.input", side_effect=[code])
        argv = unittest.mock.patch.object(sys, "argv", ["module", *arguments])
        with ask, argv, contextlib.redirect_stdout(io.StringIO()) as shown:
            try:
                module._main()
            except SystemExit as error:
                return shown.getvalue(), str(error)
        return shown.getvalue(), None

    def test_the_token_is_printed_and_works(self):
        ask = unittest.mock.patch("builtins.input", return_value=" valid-code\n")
        with self.costs("oauth2/token"), ask:
            with contextlib.redirect_stdout(io.StringIO()) as shown:
                self.assertEqual(module.authorize("app-key"), "pkce-refresh-token")
        *lines, key, token = shown.getvalue().splitlines()
        self.assertEqual(key, "DROPBOX_APP_KEY=app-key")
        self.assertEqual(token, "DROPBOX_OAUTH2_REFRESH_TOKEN=pkce-refresh-token")
        address = next(line for line in lines if line.startswith("https://"))
        query = parse_qs(urlsplit(address).query)
        self.assertEqual(query["token_access_type"], ["offline"])
        self.assertEqual(query["code_challenge_method"], ["S256"])
        self.assertEqual(query["scope"], [" ".join(module.SCOPES)])
        with override_settings(**dict(line.split("=") for line in (key, token))):
            self.assertFalse(DropboxStorage().exists("a"))

    def test_what_fails_is_one_line(self):
        refused = "oauth2/token of '%s' failed"
        once = rf"{refused % 'app-key'} \(1 attempt, 0 s\):"
        usage = "Give the App key of your app: python -m .* APP_KEY"
        untyped = "No code was typed. Run this again and copy it .*"
        for code, arguments, fault, end in (
            ("x", ["app-key"], None, rf"{refused % 'app-key'}: invalid_grant \(oauth2_.*"),
            ("x", ["other"], None, rf"{refused % 'other'}: invalid_client \(app_key .*"),
            ("x", ["app-key"], "reset", f"{once} Con.*"),
            ("x", ["app-key"], "garbage", f"{once} .*"),
            ("read-only", ["app-key"], None, "The app may not use files.content.write: .*"),
            *((code, ["app-key"], None, untyped) for code in ("", EOFError(), KeyboardInterrupt())),
            ("x", [""], None, usage), ("x", [], None, usage),
        ):  # fmt: skip
            if fault:
                self.account.fail("oauth2/token", fault)
            with self.subTest(code=code, arguments=arguments, fault=fault):
                shown, found = self.run_command(code, *arguments)
                self.assertRegex(found, f"^{end}$")
                self.assertNotIn("REFRESH_TOKEN", shown)
            self.account.faults.clear()

    def test_an_answer_without_a_refresh_token_is_a_failure(self):
        for missing in (None, "", 5):
            answer = {"access_token": "sl.x", "uid": "1", "account_id": "dbid:1"}
            answer["refresh_token"] = missing
            with unittest.mock.patch.object(
                self.account, "exchange", lambda form: answer
            ):
                shown, found = self.run_command("valid-code", "app-key")
            self.assertIn("BadResponse the answer holds no refresh token.", found)
            self.assertNotIn("REFRESH_TOKEN", shown)

    def test_the_module_runs_as_a_command_without_settings(self):
        name = module.__name__
        folder = pathlib.Path(module.__file__).resolve().parents[name.count(".")]
        untyped = "No code was typed. Run this again and copy it from the page."
        usage = f"Give the App key of your app: python -m {name} APP_KEY"
        for arguments, end in (([], usage), (["app-key"], untyped)):
            done = subprocess.run(
                [sys.executable, "-m", name, *arguments],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                check=False,
            )
            self.assertEqual((done.stderr, done.returncode), (f"{end}\n", 1))


def nobody_is_logged_in(get_response):
    def middleware(request):
        request.user = types.SimpleNamespace(is_authenticated=False)
        return get_response(request)

    return middleware


urlpatterns = [
    urls.path("default/<path:path>", module.serve),
    urls.path("files/<path:path>", module.serve, {"storage": "files"}),
    urls.path("private/<path:path>", login_required(module.serve)),
]


class ManifestStorage(ManifestFilesMixin, DropboxStorage):
    base_url = "/static/"
    root_path = "/static"


class ManifestTests(StorageTestCase):
    @unittest.skipUnless(HAS_STORAGES, "STORAGES came with Django 4.2")
    def test_collectstatic_gives_hashed_names(self):
        """And asks for each file as little as Django does."""
        files = {"a.css": b"body { background: url(b.png) }", "b.png": b"picture"}
        backend = {"BACKEND": f"{__name__}.ManifestStorage"}
        with (
            tempfile.TemporaryDirectory() as folder,
            override_settings(
                INSTALLED_APPS=["django.contrib.staticfiles"],
                STATIC_URL="/static/",
                STATICFILES_DIRS=[folder],
                STORAGES={"default": backend, "staticfiles": backend},
            ),
        ):
            for name, content in files.items():
                pathlib.Path(folder, name).write_bytes(content)
            get_finder.cache_clear()
            self.addCleanup(get_finder.cache_clear)
            # It reads its manifest when it is built: the class has the client.
            client = FakeDropbox(self.account)
            self.enter(unittest.mock.patch.object(ManifestStorage, "client", client))
            collect = functools.partial(call_command, "collectstatic", verbosity=0)
            for manifests in (1, 0):  # that are read
                with self.account.counting() as calls:
                    collect(interactive=False, post_process=False)
                self.assertEqual(sum(calls.values()), manifests + 2 * len(files))
            collect(interactive=False)
            style, picture = static("a.css"), static("b.png")
        self.assertRegex(style, r"^/static/a\.\w{12}\.css$")
        self.assertRegex(picture, r"^/static/b\.\w{12}\.png$")
        files = self.account.files()
        plain = {"/static/a.css", "/static/b.png", "/static/staticfiles.json"}
        self.assertEqual(files.keys(), plain | {style, picture})
        self.assertIn(posixpath.basename(picture).encode(), files[style])


# -- On a real account, if there is one ------------------------------------------------

LIVE = {
    option: os.environ[f"DROPBOX_TEST_{name}"]
    for option, name in zip(
        ("oauth2_access_token", "oauth2_refresh_token", "app_key", "app_secret"),
        ("TOKEN", "REFRESH_TOKEN", "APP_KEY", "APP_SECRET"),
    )
    if os.environ.get(f"DROPBOX_TEST_{name}")
}


class PagingDropbox(dropbox.Dropbox):
    """Lists in small pages."""

    def files_list_folder(self, path, recursive=False):
        return super().files_list_folder(path, recursive, limit=2)


class LiveTests(UsesStorage, SimpleTestCase):
    """What the README promises, at true size, with public names alone.

    On the account whose credentials are in DROPBOX_TEST_TOKEN, or in
    DROPBOX_TEST_REFRESH_TOKEN, DROPBOX_TEST_APP_KEY and DROPBOX_TEST_APP_SECRET: in a
    new folder, which is removed at the end. Else on a fake account.
    """

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.account = FakeAccount()
        network.is_open = bool(LIVE)
        cls.addClassCleanup(setattr, network, "is_open", False)
        sizes = true_sizes()
        sizes.__enter__()
        cls.addClassCleanup(sizes.__exit__, None, None, None)
        cls.root = f"/dropbox_storage-tests-{os.urandom(6).hex()}"
        cls.addClassCleanup(cls.remove_all)
        cls.data = noise(13 * MiB + 1, 13)

    @classmethod
    def make_storage(cls, **options):
        if LIVE:
            return DropboxStorage(**LIVE, **options)
        return cls.account.storage(**REFRESHING, **options)

    @classmethod
    def remove_all(cls):
        storage = cls.make_storage()
        storage.delete(cls.root.lstrip("/"))
        expect(not storage.exists(cls.root.lstrip("/")))

    def setUp(self):
        cache.clear()
        self.storage = self.new_storage()

    def new_storage(self, **options):
        folder = self.id().rpartition(".")[2]
        return self.make_storage(root_path=f"{self.root}/{folder}", **options)

    def test_sizes_around_the_chunks(self):
        chunks = [n * 4 * MiB + d for n in (1, 2, 3) for d in (0, 1)]
        for size in (0, 1, MiB // 4, MiB // 4 + 1, *chunks, len(self.data)):
            name = self.save(f"{size}.bin", self.data[:size])
            self.assertEqual(self.storage.size(name), size)
            self.assertTrue(self.read(name) == self.data[:size])
        self.write("written.bin", self.data)
        self.assertTrue(self.read("written.bin") == self.data)

    def test_reading_anywhere_and_one_revision(self):
        self.save("a.bin", self.data)
        with self.storage.open("a.bin") as file:
            for start in (9 * MiB, 5, len(self.data) - 3, 4 * MiB - 1, 9 * MiB):
                file.seek(start)
                self.assertTrue(file.read(100) == self.data[start : start + 100])
            file.seek(MiB)
            self.assertTrue(file.read() == self.data[MiB:])
        with self.storage.open("a.bin") as file:
            head = file.read(5)
            self.write("a.bin", b"new")
            self.assertTrue(head + file.read() == self.data)

    def test_storages_that_save_one_name_get_a_file_each(self):
        for size in (9, 9 * MiB):
            contents = [noise(size, number) for number in range(4)]
            with ThreadPoolExecutor(4) as pool:
                names = [*pool.map(lambda data: self.save("a.bin", data), contents)]
            self.assertEqual(len({*names}), 4)
            for name, content in zip(names, contents):
                self.assertTrue(self.read(name) == content)

    def test_replacing_in_each_mode(self):
        for mode in ("overwrite", "update"):
            storage = self.new_storage(write_mode=mode)
            for content in (b"a", b"a", b"b", self.data, self.data, b""):
                self.assertEqual(self.save(mode, content, storage), mode)
                self.assertTrue(self.read(mode) == content)
        for mine, theirs in ((b"mine", b"theirs"), (self.data, b"theirs again")):
            with self.assertRaises(DropboxStorageException):
                with storage.open("update", "wb") as file:
                    file.write(mine)
                    self.write("update", theirs)
            self.assertEqual(self.read("update"), theirs)
        with self.assertRaises(FileExistsError), self.storage.open("new", "xb") as file:
            file.write(b"mine")
            self.save("new", b"theirs")
        self.assertEqual(self.read("new"), b"theirs")

    def test_open_modes(self):
        self.write("a", "tw\xf6\n", "w")
        self.write("a", b"more", "ab")
        self.write("a", b"T", "r+b")
        self.assertEqual(self.read("a", mode="r"), "Tw\xf6\nmore")
        file = self.storage.open("a", "wb")
        file.write(b"half")
        file.discard()
        self.assertEqual(self.read("a"), b"Tw\xc3\xb6\nmore")

    def test_names(self):
        for name in ("desktop.ini", "e\u0301", "x" * 300, "dots...", " a b", "a\x7fb"):
            valid = self.storage.get_valid_name(name)
            self.assertEqual(self.save(valid, b"x"), valid)
            self.assertTrue(self.storage.exists(valid.upper()))
        for name in ("desktop.ini", "a\x7fb", "space /a"):
            with self.assertRaises(DropboxStorageException):
                self.save(name, b"x")
        self.save("Dir/a")
        with self.assertRaises(NotADirectoryError):
            self.save("dir/A/b")
        for use in (self.storage.open, self.storage.size):
            self.assertRaises(FileNotFoundError, use, "missing")
            self.assertRaises(IsADirectoryError, use, "dir")
        self.assertFalse(self.storage.exists("missing"))

    def test_listing_over_several_pages(self):
        for name in ("1", "2", "3", "4", "Sub/5"):
            self.save(name, b"12345")
        client = copy.copy(self.storage.client)
        client.__class__ = PagingDropbox
        self.storage.client = client
        folders, files = self.storage.listdir("")
        self.assertEqual((folders, sorted(files)), (["Sub"], ["1", "2", "3", "4"]))
        for name in ("3", "Sub", "missing"):
            self.storage.delete(name)
        self.assertEqual(sorted(self.storage.listdir("")[1]), ["1", "2", "4"])
        age = time.time() - self.storage.get_modified_time("1").timestamp()
        self.assertLess(abs(age), 600)

    def test_links_lead_to_the_bytes(self):
        self.save("a b.txt", b"12345")
        link = self.storage.url("a b.txt")
        follow = (lambda link: requests.get(link, timeout=60).content) if LIVE else None
        self.assertEqual((follow or self.account.follow)(link), b"12345")
        self.assertEqual(self.storage.url("A b.TXT"), link)
        self.storage.delete("a b.txt")
        self.assertEqual(self.storage.url("a b.txt"), "about:invalid#a%20b.txt")

    @unittest.skipIf(LIVE and "oauth2_refresh_token" not in LIVE, "no refresh token")
    def test_a_token_that_expires(self):
        self.save("a", b"x")
        client = self.storage.client
        old = client._oauth2_access_token
        client._oauth2_access_token_expiration = datetime.datetime(2020, 1, 1)
        self.assertEqual(self.read("a"), b"x")
        self.assertNotEqual(client._oauth2_access_token, old)


# -- The demo --------------------------------------------------------------------------


def demo(paths, account):
    """Save the files, list, link, read, overwrite and delete them; return the failures."""
    default = {"DEFAULT_FILE_STORAGE": BACKEND}
    if HAS_STORAGES:
        default = {"STORAGES": {"default": {"BACKEND": BACKEND}}}
    with network.shut(), override_settings(**default, DROPBOX_ROOT_PATH="/demo"):
        default_storage = django_storage.default_storage
        default_storage.client = FakeDropbox(account)
        print("A Dropbox account in memory, behind the real SDK and default_storage.")
        failures = sum(show_file(account, default_storage, path) for path in paths)
    print(f"{failures} steps DIFFER." if failures else "Everything as expected.")
    return failures


def show_file(account, storage, path):
    """Take a file through the storage; print what each step says and costs."""
    path, differing = pathlib.Path(path), 0
    content, name = path.read_bytes(), path.name

    def leads_here(link):
        return account.links.get(link) == content

    def overwrite():
        with storage.open(name, "wb") as file:
            file.write(content[::-1])
        return account.files()[f"/demo/{name}"]

    print(f"\n{path}, {len(content)} bytes")
    for step, action, expected in (
        ("save", lambda: storage.save(name, File(io.BytesIO(content))), name),
        ("exists", lambda: storage.exists(name), True),
        ("list", lambda: storage.listdir(""), ([], [name])),
        ("size", lambda: storage.size(name), len(content)),
        ("link", lambda: storage.url(name), leads_here),
        ("link again", lambda: storage.url(name), leads_here),
        ("read back", lambda: storage.open(name).read(), content),
        ("overwrite", overwrite, content[::-1]),
        ("read back", lambda: storage.open(name).read(), content[::-1]),
        ("delete", lambda: storage.delete(name), None),
        ("exists", lambda: storage.exists(name), False),
    ):
        with account.counting() as calls:
            result = action()
        cost = ", ".join(f"{count} x {route}" for route, count in calls.items())
        shown = f"{len(result)} bytes" if isinstance(result, bytes) else str(result)
        differs = not (expected(result) if callable(expected) else result == expected)
        differing += differs
        verdict = "   DIFFERS" if differs else ""
        print(f"  {step:<10} {shown:<36} {cost or 'no call'}{verdict}")
    return differing


if __name__ == "__main__":
    if sys.argv[1:2] == ["demo"] and sys.argv[2:]:
        sys.exit(1 if demo(sys.argv[2:], FakeAccount()) else 0)
    unittest.main()
