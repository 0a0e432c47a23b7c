"""Tests of dropbox_storage, and the fake Dropbox on which they and the demo run.

    python -m pytest
    python test_dropbox_storage.py demo FILE...
"""

import base64
import collections
import contextlib
import dataclasses
import datetime
import hashlib
import importlib
import io
import itertools
import json
import pathlib
import re
import sys
import threading
import unicodedata
import unittest
from urllib.parse import parse_qs, urlsplit

import dropbox
import requests
import urllib3
from django.conf import settings

if not settings.configured:
    settings.configure(USE_TZ=True)

from django.core.exceptions import ImproperlyConfigured  # noqa: E402
from django.core.files.base import ContentFile  # noqa: E402

# The module beside this one, also where both are copied into another package.
module_name = pathlib.Path(__file__).stem.replace("test_", "", 1)
package = __name__.rpartition(".")[0]
module = importlib.import_module(f"{package}.{module_name}" if package else module_name)
DropboxStorage = module.DropboxStorage
DropboxStorageException = module.DropboxStorageException

MiB = 1024 * 1024
BLOCK = 4 * MiB


# The fake Dropbox


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

    def metadata(self):
        found = {".tag": "folder", "name": self.path.rpartition("/")[2]}
        found.update(id=f"id:{self.path}", path_display=self.path)
        found.update(path_lower=self.path.lower())
        if self.data is not None:
            found.update({".tag": "file"}, rev=self.rev, size=len(self.data))
            found.update(client_modified=self.modified, server_modified=self.modified)
            found.update(content_hash=content_hash(self.data), is_downloadable=True)
        return found


@dataclasses.dataclass
class Session:
    """An upload session: what has been sent, by offset."""

    concurrent: bool
    pieces: dict = dataclasses.field(default_factory=dict)
    end: int = None  # where it was closed

    @property
    def data(self):
        return b"".join(self.pieces[offset] for offset in sorted(self.pieces))


class FakeAccount(requests.adapters.HTTPAdapter):
    """A Dropbox account in memory, in place of the network under the real SDK.

    It refuses what Dropbox refuses, counts the calls of each route, and fails on demand.
    """

    def __init__(self, page_size=500):
        super().__init__()
        self.page_size, self.lock = page_size, threading.RLock()
        self.entries, self.revisions, self.sessions = {}, {}, {}
        self.cursors, self.links, self.shared = {}, {}, set()
        self.calls, self.timeouts, self.faults = collections.Counter(), set(), []
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
        return self.connect(DropboxStorage(**{"oauth2_access_token": "valid-token"} | options))

    def put(self, path, data=b""):
        """Write a file as another device would."""
        self.commit({"path": path, "mode": "overwrite"}, data)

    def files(self):
        """The bytes of each file by its path."""
        found = self.entries.values()
        return {entry.path: entry.data for entry in found if entry.data is not None}

    def fail(self, route, kind, nth=1, times=1, value=0):
        """Misbehave at the nth call of the route ("*": any) from now, and after it."""
        self.faults.append([route, kind, range(nth, nth + times), itertools.count(1), value])

    def expire_tokens(self):
        self.expired |= self.tokens
        self.tokens.clear()

    @contextlib.contextmanager
    def counting(self):
        """Yield a Counter that holds, after the block, the calls made inside it."""
        before, counted = self.calls.copy(), collections.Counter()
        yield counted
        counted.update(self.calls - before)
