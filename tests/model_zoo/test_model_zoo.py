from pathlib import Path

import pytest

from miti_detr import model_zoo
from miti_detr.model_zoo import get_config_file


def test_a_config_of_the_clone() -> None:
    path = Path(get_config_file("shapes/miti_detr.yaml"))
    assert path.is_absolute()
    assert "LAYER_RESIDUAL" in path.read_text()


def test_configs_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/a.yaml").touch()
    monkeypatch.setattr(model_zoo, "__file__", str(tmp_path / "__init__.py"))
    assert get_config_file("a.yaml") == str(tmp_path / "configs/a.yaml")


def test_an_unknown_config_is_named_with_the_nearest() -> None:
    with pytest.raises(FileNotFoundError, match=r"'shapes/mitidetr\.yaml'.*shapes/miti_detr\.yaml"):
        get_config_file("shapes/mitidetr.yaml")
