"""Configuration keys that Miti-DETR adds to Detectron2's.

The keys below ``MODEL.DETR`` that the published Detectron2 wrapper of DETR has keep their names
and defaults, so that its YAML files load here with only ``MODEL.META_ARCHITECTURE`` changed
(facebookresearch/detr ``d2/detr/config.py`` at 29901c5).
"""

from detectron2.config import CfgNode as CN


def add_miti_detr_config(cfg: CN) -> None:
    """Add the keys of Miti-DETR, with their defaults, to a Detectron2 config.

    Keys that ``cfg`` has already stay as they are: other plug-ins use ``MODEL.SWIN`` too. Call
    theirs first, since some replace the whole section.

    Args:
        cfg: the config of :func:`detectron2.config.get_cfg`; changed in place.

    Raises:
        ValueError: another plug-in has a value where this one has a section, or the reverse.
    """
    _add_missing(cfg, _defaults())


def _defaults() -> CN:
    """Return the keys of this project only."""
    cfg = CN()
    for name in ("MODEL", "SOLVER", "TEST", "DATASETS", "INPUT"):
        cfg[name] = CN()
    cfg.MODEL.DETR, cfg.MODEL.BACKBONE, cfg.SOLVER.AMP, cfg.INPUT.CROP = CN(), CN(), CN(), CN()
    _add_transformer_keys(cfg)
    _add_prediction_keys(cfg)
    _add_deformable_keys(cfg)
    _add_mask_keys(cfg)
    _add_pretraining_keys(cfg)
    _add_weights_keys(cfg)
    _add_backbone_keys(cfg)
    _add_speed_keys(cfg)
    _add_solver_keys(cfg)
    _add_data_keys(cfg)
    # Further writers of metrics: dotted names of subclasses of Detectron2's EventWriter, or lists
    # of a name and its arguments; miti_detr.engine.hooks.loggers has WandbWriter and MLflowWriter
    cfg.LOGGERS = []
    cfg.OUTPUT_NOTE = ""  # what this run is for; recorded in its log, config and checkpoints
    return cfg


def _add_missing(cfg: CN, defaults: CN, prefix: str = "") -> None:
    for name, value in defaults.items():
        key = prefix + name
        if name not in cfg:
            cfg[name] = value
        elif isinstance(value, CN) != isinstance(cfg[name], CN):
            raise ValueError(
                f"{key} is {cfg[name]!r}, which another plug-in has set. Miti-DETR uses this name "
                f"for a {'section' if isinstance(value, CN) else 'value'}, so the two plug-ins "
                "cannot share a config."
            )
        elif isinstance(value, CN):
            _add_missing(cfg[name], value, f"{key}.")


def _add_transformer_keys(cfg: CN) -> None:
    detr = cfg.MODEL.DETR
    # The one switch between DETR and Miti-DETR: where the input of a layer joins its output
    #   none        DETR
    #   before_norm Miti-DETR as published: joins the last sum, before the last LayerNorm
    #   after_norm  Miti-DETR by equation (6) of the paper: added to the finished layer
    detr.LAYER_RESIDUAL = "before_norm"
    # Stacks that have it: both | encoder | decoder
    detr.LAYER_RESIDUAL_IN = "both"
    # Iterations over which the strength of the residual rises linearly from 0 (DETR) to 1, for a
    # training that starts from DETR's weights; 0: it is 1 from the start, as published. Read by the
    # trainer of this project; others register miti_detr.engine.ResidualRamp
    detr.RESIDUAL_RAMP_ITERS = 0
    detr.HIDDEN_DIM = 256  # width C of the tokens
    detr.NHEADS = 8  # attention heads; must divide HIDDEN_DIM
    detr.ENC_LAYERS = 6
    detr.DEC_LAYERS = 6
    detr.DIM_FEEDFORWARD = 2048  # width of the hidden layer of the feed-forward network
    # Probability; in attention weights, after each sub-layer, in the feed-forward network
    detr.DROPOUT = 0.1
    detr.PRE_NORM = False  # True: LayerNorm before each sub-layer instead of after it


def _add_prediction_keys(cfg: CN) -> None:
    detr = cfg.MODEL.DETR
    detr.NUM_CLASSES = 80  # K; with softmax, "no object" is index K of the logits
    # Q; an image with more objects than that cannot be fully detected
    detr.NUM_OBJECT_QUERIES = 100
    # Backbone outputs that become the tokens, as a list: one for DETR, one for each level of
    # Deformable-DETR, by decreasing size; empty: the output with the largest stride
    detr.IN_FEATURES = []
    detr.POSITION_EMBEDDING = "sine"  # sine | learned
    # Feature cells that count as image inside a padded batch:
    #   ceil     the first ceil(size / stride) rows and columns (Detectron2 wrapper of DETR)
    #   nearest  nearest-neighbour resize of the pixel mask (main repository of DETR)
    detr.PADDING_MASK = "ceil"
    # Batches are padded to a multiple of this many pixels in height and width. 0: to the largest
    # image, as published. Few distinct shapes make CPU and compiled runs faster
    detr.SIZE_DIVISIBILITY = 0

    # How the class of a query is predicted:
    #   softmax  cross-entropy over the classes and "no object" (DETR)
    #   focal    sigmoid focal loss of each class by itself (Deformable-DETR); detections are the
    #            TEST.DETECTIONS_PER_IMAGE pairs of query and class with the highest scores
    detr.CLASS_LOSS = "softmax"
    detr.FOCAL_ALPHA = 0.25  # weight of the class of a query, 1 - alpha of its other classes
    detr.FOCAL_GAMMA = 2.0  # exponent; 0: cross-entropy

    # Weights of the set loss
    # Weight of the classification loss, and of the class probability in the matching cost
    detr.CLASS_WEIGHT = 1.0
    detr.L1_WEIGHT = 5.0  # the same for the L1 distance of the boxes
    detr.GIOU_WEIGHT = 2.0  # the same for the generalised IoU
    detr.NO_OBJECT_WEIGHT = 0.1  # class weight of "no object" in the cross-entropy
    detr.DEEP_SUPERVISION = True  # losses on every decoder layer, not only the last one


def _add_deformable_keys(cfg: CN) -> None:
    # MODEL.META_ARCHITECTURE DeformableDetr
    detr = cfg.MODEL.DETR
    # Levels of features: those of IN_FEATURES, then one of half the size by a strided convolution,
    # and so on
    detr.NUM_FEATURE_LEVELS = 1
    detr.NUM_POINTS = 4  # points that a head reads on each level
    # Each decoder layer corrects the boxes of the layer before it, with its own heads
    detr.BOX_REFINEMENT = False
    # The encoder proposes the boxes from which the decoder starts; needs BOX_REFINEMENT
    detr.TWO_STAGE = False


def _add_mask_keys(cfg: CN) -> None:
    # MODEL.MASK_ON True: each query also has a mask. Needs finer outputs of the backbone, such as
    # MODEL.RESNETS.OUT_FEATURES ["res2", "res3", "res4", "res5"]
    detr = cfg.MODEL.DETR
    # Weights of a trained detector on which only the mask head is trained; "": both are trained.
    # They replace those of MODEL.WEIGHTS when a training begins
    detr.FROZEN_WEIGHTS = ""
    # Points of each mask at which its losses are taken, most of them where the mask is least
    # certain; 0: all pixels, as published
    detr.MASK_POINTS = 0
    # Classes (0..K-1) that are stuff, without instances. Not empty: panoptic segmentation
    detr.STUFF_CLASSES = []
    # Lowest probability of the class of a panoptic segment
    cfg.TEST.PANOPTIC_THRESHOLD = 0.85
    # Lowest score of a detection with a mask. Masks take time: raise it where low scores do not
    # count, unlike in COCO's metrics
    cfg.TEST.MASK_MIN_SCORE = 0.0
    # Form of predicted masks: bool (M, height, width) | rle (run-length encodings)
    cfg.TEST.MASK_FORMAT = "bool"


def _add_pretraining_keys(cfg: CN) -> None:
    # MODEL.META_ARCHITECTURE UpDetr; its patches: INPUT.PATCHES
    cfg.MODEL.UP_DETR = CN()
    # Match a patch with its own queries only. False: with those of any patch, as published, which
    # takes long to train from scratch
    cfg.MODEL.UP_DETR.MATCH_OWN = False
    # Weight of the loss between a query's reconstruction of the feature of its patch and that
    # feature; 0: without
    cfg.MODEL.UP_DETR.FEATURE_WEIGHT = 1.0


def _add_weights_keys(cfg: CN) -> None:
    # Layer residual that MODEL.WEIGHTS was trained with: none | before_norm | after_norm.
    # "": as the file records it; a file without a record is taken as none (DETR)
    cfg.MODEL.DETR.WEIGHTS_RESIDUAL = ""
    # Read weights that need more than tensors and plain values. Such a file can run any code:
    # only for files whose origin you trust
    cfg.MODEL.TRUST_WEIGHTS = False


def _add_backbone_keys(cfg: CN) -> None:
    # Compute the features of a frozen backbone (SOLVER.BACKBONE_MULTIPLIER 0) once, for this number
    # of random variants of each training image, and keep them on the disk; 0: in each step
    cfg.MODEL.BACKBONE.CACHE_FEATURES = 0

    # MODEL.BACKBONE.NAME build_swin_backbone; the defaults are those of Swin-T
    cfg.MODEL.SWIN = CN()
    cfg.MODEL.SWIN.EMBED_DIM = 96  # channels of the first stage, doubled by each further one
    cfg.MODEL.SWIN.DEPTHS = (2, 2, 6, 2)  # blocks of each stage

    # MODEL.BACKBONE.NAME build_vit_backbone; the defaults are those of ViTDet with ViT-B
    cfg.MODEL.VIT = CN()
    cfg.MODEL.VIT.IMG_SIZE = 1024  # pixels; every batch is padded to this square
    cfg.MODEL.VIT.EMBED_DIM = 768

    # MODEL.BACKBONE.NAME build_timm_backbone; needs the extra miti_detr[timm]
    cfg.MODEL.TIMM = CN()
    cfg.MODEL.TIMM.NAME = "resnet50"  # of a model in timm
    cfg.MODEL.TIMM.PRETRAINED = False  # True: timm downloads its weights


def _add_speed_keys(cfg: CN) -> None:
    # Compile backbone, transformer, heads and loss terms (torch.compile). Shapes of a batch are
    # compiled, so bound their number by MODEL.DETR.SIZE_DIVISIBILITY. On a CPU it needs a C++
    # compiler
    cfg.MODEL.COMPILE = False
    # On a GPU, record the kernels of backbone and transformer once for each shape of a batch, which
    # saves the time of the host. Bound the number of shapes by MODEL.DETR.SIZE_DIVISIBILITY
    cfg.MODEL.CUDA_GRAPHS = False
    # TensorFloat-32 in products and convolutions of float32 on a GPU: on, off, or default (torch's:
    # convolutions only). It moves logits by 1e-2
    cfg.MODEL.TF32 = "default"
    # Compute the inside of transformer layers and backbone stages twice instead of keeping it for
    # the backward pass: the same numbers, less memory, more time
    cfg.MODEL.DETR.ACTIVATION_CHECKPOINT = False
    # Parts in which it does so, such as ("backbone.res3", "backbone.res4", "transformer.encoder")
    cfg.MODEL.DETR.ACTIVATION_CHECKPOINT_IN = ("backbone", "transformer")
    # Replace parts of the model by faster ones that compute the same up to rounding
    cfg.MODEL.ACCELERATE = True
    # Precision of mixed precision: float16 | bfloat16
    cfg.SOLVER.AMP.PRECISION = "bfloat16"
    # Mixed precision in evaluation and prediction; boxes stay in float32
    cfg.TEST.AMP = CN()
    cfg.TEST.AMP.ENABLED = False


def _add_solver_keys(cfg: CN) -> None:
    # Parts into which each process cuts its share of IMS_PER_BATCH. Their gradients are added up to
    # one step, which is that of the whole batch and takes the memory of a part. 0: as few as the
    # memory of the GPU allows, which is tried before the training; on a CPU 1
    cfg.SOLVER.ACCUMULATE = 1
    # Average of the weights over training steps (EMA), which evaluation and checkpoints use
    cfg.SOLVER.EMA = CN()
    cfg.SOLVER.EMA.ENABLED = False
    cfg.SOLVER.EMA.DECAY = 0.9997  # share of the average that a step keeps
    # Steps in which the decay grows from 0, so that the first weights are forgotten; 0: at once
    cfg.SOLVER.EMA.WARMUP = 2000
    cfg.SOLVER.EMA.PERIOD = 1  # steps between two updates, which then keep DECAY ** PERIOD

    # End the run after this many evaluations in a row without a better result; 0: never
    cfg.SOLVER.EARLY_STOP = CN()
    cfg.SOLVER.EARLY_STOP.PATIENCE = 0
    cfg.SOLVER.EARLY_STOP.MIN_DELTA = 0.0  # a better result is better by more than this
    # Name in metrics.json, such as bbox/AP50 or validation/total_loss; lower is better for losses.
    # "": the AP of the (first) data set of TEST, as for model_best.pth
    cfg.SOLVER.EARLY_STOP.METRIC = ""

    cfg.SOLVER.OPTIMIZER = "ADAMW"  # ADAMW | SGD
    # Learning rate of the backbone relative to BASE_LR; 0 freezes it
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    # Parts of the model that are not trained, such as ("backbone", "transformer.encoder"); their
    # batch normalisations keep their statistics
    cfg.SOLVER.FREEZE = ()
    # Learning rate relative to BASE_LR of the layers of Deformable-DETR that say where to look:
    # sampling offsets and reference points
    cfg.SOLVER.SAMPLING_MULTIPLIER = 0.1
    # Schedule in passes over the training data. > 0: replaces MAX_ITER, by the real length of
    # DATASETS.TRAIN
    cfg.SOLVER.EPOCHS = 0
    # Epochs after which the learning rate is multiplied by GAMMA; replaces STEPS when EPOCHS > 0.
    # LR_SCHEDULER_NAME WarmupFlatCosineLR: the one from which it falls to BASE_LR_END
    cfg.SOLVER.EPOCH_STEPS = ()
    # Warm-up in epochs, parts of them as well. > 0: replaces WARMUP_ITERS
    cfg.SOLVER.WARMUP_EPOCHS = 0.0
    # Images of a batch that BASE_LR and all iterations of this config are meant for: those of
    # another IMS_PER_BATCH are scaled, and the log says how. 0: nothing is scaled
    cfg.SOLVER.REFERENCE_BATCH = 0


def _add_data_keys(cfg: CN) -> None:
    # Data sets to register: a list of [name, annotation json in COCO format, image folder], of
    # [name, panoptic json, image folder, folder of segment images], and of [name, image folder] for
    # images without labels
    cfg.DATASETS.COCO_FORMAT = []
    # The same for image folders only: a list of [name, image folder]
    cfg.DATASETS.UNLABELED = []
    # Share of the images of TRAIN that is used, evenly spread, in (0, 1]
    cfg.DATASETS.TRAIN_SHARE = 1.0
    # What to do with a faulty annotation (empty box, unknown category): error | drop
    cfg.DATASETS.BAD_ANNOTATIONS = "error"
    # What to do with an image that cannot be read, or whose size is not that of its data set:
    #   error  stop, and name the file
    #   skip   use the next image instead, and count it in the log
    cfg.DATASETS.BAD_IMAGES = "error"
    # Whether images are turned upright by their EXIF orientation (apply), or taken as they are
    # stored (ignore); the boxes of the data set decide which is right
    cfg.DATASETS.EXIF_ORIENTATION = "apply"
    # Shortest edges (pixels) to which an image is resized before the random crop of INPUT.CROP
    cfg.INPUT.CROP.MIN_SIZE_BEFORE = (400, 500, 600)
    # Pre-training without labels (MODEL.META_ARCHITECTURE UpDetr): patches drawn of each image, M
    # of the paper; 0: none, and the data sets have labels
    cfg.INPUT.PATCHES = CN()
    cfg.INPUT.PATCHES.NUMBER = 0
    cfg.INPUT.PATCHES.SIZE = 128  # side to which a patch is resized, pixels
    cfg.TEST.IMS_PER_BATCH = 1  # images per batch of evaluation, in each process
    # Evaluations also compute the losses of training, without its augmentation and dropout, and log
    # them as validation/loss_ce and so on
    cfg.TEST.LOSS = False
    # Evaluate with faster-coco-eval if it is installed; the numbers are those of pycocotools
    cfg.TEST.FAST_COCO_EVAL = True
