"""How a store, a file system or a service that is away shows: error numbers, and what libraries print of them.

What is listed here mends by itself or by its administrator, and says nothing about the work that met it.
"""

from __future__ import annotations

import errno
import re

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
AWAY = frozenset(
    {
        errno.EIO,
        errno.EROFS,
        errno.ESTALE,
        errno.EREMOTEIO,
        errno.ENOTCONN,
        errno.ETIMEDOUT,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.ECONNABORTED,
        errno.ECONNRESET,
        errno.ECONNREFUSED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ESHUTDOWN,
        errno.ENOLINK,
        errno.ECOMM,
        errno.EPROTO,
    }
)


def _numbers(numbers: frozenset[int]) -> str:
    """Python writes `[Errno 5]`, Rust `(os error 5)`, C only the words."""
    choice = "|".join(str(number) for number in sorted(numbers))
    return rf"(errno|os error):? ({choice})\b"


FULL_TEXT = re.compile(rf"no space left on device|disk quota exceeded|\benospc\b|{_numbers(FULL)}", re.IGNORECASE)
AWAY_TEXT = re.compile(
    "|".join(
        (
            _numbers(AWAY),
            r"read-only file ?system|stale (nfs )?file handle|input/output error|remote i/o error",
            r"transport endpoint is not connected|cannot send after transport endpoint|host is down|no route to host",
            r"network is (down|unreachable)|software caused connection abort",
            r"connection (refused|aborted)|connection reset by peer|remote end closed connection|server disconnected",
            r"name or service not known|temporary failure in name resolution|nodename nor servname|dns error",
            r"connect(ion)? timed out|read timed out|(operation|request) timed out|request ?time-?out|\btimeouterror\b",
            r"could not be reached|error sending request|max retries exceeded|incomplete ?read",
            r"answered (408|425|429|5\d\d)\b|\b(500 internal server error|502 bad gateway|504 gateway time-?out)",
            r"slow ?down|service ?unavailable|\binternalerror\b|too ?many ?requests",
            r"refused the credentials|no credentials were found|expired ?token|token has expired|requesttimetooskewed",
            r"\b(nosuchbucket|invalidaccesskeyid|signaturedoesnotmatch|tokenrefreshrequired|invalidtoken)\b",
            r"the bucket does not exist",
        )
    ),
    re.IGNORECASE,
)
# A store's own words: `error: cannot read x in s3://b`, `error: store.json in s3://b is damaged`.
STORE_TEXT = re.compile(
    r"^error: (cannot (open|read|write|list|delete) .+ in |\S+ in .+ is damaged|there is no (submission|store))",
    re.IGNORECASE,
)


def kind_of_number(number: int | None) -> str:
    """Return the failure kind of an error number, "" for one that says nothing about the world outside."""
    if number in FULL:
        return "disk_full"
    return "unreachable" if number in AWAY else ""


def kind_of_text(text: str) -> str:
    """Return the failure kind that a library's message gives away, "" if it gives none."""
    if FULL_TEXT.search(text):
        return "disk_full"
    return "unreachable" if AWAY_TEXT.search(text) else ""
