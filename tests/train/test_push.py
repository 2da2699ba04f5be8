"""`--push-to-hub`: when the weights folder is uploaded, and what is said when it cannot be."""

import json
import shlex

import huggingface_hub
import pytest
from click.testing import CliRunner

from omniid.cli.main import main
from omniid.config import preset_to_toml
from omniid.hub import HubError, push_weights


class Hub:
    """The part of `HfApi` that is used, with the repositories it holds."""

    def __init__(self):
        self.private, self.uploads = {}, []

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.private.setdefault(repo_id, private)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def repo_info(self, repo_id):
        return huggingface_hub.hf_api.ModelInfo(id=repo_id, private=self.private[repo_id])

    def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns):
        self.uploads.append((repo_id, sorted(path.name for path in folder_path.iterdir())))


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_something")
    return made


def train(tiny, records, tmp_path, *more):
    (tmp_path / "tiny.toml").write_text(preset_to_toml(tiny))
    words = ["train", "mtd", "--preset", tmp_path / "tiny.toml", "--data", records, "--run", tmp_path / "run"]
    words += ["--set", "train.mtd.steps=2", "--device", "cpu", "--quiet", *more]
    return CliRunner().invoke(main, [str(word) for word in words])


def test_a_finished_run_is_pushed_private_and_only_when_asked(tiny, records, tmp_path, hub):
    assert json.loads(train(tiny, records, tmp_path, "--json").stdout)["hub_address"] is None
    assert hub.uploads == []
    result = train(tiny, records, tmp_path, "--resume", "--push-to-hub", "me/people")
    assert result.stdout.strip() == "mtd: 2 steps, done already, pushed to https://huggingface.co/me/people"
    assert hub.uploads == [("me/people", ["decoder.safetensors", "encoder.safetensors", "preset.toml"])]
    assert hub.private == {"me/people": True}


def test_a_public_repository_takes_weights_only_with_public(tmp_path, hub):
    assert push_weights(tmp_path, "me/open", public=True) == "https://huggingface.co/me/open"
    assert hub.private == {"me/open": False}
    with pytest.raises(HubError, match=r"me/open is public; they are safe in .* --public"):
        push_weights(tmp_path, "me/open")
    assert len(hub.uploads) == 1


def test_a_failed_push_says_where_the_weights_are_and_how_to_push_them(tmp_path, hub, monkeypatch):
    def fail(**settings):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "upload_folder", fail)
    folder = tmp_path / "my weights"
    with pytest.raises(HubError, match=r"not pushed \(no route to host\); they are safe in .*my weights") as caught:
        push_weights(folder, "me/people")
    words = shlex.split(str(caught.value).split("push them again with: ")[1])
    assert words == ["hf", "upload", "me/people", str(folder), ".", "--private"]


@pytest.mark.parametrize(
    ("repo", "token", "text"),
    [
        ("me/people", None, "needs a token of the Hugging Face Hub; log in with: hf auth login"),
        ("me/my people", "hf_something", "name a repository like somebody/omniid-mini"),
    ],
    ids=["token", "name"],
)
def test_what_cannot_be_pushed_is_refused_before_training(tiny, records, tmp_path, hub, monkeypatch, repo, token, text):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    result = train(tiny, records, tmp_path, "--push-to-hub", repo)
    assert result.exit_code == 1 and text in result.stderr
    assert not (tmp_path / "run").exists()


def test_public_without_a_push_is_wrong_usage(tiny, records, tmp_path):
    result = train(tiny, records, tmp_path, "--public")
    assert result.exit_code == 2 and "--public goes with --push-to-hub" in result.stderr
