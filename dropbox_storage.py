"""Keep the files of a Django project in Dropbox.

    STORAGES = {
        "default": {
            "BACKEND": "dropbox_storage.DropboxStorage",
            "OPTIONS": {
                "oauth2_refresh_token": os.environ["DROPBOX_REFRESH_TOKEN"],
                "app_key": os.environ["DROPBOX_APP_KEY"],
                "app_secret": os.environ["DROPBOX_APP_SECRET"],
            },
        },
        ...
    }

Bytes flow Django -> DropboxStorage -> _Upload or _Download -> DropboxStorage._call, the
one door to the SDK -> Dropbox. README.md lists the options and what is promised.

License: BSD-3-Clause.
"""

import contextlib
import copy
import datetime
import errno
import hashlib
import io
import json
import logging
import operator
import os
import posixpath
import random
import re
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urljoin

from django.conf import settings
from django.core.cache import cache
from django.core.exceptions import ImproperlyConfigured, SuspiciousFileOperation
from django.core.files import storage as django_storage
from django.core.files.base import File
from django.utils.deconstruct import deconstructible
from django.utils.encoding import filepath_to_uri

__all__ = ["DropboxFile", "DropboxStorage", "DropboxStorageException", "serve"]
__version__ = "1.0.0"

logger = logging.getLogger("dropbox_storage")

MiB = 1024 * 1024

# Bytes. Dropbox hashes files in blocks of this size, and a concurrent upload session
# takes chunks that are multiples of it.
# https://www.dropbox.com/developers/reference/content-hash
HASH_BLOCK = 4 * MiB

# Bytes of the requests with which a download begins, and of those that follow. The
# first is there at once, and holds what says how large a picture is; who reads on past
# the second wants the rest, which four connections at 8 MB/s fetch without a pause.
FIRST_PARTS = (512 * 1024, 1536 * 1024)
PART_SIZE = 4 * MiB

# Bytes that one read from a connection, or from a file that is read line by line, asks for.
READ_SIZE = 64 * 1024

# Idle connections that a client keeps: for eight threads with four transfers each.
POOL_SIZE = 32

# Characters in a name, and names that Dropbox refuses whatever their case.
# https://help.dropbox.com/organize/file-names
MAX_NAME = 255
RESERVED_NAMES = ("desktop.ini", "thumbs.db", ".ds_store", ".dropbox", ".dropbox.attr")

# Seconds that a temporary link lives, and for how many of them no browser may keep it.
# https://www.dropbox.com/developers/documentation/http/documentation#files-get_temporary_link
LINK_LIFE = 4 * 60 * 60
LINK_RESERVE = 60

WRITE_MODES = ("add", "overwrite", "update")

# What Dropbox says about paths, by the end of its reason, as Python says it.
OS_ERRORS = {
    errno.ENOENT: ("path/not_found", "path_lookup/not_found"),
    errno.EISDIR: ("path/not_file", "conflict/folder"),
    errno.ENOTDIR: ("path/not_folder", "conflict/file_ancestor"),
    errno.EEXIST: ("conflict/file",),
}

# Refusals that mean: the same again, later.
BUSY = ("too_many_write_operations", "content_hash_mismatch")

# What to do about the others, by what stands in Dropbox's answer.
HINTS = {
    "expired_access_token": "'sl.' tokens live four hours; set oauth2_refresh_token",
    "invalid_access_token": "it is wrong or revoked; authorize the app again",
    "invalid_client": "app_key and app_secret must be of the app that was authorized",
    "missing_scope": "tick it under Permissions in the App Console, authorize again",
    "user_suspended": "the account is suspended; its owner or team can reactivate it",
    "select_user": "team_member_id must be of the team that authorized the app",
    "no_permission": "the account has no access to namespace_id",
    "insufficient_space": "the account is full; free or buy space",
    "no_write_permission": "the account may only read there; change root_path",
    "disallowed_name": "Dropbox reserves that name; get_valid_name() mends it",
    "malformed_path": "no backslash, NUL, space at an end or name over 255 characters",
    "email_not_verified": "verify the account's e-mail address, or use base_url",
    "access_denied": "sharing is off for the account; use base_url",
    "settings_error": "public links are off for the account; use base_url",
}


class DropboxStorageException(Exception):
    """Dropbox refused a call for good, or could not be reached for too long.

    The message holds the route, the path, Dropbox's reason and what to do about it;
    `reason` the tags of the API's error alone, as in "path/insufficient_space", or else
    "HTTP 400". The SDK's own exception is the `__cause__`.
    """

    def __init__(self, message, reason=""):
        super().__init__(message)
        self.reason = reason


class _Option:
    """An option's value from the settings, read when it is used.

    A constructor argument (in the instance's __dict__) and a class attribute of a
    subclass hide this descriptor: that alone makes the order of precedence.
    """

    def __init__(self, setting, default, clean, *allowed):
        self.setting, self.default = setting, default
        self._clean, self._allowed = clean, allowed

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, storage, owner=None):
        value = getattr(settings, self.setting, self.default) if storage else None
        return self.clean(value) if storage else self

    def clean(self, value):
        try:
            return self._clean(value, *self._allowed)
        except ValueError as error:
            found = "something else" if self.name in _CREDENTIALS else repr(value)
            message = f"{self.name} (or {self.setting}) must be {error}: found {found}."
            raise ImproperlyConfigured(message) from None


# What the options may be: each returns the value to use.


def _text(value):
    # Empty is what an unset environment variable often is.
    if value and not (isinstance(value, str) and re.fullmatch("[!-~]+", value)):
        raise ValueError("a string of printable ASCII characters without spaces")
    return value or None


def _root_path(value):
    path = "/" + str(value or "").replace("\\", "/").strip("/")
    if not str(value).startswith("/"):
        raise ValueError(f"a path that begins with '/', such as {path!r}")
    return unicodedata.normalize("NFC", posixpath.normpath(path))


def _url(value):
    if value and not isinstance(value, str):
        raise ValueError("a URL such as '/media/', or None")
    return f"{value.rstrip('/')}/" if value else None


def _seconds(value, least, most):
    if value is None or (type(value) in (int, float) and least <= value <= most):
        return value
    raise ValueError(f"None or a number of seconds from {least} to {most}")


def _one_of(value, *choices):
    if value in choices:
        return value
    raise ValueError(f"one of {', '.join(map(repr, choices))}")


@deconstructible
class DropboxStorage(django_storage.Storage):
    """Django's storage API on the files of a Dropbox account.

    Takes the options below by name, the access token by position too; each may also be
    a class attribute of a subclass or a setting. Raises ImproperlyConfigured for what
    cannot work, offline; missing credentials are reported when they are first needed,
    as a migration builds its storages where there are none.

    Every method that calls Dropbox raises DropboxStorageException when Dropbox refuses
    or cannot be reached, and FileNotFoundError, IsADirectoryError, NotADirectoryError
    or FileExistsError where those say it all.
    """

    # A token of the app; those that begin with "sl." live four hours.
    oauth2_access_token = _Option("DROPBOX_OAUTH2_TOKEN", None, _text)
    # Lives until it is revoked; with the app's key and secret it yields access tokens.
    oauth2_refresh_token = _Option("DROPBOX_OAUTH2_REFRESH_TOKEN", None, _text)
    app_key = _Option("DROPBOX_APP_KEY", None, _text)
    app_secret = _Option("DROPBOX_APP_SECRET", None, _text)
    # The folder that holds all files: absolute, within the app's or the account's root.
    root_path = _Option("DROPBOX_ROOT_PATH", "/", _root_path)
    # Seconds without an answer after which a request has failed; None: wait for ever.
    timeout = _Option("DROPBOX_TIMEOUT", 100, _seconds, 0.001, threading.TIMEOUT_MAX)
    # What save() does with a name that is taken. "add": saves under another name;
    # "overwrite": replaces the file; "update": replaces it unless it changes meanwhile.
    write_mode = _Option("DROPBOX_WRITE_MODE", "add", _one_of, *WRITE_MODES)
    # url() is this joined with the name, without a call; see serve().
    base_url = _Option("DROPBOX_BASE_URL", None, _url)
    # Without base_url, url() is a public link that lasts, instead of a temporary one.
    shared_links = _Option("DROPBOX_SHARED_LINKS", False, _one_of, True, False)
    # Seconds that Django's default cache keeps a link; 0 or None: not at all.
    url_cache_timeout = _Option(
        "DROPBOX_URL_CACHE_TIMEOUT", 3600, _seconds, 0, LINK_LIFE
    )
    # The team folder or namespace in which root_path lies.
    namespace_id = _Option("DROPBOX_NAMESPACE_ID", None, _text)
    # The member for whom an app that a whole team has authorized acts.
    team_member_id = _Option("DROPBOX_TEAM_MEMBER_ID", None, _text)
    # List root_path once and answer from that. For commands that are the only writer
    # while they run, collectstatic above all: changes made by others go unseen.
    preload_metadata = _Option("DROPBOX_PRELOAD_METADATA", False, _one_of, True, False)

    # Bytes of one request of an upload, rounded up to whole hash blocks, 150 MiB at most;
    # content up to this size is a single request. 8 MiB spends 95 % of a request on moving
    # bytes at 8 MB/s and 50 ms latency, yet CONNECTIONS of them take no more than 32 MiB.
    CHUNK_SIZE = 8 * MiB
    # Requests in flight for one transfer. Dropbox limits the bandwidth of a connection;
    # with more than four, an upload meets its locks and rate limits rather than speed.
    CONNECTIONS = 4
    # Attempts of one call, the first included.
    MAX_ATTEMPTS = 6
    # Seconds after a call's first failure in which further attempts may begin.
    MAX_WAIT = 60

    _client = None  # that was assigned

    def __init__(self, oauth2_access_token=None, **options):
        if oauth2_access_token is not None:
            options["oauth2_access_token"] = oauth2_access_token
        if unknown := ", ".join(sorted(options.keys() - _OPTIONS.keys())):
            known = ", ".join(sorted(_OPTIONS))
            raise ImproperlyConfigured(f"Unknown option {unknown}; there are {known}.")
        vars(self).update(options)
        for name, option in _OPTIONS.items():
            given = getattr(self, name)
            if (value := option.clean(given)) != given:
                setattr(self, name, value)
        missing = [name for name in _CREDENTIALS[1:] if not getattr(self, name)]
        if len(missing) in (1, 2):
            raise ImproperlyConfigured(
                f"{' and '.join(missing)} not set: oauth2_refresh_token, app_key and "
                "app_secret (or their DROPBOX_* settings) work together; set all or none."
            )
        self._hide_credentials()
        self._processes = {}

    def _hide_credentials(self):
        # deconstruct() itself cannot: @deconstructible replaces it in each class.
        secrets = [value for name in _CREDENTIALS if (value := getattr(self, name))]
        args, kwargs = self._constructor_args
        args = tuple(None if arg in secrets else arg for arg in args)
        kwargs = {k: v for k, v in kwargs.items() if v not in secrets}
        self._constructor_args = (args if any(args) else (), kwargs)

    def __eq__(self, other):
        # What migrations compare: deconstruct(), without its check of the import path.
        same = type(self) is type(other)
        return same and self._constructor_args == other._constructor_args

    def __hash__(self):
        return hash(type(self))

    def __getstate__(self):
        return {**vars(self), "_processes": {}}

    @property
    def _process(self):
        return self._processes.setdefault(os.getpid(), _Process())

    @property
    def client(self):
        """The dropbox.Dropbox that makes the calls.

        Built when it is first used, once per process and again if an option changes;
        may be assigned, to use another one with its own credentials.
        """
        options = [getattr(self, name) for name in _OPTIONS]
        with self._process.lock:
            if self._process.options != options and not self._client:
                self._process.client, self._process.options = self._connect(), options
            return self._client or self._process.client

    @client.setter
    def client(self, client):
        self._client = client

    def _connect(self):
        if not (self.oauth2_access_token or self.oauth2_refresh_token):
            raise ImproperlyConfigured(
                "No Dropbox credentials: set oauth2_refresh_token, app_key and app_secret, "
                "or oauth2_access_token, as options or as DROPBOX_* settings."
            )
        if not self.oauth2_refresh_token and self.oauth2_access_token.startswith("sl."):
            logger.warning("oauth2_access_token: %s.", HINTS["expired_access_token"])
        import dropbox  # costs 0.25 s and 27 MB, too much for every management command

        root = json.dumps({".tag": "namespace_id", "namespace_id": self.namespace_id})
        return dropbox.Dropbox(
            **{name: getattr(self, name) for name in (*_CREDENTIALS, "timeout")},
            headers={  # requests leaves out those that are None
                "Dropbox-API-Path-Root": root if self.namespace_id else None,
                "Dropbox-API-Select-User": self.team_member_id,
            },
            session=dropbox.create_session(max_connections=POOL_SIZE),
            max_retries_on_error=0,
        )

    def _open(self, name, mode="rb"):
        return DropboxFile(name, self, mode)

    def _save(self, name, content):
        name = self._clean_name(name)
        with _Upload(self, self._path(name), self.write_mode) as upload:
            for chunk in content.chunks():
                upload.write(chunk.encode() if isinstance(chunk, str) else chunk)
            for attempt in range(1, self.MAX_ATTEMPTS + 1):
                try:
                    upload.commit(self._path(name))
                    return name
                except (FileExistsError, IsADirectoryError):
                    if upload.mode != "add" or attempt == self.MAX_ATTEMPTS:
                        raise
                    name = self._clean_name(self.get_available_name(name))

    def get_valid_name(self, name):
        """Also mends what Dropbox refuses: reserved names, dots at the end, length."""
        name = super().get_valid_name(unicodedata.normalize("NFC", str(name)))
        root, extension = posixpath.splitext(name.rstrip("."))
        valid = (root[: max(1, MAX_NAME - len(extension))] + extension)[:MAX_NAME]
        return f"_{valid}" if valid.lower() in ("", *RESERVED_NAMES) else valid

    def get_alternative_name(self, file_root, file_ext):
        # Django adds an underscore and seven characters.
        room = max(1, MAX_NAME - 8 - len(file_ext))
        return super().get_alternative_name(file_root[:room], file_ext)

    def get_available_name(self, name, max_length=None):
        clean = self._clean_name(name)
        if self.write_mode != "add" and len(clean) <= (max_length or len(clean)):
            return clean
        return super().get_available_name(name, max_length)

    def delete(self, name):
        """Delete the file, or the folder with all that is in it; quiet if it is gone."""
        if not name:
            raise ValueError("The name must be given to delete().")
        path = self._path(name)
        with contextlib.suppress(FileNotFoundError):
            self._call("files/delete_v2", path, path)
        self._note(path, None)

    def exists(self, name):
        with contextlib.suppress(FileNotFoundError):
            return not self._clean_name(name) or bool(self._metadata(self._path(name)))
        return False

    def listdir(self, path):
        entries = self._entries(
            self._path(path) if self._clean_name(path) else self._root
        )
        folders = [entry.name for entry in entries if not _is_file(entry)]
        return folders, [entry.name for entry in entries if _is_file(entry)]

    def size(self, name):
        return self._file_metadata(self._path(name)).size

    def url(self, name):
        """A link to the file's bytes: see base_url, shared_links and README.md.

        "" and a warning in the log "dropbox_storage" if the file is gone, so that one
        missing picture does not take down the page that shows it.
        """
        if self.base_url:
            return urljoin(self.base_url, (filepath_to_uri(name) or "").lstrip("/"))
        try:
            return self._link(self._path(name))[0]
        except FileNotFoundError:
            logger.warning("No link to %r: there is no such file in Dropbox.", name)
            return ""

    def get_modified_time(self, name):
        modified = self._file_metadata(self._path(name)).server_modified
        aware = modified.replace(tzinfo=datetime.timezone.utc)
        naive = datetime.datetime.fromtimestamp(aware.timestamp())
        return aware if settings.USE_TZ else naive

    # Names, and what is known about them

    def _clean_name(self, name):
        """The name in its one form: relative, NFC, forward slashes; "" for the root."""
        given = unicodedata.normalize("NFC", os.fspath(name).replace("\\", "/"))
        clean = posixpath.normpath(given)
        if clean in (".", "/", "//"):
            return ""
        if f"{clean}/".startswith(("/", "../")):
            raise SuspiciousFileOperation(f"{given!r} leads out of {self.root_path!r}.")
        return clean

    @property
    def _root(self):
        """The path of the folder that holds all files, "" if that is the account's."""
        return self.root_path.rstrip("/")

    def _path(self, name):
        """The absolute path of a name, which must not be the root."""
        if clean := self._clean_name(name):
            return f"{self._root}/{clean}"
        raise _os_error(errno.EISDIR, "the root of all files", self.root_path)

    def _metadata(self, path):
        if not self.preload_metadata:
            return self._call("files/get_metadata", path, path)
        if metadata := self._listing().get(path.lower()):
            return metadata
        raise _os_error(errno.ENOENT, "not in the preloaded listing", path)

    def _file_metadata(self, path):
        metadata = self._metadata(path)
        if _is_file(metadata):
            return metadata
        raise _os_error(errno.EISDIR, "not a file", path)

    def _entries(self, folder):
        """The metadata of what is in the folder."""
        if not self.preload_metadata:
            return self._list_folder(folder)
        if folder != self._root and _is_file(self._metadata(folder)):
            raise _os_error(errno.ENOTDIR, "not a folder", folder)
        listing, parent = [*self._listing().items()], folder.lower() or "/"
        return [entry for path, entry in listing if posixpath.dirname(path) == parent]

    def _list_folder(self, folder, recursive=False, retry=None):
        retry = retry or _Retry(self)
        try:
            page = self._call("files/list_folder", folder, folder, recursive)
            entries = page.entries
            while page.has_more:
                page = self._call("files/list_folder/continue", folder, page.cursor)
                entries += page.entries
        except FileNotFoundError:
            if folder != self._root:
                raise
            entries = []  # nothing has been saved yet
        except DropboxStorageException as error:
            if error.reason == "reset" and retry.wait(error):  # the cursor has expired
                return self._list_folder(folder, recursive, retry)
            raise
        # Later pages also report what has been deleted meanwhile, without an id.
        return [entry for entry in entries if hasattr(entry, "id")]

    def _listing(self):
        """What preload_metadata has listed, by path in lower case."""
        with self._process.lock:
            if self._process.listing is None:
                entries = self._list_folder(self._root, recursive=True)
                self._process.listing = {entry.path_lower: entry for entry in entries}
            return self._process.listing

    def _note(self, path, metadata):
        """Keep true what is remembered: metadata is at path now, or nothing if None."""
        self._cached("delete", path)
        with self._process.lock:
            listing = {} if self._process.listing is None else self._process.listing
            for known in [k for k in listing if f"{k}/".startswith(f"{path.lower()}/")]:
                del listing[known]
            while metadata and path != "/":
                listing.setdefault(path.lower(), metadata)
                path = posixpath.dirname(path)
                metadata = _Folder(path)

    # Links

    def _link(self, path):
        """A link to the file and when it was made, in seconds since the epoch."""
        entry = self._cached("get", path) if self.url_cache_timeout else None
        if not entry:
            make = self._shared_link if self.shared_links else self._temporary_link
            entry = (make(path), time.time())
            self._cached("set", path, entry, self.url_cache_timeout or 0)
        return entry

    def _temporary_link(self, path):
        return self._call("files/get_temporary_link", path, path).link

    def _shared_link(self, path):
        """The public link to the file, in the form that leads to its bytes."""
        try:
            link = self._call("sharing/create_shared_link_with_settings", path, path)
        except DropboxStorageException as error:
            if not error.reason.startswith("shared_link_already_exists"):
                raise
            link = self._call(
                "sharing/list_shared_links", path, path, None, True
            ).links[0]
        return re.sub(r"([?&])dl=\d", r"\1raw=1", link.url)

    def _cached(self, method, path, *args):
        """What Django's cache answers of path; one that is down costs a call, no more."""
        account = self.client._oauth2_refresh_token or self.client._oauth2_access_token
        space = (self.namespace_id, self.team_member_id, self.shared_links)
        digest = hashlib.sha256(repr((account, space, path.lower())).encode())
        try:
            return getattr(cache, method)(
                f"dropbox_storage:{digest.hexdigest()}", *args
            )
        except Exception as error:
            logger.warning("Cannot keep links in the cache: %s.", type(error).__name__)

    # The door to Dropbox

    def _call(self, route, path, *args, work=None, retry=None, **kwargs):
        """What the SDK's method for the route returns for the arguments, or work(client).

        Repeats what may succeed later, as retry allows, and raises what Django expects
        for the rest; path is what the messages name.
        """
        work = work or operator.methodcaller(route.replace("/", "_"), *args, **kwargs)
        client, retry, expired = self.client, retry or _Retry(self), None
        while True:
            try:
                attempt = self._authorized(client, expired)
                return work(attempt)
            except Exception as error:
                if renew := client._oauth2_refresh_token and "expired" in _reason(
                    error
                ):
                    expired = attempt._oauth2_access_token
                if not retry.wait(error, renew):
                    raise self._failure(error, route, path, retry) from error

    def _authorized(self, client, expired):
        """A copy of client for one attempt, with a live token.

        The SDK's own retries are off in it: of two policies on top of each other,
        nobody could say when they end. Nor has the SDK a lock around its refresh.
        """
        with self._process.lock:
            if expired and expired == client._oauth2_access_token:
                client.refresh_access_token(scope=client._scope)
            client.check_and_refresh_access_token()
        attempt = copy.copy(client)
        attempt._headers = dict(client._headers or {})
        attempt.request_json_string_with_retry = attempt.request_json_string
        return attempt

    def _failure(self, error, route, path, retry):
        """What Django expects where the SDK raised error."""
        self._process.listing = None  # it may be what has misled the caller
        reason = _reason(error)
        for code, ends in OS_ERRORS.items():
            if reason.endswith(ends):
                return _os_error(code, f"{route}: {reason}", path)
        for name in _CREDENTIALS:  # Dropbox repeats a malformed token in its answer
            secret = getattr(self.client, f"_{name}") or "\0"
            for key, value in vars(error).items():
                if isinstance(value, str):
                    setattr(error, key, value.replace(secret, f"<{name}>"))
        detail = "" if hasattr(error, "error") else getattr(error, "body", error)
        said = f"{reason} {detail}".strip()[:500]
        hint = next((f" ({hint})" for tag, hint in HINTS.items() if tag in said), "")
        message = f"{route} of {path!r} failed {retry}: {said}{hint}."
        return DropboxStorageException(message, reason)


_CREDENTIALS = ("oauth2_access_token", "oauth2_refresh_token", "app_key", "app_secret")
_OPTIONS = {k: v for k, v in vars(DropboxStorage).items() if isinstance(v, _Option)}


class _Process:
    """What a storage holds in one process: a forked child inherits none of it."""

    def __init__(self):
        self.lock = threading.RLock()
        self.client = self.options = self.listing = None


class _Folder:
    """The metadata of a folder that an upload has created on its way."""

    def __init__(self, path):
        self.name = posixpath.basename(path)


class _Retry:
    """The one policy by which a call is repeated: how often, when, and for how long."""

    def __init__(self, storage):
        self._storage, self._failures, self._since = storage, 0, 0.0
        self.lost = False  # the answer to an attempt that may have been carried out

    def wait(self, error, transient=False):
        """Sleep until the next attempt; return whether there is to be one at all."""
        self._failures, self._since = (
            self._failures + 1,
            self._since or time.monotonic(),
        )
        status = getattr(
            error, "status_code", 409 if hasattr(error, "request_id") else 0
        )
        unanswered = status in (0, 408) or status >= 500
        self.lost = self.lost or unanswered
        busy = status == 429 or _reason(error).endswith(BUSY)
        pause = max(
            2**self._failures / 8 * random.uniform(1, 2),
            getattr(error, "backoff", 0) or 0,
        )
        late = time.monotonic() + pause > self._since + self._storage.MAX_WAIT
        if late or self._failures >= self._storage.MAX_ATTEMPTS:
            return False
        if again := unanswered or busy or transient:
            time.sleep(pause)
        return again

    def __str__(self):
        return f"{self._failures} times in {time.monotonic() - self._since:.0f} s"


def _reason(error):
    """Dropbox's tags, as in "path/conflict/file"; or else the status or the type."""
    tags, value = [], getattr(error, "error", None)
    while value is not None:
        tags.append(
            getattr(value, "_tag", None) or getattr(value, "required_scope", None)
        )
        value = getattr(value, "_value", getattr(value, "reason", None))
    status = f"HTTP {error.status_code}" if hasattr(error, "status_code") else ""
    return "/".join(filter(None, tags)) or status or type(error).__name__


def _is_file(metadata):
    return hasattr(metadata, "rev")


def _os_error(code, detail, path):
    # OSError itself picks the subclass that belongs to the code.
    return OSError(code, f"{os.strerror(code)} in Dropbox ({detail})", path)


class DropboxFile(File):
    """A file in Dropbox, as DropboxStorage.open() returns it.

    mode: "r" and "rb" read, with a seekable stream that fetches what is read; "w", "wb"
    replace the file and "x", "xb" create it, when the file is closed and not before: a
    with block that ends in an exception leaves Dropbox as it was. The modes without "b"
    take and give text in UTF-8. Other modes raise ValueError.
    """

    def __init__(self, name, storage, mode="rb"):
        self.name, self._storage, self.mode = name, storage, mode
        self.file = self._open_stream()

    def _open_stream(self):
        if self.mode not in ("r", "rb", "w", "wb", "x", "xb"):
            raise ValueError(
                f"mode must be r, rb, w, wb, x or xb: found {self.mode!r}."
            )
        storage, path = self._storage, self._storage._path(self.name)
        if self.mode[0] == "x" and storage.exists(self.name):
            raise _os_error(errno.EEXIST, f"mode {self.mode!r}", path)
        if self.mode[0] == "r":
            self._stream = _Download(storage, path)
            stream = io.BufferedReader(self._stream, READ_SIZE)
        else:
            replace = "update" if storage.write_mode == "update" else "overwrite"
            stream = _Upload(storage, path, "add" if self.mode[0] == "x" else replace)
            self._stream = stream
        return stream if "b" in self.mode else io.TextIOWrapper(stream, "utf-8")

    @property
    def size(self):
        """In bytes: of the file when it was opened, or of what has been written."""
        return self._stream.size

    def open(self, mode=None):
        """Open the file again, or go back to its beginning if it is open; return it."""
        if self.closed or (mode or self.mode) != self.mode:
            self.close()
            self.mode = mode or self.mode
            self.file = self._open_stream()
        elif self.readable():
            self.seek(0)
        return self

    def close(self):
        try:
            if not self.closed and self.writable():
                self.file.flush()
                self._stream.commit(self._stream.path)
        finally:
            self._stream.close()

    def __exit__(self, exc_type, exc_value, traceback):
        if exc_type:
            self._stream.close()  # half of a file must not replace the old one
        self.close()


class _ContentHash:
    """Dropbox's content hash, computed while the bytes pass by.

    SHA-256 over the SHA-256 digests of each block of 4 MiB.
    https://www.dropbox.com/developers/reference/content-hash
    """

    def __init__(self, data=b""):
        self.size, self._digests, self._block = 0, hashlib.sha256(), hashlib.sha256()
        self.update(data)

    def update(self, data):
        view = memoryview(data)
        while view:
            head = view[: HASH_BLOCK - self.size % HASH_BLOCK]
            self._block.update(head)
            self.size, view = self.size + len(head), view[len(head) :]
            if self.size % HASH_BLOCK == 0:
                self._digests.update(self._block.digest())
                self._block = hashlib.sha256()

    def hexdigest(self):
        digests = self._digests.copy()
        digests.update(self._block.digest() if self.size % HASH_BLOCK else b"")
        return digests.hexdigest()

    def check(self, metadata, route, path):
        """Raise DropboxStorageException unless this is the hash in the metadata."""
        if self.hexdigest() != metadata.content_hash:
            message = f"{route} of {path!r} failed: not the bytes that Dropbox holds."
            raise DropboxStorageException(message, "content_hash_mismatch")


class _Download(io.RawIOBase):
    """The bytes of a file, from one revision of it, in parts.

    Opening makes one request, whose reply holds the metadata and the first part. Seeking
    is free until the next read, which begins a new request if it has to. Who has read
    FIRST_PARTS in order has the parts that follow fetched ahead.
    """

    def __init__(self, storage, path):
        self._storage, self._path, self._revision, self.size = storage, path, path, 0
        self._position = self._begin = 0  # of the reader, who may seek, and of _part
        self._parts, self._part, self._content = self._fetch_all(0), b"", _ContentHash()
        try:
            self._load()
        except DropboxStorageException as error:
            if error.reason != "HTTP 416":  # an empty file has no range
                raise

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        position = offset + (0, self._position, self.size)[whence]
        if position < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = position
        return position

    def readinto(self, buffer):
        if self._position >= self.size:
            return 0
        if not self._begin <= self._position < self._begin + len(self._part):
            self._load()
        start = self._position - self._begin
        data = self._part[start : start + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self):
        self._parts.close()
        super().close()

    def _load(self):
        """Take the next part, or begin anew at the position after a seek or an error."""
        if self._position != self._begin + len(self._part):
            self._parts.close()
            self._parts, self._content = self._fetch_all(self._position), _ContentHash()
        self._begin, self._part = -1, b""  # in case of an error
        part = next(self._parts)
        self._content.update(part)
        if self._content.size == self.size:
            self._content.check(self._metadata, "files/download", self._path)
        self._begin, self._part = self._position, memoryview(part)

    def _fetch_all(self, start):
        """The parts from start to the end of the file."""
        self._abandoned = False
        for length in FIRST_PARTS:
            yield self._fetch(start, start + length)
            start += length
        connections, ahead = self._storage.CONNECTIONS, []
        with ThreadPoolExecutor(connections, "dropbox_storage") as pool:
            try:
                while ahead or start < self.size:
                    while start < self.size and len(ahead) < connections:
                        ahead.append(pool.submit(self._fetch, start, start + PART_SIZE))
                        start += PART_SIZE
                    yield ahead.pop(0).result()
            finally:
                self._abandoned = True

    def _fetch(self, start, stop):
        """The bytes from start to stop; an attempt goes on where the last was cut off."""
        data = io.BytesIO()

        def download(client):
            begin = start + data.tell()
            client._headers["Range"] = f"bytes={begin}-{stop - 1}"
            self._metadata, response = client.files_download(self._revision)
            self.size, self._revision = self._metadata.size, f"rev:{self._metadata.rev}"
            with response:
                found = response.headers.get("Content-Range", "bytes 0-")
                if not found.startswith(f"bytes {begin}-"):
                    raise OSError(f"asked for bytes {begin} to {stop}, found {found}")
                for block in response.iter_content(READ_SIZE):
                    data.write(block)
                    if self._abandoned:
                        return b""
            if start + data.tell() < min(stop, self.size):
                raise EOFError(f"the reply ended after {data.tell()} bytes")
            return data.getvalue()

        return self._storage._call("files/download", self._path, work=download)


class _Upload(io.RawIOBase):
    """Bytes on their way to Dropbox, which become a file when commit() is called.

    Up to one chunk is kept, and sent with the commit. More goes into a concurrent upload
    session while it is being written, with CONNECTIONS chunks in memory at most. Closing
    without a commit leaves Dropbox as it was, which drops the session by itself.
    """

    def __init__(self, storage, path, mode):
        from dropbox import files

        self._storage, self.path, self.mode, self._files = storage, path, mode, files
        self._target = {"mode": files.WriteMode.add, "strict_conflict": True}
        if mode == "overwrite":
            self._target = {"mode": files.WriteMode.overwrite}
        elif mode == "update":
            with contextlib.suppress(FileNotFoundError):
                revision = storage._file_metadata(path).rev
                self._target["mode"] = files.WriteMode.update(revision)
        self._chunk_size = -(-storage.CHUNK_SIZE // HASH_BLOCK) * HASH_BLOCK
        self._content, self._buffer = _ContentHash(), io.BytesIO()
        self._session, self._offset, self._sending = None, 0, []
        self._pool = ThreadPoolExecutor(storage.CONNECTIONS, "dropbox_storage")

    @property
    def size(self):
        return self._content.size

    def writable(self):
        return True

    def write(self, data):
        with memoryview(data).cast("B") as view:
            written = 0
            while written < view.nbytes:
                if self._buffer.tell() == self._chunk_size:
                    self._send(self._buffer.getvalue())
                    self._buffer = io.BytesIO()
                room = self._chunk_size - self._buffer.tell()
                written += self._buffer.write(view[written : written + room])
            self._content.update(view)
            return written

    def commit(self, path):
        """Make what was written the file at path, at once and whole.

        Raises FileExistsError or IsADirectoryError if something is in the way; it may
        then be called again with another path, and sends nothing twice.
        """
        self.path = path
        try:
            metadata = self._finish() if self._session else self._put()
        except FileExistsError as error:
            if self.mode != "update":
                raise
            message = (
                f"{path!r} has changed since it was looked at; nothing was replaced."
            )
            raise DropboxStorageException(
                message, "path/conflict/file"
            ) from error.__cause__
        self._content.check(metadata, "files/upload", path)
        self._storage._note(path, metadata)

    def close(self):
        self._buffer.close()
        self._pool.shutdown(cancel_futures=True)
        super().close()

    def _put(self):
        data = self._buffer.getvalue()
        try:
            return self._commit("files/upload", data, self.path, **self._target)
        except OSError as error:
            # Dropbox has kept the data, in a session that can be finished elsewhere.
            self._session = error.__cause__.error.get_path().upload_session_id
            self._buffer = io.BytesIO()
            raise

    def _finish(self):
        if rest := self._buffer.getvalue():
            self._close_session(rest)
            self._buffer = io.BytesIO()
        cursor = self._files.UploadSessionCursor(self._session, self.size)
        commit = self._files.CommitInfo(self.path, **self._target)
        return self._commit("files/upload_session/finish", b"", cursor, commit)

    def _close_session(self, rest):
        """Send whole blocks like the others; when all have arrived, what closes it."""
        whole = len(rest) - len(rest) % HASH_BLOCK
        self._send(rest[:whole])
        for sent in self._sending:
            sent.result()
        self._append(self._offset, rest[whole:], close=True)

    def _commit(self, route, data, *args, **kwargs):
        """The file's metadata, also if only the answer that held it was lost."""
        retry = _Retry(self._storage)
        try:
            return self._post(route, data, *args, retry=retry, **kwargs)
        except (OSError, DropboxStorageException):
            with contextlib.suppress(OSError, DropboxStorageException):
                if retry.lost:
                    found = self._storage._call(
                        "files/get_metadata", self.path, self.path
                    )
                    self._content.check(found, route, self.path)
                    return found
            raise

    def _send(self, chunk):
        """Begin to send a chunk of whole hash blocks; wait while there are too many."""
        if not self._session:
            kind = self._files.UploadSessionType.concurrent
            started = self._post("files/upload_session/start", b"", session_type=kind)
            self._session = started.session_id
        self._sending.append(self._pool.submit(self._append, self._offset, chunk))
        self._offset += len(chunk)
        if len(self._sending) >= self._storage.CONNECTIONS:
            self._sending.pop(0).result()

    def _append(self, offset, chunk, close=False):
        cursor = self._files.UploadSessionCursor(self._session, offset)
        retry, route = _Retry(self._storage), "files/upload_session/append_v2"
        try:
            self._post(route, chunk, cursor, close, retry=retry)
        except DropboxStorageException as error:
            # Dropbox has it: the lost answer said so. If not, the commit is refused.
            if not (retry.lost and error.reason in ("closed", "incorrect_offset")):
                raise

    def _post(self, route, data, *args, **kwargs):
        kwargs["content_hash"] = _ContentHash(data).hexdigest()
        return self._storage._call(route, self.path, data, *args, **kwargs)


def serve(request, path, storage="default"):
    """Redirect to a temporary link to the file, for path("media/<path:path>", serve).

    storage is the alias of a DropboxStorage in STORAGES, or a DropboxStorage. Only GET
    and HEAD; 404 for what cannot be a file. Wrap it in login_required or the like to
    decide who may look. A browser keeps the redirect no longer than the link lives.
    """
    from django.http import Http404, HttpResponseNotAllowed, HttpResponseRedirect

    if request.method not in ("GET", "HEAD"):
        return HttpResponseNotAllowed(["GET", "HEAD"])
    if storage == "default":
        storage = django_storage.default_storage  # all that there is before Django 4.2
    elif isinstance(storage, str):
        storage = django_storage.storages[storage]
    try:
        link, made = storage._link(storage._path(path))
    except (OSError, SuspiciousFileOperation, DropboxStorageException) as error:
        if not getattr(error, "reason", "malformed_path").endswith("malformed_path"):
            raise
        raise Http404(path) from error
    left = made + LINK_LIFE - LINK_RESERVE - time.time()
    seconds = max(0, int(min(storage.url_cache_timeout or 0, left)))
    cache_control = f"private, max-age={seconds}"
    return HttpResponseRedirect(link, headers={"Cache-Control": cache_control})
