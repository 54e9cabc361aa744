from pathlib import Path

from miti_detr.evaluation import write_coco_table


def test_table_fits_eighty_columns(tmp_path: Path) -> None:
    metrics = {"AP": 12.345, "AP50": 100.0, "AR": float("nan")}
    metrics |= {f"AP-a class with a rather long name {i}": float(i) for i in range(81)}
    path = tmp_path / "inference" / "coco_table.txt"
    write_coco_table({"some_val": {"bbox": metrics}}, path)
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "12.35" in text or "12.34" in text
    assert all(f"{i}.00" in text for i in range(81))
