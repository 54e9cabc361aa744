"""``miti-detr export``: writes a trained model for torch.export, ONNX or OpenVINO."""

import argparse

from .arguments import positive_int, split_overrides


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "export",
        help="write a model for torch.export, ONNX or OpenVINO",
        description="Exports a trained model, and compares the file with the model on single "
        "images and padded batches. A float32 file that differs is not written. For float16 and "
        "int8 the difference of AP is printed.",
        epilog="KEY VALUE pairs at the end override the config, such as INPUT.MIN_SIZE_TEST 640.",
    )
    parser.add_argument("weights", metavar="WEIGHTS", help="checkpoint of the model")
    parser.add_argument(
        "--format", required=True, choices=("torch", "onnx", "openvino"), help="kind of file"
    )
    parser.add_argument(
        "--output",
        metavar="F",
        help="file that ends in .pt2, .onnx or .xml; default: beside the checkpoint, or here if it "
        "is an address",
    )
    parser.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "float16", "int8"),
        help="default float32; the others for onnx and openvino",
    )
    parser.add_argument(
        "--calibration",
        nargs="+",
        default=[],
        metavar="IMAGE|FOLDER",
        help="images for int8, such as 100 of the training images",
    )
    parser.add_argument(
        "--dataset",
        default="",
        metavar="NAME",
        help="data set on which AP is compared; default: for lower precision the first of "
        "DATASETS.TEST",
    )
    parser.add_argument(
        "--static",
        nargs=3,
        type=positive_int,
        metavar=("N", "H", "W"),
        help="take batches of N images of H x W pixels only; default: of any number and size",
    )
    parser.add_argument(
        "--image-type", default="uint8", choices=("uint8", "float32"), help="default uint8"
    )
    parser.add_argument(
        "--no-masks", action="store_true", help="leave out the masks of a model that has masks"
    )
    best = "return the K best detections of an image, which saves masks; default: all"
    parser.add_argument("--top-k", type=positive_int, metavar="K", help=best)
    parser.add_argument(
        "--config-file", metavar="C", help="YAML file; default: the config in the checkpoint"
    )
    parser.set_defaults(func=run, overrides=[])


def run(args: argparse.Namespace) -> int:
    """Export, and print what was compared."""
    from miti_detr.engine import prepare_cpu
    from miti_detr.export import ExportOptions, export_model
    from miti_detr.predict.sources import find_images

    prepare_cpu()
    images, overrides = split_overrides(args.calibration)
    options = ExportOptions(
        format=args.format,
        precision=args.precision,
        calibration=find_images(images) if images else (),
        dataset=args.dataset,
        static_shape=tuple(args.static) if args.static else None,
        image_type=args.image_type,
        masks=not args.no_masks,
        top_k=args.top_k,
    )
    path = export_model(
        args.weights,
        args.output,
        options,
        config_file=args.config_file,
        overrides=[*overrides, *args.overrides],
        say=print,
    )
    print(f"wrote {path}")
    return 0
