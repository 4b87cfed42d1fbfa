"""How images are divided, and what is read from a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from service.model.images import InputSpec, decode_image
from tests.training.image_folders import CLASS_NAMES, write_classes
from training.data.dataset import Dataset, stratified_split
from training.data.duplicates import warn_of_duplicates
from training.data.folder import load_folder, load_source
from training.errors import DataError

SPEC = InputSpec()


@given(counts=st.lists(st.integers(1, 60), min_size=2, max_size=6), share=st.floats(0.05, 0.9), seed=st.integers(0, 1000))
def test_a_split_takes_the_same_share_of_every_class(counts: list[int], share: float, seed: int) -> None:
    """Every index is in exactly one part, every class keeps an image, and its share is right to within one image."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    held_out = round(share * len(labels))
    kept, held = stratified_split(labels, held_out, seed)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        taken = int((labels[held] == label).sum())
        assert count - taken >= 1
        assert taken == count - 1 or abs(taken - count * held_out / len(labels)) < 1
    if all(count * (1 - share) > 2 for count in counts):
        assert len(held) == held_out


def test_a_split_depends_on_its_seed_alone() -> None:
    """The same seed holds out the same images, another seed others, whatever torch drew before."""
    labels = torch.arange(100) % 4
    torch.manual_seed(1)
    first = stratified_split(labels, 20, seed=5)[1]
    torch.manual_seed(2)
    assert torch.equal(stratified_split(labels, 20, seed=5)[1], first)
    assert not torch.equal(stratified_split(labels, 20, seed=6)[1], first)


def test_a_subset_keeps_images_labels_and_files_together(source_folder: Path) -> None:
    """What is taken out of a data set is still the image of its file, with its label."""
    data = load_folder(source_folder, SPEC)
    part = data.subset(torch.tensor([5, 0, 17]))
    for image, label, path in zip(part.images, part.labels, part.paths, strict=True):
        assert path.parent.name == part.class_names[int(label)]
        assert torch.equal(image, torch.from_numpy(decode_image(path.read_bytes(), SPEC)))


@pytest.fixture
def source_folder(tmp_path: Path) -> Path:
    """A single folder with ten images in each of three classes."""
    return write_classes(tmp_path / "images", 10)


def test_a_folder_is_read_in_sorted_order_by_the_services_decoder(source_folder: Path) -> None:
    """Classes are named after their folders, files follow each other by name, and pixels are what the service would see."""
    data = load_folder(source_folder, SPEC)
    assert data.class_names == CLASS_NAMES
    assert list(data.paths) == sorted(source_folder.glob("*/*.jpg"))
    assert data.images.shape == (30, 3, 32, 32)
    assert data.images.dtype == torch.uint8
    assert data.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert torch.equal(data.images[13], torch.from_numpy(decode_image(data.paths[13].read_bytes(), SPEC)))


def test_images_come_in_the_size_that_is_asked_for(source_folder: Path) -> None:
    """Any input size can be trained at; the files may have any size of their own."""
    assert load_folder(source_folder, InputSpec(size=48)).images.shape == (30, 3, 48, 48)


def test_other_files_are_passed_over(source_folder: Path) -> None:
    """Notes, hidden files and files beside the class folders are no images and no errors."""
    (source_folder / "red" / "notes.txt").write_text("no image")
    (source_folder / "red" / ".hidden.jpg").write_bytes(b"no image")
    (source_folder / "README.md").write_text("no class")
    (source_folder / ".cache").mkdir()
    assert len(load_folder(source_folder, SPEC)) == 30


def test_a_single_folder_is_split_by_its_seed(source_folder: Path) -> None:
    """A folder without test/ gives a fifth of every class for testing, the same one each time."""
    source = load_source(source_folder, SPEC)
    assert torch.bincount(source.test.labels).tolist() == [2, 2, 2]
    assert torch.bincount(source.train.labels).tolist() == [8, 8, 8]
    assert not set(source.train.paths) & set(source.test.paths)
    assert load_source(source_folder, SPEC).test.paths == source.test.paths
    assert load_source(source_folder, SPEC, split_seed=1).test.paths != source.test.paths


def test_a_folder_with_train_and_test_is_taken_as_it_is(tmp_path: Path) -> None:
    """With both folders there, nothing is split, and both know the same classes."""
    write_classes(tmp_path / "train", 4)
    write_classes(tmp_path / "test", 2, seed=1)
    source = load_source(tmp_path, SPEC)
    assert (len(source.train), len(source.test)) == (12, 6)
    assert source.train.class_names == source.test.class_names == CLASS_NAMES


def test_a_test_folder_may_lack_a_class_and_labels_stay_right(tmp_path: Path) -> None:
    """Labels are numbers of the model's classes, not of the folders that happen to be there."""
    write_classes(tmp_path / "images", 2)
    for path in (tmp_path / "images" / "bars").iterdir():
        path.unlink()
    (tmp_path / "images" / "bars").rmdir()
    data = load_folder(tmp_path / "images", SPEC, class_names=CLASS_NAMES)
    assert data.labels.tolist() == [1, 1, 2, 2]
    assert data.class_names == CLASS_NAMES


def test_unreadable_files_are_named(source_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A few damaged files are left out and named; above a tenth they are refused, unless they are asked to be skipped."""
    (source_folder / "red" / "0003.jpg").write_bytes(b"not a JPEG")
    sound = (source_folder / "green" / "0001.jpg").read_bytes()
    (source_folder / "green" / "0001.jpg").write_bytes(sound[: len(sound) // 2])
    data = load_folder(source_folder, SPEC)
    assert len(data) == len(data.paths) == 28
    assert "red/0003.jpg: " in caplog.text
    assert "send" not in caplog.text, "nobody sends these files"
    for index in (4, 5):
        (source_folder / "red" / f"000{index}.jpg").write_bytes(b"not a JPEG")
    with pytest.raises(DataError, match=r"4 files cannot be read \(pass --skip-unreadable") as caught:
        load_folder(source_folder, SPEC)
    assert "green/0001.jpg: " in str(caught.value)
    assert "red/0003.jpg: " in str(caught.value)
    assert len(load_folder(source_folder, SPEC, skip_unreadable=True)) == 26


def test_many_unreadable_files_do_not_fill_the_screen(source_folder: Path) -> None:
    """Of more than twenty, the first twenty are named and the rest counted."""
    for path in source_folder.glob("*/*.jpg"):
        path.write_bytes(b"damaged")
    with pytest.raises(DataError, match="30 files cannot be read") as caught:
        load_folder(source_folder, SPEC)
    assert str(caught.value).count("0") < 200
    assert "and 10 more" in str(caught.value)


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)


def test_what_is_no_data_folder_is_refused(tmp_path: Path) -> None:
    """Each way of giving the wrong folder has its own message, which says what is missing."""
    (tmp_path / "file").write_text("")
    for path, message in [(tmp_path / "absent", "does not exist"), (tmp_path / "file", "is a file, not a folder")]:
        with pytest.raises(DataError, match=message):
            load_source(path, SPEC)
    make(tmp_path, "none", "one/cat", "half/train/cat", "half/train/dog")
    for name, message in [
        ("none", "holds no class folders; at least 2"),
        ("one", "holds one class folder; at least 2"),
        ("half", "has train/ and no test/"),
    ]:
        with pytest.raises(DataError, match=message):
            load_source(tmp_path / name, SPEC)


def test_an_empty_class_is_refused(source_folder: Path) -> None:
    """A class without images cannot be learnt; the message names its folder."""
    make(source_folder, "blue")
    with pytest.raises(DataError, match=r"blue holds no image"):
        load_folder(source_folder, SPEC)
    (source_folder / "blue" / "0.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"blue holds no readable image"):
        load_folder(source_folder, SPEC)


def test_a_foreign_class_is_refused(source_folder: Path) -> None:
    """Images of a class that the model does not know cannot be right or wrong."""
    with pytest.raises(DataError, match="not among bars, red: green"):
        load_folder(source_folder, SPEC, class_names=("bars", "red"))


def test_too_few_images_to_hold_any_out_are_refused(tmp_path: Path) -> None:
    """A class of two images has no fifth."""
    with pytest.raises(DataError, match=r"too few images of green, red to hold one out for the test; each needs at least 5"):
        load_source(write_classes(tmp_path / "images", 2), SPEC)


def test_folders_are_walked_with_links_and_names_of_any_kind(tmp_path: Path) -> None:
    """Nested folders, upper-case endings, spaces, other scripts, links to files and folders; a loop of links ends."""
    source = write_classes(tmp_path / "drawn", 4)
    data = tmp_path / "my photos"
    (data / "кот и 犬" / "2023 summer" / "best of").mkdir(parents=True)
    (source / "red" / "0000.jpg").rename(data / "кот и 犬" / "IMG 1.JPG")
    (source / "red" / "0001.jpg").rename(data / "кот и 犬" / "2023 summer" / "best of" / "é.JPeG")
    (data / "кот и 犬" / "a link.jpg").symlink_to(source / "red" / "0002.jpg")
    (data / "кот и 犬" / "loop").symlink_to(data / "кот и 犬")
    (data / "Green Things").symlink_to(source / "green")
    read = load_folder(data, SPEC)
    assert read.class_names == ("Green Things", "кот и 犬")
    assert read.labels.tolist() == [0] * 4 + [1] * 3


@pytest.mark.parametrize("suffix", [".tif", ".TIFF", ".ppm", ".avif", ".webp", ".bmp", ".gif"])
def test_formats_of_cameras_and_scanners_are_read(suffix: str, tmp_path: Path) -> None:
    """What the service accepts, and TIFF and Netpbm, give the pixels that were saved, to within compression."""
    data = load_folder(write_classes(tmp_path / "jpeg", 1), SPEC)
    for path in data.paths:
        target = tmp_path / "other" / path.parent.name / f"x{suffix}"
        target.parent.mkdir(parents=True)
        with Image.open(path) as image:
            image.save(target)
    other = load_folder(tmp_path / "other", SPEC)
    assert (other.images.float() - data.images.float()).abs().mean() < 16


def test_a_damaged_tiff_is_named(source_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that has to be converted is unreadable like any other."""
    (source_folder / "red" / "x.tif").write_bytes(b"II*\0 not a TIFF")
    load_folder(source_folder, SPEC)
    assert "red/x.tif" in caplog.text


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_a_validation_folder_without_test_is_the_test_set(name: str, tmp_path: Path) -> None:
    """The folder has its usual names in any case; validation images are then held out of train."""
    write_classes(tmp_path / "Train", 4)
    write_classes(tmp_path / name, 2, seed=1)
    source = load_source(tmp_path, SPEC)
    assert (len(source.train), len(source.test), source.validation) == (12, 6, None)


def test_three_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    """Nothing is held out of train where validation images have a folder of their own."""
    for name, each in (("train", 4), ("val", 2), ("test", 3)):
        write_classes(tmp_path / name, each, seed=each)
    source = load_source(tmp_path, SPEC)
    train, validation = source.divided(5, seed=0)
    assert (len(train), len(validation), len(source.test)) == (12, 6, 9)
    write_classes(tmp_path / "valid", 2)
    with pytest.raises(DataError, match="both val/ and valid/; keep one"):
        load_source(tmp_path, SPEC)


def test_what_is_left_out_is_counted(source_folder: Path) -> None:
    """Files that are no images, unreadable ones and images outside of the class folders have their reasons."""
    (source_folder / "red" / "notes.TXT").write_text("no image")
    (source_folder / "red" / "x.jpg").write_bytes(b"damaged")
    (source_folder / "lost.png").write_bytes(b"anywhere")
    left_out = load_source(source_folder, SPEC).left_out
    assert left_out == {".txt files": 1, "unreadable files": 1, "images in no class folder": 1}


def test_near_duplicates_of_train_in_test_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same picture, saved larger and with another quality, is found, mirrored too; others of its class are not."""
    write_classes(tmp_path / "train", 20)
    write_classes(tmp_path / "test", 5, seed=1)
    assert warn_of_duplicates(load_source(tmp_path, SPEC)) == 0
    with Image.open(tmp_path / "train" / "bars" / "0003.jpg") as image:
        image.resize((image.width * 2, image.height * 2)).save(tmp_path / "test" / "bars" / "copy.jpg", quality=60)
        ImageOps.mirror(image).save(tmp_path / "test" / "bars" / "mirrored.jpg")
    assert warn_of_duplicates(load_source(tmp_path, SPEC)) == 2
    assert "test/bars/mirrored.jpg is like" in caplog.text
    assert "test/bars/copy.jpg is like" in caplog.text
    assert "train/bars/0003.jpg" in caplog.text


def test_the_centre_is_scaled_up_to_the_same_size_and_nothing_else_changes() -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[:, :, 2:6, 2:6] = 200
    data = Dataset(images, torch.tensor([0, 1]), ("a", "b"))
    assert data.centred(4).images.unique().tolist() == [200]
    assert torch.equal(data.centred(8).images, images)
    assert torch.equal(data.centred(4).labels, data.labels)
    for pixels in (0, 9, -3):
        with pytest.raises(ValueError, match="1 to 8 pixels"):
            data.centred(pixels)
