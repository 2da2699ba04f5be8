"""Re-rendered people: whether a recogniser knows them, and pictures a second.

Each person is made from one photo alone; its renders at random poses, expressions and lights are compared with the
person's other photo (same) and with other people's (different). Blends are compared with their parents and with each
other. `omniid bench rerender -- --data DATA` reads DATA/london, DATA/face_model, DATA/landmarks and DATA/recognizer
(docs/rerender.md); it needs onnxruntime and ai-edge-litert.
"""

import time
from pathlib import Path

import numpy as np
from harness import command_line, data_folder, end_without_inputs, report

from omniid.data.rerender import (
    PersonMask,
    PhotoReader,
    blend,
    group_by_person,
    load_face_model,
    make_likeness,
    render,
)
from omniid.data.rerender.dataset import draw_recipes
from omniid.data.synthetic import View
from omniid.faces.align import similarity, warp
from omniid.faces.landmarks import landmark_group

SIZE = 256
_FIVE = np.array([[38.29, 51.70], [73.53, 51.50], [56.03, 71.74], [41.55, 92.37], [70.73, 92.20]])


class Recogniser:
    """MobileFaceNet: unit codes of faces aligned by eyes, nose tip and mouth corners."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, image: np.ndarray, five: np.ndarray) -> np.ndarray:
        crop = warp(image, similarity(five, _FIVE), 112).astype(np.float32) / 255
        values = (crop - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        code = self._session.run(None, {"input0": values.transpose(2, 0, 1)[None].astype(np.float32)})[0][0]
        return code / np.linalg.norm(code)


def five_of_render(landmarks: np.ndarray) -> np.ndarray:
    return np.stack([*landmarks[:2], landmarks[landmark_group("nose bridge")][-1], *landmarks[3:5]])


def five_of_photo(points: np.ndarray) -> np.ndarray:
    points = points[:, :2]
    return np.stack([points[[33, 133]].mean(0), points[[362, 263]].mean(0), points[4], points[61], points[291]])


def main() -> None:
    parser = command_line()
    parser.add_argument("--data", type=Path, default=data_folder())
    parser.add_argument("--people", type=int, default=58)
    parser.add_argument("--views", type=int, default=6)
    parser.add_argument("--yaw-range", type=float, default=36.0)
    parser.add_argument("--blends", type=int, default=20)
    arguments = parser.parse_args()
    folders = [arguments.data / name for name in ("london", "face_model", "landmarks", "recognizer")]
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        end_without_inputs(f"no folder {', '.join(missing)} (docs/rerender.md)")
    model = load_face_model(arguments.data / "face_model")
    recognise = Recogniser(arguments.data / "recognizer" / "MobileFaceNet.onnx")
    reader, person_mask = PhotoReader(arguments.data / "landmarks"), PersonMask(arguments.data / "landmarks")
    groups = {n: p for n, p in group_by_person([arguments.data / "london"]).items() if len(p) == 2}
    names = list(groups)[: arguments.people]

    people, second, first = {}, [], []
    start = time.perf_counter()
    for name in names:
        source, other = (reader(path) for path in groups[name])
        people[name] = make_likeness(model, person_mask, name, [source])
        first.append(recognise(np.asarray(source.image), five_of_photo(source.points)))
        second.append(recognise(np.asarray(other.image), five_of_photo(other.points)))
    fit_s = (time.perf_counter() - start) / len(names)
    first, second = np.array(first), np.array(second)

    render_s = []

    def codes(person, number: int) -> np.ndarray:
        found = []
        for k in range(arguments.views):
            view = View.sample(1000 * number + k, arguments.yaw_range)
            begin = time.perf_counter()
            face = render(model, person, view, SIZE)
            render_s.append(time.perf_counter() - begin)
            found.append(recognise(face.image, five_of_render(face.landmarks)))
        return np.array(found)

    own = np.array([codes(people[name], number) for number, name in enumerate(names)])
    against = np.einsum("pvc,qc->pvq", own, second)
    same = np.einsum("pvp->pv", against)
    off = ~np.eye(len(names), dtype=bool)
    photos = first @ second.T

    recipes = draw_recipes(names, arguments.blends, np.random.default_rng(0))
    mixed = np.array(
        [
            codes(blend(model, [people[n] for n in recipe.parents], recipe, "blend"), 500 + number)
            for number, recipe in enumerate(recipes)
        ]
    )
    parents = [
        float((mixed[k] @ second[names.index(name)]).mean())
        for k, recipe in enumerate(recipes)
        for name in recipe.parents
    ]
    among = np.einsum("avc,bwc->abvw", mixed, mixed)
    views = ~np.eye(arguments.views, dtype=bool)
    blend_same = np.mean([among[k, k][views].mean() for k in range(len(recipes))])
    strangers = [
        among[a, b].mean()
        for a in range(len(recipes))
        for b in range(a)
        if not set(recipes[a].parents) & set(recipes[b].parents)
    ]
    rows = [
        {
            "compared": "render, own second photo",
            "cosine": float(same.mean()),
            "lowest person": float(same.mean(1).min()),
        },
        {"compared": "render, other people's photo", "cosine": float(against.transpose(0, 2, 1)[off].mean())},
        {"compared": "photo, own second photo", "cosine": float(np.diag(photos).mean())},
        {"compared": "photo, other people's photo", "cosine": float(photos[off].mean())},
        {"compared": "blend, itself in another view", "cosine": float(blend_same)},
        {"compared": "blend, photo of a parent", "cosine": float(np.mean(parents))},
        {"compared": "blend, blend of other people", "cosine": float(np.mean(strangers))},
    ]
    rate = 1 / np.median(render_s)
    report(
        "rerender",
        rows,
        f"{len(names)} people from one photo each, {arguments.views} views each at {SIZE} px, yaw within "
        f"{arguments.yaw_range:g} degrees; one process renders {rate:.1f} pictures/s, a person takes {fit_s:.1f} s.",
        parser,
    )
    worst = np.argsort(same.mean(1))[:5]
    print("least like their photo:", ", ".join(f"{names[k]} {same[k].mean():.2f}" for k in worst))


if __name__ == "__main__":
    main()
