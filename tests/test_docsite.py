"""Pages of the documentation site that are generated; `make site` checks the rest."""

import re
import runpy

from detectron2.config import CfgNode

from miti_detr.config import _defaults
from tests.helpers import ROOT

PAGES = runpy.run_path(str(ROOT / "tools/docsite/pages.py"))


def test_config_keys_page_is_complete() -> None:
    keys = PAGES["config_keys"]((ROOT / "miti_detr/config.py").read_text())

    def flat(node: CfgNode, prefix: str = "") -> dict[str, object]:
        found: dict[str, object] = {}
        for name, value in node.items():
            nested = isinstance(value, CfgNode)
            found |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: repr(value)}
        return found

    assert {key.name: key.default for key in keys} == flat(_defaults())
    meanings = {key.name: key.meaning for key in keys}
    assert meanings["OUTPUT_NOTE"].startswith("what this run is for")
    assert meanings["SOLVER.EMA.ENABLED"].startswith("Average of the weights")
    assert "  before_norm Miti-DETR" in meanings["MODEL.DETR.LAYER_RESIDUAL"]


def test_links_of_the_site_stay_on_it() -> None:
    """A page at the top links to docs/, and a page in docs/ to the top and to other files."""
    pages = {name: (text, linked) for name, text, linked in PAGES["written_pages"]()}
    assert {"index.md", "evidence.md", "training.md"} <= set(pages)
    assert "](training.md)" in pages["index.md"][0]
    assert "](index.md#your-own-data)" in pages["pipelines.md"][0]
    assert pages["benchmarks.md"][1] == {"benchmarks/runs.yaml", "benchmarks/gpu.yaml"}
    for text, linked in pages.values():
        files = {f"files/{path}": path for path in linked}
        for target in re.findall(r"\]\((?!https?:|#)([^)\s#]+)", text):
            path = ROOT / files.get(target, f"docs/{target}")
            assert target in pages or path.is_file(), target


def test_api_pages_list_what_the_packages_export() -> None:
    pages = dict(PAGES["api_pages"]())
    assert "::: miti_detr.load_predictor\n" in pages["api/miti_detr.md"]
    assert "## miti_detr.modeling.deformable\n" in pages["api/modeling.md"]


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "tools/docsite/mkdocs.yml").read_text()
    pages = [name for name, *_ in (*PAGES["written_pages"](), *PAGES["api_pages"]())]
    assert [name for name in pages if f": {name}\n" not in nav] == []
