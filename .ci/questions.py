"""Ask a real account what no document of Dropbox's settles, and print its answers.

    DROPBOX_TEST_TOKEN=... python .ci/questions.py

The storage works with each answer. A new folder is made, and removed at the end.
"""

import os

import dropbox
from dropbox import files
from dropbox.exceptions import ApiError

BLOCK = bytes(4 * 1024 * 1024)
CLIENT = dropbox.Dropbox(os.environ["DROPBOX_TEST_TOKEN"])
FOLDER = f"/dropbox_storage-questions-{os.urandom(6).hex()}"


def emoji():
    return CLIENT.files_upload(b"x", f"{FOLDER}/\U0001f600.txt").name


def refused_data():
    try:
        CLIENT.files_upload(b"mine", f"{FOLDER}/a")
    except ApiError as error:
        session = error.error.get_path().upload_session_id
    if not session:
        return "no: upload_session_id is empty"
    commit = files.CommitInfo(f"{FOLDER}/finished")
    cursor = files.UploadSessionCursor(session, 4)
    return CLIENT.files_upload_session_finish(b"", cursor, commit).size == 4


def identical_bytes():
    mode = files.WriteMode.update(CLIENT.files_upload(b"x", f"{FOLDER}/b").rev)
    CLIENT.files_upload(b"x", f"{FOLDER}/b", mode=mode, strict_conflict=True)
    return False


def empty_close():
    kind = files.UploadSessionType.concurrent
    session = CLIENT.files_upload_session_start(b"", session_type=kind).session_id
    cursor = files.UploadSessionCursor(session, 0)
    CLIENT.files_upload_session_append_v2(BLOCK, cursor)
    cursor = files.UploadSessionCursor(session, len(BLOCK))
    CLIENT.files_upload_session_append_v2(b"", cursor, close=True)
    return True


def compression():
    CLIENT.files_upload(b"text " * 100_000, f"{FOLDER}/text")
    with CLIENT.files_download(f"{FOLDER}/text")[1] as response:
        return response.headers.get("Content-Encoding", False)


def ranges():
    ranged = CLIENT.clone(headers={"Range": "bytes=10-19"})
    return len(ranged.files_download(f"{FOLDER}/text")[1].content) == 10


def content_hash():
    return bool(CLIENT.files_get_metadata(f"{FOLDER}/a").content_hash)


def paths():
    return bool(CLIENT.files_get_metadata(f"{FOLDER}/a").path_display)


def empty_pages():
    page = CLIENT.files_list_folder(FOLDER)
    return page.has_more and not page.entries


QUESTIONS = {
    "Are names with emoji taken?": emoji,
    "Does a refused files/upload keep its data?": refused_data,
    "Does strict_conflict refuse identical bytes for the right rev?": identical_bytes,
    "May an empty append close a session that holds data?": empty_close,
    "Is a download compressed for those who accept it?": compression,
    "Does a reply end where its range does?": ranges,
    "Does metadata have a content_hash?": content_hash,
    "Does metadata have paths?": paths,
    "May a page of a listing be empty and have more?": empty_pages,
}


def main():
    CLIENT.files_upload(b"theirs", f"{FOLDER}/a")
    try:
        for question, ask in QUESTIONS.items():
            try:
                answer = ask()
            except ApiError as error:
                answer = f"refused: {error.error}"
            print(f"{question:<63} {answer}")
    finally:
        CLIENT.files_delete_v2(FOLDER)


if __name__ == "__main__":
    main()
