"""Malformed and hostile requests: none crashes the server or exhausts its memory."""

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
MAX_GROWTH_BYTES = 2**30
"""Memory that a server may use beyond that after its first prediction: a decoded image of 49 million pixels and copies
of it, and a body of 32 MiB as Python objects."""


def image_files() -> list[bytes]:
    """Valid files of all supported kinds: colour models, transparency, animation, metadata."""
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
    files = []
    for kind, picture, options in kinds:
        file = BytesIO()
        picture.save(file, kind, **options)
        files.append(file.getvalue())
    return files


def with_right_checksums(png: bytes) -> bytes:
    """A PNG file with corrected chunk checksums, so that a reader parses the chunks."""
    fixed, at = bytearray(png[:8]), 8
    while at + 12 <= len(png):
        chunk = png[at + 4 : at + 8 + int.from_bytes(png[at : at + 4], "big")]
        fixed += png[at : at + 4] + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        at += 8 + len(chunk) + 4 if chunk else len(png)
    return bytes(fixed)


def mutated(random: Random, data: bytes) -> bytes:
    """Truncates, flips, overwrites, removes or inserts bytes."""
    changed, at = bytearray(data), random.randrange(len(data))
    mutation = random.choice(("cut", "flip", "flip", "flip", "extreme", "remove", "insert"))
    if mutation == "cut":
        del changed[at:]
    elif mutation == "flip":
        for _ in range(random.choice((1, 1, 2, 4, 16))):
            changed[random.randrange(min(len(data), random.choice((40, 200, len(data)))))] ^= 1 << random.randrange(8)
    elif mutation == "extreme":
        changed[at : at + 4] = random.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"99e9", b"[[[["))
    elif mutation == "remove":
        del changed[at : at + random.randrange(1, 64)]
    else:
        changed[at:at] = random.randbytes(random.randrange(1, 64))
    return bytes(changed)


def png_of(width: int, height: int) -> bytes:
    """A PNG file with a declared size and as many zero bytes as compress into a small file."""
    rows = zlib.compress(bytes(min(height * (1 + 3 * width), 2**28)), 9)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


Request = tuple[bytes, dict[str, str]]
"""Body and headers."""


def binary_request(files: Sequence[bytes]) -> Request:
    body, length = InferenceServerClient.generate_request_body([images_of(files)])
    return body, {HEADER_LENGTH: str(length)}


def json_request(**members: Any) -> Request:
    return json.dumps(members).encode(), {}


def bombs() -> list[Request]:
    """Small requests that declare or decompress to something large."""
    pixels_input = {"name": "pixel_values", "shape": [1, 3, SIDE, SIDE], "datatype": "FP32", "data": [0.0]}
    lists: list[Any] = [[0.0]]
    for _ in range(150):
        lists = [lists]
    requests = [
        binary_request([png_of(*size)]) for size in ((100_000, 100_000), (7000, 7000), (1, 40_000_000), (2**31 - 1, 1))
    ]
    requests += [
        json_request(inputs=[{**pixels_input, "shape": shape}])
        for shape in ([2**31] * 8, [10**300], [1] * 10_000, [2**31, 0])
    ]
    requests += [
        json_request(inputs=[{**pixels_input, "data": lists}]),
        json_request(inputs=[{**pixels_input, "data": ["x" * 10**6, *[0.0] * 3071]}]),
        json_request(inputs=[{**pixels_input, "data": [10**300] * 3072}]),
        json_request(inputs=[pixels_input] * 10_000),
        json_request(inputs=[{"name": str(i)} for i in range(10_000)]),
        json_request(inputs=[pixels_input], outputs=[{"name": str(i)} for i in range(10_000)]),
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
    return requests


def malformed(random: Random, count: int) -> Iterator[Request]:
    """Valid requests with a mutated file, body or header; all bombs in between."""
    files = image_files()
    encoded = [base64.b64encode(file).decode() for file in files]
    bodies = [
        binary_request(files[:2]),
        json_request(
            id="x",
            inputs=[{"name": "image", "shape": [2], "datatype": "BYTES", "data": encoded[:2]}],
            outputs=[{"name": "digits.logits", "parameters": {"binary_data": True}}],
            parameters={"timeout": 10**7, "tasks": "digits"},
        ),
        json_request(inputs=pixels(0.5)),
    ]
    remaining_bombs = bombs()
    interval = count // len(remaining_bombs)
    for number in range(count):
        if number % interval == 0 and remaining_bombs:
            yield remaining_bombs.pop()
        elif random.random() < 0.6:
            file = mutated(random, random.choice(files))
            is_png = file.startswith(b"\x89PNG") and random.random() < 0.8
            yield binary_request([with_right_checksums(file) if is_png else file])
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


HttpRequest = tuple[str, str, bytes, dict[str, str]]
"""Method, target, body and headers."""


def hostile(random: Random, count: int) -> Iterator[HttpRequest]:
    """Requests of every route and method, real and invented, with hostile names, headers and bodies."""
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
    paths += [f"/api/v1/{path}" for path in ("status", "tasks", "verifications", "predict")]
    paths += [f"/api/v1/tasks/{{}}{path}" for path in ("", "/versions", "/lineage", "/aliases/{}", "/versions/{}")]
    paths += ["/api/v1/tasks/{}/versions/{}/artifact", "/v2", "/v2/repository/index", "/v2/health/ready"]
    paths += [f"/v2/models/{{}}{path}" for path in ("", "/ready", "/infer", "/versions/{}/infer")]
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
    """The peak resident memory of a process."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_five_thousand_hostile_requests_get_responses_without_memory_growth(
    glyphs: FrozenBackbone, tmp_path: Path
) -> None:
    served_tasks(glyphs, tmp_path / "tasks.db")
    statuses: Counter[int] = Counter()
    with ServedProcess(tmp_path / "tasks.db", tmp_path) as served, client_at(served) as client:
        infer(client, pictures(3))
        requests, lock, sizes = hostile(Random(11), HOSTILE), threading.Lock(), []

        def series() -> int:
            return client.get("/metrics").text.count("\naddenda_requests_total{")

        def send() -> Counter[int]:
            counts: Counter[int] = Counter()
            while True:
                with lock:
                    request = next(requests, None)
                    if request is not None and len(sizes) < 2 and counts.total() == HOSTILE // 16:
                        sizes.append((resident_bytes(served.process.pid), series()))
                if request is None:
                    return counts
                connection = HTTPConnection(served.url.removeprefix("http://"), timeout=60)
                method, target, body, headers = request
                try:
                    connection.request(method, target, body, headers)
                    response = connection.getresponse()
                    content = response.read() if "events" not in target else b""
                    counts[response.status] += 1
                    assert response.status < 500 or response.status in (503, 504), (request, content)
                except (ConnectionError, BadStatusLine):
                    counts[0] += 1  # disconnected: the headers were not valid HTTP
                finally:
                    connection.close()

        with ThreadPoolExecutor(8) as senders:
            for future in [senders.submit(send) for _ in range(8)]:
                statuses += future.result()
        (half_bytes, half_series), (end_bytes, end_series) = sizes[0], (resident_bytes(served.process.pid), series())
        assert served.process.poll() is None
        assert client.get("/readyz").status_code == 200
    assert statuses.total() == HOSTILE
    assert statuses[0] < HOSTILE / 10
    assert {200, 400, 404, 405, 422} <= statuses.keys()
    assert end_bytes - half_bytes < 2**26, "the second half used more memory than the first"
    assert end_series <= half_series + 40, "new combinations of route and status, but not one per request"
    assert "traceback" not in served.log.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_ten_thousand_malformed_requests_neither_crash_the_server_nor_exhaust_its_memory(
    glyphs: FrozenBackbone, tmp_path: Path
) -> None:
    statuses: Counter[int] = Counter()
    served_tasks(glyphs, tmp_path / "tasks.db")
    with ServedProcess(tmp_path / "tasks.db", tmp_path) as served, client_at(served) as client:
        good = pictures(3)
        first = infer(client, good)
        initial_bytes = resident_bytes(served.process.pid)
        requests, lock = malformed(Random(7), MALFORMED), threading.Lock()

        def send() -> Counter[int]:
            counts: Counter[int] = Counter()
            connection = HTTPConnection(served.url.removeprefix("http://"))  # much faster than httpx
            while True:
                with lock:
                    request = next(requests, None)
                if request is None:
                    connection.close()
                    return counts
                connection.request("POST", "/v2/models/combined/infer", *request)
                response = connection.getresponse()
                content = response.read()
                counts[response.status] += 1
                assert response.status < 500, content
                assert response.status == 200 or json.loads(content)["detail"]

        with ThreadPoolExecutor(8) as senders:  # concurrent, so that requests are batched
            for future in [senders.submit(send) for _ in range(8)]:
                statuses += future.result()
        assert served.process.poll() is None
        assert resident_bytes(served.process.pid) - initial_bytes < MAX_GROWTH_BYTES
        last = infer(client, good)
        for output in first.get_response()["outputs"]:
            before, after = (result.as_numpy(output["name"]) for result in (first, last))
            assert (
                before.tobytes() == after.tobytes() if before.dtype == np.float32 else before.tolist() == after.tolist()
            )
    assert statuses.total() == MALFORMED
    assert {200, 400, 413, 415} <= statuses.keys() <= {200, 400, 404, 413, 415}
    assert statuses[400] > MALFORMED / 2
    assert "traceback" not in served.log.read_text()
