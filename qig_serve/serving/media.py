"""Where pictures may come from: vLLM's media connector with the doors closed.

vLLM fetches any URL by default, follows redirects, and connects to whatever address a
name resolves to. Here remote pictures are off unless domains were allowed, and an address is
checked where the connection is made, so a name cannot resolve to one thing when checked and to
another when connected to. Importing this module registers the connector as `qig`; the server
selects it with VLLM_MEDIA_CONNECTOR.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import ipaddress
import socket
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from PIL import Image

from qig_serve.serving.limits import Limits
from qig_serve.vllm_plugin import compat, patches

NAME = "qig"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, and not a wrapping of another."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and (
        ip.ipv4_mapped or ip.sixtofour or ip.teredo or ip in _NAT64
    ):
        return False
    return ip.is_global and not ip.is_multicast


def _refuse(message: str, url: object = None) -> Exception:
    return compat.validation_error()(message, parameter="image_url", value=url)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Lets a refusal through as it was raised (vLLM 0.26 makes "Invalid URL", 422, of it).

    A picture that cannot be had is the request's fault too, where vLLM answers 500 or 501.
    """
    refusal = compat.validation_error()
    try:
        yield
    except refusal:
        raise
    except Exception as error:
        if isinstance(error.__cause__, refusal):
            raise error.__cause__ from None
        if isinstance(error, (aiohttp.ClientError, OSError, NotImplementedError)):
            said = str(error) or type(error).__name__
            raise _refuse(f"the picture cannot be loaded: {said}") from error
        raise


class PublicResolver(AbstractResolver):
    """Resolves names, and refuses those that resolve to an address that is not public."""

    def __init__(self) -> None:
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """As aiohttp's resolver; vLLM's validation error (400) if any address is not public."""
        results = await self._resolver.resolve(host, port, family)
        for result in results:
            if not is_public(result["host"]):
                raise _refuse(f"{host} resolves to {result['host']}, which is not a public address")
        return results

    async def close(self) -> None:
        """Release the resolver."""
        await self._resolver.close()


_Connection: Any = patches.overridable(
    compat.http_connection(), "get_async_client", "get_bytes", "async_get_bytes"
)


class PublicConnection(_Connection):  # type: ignore[misc]
    """vLLM's HTTP client, connecting to public addresses only."""

    _session: aiohttp.ClientSession | None = None

    async def get_async_client(self) -> aiohttp.ClientSession:
        """The session, made once."""
        if self._session is None:
            connector = aiohttp.TCPConnector(resolver=PublicResolver())
            self._session = aiohttp.ClientSession(connector=connector)
        return self._session

    def get_bytes(self, url: str, **options: Any) -> bytes:
        """As vLLM's; through the asynchronous client, which checks the address."""

        async def fetch() -> bytes:
            connection = PublicConnection()
            try:
                return await connection.async_get_bytes(url, **options)
            finally:
                await (await connection.get_async_client()).close()

        return asyncio.run(fetch())


_Connector: Any = patches.overridable(
    compat.media_connector(),
    "_assert_url_in_allowed_media_domains",
    "_load_file_url",
    "load_from_url",
    "load_from_url_async",
)


class GuardedMediaConnector(_Connector):  # type: ignore[misc]
    """Data URLs, files under the allowed path, and pictures of allowed domains."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["connection"] = PublicConnection()
        super().__init__(*args, **kwargs)
        self._max_pixels = Limits.from_environment().max_image_pixels

    def _assert_url_in_allowed_media_domains(self, url_spec: Any) -> None:
        host = url_spec.hostname or ""
        if not self.allowed_media_domains:
            raise _refuse(
                "pictures by remote URL are off on this server: send a data URL, or start the "
                "server with --allowed-media-domains",
                url_spec.url,
            )
        if host not in self.allowed_media_domains:
            allowed = ", ".join(self.allowed_media_domains)
            raise _refuse(f"{host} is not an allowed media domain ({allowed})", url_spec.url)
        try:  # an address written out is not resolved, so PublicResolver never sees it
            public = is_public(host.strip("[]"))
        except ValueError:
            return
        if not public:
            raise _refuse(f"{host} is not a public address", url_spec.url)

    def _load_file_url(self, url_spec: Any, media_io: Any) -> Any:
        try:
            return super()._load_file_url(url_spec, media_io)
        except (RuntimeError, OSError) as error:
            raise _refuse(f"cannot load the file: {error}", url_spec.url) from error

    def load_from_url(self, url: str, media_io: Any, **options: Any) -> Any:
        """As vLLM's, with the pixel cap."""
        self._cap_pixels(media_io)
        with _refusals():
            return super().load_from_url(url, media_io, **options)

    async def load_from_url_async(self, url: str, media_io: Any, **options: Any) -> Any:
        """As vLLM's, with the pixel cap."""
        self._cap_pixels(media_io)
        with _refusals():
            return await super().load_from_url_async(url, media_io, **options)

    def _cap_pixels(self, media_io: Any) -> None:
        """Look at a picture's size before its pixels are decoded, wherever it came from."""

        def wrap(load_bytes: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
            def load_small_enough(data: bytes) -> Any:
                self._check_pixels(data)
                try:
                    return load_bytes(data)
                except (ValueError, compat.validation_error()):  # vLLM's own sentence, and 400
                    raise
                except Exception as error:
                    raise _refuse(f"the picture cannot be decoded: {error}") from error

            return load_small_enough

        patches.wrap_load_bytes(media_io, wrap)

    def _check_pixels(self, data: bytes) -> None:
        try:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
        except OSError:  # not a picture: vLLM says what is wrong with it
            return
        except Exception as error:  # decoders raise anything about a stranger's bytes
            raise _refuse(f"the picture cannot be read: {error}") from error
        if width * height > self._max_pixels:
            raise _refuse(
                f"the picture is {width} x {height}, more than the {self._max_pixels} pixels "
                "that this server accepts (--max-image-pixels)"
            )


compat.media_connector_registry().register(NAME)(GuardedMediaConnector)
