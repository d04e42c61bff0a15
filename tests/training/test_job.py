"""A training from its configuration to the model folder: divided together, resumed, nothing secret, no peeking."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import wsi_mmm
from helpers.annotation_targets import DECODER, ENCODER, MODEL, SIZE, disc_task, discs, joint, patches, tissue_task
from wsi_mmm.errors import ConfigError, InputError, ManifestError, ModelError, OutputError
from wsi_mmm.model.checkpoint import load_model, save_model
from wsi_mmm.outputs.exports import write_features
from wsi_mmm.slides.fake import synthetic_slide
from wsi_mmm.training import job
from wsi_mmm.training.config import parse
from wsi_mmm.training.data.base import Sample
from wsi_mmm.training.data.embedding import source_identity
from wsi_mmm.training.data.images import ImageItems
from wsi_mmm.training.divide import divide, fixed_parts
from wsi_mmm.training.fit import StepReport, TrainingListener
from wsi_mmm.training.job import facts_of, prepare, take_over, train
from wsi_mmm.training.state import read, weights_of


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_patient_of_two_data_sets_is_on_one_side_in_both(tmp_path: Path) -> None:
    """The split is drawn over all data sets together: the patients of a part are the same in each of them."""
    prepared = prepare(parse(joint(tmp_path)))
    sides = [
        {
            part: {str(one.feed.source.index.groups[n]) for n in one.split.part(part)}
            for part in ("train", "val", "test")
        }
        for one in prepared.data
    ]
    assert sides[0] == sides[1]
    assert sorted(map(len, sides[0].values())) == [1, 1, 2]
    rows = prepared.summary()
    assert [row["data"] for row in rows] == ["patches", "discs"]
    assert rows[0]["classes"] == {"dark": 4, "pale": 4}
    assert (rows[0]["train"], rows[0]["val"], rows[0]["test"]) == (8, 4, 4)
    assert job.describe(prepared).startswith("2 data sets (12 train, 6 val, 6 test items)")


def test_a_table_says_who_is_on_which_side(tmp_path: Path) -> None:
    """A split column holds for its patients in every data set; who has no word is not used, others are drawn."""
    table = tmp_path / "slides.csv"
    table.write_text("slide,patient,part,x\ns1,p0,train,a\ns2,p1,testing,a\ns3,p2,,a\n")
    task = {"name": "x", "kind": "classify", "classes": ["a", "b"]}
    slides = {"table": str(table), "patient": "patient", "split": "part", "truth": {"x": {"columns": ["x"]}}}
    raw = joint(tmp_path, task=[tissue_task(), disc_task(), task])
    raw["data"] += [{"name": "t", "kind": "slide-table", "slides": slides}]
    config = parse(raw)
    assert fixed_parts(config) == {"p0": "train", "p1": "test", "p2": ""}
    feeds = [entry.open(job.data_context(config)) for entry in config.data[:2]]
    for source, split in zip(feeds, divide([(s.name, s.index) for s in feeds], config), strict=True):
        sides = {part: {str(source.index.groups[n]) for n in split.part(part)} for part in ("train", "val", "test")}
        assert "p0" in sides["train"] and "p1" in sides["test"] and not any("p2" in some for some in sides.values())
        assert sum("p3" in some for some in sides.values()) == 1
    table.write_text("slide,patient,part,x\ns1,p0,train,a\ns2,p0,test,a\n")
    with pytest.raises(ManifestError, match="the split column divides"):
        fixed_parts(config)
    table.write_text("slide,patient,part,x\ns1,p0,maybe,a\n")
    with pytest.raises(ManifestError, match="give train, val, test or nothing"):
        fixed_parts(config)


def test_a_picture_on_two_sides_is_named(tmp_path: Path) -> None:
    """One folder listed twice with different patients is refused when pictures are compared, naming both sides; equal
    names in two data sets alone are no leak, since every folder may have a 1.png."""
    raw = joint(tmp_path)
    raw["data"] = [
        {**patches(tmp_path / "patches"), "name": name, "group": group}
        for name, group in (("one", "/(p[0-9]+)-"), ("two", "-([0-9]+).png"))
    ]
    raw["task"] = [tissue_task()]
    assert prepare(parse(raw))
    with pytest.raises(InputError, match=r"pictures? in more than one part: .*one/.*png.*two/.*put each on one side"):
        prepare(parse(raw, ["split.pictures=true"]))


def test_copies_under_other_names_are_found_when_asked_for(tmp_path: Path) -> None:
    """split.pictures compares decoded pictures before anything is learnt; without it names and groups are compared."""
    raw = joint(tmp_path)
    folder = tmp_path / "patches" / "dark"
    whole = prepare(parse(raw))
    held = next(str(whole.data[0].feed.source.index.groups[n]) for n in whole.data[0].split.test)
    known = next(str(whole.data[0].feed.source.index.groups[n]) for n in whole.data[0].split.train)
    source = next(folder.glob(f"{held}-*.png"))
    next(folder.glob(f"{known}-*.png")).write_bytes(source.read_bytes())
    assert prepare(parse(raw))
    with pytest.raises(InputError, match="1 picture in more than one part"):
        prepare(parse(raw, ["split.pictures=true"]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["split.val=0.6", "split.test=0.5"], "shares of train, val and test"),
        (["split.folds=2", "split.fold=2"], r"split\.fold is 2 of 2: folds count from 0"),
        (["split.folds=9"], "groups do not fill 9 folds"),
        (["split.val=0", "split.test=0", "validation.best=tissue.accuracy"], "want held-out items: give split.val"),
        (["out=s3://bucket/run"], r"out is s3://bucket/run: the model is written to a local folder"),
    ],
)
def test_what_cannot_be_divided_is_said_before_anything_is_learnt(
    tmp_path: Path, settings: Sequence[str], words: str
) -> None:
    """One line that names the option; no folder is made."""
    with pytest.raises((ConfigError, OutputError), match=words):
        train(parse(joint(tmp_path), settings))
    assert not (tmp_path / "run").exists()


def test_a_data_set_without_items_is_named(tmp_path: Path) -> None:
    """A data set that is one patient, who was held out, has nothing to learn from; nor has an empty folder."""
    raw = joint(tmp_path, split={"val": 0.8})
    raw["data"][1]["group"] = "(p)[0-9]"
    with pytest.raises(ConfigError, match=r"data 'discs' has no item to learn from: .*smaller split\.val"):
        prepare(parse(raw))
    for path in (tmp_path / "discs" / "images").glob("*.png"):
        path.unlink()
    with pytest.raises(InputError, match=r"no picture .* below"):
        prepare(parse(raw))


def test_the_same_again_gives_the_same_folder(tmp_path: Path) -> None:
    """A training that is over, and one that was stopped in between, leave the same files as one without a stop."""
    raw = joint(tmp_path, optim={"average": 0.9})
    first = train(parse(raw))
    assert Path(first.model) == tmp_path / "run" / "model"
    assert set(first.val) == set(first.test) == {"tissue", "disc"} and first.step == 3 and first.items == 12
    written = files(Path(first.model))
    again = train(parse(raw))
    assert files(Path(again.model)) == written and again.test == first.test

    def stop(progress: StepReport) -> None:
        if progress.step == 2:
            raise ZeroDivisionError

    other = parse(raw, [f"out={tmp_path / 'other'}", "checkpoint.every=1"])
    with pytest.raises(ZeroDivisionError):
        train(other, TrainingListener(on_step=stop))
    resumed: list[int] = []
    done = train(other, TrainingListener(on_step=lambda p: resumed.append(p.step)))
    assert resumed == [2, 3]
    assert files(Path(done.model))["model.safetensors"] == written["model.safetensors"]


def test_another_configuration_does_not_go_on(tmp_path: Path) -> None:
    """Other data in the same folder is refused by name; the pace of reading may change."""
    train(parse(joint(tmp_path)))
    assert train(parse(joint(tmp_path), ["threads=1"])).model
    with pytest.raises(ModelError, match=r"another configuration \(config\.split"):
        train(parse(joint(tmp_path), ["split.seed=7"]))


def test_the_model_is_that_of_the_best_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With validation.best the folder holds the weights of the best step, and the card says of which."""
    heights = {1: 0.1, 2: 0.9, 3: 0.5}
    at = iter(heights.values())
    real = job.fitting.figures  # type: ignore[attr-defined]

    def planned(*args: Any, **more: Any) -> Any:
        found = real(*args, **more)
        found["tissue"]["accuracy"] = next(at)
        return found

    monkeypatch.setattr(job.fitting, "figures", planned)
    raw = joint(tmp_path, validation={"every": 1, "best": "tissue.accuracy"}, checkpoint={"every": 1, "keep": 9})
    done = train(parse(raw))
    assert done.step == 2 and done.val["tissue"]["accuracy"] == 0.9
    card = json.loads((Path(done.model) / "card.json").read_text())
    assert card["data"]["weights"] == "of step 2, the best by tissue.accuracy"
    saved = load_model(done.model).state_dict()
    same = []
    for step in (2, 3):
        kept = weights_of(read(str(tmp_path / "run" / "checkpoints" / f"step-{step:08d}.safetensors"))[0])
        assert kept.keys() == saved.keys()
        # the folder's weights are of half precision
        same.append(all(torch.equal(saved[key].half(), kept[key].half()) for key in kept))
    assert same == [True, False]


def test_the_card_holds_the_configuration_without_credentials(tmp_path: Path) -> None:
    """What the model was made from stands in its card and its checkpoints; keys in addresses do not."""
    config = parse(joint(tmp_path), ["model.licence=ours", "steps=1"])
    card = json.loads((Path(train(config).model) / "card.json").read_text())
    assert card["licence"] == "ours" and card["data"]["configuration"] == json.loads(json.dumps(facts_of(config)))
    data = config.data[0].model_copy(update={"path": "https://me:hush@host/x?sig=abc"})
    secret = config.model_copy(update={"data": (data, config.data[1])})
    for written in (facts_of(secret), job.fit_plan(secret).config):
        text = json.dumps(written)
        assert "host/x" in text and "hush" not in text and "sig=abc" not in text


def test_the_test_part_is_never_read_while_learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the last step is done every read is of a training or validation item; only then the test part is read."""
    config = parse(joint(tmp_path), ["validation.every=1"])
    forbidden = {
        str(one.feed.source.index.keys[n]) for one in prepare(config).data for n in one.split.test.tolist()
    }  # fmt: skip
    assert len(forbidden) == 6
    learning: set[str] = set()
    later: set[str] = set()
    over: list[int] = []
    real = ImageItems.read

    def read(self: ImageItems, numbers: Sequence[int], size: int) -> list[Sample]:
        (later if over else learning).update(self.index.keys[n] for n in numbers)
        return real(self, numbers, size)

    monkeypatch.setattr(ImageItems, "read", read)
    train(config, TrainingListener(on_validation=lambda step, _: over.append(step) if step == config.steps else None))
    assert learning and not learning & forbidden
    assert forbidden <= later


def test_a_fraction_holds_for_the_data_sets_that_are_named(tmp_path: Path) -> None:
    """Half of the items of one data set, every class among them; the other data set and the held-out parts stay."""
    raw = joint(tmp_path, sampling={"fraction": 0.5, "fraction_of": ["patches"]})
    rows = prepare(parse(raw)).summary()
    assert [row["train"] for row in rows] == [4, 4] and set(rows[0]["classes"]) == {"dark", "pale"}
    everywhere = prepare(parse(raw, ["sampling.fraction_of=[]"])).summary()
    assert [row["train"] for row in everywhere] == [4, 2]
    assert [row["val"] for row in everywhere] == [row["val"] for row in rows] == [4, 2]


def test_weights_are_taken_over_where_they_fit(tmp_path: Path) -> None:
    """model.start: encoder, decoder and heads of one name are those of the folder; another encoder is refused,
    saying which one to give."""
    raw = joint(tmp_path, steps=1)
    folder = train(parse(raw)).model
    old = load_model(folder)
    new = joint(tmp_path, out=str(tmp_path / "next"), task=[tissue_task(), disc_task("ring")])
    new["data"][1]["task"] = "ring"
    new["model"] = {**new["model"], "start": folder}
    begun = prepare(parse(new, ["model.mean=[0.1,0.2,0.3]"])).model
    before, after = old.state_dict(), begun.state_dict()
    shared = [key for key in after if key in before]
    assert len(shared) < len(after) and all(torch.equal(before[key], after[key]) for key in shared)
    assert any("ring" in key for key in after if key not in before)
    assert begun.card.mean == (0.1, 0.2, 0.3) and begun.card.std == old.card.std
    assert take_over(begun, old) == len(shared)
    with pytest.raises(ModelError, match=r"weights do not fit; give its encoder: name resnet18d, args \{\"channels\""):
        prepare(parse(new, ["model.encoder.args={channels=[8,8,16,32]}"]))


def test_the_model_begins_alike_from_its_seed(tmp_path: Path) -> None:
    """One seed, one beginning; another seed, another one."""
    config = parse(joint(tmp_path))
    one, two = (job.begin_model(config).state_dict() for _ in range(2))
    other = job.begin_model(config.model_copy(update={"seed": 1})).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_held_out_items_are_limited_evenly(tmp_path: Path) -> None:
    """validation.items: so many of each data set, the same ones each time, the first and the last among them."""
    raw = joint(tmp_path, validation={"items": 2})
    prepared = prepare(parse(raw))
    keys = [[sample.key for sample in job.held_out(prepared, "val")] for _ in range(2)]
    assert keys[0] == keys[1] and len(keys[0]) == 4
    val = prepared.data[0].split.val
    index = prepared.data[0].feed.source.index
    assert keys[0][:2] == [index.keys[val[0]], index.keys[val[-1]]]


def test_what_is_told_while_it_learns(tmp_path: Path) -> None:
    """A listener hears every step, validation and checkpoint, and a line before and after."""
    lines: list[str] = []
    steps: list[int] = []
    found: list[tuple[int, set[str]]] = []
    kept: list[int] = []
    listener = TrainingListener(
        lambda p: steps.append(p.step), lambda step, f: found.append((step, set(f))),
        lambda step, _: kept.append(step), lines.append,
    )  # fmt: skip
    train(parse(joint(tmp_path), ["validation.every=2", "checkpoint.every=2"]), listener)
    assert steps == [1, 2, 3] and found == [(2, {"tissue", "disc"}), (3, {"tissue", "disc"})] and kept == [2, 3]
    assert lines[0].startswith("2 data sets") and lines[-1].endswith("model, the weights of step 3")
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss/tissue", "loss/disc", "rate"} <= set(told[0]) and told[0]["step"] == 1
    assert "val/disc/dice" in told[-1] or any(name.startswith("val/disc/") for name in told[-1])


def test_sizes_of_the_helper_are_what_these_tests_rely_on(tmp_path: Path) -> None:
    """The tiny pictures are as large as the tiny model's tiles."""
    entry = discs(tmp_path)
    source = replace(prepare(parse(joint(tmp_path / "more"))).data[1].feed).source
    assert source.read([0], SIZE)[0].pixels.shape == (SIZE, SIZE, 3)  # type: ignore[union-attr]
    assert entry["kind"] == "image-masks" and ENCODER["name"] and DECODER["widths"]
    assert np.unique(source.read([0], SIZE)[0].targets["disc"]).tolist() == [-1, 0, 1]  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_dask_cluster_trains_as_one_process_does(tmp_path: Path) -> None:
    """A rank on each of two workers gives the weights of one process, as far as half precision shows them."""
    import json
    import subprocess
    import sys

    from safetensors.torch import load_file

    raw = joint(tmp_path)
    (tmp_path / "raw.json").write_text(json.dumps({**raw, "out": str(tmp_path / "cluster")}))
    code = (
        "import json, pathlib, wsi_mmm\n"
        "from distributed import Client, LocalCluster\n"
        "if __name__ == '__main__':\n"
        f"    raw = json.loads(pathlib.Path({str(tmp_path / 'raw.json')!r}).read_text())\n"
        "    with LocalCluster(2, threads_per_worker=1, dashboard_address=None) as c, Client(c) as client:\n"
        "        print(wsi_mmm.train(raw, client=client).model)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert str(tmp_path / "cluster" / "model") in done.stdout, done.stderr
    alone = load_file(Path(job.train(parse(raw)).model) / "model.safetensors")
    spread = load_file(tmp_path / "cluster" / "model" / "model.safetensors")
    assert alone.keys() == spread.keys()
    assert max(float((alone[k].float() - spread[k].float()).abs().max()) for k in alone) < 2e-3


def test_the_first_class_of_a_segmentation_is_drawn(tmp_path: Path) -> None:
    """A model whose answer is the first class everywhere draws it, unless that class is the background."""
    slide = tmp_path / "s.tiff"
    synthetic_slide(slide, 1, width=256, height=192, mpp=0.5, nuclei=4)
    for classes, drawn in ((["gland", "stroma"], {"gland": 1, "stroma": 0}), (["background", "disc"], {"disc": 0})):
        raw = joint(tmp_path, task=[{**disc_task(), "classes": classes}], model={**MODEL, "tile_size": 64})
        raw["data"] = [{key: value for key, value in raw["data"][1].items() if key != "values"}]
        model = job.begin_model(parse(raw))
        with torch.no_grad():
            model.get_parameter("heads.disc.out.bias").copy_(torch.tensor([30.0, -30.0]))
        save_model(model.eval(), tmp_path / classes[0])
        report = wsi_mmm.run(
            str(slide), tmp_path / classes[0], output=tmp_path / "out" / classes[0], tissue="none", gzip=False
        )
        counts = json.loads((tmp_path / "out" / classes[0] / "s" / "slide.json").read_text())["classes"]["disc"]
        found = json.loads((tmp_path / "out" / classes[0] / "s" / "result.geojson").read_text())["features"]
        assert report.exit_code == 0 and {name: counts[name] for name in drawn} == drawn
        names = [one["properties"]["classification"]["name"] for one in found]
        assert names == [name for name, count in drawn.items() for _ in range(count)]


def bag_training(folder: Path, start: Path, **attributes: Any) -> dict[str, Any]:
    """Bags of vectors that ``start`` made of six slides, by their files; ``attributes`` that are otherwise."""
    made = {"encoder": "start", "model_hash": source_identity(str(start), None), "mpp": 0.5, "patch_size": SIZE,
            "overlap": 0, **attributes}  # fmt: skip
    rows = []
    for number in range(6):
        vectors = np.random.default_rng(number).normal(size=(4, 16)).astype(np.float32)
        write_features(f"{folder}/f{number}/features.zarr", vectors, np.zeros((4, 2), np.int64), made)
        rows.append(f"f{number},{'ab'[number % 2]}")
    (folder / "bags.csv").write_text("\n".join(["slide,grade", *rows]))
    task = {"name": "grade", "kind": "classify", "classes": ["a", "b"], "scope": "bag"}
    slides = {"table": str(folder / "bags.csv"), "truth": {"grade": {"columns": ["grade"]}}}
    data = {"name": "bags", "kind": "bags", "features": f"{folder}/{{slide}}/features.zarr", "slides": slides}
    model = {**MODEL, "start": str(start), "mean": [0.5] * 3, "std": [0.2] * 3}
    split = {"val": 0.34, "test": 0.0}
    return joint(folder, task=[task], data=[data], model=model, split=split)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A model of the encoder of `MODEL`."""
    raw = joint(tmp_path / "first", model={**MODEL, "mean": [0.5] * 3, "std": [0.2] * 3})
    save_model(job.begin_model(parse(raw)), tmp_path / "start")
    return tmp_path / "start"


def test_bags_are_vectors_of_the_model_that_learns_from_them(tmp_path: Path, start: Path) -> None:
    """What the files say must be what the model would make of slides; a training says what it learnt from, and its
    model may be begun with again."""
    raw = bag_training(tmp_path, start)
    done = train(parse(raw, ["steps=1"]))
    card = load_model(done.model).card
    assert card.data["features"]["model_hash"] == source_identity(str(start), None)
    assert prepare(parse(raw, [f"model.start={done.model}"]))  # its encoder is still the one that made them
    with pytest.raises(ConfigError, match="cannot hold vectors of this model, whose encoder is random"):
        prepare(parse({**raw, "model": {key: value for key, value in raw["model"].items() if key != "start"}}))
    with pytest.raises(
        ConfigError, match=r"data 'bags': .*f0/features\.zarr was embedded with mpp 0\.5, model\.mpp is 1:"
    ):
        prepare(parse(raw, ["model.mpp=1.0"]))
    with pytest.raises(ConfigError, match=r"was embedded by 'start' \(model_hash 999999999999\)"):
        prepare(parse(bag_training(tmp_path, start, model_hash="9" * 64)))


def test_bags_do_not_learn_beside_what_changes_their_encoder(tmp_path: Path, start: Path) -> None:
    """Vectors on disk stay what they are while other data moves the encoder: refused unless that is frozen."""
    raw, bags = joint(tmp_path), bag_training(tmp_path, start)
    both = {**bags, "task": [tissue_task(), *bags["task"]], "data": [raw["data"][0], *bags["data"]]}
    with pytest.raises(ConfigError, match=r"'patches' would change the encoder.* set optim\.frozen = (\d+)") as error:
        prepare(parse(both))
    depth = re.search(r"frozen = (\d+)", str(error.value))
    assert depth is not None
    done = train(parse(both, ["steps=2", f"optim.frozen={depth[1]}", f"out={tmp_path}/frozen"]))
    before, after = load_model(start).state_dict(), load_model(done.model).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("encoder."))
