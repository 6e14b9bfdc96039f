"""Ten thousand requests that are malformed or meant to harm: none breaks the server, none fills its memory."""

from __future__ import annotations

import base64
import gzip
import json
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import BadStatusLine, HTTPConnection
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tritonclient.http import InferenceServerClient

from addenda import FrozenBackbone
from addenda.serving.tensors import HEADER_LENGTH
from tests.support.inference import SIDE, client_at, images_of, infer, pictures, pixels, served_tasks
from tests.support.servers import ServedProcess

MALFORMED, HOSTILE = 10_000, 5_000
MOST_MORE_BYTES = 2**30
"""What a server may take beyond what it has after its first answer: an image of 49 million pixels, decoded, and copies
of it; and a body of 32 MiB as Python objects."""


def image_files() -> list[bytes]:
    """Valid files of every kind that is taken: colour models, transparency, animation, metadata."""
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 28, 3), dtype=np.uint8))
    exif, text = Image.Exif(), PngInfo()
    exif[0x0112], exif[0x010E] = 6, "hello"
    text.add_text("a", "b" * 100, zip=True)
    kinds: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("JPEG", colour, {"exif": exif}),
        ("JPEG", colour, {"progressive": True}),
        ("JPEG", colour.convert("CMYK"), {}),
        ("PNG", colour, {"exif": exif, "pnginfo": text, "icc_profile": b"x" * 200}),
        ("PNG", colour.convert("RGBA"), {}),
        ("PNG", colour.convert("P"), {"transparency": 3}),
        ("PNG", colour.convert("1"), {}),
        ("PNG", Image.fromarray(np.arange(672, dtype=np.uint16).reshape(24, 28)), {}),
        ("PNG", colour, {"save_all": True, "append_images": [colour.rotate(90)]}),
        ("WEBP", colour, {"exif": exif}),
        ("WEBP", colour.convert("RGBA"), {"lossless": True}),
        ("WEBP", colour, {"save_all": True, "append_images": [colour.rotate(90)]}),
    ]
    made = []
    for kind, picture, options in kinds:
        file = BytesIO()
        picture.save(file, kind, **options)
        made.append(file.getvalue())
    return made


def with_right_checksums(png: bytes) -> bytes:
    """A PNG file whose chunks' checksums fit again, so that a reader looks at what is in them."""
    made, at = bytearray(png[:8]), 8
    while at + 12 <= len(png):
        chunk = png[at + 4 : at + 8 + int.from_bytes(png[at : at + 4], "big")]
        made += png[at : at + 4] + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        at += 8 + len(chunk) + 4 if chunk else len(png)
    return bytes(made)


def mutated(random: Random, data: bytes) -> bytes:
    """Bytes cut off, flipped, overwritten with extremes, taken out or put in."""
    changed, at = bytearray(data), random.randrange(len(data))
    how = random.choice(("cut", "flip", "flip", "flip", "extreme", "remove", "insert"))
    if how == "cut":
        del changed[at:]
    elif how == "flip":
        for _ in range(random.choice((1, 1, 2, 4, 16))):
            changed[random.randrange(min(len(data), random.choice((40, 200, len(data)))))] ^= 1 << random.randrange(8)
    elif how == "extreme":
        changed[at : at + 4] = random.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"99e9", b"[[[["))
    elif how == "remove":
        del changed[at : at + random.randrange(1, 64)]
    else:
        changed[at:at] = random.randbytes(random.randrange(1, 64))
    return bytes(changed)


def png_of(width: int, height: int) -> bytes:
    """A PNG file whose head says a size, and whose pixels are zeros of as many bytes as fit into a small file."""
    rows = zlib.compress(bytes(min(height * (1 + 3 * width), 2**28)), 9)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


Asked = tuple[bytes, dict[str, str]]


def asked_in_binary(files: Sequence[bytes]) -> Asked:
    body, length = InferenceServerClient.generate_request_body([images_of(files)])
    return body, {HEADER_LENGTH: str(length)}


def asked_in_json(**members: Any) -> Asked:
    return json.dumps(members).encode(), {}


def bombs() -> list[Asked]:
    """Small requests that would be large where they are believed."""
    one = {"name": "pixel_values", "shape": [1, 3, SIDE, SIDE], "datatype": "FP32", "data": [0.0]}
    lists: list[Any] = [[0.0]]
    for _ in range(150):
        lists = [lists]
    made = [
        asked_in_binary([png_of(*size)]) for size in ((100_000, 100_000), (7000, 7000), (1, 40_000_000), (2**31 - 1, 1))
    ]
    made += [
        asked_in_json(inputs=[{**one, "shape": shape}]) for shape in ([2**31] * 8, [10**300], [1] * 10_000, [2**31, 0])
    ]
    made += [
        asked_in_json(inputs=[{**one, "data": lists}]),
        asked_in_json(inputs=[{**one, "data": ["x" * 10**6, *[0.0] * 3071]}]),
        asked_in_json(inputs=[{**one, "data": [10**300] * 3072}]),
        asked_in_json(inputs=[one] * 10_000),
        asked_in_json(inputs=[{"name": str(i)} for i in range(10_000)]),
        asked_in_json(inputs=[one], outputs=[{"name": str(i)} for i in range(10_000)]),
        (b"[" * 10**6, {}),
        (b'{"inputs":[' + b"{}," * 10**6, {}),
        (b'{"inputs":[' + b"1," * 5 * 10**6, {}),
        (b'{"inputs":[' + b"9" * 10**6, {}),
        (b"\x01\x00\x00\x00" * 10**6, {HEADER_LENGTH: "999999999999999999999"}),
        (gzip.compress(bytes(10**8), 9), {"Content-Encoding": "gzip"}),
        (gzip.compress(b"[" * (31 * 2**20), 9), {"Content-Encoding": "gzip"}),
        (zlib.compress(bytes(10**8), 9), {"Content-Encoding": "deflate"}),
        (b"not deflated", {"Content-Encoding": "deflate"}),
        (b"{}", {"Content-Encoding": "br"}),
    ]  # fmt: skip
    return made


def malformed(random: Random, count: int) -> Iterator[Asked]:
    """Requests that are valid but for what was done to a file, the body or a header; every bomb in between."""
    files = image_files()
    encoded = [base64.b64encode(file).decode() for file in files]
    bodies = [
        asked_in_binary(files[:2]),
        asked_in_json(
            id="x",
            inputs=[{"name": "image", "shape": [2], "datatype": "BYTES", "data": encoded[:2]}],
            outputs=[{"name": "digits.logits", "parameters": {"binary_data": True}}],
            parameters={"timeout": 10**7, "tasks": "digits"},
        ),
        asked_in_json(inputs=pixels(0.5)),
    ]
    threats = bombs()
    every = count // len(threats)
    for number in range(count):
        if number % every == 0 and threats:
            yield threats.pop()
        elif random.random() < 0.6:
            file = mutated(random, random.choice(files))
            is_png = file.startswith(b"\x89PNG") and random.random() < 0.8
            yield asked_in_binary([with_right_checksums(file) if is_png else file])
        else:
            body, headers = random.choice(bodies)
            length = headers.get(HEADER_LENGTH)
            if length is not None and random.random() < 0.3:
                yield body, {HEADER_LENGTH: str(int(length) + random.choice((-1, 1, 10**6, -int(length), 7)))}
            elif length is not None and random.random() < 0.7:
                head = mutated(random, body[: int(length)])
                yield head + body[int(length) :], {HEADER_LENGTH: str(len(head))}
            else:
                yield mutated(random, body), headers


Sent = tuple[str, str, bytes, dict[str, str]]


def hostile(random: Random, count: int) -> Iterator[Sent]:
    """Requests of every route and method, real and made up, with names, headers and bodies that nobody would send."""
    names = [
        "digits",
        "strokes",
        "auto",
        "combined",
        "x" * 4000,
        "..%2f..%2fetc",
        "%00",
        "a%0d%0ab",
        "%ff",
        "'; DROP",
        "{}",
    ]
    paths = ["/", "/livez", "/readyz", "/metrics", "/openapi.json", "/{}", "/static/{}", "/tasks/{}"]
    paths += [f"/api/v1/{one}" for one in ("status", "tasks", "verifications", "predict")]
    paths += [f"/api/v1/tasks/{{}}{one}" for one in ("", "/versions", "/lineage", "/aliases/{}", "/versions/{}")]
    paths += ["/api/v1/tasks/{}/versions/{}/artifact", "/v2", "/v2/repository/index", "/v2/health/ready"]
    paths += [f"/v2/models/{{}}{one}" for one in ("", "/ready", "/infer", "/versions/{}/infer")]
    methods = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"]
    queries = [
        "",
        "",
        "?tasks={}",
        "?task={}&top=99999",
        "?limit=-1",
        "?before={}",
        "?since=now",
        "?name=*{}*&limit=1000",
    ]
    bodies = [
        b"", b"{}", b"[" * 100_000, b'{"a":' * 50_000, b"\x80\x04\x95", random.randbytes(5000), b'{"version": 1e999}',
        json.dumps({"version": 2**63}).encode(), b"\xff\xfe", pictures(1)[0],
    ]  # fmt: skip
    headers = [
        {}, {}, {"Content-Type": "multipart/form-data; boundary=x"}, {"Content-Encoding": "gzip"},
        {"If-Match": '"x"' * 500}, {"Idempotency-Key": "k" * 500}, {"X-Request-Id": "i" * 4000},
        {"Accept": "*/*" * 1000}, {"Range": "bytes=0-"},
        {"Expect": "100-continue"}, {HEADER_LENGTH: "-1"}, {"Cookie": "addenda_key=" + "c" * 3000},
        {"Authorization": "Bearer " + "b" * 3000}, {"Addenda-Timeout-Ms": "1"}, {"Content-Type": "application/json"},
    ]  # fmt: skip
    for number in range(count):
        method = f"MADE{number}" if number % 5 == 0 else random.choice(methods)
        path, query = random.choice(paths), random.choice(queries)
        name, other = (random.choice([*names, str(number), "1"]) for _ in range(2))
        target = f"{path.format(name, other)}{query.format(name)}".replace(" ", "%20")
        yield method, target, random.choice(bodies), random.choice(headers)


def resident_bytes(pid: int) -> int:
    """The most that a process has had in memory so far."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_five_thousand_hostile_requests_are_answered_and_nothing_grows(glyphs: FrozenBackbone, tmp_path: Path) -> None:
    served_tasks(glyphs, tmp_path / "tasks.db")
    statuses: Counter[int] = Counter()
    with ServedProcess(tmp_path / "tasks.db", tmp_path) as served, client_at(served) as client:
        infer(client, pictures(3))
        waiting, taking, sizes = hostile(Random(11), HOSTILE), threading.Lock(), []

        def series() -> int:
            return client.get("/metrics").text.count("\naddenda_requests_total{")

        def send() -> Counter[int]:
            found: Counter[int] = Counter()
            while True:
                with taking:
                    asked = next(waiting, None)
                    if asked is not None and len(sizes) < 2 and found.total() == HOSTILE // 16:
                        sizes.append((resident_bytes(served.process.pid), series()))
                if asked is None:
                    return found
                connection = HTTPConnection(served.url.removeprefix("http://"), timeout=60)
                method, target, body, headers = asked
                try:
                    connection.request(method, target, body, headers)
                    answer = connection.getresponse()
                    told = answer.read() if "events" not in target else b""
                    found[answer.status] += 1
                    assert answer.status < 500 or answer.status in (503, 504), (asked, told)
                except (ConnectionError, BadStatusLine):
                    found[0] += 1  # hung up on: the head was no HTTP
                finally:
                    connection.close()

        with ThreadPoolExecutor(8) as senders:
            for sent in [senders.submit(send) for _ in range(8)]:
                statuses += sent.result()
        (half_bytes, half_series), (end_bytes, end_series) = sizes[0], (resident_bytes(served.process.pid), series())
        assert served.process.poll() is None
        assert client.get("/readyz").status_code == 200
    assert statuses.total() == HOSTILE
    assert statuses[0] < HOSTILE / 10
    assert {200, 400, 404, 405, 422} <= statuses.keys()
    assert end_bytes - half_bytes < 2**26, "the second half took more than the first"
    assert end_series <= half_series + 40, "so many more routes and statuses, and not one for each request"
    assert "traceback" not in served.log.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_ten_thousand_malformed_requests_neither_break_nor_fill_the_server(
    glyphs: FrozenBackbone, tmp_path: Path
) -> None:
    statuses: Counter[int] = Counter()
    served_tasks(glyphs, tmp_path / "tasks.db")
    with ServedProcess(tmp_path / "tasks.db", tmp_path) as served, client_at(served) as client:
        good = pictures(3)
        first = infer(client, good)
        before = resident_bytes(served.process.pid)
        waiting, taking = malformed(Random(7), MALFORMED), threading.Lock()

        def send() -> Counter[int]:
            found: Counter[int] = Counter()
            connection = HTTPConnection(served.url.removeprefix("http://"))  # far quicker than a friendlier client
            while True:
                with taking:
                    asked = next(waiting, None)
                if asked is None:
                    connection.close()
                    return found
                connection.request("POST", "/v2/models/combined/infer", *asked)
                answer = connection.getresponse()
                told = answer.read()
                found[answer.status] += 1
                assert answer.status < 500, told
                assert answer.status == 200 or json.loads(told)["detail"]

        with ThreadPoolExecutor(8) as senders:  # so many pass the model together
            for sent in [senders.submit(send) for _ in range(8)]:
                statuses += sent.result()
        assert served.process.poll() is None
        assert resident_bytes(served.process.pid) - before < MOST_MORE_BYTES
        again = infer(client, good)
        for output in first.get_response()["outputs"]:
            one, other = (answer.as_numpy(output["name"]) for answer in (first, again))
            assert one.tobytes() == other.tobytes() if one.dtype == np.float32 else one.tolist() == other.tolist()
    assert statuses.total() == MALFORMED
    assert {200, 400, 413, 415} <= statuses.keys() <= {200, 400, 404, 413, 415}
    assert statuses[400] > MALFORMED / 2
    assert "traceback" not in served.log.read_text()
