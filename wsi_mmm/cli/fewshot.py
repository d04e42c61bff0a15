"""The commands about few-shot heads: fewshot fit, fewshot predict."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from wsi_mmm.cli.console import command, make_app, say, say_json, table

fewshot_app = make_app(
    "Teach a classifier on frozen features, in seconds.\n\n\b\nExamples:\n"
    "  wsi-mmm embed slides/ -o features/\n"
    "  wsi-mmm fewshot fit features/ --labels annotations/ -o head/\n"
    "  wsi-mmm run slides/ -m head/model -o results/"
)

Features = Annotated[str, typer.Argument(metavar="FEATURES", help="The folder that wsi-mmm embed wrote.")]


@command(fewshot_app, "fit")
def fit(
    features: Features,
    labels: Annotated[
        str,
        typer.Option(
            help="A folder with <slide>.geojson (tiles learn the class of the region they lie in, or of the points in "
            "them), or a CSV with the columns slide, label and perhaps patient (slides learn from their mean vector)."
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the head.")] = "head",
    head: Annotated[
        Literal["linear", "knn", "gbm", "all"],
        typer.Option(help="linear: also a model that run takes; knn; gbm (needs LightGBM); all: keep the best."),
    ] = "linear",
    classes: Annotated[
        str | None, typer.Option(help="Classes to learn, with commas. (default: all that are annotated)")
    ] = None,
    column: Annotated[str, typer.Option(help="Column of the CSV that holds the label.")] = "label",
    task: Annotated[str, typer.Option(help="What the answers are called.")] = "fewshot",
    weights: Annotated[
        str | None, typer.Option(help="Weights of a bare encoder, as given to embed.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the folds.")] = 0,
) -> None:
    """Fit a head to labelled tiles or slides and judge it on groups that it has not seen.

    \b
    Examples:
      wsi-mmm fewshot fit features/ --labels annotations/ -o head/
      wsi-mmm fewshot fit features/ --labels slides.csv --column grade --head all
    """
    from wsi_mmm.training.fewshot_run import learn

    chosen = [name.strip() for name in classes.split(",")] if classes else None
    found = learn(
        features, labels, output, head=head, classes=chosen, column=column, task=task, weights=weights, seed=seed
    )
    rows = []
    for one in found:
        say_json(one)
        name, how = one.kind + (" (kept)" if one.kept else ""), one.figures
        rows.append((name, f"{how['balanced_accuracy']:.3f}", f"{how['auroc']:.3f}", how["folds"], how["examples"]))
    table(rows, ("head", "balanced accuracy", "AUROC", "folds", "examples"))
    judged = f"judged on {found[0].figures['judged_on']}"
    say(judged if found[0].figures["folds"] else "too few slides or regions to hold any out: how good it is is unknown")
    say(f"head {output}")


@command(fewshot_app, "predict")
def predict(
    features: Features,
    head: Annotated[str, typer.Option(help="The folder that fewshot fit wrote.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the tables.")] = "fewshot",
) -> None:
    """Predict with a head on embedded slides.

    \b
    Examples:
      wsi-mmm fewshot predict features/ --head head/ -o answers/
    """
    from wsi_mmm.training.fewshot_run import predict as speak

    said = speak(features, head, output)
    for one in said:
        say_json(one)
    table([(s.slide, s.answer, f"{s.probability:.3f}", s.table) for s in said], ("slide", "answer", "share", "tiles"))
