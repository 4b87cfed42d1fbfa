"""CIFAR-10 as torchvision downloads it; here its archive is a tiny one, in the same form on disk."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.datasets import CIFAR10

from service.model.images import InputSpec, decode_image, encode_png
from training.data.cifar10 import load_cifar10
from training.errors import DataError

# torchvision unpacks the archive, after its check, without the filter that Python 3.12 and 3.13 ask for; 3.14 has one itself.
pytestmark = pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter:DeprecationWarning")

CLASSES = ["cat", "dog", "frog"]
EACH = 4  # images in each of the five training files and in the test file


def archive_files() -> dict[str, bytes]:
    """Give the files of the archive: pickled dictionaries with rows of 3,072 bytes, red before green before blue."""
    rng = np.random.default_rng(0)
    files = {}
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        entry = {"data": rng.integers(0, 256, (EACH, 3072), np.uint8), "labels": rng.integers(0, len(CLASSES), EACH).tolist()}
        files[name] = pickle.dumps(entry)
    files["batches.meta"] = pickle.dumps({"label_names": CLASSES})
    return files


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Where a web server offers what lies in ``tmp_path / "served"``."""
    (tmp_path / "served").mkdir()
    handler = partial(Quiet, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def archive(tmp_path: Path, address: str) -> type[CIFAR10]:
    """CIFAR-10 as torchvision has it, but downloading a tiny archive from a server of our own."""
    files = archive_files()
    packed = tmp_path / "served" / "tiny.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    sums = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}

    class Tiny(CIFAR10):  # type: ignore[misc]  # torchvision has no types
        url = f"{address}/tiny.tar.gz"
        filename = "tiny.tar.gz"
        tgz_md5 = hashlib.md5(packed.read_bytes()).hexdigest()
        train_list: ClassVar = [[f"data_batch_{number}", sums[f"data_batch_{number}"]] for number in range(1, 6)]
        test_list: ClassVar = [["test_batch", sums["test_batch"]]]
        meta: ClassVar = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}

    return Tiny


def expected(name: str) -> tuple[NDArray[np.uint8], list[int]]:
    entry = pickle.loads(archive_files()[name])
    return entry["data"].reshape(-1, 3, 32, 32), entry["labels"]


def test_the_archive_is_downloaded_verified_and_converted(archive: type[CIFAR10], tmp_path: Path) -> None:
    """Every image comes out bit-exact with its own label, train from five files in order, test from one."""
    source = load_cifar10(tmp_path / "data", InputSpec(), archive)
    assert source.train.class_names == source.test.class_names == tuple(CLASSES)
    images, labels = expected("test_batch")
    np.testing.assert_array_equal(source.test.images.numpy(), images)
    assert source.test.labels.tolist() == labels
    assert source.train.images.shape == (5 * EACH, 3, 32, 32)
    images, labels = expected("data_batch_2")
    np.testing.assert_array_equal(source.train.images[EACH : 2 * EACH].numpy(), images)
    assert source.train.labels[EACH : 2 * EACH].tolist() == labels
    assert source.train.images.is_contiguous()


def test_another_size_is_what_the_service_would_make_of_the_image(archive: type[CIFAR10], tmp_path: Path) -> None:
    """At another input size, images are scaled as the service scales a file of the same pixels."""
    spec = InputSpec(size=48)
    source = load_cifar10(tmp_path / "data", spec, archive)
    image = expected("test_batch")[0][1]
    np.testing.assert_array_equal(source.test.images[1].numpy(), decode_image(encode_png(image), spec))


def test_a_second_call_downloads_nothing(archive: type[CIFAR10], tmp_path: Path) -> None:
    """What is there and has the right sums is used, so that a machine without a network can train."""
    load_cifar10(tmp_path / "data", InputSpec(), archive)
    (tmp_path / "served" / "tiny.tar.gz").unlink()
    assert len(load_cifar10(tmp_path / "data", InputSpec(), archive).train) == 5 * EACH


def test_a_damaged_download_is_refused(archive: type[CIFAR10], tmp_path: Path) -> None:
    """An archive with another sum than the published one is never unpacked."""
    packed = tmp_path / "served" / "tiny.tar.gz"
    packed.write_bytes(packed.read_bytes() + b"more")
    with pytest.raises(DataError, match="cannot download CIFAR-10"):
        load_cifar10(tmp_path / "data", InputSpec(), archive)
    assert not (tmp_path / "data" / CIFAR10.base_folder).exists()


def test_no_network_is_one_line(archive: type[CIFAR10], tmp_path: Path) -> None:
    """Where nothing can be downloaded, the message says so, and what else can be given."""
    (tmp_path / "served" / "tiny.tar.gz").unlink()
    with pytest.raises(DataError, match=r"cannot download CIFAR-10 .* or give --data a folder"):
        load_cifar10(tmp_path / "data", InputSpec(), archive)


def test_a_png_holds_the_same_pixels() -> None:
    """Encoding for the service loses nothing."""
    image = np.random.default_rng(0).integers(0, 256, (3, 32, 32), np.uint8)
    assert torch.equal(torch.from_numpy(decode_image(encode_png(image), InputSpec())), torch.from_numpy(image))
