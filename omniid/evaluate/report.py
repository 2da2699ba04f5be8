"""report.html of an evaluation: tables, plots and generated pictures beside photos."""

from dataclasses import replace
from pathlib import Path

from PIL import Image

from omniid.contact_sheet import contact_sheet
from omniid.evaluate.drawing import Drawn
from omniid.evaluate.figure import Figure
from omniid.evaluate.html_page import HtmlPage
from omniid.evaluate.people import People, as_pixels
from omniid.evaluate.plots import bars, curve_over_inputs
from omniid.evaluate.run import Evaluation
from omniid.evaluate.text_table import cell, title

NUM_SHOWN = 12
"""People whose pictures are shown; the first ones, not the best."""
_CURVES = ("id similarity", "rank-1", "copying", "diversity")


def write_report(found: Evaluation, path: str | Path) -> None:
    """Writes the page of an evaluation."""
    page = HtmlPage("Evaluation of identity")
    scores = found.scores
    page.text(f"Weights {scores['weights']}, sha256 {scores['fingerprint']}, seed {scores['seed']}.")
    page.text(
        "Every value is a mean over people with a 90 % bootstrap interval over people. Levels of a recogniser on the photos "
        "themselves say what its similarities mean. Pictures of the first people are shown, not of the best."
    )
    _redrawn(page, scores)
    if "attributes" in scores:
        _prompts(page, scores["attributes"])
    _tables(page, found.figures)
    _plots(page, found.figures)
    for people, drawn in found.drawn:
        page.heading(_name(drawn, people))
        page.picture(side_by_side(people, drawn), drawn.prompt)
    page.write(path)


def side_by_side(people: People, drawn: Drawn, num_people: int = NUM_SHOWN) -> Image.Image:
    """Encoded photos, generated pictures and other photos of the first people, one a row."""
    inputs, targets = (as_pixels(photos[:num_people]) for photos in (people.inputs, people.targets))
    columns = {f"encoded {n + 1}": _pictures(inputs[:, n]) for n in range(drawn.num_inputs)}
    kind = "at the pose of photo" if drawn.is_controlled else "generated"
    columns |= {f"{kind} {n + 1}": _pictures(drawn.pictures[:num_people, n]) for n in range(drawn.pictures.shape[1])}
    columns |= {f"photo {n + 1}": _pictures(targets[:, n]) for n in range(targets.shape[1])}
    return contact_sheet(columns, people.names[:num_people])


def _redrawn(page: HtmlPage, scores: dict) -> None:
    labels = {"inputs_3": "unseen, 3 photos", "inputs_1": "unseen, 1 photo", "real": "real, 1 photo"}
    rows = []
    for key, label in labels.items():
        if key in scores:
            of = scores[key]
            rows.append(
                [label]
                + [f"{of[name]:.3f} [{low:.3f}, {high:.3f}]" for name, (low, high) in of["intervals"].items()]
                + [of["num_people"]]
            )
    if rows:
        page.heading("Redrawn by the masked decoder")
        page.table(["", "identity gap", "colour-free gap", "rank-1", "own error (0..255)", "people"], rows)


def _prompts(page: HtmlPage, scores: dict) -> None:
    low, high = scores["interval"]
    page.heading("Whether prompts change what they name")
    page.text(f"{scores['share']:.2f} [{low:.2f}, {high:.2f}] of {scores['num_cases']} cases, seed {scores['seed']}.")
    rows = [
        (one["attribute"], one["check"], one["num_cases"], f"{one['share']:.2f}", f"{one['share_of_renders']:.2f}")
        for one in scores["checks"]
    ]
    page.table(["attribute", "first / second prompt", "cases", "pass", "of rendered pairs"], rows)


def _tables(page: HtmlPage, figures: list[Figure]) -> None:
    for context in dict.fromkeys(one.context for one in figures):
        some = [one for one in figures if one.context == context]
        page.heading(f"{context.people} people, {context.task}")
        page.text(title(context, max(one.num_people for one in some)))
        page.table(
            ["metric", "measured by", "value [90 %]"], [(one.metric, one.measured_by, cell(one)) for one in some]
        )


def _plots(page: HtmlPage, figures: list[Figure]) -> None:
    # Figures that differ in nothing but the number of photos make one curve.
    for key in dict.fromkeys(_apart_from_inputs(one) for one in figures if one.context.num_inputs):
        same = [one for one in figures if _apart_from_inputs(one) == key]
        if len({one.context.num_inputs for one in same}) > 1:
            page.heading(f"{key.people} people, {key.task}, over the number of photos")
            for metric in _CURVES:
                if any(one.metric == metric for one in same):
                    page.plot(curve_over_inputs(same, metric))
    levels = [one for one in figures if one.metric in ("same person", "different people", "id similarity")]
    for name in dict.fromkeys(one.measured_by for one in levels):
        some = [one for one in levels if one.measured_by == name]
        page.heading(f"Similarities by {name}")
        page.plot(bars(some, [_label(one) for one in some], "cosine"))


def _apart_from_inputs(one: Figure):
    return replace(one.context, num_inputs=None)


def _label(one: Figure) -> str:
    context = one.context
    if context.num_inputs is None:
        return f"{one.metric}, {context.people}"
    return f"{context.task}, {context.num_inputs}, {context.people}"


def _name(drawn: Drawn, people: People) -> str:
    kind = "controlled by landmarks" if drawn.is_controlled else "from the prompt"
    return f"{people.names[0]} and others from {drawn.num_inputs} photos, {kind}"


def _pictures(pixels) -> list[Image.Image]:
    return [Image.fromarray(one) for one in pixels]
