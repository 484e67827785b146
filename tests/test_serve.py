"""The page that one searches: in a real browser, and against those who should get nothing from it."""

import http.client
import io
import json
import os
import shutil
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch
from conftest import mistake
from PIL import Image
from test_report import browser, needs_browser  # noqa: F401, a fixture

import retrieve
import serve
from archive import Archive, Vocabulary, about, mixed
from build import load_run
from index import index_images
from runs import finished
from serve import LARGEST_UPLOAD, Server, Site
from split_file import trained_captions
from trust import find_samples

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def site(trained, tmp_path_factory):
    run = tmp_path_factory.mktemp("served") / "run"
    shutil.copytree(trained, run)
    model, tokenizer, metadata = load_run(run, CPU)
    samples = {sample.image: sample for sample in find_samples(None, metadata, run)}
    files, gallery, _ = index_images(run, model, list(samples), CPU, 8, 0)
    archive = Archive(model, tokenizer, metadata, [samples[file] for file in files], gallery, CPU)
    header = {**about(run, metadata, len(files), finished(run)), "top": 20, "per_group": True}
    made = Site(archive, header, Vocabulary(metadata, trained_captions(run)))
    with Server(made) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        made.port, made.key = server.server_address[1], server.key
        yield made
        server.shutdown()


def ask(site, method, path, body=None, **headers):
    """→ status, content, headers"""
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
    try:
        connection.request(
            method, f"/{site.key}{path}", body, {key.replace("_", "-"): value for key, value in headers.items()}
        )
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


def search(site, **asked):
    status, content, _ = ask(site, "POST", "/search", json.dumps(asked))
    return status, json.loads(content)


def png(size=(40, 40), colour="red"):
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def test_a_search_finds_what_retrieve_finds(site, script, trained, tmp_path):
    status, out, err = script(retrieve, "--run", trained, "--text", "a red shape", "--json", "--top", 5)
    assert status == 0, err
    expected = json.loads(out)
    status, answer = search(site, text="a red shape", top=5)
    assert status == 200
    assert [card["score"] for card in answer["found"]] == pytest.approx([r["score"] for r in expected], abs=2e-4)
    for card, result in zip(answer["found"], expected, strict=True):
        assert site.archive.samples[card["number"]].label == card["class"]
        assert card["name"] == Path(site.archive.samples[card["number"]].image).name and "/" not in card["name"]
        assert card["predicted"] in site.archive.metadata.classes and result["rank"] > 0


def test_more_like_this_leaves_the_image_itself_out(site):
    for number in (0, 5):
        _, answer = search(site, like=number, top=100)
        own = site.archive.samples[number].group
        assert own not in {card["group"] for card in answer["found"]} and len(answer["found"]) == 8  # other groups
        _, answer = search(site, like=number, top=100, frames=True)
        assert len(answer["found"]) == 16


def test_a_class_can_be_asked_for(site):
    label = site.archive.metadata.classes[1]
    _, answer = search(site, text="shape", frames=True, **{"class": label})
    assert len(answer["found"]) == 6 and {card["class"] for card in answer["found"]} == {label}
    for odd in ("none", ["a"], 5, {}):
        assert search(site, text="shape", **{"class": odd})[0] == (200 if odd == {} else 400)


def test_a_class_without_images_finds_none(site, monkeypatch):
    label = site.archive.metadata.classes[0]
    monkeypatch.delitem(site.rows, label)
    assert search(site, text="shape", **{"class": label}) == (200, {"query": ANY, "found": [], "note": ""})


def test_words_that_are_new_are_named(site):
    assert search(site, text="a red shape")[1]["note"] == ""
    note = search(site, text="a purring cat")[1]["note"]
    assert note == "training never saw: purring, cat; the base model may know them"


def test_an_upload_is_searched_by_and_mixed(site):
    file = site.archive.samples[3].image
    _, content, _ = ask(site, "POST", "/upload", file.read_bytes())
    name = json.loads(content)["image"]
    _, alone = search(site, image=name, frames=True)
    assert alone["found"][0]["number"] == 3 and alone["found"][0]["score"] > 0.999
    _, text = search(site, text="a green shape", frames=True)
    for mix, expected in ((0, alone), (1, text)):
        _, answer = search(site, image=name, text="a green shape", mix=mix, frames=True)
        assert [card["score"] for card in answer["found"]] == pytest.approx(
            [card["score"] for card in expected["found"]], abs=1e-3
        )
    query = mixed(site.archive.of_text("a green shape"), site.archive.of_image(file), 0.5)
    _, answer = search(site, image=name, text="a green shape")
    assert answer["found"][0]["score"] == pytest.approx(site.archive.search(query, 1)[0]["score"], abs=1e-3)
    assert search(site, image="999999")[0] == 410


def test_pictures_and_maps_are_jpegs(site):
    _, answer = search(site, text="a red shape")
    for path in ("/image/0", "/thumb/0", f"/heat/{answer['query']}/0"):
        status, content, headers = ask(site, "GET", path)
        assert status == 200 and headers["Content-Type"] == "image/jpeg" and headers["Cache-Control"] == "no-store"
        assert Image.open(io.BytesIO(content)).format == "JPEG"
    assert ask(site, "GET", "/heat/none/0")[0] == 410


def test_only_so_much_is_remembered(site, monkeypatch):
    monkeypatch.setattr(serve, "REMEMBERED", 3)
    queries = [search(site, text=f"shape {i}")[1]["query"] for i in range(5)]
    assert [ask(site, "GET", f"/heat/{query}/0")[0] for query in queries] == [410, 410, 200, 200, 200]


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


PATHS = """/../../etc/passwd /image/../../etc/passwd /image/%2e%2e%2fetc%2fpasswd /thumb//etc/passwd /image/-1
    /image/1e3 /image/99999999999999999999 /image/%D9%A3 /page.html /serve.py /image/ /heat/1/x"""


@pytest.mark.parametrize("path", PATHS.split())
def test_nothing_but_its_images_is_given(site, path):
    assert ask(site, "GET", path)[0] in (404, 410)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "[::1]:{port}", ""]
)
def test_another_host_gets_nothing(site, host):
    for method, path in (("GET", "/"), ("GET", "/about"), ("POST", "/search")):
        status, content, _ = ask(site, method, path, "{}", Host=host.format(port=site.port))
        assert status == 403 and b"for this machine alone" in content


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"}]
)
def test_another_page_gets_nothing(site, headers):
    for method, path in (("GET", "/thumb/0"), ("POST", "/upload"), ("POST", "/search")):
        status, _, answered = ask(site, method, path, png(), **headers)
        assert status == 403 and "Access-Control-Allow-Origin" not in answered
    own = {"Origin": f"http://127.0.0.1:{site.port}", "Sec_Fetch_Site": "same-origin"}
    assert ask(site, "GET", "/thumb/0", **own)[0] == 200


def test_without_the_key_nothing_is_given(site):
    """Another user of the same machine knows the port at most."""
    for path in ("/", "/about", "/thumb/0", f"/{site.key[:-1]}/thumb/0", f"/x{site.key}/", "//thumb/0", "/%00/"):
        connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=10)
        connection.request("GET", path)
        assert connection.getresponse().status == 403
        connection.close()
    assert len(site.key) > 20


def test_it_listens_on_this_machine_only(site):
    with pytest.raises(OSError), socket.create_connection((socket.gethostbyname(socket.gethostname()), site.port), 2):
        if socket.gethostbyname(socket.gethostname()).startswith("127."):
            raise OSError("the machine's name is its loopback address")


def test_a_large_upload_is_refused_unread(site):
    for length in (LARGEST_UPLOAD + 1, 100_000_000, 10**30):
        with socket.create_connection(("127.0.0.1", site.port), 10) as client:
            head = (
                f"POST /{site.key}/upload HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nContent-Length: {length}\r\n\r\n"
            )
            client.sendall(head.encode())
            assert b"413" in client.recv(100)
    assert ask(site, "POST", "/search", b" " * 200_000)[0] == 413
    for bad in ("-5", "x", "1_0"):
        assert ask(site, "POST", "/upload", None, Content_Length=bad)[0] == 411


def test_a_decompression_bomb_is_refused(site):
    """A PNG of a few kilobytes that says it has 900 million pixels, and one that really has them, black."""
    raw = zlib.compress(b"\0" * 3_000_000)

    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    head = (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", raw) + chunk(b"IEND", b"")
    started = time.monotonic()
    assert ask(site, "POST", "/upload", bomb)[0] == 400
    assert time.monotonic() - started < 30
    for content in (b"", b"no image", png()[:50], b"<svg/>"):
        status, answer, _ = ask(site, "POST", "/upload", content)
        assert status == 400 and b"no image that can be read" in answer


BODIES = r"""[] { \xff {"text":5,"mix":"x"} {"text":"a","mix":2} {"like":"../x"} {"like":-1} {"text":"a","top":0}
    {"text":"a","top":"x"} {"text":""} {"image":{}} {"text":NaN}"""


@pytest.mark.parametrize("body", ["", *BODIES.split()])
def test_odd_questions_are_answered_in_words(site, body):
    status, content, _ = ask(site, "POST", "/search", body.encode("latin-1").replace(b"\\xff", b"\xff"))
    assert 400 <= status < 500 and len(json.loads(content)["error"]) > 10


def test_a_page_may_load_nothing_from_elsewhere(site):
    status, content, headers = ask(site, "GET", "/")
    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
    assert b"http" not in content


def test_fifty_at_once_are_all_answered(site):
    def one(i):
        return ask(site, "GET", f"/thumb/{i % 5}")[0] if i % 2 else search(site, text=f"shape {i}")[0]

    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(one, range(50))) == [200] * 50


def test_browsers_that_leave_do_no_harm(site, capsys):
    head = f"Host: 127.0.0.1:{site.port}\r\n"
    for request in (
        f"POST /{site.key}/upload HTTP/1.1\r\n{head}Content-Length: 5000\r\n\r\nabc",
        f"GET /{site.key}/image/0 HTTP/1.1\r\n{head}\r\n",
        "GET / HT",
        "\0\0\0",
    ):
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", site.port), 10) as client:
                client.sendall(request.encode())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset, not closed
    time.sleep(0.3)
    assert ask(site, "GET", "/about")[0] == 200
    assert capsys.readouterr().err == ""


def test_it_writes_nothing(site):
    run = next(iter(site.archive.samples)).image.parents[2]
    before = {path: path.stat().st_mtime for path in run.rglob("*")}
    temporary = set(os.listdir("/tmp"))
    ask(site, "POST", "/upload", png())
    search(site, text="red")
    assert {path: path.stat().st_mtime for path in run.rglob("*")} == before
    assert not {name for name in set(os.listdir("/tmp")) - temporary if "pytest" not in name and "bash" not in name}


def test_flags_that_make_no_sense_together(script, trained):
    assert "leave out the other ones" in mistake(script(retrieve, "--run", trained, "--serve", "--text", "x"))
    assert "--open has no effect" in mistake(script(retrieve, "--run", trained, "--text", "x", "--open"))


# ---------------------------------------------------------------------------------------------------------------------
# The browser


def until(page, condition):
    """Wait for a condition in JavaScript. Playwright's own way needs eval, which the page forbids."""
    started = time.monotonic()
    while not page.evaluate(condition):
        assert time.monotonic() - started < 30, condition
        time.sleep(0.05)


@needs_browser
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(site, browser, width, scheme, tmp_path):  # noqa: F811
    page, wrong = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), []
    own = f"http://127.0.0.1:{site.port}/{site.key}/"
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((own, "data:", "blob:")) else wrong.append(r.url))
    page.goto(own)
    until(page, "document.getElementById('about').textContent.includes('not a medical device')")
    assert "18 images" in page.inner_text("#about") and page.is_hidden("#mixing") and page.is_hidden("#example")

    def numbers():
        until(page, "document.getElementById('found').getAttribute('aria-busy') === 'false'")
        return page.eval_on_selector_all("article", "all => all.map(a => Number(a.dataset.number))")

    page.fill("#text", "a red shape")
    page.press("#text", "Enter")
    page.wait_for_selector("article")
    _, expected = search(site, text="a red shape")
    by_text = numbers()
    assert by_text == [card["number"] for card in expected["found"]]
    first = expected["found"][0]
    assert page.inner_text("article .class") == first["class"].replace("-", " ")
    until(page, "[...document.images].filter(i => i.src).every(i => i.complete && i.naturalWidth > 0)")

    # An image is dropped; the slider weighs it against the text.
    file = site.archive.samples[by_text[-1]].image
    content = list(file.read_bytes())
    page.evaluate(
        """content => { const data = new DataTransfer();
           data.items.add(new File([new Uint8Array(content)], "dropped.png", {type: "image/png"}));
           document.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true})); }""",
        content,
    )
    page.wait_for_selector("#example img")
    page.wait_for_selector("#mixing:not([hidden])")
    orders = []
    for mix in ("1", "0"):
        with page.expect_response("**/search"):
            page.locator("#mix").fill(mix)
            page.dispatch_event("#mix", "change")
        orders.append(numbers())
    assert orders[0] == by_text and orders[1] != by_text and orders[1][0] == by_text[-1]

    # Maps, the keyboard, the whole image, more like this, a class, no query.
    with page.expect_response("**/heat/**"):
        page.check("#heat")
    until(page, "[...document.querySelectorAll('article img')].every(i => i.naturalWidth > 0)")
    page.uncheck("#heat")
    page.press("#text", "ArrowDown")
    page.keyboard.press("ArrowRight")
    focused = page.evaluate("Number(document.activeElement.closest('article').dataset.number)")
    assert focused == orders[1][1]
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open] img")
    page.keyboard.press("Escape")
    with page.expect_response("**/search"):
        page.locator("article .more").first.click()
    assert orders[1][0] not in numbers() and page.input_value("#text") == ""
    with page.expect_response("**/search"):
        page.select_option("#class", site.archive.metadata.classes[0])
    until(page, "document.querySelectorAll('article').length <= 6")
    page.locator("#example button").click()
    until(page, "document.getElementById('state').textContent.startsWith('Type what')")
    assert page.locator("article").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not wrong

    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"no image"})
    page.wait_for_selector("#state.error")
    assert "no image that can be read" in page.inner_text("#state")
    page.close()
