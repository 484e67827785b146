"""A page to search by, for this machine alone: python retrieve.py --serve

Python's own http.server gives a browser page.html, and answers what that asks for:

    GET  /KEY/            the page                       POST /KEY/search   JSON in and out: {"text", "image", …}
    GET  /KEY/about       what is searched, and by what  POST /KEY/upload   an image → {"image": its name}
    GET  /KEY/image/7     image 7 as a JPEG, whatever    GET  /KEY/heat/3/7 where the model looked in image 7, for
                          it is; thumb/7 a small one                        question 3

Other machines, other users of this one, and other pages that the browser has open must not reach it. It listens on
127.0.0.1 only. The printed address holds a KEY, drawn anew each time, without which nothing is answered. It answers
only if the request's Host is that address: a foreign name that is made to mean 127.0.0.1 (*DNS rebinding*) shows there.
It refuses what another page sends, which shows in Origin and Sec-Fetch-Site. Images are asked for by number, never by
path, and leave as JPEGs made here. What is uploaded is bounded, decoded as an image, kept in memory and forgotten. It
writes no file.
"""

import contextlib
import io
import json
import secrets
import sys
import threading
import webbrowser
from collections import OrderedDict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from archive import mixed
from errors import UserError, reason
from explain import explain
from files import parse_json
from images import load_image
from pictures import jpeg, overlay

PAGE = Path(__file__).with_name("page.html")
LARGEST_UPLOAD, LONGEST_QUESTION, REMEMBERED, MOST_FOUND = 20_000_000, 10_000, 50, 100
THUMB, WHOLE = 320, 1600  # pixels
RULES = (  # what the page may load: itself, and images of this server
    "default-src 'none'; img-src 'self' blob: data:; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Refused(Exception):
    """A request that is not answered, with its status and why."""

    def __init__(self, status, why):
        super().__init__(why)
        self.status = status


class Site:
    """What the page asks for. One question at a time uses the model."""

    def __init__(self, archive, about, vocabulary):
        """about: what the page should know at first, as archive.about gives it; vocabulary: archive.Vocabulary."""
        self.archive, self.vocabulary, self.lock = archive, vocabulary, threading.Lock()
        self.about = {**about, "groups": bool(archive.groups)}
        self.uploads, self.queries, self.count = OrderedDict(), OrderedDict(), 0
        labels = [sample.label for sample in archive.samples]
        self.rows = {name: torch.tensor([i for i, label in enumerate(labels) if label == name]) for name in set(labels)}

    def _remember(self, where, value):
        """→ the name of the value, which is forgotten when so many others have come."""
        self.count += 1
        where[str(self.count)] = value
        while len(where) > REMEMBERED:
            where.popitem(last=False)
        return str(self.count)

    def upload(self, content):
        try:
            embedding = self.archive.of_image(io.BytesIO(content))
        except UserError:
            raise Refused(HTTPStatus.BAD_REQUEST, "this is no image that can be read: JPEG, PNG, TIFF, …") from None
        return {"image": self._remember(self.uploads, embedding)}

    def search(self, asked):
        """{"text", "image": an upload's name, "like": the number of an image, "mix", "class", "top", "frames": whether
        to show all of a group}, all optional."""
        words, own = str(asked.get("text") or "").strip()[:LONGEST_QUESTION], None
        text = self.archive.of_text(words) if words else None
        image = None
        if asked.get("like") is not None:
            own = self.number(asked["like"])
            image = self.archive.gallery[own : own + 1].float()
        elif asked.get("image") is not None:
            image = self.uploads.get(str(asked["image"]))
            if image is None:
                raise Refused(HTTPStatus.GONE, "the image is forgotten; choose it again")
        if text is None and image is None:
            raise Refused(HTTPStatus.BAD_REQUEST, "type something to look for, or choose an image")
        mix, top = asked.get("mix", 0.5), asked.get("top", 20)
        if not isinstance(mix, (int, float)) or not 0 <= mix <= 1 or not isinstance(top, int) or top < 1:
            raise Refused(HTTPStatus.BAD_REQUEST, "mix is a number from 0 to 1, top a whole number")
        query, rows, label = mixed(text, image, mix), None, asked.get("class") or None
        if label is not None:
            if label not in self.archive.metadata.classes:
                raise Refused(HTTPStatus.BAD_REQUEST, "there is no such class")
            rows = self.rows.get(label, torch.empty(0, dtype=torch.int64))
        found = self.archive.search(query, min(top, MOST_FOUND), rows, asked.get("frames") is not True, own)
        shown = ("score", "class", "predicted", "probability", "captions", "group", "of_group", "copies")
        cards = [{"number": r["row"], "name": Path(r["image"]).name} | {key: r[key] for key in shown} for r in found]
        return {"query": self._remember(self.queries, query), "found": cards, "note": self.vocabulary.note(words)}

    def number(self, text):
        """→ the row of an image."""
        digits = str(text)
        if not (
            digits.isascii() and digits.isdecimal() and len(digits) < 12 and int(digits) < len(self.archive.samples)
        ):
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such image")
        return int(digits)

    def picture(self, number, side):
        file = self.archive.samples[self.number(number)].image
        return jpeg(load_image(file, side), side)

    def heat(self, query, number):
        if query not in self.queries:
            raise Refused(HTTPStatus.GONE, "the question is forgotten; ask it again")
        file = self.archive.samples[self.number(number)].image
        ((square, heat),) = explain(self.archive.model, [file], self.queries[query][0], self.archive.device)
        return jpeg(overlay(square.resize((THUMB, THUMB)), heat), THUMB)


class Handler(BaseHTTPRequestHandler):
    server_version, sys_version, protocol_version, timeout = "retrieve", "", "HTTP/1.1", 30

    def do_GET(self):
        self._answer(self._get)

    def do_POST(self):
        self._answer(self._post)

    def _get(self):
        site, path = self.server.site, self._path()
        kind, _, name = path.partition("/")
        if not path:
            return "text/html; charset=utf-8", PAGE.read_bytes()
        if path == "about":
            return _json(site.about)
        if kind in ("image", "thumb"):
            return "image/jpeg", site.picture(name, WHOLE if kind == "image" else THUMB)
        if kind == "heat":
            with site.lock:
                return "image/jpeg", site.heat(*name.partition("/")[::2])
        raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")

    def _post(self):
        site, path = self.server.site, self._path()
        most = {"upload": LARGEST_UPLOAD, "search": 10 * LONGEST_QUESTION}.get(path)
        if most is None:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        content = self._body(most)
        if path == "upload":
            with site.lock:
                return _json(site.upload(content))
        try:
            asked = parse_json(content.decode("utf-8"))
        except ValueError:
            asked = None
        if not isinstance(asked, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "this is no JSON object")
        with site.lock:
            return _json(site.search(asked))

    def _path(self):
        """→ what follows the key."""
        key, _, path = self.path.removeprefix("/").partition("/")
        if not secrets.compare_digest(key.encode("latin-1", "replace"), self.server.key.encode()):
            raise Refused(HTTPStatus.FORBIDDEN, "the address is not that which was printed")
        return path

    def _body(self, most):
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the length is missing")
        if len(length) > 12 or int(length) > most:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {most / 1e6:g} MB are not taken")
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            raise ConnectionError
        return content

    def _check_sender(self):
        """Raise Refused where the request is not from our own page."""
        port = self.server.server_address[1]
        hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost")]
        if self.headers.get_all("Host") not in ([host] for host in hosts):
            raise Refused(HTTPStatus.FORBIDDEN, "this page is for this machine alone")
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "none")
        foreign = site not in ("same-origin", "none") or (origin and origin not in [f"http://{host}" for host in hosts])
        if foreign:
            raise Refused(HTTPStatus.FORBIDDEN, "another page may not ask this")

    def _answer(self, work):
        status, kind = HTTPStatus.OK, "application/json"
        try:
            self._check_sender()
            kind, content = work()
        except Refused as problem:
            status, (kind, content) = problem.status, _json({"error": str(problem)})
        except UserError as problem:
            status, (kind, content) = HTTPStatus.INTERNAL_SERVER_ERROR, _json({"error": str(problem)})
        except (ConnectionError, TimeoutError):  # the browser has left
            self.close_connection = True
            return
        if status != HTTPStatus.OK:
            self.close_connection = True  # there may be more to come, which nobody will read
        try:
            self.send_response(status)
            headers = {"Content-Type": kind, "Content-Length": len(content), "Cache-Control": "no-store"}
            headers |= {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": RULES}
            headers |= {"Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "no-referrer"}
            headers |= {"Connection": "close"} if self.close_connection else {}
            for name, value in headers.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def log_message(self, *_):
        """Be silent."""


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def __init__(self, site):
        super().__init__(("127.0.0.1", 0), Handler)
        self.site, self.key = site, secrets.token_urlsafe(16)
        self.address = f"http://127.0.0.1:{self.server_address[1]}/{self.key}/"

    def handle_error(self, request, address):
        problem = sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1]
        if not isinstance(problem, (ConnectionError, TimeoutError)):
            print(f"note: a request was not answered ({reason(problem)})", file=sys.stderr)


def _json(value):
    return "application/json", json.dumps(value).encode()


def serve(site, open_page):
    """Answer until Ctrl-C. open_page: show it in the user's browser."""
    with Server(site) as server, contextlib.suppress(KeyboardInterrupt):
        print(f"search at {server.address} until Ctrl-C", flush=True)
        if open_page:
            threading.Thread(target=webbrowser.open, args=(server.address,), daemon=True).start()
        server.serve_forever()
