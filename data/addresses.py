"""Where a downloader may go: http and https URLs without tricks, and public addresses, judged by the very address that
is connected to.

A list of URLs from the web is hostile input: a name may lead to the machine's own services, to the network around it
or to a cloud's metadata service, directly, by a redirect, or by answering differently the second time it is asked.
Sources: the IANA registries of special-purpose IPv4 and IPv6 addresses; the WHATWG URL standard ("ends in a number")
and its Fetch standard ("port blocking").
"""

import ipaddress
import re

from yarl import URL

MAX_URL = 8000  # characters
NOT_PUBLIC_4 = tuple(
    (ipaddress.IPv4Network(network), kind)
    for network, kind in (
        ("0.0.0.0/8", "of this network"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "shared by a provider"),
        ("127.0.0.0/8", "loopback"),
        ("168.63.129.16/32", "a cloud's metadata service"),
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "reserved"),
        ("192.0.2.0/24", "for documentation"),
        ("192.88.99.0/24", "a 6to4 relay"),
        ("192.168.0.0/16", "private"),
        ("198.18.0.0/15", "for benchmarks"),
        ("198.51.100.0/24", "for documentation"),
        ("203.0.113.0/24", "for documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
    )
)
# Only 2000::/3 is given out for the public internet; these parts of it are not.
GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
NOT_PUBLIC_6 = tuple(
    (ipaddress.IPv6Network(network), kind)
    for network, kind in (
        ("::1/128", "loopback"),
        ("::/128", "unspecified"),
        ("::ffff:0:0/96", "an IPv4 address in IPv6"),
        ("64:ff9b:1::/48", "a private translation to IPv4"),
        ("2001::/23", "of a protocol"),
        ("2001:db8::/32", "for documentation"),
        ("2002::/16", "a 6to4 tunnel"),
        ("3fff::/20", "for documentation"),
        ("fc00::/7", "private"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "private"),
        ("ff00::/8", "multicast"),
    )
)
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # its last 32 bits are the IPv4 address that is meant
LOOPBACK = (ipaddress.IPv4Network("127.0.0.0/8"), ipaddress.IPv6Network("::1/128"))
BLOCKED_PORTS = frozenset(
    (0, 1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103, 104, 109)
    + (110, 111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515, 526, 530)
    + (531, 532, 540, 548, 554, 556, 563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049, 3659, 4045, 4190)
    + (5060, 5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080)
)
PLAIN_IPV4 = re.compile(r"(0|[1-9][0-9]{0,2})(\.(0|[1-9][0-9]{0,2})){3}")
NUMBER = re.compile(r"[0-9]+|0[xX][0-9a-fA-F]*")
HOST = re.compile(r"[0-9A-Za-z_.-]+|[0-9a-fA-F]*:[0-9a-fA-F:.]*(%.*)?")  # names after IDNA, and IPv6 addresses


class UrlError(ValueError):
    """A URL that is not fetched; the message says why, without the URL."""


class AddressError(UrlError):
    """The URL names an address that is not public."""


def address_problem(address: str, allow_loopback: bool = False) -> str | None:
    """Why an address (the text of an IPv4 or IPv6 address) is not public, None where it is.

    allow_loopback lets 127.0.0.0/8 and ::1 through and nothing else. A NAT64 address is judged by the IPv4 address
    inside; every other way to carry IPv4 in IPv6 is refused.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return f"{ascii(address[:80])} is no address"
    if allow_loopback and any(parsed.version == network.version and parsed in network for network in LOOPBACK):
        return None
    if isinstance(parsed, ipaddress.IPv4Address):
        return next((f"{address} is {kind}" for network, kind in NOT_PUBLIC_4 if parsed in network), None)
    if parsed.scope_id:
        return f"{address} is of one network interface"
    if parsed in NAT64:
        problem = address_problem(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
        return f"{address} leads to IPv4, where {problem}" if problem else None
    problem = next((f"{address} is {kind}" for network, kind in NOT_PUBLIC_6 if parsed in network), None)
    return problem or (None if parsed in GLOBAL_6 else f"{address} is reserved")


def checked_url(text: str, base: URL | None = None, allow_loopback: bool = False) -> URL:
    """The URL that may be asked for; a relative one (of a redirect) is joined to base. Raises UrlError.

    Refused: schemes other than http and https, user names and passwords, ports of other protocols, IPv4 addresses in
    any form but four plain decimal numbers, addresses that are not public. What a name resolves to is judged later.
    """
    text = text.strip()
    if not text or len(text) > MAX_URL:
        raise UrlError("is empty" if not text else f"is longer than {MAX_URL} characters")
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise UrlError("holds a control character")
    try:
        url = URL(text) if base is None else base.join(URL(text))
        host, port = url.raw_host, url.port
    except (ValueError, TypeError) as error:  # UnicodeError of an impossible name is a ValueError
        raise UrlError(f"cannot be read: {str(error)[:200]}") from error
    if url.scheme not in ("http", "https"):
        raise UrlError(f"has the scheme {ascii(url.scheme[:20])}, not http or https" if url.scheme else "has no scheme")
    if url.raw_user is not None or url.raw_password is not None:
        raise UrlError("holds a user name or a password")
    if not host or not host.strip("."):
        raise UrlError("has no host")
    if not HOST.fullmatch(host):
        raise UrlError(f"has the host {ascii(host[:80])}, which no name can be")
    if port in BLOCKED_PORTS:
        raise UrlError(f"has port {port}, which is of another protocol")
    last = host.rstrip(".").rpartition(".")[2]
    if ":" not in host and NUMBER.fullmatch(last) and not PLAIN_IPV4.fullmatch(host):
        raise UrlError("has an IPv4 address in an unusual form")
    if ":" in host or PLAIN_IPV4.fullmatch(host):
        problem = address_problem(host, allow_loopback)
        if problem:
            raise AddressError(problem)
    return url
