"""Keep the files of a Django project in Dropbox.

    # settings.py
    DROPBOX_OAUTH2_REFRESH_TOKEN = os.environ["DROPBOX_OAUTH2_REFRESH_TOKEN"]
    DROPBOX_APP_KEY = os.environ["DROPBOX_APP_KEY"]
    DROPBOX_APP_SECRET = os.environ["DROPBOX_APP_SECRET"]
    STORAGES = {
        "default": {"BACKEND": "dropbox_storage.DropboxStorage"},
        ...
    }

README.md describes the options and what the storage does. A call goes this way:

    Django -> DropboxStorage -> _Upload or _Download -> _Api -> SDK client -> Dropbox

One rule explains much of the code. Debug pages and error trackers show the local
variables of every function that an error passes through. Therefore no local variable
holds a credential, and the content of a file is only in objects with a short repr, such
as io.BytesIO and memoryview.

License: BSD-3-Clause.
"""

import collections
import contextlib
import copy
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
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
from concurrent.futures import Future
from datetime import datetime, timezone

from django.conf import settings
from django.core.cache import caches
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

# Bytes. Dropbox hashes files in blocks of this size. The chunks of a concurrent upload
# session are multiples of it.
# https://www.dropbox.com/developers/reference/content-hash
HASH_BLOCK = 4 * MiB

# Bytes that one request may carry.
# https://www.dropbox.com/developers/documentation/http/documentation#files-upload
MAX_REQUEST = 150 * MiB

# Bytes that are read from a connection or a temporary file at a time.
READ_SIZE = 128 * 1024

# Bytes. A file of up to this size is read with one request.
WHOLE_FILE = 8 * MiB

# Bytes of one request for a part of a larger file. At 8 MB/s and 50 ms latency, such a
# request spends 80 % of its time on moving bytes.
READ_BLOCK = 2 * MiB

# Blocks of a file that are kept in memory, apart from the first.
KEPT_BLOCKS = 8

# Bytes. If no more than this is left of a response, it is read to its end, which takes
# less time than the TLS handshake of a new connection.
DRAIN = 512 * 1024

# Idle connections that a client keeps: enough for several threads with six requests.
POOL_SIZE = 32

# SDK clients that a storage keeps if its options change, as with one account a tenant.
KEPT_CLIENTS = 16

# Seconds. The longest pause between two attempts, unless Dropbox asks for a longer one.
MAX_PAUSE = 15

# Characters of a name, and the names that Dropbox refuses in upper and lower case.
# https://help.dropbox.com/organize/file-names
MAX_NAME = 255
RESERVED_NAMES = ("desktop.ini", "thumbs.db", ".ds_store", "icon\r", ".dropbox")
RESERVED_NAMES += (".dropbox.attr",)

# Seconds that a temporary link is valid. A browser keeps a redirect to it for less.
# https://www.dropbox.com/developers/documentation/http/documentation#files-get_temporary_link
LINK_LIFE = 4 * 60 * 60
LINK_RESERVE = 60

WRITE_MODES = ("add", "overwrite", "update")

EXPIRED = "expired_access_token"

CREDENTIALS = ("oauth2_access_token", "oauth2_refresh_token", "app_key", "app_secret")

# The end of Dropbox's reason for each error that Python has a name for.
OS_ERRORS = {
    errno.ENOENT: ("path/not_found", "path_lookup/not_found"),
    errno.EISDIR: ("path/not_file", "conflict/folder"),
    errno.ENOTDIR: ("path/not_folder", "conflict/file_ancestor"),
    errno.EEXIST: ("conflict/file",),
}

# The end of the reasons after which the same request may succeed later.
TRANSIENT = ("too_many_write_operations", "content_hash_mismatch")

# What to do about the other reasons, by a word of Dropbox's answer.
HINTS = {
    EXPIRED: "'sl.' tokens live four hours; set oauth2_refresh_token",
    "invalid_access_token": "oauth2_access_token is wrong, revoked or of another app",
    "invalid_grant": "oauth2_refresh_token is wrong, revoked or of another app",
    "invalid_client": "app_key and app_secret must be of the app that was authorized",
    "missing_scope": "tick it under Permissions in the App Console, authorize again",
    "required scope": "tick it under Permissions in the App Console, authorize again",
    "user_suspended": "the account is suspended; its owner or team can reactivate it",
    "invalid_select_user": "team_member_id must be a member of the app's team",
    "no_permission": "the account has no access to namespace_id",
    "sandbox app": "an app with an App folder cannot use namespace_id",
    "insufficient_space": "the account is full; free or buy space",
    "no_write_permission": "the account may only read there; change root_path",
    "disallowed_name": "Dropbox reserves that name; get_valid_name() mends it",
    "malformed_path": "no backslash, NUL, DEL, space at an end; at most 255; no emoji?",
    "too_many_files": "the folder is too large; delete its files in several steps",
    "team_folder": "a team folder is changed in the team's Admin Console",
    "operation_suppressed": "Dropbox blocks this now; look into the account's web site",
    "restricted_content": "Dropbox blocks this file for legal reasons",
    "access_restricted": "the owner or the team restricts access to this file",
    "unsupported_file": "a Paper document has no bytes and no links; export it",
    "email_not_verified": "verify the account's e-mail address",
}

# Words of the reasons that only the owner of the account or the app can mend. They are
# logged as errors.
OWNER_REASONS = ("access_token", "invalid_grant", "invalid_client", "select_user")
OWNER_REASONS += ("missing_scope", "required scope", "suspended", "insufficient_space")


class DropboxStorageException(Exception):
    """Dropbox refused a request, or could not be reached in time.

    The message names the route, the path, the reason and what to do about it. `reason`
    is Dropbox's own text for programs, such as "path/insufficient_space", "HTTP 400",
    or the name of a network error. `temporary` tells whether the same call may succeed
    later. The exception of the SDK is the `__cause__`.
    """

    def __init__(self, message, reason="", temporary=False):
        super().__init__(message)
        self.reason, self.temporary = reason, temporary


def _os_error(code, detail, path):
    # OSError itself chooses the subclass that belongs to the code.
    return OSError(code, f"{os.strerror(code)} in Dropbox ({detail})", path)


# The options


OPTIONS = {}  # by name, as DropboxStorage declares them


class _Option:
    """An option of the storage, which is read from the settings when it is used.

    This is a non-data descriptor: a constructor argument (in the instance's __dict__)
    and a class attribute of a subclass hide it. That is the order of precedence.
    """

    def __init__(self, setting, default, clean, *allowed):
        self.setting, self.default, self._clean = setting, default, clean
        self._allowed = allowed

    def __set_name__(self, owner, name):
        self.name, self.is_secret = name, name in CREDENTIALS
        OPTIONS[name] = self

    def __get__(self, storage, owner=None):
        if storage is None:
            return self
        return self.clean(getattr(settings, self.setting, self.default))

    def clean(self, value):
        """Return the value in the form that is used, or raise ImproperlyConfigured."""
        try:
            return self._clean(value, *self._allowed)
        except ValueError as error:
            found = "something else" if self.is_secret else repr(value)
            message = f"{self.name} (or {self.setting}) must be {error}: found {found}."
        del value  # an error report shows this frame
        raise ImproperlyConfigured(message)

    def is_computed(self, storage):
        """Whether a property of a subclass computes the value when it is used."""
        attribute = getattr(type(storage), self.name)
        return attribute is not self and hasattr(attribute, "__get__")

    def check(self, storage):
        """Refuse a wrong value, and clean the value of the instance or its class."""
        if not self.is_computed(storage):
            storage._option(self.name)
            # A class keeps its credentials: of two tokens, the nearer one is used.
            is_inherited = getattr(type(storage), self.name) is self
            if self.name in vars(storage) or not (is_inherited or self.is_secret):
                vars(storage)[self.name] = storage._option(self.name)

    def place(self, storage):
        """Where the value is set: 0 for the instance, then one more for each class."""
        places = [vars(storage), *map(vars, type(storage).__mro__)]
        return [self.name in place for place in places].index(True)


# The functions below check and clean the values of options.


def _text(value):
    # An unset environment variable often arrives as an empty string.
    allowed = r"[!#-&(-[\]-~]+"
    if value and not (isinstance(value, str) and re.fullmatch(allowed, value)):
        raise ValueError("printable ASCII without spaces, quotes and backslashes")
    return value or None


def _root_path(value):
    path = "/" + str(value or "").replace("\\", "/").strip("/")
    if not str(value).startswith("/"):
        raise ValueError(f"a path that begins with '/', such as {path!r}")
    if "\0" in path or ".." in path.split("/"):
        raise ValueError("a path without '..' and NUL")
    return unicodedata.normalize("NFC", posixpath.normpath(path))


def _url(value):
    if isinstance(value, Promise):  # reverse_lazy() works after the URLs are loaded
        return value
    if value and not isinstance(value, str):
        raise ValueError("a URL such as '/media/', or None")
    return f"{value.rstrip('/')}/" if value else None


def _seconds(value, least, most):
    if value is None or (type(value) in (int, float) and least <= value <= most):
        return value
    raise ValueError(f"None or a number of seconds from {least} to {most}")


def _one_of(value, choices):
    # The choices, or the name of the setting that holds them.
    choices = getattr(settings, choices) if isinstance(choices, str) else choices
    if value in choices:
        return value
    raise ValueError(f"one of {', '.join(map(repr, choices))}")


class _Connection:
    """The options that make a client. It keeps them out of reports: it has no repr."""

    def __init__(self, storage):
        names = (*CREDENTIALS, "timeout", "namespace_id", "team_member_id")
        vars(self).update({name: storage._option(name) for name in names})
        self.missing = [name for name in CREDENTIALS[1:] if not getattr(self, name)]
        self.is_empty = len(self.missing) == 3 and not self.oauth2_access_token

    def digest(self):
        """A key for this process and these options that does not show them."""
        return hashlib.sha256(repr((os.getpid(), vars(self))).encode()).hexdigest()

    def check(self, required):
        """Raise ImproperlyConfigured for credentials that cannot work together."""
        if str(self.oauth2_refresh_token).startswith("sl."):
            message = "is an access token; copy refresh_token from the same answer."
            raise ImproperlyConfigured(f"oauth2_refresh_token {message}")
        if len(self.missing) in (1, 2) or (required and self.is_empty):
            missing = " and ".join(f"{n} ({OPTIONS[n].setting})" for n in self.missing)
            raise ImproperlyConfigured(
                f"{missing} not set: set all three of oauth2_refresh_token, app_key, "
                "app_secret, or else oauth2_access_token (DROPBOX_OAUTH2_TOKEN) alone."
            )

    def make_client(self):
        import dropbox  # costs 0.25 s and 27 MB, too much for every management command

        root = f'{{".tag": "namespace_id", "namespace_id": "{self.namespace_id}"}}'
        headers = {"Dropbox-API-Path-Root": root} if self.namespace_id else {}
        if self.team_member_id:
            headers["Dropbox-API-Select-User"] = self.team_member_id
        if not self.oauth2_refresh_token and self.oauth2_access_token.startswith("sl."):
            logger.warning("oauth2_access_token: %s.", HINTS[EXPIRED])
        return dropbox.Dropbox(
            **{name: getattr(self, name) for name in CREDENTIALS},
            headers=headers,
            timeout=self.timeout,
            session=dropbox.create_session(max_connections=POOL_SIZE),
            max_retries_on_error=0,  # perform() alone repeats requests
            max_retries_on_rate_limit=0,
        )


# The storage


class _NoNameTaken(django_storage.Storage):
    """Finds names for files that may replace others: only their length matters."""

    def exists(self, name):
        return False

    def get_alternative_name(self, file_root, file_ext):
        return f"{file_root}{file_ext}"


def _mend(part):
    """Return a part of a name without what Dropbox refuses in it."""
    root, extension = posixpath.splitext(part.replace("\x7f", "").rstrip(". "))
    part = (root[: max(1, MAX_NAME - len(extension))] + extension)[:MAX_NAME]
    part = part.rstrip(". ")
    return f"_{part}" if part.lower() in ("", *RESERVED_NAMES) else part


@deconstructible
class DropboxStorage(django_storage.Storage):
    """Django's storage API for the files of a Dropbox account.

    Takes the options below as keyword arguments, and the access token as a positional
    one, too. Each option may also be a class attribute of a subclass or a setting.
    Wrong values raise ImproperlyConfigured here, without a request. Missing credentials
    raise it at the first request: a migration builds its storages without them.

    A method that sends a request raises DropboxStorageException if Dropbox refuses it
    or cannot be reached, and FileNotFoundError, IsADirectoryError, NotADirectoryError
    or FileExistsError where one of them describes the error.
    """

    # An access token of the app. One that begins with "sl." is valid for four hours.
    oauth2_access_token = _Option("DROPBOX_OAUTH2_TOKEN", None, _text)
    # Valid until it is revoked. With the app's key and secret it gives access tokens.
    oauth2_refresh_token = _Option("DROPBOX_OAUTH2_REFRESH_TOKEN", None, _text)
    app_key = _Option("DROPBOX_APP_KEY", None, _text)
    app_secret = _Option("DROPBOX_APP_SECRET", None, _text)
    # The folder that holds all files. It begins at the root of the app or the account.
    root_path = _Option("DROPBOX_ROOT_PATH", "/", _root_path)
    # Seconds without an answer after which a request has failed. None: no limit.
    timeout = _Option("DROPBOX_TIMEOUT", 100, _seconds, 0.001, 86400)
    # Seconds after the first failure of a call in which it is attempted again. 0: one
    # attempt; None: no limit.
    max_wait = _Option("DROPBOX_MAX_WAIT", 60, _seconds, 0, 86400)
    # What save() does if the name is taken. "add": chooses another name; "overwrite":
    # replaces the file; "update": replaces it unless somebody changes it meanwhile.
    write_mode = _Option("DROPBOX_WRITE_MODE", "add", _one_of, WRITE_MODES)
    # If it is set, url() joins it with the name and sends no request; see serve().
    base_url = _Option("DROPBOX_BASE_URL", None, _url)
    # The alias in CACHES of the cache that keeps the temporary links.
    url_cache = _Option("DROPBOX_URL_CACHE", "default", _one_of, "CACHES")
    # Seconds that a link is kept there. 0 or None: not at all.
    url_cache_timeout = _Option(
        "DROPBOX_URL_CACHE_TIMEOUT", 3600, _seconds, 0, LINK_LIFE
    )
    # The team folder or namespace in which root_path begins.
    namespace_id = _Option("DROPBOX_NAMESPACE_ID", None, _text)
    # The member for whom an app acts that a whole team has authorized.
    team_member_id = _Option("DROPBOX_TEAM_MEMBER_ID", None, _text)

    # Bytes of one request of an upload, rounded up to whole hash blocks. Content of up
    # to twice this size is sent with one request. At 8 MB/s and 50 ms latency, a
    # request for 4 MiB spends 90 % of its time on moving bytes.
    CHUNK_SIZE = 4 * MiB
    # Requests of one transfer that are sent at the same time. Dropbox limits the
    # bandwidth of a connection.
    CONNECTIONS = 6
    # Seconds. The longest pause after the first failure; it doubles after each failure.
    FIRST_WAIT = 0.5

    _assigned_client = None

    def __init__(self, oauth2_access_token=None, **options):
        if oauth2_access_token is not None:
            options["oauth2_access_token"] = oauth2_access_token
        unknown = ", ".join(sorted(options.keys() - OPTIONS.keys() - {"location"}))
        vars(self).update(options, _kept={})
        del oauth2_access_token, options  # an error report shows this frame
        if unknown:
            known = ", ".join(sorted(OPTIONS))
            raise ImproperlyConfigured(f"Unknown option {unknown}; there are {known}.")
        if hasattr(self, "location"):  # the name that django-storages once used
            raise ImproperlyConfigured("location is called root_path here; rename it.")
        for option in OPTIONS.values():
            option.check(self)
        if not any(OPTIONS[name].is_computed(self) for name in CREDENTIALS):
            _Connection(self).check(required=False)

    def __getstate__(self):
        return {**vars(self), "_kept": {}}

    @property
    def _constructor_args(self):
        """The arguments for deconstruct(), without those that hold credentials.

        @deconstructible sets this attribute, and replaces deconstruct() in each class.
        """
        args, kwargs = self._arguments
        args = [None if self._holds_credential(arg) else arg for arg in args]
        kwargs = {k: v for k, v in kwargs.items() if not self._holds_credential(v)}
        return tuple(args) if any(arg is not None for arg in args) else (), kwargs

    @_constructor_args.setter
    def _constructor_args(self, arguments):
        self._arguments = arguments

    def _holds_credential(self, value):
        if isinstance(value, Promise):  # a lazy URL, which may not be known yet
            return False
        for name in CREDENTIALS:
            # A property may need a web request, which a migration does not have.
            with contextlib.suppress(Exception):
                if getattr(self, name) and repr(getattr(self, name)) in repr(value):
                    return True
        return False

    def _option(self, name):
        """Return the option's value, cleaned also if a property computes it."""
        return OPTIONS[name].clean(getattr(self, name))

    def _keep(self, key, make):
        """Return the object that is kept under the key, or keep the one that is made.

        setdefault() makes this safe in threads. In a forked process, the keys differ.
        """
        kept = self._kept.get(key) or self._kept.setdefault(key, make())
        for old in [*self._kept][: -2 * KEPT_CLIENTS]:  # each client has an _Api, too
            self._kept.pop(old, None)
        return kept

    @property
    def client(self):
        """The dropbox.Dropbox that sends the requests.

        It is made when it is first used, once per process and set of options. You may
        assign another one, which then uses its own credentials.
        """
        if self._assigned_client:
            return self._assigned_client
        connection = self._connection()
        return self._keep(connection.digest(), connection.make_client)

    @client.setter
    def client(self, client):
        self._assigned_client = client

    def _connection(self):
        """Return the options for a client. Of two tokens, the nearer one is used."""
        connection = _Connection(self)
        if connection.is_empty:
            connection = self._registered_connection() or connection
        connection.check(required=True)
        access, refresh = (OPTIONS[name].place(self) for name in CREDENTIALS[:2])
        if connection.oauth2_access_token and access < refresh:
            vars(connection).update(dict.fromkeys(CREDENTIALS[1:]))
        return connection

    def _registered_connection(self):
        """Return the connection of the storage in STORAGES that is equal to this one.

        Apps pass deconstruct() to a task, which builds the storage again; credentials
        are not in it. Nothing is returned if equal storages have several accounts.
        """
        backend = f"{type(self).__module__}.{type(self).__qualname__}"
        entries = getattr(settings, "STORAGES", {}).items()
        aliases = [alias for alias, entry in entries if entry.get("BACKEND") == backend]
        storages = [django_storage.storages[alias] for alias in aliases]
        equal = [one for one in storages if one.deconstruct() == self.deconstruct()]
        found = [one for one in map(_Connection, equal) if not one.is_empty]
        return found[0] if len({one.digest() for one in found}) == 1 else None

    @property
    def _api(self):
        """The way to Dropbox, with the options as they are now."""
        client = self.client
        api = self._keep((os.getpid(), id(client)), lambda: _Api(client))
        max_wait = self._option("max_wait")
        api.max_wait = float("inf") if max_wait is None else max_wait
        api.first_wait = self.FIRST_WAIT
        return api

    def _open(self, name, mode="rb"):
        return DropboxFile(name, self, mode)

    def _save(self, name, content):
        name, mode = self._clean_name(name), self._option("write_mode")
        revision = self._find_revision(name) if mode == "update" else None
        upload = _Upload(self, self._path(name), mode, revision)
        with contextlib.closing(upload):
            upload.send(content.chunks())
            while True:
                try:
                    upload.commit()
                    return name
                except (FileExistsError, IsADirectoryError):
                    taken, name = name, self._clean_name(self.get_available_name(name))
                    if mode != "add" or name == taken:
                        raise
                    upload.path = self._path(name)

    def generate_filename(self, filename):
        """Also changes in each folder of the name what Dropbox refuses."""
        filename = unicodedata.normalize("NFC", str(filename)).replace("\\", "/")
        *folders, name = filename.split("/")
        folders = [part if part in ("", ".", "..") else _mend(part) for part in folders]
        return super().generate_filename("/".join([*folders, name]))

    def get_valid_name(self, name):
        """Also changes what Dropbox refuses: reserved names, final dots, long names."""
        return _mend(super().get_valid_name(unicodedata.normalize("NFC", str(name))))

    def get_alternative_name(self, file_root, file_ext):
        # Django adds an underscore and seven characters. One of the root must remain.
        file_ext = file_ext[-(MAX_NAME - 9) :]
        room = MAX_NAME - 8 - len(file_ext)
        return super().get_alternative_name(file_root[:room], file_ext)

    def get_available_name(self, name, max_length=None):
        if self._option("write_mode") != "add":
            return _NoNameTaken().get_available_name(name, max_length)
        return super().get_available_name(name, max_length)

    def delete(self, name):
        """Delete the file if it exists, or the folder with all that is in it."""
        if not name:
            raise ValueError("The name must be given to delete().")
        api, path = self._api, self._path(name)
        with contextlib.suppress(FileNotFoundError):
            api.call("files/delete_v2", path)
        self._forget_link(api, path)

    def exists(self, name):
        if not self._clean_name(name):
            return True  # the folder that holds all files
        with contextlib.suppress(FileNotFoundError):
            return bool(self._api.call("files/get_metadata", self._path(name)))
        return False

    def listdir(self, path):
        folder = f"{self._root}/{self._clean_name(path)}".rstrip("/")
        entries = self._list_folder(folder)
        folders = [entry.name for entry in entries if not hasattr(entry, "rev")]
        return folders, [entry.name for entry in entries if hasattr(entry, "rev")]

    def size(self, name):
        return self._file_metadata(name).size

    def url(self, name):
        """Return base_url with the name, or a temporary link to the bytes of the file.

        If the file does not exist, the link is an invalid address that is different for
        each name, and a warning is logged: one missing picture must not break a page.
        """
        base_url = self._option("base_url")
        if base_url is not None:
            path = (filepath_to_uri(name) or "").lstrip("/")
            return f"{str(base_url).rstrip('/')}/{path}"
        if not name:
            raise ValueError("The name must be given to url().")
        try:
            return self._link(self._path(name))[0]
        except FileNotFoundError:
            logger.warning("No link to %r: it is not in %r.", name, self.root_path)
            return f"about:invalid#{filepath_to_uri(self._clean_name(name))}"

    def get_modified_time(self, name):
        modified = self._file_metadata(name).server_modified
        seconds = modified.replace(tzinfo=timezone.utc).timestamp()
        zone = timezone.utc if settings.USE_TZ else None
        return datetime.fromtimestamp(seconds, zone)

    # Names and metadata

    def _clean_name(self, name):
        """Return the name relative to root_path, in NFC and with slashes; "" for it."""
        given = unicodedata.normalize("NFC", os.fspath(name).replace("\\", "/"))
        if re.search("[\0\ud800-\udfff]", given):
            raise SuspiciousFileOperation(f"{given!r} holds NUL or half a character.")
        clean = posixpath.normpath(given)
        if clean in (".", "/", "//"):
            return ""
        if f"{clean}/".startswith(("/", "../")):
            raise SuspiciousFileOperation(f"{given!r} is outside {self.root_path!r}.")
        return clean

    @property
    def _root(self):
        """The path of the folder that holds all files; "" for the account's root."""
        return self._option("root_path").rstrip("/")

    def _path(self, name):
        """Return the absolute path of a name, which must not be the root."""
        if clean := self._clean_name(name):
            return f"{self._root}/{clean}"
        raise _os_error(errno.EISDIR, "the root of all files", self.root_path)

    def _file_metadata(self, name):
        path = self._path(name)
        metadata = self._api.call("files/get_metadata", path)
        if hasattr(metadata, "rev"):  # folders have none
            return metadata
        raise _os_error(errno.EISDIR, "not a file", path)

    def _find_revision(self, name):
        """Return the revision of the file, or None if it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            return self._file_metadata(name).rev

    def _list_folder(self, folder, may_restart=True):
        """Return the metadata of the files and folders in the folder."""
        api, entries = self._api, {}
        try:
            page = api.call("files/list_folder", folder)
            _add_page(entries, page)
            while page.has_more:
                page = api.call("files/list_folder/continue", folder, page.cursor)
                _add_page(entries, page)
        except FileNotFoundError:
            if folder != self._root:
                raise
        except DropboxStorageException as error:
            if error.reason != "reset" or not may_restart:
                raise
            # The cursor has expired.
            return self._list_folder(folder, may_restart=False)
        return [*entries.values()]  # none if nothing has been saved yet

    # Links

    def _link(self, path):
        """Return a temporary link and the time when it was made, in Unix seconds."""
        api, timeout = self._api, self._option("url_cache_timeout")
        # Everybody who finds no link stores or finds a mark. Saving and deleting remove
        # it. So a link that was made meanwhile, of the old file, is not kept.
        key, mark = api.link_key(path), os.urandom(16).hex()
        found = self._use_cache("get_or_set", key, mark, timeout) if timeout else None
        if _is_link(found):
            return found
        try:
            link = api.call("files/get_temporary_link", path).link, time.time()
        except BaseException:
            if found is not None:
                self._use_cache("delete", key)
            raise
        if found is not None and self._use_cache("get", key) == found:
            self._use_cache("set", key, link, timeout)
        return link

    def _forget_link(self, api, path):
        if self._option("url_cache_timeout"):
            self._use_cache("delete", api.link_key(path))

    def _use_cache(self, method, *args):
        """Call the method of the cache. If it is down, log that and return None."""
        cache = caches[self._option("url_cache")]
        try:
            return getattr(cache, method)(*args)
        except Exception as error:
            logger.warning("The cache of links failed: %s.", type(error).__name__)


def _is_link(value):
    """Whether this is a link with its time, and not a mark or anything else."""
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2
    link, made = value if is_pair else ("", 0)
    return str(link).startswith("https://") and isinstance(made, (int, float))


def _add_page(entries, page):
    """Add a page of a listing to the entries. Later pages report what has changed."""
    for entry in page.entries:
        # Where a namespace is not mounted, entries have no paths.
        path = entry.path_lower or entry.name.lower()
        entries.pop(path, None)
        if hasattr(entry, "id"):  # what was deleted has none
            entries[path] = entry


# Files


class DropboxFile(File):
    """A file in Dropbox, as DropboxStorage.open() returns it.

    mode: as for Python's open(). Text is UTF-8. "r" and "rb" read what they need from
    Dropbox. The other modes work on a temporary file, which close() uploads: "r+" and
    "a" begin with the content of the file, and replace the revision that they read.
    Nothing is uploaded if an exception has been raised since the file was opened.
    """

    file = _download = _upload = None

    def __init__(self, name, storage, mode="rb"):
        self.name, self._storage, self.mode = os.fspath(name), storage, mode
        self._open_stream()

    def _open_stream(self):
        letters = "".join(sorted(self.mode))
        if not re.fullmatch(r"\+?(a[bt]?|b?[rwx]|rt|t[wx])", letters):
            raise ValueError(f"{self.mode!r} is not a mode of open(), such as 'rb'.")
        path = self._storage._path(self.name)
        encoding = None if "b" in letters else "utf-8"
        self._handled, self._is_discarded = sys.exc_info()[1], False
        self._download = None
        if letters in ("r", "br", "rt"):
            self._download = _Download(self._storage, path)
            file = io.BufferedReader(self._download, READ_SIZE)
            self.file = io.TextIOWrapper(file, encoding) if encoding else file
        else:
            self._open_temporary(path, letters, encoding)

    def _open_temporary(self, path, letters, encoding):
        """Open a temporary file in this mode, and choose what the upload replaces."""
        storage, mode, revision, download = self._storage, "update", None, None
        if "w" in letters and storage._option("write_mode") != "update":
            mode = "overwrite"
        elif "w" in letters:
            revision = storage._find_revision(self.name)
        elif "r" in letters or storage.exists(self.name):
            if "x" in letters:
                raise _os_error(errno.EEXIST, f"mode {self.mode!r}", path)
            download = _Download(storage, path)
            revision = download.revision
        elif "x" in letters:
            mode = "add"
        folder = settings.FILE_UPLOAD_TEMP_DIR
        self.file = tempfile.TemporaryFile(self.mode, encoding=encoding, dir=folder)
        if "a" in letters:
            # open() sets this flag for a path, but not for a descriptor.
            with contextlib.suppress(ImportError):  # on Windows
                import fcntl

                fcntl.fcntl(self.file, fcntl.F_SETFL, os.O_APPEND)
        if download:
            with io.BufferedReader(download, READ_SIZE) as source:
                with open(self.file.fileno(), "wb", closefd=False) as copy:
                    copy.writelines(iter(lambda: source.read(READ_SIZE), b""))
            self.file.seek(0, io.SEEK_END if "a" in letters else io.SEEK_SET)
        self._upload = _Upload(storage, path, mode, revision)

    @property
    def size(self):
        """In bytes: of the file when it was opened, or of what has been written."""
        if self._download:
            return self._download.size
        if not self.closed:
            self.file.flush()
            self._size = os.fstat(self.file.fileno()).st_size
        return self._size

    def open(self, mode=None):
        """Open the file again, or go to its beginning if it is open; return it."""
        if not self.closed and mode in (None, self.mode):
            self.seek(0)
        else:
            self.close()
            self.mode = mode or self.mode
            self._open_stream()
        return self

    def close(self):
        """Upload what was written, unless an exception was raised since the opening."""
        if self.closed:
            return
        if sys.exc_info()[0] and sys.exc_info()[1] is not self._handled:
            self._is_discarded = True
        upload, self._upload, self._handled = self._upload, None, None
        with contextlib.closing(self.file):
            if self._download:
                self._download.may_drain = not self._is_discarded
            elif upload and self._is_discarded:
                reason = "an exception came first, or nobody closed it"
                logger.warning("%r is not saved: %s.", self.name, reason)
            elif upload:
                self._save(upload)

    def _save(self, upload):
        self._size = self.size  # this also flushes the buffer
        with open(self.file.fileno(), "rb", closefd=False) as content:
            content.seek(0)
            with contextlib.closing(upload):
                upload.send(iter(lambda: content.read(READ_SIZE), b""))
                upload.commit()

    def __exit__(self, exc_type, exc_value, traceback):
        # An exception that is handled outside the block does not matter.
        self._handled, self._is_discarded = sys.exc_info()[1], exc_type is not None
        self.close()

    def _dealloc_warn(self, source):
        """C wrappers call this before they close the file because nobody uses it."""
        self._is_discarded = True

    def __del__(self):
        if not self._download:
            self._is_discarded = True
            self.close()


class _ContentHash:
    """Dropbox's content hash: SHA-256 over the SHA-256 digests of all 4 MiB blocks.

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
        """Add what the other has hashed. This one must end with a whole block."""
        self.size, self._block = self.size + other.size, other._block
        self._digests += other._digests

    def hexdigest(self):
        rest = self._block.digest() if self.size % HASH_BLOCK else b""
        return hashlib.sha256(self._digests + rest).hexdigest()

    def matches(self, metadata):
        """Whether the metadata is that of a file with these bytes."""
        # The hash is optional in Dropbox's specification.
        hashes = (None, self.hexdigest())
        return metadata.size == self.size and metadata.content_hash in hashes

    def check(self, metadata, route, path):
        """Raise DropboxStorageException unless the metadata matches."""
        if not self.matches(metadata):
            message = f"{route} of {path!r} failed: Dropbox has other bytes."
            raise DropboxStorageException(message, "content_hash_mismatch")


def _in_background(function, *args):
    """Call the function in a thread of its own; return a Future of its result.

    The threads of an executor are joined when the interpreter exits. Here, nothing
    waits for a request that nobody needs any more.
    """
    future = Future()
    try:
        call = (future, function, args)
        threading.Thread(None, _run, "dropbox_storage", call, daemon=True).start()
    except RuntimeError:  # no more threads, as when the interpreter exits
        _run(future, function, args)
    return future


def _run(future, function, args):
    try:
        future.set_result(function(*args))
    except BaseException as error:
        future.set_exception(error)
    finally:
        del future, function, args  # the error keeps this frame, and would keep them


# Downloading


class _Download(io.RawIOBase):
    """The bytes of one revision of a file. Seeking sends no request, reading may do.

    The file is a row of blocks: a single one, or blocks of READ_BLOCK bytes. The first
    comes with the request that opens the file. A block is requested when it is read,
    and with it the next ones, if the block before it was read just before.
    """

    may_drain, _head, _blocks = False, None, {}  # until the file is open

    def __init__(self, storage, path):
        self.api, self.path, self._process = storage._api, path, os.getpid()
        self._metadata, response = self.api.perform(
            "files/download", path, lambda: _request_bytes(self.api, path)
        )
        self.size, self.revision = self._metadata.size, self._metadata.rev
        self.block_size = self.size if self.size <= WHOLE_FILE else READ_BLOCK
        self._position = self._number = 0  # of the next byte, and of the last block
        self._most_ahead, self._ahead = min(storage.CONNECTIONS, KEPT_BLOCKS), 1
        self._content, self._has_failed, self._blocks = _ContentHash(), False, {}
        self._head = _Block(self, 0, response)

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        if whence == io.SEEK_CUR:  # as for tell()
            self._check_state()
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}
        if whence not in starts or starts[whence] + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position, self._has_failed = starts[whence] + offset, False
        return self._position

    def readinto(self, buffer):
        self._check_state()
        if self._position >= self.size:
            return 0
        try:
            data = self._read_block(len(buffer))
            self._check_content(data)
        except BaseException:
            self._has_failed = True
            self._drop_blocks()
            raise
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _check_state(self):
        if self._process != os.getpid():
            message = f"{self.path!r} was opened in another process; open it again."
            raise DropboxStorageException(message)
        if self._has_failed:  # the buffer above has lost what it held
            message = f"Reading {self.path!r} has failed; seek() to where to continue."
            raise DropboxStorageException(message)

    def _read_block(self, count):
        """Return a view of up to count bytes at the position."""
        number, offset = divmod(self._position, self.block_size)
        if number != self._number:
            is_next = number == self._number + 1
            self._number, self._ahead = number, self._most_ahead if is_next else 1
        if number == 0:
            self._head = self._head or _Block(self, 0)
            return self._head.read(offset, count)
        # Each use puts these blocks behind the others, which are thrown out first.
        last = min(number + self._ahead - 1, (self.size - 1) // self.block_size)
        for n in range(number, last + 1):
            self._blocks[n] = self._blocks.pop(n, None) or _Block(self, n)
        for n in [*self._blocks][:-KEPT_BLOCKS]:
            self._blocks.pop(n).cancel()
        return self._blocks[number].read(offset, count)

    def _check_content(self, data):
        """Hash what is read in order from the beginning, and check the whole file."""
        if self._position == 0:
            self._content = _ContentHash()
        known = self._content.size - self._position
        if 0 <= known < len(data):
            self._content.update(data[known:])
            if self._content.size == self.size:
                self._content.check(self._metadata, "files/download", self.path)

    def _drop_blocks(self):
        while self._blocks:
            self._blocks.popitem()[1].cancel()
        head, self._head = self._head, None
        if head:  # a forked process shares the connection with its parent
            head.close(self.may_drain and self._process == os.getpid())

    def close(self):
        self._drop_blocks()
        super().close()


class _Block:
    """Consecutive bytes of a revision, kept in memory as they arrive.

    They come from a response while they are read, or else are loaded in the background.
    """

    def __init__(self, download, number, response=None):
        self._api, self._path = download.api, download.path
        self._revision, self._response = download.revision, response
        self._start = number * download.block_size
        size = min(download.block_size, download.size - self._start)
        self._data, self._loaded = memoryview(bytearray(size)), 0
        self._is_cancelled, self._future = False, None
        if not response:
            self._future = _in_background(self._load, size)

    def read(self, offset, count):
        """Wait for up to count bytes from the offset on; return a view of them."""
        end = min(offset + count, len(self._data))
        if self._future:
            self._future.result()
        else:
            self._load(end)
        return self._data[offset:end]

    def _load(self, end):
        while self._loaded < end:
            self._api.perform("files/download", self._path, self._read_part)
        if self._loaded == len(self._data):
            self.close()

    def _read_part(self):
        """Read some bytes; after an error, the next attempt sends a new request."""
        begin, end = self._start + self._loaded, self._start + len(self._data)
        try:
            if self._is_cancelled:
                raise DropboxStorageException(f"Reading {self._path!r} was cancelled.")
            if not self._response:
                revision = f"rev:{self._revision}"
                _, self._response = _request_bytes(self._api, revision, begin, end)
            part = self._response.read(min(READ_SIZE, end - begin))
            if not part:
                raise _BadResponse(f"the response ended before byte {begin}")
            self._data[self._loaded : self._loaded + len(part)] = part
            self._loaded += len(part)
        except BaseException:
            self.close()
            raise

    def cancel(self):
        """Let the background thread stop. The future may hold an error with frames."""
        self._is_cancelled, self._future = True, None

    def close(self, drain=False):
        """Close the response, or read the little that is left, to keep its socket."""
        response, self._response = self._response, None
        if response and drain and 0 < (response.length_remaining or 0) <= DRAIN:
            _in_background(response.drain_conn)
        elif response:
            response.close()


def _request_bytes(api, path, begin=0, end=None):
    """Request the bytes from begin to end, or all. Return metadata and raw response."""
    headers = {"Accept-Encoding": "identity"}  # a raw response is not decoded
    if end:
        headers["Range"] = f"bytes={begin}-{end - 1}"
    metadata, response = api.request(headers).files_download(path)
    encoding = response.headers.get("Content-Encoding", "identity")
    found = response.headers.get("Content-Range", "bytes 0-")
    if encoding != "identity" or not found.startswith(f"bytes {begin}-"):
        response.raw.close()
        raise _BadResponse(f"asked for bytes from {begin}, found {encoding} {found}")
    return metadata, response.raw


# Uploading


def _view(chunk):
    return memoryview(chunk.encode() if isinstance(chunk, str) else chunk).cast("B")


def _cut(chunks, size):
    """Yield the content as io.BytesIO objects of `size` bytes; the last may be smaller.

    There is always one.
    """
    piece, room = io.BytesIO(), size
    for view in map(_view, chunks):
        while view:
            if not room:
                yield piece
                piece, room = io.BytesIO(), size
                piece.seek(size - 1)  # allocates it whole: growing would copy it
                piece.write(b"\0")
                piece.seek(0)
            count = piece.write(view[:room])
            view, room = view[count:], room - count
    piece.truncate()
    yield piece


class _Upload:
    """Content that becomes a file in Dropbox with commit().

    Up to two pieces are sent with the request that commits them. More are sent while
    they come, with a concurrent upload session. Without a commit, Dropbox stays as it
    was: it forgets the session after some days.

    mode: a write mode. revision: for "update", that of the file that is replaced, None
    if there is none.
    """

    def __init__(self, storage, path, mode, revision=None):
        from dropbox import files

        self.path, self._mode = path, mode
        self._storage, self._api, self._files = storage, storage._api, files
        self._target = {"mode": files.WriteMode.add, "strict_conflict": True}
        if mode == "overwrite":
            self._target = {"mode": files.WriteMode.overwrite}
        elif revision:
            self._target["mode"] = files.WriteMode.update(revision)
        self._content, self._pieces, self._is_closed = _ContentHash(), [], False
        self._session, self._offset, self._sending = None, 0, []

    def close(self):
        """Let the background threads stop, and drop what has not been sent."""
        self._is_closed, self._pieces, self._sending = True, [], []

    def send(self, chunks):
        """Send all pieces but the last one, which the end of a session needs."""
        most = MAX_REQUEST // 2 - HASH_BLOCK
        blocks = -(-min(self._storage.CHUNK_SIZE, most) // HASH_BLOCK)
        for piece in _cut(chunks, blocks * HASH_BLOCK):
            self._pieces.append(piece)
            while len(self._pieces) > (1 if self._session else 2):
                self._send_in_background(self._pieces.pop(0))

    def _send_in_background(self, piece):
        if not self._session:
            kind = self._files.UploadSessionType.concurrent
            start = self._call("files/upload_session/start", io.BytesIO(), False, kind)
            self._session = start.session_id
        if len(self._sending) == self._storage.CONNECTIONS:
            self._content.append(self._sending.pop(0).result())
        self._sending.append(_in_background(self._append, self._offset, piece))
        self._offset += piece.tell()

    def _append(self, offset, piece, close=False):
        """Send a piece of the session; return its hash."""
        content = _ContentHash(piece.getbuffer())
        cursor = self._files.UploadSessionCursor(self._session, offset)
        route, digest = "files/upload_session/append_v2", content.hexdigest()
        try:
            self._call(route, piece, cursor, close, content_hash=digest)
        except DropboxStorageException as error:
            # If a response was lost, the session may have the piece, and refuse it now.
            is_there = error.reason.endswith(("closed", "incorrect_offset"))
            if not (is_there and error.failure.is_lost):
                raise
        return content

    def commit(self):
        """Make the content the file at self.path.

        Raises FileExistsError or IsADirectoryError if the path is taken. It may then be
        called again, after self.path has been changed.
        """
        now = datetime.now(timezone.utc).replace(tzinfo=None, microsecond=0)
        self._target["client_modified"] = now
        try:
            metadata = self._finish_session() if self._session else self._put_file()
            self._content.check(metadata, "files/upload", self.path)
        except (OSError, DropboxStorageException) as error:
            if not self._is_committed(getattr(error, "failure", _Failure(""))):
                if self._mode != "update" or not isinstance(error, FileExistsError):
                    raise
                changed = f"{self.path!r} has changed since it was looked at"
                message = f"{changed}; it was left alone."
                raise DropboxStorageException(message, "path/conflict/file") from error
        self._storage._forget_link(self._api, self.path)

    def _put_file(self):
        first, *others = self._pieces
        for piece in others:
            first.write(piece.getvalue())
        self._pieces, self._content = [first], _ContentHash(first.getbuffer())
        target = {**self._target, "content_hash": self._content.hexdigest()}
        return self._call("files/upload", first, self.path, **target)

    def _finish_session(self):
        if self._pieces:
            while self._sending:  # a closed session takes no more pieces
                self._content.append(self._sending.pop(0).result())
            last = self._append(self._offset, self._pieces[0], close=True)
            self._content.append(last)
            self._pieces = []
        cursor = self._files.UploadSessionCursor(self._session, self._content.size)
        commit = self._files.CommitInfo(self.path, **self._target)
        return self._call("files/upload_session/finish", io.BytesIO(), cursor, commit)

    def _is_committed(self, failure):
        """Whether the path holds what was sent, although the commit failed.

        Either the response was lost, or "update" refused bytes that change nothing. A
        conflict of a session is with the file of somebody else: a session that has been
        committed does not exist any more. A file that was added has the time that was
        sent with it.
        """
        is_conflict = failure.reason.endswith(OS_ERRORS[errno.EEXIST])
        is_lost = failure.is_lost and not (is_conflict and self._session)
        if is_lost or (is_conflict and self._mode == "update"):
            api = copy.copy(self._api)
            if failure.is_transient:  # the call has waited already
                api.max_wait = 0
            with contextlib.suppress(*NO_FILE, DropboxStorageException):
                found = api.call("files/get_metadata", self.path)
                if hasattr(found, "rev") and self._content.matches(found):
                    now = self._target["client_modified"]
                    return self._mode != "add" or found.client_modified == now
        return False

    def _call(self, route, piece, *args, **kwargs):
        """Send the piece with the SDK's method for the route."""

        def send():
            if self._is_closed:
                raise DropboxStorageException(f"{self.path!r} was not sent.")
            method = getattr(self._api.request(), route.replace("/", "_"))
            return method(piece.getvalue(), *args, **kwargs)

        return self._api.perform(route, self.path, send)


# Requests


class _BadResponse(Exception):
    """A response that is not what was asked for, or that ended too early."""


# What a failed request means.
# reason: Dropbox's own text for programs. text: what it says to people.
# is_transient: the same request may succeed later.
# is_lost: the request may have been carried out, and only its response was lost.
# retry_after: seconds that Dropbox asks to wait.
FIELDS = "reason text is_transient is_lost retry_after"
_Failure = collections.namedtuple("_Failure", FIELDS, defaults=("", False, False, 0))


class _Api:
    """The way to Dropbox: the SDK client, its access token, and when to try again.

    max_wait and first_wait, in seconds, are set by the storage.
    """

    def __init__(self, client):
        self.client, self._token_lock, self._failures = client, threading.Lock(), 0
        # A forked process must not use the sockets that it shares with its parent.
        client._session.close()

    def link_key(self, path):
        """The key in the cache: for this account, namespace, member and file.

        It folds ASCII letters alone: Dropbox's folding of other letters is unknown.
        """
        client = self.client
        digest = hashlib.sha256(repr((client._headers, path.encode().lower())).encode())
        name = "refresh" if client._oauth2_refresh_token else "access"
        digest.update(str(getattr(client, f"_oauth2_{name}_token")).encode())
        return f"dropbox_storage:{digest.hexdigest()}"

    def request(self, headers=()):
        """Return a copy of the client for one request, with a live access token.

        Its session raises HttpError for each response that is not 2xx: before the SDK
        decodes or repeats it, and before requests follows a redirect. The session
        shares the connections of the client's session, which stays as it is.
        """
        client, request = self.client, copy.copy(self.client)
        request._session = session = object.__new__(type(client._session))
        hooks = [*client._session.hooks["response"], self._check_response]
        vars(session).update(vars(client._session), hooks={"response": hooks})
        self._refresh_token(request)
        request._oauth2_refresh_token = None  # so that only this method refreshes
        request._headers = {**(client._headers or {}), **dict(headers)}
        return request

    def _refresh_token(self, request):
        """Give the request a token; let the SDK refresh it first if that is due.

        One thread refreshes at a time. The others go on with a token that is still
        valid, and otherwise wait for no longer than the timeout; if that thread fails,
        they fail with it.
        """
        now, failures = datetime.now(timezone.utc).replace(tzinfo=None), self._failures
        is_valid = (request._oauth2_access_token_expiration or now) > now
        wait = 0 if is_valid else request._timeout or -1
        if self._token_lock.acquire(timeout=wait):
            try:
                if failures != self._failures:
                    raise _BadResponse("another thread could not refresh the token")
                _copy_token(self.client, request)
                request.check_and_refresh_access_token()
                _copy_token(request, self.client)
            except BaseException as error:
                if not isinstance(error, _BadResponse):
                    self._failures += 1
                raise
            finally:
                self._token_lock.release()
        elif not is_valid:
            raise _BadResponse("another thread is still refreshing the token")

    def _check_response(self, response, **kwargs):
        """Raise HttpError unless the response is 2xx. This is a hook of requests."""
        request, status = response.request, response.status_code
        seconds = response.elapsed.total_seconds()
        logger.debug("%s: HTTP %d in %.3f s.", request.path_url, status, seconds)
        if 200 <= status < 300:
            return
        from dropbox.exceptions import HttpError

        used = request.headers.get("Authorization")
        if status == 401 and used == f"Bearer {self.client._oauth2_access_token}":
            self.client._oauth2_access_token_expiration = None  # the next one refreshes
        number = response.headers.get("x-dropbox-request-id")
        error = HttpError(number, status, response.content.decode(errors="replace"))
        error.retry_after = response.headers.get("Retry-After")
        raise error

    def call(self, route, path, *args):
        """Call the SDK's method for the route, with the path or else with args."""
        name, args = route.replace("/", "_"), args or (path,)
        return self.perform(route, path, lambda: getattr(self.request(), name)(*args))

    def perform(self, route, path, send):
        """Return what send() returns. Repeat it while its failures are transient.

        The last attempt begins at most max_wait seconds after the first failure. An
        error that comes neither from Dropbox nor from the network passes through.
        """
        handled, failed_at, is_lost, is_renewed = sys.exc_info()[1], None, False, False
        for attempt in itertools.count(1):
            try:
                return send()
            except BaseException as error:
                # All is decided in here: the error is freed when this block ends.
                self._clean(error, handled)
                failure = _explain(error)
                if not failure:
                    raise
                now = time.monotonic()
                failed_at, is_lost = failed_at or now, is_lost or failure.is_lost
                can_refresh = bool(self.client._oauth2_refresh_token)
                is_expired = failure.reason == EXPIRED and can_refresh
                is_transient = failure.is_transient or is_expired
                failure = failure._replace(is_lost=is_lost, is_transient=is_transient)
                pause = _pause_after(failure, attempt, self.first_wait)
                if is_expired and not is_renewed:
                    is_renewed, pause = True, 0  # the next attempt refreshes the token
                elif not is_transient or now - failed_at + pause >= self.max_wait:
                    tried = self._describe(failure, attempt, now - failed_at)
                    raise _error_for(failure, route, path, tried) from error
            asked = failure.retry_after
            asks = f", Dropbox asks to wait {asked:g} s" if asked else ""
            level = logging.INFO if attempt == 1 else logging.WARNING
            line = f"{route} of {path!r} failed at attempt {attempt}: {failure.reason}"
            logger.log(level, "%s%s. Next attempt in %.1f s.", line, asks, pause)
            time.sleep(pause)

    def _describe(self, failure, attempt, waited):
        """Return how long a call was attempted, for the message of its error."""
        if not failure.is_transient:
            return ""
        if asked := failure.retry_after:
            return f" (Dropbox asks to wait {asked:g} s, max_wait is {self.max_wait:g})"
        return f" ({attempt} attempt{'s' if attempt > 1 else ''}, {waited:.0f} s)"

    def _clean(self, error, handled):
        """Remove secrets and content from the error and its causes, up to `handled`.

        That is the variables of the SDK's frames, the request with its headers and its
        body, the response, and all that repeats a part of a credential.
        """
        while error is not None and error is not handled:
            traceback.clear_frames(error.__traceback__)
            for name, value in [*vars(error).items()]:
                is_message = type(value).__module__ == "requests.models"
                if is_message or self._shows_credential(value):
                    setattr(error, name, None)
            if self._shows_credential(error.args):
                error.args = ()
            cause = error.__cause__
            error = error.__context__ if cause is None else cause

    def _shows_credential(self, value):
        """Whether it holds a part of a credential that quoting does not change."""
        text, client = f"{value} {value!r}", self.client
        secrets = (str(getattr(client, f"_{name}")) for name in CREDENTIALS)
        parts = (re.findall(r"[A-Za-z0-9_-]{6,}", secret) for secret in secrets)
        return any(part in text for part in itertools.chain.from_iterable(parts))


def _copy_token(source, target):
    for name in ("_oauth2_access_token", "_oauth2_access_token_expiration"):
        setattr(target, name, getattr(source, name))


def _pause_after(failure, attempt, first_wait):
    """Return the seconds to wait: what Dropbox asks for, or twice as many each time."""
    backoff = min(MAX_PAUSE, first_wait * 2 ** min(attempt - 1, 99))
    return failure.retry_after or backoff * random.uniform(0.5, 1)


# What the SDK raises for a response that it cannot decode.
UNDECODABLE = (ValueError, KeyError, AssertionError, UnicodeDecodeError)


def _explain(error):
    """Return the _Failure behind an error of the SDK, requests or urllib3.

    Returns None for an error that comes from elsewhere, such as a time limit that a
    signal handler raises. Those may be subclasses of OSError, ValueError or others, so
    what the SDK raises for a response that it cannot decode is known by its exact type.
    """
    from dropbox import exceptions
    from dropbox.stone_validators import ValidationError
    from requests import RequestException
    from urllib3.exceptions import HTTPError

    kind, reason = type(error), type(error).__name__.lstrip("_")
    if isinstance(error, exceptions.HttpError):
        asked = getattr(error, "retry_after", None)
        return _explain_refusal(error.status_code, error.body or "", asked)
    if isinstance(error, exceptions.DropboxException):
        return _Failure(reason)
    is_transient = kind in UNDECODABLE or reason == "JSONDecodeError"
    # A body that does not fit, missing CA certificates, a token that is not ASCII.
    permanent = (ValidationError, OSError, UnicodeEncodeError)
    if isinstance(error, (RequestException, HTTPError, _BadResponse)):
        # Those that are a ValueError, too, are about a wrong header, URL or proxy.
        is_transient = is_transient or not isinstance(error, ValueError)
    elif not is_transient and kind not in permanent:
        return None
    is_lost = is_transient or kind is ValidationError
    return _Failure(reason, _printable(str(error)), is_transient, is_lost)


def _explain_refusal(status, body, retry_after):
    """Return the _Failure behind a response that is not 2xx.

    The reason is Dropbox's error_summary without the dots at its end, or the error of
    OAuth, or "HTTP 400".
    """
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    summary = _field(answer, "error_summary") or _field(answer, "error")
    reason = _printable(summary).rstrip("/. ") if isinstance(summary, str) else ""
    fields = ("user_message text", "error_description", "error required_scope")
    texts = [_field(answer, *names.split()) for names in fields]
    text = " ".join(str(text) for text in texts if text) if reason else body
    is_gone = status >= 500 or status == 408
    is_busy = status == 429 or reason.endswith(TRANSIENT)
    asked = max(map(_number, (retry_after, _field(answer, "error", "retry_after"))))
    reason = reason or f"HTTP {status}"
    return _Failure(reason, _printable(text), is_gone or is_busy, is_gone, asked)


def _field(value, *names):
    """Return the value at the names in nested JSON objects, None if there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _number(seconds):
    """Return the number of seconds in a header or in JSON; 0 for anything else."""
    is_number = re.fullmatch(r"\d{1,9}(\.\d*)?", f"{seconds}".strip(), re.ASCII)
    return float(is_number[0]) if is_number else 0


def _printable(text):
    """Return at most 500 characters of the text, without control characters."""
    return "".join(c if c.isprintable() else " " for c in text[:500]).strip()


def _error_for(failure, route, path, tried):
    """Return the error that Django expects, with the failure on it."""
    told = f"{failure.reason} {failure.text}".strip()[:500]
    for code, ends in OS_ERRORS.items():
        if failure.reason.endswith(ends):
            error = _os_error(code, f"{route}: {failure.reason}", path)
            break
    else:
        hints = [f" ({HINTS[key]})" for key in HINTS if re.search(rf"\b{key}\b", told)]
        message = f"{route} of {path!r} failed{tried}: {told}{''.join(hints[:1])}."
        error = DropboxStorageException(message, failure.reason, failure.is_transient)
    error.failure = failure
    if failure.is_transient:
        logger.warning("%s", error)
    elif any(words in told for words in OWNER_REASONS):
        logger.error("%s", error)
    return error


NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def serve(request, path, storage="default"):
    """Redirect to a temporary link to the file, for path("media/<path:path>", serve).

    storage: an alias in STORAGES, or a DropboxStorage. Answers GET and HEAD. A path
    without a file is a 404, and so is one that is not spelled as the storage spells it,
    such as "public/../private": a view that checks the path has checked the file. To
    decide who may look, wrap it in login_required or the like. A browser keeps the
    redirect for less time than the link is valid.
    """
    from django.http import Http404, HttpResponseNotAllowed, HttpResponseRedirect

    if request.method not in ("GET", "HEAD"):
        return HttpResponseNotAllowed(["GET", "HEAD"])
    storage = _find_storage(storage)
    try:
        if path != storage._clean_name(path):
            raise Http404(path)
        link, made = storage._link(storage._path(path))
    except (*NO_FILE, SuspiciousFileOperation, DropboxStorageException) as error:
        if not getattr(error, "reason", "malformed_path").endswith("malformed_path"):
            raise
        raise Http404(path) from error
    left = made + LINK_LIFE - LINK_RESERVE - time.time()
    seconds = max(0, int(min(storage._option("url_cache_timeout") or 0, left)))
    cache_control = f"private, max-age={seconds}"
    return HttpResponseRedirect(link, headers={"Cache-Control": cache_control})


def _find_storage(storage):
    """Return the DropboxStorage with that alias, or the one that is given."""
    if storage == "default":  # the only alias before Django 4.2
        storage = django_storage.default_storage
    elif isinstance(storage, str):
        if not hasattr(django_storage, "storages"):
            found = f"Before Django 4.2 there is no alias {storage!r}"
            raise ImproperlyConfigured(f"{found}: pass serve() the storage itself.")
        storage = django_storage.storages[storage]
    if not isinstance(storage, DropboxStorage):
        raise ImproperlyConfigured(f"serve() needs a DropboxStorage, not {storage!r}.")
    return storage
