"""What a table or figure declares: trainings, rows, and the paper's numbers."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One stage of training, from the encoder that another training left."""

    stage: str
    """mtd, flow or control."""
    overrides: tuple[str, ...] = ()
    """Of the preset, as `--set` takes them."""
    after: "Training | None" = None
    """Whose encoder it takes; None for one of random or CLIP weights. Adapters always start anew."""
    data: str = "main"
    """Which records: main or other."""
    is_encoder_given: bool = False
    """Takes an encoder that was trained elsewhere (`Lab.encoder`)."""

    def chain(self) -> "list[Training]":
        """This training and those before it, the first first."""
        return [*(self.after.chain() if self.after else []), self]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table."""

    label: str
    training: Training
    paper: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """The paper's values by metric, one for each number of inputs; empty where the paper has no such row."""
    note: str = ""
    """What is different from the paper here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of the paper, or the data of a figure."""

    name: str
    title: str
    rows: list[Row]
    metrics: tuple[str, ...]
    """Names of `omniid.evaluate` figures; the first decides the text's order."""
    num_inputs: tuple[int, ...]
    notes: tuple[str, ...] = ()
    rises: bool = False
    """Whether the paper shows each row above the one before it, without printed values."""

    @property
    def is_controlled(self) -> bool:
        """Whether pictures are drawn after the landmarks of targets."""
        return self.rows[0].training.stage == "control"

    def trainings(self) -> list[Training]:
        """All trainings, each once, in an order in which they can be run."""
        return list(dict.fromkeys(one for row in self.rows for one in row.training.chain()))
