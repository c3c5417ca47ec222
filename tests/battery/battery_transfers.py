"""Pulls, pushes and trainings through servers that fail, lie or drip, and pushes that race: the same bytes or a refusal."""

from __future__ import annotations

import os
import random
import socketserver
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.battery.battery_cases import REFUSED, SAME, Case, Failed, refused
from tests.battery.battery_material import Material, refuse_differences, train, tree, weights_of
from tests.battery.battery_process import GIB, run, start
from tests.common import servers
from tests.common.servers import Fault, FaultyServer, s3_environment, serve_s3

DEADLINE_S = 300.0  # five tries of 30 s and the waits between them, after small files that arrive in time, slowly
_CARD = "README.md"
_AWAY = (
    "ftp://127.0.0.1/x",
    "file:///etc/passwd",
    "gopher://127.0.0.1/",
    "data:,x",
    "http://127.0.0.1:1/x",
    "//[",
    "/loop",
)
PASSING: dict[str, Callable[[random.Random], Fault]] = {
    "cut": lambda rng: Fault(cut=rng.choice((0, 1, rng.randrange(20_000)))),
    "503": lambda rng: Fault(status=503, body=b"<Error><Code>SlowDown</Code></Error>"),
    "500": lambda rng: Fault(status=500, body=b"x" * rng.randrange(2000)),
    "429": lambda rng: Fault(status=429, headers={"Retry-After": rng.choice(("1", "0", "soon", "-5"))}),
    "404": lambda rng: Fault(status=404, body=b"<Error><Code>NoSuchKey</Code></Error>"),
    "an error's body, cut": lambda rng: Fault(status=503, headers={"Content-Length": "500"}, body=b"<Error><Code>Slow"),
    "flip": lambda rng: Fault(flip=True),
    "longer": lambda rng: Fault(extra=rng.randbytes(rng.randrange(1, 5000))),
    "a wrong length": lambda rng: Fault(headers={"Content-Length": rng.choice(("7", "99999999", "-1", "x", "1e9"))}),
    "no ranges": lambda rng: Fault(whole=True),
    "chunked": lambda rng: Fault(chunked=True, cut=rng.choice((None, 10, 5000))),
    "gzip": lambda rng: Fault(headers={"Content-Encoding": "gzip"}),
    "an empty page": lambda rng: Fault(status=200),
    "a wrong range": lambda rng: Fault(headers={"Content-Range": rng.choice(("bytes 5-9/10", "x", "bytes */0"))}),
    "a redirect": lambda rng: Fault(status=302, headers={"Location": rng.choice(_AWAY)}),
    "a redirect to nowhere": lambda rng: Fault(status=301),
    "403": lambda rng: Fault(status=403),
    "no more": lambda rng: Fault(status=204),
    "bytes": lambda rng: Fault(status=200, body=rng.randbytes(300)),
}
# Those of the tests, redirects among them.
KNOWN: dict[str, Fault] = {**getattr(servers, "FAULTS", {}), **getattr(servers, "REDIRECTS", {})}
PASSING |= {f"{name} (tests)": lambda rng, fault=fault: fault for name, fault in KNOWN.items()}  # type: ignore[misc]
STANDING = {
    "stalls": lambda rng: Fault(stall=rng.choice((0, 100))),
    "trickles": lambda rng: Fault(trickle=True),
    "hangs": lambda rng: Fault(hang=True),
}
RAW: dict[str, tuple[bytes, float]] = {  # what is sent, and seconds between its bytes; then the same again
    "a header, a byte a second": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Long: " + b"a" * 500, 1.0),
    "no HTTP": (b"\x00\xff" * 50, 0.0),
    "half a status line": (b"HTTP/1.1 2", 0.0),
    "endless headers": (b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 200_000, 0.0),
    "an endless header": (b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 2_000_000, 0.0),
    "an endless body": (b"HTTP/1.1 200 OK\r\n\r\n" + b"{" * 300_000_000, 0.0),
    "a chunk of 2^60": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffff\r\nabc", 0.0),
    "another status": (b"HTTP/1.1 999 \x1b]0;owned\x07\r\nContent-Length: 0\r\n\r\n", 0.0),
}


@contextmanager
def serving(function: Callable[[Path], None], folder: Path) -> Iterator[str]:
    """Run a server in a process of its own, which writes its address to a file; yields the address."""
    place = folder / "address.txt"
    place.unlink(missing_ok=True)
    server = start([], folder / "server.txt", before=partial(function, place))
    until = time.monotonic() + 60
    while not place.exists() or not place.read_text():
        if time.monotonic() > until:
            raise Failed(f"no server: {(folder / 'server.txt').read_text()[-800:]}")
        time.sleep(0.01)
    try:
        yield place.read_text()
    finally:
        server.finish(0)


def _wait(place: Path, url: str) -> None:
    place.write_text(url)
    while True:
        time.sleep(3600)


def http(root: Path, faults: list[Fault], always: Fault, share: float, seed: int, place: Path) -> None:
    """Serve a folder: a share of the requests gets the next fault."""
    with FaultyServer(root) as server:
        _fail(server, faults, always, share, seed)
        _wait(place, server.url)


def s3(faults: list[Fault], always: Fault, share: float, seed: int, place: Path) -> None:
    """Serve a bucket through a proxy that fails, and directly: two addresses."""
    os.environ.update(s3_environment("http://127.0.0.1:9"))
    with serve_s3() as direct, FaultyServer(upstream=direct) as server:
        _fail(server, faults, always, share, seed)
        _wait(place, f"{server.url} {direct}")


def _fail(server: FaultyServer, faults: list[Fault], always: Fault, share: float, seed: int) -> None:
    rng = random.Random(seed)
    server.faults, server.always = faults, always
    if always.hang or always.trickle or always.drip_head or always.stall is not None:
        share = 1.0  # 30 s each: now and then, they would hold a transfer for as long as it has files
    server.concerns = lambda method, path: rng.random() < share


def raw(data: bytes, pause: float, place: Path) -> None:
    """Answer every connection with bytes, whatever it asks."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            try:
                self.request.recv(65536)
                for byte in data if pause else ():
                    self.request.sendall(bytes([byte]))
                    time.sleep(pause)
                if not pause:
                    self.request.sendall(data)
            except OSError:
                pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        place.write_text(f"http://127.0.0.1:{server.server_address[1]}")
        server.serve_forever()


def some_faults(name: str, rng: random.Random) -> tuple[list[Fault], Fault]:
    """A few faults that pass, or one that stands."""
    if name in STANDING:
        return [], STANDING[name](rng)
    if name == "a mixture":
        return [make(rng) for make in rng.choices(list(PASSING.values()), k=rng.randrange(3, 20))], Fault()
    if rng.random() < 0.25:
        return [], PASSING[name](rng)
    return [PASSING[name](rng) for _ in range(rng.randrange(1, 5))], Fault()


def without_card(found: dict[str, bytes]) -> dict[str, bytes]:
    """A cache's files but for its card, which no digest covers."""
    return {name: data for name, data in found.items() if name != _CARD}


def judge_pull(source: str, sound: str, expected: dict[str, bytes], folder: Path, environment: dict[str, str]) -> str:
    """The same bytes, or a refusal that leaves nothing that looks finished and that a sound server's pull mends."""
    target = folder / "pulled"
    command = ["cachectl", "pull", source, str(target), "--jobs", "2"]
    said = run(command, folder / "pull.txt", limit_s=DEADLINE_S, before=lambda: os.environ.update(environment))
    how = REFUSED if refused(said, what="pull", memory=GIB) else SAME
    if how == REFUSED:
        if (target / "manifest.json").exists():
            raise Failed(f"a refused pull left a manifest: {said.text[-800:]}")
        command[2] = sound
        said = run(command, folder / "again.txt", before=lambda: os.environ.update(environment))
        if refused(said, what="pull, again, from a sound server"):
            raise Failed(f"pull, again, from a sound server: {said.text[-800:]}")
    refuse_differences(without_card(tree(target)), without_card(expected), "pull")
    return how


def http_pull(made: Material, name: str, folder: Path, rng: random.Random) -> str:
    """Pull a cache over HTTP."""
    faults, always = some_faults(name, rng)
    kind, share, seed = rng.choice(("zarr", "webdataset")), rng.choice((1.0, 0.5, 0.1)), rng.randrange(10**6)
    root = made.folder / "caches"
    (folder / "a").mkdir(parents=True)
    with (
        serving(partial(http, root, faults, always, share, seed), folder) as faulty,
        serving(partial(http, root, [], Fault(), 0.0, 0), folder / "a") as sound,
    ):
        return judge_pull(f"{faulty}/{kind}", f"{sound}/{kind}", tree(made.caches[kind]), folder, {})


def http_train(made: Material, name: str, folder: Path, rng: random.Random) -> str:
    """Train from an address."""
    faults, always = some_faults(name, rng)
    folder.mkdir(parents=True)
    server = partial(http, made.folder / "caches", faults, always, rng.choice((1.0, 0.3)), rng.randrange(10**6))
    mirror = {"VLM_DISTILL_CACHE_DIR": str(folder / "mirror")}
    with serving(server, folder) as url:
        said = run(
            train("train", f"{url}/webdataset", folder / "output"),
            folder / "train.txt",
            limit_s=DEADLINE_S,
            before=lambda: os.environ.update(mirror),
        )
    if refused(said, what="train"):
        return REFUSED
    refuse_differences(weights_of(folder / "output"), weights_of(made.trained["webdataset"]), "train")
    return SAME


def raw_pull(made: Material, name: str, folder: Path, _rng: random.Random) -> str:
    """Pull from what is no server."""
    folder.mkdir(parents=True)
    with serving(partial(raw, *RAW[name]), folder) as url:
        said = run(["cachectl", "pull", f"{url}/zarr", str(folder / "pulled")], folder / "pull.txt", limit_s=DEADLINE_S)
    if not refused(said, what="pull", memory=GIB):
        raise Failed("pull took what no server sent")
    if "\x1b" in said.text:
        raise Failed(f"escapes reach the terminal: {said.text!r}")
    return REFUSED


def s3_copy(made: Material, name: str, folder: Path, rng: random.Random) -> str:
    """Push through the proxy and pull directly, or the other way round."""
    faults, always = some_faults(name, rng)
    kind = rng.choice(("zarr", "webdataset"))
    pushes = rng.random() < 0.5
    folder.mkdir(parents=True)
    with serving(partial(s3, faults, always, rng.choice((1.0, 0.3)), rng.randrange(10**6)), folder) as urls:
        faulty, direct = (s3_environment(url) for url in urls.split())
        push = ["cachectl", "push", str(made.caches[kind]), "s3://caches/there", "--jobs", "2"]
        environment = faulty if pushes else direct
        said = run(push, folder / "push.txt", limit_s=DEADLINE_S, before=lambda: os.environ.update(environment))
        if refused(said, what="push"):
            if not pushes:
                raise Failed(f"push to a sound server: {said.text[-800:]}")
            said = run([*push, "--overwrite"], folder / "push.txt", before=lambda: os.environ.update(direct))
            if refused(said, what="push, again"):
                raise Failed(f"push, again, to a sound server: {said.text[-800:]}")
        if not pushes:
            target = folder / "pulled"
            pull = ["cachectl", "pull", "s3://caches/there", str(target), "--jobs", "2"]
            said = run(pull, folder / "pull.txt", limit_s=DEADLINE_S, before=lambda: os.environ.update(faulty))
            if refused(said, what="pull") and (target / "manifest.json").exists():
                raise Failed(f"a refused pull left a manifest: {said.text[-800:]}")
        return judge_pull("s3://caches/there", "s3://caches/there", tree(made.caches[kind]), folder, direct)


def race(made: Material, place: str, folder: Path, rng: random.Random) -> str:
    """Several pushes over one another: what is there in the end is one of those that reported success."""
    folder.mkdir(parents=True)

    def go(target: str, environment: dict[str, str]) -> str:
        running, done = {}, {}
        for name, cache in made.caches.items():
            command = ["cachectl", "push", str(cache), target, "--overwrite", "--jobs", "2"]
            running[name] = start(command, folder / f"{name}.txt", before=lambda: os.environ.update(environment))
            time.sleep(rng.choice((0, 0, rng.uniform(0, 0.3))))
        # The others are no orphans of the first that ends.
        everybody = frozenset(other.process for other in running.values())
        for name, push in running.items():
            push.others |= everybody - {push.process}
            done[name] = push.finish(DEADLINE_S)
        won = [name for name, said in done.items() if not refused(said, what=f"push of {name}")]
        if not won:  # they saw one another: the next one alone must do
            command = ["cachectl", "push", str(made.caches["zarr"]), target, "--overwrite"]
            said = run(command, folder / "alone.txt", before=lambda: os.environ.update(environment))
            if refused(said, what="a push alone, after the others"):
                raise Failed(f"after pushes that all refused, one alone refuses: {said.text[-800:]}")
            won = ["zarr"]
        pull = ["cachectl", "pull", target, str(folder / "pulled")]
        said = run(pull, folder / "pull.txt", before=lambda: os.environ.update(environment))
        if refused(said, what="pull, after the pushes"):
            raise Failed(f"pushes of {won} reported success, and pull refuses: {said.text[-800:]}")
        found = without_card(tree(folder / "pulled"))
        fitting = [name for name, cache in made.caches.items() if without_card(tree(cache)) == found]
        if not set(fitting) & set(won):
            raise Failed(f"pushes of {won} reported success, and what is there is {fitting}")
        return SAME

    if place == "folder":
        return go(str(folder / "there"), {})
    with serving(partial(s3, [], Fault(), 0.0, 0), folder) as urls:
        return go("s3://caches/there", s3_environment(urls.split()[1]))


def transfers(made: Material) -> list[Case]:
    """All cases."""

    def case(name: str, work: Callable[..., str], of: str) -> Case:
        return Case(kind="transfers", name=f"{name}: {of}", work=partial(work, made, of), limit_s=3 * DEADLINE_S)

    names = [*STANDING, *PASSING]
    mixtures = ["a mixture"] * 8
    cases = [case("HTTP pull", http_pull, of) for of in [*names, *mixtures]]
    cases += [case("pull from what is no server", raw_pull, of) for of in RAW]
    cases += [case("S3", s3_copy, of) for of in [*names[::2], *mixtures]]
    cases += [case("training from an address", http_train, of) for of in [*names[1::4], *mixtures]]
    return cases + [case("pushes that race", race, of) for of in ("folder", "s3") for _ in range(6)]
