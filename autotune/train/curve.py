"""loss.png: the losses of a training against its tokens."""

from pathlib import Path

from matplotlib.figure import Figure

from autotune.train.log import read_log


def draw_curve(log: Path, picture: Path) -> None:
    """Draw the rows of a train_log.csv; the picture is replaced as a whole. Raises OSError."""
    rows = read_log(log)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row.tokens for row in rows], [row.train_loss for row in rows], lw=1, label="training")
    seen = [(row.tokens, row.validation_loss) for row in rows if row.validation_loss is not None]
    if seen:
        axes.plot(*zip(*seen, strict=True), "o-", ms=3, label="validation")
    axes.set(xlabel="tokens", ylabel="loss (nats a token)")
    axes.legend()
    axes.grid(alpha=0.3)
    temporary = picture.with_name(f".{picture.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(picture)
