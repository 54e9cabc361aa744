from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from miti_detr.pictures import ImageError
from miti_detr.predict import DetectionPredictor
from miti_detr.predict.films import read_frames
from miti_detr.predict.job import predict_files
from tests.visualize.test_drawing import grey

FRAMES = 6


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """Six grey frames with a sound."""
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as out:
        video = out.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = out.add_stream("aac", rate=16000)
        for _ in range(FRAMES):
            out.mux(video.encode(av.VideoFrame.from_image(grey(64, 48))))
        out.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 9600), np.float32), "fltp", "mono")
        sound.sample_rate = 16000
        out.mux(audio.encode(sound))
        out.mux(audio.encode(None))
    return path


def test_frames(film: Path) -> None:
    frames = list(read_frames(film))
    assert len(frames) == FRAMES
    assert frames[0].shape == (48, 64, 3)
    assert abs(int(frames[0].mean()) - 128) < 4


def test_a_stream_of_a_film(film: Path, predictor: DetectionPredictor) -> None:
    results = list(predictor.stream(film, batch_size=4))
    assert [result.boxes[0].tolist() for result in results] == [[0, 0, 32, 48]] * FRAMES


def test_a_film_is_drawn_and_keeps_its_sound(film: Path, predictor: DetectionPredictor) -> None:
    out = film.parent / "out"
    image = film.parent / "a.png"
    grey(10, 10).save(image)
    summary = predict_files(predictor, [image, film, image.with_name("gone.png")], out)
    assert (summary.done, summary.detections, len(summary.failed)) == (2, 1 + FRAMES, 1)
    assert '"image_id": 7, "file_name"' in summary.output.read_text()
    assert '"frame": 5' in summary.output.read_text()
    with av.open(str(out / "film.mp4")) as drawn, av.open(str(film)) as original:
        assert drawn.streams.video[0].average_rate == original.streams.video[0].average_rate
        frames = list(drawn.decode(video=0))
        assert len(frames) == FRAMES
        assert Image.fromarray(frames[0].to_ndarray(format="rgb24")).size == (64, 48)
    with av.open(str(out / "film.mp4")) as drawn, av.open(str(film)) as original:
        packets = [sum(p.size for p in x.demux(audio=0)) for x in (drawn, original)]
    assert packets[0] == packets[1] > 0


def test_what_is_no_film(film: Path, predictor: DetectionPredictor) -> None:
    film.write_bytes(film.read_bytes()[:200])
    with pytest.raises(ImageError, match=r"film\.mp4 cannot be read"):
        list(read_frames(film))
    summary = predict_files(predictor, [film], film.parent / "out")
    assert len(summary.failed) == 1
    assert [path.name for path in (film.parent / "out").glob("*.mp4")] == []
