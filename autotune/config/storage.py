"""URLs of Optuna storages. Passwords in them are used to connect, but never recorded or shown.

A password belongs in AUTOTUNE_STORAGE_PASSWORD, or where the database's own client looks for it (PGPASSWORD and
~/.pgpass for PostgreSQL), so that a resumed search finds it too.
"""

import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import unquote

from autotune.errors import ConfigError

if TYPE_CHECKING:  # importing it takes a quarter of a second
    import sqlalchemy

PASSWORD_VARIABLE = "AUTOTUNE_STORAGE_PASSWORD"
_SECRET_KEY = re.compile(r"pass|pwd|secret|token|key", re.IGNORECASE)
"""Names of secret parameters in a URL's query."""
_IN_TEXT = re.compile(
    r"://[^\s/]*?:(?P<login>[^\s@]+)@|[?&;\s]\w*(?:pass|pwd|secret|token)\w*=(?P<query>[^\s&;]+)", re.IGNORECASE
)


def without_password(url: str) -> str:
    """The URL without its password, for records and messages. Raises ConfigError, without showing it, for an invalid
    URL."""
    if not url:
        return ""
    parsed = _parsed(url)
    query = {key: value for key, value in parsed.query.items() if not _SECRET_KEY.search(key)}
    if parsed.password is None and len(query) == len(parsed.query):
        return url
    return parsed.set(query=query)._replace(password=None).render_as_string(hide_password=False)


def connect_url(url: str) -> "sqlalchemy.URL":
    """The URL to connect with: with its own password, else with the one in the environment."""
    parsed = _parsed(url)
    password = os.environ.get(PASSWORD_VARIABLE)
    return parsed.set(password=password) if password and parsed.username and not parsed.password else parsed


def is_server(url: str) -> bool:
    """Whether the URL is a database server's, where searches of several machines may meet. Raises ConfigError."""
    return bool(url) and connect_url(url).get_backend_name() != "sqlite"


def _parsed(url: str) -> "sqlalchemy.URL":
    import sqlalchemy

    advice = "give for example sqlite:///studies.db or postgresql://user@host/database"
    try:
        parsed = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # their messages contain the URL
        raise ConfigError(f"--storage cannot be opened: it is not a URL; {advice}") from None
    around = (parsed.username, parsed.host, None if parsed.get_backend_name() == "sqlite" else parsed.database)
    if any("@" in part for part in around if part):  # as in `user:p@ss@host`, where `ss@host` is the host
        raise ConfigError(f"--storage cannot be opened: write an @ in its password as %40; {advice}")
    return parsed


def secrets_in(texts: Iterable[str]) -> set[str]:
    """The passwords in these texts, as written and decoded, and those in the environment."""
    secrets = {os.environ.get(name, "") for name in (PASSWORD_VARIABLE, "PGPASSWORD")}
    for text in texts:
        for match in _IN_TEXT.finditer(text):
            secrets |= {secret := match["login"] or match["query"], unquote(secret)}
    return secrets - {""}


def scrub(text: str, secrets: Iterable[str]) -> str:
    """The text with *** in place of each secret."""
    for secret in sorted(secrets, key=len, reverse=True):  # one may contain another
        text = text.replace(secret, "***")
    return text
