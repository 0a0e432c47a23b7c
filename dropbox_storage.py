"""Keep the files of a Django project in Dropbox.

    STORAGES = {
        "default": {
            "BACKEND": "dropbox_storage.DropboxStorage",
            "OPTIONS": {
                "oauth2_refresh_token": os.environ["DROPBOX_OAUTH2_REFRESH_TOKEN"],
                "app_key": os.environ["DROPBOX_APP_KEY"],
                "app_secret": os.environ["DROPBOX_APP_SECRET"],
            },
        },
        ...
    }

Bytes flow Django -> DropboxStorage -> _Upload or _Download -> DropboxStorage._perform,
the one door to the SDK -> Dropbox. README.md lists the options and what is promised.

License: BSD-3-Clause.
"""

import contextlib
import copy
import errno
import functools
import hashlib
import io
import logging
import operator
import os
import pathlib
import posixpath
import random
import re
import sys
import threading
import time
import traceback
import unicodedata
from concurrent.futures import Future
from datetime import datetime, timezone

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

# Bytes that one request may carry.
# https://www.dropbox.com/developers/documentation/http/documentation#files-upload
MAX_REQUEST = 150 * MiB

# Bytes that are read from a connection at a time.
READ_SIZE = 128 * 1024

# Bytes. Who has read as many in order is taken to want the rest, which is then fetched
# in blocks of this size, on several connections.
AHEAD = 2 * MiB

# Bytes up to which the rest of a file comes on one connection all the same: there are
# too few blocks for the others.
FEW = 4 * AHEAD

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

CREDENTIALS = ("oauth2_access_token", "oauth2_refresh_token", "app_key", "app_secret")

# What Dropbox says about paths, by the end of its reason, as Python says it.
OS_ERRORS = {
    errno.ENOENT: ("path/not_found", "path_lookup/not_found"),
    errno.EISDIR: ("path/not_file", "conflict/folder"),
    errno.ENOTDIR: ("path/not_folder", "conflict/file_ancestor"),
    errno.EEXIST: ("conflict/file",),
}

# Refusals that mean: the same again, later.
BUSY = ("too_many_write_operations", "content_hash_mismatch", "HTTP 408")

# What to do about the others, by a word of Dropbox's answer; token is the one in use.
HINTS = {
    "expired_access_token": "'sl.' tokens live four hours; set oauth2_refresh_token",
    "invalid_access_token": "{token} is wrong, revoked or of another app",
    "invalid_client": "app_key and app_secret must be of the app that was authorized",
    "missing_scope": "tick it under Permissions in the App Console, authorize again",
    "user_suspended": "the account is suspended; its owner or team can reactivate it",
    "select_user": "team_member_id must be of the team that authorized the app",
    "no_permission": "the account has no access to namespace_id",
    "insufficient_space": "the account is full; free or buy space",
    "no_write_permission": "the account may only read there; change root_path",
    "disallowed_name": "Dropbox reserves that name; get_valid_name() mends it",
    "malformed_path": "no backslash, NUL, DEL, space at an end; at most 255; no emoji?",
    "too_many_files": "the folder is too large; delete what is in it by parts",
    "unsupported_file": "a Paper document has no bytes and no links; export it",
    "email_not_verified": "verify the account's e-mail address, or use base_url",
    "access_denied": "sharing is off for the account; use base_url",
    "settings_error": "public links are off for the account; use base_url",
    "shared_link_already_exists": "but is not told; remove it on dropbox.com",
}

# What a listing without paths means: it cannot be preloaded.
NOT_MOUNTED = "its namespace is not mounted; set preload_metadata to False"


class DropboxStorageException(Exception):
    """Dropbox refused a call for good, or could not be reached for too long.

    The message holds the route, the path, Dropbox's reason and what to do about it;
    `reason` the tags of the API's error alone, as in "path/insufficient_space", or else
    "HTTP 400". The SDK's own exception is the `__cause__`.
    """

    def __init__(self, message, reason=""):
        super().__init__(message)
        self.reason = reason


# What an error means


def _os_error(code, detail, path):
    # OSError itself picks the subclass that belongs to the code.
    return OSError(code, f"{os.strerror(code)} in Dropbox ({detail})", path)


def _reason(error):
    """Dropbox's tags, as in "path/conflict/file"; or else the status or the type."""
    tags, value = [], getattr(error, "error", None)
    while value is not None:
        tag = getattr(value, "_tag", getattr(value, "required_scope", ""))
        if not isinstance(tag, str):
            break  # no union of the SDK's, but one that a test has made up
        tags.append(tag)
        value = getattr(value, "_value", getattr(value, "reason", None))
    status = f"HTTP {error.status_code}" if hasattr(error, "status_code") else ""
    return "/".join(filter(None, tags)) or status or type(error).__name__


def _meaning(error, client):
    """What an error out of the SDK means, in one word.

    "busy": the same again, later. "expired": the client needs a new token.
    "unanswered": there was no answer, or none of Dropbox's, and the work may have been
    done. "misfit": there was one, but not as specified. "refused": for good. "": it
    does not come from Dropbox.
    """
    from dropbox import exceptions
    from dropbox.stone_validators import ValidationError
    from urllib3.exceptions import HTTPError

    reason = _reason(error)
    if isinstance(error, exceptions.RateLimitError) or reason.endswith(BUSY):
        return "busy"
    if reason == "expired_access_token" and client._oauth2_refresh_token:
        return "expired"
    # What requests raises is an OSError; an answer that does not parse one of the last.
    no_answer = (OSError, EOFError, HTTPError, ValueError, KeyError, AssertionError)
    if isinstance(error, (exceptions.InternalServerError, *no_answer)):
        return "unanswered"
    if isinstance(error, ValidationError):
        return "misfit"
    return "refused" if isinstance(error, exceptions.DropboxException) else ""


def _clear_frames(error, handled):
    """Empty the frames of the error and of its causes, up to what was handled before.

    The SDK's hold tokens, and Django's debug page and its mails to ADMINS show them.
    """
    while error not in (None, handled):
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _is_file(metadata):
    return hasattr(metadata, "rev")


# The options


OPTIONS = {}  # by name, as DropboxStorage declares them


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
        OPTIONS[name] = self

    def __get__(self, storage, owner=None):
        if storage is None:
            return self
        return self.clean(getattr(settings, self.setting, self.default))

    def clean(self, value):
        """The value to use; raises ImproperlyConfigured if it is not allowed."""
        try:
            return self._clean(value, *self._allowed)
        except ValueError as error:
            found = "something else" if self.name in CREDENTIALS else repr(value)
            message = f"{self.name} (or {self.setting}) must be {error}: found {found}."
        del value  # a debug page shows what the frames of an error hold
        raise ImproperlyConfigured(message)

    def distance(self, storage):
        """How near the value is: 0 for the constructor's, most for the settings'."""
        places = [vars(storage), *map(vars, type(storage).__mro__)]
        return [self.name in place for place in places].index(True)

    def check(self, storage):
        """Refuse the storage's value if it is not allowed, and tidy one of its own."""
        if isinstance(getattr(type(storage), self.name), property):
            return  # which a subclass may have to answer when it is used
        value = self.clean(getattr(storage, self.name))
        if self.name in vars(storage) or getattr(type(storage), self.name) is not self:
            vars(storage)[self.name] = value


# What the options may be: each returns the value to use.


def _text(value):
    # Empty is what an unset environment variable often is.
    plain = r"[!#-&(-[\]-~]+"
    if value and not (isinstance(value, str) and re.fullmatch(plain, value)):
        raise ValueError("printable ASCII without spaces, quotes and backslashes")
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


# The storage


class _State:
    """What a storage holds in one process: a forked child inherits none of it."""

    def __init__(self):
        self.lock, self.listing_lock = threading.RLock(), threading.RLock()
        self.client = self.connection = self.listing = None


class _ShortNames(django_storage.Storage):
    """Names of files that may replace others: none is taken, but it may be long."""

    def exists(self, name):
        return False

    def get_alternative_name(self, file_root, file_ext):
        return f"{file_root}{file_ext}"


def _remove_tree(entries, path):
    """Remove the path, and all that is below it."""
    for known in [key for key in entries if f"{key}/".startswith(f"{path}/")]:
        del entries[known]


def _add_page(entries, page):
    """Add a page of a listing; later ones also tell what has changed meanwhile."""
    for entry in page:
        # Where a namespace is not mounted there are no paths.
        path = entry.path_lower or entry.name.lower()
        if hasattr(entry, "id"):
            entries[path] = entry
        else:
            _remove_tree(entries, path)


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
    # Seconds after a call's first failure in which further attempts may begin; 0: one
    # attempt; None: as long as MAX_ATTEMPTS take.
    max_wait = _Option("DROPBOX_MAX_WAIT", 60, _seconds, 0, 86400)
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
    # Seconds to wait after the first failure, at most; doubled after each that follows.
    FIRST_WAIT = 0.5

    _client = None  # that was assigned

    def __init__(self, oauth2_access_token=None, **options):
        if oauth2_access_token is not None:
            options["oauth2_access_token"] = oauth2_access_token
        unknown = ", ".join(sorted(options.keys() - OPTIONS.keys() - {"location"}))
        vars(self).update(options)
        del oauth2_access_token, options  # from the frame, which errors may show
        if unknown:
            known = ", ".join(sorted(OPTIONS))
            raise ImproperlyConfigured(f"Unknown option {unknown}; there are {known}.")
        access, refresh = (OPTIONS[name].distance(self) for name in CREDENTIALS[:2])
        for option in OPTIONS.values():
            option.check(self)
        self._check_credentials(needed=False)
        if hasattr(self, "location"):  # as django-storages once called it
            raise ImproperlyConfigured("location is called root_path here; rename it.")
        if self.base_url is not None and self.shared_links:
            raise ImproperlyConfigured("Set base_url or shared_links, not both.")
        if self.oauth2_access_token and access < refresh:  # of two the nearer is meant
            vars(self).update(dict.fromkeys(CREDENTIALS[1:]))
        self._hide_credentials()
        self._states = {}

    def _check_credentials(self, needed):
        """Raise ImproperlyConfigured for what cannot work, and for none if needed."""
        if str(self.oauth2_refresh_token).startswith("sl."):
            mend = "copy refresh_token from the same answer"
            raise ImproperlyConfigured(
                f"oauth2_refresh_token is an access token; {mend}."
            )
        names = [name for name in CREDENTIALS[1:] if not getattr(self, name)]
        if len(names) in (1, 2) or (needed and names and not self.oauth2_access_token):
            missing = " and ".join(f"{n} ({OPTIONS[n].setting})" for n in names)
            raise ImproperlyConfigured(
                f"{missing} not set: set all three of oauth2_refresh_token, app_key, "
                "app_secret, or else oauth2_access_token (DROPBOX_OAUTH2_TOKEN) alone."
            )

    def _hide_credentials(self):
        # deconstruct() itself cannot: @deconstructible replaces it in each class.
        secrets = {vars(self).get(name) for name in CREDENTIALS} - {None}

        def hidden(value):  # without asking a lazy base_url what it is
            return isinstance(value, str) and value in secrets

        args, kwargs = self._constructor_args
        args = tuple(None if hidden(arg) else arg for arg in args)
        kwargs = {k: v for k, v in kwargs.items() if not hidden(v)}
        self._constructor_args = (() if args == (None,) else args, kwargs)

    def __getstate__(self):
        return {**vars(self), "_states": {}}

    @property
    def _state(self):
        return self._states.setdefault(os.getpid(), _State())

    @property
    def client(self):
        """The dropbox.Dropbox that makes the calls.

        Built when it is first used, once per process and again if its options change;
        may be assigned, to use another one with its own credentials.
        """
        state = self._state
        with state.lock:
            if self._client and state.client is not self._client:
                # In a forked process its connections are the parent's, too.
                self._client._session.close()
                state.client, state.connection = self._client, None
            elif not self._client and state.connection != self._connection:
                state.client, state.connection = self._connect(), self._connection
            return state.client

    @client.setter
    def client(self, client):
        self._client = client

    @property
    def _connection(self):
        """The options of which the client is made."""
        names = (*CREDENTIALS, "timeout", "namespace_id", "team_member_id")
        return {name: OPTIONS[name].clean(getattr(self, name)) for name in names}

    def _connect(self):
        self._check_credentials(needed=True)
        import dropbox  # costs 0.25 s and 27 MB, too much for every management command

        session = dropbox.create_session(max_connections=POOL_SIZE)
        options, headers = self._connection, {}
        if root := options.pop("namespace_id"):
            root = f'{{".tag": "namespace_id", "namespace_id": "{root}"}}'
            headers["Dropbox-API-Path-Root"] = root
        if member := options.pop("team_member_id"):
            headers["Dropbox-API-Select-User"] = member
        options.update(max_retries_on_error=0, max_retries_on_rate_limit=0)
        if not self.oauth2_refresh_token and self.oauth2_access_token.startswith("sl."):
            logger.warning("oauth2_access_token: %s.", HINTS["expired_access_token"])
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
        # Django adds an underscore and seven characters; one of the root must stay.
        file_ext = file_ext[-(MAX_NAME - 9) :]
        room = MAX_NAME - 8 - len(file_ext)
        return super().get_alternative_name(file_root[:room], file_ext)

    def get_available_name(self, name, max_length=None):
        if self.write_mode != "add":  # a name that is taken will do
            return _ShortNames().get_available_name(name, max_length)
        return super().get_available_name(name, max_length)

    def delete(self, name):
        """Delete the file, or the folder with all that is in it, if it is there."""
        if not name:
            raise ValueError("The name must be given to delete().")
        path = self._path(name)
        with contextlib.suppress(FileNotFoundError):
            self._call("files/delete_v2", path)
        self._note_deletion(path)

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
            logger.warning("No link to %r: it is not in %r.", name, self.root_path)
            return ""

    def get_modified_time(self, name):
        metadata = self._file_metadata(self._path(name))
        seconds = metadata.server_modified.replace(tzinfo=timezone.utc).timestamp()
        zone = timezone.utc if settings.USE_TZ else None
        return datetime.fromtimestamp(seconds, zone)

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
        return OPTIONS["root_path"].clean(self.root_path).rstrip("/")

    def _path(self, name):
        """The absolute path of a name, which must not be the root."""
        if clean := self._clean_name(name):
            return f"{self._root}/{clean}"
        raise _os_error(errno.EISDIR, "the root of all files", self.root_path)

    def _metadata(self, path):
        if not self.preload_metadata:
            return self._call("files/get_metadata", path)
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
        with self._state.listing_lock:
            found, parent = self._listing().items(), folder.lower() or "/"
            return [entry for path, entry in found if posixpath.dirname(path) == parent]

    def _list_folder(self, folder, recursive=False, attempt=1):
        entries, route = {}, "files/list_folder/continue"
        try:
            page = self._call("files/list_folder", folder, recursive)
            _add_page(entries, page.entries)
            while page.has_more:
                page = self._perform(route, folder, _method(route, page.cursor))
                _add_page(entries, page.entries)
        except FileNotFoundError:
            if folder == self._root:
                return []  # nothing has been saved yet
            raise
        except DropboxStorageException as error:
            if error.reason != "reset" or attempt == self.MAX_ATTEMPTS:
                raise
            return self._list_folder(folder, recursive, attempt + 1)  # cursor expired
        return [*entries.values()]

    def _listing(self):
        """What preload_metadata has listed, by path in lower case."""
        with self._state.listing_lock:
            listing = self._state.listing
            if listing is None:
                entries = self._list_folder(self._root, recursive=True)
                if not all(entry.path_display for entry in entries):
                    raise DropboxStorageException(f"{self.root_path!r}: {NOT_MOUNTED}.")
                listing = {entry.path_display.lower(): entry for entry in entries}
                self._state.listing = listing
            return listing

    def _note_file(self, path, metadata):
        """Keep true what is known: metadata is of the file that is at path now."""
        self._forget_links(path)
        with self._state.listing_lock:
            listing = {} if self._state.listing is None else self._state.listing
            listing[path.lower()] = metadata
            for parent in [*pathlib.PurePosixPath(path).parents][:-1]:
                listing.setdefault(str(parent).lower(), parent)  # it has a name, too

    def _note_deletion(self, path):
        """Keep true what is known: nothing is at path any more."""
        self._forget_links(path)
        with self._state.listing_lock:
            _remove_tree(self._state.listing or {}, path.lower())

    # Links

    def _link(self, path, shared=False):
        """A link to the file and when it was made, in seconds since the epoch."""
        if not self.url_cache_timeout:
            return self._make_link(path, shared), time.time()
        key = self._link_key(path, shared)
        entry = self._ask_cache("get", key)
        if entry and not isinstance(entry, str):
            return entry
        # Who replaces the file removes the mark, and a link to the old one is not kept.
        mark = os.urandom(16).hex()
        self._ask_cache("set", key, mark, self.url_cache_timeout)
        entry = (self._make_link(path, shared), time.time())
        if self._ask_cache("get", key) == mark:
            self._ask_cache("set", key, entry, self.url_cache_timeout)
        return entry

    def _make_link(self, path, shared):
        """A temporary link, or the public one in the form that leads to the bytes."""
        if not shared:
            return self._call("files/get_temporary_link", path).link
        try:
            link = self._call("sharing/create_shared_link_with_settings", path)
        except DropboxStorageException as error:
            if not error.reason.startswith("shared_link_already_exists"):
                raise
            told = self._call("sharing/list_shared_links", path, direct_only=True).links
            if not told:
                raise
            link = told[0]
        return re.sub(r"([?&])dl=\d", r"\1raw=1", link.url)

    def _link_key(self, path, shared):
        client = self.client
        account = client._oauth2_refresh_token or client._oauth2_access_token
        # The headers hold the namespace and the member of the team.
        link = repr((account, client._headers, shared, path.lower()))
        return f"dropbox_storage:{hashlib.sha256(link.encode()).hexdigest()}"

    def _forget_links(self, path):
        keys = [self._link_key(path, shared) for shared in (False, True)]
        self._ask_cache("delete_many", keys)

    def _ask_cache(self, method, *args):
        """What the cache answers; one that is down costs a call, but is no error."""
        try:
            return getattr(cache, method)(*args)
        except Exception as error:
            logger.warning("Cannot keep links in the cache: %s.", type(error).__name__)

    # The door to Dropbox

    def _call(self, route, path, *args, **kwargs):
        """What the SDK's method for the route answers for the path."""
        return self._perform(route, path, _method(route, path, *args, **kwargs))

    def _perform(self, route, path, work, settle=None, abandoned=None, client=None):
        """What work(client) returns: it makes the route's request, for the path.

        The one policy: failures that may pass are repeated, up to MAX_ATTEMPTS and
        within max_wait. The rest raise what Django expects, and name the path; unless
        settle(reason, lost) has an answer all the same: lost is whether an attempt may
        have been carried out, and only its answer been lost. Errors that are not
        Dropbox's pass through. Who has no use for an answer any more is abandoned().
        """
        handled, client = sys.exc_info()[1], client or self.client
        authorized, expired, lost, failed_at = client, None, False, None
        call = f"{route} of {path!r}"
        attempt = 0
        while not (abandoned and abandoned()):
            attempt += 1
            try:
                authorized = self._authorized(client, expired, call)
                return work(authorized)
            except BaseException as caught:
                error, meaning = caught, _meaning(caught, client)
                _clear_frames(caught, handled)
                if not meaning:
                    raise
            failed_at = failed_at or time.monotonic()
            expired = authorized if meaning == "expired" else expired
            lost = lost or meaning in ("unanswered", "misfit")
            tried = ""
            if meaning in ("unanswered", "busy", "expired"):
                tried = self._pause(call, error, meaning, attempt, failed_at)
                if not tried:
                    continue
            elif settle and (result := settle(_reason(error), lost)):
                return result
            self._state.listing = None  # it may be what has misled the caller
            raise _translate_error(error, client, route, path, tried) from error
        raise DropboxStorageException(f"{call} was abandoned.")

    def _pause(self, call, error, meaning, attempt, failed_at):
        """Sleep until the next attempt; if there is none, return what was tried."""
        waited = time.monotonic() - failed_at
        backoff = self.FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1)
        asked = getattr(error, "backoff", None) or 0
        wait = 0 if meaning == "expired" else max(backoff, asked)
        late = self.max_wait is not None and waited + wait >= self.max_wait
        said = f"{call}: {_reason(error)} at attempt {attempt} of {self.MAX_ATTEMPTS}"
        if attempt == self.MAX_ATTEMPTS or (late and meaning != "expired"):
            logger.warning("%s; given up after %.1f s.", said, waited)
            if late and asked > backoff:
                return f" (Dropbox asks to wait {asked} s, max_wait is {self.max_wait})"
            return f" ({attempt} attempt{'s' if attempt > 1 else ''}, {waited:.0f} s)"
        level = logging.INFO if attempt == 1 else logging.WARNING
        logger.log(level, "%s; the next in %.1f s.", said, wait)
        time.sleep(wait)
        return ""

    def _authorized(self, client, expired, call):
        """A copy of client for one attempt, with a live token and headers of its own.

        expired is the copy whose token Dropbox has refused as such, if any. The SDK's
        own retries are off in the copy: of two policies on top of each other, nobody
        could say when they end. The lock lets many threads refresh once.
        """
        with self._state.lock:
            authorized = copy.copy(client)
            authorized._max_retries_on_error = 0
            check = functools.partial(_check_answer, client, call)
            authorized.raise_dropbox_error_for_resp = check
            if expired and expired._oauth2_access_token == client._oauth2_access_token:
                authorized.refresh_access_token(scope=client._scope)
            else:
                authorized.check_and_refresh_access_token()
            for name in ("_oauth2_access_token", "_oauth2_access_token_expiration"):
                setattr(client, name, getattr(authorized, name))
        authorized._headers = dict(client._headers or {})
        authorized._oauth2_refresh_token = None
        authorized.request_json_string_with_retry = authorized.request_json_string
        return authorized


def _method(route, *args, **kwargs):
    """What calls the route's method, of the client that it is given."""
    return operator.methodcaller(route.replace("/", "_"), *args, **kwargs)


def _check_answer(client, call, response):
    """Raise the SDK's error for what it overlooks in an answer, too."""
    from dropbox import exceptions

    status, seconds = response.status_code, response.elapsed.total_seconds()
    address = response.request.path_url
    logger.debug("%s: %s, HTTP %d in %.3f s.", call, address, status, seconds)
    if status in (403, 404):
        # The SDK takes them for errors of the route, whose unions do not know them.
        number = response.headers.get("x-dropbox-request-id")
        raise exceptions.HttpError(number, status, response.text)
    try:
        client.raise_dropbox_error_for_resp(response)
    except exceptions.RateLimitError as error:
        # JSON may leave out how many seconds to wait; the header has them.
        asked = response.headers.get("Retry-After", "")
        error.backoff = int(asked) if asked.isdecimal() else error.backoff
        raise


def _translate_error(error, client, route, path, tried):
    """What Django expects where the SDK raised error."""
    reason = _reason(error)
    for code, ends in OS_ERRORS.items():
        if reason.endswith(ends):
            return _os_error(code, f"{route}: {reason}", path)
    _redact_error(error, client)
    body = "" if hasattr(error, "error") else getattr(error, "body", error)
    said = f"{reason} {body}".strip()[:500]
    words = re.findall(r"\w+", said)
    hint = next((f" ({hint})" for word, hint in HINTS.items() if word in words), "")
    token = f"oauth2_{'refresh' if client._oauth2_refresh_token else 'access'}_token"
    message = f"{route} of {path!r} failed{tried}: {said}{hint.format(token=token)}."
    return DropboxStorageException(message, reason)


def _redact_error(error, client):
    """Take from the error what it says if that repeats one of the credentials."""

    def bare(text):  # however it is quoted and escaped
        return re.sub(r"[\\\"']", "", str(text or ""))

    secrets = [bare(getattr(client, f"_{name}")) for name in CREDENTIALS]
    said = bare(f"{error.args} {vars(error)}")
    if any(secret and secret in said for secret in secrets):
        error.args, error.body, error.message = (), "", ""


class DropboxFile(File):
    """A file in Dropbox, as DropboxStorage.open() returns it.

    mode: "r" and "rb" read, with a seekable stream that fetches what is read; "w", "wb"
    replace the file and "x", "xb" create it, when the file is closed and not before: if
    that is because of an exception, Dropbox is left as it was. The modes without "b"
    take and give text in UTF-8. Other modes raise ValueError.
    """

    def __init__(self, name, storage, mode="rb"):
        self.name, self._storage, self.mode = name, storage, mode
        self.file = self._open_stream()

    def _open_stream(self):
        if self.mode not in ("r", "rb", "w", "wb", "x", "xb"):
            raise ValueError(f"mode must be r, rb, w, wb, x or xb: {self.mode!r}.")
        storage, path = self._storage, self._storage._path(self.name)
        self._whole, self._handled = None, sys.exc_info()[1]
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
        """Commit what was written, unless an exception came up since the opening."""
        if self._whole is None:  # a FieldFile's with block does not tell
            self._whole = sys.exc_info()[1] in (None, self._handled)
        try:
            if self.writable() and self._whole:
                self.file.flush()
                self._stream.commit(self._stream.path)
            elif self.writable():
                logger.warning("%r is not saved: an exception came first.", self.name)
                self._stream.close()
        finally:
            self.file.close()

    def __exit__(self, exc_type, exc_value, traceback):
        self._whole = exc_type is None
        self.close()


class _ContentHash:
    """Dropbox's content hash, computed while the bytes pass by.

    SHA-256 over the SHA-256 digests of each block of 4 MiB.
    https://www.dropbox.com/developers/reference/content-hash
    """

    def __init__(self, data=b""):
        self.size, self._digests, self._block = 0, bytearray(), hashlib.sha256()
        self.update(data)

    def update(self, data):
        view = memoryview(data)
        while view:
            head = view[: HASH_BLOCK - self.size % HASH_BLOCK]
            self._block.update(head)
            self.size, view = self.size + len(head), view[len(head) :]
            if self.size % HASH_BLOCK == 0:
                self._digests += self._block.digest()
                self._block = hashlib.sha256()

    def append(self, other):
        """Add what other has hashed, after whole blocks."""
        self.size, self._block = self.size + other.size, other._block
        self._digests += other._digests

    def hexdigest(self):
        rest = self._block.digest() if self.size % HASH_BLOCK else b""
        return hashlib.sha256(self._digests + rest).hexdigest()

    def check(self, metadata, route, path):
        """Raise DropboxStorageException unless the metadata is of these bytes."""
        hashes = (None, self.hexdigest())  # it is optional in the specification
        if metadata.size != self.size or metadata.content_hash not in hashes:
            message = f"{route} of {path!r} failed: not the bytes that Dropbox holds."
            raise DropboxStorageException(message, "content_hash_mismatch")


def _in_background(function, *args):
    """Call the function on a thread of its own; return the Future of what it returns.

    An executor would join its threads when the interpreter exits: nobody waits for the
    requests of a stream that is gone.
    """
    future = Future()

    def run():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    try:
        threading.Thread(target=run, name="dropbox_storage", daemon=True).start()
    except RuntimeError:  # there can be no more threads, as when the interpreter exits
        run()
    return future


class _Download(io.RawIOBase):
    """The bytes of a file, from one revision of it.

    Opening makes one request, whose reply holds the metadata and begins the file.
    Seeking is free until the next read, which begins a new request if it has to. Who
    has read AHEAD bytes in order has the rest fetched ahead. After an error nothing can
    be read until a seek(), as the buffer above the stream has lost what it held.
    """

    _reading = _parts = None  # an object of its own for each run through the file

    def __init__(self, storage, path):
        self._connections, self._path = storage.CONNECTIONS, path
        self._revision = path  # whichever it is now
        request = functools.partial(storage._perform, "files/download", path)
        self._perform = functools.partial(request, client=storage.client)
        self._metadata, reply = self._perform(self._send_request)
        self._revision, self.size = f"rev:{self._metadata.rev}", self._metadata.size
        self._position = 0  # of the reader, who may seek
        self._begin_reading(reply)

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        if whence == io.SEEK_CUR:  # as in tell()
            self._check_state()
        position = offset + (0, self._position, self.size)[whence]
        if position < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = position
        if self._reading is None:
            self._begin_reading()
        return position

    def readinto(self, buffer):
        self._check_state()
        if self._position >= self.size:
            return 0
        try:
            if not 0 < self._end - self._position <= len(self._part):
                self._load_part()
        except BaseException:
            self._stop_reading()
            raise
        data = self._part[self._position - self._end :][: len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self):
        self._stop_reading()
        super().close()

    def _begin_reading(self, reply=None):
        """Have the bytes from the position on to come, the first of them from reply."""
        self._stop_reading()
        self._reading, self._content = object(), _ContentHash()
        self._part, self._end = b"", self._position  # the part ends there in the file
        self._parts = self._read_parts(self._position, reply)

    def _stop_reading(self):
        """Have nothing more to come: who is fetching ahead will notice."""
        self._reading = None
        if self._parts:
            self._parts.close()

    def _check_state(self):
        if self._reading is None:
            raise DropboxStorageException(
                f"Reading {self._path!r} has failed before; seek() to where to go on."
            )

    def _load_part(self):
        """Take the next part, which begins at the position."""
        if self._position != self._end:
            self._begin_reading()
        part = next(self._parts)
        self._content.update(part)
        if self._content.size == self.size:
            self._content.check(self._metadata, "files/download", self._path)
        self._part, self._end = memoryview(part), self._end + len(part)

    def _read_parts(self, start, reply):
        """Yield the bytes from start on: the first of one request, the rest of many."""
        reading, blocks = self._reading, []
        stop = self.size if self.size - start <= FEW else start + AHEAD
        yield from self._read_range(reading, start, stop, reply)
        for start in range(stop, self.size, AHEAD):
            block = self._read_range(reading, start, min(start + AHEAD, self.size))
            blocks.append(_in_background(list, block))
            if len(blocks) == self._connections:
                yield from blocks.pop(0).result()
        for block in blocks:
            yield from block.result()

    def _read_range(self, reading, start, stop, reply=None):
        """Yield the bytes from start to stop; go on where a reply is cut off."""

        def abandoned():
            return self._reading is not reading

        def read(client):
            nonlocal reply
            if reply is None or reply.closed:
                reply = self._send_request(client, start, stop)[1]
            part = reply.read(min(READ_SIZE, stop - start))
            if not part:
                raise EOFError(f"the reply ended before byte {start}")
            return part

        try:
            while start < stop:
                part = self._perform(read, abandoned=abandoned)
                start += len(part)
                yield part
        finally:
            if reply:
                reply.close()

    def _send_request(self, client, start=0, stop=None):
        """Ask for the bytes from start to stop, or all; return metadata and reply."""
        client._headers["Accept-Encoding"] = "identity"  # the raw reply is not decoded
        if stop:
            client._headers["Range"] = f"bytes={start}-{stop - 1}"
        metadata, response = client.files_download(self._revision)
        encoding = response.headers.get("Content-Encoding", "identity")
        found = response.headers.get("Content-Range", "bytes 0-")
        if encoding != "identity" or not found.startswith(f"bytes {start}-"):
            response.raw.close()
            raise OSError(f"asked for bytes from {start}, found {encoding} {found}")
        return metadata, response.raw


class _Upload(io.RawIOBase):
    """Bytes on their way to Dropbox, which become a file when commit() is called.

    Up to two chunks are kept, and sent with the commit. What is more goes into a
    concurrent upload session while it is being written, with CONNECTIONS chunks in
    flight at most. Closing without a commit leaves Dropbox as it was; it forgets the
    session by itself.
    """

    def __init__(self, storage, path, mode):
        from dropbox import files

        self._storage, self._files = storage, files
        self._perform = functools.partial(storage._perform, client=storage.client)
        self.path, self.mode, self.size = path, mode, 0
        self._target = {"mode": files.WriteMode.add, "strict_conflict": True}
        if mode == "overwrite":
            self._target = {"mode": files.WriteMode.overwrite}
        elif mode == "update":
            with contextlib.suppress(FileNotFoundError):
                revision = storage._file_metadata(path).rev
                self._target["mode"] = files.WriteMode.update(revision)
        size = min(storage.CHUNK_SIZE, MAX_REQUEST // 2 - HASH_BLOCK)
        self._chunk_size = -(-size // HASH_BLOCK) * HASH_BLOCK
        self._buffer, self._content = bytearray(), _ContentHash()
        self._session, self._offset, self._sending = None, 0, []

    def writable(self):
        return True

    def tell(self):
        return self.size

    def write(self, data):
        if self.closed:
            raise ValueError(f"{self.path!r} is closed; nothing can be written to it.")
        view = memoryview(data).cast("B")
        for start in range(0, len(view), self._chunk_size):
            piece = view[start : start + self._chunk_size]
            self._buffer += piece
            self.size += len(piece)
            # What closes a session must hold data: some is always kept.
            while len(self._buffer) > self._chunk_size * (1 if self._session else 2):
                self._send_chunk()
        return len(view)

    def commit(self, path):
        """Make what was written the file at path, at once and whole.

        Raises FileExistsError or IsADirectoryError if something is in the way; it may
        then be called again with another path.
        """
        self.path = path
        now = datetime.now(timezone.utc)
        self._target["client_modified"] = now.replace(tzinfo=None, microsecond=0)
        try:
            metadata = self._finish_session() if self._session else self._put_file()
        except FileExistsError as error:
            if self.mode != "update":
                raise
            raise DropboxStorageException(
                f"{path!r} has changed since it was looked at; it was left alone.",
                "path/conflict/file",
            ) from error
        self._content.check(metadata, "files/upload", path)
        self._storage._note_file(path, metadata)

    def _put_file(self):
        """Send it all in one request, which also commits it."""
        data = bytes(self._buffer)
        self._content = _ContentHash(data)
        target = {**self._target, "content_hash": self._content.hexdigest()}
        return self._call("files/upload", self._committed, data, self.path, **target)

    def _finish_session(self):
        """Close the session when all chunks have arrived, and commit it."""
        if self._buffer:
            while self._sending:  # once it is closed, a session takes no more
                self._await_chunk()
            rest = bytes(self._buffer)
            self._content.append(self._append_chunk(self._offset, rest, close=True))
            self._buffer.clear()
        cursor = self._files.UploadSessionCursor(self._session, self.size)
        commit = self._files.CommitInfo(self.path, **self._target)
        route = "files/upload_session/finish"
        return self._call(route, self._committed, b"", cursor, commit)

    def _committed(self, reason, lost):
        """The file at the target, if it is the one that was to be committed.

        Its bytes are the same, then, and the answer was lost or "update" refused what
        would change nothing. But a conflict of a session, which ends with a commit, is
        one with someone else's file; without one, a file that was added has the time
        that was sent with it.
        """
        conflict = "conflict/file" in reason
        unchanged = conflict and self.mode == "update"
        if not unchanged and (not lost or (conflict and self._session)):
            return None
        with contextlib.suppress(OSError, DropboxStorageException):
            found = self._storage._call("files/get_metadata", self.path)
            sent = self._target["client_modified"]
            ours = self._session or self.mode != "add"
            if _is_file(found) and (ours or found.client_modified == sent):
                self._content.check(found, "files/get_metadata", self.path)
                return found

    def _send_chunk(self):
        if not self._session:
            kind = self._files.UploadSessionType.concurrent
            route = "files/upload_session/start"
            self._session = self._call(route, None, b"", session_type=kind).session_id
        if len(self._sending) == self._storage.CONNECTIONS:
            self._await_chunk()
        chunk = bytes(memoryview(self._buffer)[: self._chunk_size])
        del self._buffer[: self._chunk_size]
        self._sending.append(_in_background(self._append_chunk, self._offset, chunk))
        self._offset += len(chunk)

    def _await_chunk(self):
        """Wait for the oldest chunk in flight; one that has failed stays there."""
        self._content.append(self._sending[0].result())
        self._sending.pop(0)

    def _append_chunk(self, offset, chunk, close=False):
        """Send a chunk of the session; return its hash."""
        content = _ContentHash(chunk)
        cursor = self._files.UploadSessionCursor(self._session, offset)
        route, digest = "files/upload_session/append_v2", content.hexdigest()
        self._call(route, _has_arrived, chunk, cursor, close, content_hash=digest)
        return content

    def _call(self, route, settle, *args, **kwargs):
        work = _method(route, *args, **kwargs)
        return self._perform(route, self.path, work, settle, lambda: self.closed)


def _has_arrived(reason, lost):
    """Whether a chunk whose answer was lost is in the session: that takes no more."""
    return lost and reason.endswith(("closed", "incorrect_offset"))


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
        if not hasattr(django_storage, "storages"):
            found = f"Before Django 4.2 there is no alias {storage!r}"
            raise ImproperlyConfigured(f"{found}: pass serve() the storage itself.")
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
