"""From what a user names to slides with ids."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_mmm import inputs
from wsi_mmm.config import SlideSpec
from wsi_mmm.errors import InputError, ManifestError, OptionError, SlideNotFound
from wsi_mmm.inputs import expand_inputs, read_manifest, safe_id, unique_specs


def touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def manifest(folder: Path, text: str, name: str = "slides.csv") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_folder_gives_its_slides_sorted_and_recursive(tmp_path: Path) -> None:
    """Slides are found by suffix at any depth; hidden and other files are left alone."""
    touch(tmp_path, "b.svs", "a.TIFF", "sub/c.ndpi", "notes.txt", "._b.svs")
    assert [Path(spec.uri).name for spec in expand_inputs([tmp_path])] == ["a.TIFF", "b.svs", "c.ndpi"]


def test_a_pattern_gives_what_it_matches(tmp_path: Path) -> None:
    """``*`` stays in a folder and ``**`` crosses folders."""
    touch(tmp_path, "b.svs", "a.svs", "sub/c.svs")
    assert [spec.id for spec in expand_inputs([f"{tmp_path}/*.svs"])] == ["a", "b"]
    assert {spec.id for spec in expand_inputs([f"{tmp_path}/**/*.svs"])} == {"a", "b", "c"}


def test_a_file_with_brackets_in_its_name_is_itself(tmp_path: Path) -> None:
    """A name that looks like a pattern and exists is a slide."""
    (path,) = touch(tmp_path, "a[1].svs")
    assert [spec.uri for spec in expand_inputs([path])] == [str(path)]


def test_a_missing_slide_is_left_to_fail_alone(tmp_path: Path) -> None:
    """A slide named outright passes unchecked, so that it does not stop the others."""
    (here,) = touch(tmp_path, "here.svs")
    assert [spec.id for spec in expand_inputs([str(here), f"{tmp_path}/gone.svs"])] == ["here", "gone"]


@pytest.mark.parametrize("name", ["", "*.svs"])
def test_a_folder_or_pattern_without_slides_says_so(tmp_path: Path, name: str) -> None:
    """Naming many slides and finding none is an error."""
    with pytest.raises(SlideNotFound, match=r"no (slide in|file matches)"):
        expand_inputs([f"{tmp_path}/{name}".rstrip("/")])


def test_nothing_named_is_an_error() -> None:
    """No inputs, and an empty name, are refused."""
    with pytest.raises(SlideNotFound, match="no slides given"):
        expand_inputs([])
    with pytest.raises(InputError, match="empty"):
        expand_inputs([" "])


def test_a_bucket_prefix_and_pattern_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes give what looks like slides; patterns give what matches, within a folder unless ``**`` is said."""
    keys = ["s3://b/p/a.svs", "s3://b/p/n.txt", "s3://b/p/x.y/c.svs", "s3://b/p/z?.svs"]
    monkeypatch.setattr(inputs.store, "list_uris", lambda prefix: [key for key in keys if key.startswith(prefix)])
    monkeypatch.setattr(inputs.store, "exists", lambda uri: uri in keys)
    slides = ["s3://b/p/a.svs", "s3://b/p/x.y/c.svs", "s3://b/p/z?.svs"]
    assert [spec.uri for spec in expand_inputs(["s3://b/p"])] == slides
    assert [spec.uri for spec in expand_inputs(["s3://b/p/x.y/"])] == ["s3://b/p/x.y/c.svs"]
    assert [spec.uri for spec in expand_inputs(["s3://b/p/*.svs"])] == ["s3://b/p/a.svs", "s3://b/p/z?.svs"]
    assert [spec.uri for spec in expand_inputs(["s3://b/p/**/*.svs"])] == slides
    assert [spec.id for spec in expand_inputs(["s3://b/p/[a-c].svs"])] == ["a"]
    with pytest.raises(SlideNotFound, match="nothing matches"):
        expand_inputs(["s3://b/p/*.ndpi"])
    with pytest.raises(InputError, match="name the bucket"):
        expand_inputs(["s3://*/p"])


def test_a_web_address_is_one_slide_named_by_its_path() -> None:
    """Queries, which may hold signatures, never reach the id."""
    (spec,) = expand_inputs(["https://host/dir/a%20b.svs?sig=secret"])
    assert "secret" not in spec.id
    assert spec.id.startswith("a_b-")


def test_namesakes_get_different_stable_ids(tmp_path: Path) -> None:
    """Slides of one name in different folders get ids that do not depend on the order they are named in."""
    one, two = touch(tmp_path, "one/s.svs", "two/s.svs")
    forwards = {spec.uri: spec.id for spec in expand_inputs([one, two])}
    backwards = {spec.uri: spec.id for spec in expand_inputs([two, one])}
    assert forwards == backwards
    assert forwards[str(one)].startswith("one-s-")
    assert len(set(forwards.values())) == 2


def test_ids_that_differ_only_in_case_are_told_apart(tmp_path: Path) -> None:
    """File systems that ignore case would put both in one folder."""
    ids = [spec.id.lower() for spec in expand_inputs(touch(tmp_path, "x/Slide.svs", "y/slide.svs"))]
    assert len(set(ids)) == 2


def test_a_slide_named_twice_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative, absolute and file:// names of one file are the same slide."""
    (path,) = touch(tmp_path, "a.svs")
    monkeypatch.chdir(tmp_path)
    assert len(expand_inputs([path, "a.svs", f"file://{path}", tmp_path])) == 1


def test_of_two_demands_on_one_slide_the_second_fails() -> None:
    """Two resolutions for one slide cannot both hold: the first is done, the second is an error of its own."""
    first, second = unique_specs([SlideSpec("a.svs", mpp=0.25), SlideSpec("a.svs", mpp=0.5)])
    assert first.mpp == 0.25 and not first.error
    assert "given twice" in second.error and second.id != first.id


def test_expanding_is_idempotent(tmp_path: Path) -> None:
    """What came out can go in again and stays the same."""
    specs = expand_inputs(touch(tmp_path, "one/s.svs", "two/s.svs", "two/ä b.svs"))
    assert expand_inputs(specs) == specs


@given(st.text())
def test_an_id_is_always_one_safe_folder_name(text: str) -> None:
    """Whatever a slide or a manifest calls itself, its folder stays below the output."""
    name = safe_id(text)
    assert re.fullmatch(r"[A-Za-z0-9_-][\w.-]{0,118}[A-Za-z0-9_-]|[A-Za-z0-9_-]", name, re.ASCII)
    assert name.lower() not in ("report", "con", "nul")
    assert safe_id(name) == name


@given(st.lists(st.text(min_size=1), min_size=2, max_size=2, unique=True))
def test_different_names_get_different_ids(pair: list[str]) -> None:
    """What is replaced to make a name safe never makes two slides one."""
    assert safe_id(pair[0]) != safe_id(pair[1])


@pytest.mark.parametrize("evil", ["../../etc/passwd", "/etc/passwd", "..", ".", "a/b", "a\\b", "report", "nul.txt"])
def test_ids_cannot_leave_the_output(evil: str, tmp_path: Path) -> None:
    """Path separators, parent folders and reserved names do not survive in a manifest's ids."""
    (spec,) = expand_inputs([manifest(tmp_path, f'sample_id,image_path\n"{evil}",a.svs\n')])
    assert (tmp_path / spec.id).resolve().parent == tmp_path.resolve()
    assert spec.id != evil


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("slide,mpp\na.svs,0.25\nb.svs,\n", [("a", 0.25, None), ("b", None, None)]),
        ("wsi,mpp\na.svs,0.5\n", [("a", 0.5, None)]),
        (
            "sample_id,image_path,mask_path,spacing_at_level_0,patient_id\ns1,a.svs,m.geojson,0.25,p\n",
            [("s1", 0.25, "m.geojson")],
        ),
        ("path,wsi_mpp,wsi_magnification\na.svs,0.25,40\n", [("a", 0.25, None)]),
        ("\ufeffSlide, MPP \r\n a.svs , 0.25 \r\n\r\n", [("a", 0.25, None)]),
        ("slide\na.svs\n", [("a", None, None)]),
        ("Slide Path,Spacing at level 0,Mask-Path\na.svs,0.25,m.png\n", [("a", 0.25, "m.png")]),
    ],
)
def test_manifests_of_the_tools_in_use_are_read(tmp_path: Path, text: str, expected: list[tuple[object, ...]]) -> None:
    """Every known set of headers gives slides, resolutions, masks and ids; paths are relative to the manifest."""
    specs = expand_inputs([manifest(tmp_path, text)])
    assert [(spec.id, spec.mpp, spec.mask and Path(spec.mask).name) for spec in specs] == expected
    assert all(Path(spec.uri).parent == tmp_path for spec in specs)


def test_relative_paths_of_windows_are_found(tmp_path: Path) -> None:
    """A backslash separates folders where the file is there under that reading only."""
    (tmp_path / "scans").mkdir()
    for name in ("scans/a.svs", "odd\\b.svs"):
        (tmp_path / name).touch()
    specs = expand_inputs([manifest(tmp_path, "slide\nscans\\a.svs\nodd\\b.svs\nscans\\gone.svs\n")])
    assert [spec.uri for spec in specs] == [
        f"{tmp_path}/{name}" for name in ("scans/a.svs", "odd\\b.svs", "scans\\gone.svs")
    ]


ROWS = "slide,mpp\na.svs,0.25\nb.svs,0.5\n"


@pytest.mark.parametrize(
    "data",
    [
        ROWS.replace(",", ";").encode(),
        b"slide;mpp\na.svs;0,25\nb.svs;0,5\n",
        b'slide,mpp\na.svs,"0,25"\nb.svs,"0,5"\n',
        b"\xef\xbb\xbfsep=;\nslide;mpp\na.svs;0.25\nb.svs;0.5\n",
        ROWS.replace(",", "\t").encode(),
        ROWS.encode("utf-16"),
        ROWS.encode("utf-16-le").join([b"\xff\xfe", b""]),
        ROWS.replace("\n", "\r").encode(),
        ROWS.replace("\n", "\r\n\r\n").encode(),
        "slide,mpp,note\na.svs,0.25,Müller\nb.svs,0.5,\n".encode("cp1252"),
    ],
    ids=[
        "semicolons",
        "decimal commas",
        "quoted commas",
        "sep=",
        "tabs",
        "UTF-16",
        "UTF-16 LE",
        "CR",
        "CRLF",
        "cp1252",
    ],
)
def test_a_manifest_as_spreadsheets_write_it(tmp_path: Path, data: bytes) -> None:
    """Every separator, encoding and line end gives the same slides and resolutions."""
    (tmp_path / "m.csv").write_bytes(data)
    assert [(spec.id, spec.mpp) for spec in expand_inputs([f"{tmp_path}/m.csv"])] == [("a", 0.25), ("b", 0.5)]


@pytest.mark.parametrize("cell", ["NA", "n/a", "none", "NULL", "-"])
def test_a_resolution_that_is_not_known_is_left_to_the_slide(tmp_path: Path, cell: str) -> None:
    """R writes NA; that is no resolution, and no error."""
    assert expand_inputs([manifest(tmp_path, f"slide,mpp\na.svs,{cell}\n")])[0].mpp is None


def test_a_zero_byte_in_a_manifest_is_named(tmp_path: Path) -> None:
    """No path may hold one: the message says in which row it is; the other slides go on."""
    good, bad = expand_inputs([manifest(tmp_path, "slide\na.svs\nb\0.svs\n")])
    assert not good.error and "row 3 holds a zero byte" in bad.error


def test_folders_that_are_links_are_entered_once(tmp_path: Path) -> None:
    """A linked subfolder is searched; a link that leads back up ends the search there."""
    touch(tmp_path, "store/a.svs", "in/b.svs")
    (tmp_path / "in/batch").symlink_to(tmp_path / "store")
    (tmp_path / "in/up").symlink_to(tmp_path / "in")
    assert [spec.id for spec in expand_inputs([tmp_path / "in"])] == ["b", "a"]


def test_hidden_and_server_folders_are_not_entered(tmp_path: Path) -> None:
    """A bin and the thumbnails of a file server hold no slides of the study."""
    touch(tmp_path, "a.svs", ".trash/b.svs", "@eaDir/a.svs", "#recycle/c.svs", "lost+found/d.svs")
    assert [spec.id for spec in expand_inputs([tmp_path])] == ["a"]


def test_pipes_and_sockets_in_a_folder_are_not_slides(tmp_path: Path) -> None:
    """Opening a pipe would wait for ever; a broken link is a slide, which fails by name."""
    touch(tmp_path, "a.tif")
    os.mkfifo(tmp_path / "pipe.tif")
    (tmp_path / "gone.tif").symlink_to(tmp_path / "nowhere.tif")
    assert [spec.id for spec in expand_inputs([tmp_path])] == ["a", "gone"]


@pytest.mark.parametrize("suffix", ["qptiff", "ptif", "tf8", "tf2", "OME.TF2"])
def test_less_usual_suffixes_of_tiff_are_found(tmp_path: Path, suffix: str) -> None:
    """A scanner's suffix is not a reason to miss its slides."""
    touch(tmp_path, f"a.{suffix}")
    assert len(expand_inputs([tmp_path])) == 1


def test_dicom_without_a_suffix_is_found(tmp_path: Path) -> None:
    """An archive names its files by UID; the mark at byte 128 tells them from others."""
    for name in ("1.2.840.1", "IM0001", "README"):
        (tmp_path / name).write_bytes(bytes(128) + (b"DICM" if name != "README" else b"TEXT"))
    assert [Path(spec.uri).name for spec in expand_inputs([tmp_path])] == ["1.2.840.1", "IM0001"]


def test_images_of_other_kinds_are_passed_over_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log counts them, and so does the error of a folder that holds nothing else."""
    touch(tmp_path, "a.png", "b.PNG", "c.vsi")
    with pytest.raises(SlideNotFound, match=r"passed over: 2 \.png, 1 \.vsi"):
        expand_inputs([tmp_path])
    touch(tmp_path, "a.svs")
    assert [spec.id for spec in expand_inputs([tmp_path])] == ["a"]
    assert "2 .png, 1 .vsi" in caplog.text


def test_a_tab_separated_manifest_is_read(tmp_path: Path) -> None:
    """A .tsv manifest has tabs."""
    assert read_manifest(manifest(tmp_path, "slide\tmpp\na.svs\t0.5\n", "m.tsv"))[0].mpp == 0.5


def test_a_manifest_keeps_uris(tmp_path: Path) -> None:
    """Absolute paths and URIs are not made relative to the manifest."""
    specs = read_manifest(manifest(tmp_path, "slide\n/data/a.svs\ns3://b/c.svs\nfile:///x/y.svs\n"))
    assert [spec.uri for spec in specs] == ["/data/a.svs", "s3://b/c.svs", "/x/y.svs"]


def test_a_manifest_in_a_bucket_is_read_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its relative paths are relative to its prefix."""
    monkeypatch.setattr(inputs.store, "read_bytes", lambda uri: b"slide\nsub/a.svs\n")
    assert read_manifest("s3://b/study/m.csv")[0].uri == "s3://b/study/sub/a.svs"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("slide,mpp\n", "no slides"),
        ("name,mpp\na.svs,0.5\n", r"no column names the slides.*found: name, mpp"),
        ("slide,slide\na,b\n", r"column 'slide' is there twice"),
        ("slide,id\na.svs,x\nb.svs,x\n", r"id 'x' is given to more than one slide"),
    ],
)
def test_a_wrong_manifest_names_row_and_column(tmp_path: Path, text: str, message: str) -> None:
    """Whatever is wrong, the message says where, counting the header as row 1."""
    with pytest.raises(ManifestError, match=message):
        expand_inputs([manifest(tmp_path, text)])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (",0.5", r"row 3, column 'slide': empty"),
        ("b.svs,zero", r"row 3, column 'mpp': mpp 'zero' is not a number"),
        ("b.svs,0", r"row 3, column 'mpp': mpp 0"),
        ("b.svs,nan", r"row 3, column 'mpp': mpp nan"),
        ("b.svs,-1", r"row 3, column 'mpp'"),
        ("C:,odd,0.5,x", r"row 3 has 4 cells and the header 2"),
    ],
)
def test_a_wrong_row_fails_alone(tmp_path: Path, row: str, message: str) -> None:
    """A row that is wrong becomes a slide with an error that says where; its neighbours are slides as ever."""
    first, wrong, last = expand_inputs([manifest(tmp_path, f"slide,mpp\na.svs,0.5\n{row}\nz.svs,0.5\n")])
    assert not first.error and not last.error
    assert re.search(message, wrong.error)


def test_a_manifest_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    """A missing manifest and a binary one are told apart."""
    with pytest.raises(ManifestError, match="no manifest at"):
        expand_inputs([f"{tmp_path}/none.csv"])
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="cannot be read as UTF-8"):
        expand_inputs([f"{tmp_path}/binary.csv"])


def test_a_resolution_for_all_yields_to_the_manifest(tmp_path: Path) -> None:
    """``mpp`` is for the slides of which the manifest says nothing."""
    specs = expand_inputs([manifest(tmp_path, "slide,mpp\na.svs,0.25\nb.svs,\n")], mpp=0.5)
    assert [spec.mpp for spec in specs] == [0.25, 0.5]
    with pytest.raises(OptionError):
        expand_inputs(["a.svs"], mpp=float("nan"))
