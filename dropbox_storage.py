"""Keep the files of a Django project in Dropbox.

    # settings.py
    DROPBOX_OAUTH2_REFRESH_TOKEN = os.environ.get("DROPBOX_OAUTH2_REFRESH_TOKEN")
    DROPBOX_APP_KEY = os.environ.get("DROPBOX_APP_KEY")
    DROPBOX_APP_SECRET = os.environ.get("DROPBOX_APP_SECRET")
    STORAGES = {
        "default": {"BACKEND": "dropbox_storage.DropboxStorage"},
        ...
    }

README.md describes the options and what the storage does. A call goes this way, and
the parts of this file stand in the same order:

    Django -> DropboxStorage -> _Upload or _Download -> _Api -> SDK client -> Dropbox

State has two places. A storage holds its options and, if you assign one, its client.
A process holds the clients, their access tokens and their connections: see _Process.

One rule explains much of the code. Debug pages and error trackers show the local
variables of every function that an error passes through. Therefore no local variable
holds a credential, and the content of a file is only in objects with a short repr, such
as io.BytesIO and memoryview.

License: BSD-3-Clause.
"""

import _thread
import collections
import contextlib
import copy
import errno
import functools
import hashlib
import inspect
import io
import json
import logging
import os
import posixpath
import random
import re
import sys
import tempfile
import time
import traceback
import unicodedata
import weakref
from datetime import datetime, timedelta, timezone

from django.conf import settings
from django.core.cache import caches
from django.core.exceptions import ImproperlyConfigured, SuspiciousFileOperation
from django.core.files import storage as django_storage
from django.core.files.base import File
from django.utils.deconstruct import deconstructible
from django.utils.encoding import filepath_to_uri
from django.utils.functional import Promise
from django.utils.module_loading import import_string

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

# Bytes. A new file of up to this size is sent without asking first whether its name is
# taken: to send it twice takes less time than to ask.
SMALL_FILE = 256 * 1024

# Bytes that are read from a connection or a temporary file at a time.
READ_SIZE = 128 * 1024

# Bytes. A file of up to this size is read with one request.
WHOLE_FILE = 8 * MiB

# Bytes of one request for a part of a larger file. At 8 MB/s and 50 ms latency, such a
# request spends 80 % of its time on moving bytes.
READ_BLOCK = 2 * MiB

# Blocks of a file that are kept in memory, apart from the first.
KEPT_BLOCKS = 8

# Blocks read in order after which a reader is taken to want the rest of the file: 1, 2
# and 4 blocks have been requested ahead by then.
BLOCKS_IN_ORDER = 3

# Bytes. If no more than this is left of a response, it is read to its end, which takes
# less time than the TLS handshake of a new connection.
DRAIN = 512 * 1024

# Bytes of a refusal that are read. Those of Dropbox have less than 1 KiB.
MAX_REFUSAL = 64 * 1024

# Idle connections to a host that a process keeps: 16 threads with six requests each.
POOL_SIZE = 96

# SDK clients that a process keeps, as with one account a tenant: about 2 KiB each.
KEPT_CLIENTS = 1000

# Seconds before the end of an access token in which it is refreshed, as the SDK does.
REFRESH_EARLY = 300

# Seconds after an early refresh that failed until another one, unless Dropbox asks for
# more.
REFRESH_PAUSE = 30

# Seconds. The longest pause between two attempts, unless Dropbox asks for a longer one.
MAX_PAUSE = 15

# Characters of a name, and the names that Dropbox refuses in upper and lower case.
# https://help.dropbox.com/organize/file-names
MAX_NAME = 255
RESERVED_NAMES = (
    "desktop.ini",
    "thumbs.db",
    ".ds_store",
    "icon\r",
    ".dropbox",
    ".dropbox.attr",
)

# Seconds that a temporary link is valid, and the most that it is kept in the cache, so
# that a link which is handed out is valid for an hour at least.
# https://www.dropbox.com/developers/documentation/http/documentation#files-get_temporary_link
LINK_LIFE = 4 * 60 * 60
MAX_LINK_AGE = 3 * 60 * 60

# Seconds. A browser keeps a redirect to a link for this much less than the link lives.
LINK_RESERVE = 60

# Seconds in which a link must arrive after it was asked for. Else it is not cached.
LINK_REQUEST_LIFE = 300

WRITE_MODES = ("add", "overwrite", "update")

# Of two tokens that are set at the same place, the refresh token is used.
TOKENS = ("oauth2_refresh_token", "oauth2_access_token")
CREDENTIALS = ("oauth2_access_token", "oauth2_refresh_token", "app_key", "app_secret")

# What deconstruct() puts in the place of an argument that holds a credential.
HIDDEN = "***"

NOT_GIVEN = object()  # the access token, if the constructor has no such argument

# What to do about an access token that begins with "sl.".
SHORT_LIVED = "'sl.' tokens live four hours; set oauth2_refresh_token"

# What django-storages calls while its storage works, and what takes its place here.
FOREIGN_HOOKS = {
    "location": "it is called root_path here; rename it",
    "get_default_settings": "set the options as class attributes or arguments",
    "_chunked_upload": "override _save()",
}


class DropboxStorageException(Exception):
    """Dropbox refused a request, or could not be reached in time.

    The message names the route, the path, the reason and what to do about it. `reason`
    is Dropbox's own text for programs, such as "path/insufficient_space", "HTTP 400",
    or the name of a network error. `temporary` tells whether the same call may succeed
    later; `retry_after` is the number of seconds that Dropbox asks to wait until then,
    0 if it does not say. If Dropbox refused, the SDK's HttpError is the `__cause__`.
    """

    def __init__(self, message, reason="", temporary=False, retry_after=0):
        super().__init__(message)
        self.reason = reason
        self.temporary = temporary
        self.retry_after = retry_after


def _os_error(code, detail, path):
    # OSError itself chooses the subclass that belongs to the code.
    return OSError(code, f"{os.strerror(code)} in Dropbox ({detail})", path)


# -- Options ---------------------------------------------------------------------------

OPTIONS = {}  # by name, as DropboxStorage declares them


class _Option:
    """An option of the storage, which is checked and cleaned whenever it is used.

    This is a non-data descriptor, so Python itself knows the order of precedence: a
    property of a subclass; a constructor argument, which is in the __dict__ of the
    instance; another attribute of a subclass; and at last the setting, found here.
    """

    def __init__(self, setting, default, clean, *allowed):
        self.setting = setting
        self.default = default
        self._clean = clean
        self._allowed = allowed

    def __set_name__(self, owner, name):
        self.name = name
        OPTIONS[name] = self

    def __get__(self, storage, owner=None):
        if storage is None:
            return self
        return getattr(settings, self.setting, self.default)

    def read(self, storage):
        """Return the value as it is now, in the form that is used.

        Raises ImproperlyConfigured for a wrong value.
        """
        value = getattr(storage, self.name)
        try:
            return self._clean(value, *self._allowed)
        except ValueError as error:
            is_secret = self.name in CREDENTIALS
            found = _describe_credential(value) if is_secret else repr(value)
            message = f"{self.name} (or {self.setting}) must be {error}: found {found}."
        del value  # an error report shows this frame
        raise ImproperlyConfigured(message)

    def is_computed(self, storage):
        """Whether a property of a subclass computes the value, without asking it."""
        attribute = inspect.getattr_static(type(storage), self.name)
        return attribute is not self and hasattr(attribute, "__get__")

    def place(self, storage):
        """Return how far the value is set from the storage: 0 is the storage itself,
        higher numbers are its classes. DropboxStorage stands for the settings.
        """
        places = [vars(storage), *map(vars, type(storage).__mro__)]
        return [self.name in place for place in places].index(True)


# The functions below check and clean the values of options.


TEXT = r"[!#-&(-[\]-~]+"


def _text(value):
    # An unset environment variable often arrives as an empty string.
    if not value:
        return None
    if isinstance(value, str) and re.fullmatch(TEXT, value):
        return value
    raise ValueError("printable ASCII without spaces, quotes and backslashes")


def _refresh_token(value):
    if str(value).startswith("sl."):
        raise ValueError("the refresh_token of Dropbox's answer")
    return _text(value)


def _describe_credential(value):
    """Say what is wrong with a credential, and show nothing of it."""
    if not isinstance(value, str):
        return f"a value of type {type(value).__name__}"
    if value != value.rstrip():
        return "a line break or a blank at its end"
    if re.fullmatch(TEXT, value):
        return "an access token, which begins with 'sl.'"
    return "another character, which is not shown"


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
    if not value:
        return None
    if isinstance(value, str) and re.fullmatch(r"(/|[a-z]+://[^/\s])\S*", value):
        return f"{value.rstrip('/')}/"
    raise ValueError("a URL such as '/media/' or 'https://host/', or None")


def _seconds(value, least, most):
    if value is None or (type(value) in (int, float) and least <= value <= most):
        return value
    raise ValueError(f"None or a number of seconds from {least} to {most}")


def _write_mode(value):
    return _one_of(value, WRITE_MODES)


def _cache_alias(value):
    return _one_of(value, settings.CACHES)


def _one_of(value, choices):
    if value in list(choices):
        return value
    raise ValueError(f"one of {', '.join(map(repr, choices))}")


class _Account:
    """The credentials that a storage uses. It has no repr, so no report shows them.

    Of the places that set a token, the nearest to the storage decides, also if its
    value is empty: a tenant without a token must not use the account of the site.
    """

    def __init__(self, storage):
        places = {name: OPTIONS[name].place(storage) for name in TOKENS}
        nearest = min(places.values())
        self.oauth2_access_token = None
        self.oauth2_refresh_token = None
        for name in TOKENS:
            if places[name] == nearest and not self.oauth2_refresh_token:
                setattr(self, name, OPTIONS[name].read(storage))
        self.app_key = OPTIONS["app_key"].read(storage)
        self.app_secret = OPTIONS["app_secret"].read(storage)

    @property
    def is_hidden(self):
        """Whether deconstruct() has left out one of the credentials."""
        return HIDDEN in vars(self).values()

    @property
    def digest(self):
        """A key for these credentials that does not show them."""
        return hashlib.sha256(repr(vars(self)).encode()).hexdigest()

    def check(self, storage):
        """Raise ImproperlyConfigured for credentials that cannot work together."""
        has_token = bool(self.oauth2_refresh_token or self.oauth2_access_token)
        missing = [] if has_token else ["oauth2_refresh_token"]
        if not self.app_key and not self.oauth2_access_token:
            missing.append("app_key")
        if missing:
            missing = [f"{name} ({OPTIONS[name].setting})" for name in missing]
            reason = "" if has_token else _describe_empty_token(storage)
            raise ImproperlyConfigured(
                f"{' and '.join(missing)} not set{reason}: set oauth2_refresh_token, "
                "app_key and app_secret (an app that uses PKCE has no secret), or else "
                "oauth2_access_token (DROPBOX_OAUTH2_TOKEN)."
            )

    def make_client(self, session):
        if str(self.oauth2_access_token).startswith("sl."):
            logger.warning("oauth2_access_token: %s.", SHORT_LIVED)
        return _client_class()(
            **vars(self),
            session=session,
            max_retries_on_error=0,  # _Api.perform() alone repeats requests
            max_retries_on_rate_limit=0,
        )


def _describe_empty_token(storage):
    """Say where a token is set to nothing, so that the others do not count."""
    place = min(OPTIONS[name].place(storage) for name in TOKENS)
    if place == 0:
        return f", as this {type(storage).__name__} object has an empty token"
    kind = type(storage).__mro__[place - 1]
    if kind is DropboxStorage:
        return ""
    return f", as class {kind.__name__} has an empty token"


# -- The storage -----------------------------------------------------------------------


class _NoNameTaken(django_storage.Storage):
    """Finds names for files that may replace others: only their length matters."""

    def exists(self, name):
        return False

    def get_alternative_name(self, file_root, file_ext):
        return f"{file_root}{file_ext}"


class _NewFile(django_storage.Storage):
    """Saves a file under a name that is free, with Django's own code.

    free_name: a name that counts as free without a request, until Dropbox refuses it.
    """

    def __init__(self, storage, max_length, free_name):
        self._storage = storage
        self._max_length = max_length
        self._free_name = free_name
        self._refused = set()

    def exists(self, name):
        if name == self._free_name:
            return False
        return name in self._refused or self._storage.exists(name)

    def get_alternative_name(self, file_root, file_ext):
        return self._storage.get_alternative_name(file_root, file_ext)

    def _save(self, name, content):
        return self._storage._add(name, content, self._choose_name)

    def _choose_name(self, name, refused):
        self._free_name = None
        self._refused = refused
        return self.get_available_name(name, self._max_length)


@deconstructible
class DropboxStorage(django_storage.Storage):
    """Django's storage API for the files of a Dropbox account.

    Takes the options below as keyword arguments, and the access token as a positional
    one, too. Each option may also be a class attribute of a subclass or a setting.
    Wrong values raise ImproperlyConfigured here, without a request; those of properties
    raise it when they are used. Missing credentials raise it at the first request: a
    migration builds its storages without them.

    A method that sends a request raises DropboxStorageException if Dropbox refuses it
    or cannot be reached, and FileNotFoundError, IsADirectoryError, NotADirectoryError
    or FileExistsError where one of them describes the error.
    """

    # An access token of the app. One that begins with "sl." is valid for four hours.
    oauth2_access_token = _Option("DROPBOX_OAUTH2_TOKEN", None, _text)
    # Valid until it is revoked. With the app's key it gives access tokens.
    oauth2_refresh_token = _Option("DROPBOX_OAUTH2_REFRESH_TOKEN", None, _refresh_token)
    app_key = _Option("DROPBOX_APP_KEY", None, _text)
    # An app that authorizes with PKCE has none.
    app_secret = _Option("DROPBOX_APP_SECRET", None, _text)
    # The folder that holds all files. It begins at the root of the app or the account.
    root_path = _Option("DROPBOX_ROOT_PATH", "/", _root_path)
    # Seconds without an answer after which a request has failed. None: no limit.
    timeout = _Option("DROPBOX_TIMEOUT", 100, _seconds, 0.001, 86400)
    # Seconds after the first failure of a request in which it is attempted again. 0:
    # one attempt; None: no limit.
    max_wait = _Option("DROPBOX_MAX_WAIT", 60, _seconds, 0, 86400)
    # What save() does if the name is taken. "add": chooses another name; "overwrite":
    # replaces the file; "update": replaces it unless somebody changes it meanwhile.
    write_mode = _Option("DROPBOX_WRITE_MODE", "add", _write_mode)
    # If it is set, url() joins it with the name and sends no request; see serve().
    base_url = _Option("DROPBOX_BASE_URL", None, _url)
    # The alias in CACHES of the cache that keeps the temporary links.
    url_cache = _Option("DROPBOX_URL_CACHE", "default", _cache_alias)
    # Seconds that a link is kept there. 0 or None: not at all.
    url_cache_timeout = _Option(
        "DROPBOX_URL_CACHE_TIMEOUT", 3600, _seconds, 0, MAX_LINK_AGE
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

    def __init__(self, oauth2_access_token=NOT_GIVEN, **options):
        if oauth2_access_token is not NOT_GIVEN:
            options["oauth2_access_token"] = oauth2_access_token
        unknown = ", ".join(sorted(options.keys() - OPTIONS.keys() - {"location"}))
        hooks = [hook for hook in FOREIGN_HOOKS if hasattr(type(self), hook)]
        hooks += options.keys() & {"location"}
        vars(self).update(options)
        self._arguments = _hide_credentials(self._arguments, vars(self))
        del oauth2_access_token, options  # an error report shows this frame
        if hooks:
            raise ImproperlyConfigured(
                f"{hooks[0]} of {type(self).__name__} belongs to django-storages and "
                f"would be ignored: {FOREIGN_HOOKS[hooks[0]]}."
            )
        if unknown:
            known = ", ".join(sorted(OPTIONS))
            raise ImproperlyConfigured(f"Unknown option {unknown}; there are {known}.")
        for option in OPTIONS.values():
            if not option.is_computed(self):
                option.read(self)

    @property
    def _constructor_args(self):
        """The arguments for deconstruct(): "***" for each that holds a credential.

        @deconstructible sets this attribute, and replaces deconstruct() in each class.
        """
        credentials = {}
        for name in CREDENTIALS:
            # A property may need a web request, which a migration does not have.
            with contextlib.suppress(Exception):
                credentials[name] = getattr(self, name)
        return _hide_credentials(self._arguments, credentials)

    @_constructor_args.setter
    def _constructor_args(self, arguments):
        self._arguments = arguments

    def _option(self, name):
        return OPTIONS[name].read(self)

    @property
    def client(self):
        """The dropbox.Dropbox that sends the requests.

        It is made when it is used, and shares its connections and its token with those
        of all storages of the process that have the same credentials. You may assign
        another one, which then uses its own credentials, and its own headers.
        """
        if self._assigned_client is not None:
            return self._assigned_client
        account = _Account(self)
        if account.is_hidden:
            account = self._registered_account()
        account.check(self)
        owner = _process().client(account)
        client = copy.copy(owner)
        client.owner = owner
        client._timeout = self._option("timeout")
        client._headers = self._headers
        return client

    @client.setter
    def client(self, client):
        self._assigned_client = client

    @property
    def _headers(self):
        """The headers of each request, for the namespace and the member of a team."""
        headers = {}
        if namespace := self._option("namespace_id"):
            root = {".tag": "namespace_id", "namespace_id": namespace}
            headers["Dropbox-API-Path-Root"] = json.dumps(root)
        if member := self._option("team_member_id"):
            headers["Dropbox-API-Select-User"] = member
        return headers

    def _registered_account(self):
        """Return the account of the entry in STORAGES that is equal to this storage.

        Apps pass deconstruct() to a task, which builds the storage again: that has no
        credentials. Raises ImproperlyConfigured if there is not exactly one account.
        """
        handler = getattr(django_storage, "storages", None)  # since Django 4.2
        entries = handler.backends if handler else {}
        aliases = [alias for alias in entries if self._is_built_by(entries[alias])]
        storages = [handler[alias] for alias in aliases]
        equal = [one for one in storages if one.deconstruct() == self.deconstruct()]
        accounts = {account.digest: account for account in map(_Account, equal)}
        if len(accounts) == 1 and not (account := accounts.popitem()[1]).is_hidden:
            return account
        raise ImproperlyConfigured(
            f"The credentials of this {type(self).__name__} were left out when it was "
            "written to a migration or handed to a task. One entry of STORAGES must "
            "have this class, the same other options, and the credentials."
        )

    def _is_built_by(self, entry):
        """Whether the entry of STORAGES has this class, under whatever path."""
        # Another backend may not be installed.
        with contextlib.suppress(ImportError, ImproperlyConfigured):
            return import_string(entry.get("BACKEND", "")) is type(self)
        return False

    @property
    def _api(self):
        """The way to Dropbox, with the options as they are now."""
        max_wait = self._option("max_wait")
        if max_wait is None:
            max_wait = float("inf")
        return _Api(self.client, max_wait, self.FIRST_WAIT)

    def _open(self, name, mode="rb"):
        return DropboxFile(name, self, mode)

    def save(self, name, content, max_length=None):
        if self._option("write_mode") != "add" or not self._has_default_naming():
            return super().save(name, content, max_length)
        if not hasattr(content, "chunks"):
            content = File(content, name)
        wanted = content.name if name is None else name
        free_name = str(wanted) if _is_small(content) else None
        new_file = _NewFile(self, max_length, free_name)
        return new_file.save(name, content, max_length)

    def _save(self, name, content):
        mode = self._option("write_mode")
        if mode == "add":
            return self._add(
                name, content, lambda wanted, refused: self.get_available_name(wanted)
            )
        name = self._clean_name(name)
        revision = self._find_revision(name) if mode == "update" else None
        upload = self._start_upload(self._path(name), mode, revision)
        with contextlib.closing(upload):
            upload.send(content.chunks())
            self._commit(upload)
        return name

    def _add(self, name, content, choose_name):
        """Save the file under the name, or another one if it is taken; return the name.

        choose_name: returns another one for the name, and the names that were refused.
        """
        wanted = self._clean_name(name)
        name = wanted
        refused = set()
        upload = self._start_upload(self._path(name), "add", None)
        with contextlib.closing(upload):
            upload.send(content.chunks())
            while True:
                try:
                    self._commit(upload)
                    return name
                except (FileExistsError, IsADirectoryError):
                    if name in refused:
                        raise  # it would be refused for ever
                refused.add(name)
                name = self._clean_name(choose_name(wanted, refused))
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
        path = self._path(name)
        api = self._api
        try:
            with contextlib.suppress(FileNotFoundError):
                api.call("files/delete_v2", path)
        finally:
            self._cached_link(api, path).forget()

    def exists(self, name):
        path = self._full_path(name)
        if self._is_root(path):
            return True
        with contextlib.suppress(FileNotFoundError):
            return bool(self._api.call("files/get_metadata", path))
        return False

    def listdir(self, path):
        entries = self._list_folder(self._full_path(path).rstrip("/"))
        folders = [entry.name for entry in entries if not hasattr(entry, "rev")]
        files = [entry.name for entry in entries if hasattr(entry, "rev")]
        return folders, files

    def size(self, name):
        return self._file_metadata(name).size

    def url(self, name):
        """Return base_url with the name, or a temporary link to the bytes of the file.

        If the file does not exist, the link is an invalid address that is different for
        each name, and a warning is logged: one missing picture must not break a page.
        """
        base_url = self._option("base_url")
        if base_url is not None:
            relative = self._relative_name(_spell(str(name or "")))
            path = filepath_to_uri(relative).lstrip("/")
            return f"{str(base_url).rstrip('/')}/{path}"
        if not name:
            raise ValueError("The name must be given to url().")
        try:
            return self._link(self._path(name))
        except FileNotFoundError:
            root = self._option("root_path")
            logger.warning("No link to %r: it is not in %r.", name, root)
            return f"about:invalid#{filepath_to_uri(_spell(name))}"

    def get_modified_time(self, name):
        modified = self._file_metadata(name).server_modified
        seconds = modified.replace(tzinfo=timezone.utc).timestamp()
        zone = timezone.utc if settings.USE_TZ else None
        return datetime.fromtimestamp(seconds, zone)

    # -- Transfers, names and metadata --

    def _has_default_naming(self):
        """Whether nobody overrides the methods that decide on a new name."""
        names = ("exists", "get_available_name", "is_name_available", "_save")
        return all(
            getattr(getattr(self, name, None), "__func__", None)
            is getattr(DropboxStorage, name, None)
            for name in names
        )

    def _start_upload(self, path, mode, revision):
        connections = max(1, self.CONNECTIONS)
        return _Upload(self._api, path, mode, revision, self.CHUNK_SIZE, connections)

    def _commit(self, upload):
        try:
            upload.commit()
        finally:
            self._cached_link(self._api, upload.path).forget()

    def _clean_name(self, name):
        """Return the name relative to root_path, in NFC and with slashes; "" for it."""
        if re.search("[\0\ud800-\udfff]", os.fspath(name)):
            raise SuspiciousFileOperation(f"{name!r} holds NUL or half a character.")
        if os.fspath(name).strip("/") == "":
            return ""
        clean = self._relative_name(_spell(name))
        if clean.startswith("/") or f"{clean}/".startswith("../"):
            root = self._option("root_path")
            raise SuspiciousFileOperation(f"{name!r} is outside {root!r}.")
        clean = clean.rstrip("/")
        return "" if clean == "." else clean

    def _relative_name(self, name):
        """Return an absolute name inside root_path as a relative one."""
        is_inside = f"{name}/".startswith(f"{self._root}/")
        return name[len(self._root) + 1 :] if is_inside else name

    @property
    def _root(self):
        """The path of the folder that holds all files; "" for the account's root."""
        return self._option("root_path").rstrip("/")

    def _full_path(self, name):
        """Return Dropbox's path of the name. Subclasses may call or override this.

        The name may be absolute if it is inside root_path. Raises
        SuspiciousFileOperation if it is outside.
        """
        return f"{self._root}/{self._clean_name(name)}".rstrip("/")

    def _is_root(self, path):
        return path.rstrip("/") == self._full_path("").rstrip("/")

    def _path(self, name):
        """Return Dropbox's path of a name, which must not be the root."""
        path = self._full_path(name)
        if self._is_root(path):
            raise _os_error(errno.EISDIR, "the root of all files", path or "/")
        return path

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
        api = self._api
        entries = {}
        try:
            page = api.call("files/list_folder", folder)
            _add_page(entries, page)
            while page.has_more:
                page = api.call("files/list_folder/continue", folder, page.cursor)
                _add_page(entries, page)
        except FileNotFoundError:
            if not self._is_root(folder):
                raise  # the root is there with the first file that is saved
        except DropboxStorageException as error:
            if not (may_restart and _has_words(error.reason, "reset")):
                raise
            # The cursor has expired.
            return self._list_folder(folder, may_restart=False)
        return [*entries.values()]

    def _start_download(self, path):
        return _Download(self._api, path, max(1, self.CONNECTIONS))

    # -- Links --

    def _link(self, path):
        """Return a temporary link to the file, from the cache if it has one."""
        api = self._api
        cached = self._cached_link(api, path)
        link = cached.find()
        if link is None:
            cached.mark_request()
            try:
                link = api.get_link(path)
            except BaseException:
                cached.forget()
                raise
            cached.keep(link)
        return link

    def _cached_link(self, api, path):
        timeout = self._option("url_cache_timeout")
        cache = caches[self._option("url_cache")] if timeout else None
        return _CachedLink(cache, timeout, api.client, path)


def _hide_credentials(arguments, credentials):
    """Return (args, kwargs) of a constructor with "***" for what holds a credential."""
    args, kwargs = arguments
    secrets = [repr(credentials[name]) for name in CREDENTIALS if credentials.get(name)]
    args = [HIDDEN if _holds_any(value, secrets) else value for value in args]
    hidden = {name for name in kwargs if _holds_any(kwargs[name], secrets)}
    return tuple(args), {**kwargs, **dict.fromkeys(hidden, HIDDEN)}


def _holds_any(value, secrets):
    if isinstance(value, Promise):  # a lazy URL, which may not be known yet
        return False
    try:
        text = repr(value)
    except Exception:  # nobody knows what it holds
        return True
    return any(secret in text for secret in secrets)


class _CachedLink:
    """The temporary link to one file in Django's cache.

    A request for a link is marked in the cache. Saving and deleting remove the mark.
    Therefore a link to the old file, which arrives after that, is not kept. If the
    cache is down, that is logged once, and there is no cache.
    """

    def __init__(self, cache, timeout, client, path):
        self._cache = cache  # None if there is none, or if it is down
        self._timeout = timeout
        self._key = _link_key(client, path)
        self._mark_key = f"{self._key}:request"
        self._mark = None

    def find(self):
        """Return the link, or None if there is none."""
        link = self._use("get", self._key)
        return link if _is_link(link) else None

    def mark_request(self):
        """Call this before asking for the link. Several requests share a mark."""
        mark = os.urandom(16).hex()
        self._mark = self._use("get_or_set", self._mark_key, mark, LINK_REQUEST_LIFE)

    def keep(self, link):
        self._use("set", self._key, link, self._timeout)
        # The link is stored first: whoever removes the mark afterwards removes it, too.
        if self._use("get", self._mark_key) != self._mark:
            self._use("delete", self._key)

    def forget(self):
        self._use("delete_many", [self._mark_key, self._key])

    def _use(self, method, *args):
        """Call the method of the cache. If it is down, log that and return None."""
        if self._cache is None:
            return None
        try:
            return getattr(self._cache, method)(*args)
        except Exception as error:
            logger.warning("The cache of links failed: %s.", type(error).__name__)
            self._cache = None
            return None


def _is_link(link):
    return isinstance(link, str) and re.fullmatch("https://[!-~]+", link) is not None


def _link_key(client, path):
    """The key in the cache: for the account, the namespace, the member and the file.

    It folds ASCII letters alone: Dropbox's folding of other letters is unknown.
    """
    digest = hashlib.sha256(repr((client._headers, path.encode().lower())).encode())
    name = "refresh" if client._oauth2_refresh_token else "access"
    digest.update(str(getattr(client, f"_oauth2_{name}_token")).encode())
    return f"dropbox_storage:{digest.hexdigest()}"


def _add_page(entries, page):
    """Add a page of a listing to the entries. Later pages report what has changed."""
    for entry in page.entries:
        # Where a namespace is not mounted, entries have no paths.
        path = entry.path_lower or entry.name.lower()
        entries.pop(path, None)
        if hasattr(entry, "id"):  # what was deleted has none
            entries[path] = entry


def _is_small(content):
    """Whether the content says that it is small. It need not be true."""
    try:
        return content.size <= SMALL_FILE
    except Exception:  # it may have no size, or ask somebody else for it
        return False


def _spell(name):
    """Return the name in NFC, with slashes, and without empty parts and '.'."""
    name = unicodedata.normalize("NFC", os.fspath(name).replace("\\", "/"))
    clean = posixpath.normpath(name).replace("//", "/") if name else ""
    is_folder = name.endswith("/") and not clean.endswith("/")
    return f"{clean}/" if is_folder else clean


def _mend(part):
    """Return a part of a name without what Dropbox refuses in it."""
    root, extension = posixpath.splitext(part.replace("\x7f", "").rstrip(". "))
    part = (root[: max(1, MAX_NAME - len(extension))] + extension)[:MAX_NAME]
    part = part.rstrip(". ")
    return f"_{part}" if part.lower() in ("", *RESERVED_NAMES) else part


# -- Files -----------------------------------------------------------------------------


class DropboxFile(File):
    """A file in Dropbox, as DropboxStorage.open() returns it.

    mode: as for Python's open(). Text is UTF-8. "r" and "rb" read what they need from
    Dropbox. The other modes work on a temporary file, which close() uploads: "r+" and
    "a" begin with the content of the file, and replace the revision that they read.

    close() saves what was written. discard() gives it up, and so does a `with` block
    that an exception leaves. What nobody closes is not saved.
    """

    file = None
    _download = None  # of a file that is open for reading
    _draft = None  # of one that is open for writing

    def __init__(self, name, storage, mode="rb"):
        self.name = os.fspath(name)
        self._storage = storage
        self._open_stream(mode)

    def _open_stream(self, mode):
        """Open the file in Dropbox. Nothing is set before that has succeeded."""
        letters = _check_mode(mode)
        path = self._storage._path(self.name)
        if letters in ("r", "br", "rt"):
            download = self._storage._start_download(path)
            file = io.BufferedReader(download, READ_SIZE)
            self.file = file if "b" in letters else io.TextIOWrapper(file, "utf-8")
            self._download = download
            self._size = download.size
        else:
            draft = _Draft(self._storage, self.name, path, mode)
            self.file = draft.handle
            self._draft = draft
        self.mode = mode
        self._is_collecting = False

    @property
    def size(self):
        """In bytes: of the file when it was opened, or of what has been written."""
        if self._draft is not None:
            if not self.file.closed:
                self.file.flush()
            self._size = self._draft.size
        return self._size

    def open(self, mode=None):
        """Open the file again, or go to its beginning if it is open; return it.

        mode: if it is not given, the one before; but "w+" and "x+" become "r+".
        """
        if not self.closed and mode in (None, self.mode):
            self.seek(0)
            return self
        if mode is None:
            mode = re.sub("[wx]", "r", self.mode) if "+" in self.mode else self.mode
        _check_mode(mode)
        self.close()
        self._open_stream(mode)
        return self

    def close(self):
        """Upload what was written. If that fails, it is lost: the file is closed."""
        if self._is_collecting:
            self._is_collecting = False  # a later call comes from a user
        else:
            self._end(True)

    def discard(self):
        """Close the file without uploading what was written."""
        self._end(False)

    def __exit__(self, exc_type, exc_value, traceback):
        if exc_type is None:
            self.close()
        else:
            self._end(False, "an exception came first")

    def _dealloc_warn(self, source):
        """Wrappers of Python's io call this if nobody uses them, and then close()."""
        self._is_collecting = True

    def __del__(self):
        if self._draft is not None:
            self._end(False, "nobody closed it")

    def _end(self, saves, reason=None):
        """Close the file, and upload what was written, or log the reason why not."""
        draft = self._draft
        download = self._download
        self._draft = None
        self._download = None
        if draft is not None:
            with contextlib.closing(draft):
                if saves:
                    self._save(draft)
                else:
                    self._drop(draft, reason)
        elif download is not None:
            download.may_drain = saves
            self.file.close()

    def _save(self, draft):
        self.file.close()  # which flushes it, also where a wrapper has closed it
        self._size = draft.size
        if draft.is_changed():
            draft.upload.send(draft.chunks())
            self._storage._commit(draft.upload)

    def _drop(self, draft, reason):
        with contextlib.suppress(OSError):  # what cannot be flushed is not needed
            self.file.close()
        self._size = draft.size
        if reason:
            logger.warning("%r is not saved: %s.", self.name, reason)


def _check_mode(mode):
    """Return the letters of the mode in alphabetical order, or raise ValueError."""
    letters = "".join(sorted(mode))
    if re.fullmatch(r"\+?(a[bt]?|b?[rwx]|rt|t[wx])", letters):
        return letters
    raise ValueError(f"{mode!r} is not a mode of open(), such as 'rb'.")


class _Draft:
    """What is written to a file until it is uploaded: a temporary file.

    handle: what the user writes to. It has a descriptor of its own: whoever closes it,
    as wrappers do, leaves the temporary file open.
    upload: what will replace the file in Dropbox.
    """

    def __init__(self, storage, name, path, mode):
        folder = settings.FILE_UPLOAD_TEMP_DIR
        self._temporary = tempfile.TemporaryFile(buffering=0, dir=folder)
        self._original = None  # the _ContentHash of the file in Dropbox, if it matters
        try:
            self.upload = self._find_target(storage, name, path, mode)
            self.handle = self._open_handle(mode)
        except BaseException:
            self._temporary.close()
            raise

    def _find_target(self, storage, name, path, mode):
        """Return an upload that replaces what the mode allows."""
        if "w" in mode and storage._option("write_mode") != "update":
            return storage._start_upload(path, "overwrite", None)
        if "w" in mode:
            revision = storage._find_revision(name)
            return storage._start_upload(path, "update", revision)
        if "x" in mode:
            if storage.exists(name):
                raise _os_error(errno.EEXIST, f"mode {mode!r}", path)
            return storage._start_upload(path, "add", None)
        try:
            revision = self._fill(storage._start_download(path))
        except FileNotFoundError:
            if "a" not in mode:
                raise
            revision = None
        return storage._start_upload(path, "update", revision)

    def _fill(self, download):
        """Copy what is downloaded to the temporary file; return its revision."""
        with io.BufferedReader(download, READ_SIZE) as source:
            with open(self._temporary.fileno(), "wb", closefd=False) as target:
                target.writelines(iter(functools.partial(source.read, READ_SIZE), b""))
            self._original = download.content
        self._temporary.seek(0)
        return download.revision

    def _open_handle(self, mode):
        descriptor = os.dup(self._temporary.fileno())
        if "a" in mode:
            # open() sets this flag for a path, but not for a descriptor.
            with contextlib.suppress(ImportError):  # on Windows
                import fcntl

                fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
        return open(descriptor, mode, encoding=None if "b" in mode else "utf-8")

    @property
    def size(self):
        return os.fstat(self._temporary.fileno()).st_size

    def is_changed(self):
        """Whether it differs from the file in Dropbox with which it began."""
        if self._original is None or self._original.size != self.size:
            return True
        content = _ContentHash()
        buffer = memoryview(bytearray(READ_SIZE))
        self._temporary.seek(0)
        while count := self._temporary.readinto(buffer):
            content.update(buffer[:count])
        return content.hexdigest() != self._original.hexdigest()

    def chunks(self):
        self._temporary.seek(0)
        return iter(functools.partial(self._temporary.read, READ_SIZE), b"")

    def close(self):
        self.upload.close()
        self._temporary.close()


class _ContentHash:
    """Dropbox's content hash: SHA-256 over the SHA-256 digests of all 4 MiB blocks.

    https://www.dropbox.com/developers/reference/content-hash
    """

    def __init__(self, data=b""):
        self.size = 0
        self._digests = bytearray()
        self._block = hashlib.sha256()
        self.update(data)

    def update(self, data):
        view = memoryview(data)
        while view:
            head = view[: HASH_BLOCK - self.size % HASH_BLOCK]
            self._block.update(head)
            self.size += len(head)
            view = view[len(head) :]
            if self.size % HASH_BLOCK == 0:
                self._digests += self._block.digest()
                self._block = hashlib.sha256()

    def append(self, other):
        """Add what the other has hashed. This one must end with a whole block."""
        self.size += other.size
        self._digests += other._digests
        self._block = other._block

    def hexdigest(self):
        rest = self._block.digest() if self.size % HASH_BLOCK else b""
        return hashlib.sha256(self._digests + rest).hexdigest()

    def matches(self, metadata):
        """Whether the metadata is that of a file with these bytes."""
        # The hash is optional in Dropbox's specification.
        hashes = (None, self.hexdigest())
        return metadata.size == self.size and metadata.content_hash in hashes


class _Task:
    """A call in a thread of its own. Any number of threads may wait for its result.

    The thread does not keep the interpreter from exiting, as those of an executor do.
    An exception that a signal handler raises cannot leave a lock locked here, as it can
    in a Future, whose Condition is Python code: each thread that waits has its own.
    """

    def __init__(self):
        self.is_done = False
        self._locks = []  # of the threads that wait
        self._result = None
        self._error = None

    def start(self, function, *args):
        """Call the function in a new thread, or here if there are no more threads."""
        try:
            _thread.start_new_thread(_run_task, (self, function, args))
        except RuntimeError:  # as when the interpreter exits
            _run_task(self, function, args)
        return self

    def wait(self, seconds=None):
        """Return whether the call has ended, after that many seconds at most."""
        lock = _thread.allocate_lock()
        lock.acquire()
        self._locks.append(lock)
        if not self.is_done:
            lock.acquire(timeout=-1 if seconds is None else seconds)
        return self.is_done

    def result(self):
        """Wait for the call; return its result, or raise its error."""
        self.wait()
        try:
            if self._error is not None:
                raise self._error
            return self._result
        finally:
            del self  # the error keeps this frame, which would keep the error

    @property
    def has_failed(self):
        return self._error is not None


def _run_task(task, function, args):
    try:
        task._result = function(*args)
    except BaseException as error:
        task._error = error
    finally:
        task.is_done = True
        for lock in task._locks:
            lock.release()
        del task, function, args  # an error keeps this frame, and would keep them


# -- Downloads -------------------------------------------------------------------------


class _Download(io.RawIOBase):
    """The bytes of one revision of a file. Seeking sends no request, reading may do.

    may_drain: whether close() may read the rest of a response to keep its connection.
    """

    may_drain = False
    _blocks = None  # until the file is open

    def __init__(self, api, path, connections):
        request = functools.partial(_request_bytes, api, path)
        metadata, response = api.perform("files/download", path, request)
        self.size = metadata.size
        self.revision = metadata.rev
        self.content = _ContentHash()  # of what has been read in order
        self._metadata = metadata
        self._path = path
        self._process = os.getpid()
        self._position = 0
        self._has_failed = False
        revision = _Revision(api, path, metadata.rev, metadata.size)
        self._blocks = _Blocks(revision, response, connections)

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        self._check_is_open()
        if whence == io.SEEK_CUR:  # as for tell()
            self._check_has_not_failed()
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}
        if whence not in starts or starts[whence] + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = starts[whence] + offset
        self._has_failed = False
        return self._position

    def readinto(self, buffer):
        buffer = memoryview(buffer)  # a report would show what the memory held before
        view = self._read(len(buffer))
        buffer[: len(view)] = view
        return len(view)

    def readall(self):
        # The base class would join chunks, and have all twice in memory.
        content = io.BytesIO()
        while view := self._read(READ_BLOCK):
            content.write(view)
        return content.getvalue()

    def _read(self, count):
        """Return a view of up to count bytes at the position, and move the position."""
        self._check_is_open()
        self._check_has_not_failed()
        if self._position >= self.size:
            return memoryview(b"")
        try:
            view = self._blocks.read(self._position, count)
            self._check_content(view)
        except BaseException:
            self._has_failed = True
            self._blocks.close()
            raise
        self._position += len(view)
        return view

    def _check_is_open(self):
        if self.closed:
            raise ValueError("I/O operation on closed file.")
        if self._process != os.getpid():
            message = f"{self._path!r} was opened in another process; open it again."
            raise DropboxStorageException(message)

    def _check_has_not_failed(self):
        if self._has_failed:  # the buffer above has lost what it held
            message = f"Reading {self._path!r} has failed; seek() to where to continue."
            raise DropboxStorageException(message)

    def _check_content(self, view):
        """Hash what is read in order from the beginning, and check the whole file."""
        if self._position == 0:
            self.content = _ContentHash()
        known = self.content.size - self._position
        if not 0 <= known < len(view):
            return
        self.content.update(view[known:])
        if self.content.size == self.size and not self.content.matches(self._metadata):
            raise DropboxStorageException(
                f"files/download of {self._path!r} failed: Dropbox has other bytes.",
                "content_hash_mismatch",
                temporary=True,
            )

    def close(self):
        if self._blocks is not None:
            # A forked process shares the connection with its parent.
            self._blocks.close(self.may_drain and self._process == os.getpid())
        super().close()


class _Revision(collections.namedtuple("_Revision", "api path revision size")):
    """A revision of a file, and where to request its bytes.

    It is a row of blocks: a single one, or blocks of READ_BLOCK bytes.
    """

    __slots__ = ()

    @property
    def block_size(self):
        return self.size if self.size <= WHOLE_FILE else READ_BLOCK

    def block_range(self, number):
        """Return the begin and the end of a block in bytes."""
        begin = number * self.block_size
        return begin, min(begin + self.block_size, self.size)


class _Blocks:
    """The blocks of a revision that are in memory or on disk.

    The first block is that of the response that opens the file, and is read as it is
    needed. The others are requested whole, in the background. A reader who goes on
    from the beginning has several requested ahead; after a jump it is one, and more
    with each block that is read in order.
    """

    def __init__(self, revision, response, connections):
        self._revision = revision
        self._first = _Block(revision, 0, response)
        self._memory = {}  # by number, the least recently used first
        self._disk = _BlocksOnDisk()
        self._most_ahead = min(connections, KEPT_BLOCKS)
        self._number = 0  # of the block that was read last
        self._in_order = BLOCKS_IN_ORDER  # blocks read in order, as if after so many

    def read(self, position, count):
        """Return a view of up to count bytes, of one block."""
        number, offset = divmod(position, self._revision.block_size)
        if number == self._number + 1:
            self._in_order += 1
        elif number != self._number:
            self._in_order = 0
        self._number = number
        if number == 0 and self._first is not None:
            return self._first.read(offset, count)
        self._request_from(number)
        return self._memory[number].read(offset, count)

    def _request_from(self, number):
        """Have the block in memory, and request those that are likely to follow."""
        ahead = min(2 ** min(self._in_order, BLOCKS_IN_ORDER), self._most_ahead)
        last = (self._revision.size - 1) // self._revision.block_size
        for one in range(number, min(number + ahead - 1, last) + 1):
            # Each use puts these blocks behind the others, which are dropped first.
            block = self._memory.pop(one, None)
            # A block may have failed in an outage, before it was needed.
            if block is not None and block.has_failed:
                block.cancel()
                block = None
            self._memory[one] = block or self._load(one)
        while len(self._memory) > KEPT_BLOCKS:
            self._drop(next(iter(self._memory)))

    def _load(self, number):
        begin, end = self._revision.block_range(number)
        block = _Block(self._revision, number)
        if not self._disk.read(number, block.data):
            block.request()
        return block

    def _drop(self, number):
        """Drop a block from memory: to the disk if this reader may come back to it."""
        block = self._memory.pop(number)
        if self._in_order < BLOCKS_IN_ORDER and block.is_whole:
            self._disk.write(number, block.data)
        block.cancel()

    def close(self, may_drain=False):
        """Drop all blocks. What is read later is requested again."""
        while self._memory:
            self._memory.popitem()[1].cancel()
        self._disk.close()
        first = self._first
        self._first = None
        if first is not None:
            first.close(may_drain)


class _BlocksOnDisk:
    """Blocks in a temporary file. If the disk fails, they are simply not there."""

    def __init__(self):
        self._file = None
        self._offsets = {}  # by number of the block

    def write(self, number, data):
        if number in self._offsets:
            return
        with contextlib.suppress(OSError):
            if self._file is None:
                folder = settings.FILE_UPLOAD_TEMP_DIR
                self._file = tempfile.TemporaryFile(buffering=0, dir=folder)
            offset = self._file.seek(0, io.SEEK_END)
            if self._file.write(data) == len(data):
                self._offsets[number] = offset

    def read(self, number, data):
        """Read the block into the data; return whether it was there."""
        if number not in self._offsets:
            return False
        with contextlib.suppress(OSError):
            self._file.seek(self._offsets[number])
            return self._file.readinto(data) == len(data)
        return False

    def close(self):
        self._offsets.clear()
        if self._file is not None:
            self._file.close()
            self._file = None


class _Block:
    """Consecutive bytes of a revision, in memory.

    They come from a response while they are read, or are loaded in the background.
    """

    def __init__(self, revision, number, response=None):
        self._revision = revision
        self._begin, end = revision.block_range(number)
        self.data = memoryview(bytearray(end - self._begin))
        self._loaded = 0
        self._response = response
        self._task = None
        self._is_cancelled = False

    def request(self):
        """Load the whole block in the background."""
        self._task = _Task().start(self._load, len(self.data))

    @property
    def is_whole(self):
        return self._task is None or (self._task.is_done and not self.has_failed)

    @property
    def has_failed(self):
        return self._task is not None and self._task.has_failed

    def read(self, offset, count):
        """Wait for up to count bytes from the offset on; return a view of them."""
        end = min(offset + count, len(self.data))
        if self._task is not None:
            self._task.result()
        elif self._response is not None:
            self._load(end)
        return self.data[offset:end]

    def _load(self, end):
        while self._loaded < end:
            api = self._revision.api
            api.perform("files/download", self._revision.path, self._read_part)
        if self._loaded == len(self.data):
            self.close()

    def _read_part(self):
        """Read some bytes; after an error, the next attempt sends a new request."""
        path = self._revision.path
        begin = self._begin + self._loaded
        end = self._begin + len(self.data)
        try:
            if self._is_cancelled:
                raise DropboxStorageException(f"Reading {path!r} was cancelled.")
            if self._response is None:
                revision = f"rev:{self._revision.revision}"
                api = self._revision.api
                self._response = _request_bytes(api, revision, begin, end)[1]
            part = self.data[self._loaded : self._loaded + READ_SIZE]
            count = self._response.readinto(part)
            if not count:
                raise _BadResponse(f"the response ended before byte {begin}")
            self._loaded += count
        except BaseException:
            self.close()
            raise

    def cancel(self):
        """Let the background thread stop. The task may hold an error with frames."""
        self._is_cancelled = True
        self._task = None

    def close(self, may_drain=False):
        """Close the response, or read the little that is left, to keep its socket."""
        response = self._response
        self._response = None
        if response is None:
            return
        if may_drain and 0 < (response.length_remaining or 0) <= DRAIN:
            _Task().start(response.drain_conn)
        else:
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


# -- Uploads ---------------------------------------------------------------------------


class _Upload:
    """Content that becomes a file in Dropbox with commit().

    Up to two chunks are sent with the request that commits them. More are sent while
    they come, several at the same time, with a concurrent upload session. Without a
    commit, Dropbox stays as it was: it forgets the session after some days.

    mode: a write mode. revision: for "update", that of the file that is replaced, None
    if there is none.
    """

    def __init__(self, api, path, mode, revision, chunk_size, connections):
        from dropbox import files

        self.path = path
        self._api = api
        self._mode = mode
        self._target = {"mode": files.WriteMode.add, "strict_conflict": True}
        if mode == "overwrite":
            self._target = {"mode": files.WriteMode.overwrite}
        elif revision:
            self._target["mode"] = files.WriteMode.update(revision)
        self._chunk_size = _round_chunk_size(chunk_size)
        self._connections = connections
        self._content = _ContentHash()  # of the chunks that Dropbox has
        self._chunks = []  # those that have not been sent
        self._sending = collections.deque()  # tasks, each of which returns a hash
        self._session = None  # the id of the upload session
        self._offset = 0  # of the next chunk in the session, in bytes
        self._is_closed = False

    def close(self):
        """Let the background threads stop, and drop what has not been sent."""
        self._is_closed = True
        self._chunks = []
        self._sending.clear()

    def send(self, content):
        """Take the content, an iterable of bytes or text. Send it if it is long."""
        for chunk in _cut(content, self._chunk_size):
            self._chunks.append(chunk)
            if len(self._chunks) > 2 and self._session is None:
                self._start_session()
            # The last chunk closes the session, which may be impossible without data.
            while self._session is not None and len(self._chunks) > 1:
                self._append_in_background(self._chunks.pop(0))

    def commit(self):
        """Make the content the file at self.path.

        Raises FileExistsError or IsADirectoryError if the path is taken. It may then be
        called again, after self.path has been changed.
        """
        if self._session is not None and self._chunks:
            self._close_session()
        now = datetime.now(timezone.utc).replace(tzinfo=None, microsecond=0)
        self._target["client_modified"] = now
        send = self._send_file if self._session is None else self._finish_session
        try:
            metadata = send()
        except (OSError, DropboxStorageException) as error:
            if self._is_committed(error):
                return
            if self._mode != "update" or not isinstance(error, FileExistsError):
                raise
            message = f"{self.path!r} has changed since it was looked at"
            raise DropboxStorageException(
                f"{message}; it was left alone.", "path/conflict/file"
            ) from error
        if not self._content.matches(metadata):
            message = f"files/upload of {self.path!r} failed: Dropbox has other bytes."
            raise DropboxStorageException(message, "content_hash_mismatch")

    def _is_committed(self, error):
        """Whether the path holds what was sent, although the commit has failed.

        Either a response was lost, or "update" refused bytes that change nothing. A
        file that was added has the time that was sent with it.
        """
        failure = getattr(error, "failure", None)
        if failure is None:  # the error comes from elsewhere
            return False
        is_refused = self._mode == "update" and isinstance(error, FileExistsError)
        if not (failure.is_lost or is_refused):
            return False
        api = copy.copy(self._api)
        if failure.is_transient:  # the commit has waited already
            api.max_wait = 0
        with contextlib.suppress(*NO_FILE, DropboxStorageException):
            found = api.call("files/get_metadata", self.path)
            if hasattr(found, "rev") and self._content.matches(found):
                now = self._target["client_modified"]
                return self._mode != "add" or found.client_modified == now
        return False

    def _send_file(self):
        first, *others = self._chunks
        for chunk in others:
            first.write(chunk.getbuffer())
        self._chunks = [first]
        self._content = _ContentHash(first.getbuffer())
        target = {**self._target, "content_hash": self._content.hexdigest()}
        return self._call("files/upload", first, self.path, **target)

    def _start_session(self):
        from dropbox.files import UploadSessionType

        route = "files/upload_session/start"
        kind = UploadSessionType.concurrent
        self._session = self._call(route, io.BytesIO(), False, kind).session_id

    def _append_in_background(self, chunk):
        """Send the chunk in the background; wait if enough others are being sent."""
        if len(self._sending) == self._connections:
            self._content.append(self._sending.popleft().result())
        task = _Task().start(self._append, self._offset, chunk, False)
        self._sending.append(task)
        self._offset += chunk.tell()

    def _append(self, offset, chunk, close):
        """Send a chunk of the session; return its hash."""
        from dropbox.files import UploadSessionCursor

        content = _ContentHash(chunk.getbuffer())
        cursor = UploadSessionCursor(self._session, offset)
        route = "files/upload_session/append_v2"
        digest = content.hexdigest()
        try:
            self._call(route, chunk, cursor, close, content_hash=digest)
        except DropboxStorageException as error:
            # If a response was lost, the session may have the chunk, and refuse it now.
            refusals = ("closed", "incorrect_offset")
            has_arrived = any(_has_words(error.reason, words) for words in refusals)
            if not (has_arrived and error.failure.is_lost):
                raise
        return content

    def _close_session(self):
        """Send the last chunk when all others are there."""
        while self._sending:
            self._content.append(self._sending.popleft().result())
        self._content.append(self._append(self._offset, self._chunks.pop(), True))

    def _finish_session(self):
        from dropbox.files import CommitInfo, UploadSessionCursor

        cursor = UploadSessionCursor(self._session, self._content.size)
        target = CommitInfo(self.path, **self._target)
        return self._call("files/upload_session/finish", io.BytesIO(), cursor, target)

    def _call(self, route, chunk, *args, **kwargs):
        """Send the chunk with the SDK's method for the route."""

        def send():
            if self._is_closed:
                raise DropboxStorageException(f"{self.path!r} was not sent.")
            method = getattr(self._api.request(), route.replace("/", "_"))
            return method(chunk.getvalue(), *args, **kwargs)

        return self._api.perform(route, self.path, send)


def _round_chunk_size(size):
    """Return the size in whole hash blocks, so that two chunks fit into a request."""
    most = MAX_REQUEST // 2 - HASH_BLOCK
    blocks = -(-min(max(1, size), most) // HASH_BLOCK)
    return blocks * HASH_BLOCK


def _cut(content, size):
    """Yield the content as io.BytesIO objects of `size` bytes; the last may be smaller.

    There is always one.
    """
    chunk = io.BytesIO()
    room = size
    for view in map(_view, content):
        while view:
            if not room:
                yield chunk
                chunk = io.BytesIO()
                room = size
                chunk.seek(size - 1)  # allocates it whole: growing would copy it
                chunk.write(b"\0")
                chunk.seek(0)
            count = chunk.write(view[:room])
            view = view[count:]
            room -= count
    chunk.truncate()
    yield chunk


def _view(data):
    """Return bytes, or text as UTF-8, as a memoryview."""
    if not isinstance(data, str):
        return memoryview(data).cast("B")
    try:
        return memoryview(data.encode())
    except UnicodeEncodeError as error:
        wrong = error.object[error.start]
        position = error.start
    del data  # an error report shows this frame
    message = f"surrogates not allowed (character {position} of a chunk)"
    raise UnicodeEncodeError("utf-8", wrong, 0, 1, message)


# -- The way to Dropbox ----------------------------------------------------------------


class _Process:
    """What all storages of a process share. A forked process has one of its own.

    It is safe in threads without a lock: each step is one operation of a dictionary.
    """

    def __init__(self):
        self._session = _make_session()
        # By account; the client that was used last is the last one.
        self._clients = collections.OrderedDict()
        self._tokens = weakref.WeakKeyDictionary()  # by client

    def client(self, account):
        """Return the client of the account, or make one."""
        key = account.digest
        client = self._clients.get(key)
        if client is None:
            client = self._clients.setdefault(key, account.make_client(self._session))
            self._tokens.setdefault(client, _Token())
        with contextlib.suppress(KeyError):  # another thread may have thrown it out
            self._clients.move_to_end(key)
        while len(self._clients) > KEPT_CLIENTS:
            self._clients.popitem(last=False)
        return client

    def token(self, client):
        """Return what the process knows of the access token of a client.

        A client that somebody has assigned may come from the parent of a forked
        process, with which it must not share its connections.
        """
        if client not in self._tokens:
            client._session.close()  # which opens others when they are needed
        return self._tokens.setdefault(client, _Token())


class _Token:
    """What a process knows of the access token that a client holds."""

    def __init__(self):
        # Held during a refresh. Only threads in the background wait for it: there, no
        # exception of a signal handler can leave it locked.
        self.lock = _thread.allocate_lock()
        self.refreshes = 0  # how many have ended
        self.failure = None  # of the last one
        self.retry_at = 0  # seconds, on the monotonic clock: not refreshed early before


_processes = {}  # by process id


def _process():
    number = os.getpid()
    return _processes.get(number) or _processes.setdefault(number, _Process())


def _make_session():
    """Return a session of requests with connections that belong to no account."""
    from http.cookiejar import DefaultCookiePolicy

    import dropbox

    session = dropbox.create_session(max_connections=POOL_SIZE)
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    # With this, requests takes no password from a .netrc file to replace the token.
    session.auth = _leave_alone
    return session


def _leave_alone(request):
    return request


@functools.cache
def _client_class():
    import dropbox  # costs 0.25 s and 27 MB, too much for every management command

    class Client(dropbox.Dropbox):
        """A client of the module's own. Its copies hand it the token that they refresh.

        owner: the client of which this one is a copy.
        """

        owner = None

        def refresh_access_token(self, *args, **kwargs):
            super().refresh_access_token(*args, **kwargs)
            _keep_token(self, _find_owner(self))

    return Client


def _find_owner(client):
    """Return the client that keeps the access token of this one.

    A copy that somebody has given another session is a client of its own.
    """
    owner = getattr(client, "owner", None) or client
    return owner if owner._session is client._session else client


def _keep_token(client, owner):
    owner._oauth2_access_token = client._oauth2_access_token
    owner._oauth2_access_token_expiration = client._oauth2_access_token_expiration


class _Api:
    """The way to Dropbox for one operation: the client, and when to try again.

    max_wait, first_wait: in seconds, as the options of the storage; infinity: no limit.
    """

    def __init__(self, client, max_wait, first_wait):
        self.client = client
        self._owner = _find_owner(client)
        self._token = _process().token(self._owner)
        self.max_wait = max_wait
        self._first_wait = first_wait

    def call(self, route, path, *args):
        """Call the SDK's method for the route, with the path or else with args."""

        def send():
            method = getattr(self.request(), route.replace("/", "_"))
            return method(*(args or (path,)))

        return self.perform(route, path, send)

    def get_link(self, path):
        """Return a temporary link. Anything else in its place is a failed answer."""
        route = "files/get_temporary_link"

        def send():
            link = self.request().files_get_temporary_link(path).link
            if not _is_link(link):
                raise _BadResponse("the answer holds no https link")
            return link

        return self.perform(route, path, send)

    def perform(self, route, path, send):
        """Return what send() returns. Repeat it while its failures are transient.

        The last attempt begins at most max_wait seconds after the first failure. An
        error that comes neither from Dropbox nor from the network passes through.
        """
        handled = sys.exc_info()[1]
        can_refresh = bool(self.client._oauth2_refresh_token)
        retry = _Retry(self.max_wait, self._first_wait, can_refresh)
        while True:
            try:
                return send()
            except BaseException as error:
                _clear_frames(error, handled)
                failure = _explain(error, self.client)
                if failure is None:
                    raise
            # The SDK's error, and all that it held, is gone here.
            retry.add(failure, time.monotonic())
            if retry.gives_up:
                raise _make_error(retry, route, path) from retry.failure.cause()
            _log_attempt(retry, route, path)
            time.sleep(retry.pause)

    def request(self, headers=()):
        """Return a copy of the client for one request, with a live access token."""
        self._ensure_token()
        request = _copy_client(self.client, self._owner)
        request._oauth2_access_token = self._owner._oauth2_access_token
        request._oauth2_refresh_token = None  # so that only _refresh() refreshes
        request._headers = {**(request._headers or {}), **dict(headers)}
        return request

    def _ensure_token(self):
        """Have the token refreshed if that is due, and wait if there is no valid one.

        A refresh runs in the background, so that no exception of a signal handler can
        interrupt it, and that nobody waits who still has a valid token.
        """
        if not self._owner._oauth2_refresh_token:
            return
        expiration = self._owner._oauth2_access_token_expiration
        now = datetime.now(timezone.utc).replace(tzinfo=None)
        if expiration and expiration > now + timedelta(seconds=REFRESH_EARLY):
            return
        is_valid = bool(expiration and expiration > now)
        is_early = is_valid and time.monotonic() < self._token.retry_at
        if is_early or (is_valid and self._token.lock.locked()):
            return
        known = self._token.refreshes
        refresh = _Task().start(_share_refresh, self.client, self._token, known)
        if is_valid:
            return
        if not refresh.wait(self.client._timeout):
            raise _RequestError(_Failure("token refresh timed out", is_transient=True))
        if failure := refresh.result():
            raise _RequestError(failure)


def _share_refresh(client, token, known):
    """Refresh the token, unless somebody else has done so since `known` refreshes.

    Returns None, or the _Failure for all who wait: threads must not share an exception,
    whose traceback grows in each.
    """
    with token.lock:
        if token.refreshes == known:
            token.failure = _refresh(client)
            pause = (
                max(REFRESH_PAUSE, token.failure.retry_after) if token.failure else 0
            )
            token.retry_at = time.monotonic() + pause
            token.refreshes += 1
        return token.failure


def _refresh(client):
    """Let the SDK refresh the access token. Return None, or a _Failure."""
    owner = _find_owner(client)
    try:
        request = _copy_client(client, owner)
        request._oauth2_access_token_expiration = None
        request.check_and_refresh_access_token()
        if not _is_token(request._oauth2_access_token):
            raise _BadResponse("the answer holds no access token")
        _keep_token(request, owner)
        return None
    except BaseException as error:
        _clear_frames(error)
        failure = _explain(error, client)
        if failure is None:
            raise
        # Who waits for it raises it; an early refresh has nobody who waits.
        logger.info("The access token was not refreshed: %s.", failure.shown_reason)
        return failure


def _is_token(token):
    with contextlib.suppress(ValueError):
        return _text(token) is not None
    return False


def _copy_client(client, owner):
    """Return a copy of the client whose session raises HttpError for a refusal.

    That comes before the SDK decodes or repeats it, and before requests follows a
    redirect. The copy shares the connections of the client, which stays as it is.
    """
    request = copy.copy(client)
    session = client._session
    request._session = object.__new__(type(session))
    vars(request._session).update(vars(session))
    hooks = (session.hooks or {}).get("response") or []
    hooks = [hooks] if callable(hooks) else [*hooks]
    check = functools.partial(_check_response, owner)
    request._session.hooks = {"response": [*hooks, check]}
    return request


def _check_response(client, response, **kwargs):
    """Raise HttpError unless the response is 2xx. This is a hook of requests."""
    status = response.status_code
    if logger.isEnabledFor(logging.DEBUG):
        seconds = response.elapsed.total_seconds()
        path = response.request.path_url
        logger.debug("%s: HTTP %d in %.3f s.", path, status, seconds)
    if 200 <= status < 300:
        return
    from dropbox.exceptions import HttpError

    used = response.request.headers.get("Authorization")
    if status == 401 and used == f"Bearer {client._oauth2_access_token}":
        client._oauth2_access_token_expiration = None  # the next request refreshes it
    number = response.headers.get("x-dropbox-request-id")
    error = HttpError(number, status, _read_refusal(response.raw))
    error.retry_after = response.headers.get("Retry-After")
    raise error


def _read_refusal(response):
    """Return the beginning of the body as text.

    A short body is read to its end, so that the connection can be used again. It is
    read in small parts: if it is compressed, each can become a thousand times as large.
    """
    body = io.BytesIO()
    while body.tell() < MAX_REFUSAL:
        part = response.read(1024, decode_content=True)
        if not part:
            break
        body.write(part)
    response.close()
    return body.getvalue()[:MAX_REFUSAL].decode(errors="replace")


class _Retry:
    """What to do after each failure of a request: pause and try again, or give up.

    failure: the last one; it is lost if one of them was. waited: seconds since the
    first. pause: seconds until the next attempt, if it does not give up.
    """

    def __init__(self, max_wait, first_wait, can_refresh):
        self.max_wait = max_wait
        self.can_refresh = can_refresh  # whether there is a refresh token
        self.attempts = 0
        self.failure = None
        self.waited = 0
        self.pause = 0
        self.gives_up = False
        self._first_wait = first_wait
        self._first_failure = None  # when it happened, on the monotonic clock
        self._has_refreshed = False

    def add(self, failure, now):
        """Decide what to do after a failure at that time, in seconds."""
        was_lost = self.failure is not None and self.failure.is_lost
        if self._first_failure is None:
            self._first_failure = now
        self.attempts += 1
        self.waited = now - self._first_failure
        is_expired = self.can_refresh and _has_words(failure.reason, EXPIRED)
        is_refused = self.can_refresh and _has_words(failure.reason, INVALID)
        self.failure = failure._replace(
            is_lost=failure.is_lost or was_lost,
            is_transient=failure.is_transient or is_expired,
        )
        if (is_expired or is_refused) and not self._has_refreshed:
            self._has_refreshed = True
            self.pause = 0  # the next attempt begins with a new token
            return
        self.pause = self._choose_pause()
        is_late = self.waited + self.pause >= self.max_wait
        self.gives_up = is_late or not self.failure.is_transient

    def _choose_pause(self):
        """Return the seconds that Dropbox asks for, or twice as many each time."""
        backoff = self._first_wait * 2 ** min(self.attempts - 1, 99)
        backoff = min(MAX_PAUSE, backoff) * random.uniform(0.5, 1)
        return self.failure.retry_after or backoff


def _log_attempt(retry, route, path):
    """Log a failure after which the request is sent again."""
    level = logging.INFO if retry.attempts == 1 else logging.WARNING
    asks = retry.failure.describe_retry_after()
    reason = retry.failure.shown_reason
    reason = f"{reason}, {asks}" if asks else reason
    message = "%s of %r failed at attempt %d: %s. Next attempt in %.1f s."
    logger.log(level, message, route, path, retry.attempts, reason, retry.pause)


# -- What a failure means --------------------------------------------------------------

EXPIRED = "expired_access_token"
INVALID = "invalid_access_token"

# The words of Dropbox's reason for each error that Python has a name for.
MALFORMED = ("path/malformed_path", "path_lookup/malformed_path")
OS_ERRORS = {
    errno.ENOENT: ("path/not_found", "path_lookup/not_found", *MALFORMED),
    errno.EISDIR: ("path/not_file", "conflict/folder"),
    errno.ENOTDIR: ("path/not_folder", "conflict/file_ancestor"),
    errno.EEXIST: ("conflict/file",),
}
NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)

# The words of the reasons after which the same request may succeed later.
TRANSIENT = ("too_many_write_operations", "content_hash_mismatch")

# What to do about a failure that is known by its words.
# words: in Dropbox's answer, or in the text of a network error.
# is_for_owner: only the owner of the account, the app or the server can do it. Such a
# failure is logged as an error.
# context: the beginning of the route, or REFRESHING if there is a refresh token.
_Hint = collections.namedtuple("_Hint", "words advice is_for_owner context")
REFRESHING = "refreshing"


def _hint(words, advice, context=""):
    return _Hint(words, advice, False, context)


def _owner_hint(words, advice, context=""):
    return _Hint(words, advice, True, context)


TICK = "tick it under Permissions in the App Console, authorize again"
HINTS = (
    _hint(EXPIRED, "a token that Dropbox has just given is refused", REFRESHING),
    _owner_hint(EXPIRED, SHORT_LIVED),
    _owner_hint(
        INVALID,
        "a token that Dropbox has just given is refused; authorize the app again",
        REFRESHING,
    ),
    _owner_hint(INVALID, "oauth2_access_token is wrong, revoked or of another app"),
    _owner_hint(
        "invalid_grant", "oauth2_refresh_token is wrong, revoked or of another app"
    ),
    _owner_hint(
        "invalid_client",
        "app_key and app_secret must be of the app that was authorized",
    ),
    _owner_hint("missing_scope", TICK),
    _owner_hint("required scope", TICK),
    _owner_hint(
        "user_suspended",
        "the account is suspended; its owner or team can reactivate it",
    ),
    _owner_hint(
        "invalid_select_user", "team_member_id must be a member of the app's team"
    ),
    _owner_hint("no_permission", "the account has no access to namespace_id"),
    _owner_hint("sandbox app", "an app with an App folder cannot use namespace_id"),
    _owner_hint("insufficient_space", "the account is full; free or buy space"),
    _owner_hint(
        "no_write_permission", "the account may only read there; change root_path"
    ),
    _owner_hint("invalid_account_type", "the account's plan does not include this"),
    _owner_hint("route_access_denied", "the app or its team does not allow this call"),
    _owner_hint("email_not_verified", "verify the account's e-mail address"),
    _hint("disallowed_name", "Dropbox reserves that name; get_valid_name() mends it"),
    _hint(
        "malformed_path",
        "a name must not hold a backslash, NUL or DEL, end with a space or have more "
        "than 255 characters; some accounts allow no emoji",
    ),
    _hint(
        "too_many_files", "the folder is full; save into several folders", "files/up"
    ),
    _hint(
        "too_many_files", "the folder is too large; delete its files in several steps"
    ),
    _hint("payload_too_large", "set a smaller CHUNK_SIZE", "files/upload"),
    _hint("team_folder", "a team folder is changed in the team's Admin Console"),
    _hint(
        "operation_suppressed",
        "Dropbox blocks this now; look into the account's web site",
    ),
    _hint("restricted_content", "Dropbox blocks this file for legal reasons"),
    _hint("access_restricted", "the owner or the team restricts access to this file"),
    _hint("unsupported_file", "a Paper document has no bytes and no links; export it"),
    _owner_hint(
        "CERTIFICATE_VERIFY_FAILED",
        "set REQUESTS_CA_BUNDLE to a file with the CA certificates of your network",
    ),
    _owner_hint(
        "Tunnel connection failed",
        "the proxy refuses; check address, user and password in HTTPS_PROXY",
    ),
    _owner_hint(
        "bad address",
        "check HTTPS_PROXY and the like: http://user:password@host:port, where special "
        "characters of the password are written as %XX; socks5:// needs PySocks",
    ),
    _owner_hint("bad header", "a token or header of the client is no printable ASCII"),
)

# If one of these packages raises an error of Python's own classes, Dropbox's answer
# could not be read.
LIBRARIES = ("dropbox", "stone", "requests", "urllib3", "json", "simplejson", "http")


class _BadResponse(Exception):
    """A response that is not what was asked for, or that ended too early."""


class _RequestError(Exception):
    """The refresh of the token has failed, in another thread."""

    def __init__(self, failure):
        super().__init__(failure.shown_reason)
        self.failure = failure


class _Failure(
    collections.namedtuple(
        "_Failure",
        "reason text is_transient is_lost retry_after status body number shown",
        defaults=("", False, False, 0, 0, "", None, ""),
    )
):
    """What a failed request means.

    reason: Dropbox's own text for programs. shown: the same without credentials, if it
    is another text. text: what Dropbox says to people.
    is_transient: the same request may succeed later.
    is_lost: the request may have been carried out, and only its response was lost.
    retry_after: seconds that Dropbox asks to wait.
    status, body, number: of a refusal; the number is that of the request.
    """

    __slots__ = ()

    @property
    def shown_reason(self):
        return self.shown or self.reason

    def cause(self):
        """Return an error of the SDK that holds nothing but this, or None."""
        from dropbox.exceptions import HttpError

        return HttpError(self.number, self.status, self.body) if self.status else None

    def describe_retry_after(self):
        seconds = self.retry_after
        return f"Dropbox asks to wait {seconds:g} s" if seconds else ""


def _clear_frames(error, handled=None):
    """Clear the frames of the error and its causes, which hold tokens and content.

    handled: an error that was there before; it and its causes stay as they are.
    """
    while error is not None and error is not handled:
        traceback.clear_frames(error.__traceback__)
        cause = error.__cause__
        error = error.__context__ if cause is None else cause


def _explain(error, client):
    """Return the _Failure behind an error of the SDK, requests or urllib3.

    Returns None for an error that comes from elsewhere: a bug, a hook, or a time limit
    that a signal handler raises.
    """
    from dropbox import exceptions
    from dropbox.dropbox_client import BadInputException
    from dropbox.stone_validators import ValidationError
    from requests import RequestException
    from urllib3.exceptions import HTTPError

    name = type(error).__name__.lstrip("_")
    if isinstance(error, _RequestError):
        return error.failure
    if isinstance(error, exceptions.HttpError):
        return _explain_refusal(error, client)
    if isinstance(error, exceptions.DropboxException):
        return _Failure(name)
    if isinstance(error, BadInputException):
        return _Failure(name, _printable(_redact(str(error), client)))
    if isinstance(error, ValidationError):  # a body that does not fit
        return _Failure(name, _printable(_redact(str(error), client)), is_lost=True)
    if isinstance(error, (RequestException, HTTPError, _BadResponse)):
        return _explain_network_error(name, error, client)
    package = _find_package(error)
    if package == "urllib":
        return _Failure(name, "bad address")
    if package in LIBRARIES:
        # The CA certificates are missing, or a header is not ASCII.
        is_local = isinstance(error, (OSError, UnicodeEncodeError))
        text = _printable(_redact(str(error), client))
        return _Failure(name, text, is_transient=not is_local, is_lost=not is_local)
    return None


def _explain_network_error(name, error, client):
    text = _redact_proxies(_redact(str(error), client), client)
    if isinstance(error, ValueError) and name != "JSONDecodeError":
        # The text of such an error may show the password of a proxy, or a token.
        return _Failure(name, "bad header" if "Header" in name else "bad address")
    lasting = "CERTIFICATE_VERIFY_FAILED|Tunnel connection failed: 4"
    if re.search(lasting, text):
        return _Failure(name, _printable(text))
    return _Failure(name, _printable(text), is_transient=True, is_lost=True)


def _find_package(error):
    """Return the package whose code has raised the error, if Python defines its class.

    Returns "" for other errors, such as those that a timer raises in another thread.
    """
    kind = type(error).__module__.partition(".")[0]
    is_python = kind in ("builtins", "json", "simplejson")
    if not is_python or not isinstance(error, Exception):
        return ""
    if isinstance(error, MemoryError):
        return ""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0]


def _explain_refusal(error, client):
    """Return the _Failure behind a response that is not 2xx.

    The reason is Dropbox's error_summary without the dots at its end, or the error of
    OAuth, or "HTTP 400".
    """
    status = error.status_code
    try:
        answer = json.loads(error.body or "")
    except (ValueError, RecursionError):
        answer = None
    body = _redact(error.body or "", client)
    summary = _field(answer, "error_summary") or _field(answer, "error")
    reason = _printable(summary).rstrip("/. ") if isinstance(summary, str) else ""
    fields = ("user_message text", "error_description", "error required_scope")
    texts = [_field(answer, *names.split()) for names in fields]
    text = " ".join(str(text) for text in texts if text) if reason else body
    text = _redact(text, client)
    shown = _redact(reason, client)
    if not re.fullmatch("[a-z_/]+", reason):  # no tags of Dropbox, on which we decide
        reason = shown
    is_gone = status >= 500 or status == 408
    is_busy = status == 429 or any(_has_words(reason, words) for words in TRANSIENT)
    asked = (
        getattr(error, "retry_after", None),
        _field(answer, "error", "retry_after"),
    )
    return _Failure(
        reason=reason or f"HTTP {status}",
        shown=shown,
        text=_printable(text),
        is_transient=is_gone or is_busy,
        is_lost=is_gone,
        retry_after=max(map(_number, asked)),
        status=status,
        body=body,
        number=error.request_id,
    )


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
    text = text[:500]
    if not text.isprintable():
        text = "".join(one if one.isprintable() else " " for one in text)
    return text.strip()


def _has_words(text, words):
    """Whether the text has these words: Dropbox may add others before and after."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def _redact(text, client):
    """Return the text without credentials of the client."""
    for name in CREDENTIALS:
        secret = getattr(client, f"_{name}")
        for part in _find_parts(secret) if secret else ():
            text = text.replace(part, "***")
    return text


def _redact_proxies(text, client):
    """Return the text without users and passwords of proxies."""
    from requests.utils import getproxies

    proxies = {**getproxies(), **client._session.proxies}
    for proxy in proxies.values():
        user = str(proxy).rpartition("@")[0].rpartition("//")[2]
        for part in re.findall(r"[^:/]{3,}", user):
            text = text.replace(part, "***")
    return text


@functools.lru_cache(maxsize=100)
def _find_parts(secret):
    """Return what shows a part of the secret, in whatever way it is quoted."""
    spellings = {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1]}
    return [*spellings, *re.findall("[A-Za-z0-9_-]{8,}", secret)]


def _make_error(retry, route, path):
    """Return the error that Django expects, with the failure on it, and log it."""
    failure = retry.failure
    for code, reasons in OS_ERRORS.items():
        if route.startswith("files/upload"):  # which says what is wrong with the name
            reasons = [words for words in reasons if words not in MALFORMED]
        if any(_has_words(failure.reason, words) for words in reasons):
            error = _os_error(code, f"{route}: {failure.shown_reason}", path)
            error.failure = failure
            return error
    told = f"{failure.shown_reason} {failure.text}".strip()[:500]
    words = f"{failure.reason} {failure.text}"
    hint = _find_hint(words, route, retry.can_refresh)
    advice = f" ({hint.advice})" if hint else ""
    error = DropboxStorageException(
        f"{route} of {path!r} failed{_describe_attempts(retry)}: {told}{advice}.",
        failure.reason,
        failure.is_transient,
        failure.retry_after,
    )
    error.failure = failure
    if failure.is_transient:
        logger.warning("Gave up: %s", error)
    elif hint and hint.is_for_owner:
        # Trackers group errors by the template.
        logger.error(f"{hint.words}: %s", error)
    return error


def _find_hint(told, route, can_refresh):
    for hint in HINTS:
        is_here = route.startswith(hint.context)
        if hint.context == REFRESHING:
            is_here = can_refresh
        if is_here and _has_words(told, hint.words):
            return hint
    return None


def _describe_attempts(retry):
    """Return how long a request was attempted, for the message of its error."""
    if not retry.failure.is_transient:
        return ""
    attempts = f"{retry.attempts} attempt{'s' if retry.attempts > 1 else ''}"
    asks = retry.failure.describe_retry_after()
    if asks:
        asks = f"; {asks}, max_wait is {retry.max_wait:g} s"
    return f" ({attempts}, {retry.waited:.0f} s{asks})"


# -- The view --------------------------------------------------------------------------


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
        link = storage._link(storage._path(path))
    except (*NO_FILE, SuspiciousFileOperation) as error:
        raise Http404(path) from error
    # The link may have been in the cache for so long.
    age = storage._option("url_cache_timeout") or 0
    seconds = int(min(age, LINK_LIFE - LINK_RESERVE - age))
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
