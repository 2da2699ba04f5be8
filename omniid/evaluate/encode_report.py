"""report.html of `omniid encode`: which poses the photos cover, and which photo and place each query looked at."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from omniid.evaluate.attention import attention_sheet, photo_attention, photo_shares
from omniid.evaluate.html_page import HtmlPage
from omniid.faces import Face
from omniid.identity import Identity
from omniid.models.encoder import OmniIDEncoder

NUM_QUERIES = 8


def write_encode_report(
    path: str | Path, encoder: OmniIDEncoder, identity: Identity, crops: Sequence[np.ndarray], faces: Sequence[Face]
) -> None:
    """Writes the page of one identity. crops: uint8 (H, H, 3) as they were encoded, with the face of each."""
    attention = photo_attention(encoder, crops)
    shares = photo_shares(attention)
    page = HtmlPage("An identity and its photos")
    page.text(
        f"{identity.num_images} photos, {identity.shape[0]} x {identity.shape[1]} tokens, encoder {identity.encoder[:12]}. "
        "This page shows the photos: treat it as you treat them."
    )
    page.heading("Photos")
    favourite = np.bincount(shares.argmax(1), minlength=len(crops))
    rows = []
    for index, face in enumerate(faces):
        pose = ["unknown"] * 3 if face.pose is None else [f"{angle:+.0f}" for angle in face.pose]
        rows.append(
            [
                face.name,
                *pose,
                f"{face.quality:.2f}",
                f"{shares[:, index].mean():.2f}",
                int(favourite[index]),
                face.note or "",
            ]
        )
    page.table(
        ["photo", "yaw", "pitch", "roll", "quality", "share of attention", "queries that look at it most", "note"], rows
    )
    page.heading("Poses")
    page.text(
        "Yaw to the person's left and pitch upwards, in degrees. Photos from several sides give a better identity."
    )
    page.plot(pose_plot(faces))
    page.heading("What single queries look at")
    page.text("The last cross-attention block, mean over heads; the most concentrated queries at different places.")
    page.picture(attention_sheet(encoder, crops, NUM_QUERIES, [Path(face.name).name for face in faces]))
    page.write(path)


def pose_plot(faces: Sequence[Face]):
    """Yaw and pitch of the photos whose pose is known."""
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(5, 3.2), layout="constrained")
    axes = plot.subplots()
    for index, face in enumerate(faces):
        if face.pose is not None:
            axes.plot(face.pose[0], face.pose[1], "o", color="#c22")
            axes.annotate(str(index + 1), face.pose[:2], textcoords="offset points", xytext=(5, 5))
    axes.set(xlim=(-90, 90), ylim=(-45, 45), xlabel="yaw", ylabel="pitch")
    axes.grid(alpha=0.3)
    return plot
