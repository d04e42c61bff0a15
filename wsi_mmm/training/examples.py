"""Configurations to begin with, by what there is to learn from; ``wsi-mmm train --example`` prints them."""

from __future__ import annotations

PICTURES = """\
# wsi-mmm train joint.toml: one encoder learns two tasks from two data sets. --schema lists every option.
out = "runs/joint"
seed = 0
steps = 2000

[model]
name = "joint"
mpp = 0.5                    # micrometres per pixel of what the model sees
tile_size = 256
encoder = { name = "resnet18d", weights = "random" }   # or "pretrained", or a .safetensors file

[[task]]
name = "tissue"
kind = "classify"
classes = ["tumour", "normal"]

[[task]]
name = "gland"
kind = "segment"
classes = ["background", "gland"]

[[data]]
name = "patches"             # patches/tumour/*.png, patches/normal/*.png
kind = "class-folders"
task = "tissue"
path = "patches"
group = "(patient[0-9]+)"    # what must stay on one side of the split
batch = 16

[[data]]
name = "glands"              # glands/images/*.png and glands/masks/*.png, of the same names
kind = "image-masks"
task = "gland"
images = "glands/images"
masks = "glands/masks"
values = { 0 = "background", 1 = "gland", 255 = "" }
batch = 8

[split]
val = 0.2
test = 0.1

[sampling]
policy = "balanced"          # every data set in every step

[optim]
rate = 1e-3
schedule = "cosine"
warmup = 50
average = 0.999              # moving average of the weights

[validation]
every = 200
best = "tissue.balanced_accuracy"
"""

SLIDES = """\
# wsi-mmm train slides.toml: regions that were annotated in QuPath, on whole slides. --schema lists every option.
out = "runs/tumour"
seed = 0
steps = 2000

[model]
name = "tumour"
mpp = 1.0                    # micrometres per pixel of what the model sees
tile_size = 256
encoder = { name = "resnet18d", weights = "random" }   # or "pretrained", or a .safetensors file

[[task]]
name = "tumour"
kind = "segment"             # or "instances", "detect" for objects; "classify" for whole tiles
classes = ["other", "tumour", "stroma"]
background = "other"         # the class that results do not draw

[[data]]
name = "study"               # slides/P1_a.svs and slides/P1_a.geojson, as QuPath exports its objects
kind = "slides"
task = "tumour"
slides = "slides/"           # folders, patterns, s3:// prefixes, manifests
annotations = "{folder}/{stem}.geojson"
group = "^(P[0-9]+)_"        # the patient in the slide's name: never on two sides of the split
stride = 256
batch = 8
# mpp_override = 0.25        # where files do not say what their pixels measure
# dot_um = 4.0               # radius of the disc that a point stands for; 0: points are left out

[data.shapes.tumour]         # from the classes in QuPath to those of the task; --dry-run shows what becomes of them
background = "other"         # what lies in a region that was annotated, and in no shape
buckets = [
  { label = "use", pattern = "ROI" },                                        # all that is in here was annotated
  { label = "tumour", pattern = "tum", how = "prefix", any_case = true },
  { label = "stroma", pattern = "stroma", any_case = true },
]
unmatched = "ignore"         # nothing is learnt there

[split]
val = 0.25

[change]
angle = 180.0

[validation]
every = 200
best = "tumour.mean_iou"
"""

BAGS = """\
# A label per slide, from the vectors of its tiles:
#   wsi-mmm embed slides/ -o features
#   wsi-mmm train bags.toml
#   wsi-mmm run slides/ -m runs/grade/model -o results
out = "runs/grade"
seed = 0
steps = 300

[model]
name = "grade"
start = "default"            # the model that made the vectors: a run makes them anew, by the same encoder
mpp = 0.5                    # as embedded, and so are the next two
tile_size = 256
overlap = 0
encoder = { name = "resnet18d", args = { channels = [48, 96, 160, 224] } }   # that of the model above
bag = { kind = "gated", width = 128, hidden = 64 }

[[task]]
name = "grade"
kind = "classify"            # or "multilabel", "regress", "survive"
classes = ["low", "high"]
scope = "bag"

[[data]]
name = "cohort"
kind = "bags"
features = "features/{slide}/features.zarr"
most = 2000                  # tiles of a slide that a step looks at, drawn anew
batch = 8
# foreign = true             # for .h5 of other tools, which do not say by which encoder they were made

[data.slides]
table = "slides.csv"         # a row per slide: slide,patient,grade
patient = "patient"
truth = { grade = { columns = ["grade"] } }

[split]
val = 0.25

[sampling]
class_balance = true

[validation]
every = 50
best = "grade.auroc"
"""

EXAMPLES = {"pictures": PICTURES, "slides": SLIDES, "bags": BAGS}
"""Name -> TOML."""
