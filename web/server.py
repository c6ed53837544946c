"""A small web server: it answers one page, and requests in JSON by calling methods of an application.

Python's own ThreadingHTTPServer does what a room of raters needs, a thread for each connection, without a
further dependency. What it does not do stands here: limits, a password, and refusing what other sites send.
"""
import base64
import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import socket
import sqlite3
import sys
import threading
import time
import traceback
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from data.errors import InputError

PAGE = (Path(__file__).parent / "page.html").read_bytes()
MOST_BYTES = 64 * 1024  # of a request
MOST_READ = 32 * 2**20  # of a request that is too long: reading it first lets the answer arrive
RATE, BURST = 10, 40  # requests a second of one rater, on average and at once
COOKIE = re.compile(r"(?:^|;) ?rater=([\w-]{20,64})(?:;|$)")


class Refused(Exception):
    """An answer other than 200, with a message for the person at the page."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def allow_own_code(page):
    """A content security policy under which only the page's own script and style are used."""
    def hashes(tag):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in found]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


HEADERS = {
    "Content-Security-Policy": allow_own_code(PAGE), "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


class Server(ThreadingHTTPServer):
    """`application` has to be set before it serves: its `get` and `post` are {path: method(rater, values)}.

    A method returns what becomes JSON, or for a stream of server-sent events an iterator of (id, what becomes
    JSON). It may raise Refused.
    """
    request_queue_size = 256  # connections that wait to be accepted
    daemon_threads = True

    def __init__(self, host, port, password=None):
        self.application, self.password = None, password
        try:
            self.on_loopback = ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
            if not self.on_loopback and not password:
                raise InputError(f"--host {host}: others could reach the arena; give a --password")
            self.limits, self.limits_lock = {}, threading.Lock()
            super().__init__((host, port), Handler)
        except OSError as error:
            raise InputError(f"--host {host} --port {port}: cannot serve there ({error.strerror}); give "
                             "another --port or --host") from None

    def check_rate(self, rater):
        """Raise Refused if this rater has sent too many requests lately."""
        with self.limits_lock:
            if len(self.limits) > 10_000:
                self.limits.clear()
            allowance, since = self.limits.get(rater, (BURST, time.monotonic()))
            time_now = time.monotonic()
            allowance = min(BURST, allowance + RATE * (time_now - since))
            self.limits[rater] = max(0, allowance - 1), time_now
        if allowance < 1:
            raise Refused(HTTPStatus.TOO_MANY_REQUESTS, "Too many requests; wait a moment.")

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # which means a broken connection; the page asks again
            traceback.print_exc()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "arena", ""
    timeout = 60  # seconds that a connection may be silent
    disable_nagle_algorithm = True

    def do_GET(self):
        self.respond(self.server.application.get)

    def do_POST(self):
        self.respond(self.server.application.post)

    def log_message(self, form, *values):
        pass  # nobody's address is written anywhere

    def respond(self, methods):
        """Answer a request. Whatever goes wrong is said in JSON: {"error": message}."""
        self.new_cookie = None
        try:
            status, answer = HTTPStatus.OK, self.answer(methods)
        except Refused as refusal:
            status, answer = refusal.status, {"error": str(refusal)}
        except sqlite3.Error as error:
            traceback.print_exc()
            status, why = HTTPStatus.INSUFFICIENT_STORAGE, f"the database cannot be written ({error})"
            answer = {"error": f"Nothing was stored: {why}. Try again later."}
        except OSError:  # the connection broke
            raise
        except Exception:
            traceback.print_exc()
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            answer = {"error": "Something went wrong. Try again."}
        if hasattr(answer, "__next__"):
            self.send_events(answer)
        elif answer is PAGE:
            self.send(status, PAGE, "text/html; charset=utf-8")
        else:
            self.send(status, json.dumps(answer).encode(), "application/json")

    def answer(self, methods):
        """What is sent: PAGE, what becomes JSON, or an iterator of events."""
        body = self.read_body()
        self.check_sender()
        url = urlsplit(self.path)
        if self.command == "GET" and url.path in ("/", "/results"):
            self.rater(create=True)
            return PAGE
        if url.path not in methods:
            raise Refused(HTTPStatus.NOT_FOUND, "There is no such page.")
        rater = self.rater()
        self.server.check_rate(rater)
        values = dict(parse_qsl(url.query)) if self.command == "GET" else self.parse(body)
        if last_event := self.headers.get("Last-Event-ID"):
            values["last_event"] = last_event
        return methods[url.path](rater, values)

    def read_body(self):
        """The content of a request. One that is too long is read and refused, as closing the connection at
        once would hide the answer."""
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "Send the length of the request.")
        length = self.headers.get("Content-Length", "0")
        if not re.fullmatch("[0-9]{1,15}", length):
            self.close_connection = True
            raise Refused(HTTPStatus.BAD_REQUEST, "The length of the request is no number.")
        length = int(length)
        if length <= MOST_BYTES:
            return self.rfile.read(length)
        self.close_connection = True
        for _ in range(min(length, MOST_READ) // MOST_BYTES):
            if not self.rfile.read(MOST_BYTES):
                break
        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                      f"This is too long: a request may have {MOST_BYTES // 1024} kB.")

    def check_sender(self):
        """Refuse who does not know the password, and what a page of another site sends."""
        server, given = self.server, self.headers.get("Authorization", "")
        host = self.headers.get("Host", "")
        # Without a password a page of another site could pretend to be this one, by a name of its own for this
        # address. With one it lacks the password, so a proxy may stand before the arena.
        own_names = ("localhost", "127.0.0.1", server.server_address[0])
        if server.on_loopback and not server.password and host.rsplit(":", 1)[0] not in own_names:
            raise Refused(HTTPStatus.FORBIDDEN, "Open the arena as localhost or 127.0.0.1.")
        if self.headers.get("Origin") not in (None, f"http://{host}", f"https://{host}"):
            raise Refused(HTTPStatus.FORBIDDEN, "This request comes from another site.")
        is_json = self.headers.get("Content-Type", "").partition(";")[0] == "application/json"
        if self.command == "POST" and not is_json:
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Requests are JSON.")
        if server.password:
            wanted = "Basic " + base64.b64encode(f"rater:{server.password}".encode()).decode()
            if not hmac.compare_digest(given.encode(), wanted.encode()):
                time.sleep(0.5 if given else 0)  # so that guessing takes long
                raise Refused(HTTPStatus.UNAUTHORIZED, "Give the name rater and the arena's password.")

    def rater(self, create=False):
        """The name of whoever sends this request: a hash of the random cookie that the page came with. So the
        database does not hold what one would need to vote in another's name."""
        if cookie := COOKIE.search(self.headers.get("Cookie", "")):
            return hashlib.sha256(cookie[1].encode()).hexdigest()[:12]
        if not create:
            raise Refused(HTTPStatus.FORBIDDEN, "Open the arena's page first, and allow its cookie.")
        self.new_cookie = secrets.token_urlsafe(24)

    def parse(self, body):
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):  # which covers bytes that are not UTF-8
            raise Refused(HTTPStatus.BAD_REQUEST, "This is not JSON in UTF-8.") from None
        if not isinstance(values, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "This is not a JSON object.")
        return values

    def send(self, status, content, kind):
        self.start_answer(status, kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def start_answer(self, status, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", 'Basic realm="arena"')
        if self.new_cookie:
            self.send_header("Set-Cookie", f"rater={self.new_cookie}; HttpOnly; SameSite=Lax; Path=/; "
                             "Max-Age=31536000")
        if self.close_connection:
            self.send_header("Connection", "close")

    def send_events(self, events):
        """Server-sent events, until there are no more; the browser asks again when the connection breaks."""
        self.close_connection = True
        self.start_answer(HTTPStatus.OK, "text/event-stream")
        self.end_headers()
        for number, event in events:
            self.wfile.write(f"id: {number}\ndata: {json.dumps(event)}\n\n".encode())
