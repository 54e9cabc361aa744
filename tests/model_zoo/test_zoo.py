"""The models that the package brings: each is what its entry and its page say of it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

import tools.zoo
from miti_detr import load_predictor
from miti_detr.checkpoint import CheckpointError, MitiDetrCheckpointer, read_checkpoint
from miti_detr.checkpoint.variant import RECORD_KEY
from miti_detr.cli.main import main
from miti_detr.data.shapes import NUM_VAL
from miti_detr.engine import setup_config
from miti_detr.engine.launch.checks import check_weights
from miti_detr.engine.predictor import Predictor
from miti_detr.model_zoo import ZooModel, find_zoo_weights, get_config_file, zoo, zoo_models
from miti_detr.yaml_files import flatten, parse_config
from tests.helpers import tiny_config
from tests.small_shapes import small_shapes

NAMES = list(zoo_models())
LOG = "miti_detr 0.1.0, git commit {}\nPython  3.11.7\ndetectron2  0.6 @/x\nPyTorch  2.4.0 @/y\n"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All of ``shapes_val``."""
    with small_shapes(tmp_path_factory.mktemp("shapes"), 1, NUM_VAL):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_model_has_the_ap_of_its_entry(name: str, shapes: None) -> None:
    entry = zoo_models()[name]
    metrics, parameters = tools.zoo.evaluate(f"zoo://{name}")
    assert metrics["bbox/AP"] == pytest.approx(entry.AP, abs=0.5)
    assert metrics["bbox/AP50"] == pytest.approx(entry.AP50, abs=0.5)
    if entry.mask_AP is not None:
        assert metrics["segm/AP"] == pytest.approx(entry.mask_AP, abs=0.5)
    assert parameters == entry.parameters


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_that_of_its_config(name: str) -> None:
    """As ``train_net.py`` and as ``load_predictor`` load it, it detects the same."""
    entry = zoo_models()[name]
    words = [*entry.overrides, "MODEL.WEIGHTS", f"zoo://{name}", "MODEL.DEVICE", "cpu"]
    cfg = setup_config(get_config_file(entry.config), words)
    check_weights(cfg, needed=True)
    image = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    (found,) = Predictor(cfg)([image])
    expected = found[found.scores.argsort(descending=True)]
    result = load_predictor(f"zoo://{name}", threshold=0.0)(image, channels=cfg.INPUT.FORMAT)
    torch.testing.assert_close(result.scores, expected.scores)
    torch.testing.assert_close(result.pred_boxes.tensor, expected.pred_boxes.tensor)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_holds_weights_and_no_path_of_a_machine(name: str) -> None:
    path = find_zoo_weights(name)  # checks the sha256
    assert Path(path).stat().st_size == zoo_models()[name].bytes
    checkpoint = read_checkpoint(path)
    assert set(checkpoint) == {"model", RECORD_KEY}
    types = {v.dtype for v in checkpoint["model"].values()}
    assert types <= {torch.float32, torch.int64}  # the latter: batches that batch norms have seen
    values = flatten(parse_config(checkpoint[RECORD_KEY]["config"], name)).values()
    assert not [v for v in values if isinstance(v, str) and v.startswith(("/", "~"))]


def test_the_zoo_is_small_and_complete() -> None:
    files = {p for p in (zoo.zoo_folder() / "weights").rglob("*") if p.is_file()}
    assert files == {zoo.zoo_file(name) for name in NAMES}
    assert sum(path.stat().st_size for path in files) <= tools.zoo.LARGEST == 15_000_000


def test_the_page_has_the_figures_of_the_zoo() -> None:
    text = tools.zoo.PAGE.read_text()
    assert tools.zoo.page(text, zoo_models()) == text, "run `python -m tools.zoo`"


def test_the_list_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[2 : 2 + len(NAMES)]] == NAMES


def test_weights_of_another_variant_are_refused() -> None:
    """By our checkpointer, and by Detectron2's own, which knows nothing of records."""
    weights = ["MODEL.WEIGHTS", "zoo://shapes/miti_detr", "MODEL.DEVICE", "cpu"]
    cfg = setup_config(get_config_file("shapes/detr.yaml"), weights)
    with pytest.raises(CheckpointError, match=r"LAYER_RESIDUAL is none, the weights have before_"):
        MitiDetrCheckpointer(build_model(cfg), cfg=cfg).load(cfg.MODEL.WEIGHTS)
    predictor = DefaultPredictor(cfg)
    with pytest.raises(CheckpointError, match=r"LAYER_RESIDUAL is none, the weights have before_"):
        predictor(np.zeros((32, 32, 3), np.uint8))


def weights_config(weights: str) -> CfgNode:
    return tiny_config("MODEL.WEIGHTS", weights)


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    for name in ("shapes/x", "../zoo.json", ""):
        with pytest.raises(FileNotFoundError, match="no such model in the zoo; use zoo://shapes/"):
            check_weights(weights_config(f"zoo://{name}"), needed=True)


@pytest.fixture
def own_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty zoo."""
    (tmp_path / "zoo.json").write_text("{}")
    for module in (zoo, tools.zoo):
        monkeypatch.setattr(module, "zoo_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a training of two iterations leaves; the AP of its random weights is 0."""
    folder = tmp_path / "run"
    start = ("MODEL.WEIGHTS", "/a/machine/detr.pth")
    cfg = tiny_config("OUTPUT_DIR", str(folder), "SEED", 7, *start)
    torch.manual_seed(0)
    model = build_model(cfg)
    MitiDetrCheckpointer(model, str(folder), cfg=cfg).save("model_final", iteration=39)
    records = [
        {"iteration": 19, "time": 0.5},
        {"iteration": 39, "time": 1.0},
        {"iteration": 40, "bbox/AP": 0.01, "bbox/AP50": 0.02},
    ]
    (folder / "metrics.json").write_text("\n".join(json.dumps(record) for record in records))
    (folder / "log.txt").write_text(LOG.format("a" * 40))
    return folder


def add(*runs: Path) -> ZooModel:
    """Add runs as ``a/b``."""
    return tools.zoo.add_model("a/b", list(runs), "shapes/miti_detr.yaml", "model_final.pth", "x")


def test_a_run_is_added(own_zoo: Path, run: Path, tmp_path: Path) -> None:
    """Its seconds are 20 iterations of 0.5 s and 20 of 1 s."""
    with small_shapes(tmp_path / "data"):
        added = add(run)
    assert zoo_models() == {"a/b": added}
    assert added.overrides[:2] == ["MODEL.DETR.DEC_LAYERS", "2"]
    assert (added.AP, added.AP50, added.seeds, added.spread) == (
        0.01,
        0.02,
        {"7": 0.01},
        "one seed",
    )
    assert (added.iterations, added.minutes, added.commit) == (40, 0.5, "a" * 40)
    assert added.versions["torch"] == "2.4.0"
    record = read_checkpoint(find_zoo_weights("a/b"))[RECORD_KEY]
    config = parse_config(record["config"], "a/b")
    assert (config["OUTPUT_DIR"], config["MODEL"]["WEIGHTS"]) == ("output/a/b", "")
    assert "MODEL.WEIGHTS" not in added.overrides

    zoo.zoo_file("a/b").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="missing or damaged"):
        check_weights(weights_config("zoo://a/b"))


def test_seeds_give_a_deviation(own_zoo: Path, run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    with small_shapes(tmp_path / "data"), pytest.raises(ValueError, match="different seeds"):
        add(run, other)
    checkpoint = torch.load(other / "model_final.pth", weights_only=True)
    record = checkpoint[RECORD_KEY]
    record["config"] = record["config"].replace("SEED: 7", "SEED: 8")
    torch.save(checkpoint, other / "model_final.pth")
    text = (other / "metrics.json").read_text().replace("0.01", "3.01")
    (other / "metrics.json").write_text(text)
    with small_shapes(tmp_path / "data"):
        added = add(run, other)
    assert added.seeds == {"7": 0.01, "8": 3.01}
    assert added.spread == "1.5 ± 2.1 (2)"


def test_what_does_not_fit_the_run_or_the_zoo_is_refused(
    own_zoo: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (run / "metrics.json").read_text()
    (run / "metrics.json").write_text(text.replace("0.01", "50.0"))
    with small_shapes(tmp_path / "data"), pytest.raises(ValueError, match=r"says 50\.00"):
        add(run)
    monkeypatch.setattr(tools.zoo, "LARGEST", 1000)
    (run / "metrics.json").write_text(text)
    with small_shapes(tmp_path / "data"), pytest.raises(ValueError, match="the zoo is larger"):
        add(run)
    (run / "metrics.json").write_text(text.partition('\n{"iteration": 40')[0])
    with pytest.raises(ValueError, match="no evaluation of these weights"):
        add(run)
    assert not (own_zoo / "weights").exists()
