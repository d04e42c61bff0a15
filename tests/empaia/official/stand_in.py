"""A test fixture in the place of an app: posts a little of all that the default model's app must, then finalizes.

``python stand_in.py HOW``: "sound", or what is to be wrong with it (see ``main``).
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import numpy as np

from wsi_mmm.config import empaia_job
from wsi_mmm.empaia.bodies import Annotation, ClassOf, Collection, Polygon, Primitive, Record, Reference, Wsi
from wsi_mmm.empaia.client import AppApi, Mode
from wsi_mmm.empaia.job_inputs import read_slide
from wsi_mmm.empaia.pixelmaps import MapLevel, Pixelmap, tile_bytes

CLASSES = "org.empaia.wsi_mmm.default.v3.0.classes"


async def main(how: str) -> None:
    """Do it soundly, or with one thing wrong."""
    async with AppApi(empaia_job()) as api:
        if how == "silence":
            return
        if how == "failure":
            await api.failure("The slide is not of tissue.")
            return
        mode, said = await api.mode(), await api.input("slide")
        wsi = read_slide(said)
        picture = await api.region(wsi.id, 0, (0, 0, 64, 64))
        assert picture[:3] == b"\xff\xd8\xff"
        if how == "waits":
            print("waiting", flush=True)
            await asyncio.sleep(60)
        await outputs(api, wsi, mode, how)
        await api.progress(1.0)
        await api.finalize()


async def outputs(api: AppApi, wsi: Wsi, mode: Mode, how: str) -> None:
    """Two polygons of tissue, three nuclei, and what is said of them."""
    slide = Reference("wsi", wsi.id)
    tissue = await posted(api, "tissue", Collection("polygon", name="tissue", reference=slide), squares(wsi, 2))
    nuclei = await posted(api, "nuclei_objects", Collection("polygon", name="nuclei", reference=slide), squares(wsi, 3))
    leaf = "nuclei.tumor" if how == "class" else "nuclei.nucleus"
    await posted(api, "nuclei_classes", Collection("class"), [ClassOf(f"{CLASSES}.{leaf}", one) for one in nuclei])
    about = tissue if how == "reference" else nuclei
    sure = [Primitive("confidence", "float", 0.5, Reference("annotation", one)) for one in about]
    await posted(api, "nuclei_confidences", Collection("float"), sure)
    stain = [ClassOf(f"{CLASSES}.stain.H_and_E", one) for one in tissue]
    await posted(api, "stain_classes", Collection("class"), stain)
    if how != "missing":
        await api.post_output("stain_slide_class", Primitive("stain", "string", "H&E", slide))
    await density(api, wsi)
    if mode is Mode.preprocessing:
        await api.post_output("nuclei_slide_count", Primitive("count", "integer", 3, slide))
        await api.post_output("nuclei_slide_density", Primitive("density", "float", 9, slide))
        return
    regions = [Reference("annotation", one["id"]) for one in (await api.input("regions"))["items"]]
    counts = [Primitive("count", "integer", 3, one) for one in regions]
    await posted(api, "nuclei_counts", Collection("integer"), counts)
    await posted(api, "nuclei_densities", Collection("float"), [Primitive("d", "float", 9, one) for one in regions])


async def density(api: AppApi, wsi: Wsi) -> None:
    """A map of one tile."""
    made = Pixelmap("density", "continuous", "float32", wsi.id, (MapLevel(0, (0, 0, 0, 0)),), limits=(0.0, 9.0))
    posted_id = await api.post_output("nuclei_map", made)
    await api.put_tile(made, posted_id, (0, 0, 0), data=tile_bytes(made, np.full((256, 256), 9.0)))


def squares(wsi: Wsi, count: int) -> list[Record]:
    """Polygons in a row."""
    corners = [((x, 10), (x + 8, 10), (x + 8, 18), (x, 18)) for x in range(10, 10 + 20 * count, 20)]
    return [Annotation("square", Polygon(one), wsi, wsi.npp) for one in corners]


async def posted(api: AppApi, key: str, empty: Collection, records: Any) -> list[str]:
    """Ids of what a collection was filled with."""
    collection = await api.post_output(key, empty)
    return [one async for ids in api.post_items(collection, records) for one in ids]


if __name__ == "__main__":
    assert "EMPAIA_TOKEN" in os.environ and os.environ["EMPAIA_TOKEN"] not in " ".join(sys.argv)
    asyncio.run(main(sys.argv[1]))
