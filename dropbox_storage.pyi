import os
from collections.abc import Generator
from datetime import datetime
from types import TracebackType
from typing import IO, Any, AnyStr, Generic, Literal, Protocol, TypeVar, overload

# Without django-stubs, Django has no types, which these two comments allow for.
from django.core.files.base import File  # type: ignore[import-untyped, unused-ignore]
from django.core.files.storage import Storage  # type: ignore[import-untyped, unused-ignore]
from django.http import HttpRequest, HttpResponseBase  # type: ignore[import-untyped, unused-ignore]
from typing_extensions import Self, TypeAlias

__all__ = [
    "DropboxFile",
    "DropboxStorage",
    "DropboxStorageException",
    "authorize",
    "check",
    "serve",
]
__version__: str

_Name: TypeAlias = str | os.PathLike[str]
# Bytes or text; without django-stubs, a File is no IO.
_Content: TypeAlias = IO[Any] | File[Any]
# The usual spellings of the modes.
_TextMode: TypeAlias = Literal[
    "r", "w", "x", "a", "r+", "w+", "x+", "a+", "rt", "wt", "xt", "at"
]
_BinaryMode: TypeAlias = Literal[
    "rb", "wb", "xb", "ab", "r+b", "w+b", "x+b", "a+b", "rb+", "wb+", "xb+", "ab+"
]
_WriteMode: TypeAlias = Literal["add", "overwrite", "update"]

_AnyStr_co = TypeVar("_AnyStr_co", str, bytes, covariant=True)
_AnyStr_contra = TypeVar("_AnyStr_contra", str, bytes, contravariant=True)

class DropboxStorageException(Exception):
    reason: str
    temporary: bool
    retry_after: float
    def __init__(
        self,
        message: str,
        reason: str = "",
        temporary: bool = False,
        retry_after: float = 0,
    ) -> None: ...

# Without django-stubs, the base is Any.
class DropboxStorage(Storage):  # type: ignore[misc, unused-ignore]
    oauth2_access_token: str | None
    oauth2_refresh_token: str | None
    app_key: str | None
    app_secret: str | None
    root_path: str
    timeout: float | None
    write_mode: _WriteMode
    base_url: str | None
    url_cache: str
    url_cache_timeout: float | None
    max_wait: float | None
    namespace_id: str | None
    team_member_id: str | None

    CHUNK_SIZE: int
    CONNECTIONS: int
    FIRST_WAIT: float

    # Any: deconstructible() passes on what a subclass takes.
    def __new__(cls, *args: Any, **kwargs: Any) -> Self: ...
    def __init__(
        self,
        oauth2_access_token: str | None = ...,
        *,
        oauth2_refresh_token: str | None = ...,
        app_key: str | None = ...,
        app_secret: str | None = ...,
        root_path: str = ...,
        timeout: float | None = ...,
        write_mode: _WriteMode = ...,
        base_url: str | None = ...,
        url_cache: str = ...,
        url_cache_timeout: float | None = ...,
        max_wait: float | None = ...,
        namespace_id: str | None = ...,
        team_member_id: str | None = ...,
    ) -> None: ...
    # Any: the arguments of a subclass.
    def deconstruct(
        obj,  # pyright: ignore[reportSelfClsParameterName]
    ) -> tuple[str, tuple[Any, ...], dict[str, Any]]: ...
    # A dropbox.Dropbox. Any, because the SDK has no types: a protocol of its public
    # methods would accept objects that do not work.
    @property
    def client(self) -> Any: ...
    @client.setter
    def client(self, client: Any) -> None: ...
    @client.deleter
    def client(self) -> None: ...
    # Dropbox's path of a name, for requests through the client.
    def _full_path(self, name: _Name) -> str: ...
    # What subclasses override: files of any kind may go in and come out.
    def _open(self, name: str, mode: Any = "rb") -> File[Any]: ...
    def _save(self, name: str, content: File[Any]) -> str: ...
    def generate_filename(self, filename: _Name) -> str: ...
    # Other modes are errors, which the base class cannot say.
    @overload  # type: ignore[override, unused-ignore]
    def open(self, name: _Name, mode: _BinaryMode = "rb") -> DropboxFile[bytes]: ...
    @overload
    def open(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, name: _Name, mode: _TextMode
    ) -> DropboxFile[str]: ...
    def save(
        self, name: _Name | None, content: _Content, max_length: int | None = None
    ) -> str: ...
    def get_valid_name(self, name: str) -> str: ...
    def get_alternative_name(self, file_root: str, file_ext: str) -> str: ...
    def get_available_name(self, name: _Name, max_length: int | None = None) -> str: ...
    def delete(self, name: _Name) -> None: ...
    def exists(self, name: _Name) -> bool: ...
    def listdir(self, path: _Name) -> tuple[list[str], list[str]]: ...
    def size(self, name: _Name) -> int: ...
    def url(self, name: _Name | None) -> str: ...
    def get_modified_time(self, name: _Name) -> datetime: ...

class _Read(Protocol[_AnyStr_co]):
    def __call__(self, n: int = -1, /) -> _AnyStr_co: ...

class _Write(Protocol[_AnyStr_contra]):
    def __call__(self, data: _AnyStr_contra, /) -> int: ...

class DropboxFile(File[AnyStr], Generic[AnyStr]):  # type: ignore[misc, unused-ignore]
    name: str | None
    mode: str
    file: Any  # a file of Python's, which the methods below use
    @overload
    def __init__(
        self: DropboxFile[bytes],
        name: _Name,
        storage: DropboxStorage,
        mode: _BinaryMode = "rb",
    ) -> None: ...
    @overload
    def __init__(
        self: DropboxFile[str], name: _Name, storage: DropboxStorage, mode: _TextMode
    ) -> None: ...
    @property
    def size(self) -> int: ...  # type: ignore[override, unused-ignore]
    # Here it takes no more than the mode, in which a text file stays a text file.
    def open(self, mode: str | None = None) -> Self: ...  # type: ignore[override, unused-ignore]
    @property
    def read(self) -> _Read[AnyStr]: ...
    @property
    def readline(self) -> _Read[AnyStr]: ...
    @property
    def write(self) -> _Write[AnyStr]: ...
    def chunks(
        self, chunk_size: int | None = None
    ) -> Generator[AnyStr, None, None]: ...
    def __iter__(self) -> Generator[AnyStr, None, None]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
    def close(self) -> None: ...
    def discard(self) -> None: ...
    def __del__(self) -> None: ...

def serve(
    request: HttpRequest, path: str, storage: str | DropboxStorage = "default"
) -> HttpResponseBase: ...
def check(alias: str = "default") -> None: ...
def authorize(app_key: str) -> str: ...
