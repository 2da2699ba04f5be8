"""The Markdown report of a table: the paper's numbers beside ours, pictures, verdicts, cost."""

from collections.abc import Sequence

from PIL import Image

from omniid.contact_sheet import contact_sheet
from omniid.reproduce.estimate import estimate
from omniid.reproduce.orderings import certainty, paper_orderings, rising, summary
from omniid.reproduce.result import Result, RowResult, paper_value

TITLES = {"id similarity": "ID similarity", "pose error": "Pose error"}
HIGHER_IS_BETTER = {"id similarity": True, "pose error": False}
NUM_INPUTS_SHOWN = 3
"""Photos that the pictures in a report are drawn from, where the table has that many."""

SMOKE_SHARE = 0.1
"""Of the preset's steps: below it nothing is learned that could be compared."""


def markdown(result: Result, pictures: Sequence[str]) -> str:
    """The report's text. pictures: names of picture files beside it."""
    table, about = result.table, result.about
    parts = [f"# {table.title}, preset {about['preset']}", _setting(result)]
    parts.append(_caution(about["share_of_steps"]))
    parts += [_numbers(result, metric, by) for metric, by in result.measured()]
    notes = [*table.notes, *(f"{one.row.label}: {one.row.note}." for one in result.rows if one.row.note)]
    parts.append("\n".join(f"* {note}" for note in notes))
    parts += [f"![{name}]({name})" for name in pictures]
    parts.append("## Which orderings hold\n\n" + verdicts(result))
    parts.append("## Cost\n\n" + _cost(result))
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(result: Result) -> str:
    about, levels = result.about, {}
    for by, metric, value in result.levels():
        levels.setdefault(by, []).append(f"{metric} {value:.3f}")
    photos = "; ".join(f"{by}: {', '.join(values)}" for by, values in levels.items())
    targets, seeds = (_counted(about[name], what) for name, what in (("num_targets", "target"), ("num_seeds", "seed")))
    return (
        f"`{about['command']}` on {about['num_people']} held-out people of `{about['data']}` with {targets} each, {seeds} of "
        f"training, drawn by base {_short(about['base'])}. Similarity is a recogniser's cosine between picture and photo; of the "
        f"photos themselves it says, {photos}."
    )


def _short(base: str) -> str:
    """The start of a fingerprint, or a base's own name."""
    return base[:12] if len(base) == 64 else base


def _caution(share: float) -> str:
    if share >= 1:
        return ""
    steps = f"trained for {share:.2g} of the preset's steps"
    if share < SMOKE_SHARE:
        return f"**Smoke run, not a result:** {steps}. It shows that the path works; its numbers mean nothing."
    return f"**Reduced run:** {steps}. What the others would change is not known."


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _numbers(result: Result, metric: str, by: str) -> str:
    counts = result.table.num_inputs
    unit = " (degrees)" if metric == "pose error" else ""
    better = "higher" if HIGHER_IS_BETTER[metric] else "lower"
    heads = [f"{n} photo{'s' * (n > 1)}" for n in counts]
    lines = [
        f"## {TITLES[metric]}{unit}, by {by}; {better} is better",
        "",
        "| | paper, " + " / ".join(map(str, counts)) + " photos | " + " | ".join(heads) + " |",
        "|---" * (len(counts) + 2) + "|",
    ]
    for one in result.rows:
        paper = [paper_value(one.row, metric, i) for i in range(len(counts))]
        stated = "" if None in paper else " / ".join(f"{value:g}" for value in paper)
        cells = [_cell(one, metric, by, n) for n in counts]
        lines.append(f"| {one.row.label} | {stated} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(one: RowResult, metric: str, by: str, num_inputs: int) -> str:
    ours = estimate(one.values(metric, by, num_inputs))
    digits = 1 if metric == "pose error" else 3
    return f"{ours.value:.{digits}f} [{ours.low:.{digits}f}, {ours.high:.{digits}f}]"


def verdicts(result: Result) -> str:
    """One paragraph for each metric, measurer and number of inputs, and how sure they are."""
    counts, labels = result.table.num_inputs, [one.row.label for one in result.rows]
    lines, compared = [], 0
    for metric, by in result.measured():
        found = []
        for index, n in enumerate(counts):
            ours = [one.values(metric, by, n) for one in result.rows]
            paper = [paper_value(one.row, metric, index) for one in result.rows]
            ordered = rising(labels, ours) if result.table.rises else paper_orderings(labels, paper, ours)
            found.append((f"{n} photo{'s' * (n > 1)}", ordered))
        if metric == "id similarity":
            for one in result.rows:
                each = [one.values(metric, by, n) for n in counts]
                found.append((f"{one.row.label}, more photos", rising([str(n) for n in counts], each)))
        lines += [f"* {summary(f'{metric} by {by}, {what}', some)}" for what, some in found if some]
        compared += sum(len(some) for _, some in found)
    about = result.about
    return "\n".join([*lines, "", certainty(about["num_seeds"], about["num_people"], compared)])


def _cost(result: Result) -> str:
    lines = ["| training | stage | steps | seeds | hours |", "|---|---|---|---|---|"]
    total = 0.0
    for training in result.table.trainings():
        each = [trained for (one, _), trained in result.trainings.items() if one == training]
        seconds = sum(one.seconds for one in each)
        total += seconds
        what = " ".join(training.overrides) or "as the preset says"
        after = f" after {training.after.stage}" if training.after else ""
        after += " with the given encoder" if training.is_encoder_given else ""
        lines.append(f"| {what}{after} | {training.stage} | {each[0].steps} | {len(each)} | {seconds / 3600:.3g} |")
    return "\n".join([*lines, "", f"Training took {total / 3600:.3g} hours on {result.about['device']}."])


def picture(result: Result) -> Image.Image:
    """Rows: people. Columns: the target, then each row's picture from three photos, of the first seed."""
    counts = result.table.num_inputs
    column = 1 + (counts.index(NUM_INPUTS_SHOWN) if NUM_INPUTS_SHOWN in counts else len(counts) - 1)
    columns: dict[str, list[Image.Image]] = {}
    for one in result.rows:
        strips = [Image.open(path).convert("RGB") for path in one.scores[0].pictures]
        size = strips[0].height
        columns.setdefault("target", [strip.crop((0, 0, size, size)) for strip in strips])
        box = (column * size, 0, (column + 1) * size, size)
        columns[one.row.label] = [strip.crop(box) for strip in strips]
    return contact_sheet(columns, [f"person {index}" for index in range(len(columns["target"]))])
