"""Publishing a checkpoint over the one that a service watches."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.model.atomic_file import WriteError
from service.model.checkpoint import CheckpointError, load_checkpoint
from training.output.publish import publish


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A file that is served now."""
    path = tmp_path / "models" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"what is served now")
    return path


def test_publishing_replaces_the_file_whole(finished_run: Path, target: Path) -> None:
    """The same bytes are there, so the version is the same, and nothing else is left beside them."""
    source = finished_run / "model.safetensors"
    assert publish(source, target) == load_checkpoint(source).version
    assert target.read_bytes() == source.read_bytes()
    assert list(target.parent.iterdir()) == [target]


def test_publishing_over_a_link_leaves_what_it_points_to(finished_run: Path, target: Path) -> None:
    """In a container the served file is first a link to the image's own checkpoint."""
    link = target.with_name("link.safetensors")
    link.symlink_to(target)
    publish(finished_run / "model.safetensors", link)
    assert not link.is_symlink()
    assert target.read_bytes() == b"what is served now"


def test_a_damaged_checkpoint_is_not_published(finished_run: Path, target: Path, tmp_path: Path) -> None:
    """The file that is served stays as it is."""
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((finished_run / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        publish(damaged, target)
    assert target.read_bytes() == b"what is served now"


def test_a_place_that_cannot_be_written_is_named(finished_run: Path, target: Path) -> None:
    """A folder that is really a file takes nothing, and the message says which."""
    with pytest.raises(WriteError, match="what-is-not-a-folder"):
        publish(finished_run / "model.safetensors", target / "what-is-not-a-folder" / "model.safetensors")
