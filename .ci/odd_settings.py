# Appended to the settings of a project that holds a copy of the module and its tests:
# whatever a project may have set, the tests must neither see nor leave anything behind.

import django  # noqa: E402, I001

DROPBOX_OAUTH2_TOKEN = "sl.of-the-project"
DROPBOX_OAUTH2_REFRESH_TOKEN = "of-the-project"
DROPBOX_APP_KEY = DROPBOX_APP_SECRET = "odd"
DROPBOX_ROOT_PATH = "/production"
DROPBOX_WRITE_MODE = "overwrite"
DROPBOX_TIMEOUT = 1
DROPBOX_MAX_WAIT = 0
DROPBOX_BASE_URL = "/odd/"
DROPBOX_URL_CACHE_TIMEOUT = 0
DROPBOX_NAMESPACE_ID = "99"
DROPBOX_TEAM_MEMBER_ID = "dbmid:odd"
DROPBOX_URL_CACHE = "odd"

backend = "shop.files.remote.DropboxStorage"
if django.VERSION >= (4, 2):
    STORAGES = {name: {"BACKEND": backend} for name in ("default", "staticfiles")}
else:
    DEFAULT_FILE_STORAGE = STATICFILES_STORAGE = backend

CACHES = {
    alias: {"BACKEND": "django.core.cache.backends.dummy.DummyCache"}
    for alias in ("default", "odd")
}
USE_TZ = False
TIME_ZONE = "Asia/Kathmandu"
MEDIA_URL = "https://cdn.example.com/odd/"
STATIC_URL = "odd/"
FILE_UPLOAD_HANDLERS = ["django.core.files.uploadhandler.TemporaryFileUploadHandler"]
FILE_UPLOAD_MAX_MEMORY_SIZE = 1
FILE_UPLOAD_PERMISSIONS = None
LOGGING = {
    "version": 1,
    "disable_existing_loggers": True,
    "root": {"level": "CRITICAL"},
    "loggers": {"dropbox_storage": {"level": "CRITICAL", "propagate": False}},
}
