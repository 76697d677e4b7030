"""Seeded damage to what callers send: bytes, image files, JSON, tensors, protobuf.

Each function takes a `random.Random` and does something different with each of its states, so that
a request is rebuilt from its seed alone.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from io import BytesIO
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from tests.conversations import RESPONSES, picture
from tests.loadgen import Tensor

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF")
DATATYPES = (
    "BYTES", "INT32", "UINT8", "FP32", "BOOL", "INT8", "INT64", "UINT64", "FP16", "BF16", "FP64",
    "", "FP128", "bytes", "INT32 ", "\0",
)  # fmt: skip
EDGES = (
    0, 1, 2, 3, 7, 63, 64, 65, 127, 128, 255, 256, 1000, 4096, 32767, 32768, 65535, 65536,
    2**24, 2**31 - 1, 2**31, 2**32 - 1,
)  # fmt: skip
DIMENSIONS = (-1, -2, -(2**31), -(2**63), 0, 2, 3, 5, 1000, 2**31, 2**32 + 1, 2**62, 2**63 - 1)

# --- bytes


def flip_bits(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def cut_out(rng: Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def repeat(rng: Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:end] + data[start:end] * rng.choice((1, 2, 50)) + data[end:]


def overwrite(rng: Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + rng.randbytes(end - start) + data[end:]


def insert(rng: Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.choice((1, 4, 100))) + data[place:]


def swap_blocks(rng: Random, data: bytes) -> bytes:
    a, b = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:a] + data[b:] + data[a:b]


def noise(rng: Random, data: bytes) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 4, 64, 5000)))


def set_number(rng: Random, data: bytes) -> bytes:
    """Put a limit of some integer type somewhere, mostly in the header."""
    form = rng.choice("<>") + rng.choice("BHI")
    value = struct.pack(form, rng.choice(EDGES) % 256 ** struct.calcsize(form))
    place = rng.randrange(max(1, min(len(data), rng.choice((32, 64, 512, 1 << 30)))))
    return data[:place] + value + data[place + len(value) :]


BYTES: tuple[Callable[[Random, bytes], bytes], ...] = (
    flip_bits, flip_bits, truncate, cut_out, repeat, overwrite, insert, swap_blocks, noise,
    set_number, set_number,
)  # fmt: skip


def damaged(rng: Random, data: bytes) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(BYTES)(rng, data)
    return data


def _span(rng: Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 4, 16, 256)))


# --- images


def image_files() -> list[bytes]:
    """Small valid files of every format and of the modes and layouts that differ inside."""
    colour, grey = picture(61, 47, 1), picture(33, 90, 2).convert("L")
    palette, alpha = colour.quantize(16), picture(40, 40, 3).convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize((40, 40)))
    films = [picture(48, 32, seed) for seed in (4, 5)]
    return [
        *(_file(colour, name) for name in FORMATS),
        _file(grey, "PNG"), _file(grey, "JPEG"), _file(grey, "TIFF", compression="tiff_lzw"),
        _file(palette, "PNG"), _file(palette, "GIF"), _file(palette, "BMP"),
        _file(alpha, "PNG"), _file(alpha, "WEBP", lossless=True), _file(alpha, "TIFF"),
        _file(colour, "JPEG", progressive=True, quality=40),
        _file(colour.convert("CMYK"), "JPEG"), _file(colour.convert("1"), "BMP"),
        _file(colour, "TIFF", compression="tiff_adobe_deflate"),
        _file(colour, "TIFF", compression="jpeg"),
        _file(films[0], "GIF", save_all=True, append_images=films[1:]),
        _file(films[0], "WEBP", save_all=True, append_images=films[1:]),
        _file(films[0], "PNG", save_all=True, append_images=films[1:]),
    ]  # fmt: skip


def damaged_image(rng: Random, files: Sequence[bytes]) -> bytes:
    """A file with damage, or one that only looks strange: parts moved, checksums right."""
    data = rng.choice(files)
    kind = rng.random()
    if kind < 0.3 and data.startswith(b"\x89PNG"):
        return _damaged_png(rng, data)
    if kind < 0.3 and data.startswith(b"\xff\xd8"):
        return _damaged_jpeg(rng, data)
    if kind < 0.3 and data.startswith(b"RIFF"):
        return _damaged_riff(rng, data)
    if kind < 0.35:  # one format's beginning on another one's rest
        other = rng.choice(files)
        place = rng.choice((4, 12, 30, 100))
        return data[:place] + other[place:]
    return damaged(rng, data)


def _file(image: Image.Image, format_: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def _damaged_png(rng: Random, data: bytes) -> bytes:
    """Chunks moved, doubled, dropped or damaged, with checksums that are right again."""
    chunks, place = [], 8
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size
    _rearrange(rng, chunks)
    if chunks and rng.random() < 0.7:
        index = rng.choice((0, rng.randrange(len(chunks))))
        name, content = chunks[index]
        chunks[index] = name, damaged(rng, content)
    return data[:8] + b"".join(
        struct.pack(">I", len(content)) + name + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )  # fmt: skip


def _damaged_jpeg(rng: Random, data: bytes) -> bytes:
    """Segments before the scan moved, doubled, dropped or damaged."""
    segments, place = [], 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        (size,) = struct.unpack(">H", data[place + 2 : place + 4])
        segments.append(data[place : place + 2 + size])
        place += 2 + size
    _rearrange(rng, segments)
    if segments and rng.random() < 0.7:
        index = rng.randrange(len(segments))
        segments[index] = segments[index][:4] + damaged(rng, segments[index][4:])
    return data[:2] + b"".join(segments) + data[place:]


def _damaged_riff(rng: Random, data: bytes) -> bytes:
    chunks, place = [], 12
    while place + 8 <= len(data):
        (size,) = struct.unpack("<I", data[place + 4 : place + 8])
        end = place + 8 + size + size % 2
        chunks.append(data[place:end])
        place = end
    _rearrange(rng, chunks)
    if chunks and rng.random() < 0.7:
        index = rng.randrange(len(chunks))
        chunks[index] = chunks[index][:8] + damaged(rng, chunks[index][8:])
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _rearrange(rng: Random, parts: list[Any]) -> None:
    for _ in range(rng.choice((0, 1, 1, 3))):
        if not parts:
            return
        index = rng.randrange(len(parts))
        what = rng.randrange(3)
        if what == 0:
            parts.insert(rng.randrange(len(parts) + 1), parts.pop(index))
        elif what == 1:
            parts.insert(rng.randrange(len(parts) + 1), parts[index])
        else:
            del parts[index]


# --- JSON


# What no JSON encoder writes; `@n@` stands for entry n until the rest is encoded.
_RAW = (
    "1e400", "-1e400", "1" * 400, "NaN", "Infinity", "-0", "0.1e-400", "01", "0x10", "1.", "+1",
    '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\\x41"', '"\x01"', "[" * 300 + "]" * 300,
    "[" * 5000, '{"a":' * 300 + "1" + "}" * 300, '{"role":"user","role":"system","content":""}',
    '{"type":"text","text":"a","type":"image"}', '{"type":"image","min_pixels":1,"min_pixels":2}',
    '{"type":"text","text":"a","text":{"b":[]}}', "", ",", "// no", "'x'", "tru", "nul\u0000l",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2.5, 28, 784, 50_000, 10**9, 2**31, 2**63, -(2**63), 10**400, "",
    "user", "system", "assistant", "text", "image", "video", "<|im_end|>", "<|image_pad|>",
    "\ufffe\U0010ffff", "x" * 3000, [], {}, [[]], [None], [{}], {"": ""}, ["text"],
    {"type": "image"}, {"type": "text", "text": "more"}, {"type": "video"},
    {"type": "image", "resized_height": 28, "resized_width": 10**6},
    {"type": "image", "min_pixels": 784, "max_pixels": 785},
    {"type": "image", "image": "/etc/passwd"}, {"role": "user", "content": "again"},
    {"__proto__": {}, "role": "user", "content": "x"},
    *(f"@{index}@" for index in range(len(_RAW))),
)  # fmt: skip
_KEYS = (
    "role", "content", "type", "text", "image", "min_pixels", "max_pixels", "resized_height",
    "resized_width", "fps", "", "\0", "k" * 2000,
)  # fmt: skip


def damaged_json(rng: Random, value: Any) -> bytes:
    """A message whose tree or whose text is damaged."""
    if rng.random() < 0.35:
        return damaged(rng, json.dumps(value, ensure_ascii=rng.random() < 0.5).encode())
    value = json.loads(json.dumps(value))
    if rng.random() < 0.2:  # valid, with words that nobody writes
        text = any_text(rng).decode(errors="replace")
        parts = [p for m in value if isinstance(m["content"], list) for p in m["content"]]
        texts = [part for part in parts if part["type"] == "text"]
        plain = [m for m in value if isinstance(m["content"], str)]
        place, key = rng.choice([(t, "text") for t in texts] + [(m, "content") for m in plain])
        place[key] = text
        return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()
    for _ in range(rng.choice((1, 1, 2, 5))):
        value = _mutate_tree(rng, value)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    for index, raw in enumerate(_RAW):
        text = text.replace(f'"@{index}@"', raw)
    return text.encode("utf-8", "surrogatepass")


def _value(rng: Random) -> Any:
    return deepcopy(rng.choice(_VALUES))


def _mutate_tree(rng: Random, tree: Any) -> Any:
    """Change one place of a tree of lists and dicts, its root included."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in items:
            places.append((node, key))
            if isinstance(child, list | dict):
                walk(child)

    if isinstance(tree, list | dict):
        walk(tree)
    if not places or rng.random() < 0.03:
        return _value(rng)
    node, key = rng.choice(places)
    what = rng.randrange(6)
    if what <= 2:
        node[key] = _value(rng)
    elif what == 3:
        del node[key]
    elif what == 4 and isinstance(node, dict):
        node[rng.choice(_KEYS)] = rng.choice((deepcopy(node[key]), _value(rng)))
    elif isinstance(node, list):
        node.insert(rng.randrange(len(node) + 1), rng.choice((deepcopy(node[key]), _value(rng))))
    else:
        node[key] = [node[key]]
    return tree


# --- text


def any_text(rng: Random) -> bytes:
    """A response: mostly text, sometimes no UTF-8."""
    text = rng.choice(list(RESPONSES.values())).encode()[:400]
    return damaged(rng, text) if rng.random() < 0.4 else text


# --- tensors


def damaged_tensors(rng: Random, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Inputs that do not fit their model: name, type, shape, length or content is wrong."""
    changed = list(tensors)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _damage_tensors(rng, changed)
    return changed


def _damage_tensors(rng: Random, tensors: list[Tensor]) -> None:
    if not tensors:
        return
    index = rng.randrange(len(tensors))
    tensor = tensors[index]
    what = rng.randrange(12)
    if what == 0:
        del tensors[index]
    elif what == 1:
        tensors.insert(rng.randrange(len(tensors) + 1), tensor)
    elif what == 2:
        tensors.insert(index, replace(tensor, name=rng.choice(("", "scores", "x" * 300, "\n"))))
    elif what == 3:
        tensors[index] = replace(tensor, name=rng.choice(tensors).name + rng.choice(("", " ", "s")))
    elif what in (4, 5):
        tensors[index] = replace(tensor, datatype=rng.choice(DATATYPES))
    elif what in (6, 7, 8):
        tensors[index] = replace(tensor, shape=_damaged_shape(rng, tensor.shape))
    elif what == 9 and tensor.datatype == "BYTES":
        tensors[index] = replace(tensor, raw=_lying_lengths(rng, tensor.raw))
    else:
        tensors[index] = replace(tensor, raw=damaged(rng, tensor.raw))


def _damaged_shape(rng: Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    dims = list(shape)
    what = rng.randrange(6) if dims else 1
    if what == 0:
        del dims[rng.randrange(len(dims)) :]
    elif what == 1:
        dims.insert(rng.randrange(len(dims) + 1), rng.choice((1, *DIMENSIONS)))
    elif what == 2:
        dims[rng.randrange(len(dims))] += rng.choice((-1, 1))
    elif what == 3:
        dims = dims[::-1]
    elif what == 4:  # two factors whose product wraps around to what it was
        dims = [*dims[:-1], dims[-1] * 2**32, 2**32]
    else:
        dims[rng.randrange(len(dims))] = rng.choice(DIMENSIONS)
    return tuple(max(-(2**63), min(2**63 - 1, dim)) for dim in dims)


def _lying_lengths(rng: Random, raw: bytes) -> bytes:
    """Change a length in front of a string."""
    places, place = [], 0
    while place + 4 <= len(raw):
        places.append(place)
        place += 4 + struct.unpack("<I", raw[place : place + 4])[0]
    if not places:
        return rng.randbytes(rng.randrange(8))
    place = rng.choice(places)
    (length,) = struct.unpack("<I", raw[place : place + 4])
    lie = rng.choice(
        (0, length - 1, length + 1, length + 4, 2**31 - 1, 2**31, 2**32 - 4, 2**32 - 1)
    )
    return raw[:place] + struct.pack("<I", lie % 2**32) + raw[place + 4 :]


def damaged_message(rng: Random, request: Any) -> None:
    """Change a ModelInferRequest outside its tensors' own fields, in place."""
    what = rng.randrange(9)
    tensor = rng.choice(request.inputs)
    if what == 0:
        del request.raw_input_contents[rng.randrange(len(request.raw_input_contents)) :]
    elif what == 1:
        request.raw_input_contents.append(rng.randbytes(rng.choice((0, 4, 1000))))
    elif what == 2:  # typed contents beside raw ones, or in their place
        if rng.random() < 0.7:
            del request.raw_input_contents[:]
        getattr(tensor.contents, rng.choice(("bytes_contents", "bool_contents"))).extend(
            [True] if tensor.contents.bool_contents else []
        )
        tensor.contents.int_contents.extend(rng.choices(EDGES[:20], k=rng.choice((0, 1, 4))))
    elif what == 3:
        region = tensor.parameters["shared_memory_region"]
        region.string_param = rng.choice(("", "x", "/dev/shm", "../../etc/passwd"))
        tensor.parameters["shared_memory_byte_size"].int64_param = rng.choice(DIMENSIONS)
    elif what == 4:
        request.outputs.add(name=rng.choice(("", "scores", "no", "token_counts", "x" * 300)))
        if rng.random() < 0.5:
            request.outputs[0].parameters["classification"].int64_param = rng.choice(DIMENSIONS)
    elif what == 5:
        name = rng.choice(("sequence_start", "priority", "sequence_id", "triton_x", "x", ""))
        request.parameters[name].int64_param = rng.choice(DIMENSIONS)
    elif what == 6:
        name = rng.choice(("timeout", "priority", "sequence_id", "binary_data_output"))
        request.parameters[name].string_param = rng.choice(("", "-1", "x", "\0"))
    elif what == 7:
        request.id = rng.choice(("", "\n", "i" * 5000, "triward-canary"))
    else:
        tensor.parameters["binary_data_size"].int64_param = rng.choice(DIMENSIONS)


def damaged_features(rng: Random, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of `reward_forward` whose types fit and whose values may not."""
    changed = {name: array.copy() for name, array in arrays.items()}
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice(list(changed))
        array = changed[name]
        what = rng.randrange(5)
        if what == 0:
            changed[name] = array[: rng.randrange(len(array) + 1)]
        elif what == 1:
            changed[name] = np.concatenate([array, array[: rng.randrange(len(array) + 1)]])
        elif what == 2 and array.size:
            limits = np.iinfo(array.dtype)
            values = (0, 1, 2, limits.min, limits.max, rng.randrange(limits.max))
            array.flat[rng.randrange(array.size)] = rng.choice(values)
        elif what == 3 and array.size:
            array.flat[rng.randrange(array.size)] += 1
        else:
            order = np.random.default_rng(rng.randrange(2**32)).permutation(len(array))
            changed[name] = array[order]
    return changed
