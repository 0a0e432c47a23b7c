"""Tests of dropbox_storage, and the fake Dropbox on which they and the demo run.

python -m pytest
python test_dropbox_storage.py demo FILE...
"""

import collections
import contextlib
import copy
import dataclasses
import datetime
import errno
import functools
import gc
import gzip
import hashlib
import importlib
import io
import itertools
import json
import logging
import os
import pathlib
import pickle
import posixpath
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import traceback
import tracemalloc
import types
import unicodedata
import unittest
import unittest.mock
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import parse_qs, urlsplit

import django
import dropbox
import requests
import urllib3
from django import urls
from django.conf import global_settings, settings

try:
    import hypothesis
    from hypothesis import strategies as st
    from hypothesis.stateful import (
        RuleBasedStateMachine,
        invariant,
        rule,
        run_state_machine_as_test,
    )
except ImportError:
    hypothesis = None

if not settings.configured:
    if "DJANGO_SETTINGS_MODULE" not in os.environ:
        apps = ["django.contrib.auth", "django.contrib.contenttypes"]
        settings.configure(SECRET_KEY="for tests", INSTALLED_APPS=apps)
    django.setup()

from django.contrib.auth.decorators import login_required
from django.contrib.staticfiles import storage as staticfiles
from django.contrib.staticfiles.finders import get_finder
from django.contrib.staticfiles.storage import ManifestFilesMixin
from django.core.cache import cache
from django.core.cache.backends.base import BaseCache
from django.core.cache.backends.locmem import LocMemCache
from django.core.exceptions import ImproperlyConfigured, SuspiciousFileOperation
from django.core.files import storage as django_storage
from django.core.files.base import ContentFile, File
from django.core.files.uploadedfile import SimpleUploadedFile
from django.core.management import call_command
from django.db import models
from django.db.migrations.writer import MigrationWriter
from django.db.models.fields.files import FieldFile
from django.forms import ClearableFileInput
from django.http import FileResponse, Http404
from django.templatetags.static import static
from django.test import RequestFactory, SimpleTestCase, override_settings
from django.utils.module_loading import import_string
from django.views.debug import ExceptionReporter

# The module beside this one, also where both are copied into another package.
module_name = pathlib.Path(__file__).stem.replace("test_", "", 1)
package = __name__.rpartition(".")[0]
module = importlib.import_module(f"{package}.{module_name}" if package else module_name)
DropboxStorage = module.DropboxStorage
DropboxStorageException = module.DropboxStorageException

MiB = 1024 * 1024
BLOCK = 4 * MiB
READ_SIZE = module.READ_SIZE


# The fake Dropbox


@functools.lru_cache(maxsize=100)
def content_hash(data):
    """Straight from https://www.dropbox.com/developers/reference/content-hash."""
    blocks = [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
    digests = b"".join(hashlib.sha256(block).digest() for block in blocks)
    return hashlib.sha256(digests).hexdigest()


class Refused(Exception):
    """Dropbox's answer to what it does not do: a status and a JSON or text body."""

    def __init__(self, status, body, **headers):
        self.status, self.body, self.headers = status, body, headers


def conflict(error):
    """The 409 of a route; error is the value of its union, or the tags "a/b/c"."""
    if isinstance(error, str):
        *outer, inner = error.split("/")
        error = {".tag": inner}
        for tag in reversed(outer):
            error = {".tag": tag, tag: error}
    return Refused(409, {"error_summary": "..", "error": error})


def bad_request(text):
    return Refused(400, f"Error in call to API function: {text}")


@dataclasses.dataclass
class Entry:
    """A file, or a folder if data is None, at a path with the case it was made with."""

    path: str
    data: bytes = None
    rev: str = None
    modified: str = None
    client_modified: str = None

    def metadata(self):
        """As in a union of Metadata, with a tag; see untagged()."""
        found = {".tag": "folder", "name": self.path.rpartition("/")[2]}
        found.update(id=f"id:{self.path}", path_display=self.path)
        found.update(path_lower=self.path.lower())
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
    "unmounted": "metadata has no paths",
    "empty_pages": "each listing begins with an empty page that has more",
    "lost_links": "an existing shared link is not told",
    "bare_429": "429 tells how long to wait in the Retry-After header alone",
    "paper": "files that end in .paper have no hash, no bytes and no links",
}


class FakeAccount(requests.adapters.HTTPAdapter):
    """A Dropbox account in memory, in place of the network under the real SDK.

    It refuses what Dropbox refuses, counts the calls of each route, and fails on demand.
    quirks are keys of QUIRKS.
    """

    def __init__(self, page_size=500, quirks=()):
        super().__init__()
        self.page_size, self.lock, self.quirks = page_size, threading.RLock(), quirks
        self.entries, self.revisions, self.sessions = {}, {}, {}
        self.cursors, self.links, self.shared, self.changes = {}, {}, set(), []
        self.calls, self.timeouts, self.faults = collections.Counter(), set(), []
        self.refused, self.expires_in, self.body = None, 14400, io.BytesIO
        self.in_flight = self.most_in_flight = self.bytes_in = self.bytes_out = 0
        self.numbers = itertools.count(1)
        self.tokens, self.expired = {"valid-token"}, set()
        self.refresh_tokens = {"valid-refresh-token": ("app-key", "app-secret")}
        self.namespaces = {"1": "", "42": "/team"}

    # What tests and the demo do with it

    def connect(self, storage):
        """Let the client of the storage talk to this account; return the storage."""
        storage.client._session.mount("https://", self)
        return storage

    def storage(self, **options):
        options = {"oauth2_access_token": "valid-token", **options}
        storage = DropboxStorage(**options)
        storage.FIRST_WAIT = 0.001
        return self.connect(storage)

    def put(self, path, data=b"", modified=None):
        """Write a file as another device would."""
        target = {"path": path, "mode": "overwrite", "client_modified": modified}
        self.commit(target, data)

    def files(self):
        """The bytes of each file by its path."""
        found = self.entries.values()
        return {entry.path: entry.data for entry in found if entry.data is not None}

    def fail(self, route, kind, nth=1, times=1, value=0):
        """Misbehave at the nth call of the route ("*": any) from now, and after it.

        A kind that can be called is what happens meanwhile; if that raises nothing, a
        503 that has done nothing follows.
        """
        self.faults.append(
            [route, kind, range(nth, nth + times), itertools.count(1), value]
        )

    def expire_tokens(self):
        self.expired |= self.tokens
        self.tokens.clear()

    @contextlib.contextmanager
    def counting(self):
        """Yield a Counter that holds, after the block, the calls made inside it."""
        before, counted = self.calls.copy(), collections.Counter()
        yield counted
        counted.update(self.calls - before)

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
            raise requests.ConnectionError(error)  # noqa: B904 - as requests does
        finally:
            with self.lock:
                self.in_flight -= 1
        if not isinstance(body, bytes):
            kind = "text/plain" if isinstance(body, str) else "application/json"
            headers = {"content-type": kind, **headers}
            body = (body if isinstance(body, str) else json.dumps(body)).encode()
        headers = {"content-length": str(len(body)), **headers}
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
        handler = getattr(self, route.replace("/", "_"), None)
        if not handler:
            raise Refused(404, f"no such route: {route}")
        self.authenticate(headers.get("Authorization", ""))
        body = request.body or b""
        argument = headers.get("Dropbox-API-Arg") or body
        argument = self.in_namespace(json.loads(argument), headers)
        if fault == "corrupt" and route != "files/download" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        if route == "files/download":
            return self.send_file(*self.files_download(argument), request, fault)
        with self.lock:
            result = handler(argument, body)
        if fault == "503_after":
            raise Refused(503, "unavailable")
        if fault == "reset_after":
            raise urllib3.exceptions.ProtocolError("reset")
        return 200, {}, {} if fault == "misfit_after" else self.quirky(result)

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
        if "unmounted" in self.quirks:
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
        if wanted := request.headers.get("Range"):
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
            first, last = int(first), min(int(last or len(data)), len(data) - 1)
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
        if not token:
            raise Refused(400, "The given OAuth 2 access token is malformed.")
        if token not in self.tokens:
            kind = "expired" if token in self.expired else "invalid"
            self.fail_before("", f"{kind}_token", 0)

    def in_namespace(self, argument, headers):
        root = json.loads(headers.get("Dropbox-API-Path-Root", '{"namespace_id": "1"}'))
        if root["namespace_id"] not in self.namespaces:
            error = {".tag": "no_permission"}
            raise Refused(422, {"error_summary": "..", "error": error})
        target = argument.get("commit", argument)
        if not target.get("path", "rev:").startswith(("rev:", "id:")):
            target["path"] = self.namespaces[root["namespace_id"]] + target["path"]
        return argument

    def token(self, form):
        form = {name: values[0] for name, values in form.items()}
        owner = self.refresh_tokens.get(form["refresh_token"])
        if not owner:
            raise Refused(400, {"error": "invalid_grant"})
        if owner != (form["client_id"], form.get("client_secret")):
            raise Refused(400, {"error": "invalid_client: bad app key or secret"})
        token = f"sl.fresh-{next(self.numbers)}"
        self.tokens.add(token)
        return {
            "access_token": token,
            "token_type": "bearer",
            "expires_in": self.expires_in,
        }

    # Faults

    def take_fault(self, route):
        for wanted, kind, calls, count, value in self.faults:
            if wanted in ("*", route) and next(count) in calls:
                return kind, value
        return None, 0

    def fail_before(self, route, fault, value):
        """Raise the failure that comes before anything is done."""
        later = {"Retry_After": str(value)}
        busy = {".tag": "too_many_write_operations"}
        unauthorized = {
            "expired_token": {".tag": "expired_access_token"},
            "invalid_token": {".tag": "invalid_access_token"},
            "suspended": {".tag": "user_suspended"},
            "route_access": {".tag": "route_access_denied"},
            "missing_scope": {
                ".tag": "missing_scope",
                "required_scope": "files.content.write",
            },
        }
        if callable(fault):
            fault()
            raise Refused(503, "unavailable")
        if fault in ("500", "502", "503"):
            raise Refused(int(fault), "unavailable")
        if fault == "html":
            raise Refused(502, "<html>Bad gateway</html>", content_type="text/html")
        if fault == "garbage":
            raise Refused(200, "<html>Welcome</html>", content_type="text/html")
        if fault == "reset":
            raise urllib3.exceptions.ProtocolError("reset")
        if fault == "tls":
            raise requests.exceptions.SSLError("bad record")
        if fault == "stall":
            raise requests.ReadTimeout("stalled")
        if fault in ("429", "too_many_writes"):
            reason = {".tag": "too_many_requests"} if fault == "429" else busy
            error = {"reason": reason, "retry_after": value}
            if "bare_429" in self.quirks:
                del error["retry_after"]
            raise Refused(429, {"error_summary": "..", "error": error}, **later)
        if fault == "429_text":
            raise Refused(429, "too_many_requests", **later)
        if fault in unauthorized:
            raise Refused(401, {"error_summary": "..", "error": unauthorized[fault]})
        if fault == "bad_input":
            raise bad_request("bad input")
        if fault == "no_route":
            raise Refused(404, "Unknown API function")
        if fault == "account_type":
            tags = {".tag": "invalid_account_type", "invalid_account_type": "feature"}
            summary = "invalid_account_type/feature/.."
            raise Refused(403, {"error_summary": summary, "error": tags})
        if fault == "session_lost":
            finish = route.endswith("finish")
            raise conflict("lookup_failed/not_found" if finish else "not_found")
        if fault and fault.startswith("/"):  # the tags of the route's own error
            fault = fault[1:]
            if route == "files/upload" and fault.startswith("path/"):
                raise self.upload_error(conflict(fault[5:]), b"")
            raise conflict(fault)

    def upload_error(self, refused, data):
        """A write error as files/upload has it: with a session that holds the data."""
        session = ""
        if "forgetful" not in self.quirks:
            session = f"session-{next(self.numbers)}"
            self.sessions[session] = Session(False, {0: data})
        reason = refused.body["error"]
        return conflict(
            {".tag": "path", "reason": reason, "upload_session_id": session}
        )

    # Routes

    def find(self, path, error="path"):
        if path == "" or path == "/":
            raise bad_request("path: The root folder is unsupported.")
        if path.startswith("rev:"):
            entry = self.revisions.get(path[4:])
        elif self.malformed(path):
            raise conflict(f"{error}/malformed_path")
        else:
            entry = self.entries.get(path.lower())
        if not entry:
            raise conflict(f"{error}/not_found")
        return entry

    def find_file(self, path):
        entry = self.find(path)
        if entry.data is None:
            raise conflict("path/not_file")
        return entry

    def malformed(self, path):
        parts = path[1:].split("/")
        return "\\" in path or any(
            part in ("", ".", "..")
            or part.endswith(" ")
            or "\0" in part
            or "\x7f" in part
            or len(part) > 255
            for part in parts
        )

    def commit(self, target, data):
        """Write a file; raises the 409 of a WriteError."""
        if not target["path"].startswith("/"):
            raise bad_request(f"path: {target['path']!r} did not match pattern")
        path = unicodedata.normalize("NFC", target["path"])
        if self.malformed(path):
            raise conflict("malformed_path")
        if path.rpartition("/")[2].lower() in DISALLOWED_NAMES:
            raise conflict("disallowed_name")
        *parents, path = itertools.accumulate(path[1:].split("/"), "{}/{}".format)
        parents, path = [f"/{parent}" for parent in parents], f"/{path}"
        for parent in parents:
            if getattr(self.entries.get(parent.lower()), "data", None) is not None:
                raise conflict("conflict/file_ancestor")
        mode, strict = target.get("mode", "add"), target.get("strict_conflict")
        mode = mode if isinstance(mode, dict) else {".tag": mode}
        found = self.entries.get(path.lower())
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
            raise conflict("conflict/file")
        for parent in parents:
            if parent.lower() not in self.entries:
                self.entries[parent.lower()] = Entry(parent)
                self.changes.append(self.entries[parent.lower()].metadata())
        now = datetime.datetime.now(datetime.timezone.utc)
        entry = Entry(found.path if found else path, data, f"{next(self.numbers):09x}")
        entry.modified = now.strftime("%Y-%m-%dT%H:%M:%SZ")
        entry.client_modified = target.get("client_modified")
        self.entries[path.lower()] = self.revisions[entry.rev] = entry
        self.changes.append(entry.metadata())
        return entry.metadata()

    def check_hash(self, argument, body):
        if len(body) > 150 * MiB:
            raise conflict("payload_too_large")
        if argument.get("content_hash", content_hash(body)) != content_hash(body):
            raise conflict("content_hash_mismatch")

    def files_upload(self, argument, body):
        self.check_hash(argument, body)
        try:
            return untagged(self.commit(argument, body))
        except Refused as refused:
            if refused.status != 409:
                raise
            raise self.upload_error(refused, body) from None

    def files_upload_session_start(self, argument, body):
        self.check_hash(argument, body)
        concurrent = argument.get("session_type", {}).get(".tag") == "concurrent"
        if concurrent and body:
            raise conflict("concurrent_session_data_not_allowed")
        session = f"session-{next(self.numbers)}"
        self.sessions[session] = Session(concurrent, {0: body})
        return {"session_id": session}

    def append(self, cursor, body, close, error=""):
        """Add to a session; raises the 409 of an UploadSessionLookupError, in error."""
        session, offset = self.sessions.get(cursor["session_id"]), cursor["offset"]
        if not session:
            raise conflict(f"{error}not_found")
        length = len(session.data)
        if not session.concurrent and offset != length:
            tag = {".tag": "incorrect_offset", "correct_offset": length}
            raise conflict(
                {".tag": "lookup_failed", "lookup_failed": tag} if error else tag
            )
        if session.concurrent and offset % BLOCK:
            raise conflict(f"{error}concurrent_session_invalid_offset")
        if session.concurrent and len(body) % BLOCK and not close:
            raise conflict(f"{error}concurrent_session_invalid_data_size")
        empty = close and offset and not body
        if session.concurrent and empty and "empty_close" in self.quirks:
            raise conflict(f"{error}concurrent_session_invalid_data_size")
        if session.end is not None and (body or close):
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
            if refused.status != 409:
                raise
            raise conflict({".tag": "path", "path": refused.body["error"]}) from None
        del self.sessions[cursor["session_id"]]
        return untagged(metadata)

    def files_download(self, argument):
        entry = self.find_file(argument["path"])
        return untagged(entry.metadata()), entry.data

    def files_get_metadata(self, argument, body):
        return self.find(argument["path"]).metadata()

    def files_delete_v2(self, argument, body):
        entry = self.find(argument["path"], "path_lookup")
        path = entry.path.lower()
        for key in [key for key in self.entries if f"{key}/".startswith(f"{path}/")]:
            del self.entries[key]
        gone = {**entry.metadata(), ".tag": "deleted"}
        self.changes.append(
            {k: gone[k] for k in (".tag", "name", "path_lower", "path_display")}
        )
        return {"metadata": entry.metadata()}

    def files_list_folder(self, argument, body):
        folder, recursive = argument["path"], argument.get("recursive")
        if folder == "/":
            raise bad_request('path: Specify the root folder as "" rather than "/".')
        if folder and self.find(folder).data is not None:
            raise conflict("path/not_folder")
        start = f"{folder.lower()}/"

        def inside(metadata):
            path = metadata["path_lower"]
            below = path[len(start) :]
            return path.startswith(start) and (recursive or "/" not in below)

        found = [entry.metadata() for _, entry in sorted(self.entries.items())]
        found = [*filter(inside, found)]
        return self.page(found, inside, len(self.changes), first=True)

    def files_list_folder_continue(self, argument, body):
        if argument["cursor"] not in self.cursors:
            raise conflict("reset")
        found, inside, known = self.cursors[argument["cursor"]]
        found = [*found, *filter(inside, self.changes[known:])]
        return self.page(found, inside, len(self.changes))

    def page(self, found, inside, known, first=False):
        """A page of what was found, and what has changed since known changes."""
        size = 0 if first and "empty_pages" in self.quirks else self.page_size
        cursor, rest = f"cursor-{next(self.numbers)}", found[size:]
        self.cursors[cursor] = (rest, inside, known)
        more = bool(rest) or not size
        return {"entries": found[:size], "cursor": cursor, "has_more": more}

    def files_get_temporary_link(self, argument, body):
        entry = self.find_file(argument["path"])
        if self.is_paper(entry.path):
            raise conflict("unsupported_file")
        link = f"https://content.example/apitl/{next(self.numbers)}"
        self.links[link] = entry.data
        return {"metadata": untagged(entry.metadata()), "link": link}

    def sharing_create_shared_link_with_settings(self, argument, body):
        entry = self.find_file(argument["path"])
        if entry.path.lower() in self.shared:
            raise conflict("shared_link_already_exists")
        self.shared.add(entry.path.lower())
        return self.shared_link(entry)

    def sharing_list_shared_links(self, argument, body):
        path = self.find_file(argument["path"]).path.lower()
        paths = self.shared & {path}
        if not argument.get("direct_only"):  # a link to a folder leads there, too
            paths = {
                known for known in self.shared if f"{path}/".startswith(f"{known}/")
            }
        told = [] if "lost_links" in self.quirks else sorted(paths)
        links = [self.shared_link(self.entries[known]) for known in told]
        return {"links": links, "has_more": False}

    def shared_link(self, entry):
        name, key = (
            entry.path.rpartition("/")[2],
            content_hash(entry.path.encode())[:15],
        )
        can = (
            "can_revoke",
            "can_set_expiry",
            "can_remove_expiry",
            "can_allow_download",
        )
        can += ("allow_download", "can_disallow_download", "allow_comments")
        permissions = dict.fromkeys((*can, "team_restricts_comments"), False)
        permissions["visibility_policies"] = []
        url = f"https://www.dropbox.com/scl/fi/{key}/{name}?rlkey={key[:8]}&dl=0"
        kind = "folder" if entry.data is None else "file"
        extra = {".tag": kind, "url": url, "link_permissions": permissions}
        return {**entry.metadata(), **extra}


class FakeDropbox(dropbox.Dropbox):
    """A real client of the SDK on a fake account, to be assigned to storage.client."""

    def __init__(self, account=None):
        super().__init__("valid-token")
        self.account = account or FakeAccount()
        self._session.mount("https://", self.account)


class FakeDropboxTests(unittest.TestCase):
    """The fake does what Dropbox does, as the SDK sees it."""

    def setUp(self):
        self.account = FakeAccount(page_size=2)
        self.client = FakeDropbox(self.account)

    def refusal(self, method, *args, **kwargs):
        with self.assertRaises(dropbox.exceptions.DropboxException) as caught:
            getattr(self.client, method)(*args, **kwargs)
        return str(caught.exception)

    def test_upload_download_and_delete(self):
        add = dropbox.files.WriteMode.add
        self.client.files_upload(b"one", "/Dir/a.txt")
        self.assertEqual(self.client.files_upload(b"one", "/dir/A.txt").name, "a.txt")
        refused = self.refusal("files_upload", b"two", "/dir/A.txt", add)
        self.assertIn("WriteConflictError('file', None)", refused)
        self.assertIn("upload_session_id", refused)
        self.assertIn("'folder'", self.refusal("files_upload", b"", "/dir"))
        self.assertIn(
            "file_ancestor", self.refusal("files_upload", b"", "/dir/a.txt/b")
        )
        self.assertIn("malformed", self.refusal("files_upload", b"", "/dir/b "))
        self.assertIn("disallowed", self.refusal("files_upload", b"", "/Desktop.ini"))
        metadata, response = self.client.files_download("/dir/a.TXT")
        self.assertEqual((metadata.size, response.content), (3, b"one"))
        self.assertEqual(metadata.content_hash, content_hash(b"one"))
        self.client.files_delete_v2("/DIR")
        self.assertIn("not_found", self.refusal("files_get_metadata", "/dir/a.txt"))
        self.assertIn("unsupported", self.refusal("files_get_metadata", "/"))

    def test_ranges_revisions_and_update(self):
        old = self.client.files_upload(b"0123456789", "/a")
        self.client._headers = {"Range": "bytes=2-4"}
        response = self.client.files_download("/a")[1]
        self.assertEqual((response.status_code, response.content), (206, b"234"))
        self.assertEqual(response.headers["Content-Range"], "bytes 2-4/10")
        self.client._headers = None
        update = dropbox.files.WriteMode.update
        self.client.files_upload(b"new", "/a", mode=update(old.rev))
        content = self.client.files_download(f"rev:{old.rev}")[1].content
        self.assertEqual(content, b"0123456789")
        refused = self.refusal("files_upload", b"x", "/a", mode=update(old.rev))
        self.assertIn("'conflict'", refused)

    def test_pages_and_their_end(self):
        for name in "abcde":
            self.client.files_upload(b"", f"/{name}/f")
        page, names = self.client.files_list_folder(""), []
        while names.extend(entry.name for entry in page.entries) or page.has_more:
            page = self.client.files_list_folder_continue(page.cursor)
        self.assertEqual(names, list("abcde"))
        self.account.cursors.clear()
        self.assertIn("reset", self.refusal("files_list_folder_continue", page.cursor))
        self.assertIn('""', self.refusal("files_list_folder", "/"))

    def test_upload_sessions(self):
        files, client = dropbox.files, self.client
        kind = files.UploadSessionType.concurrent
        session = client.files_upload_session_start(b"", session_type=kind).session_id
        cursor = files.UploadSessionCursor(session, 5)
        append = "files_upload_session_append_v2"
        self.assertIn("invalid_offset", self.refusal(append, b"x", cursor))
        cursor.offset = BLOCK
        self.assertIn("invalid_data_size", self.refusal(append, b"x", cursor))
        client.files_upload_session_append_v2(b"end", cursor, close=True)
        self.assertIn("closed", self.refusal(append, b"x", cursor, close=True))
        cursor.offset, commit = BLOCK + 3, files.CommitInfo("/a")
        finish = "files_upload_session_finish"
        self.assertIn("missing", self.refusal(finish, b"", cursor, commit))
        self.account.sessions[session].pieces[0] = bytes(BLOCK)
        self.assertEqual(
            client.files_upload_session_finish(b"", cursor, commit).size, cursor.offset
        )
        self.assertIn("not_found", self.refusal(finish, b"", cursor, commit))
        serial = client.files_upload_session_start(b"abc").session_id
        cursor = files.UploadSessionCursor(serial, 1)
        self.assertIn("correct_offset=3", self.refusal(append, b"x", cursor))

    def test_faults(self):
        self.account.fail("files/get_metadata", "missing_scope")
        self.assertIn("AuthError", self.refusal("files_get_metadata", "/a"))
        self.assertIn("not_found", self.refusal("files_get_metadata", "/a"))
        self.account.put("/a", b"0123456789" * 100)
        self.account.fail("files/download", "truncate")
        with self.assertRaises((requests.RequestException, AssertionError)):
            self.assertEqual(len(self.client.files_download("/a")[1].content), 1000)
        self.assertEqual(self.account.calls["files/get_metadata"], 2)


# Neither the network nor the project's settings


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


# What a project may have set, as Django has it by default.
NEUTRAL = "CACHES|LOGGING|MEDIA_|MIDDLEWARE|STATIC_|STATICFILES_[DF]|FILE_UPLOAD_|"
NEUTRAL += "ROOT_URLCONF|TIME_ZONE|"
NEUTRAL += "STORAGES" if django.VERSION >= (4, 2) else ".*_STORAGE"
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
    isolation.enter_context(network.shut())
    isolation.enter_context(neutral_settings)
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
    assert not network.attempts, f"Something asked for {network.attempts}."


class IsolationTests(unittest.TestCase):
    def test_what_is_not_mounted_on_an_account_fails_at_once_and_says_so(self):
        storage, attempts = DropboxStorage("token"), len(network.attempts)
        for act in (
            lambda: storage.exists("a"),
            lambda: storage.save("a", ContentFile(bytes(9 * MiB))),
            lambda: storage.open("a"),
            lambda: requests.get("https://www.example.com/"),
        ):
            with self.assertRaisesRegex(RuntimeError, "A test has tried to reach"):
                act()
        self.assertEqual(len(network.attempts), attempts + 4)
        del network.attempts[attempts:]

    def test_the_projects_settings_are_not_seen(self):
        self.assertFalse([n for n in dir(settings) if n.startswith("DROPBOX_")])
        self.assertEqual(DropboxStorage().root_path, "/")
        default = type(django_storage.default_storage._wrapped or object())
        self.assertFalse(issubclass(default, DropboxStorage))


# What the tests of the storage share


class StorageTestCase(SimpleTestCase):
    """Tests of one storage on one fake account."""

    def setUp(self):
        cache.clear()
        self.account = FakeAccount()
        self.storage = self.account.storage()

    def save(self, name, content=b"", storage=None):
        return (storage or self.storage).save(name, ContentFile(content))

    def ends_with_threads(self, count):
        """Nobody waits for threads in the background, but they soon end."""
        end = time.monotonic() + 5
        while threading.active_count() > count and time.monotonic() < end:
            time.sleep(0.01)
        self.assertEqual(threading.active_count(), count)

    def raises(self, error, message):
        """Expect an error whose whole message is this."""
        return self.assertRaisesRegex(error, f"^{re.escape(message)}$")


class Unsized:
    """Content that knows no size, has no seek and cannot be read twice."""

    def __init__(self, *chunks):
        self.left = list(chunks)

    def chunks(self):
        while self.left:
            yield self.left.pop(0)


class Broken(Unsized):
    def chunks(self):
        yield from super().chunks()
        raise ZeroDivisionError("half way")


REFRESHING = {
    "oauth2_refresh_token": "valid-refresh-token",
    "app_key": "app-key",
    "app_secret": "app-secret",
}


LARGE = random.Random(6).randbytes(9 * MiB)
HUGE = random.Random(7).randbytes(20 * MiB)


def write(storage):
    with storage.open("a", "wb") as file:
        file.write(b"written")


def read(name):
    def act(storage):
        with storage.open(name) as file:
            return hashlib.sha256(file.read()).hexdigest()

    return act


def save(name, content):
    return lambda storage: storage.save(name, ContentFile(content))


# What is done: the storage's options, and the operation, whose result is compared.
OPERATIONS = {
    "save": ({}, save("new", b"new")),
    "save large": ({}, save("new", LARGE)),
    "save a taken name": (
        {},
        lambda storage: storage._save("a", ContentFile(b"x"))[:2],
    ),
    "overwrite": ({"write_mode": "overwrite"}, save("a", b"new")),
    "update": ({"write_mode": "update"}, save("a", b"new")),
    "update large": ({"write_mode": "update"}, save("a", LARGE)),
    "write": ({}, write),
    "read": ({}, read("a")),
    "read huge": ({}, read("huge")),
    "exists": ({}, lambda storage: (storage.exists("a"), storage.exists("none"))),
    "size": ({}, lambda storage: storage.size("a")),
    "time": ({}, lambda storage: storage.get_modified_time("a")),
    "list": ({}, lambda storage: storage.listdir("dir")),
    "delete": ({}, lambda storage: storage.delete("a")),
    "delete a folder": ({}, lambda storage: storage.delete("dir")),
    "link": ({}, lambda storage: storage.url("a")[:30]),
    "shared link": ({"shared_links": True}, lambda storage: storage.url("a")),
    "preload": ({"preload_metadata": True}, lambda storage: storage.listdir("dir")),
}
LARGE_OPERATIONS = ("update large", "read huge")
TRANSIENT = ("500", "502", "503", "503_after", "429", "429_text", "too_many_writes")
TRANSIENT += (
    "reset",
    "reset_after",
    "stall",
    "tls",
    "html",
    "garbage",
    "expired_token",
)
PERMANENT = ("invalid_token", "missing_scope", "suspended", "bad_input", "/brand_new")
PERMANENT += ("no_route", "account_type", "route_access")
# Those that only some routes know.
BUSY = {
    "files/upload": "/path/too_many_write_operations",
    "files/upload_session/finish": "/too_many_write_operations",
    "files/delete_v2": "/too_many_write_operations",
}
REFUSALS = {
    "files/upload": (
        "/path/insufficient_space",
        "/path/no_write_permission",
        "/path/disallowed_name",
        "/path/malformed_path",
    ),
    "files/upload_session/append_v2": ("session_lost", "/payload_too_large"),
    "files/upload_session/finish": ("session_lost", "/path/insufficient_space"),
    "files/delete_v2": ("/path_write/no_write_permission", "/too_many_files"),
    "files/download": ("/path/restricted_content",),
    "files/get_metadata": ("/path/restricted_content",),
    "files/get_temporary_link": ("/unsupported_file",),
    "oauth2/token": (),
}


# What an error means


class ErrorTests(StorageTestCase):
    def test_permanent_failures_say_what_to_do(self):
        for route, fault, reason in (
            ("files/upload", "/path/insufficient_space", "path/insufficient_space (the account"
             " is full; free or buy space)"),
            ("files/upload", "/path/no_write_permission", "path/no_write_permission (the "
             "account may only read there; change root_path)"),
            ("files/upload", "/path/disallowed_name", "path/disallowed_name (Dropbox reserves "
             "that name; get_valid_name() mends it)"),
            ("files/upload", "/payload_too_large", "payload_too_large"),
            ("files/upload", "missing_scope", "missing_scope/files.content.write (tick it "
             "under Permissions in the App Console, authorize again)"),
            ("files/upload", "suspended", "user_suspended (the account is suspended; its owner "
             "or team can reactivate it)"),
            ("files/upload", "invalid_token", "invalid_access_token (oauth2_access_token is "
             "wrong, revoked or of another app)"),
            ("files/upload", "bad_input", "HTTP 400 Error in call to API function: bad input"),
        ):  # fmt: skip
            self.account.fail(route, fault)
            with self.subTest(fault), self.account.counting() as calls:
                with self.raises(
                    DropboxStorageException, f"{route} of '/a' failed: {reason}."
                ) as caught:
                    self.save("a")
            self.assertIsInstance(
                caught.exception.__cause__, dropbox.exceptions.DropboxException
            )
            self.assertTrue(reason.startswith(caught.exception.reason))
            self.assertEqual(calls[route], 1)
            self.account.faults.clear()
        self.assertFalse(self.account.entries)

    def test_errors_are_raised_from_those_of_the_sdk(self):
        self.account.put("/dir/a")
        for call, error in (
            (lambda: self.storage.open("missing"), FileNotFoundError),
            (lambda: self.storage.size("missing"), FileNotFoundError),
            (lambda: self.storage.open("dir"), IsADirectoryError),
            (lambda: self.storage.listdir("dir/a"), NotADirectoryError),
            (lambda: self.save("dir/a/b"), NotADirectoryError),
        ):
            with self.assertRaises(error) as caught:
                call()
            cause = caught.exception.__cause__
            self.assertIsInstance(cause, dropbox.exceptions.ApiError)
            self.assertIn(
                caught.exception.filename, ("/missing", "/dir", "/dir/a", "/dir/a/b")
            )

    def test_the_exception_is_no_oserror_and_keeps_its_reason(self):
        self.assertFalse(issubclass(DropboxStorageException, OSError))
        error = pickle.loads(pickle.dumps(DropboxStorageException("text", "reason")))
        self.assertEqual((str(error), error.reason), ("text", "reason"))

    def test_errors_that_are_made_up_with_mocks(self):
        for mock in (unittest.mock.Mock(), unittest.mock.MagicMock(), None, "text"):
            error = dropbox.exceptions.ApiError("id", mock, "text", "en")
            patched = unittest.mock.patch.object(
                dropbox.Dropbox, "files_get_metadata", side_effect=error
            )
            with (
                patched,
                self.raises(
                    DropboxStorageException,
                    "files/get_metadata of '/a' failed: ApiError.",
                ),
            ):
                self.storage.exists("a")

    def test_an_error_keeps_what_was_being_handled_before(self):
        self.account.fail("*", "bad_input")
        try:
            raise KeyError("before")
        except KeyError as before:
            with self.assertRaises(DropboxStorageException) as caught:
                self.storage.exists("a")
            error = cause = caught.exception.__cause__
            self.assertIsInstance(cause, dropbox.exceptions.BadInputError)
            while error.__context__:
                error = error.__context__
            self.assertIs(error, before)

    def test_what_the_sdk_does_not_know_is_told_in_dropboxs_own_words(self):
        for fault, said in {
            "no_route": "HTTP 404 Unknown API function.",
            "account_type": 'HTTP 403 {"error_summary": "invalid_account_type/feature/..", '
            '"error": {".tag": "invalid_account_type", "invalid_account_type": "feature"}}.',
        }.items():
            for route, act in (
                ("files/get_metadata", lambda: self.storage.exists("a")),
                ("files/upload", lambda: self.storage._save("a", ContentFile(b"x"))),
                ("files/download", lambda: self.storage.open("a")),
            ):
                self.account.fail(route, fault)
                message = f"{route} of '/a' failed: {said}"
                with self.account.counting() as calls:
                    with self.raises(DropboxStorageException, message) as caught:
                        act()
                self.assertEqual(sum(calls.values()), 1)
                self.assertEqual(caught.exception.reason, said[:8])
                self.account.faults.clear()

    def test_a_long_answer_is_cut(self):
        class Wordy(FakeAccount):
            def answer(self, *args):
                raise Refused(400, "word" * 1000)

        said = f"HTTP 400 {'word' * 1000}"[:500]
        message = f"files/get_metadata of '/a' failed: {said}."
        with self.raises(DropboxStorageException, message):
            Wordy().storage().exists("a")

    def test_hints_are_about_what_was_said(self):
        sharing = self.account.storage(shared_links=True)
        for storage, route, act, fault, hint in (
            (sharing, "*", "url", "/access_denied", "sharing is off"),
            (sharing, "*", "url", "route_access", None),
            (self.storage, "*", "delete", "/too_many_files", "too large"),
            (
                self.storage,
                "*",
                "exists",
                "/path/malformed_path",
                "DEL, space at an end",
            ),
            (self.storage, "*", "exists", "/path/malformed_path", "no emoji"),
        ):
            self.account.fail(route, fault)
            with self.assertRaises(DropboxStorageException) as caught:
                getattr(storage, act)("a")
            shown = str(caught.exception)
            self.assertEqual("(" in shown, hint is not None, shown)
            self.assertIn(hint or "route_access_denied", shown)
            self.account.faults.clear()

    def test_what_dropbox_cannot_name_it_refuses(self):
        for name in ("a\x7fb", "a\\b\x7f"):
            with self.assertRaisesRegex(DropboxStorageException, "DEL"):
                self.storage.save(name, ContentFile(b"x"))


class SecretTests(StorageTestCase):
    secrets = {
        "oauth2_access_token": "sl.hidden-access",
        "oauth2_refresh_token": "hidden-refresh",
        "app_key": "hidden-key",
        "app_secret": "hidden-secret",
    }

    def migration(self, storage):
        field = models.FileField(storage=storage)
        return MigrationWriter.serialize(field)[0]

    def test_a_migration_holds_no_secret_and_can_be_imported_without_any(self):
        token = self.secrets["oauth2_access_token"]
        keywords = {k: v for k, v in self.secrets.items() if k != "oauth2_access_token"}
        for storage in (
            DropboxStorage(**self.secrets, root_path="/r"),
            DropboxStorage(token, **keywords, root_path="/r"),
        ):
            written = self.migration(storage)
            self.assertNotIn("hidden", written)
            path, args, kwargs = storage.deconstruct()
            self.assertEqual((args, kwargs), ((), {"root_path": "/r"}))
            self.assertEqual(path, f"{module.__name__}.DropboxStorage")
            imported = import_string(path)(*args, **kwargs)
            self.assertEqual(imported.deconstruct(), storage.deconstruct())

    def test_subclasses_with_arguments_of_their_own(self):
        class Media(DropboxStorage):
            def __init__(self, secret, folder="/x"):
                super().__init__(secret, root_path=folder)

        args, kwargs = Media("hidden-token", folder="/y")._constructor_args
        self.assertEqual((args, kwargs), ((), {"folder": "/y"}))

    def test_a_callable_storage_stays_a_path(self):
        written = self.migration(get_storage)
        self.assertIn(f"{__name__}.get_storage", written)

    def test_a_storage_is_neither_false_nor_callable(self):
        self.assertTrue(DropboxStorage())
        self.assertFalse(callable(DropboxStorage()))
        self.assertNotEqual(DropboxStorage(), "storage")

    def test_no_repr_and_no_log_shows_a_secret(self):
        with self.assertLogs(level="DEBUG") as logs:
            storage = self.account.connect(DropboxStorage(**self.secrets))
            storage.FIRST_WAIT = 0.001
            self.account.refresh_tokens = {
                "hidden-refresh": ("hidden-key", "hidden-secret")
            }
            self.account.tokens.add("sl.hidden-access")
            self.save("a", b"x", storage)
            self.account.fail("*", "503", times=3)
            self.assertIn("/a", self.account.files())
            shown = [repr(storage), str(storage), repr(storage.open("a"))]
            logging.getLogger().debug("at least one")
        self.assertNotIn("hidden", "".join([*shown, *logs.output]))

    def test_no_error_shows_a_secret_that_dropbox_repeats(self):
        for token in ("hidden-access", '"hidden-access"', r"hidden\access"):
            storage = DropboxStorage()
            storage.client = client = FakeDropbox(self.account)
            client._oauth2_access_token = token
            text = f'Invalid value in HTTP header "Authorization": "Bearer {token}"'
            for answer in (text, json.dumps({"error": text})):
                self.account.refused = Refused(400, answer)
                with self.assertRaises(DropboxStorageException) as caught:
                    storage.exists("a")
                error = caught.exception
                shown = "".join(traceback.format_exception(None, error, None))
                self.assertIn("BadInputError", shown)
                self.assertNotIn("hidden", shown)
                self.assertNotIn("hidden", repr(vars(error.__cause__)))

    def debug_page(self, act):
        """An error and what Django's debug page, and its mail to ADMINS, show of it.

        That is what the frames of the error and its causes hold, but for those of the
        tests: only FakeAccount.answer() stands for urllib3.
        """
        try:
            act()
        except Exception as error:
            with override_settings(DEBUG=True):
                report = ExceptionReporter(
                    None, type(error), error, error.__traceback__
                )
                frames = report.get_traceback_frames()
            shown = [
                repr(frame.get("vars"))
                for frame in frames
                if frame.get("filename") != __file__
                or frame.get("function") == "answer"
            ]
            self.assertTrue(shown)
            return error, f"{error!r} {error.__cause__!r} {shown}"
        self.fail("no error")

    def test_no_debug_page_shows_a_secret(self):
        """Of any operation under any kind of failure: its frames are shown with all they hold."""
        secrets = {name: f"{os.urandom(9).hex()}-{name}" for name in REFRESHING}
        values = [*secrets.values()]

        class TimeLimit(Exception):
            pass

        def limit():
            raise TimeLimit

        kinds = ("503", "429", "reset", "garbage", "missing_scope", "bad_input", limit)
        # It takes long to show what is large: one such operation will do.
        operations = [name for name in OPERATIONS if name not in LARGE_OPERATIONS]
        for operation, fault in itertools.product(operations, kinds):
            options, act = OPERATIONS[operation]
            account = FakeAccount()
            account.put("/a", b"old")
            account.put("/huge", HUGE)
            account.put("/dir/0")
            account.refresh_tokens = {values[0]: tuple(values[1:])}
            storage = account.storage(oauth2_access_token=None, **secrets, **options)
            clean = account.storage(oauth2_access_token=None, **secrets, **options)
            cache.clear()
            with account.counting() as calls:
                act(clean)
            account.entries.pop("/new", None)
            for route in calls:
                cache.clear()
                account.put("/a", b"old")
                account.put("/dir/0")
                account.faults.clear()
                account.fail(route, fault, times=999)
                with self.subTest(f"{operation}: {route} {fault}"):
                    error, page = self.debug_page(lambda: act(storage))
                    self.assertIsInstance(error, (DropboxStorageException, TimeLimit))
                    for secret in (*values, *account.tokens):
                        self.assertFalse(secret in page)

    def test_no_debug_page_shows_a_secret_that_cannot_be_used(self):
        secret = os.urandom(9).hex()
        for options in (
            {"oauth2_access_token": secret, "root_path": "relative"},
            {"oauth2_access_token": secret, "unknown": 1},
            {"oauth2_access_token": f"{secret} "},
            {"oauth2_refresh_token": secret, "app_key": secret},
            {"app_secret": secret, "timeout": 0},
        ):
            error, page = self.debug_page(lambda: DropboxStorage(**options))
            self.assertIsInstance(error, ImproperlyConfigured)
            self.assertFalse(secret in page, options)

    def test_no_debug_page_shows_a_secret_where_the_sdk_is_missing(self):
        secret = os.urandom(9).hex()
        storage = DropboxStorage(secret)
        with unittest.mock.patch.dict(sys.modules, {"dropbox": None}):
            error, page = self.debug_page(lambda: storage.exists("a"))
        self.assertIsInstance(error, ImportError)
        self.assertFalse(secret in page)


# The options


class OptionTests(StorageTestCase):
    settings = {
        "oauth2_access_token": ("DROPBOX_OAUTH2_TOKEN", "token-1", "token-2", None),
        "root_path": ("DROPBOX_ROOT_PATH", "/one", "/two", "/"),
        "timeout": ("DROPBOX_TIMEOUT", 1, 2.5, 100),
        "write_mode": ("DROPBOX_WRITE_MODE", "update", "overwrite", "add"),
        "base_url": ("DROPBOX_BASE_URL", "/one/", "/two/", None),
        "shared_links": ("DROPBOX_SHARED_LINKS", True, False, False),
        "url_cache_timeout": ("DROPBOX_URL_CACHE_TIMEOUT", 60, 0, 3600),
        "namespace_id": ("DROPBOX_NAMESPACE_ID", "1", "2", None),
        "team_member_id": ("DROPBOX_TEAM_MEMBER_ID", "dbmid:1", "dbmid:2", None),
        "max_wait": ("DROPBOX_MAX_WAIT", 30, 0, 60),
        "preload_metadata": ("DROPBOX_PRELOAD_METADATA", True, False, False),
    }

    def test_argument_goes_before_class_attribute_before_setting_before_default(self):
        for option, (setting, first, second, default) in self.settings.items():
            with self.subTest(option):
                subclass = type("Subclass", (DropboxStorage,), {option: first})
                self.assertEqual(getattr(DropboxStorage(), option), default)
                with self.settings_changed(setting, second):
                    self.assertEqual(getattr(DropboxStorage(), option), second)
                    self.assertEqual(getattr(subclass(), option), first)
                    argument = subclass(**{option: second})
                    self.assertEqual(getattr(argument, option), second)

    def settings_changed(self, setting, value):
        return override_settings(**{setting: value})

    def test_settings_are_read_when_they_are_used(self):
        storage = DropboxStorage()
        with override_settings(DROPBOX_ROOT_PATH="/later"):
            self.assertEqual(storage.root_path, "/later")
        self.assertEqual(storage.root_path, "/")

    def test_a_refresh_token_needs_key_and_secret_and_the_reverse(self):
        together = (
            "not set: set all three of oauth2_refresh_token, app_key, app_secret, or "
            "else oauth2_access_token (DROPBOX_OAUTH2_TOKEN) alone."
        )
        key, secret = "app_key (DROPBOX_APP_KEY)", "app_secret (DROPBOX_APP_SECRET)"
        with self.raises(ImproperlyConfigured, f"{key} and {secret} {together}"):
            DropboxStorage(oauth2_refresh_token="refresh")
        with self.raises(ImproperlyConfigured, f"{secret} {together}"):
            DropboxStorage(oauth2_refresh_token="refresh", app_key="key")
        refresh = "oauth2_refresh_token (DROPBOX_OAUTH2_REFRESH_TOKEN)"
        with self.raises(ImproperlyConfigured, f"{refresh} {together}"):
            DropboxStorage(app_secret="secret", app_key="key")
        with override_settings(DROPBOX_OAUTH2_REFRESH_TOKEN="refresh"):
            with self.raises(ImproperlyConfigured, f"{key} and {secret} {together}"):
                DropboxStorage("token")
        storage = DropboxStorage()
        with override_settings(DROPBOX_APP_KEY="key"):
            with self.raises(
                ImproperlyConfigured, f"{refresh} and {secret} {together}"
            ):
                storage.exists("a")

    def test_an_unknown_option_is_named(self):
        with self.assertRaisesRegex(
            ImproperlyConfigured, "Unknown option token; there"
        ):
            DropboxStorage(token="x")

    def test_bad_values_are_named_with_what_would_do(self):
        for options, message in {
            ("root_path", "media"): "a path that begins with '/', such as '/media'",
            ("root_path", ""): "a path that begins with '/', such as '/'",
            ("write_mode", "append"): "one of 'add', 'overwrite', 'update'",
            ("timeout", 0): "None or a number of seconds from 0.001 to 86400",
            ("timeout", "9"): "None or a number of seconds from 0.001 to 86400",
            ("timeout", True): "None or a number of seconds from 0.001 to 86400",
            ("timeout", 86401): "None or a number of seconds from 0.001 to 86400",
            ("max_wait", -1): "None or a number of seconds from 0 to 86400",
            ("max_wait", 86401): "None or a number of seconds from 0 to 86400",
            ("url_cache_timeout", 14401): "None or a number of seconds from 0 to 14400",
            ("preload_metadata", "yes"): "one of True, False",
            ("base_url", 7): "a URL such as '/media/', or None",
            (
                "namespace_id",
                42,
            ): "printable ASCII without spaces, quotes and backslashes",
        }.items():
            setting, found = self.settings[options[0]][0], repr(options[1])
            message = f"{options[0]} (or {setting}) must be {message}: found {found}."
            with self.subTest(options):
                with self.raises(ImproperlyConfigured, message):
                    DropboxStorage(**dict([options]))
                with self.settings_changed(setting, options[1]):
                    with self.raises(ImproperlyConfigured, message):
                        DropboxStorage()

    def test_a_bad_credential_is_not_repeated(self):
        with self.raises(
            ImproperlyConfigured,
            "oauth2_access_token (or DROPBOX_OAUTH2_TOKEN) must be printable ASCII without "
            "spaces, quotes and backslashes: found something else.",
        ):
            DropboxStorage("se cret\n")

    def test_without_credentials_only_the_first_use_fails(self):
        with self.raises(
            ImproperlyConfigured,
            "oauth2_refresh_token (DROPBOX_OAUTH2_REFRESH_TOKEN) and app_key (DROPBOX_APP_KEY) "
            "and app_secret (DROPBOX_APP_SECRET) not set: set all three of "
            "oauth2_refresh_token, app_key, app_secret, or else oauth2_access_token "
            "(DROPBOX_OAUTH2_TOKEN) alone.",
        ):
            DropboxStorage().exists("a.txt")

    def test_what_is_empty_is_not_set(self):
        """As unset environment variables are."""
        storage = DropboxStorage(**dict.fromkeys(module.CREDENTIALS, ""), base_url="")
        for option in (*module.CREDENTIALS, "base_url"):
            self.assertIsNone(getattr(storage, option))

    def test_root_path_is_tidied(self):
        for spelling, root in {
            "/a/": "/a",
            "//a//b/.": "/a/b",
            "/": "/",
            "/e\u0301": "/\xe9",
        }.items():
            self.assertEqual(DropboxStorage(root_path=spelling).root_path, root)
            subclass = type("Subclass", (DropboxStorage,), {"root_path": spelling})
            self.assertEqual(subclass().root_path, root)

    def test_a_refresh_token_that_is_an_access_token_is_refused(self):
        with self.raises(
            ImproperlyConfigured,
            "oauth2_refresh_token is an access token; copy refresh_token from the same answer.",
        ):
            DropboxStorage(oauth2_refresh_token="sl.x", app_key="k", app_secret="s")

    def test_quotes_and_backslashes_in_credentials_are_refused(self):
        for option, value in itertools.product(
            module.CREDENTIALS, ('"token"', "'token'", "to\\ken")
        ):
            setting = module.OPTIONS[option].setting
            with self.raises(
                ImproperlyConfigured,
                f"{option} (or {setting}) must be printable ASCII without spaces, quotes and backslashes: found "
                "something else.",
            ):
                DropboxStorage(**{option: value})

    def test_what_the_older_backend_called_location_is_refused(self):
        message = "location is called root_path here; rename it."
        with self.raises(ImproperlyConfigured, message):
            DropboxStorage(location="/media")
        with self.raises(ImproperlyConfigured, message):
            type("Media", (DropboxStorage,), {"location": "/media"})()

    def test_base_url_and_shared_links_exclude_each_other(self):
        with self.raises(
            ImproperlyConfigured, "Set base_url or shared_links, not both."
        ):
            DropboxStorage(base_url="/media/", shared_links=True)
        DropboxStorage(base_url="", shared_links=True)


# The storage


class CallableStorage(DropboxStorage):
    root_path = "/callable"


def get_storage():
    return CallableStorage()


class ConfigurationTests(StorageTestCase):
    backend = f"{module.__name__}.DropboxStorage"

    @unittest.skipIf(django.VERSION < (4, 2), "STORAGES came with Django 4.2")
    def test_storages_setting(self):
        options = {"oauth2_access_token": "valid-token", "root_path": "/remote"}
        remote = {"BACKEND": self.backend, "OPTIONS": options}
        with override_settings(STORAGES={**settings.STORAGES, "remote": remote}):
            storage = self.account.connect(django_storage.storages["remote"])
            self.save("a.txt", b"x", storage)
        self.assertEqual(self.account.files(), {"/remote/a.txt": b"x"})

    def test_settings_alone_suffice(self):
        """As for DEFAULT_FILE_STORAGE, which builds the storage without arguments."""
        with override_settings(
            DROPBOX_OAUTH2_TOKEN="valid-token", DROPBOX_ROOT_PATH="/set"
        ):
            storage = self.account.connect(import_string(self.backend)())
            self.save("a.txt", b"x", storage)
        self.assertEqual(self.account.files(), {"/set/a.txt": b"x"})

    def test_class_attributes_of_a_subclass_suffice(self):
        attributes = {"oauth2_access_token": "valid-token", "root_path": "/sub"}
        storage = type("Media", (DropboxStorage,), attributes)()
        self.save("a.txt", b"x", self.account.connect(storage))
        self.assertEqual(self.account.files(), {"/sub/a.txt": b"x"})

    def test_bad_class_attributes_are_refused(self):
        with self.assertRaisesRegex(ImproperlyConfigured, "found 'media'"):
            type("Media", (DropboxStorage,), {"root_path": "media"})()

    def test_namespace(self):
        storage = self.account.storage(namespace_id="42", root_path="/r")
        self.save("a.txt", b"x", storage)
        self.assertEqual(self.account.files(), {"/team/r/a.txt": b"x"})
        self.assertEqual(storage.open("a.txt").read(), b"x")
        with self.assertRaisesRegex(DropboxStorageException, "namespace_id"):
            self.account.storage(namespace_id="7").exists("a.txt")

    def test_team_member(self):
        storage = self.account.storage(team_member_id="dbmid:1")
        storage.exists("a.txt")
        self.assertEqual(
            self.account.last_headers["Dropbox-API-Select-User"], "dbmid:1"
        )
        self.storage.exists("a.txt")
        self.assertNotIn("Dropbox-API-Select-User", self.account.last_headers)

    def test_timeout_holds_for_every_request(self):
        storage = self.account.storage(timeout=7, **REFRESHING)
        self.save("big", bytes(9 * MiB), storage)
        storage.open("big").read()
        storage.listdir("")
        storage.delete(storage.save("a.txt", ContentFile(b"")))
        self.assertIn("oauth2/token", self.account.calls)
        self.assertEqual(self.account.timeouts, {7})

    def test_a_changed_option_makes_a_new_client(self):
        storage = DropboxStorage()
        with override_settings(DROPBOX_OAUTH2_TOKEN="one"):
            first = storage.client
            self.assertIs(storage.client, first)
        with override_settings(DROPBOX_OAUTH2_TOKEN="two"):
            self.assertIsNot(storage.client, first)

    def test_an_assigned_client_is_used_with_its_own_credentials(self):
        storage = DropboxStorage()
        storage.client = FakeDropbox(self.account)
        self.save("a.txt", b"x", storage)
        self.assertEqual(self.account.files(), {"/a.txt": b"x"})

    def test_an_assigned_client_does_not_repeat_calls_by_itself(self):
        self.storage.client = FakeDropbox(self.account)
        for fault in ("503", "429"):
            self.account.fail("files/get_metadata", fault, times=99)
            with self.account.counting() as calls:
                with self.assertRaises(DropboxStorageException):
                    self.storage.exists("a")
            self.assertEqual(calls["files/get_metadata"], self.storage.MAX_ATTEMPTS)
            self.account.faults.clear()

    def test_who_uses_the_client_gets_errors_at_once(self):
        for fault in ("503", "429"):
            self.account.fail("files/get_metadata", fault)
            with self.assertRaises(dropbox.exceptions.HttpError):
                self.storage.client.files_get_metadata("/a")
            self.account.faults.clear()

    def test_copies_and_pickles_build_their_own_client(self):
        storage = self.account.storage(root_path="/r")
        for copied in (copy.deepcopy(storage), pickle.loads(pickle.dumps(storage))):
            self.assertEqual(copied.deconstruct(), storage.deconstruct())
            self.assertIsNot(copied.client, storage.client)
            name = self.save("a.txt", b"x", self.account.connect(copied))
            self.assertIn(f"/r/{name}", self.account.files())

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_a_forked_process_builds_its_own_client(self):
        self.storage.exists("a.txt")
        parent = id(self.storage.client)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork
            child = os.fork()
        if not child:
            status = 1
            with contextlib.suppress(BaseException):
                self.account.connect(self.storage).exists("a.txt")
                status = int(id(self.storage.client) == parent)
            os._exit(status)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.assertEqual(id(self.storage.client), parent)

    def test_what_costs_much_is_not_imported_with_the_module(self):
        code = (
            "from django.conf import settings; settings.configure(); import sys\n"
            f"from {module.__name__} import DropboxStorage; DropboxStorage('token')\n"
            "costly = {'dropbox', 'requests', 'django.http', 'django.db.models'}\n"
            "assert not costly & sys.modules.keys()\n"
        )
        folder = (
            pathlib.Path(module.__file__).resolve().parents[module.__name__.count(".")]
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, check=False)
        self.assertEqual(done.returncode, 0)

    def test_of_two_tokens_the_nearer_one_is_used(self):
        refreshing = {
            "DROPBOX_OAUTH2_REFRESH_TOKEN": "valid-refresh-token",
            "DROPBOX_APP_KEY": "app-key",
            "DROPBOX_APP_SECRET": "app-secret",
        }

        def token(storage):
            self.account.connect(storage).exists("a")
            authorization = self.account.last_headers["Authorization"]
            return authorization.replace("Bearer ", "")[:5]

        near = type("Near", (DropboxStorage,), {"oauth2_access_token": "valid-token"})
        nearest = type("Nearest", (near,), REFRESHING)
        with override_settings(**refreshing, DROPBOX_OAUTH2_TOKEN="other"):
            self.assertEqual(token(DropboxStorage()), "sl.fr")
            self.assertEqual(token(DropboxStorage("valid-token")), "valid")
            self.assertEqual(token(near()), "valid")
        self.assertEqual(token(nearest()), "sl.fr")
        self.assertEqual(token(nearest("valid-token")), "valid")
        self.assertEqual(token(near(**REFRESHING)), "sl.fr")
        self.assertEqual(token(DropboxStorage("expired", **REFRESHING)), "sl.fr")

    def test_a_property_of_a_subclass_is_asked_when_it_is_used(self):
        class Tenants(DropboxStorage):
            tenant = None

            @property
            def root_path(self):
                return f"/tenants//{self.tenant.lower()}/"

            @property
            def oauth2_access_token(self):
                return f"{self.tenant}-token"

        storage = Tenants()
        for tenant in ("one", "e\u0301"):
            storage.tenant = tenant
            self.account.tokens = {f"{tenant}-token"}
            if tenant == "one":
                self.save("a.txt", b"x", self.account.connect(storage))
        self.assertEqual(self.account.files(), {"/tenants/one/a.txt": b"x"})
        with self.assertRaisesRegex(ImproperlyConfigured, "oauth2_access_token"):
            storage.exists("a.txt")
        storage.tenant = None
        self.assertEqual(storage._constructor_args, ((), {}))

    def test_a_forked_process_does_not_share_an_assigned_clients_connections(self):
        self.storage.client = client = FakeDropbox(self.account)
        closed = []
        self.account.close = lambda: closed.append(os.getpid())
        self.storage.exists("a.txt")
        closed.clear()
        self.storage.exists("a.txt")
        self.assertEqual(closed, [])
        with unittest.mock.patch.object(os, "getpid", lambda: 1):  # as in a child
            self.storage.exists("a.txt")
            self.storage.exists("a.txt")
        self.assertEqual(closed, [1])
        self.assertIs(self.storage.client, client)


class SavingTests(StorageTestCase):
    def test_every_size_around_the_chunks_is_stored_whole(self):
        chunk = self.storage.CHUNK_SIZE
        data = random.Random(1).randbytes(3 * chunk + 1)
        sizes = [n * chunk + d for n in range(4) for d in (-1, 0, 1)][1:]
        for size in [*sizes, BLOCK // 2, chunk + BLOCK // 2, 2 * chunk + 5]:
            with self.subTest(size), self.account.counting() as calls:
                self.assertEqual(self.save("a", data[:size]), "a")
                self.assertEqual(self.account.files(), {"/a": data[:size]})
            if size <= 2 * chunk:
                self.assertEqual(calls["files/upload"], 1)
                self.assertEqual(sum(calls.values()), 2)  # exists() is the other one
            self.assertFalse(set(self.account.sessions))
            self.storage.delete("a")

    def test_a_chunk_size_is_rounded_up_to_whole_hash_blocks(self):
        self.storage.CHUNK_SIZE = 1
        data = random.Random(2).randbytes(3 * BLOCK)
        self.save("a", data)
        self.assertEqual(self.account.files(), {"/a": data})

    def test_content_of_any_kind(self):
        middle = ContentFile(b"from the beginning")
        middle.seek(5)
        lying = ContentFile(b"longer than it says")
        lying.size = 3
        unknown = ContentFile(b"x")
        unknown.size = None
        for content, stored in (
            (ContentFile("t\xe9xt"), "t\xe9xt".encode()),
            (ContentFile(""), b""),
            (middle, b"from the beginning"),
            (lying, b"longer than it says"),
            (unknown, b"x"),
            (Unsized(), b""),
            (Unsized(b""), b""),
            (
                Unsized(b"one ", "tw\xf6 ", bytearray(b"three ")),
                "one tw\xf6 three ".encode(),
            ),
            (io.BytesIO(b"raw"), b"raw"),
            (File(io.StringIO("text"), "x"), b"text"),
            (SimpleUploadedFile("x", b"upload"), b"upload"),
        ):
            with self.subTest(stored):
                name = self.storage.save("a", content)
                self.assertEqual(self.account.files()[f"/{name}"], stored)

    def test_content_stays_open(self):
        content = ContentFile(b"x")
        self.save("a")
        self.storage.save("a", content)
        self.assertFalse(content.closed)
        self.assertEqual(content.open().read(), b"x")

    def test_content_that_breaks_half_way_is_not_stored(self):
        self.account.put("/a", b"old")
        for mode in module.WRITE_MODES:
            for size in (1, 3 * self.storage.CHUNK_SIZE):
                storage = self.account.storage(write_mode=mode)
                with self.subTest(mode=mode, size=size):
                    with self.assertRaises(ZeroDivisionError):
                        storage.save("a", Broken(bytes(size)))
                    self.assertEqual(self.account.files(), {"/a": b"old"})

    def test_a_name_that_gets_taken_meanwhile(self):
        """As between the check and the write: also by the same bytes, sent only once."""
        for size in (5, 3 * self.storage.CHUNK_SIZE):
            data = random.Random(size).randbytes(size)
            for other in (b"other", data):
                with self.subTest(size=size, same=other == data):
                    self.account.entries.clear()
                    self.account.put("/taken.txt", other)
                    sent = self.account.bytes_in
                    name = self.storage._save("taken.txt", ContentFile(data))
                    self.assertRegex(name, r"^taken_\w{7}\.txt$")
                    files = {"/taken.txt": other, f"/{name}": data}
                    self.assertEqual(self.account.files(), files)
                    self.assertLess(self.account.bytes_in - sent, size + 5000)

    def test_names_that_are_taken_again_and_again(self):
        class Counting(DropboxStorage):
            tried = 0

            def get_available_name(self, name, max_length=None):
                self.tried += 1
                return f"{self.tried}.txt"

        last = self.storage.MAX_ATTEMPTS
        for number in range(1, last):
            self.account.put(f"/{number}.txt", b"other")
        storage = self.account.connect(Counting("valid-token"))
        self.assertEqual(self.save("a", b"mine", storage), f"{last}.txt")
        storage = self.account.connect(Counting("valid-token"))
        with self.account.counting() as calls, self.assertRaises(FileExistsError):
            self.save("a", b"mine", storage)
        self.assertEqual(calls["files/upload"], last)

    def test_a_folder_that_has_taken_the_name_meanwhile(self):
        self.account.put("/a/b")
        self.assertRegex(self.storage._save("a", ContentFile(b"x")), r"^a_\w{7}$")
        storage = self.account.storage(write_mode="overwrite")
        with self.assertRaises(IsADirectoryError):
            storage.save("a", ContentFile(b"x"))

    def test_a_file_where_a_folder_is_needed(self):
        self.account.put("/a", b"old")
        with self.assertRaises(NotADirectoryError):
            self.save("a/b", b"x")
        self.assertEqual(self.account.files(), {"/a": b"old"})

    def test_many_threads_that_save_one_name_get_a_file_each(self):
        with ThreadPoolExecutor(8) as pool:
            saved = [*pool.map(lambda i: (self.save("a", b"%d" % i), i), range(40))]
        self.assertEqual(self.account.files(), {f"/{n}": b"%d" % i for n, i in saved})

    def test_overwrite_replaces_in_one_call(self):
        storage = self.account.storage(write_mode="overwrite")
        self.assertEqual(storage.save("A.txt", ContentFile(b"old")), "A.txt")
        with self.account.counting() as calls:
            self.assertEqual(storage.save("A.txt", ContentFile(b"new")), "A.txt")
        self.assertEqual(calls, {"files/upload": 1})
        self.assertEqual(self.account.files(), {"/A.txt": b"new"})

    def test_update_replaces_what_it_has_seen_and_nothing_else(self):
        storage = self.account.storage(write_mode="update")
        for content in (b"first", b"second"):
            self.assertEqual(storage.save("a", ContentFile(content)), "a")
            self.assertEqual(self.account.files(), {"/a": content})

        def changing():
            yield b"mine"
            self.account.put("/a", b"theirs")

        content = Unsized()
        content.chunks = changing
        with self.raises(
            DropboxStorageException,
            "'/a' has changed since it was looked at; it was left alone.",
        ):
            storage.save("a", content)
        self.assertEqual(self.account.files(), {"/a": b"theirs"})

    def test_max_length_truncates_in_every_mode(self):
        for mode in module.WRITE_MODES:
            storage = self.account.storage(write_mode=mode)
            name = storage.save("x" * 30 + ".txt", ContentFile(b""), max_length=20)
            self.assertEqual(len(name), 20)
            self.assertTrue(name.endswith(".txt" if mode == "add" else "xxxxxx.txt"))
        with self.assertRaises(SuspiciousFileOperation):
            storage.save("x" * 30 + ".txt", ContentFile(b""), max_length=4)

    def test_what_dropbox_has_stored_is_compared_with_what_was_sent(self):
        class Careless(FakeAccount):
            def commit(self, target, data):
                return super().commit(target, data[:-1])

        for size in (5, 3 * self.storage.CHUNK_SIZE):
            with self.assertRaises(DropboxStorageException) as caught:
                Careless().storage().save("a", ContentFile(bytes(size)))
            self.assertEqual(caught.exception.reason, "content_hash_mismatch")

    def test_two_who_save_equal_bytes_under_one_name_get_a_file_each(self):
        """One of them is refused once by a 503 that has done nothing."""
        for size in (5, 3 * self.storage.CHUNK_SIZE):
            data = random.Random(size).randbytes(size)
            for mode in ("add", "x"):
                account = FakeAccount()
                storage = account.storage()
                # With a session even the time may be the same, as it shows more.
                times = {} if size > 5 else {"modified": "2024-07-01T12:00:00Z"}
                for route in ("files/upload", "files/upload_session/finish"):
                    account.fail(route, lambda: account.put("/a", data, **times))
                with self.subTest(size=size, mode=mode):
                    if mode == "add":
                        name = storage._save("a", ContentFile(data))
                        files = {"/a": data, f"/{name}": data}
                        self.assertTrue(account.files() == files)
                        self.assertEqual(len(files), 2)
                    else:
                        with self.assertRaises(FileExistsError):
                            with storage.open("a", "xb") as file:
                                file.write(data)

    def test_the_time_of_a_file_is_that_of_its_commit(self):
        for size in (5, 3 * self.storage.CHUNK_SIZE):
            before = int(time.time())
            name = self.save("a", bytes(size))
            entry = self.account.entries[f"/{name.lower()}"]
            modified = datetime.datetime.strptime(
                f"{entry.client_modified}+0000", "%Y-%m-%dT%H:%M:%SZ%z"
            )
            self.assertLessEqual(before, modified.timestamp())
            self.assertLessEqual(modified.timestamp(), time.time())

    def test_a_dead_dropbox_is_waited_for_once(self):
        for size in (5, 3 * self.storage.CHUNK_SIZE):
            account = FakeAccount()
            storage = account.storage()
            for route in ("files/upload", "files/upload_session/finish"):
                account.fail(route, lambda: account.fail("*", "503", times=999))
            with self.assertRaises(DropboxStorageException):
                storage._save("a", ContentFile(bytes(size)))
            self.assertEqual(account.calls["files/get_metadata"], 0)

    def test_chunks_of_any_size_fit_into_a_request(self):
        class Small(FakeAccount):  # as if 12 MiB were all that a request may carry
            def check_hash(self, argument, body):
                assert len(body) <= 12 * MiB
                super().check_hash(argument, body)

        data = random.Random(8).randbytes(30 * MiB + 1)
        for size in (1, 5 * MiB, 75 * MiB, 150 * MiB, 1000 * MiB):
            account = Small()
            storage = account.storage()
            storage.CHUNK_SIZE = size
            with unittest.mock.patch.object(module, "MAX_REQUEST", 12 * MiB):
                for end in (9 * MiB, 13 * MiB, len(data)):
                    name = storage.save("a", ContentFile(data[:end]))
                    self.assertTrue(account.files()[f"/{name}"] == data[:end])
            self.assertEqual(len(account.sessions), 0)

    def test_each_byte_is_hashed_once(self):
        hashed = []

        class Counting(module._ContentHash):
            def update(self, data):
                hashed.append(len(data))
                super().update(data)

        data = bytes(5 * self.storage.CHUNK_SIZE + 1)
        with unittest.mock.patch.object(module, "_ContentHash", Counting):
            self.save("small", data[:5])
            self.save("large", data)
        self.assertEqual(sum(hashed), 5 + len(data))


class LookingTests(StorageTestCase):
    def setUp(self):
        super().setUp()
        self.account.put("/a.txt", b"12345")
        self.account.put("/dir/Sub/b.txt", b"x")

    def test_exists(self):
        for name, there in {
            "a.txt": True,
            "A.TXT": True,
            "dir": True,
            "dir/sub/b.txt": True,
            "": True,
            ".": True,
            "b.txt": False,
            "dir/b.txt": False,
            "a.txt/b": False,
        }.items():
            self.assertIs(self.storage.exists(name), there, name)

    def test_exists_raises_when_it_cannot_know(self):
        for fault in ("invalid_token", "bad_input", "/path/restricted_content"):
            self.account.fail("files/get_metadata", fault)
            with self.assertRaises(DropboxStorageException):
                self.storage.exists("a.txt")
            self.account.faults.clear()

    def test_listdir(self):
        for path in ("", ".", "/", pathlib.Path("")):
            self.assertEqual(self.storage.listdir(path), (["dir"], ["a.txt"]))
        self.assertEqual(self.storage.listdir("dir"), (["Sub"], []))
        self.assertEqual(self.storage.listdir("DIR/sub/"), ([], ["b.txt"]))
        with self.assertRaises(FileNotFoundError):
            self.storage.listdir("missing")
        with self.assertRaises(NotADirectoryError):
            self.storage.listdir("a.txt")

    def test_listdir_follows_every_page(self):
        self.account.page_size = 3
        for i in range(10):
            self.account.put(f"/many/{i}")
        names = [str(i) for i in range(10)]
        with self.account.counting() as calls:
            self.assertEqual(self.storage.listdir("many"), ([], names))
        paged = {"files/list_folder": 1, "files/list_folder/continue": 3}
        self.assertEqual(calls, paged)

    def test_a_listing_that_expires_begins_again(self):
        self.account.page_size = 3
        for i in range(10):
            self.account.put(f"/many/{i}")
        names = [str(i) for i in range(10)]
        for page in (1, 2, 3):
            self.account.fail("files/list_folder/continue", "/reset", nth=page)
            self.assertEqual(self.storage.listdir("many"), ([], names))
            self.account.faults.clear()
        self.account.fail("files/list_folder/continue", "/reset", times=99)
        with self.account.counting() as calls:
            with self.assertRaises(DropboxStorageException) as caught:
                self.storage.listdir("many")
        self.assertEqual(caught.exception.reason, "reset")
        self.assertEqual(calls["files/list_folder"], self.storage.MAX_ATTEMPTS)

    def test_a_root_that_does_not_exist_yet_is_empty(self):
        storage = self.account.storage(root_path="/new")
        self.assertEqual(storage.listdir(""), ([], []))
        self.assertEqual(FakeAccount().storage().listdir(""), ([], []))
        self.assertFalse(storage.exists("a.txt"))
        self.save("a.txt", b"x", storage)
        self.assertEqual(storage.listdir(""), ([], ["a.txt"]))

    def test_size_and_time_are_those_of_files(self):
        self.assertEqual(self.storage.size("a.txt"), 5)
        for look in (self.storage.size, self.storage.get_modified_time):
            with self.assertRaises(FileNotFoundError):
                look("missing")
            with self.assertRaises(IsADirectoryError):
                look("dir")
            with self.assertRaises(IsADirectoryError):
                look("")

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

    def test_what_dropbox_does_not_know_is_not_implemented(self):
        for method in ("path", "get_accessed_time", "get_created_time"):
            with self.assertRaises(NotImplementedError):
                getattr(self.storage, method)("a.txt")

    def test_delete(self):
        self.storage.delete("A.txt")
        self.storage.delete("a.txt")
        self.assertEqual(self.account.files(), {"/dir/Sub/b.txt": b"x"})
        self.storage.delete("dir")
        self.assertEqual(self.account.entries, {})
        for name in ("", None):
            with self.raises(ValueError, "The name must be given to delete()."):
                self.storage.delete(name)

    def test_each_look_is_one_call(self):
        for look, route in (
            (lambda: self.storage.exists("a.txt"), "files/get_metadata"),
            (lambda: self.storage.size("a.txt"), "files/get_metadata"),
            (lambda: self.storage.get_modified_time("a.txt"), "files/get_metadata"),
            (lambda: self.storage.listdir("dir"), "files/list_folder"),
            (lambda: self.storage.url("a.txt"), "files/get_temporary_link"),
            (lambda: self.storage.delete("a.txt"), "files/delete_v2"),
        ):
            with self.account.counting() as calls:
                look()
            self.assertEqual(calls, {route: 1})

    def test_a_listing_that_changes_between_its_pages(self):
        """Later pages report what is gone, with all below it, and what is new again."""

        class Changing(FakeAccount):
            def files_list_folder_continue(self, argument, body):
                if "/many/9" not in self.files():
                    self.put("/many/1", b"longer")
                    self.put("/many/9")
                    for path in ("/many/0", "/many/5", "/many/SUB"):
                        self.files_delete_v2({"path": path}, b"")
                    self.put("/many/5", b"again")
                return super().files_list_folder_continue(argument, body)

        for preload in (False, True):
            self.account = Changing(page_size=3)
            for i in range(6):
                self.account.put(f"/many/{i}")
                self.account.put(f"/many/Sub/deep/{i}")
            storage = self.account.storage(preload_metadata=preload)
            folders, files = storage.listdir("many")
            self.assertEqual(sorted(files), ["1", "2", "3", "4", "5", "9"])
            self.assertEqual(folders, [])
            if preload:
                self.assertEqual(storage.size("many/1"), 6)
                self.assertFalse(storage.exists("many/sub/deep/1"))
                self.assertFalse(storage.exists("many/Sub"))

    def test_an_alternative_of_a_name_with_a_long_extension_fits(self):
        for name in (f"x.{'y' * 253}", f"x.{'y' * 248}.jpeg", f".{'y' * 254}"):
            self.save(name, b"1")
            saved = self.save(name, b"2")
            self.assertNotEqual(saved, name)
            self.assertEqual(len(saved), 255)
            self.assertEqual(saved.endswith(name[-5:]), name[0] == "x")
            self.assertTrue(saved.startswith(name[0]))


# Names, and what is known about them


class NameTests(StorageTestCase):
    def test_a_name_has_one_form(self):
        for spelling, name in {
            "e\u0301.txt": "\xe9.txt",
            "dir\\b.txt": "dir/b.txt",
            pathlib.PurePosixPath("dir/c.txt"): "dir/c.txt",
            "./dir//x/../d.txt": "dir/d.txt",
        }.items():
            with self.subTest(spelling):
                self.assertEqual(self.storage._save(spelling, ContentFile(b"x")), name)
                self.assertEqual(self.account.files()[f"/{name}"], b"x")
                self.assertTrue(self.storage.exists(spelling))
                self.assertEqual(self.storage.open(spelling).read(), b"x")

    def test_no_method_leaves_the_root(self):
        self.account.put("/outside.txt", b"mine")
        calls = sum(self.account.calls.values())
        content = ContentFile(b"x")
        for root, name in itertools.product(
            ("/", "/root"),
            (
                "../outside.txt",
                "/outside.txt",
                "a/../../outside.txt",
                "..",
                "/root/../a",
            ),
        ):
            storage = self.account.storage(root_path=root)
            for call in (
                lambda: storage._save(name, content),
                lambda: storage.save(name, content),
                lambda: storage.open(name),
                lambda: storage.open(name, "wb"),
                lambda: storage.delete(name),
                lambda: storage.exists(name),
                lambda: storage.listdir(name),
                lambda: storage.size(name),
                lambda: storage.url(name),
                lambda: storage.get_modified_time(name),
                lambda: storage.get_available_name(name),
            ):
                with self.subTest(root=root, name=name):
                    with self.assertRaises(SuspiciousFileOperation):
                        call()
        self.assertEqual(sum(self.account.calls.values()), calls)

    def test_the_root_itself_is_neither_deleted_nor_written(self):
        self.save("a.txt", b"x")
        for name in (".", "/", "a/..", "./"):
            with self.subTest(name):
                with self.assertRaises(IsADirectoryError):
                    self.storage.delete(name)
                with self.assertRaises(IsADirectoryError):
                    self.storage._save(name, ContentFile(b""))
                with self.assertRaises(IsADirectoryError):
                    self.storage.open(name)
        self.assertEqual(self.account.files(), {"/a.txt": b"x"})

    def test_names_that_are_none_are_refused_in_every_mode(self):
        for mode, name in itertools.product(
            module.WRITE_MODES, ("", ".", "..", "a/..", "/")
        ):
            storage = self.account.storage(write_mode=mode)
            with self.subTest(mode=mode, name=name):
                with self.assertRaises(SuspiciousFileOperation):
                    storage.save(name, ContentFile(b""))
                with self.assertRaisesRegex(
                    SuspiciousFileOperation, "Could not derive"
                ):
                    storage.get_available_name(name)

    def test_what_no_path_can_hold_is_refused_offline(self):
        for name in ("a\0b", "a\udc80b"):
            with self.assertRaisesRegex(SuspiciousFileOperation, "NUL or half"):
                self.storage.exists(name)
        self.assertFalse(self.account.calls)

    def test_get_valid_name_mends_what_dropbox_refuses(self):
        for spelling, valid in {
            "desktop.ini": "_desktop.ini",
            "Thumbs.DB": "_Thumbs.DB",
            ".dropbox": "_.dropbox",
            "Icon\r": "Icon",
            "trailing dots...": "trailing_dots",
            " spaces ": "spaces",
            "e\u0301": "\xe9",
            f"{'x' * 300}.jpeg": f"{'x' * 250}.jpeg",
            f"xz.{'y' * 300}": f"x.{'y' * 253}",
        }.items():
            with self.subTest(spelling):
                self.assertEqual(self.storage.get_valid_name(spelling), valid)
                self.assertEqual(self.save(valid), valid)

    def test_an_alternative_of_a_long_name_fits(self):
        name = f"{'x' * 250}.jpeg"
        self.save(name)
        self.assertEqual(len(self.save(name)), 255)


class PreloadTests(StorageTestCase):
    def setUp(self):
        super().setUp()
        self.account.page_size = 3
        for name in ("a.txt", "dir/b.txt", "Dir/Sub/c.txt", "dir/sub/d.txt"):
            self.account.put(f"/static/{name}", name.encode())
        self.storage = self.preloading()
        self.plain = self.account.storage(root_path="/static")

    def preloading(self, **options):
        options = {"preload_metadata": True, "root_path": "/static", **options}
        return self.account.storage(**options)

    def looks(self, storage):
        """All that a storage says of its files."""
        found, names = (
            {},
            ["", "a.txt", "A.txt", "dir", "dir/Sub", "dir/sub/c.txt", "x", "n/e/w"],
        )
        for look, name in itertools.product(
            ("exists", "size", "get_modified_time", "listdir", "get_available_name"),
            names,
        ):
            try:
                found[look, name] = getattr(storage, look)(name)
            except (OSError, SuspiciousFileOperation) as error:
                found[look, name] = type(error)
            if look == "listdir" and isinstance(found[look, name], tuple):
                found[look, name] = [*map(sorted, found[look, name])]
            if look == "get_available_name":
                found[look, name] = found[look, name] == name
        return found

    def test_one_listing_answers_everything(self):
        expected = self.looks(self.plain)
        with self.account.counting() as calls:
            self.assertEqual(self.looks(self.storage), expected)
        paged = {"files/list_folder": 1, "files/list_folder/continue": 1}
        self.assertEqual(calls, paged)

    def test_its_own_writes_and_deletes_keep_it_true(self):
        storage = self.storage
        for change in (
            lambda: storage.save("n/e/w", ContentFile(b"new")),
            lambda: storage.save("a.txt", ContentFile(b"another")),
            lambda: storage.open("A.TXT", "wb").close(),
            lambda: storage.delete("dir/sub/c.txt"),
            lambda: storage.delete("DIR"),
            lambda: storage.delete("missing"),
            lambda: storage.save("dir", ContentFile(b"a file now")),
            lambda: storage.delete("n/e/w"),
        ):
            change()
            self.assertEqual(self.looks(storage), self.looks(self.plain))
        self.assertEqual(self.account.calls["files/list_folder"] > 0, True)

    def test_a_root_that_does_not_exist_yet_is_empty(self):
        storage = self.preloading(root_path="/new")
        self.assertFalse(storage.exists("a.txt"))
        self.assertEqual(storage.listdir(""), ([], []))
        self.save("a.txt", b"x", storage)
        self.assertTrue(storage.exists("a.txt"))
        self.assertEqual(self.account.calls["files/list_folder"], 1)

    def test_what_others_have_done_is_never_overwritten(self):
        self.assertFalse(self.storage.exists("new.txt"))
        self.account.put("/static/new.txt", b"theirs")
        self.assertRegex(
            self.save("new.txt", b"mine", self.storage), r"^new_\w{7}.txt$"
        )
        update = self.preloading(write_mode="update")
        update.size("a.txt")
        self.account.put("/static/a.txt", b"theirs")
        with self.assertRaises(DropboxStorageException):
            self.save("a.txt", b"mine", update)
        self.save("a.txt", b"mine", update)  # after an error it looks again
        self.assertEqual(self.account.files()["/static/a.txt"], b"mine")

    def collect(self, **options):
        """Run collectstatic as in a new process; return its number of calls."""
        lazy = staticfiles.staticfiles_storage
        self.addCleanup(setattr, lazy, "_wrapped", lazy._wrapped)
        self.addCleanup(get_finder.cache_clear)
        lazy._wrapped = self.account.connect(DropboxStorage())
        with self.account.counting() as calls:
            call_command("collectstatic", interactive=False, verbosity=0, **options)
        return sum(calls.values())

    @unittest.skipIf(django.VERSION < (4, 2), "STORAGES came with Django 4.2")
    def test_collectstatic(self):
        """40 files: a first time, again, after a change, and after clearing."""
        backend = f"{module.__name__}.DropboxStorage"
        self.account.page_size = 500
        for preload, limits in ((True, (42, 2, 4)), (False, (120, 80, 83))):
            with (
                tempfile.TemporaryDirectory() as folder,
                override_settings(
                    INSTALLED_APPS=["django.contrib.staticfiles"],
                    STATIC_URL="/static/",
                    STATICFILES_DIRS=[folder],
                    STATICFILES_FINDERS=[
                        "django.contrib.staticfiles.finders.FileSystemFinder"
                    ],
                    STORAGES={
                        "default": {"BACKEND": backend},
                        "staticfiles": {"BACKEND": backend},
                    },
                    DROPBOX_OAUTH2_TOKEN="valid-token",
                    DROPBOX_ROOT_PATH=f"/collected-{preload}",
                    DROPBOX_PRELOAD_METADATA=preload,
                ),
            ):
                get_finder.cache_clear()
                for i in range(40):
                    path = pathlib.Path(folder, f"dir{i % 3}", f"{i}.css")
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(b"%d" % i)
                    os.utime(path, (1, 1))
                self.assertLessEqual(self.collect(), limits[0])
                files = self.account.files()
                self.assertLessEqual(self.collect(), limits[1])
                self.assertEqual(self.account.files(), files)
                path.write_bytes(b"changed")
                os.utime(path, (time.time() + 9,) * 2)
                self.assertLessEqual(self.collect(), limits[2])
                name = f"/collected-{preload}/dir0/39.css"
                self.assertEqual(self.account.files(), {**files, name: b"changed"})
                self.collect(clear=True)
                self.assertEqual(self.account.files(), {**files, name: b"changed"})

    def test_threads_share_a_listing_while_it_changes(self):
        """Saves, failures and looks at once: none of them gets in the way of another."""
        self.account.page_size = 500
        for i in range(2000):
            self.account.put(f"/static/many/{i}")
        done = threading.Event()

        def fail():
            while not done.is_set():
                with contextlib.suppress(FileNotFoundError):
                    self.storage.size("missing")

        def look():
            while not done.is_set():
                self.assertGreaterEqual(len(self.storage.listdir("many")[1]), 2000)

        with ThreadPoolExecutor(3) as pool:
            others = [pool.submit(fail), pool.submit(look), pool.submit(look)]
            try:
                for i in range(100):
                    name = self.save(f"many/new/{i}", b"x", self.storage)
                    self.assertEqual(name, f"many/new/{i}")
            finally:
                done.set()
            for other in others:
                other.result()

    def test_a_save_does_not_look_through_the_listing(self):
        class Listing(dict):
            def __iter__(self):
                raise AssertionError("looked through")

            items = keys = values = __iter__

        self.storage.exists("a.txt")
        state = self.storage._state
        state.listing = Listing(state.listing)
        self.assertEqual(self.save("new/a.txt", b"x", self.storage), "new/a.txt")
        self.assertTrue(self.storage.exists("new"))


# Links


class LinkTests(StorageTestCase):
    def setUp(self):
        super().setUp()
        self.account.put("/a b.txt", b"12345")

    def leads_to(self, link, content):
        self.assertEqual(self.account.links[link], content)

    def test_a_temporary_link_is_cached_for_all_spellings_of_a_name(self):
        link = self.storage.url("a b.txt")
        self.leads_to(link, b"12345")
        for name in ("a b.txt", "A B.TXT", "./a b.txt"):
            self.assertEqual(self.storage.url(name), link)
        self.assertEqual(self.account.calls["files/get_temporary_link"], 1)

    def test_saving_writing_and_deleting_drop_the_link(self):
        storage = self.account.storage(write_mode="overwrite")

        def write():
            with storage.open("a b.txt", "wb") as file:
                file.write(b"written")

        for change, content in (
            (lambda: storage.save("A b.txt", ContentFile(b"saved")), b"saved"),
            (write, b"written"),
        ):
            old = storage.url("a b.txt")
            change()
            self.assertNotEqual(storage.url("a b.txt"), old)
            self.leads_to(storage.url("a b.txt"), content)
        self.account.storage(shared_links=True).url("a b.txt")
        storage.delete("a b.txt")
        for options in ({}, {"shared_links": True}):
            with self.assertLogs("dropbox_storage", "WARNING"):
                self.assertEqual(self.account.storage(**options).url("a b.txt"), "")

    def test_accounts_namespaces_members_and_roots_are_apart(self):
        self.account.tokens |= {"other-token"}
        self.account.put("/team/a b.txt")
        self.account.put("/root/a b.txt")
        links = {
            self.account.storage(**options).url("a b.txt")
            for options in (
                {},
                {"oauth2_access_token": "other-token"},
                {"namespace_id": "42"},
                {"team_member_id": "dbmid:1"},
                {"root_path": "/root"},
                {"shared_links": True},
            )
        }
        self.assertEqual(len(links), 6)

    def test_the_cache_holds_no_secret(self):
        self.storage.url("a b.txt")
        self.assertEqual(len(cache._cache), 1)
        (key,) = cache._cache
        self.assertNotIn("valid-token", key)
        self.assertRegex(key, "^:1:dropbox_storage:[0-9a-f]{64}$")

    def test_url_cache_timeout(self):
        for timeout in (0, None):
            storage = self.account.storage(url_cache_timeout=timeout)
            with unittest.mock.patch.object(LocMemCache, "set") as kept:
                self.assertNotEqual(storage.url("a b.txt"), storage.url("a b.txt"))
            kept.assert_not_called()
        storage = self.account.storage(url_cache_timeout=0.05)
        old = storage.url("a b.txt")
        time.sleep(0.1)
        self.assertNotEqual(storage.url("a b.txt"), old)

    def test_a_cache_that_is_down_costs_a_call_and_no_more(self):
        broken = {"default": {"BACKEND": f"{__name__}.BrokenCache"}}
        with override_settings(CACHES=broken):
            with self.assertLogs("dropbox_storage", "WARNING") as logs:
                self.leads_to(self.storage.url("a b.txt"), b"12345")
                self.save("b.txt", b"x")
        self.assertNotIn("cache.example", "".join(logs.output))
        self.assertEqual(self.account.calls["files/get_temporary_link"], 1)

    def test_a_cache_that_keeps_json(self):
        class JsonCache(LocMemCache):
            def set(self, key, value, *args, **kwargs):
                super().set(key, json.dumps(value), *args, **kwargs)

            def get(self, *args, **kwargs):
                return json.loads(super().get(*args, **kwargs) or "null")

        with unittest.mock.patch.object(module, "cache", JsonCache("json", {})):
            link = self.storage.url("a b.txt")
            self.assertEqual(self.storage.url("a b.txt"), link)

    def test_a_missing_file_has_no_link_and_one_warning(self):
        for options in ({}, {"shared_links": True}):
            storage = self.account.storage(**options)
            with self.assertLogs("dropbox_storage", "WARNING") as logs:
                self.assertEqual(storage.url("gone.jpg"), "")
            text = "No link to 'gone.jpg': it is not in '/'."
            self.assertEqual(logs.output, [f"WARNING:dropbox_storage:{text}"])

    def test_every_other_error_raises(self):
        self.account.fail("files/get_temporary_link", "invalid_token")
        with self.assertRaises(DropboxStorageException):
            self.storage.url("a b.txt")
        self.account.put("/dir/x")
        with self.assertRaises(IsADirectoryError):
            self.storage.url("dir")

    def test_base_url_needs_no_call(self):
        storage = DropboxStorage(base_url="/media")
        self.assertEqual(storage.base_url, "/media/")
        for name, url in {
            "a b.txt": "/media/a%20b.txt",
            "/dir\\\xe9.txt": "/media/dir/%C3%A9.txt",
            "": "/media/",
            None: "/media/",
        }.items():
            self.assertEqual(storage.url(name), url)

    def test_a_lazy_base_url_is_looked_up_when_it_is_used(self):
        base_url = urls.reverse_lazy("media", args=[""])
        storage = DropboxStorage("secret", base_url=base_url)
        with override_settings(ROOT_URLCONF=()), self.assertRaises(urls.NoReverseMatch):
            storage.url("a b.txt")
        pattern = urls.re_path("^media/(.*)$", module.serve, name="media")
        with override_settings(ROOT_URLCONF=(pattern,)):
            self.assertEqual(storage.url("a b.txt"), "/media/a%20b.txt")

    def test_shared_links(self):
        storage = self.account.storage(shared_links=True)
        with self.account.counting() as calls:
            link = storage.url("a b.txt")
            self.assertEqual(storage.url("a b.txt"), link)
        self.assertRegex(
            link, r"^https://www.dropbox.com/scl/fi/\w+/a b.txt\?rlkey=\w+&raw=1$"
        )
        self.assertEqual(calls, {"sharing/create_shared_link_with_settings": 1})
        cache.clear()
        self.assertEqual(storage.url("a b.txt"), link)
        self.assertEqual(self.account.calls["sharing/list_shared_links"], 1)

    def test_the_shared_link_of_a_folder_is_none_of_the_files_in_it(self):
        self.account.put("/dir/a.txt", b"12345")
        self.account.shared |= {"/dir", "/dir/a.txt"}
        link = self.account.storage(shared_links=True).url("dir/a.txt")
        self.assertIn("/a.txt?", link)

    def test_sharing_that_is_off_is_explained(self):
        storage = self.account.storage(shared_links=True)
        for fault, hint in {
            "/access_denied": "sharing is off for the account; use base_url",
            "/settings_error/not_authorized": "public links are off for the account",
            "/email_not_verified": "verify the account's e-mail address",
            "missing_scope": "tick it under Permissions in the App Console",
        }.items():
            self.account.fail("sharing/create_shared_link_with_settings", fault)
            with self.assertRaisesRegex(DropboxStorageException, hint):
                storage.url("a b.txt")
            self.account.faults.clear()

    def test_a_link_that_is_made_while_the_file_is_replaced_is_not_kept(self):
        storage = self.account.storage(write_mode="overwrite")

        class Replacing(FakeAccount):
            def files_get_temporary_link(self, argument, body):
                result = super().files_get_temporary_link(argument, body)
                if self.changes[-1]["size"] == 5:
                    storage.save("A b.txt", ContentFile(b"new"))
                return result

        self.account = Replacing()
        self.account.put("/a b.txt", b"12345")
        self.account.connect(storage)
        self.leads_to(storage.url("a b.txt"), b"12345")
        self.leads_to(storage.url("a b.txt"), b"new")
        self.assertEqual(storage.url("a b.txt"), storage.url("a b.txt"))

    def test_own_clients_with_other_headers_have_other_links(self):
        links = set()
        for headers in (None, {"Dropbox-API-Path-Root": '{"namespace_id": "42"}'}):
            storage = DropboxStorage()
            storage.client = FakeDropbox(self.account)
            storage.client._headers = headers
            self.account.put("/team/a b.txt", b"theirs")
            links.add(storage.url("a b.txt"))
        self.assertEqual(len(links), 2)


class BrokenCache(BaseCache):
    def __init__(self, *args):
        super().__init__({})

    def get(self, *args, **kwargs):
        raise ConnectionError("redis://user:password@cache.example is down")

    set = delete_many = get


# The door to Dropbox


class DoorTests(StorageTestCase):
    def test_what_lasts_is_reported_with_how_long_it_was_tried(self):
        for fault in ("503", "429", "reset", "html"):
            self.account.fail("files/get_metadata", fault, times=99)
            with self.account.counting() as calls:
                with self.assertRaisesRegex(
                    DropboxStorageException,
                    r"files/get_metadata of '/a' failed \(6 attempts, 0 s\): ",
                ):
                    self.storage.exists("a")
            self.assertEqual(calls["files/get_metadata"], self.storage.MAX_ATTEMPTS)
            self.account.faults.clear()

    def test_permanent_failures_are_not_repeated_without_a_pause_either(self):
        self.storage.FIRST_WAIT = 0
        self.account.fail("files/get_metadata", "missing_scope", times=9)
        with self.assertRaises(DropboxStorageException):
            self.storage.exists("a")
        self.assertEqual(self.account.calls["files/get_metadata"], 1)

    def test_a_wait_that_is_too_long_is_not_begun(self):
        self.account.fail("files/get_metadata", "429", value=300)
        begun = time.monotonic()
        with self.assertRaisesRegex(
            DropboxStorageException,
            r"failed \(Dropbox asks to wait 300 s, max_wait is 60\): "
            "too_many_requests",
        ):
            self.storage.exists("a")
        self.assertLess(time.monotonic() - begun, 5)

    def test_retry_after_is_honoured(self):
        for fault in ("429", "429_text", "too_many_writes"):
            self.account.fail("files/get_metadata", fault, value=1)
            begun = time.monotonic()
            self.assertFalse(self.storage.exists("a"))
            self.assertGreaterEqual(time.monotonic() - begun, 1)
            self.account.faults.clear()

    def log(self, act, level="INFO"):
        """What is logged while act() succeeds or fails, with its numbers as N."""
        with self.assertLogs("dropbox_storage", level) as logs:
            with contextlib.suppress(DropboxStorageException):
                act()
        return [re.sub(r"\d+\.\d+", "N", line) for line in logs.output]

    def test_each_repeat_is_a_line_in_the_log(self):
        for fault, reason in {
            "503": "HTTP 503",
            "429": "too_many_requests",
            "reset": "ConnectionError",
            "stall": "ReadTimeout",
            "html": "HTTP 502",
            "garbage": "AssertionError",
        }.items():
            self.account.fail("files/get_metadata", fault, times=3)
            start = f"dropbox_storage:files/get_metadata of '/a': {reason} at attempt"
            lines = self.log(lambda: self.storage.exists("a"))
            self.assertEqual(
                lines,
                [
                    f"INFO:{start} 1 of 6; the next in N s.",
                    f"WARNING:{start} 2 of 6; the next in N s.",
                    f"WARNING:{start} 3 of 6; the next in N s.",
                ],
            )
            self.account.faults.clear()
        self.account.put("/a", bytes(MiB))
        self.account.fail("files/download", "truncate")
        lines = self.log(lambda: self.storage.open("a").read())
        self.assertRegex(lines[0], "INFO:.*files/download of '/a': .* attempt 1 of 6")

    def test_a_call_that_gives_up_is_a_warning(self):
        self.account.fail("files/get_metadata", "503", times=99)
        lines = self.log(lambda: self.storage.exists("a"), "WARNING")
        self.assertEqual(len(lines), 5)
        said = "files/get_metadata of '/a': HTTP 503 at attempt 6 of 6; given up after N s."
        self.assertEqual(lines[-1], f"WARNING:dropbox_storage:{said}")

    def test_each_call_is_a_line_for_debugging_with_its_time(self):
        self.account.put("/huge", HUGE)
        storage = self.account.storage(**{"oauth2_access_token": None}, **REFRESHING)
        debug = "DEBUG:dropbox_storage:"
        lines = self.log(lambda: storage.exists("b"), "DEBUG")
        self.assertEqual(
            lines,
            [
                f"{debug}files/get_metadata of '/b': /oauth2/token, HTTP 200 in N s.",
                f"{debug}files/get_metadata of '/b': /2/files/get_metadata, HTTP 409 in N s.",
            ],
        )
        with self.account.counting() as calls:
            lines = self.log(lambda: storage.open("huge").read(), "DEBUG")
        self.assertEqual(
            lines[0],
            f"{debug}files/download of '/huge': /2/files/download, HTTP 200 in N s.",
        )
        self.assertEqual(len(lines), calls["files/download"])

    def test_what_is_refused_at_once_is_no_warning(self):
        self.account.fail("files/get_metadata", "missing_scope")
        lines = self.log(lambda: self.storage.exists("a"), "DEBUG")
        self.assertEqual(len(lines), 1)

    def test_max_wait_bounds_a_call(self):
        self.account.fail("files/get_metadata", "503", times=999)
        for max_wait, attempts in ((0, 1), (0.05, 3), (None, 6), (60, 6)):
            storage = self.account.storage(max_wait=max_wait)
            storage.FIRST_WAIT = 0.02
            begun = time.monotonic()
            with self.account.counting() as calls:
                with self.assertRaises(DropboxStorageException) as caught:
                    storage.exists("a")
            if max_wait != 0.05:
                self.assertEqual(calls["files/get_metadata"], attempts)
            self.assertLess(time.monotonic() - begun, 0.3 if max_wait == 0.05 else 2)
            self.assertNotIn("1 attempts", str(caught.exception))
            self.assertNotIn("asks", str(caught.exception))
        storage = self.account.storage(max_wait=0)
        storage.FIRST_WAIT = 0
        with self.assertRaisesRegex(DropboxStorageException, r"\(1 attempt, 0 s\)"):
            storage.exists("a")
        self.account.faults.clear()
        self.account.fail("files/get_metadata", "429", value=1)
        storage = self.account.storage(max_wait=0.5)
        with self.assertRaisesRegex(
            DropboxStorageException, r"\(Dropbox asks to wait 1 s, max_wait is 0.5\)"
        ):
            storage.exists("a")

    def test_an_expired_token_is_no_wait(self):
        storage = self.account.storage(
            **{"oauth2_access_token": None}, **REFRESHING, max_wait=0
        )
        storage.exists("a")
        self.account.expire_tokens()
        self.assertFalse(storage.exists("a"))

    def test_the_pauses_grow_and_are_random(self):
        pauses = []
        storage = self.account.connect(DropboxStorage("valid-token"))
        self.account.fail("files/get_metadata", "503", times=999)
        with unittest.mock.patch.object(time, "sleep", pauses.append):
            for _ in range(20):
                with self.assertRaises(DropboxStorageException):
                    storage.exists("a")
        for attempt, most in enumerate((0.5, 1, 2, 4, 8)):
            found = pauses[attempt::5]
            self.assertEqual(len({*found}), 20)
            self.assertTrue(all(most / 2 <= pause <= most for pause in found), found)

    def test_attempts_are_counted_in_words(self):
        self.account.fail("files/get_metadata", "503", times=999)
        for attempts, words in ((1, "1 attempt,"), (2, "2 attempts,")):
            self.storage.MAX_ATTEMPTS = attempts
            with self.assertRaisesRegex(DropboxStorageException, words):
                self.storage.exists("a")


class TokenTests(StorageTestCase):
    def setUp(self):
        super().setUp()
        self.storage = self.account.storage(oauth2_access_token=None, **REFRESHING)

    def test_threads_refresh_once(self):
        for _ in range(2):
            with self.account.counting() as calls, ThreadPoolExecutor(8) as pool:
                for saved in pool.map(self.save, map(str, range(8))):
                    self.assertTrue(saved)
            self.assertEqual(calls["oauth2/token"], 1)
            self.account.expire_tokens()

    def test_a_token_that_expires_in_the_middle_is_refreshed_once(self):
        self.account.fail(
            "files/upload_session/append_v2", "expired_token", nth=2, times=2
        )
        data = random.Random(5).randbytes(30 * MiB)
        self.save("a", data)
        self.assertTrue(self.account.files()["/a"] == data)
        self.account.expire_tokens()
        with self.account.counting() as calls, self.storage.open("a") as file:
            self.assertTrue(file.read() == data)
        self.assertEqual(calls["oauth2/token"], 1)

    def test_faults_of_the_token_endpoint_are_survived(self):
        for fault in ("500", "503", "429", "429_text", "reset", "stall", "tls", "html"):
            with self.subTest(fault):
                storage = copy.deepcopy(self.storage)
                self.account.connect(storage)
                self.account.fail("oauth2/token", fault, times=3)
                self.assertFalse(storage.exists("a"))
                self.account.faults.clear()

    def test_a_token_that_expires_while_none_can_be_had(self):
        self.storage.exists("a")
        self.account.expire_tokens()
        self.account.fail("oauth2/token", "503", times=3)
        with self.account.counting() as calls:
            self.assertFalse(self.storage.exists("a"))
        self.assertEqual(calls, {"files/get_metadata": 2, "oauth2/token": 4})

    def test_a_token_that_hardly_lives_is_refreshed_once_a_call(self):
        self.account.expires_in = 60
        for _ in range(2):
            with self.account.counting() as calls:
                self.storage.exists("a")
            self.assertEqual(calls["oauth2/token"], 1)

    def test_what_cannot_be_refreshed_says_why(self):
        for options, reason in {
            (
                "oauth2_refresh_token",
                "revoked",
            ): "invalid_access_token (oauth2_refresh_token is wrong, revoked or of another app)",
            ("app_secret", "wrong"): "invalid_client",
        }.items():
            storage = DropboxStorage(**{**REFRESHING, **dict([options])})
            with self.assertRaisesRegex(DropboxStorageException, re.escape(reason)):
                self.account.connect(storage).exists("a")

    def test_a_short_lived_token_warns_once_and_its_expiry_is_explained(self):
        self.account.tokens.add("sl.short")
        advice = "'sl.' tokens live four hours; set oauth2_refresh_token"
        storage = DropboxStorage("sl.short")
        with self.assertLogs("dropbox_storage", "WARNING") as logs:
            self.account.connect(storage)
            storage.exists("a")
            storage.exists("a")
        output = [f"WARNING:dropbox_storage:oauth2_access_token: {advice}."]
        self.assertEqual(logs.output, output)
        self.account.expire_tokens()
        with self.raises(
            DropboxStorageException,
            f"files/get_metadata of '/a' failed: expired_access_token ({advice}).",
        ):
            storage.exists("a")

    def test_an_own_clients_token_is_refreshed_by_the_same_policy(self):
        """The SDK would repeat each attempt up to four times, with pauses of its own."""
        self.storage.client = FakeDropbox(self.account)
        self.storage.client._oauth2_refresh_token = "valid-refresh-token"
        self.storage.client._app_key = "app-key"
        self.storage.client._app_secret = "app-secret"
        self.account.fail("oauth2/token", "503", times=99)
        with self.account.counting() as calls:
            with self.assertRaisesRegex(DropboxStorageException, "6 attempts"):
                self.storage.exists("a")
        self.assertEqual(calls, {"oauth2/token": 6})
        self.account.faults.clear()
        with self.account.counting() as calls:
            for _ in range(3):
                self.assertFalse(self.storage.exists("a"))
        self.assertEqual(calls["oauth2/token"], 1)


class FaultTests(StorageTestCase):
    """One operation, one fault: at each of its routes, first and later, once and more."""

    def run_one(self, operation, *faults):
        """The account afterwards, the result or the exception, and the calls."""
        options, act = OPERATIONS[operation]
        cache.clear()
        account = FakeAccount(page_size=2)
        account.put("/a", b"old")
        account.put("/huge", HUGE)
        for i in range(5):
            account.put(f"/dir/{i}")
        for entry in account.entries.values():
            entry.modified = "2024-07-01T12:00:00Z"
        storage = account.storage(
            **REFRESHING, **{"oauth2_access_token": None}, **options
        )
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

    def cells(self, operation):
        account, result, clean = self.run_one(operation)
        self.assertNotIsInstance(result, Exception)
        for route, count in clean.items():
            for nth in (1, count)[:count]:
                yield account, result, clean, route, nth

    def test_what_passes_is_survived(self):
        for operation in OPERATIONS:
            for expected, result, clean, route, nth in self.cells(operation):
                faults = [*TRANSIENT, BUSY.get(route)]
                if route.startswith("files/upload"):
                    faults.append("corrupt")
                if route == "files/download":
                    faults += ["truncate", "short"]
                for fault, times in itertools.product(filter(None, faults), (1, 3)):
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

    def test_what_does_not_pass_is_reported_at_once(self):
        for operation in OPERATIONS:
            for _, _, clean, route, nth in self.cells(operation):
                for fault in (*PERMANENT, *REFUSALS.get(route, ())):
                    if route == "oauth2/token" and fault == "/brand_new":
                        continue  # no route of the API, with no errors of its own
                    with self.subTest(f"{operation}: {route} {nth} {fault}"):
                        account, found, calls = self.run_one(
                            operation, (route, fault, nth, 999)
                        )
                        self.assertIsInstance(found, DropboxStorageException)
                        self.assertNotIn("attempts", str(found))
                        self.assertLessEqual(calls[route], clean[route] + 1)
                        self.assertEqual(account.files()["/a"], b"old")
                        self.assertNotIn("/new", account.files())

    def test_what_lasts_is_reported_with_nothing_lost(self):
        for operation in OPERATIONS:
            for _, _, _, route, nth in self.cells(operation):
                for fault in ("503", "429", "reset", "stall"):
                    with self.subTest(f"{operation}: {route} {nth} {fault}"):
                        account, found, calls = self.run_one(
                            operation, (route, fault, nth, 999)
                        )
                        self.assertIsInstance(found, DropboxStorageException)
                        self.assertIn("6 attempts", str(found))
                        self.assertEqual(account.files()["/a"], b"old")
                        self.assertNotIn("/new", account.files())

    def test_wrong_bytes_are_never_taken_for_the_file(self):
        for operation in ("read", "read huge"):
            for _, _, _, route, nth in self.cells(operation):
                if route == "files/download":
                    found = self.run_one(operation, (route, "corrupt", nth))[1]
                    self.assertIsInstance(found, DropboxStorageException)
                    self.assertEqual(found.reason, "content_hash_mismatch")

    def test_a_commit_whose_answer_does_not_fit_is_found(self):
        for operation, route in (
            ("save", "files/upload"),
            ("save large", "files/upload_session/finish"),
        ):
            expected = self.run_one(operation)[0]
            account, found, calls = self.run_one(operation, (route, "misfit_after"))
            self.assertEqual(found, "new")
            self.same(operation, account, expected)
            self.assertEqual(calls[route], 1)

    def test_a_lost_commit_that_failed_is_not_taken_for_done(self):
        """The answer is lost, and then someone else's file is what is found."""
        for size in (5, len(LARGE)):
            account = FakeAccount()
            storage = account.storage(write_mode="update")
            account.put("/a", b"old")
            account.fail("files/upload", "reset")
            account.fail("files/upload_session/finish", "reset")
            content = Unsized(LARGE[:size])
            once = content.chunks

            def chunks(once=once, account=account):
                yield from once()
                account.put("/a", b"theirs")

            content.chunks = chunks
            with self.assertRaises(DropboxStorageException):
                storage.save("a", content)
            self.assertEqual(account.files(), {"/a": b"theirs"})

    def test_a_chunk_that_is_lost_and_then_refused_has_not_arrived(self):
        append = "files/upload_session/append_v2"
        self.account.fail(append, "503")
        self.account.fail(append, "session_lost")
        self.storage.CONNECTIONS = 1
        with self.assertRaisesRegex(DropboxStorageException, f"^{append} of") as caught:
            self.save("a", HUGE)
        self.assertEqual(caught.exception.reason, "not_found")
        self.assertEqual(self.account.files(), {})

    def test_no_thread_is_left_behind(self):
        threads = threading.active_count()
        for operation in ("save large", "read huge"):
            for _, _, _, route, nth in self.cells(operation):
                for fault in ("missing_scope", "503"):
                    self.run_one(operation, (route, fault, nth, 999))
        self.ends_with_threads(threads)

    def test_what_is_not_dropboxs_passes_through_at_once(self):
        """As the time limits of task queues, which a signal raises: plain Exceptions."""

        class TimeLimit(Exception):
            pass

        def interrupt(error):
            raise error

        for operation in OPERATIONS:
            for _, _, clean, route, nth in self.cells(operation):
                for error in (TimeLimit("of the queue"), TypeError("a bug")):
                    with self.subTest(f"{operation}: {route} {nth} {error}"):
                        fault = (route, functools.partial(interrupt, error), nth, 999)
                        account, found, calls = self.run_one(operation, fault)
                        self.assertIs(found, error)
                        self.assertLessEqual(calls[route], clean[route])
                        self.assertEqual(account.files()["/a"], b"old")


# DropboxFile


class FileTests(StorageTestCase):
    def setUp(self):
        super().setUp()
        self.account.put("/a.txt", b"one\ntw\xc3\xb6\r\nthree")
        self.big = random.Random(3).randbytes(20 * MiB + 5)

    def test_a_file_reads_like_a_local_one(self):
        with self.account.counting() as calls, self.storage.open("a.txt") as file:
            self.assertEqual(file.name, "a.txt")
            self.assertEqual(file.mode, "rb")
            self.assertEqual((file.size, len(file), bool(file)), (15, 15, True))
            self.assertEqual(repr(file), "<DropboxFile: a.txt>")
            self.assertFalse(file.closed)
            self.assertTrue(file.readable() and file.seekable())
            self.assertFalse(file.writable())
            self.assertEqual(file.read(2), b"on")
            self.assertEqual(file.tell(), 2)
            self.assertEqual(file.readline(), b"e\n")
            self.assertEqual(file.seek(-5, io.SEEK_END), 10)
            self.assertEqual(file.read(), b"three")
            self.assertEqual(file.read(), b"")
            self.assertEqual([*file.chunks(4)][-1], b"ree")
            file.seek(0)
            self.assertEqual(file.readlines()[0], b"one\n")
            self.assertEqual([*file][1], b"tw\xc3\xb6\r\n")
            file.seek(100)
            self.assertEqual(file.read(), b"")
            with self.assertRaises(OSError) as caught:
                file.seek(-1)
            self.assertEqual(caught.exception.errno, errno.EINVAL)
            self.assertEqual(file.tell(), 100)
            with self.assertRaises(io.UnsupportedOperation):
                file.write(b"x")
        self.assertTrue(file.closed)
        self.assertEqual(calls, {"files/download": 1})

    def test_text_is_utf_8(self):
        with self.storage.open("a.txt", "r") as file:
            self.assertEqual(file.read(), "one\ntw\xf6\nthree")
        with self.storage.open("new.txt", "w") as file:
            file.write("tw\xf6\n")
        self.assertEqual(self.account.files()["/new.txt"], b"tw\xc3\xb6\n")

    def test_other_modes_are_refused(self):
        for mode in ("a", "ab", "r+", "rb+", "w+b", "rt", "br", "", "U"):
            message = f"mode must be r, rb, w, wb, x or xb: {mode!r}."
            with self.raises(ValueError, message):
                self.storage.open("a.txt", mode)

    def test_open_itself_reports_what_cannot_be_opened(self):
        self.account.put("/dir/b")
        for mode in ("r", "rb"):
            with self.assertRaises(FileNotFoundError):
                self.storage.open("missing", mode)
            with self.assertRaises(IsADirectoryError):
                self.storage.open("dir", mode)
        for mode in ("x", "xb"):
            with self.assertRaises(FileExistsError):
                self.storage.open("a.txt", mode)

    def test_a_file_can_be_opened_again(self):
        file = self.storage.open("a.txt")
        self.assertEqual(file.read(3), b"one")
        with self.account.counting() as calls:
            self.assertIs(file.open(), file)
            self.assertEqual(file.read(3), b"one")
        self.assertFalse(calls)
        file.close()
        with self.assertRaises(ValueError):
            file.read()
        self.assertEqual(file.open().read(3), b"one")
        self.assertEqual(file.open("r").read(3), "one")
        with file.open("wb"):
            file.write(b"new")
        self.assertEqual(self.account.files()["/a.txt"], b"new")
        self.assertEqual(file.open("rb").read(), b"new")

    def test_one_version_of_a_file_per_open(self):
        self.account.put("/big", self.big)
        for first in (5, 3 * MiB):
            with self.storage.open("big") as file:
                head = file.read(first)
                self.account.put("/big", b"new")
                self.assertEqual(file.size, len(self.big))
                self.assertTrue(head + file.read() == self.big)
            self.account.put("/big", self.big)

    def test_seeking_anywhere_in_a_large_file(self):
        self.account.put("/big", self.big)
        rand = random.Random(4)
        with self.storage.open("big") as file:
            for _ in range(50):
                start, size = rand.randrange(len(self.big)), rand.randrange(MiB)
                file.seek(start)
                self.assertTrue(file.read(size) == self.big[start : start + size])
            file.seek(0)
            self.assertTrue(file.read() == self.big)

    def test_reading_on_is_fetched_ahead_on_several_connections(self):
        self.account.put("/big", self.big)
        with self.account.counting() as calls, self.storage.open("big") as file:
            self.assertTrue(b"".join(file.chunks()) == self.big)
        self.assertLessEqual(self.account.most_in_flight, self.storage.CONNECTIONS)
        self.assertGreater(calls["files/download"], 5)
        together = threading.Barrier(self.storage.CONNECTIONS)
        first = iter(range(together.parties))

        class Body(io.BytesIO):
            def __init__(self, data):
                super().__init__(data)
                if next(first, None) is not None:
                    together.wait(5)

        with self.storage.open("big") as file:
            self.account.body = Body
            self.assertTrue(file.read() == self.big)
        self.assertFalse(together.broken)
        self.account.body = io.BytesIO
        self.account.put("/small", self.big[: 8 * MiB])
        with self.account.counting() as calls, self.storage.open("small") as file:
            self.assertTrue(file.read() == self.big[: 8 * MiB])
        self.assertEqual(calls, {"files/download": 1})

    def test_writing_becomes_visible_when_closed_and_not_before(self):
        for mode in ("w", "wb"):
            text = "b" not in mode
            self.account.put("/a.txt", b"old")
            file = self.storage.open("a.txt", mode)
            self.assertEqual(file.write("new" if text else b"new"), 3)
            self.assertEqual(self.account.files(), {"/a.txt": b"old"})
            file.close()
            file.close()
            self.assertTrue(file.closed)
            with self.assertRaises(ValueError):
                file.write("late" if text else b"late")
            self.assertEqual(self.account.files(), {"/a.txt": b"new"})

    def test_an_exception_in_the_block_drops_what_was_written(self):
        for mode in ("w", "wb", "x", "xb"):
            name = "a.txt" if "w" in mode else "b.txt"
            before = self.account.files()
            with self.assertRaises(ZeroDivisionError):
                with self.storage.open(name, mode) as file:
                    file.write("half" if "b" not in mode else b"half")
                    raise ZeroDivisionError
            self.assertTrue(file.closed)
            file = self.storage.open(name, mode)  # and is never closed
            file.write("half" if "b" not in mode else b"half")
            del file
            gc.collect()
            self.assertEqual(self.account.files(), before)

    def test_writing_nothing_makes_an_empty_file(self):
        self.storage.open("empty", "wb").close()
        self.assertEqual(self.account.files()["/empty"], b"")

    def test_writing_much_goes_up_in_chunks(self):
        with self.storage.open("big", "wb") as file:
            for start in range(0, len(self.big), 100_000):
                file.write(self.big[start : start + 100_000])
            self.assertEqual(file.size, len(self.big))
        self.assertTrue(self.account.files()["/big"] == self.big)
        self.assertEqual(self.account.calls["files/upload_session/finish"], 1)

    def test_exclusive_creation_holds_until_it_is_closed(self):
        with self.assertRaises(FileExistsError), self.storage.open("new", "xb") as file:
            file.write(b"mine")
            self.account.put("/new", b"theirs")
        self.assertEqual(self.account.files()["/new"], b"theirs")
        with self.storage.open("free", "x") as file:
            file.write("mine")
        self.assertEqual(self.account.files()["/free"], b"mine")

    def test_update_mode_holds_for_open_too(self):
        storage = self.account.storage(write_mode="update")
        with self.assertRaises(DropboxStorageException):
            with storage.open("a.txt", "wb") as file:
                file.write(b"mine")
                self.account.put("/a.txt", b"theirs")
        self.assertEqual(self.account.files(), {"/a.txt": b"theirs"})

    def test_a_zip_is_read_from_its_directory(self):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("large", self.big)
            archive.writestr("small.txt", b"found")
        self.account.put("/a.zip", packed.getvalue())
        with self.storage.open("a.zip") as file, zipfile.ZipFile(file) as archive:
            self.assertEqual(archive.namelist(), ["large", "small.txt"])
            self.assertEqual(archive.read("small.txt"), b"found")
            self.assertTrue(archive.read("large") == self.big)
        with (
            self.storage.open("b.zip", "wb") as file,
            zipfile.ZipFile(file, "w") as made,
        ):
            made.writestr("small.txt", b"found")
        with self.storage.open("b.zip") as file, zipfile.ZipFile(file) as archive:
            self.assertEqual(archive.read("small.txt"), b"found")

    @unittest.skipIf(django.VERSION < (4, 0), "Django 3.2 has no length for such files")
    def test_a_file_response_knows_its_length_without_another_call(self):
        with self.account.counting() as calls:
            response = FileResponse(self.storage.open("a.txt"))
            self.assertEqual(response["Content-Length"], "15")
            content = b"".join(response.streaming_content)
            response.close()
        self.assertEqual(content, b"one\ntw\xc3\xb6\r\nthree")
        self.assertEqual(calls, {"files/download": 1})

    def test_no_reply_is_left_open(self):
        replies = []  # kept, so that none is closed only by being forgotten

        class Recording(FakeAccount):
            def send(self, *args, **kwargs):
                replies.append(super().send(*args, **kwargs))
                return replies[-1]

        account = Recording()
        storage = account.storage()
        account.put("/big", self.big)
        account.fail("files/download", "truncate", times=2)
        with storage.open("big") as file:
            self.assertTrue(file.read() == self.big)
        threads = threading.active_count()
        for size in (5 * MiB, 5):
            with storage.open("big") as file:
                file.read(size)
            self.ends_with_threads(threads)
        files = [reply for reply in replies if "dropbox-api-result" in reply.headers]
        self.assertGreater(len(files), 5)
        self.assertTrue(all(reply.raw.closed for reply in files))

    def test_the_blocks_fetched_ahead_do_not_overlap(self):
        self.account.put("/big", self.big)
        begun = self.account.bytes_out
        with self.storage.open("big") as file:
            file.seek(1)
            self.assertTrue(file.read() == self.big[1:])
        whole = len(self.big)  # the reply to the opening, of which nothing was read
        self.assertEqual(self.account.bytes_out - begun, whole + len(self.big[1:]))

    def test_parts_that_do_not_end_where_the_blocks_begin(self):
        self.account.put("/big", self.big)
        with unittest.mock.patch.object(module, "READ_SIZE", 100_003):
            with self.storage.open("big") as file:
                self.assertTrue(file.read() == self.big)

    def test_closing_does_not_wait_for_what_is_fetched_ahead(self):
        class Slow(io.BytesIO):
            def read(self, *args):
                time.sleep(0.05)
                return super().read(*args)

        self.account.put("/big", self.big)
        for leave in ("close", "seek"):
            self.account.body = io.BytesIO
            file = self.storage.open("big")
            file.read(2 * MiB)
            self.account.body = Slow
            file.read(5 * MiB // 2)  # with the second block comes a seventh
            begun = time.monotonic()
            if leave == "close":
                file.close()
            else:
                file.seek(0)
                self.assertEqual(file.read(9), self.big[:9])
            self.assertLess(time.monotonic() - begun, 0.5)
            file.close()

    def test_a_reply_from_elsewhere_in_the_file_is_refused(self):
        class Rangeless(FakeAccount):
            def send_file(self, metadata, data, request, fault):
                request.headers.pop("Range", None)
                return super().send_file(metadata, data, request, fault)

        account = Rangeless()
        account.put("/a", b"0123456789" * MiB)
        with account.storage().open("a") as file:
            file.seek(5 * MiB)
            with self.assertRaisesRegex(
                DropboxStorageException, "asked for bytes from"
            ):
                file.read(10)

    def test_no_thread_or_connection_is_left_behind(self):
        self.account.put("/big", self.big)
        threads = threading.active_count()
        with self.storage.open("big") as file:
            file.read(5 * MiB)
        with self.storage.open("big", "wb") as file:
            file.write(self.big)
        with self.assertRaises(ZeroDivisionError):
            self.storage.save("new", Broken(self.big))
        self.ends_with_threads(threads)

    def test_a_reader_goes_on_after_an_error_only_from_where_it_seeks_to(self):
        """The buffer has lost what it held: reading on would skip that unseen."""
        self.account.put("/big", b"0123456789abcde\n" * MiB)
        self.storage.MAX_ATTEMPTS = 1
        stopped = "Reading '/big' has failed before; seek() to where to go on."
        for mode in ("rb", "r"):
            expected = "0123456789abcde\n" if mode == "r" else b"0123456789abcde\n"
            with self.storage.open("big", mode) as file:
                file.read(5)
                self.account.fail("files/download", "truncate", nth=2)
                with self.assertRaises(DropboxStorageException):
                    file.read()
                self.account.faults.clear()
                if mode == "r":  # the text that was decoded before is not lost
                    self.assertEqual(file.readline(), expected[5:])
                for go_on in (file.read, file.tell, lambda: file.read(9 * MiB)):
                    with self.raises(DropboxStorageException, stopped):
                        go_on()
                with self.assertRaises(
                    (DropboxStorageException, io.UnsupportedOperation)
                ):
                    file.seek(0, io.SEEK_CUR)
                self.assertEqual(file.seek(16), 16)
                self.assertEqual(file.read(16), expected)
                self.assertEqual(file.seek(0), 0)
                self.assertTrue(file.read() == expected * MiB)

    def test_an_interrupted_read_does_not_skip_either(self):
        class Interrupted(io.BytesIO):
            def read(self, *args):
                if self.tell() > 5 * READ_SIZE:
                    raise KeyboardInterrupt
                return super().read(*args)

        self.account.put("/big", self.big)
        self.account.body = Interrupted
        with self.storage.open("big") as file:
            with self.assertRaises(KeyboardInterrupt):
                file.read()
            self.account.body = io.BytesIO
            with self.assertRaises(DropboxStorageException):
                file.read()
            file.seek(3)
            self.assertTrue(file.read() == self.big[3:])

    def test_an_exception_around_a_field_file_drops_what_was_written(self):
        """A FieldFile's with block calls close() and says nothing of the exception."""
        field = models.FileField(storage=self.storage)
        for mode, half in (("wb", b"half"), ("w", "half")):
            with self.assertLogs("dropbox_storage", "WARNING") as logs:
                with self.assertRaises(ZeroDivisionError):
                    with FieldFile(None, field, "a.txt").open(mode) as file:
                        file.write(half)
                        raise ZeroDivisionError
            self.assertEqual(
                self.account.files()["/a.txt"], b"one\ntw\xc3\xb6\r\nthree"
            )
            text = "'a.txt' is not saved: an exception came first."
            self.assertEqual(logs.output, [f"WARNING:dropbox_storage:{text}"])
        file = FieldFile(None, field, "a.txt").open("wb")
        file.write(b"half")
        with self.assertRaises(ZeroDivisionError):
            try:
                raise ZeroDivisionError
            finally:
                file.close()
        self.assertEqual(self.account.files()["/a.txt"], b"one\ntw\xc3\xb6\r\nthree")

    def test_writing_while_another_exception_is_handled(self):
        field = models.FileField(storage=self.storage)

        def write(content, file):
            with file:
                file.write(content)

        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            write(b"1", FieldFile(None, field, "a.txt").open("wb"))
            self.assertEqual(self.account.files()["/a.txt"], b"1")
            write(b"2", self.storage.open("a.txt", "wb"))
            self.assertEqual(self.account.files()["/a.txt"], b"2")
            later = self.storage.open("a.txt", "wb")
        later.write(b"3")
        later.close()
        self.assertEqual(self.account.files()["/a.txt"], b"3")
        earlier = self.storage.open("a.txt", "wb")
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            write(b"4", earlier)  # whose with block has seen no exception
        self.assertEqual(self.account.files()["/a.txt"], b"4")

    def test_an_exit_stack_that_ends_in_an_exception_drops_what_was_written(self):
        def fail():
            raise ZeroDivisionError

        with self.assertRaises(ZeroDivisionError), contextlib.ExitStack() as stack:
            stack.enter_context(self.storage.open("a.txt", "wb")).write(b"half")
            stack.callback(fail)
        self.assertEqual(self.account.files()["/a.txt"], b"one\ntw\xc3\xb6\r\nthree")

    def test_tell_while_writing(self):
        with self.storage.open("a.tar", "wb") as file:
            self.assertEqual(file.tell(), 0)
            with tarfile.open(fileobj=file, mode="w") as archive:
                archive.addfile(tarfile.TarInfo("empty"))
            self.assertEqual(file.tell(), file.size)
        with self.storage.open("a.tar") as file, tarfile.open(fileobj=file) as archive:
            self.assertEqual(archive.getnames(), ["empty"])

    def test_a_write_that_has_failed_is_never_committed(self):
        self.account.fail("files/upload_session/append_v2", "bad_input")
        file = self.storage.open("a.txt", "wb")
        for _ in range(2):
            with self.assertRaises(DropboxStorageException):
                for _ in range(2):
                    file.write(self.big)
        with self.assertRaises(DropboxStorageException):
            file.close()
        self.assertTrue(file.closed)
        self.assertEqual(self.account.files()["/a.txt"], b"one\ntw\xc3\xb6\r\nthree")

    def test_opening_in_another_mode_ends_the_one_before(self):
        file = self.storage.open("a.txt", "wb")
        file.write(b"written")
        self.assertEqual(file.open("rb").read(), b"written")
        self.assertEqual(file.open("wb").write(b"again"), 5)
        self.assertEqual(self.account.files()["/a.txt"], b"written")
        file.close()
        self.assertEqual(self.account.files()["/a.txt"], b"again")

    def test_opening_again_what_is_being_written_goes_on(self):
        with self.storage.open("a.txt", "wb") as file:
            file.write(b"one")
            file.open().write(b"two")
        self.assertEqual(self.account.files()["/a.txt"], b"onetwo")

    def test_text_that_is_dropped_is_not_sent_either(self):
        file = self.storage.open("a.txt", "w")
        file.write("x" * 2 * self.storage.CHUNK_SIZE)
        with self.account.counting() as calls:
            with self.assertRaises(ZeroDivisionError), file:
                file.write("more")
                raise ZeroDivisionError
        self.assertFalse(calls)

    def test_the_last_few_blocks_come_in_one_reply(self):
        self.account.put("/big", self.big)
        for start in (len(self.big) - 8 * MiB, len(self.big) - 1):
            with self.storage.open("big") as file, self.account.counting() as calls:
                file.seek(start)
                self.assertTrue(file.read() == self.big[start:])
            self.assertEqual(calls, {"files/download": 1})


# _Download and _Upload


class SinkAccount(FakeAccount):
    """Takes uploads without keeping them: all blocks are ZEROS."""

    def files_upload_session_append_v2(self, argument, body):
        time.sleep(0.01)  # so that those who do not wait pile up chunks
        with self.lock:
            self.bytes_kept = getattr(self, "bytes_kept", 0) + len(body)

    def files_upload_session_finish(self, argument, body):
        digests = hashlib.sha256(ZEROS).digest() * (self.bytes_kept // BLOCK)
        found = Entry("/big", b"", "0123456789", "2024-07-01T12:00:00Z").metadata()
        found["content_hash"] = hashlib.sha256(digests).hexdigest()
        return {**found, "size": self.bytes_kept}


ZEROS = bytes(BLOCK)


class MemoryTests(StorageTestCase):
    """However large a file is, it is never in memory as a whole."""

    limit = 48 * MiB

    def peak(self, act):
        tracemalloc.start()
        try:
            act()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def test_saving(self):
        account = SinkAccount()
        storage = account.storage()
        for chunk in (ZEROS, ZEROS[: 64 * 1024]):
            content = Unsized()
            content.chunks = lambda: itertools.repeat(chunk, 128 * MiB // len(chunk))
            account.bytes_kept = 0
            peak = self.peak(lambda: storage.save("big", content))
            self.assertEqual(account.bytes_kept, 128 * MiB)
            self.assertLess(peak, self.limit)
        one = ContentFile(ZEROS * 32)  # yields all its bytes at once
        account.bytes_kept = 0
        self.assertLess(self.peak(lambda: storage.save("big", one)), self.limit)

    def test_reading(self):
        self.account.put("/big", ZEROS * 32)

        def read():
            with self.storage.open("big") as file:
                self.assertEqual(sum(map(len, file.chunks())), 128 * MiB)

        self.assertLess(self.peak(read), self.limit)


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


def run_python(code, timeout=20):
    """What a process of its own prints: seconds it may take, 20 by default."""
    name = pathlib.Path(__file__).stem if __name__ == "__main__" else __name__
    folder = pathlib.Path(__file__).resolve().parents[name.count(".")]
    code = f"from {name} import *\n{code}"
    command = [sys.executable, "-c", code]
    names = os.environ.keys() - {"DJANGO_SETTINGS_MODULE"}
    done = subprocess.run(
        command,
        cwd=folder,
        env={name: os.environ[name] for name in names},
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


@unittest.skipUnless(hasattr(signal, "pthread_kill"), "needs POSIX's signals")
class LeavingTests(StorageTestCase):
    """Nobody waits for the requests of a stream that is gone."""

    def setUp(self):
        super().setUp()
        # A shell lets what it runs in the background ignore Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, before)

    @contextlib.contextmanager
    def at_once(self):
        begun = time.monotonic()
        yield
        self.assertLess(time.monotonic() - begun, 1)

    def reader(self, account):
        """A reader whose next blocks stall."""
        account.put("/big", HUGE)
        file = account.storage().open("big")
        file.read(5)
        account.stalling = ("files/download",)
        file.read(2 * MiB - 5)
        return file

    def writer(self, account):
        """A writer whose chunks stall."""
        file = account.storage().open("big", "wb")
        account.stalling = ("files/upload_session/append_v2",)
        file.write(HUGE)
        while account.waiting < 2:
            time.sleep(0.01)
        return file

    def test_an_exception_of_ones_own(self):
        account = StallingAccount()
        with self.at_once(), self.assertRaises(ZeroDivisionError):
            with self.writer(account):
                raise ZeroDivisionError
        with self.at_once(), self.assertRaises(ZeroDivisionError):
            account.storage().save("new", Broken(HUGE))

    def interrupted(self, act):
        """Ctrl-C while it waits."""
        main = threading.main_thread().ident
        timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        with self.at_once(), self.assertRaises(KeyboardInterrupt):
            act()
        timer.join()

    def test_an_interrupt_while_it_waits_for_a_block(self):
        account = StallingAccount()
        file = self.reader(account)
        self.interrupted(file.read)
        self.assertEqual(account.waiting, account.storage().CONNECTIONS)
        with self.at_once():
            file.close()

    def test_seeking_away_from_blocks_that_stall(self):
        account = StallingAccount()
        file = self.reader(account)
        self.interrupted(file.read)
        account.stalling = ()
        with self.at_once():
            file.seek(9 * MiB)
            self.assertEqual(file.read(9), HUGE[9 * MiB :][:9])
            file.close()

    def test_an_interrupt_while_it_waits_for_a_chunk(self):
        account = StallingAccount()
        file = self.writer(account)
        self.interrupted(lambda: file.write(HUGE * 2))
        with self.at_once(), self.assertRaises(ZeroDivisionError), file:
            raise ZeroDivisionError

    def test_retries_end_with_the_stream(self):
        self.account.put("/big", HUGE)
        self.storage.FIRST_WAIT, self.storage.MAX_ATTEMPTS = 1, 10
        threads = threading.active_count()
        file = self.storage.open("big")
        file.read(2 * MiB)
        self.account.fail("files/download", "503", times=999)
        self.interrupted(file.read)
        file.close()
        with self.at_once():
            self.ends_with_threads(threads)

    def test_a_stream_that_is_closed_meanwhile(self):
        self.account.put("/big", HUGE)
        stream = self.storage.open("big").file.raw
        stream.seek(9)
        self.account.fail("files/download", stream.close)
        with self.raises(
            DropboxStorageException, "files/download of '/big' was abandoned."
        ):
            stream.read(9)

    def test_a_reader_that_the_garbage_collector_closes(self):
        """In whatever thread, with whatever lock: as here that of the refresh."""

        class Collecting(FakeAccount):
            collecting = False

            def token(self, form):
                if self.collecting:
                    time.sleep(0.3)  # so that those who fetch ahead wait for the lock
                    gc.collect()
                return super().token(form)

        account = Collecting()
        account.put("/big", HUGE)
        storage = account.storage(**{"oauth2_access_token": None}, **REFRESHING)

        first = iter([0])

        class Slow(io.BytesIO):  # but for the first block
            def __init__(self, data):
                super().__init__(data)
                self.pause = next(first, 0.1)

            def read(self, *args):
                time.sleep(self.pause)
                return super().read(*args)

        def leave_open():
            field = models.FileField(storage=storage)
            file = FieldFile(None, field, "big").open()
            file.read(2 * MiB)
            account.body = Slow
            file.read(MiB)
            file.cycle = file

        gc.disable()
        self.addCleanup(gc.enable)
        leave_open()
        account.collecting = True
        account.fail("files/get_metadata", "expired_token")
        for name in ("a", "b"):
            thread = threading.Thread(target=storage.exists, args=name, daemon=True)
            thread.start()
            thread.join(5)
            self.assertFalse(thread.is_alive())

    def test_the_interpreter_exits(self):
        for stalls in ("reader", "writer"):
            code = f"""
account = StallingAccount()
file = LeavingTests().{stalls}(account)
act = (lambda: file.write(HUGE)) if file.writable() else file.read
threading.Thread(target=act, daemon=True).start()
while account.waiting < 2: time.sleep(0.01)
print("done")
"""
            with self.subTest(stalls):
                self.assertEqual(run_python(code), "done\n")

    def test_transfers_where_no_thread_can_be_started(self):
        full = RuntimeError("can't start new thread")
        with unittest.mock.patch.object(threading.Thread, "start", side_effect=full):
            self.save("big", HUGE)
            self.assertTrue(self.storage.open("big").read() == HUGE)

    def test_transfers_at_exit_and_in_a_thread_that_outlives_the_main_one(self):
        transfer = """
account = FakeAccount()
storage = account.storage()
def transfer():
    time.sleep(0.5)
    storage.save("big", ContentFile(HUGE))
    print(storage.open("big").read() == account.files()["/big"] == HUGE)
"""
        for begin in (
            "atexit.register(transfer)",
            "threading.Thread(target=transfer).start()",
        ):
            with self.subTest(begin):
                self.assertEqual(
                    run_python(f"{transfer}\nimport atexit\n{begin}"), "True\n"
                )


# serve


class ServeTests(StorageTestCase):
    def setUp(self):
        super().setUp()
        self.storage = self.account.storage(base_url="/media/")
        self.account.put("/dir/a b.jpg", b"12345")

    def get(self, path, method="GET", **options):
        request = RequestFactory().generic(method, "/media/")
        return module.serve(request, path, **{"storage": self.storage, **options})

    def test_it_redirects_to_a_cached_temporary_link(self):
        with self.account.counting() as calls:
            for method in ("GET", "HEAD"):
                response = self.get("dir/a b.jpg", method)
                self.assertEqual(response.status_code, 302)
                self.assertEqual(self.account.links[response["Location"]], b"12345")
        self.assertEqual(calls, {"files/get_temporary_link": 1})
        self.assertEqual(response["Cache-Control"], "private, max-age=3600")

    def test_a_browser_keeps_the_redirect_for_less_than_the_link_lives(self):
        self.storage.url_cache_timeout = 14400
        self.get("dir/a b.jpg")
        ages = []
        (key,) = (key.partition(":1:")[2] for key in cache._cache)
        link, made = cache.get(key)
        for age in (0, 7200, 14390):
            cache.set(key, (link, made - age))
            response = self.get("dir/a b.jpg")
            ages.append(int(response["Cache-Control"].partition("max-age=")[2]))
        for age, life in zip(ages, (14400, 7200, 10)):
            # A minute less; what is begun of a second, or the test takes, is lost.
            self.assertIn(age, {max(0, life - lost) for lost in (61, 62, 63)})
        for timeout in (0, None):
            self.storage.url_cache_timeout = timeout
            response = self.get("dir/a b.jpg")
            self.assertEqual(response["Cache-Control"], "private, max-age=0")

    def test_what_cannot_be_a_file_is_not_found(self):
        for path in (
            "gone.jpg",
            "dir",
            "",
            "../a",
            "/etc/passwd",
            "a\0b",
            "x" * 300,
            "dir/a b.jpg/x",
        ):
            with self.subTest(path), self.assertRaises(Http404):
                self.get(path)

    def test_other_methods_are_not_allowed(self):
        response = self.get("dir/a b.jpg", "POST")
        self.assertEqual((response.status_code, response["Allow"]), (405, "GET, HEAD"))

    def test_other_errors_are_not_hidden(self):
        self.account.fail("*", "invalid_token")
        with self.assertRaises(DropboxStorageException):
            self.get("dir/a b.jpg")

    def test_shared_links_and_base_url_together(self):
        self.storage.shared_links = True
        self.assertIn("/apitl/", self.get("dir/a b.jpg")["Location"])

    def browse(self, url, **storages):
        """What Django's test client gets from urlpatterns with these storages."""
        backend = f"{module.__name__}.DropboxStorage"
        options = {"oauth2_access_token": "valid-token", "base_url": "/files/"}
        files = {"BACKEND": backend, "OPTIONS": options}
        with override_settings(
            STORAGES={"default": {"BACKEND": backend}, "files": files},
            DROPBOX_OAUTH2_TOKEN="valid-token",
            ROOT_URLCONF=__name__,
            LOGIN_URL="/login/",
            ALLOWED_HOSTS=["testserver"],
            MIDDLEWARE=[f"{__name__}.nobody_is_logged_in"],
        ):
            self.account.connect(django_storage.default_storage)
            self.account.connect(django_storage.storages["files"])
            return self.client.get(url)

    @unittest.skipIf(django.VERSION < (4, 2), "aliases came with Django 4.2")
    def test_it_serves_the_default_storage_and_those_named_by_an_alias(self):
        for url in ("/default/dir/a%20b.jpg", "/files/dir/a%20b.jpg"):
            response = self.browse(url)
            self.assertEqual(self.account.links[response["Location"]], b"12345")
        self.assertEqual(self.browse("/files/gone").status_code, 404)

    @unittest.skipIf(django.VERSION < (4, 2), "aliases came with Django 4.2")
    def test_an_anonymous_visitor_is_sent_to_the_login(self):
        response = self.browse("/private/dir/a%20b.jpg")
        self.assertEqual(response["Location"], "/login/?next=/private/dir/a%2520b.jpg")
        self.assertEqual(self.account.calls["files/get_temporary_link"], 0)

    def test_a_page_and_a_form_link_the_file_without_a_call(self):
        field = models.FileField(storage=self.storage)
        file = FieldFile(None, field, "dir/a b.jpg")
        self.assertEqual(file.url, "/media/dir/a%20b.jpg")
        widget = ClearableFileInput().render("file", file)
        self.assertIn('<a href="/media/dir/a%20b.jpg">dir/a b.jpg</a>', widget)
        self.assertFalse(self.account.calls)

    def test_the_form_of_an_object_whose_file_is_gone_still_opens(self):
        field = models.FileField(storage=self.account.storage())
        with self.assertLogs("dropbox_storage", "WARNING"):
            widget = ClearableFileInput().render("file", FieldFile(None, field, "gone"))
        self.assertIn('<input type="file" name="file"', widget)

    @unittest.skipIf(django.VERSION >= (4, 2), "aliases came with Django 4.2")
    def test_an_alias_before_there_are_any_is_refused(self):
        with self.raises(
            ImproperlyConfigured,
            "Before Django 4.2 there is no alias 'private': pass serve() the storage itself.",
        ):
            self.get("a", storage="private")


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


# All together


class ManifestStorage(ManifestFilesMixin, DropboxStorage):
    """Reads its manifest when it is built: a test gives the class a client before."""

    base_url = "/static/"
    root_path = "/static"


class ManifestTests(StorageTestCase):
    @unittest.skipIf(django.VERSION < (4, 2), "STORAGES came with Django 4.2")
    def test_collectstatic_gives_hashed_names(self):
        backend = {"BACKEND": f"{__name__}.ManifestStorage"}
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "a.css").write_text("body { background: url(b.png) }")
            pathlib.Path(folder, "b.png").write_bytes(b"picture")
            with override_settings(
                INSTALLED_APPS=["django.contrib.staticfiles"],
                STATIC_URL="/static/",
                STATICFILES_DIRS=[folder],
                STORAGES={"default": backend, "staticfiles": backend},
            ):
                get_finder.cache_clear()
                self.addCleanup(get_finder.cache_clear)
                self.addCleanup(delattr, ManifestStorage, "client")
                ManifestStorage.client = FakeDropbox(self.account)
                call_command("collectstatic", interactive=False, verbosity=0)
                style, picture = static("a.css"), static("b.png")
            self.assertRegex(style, r"^/static/a\.\w{12}\.css$")
            self.assertRegex(picture, r"^/static/b\.\w{12}\.png$")
            files = self.account.files()
            plain = {"/static/a.css", "/static/b.png", "/static/staticfiles.json"}
            self.assertEqual(files.keys(), plain | {style, picture})
            self.assertIn(posixpath.basename(picture).encode(), files[style])


def under_each_quirk(**options):
    """Run a test with an account that has no quirk, with each of them, and with all."""

    def decorate(test):
        @functools.wraps(test)
        def run(self):
            for quirks in ((), *((quirk,) for quirk in QUIRKS), tuple(QUIRKS)):
                cache.clear()
                account = FakeAccount(page_size=3, quirks=quirks)
                with self.subTest(quirks=quirks):
                    test(self, account, account.storage(**options))

        return run

    return decorate


class QuirkTests(StorageTestCase):
    """All that matters works whatever the real Dropbox turns out to do."""

    @under_each_quirk()
    def test_saving_sizes_around_the_chunks(self, account, storage):
        data = random.Random(9).randbytes(12 * MiB + 1)
        for size in (0, 1, *(n * BLOCK + d for n in (1, 2, 3) for d in (-1, 0, 1))):
            name = storage.save(f"{size}", ContentFile(data[:size]))
            self.assertTrue(account.files()[f"/{name}"] == data[:size])
        self.assertEqual(account.sessions, {})

    @under_each_quirk()
    def test_replacing_with_the_same_bytes_and_with_others(self, account, storage):
        data = random.Random(10).randbytes(9 * MiB)
        for mode in ("overwrite", "update"):
            storage.write_mode = mode
            for content in (b"a", b"a", data, data, b"b", b""):
                self.assertEqual(storage.save("a", ContentFile(content)), "a")
                self.assertTrue(account.files() == {"/a": content})
                account.entries.clear()
                account.put("/a", content, "2020-01-01T00:00:00Z")
                with storage.open("a", "wb") as file:
                    file.write(content)
                self.assertTrue(account.files() == {"/a": content})

    @under_each_quirk(write_mode="update")
    def test_update_refuses_what_has_changed(self, account, storage):
        for size in (1, 9 * MiB):
            account.put("/a", b"old")
            with self.assertRaises(DropboxStorageException):
                with storage.open("a", "wb") as file:
                    file.write(bytes(size))
                    account.put("/a", b"theirs")
            self.assertEqual(account.files(), {"/a": b"theirs"})

    @under_each_quirk()
    def test_a_race_for_a_name(self, account, storage):
        data = random.Random(11).randbytes(9 * MiB)
        for content in (b"", b"small", data):
            for theirs in (b"theirs", content):
                account.entries.clear()
                account.put("/a", theirs)
                name = storage._save("a", ContentFile(content))
                self.assertTrue(account.files() == {"/a": theirs, f"/{name}": content})
                with self.assertRaises(FileExistsError):
                    account.entries.clear()
                    with storage.open("a", "xb") as file:
                        file.write(content)
                        account.put("/a", theirs)
                self.assertTrue(account.files() == {"/a": theirs})

    @under_each_quirk()
    def test_reading_and_ranges(self, account, storage):
        text = random.Random(12).randbytes(MiB)
        for size in (0, 1, 3 * MiB, 13 * MiB + 1):
            data = (text * (size // MiB + 1))[:size]
            account.put("/a", data)
            with storage.open("a") as file:
                self.assertTrue(file.read() == data)
                for start in (0, size // 3, size - 1):
                    file.seek(max(0, start))
                    self.assertTrue(file.read(5) == data[max(0, start) :][:5])
                file.seek(size // 2)
                account.fail("files/download", "truncate")
                self.assertTrue(file.read() == data[size // 2 :])
                account.faults.clear()

    def test_what_is_compressed_all_the_same_is_an_error(self):
        class Compressing(FakeAccount):
            def send_file(self, metadata, data, request, fault):
                request.headers["Accept-Encoding"] = "gzip"
                return super().send_file(metadata, data, request, fault)

        account = Compressing(quirks=("gzip",))
        account.put("/a", b"0123456789" * MiB)
        with self.assertRaisesRegex(DropboxStorageException, "found gzip"):
            account.storage().open("a")

    @under_each_quirk()
    def test_looking_and_listing(self, account, storage):
        preloading = account.storage(preload_metadata=True)
        self.assertEqual(storage.listdir(""), ([], []))
        for i in range(4):
            account.put(f"/Dir/{i}", b"12345")
            account.put(f"/Dir/Sub/{i}")
        for one in (storage, preloading):
            if "unmounted" in account.quirks and one is preloading:
                with self.raises(
                    DropboxStorageException,
                    "'/': its namespace is not mounted; set preload_metadata to False.",
                ):
                    one.listdir("dir")
                continue
            folders, files = one.listdir("dir")
            self.assertEqual((folders, sorted(files)), (["Sub"], ["0", "1", "2", "3"]))
            self.assertEqual(one.size("dir/1"), 5)
            self.assertTrue(one.exists("DIR/sub/3"))
            self.assertFalse(one.exists("dir/9"))
            self.assertIsInstance(one.get_modified_time("dir/1"), datetime.datetime)
        storage.delete("dir")
        self.assertFalse(storage.exists("dir/1"))

    @under_each_quirk()
    def test_links(self, account, storage):
        account.put("/a", b"12345")
        self.assertEqual(account.links[storage.url("a")], b"12345")
        sharing = account.storage(shared_links=True)
        link = sharing.url("a")
        self.assertIn("raw=1", link)
        self.assertEqual(sharing.url("a"), link)
        cache.clear()
        if "lost_links" in account.quirks:
            with self.assertRaisesRegex(
                DropboxStorageException, "remove it on dropbox.com"
            ) as caught:
                sharing.url("a")
            self.assertEqual(caught.exception.reason, "shared_link_already_exists")
        else:
            self.assertEqual(sharing.url("a"), link)

    @under_each_quirk()
    def test_waiting_for_as_long_as_dropbox_asks(self, account, storage):
        for fault in ("429", "429_text", "too_many_writes"):
            account.faults.clear()
            account.fail("files/get_metadata", fault, value=90)
            with self.assertRaisesRegex(
                DropboxStorageException, "Dropbox asks to wait 90 s, max_wait is 60"
            ):
                storage.exists("a")

    @under_each_quirk()
    def test_paper(self, account, storage):
        account.put("/a.paper", b"x")
        if "paper" in account.quirks:
            for use in (storage.open, storage.url):
                with self.assertRaisesRegex(DropboxStorageException, "Paper"):
                    use("a.paper")
            self.assertTrue(storage.exists("a.paper"))
            self.assertEqual(storage.size("a.paper"), 1)
        else:
            self.assertEqual(storage.open("a.paper").read(), b"x")


# Whatever hypothesis thinks of


if hypothesis:
    NASTY = (
        "..",
        ".",
        "",
        "a",
        "\\",
        "e\u0301",
        "\xe9",
        "ß",
        "x y",
        "~",
        "COM1",
        "...",
    )
    names = st.lists(st.sampled_from(NASTY) | st.text(max_size=5), max_size=5).map(
        "/".join
    )
    names = names | st.text(max_size=20)
    roots = st.sampled_from(["/", "/root", "/a/b", "/e\u0301"])

    class NamePropertyTests(StorageTestCase):
        @hypothesis.given(name=names, root=roots)
        @hypothesis.settings(max_examples=200, deadline=None)
        def test_every_name_stays_below_the_root_or_is_refused(self, name, root):
            account = FakeAccount()
            storage = account.storage(root_path=root)
            try:
                saved = storage.save(name, ContentFile(b"x"))
            except (
                SuspiciousFileOperation,
                DropboxStorageException,
                IsADirectoryError,
            ):
                self.assertEqual(account.files(), {})
            else:
                path = f"{storage.root_path.rstrip('/')}/{saved}"
                self.assertEqual(account.files(), {path: b"x"})
                self.assertTrue(unicodedata.is_normalized("NFC", path))
                self.assertEqual(storage.open(name).read(), b"x")

        @hypothesis.given(
            name=st.text(min_size=1).filter(lambda name: name.strip(". \t\r\n"))
        )
        @hypothesis.settings(max_examples=200, deadline=None)
        def test_every_valid_name_can_be_saved(self, name):
            try:
                valid = self.storage.get_valid_name(name)
            except SuspiciousFileOperation:
                return
            self.assertIn(f"/{self.save(valid)}", self.account.files())

    # By name, as hypothesis would spell out what is large.
    CONTENTS = {"empty": b"", "small": b"one", "other": b"two", "large": LARGE}

    class AccountMachine(RuleBasedStateMachine):
        """Any sequence of operations and faults leaves the account as it must be."""

        some = st.sampled_from(["a", "A", "b", "d/a", "D/b", "d/e\u0301", "d/\xe9"])
        contents = st.sampled_from(["empty", "small", "other", "large"])

        def __init__(self):
            super().__init__()
            cache.clear()
            self.account, self.model = FakeAccount(page_size=2), {}
            self.add = self.account.storage()
            self.overwrite = self.account.storage(write_mode="overwrite")
            self.update = self.account.storage(write_mode="update")

        def key(self, name):
            return "/" + unicodedata.normalize("NFC", name).lower()

        @contextlib.contextmanager
        def refusing(self, missing=None):
            """A permanent fault is reported and changes nothing, as is a missing file."""
            permanent = any(fault[1] in PERMANENT for fault in self.account.faults)
            try:
                yield
            except DropboxStorageException:
                assert permanent
            except FileNotFoundError:
                assert missing and missing not in self.model

        @rule(
            route=st.sampled_from(["*", "files/upload", "files/upload_session/finish"]),
            fault=st.sampled_from([f for f in TRANSIENT if f != "expired_token"]),
            nth=st.integers(1, 2),
            times=st.integers(1, 3),
        )
        def fail(self, route, fault, nth, times):
            self.account.faults.clear()
            self.account.fail(route, fault, nth, times)

        @rule(fault=st.sampled_from(PERMANENT), nth=st.integers(1, 3))
        def refuse(self, fault, nth):
            self.account.faults.clear()
            self.account.fail("*", fault, nth, 99)

        @rule()
        def recover(self):
            self.account.faults.clear()

        @rule(name=some, content=contents)
        def another_device_writes(self, name, content):
            self.account.put(f"/{name}", CONTENTS[content])
            self.model[self.key(name)] = CONTENTS[content]

        @rule(name=some, content=contents)
        def save(self, name, content):
            with self.refusing():
                saved = self.add.save(name, ContentFile(CONTENTS[content]))
                assert self.key(saved) not in self.model
                self.model[self.key(saved)] = CONTENTS[content]

        @rule(
            name=some, content=contents, mode=st.sampled_from(["overwrite", "update"])
        )
        def replace(self, name, content, mode):
            with self.refusing():
                assert getattr(self, mode).save(
                    name, ContentFile(CONTENTS[content])
                ) == name_of(name)
                self.model[self.key(name)] = CONTENTS[content]

        @rule(name=some, content=contents, breaks=st.booleans())
        def write(self, name, content, breaks):
            with self.refusing(), contextlib.suppress(ZeroDivisionError):
                with self.add.open(name, "wb") as file:
                    file.write(CONTENTS[content])
                    assert not breaks or 1 / 0
                self.model[self.key(name)] = CONTENTS[content]

        @rule(name=some)
        def delete(self, name):
            with self.refusing():
                self.add.delete(name)
                self.model.pop(self.key(name), None)

        @rule(name=some)
        def look(self, name):
            key = self.key(name)
            with self.refusing(key):
                assert self.add.exists(name) == (key in self.model)
                assert self.add.size(name) == len(self.model[key])
                assert self.add.url(name) in self.account.links

        @rule(name=some)
        def read(self, name):
            with self.refusing(self.key(name)), self.add.open(name) as file:
                assert file.read() == self.model[self.key(name)]

        @rule()
        def list(self):
            with self.refusing():
                folders, files = self.add.listdir("")
                found = {self.key(name) for name in files}
                assert found == {key for key in self.model if "/" not in key[1:]}

        @invariant()
        def the_account_holds_what_it_must(self):
            files = self.account.files()
            assert {path.lower(): data for path, data in files.items()} == self.model

    def name_of(name):
        return unicodedata.normalize("NFC", name)

    class AccountMachineTests(unittest.TestCase):
        def test_any_sequence(self):
            some = hypothesis.settings(
                max_examples=100, stateful_step_count=30, deadline=None
            )
            run_state_machine_as_test(AccountMachine, settings=some)

else:

    class HypothesisTests(unittest.TestCase):
        @unittest.skip("install hypothesis for the tests of any name and any sequence")
        def test_whatever_hypothesis_thinks_of(self):
            pass


# The README


README = pathlib.Path(__file__).with_name("README.md")


# Runs manage.py's commands with every client of the storage on a fake account.
MANAGE = """
import sys, dropbox, test_dropbox_storage as tests
from django.core.management import execute_from_command_line
account, create_session = tests.FakeAccount(), dropbox.create_session
account.refresh_tokens = {"refresh": ("key", "secret")}
def mounted(*args, **kwargs):
    session = create_session(*args, **kwargs)
    session.mount("https://", account)
    return session
dropbox.create_session = mounted
execute_from_command_line(["manage.py", *sys.argv[1:]])
"""


# What a visitor does in the project: uploads, looks, and is sent to the login.
VISIT = """
from django.contrib.auth import get_user_model
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client, RequestFactory
from docs import storages, views
from docs.models import Document
user = get_user_model().objects.create_user("user")
request = RequestFactory().post("/", {"file": SimpleUploadedFile("a b.txt", b"12345")})
request.user = user
print(views.upload(request).content.decode())
document = Document.objects.get()
print(document.file.name, document.file.url)
print(b"".join(views.download(request, document.pk)).decode())
client = Client(HTTP_HOST="localhost")
print(client.get(document.file.url)["Location"])
client.force_login(user)
print(client.get(document.file.url)["Location"][:28])
storage = storages.Encrypted(root_path="/secret")
name = storage.save("a.txt", SimpleUploadedFile("a.txt", b"secret"))
print(storage.open(name).read(), storages.DropboxStorage(root_path="/secret").size(name))
print(storages.Tenants().generate_filename("a b.txt"), storages.Invoices().write_mode)
"""


@unittest.skipUnless(README.exists(), "README.md is not beside the tests")
@unittest.skipIf(django.VERSION < (4, 2), "the README is for Django 4.2 and newer")
class ReadmeTests(unittest.TestCase):
    def blocks(self, language):
        found = re.findall(
            rf"^( *)```{language}\n(.*?)^ *```$", README.read_text(), re.M | re.S
        )
        return [textwrap.dedent(block) for _, block in found]

    def manage(self, *arguments):
        environment = {**os.environ, "DROPBOX_OAUTH2_REFRESH_TOKEN": "refresh"}
        environment.update(DROPBOX_APP_KEY="key", DROPBOX_APP_SECRET="secret")
        environment.update(DJANGO_SETTINGS_MODULE="site_of_a_reader.settings")
        folders = (self.folder, pathlib.Path(module.__file__).parent, README.parent)
        environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
        command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning"]
        done = subprocess.run(
            [*command, "-c", MANAGE, *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return done.stdout + done.stderr

    def test_its_snippets_work_in_the_order_in_which_a_reader_pastes_them(self):
        with tempfile.TemporaryDirectory() as folder:
            self.folder = pathlib.Path(folder)
            project, app = self.folder / "site_of_a_reader", self.folder / "docs"
            call_command("startproject", "site_of_a_reader", folder, verbosity=0)
            app.mkdir()
            call_command("startapp", "docs", str(app), verbosity=0)
            with (project / "settings.py").open("a") as file:
                file.write("INSTALLED_APPS += ['docs']\n")
            for block in self.blocks("python"):
                name = re.match(r"# (\w+\.py)\n", block)[1]
                home = project if name in ("settings.py", "urls.py") else app
                with (home / name).open("a") as file:
                    file.write(f"\n{block}")
                if name == "models.py":
                    self.manage("makemigrations", "docs")
            written = (app / "migrations" / "0001_initial.py").read_text()
            self.assertIn("storage=docs.storages.Invoices()", written)
            self.manage("check")
            self.assertIn("No changes", self.manage("makemigrations", "docs"))
            self.manage("migrate")
            self.assertIn("OK", self.manage("test", "docs"))
            (check,) = re.findall(
                r'shell -c "\n(.*?)\n"', self.blocks("console")[0], re.S
            )
            self.assertIn(
                "It works: /media/check.txt", self.manage("shell", "-c", check)
            )
            self.assertEqual(
                self.manage("shell", "-c", VISIT).splitlines()[-7:],
                [
                    "Thank you.",
                    "documents/a_b.txt /media/documents/a_b.txt",
                    "12345",
                    "/accounts/login/?next=/media/documents/a_b.txt",
                    "https://content.example/apit",
                    "b'secret' 8",
                    "tenant-7/a_b.txt update",
                ],
            )

    def test_its_options_are_those_of_the_module(self):
        rows = re.findall(
            r"^\| `(\w+)` \| `(DROPBOX_\w+)` \| `?([^`|]*?)`? ?\|",
            README.read_text(),
            re.M,
        )
        for name, setting, default in rows:
            option = module.OPTIONS[name]
            self.assertEqual(option.setting, setting)
            self.assertEqual(eval(default.strip() or "None"), option.default)
        self.assertEqual({name for name, *_ in rows}, module.OPTIONS.keys())
        for name, value, unit in re.findall(
            r"`([A-Z_]+)`\s\(([\d.]+)\s(MiB,)?", README.read_text()
        ):
            value = float(value) * (MiB if unit else 1)
            self.assertEqual(getattr(DropboxStorage, name), value)


# On a real account


LIVE = {
    option: os.environ[f"DROPBOX_TEST_{name}"]
    for option, name in (
        ("oauth2_access_token", "TOKEN"),
        ("oauth2_refresh_token", "REFRESH_TOKEN"),
        ("app_key", "APP_KEY"),
        ("app_secret", "APP_SECRET"),
    )
    if os.environ.get(f"DROPBOX_TEST_{name}")
}


class PagingDropbox(dropbox.Dropbox):
    """Lists in small pages."""

    def files_list_folder(self, path, recursive=False):
        return super().files_list_folder(path, recursive, limit=2)


@unittest.skipUnless(
    LIVE,
    "set DROPBOX_TEST_TOKEN, or DROPBOX_TEST_REFRESH_TOKEN, _APP_KEY and _APP_SECRET",
)
class LiveTests(SimpleTestCase):
    """What the README promises, on a real account: in one new folder, removed at the end.

    Prints a table of this account's answers to what no document of Dropbox's settles.
    """

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        network.is_open = True
        cls.addClassCleanup(setattr, network, "is_open", False)
        cls.root = f"/dropbox_storage-tests-{os.urandom(6).hex()}"
        cls.addClassCleanup(DropboxStorage(**LIVE).delete, cls.root.lstrip("/"))
        cls.data = random.Random(13).randbytes(12 * MiB + 1)

    def setUp(self):
        cache.clear()
        self.storage = self.new_storage()

    def new_storage(self, **options):
        folder = self.id().rpartition(".")[2]
        options = {"root_path": f"{self.root}/{folder}", **LIVE, **options}
        return DropboxStorage(**options)

    def save(self, name, content=b"", storage=None):
        return (storage or self.storage).save(name, ContentFile(content))

    def read(self, name):
        with self.storage.open(name) as file:
            return file.read()

    def test_sizes_around_the_chunks(self):
        for size in (0, 1, *(n * BLOCK + d for n in (1, 2, 3) for d in (-1, 0, 1))):
            name = self.save(f"{size}.bin", self.data[:size])
            self.assertEqual(self.storage.size(name), size)
            self.assertTrue(self.read(name) == self.data[:size])
        with self.storage.open("written.bin", "wb") as file:
            for start in range(0, len(self.data), MiB):
                file.write(self.data[start : start + MiB])
        self.assertTrue(self.read("written.bin") == self.data)

    def test_ranges_and_reading_ahead(self):
        self.save("a.bin", self.data)
        with self.storage.open("a.bin") as file:
            for start in (9 * MiB, 5, len(self.data) - 3, 4 * MiB - 1):
                file.seek(start)
                self.assertTrue(file.read(100) == self.data[start : start + 100])
            file.seek(MiB)
            self.assertTrue(file.read() == self.data[MiB:])
        with self.storage.open("a.bin") as file:
            head = file.read(5)
            with self.storage.open("a.bin", "wb") as other:
                other.write(b"new")
            self.assertTrue(head + file.read() == self.data)

    def test_two_storages_that_save_one_name_get_a_file_each(self):
        for content in (b"same", self.data[: 9 * MiB]):
            storages = [self.new_storage() for _ in range(4)]

            def save(storage, content=content):
                return storage._save("a.bin", ContentFile(content))

            with ThreadPoolExecutor(4) as pool:
                names = {*pool.map(save, storages)}
            self.assertEqual(len(names), 4)
            for name in names:
                self.assertTrue(self.read(name) == content)
            self.storage.delete("a.bin")

    def test_replacing_in_each_mode(self):
        for mode in ("overwrite", "update"):
            storage = self.new_storage(write_mode=mode)
            for content in (b"a", b"a", b"b", self.data, self.data, b""):
                self.assertEqual(self.save(mode, content, storage), mode)
                self.assertTrue(self.read(mode) == content)
        with self.assertRaises(DropboxStorageException):
            with storage.open("update", "wb") as file:
                file.write(b"mine")
                self.save("update", b"theirs", self.new_storage(write_mode="overwrite"))
        with self.assertRaises(FileExistsError), self.storage.open("new", "xb") as file:
            file.write(b"mine")
            self.save("new", b"theirs")
        self.assertEqual((self.read("update"), self.read("new")), (b"theirs",) * 2)

    def test_names(self):
        for name in (
            "desktop.ini",
            "e\u0301",
            "x" * 300,
            "dots...",
            " a b.txt",
            "a\x7fb",
        ):
            valid = self.storage.get_valid_name(name)
            self.assertEqual(self.save(valid, b"x"), valid)
            self.assertTrue(self.storage.exists(valid.upper()))
        for name in ("desktop.ini", "a\x7fb", "space /a"):
            with self.assertRaises(DropboxStorageException):
                self.storage._save(name, ContentFile(b"x"))
        self.save("Dir/a")
        with self.assertRaises(NotADirectoryError):
            self.save("dir/A/b")
        for use in (self.storage.open, self.storage.size):
            self.assertRaises(FileNotFoundError, use, "missing")
            self.assertRaises(IsADirectoryError, use, "dir")

    def test_listing_over_several_pages(self):
        self.assertEqual(self.storage.listdir(""), ([], []))
        for name in ("1", "2", "3", "4", "Sub/5"):
            self.save(name, b"12345")
        self.storage.client.__class__ = PagingDropbox
        folders, files = self.storage.listdir("")
        self.assertEqual((folders, sorted(files)), (["Sub"], ["1", "2", "3", "4"]))
        self.storage.delete("3")
        self.storage.delete("Sub")
        self.storage.delete("missing")
        self.assertEqual(sorted(self.storage.listdir("")[1]), ["1", "2", "4"])
        age = time.time() - self.storage.get_modified_time("1").timestamp()
        self.assertLess(abs(age), 600)

    def test_links_lead_to_the_bytes(self):
        self.save("a b.txt", b"12345")
        link = self.storage.url("a b.txt")
        self.assertEqual(requests.get(link, timeout=60).content, b"12345")
        self.assertEqual(self.storage.url("A b.TXT"), link)
        sharing = self.new_storage(shared_links=True)
        try:
            shared = sharing.url("a b.txt")
        except DropboxStorageException as error:
            raise unittest.SkipTest(f"no shared link: {error}") from error
        if dropbox.session.API_HOST == "api.dropboxapi.com":
            self.assertEqual(requests.get(shared, timeout=60).content, b"12345")

    @unittest.skipUnless("oauth2_refresh_token" in LIVE, "needs a refresh token")
    def test_a_token_that_expires(self):
        self.save("a", b"x")
        old = self.storage.client._oauth2_access_token
        self.storage.client._oauth2_access_token_expiration = datetime.datetime(
            2020, 1, 1
        )
        self.assertEqual(self.read("a"), b"x")
        self.assertNotEqual(self.storage.client._oauth2_access_token, old)

    def test_questions_that_no_document_settles(self):
        self.save("a", b"x")
        for question, answer in {
            "Are names with emoji taken?": self.takes_emoji,
            "Does a refused files/upload keep its data?": self.keeps_refused_data,
            "Does strict_conflict refuse identical bytes for the right rev?": self.is_strict,
            "May an empty append close a session that holds data?": self.closes_empty,
            "Is a download compressed for those who accept it?": self.compresses,
            "Does a reply end where its range does?": self.keeps_to_ranges,
            "Does metadata have a content_hash?": self.has_hash,
            "Does metadata have paths?": self.has_paths,
            "May a page of a listing be empty and have more?": self.has_empty_pages,
            "Is an existing shared link told?": self.tells_links,
            "Can a file that ends in .paper be downloaded?": self.downloads_paper,
            "Does a 429 tell in JSON how long to wait?": lambda: "cannot be forced",
        }.items():
            try:
                found = answer()
            except dropbox.exceptions.DropboxException as error:
                found = f"cannot be told: {module._reason(error)}"
            found = {True: "yes", False: "no"}.get(found, found)
            print(f"{question:<65} {found}")

    def path(self, name):
        return self.storage._path(name)

    def takes_emoji(self):
        try:
            self.save("\U0001f600.txt")
        except DropboxStorageException as error:
            return error.reason
        return True

    def keeps_refused_data(self):
        client, files = self.storage.client, dropbox.files
        self.save("taken", b"theirs")
        try:
            client.files_upload(b"mine", self.path("taken"))
        except dropbox.exceptions.ApiError as error:
            session = error.error.get_path().upload_session_id
        if not session:
            return "no: upload_session_id is empty"
        commit = files.CommitInfo(self.path("finished"))
        cursor = files.UploadSessionCursor(session, 4)
        client.files_upload_session_finish(b"", cursor, commit)
        return self.read("finished") == b"mine"

    def is_strict(self):
        client, path = self.storage.client, self.path("strict")
        mode = dropbox.files.WriteMode.update(client.files_upload(b"x", path).rev)
        try:
            client.files_upload(b"x", path, mode=mode, strict_conflict=True)
        except dropbox.exceptions.ApiError:
            return True
        return False

    def closes_empty(self):
        client, files = self.storage.client, dropbox.files
        kind = files.UploadSessionType.concurrent
        session = client.files_upload_session_start(b"", session_type=kind).session_id
        cursor = files.UploadSessionCursor(session, 0)
        client.files_upload_session_append_v2(self.data[:BLOCK], cursor)
        cursor = files.UploadSessionCursor(session, BLOCK)
        try:
            client.files_upload_session_append_v2(b"", cursor, close=True)
        except dropbox.exceptions.ApiError as error:
            return f"no: {module._reason(error)}"
        return True

    def compresses(self):
        self.save("text", b"text " * 100_000)
        _, response = self.storage.client.files_download(self.path("text"))
        response.close()
        return response.headers.get("Content-Encoding", False)

    def keeps_to_ranges(self):
        self.save("ranged", bytes(1000))
        client = self.storage.client.clone(headers={"Range": "bytes=10-19"})
        return len(client.files_download(self.path("ranged"))[1].content) == 10

    def has_hash(self):
        return bool(self.storage._metadata(self.path("a")).content_hash)

    def has_paths(self):
        return bool(self.storage._metadata(self.path("a")).path_display)

    def has_empty_pages(self):
        page = self.storage.client.files_list_folder(self.storage.root_path)
        return page.has_more and not page.entries

    def tells_links(self):
        path = self.path("a")
        self.storage.client.sharing_create_shared_link_with_settings(path)
        found = self.storage.client.sharing_list_shared_links(path, direct_only=True)
        return bool(found.links)

    def downloads_paper(self):
        self.save("a.paper", b"x")
        try:
            return self.read("a.paper") == b"x"
        except DropboxStorageException as error:
            return f"no: {error.reason}"


# The demo


def demo(paths, account):
    """Save the files, list, link, read, overwrite and delete them; return the failures."""
    backend = f"{module.__name__}.DropboxStorage"
    default = {"DEFAULT_FILE_STORAGE": backend}
    if django.VERSION >= (4, 2):
        default = {"STORAGES": {"default": {"BACKEND": backend}}}
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


class DemoTests(SimpleTestCase):
    def test_it_shows_every_step_and_counts_what_differs(self):
        class Forgetful(FakeAccount):
            def page(self, found, *args, **kwargs):
                return super().page([], *args, **kwargs)

        for account, failures in ((FakeAccount(), 0), (Forgetful(), 1)):
            with contextlib.redirect_stdout(io.StringIO()) as output:
                self.assertEqual(demo([__file__], account), failures)
            output = output.getvalue()
            self.assertIn("  save       test_", output)
            self.assertIn("1 x files/get_metadata, 1 x files/upload", output)
            self.assertIn("DIFFER" if failures else "Everything as expected.", output)


if __name__ == "__main__":
    if sys.argv[1:2] == ["demo"] and sys.argv[2:]:
        sys.exit(1 if demo(sys.argv[2:], FakeAccount()) else 0)
    unittest.main()
