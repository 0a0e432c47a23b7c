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
import itertools
import json
import logging
import os
import posixpath
import random
import re
import threading
import time
import types
import unicodedata
from concurrent.futures import ThreadPoolExecutor

from django.conf import settings
from django.core.cache import cache
from django.core.exceptions import ImproperlyConfigured, SuspiciousFileOperation
from django.core.files import storage as django_storage
from django.core.files.base import File
from django.utils.deconstruct import deconstructible
from django.utils.encoding import filepath_to_uri
from django.utils.functional import Promise

__all__ = ["DropboxFile", "DropboxStorage", "DropboxStorageException", "serve"]
__version__ = "1.0.0"

logger = logging.getLogger("dropbox_storage")

MiB = 1024 * 1024

# Bytes. Dropbox hashes files in blocks of this size, and a concurrent upload session
# takes chunks that are multiples of it.
# https://www.dropbox.com/developers/reference/content-hash
HASH_BLOCK = 4 * MiB

# Bytes that are read from a connection at a time.
READ_SIZE = 128 * 1024

# Bytes after which someone who reads in order is taken to want the rest, and of the
# blocks in which several connections then fetch it, if that is more than three.
AHEAD = 2 * MiB

# Idle connections that a client keeps: for several threads with six transfers each.
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
    "invalid_access_token": "oauth2_access_token or oauth2_refresh_token is wrong or "
    "revoked; authorize the app again",
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
        self.setting, self.default, self._clean = setting, default, clean
        self._allowed = allowed

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, storage, owner=None):
        if storage is None:
            return self
        return self.clean(getattr(settings, self.setting, self.default))

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
    if isinstance(value, Promise):  # reverse_lazy() works once the URLs are loaded
        return value
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
    timeout = _Option("DROPBOX_TIMEOUT", 100, _seconds, 0.001, 86400)
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

    # Bytes of one request of an upload, rounded up to whole hash blocks; content of up
    # to two of them is one request. At 8 MB/s and 50 ms latency a request for 4 MiB
    # spends 90 % of its time on moving bytes, yet those in memory take only 32 MiB.
    CHUNK_SIZE = 4 * MiB
    # Requests in flight for one transfer; Dropbox limits the bandwidth of a connection.
    CONNECTIONS = 6
    # Attempts of one call, the first included.
    MAX_ATTEMPTS = 6
    # Seconds after a call's first failure in which further attempts may begin.
    MAX_WAIT = 60
    # Seconds to wait after the first failure, at most; doubled after each that follows.
    FIRST_WAIT = 0.5

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
            value = option.clean(given)
            if value is not given and value != given:
                setattr(self, name, value)
        missing = [name for name in _CREDENTIALS[1:] if not getattr(self, name)]
        if len(missing) in (1, 2):
            raise ImproperlyConfigured(
                f"{' and '.join(missing)} not set: oauth2_refresh_token, app_key "
                "and app_secret (or their DROPBOX_* settings) work together; set all "
                "or none."
            )
        self._hide_credentials()
        self._processes = {}

    def _hide_credentials(self):
        # deconstruct() itself cannot: @deconstructible replaces it in each class.
        secrets = [value for name in _CREDENTIALS if (value := getattr(self, name))]

        def hidden(value):  # without asking a lazy base_url what it is
            return isinstance(value, str) and value in secrets

        args, kwargs = self._constructor_args
        args = tuple(None if hidden(arg) else arg for arg in args)
        kwargs = {k: v for k, v in kwargs.items() if not hidden(v)}
        args = () if args == (None,) else args
        self._constructor_args = (args, kwargs)

    def __eq__(self, other):
        # What migrations compare: deconstruct(), without its check of the import path.
        if type(self) is not type(other):
            return NotImplemented  # other may be default_storage, which knows better
        return self._constructor_args == other._constructor_args

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

        Built when it is first used, once per process and again if its options change;
        may be assigned, to use another one with its own credentials.
        """
        options, process = [getattr(self, name) for name in _CONNECTION], self._process
        with process.lock:
            if not self._client and process.options != options:
                process.client, process.options = self._connect(), options
            return self._client or process.client

    @client.setter
    def client(self, client):
        self._client = client

    def _connect(self):
        if not (self.oauth2_access_token or self.oauth2_refresh_token):
            raise ImproperlyConfigured(
                "No Dropbox credentials: set oauth2_refresh_token, app_key and "
                "app_secret, or oauth2_access_token, as options or DROPBOX_* settings."
            )
        if not self.oauth2_refresh_token and self.oauth2_access_token.startswith("sl."):
            logger.warning("oauth2_access_token: %s.", HINTS["expired_access_token"])
        import dropbox  # costs 0.25 s and 27 MB, too much for every management command

        headers = {}
        if self.namespace_id:
            root = {".tag": "namespace_id", "namespace_id": self.namespace_id}
            headers["Dropbox-API-Path-Root"] = json.dumps(root)
        if self.team_member_id:
            headers["Dropbox-API-Select-User"] = self.team_member_id
        options = {name: getattr(self, name) for name in (*_CREDENTIALS, "timeout")}
        options.update(max_retries_on_error=0, max_retries_on_rate_limit=0)
        session = dropbox.create_session(max_connections=POOL_SIZE)
        return dropbox.Dropbox(**options, headers=headers, session=session)

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
        if self.write_mode != "add":  # only asked for because of max_length
            return f"{file_root}{file_ext}"
        # Django adds an underscore and seven characters.
        room = max(1, MAX_NAME - 8 - len(file_ext))
        return super().get_alternative_name(file_root[:room], file_ext)

    def get_available_name(self, name, max_length=None):
        storage = self
        if self.write_mode != "add":  # a name that is taken will do
            storage = copy.copy(self)
            storage.exists = lambda name: False
        return super(DropboxStorage, storage).get_available_name(name, max_length)

    def delete(self, name):
        """Delete the file, or the folder with all that is in it, if it is there."""
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
        entries = self._entries(f"{self._root}/{self._clean_name(path)}".rstrip("/"))
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
            path = (filepath_to_uri(name) or "").lstrip("/")
            return f"{str(self.base_url).rstrip('/')}/{path}"
        try:
            return self._link(self._path(name), self.shared_links)[0]
        except FileNotFoundError:
            logger.warning("No link to %r: there is no such file in Dropbox.", name)
            return ""

    def get_modified_time(self, name):
        modified = self._file_metadata(self._path(name)).server_modified  # in UTC
        timestamp = modified.replace(tzinfo=datetime.timezone.utc).timestamp()
        zone = datetime.timezone.utc if settings.USE_TZ else None
        return datetime.datetime.fromtimestamp(timestamp, zone)

    # Names, and what is known about them

    def _clean_name(self, name):
        """The name in its one form: relative, NFC, forward slashes; "" for the root."""
        given = unicodedata.normalize("NFC", os.fspath(name).replace("\\", "/"))
        clean = posixpath.normpath(given)
        if clean in (".", "/", "//"):
            return ""
        if f"{clean}/".startswith(("/", "../")):
            raise SuspiciousFileOperation(f"{given!r} leads out of {self.root_path!r}.")
        if re.search("[\0\ud800-\udfff]", clean):
            raise SuspiciousFileOperation(f"{given!r} holds NUL or half a character.")
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

    def _list_folder(self, folder, recursive=False, attempt=1):
        try:
            page = self._call("files/list_folder", folder, folder, recursive)
            entries = page.entries
            while page.has_more:
                page = self._call("files/list_folder/continue", folder, page.cursor)
                entries += page.entries
        except FileNotFoundError:
            if folder == self._root:
                return []  # nothing has been saved yet
            raise
        except DropboxStorageException as error:
            if error.reason != "reset" or attempt == self.MAX_ATTEMPTS:
                raise
            return self._list_folder(folder, recursive, attempt + 1)  # cursor expired
        # Later pages also report what has been deleted meanwhile, without an id.
        return [entry for entry in entries if hasattr(entry, "id")]

    def _listing(self):
        """What preload_metadata has listed, by path in lower case."""
        with self._process.lock:
            if self._process.listing is None:
                entries = self._list_folder(self._root, recursive=True)
                self._process.listing = {e.path_display.lower(): e for e in entries}
            return self._process.listing

    def _note(self, path, metadata):
        """Keep true what is remembered: metadata is at path now, or nothing if None."""
        self._cache("delete_many", [self._link_key(path, x) for x in (False, True)])
        with self._process.lock:
            listing = {} if self._process.listing is None else self._process.listing
            for known in [k for k in listing if f"{k}/".startswith(f"{path.lower()}/")]:
                del listing[known]
            while metadata and path != "/":
                listing.setdefault(path.lower(), metadata)
                path = posixpath.dirname(path)
                metadata = types.SimpleNamespace(name=posixpath.basename(path))

    # Links

    def _link(self, path, shared=False):
        """A link to the file and when it was made, in seconds since the epoch."""
        key = self._link_key(path, shared)
        entry = self._cache("get", key) if self.url_cache_timeout else None
        if not entry:
            make = self._shared_link if shared else self._temporary_link
            entry = (make(path), time.time())
            self._cache("set", key, entry, self.url_cache_timeout or 0)
        return entry

    def _temporary_link(self, path):
        return self._call("files/get_temporary_link", path, path).link

    def _shared_link(self, path):
        """The public link to the file, in the form that leads to its bytes."""
        route = "sharing/create_shared_link_with_settings"
        try:
            link = self._call(route, path, path)
        except DropboxStorageException as error:
            if not error.reason.startswith("shared_link_already_exists"):
                raise
            route = "sharing/list_shared_links"
            link = self._call(route, path, path, direct_only=True).links[0]
        return re.sub(r"([?&])dl=\d", r"\1raw=1", link.url)

    def _link_key(self, path, shared):
        client, space = self.client, (self.namespace_id, self.team_member_id)
        account = client._oauth2_refresh_token or client._oauth2_access_token
        digest = hashlib.sha256(repr((account, space, shared, path.lower())).encode())
        return f"dropbox_storage:{digest.hexdigest()}"

    def _cache(self, method, *args):
        """What the cache answers; one that is down costs a call, but is no error."""
        try:
            return getattr(cache, method)(*args)
        except Exception as error:
            logger.warning("Cannot keep links in the cache: %s.", type(error).__name__)

    # The door to Dropbox

    def _call(self, route, path, *args, work=None, settle=None, **kwargs):
        """What the SDK's method for the route returns, or work(client).

        The one policy: failures that may pass are repeated, up to MAX_ATTEMPTS and
        within MAX_WAIT. The rest raise what Django expects, and name the path;
        unless an attempt may have been carried out and only its answer been lost, and
        settle(reason) finds that it was: then that is returned.
        """
        method = route.replace("/", "_")
        work = work or (lambda client: getattr(client, method)(*args, **kwargs))
        authorized = client = self.client
        lost, expired, failed_at = False, None, None
        for attempt in itertools.count(1):
            try:
                authorized = self._authorized(client, expired)
                return work(authorized)
            except Exception as error:
                reason, status = _reason(error), _status(error)
                unanswered = status in (0, 408) or status >= 500
                busy = status == 429 or reason.endswith(BUSY)
                stale = client._oauth2_refresh_token and "expired_access" in reason
                expired = authorized._oauth2_access_token if stale else expired
                lost = lost or unanswered or status == 200
                failed_at = failed_at or time.monotonic()
                backoff = self.FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1)
                wait = 0 if stale else max(backoff, getattr(error, "backoff", 0) or 0)
                waited = time.monotonic() - failed_at
                passing = unanswered or busy or stale
                left = attempt < self.MAX_ATTEMPTS and waited + wait < self.MAX_WAIT
                if passing and left:
                    time.sleep(wait)
                    continue
                if lost and settle and (result := settle(reason)):
                    return result
                pauses = f"{attempt} attempts, {waited:.0f} s, next after {wait:.0f} s"
                tried = f" ({pauses})" if passing else ""
                raise self._failure(error, route, path, tried) from error

    def _authorized(self, client, expired):
        """A copy of client for one attempt, with a live token.

        The SDK's own retries are off in it: of two policies on top of each other,
        nobody could say when they end. The lock lets many threads refresh once.
        """
        with self._process.lock:
            if expired and expired == client._oauth2_access_token:
                client.refresh_access_token(scope=client._scope)
            client.check_and_refresh_access_token()
            authorized = copy.copy(client)
        authorized._headers = dict(client._headers or {})
        authorized._oauth2_refresh_token = None
        authorized.request_json_string_with_retry = authorized.request_json_string
        return authorized

    def _failure(self, error, route, path, tried):
        """What Django expects where the SDK raised error."""
        self._process.listing = None  # it may be what has misled the caller
        reason = _reason(error)
        for code, ends in OS_ERRORS.items():
            if reason.endswith(ends):
                return _os_error(code, f"{route}: {reason}", path)
        secrets = [getattr(self.client, f"_{name}") for name in _CREDENTIALS]
        shown = f"{error.args} {vars(error)}"
        if any(secret and secret in shown for secret in secrets):
            error.args, error.body, error.message = (), "", ""  # a malformed token
        body = "" if hasattr(error, "error") else getattr(error, "body", error)
        said = f"{reason} {body}".strip()[:500]
        hint = next((f" ({hint})" for tag, hint in HINTS.items() if tag in said), "")
        message = f"{route} of {path!r} failed{tried}: {said}{hint}."
        return DropboxStorageException(message, reason)


_CREDENTIALS = ("oauth2_access_token", "oauth2_refresh_token", "app_key", "app_secret")
_CONNECTION = (*_CREDENTIALS, "timeout", "namespace_id", "team_member_id")
_OPTIONS = {k: v for k, v in vars(DropboxStorage).items() if isinstance(v, _Option)}


class _Process:
    """What a storage holds in one process: a forked child inherits none of it."""

    def __init__(self):
        self.lock = threading.RLock()
        self.client = self.options = self.listing = None


def _status(error):
    """The HTTP status of Dropbox's answer: 200 if it does not fit, 0 if none came."""
    if type(error).__name__ == "ValidationError":  # stone's: the same the next time
        return 200
    return getattr(error, "status_code", 409 if hasattr(error, "request_id") else 0)


def _reason(error):
    """Dropbox's tags, as in "path/conflict/file"; or else the status or the type."""
    tags, value = [], getattr(error, "error", None)
    while value is not None:
        scope = getattr(value, "required_scope", None)
        tags.append(getattr(value, "_tag", None) or scope)
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
            raise ValueError(f"mode must be r, rb, w, wb, x or xb: {self.mode!r}.")
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
            if self.writable():
                self.file.flush()
                self._stream.commit(self._stream.path)
        finally:
            self.file.close()

    def __exit__(self, exc_type, exc_value, traceback):
        if exc_type and self.writable():
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
    """The bytes of a file, from one revision of it.

    Opening makes one request, whose reply holds the metadata and begins the file.
    Seeking is free until the next read, which begins a new request if it has to. Who
    has read AHEAD bytes in order has the rest fetched ahead.
    """

    def __init__(self, storage, path):
        self._storage, self._path, self._revision, self.size = storage, path, path, 0
        self._position = 0  # of the reader, who may seek
        self._parts, self._part, self._part_at = self._read_on(0), b"", -1
        self._load()

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
        if not 0 <= self._position - self._part_at < len(self._part):
            self._load()
        data = self._part[self._position - self._part_at :][: len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self):
        self._parts.close()
        super().close()

    def _load(self):
        """Take the next part; after a seek or an error begin anew at the position."""
        if self._position != self._part_at + len(self._part):
            self._parts.close()
            self._parts, self._content = self._read_on(self._position), _ContentHash()
        self._part, self._part_at = b"", -1  # in case of an error
        part = next(self._parts)
        self._content.update(part)
        if self._content.size == self.size:
            self._content.check(self._metadata, "files/download", self._path)
        self._part, self._part_at = memoryview(part), self._position

    def _read_on(self, start):
        """Yield the bytes from start to the end; many come on several connections."""
        begin, ahead = (yield from self._stream(start)), []
        self._closing = False
        with ThreadPoolExecutor(self._storage.CONNECTIONS, "dropbox_storage") as pool:
            try:
                for start in range(begin, self.size, AHEAD):
                    ahead.append(pool.submit(self._fetch, start))
                    if len(ahead) == self._storage.CONNECTIONS:
                        yield from ahead.pop(0).result()
                for block in ahead:
                    yield from block.result()
            finally:
                self._closing = True  # nobody waits for the blocks in flight

    def _fetch(self, start):
        with contextlib.closing(self._stream(start, start + AHEAD)) as stream:
            return list(itertools.takewhile(lambda part: not self._closing, stream))

    def _stream(self, start, stop=None):
        """Yield the bytes from start to stop, return where that was.

        A reply that is cut off is continued. Without stop it ends with the file, or
        after AHEAD bytes if much is left.
        """
        response = None

        def read(client):
            nonlocal response
            response = response or self._request(client, start, stop)
            try:
                part = response.raw.read(READ_SIZE)
                if not part and start < self.size:
                    raise EOFError(f"the reply ended before byte {start}")
                return part
            except BaseException:
                response.close()
                response = None
                raise

        try:
            while True:
                part = self._storage._call("files/download", self._path, work=read)
                if not stop and self.size - start > 4 * AHEAD:
                    stop = start + AHEAD
                start += len(part)
                yield part
                if start >= min(stop or self.size, self.size):
                    return start
        finally:
            if response:
                response.close()

    def _request(self, client, start, stop):
        if start or stop:
            client._headers["Range"] = f"bytes={start}-{stop - 1 if stop else ''}"
        metadata, response = client.files_download(self._revision)
        found = response.headers.get("Content-Range", "bytes 0-")
        if not found.startswith(f"bytes {start}-"):
            response.close()
            raise OSError(f"asked for bytes from {start}, found {found}")
        self._metadata, self.size = metadata, metadata.size
        self._revision = f"rev:{metadata.rev}"
        return response


class _Upload(io.RawIOBase):
    """Bytes on their way to Dropbox, which become a file when commit() is called.

    Up to two chunks are kept, and sent with the commit. What is more goes into a
    concurrent upload session while it is being written, with CONNECTIONS chunks in
    flight at most. Closing without a commit leaves Dropbox as it was; it forgets the
    session by itself.
    """

    def __init__(self, storage, path, mode):
        from dropbox import files

        self._pool = ThreadPoolExecutor(storage.CONNECTIONS, "dropbox_storage")
        self._storage, self.path, self.mode, self._files = storage, path, mode, files
        self._target = {"mode": files.WriteMode.add, "strict_conflict": True}
        if mode == "overwrite":
            self._target = {"mode": files.WriteMode.overwrite}
        elif mode == "update":
            with contextlib.suppress(FileNotFoundError):
                revision = storage._file_metadata(path).rev
                self._target["mode"] = files.WriteMode.update(revision)
        self._chunk_size = -(-storage.CHUNK_SIZE // HASH_BLOCK) * HASH_BLOCK
        self._content, self._buffer = _ContentHash(), bytearray()
        self._session, self._offset, self._sending = None, 0, []

    @property
    def size(self):
        return self._content.size

    def writable(self):
        return True

    def write(self, data):
        if self.closed:
            raise ValueError(f"{self.path!r} is closed; nothing can be written to it.")
        view = memoryview(data).cast("B")
        for start in range(0, len(view), self._chunk_size):
            piece = view[start : start + self._chunk_size]
            self._content.update(piece)
            self._buffer += piece
            self._send_beyond(self._chunk_size * (1 if self._session else 2))
        return len(view)

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
            message = f"{path!r} has changed since it was looked at; it was left alone."
            raise DropboxStorageException(message, "path/conflict/file") from error
        self._content.check(metadata, "files/upload", path)
        self._storage._note(path, metadata)

    def close(self):
        self._pool.shutdown(cancel_futures=True)
        super().close()

    def _put(self):
        try:
            data = bytes(self._buffer)
            return self._commit("files/upload", data, self.path, **self._target)
        except OSError as error:
            # Dropbox has kept the data, in a session that can be finished elsewhere.
            self._session = error.__cause__.error.get_path().upload_session_id
            self._buffer.clear()
            raise

    def _finish(self):
        if self._buffer:  # what is no whole block closes the session, after all others
            self._send_beyond(HASH_BLOCK - 1)
            for sent in self._sending:
                sent.result()
            self._append(self._offset, bytes(self._buffer), close=True)
            self._buffer.clear()
        cursor = self._files.UploadSessionCursor(self._session, self.size)
        commit = self._files.CommitInfo(self.path, **self._target)
        return self._commit("files/upload_session/finish", b"", cursor, commit)

    def _commit(self, route, data, *args, **kwargs):
        return self._post(route, data, *args, settle=self._find, **kwargs)

    def _find(self, reason):
        """The metadata of the file at the target, if it is what was to be committed."""
        with contextlib.suppress(OSError, DropboxStorageException):
            found = self._storage._call("files/get_metadata", self.path, self.path)
            self._content.check(found, "files/upload", self.path)
            return found

    def _send_beyond(self, kept):
        """Begin to send chunks until that many bytes are left; wait for the oldest."""
        while len(self._buffer) > kept:
            if not self._session:
                kind = self._files.UploadSessionType.concurrent
                route = "files/upload_session/start"
                self._session = self._post(route, b"", session_type=kind).session_id
            if len(self._sending) == self._storage.CONNECTIONS:
                self._sending.pop(0).result()
            whole = len(self._buffer) - len(self._buffer) % HASH_BLOCK
            chunk = bytes(memoryview(self._buffer)[: min(whole, self._chunk_size)])
            self._sending.append(self._pool.submit(self._append, self._offset, chunk))
            self._offset += len(chunk)
            del self._buffer[: len(chunk)]

    def _append(self, offset, chunk, close=False):
        # If a lost answer was a success, Dropbox says that the session is closed.
        cursor = self._files.UploadSessionCursor(self._session, offset)
        done = ("closed", "incorrect_offset").__contains__
        route = "files/upload_session/append_v2"
        self._post(route, chunk, cursor, close, settle=done)

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
    if storage == "default":  # all that there is before Django 4.2
        storage = django_storage.default_storage
    elif isinstance(storage, str):
        storage = django_storage.storages[storage]
    try:
        link, made = storage._link(storage._path(path))
    except (OSError, SuspiciousFileOperation) as error:
        raise Http404(path) from error
    except DropboxStorageException as error:
        if error.reason.endswith("malformed_path"):
            raise Http404(path) from error
        raise
    left = made + LINK_LIFE - LINK_RESERVE - time.time()
    seconds = max(0, int(min(storage.url_cache_timeout or 0, left)))
    cache_control = f"private, max-age={seconds}"
    return HttpResponseRedirect(link, headers={"Cache-Control": cache_control})
