"""Keys of S3 that a file system could not have: listed under their exact names, and read."""

from __future__ import annotations

import pytest

from helpers.made_slides import Made
from wsi_mmm.errors import NotFound, OutputError, SlideNotFound, StorageError
from wsi_mmm.inputs import expand_inputs
from wsi_mmm.slides import open_slide
from wsi_mmm.storage import odd_keys, store

ODD = [
    "x//y.tif", "/lead.tif", "a/../b.tif", "../up.tif", "./here.tif", "full.tif/", "tab\t.tif", "bell\x07.tif",
    "a//", "..",
]  # fmt: skip
PLAIN = [
    "a%2Fb.tif", "tail .tif", "a#b?c.tif", "a+b&c=d.tif", "ü 日本.tif", "a[1]*{1}.tif", "100%\\b.tif",
    "~^|`'\"<>.tif", "...",
]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # botocore's own


def _put(key: str, data: bytes) -> None:
    import boto3

    boto3.client("s3").put_object(Bucket="slides", Key=key, Body=data)


def test_every_kind_of_key_is_listed_and_read(bucket: str) -> None:
    """Beside each other below one prefix; every object has its own bytes, read whole and in ranges."""
    wanted = {f"{bucket}/p/{key}": f"bytes of {key}".encode() for key in (*ODD, *PLAIN)}
    for uri, data in wanted.items():
        _put(uri.removeprefix(f"{bucket}/"), data)
    _put("p/", b"")
    _put("p/folder.tif/", b"")
    assert store.list_uris(f"{bucket}/p") == store.list_uris(f"{bucket}/p/") == sorted(wanted)
    assert store.list_uris(bucket) == sorted(wanted)
    assert store.list_folders(bucket) == ["p"]
    for uri, data in wanted.items():
        opened = store.open_store(uri)
        assert (opened.size, bytes(opened.get_ranges([(3, 4)])[0])) == (len(data), data[3:7])
        assert store.read_bytes(uri) == data
        assert odd_keys.is_odd(uri) == (uri.removeprefix(f"{bucket}/p/") in ODD)


@pytest.mark.parametrize("key", ["x//y.tif", "/y.tif", "x/../y.tif", "y.tif/", "x\ty.tif"])
def test_one_odd_key_leaves_the_slides_beside_it(bucket: str, key: str) -> None:
    """Each is found, the plain one and the odd one, which is not taken for another object."""
    _put("q/good.tif", b"x")
    _put("q/y.tif", b"y")
    _put(f"q/{key}", b"z")
    found = sorted(spec.uri for spec in expand_inputs([f"{bucket}/q/"]))
    if key.endswith("/"):  # obstore names both alike, so it is noticed
        key = "y.tif/"
    assert found == sorted([f"{bucket}/q/good.tif", f"{bucket}/q/y.tif", f"{bucket}/q/{key}"])


def test_markers_of_folders_are_no_slides(bucket: str) -> None:
    """Consoles make an empty object whose name ends in a slash, even one that ends in .tif/."""
    _put("q/", b"")
    _put("q/folder.tif/", b"")
    _put("q/good.tif", b"x")
    assert [spec.uri for spec in expand_inputs([f"{bucket}/q/"])] == [f"{bucket}/q/good.tif"]
    assert list(store.list_sizes(f"{bucket}/q")) == [f"{bucket}/q/good.tif"]


def test_a_long_listing_with_an_odd_key_is_whole(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page after page; a server whose pages begin again is an error, no endless loop."""
    keys = [f"many/{n}//a.tif" for n in range(7)]
    for key in keys:
        _put(key, b"x")
    small = odd_keys._list_page
    monkeypatch.setattr(odd_keys, "_list_page", lambda prefix, options: small(prefix, options | {"MaxKeys": 2}))
    assert store.list_uris(f"{bucket}/many") == [f"{bucket}/{key}" for key in keys]

    async def endless(prefix: str, options: object) -> dict[str, object]:
        return {"IsTruncated": True, "NextContinuationToken": "again"}

    monkeypatch.setattr(odd_keys, "_list_page", endless)
    with pytest.raises(StorageError, match="does not end"):
        store.list_uris(f"{bucket}/many")


def test_a_slide_with_an_odd_key_is_the_slide(bucket: str, small_slide: Made) -> None:
    """Fingerprint and pixels; a missing one is not found, nothing is written there."""
    _put("x//a.tif", small_slide.path.read_bytes())
    with open_slide(f"{bucket}/x//a.tif") as far, open_slide(str(small_slide.path)) as near:
        assert far.info.fingerprint == near.info.fingerprint
        assert (far.read_region(200, 100, 300, 300) == near.read_region(200, 100, 300, 300)).all()
    with pytest.raises(SlideNotFound, match="no such object"):
        open_slide(f"{bucket}/x//none.tif")
    with pytest.raises(StorageError, match="no such bucket"):
        store.open_store("s3://no-such-bucket/x//a.tif")
    assert not store.exists(f"{bucket}/x//none.tif")
    for write in (store.delete, store.object_store, lambda uri: store.write_bytes(uri, b"x")):
        with pytest.raises(OutputError, match="choose another"):
            write(f"{bucket}/x//b")


def test_an_empty_odd_object_has_no_bytes(bucket: str) -> None:
    """No range of it is valid, which is no error."""
    _put("x//empty", b"")
    assert store.open_store(f"{bucket}/x//empty").size == 0
    with pytest.raises(NotFound):
        store.open_store(f"{bucket}/x//empty/")


def test_what_is_shown_has_no_control_characters(bucket: str) -> None:
    """A name can break no line and move no cursor."""
    with pytest.raises(NotFound) as caught:
        store.open_store(f"{bucket}/a\n\x1b[2Jb.tif")
    assert str(caught.value).startswith("s3://slides/a\\x0a\\x1b[2Jb.tif: ")
