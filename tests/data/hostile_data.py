"""Data files as an attacker writes them: `CASES` by name, each writes into a folder and returns what ``DATA=`` names.

Whatever reads them must end in an error of ours or in samples, soon, and without gigabytes.
"""

import io
import json
import struct
import tarfile
import zlib

MB = 1_000_000
GOOD = {"id": "good", "question": "what?", "answer": "red"}
LONG = "9" * 5000
DEEP = 100_000


def entry(**changes):
    return json.dumps({**GOOD, **changes})


def png(width, height, *chunks, rows=1):
    """A picture that claims to be so large; few of its rows are there."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * (1 + 3 * min(width, 70_000)) * rows, 9)
    middle = b"".join(chunk(kind, data) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def gif(frames):
    """An animation."""
    frame = b"\x21\xf9\x04\0\1\0\0\0\x2c\0\0\0\0\1\0\1\0\0\2\2\x44\1\0"
    return b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff" + frame * frames + b";"


JSON_VALUES = {
    "deep list": "[" * DEEP + "]" * DEEP,
    "deep object": '{"a":' * DEEP + "1" + "}" * DEEP,
    "rather deep": "[" * 900 + "]" * 900,
    "long integer": LONG,
    "infinite": "1e999",
    "not a number": "NaN",
    "surrogate": '"\\ud800"',
    "null": "null",
    "long text": '"' + "a b " * (3 * MB) + '"',
    "many values": "[" + "0," * MB + "0]",
    "escapes": '"\\u001b[2J\\u0000"',
    "text of a list": '"' + "[" * DEEP + '"',
    "text of messages": '"' + "[{'role': " * 3000 + '"',
}  # JSON of a value that stands where a text or a list is expected
KEYS = ("id", "question", "answer", "image", "conversations", "messages", "system", "choices")
PICTURES = {
    "65535 x 65535": lambda: png(65_535, 65_535),
    "2**31 wide": lambda: png(2**31 - 1, 1),
    "no pixels": lambda: png(0, 0),
    "short": lambda: png(9000, 9000),
    "icc bomb": lambda: png(8, 8, (b"iCCP", b"a\0\0" + zlib.compress(bytes(200 * MB), 9)), rows=8),
    "text bomb": lambda: png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(200 * MB), 9)), rows=8),
    "texts": lambda: png(8, 8, *[(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000), 9))] * 300, rows=8),
    "pixels beyond": lambda: png(8, 8, rows=1_000_000),
    "frames": lambda: gif(100_000),
    "many frames and a cut": lambda: gif(100_000)[:-7],
}


def nested_aliases(first, each):
    """Eight lines, of which each names the one before it nine times."""
    lines = [
        f"{new}: &{new} {each % ','.join([f'*{old}'] * 9)}" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    return "\n".join([f"a: &a {first}", *lines, ""])


YAML = {
    "laughs": nested_aliases("[x]", "[%s]"),
    "merges": nested_aliases("{x: 1}", "{<<: [%s]}"),
    "circle": "a: &a [*a]\n",
    "circle of mappings": "a: &a {b: *a}\n",
    "deep": "a: " + "[" * DEEP + "]" * DEEP,
    "long integer": f"a: {LONG}\n",
    "long hexadecimal": f"a: 0x{'f' * 100_000}\n",
    "long sexagesimal": "a: " + ":".join(["59"] * 100_000) + "\n",
    "long": "a: b\n" * MB,
    "infinite": "a: .inf\n",
    "dates": "a: 2024-99-99\n",
    "python": "a: !!python/object/apply:os.system ['true']\n",
    "escapes": 'a: "\\e[2J\\0"\n',
    "set": "? a\n",
}


def _write(name, data):
    def write(folder):
        path = folder / name
        path.write_bytes(data() if callable(data) else data if isinstance(data, bytes) else data.encode())
        return str(path)

    return write


def _with_picture(data):
    def write(folder):
        (folder / "x.png").write_bytes(data())
        (folder / "d.json").write_text(json.dumps([{**GOOD, "image": "x.png"}]))
        return str(folder / "d.json")

    return write


def _tar(members):
    def write(folder):
        with tarfile.open(folder / "d.tar", "w") as tar:
            for name, data in members():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return str(folder / "d.tar")

    return write


def _table(name, columns, metadata=None):
    def write(folder):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns()).replace_schema_metadata(metadata), folder / name)
        return str(folder / name)

    return write


def _named(spec):
    return lambda folder: spec


def cases():
    """Pairs of a name and what writes the files."""
    for kind, value in JSON_VALUES.items():
        for key in KEYS:
            text = entry(**{key: "PLACE"}).replace('"PLACE"', value)
            yield f"json: {key} {kind}", _write("d.json", f"[{entry()},{text}]")
            yield f"jsonl: {key} {kind}", _write("d.jsonl", f"{entry()}\n{text}\n{entry(id='c')}\n")
        yield f"json: {kind}", _write("d.json", value)
        yield f"tar: {kind}", _tar(lambda v=value: [("a.json", v.encode()), ("b.json", entry().encode())])
        yield f"metadata: {kind}", _write("metadata.jsonl", value)
        csv = f'id,question,answer\na,what,red\nb,"{value.replace(chr(34), chr(34) * 2)}",red\n'
        yield f"csv: {kind}", _write("d.csv", csv)
        yield f"csv: messages {kind}", _write("d.csv", csv.replace("question,answer", "messages,x"))
        columns = lambda v=value: {"id": ["a", "b"], "question": ["what", v], "answer": ["red", "red"]}  # noqa: E731
        yield f"parquet: {kind}", _table("d.parquet", columns)
        yield f"parquet: metadata {kind}", _table("d.parquet", columns, {"huggingface": value})
    yield (
        "json: repeated keys",
        _write("d.json", '[{"id": "a", "id": "b", "question": "q", "answer": "x", "answer": "y"}]'),
    )
    yield "json: id of 10 MB", _write("d.json", lambda: f"[{entry(id='a' * 10 * MB)}]".encode())
    yield (
        "json: 40,000 turns",
        _write(
            "d.json",
            lambda: json.dumps(
                [
                    {
                        "id": "a",
                        "conversations": [
                            {"from": ("human", "gpt")[turn % 2], "value": "word"} for turn in range(80_000)
                        ],
                    }
                ]
            ).encode(),
        ),
    )
    yield "csv: field of 200 MB", _write("d.csv", lambda: b'id,question,answer\na,"' + b"a " * (100 * MB) + b'",red\n')
    yield "csv: 1,000,000 columns", _write("d.csv", "question,answer" + ",a" * MB + "\nq,a\n")
    yield "csv: an open quote", _write("d.csv", 'question,answer\n"' + "a,b\n" * MB)
    yield "parquet: a short file", _write("d.parquet", b"PAR1" + b"\xff" * 100 + b"\xff\xff\xff\x7fPAR1")
    yield "tar: a long name", _tar(lambda: [("a" * MB + ".json", entry().encode())])
    yield "tar: a huge member", _write("d.tar", _huge_member)
    for kind, data in PICTURES.items():
        yield f"picture: {kind}", _with_picture(data)
        yield f"tar: picture {kind}", _tar(lambda d=data: [("a.json", entry().encode()), ("a.png", d())])
    for kind, text in YAML.items():
        yield f"mixture: {kind}", _write("d.yaml", text)
        yield f"mixture: in an entry {kind}", _write("d.yaml", "- " + text.replace("\n", "\n  "))
    for options in (
        "images=2000000000",
        f"images={LONG}",
        "images=1,seed=99999999999999999999999",
        "images=-1",
        "images=1e9",
    ):
        yield f"shapes: {options[:40]}", _named(f"shapes:{options}")


def _huge_member():
    info = tarfile.TarInfo("a.json")
    info.size = 8**11
    return info.tobuf(format=tarfile.GNU_FORMAT) + bytes(10240)
