"""Files that are downloaded once, checked, and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from gptlab.data.verified import cache_folder, file_sha256
from gptlab.errors import UserError
from gptlab.files import because

MOST_BYTES = 2**28  # of a download; what gptlab fetches is below 100 MB


def fetch(url: str, sha256: str, name: str, what: str, flag: str, error: type[UserError]) -> Path:
    """The file at `url`, from the cache if it is there.

    Args:
        name: name of the file in the cache folder.
        what, flag: what the error message calls the file, and the option that names another copy.
        error: the type of the error.
    """
    cache = cache_folder()
    file = cache / name
    if file.is_file() and file_sha256(file) == sha256:
        return file
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            content: bytes = answer.read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise OSError(f"the answer does not end after {MOST_BYTES:,} bytes")
            if left := getattr(answer, "length", None):  # of Content-Length
                raise OSError(f"the answer ends {left:,} bytes too early")
    except (OSError, ValueError, urllib.error.URLError, http.client.HTTPException) as fault:
        raise error(
            f"{what} could not be downloaded from {url} ({because(fault)}): "
            f"download the file elsewhere and name it with {flag} FILE"
        ) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise error(f"{url} is not the file it was (another sha256): name a copy with {flag} FILE")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = cache / f".{name}.{os.getpid()}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, file)
    except OSError as fault:
        raise error(f"{file} cannot be written ({fault.strerror}): set XDG_CACHE_HOME to another folder") from None
    return file
