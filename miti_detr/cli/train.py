"""``miti-detr train``: from a folder of labelled images to a trained model."""

import argparse
import shlex
import sys
from pathlib import Path

from .arguments import positive_int


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "train",
        help="train on a folder of labelled images",
        description="Trains a Miti-DETR on labelled images: COCO JSON, YOLO or Pascal VOC, which "
        "is recognised. Writes a contact sheet of the training images, the model, its evaluation, "
        "a report on its faults, and pictures. Run again, it resumes.",
    )
    parser.add_argument("data", metavar="DATA", help="folder, COCO JSON file or data.yaml")
    parser.add_argument("--output", metavar="DIR", help="default: output/ and the name of the data")
    parser.add_argument(
        "--preset",
        choices=("laptop", "gpu", "quick"),
        default="laptop",
        help="laptop: 20 minutes on two cores (default); gpu: a larger model; quick: a rough model "
        "in minutes",
    )
    parser.add_argument("--num-gpus", type=positive_int, help="processes, one for each GPU")
    parser.set_defaults(func=run, overrides=[])
    parser.epilog = "KEY VALUE pairs at the end override the preset, such as SOLVER.MAX_ITER 3000."


def run(args: argparse.Namespace) -> int:
    """Prepare the data and the config, train, and draw."""
    from miti_detr.engine import run as run_processes
    from miti_detr.engine.launch.start import TIMEOUT
    from miti_detr.engine.program import main
    from miti_detr.files import write_text
    from miti_detr.finetune import changed_keys, draw_results, is_evaluated, preset_config
    from miti_detr.visualize.contact_sheet import draw_contact_sheet

    output = Path(args.output or f"output/{Path(args.data).resolve().stem}")
    cfg = preset_config(Path(args.data), output, args.preset, args.overrides)
    file, begun = output / "train.yaml", (output / "last_checkpoint").is_file()
    if not changed_keys(cfg, file, begun=begun) and is_evaluated(output):
        print(f"{output} is trained already. To train again, remove that folder or choose another.")
    else:
        if not begun:
            draw_contact_sheet(cfg, output / "contact_sheet.png")
            print(f"{output / 'contact_sheet.png'}: look whether the boxes are right")
        write_text(file, cfg.dump())
        arguments = argparse.Namespace(
            **{"config_file": str(file), "opts": [], "resume": True, "eval_only": False},
            **{"num_gpus": args.num_gpus, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"},
            **{"timeout": TIMEOUT, "traceback": args.traceback, "short_log": True},
            command=shlex.join(["miti-detr", *sys.argv[1:]]),
        )
        status = run_processes(main, arguments)
        if status != 0:
            return status
    draw_results(cfg, output)
    print((output / "inference" / "coco_table.txt").read_text())
    made = "contact_sheet.png, train.yaml, model_final.pth, curves.png, detections.png"
    print(f"{output} contains {made}.")
    print(f"Where the model fails: {output / 'report' / 'report.html'}. To use it:")
    weights = output / "model_final.pth"
    print(f"  miti-detr predict --weights {weights} --output predictions IMAGE ...")
    return 0
