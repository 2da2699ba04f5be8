"""omniid data curate on rendered talking heads: the people are found, their best faces chosen, bad files passed over."""

import dataclasses
import json
import os
import random
import struct
import subprocess
import sys
import time
import types
import wave
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as parquet
import pytest
from click.testing import CliRunner

from omniid.cli.main import main
from omniid.data.curate import Settings, VideoError, curate_videos, find_videos
from omniid.data.curate.annotations import read_annotations
from omniid.data.curate.choose import clusters_by_pose, spread, yaw_range
from omniid.data.curate.decode import Decoder, Span
from omniid.data.curate.people import find_people
from omniid.data.curate.topiq import Topiq, choose_topiq
from omniid.data.curate.tracks import Sight, Track
from omniid.data.inspection import inspect_records
from omniid.data.talking_heads import Shot, write_video
from omniid.faces import FaceError
from omniid.faces.files import FILES

DATA = Path(os.environ.get("OMNIID_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
pytest.importorskip("av")
pytest.importorskip("scenedetect")
needs_models = pytest.mark.skipif(
    not (DATA / FILES["mesh"]).is_file(), reason=f"no face models at {DATA}; set OMNIID_TEST_DATA"
)
SETTINGS = Settings(
    faces=f"files:{DATA}", size=96, images=6, min_images=6, min_face=60, every=4, quality="analyzer", held_out=0.4
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> tuple[Path, dict]:
    """A folder of two good videos and of broken ones; what each good one shows."""
    folder = tmp_path_factory.mktemp("videos")
    first = [Shot((1,), 24, seed=1), Shot((2,), 24, seed=2), Shot((1,), 16, seed=3), Shot((6,), 12, "small", seed=6)]
    second = [Shot((3, 4), 28, seed=4), Shot((5,), 12, "profile", seed=5)]
    truth = {
        "first": write_video(folder / "first.mp4", first, size=160, step=2),
        "second": write_video(folder / "second.mkv", second, size=160, step=2, uneven=True),
    }
    whole = (folder / "second.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    (folder / "beginning.mkv").write_bytes(
        whole[: whole.index(b"\x1f\x43\xb6\x75")]
    )  # all before the first cluster of frames
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.avi").write_text("not a video")
    with wave.open(str(folder / "sound.mov"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(4000))
    return folder, truth


@pytest.fixture(scope="module")
def curated(videos, tmp_path_factory) -> tuple[Path, dict]:
    """The records, and the summaries by video."""
    output = tmp_path_factory.mktemp("curated")
    summaries = curate_videos([videos[0]], output, SETTINGS)
    return output, {summary["video"]: summary for summary in summaries}


def people_of(summary: dict, truth: list) -> list[Counter]:
    """For each identity, whose heads its boxes hold."""
    found = []
    for person in summary["people"]:
        owners = Counter()
        for frame, (left, top, right, bottom) in zip(person["chosen"], person["boxes"], strict=True):
            for head in truth[frame]:
                if left < head.centre[0] < right and top < head.centre[1] < bottom:
                    owners[head.person, head.kind] += 1
        found.append(owners)
    return found


@needs_models
def test_each_person_becomes_one_pure_identity(videos, curated):
    truth, summaries = videos[1], curated[1]
    first = people_of(summaries["first"], truth["first"])
    assert first == [Counter({(1, "talk"): 6}), Counter({(2, "talk"): 6})]
    assert summaries["first"]["people"][0]["tracks"] == 2  # seen before and after the other
    assert summaries["first"]["dropped"]["smaller than the least size"] > 0
    second = [owners for owners in people_of(summaries["second"], truth["second"]) if (5, "profile") not in owners]
    assert sorted(next(iter(owners))[0] for owners in second) == [3, 4]
    assert all(len(owners) == 1 for owners in second)


@needs_models
def test_records_are_sound_and_split_by_video(curated):
    output, summaries = curated
    facts = inspect_records(output).as_dict()
    assert facts["problems"] == []
    assert facts["image_sizes"].keys() == {"96 x 96"}
    assert facts["images_per_identity"] == {"min": 6, "median": 6, "max": 6}
    for path in output.glob("*.parquet"):
        for row in parquet.read_table(path).to_pylist():
            (summary,) = [one for one in summaries.values() if row["identity_id"].rpartition("-")[0] == one["video"]]
            assert row["split"] == summary["split"] == path.name.partition("-")[0]
            assert row["source"].startswith("video ")
    assert {summary["split"] for summary in summaries.values()} == {"train", "validation"}


@needs_models
def test_broken_files_are_said_and_passed_over(curated):
    _, summaries = curated
    for name, words in (
        ("empty", "not a video that can be read"),
        ("text", "not a video that can be read"),
        ("sound", "has no video stream"),
        ("beginning", "not a video that can be read"),
    ):
        assert words in summaries[name]["error"]
        assert summaries[name]["people"] == []
    assert summaries["cut"]["error"] is None
    assert 3 < summaries["cut"]["frames"] < summaries["second"]["frames"]
    assert summaries["cut"]["note"].startswith("cut off after ")
    assert summaries["second"]["note"] is None
    assert summaries["second"]["remarks"] == ["frames 40 to 80 ms apart"]
    assert summaries["first"]["remarks"] == []


@needs_models
def test_the_report_shows_people_poses_and_reasons(curated):
    page = (curated[0] / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == sum(len(one["people"]) for one in curated[1].values())
    for words in (
        "smaller than the least size",
        "frames/s",
        "<circle",
        "first-0",
        "has no video stream",
        "cut off after",
        "ms apart",
    ):
        assert words in page


@needs_models
def test_a_stopped_curation_goes_on_and_ends_with_the_same_set(videos, curated, tmp_path):
    def stop(summary: dict) -> None:
        if summary["video"] == "first":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        curate_videos([videos[0]], tmp_path, SETTINGS, progress=stop)
    assert not list(tmp_path.glob("*.parquet"))
    (tmp_path / "videos" / "cut.json").unlink()  # as if killed between its two files
    curate_videos([videos[0]], tmp_path, SETTINGS)
    shards = sorted(path.name for path in curated[0].glob("*.parquet"))
    assert sorted(path.name for path in tmp_path.glob("*.parquet")) == shards
    for name in shards:
        assert (tmp_path / name).read_bytes() == (curated[0] / name).read_bytes()
    with pytest.raises(VideoError, match="begun with other videos or settings"):
        curate_videos([videos[0]], tmp_path, Settings(faces=SETTINGS.faces))


@needs_models
def test_annotated_clips_are_taken_alone_and_missing_videos_are_said(videos, tmp_path):
    folder, truth = videos
    whole = {"left": 0.0, "top": 0.0, "right": 1.0, "bottom": 1.0}
    clips = {
        "of-the-second": {"ytb_id": "first", "duration": {"start_sec": 0.96, "end_sec": 1.88}, "bbox": whole},
        "left-one": {"ytb_id": "second", "duration": {"start_sec": 0, "end_sec": 1.2}, "bbox": {**whole, "right": 0.5}},
        "lost": {"ytb_id": "gone", "duration": {"start_sec": 0, "end_sec": 1}, "bbox": whole},
    }
    (tmp_path / "clips.json").write_text(json.dumps({"clips": clips}))
    settings = dataclasses.replace(SETTINGS, annotations=str(tmp_path / "clips.json"))
    left, lost, second = curate_videos([folder], tmp_path / "out", settings)
    assert second["frames"] == 24
    shifted = {**second, "people": [{**one, "chosen": [n + 24 for n in one["chosen"]]} for one in second["people"]]}
    assert people_of(shifted, truth["first"]) == [Counter({(2, "talk"): 6})]
    (owners,) = people_of(left, truth["second"])
    assert owners.keys() == {(3, "talk")}
    assert "the video gone of the clip lost is not there; its link may be dead" in lost["error"]


@needs_models
@pytest.mark.slow
def test_a_curation_killed_at_random_moments_ends_with_the_same_set(videos, curated, tmp_path):
    """OMNIID_TEST_KILLS kills instead of two, each at a random moment within the work on a random next video."""
    rng, output = random.Random(0), tmp_path / "killed"
    command = [sys.executable, "-P", "-m", "omniid.cli.main", "data", "curate", str(videos[0]), "-o", str(output)]
    for option, value in dataclasses.asdict(SETTINGS).items():
        command += [f"--{option.replace('_', '-')}", str(value)] if value is not None else []
    for _ in range(int(os.environ.get("OMNIID_TEST_KILLS", 2))):
        with subprocess.Popen(
            [*command, "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as call:
            wanted = len(list(output.glob("videos/*.json"))) + rng.randint(0, 2)
            while call.poll() is None and len(list(output.glob("videos/*.json"))) < wanted:
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 3))
            call.kill()
    summaries = curate_videos([videos[0]], output, SETTINGS)
    assert len(summaries) == len(curated[1])
    shards = sorted(path.name for path in curated[0].glob("*.parquet"))
    assert sorted(path.name for path in output.glob("*.parquet")) == shards
    for name in shards:
        assert (output / name).read_bytes() == (curated[0] / name).read_bytes()


@needs_models
@pytest.mark.slow
def test_workers_end_with_a_call_that_is_killed(videos, tmp_path):
    command = [sys.executable, "-P", "-m", "omniid.cli.main", "data", "curate", str(videos[0]), "-o", str(tmp_path)]
    command += ["--faces", SETTINGS.faces, "--size", "96", "--min-face", "60", "--workers", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as call:
        while call.poll() is None and not list(tmp_path.glob("videos/*.json")):
            time.sleep(0.05)
        started = psutil.Process(call.pid).children(recursive=True)
        call.kill()
    assert len(started) >= 2
    _, alive = psutil.wait_procs(started, timeout=120)
    assert not alive


@needs_models
@pytest.mark.slow
def test_slices_merged_are_the_whole_set(videos, curated, tmp_path):
    arguments = ["--faces", SETTINGS.faces, "--size", 96, "--images", 6, "--min-face", 60, "--every", 4]
    arguments += ["--quality", "analyzer", "--held-out", 0.4]
    for part, count in (("1/2", 4), ("2/2", 3)):
        output = tmp_path / part[0]
        command = ["data", "curate", videos[0], "-o", output, "--shard", part, "--workers", 2, "--json", *arguments]
        result = CliRunner().invoke(main, [str(word) for word in command])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["counts"]["videos"] == count
    merge = ["data", "pack", str(tmp_path / "1"), str(tmp_path / "2"), "-o", str(tmp_path / "all")]
    assert CliRunner().invoke(main, merge).exit_code == 0

    def rows(folder: Path) -> dict:
        return {
            row["identity_id"]: row for path in folder.glob("*.parquet") for row in parquet.read_table(path).to_pylist()
        }

    assert rows(tmp_path / "all") == rows(curated[0])


def test_frames_come_with_their_times_and_turned_as_the_metadata_says(videos, tmp_path):
    folder, truth = videos
    with Decoder() as decoder:
        even = list(decoder.frames(folder / "first.mp4"))
        assert [frame.index for frame in even] == list(range(len(truth["first"])))
        assert [frame.index for frame in even if frame.starts_scene] == [0, 24, 48, 64]
        assert even[25].time == pytest.approx(1.0)
        steps = np.diff([frame.time for frame in decoder.frames(folder / "second.mkv", wanted=range(9))])
        np.testing.assert_allclose(steps, [0.08, 0.04, 0.04, 0.08, 0.04, 0.04, 0.08, 0.04], atol=0.002)
        (frame,) = decoder.frames(folder / "first.mp4", 0.5, {7}, find_cuts=False)
        assert (frame.index, frame.pixels.shape, frame.full_size) == (7, (80, 160, 3), (320, 160))
        # A quarter turn in the track header's matrix, as phones write it: shown turned clockwise.
        data = bytearray((folder / "first.mp4").read_bytes())
        at = data.index(b"tkhd") + 4 + 40
        data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
        (tmp_path / "turned.mp4").write_bytes(data)
        turned = next(decoder.frames(tmp_path / "turned.mp4"))
        assert turned.full_size == (160, 320)
        list(decoder.frames(tmp_path / "turned.mp4", find_cuts=False))
        assert decoder.remarks == ["turned by 90 degrees as its metadata say"]
        np.testing.assert_array_equal(turned.pixels, np.rot90(even[0].pixels, -1))
        # Leaving a video in the middle does not disturb the next.
        assert len(list(decoder.frames(folder / "first.mp4"))) == len(even)


def test_a_decoder_that_dies_is_an_error_of_that_video(videos):
    with Decoder() as decoder:
        frames = decoder.frames(videos[0] / "first.mp4")
        next(frames)
        decoder._process.kill()
        with pytest.raises(VideoError, match="brings the decoder down"):
            list(frames)
        assert next(decoder.frames(videos[0] / "first.mp4")).index == 0


def test_chosen_faces_spread_over_poses_and_are_the_best_of_theirs():
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(20):
        yaw = 38 * np.sin(np.linspace(0, 40, 400) + rng.uniform(0, 6)) ** 5  # mostly ahead
        poses = np.stack([yaw, rng.normal(0, 4, 400), rng.normal(0, 3, 400)], axis=1)
        quality = rng.uniform(0.4, 1, 400)
        chosen = [cluster[0] for cluster in clusters_by_pose(poses, quality, 8)[:8]]
        random = np.mean([yaw_range(poses[rng.choice(400, 8, replace=False)]) for _ in range(50)])
        assert yaw_range(poses[chosen]) > 1.2 * random
        shares.append(yaw_range(poses[chosen]) / yaw_range(poses))
        assert quality[chosen].mean() > 0.8
    assert np.mean(shares) > 0.95  # of what all frames together have


def test_clusters_hold_each_sharp_face_once():
    rng = np.random.default_rng(1)
    poses, quality = rng.normal(0, 15, (100, 3)), rng.uniform(0.5, 1, 100)
    quality[:10] = 0.01  # blurred
    clusters = clusters_by_pose(poses, quality, 4)
    assert len(clusters) == 12
    assert sorted(np.concatenate(clusters)) == list(range(10, 100))
    assert all((np.diff(quality[cluster]) <= 0).all() for cluster in clusters)
    same = clusters_by_pose(np.zeros((5, 3)), np.linspace(0.5, 1, 5), 4)
    assert [cluster.tolist() for cluster in same] == [[4, 3, 2, 1, 0]]
    assert spread(np.array([[0.0], [1.0], [10.0], [10.0]]), 0, 4) == [0, 2, 1]


def track(person: int, frames: range, every: int = 2, size: float = 100.0) -> Track:
    """Sights whose embeddings, on every so many frames, are the person's unit vector with some noise."""
    rng = np.random.default_rng(person)
    sights = []
    for frame in frames:
        vector = np.eye(8)[person] + rng.normal(0, 0.05, 8)
        embedding = vector / np.linalg.norm(vector) if frame % every == 0 else None
        box = np.array([0, 0, size * 0.8, size])
        sights.append(Sight(frame, frame / 25, box, np.zeros((5, 2)), (0.0, 0.0, 0.0), 1.0, embedding))
    return Track(sights)


def test_tracks_of_one_person_are_merged_unless_seen_together():
    tracks = [track(0, range(10)), track(1, range(10)), track(0, range(20, 30)), track(1, range(5, 9))]
    people = find_people(tracks, 0.6, 50, Counter())
    assert sorted((person.num_tracks, len(person.sights)) for person in people) == [(1, 4), (1, 10), (2, 20)]


def test_a_track_over_a_missed_cut_is_split_and_a_mixed_one_dropped():
    dropped = Counter()
    missed = Track(track(0, range(11)).sights + track(1, range(11, 20)).sights)
    people = find_people([missed], 0.6, 50, dropped)
    assert [[sight.frame for sight in person.sights] for person in people] == [list(range(11)), list(range(12, 20))]
    assert dropped["in a track too short to recognise"] == 1  # frame 11 may be either's
    small, short = track(2, range(6), size=40), track(3, range(1, 2))
    assert find_people([small, short], 0.6, 50, dropped) == []
    assert dropped["smaller than the least size"] == 6


def test_annotation_files_of_three_kinds_are_read(tmp_path):
    clip = {"ytb_id": "M2Oh", "duration": {"start_sec": 81.6, "end_sec": 86.2}}
    clip["bbox"] = {"top": 0.0, "bottom": 0.9, "left": 0.2, "right": 0.7}
    (tmp_path / "info.json").write_text(json.dumps({"meta_info": {}, "clips": {"M2Oh_1": clip}}))
    (tmp_path / "tubes.txt").write_text("abc_0003,720,1280,10,99,320,0,960,720\n\n")
    folder = tmp_path / "vfhq"
    folder.mkdir()
    meta = "Video ID: x+y\nH: 1080\nW: 1920\nFPS: 25.0\n\nCROP: 480 0 1440 540\n0 1 2 3\n"
    (folder / "Clip+-0ENDxyz+P0+C1+F50-100.txt").write_text(meta)
    (celebv,) = read_annotations(tmp_path / "info.json")
    assert (celebv.name, celebv.video, celebv.span) == ("M2Oh_1", "M2Oh", Span(81.6, 86.2))
    assert celebv.box == (0.2, 0.0, 0.7, 0.9)
    (tube,) = read_annotations(tmp_path / "tubes.txt")
    assert (tube.video, tube.span, tube.box) == ("abc_0003", Span(10, 99, in_frames=True), (0.25, 0.0, 0.75, 1.0))
    (vfhq,) = read_annotations(folder)
    assert (vfhq.video, vfhq.span, vfhq.box) == ("-0ENDxyz", Span(2.0, 4.0), (0.25, 0.0, 0.75, 0.5))
    (tmp_path / "tubes.txt").write_text("abc,720\n")
    (tmp_path / "info.json").write_text(json.dumps({"clips": {"x": {"ytb_id": "x"}}}))
    (tmp_path / "vfhq" / "Clip+a+P0+C1+F5-1.txt").write_text(meta)
    for name in ("tubes.txt", "info.json", "vfhq", "none.txt"):
        with pytest.raises(VideoError, match=r"annotations cannot be read from .* give CelebV-HQ's"):
            read_annotations(tmp_path / name)


def test_a_span_gives_its_frames_only(videos):
    with Decoder() as decoder:
        path = videos[0] / "first.mp4"
        timed = list(decoder.frames(path, span=Span(0.96, 1.04)))
        assert [(frame.index, round(frame.time * 25)) for frame in timed] == [(0, 24), (1, 25), (2, 26)]
        counted = list(decoder.frames(path, span=Span(30, 31, in_frames=True), find_cuts=False))
        assert [round(frame.time * 25) for frame in counted] == [30, 31]
        with pytest.raises(VideoError, match="shows no frame from 90 to 91"):
            next(decoder.frames(path, span=Span(90, 91)))


def test_videos_are_named_apart(tmp_path):
    for name in ("a/one.mp4", "b/one.mp4", "b/two.mkv", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(find_videos([tmp_path])) == ["a-one.mp4", "b-one.mp4", "two"]
    with pytest.raises(VideoError, match="does not exist"):
        find_videos([tmp_path / "c.mp4"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="holds no videos"):
        find_videos([tmp_path / "empty"])
    (tmp_path / "c" / "b").mkdir(parents=True)
    (tmp_path / "c" / "b" / "one.mp4").touch()
    with pytest.raises(VideoError, match=r"two videos are called b-one\.mp4"):
        find_videos([tmp_path])


def test_a_backend_that_follows_no_faces_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(FaceError, match="'offline' does not follow faces through a video; use --faces files"):
        curate_videos([tmp_path / "a.mp4"], tmp_path / "o", Settings(faces="offline"))
    assert not (tmp_path / "o").exists()  # so that the next call may use another


def test_wrong_usage_exits_with_2(tmp_path):
    def run(*arguments: object):
        return CliRunner().invoke(main, ["data", "curate", *map(str, arguments)])

    assert run(tmp_path, "-o", tmp_path, "--shard", "3/2").exit_code == 2
    assert run(tmp_path, "-o", tmp_path, "--min-images", 9).exit_code == 2
    assert run(tmp_path / "none.mp4", "-o", tmp_path).exit_code == 1
    with pytest.raises(ValueError, match="min_images is 9"):
        Settings(min_images=9)


def test_topiq_scores_crops_where_pyiqa_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(VideoError, match="pip install pyiqa"):
        Topiq()
    assert choose_topiq("analyzer") is None
    fake = types.ModuleType("pyiqa")
    fake.create_metric = lambda name, device: lambda picture: picture.mean() * 2  # TOPIQ stands behind this call
    monkeypatch.setitem(sys.modules, "pyiqa", fake)
    assert choose_topiq("topiq")(np.full((8, 8, 3), 51, np.uint8)) == pytest.approx(0.4)
    assert Topiq()(np.full((8, 8, 3), 255, np.uint8)) == 1.0

    def no_face(picture):
        raise AssertionError("No face detected in the input image.")

    fake.create_metric = lambda name, device: no_face
    assert Topiq()(np.full((8, 8, 3), 51, np.uint8)) == 0.0
