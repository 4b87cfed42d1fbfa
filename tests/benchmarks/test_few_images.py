"""The comparison of runs over few images: how it divides the data, and that it comes to its end."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.few_images import at_most, main, only
from service.model.checkpoint import load_checkpoint
from tests.training.image_folders import write_classes
from tests.training.run.test_resume import at_step, crash
from tests.training.tiny_run import TINY
from training.data.dataset import Dataset
from training.errors import DataError, RunError
from training.recipes import RECIPES
from training.run.run_folder import CHECKPOINT_FILE

# Every image is filled with its class's place, so that it can be told from its pixels.
PLACES = torch.tensor([2, 0, 1, 3, 0, 2, 3, 3])
DATA = Dataset(PLACES.to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2), PLACES, ("a", "b", "c", "d"))


def test_classes_are_labelled_by_their_places_among_the_chosen() -> None:
    """Images of other classes are left out, and each label names the class that it did."""
    chosen = only(DATA, ("d", "a"))
    assert chosen.class_names == ("d", "a")
    assert [DATA.class_names[pixel] for pixel in chosen.images[:, 0, 0, 0].tolist()] == ["a", "d", "a", "d", "d"]
    assert [chosen.class_names[label] for label in chosen.labels.tolist()] == ["a", "d", "a", "d", "d"]


def test_a_class_that_is_not_there_is_named() -> None:
    """So are those that are."""
    with pytest.raises(DataError, match="has no class e; its classes are a, b, c, d"):
        only(DATA, ("a", "e"))


def test_every_class_keeps_its_first_images() -> None:
    """A class that has fewer keeps all of them."""
    assert at_most(DATA, 2).labels.tolist() == [2, 0, 1, 3, 0, 2, 3]
    assert at_most(DATA, 1).labels.tolist() == [2, 0, 1, 3]


def few_images_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write four small classes to ``folder``; give the command over them, but for which of them are new."""
    data = folder / "data"
    for part, each in (("train", 20), ("test", 4)):
        write_classes(data / part, each)
        shutil.copytree(data / part / "bars", data / part / "stripes")
    monkeypatch.setitem(RECIPES, "tiny", replace(TINY, epochs=2))
    command = ["few_images", "--data", str(data), "--out", str(folder / "runs"), "--device", "cpu"]
    return [*command, "--images", "10", "--recipes", "tiny", "--first-recipe", "tiny", "--seeds", "0"]


@pytest.mark.slow
def test_the_table_has_a_row_for_each_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The network that is begun with knows the other classes alone, and a run that is finished is not made again."""
    monkeypatch.setattr(sys, "argv", [*few_images_of(tmp_path, monkeypatch), "--new", "red", "bars"])
    assert main() == 0
    table = capsys.readouterr().out
    assert [line.split(" | ")[:3] for line in table.splitlines()[2:]] == [
        ["| 10", "`tiny`", "random weights"],
        ["| 10", "`tiny`", "trained weights"],
    ]
    runs = {path.parent.name: load_checkpoint(path) for path in (tmp_path / "runs").glob(f"*/{CHECKPOINT_FILE}")}
    assert runs["first"].metadata.class_names == ("green", "stripes")
    assert runs["10-tiny-trained-0"].metadata.recipe["initial_checkpoint"]["version"] == runs["first"].version
    assert "initial_checkpoint" not in runs["10-tiny-random-0"].metadata.recipe
    with at_step(0, crash):
        assert main() == 0
    assert capsys.readouterr().out == table


@pytest.mark.slow
def test_runs_of_other_classes_are_not_taken_for_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of other classes in the same folder is refused, not filled with the runs that lie there."""
    command = few_images_of(tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "argv", [*command, "--new", "red", "bars"])
    assert main() == 0
    monkeypatch.setattr(sys, "argv", [*command, "--new", "red", "green"])
    with pytest.raises(RunError, match="another classes"):
        main()
