"""Keep the files of a Django project in Dropbox.

    # settings.py
    DROPBOX_APP_KEY = os.environ.get("DROPBOX_APP_KEY")
    DROPBOX_OAUTH2_REFRESH_TOKEN = os.environ.get("DROPBOX_OAUTH2_REFRESH_TOKEN")
    STORAGES = {
        "default": {"BACKEND": "dropbox_storage.DropboxStorage"},
        ...
    }

README.md describes the options and what the storage promises. The sections here:

    Options, The storage, Links    what Django calls
    Open files                     DropboxFile, which DropboxStorage.open() returns
    Uploads, Downloads             the content of one file on its way
    Hashes and threads             what both of them use
    The way to Dropbox             requests, which are repeated
    Clients and access tokens      the client and the token of a request
    What a failure means           what is repeated, and which error is raised
    The view and the commands      serve(), check() and authorize()

A storage calls an upload, an upload calls _Api, and _Api calls the SDK: each section
calls mostly those below it. Upwards, options, open files and the commands use the
storage, and the refresh of a token uses _Api. A storage holds its options and, if you
assign one, its client. What else lasts is in _clients, _tokens and _find_session():
clients, access tokens and connections of the process.

One rule explains much of the code. Debug pages and error trackers show the local
variables of every function that an error passes through. Therefore none of them holds a
credential: it is deleted first, or _Api.try_once() clears it. The content of a file is
only in objects with a short repr, such as io.BytesIO and memoryview.

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
import itertools
import json
import logging
import math
import mmap
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
import weakref
from datetime import datetime, timedelta, timezone
from typing import NamedTuple

from django.conf import settings
from django.core.cache import caches
from django.core.exceptions import ImproperlyConfigured, SuspiciousFileOperation
from django.core.files import storage as django_storage
from django.core.files.base import ContentFile, File
from django.utils.deconstruct import deconstructible
from django.utils.encoding import filepath_to_uri
from django.utils.functional import Promise
from django.utils.module_loading import import_string

__all__ = ["DropboxFile", "DropboxStorage", "DropboxStorageException"]
__all__ += ["authorize", "check", "serve"]
__version__ = "1.0.0"

logger = logging.getLogger("dropbox_storage")

MiB = 1024 * 1024


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

# Of two tokens that are set at the same place, the first of these is used.
TOKENS = ("oauth2_refresh_token", "oauth2_access_token")
CREDENTIALS = (*TOKENS, "app_key", "app_secret")

WRITE_MODES = ("add", "overwrite", "update")

# Seconds. A temporary link is valid for four hours. It is kept in the cache for three
# at most, so that a link which is handed out is valid for an hour at least.
# https://www.dropbox.com/developers/documentation/http/documentation#files-get_temporary_link
LINK_LIFE = 4 * 60 * 60
MAX_LINK_AGE = 3 * 60 * 60

# NUL, and half of a character of UTF-16.
NO_TEXT = "[\0\ud800-\udfff]"

# What deconstruct() puts in the place of an argument that holds a credential.
HIDDEN = "***"

# Characters of a credential with its quotes. A shorter one hides an argument only if it
# is a whole text in it: the key "media" must not hide the root_path "/media".
MIN_SECRET = 14

NOT_GIVEN = object()  # the access token, if the constructor has no such argument

# Names that django-storages uses and this storage ignores, and what to do instead.
FOREIGN_HOOKS = {
    "location": "it is called root_path here; rename it",
    "get_default_settings": "set the options as class attributes or arguments",
    "_chunked_upload": "override _save()",
}


class _Option:
    """An option of the storage. DropboxStorage._option() cleans it whenever it is used.

    This is a non-data descriptor, so Python itself knows the order of precedence: a
    property of a subclass; a constructor argument, which is in the __dict__ of the
    instance; another attribute of a subclass; and at last the setting, found here.
    """

    def __init__(self, setting, default, clean, *clean_args):
        self.setting = setting
        self.default = default
        self.clean = clean
        self.clean_args = clean_args

    def __set_name__(self, owner, name):
        self.name = name
        OPTIONS[name] = self

    def __get__(self, storage, owner=None):
        if storage is None:
            return self
        return getattr(settings, self.setting, self.default)

    def is_computed(self, storage):
        """Whether a property of a subclass computes the value. Does not run it."""
        attribute = inspect.getattr_static(type(storage), self.name)
        return attribute is not self and hasattr(attribute, "__get__")

    def distance(self, storage):
        """How far the value is set from the storage: 0 is the storage itself, higher
        numbers are its classes, and DropboxStorage stands for the settings."""
        places = [vars(storage), *map(vars, type(storage).__mro__)]
        return [self.name in place for place in places].index(True)


# The functions below check and clean the values of options.


def _text(value):
    # An unset environment variable often arrives as an empty string.
    if not value or _is_plain(value):
        return value or None
    found = "another character, which is not shown"
    if not isinstance(value, str):
        found = f"a value of type {type(value).__name__}"
    elif value != value.rstrip():
        found = "a line break or a blank at its end"
    raise ValueError("printable ASCII without spaces, quotes and backslashes", found)


def _is_plain(value):
    return isinstance(value, str) and bool(re.fullmatch(r"[!#-&(-[\]-~]+", value))


def _refresh_token(value):
    if str(value).startswith("sl."):
        raise ValueError("the refresh_token of Dropbox's answer", "an access token")
    return _text(value)


def _root_path(value):
    path = "/" + str(value or "").replace("\\", "/").strip("/")
    if not str(value).startswith("/"):
        text = f"a path that begins with '/', such as {path!r}"
        old = "django-storages put a relative one into the working directory"
        raise ValueError(f"{text} ({old})")
    if re.search(NO_TEXT, path) or ".." in path.split("/"):
        raise ValueError("a path without '..', NUL and half characters")
    return unicodedata.normalize("NFC", posixpath.normpath(path))


def _url(value):
    if isinstance(value, Promise):  # reverse_lazy() works after the URLs are loaded
        return value
    if not value:
        return None
    if isinstance(value, str) and re.fullmatch(r"(/|[a-z]+://[^/\s])\S*", value):
        return value
    raise ValueError("a URL such as '/media/' or 'https://host/', or None")


def _seconds(value, least, most):
    if value is None or (type(value) in (int, float) and least <= value <= most):
        return value
    raise ValueError(f"None or a number of seconds from {least} to {most}")


def _one_of(value, choices):
    if value in choices:
        return value
    raise ValueError(f"one of {', '.join(map(repr, choices))}")


class _Account:
    """The credentials that a storage uses, by the names of the SDK's arguments.

    It has no repr, so no report shows them.

    Of the places that set a token, the nearest to the storage decides, also if its
    value is empty: a tenant without a token must not use the account of the site.
    """

    def __init__(self, storage):
        distances = {name: OPTIONS[name].distance(storage) for name in TOKENS}
        nearest = min(distances.values())
        self.oauth2_refresh_token = None
        self.oauth2_access_token = None
        for name in TOKENS:  # the refresh token first
            if distances[name] == nearest and not self.oauth2_refresh_token:
                setattr(self, name, storage._option(name))
        self.app_key = storage._option("app_key")
        self.app_secret = storage._option("app_secret")

    @property
    def is_hidden(self):
        """Whether deconstruct() has left out one of the credentials."""
        return HIDDEN in vars(self).values()

    def agrees_with(self, other):
        """Whether the other has all the credentials that are not hidden here."""
        own = vars(self)
        return all(own[name] in (HIDDEN, vars(other)[name]) for name in own)

    @property
    def digest(self):
        """A key for these credentials that does not show them."""
        return hashlib.sha256(repr(vars(self)).encode()).hexdigest()

    def check(self):
        """Raise ImproperlyConfigured for credentials that cannot work together."""
        wanted = ("oauth2_refresh_token", "app_key")
        missing = [name for name in wanted if not getattr(self, name)]
        if missing and not self.oauth2_access_token:
            names = [f"{name} ({OPTIONS[name].setting})" for name in missing]
            raise ImproperlyConfigured(
                f"{' and '.join(names)} not set or empty: set oauth2_refresh_token and "
                "app_key, as python -m dropbox_storage prints them, or else "
                "oauth2_access_token (DROPBOX_OAUTH2_TOKEN). A token that is empty in "
                "an argument or a class counts: no setting takes its place."
            )


def _find_account(storage):
    """Return the account that the storage uses.

    Apps pass deconstruct() to a task, which builds the storage again, without its
    credentials. They are then taken from the entry of STORAGES that is equal to it.
    Raises ImproperlyConfigured if there is no account, or more than one.
    """
    account = _Account(storage)
    if account.is_hidden:
        arguments = storage.deconstruct()
        registered = _registered_storages(type(storage))
        equal = [_Account(one) for one in registered if one.deconstruct() == arguments]
        known = [one for one in equal if not one.is_hidden]
        accounts = {one.digest: one for one in known if account.agrees_with(one)}
        if len(accounts) != 1:
            raise ImproperlyConfigured(
                f"This {type(storage).__name__} was built from a migration or in a "
                "task, without credentials. One entry of STORAGES must have this "
                "class, the same options, and the credentials."
            )
        account = accounts.popitem()[1]
    account.check()
    return account


def _registered_storages(kind):
    """Yield the storages in STORAGES that have this class, under whatever path."""
    handler = getattr(django_storage, "storages", None)  # since Django 4.2
    for alias in handler.backends if handler else ():
        # Another backend may not be installed.
        with contextlib.suppress(ImportError, ImproperlyConfigured):
            if import_string(handler.backends[alias]["BACKEND"]) is kind:
                yield handler[alias]


def _hide_credentials(arguments, credentials):
    """Return (args, kwargs) of a constructor with "***" for what holds a credential."""
    secrets = []
    for name in CREDENTIALS:
        if secret := credentials.get(name):
            quoted = repr(secret)
            # A long one may be a part of a text, as of a URL.
            secrets.append(quoted[1:-1] if len(quoted) >= MIN_SECRET else quoted)

    def hide(value):
        if isinstance(value, Promise):  # a lazy URL, which may not be known yet
            return value
        try:
            text = repr(value)
        except Exception:  # nobody knows what it holds
            return HIDDEN
        return HIDDEN if any(secret in text for secret in secrets) else value

    args, kwargs = arguments
    return tuple(map(hide, args)), {name: hide(kwargs[name]) for name in kwargs}


# -- The storage -----------------------------------------------------------------------

# Bytes. A new file of up to this size is sent without asking first whether its name is
# taken. If it is, the file is sent again: that is rare, and hardly slower than to ask.
SMALL_FILE = 256 * 1024

# Characters of a name, and the names that Dropbox refuses in upper and lower case.
# https://help.dropbox.com/organize/file-names
MAX_NAME = 255
RESERVED_NAMES = ("desktop.ini", "thumbs.db", ".ds_store", "icon\r")
RESERVED_NAMES += (".dropbox", ".dropbox.attr")


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
    write_mode = _Option("DROPBOX_WRITE_MODE", "add", _one_of, WRITE_MODES)
    # If it is set, url() joins it with the name and sends no request; see serve().
    base_url = _Option("DROPBOX_BASE_URL", None, _url)
    # The alias in CACHES of the cache that keeps the temporary links.
    url_cache = _Option("DROPBOX_URL_CACHE", "default", _one_of, caches)
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
        unknown = sorted(options.keys() - OPTIONS.keys())
        vars(self).update(options)
        # What deconstruct() returns. Attributes may change later, so it is hidden now.
        self._arguments = _hide_credentials(self._arguments, vars(self))
        del oauth2_access_token, options  # an error report shows this frame
        for hook, advice in FOREIGN_HOOKS.items():
            if hook in unknown or hasattr(type(self), hook):
                raise ImproperlyConfigured(
                    f"{hook} of {type(self).__name__} belongs to django-storages and "
                    f"would be ignored: {advice}."
                )
        if unknown:
            known = ", ".join(sorted(OPTIONS))
            unknown = ", ".join(unknown)
            raise ImproperlyConfigured(f"Unknown option {unknown}; there are {known}.")
        for name, option in OPTIONS.items():
            if not option.is_computed(self):
                self._option(name)

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
        """Return the value of the option as it is now, in the form that is used.

        Raises ImproperlyConfigured for a wrong value.
        """
        option = OPTIONS[name]
        value = getattr(self, name)
        try:
            return option.clean(value, *option.clean_args)
        except ValueError as error:
            # The value of a text, which may be secret, is described and not shown.
            wanted, *found = error.args
            found = found[0] if found else repr(value)
        # Raised out here, so that the first error and its frames are not attached.
        del value  # an error report shows this frame
        raise ImproperlyConfigured(
            f"{name} (or {option.setting}) must be {wanted}: found {found}."
        )

    @property
    def client(self):
        """The dropbox.Dropbox that sends the requests.

        It is made when it is used, and shares its connections and its token with those
        of all storages of the process that have the same credentials. You may assign
        another one, which then uses its own credentials, headers and time limit, until
        you delete the attribute.
        """
        if self._assigned_client is not None:
            return self._assigned_client
        owner = _find_client(_find_account(self))
        client = copy.copy(owner)
        client.owner = owner
        client._timeout = self._option("timeout")
        client._headers = {}
        if namespace := self._option("namespace_id"):
            root = {".tag": "namespace_id", "namespace_id": namespace}
            client._headers["Dropbox-API-Path-Root"] = json.dumps(root)
        if member := self._option("team_member_id"):
            client._headers["Dropbox-API-Select-User"] = member
        return client

    @client.setter
    def client(self, client):
        if client is None:  # else the account of the settings would be used
            raise TypeError("client must be a dropbox.Dropbox; del ends an assignment")
        self._assigned_client = client

    @client.deleter
    def client(self):
        self._assigned_client = None

    @property
    def _api(self):
        """The way to Dropbox for one operation, with the options as they are now."""
        return _Api(self.client, self._option("max_wait"), self.FIRST_WAIT)

    def _open(self, name, mode="rb"):
        return DropboxFile(name, self, mode)

    # -- Saving --

    def save(self, name, content, max_length=None):
        """Also sends a small new file without asking first if its name is taken."""
        if self._option("write_mode") != "add" or not self._has_default_naming():
            return super().save(name, content, max_length)
        if not hasattr(content, "chunks"):
            content = File(content, name)
        new_file = _NewFile(self, max_length, asks_first=not _is_small(content))
        return new_file.save(name, content, max_length)

    def _has_default_naming(self):
        """Whether nobody overrides the methods that decide on a new name."""
        names = ("exists", "get_available_name", "is_name_available", "_save")
        used = [getattr(self, name, None) for name in names]
        functions = [getattr(method, "__func__", None) for method in used]
        return functions == [getattr(DropboxStorage, name, None) for name in names]

    def _save(self, name, content):
        return self._store(name, content, self.get_available_name)

    def _store(self, name, content, choose_name):
        """Save the content and return its name: choose_name(name) if that is taken."""
        mode = self._option("write_mode")
        name = self._clean_name(name)
        revision = self._find_revision(name) if mode == "update" else None
        refused = set()
        with contextlib.closing(self._start_upload(name, mode, revision)) as upload:
            upload.send(content.chunks())
            while True:
                try:
                    self._commit(upload)
                    return name
                except (FileExistsError, IsADirectoryError):
                    if mode != "add" or name in refused:
                        raise  # the same would be refused for ever
                # The name is taken: try another one.
                refused.add(name)
                name = self._clean_name(choose_name(name))
                upload.path = self._path(name)

    def _start_upload(self, name, mode, revision):
        path = self._path(name)
        connections = max(1, self.CONNECTIONS)
        return _Upload(self._api, path, mode, revision, self.CHUNK_SIZE, connections)

    def _commit(self, upload):
        """Let the upload become the file, and drop the link to the one before."""
        # Made before the commit: a wrong option must not fail after it.
        link = self._cached_link(upload.api, upload.path)
        link_is_old = upload.mode != "add"  # perhaps, even if the commit fails
        try:
            upload.commit()
            link_is_old = True
        finally:
            if link_is_old:
                link.forget()

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

    # -- Looking and deleting --

    def delete(self, name):
        """Delete the file if it exists, or the folder with all that is in it."""
        if not name:
            raise ValueError("The name must be given to delete().")
        path = self._path(name)
        api = self._api
        link = self._cached_link(api, path)
        try:
            with contextlib.suppress(FileNotFoundError):
                api.call("files/delete_v2", path)
        finally:
            link.forget()

    def exists(self, name):
        try:
            return bool(self._api.call("files/get_metadata", self._path(name)))
        except IsADirectoryError:  # the root
            return True
        except (FileNotFoundError, NotADirectoryError):
            return False

    def listdir(self, path):
        folder = self._full_path(self._clean_name(path))
        entries = self._list_folder(folder.rstrip("/"))
        folders = [entry.name for entry in entries if not _is_file(entry)]
        files = [entry.name for entry in entries if _is_file(entry)]
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
            # As in Django, a name outside of root_path has an address, too.
            relative = self._make_relative(_spell(str(name or "")))
            path = filepath_to_uri(relative).lstrip("/")
            return f"{str(base_url).rstrip('/')}/{path}"
        if not name:
            raise ValueError("The name must be given to url().")
        try:
            return self._cached_link(self._api, self._path(name)).get()
        except FileNotFoundError:
            root = self._option("root_path")
            logger.warning("No link to %r: it is not in %r.", name, root)
            return f"about:invalid#{filepath_to_uri(_spell(name))}"

    def get_modified_time(self, name):
        modified = self._file_metadata(name).server_modified  # naive, in UTC
        modified = modified.replace(tzinfo=timezone.utc)
        if settings.USE_TZ:
            return modified
        return modified.astimezone().replace(tzinfo=None)

    # -- Names and metadata --

    def _full_path(self, name):
        """Return Dropbox's path of the name. Subclasses may call or override this.

        The name may be absolute if it is inside root_path. Raises
        SuspiciousFileOperation if it is outside.
        """
        return f"{self._root}/{self._clean_name(name)}".rstrip("/")

    def _clean_name(self, name):
        """Return the name relative to root_path, in NFC and with slashes; "" for it."""
        if re.search(NO_TEXT, os.fspath(name)):
            raise SuspiciousFileOperation(f"{name!r} holds NUL or half a character.")
        if os.fspath(name).strip("/") == "":
            return ""
        clean = self._make_relative(_spell(name))
        if clean.startswith("/") or f"{clean}/".startswith("../"):
            root = self._option("root_path")
            raise SuspiciousFileOperation(f"{name!r} is outside {root!r}.")
        clean = clean.rstrip("/")
        return "" if clean == "." else clean

    def _make_relative(self, name):
        """Return an absolute name inside root_path as a relative one."""
        if not name.startswith("/"):
            return name
        root = self._root
        return name[len(root) + 1 :] if f"{name}/".startswith(f"{root}/") else name

    @property
    def _root(self):
        """The path of the folder that holds all files; "" for the account's root."""
        return self._option("root_path").rstrip("/")

    def _is_root(self, path):
        return path.rstrip("/") == self._full_path("").rstrip("/")

    def _path(self, name):
        """Return Dropbox's path of a name, which must not be the root."""
        # A name that leaves root_path must not reach the code of a subclass.
        path = self._full_path(self._clean_name(name))
        if self._is_root(path):
            raise _os_error(errno.EISDIR, "the root of all files", path or "/")
        return path

    def _file_metadata(self, name):
        path = self._path(name)
        metadata = self._api.call("files/get_metadata", path)
        if _is_file(metadata):
            return metadata
        raise _os_error(errno.EISDIR, "not a file", path)

    def _find_revision(self, name):
        """Return the revision of the file, or None if it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            return self._file_metadata(name).rev

    def _list_folder(self, folder, may_restart=True):
        """Return the metadata of the files and folders in the folder."""
        api = self._api
        entries = []
        try:
            page = api.call("files/list_folder", folder)
            entries += page.entries
            while page.has_more:
                page = api.call("files/list_folder/continue", folder, page.cursor)
                entries += page.entries
        except FileNotFoundError:
            if not self._is_root(folder):
                raise  # only the root may be missing: the first save makes it
        except DropboxStorageException as error:
            if may_restart and _has_tags(error.reason, "reset"):  # the cursor
                return self._list_folder(folder, may_restart=False)
            raise
        # Later pages report what has changed: the last entry of each path decides.
        # Where a namespace is not mounted, entries have no paths.
        last = {one.path_lower or one.name.lower(): one for one in entries}
        return [one for one in last.values() if hasattr(one, "id")]  # not deleted

    def _start_download(self, path):
        return _Download(self._api, path, max(1, self.CONNECTIONS))

    def _cached_link(self, api, path):
        timeout = self._option("url_cache_timeout")
        cache = caches[self._option("url_cache")] if timeout else None
        return _CachedLink(api, path, cache, timeout)


class _NoNameTaken(django_storage.Storage):
    """Finds names for files that may replace others: only their length matters."""

    def exists(self, name):
        return False

    def get_alternative_name(self, file_root, file_ext):
        return f"{file_root}{file_ext}"


class _NewFile(django_storage.Storage):
    """Saves a file under a name that is free, with Django's own code.

    asks_first: whether Dropbox is asked for the first name, or it counts as free. Names
    that were given once count as taken: whoever asks again has been refused them.
    """

    def __init__(self, storage, max_length, asks_first):
        self._storage = storage
        self._max_length = max_length
        self._asks_next = asks_first
        self._given = set()

    def exists(self, name):
        asks = self._asks_next
        self._asks_next = True
        return name in self._given or (asks and self._storage.exists(name))

    def get_alternative_name(self, file_root, file_ext):
        return self._storage.get_alternative_name(file_root, file_ext)

    def get_available_name(self, name, max_length=None):
        # _store() does not know max_length.
        name = super().get_available_name(name, self._max_length)
        self._given.add(name)
        return name

    def _save(self, name, content):
        return self._storage._store(name, content, self.get_available_name)


def _is_file(metadata):
    return hasattr(metadata, "rev")  # folders have none


def _is_small(content):
    """Whether the content says that it is small. It need not be true."""
    try:
        return content.size <= SMALL_FILE
    except Exception:  # it may have no size, or ask somebody else for it
        return False


def _spell(name):
    """Return the name in NFC, with slashes, and without empty parts and '.'."""
    name = unicodedata.normalize("NFC", os.fspath(name).replace("\\", "/"))
    # normpath() keeps two slashes at the beginning.
    clean = posixpath.normpath(name).replace("//", "/") if name else ""
    is_folder = name.endswith("/") and not clean.endswith("/")
    return f"{clean}/" if is_folder else clean


def _mend(part):
    """Return a part of a name without what Dropbox refuses in it."""
    root, extension = posixpath.splitext(part.replace("\x7f", "").rstrip(". "))
    part = (root[: max(1, MAX_NAME - len(extension))] + extension)[:MAX_NAME]
    part = part.rstrip(". ")
    return f"_{part}" if part.lower() in ("", *RESERVED_NAMES) else part


# -- Links -----------------------------------------------------------------------------

# Seconds in which a link must arrive after it was asked for. Else it is not cached.
LINK_REQUEST_LIFE = 300


class _CachedLink:
    """The temporary link to one file in Django's cache.

    A request for a link is marked in the cache. Saving and deleting remove the mark.
    Therefore a link to the old file, which arrives after that, is not kept. If the
    cache is down, that is logged, and this operation goes on without a cache.
    """

    def __init__(self, api, path, cache, timeout):
        self._api = api
        self._path = path
        self._cache = cache  # None if there is none, or if it is down
        self._timeout = timeout
        client = api.client
        # lower() of bytes changes ASCII letters alone: how Dropbox compares others is
        # not documented.
        digest = hashlib.sha256(repr((client._headers, path.encode().lower())).encode())
        digest.update(
            str(client._oauth2_refresh_token or client._oauth2_access_token).encode()
        )
        self._key = f"dropbox_storage:{digest.hexdigest()}"
        self._mark_key = f"{self._key}:request"

    def get(self):
        """Return the link, or request one and keep it."""
        link = self._use("get", self._key)
        if _is_link(link):
            return link
        # Requests at the same time share a mark.
        new_mark = os.urandom(16).hex()
        mark = self._use("get_or_set", self._mark_key, new_mark, LINK_REQUEST_LIFE)
        try:
            link = self._api.repeat(
                "files/get_temporary_link", self._path, self._request
            )
        except BaseException:
            self.forget()
            raise
        self._use("set", self._key, link, self._timeout)
        # The link is stored first: whoever removes the mark after this line removes
        # the link, too.
        if self._use("get", self._mark_key) != mark:
            self._use("delete", self._key)
        return link

    def _request(self):
        link = self._api.make_client().files_get_temporary_link(self._path).link
        if not _is_link(link):
            text = "found no https link"
            raise _RequestError("BadResponse", text, is_temporary=True)
        return link

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


# -- Open files ------------------------------------------------------------------------

# Bytes that are read from a connection or a temporary file at a time.
READ_SIZE = 128 * 1024


class DropboxFile(File):
    """A file in Dropbox, as DropboxStorage.open() returns it.

    mode: as for Python's open(). Text is UTF-8. "r" and "rb" read what they need from
    Dropbox. The other modes work on a temporary file, which close() uploads: "r+" and
    "a" begin with the content of the file, and replace the revision that they read.

    close() saves what was written. discard() gives it up, and so does a `with` block
    that an exception leaves. What nobody closes is not saved.
    """

    file = None
    _draft = None  # of a file that is open for writing

    def __init__(self, name, storage, mode="rb"):
        self.name = os.fspath(name)
        self._storage = storage
        self._open_stream(mode)

    def _open_stream(self, mode):
        """Open the file in Dropbox. Nothing is set before that has succeeded."""
        letters = _check_mode(mode)
        if "r" in letters and "+" not in letters:
            download = self._storage._start_download(self._storage._path(self.name))
            file = io.BufferedReader(download, READ_SIZE)
            self.file = file if "b" in letters else io.TextIOWrapper(file, "utf-8")
            self._size = download.size
        else:
            draft = _Draft(self._storage, self.name, mode)
            self.file = draft.handle
            self._size = draft.size
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

    def __exit__(self, exc_type, exc_value, exc_traceback):
        if exc_type is None:
            self.close()
        else:
            self._end(False, "an exception came first")

    def _dealloc_warn(self, source):
        """Wrappers of Python's io call this as garbage, and then close()."""
        self._is_collecting = True

    def __del__(self):
        if self._draft is not None:
            self._end(False, "nobody closed it")

    def _end(self, saves, reason=None):
        """Close the file, and upload what was written, or log the reason why not."""
        draft = self._draft
        self._draft = None
        if draft is None:  # it is open for reading, or closed
            self.file.close()
            return
        with contextlib.closing(draft):
            try:
                self.file.close()
            except OSError:
                if saves:  # else what cannot be flushed is not needed
                    raise
            self._size = draft.size
            if saves and draft.is_changed():
                draft.upload.send(draft.chunks())
                self._storage._commit(draft.upload)
            if reason and draft.is_changed():
                logger.warning("%r is not saved: %s.", self.name, reason)


def _check_mode(mode):
    """Return the letters of the mode, or raise ValueError."""
    letters = set(mode)
    is_known = letters <= set("rwaxbt+") and len(letters) == len(mode)
    if is_known and len(letters & set("rwax")) == 1 and not letters >= set("bt"):
        return letters
    raise ValueError(f"{mode!r} is not a mode of open(), such as 'rb'.")


class _Draft:
    """What is written to a file until it is uploaded: a temporary file.

    handle: what the user writes to. It has a descriptor of its own: whoever closes it,
    as wrappers do, leaves the temporary file open.
    upload: what will replace the file in Dropbox.
    """

    def __init__(self, storage, name, mode):
        folder = settings.FILE_UPLOAD_TEMP_DIR
        self._temporary = tempfile.TemporaryFile(buffering=0, dir=folder)
        self._original = None  # the _ContentHash of the file in Dropbox, if it matters
        try:
            target = self._prepare(storage, name, mode)
            self.upload = storage._start_upload(name, *target)
            self.handle = self._open_handle(mode)
        except BaseException:
            self._temporary.close()
            raise

    def _prepare(self, storage, name, mode):
        """Return the write mode, and the revision that may be replaced.

        If the mode keeps the content of the file, copy that to the temporary file.
        """
        if "w" in mode and storage._option("write_mode") == "update":
            return "update", storage._find_revision(name)
        if "w" in mode:
            return "overwrite", None
        if "x" in mode:
            if storage.exists(name):
                raise _os_error(errno.EEXIST, f"mode {mode!r}", storage._path(name))
            return "add", None
        try:
            return "update", self._fill(storage._start_download(storage._path(name)))
        except FileNotFoundError:
            if "a" not in mode:
                raise
            return "update", None

    def _fill(self, download):
        """Copy what is downloaded to the temporary file; return its revision."""
        with io.BufferedReader(download, READ_SIZE) as source:
            # A raw file may write only a part.
            with open(self._temporary.fileno(), "wb", closefd=False) as copied:
                # A loop would hold content in a local variable.
                copied.writelines(iter(functools.partial(source.read, READ_SIZE), b""))
            self._original = download.hash
        self._temporary.seek(0)
        return download.metadata.rev

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
        found = _ContentHash()
        # A loop would hold content in a local variable.
        collections.deque(map(found.update, self.chunks()), maxlen=0)
        return found.hexdigest() != self._original.hexdigest()

    def chunks(self):
        self._temporary.seek(0)
        return iter(functools.partial(self._temporary.read, READ_SIZE), b"")

    def close(self):
        self.upload.close()
        self._temporary.close()


# -- Uploads ---------------------------------------------------------------------------

# Bytes that one request may carry.
# https://www.dropbox.com/developers/documentation/http/documentation#files-upload
MAX_REQUEST = 150 * MiB


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

        self._files = files  # the module of the SDK
        self.api = api
        self.path = path
        self.mode = mode
        # Strict: the same bytes are a conflict, too.
        self._commit_options = {"mode": files.WriteMode.add, "strict_conflict": True}
        if mode == "overwrite":
            self._commit_options = {"mode": files.WriteMode.overwrite}
        elif revision:
            self._commit_options["mode"] = files.WriteMode.update(revision)
        # Whole hash blocks, and two chunks fit into a request.
        blocks = max(1, -(-chunk_size // HASH_BLOCK))  # rounded up
        self._chunk_size = min(blocks, MAX_REQUEST // 2 // HASH_BLOCK) * HASH_BLOCK
        self._connections = connections
        self._hash = _ContentHash()  # of the chunks that Dropbox has
        self._chunks = []  # those that have not been sent
        self._sending = collections.deque()  # calls, each of which returns a hash
        self._session = None  # the id of the upload session
        self._offset = 0  # of the next chunk in the session, in bytes

    def close(self):
        """Let the background threads stop, and drop what has not been sent."""
        self.api.is_cancelled = True
        self._chunks = []
        self._sending.clear()

    def send(self, content):
        """Take the content, an iterable of bytes or text. Send it if it is long."""
        for chunk in _cut(content, self._chunk_size):
            self._chunks.append(chunk)
            # Two fit into the request that commits. In a session, the last is kept
            # back: it closes the session, which may be impossible without data.
            while len(self._chunks) > (2 if self._session is None else 1):
                self._append_in_background(self._chunks.pop(0))
        if self._session is not None:
            while self._sending:
                self._hash.append(self._sending.popleft().result())
            self._hash.append(self._append(self._offset, self._chunks.pop(), True))

    def commit(self):
        """Make the content the file at self.path.

        Raises FileExistsError or IsADirectoryError if the path is taken. It may then be
        called again, after self.path has been changed.
        """
        now = datetime.now(timezone.utc).replace(tzinfo=None, microsecond=0)
        self._commit_options["client_modified"] = now
        try:
            metadata = self._send_commit()
        except (OSError, DropboxStorageException) as error:
            if self._is_committed(error):
                return
            if self.mode != "update" or not isinstance(error, FileExistsError):
                raise
            message = f"{self.path!r} has changed since it was looked at"
            raise DropboxStorageException(
                f"{message}; it was left alone.", "path/conflict/file"
            ) from error
        if not self._hash.matches(metadata):
            message = f"files/upload of {self.path!r} failed: Dropbox has other bytes."
            raise DropboxStorageException(message, "content_hash_mismatch")

    def _is_committed(self, error):
        """Whether the path holds what was sent, although the commit has failed.

        Either a response was lost, or "update" refused bytes that change nothing. A
        file that was added has the time that was sent with it.
        """
        failure = getattr(error, "failure", None)  # None: it comes from elsewhere
        is_refused = self.mode == "update" and isinstance(error, FileExistsError)
        if failure is None or not (failure.is_lost or is_refused):
            return False
        api = copy.copy(self.api)
        if failure.is_temporary:  # the commit has waited already
            api.max_wait = 0
        with contextlib.suppress(*NO_FILE, DropboxStorageException):
            found = api.call("files/get_metadata", self.path)
            if _is_file(found) and self._hash.matches(found):
                now = self._commit_options["client_modified"]
                return self.mode != "add" or found.client_modified == now
        return False

    def _send_commit(self):
        if self._session is not None:
            cursor = self._files.UploadSessionCursor(self._session, self._hash.size)
            commit = self._files.CommitInfo(self.path, **self._commit_options)
            route = "files/upload_session/finish"
            return self.api.call(route, self.path, io.BytesIO(), cursor, commit)
        while len(self._chunks) > 1:
            self._chunks[0].write(self._chunks.pop(1).getbuffer())
        (chunk,) = self._chunks
        self._hash = _ContentHash(chunk.getbuffer())
        options = {**self._commit_options, "content_hash": self._hash.hexdigest()}
        return self.api.call("files/upload", self.path, chunk, self.path, **options)

    def _append_in_background(self, chunk):
        """Send the chunk with the session; wait if enough others are being sent."""
        if self._session is None:
            route = "files/upload_session/start"
            kind = self._files.UploadSessionType.concurrent
            started = self.api.call(
                route, self.path, io.BytesIO(), close=False, session_type=kind
            )
            self._session = started.session_id
        if len(self._sending) == self._connections:
            self._hash.append(self._sending.popleft().result())
        call = _BackgroundCall(self._append, self._offset, chunk, False)
        self._sending.append(call)
        self._offset += chunk.tell()  # its length: sending does not move its position

    def _append(self, offset, chunk, close):
        """Send a chunk of the session; return its hash."""
        content_hash = _ContentHash(chunk.getbuffer())
        cursor = self._files.UploadSessionCursor(self._session, offset)
        route = "files/upload_session/append_v2"
        digest = content_hash.hexdigest()
        try:
            self.api.call(route, self.path, chunk, cursor, close, content_hash=digest)
        except DropboxStorageException as error:
            # If a response was lost, the session may have the chunk, and refuse it now.
            is_refused = _has_tags(error.reason, "closed", "incorrect_offset")
            if not (is_refused and error.failure.is_lost):
                raise
        return content_hash


def _cut(content, size):
    """Yield the content as io.BytesIO objects of `size` bytes; the last may be smaller.

    There is always one.
    """
    chunk = io.BytesIO()
    for view in map(_view, content):
        while view:
            if chunk.tell() == size:
                yield chunk
                chunk = io.BytesIO(bytes(size))  # whole at once: growing would copy it
            count = chunk.write(view[: size - chunk.tell()])
            view = view[count:]
    chunk.truncate()
    yield chunk


def _view(data):
    """Return bytes, or text as UTF-8, as a memoryview."""
    try:
        return memoryview(data.encode() if isinstance(data, str) else data).cast("B")
    except UnicodeEncodeError as error:
        message = f"surrogates not allowed (character {error.start} of a chunk)"
    # Raised out here: the first error, which holds all the text, is not attached.
    del data  # an error report shows this frame
    raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, message)


# -- Downloads -------------------------------------------------------------------------

# Bytes. A file of up to this size is read with one request.
WHOLE_FILE = 8 * MiB

# Bytes of one request for a part of a larger file. At 8 MB/s and 50 ms latency, such a
# request spends 80 % of its time on moving bytes.
READ_BLOCK = 2 * MiB

# Blocks of a file that are kept in memory, apart from the first.
KEPT_BLOCKS = 8

# Bytes of blocks that are kept on disk.
MAX_DISK = 128 * MiB

# Blocks read in order after which a reader is taken to want the rest of the file: 1, 2
# and 4 blocks have been requested ahead by then.
BLOCKS_IN_ORDER = 3

# Bytes. If no more than this is left of a response, it is read to its end, which takes
# less time than the TLS handshake of a new connection.
DRAIN = 512 * 1024


class _Download(io.RawIOBase):
    """The bytes of one revision of a file. Seeking sends no request, reading may do."""

    _is_collecting = False  # the garbage collector, which should not read anything
    _blocks = None  # until the file is open

    def __init__(self, api, path, connections):
        attempt = functools.partial(_request_bytes, api, path)
        metadata, response = api.repeat("files/download", path, attempt)
        if not metadata.size:
            response.drain_conn()  # only a response that is read keeps its connection
        self.size = metadata.size
        self.hash = _ContentHash()  # of what has been read in order
        self._api = api
        self.metadata = metadata
        self._path = path
        self._process = os.getpid()
        self._position = 0
        self._has_failed = False
        self._blocks = _Blocks(api, path, metadata, response, connections)

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        self._check(needs_position=whence == io.SEEK_CUR)
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}
        if whence not in starts or starts[whence] + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = starts[whence] + offset
        self._has_failed = False
        return self._position

    def readinto(self, buffer):
        buffer = memoryview(buffer)  # of which a report shows no content
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
        self._check()
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

    def _check(self, needs_position=True):
        """Raise an error if the file is closed, or if the position is not known."""
        if self.closed:
            raise ValueError("I/O operation on closed file.")
        if self._process != os.getpid():
            message = f"{self._path!r} was opened in another process; open it again."
            raise DropboxStorageException(message)
        if self._has_failed and needs_position:  # the buffer above has lost its content
            message = f"Reading {self._path!r} has failed; seek() to where to continue."
            raise DropboxStorageException(message)

    def _check_content(self, view):
        """Hash what is read in order from the beginning, and check the whole file."""
        if self._position == 0:
            self.hash = _ContentHash()
        known = self.hash.size - self._position  # bytes of this view, hashed before
        if not 0 <= known < len(view):
            return
        self.hash.update(view[known:])
        if self.hash.size == self.size and not self.hash.matches(self.metadata):
            raise DropboxStorageException(
                f"files/download of {self._path!r} failed: Dropbox has other bytes.",
                "content_hash_mismatch",
                temporary=True,
            )

    def _dealloc_warn(self, source):
        """The BufferedReader calls this before it closes because nobody uses it."""
        self._is_collecting = True

    def close(self):
        if self._blocks is not None:
            self._api.is_cancelled = True
            # A forked process shares the connection with its parent.
            is_own = self._process == os.getpid()
            self._blocks.close(may_drain=is_own and not self._is_collecting)
        super().close()


class _Blocks:
    """A revision of a file as a row of blocks: in memory, on disk, or requested.

    The first block is that of the response that opens the file, and is read as it is
    needed. The others are requested whole, in the background. A reader who goes on
    from the beginning has several requested ahead; after a jump it is one, and more
    with each block that is read in order.
    """

    def __init__(self, api, path, metadata, response, connections):
        self._api = api
        self._path = path
        self._metadata = metadata
        size = metadata.size
        self._block_size = READ_BLOCK if size > WHOLE_FILE else max(1, size)
        self._memory = {}  # by number, the least recently used first
        self._disk = None  # a temporary file
        self._offsets = {}  # of the blocks in it, by number
        self._most_ahead = min(connections, KEPT_BLOCKS)
        self._number = 0  # of the block that was read last
        # Blocks read in order. A new reader counts as one who has read enough of them.
        self._in_order = BLOCKS_IN_ORDER
        # Of an anonymous map, only what is used takes memory.
        data = memoryview(mmap.mmap(-1, self._block_size))[:size]
        self._memory[0] = _Block(api, path, metadata.rev, 0, data, response)

    def read(self, position, count):
        """Return a view of up to count bytes, of one block."""
        number, offset = divmod(position, self._block_size)
        if number == self._number + 1:
            self._in_order += 1
        elif number != self._number:
            self._in_order = 0
        self._number = number
        # 1, 2, 4, then 8 blocks; the first block stands alone.
        ahead = min(2 ** min(self._in_order, BLOCKS_IN_ORDER), self._most_ahead)
        end = number + (ahead if number else 1)
        count_of_blocks = -(-self._metadata.size // self._block_size)  # rounded up
        for one in range(number, min(end, count_of_blocks)):
            # Each use puts these blocks behind the others, which are dropped first.
            block = self._memory.pop(one, None) or self._make_block(one)
            block.prefetch()
            self._memory[one] = block
        while len(self._memory) > KEPT_BLOCKS + 1:
            self._drop(next(one for one in self._memory if one))  # never block 0
        return self._memory[number].read(offset, count)

    def _make_block(self, number):
        """Return the block, with its content if that is on disk."""
        begin = number * self._block_size
        size = min(self._block_size, self._metadata.size - begin)
        data = memoryview(bytearray(size))
        block = _Block(self._api, self._path, self._metadata.rev, begin, data)
        if number in self._offsets:
            with contextlib.suppress(OSError):  # what the disk has lost is requested
                self._disk.seek(self._offsets[number])
                block.loaded = self._disk.readinto(data)
        return block

    def _drop(self, number):
        """Drop a block from memory: to the disk if this reader may come back to it."""
        block = self._memory.pop(number)
        block.close()
        goes_on = self._in_order >= BLOCKS_IN_ORDER
        if goes_on or number in self._offsets or not block.is_whole:
            return
        offset = len(self._offsets) * self._block_size
        if offset >= MAX_DISK:
            return
        with contextlib.suppress(OSError):
            if self._disk is None:
                folder = settings.FILE_UPLOAD_TEMP_DIR
                self._disk = tempfile.TemporaryFile(buffering=0, dir=folder)
            self._disk.seek(offset)
            if self._disk.write(block.data) == len(block.data):
                self._offsets[number] = offset

    def close(self, may_drain=False):
        """Drop all blocks. What is read later is requested again."""
        while self._memory:
            self._memory.popitem()[1].close(may_drain)
        self._offsets = {}
        if self._disk is not None:
            self._disk.close()
            self._disk = None


class _Block:
    """Consecutive bytes of a revision, in memory.

    They come from a response while they are read, or are loaded in the background.

    data: the memory, as a memoryview. loaded: how many bytes of it are there.
    """

    def __init__(self, api, path, revision, begin, data, response=None):
        self.data = data
        self.loaded = 0
        self._api = api
        self._path = path
        self._revision = f"rev:{revision}"
        self._begin = begin
        self._response = response
        self._call = None  # that loads it in the background

    @property
    def is_whole(self):
        return self.loaded == len(self.data)

    def prefetch(self):
        """Load the block in the background, if nothing loads it yet."""
        is_loading = self._call is not None and not self._call.is_done
        if self._response is None and not (self.is_whole or is_loading):
            self._call = _BackgroundCall(self._load_in_background)

    def _load_in_background(self):
        """Load the block as far as that goes without an error: the reader goes on."""
        failure = None
        while failure is None and not self.is_whole:
            failure = self._api.try_once(self._read_part)[1]
        self._close_response()

    def read(self, offset, count):
        """Wait for up to count bytes from the offset on; return a view of them."""
        end = min(offset + count, len(self.data))
        if self._call is not None:
            self._call.wait()
        while self.loaded < end:
            self._api.repeat("files/download", self._path, self._read_part)
        if self.is_whole:
            self._close_response()
        return self.data[offset:end]

    def _read_part(self):
        """Read some bytes; after an error, the next attempt sends a new request."""
        begin = self._begin + self.loaded
        end = self._begin + len(self.data)
        try:
            if self._response is None:
                requested = _request_bytes(self._api, self._revision, begin, end)
                self._response = requested[1]
            part = self.data[self.loaded : self.loaded + READ_SIZE]
            count = self._response.readinto(part)
            if not count:
                text = f"the response ended before byte {begin}"
                raise _RequestError("BadResponse", text, is_temporary=True)
            self.loaded += count
        except BaseException:
            self._close_response()
            raise

    def close(self, may_drain=False):
        """Close the response, unless the background reads it, and closes it then."""
        if self._call is None or self._call.is_done:
            self._close_response(may_drain)
        self._call = None  # it may hold an error, whose frames hold this block

    def _close_response(self, may_drain=False):
        """Close the response, or read the little that is left, to keep its socket."""
        response = self._response
        self._response = None
        if response is None:
            return
        length = response.length_remaining  # None if nobody knows it
        if may_drain and length is not None and length <= DRAIN:
            _BackgroundCall(response.drain_conn)
        else:
            response.close()


def _request_bytes(api, path, begin=0, end=None):
    """Request the bytes from begin to end, or all. Return metadata and raw response."""
    headers = {"Accept-Encoding": "identity"}  # a raw response is not decoded
    if end:
        headers["Range"] = f"bytes={begin}-{end - 1}"
    metadata, response = api.make_client(headers).files_download(path)
    encoding = response.headers.get("Content-Encoding", "identity")
    found = response.headers.get("Content-Range", "bytes 0-")  # none: the whole file
    if encoding != "identity" or not found.startswith(f"bytes {begin}-"):
        response.raw.close()
        text = f"asked for bytes from {begin}, found {encoding} {found}"
        raise _RequestError("BadResponse", f"{text}: a proxy changes it")
    return metadata, response.raw


# -- Hashes and threads ----------------------------------------------------------------

# Bytes. Dropbox hashes files in blocks of this size. The chunks of a concurrent upload
# session are multiples of it.
# https://www.dropbox.com/developers/reference/content-hash
HASH_BLOCK = 4 * MiB


class _ContentHash:
    """Dropbox's content hash: SHA-256 over the SHA-256 digests of all 4 MiB blocks."""

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


class _BackgroundCall:
    """A call in a daemon thread, for whose end other threads may wait.

    An executor would keep the interpreter from exiting. A Thread, as it starts, and a
    Future take locks in Python code: an exception of a signal handler, which runs in
    the main thread, leaves them locked. Here, another thread starts the Thread, and
    each thread that waits has a lock of its own. It is a Thread because logging asks
    for one: for a raw thread, Python would list another one that never ends.
    """

    def __init__(self, function, *args):
        self.is_done = False
        self._result = None
        self._error = None
        self._locks = []  # of the threads that wait
        thread = threading.Thread(
            target=self._run, args=(function, args), name="dropbox_storage", daemon=True
        )
        try:
            _thread.start_new_thread(_start, (thread,))
        except RuntimeError:
            thread.run()

    def _run(self, function, args):
        try:
            self._result = function(*args)
        except BaseException as error:
            self._error = error
        finally:
            self.is_done = True
            for lock in self._locks:
                lock.release()
            del self, function, args  # an error keeps this frame, and would keep them

    def wait(self, seconds=None):
        """Return whether the call has ended, after that many seconds at most."""
        if not self.is_done:
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


def _start(thread):
    try:
        thread.start()
    except RuntimeError:  # there are no more threads, as when the interpreter exits
        thread.run()


# -- The way to Dropbox ----------------------------------------------------------------

# Seconds in which an address of a host must accept a connection. A host may have two.
CONNECT_LIMIT = 10

# Seconds. The longest pause between two attempts, unless Dropbox asks for a longer one.
MAX_PAUSE = 15

# Bytes of a refusal that are read. Those of Dropbox have less than 1 KiB.
MAX_REFUSAL = 64 * 1024


class _Api:
    """The way to Dropbox for one operation: the client, and when to try again.

    max_wait, first_wait: in seconds, as the options of the storage.
    """

    def __init__(self, client, max_wait, first_wait):
        self.client = client
        self.max_wait = float("inf") if max_wait is None else max_wait
        self._first_wait = first_wait
        self.is_cancelled = False  # then, no attempt begins any more
        self.owner = _find_owner(client)

    def call(self, route, path, *args, **kwargs):
        """Call the SDK's method for the route, with the path or else with args.

        An io.BytesIO as the first of them stands for its content.
        """

        def attempt():
            method = getattr(self.make_client(), route.replace("/", "_"))
            if args and isinstance(args[0], io.BytesIO):
                return method(args[0].getvalue(), *args[1:], **kwargs)
            return method(*(args or (path,)), **kwargs)

        return self.repeat(route, path, attempt)

    def repeat(self, route, path, attempt):
        """Return what attempt() returns. Repeat it while its failures are temporary.

        The last attempt begins at most max_wait seconds after the first failure. An
        error that comes neither from Dropbox nor from the network passes through.
        """
        failures = []
        began = 0  # when the first failure happened
        for number in itertools.count(1):
            result, failure = self.try_once(attempt)
            if failure is None:
                return result
            began = began or time.monotonic()
            waited = time.monotonic() - began
            reason = _redact(failure.reason, self.owner)
            record = {"route": route, "path": path, "status": failure.status}
            record.update(seconds=waited, attempt=number)

            backoff = min(MAX_PAUSE, self._first_wait * 2 ** min(number - 1, 99))
            pause = failure.retry_after or backoff * random.uniform(0.5, 1)
            had_new_token = any(one.is_token_refused for one in failures)
            failures.append(failure)
            if failure.is_token_refused and not had_new_token:
                pause = 0  # the next attempt begins with a new token
            elif not failure.is_temporary or waited + pause >= self.max_wait:
                is_lost = any(one.is_lost for one in failures)
                failure = failure._replace(is_lost=is_lost)
                raise _make_error(failure, reason, record, self.max_wait)
            level = logging.INFO if number == 1 else logging.WARNING
            message = "%s of %r failed at attempt %d: %s. Next attempt in %.1f s."
            arguments = (route, path, number, reason, pause)
            logger.log(level, message, *arguments, extra=record)
            time.sleep(pause)

    def try_once(self, attempt):
        """Return (the result of attempt(), None), or (None, the _Failure).

        The error of the SDK, and all that its frames hold, is gone with this call.
        """
        try:
            return _call_sdk(attempt), None
        except BaseException as error:
            failure = _explain(error, self.owner)
            if failure is None:
                raise
            return None, failure

    def make_client(self, headers=None):
        """Return a copy of the client for one request, with a live access token."""
        if self.is_cancelled:
            # Only threads in the background get here.
            raise DropboxStorageException("The file was closed meanwhile.")
        _ensure_token(self)
        client = self.copy_client()
        client._oauth2_refresh_token = None  # so that only _refresh() refreshes
        client._headers = {**(client._headers or {}), **(headers or {})}
        return client

    def copy_client(self):
        client = copy.copy(self.client)
        client._session = _CheckedSession(self.owner, client._timeout)
        client._oauth2_access_token = self.owner._oauth2_access_token
        return client


class _CheckedSession:
    """The session of a client for one request. The SDK uses nothing but post().

    It raises HttpError for each response that is not 2xx, before the SDK decodes or
    repeats it, and follows no redirect. The session of the client stays as it is.
    """

    def __init__(self, owner, timeout):
        self._owner = owner
        self._limits = _find_time_limits(timeout)

    def post(self, url, **options):
        options.update(timeout=self._limits, stream=True, allow_redirects=False)
        response = self._owner._session.post(url, **options)
        status = response.status_code
        if logger.isEnabledFor(logging.DEBUG):
            seconds = response.elapsed.total_seconds()
            route = response.request.path_url
            record = {"route": route, "status": status, "seconds": seconds}
            logger.debug("%s: HTTP %d in %.3f s.", *record.values(), extra=record)
        if 200 <= status < 300:
            return response
        used = response.request.headers.get("Authorization")
        if status == 401 and used == f"Bearer {self._owner._oauth2_access_token}":
            # The next request refreshes it.
            self._owner._oauth2_access_token_expiration = None
        raise _read_refusal(response)


def _find_time_limits(timeout):
    """Return the seconds to connect and to answer, as requests takes them.

    timeout: that of the client: a number, None for no limit, or already such a pair.
    """
    if isinstance(timeout, tuple):
        return timeout
    connect = CONNECT_LIMIT
    if timeout is not None:
        connect = min(CONNECT_LIMIT, timeout)
    return connect, timeout


def _read_refusal(response):
    """Return a refusal as HttpError, with the beginning of its body.

    A short body is read to its end, so that the connection can be used again. It is
    read in small parts: if it is compressed, each can become a thousand times as large.
    """
    from dropbox.exceptions import HttpError

    body = io.BytesIO()
    read = functools.partial(response.raw.read, 1024, decode_content=True)
    while body.tell() < MAX_REFUSAL and (part := read()):
        body.write(part)
    response.close()
    text = body.getvalue()[:MAX_REFUSAL].decode(errors="replace")
    request_id = response.headers.get("x-dropbox-request-id")
    error = HttpError(request_id, response.status_code, text)
    error.retry_after = response.headers.get("Retry-After")
    return error


# -- Clients and access tokens ---------------------------------------------------------

# Idle connections to a host that a process keeps: 16 threads with six requests each.
POOL_SIZE = 96

# SDK clients that are kept, as with one account a tenant: about 2 KiB each.
KEPT_CLIENTS = 1000

# Seconds before the end of an access token in which it is refreshed, as in the SDK.
REFRESH_EARLY = 300

# Seconds from a failed refresh to the next early one, unless Dropbox asks for more.
REFRESH_PAUSE = 30

_clients = collections.OrderedDict()  # by process and account, the oldest first
_tokens = weakref.WeakKeyDictionary()  # by client


class _Token:
    """What a process knows of the access token that a client holds."""

    def __init__(self):
        self.process = os.getpid()
        # Held during a refresh. Only threads in the background wait for it: there, no
        # exception of a signal handler can leave it locked.
        self.lock = _thread.allocate_lock()
        self.refresh = None  # the last call that has been started
        self.ended = 0  # how many calls have ended
        self.failure = None  # of the last one
        self.retry_at = 0  # seconds, on the monotonic clock: not refreshed early before


def _ensure_token(api):
    """Have the token refreshed if that is due, and wait if there is no valid one.

    A refresh runs in the background, so that no exception of a signal handler can
    interrupt it, and that nobody waits who still has a valid token.
    """
    owner = api.owner
    token = _find_token(owner)  # first: in a forked process, it closes connections
    if not owner._oauth2_refresh_token:
        return
    expiration = owner._oauth2_access_token_expiration
    now = datetime.now(timezone.utc).replace(tzinfo=None)
    if expiration and expiration > now + timedelta(seconds=REFRESH_EARLY):
        return
    is_valid = bool(expiration and expiration > now)
    if is_valid and time.monotonic() < token.retry_at:
        return
    refresh = token.refresh
    if refresh is None or refresh.is_done:
        refresh = _BackgroundCall(_refresh, api, token, token.ended)
        token.refresh = refresh
    if is_valid:
        return
    connect, answer = _find_time_limits(api.client._timeout)
    limit = None if None in (connect, answer) else 2 * connect + answer
    if not refresh.wait(limit):
        raise _RequestError("token refresh timed out", is_temporary=True)
    if failure := refresh.result():
        raise _RequestError(*failure)


def _refresh(api, token, ended_before):
    """Let the SDK refresh the token, unless another call has ended meanwhile.

    Returns None, or the _Failure for all who wait: threads must not share an exception,
    whose traceback grows in each.
    """

    def attempt():
        client = api.copy_client()
        client._oauth2_access_token_expiration = None
        client.check_and_refresh_access_token()
        if not _is_plain(client._oauth2_access_token):
            text = "the answer holds no access token"
            raise _RequestError("BadResponse", text, is_temporary=True)
        _keep_token(client, api.owner)

    with token.lock:
        if token.ended == ended_before:
            token.failure = api.try_once(attempt)[1]
            token.ended += 1
            if token.failure:
                pause = max(REFRESH_PAUSE, token.failure.retry_after)
                token.retry_at = time.monotonic() + pause
                # Who waits for it raises it; an early refresh has nobody who waits.
                reason = _redact(token.failure.reason, api.owner)
                logger.info("The access token was not refreshed: %s.", reason)
        return token.failure


def _find_token(owner):
    """Return what the process knows of the token of the client.

    A client that somebody has assigned may come from the parent of a forked process,
    with which it must not share its connections.
    """
    token = _tokens.get(owner)
    if token is None or token.process != os.getpid():
        owner._session.close()  # which opens others when they are needed
        token = _Token()
        _tokens[owner] = token
    return token


def _keep_token(client, owner):
    owner._oauth2_access_token = client._oauth2_access_token
    owner._oauth2_access_token_expiration = client._oauth2_access_token_expiration


def _find_owner(client):
    """Return the client that keeps the access token of this one.

    A copy that somebody has given another session is a client of its own.
    """
    owner = getattr(client, "owner", None) or client
    return owner if owner._session is client._session else client


def _find_client(account):
    """Return the client that keeps the token of the account, and has no headers."""
    key = (os.getpid(), account.digest)
    client = _clients.get(key)
    if client is None:
        if str(account.oauth2_access_token).startswith("sl."):
            logger.warning("oauth2_access_token: %s.", SHORT_LIVED)
        client = _client_class()(
            **vars(account),
            session=_find_session(os.getpid()),
            max_retries_on_error=0,  # _Api.repeat() alone repeats requests
            max_retries_on_rate_limit=0,
        )
        _tokens[client] = _Token()  # without it, the session would be closed
        client = _clients.setdefault(key, client)
        while len(_clients) > KEPT_CLIENTS:
            _clients.popitem(last=False)
    return client


@functools.cache
def _client_class():
    import dropbox  # costs 0.25 s and 27 MB, too much for every management command

    class Client(dropbox.Dropbox):
        """A client of the module's own. Its copies hand it the token that they refresh.

        owner: the client of which this one is a copy.
        """

        owner = None

        def refresh_access_token(self, *args, **kwargs):
            # A user has called it, or the SDK for a user. The copy in _refresh() has
            # another session, and _find_owner() returns the copy itself.
            super().refresh_access_token(*args, **kwargs)
            _keep_token(self, _find_owner(self))

        def check_and_refresh_access_token(self):
            return _call_sdk(super().check_and_refresh_access_token)

        def request_json_string(self, *args, **kwargs):
            return _call_sdk(super().request_json_string, *args, **kwargs)

    return Client


@functools.lru_cache(maxsize=1)
def _find_session(process):
    """Return the session of a process, whose connections belong to no account.

    It looks up proxies and certificates once: requests would do so for each request.

    process: its number, so that a forked process gets a session of its own.
    """
    from http.cookiejar import DefaultCookiePolicy

    import dropbox
    from dropbox.session import API_HOST

    session = dropbox.create_session(max_connections=POOL_SIZE)
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    url = f"https://{API_HOST}"
    found = session.merge_environment_settings(url, {}, None, None, None)
    session.proxies = found["proxies"]
    session.verify = found["verify"]
    session.trust_env = False
    return session


# -- What a failure means --------------------------------------------------------------

# The tags of Dropbox's reason for each error that Python has a name for.
OS_ERRORS = {
    "path/not_found": errno.ENOENT,
    "path_lookup/not_found": errno.ENOENT,
    "path/malformed_path": errno.ENOENT,  # but not in an upload, see _make_error()
    "path_lookup/malformed_path": errno.ENOENT,
    "path/not_file": errno.EISDIR,
    "conflict/folder": errno.EISDIR,
    "path/not_folder": errno.ENOTDIR,
    "conflict/file_ancestor": errno.ENOTDIR,
    "conflict/file": errno.EEXIST,
}
NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)

EXPIRED = "expired_access_token"
INVALID = "invalid_access_token"

# The tags of the reasons after which the same request may succeed later.
TEMPORARY = ("too_many_write_operations", "content_hash_mismatch")

# What to do about a failure with these words in Dropbox's answer, or in the text of a
# network error. These are logged as errors: only the owner of the account, the app or
# the server can do it.
SHORT_LIVED = "'sl.' tokens live four hours; set oauth2_refresh_token"
TICK = "tick it under Permissions in the App Console, authorize again"
OWNER_ADVICE = {
    EXPIRED: SHORT_LIVED,
    INVALID: "the token is wrong, revoked or of another app; authorize the app again",
    "invalid_grant": "oauth2_refresh_token or the code is wrong, revoked or used",
    "invalid_client": "app_key and app_secret must be of the app that was authorized",
    "missing_scope": TICK,
    "required scope": TICK,
    "user_suspended": "the account's owner or team can reactivate it",
    "invalid_select_user": "team_member_id must be a member of the app's team",
    "no_permission": "the account has no access to namespace_id",
    "sandbox app": "an app with an App folder cannot use namespace_id",
    "insufficient_space": "the account is full; free or buy space",
    "no_write_permission": "the account may only read there; change root_path",
    "invalid_account_type": "the account's plan does not include this",
    "route_access_denied": "the app or its team does not allow this call",
    "email_not_verified": "verify the account's e-mail address",
    "CERTIFICATE_VERIFY_FAILED": "set REQUESTS_CA_BUNDLE to the CAs of your network",
    "Tunnel connection failed": "the proxy refuses; check its user and password",
    "bad address": (
        "check HTTPS_PROXY and the like: http://user:password@host:port, where special "
        "characters of the password are written as %XX; socks5:// needs PySocks"
    ),
    "bad header": "a token or header of the client is no printable ASCII",
}
NO_NETWORK = ("Failed to resolve", "Failed to establish a new connection")
NO_NETWORK += ("connect to proxy", "connect timeout", "Network is unreachable")
ADVICE = {
    **OWNER_ADVICE,
    **dict.fromkeys(
        NO_NETWORK, "check the network, the DNS and the proxy of this host"
    ),
    "disallowed_name": "Dropbox reserves that name; get_valid_name() mends it",
    "malformed_path": (
        "a name must not hold a backslash, NUL or DEL, end with a space or have more "
        "than 255 characters; some accounts allow no emoji"
    ),
    "too_many_files": "use several folders; delete a large one in several steps",
    "payload_too_large": "set a smaller CHUNK_SIZE",
    "team_folder": "a team folder is changed in the team's Admin Console",
    "operation_suppressed": "Dropbox blocks this now; look into the account's web site",
    "restricted_content": "Dropbox blocks this file for legal reasons",
    "access_restricted": "the owner or the team restricts access to this file",
    "unsupported_file": "a Paper document has no bytes and no links; export it",
}
ADVICE_WORDS = re.compile(rf"(?<!\w)({'|'.join(ADVICE)})(?!\w)")

# Found in the names of errors of the network that are about an address or a header.
ABOUT_SETTINGS = (
    r"^(Invalid(URL|ProxyURL|Schema|Header)|MissingSchema|\w*(Location|Scheme))"
)

# Found in the name and text of the errors that each attempt would end with.
LASTING = (
    "^(OSError|UnicodeEncodeError|ApiError|BadInputException|ValidationError) |"
    "bad address|bad header|CERTIFICATE_VERIFY_FAILED|Tunnel connection failed: 4"
)

# If one of these packages raises an error of Python's own classes, Dropbox's answer
# could not be read.
LIBRARIES = ("dropbox", "stone", "requests", "urllib3", "urllib", "http")
LIBRARIES += ("json", "simplejson")


class _Failure(NamedTuple):
    """What a failed request means."""

    reason: str  # Dropbox's own text for programs
    text: str = ""  # what it says to people
    is_temporary: bool = False  # the same request may succeed later
    is_lost: bool = False  # it may have been carried out; only its response was lost
    is_token_refused: bool = False  # another access token, which can be had, may help
    retry_after: float = 0  # seconds that Dropbox asks to wait
    refusal: tuple = ()  # the arguments of the SDK's HttpError, if Dropbox has answered

    @property
    def status(self):
        return self.refusal[1] if self.refusal else None


class _RequestError(Exception):
    """A request has failed without an error of the SDK. Takes fields of _Failure."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.failure = _Failure(*args, **kwargs)


def _call_sdk(function, *args, **kwargs):
    """Call the function. After an error, nobody sees the variables of the SDK."""
    handled = sys.exc_info()[1]
    try:
        return function(*args, **kwargs)
    except BaseException as error:
        _clear_frames(error, handled)
        raise


def _clear_frames(error, handled):
    """Clear the frames of the error and its causes, which hold tokens and content.

    handled: an error that was there before; it and its causes stay as they are.
    """
    seen = [None, handled]
    while not any(error is one for one in seen):  # causes may form a cycle
        seen.append(error)
        traceback.clear_frames(error.__traceback__)
        cause = error.__cause__
        error = error.__context__ if cause is None else cause


def _explain(error, owner):
    """Return the _Failure behind an error of the SDK, requests or urllib3.

    Returns None for an error that comes from elsewhere: a bug, a hook, or a time limit
    that a signal handler raises.
    """
    if isinstance(error, _RequestError):
        return error.failure
    package = type(error).__module__.partition(".")[0]
    if package == "builtins":
        package = _find_innermost_package(error)
    if package not in LIBRARIES:
        return None
    if hasattr(error, "status_code"):
        return _explain_refusal(error, owner)
    name = type(error).__name__
    text = _redact(str(error), owner)
    if package == "urllib" or re.search(ABOUT_SETTINGS, name):
        # Such a text may show the password of a proxy, or a token.
        text = "bad header" if "Header" in name else "bad address"
    is_temporary = not re.search(LASTING, f"{name} {text}")
    return _Failure(name, text, is_temporary, is_lost=True)


def _find_innermost_package(error):
    """Return the package that has raised the error, "" for what stops a program."""
    if isinstance(error, MemoryError) or not isinstance(error, Exception):
        return ""
    frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
    return frame.f_globals.get("__name__", "").partition(".")[0]


def _explain_refusal(error, owner):
    """Return the _Failure behind a response that is not 2xx."""
    status = error.status_code
    body = error.body or ""
    try:
        answer = dict(_flatten(json.loads(body)))
    except (ValueError, RecursionError):
        answer = {}
    reason = _find_reason(answer, owner)
    body = _redact(body, owner)
    fields = ("user_message/text", "error_description", "error/required_scope")
    texts = [str(answer[path]) for path in fields if answer.get(path)]
    may_be_done = status >= 500 or status == 408
    is_busy = status == 429 or _has_tags(reason, *TEMPORARY)
    can_renew = bool(owner._oauth2_refresh_token)
    is_expired = can_renew and _has_tags(reason, EXPIRED)
    asked = [getattr(error, "retry_after", None), answer.get("error/retry_after")]
    return _Failure(
        reason=reason or f"HTTP {status}",
        text=_redact(" ".join(texts), owner) if reason else body,
        is_temporary=may_be_done or is_busy or is_expired,
        is_lost=may_be_done,
        is_token_refused=is_expired or (can_renew and _has_tags(reason, INVALID)),
        retry_after=max(map(_number, asked)),
        refusal=(error.request_id, status, body),
    )


def _find_reason(answer, owner):
    """Return the text for programs: "" if the answer, a flattened one, has none.

    It is Dropbox's error_summary without the dots at its end, or the tags of the error
    if they are more, or OAuth's error.
    """
    summary = answer.get("error_summary") or answer.get("error")
    summary = summary.rstrip("/. ") if isinstance(summary, str) else ""
    tags = "/".join(str(answer[path]) for path in answer if path.endswith("/.tag"))
    reason = _printable(tags if tags.startswith(summary) else summary)
    if re.fullmatch("[a-z_/]*", reason):  # tags, on which we decide
        return reason
    return _redact(reason, owner)


def _flatten(value, path=""):
    """Yield (path, value) for each value in nested JSON objects."""
    if not isinstance(value, dict):
        yield path, value
        return
    for name, inner in value.items():
        yield from _flatten(inner, f"{path}/{name}" if path else name)


def _number(seconds):
    """Return the number of seconds in a header or in JSON; 0 for anything else."""
    is_number = re.fullmatch(r"\d{1,9}(\.\d*)?", f"{seconds}".strip(), re.ASCII)
    return float(is_number[0]) if is_number else 0


def _has_tags(reason, *tags):
    """Whether one of these is in the reason. Dropbox may add others around it."""
    return any(f"/{tag}/" in f"/{reason}/" for tag in tags)


def _printable(text):
    """Return at most 500 characters of the text, without control characters."""
    return "".join(one if one.isprintable() else " " for one in text[:500]).strip()


def _redact(text, owner):
    """Return the text without credentials, however they are quoted."""
    for name in CREDENTIALS:
        for part in _find_parts(getattr(owner, f"_{name}") or ""):
            text = text.replace(part, HIDDEN)
    return re.sub("//[^/@\\s]+@", f"//{HIDDEN}@", text)  # the user of a proxy


@functools.lru_cache(maxsize=100)
def _find_parts(secret):
    spellings = {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1]}
    parts = [*spellings, *re.findall("[A-Za-z0-9_-]{8,}", secret)]
    return [part for part in parts if part]


def _make_error(failure, reason, record, max_wait):
    """Return the error that Django expects, with the failure on it.

    reason: as it is shown. record: what the log has for programs, with the route, the
    path, and how long the request was attempted.
    """
    route = record["route"]
    codes = [OS_ERRORS[tags] for tags in OS_ERRORS if _has_tags(failure.reason, tags)]
    is_upload = route.startswith("files/upload")
    if codes and not (is_upload and _has_tags(failure.reason, "malformed_path")):
        error = _os_error(codes[0], f"{route}: {reason}", record["path"])
    else:
        error = _make_storage_error(failure, reason, record, max_wait)
    error.failure = failure
    if failure.refusal:
        # A new error of the SDK, which holds nothing else.
        from dropbox.exceptions import HttpError

        error.__cause__ = HttpError(*failure.refusal)
    return error


def _make_storage_error(failure, reason, record, max_wait):
    """Return a DropboxStorageException, which is logged if somebody must know it."""
    tries = ""
    if failure.is_temporary:
        tries = f"{record['attempt']} attempt{'s' * (record['attempt'] > 1)}"
        tries = f"{tries}, {record['seconds']:.0f} s"
        if failure.retry_after:
            asked = f"Dropbox asks to wait {failure.retry_after:g} s"
            tries = f"{tries}; {asked}, max_wait is {max_wait:g} s"
        tries = f" ({tries})"
    text = _printable(failure.text)
    told = f"{reason} {text}".strip()[:500]
    found = ADVICE_WORDS.search(f"{failure.reason} {text}")
    words = found[0] if found else None
    advice = f" ({ADVICE[words]})" if found else ""
    error = DropboxStorageException(
        f"{record['route']} of {record['path']!r} failed{tries}: {told}{advice}.",
        failure.reason,
        failure.is_temporary,
        failure.retry_after,
    )
    if failure.is_temporary:
        logger.warning("Gave up: %s", error, extra=record)
    elif words in OWNER_ADVICE:
        # Trackers group errors by the template.
        logger.error(f"{words}: %s", error, extra=record)
    return error


# -- The view and the commands ---------------------------------------------------------

# Seconds. A browser keeps a redirect to a link for this much less than the link lives.
LINK_RESERVE = 60

SCOPES = ("files.metadata.read", "files.content.read", "files.content.write")
HELP = "Get a refresh token for an app of https://www.dropbox.com/developers/apps."


def serve(request, path, storage="default"):
    """Redirect to a temporary link to the file, for path("media/<path:path>", serve).

    storage: an alias in STORAGES, or a DropboxStorage. Answers GET and HEAD. A path
    without a file is a 404, and so is one that is not spelled as the storage spells it,
    such as "public/../private": a view that checks the path has checked the file. To
    decide who may look, wrap it in login_required or the like. A browser keeps the
    redirect for less time than the link is valid. While Dropbox is busy or down, the
    answer is a 503.
    """
    from django import http

    if request.method not in ("GET", "HEAD"):
        return http.HttpResponseNotAllowed(["GET", "HEAD"])
    storage = _find_storage(storage)
    try:
        if path != storage._clean_name(path):
            raise http.Http404(path)
        link = storage._cached_link(storage._api, storage._path(path)).get()
    except (*NO_FILE, SuspiciousFileOperation) as error:
        raise http.Http404(path) from error
    except DropboxStorageException as error:
        if not error.temporary:
            raise
        response = http.HttpResponse("Try again later.", status=503)
        if error.retry_after:
            response["Retry-After"] = f"{math.ceil(error.retry_after)}"
        return response
    # A link from the cache may be that old already.
    oldest = storage._option("url_cache_timeout") or 0
    seconds = int(min(oldest, LINK_LIFE - LINK_RESERVE - oldest))
    cache_control = f"private, max-age={seconds}"
    return http.HttpResponseRedirect(link, headers={"Cache-Control": cache_control})


def _find_storage(storage):
    """Return the DropboxStorage with that alias, or the one that is given."""
    found = storage
    if storage == "default":  # the only alias before Django 4.2
        found = django_storage.default_storage
    elif isinstance(storage, str):
        if not hasattr(django_storage, "storages"):
            text = f"Before Django 4.2 there is no alias {storage!r}"
            raise ImproperlyConfigured(f"{text}: pass the storage itself.")
        found = django_storage.storages[storage]
    if isinstance(found, DropboxStorage):
        return found
    kind = found.__class__.__name__
    raise ImproperlyConfigured(
        f"The storage {storage!r} is a {kind}, no DropboxStorage: check STORAGES."
    )


def check(alias="default"):
    """Save, read and delete a file in the storage, and print that it works.

    alias: in STORAGES. If it does not work, this ends with SystemExit and one line that
    says what is wrong and what to do.
    """
    note = ""
    try:
        storage = _find_storage(alias)
        root = storage._option("root_path")
        if root.lower().startswith("/apps/"):
            note = " An App folder is the root already: root_path begins inside it."
        name = f"check-{os.urandom(8).hex()}.txt"
        name = storage.save(name, ContentFile(b"checked"))
        try:
            with storage.open(name) as file:
                file.read()  # which compares the content hash
        finally:
            storage.delete(name)
    except (ImproperlyConfigured, ImportError) as error:
        raise SystemExit(f"Check the settings: {error}") from None
    except (DropboxStorageException, OSError, SuspiciousFileOperation) as error:
        raise SystemExit(f"It does not work: {error}{note}") from None
    print(f"It works: {name} was saved in Dropbox in {root}, read and deleted.{note}")


def authorize(app_key):
    """Let a person allow the app, print its settings, and return the refresh token.

    app_key: of an app in the App Console, which needs no secret. The person allows the
    app on a page of Dropbox, and types the code that this page shows. If that fails,
    this ends with SystemExit and one line that says what to do.
    """
    # This is for a terminal: no debug page shows these variables, which hold the token.
    from dropbox import DropboxOAuth2FlowNoRedirect

    # Without a storage, as there may be no settings yet.
    client = _client_class()("none-yet", session=_find_session(os.getpid()))
    api = _Api(client, max_wait=0, first_wait=0)
    flow = DropboxOAuth2FlowNoRedirect(
        app_key, use_pkce=True, token_access_type="offline", scope=[*SCOPES]
    )
    flow.requests_session = _CheckedSession(api.owner, client._timeout)
    print(f"Open this address and allow the app to use your Dropbox:\n{flow.start()}\n")
    code = _ask_for_code()
    try:
        finish = functools.partial(_finish, flow, code)
        result = api.repeat("oauth2/token", app_key, finish)
    except DropboxStorageException as error:
        advice = "Check the App key, and run this again for another code."
        raise SystemExit(f"{error} {advice}") from None
    lacking = [scope for scope in SCOPES if scope not in (result.scope or SCOPES)]
    if lacking:
        raise SystemExit(
            f"The app may not use {', '.join(lacking)}: tick it under Permissions in "
            "the App Console, press Submit, and run this again."
        )
    print(f"\nDROPBOX_APP_KEY={app_key}")
    print(f"DROPBOX_OAUTH2_REFRESH_TOKEN={result.refresh_token}")
    return result.refresh_token


def _ask_for_code():
    try:
        code = input("Type the code that the page shows: ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        code = ""
    if not code:
        raise SystemExit("No code was typed. Run this again and copy it from the page.")
    return code


def _finish(flow, code):
    """Return what the SDK's flow has for the code, with a refresh token."""
    result = flow.finish(code)
    if not _is_plain(result.refresh_token):
        raise _RequestError("BadResponse", "the answer holds no refresh token")
    return result


def _main():
    import argparse

    name = __spec__.name if __spec__ else "dropbox_storage"
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=HELP)
    parser.add_argument("app_key", nargs="?", help="the App key, in the App Console")
    app_key = parser.parse_args().app_key
    if not app_key:
        raise SystemExit(f"Give the App key of your app: {parser.prog} APP_KEY")
    authorize(app_key)


if __name__ == "__main__":
    logger.disabled = True  # the last line says it all
    _main()
