"""HTTP clients of our own commands, and what proxy variables mean to them.

A server on this machine is never asked through a proxy, whatever the environment says: a proxy
would look for it on its own machine. Other servers are, as HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and
NO_PROXY say; a variable that no client can use is an error that names it.
"""

from __future__ import annotations

import ipaddress
import os
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import urlsplit

from qig_serve.errors import UserError
from qig_serve.extras import require

T = TypeVar("T")
_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine itself."""
    host = (urlsplit(url).hostname or "").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def open_loopback(url: str, timeout: float) -> Any:
    """The answer to a GET of a server on this machine; raises what urllib does."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=timeout)


def openai_client(url: str, api_key: str, timeout: float, purpose: str) -> Any:
    """openai's client of the server at `url`; UserError without the package, or a usable proxy,
    and for what is no address of a server, or no key.

    purpose: what needs it, as the beginning of a sentence.
    """
    require("openai", purpose)
    from openai import DefaultHttpxClient, OpenAI

    no_address = UserError(
        f"{without_password(url)!r} is no address of a server: write http://HOST:PORT or "
        "https://HOST"
    )
    if not _is_address(url):
        raise no_address
    if not (api_key.isascii() and api_key.isprintable()):
        raise UserError(
            "the key for the server (OPENAI_API_KEY) has characters that no request can carry: "
            "set it to what the server was given, without line ends"
        )
    base = url.rstrip("/")
    base = base if base.endswith("/v1") else base + "/v1"
    try:
        http = DefaultHttpxClient(trust_env=not is_loopback(base))
    except Exception as error:  # of whichever HTTP package openai is built on
        raise UserError(_unusable(error)) from None
    try:
        return OpenAI(base_url=base, api_key=api_key, timeout=timeout, http_client=http)
    except Exception as error:
        if type(error).__name__ == "InvalidURL":  # of the same package, for such as 999.1.1.1
            raise no_address from None
        raise UserError(
            f"openai's client of {without_password(url)} cannot be made: "
            f"{type(error).__name__}: {error}"
        ) from None


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for one that is no number
    except ValueError:
        return False
    known = parts.scheme in ("http", "https") and not parts.query and not parts.fragment
    return known and bool(parts.hostname) and url.isprintable() and " " not in url


def proxy_in_words(url: str) -> str:
    """The proxy that a request to `url` goes through, to follow "does not answer"; or nothing."""
    scheme = urlsplit(url).scheme
    used = _set_variables().get(f"{scheme.upper()}_PROXY") or _set_variables().get("ALL_PROXY")
    if used is None or is_loopback(url) or urllib.request.proxy_bypass(urlsplit(url).netloc):
        return ""
    name, value = used
    return f" through the proxy of {name}={without_password(value)}"


def _set_variables() -> dict[str, tuple[str, str]]:
    """Upper-case name -> the name that is set, in upper or lower case, and its value."""
    found: dict[str, tuple[str, str]] = {}
    for variable in _VARIABLES:
        for name in (variable.lower(), variable):  # as httpx: the lower-case one counts
            if value := os.environ.get(name):
                found.setdefault(variable, (name, value))
    return found


def _unusable(error: Exception) -> str:
    from openai import DefaultHttpxClient

    for name, value in _set_variables().values():
        proxy = value if "://" in value else f"http://{value}"
        try:
            DefaultHttpxClient(proxy=proxy, trust_env=False).close()
        except Exception as why:
            return (
                f"the proxy of {name}={without_password(value)} cannot be used ({why}): correct "
                f"or unset {name}, or put the server's host into NO_PROXY"
            )
    return (
        "openai's client cannot be made with the proxies and certificates that the environment "
        f"names (SSL_CERT_FILE, SSL_CERT_DIR): {error}"
    )


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises; TimeoutError after so many seconds.

    A client's own timeout is of one read, which a server that sends a byte at a time never
    exceeds. The call then goes on in a thread that nothing waits for, Ctrl-C included.
    """
    done: Future[T] = Future()

    def work() -> None:
        try:
            done.set_result(call())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError:
        if done.done():  # just now, or with a TimeoutError of its own
            return done.result()
        raise TimeoutError(f"no whole answer within {seconds:g} s") from None


def without_password(url: str) -> str:
    """A URL as it may be shown."""
    before, at, host = url.rpartition("@")
    return url if not at else f"{before.partition('://')[0]}://...@{host}"
