"""The layer residual in transformer layers of other libraries, by hooks.

Parameters, buffers and state-dict keys stay as they are. What is computed is
:class:`~miti_detr.modeling.transformer.LayerResidual`, drawn and written out in
:mod:`~miti_detr.modeling.transformer.residual`.
"""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor, nn

from miti_detr.modeling.transformer import LAYER_RESIDUALS, LayerResidual
from miti_detr.modeling.transformer.layers import TransformerLayer


class KnownLayer(NamedTuple):
    """What is needed to know of a layer.

    Attributes:
        last_norm: name of the layer's last norm, the last thing in a post-norm layer; "": the layer
            is always pre-norm.
        first_norm: name of the layer's first norm.
        pre_norm: name of the attribute that says whether the layer is pre-norm, if there is one.
    """

    last_norm: str
    first_norm: str = "norm1"
    pre_norm: str = ""

    def is_post_norm(self, layer: nn.Module) -> bool:
        """Whether the layer is post-norm."""
        return bool(self.last_norm) and not (self.pre_norm and getattr(layer, self.pre_norm, False))


def _of_transformers(*names: str) -> dict[str, KnownLayer]:
    known = KnownLayer("final_layer_norm", "self_attn_layer_norm", "normalize_before")
    return {
        f"transformers.models.{folder}.modeling_{folder}.{name}{stack}Layer": known
        for folder, name in (name.split(":") for name in names)
        for stack in ("Encoder", "Decoder")
    }


# Layers whose forward is known, by name, so that their libraries need not be imported.
KNOWN_LAYERS: dict[str, KnownLayer] = {
    "torch.nn.modules.transformer.TransformerEncoderLayer": KnownLayer(
        "norm2", pre_norm="norm_first"
    ),
    "torch.nn.modules.transformer.TransformerDecoderLayer": KnownLayer(
        "norm3", pre_norm="norm_first"
    ),
    "timm.models.vision_transformer.Block": KnownLayer(""),
    "detectron2.modeling.backbone.vit.Block": KnownLayer(""),
    "detectron2.modeling.backbone.swin.SwinTransformerBlock": KnownLayer(""),
    **_of_transformers(
        "detr:Detr",
        "conditional_detr:ConditionalDetr",
        "deformable_detr:DeformableDetr",
        "rt_detr:RTDetr",
    ),
}


class AddedResidual:
    """Layer residuals that :func:`add_layer_residual` has added: take them away again, or ramp.

    As a context manager it takes them away at the end of the block.

    Attributes:
        residuals: name of the layer to its residual, whose ``strength`` may be changed.
    """

    def __init__(self, module: nn.Module, layers: dict[str, nn.Module], placement: str) -> None:
        """Add them; use :func:`add_layer_residual`."""
        self._hooks = [_LayerHooks(layer, LayerResidual(placement)) for layer in layers.values()]
        hooks = zip(layers, self._hooks, strict=True)
        self.residuals: dict[str, LayerResidual] = {name: hook.residual for name, hook in hooks}
        # Their short cut in evaluation hands nested tensors on, which only fused layers can take.
        stacks = (m for m in module.modules() if isinstance(m, nn.TransformerEncoder))
        added = set(map(id, layers.values()))
        self._nested = [s for s in stacks if s.use_nested_tensor and added & set(map(id, s.layers))]
        for stack in self._nested:
            stack.use_nested_tensor = False

    def remove(self) -> None:
        """Take the hooks off."""
        """Make every layer what it was; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        for stack in self._nested:
            stack.use_nested_tensor = True
        self._hooks, self._nested = [], []

    def __enter__(self) -> "AddedResidual":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def add_layer_residual(
    module: nn.Module, *, placement: str, layers: Sequence[str] | None = None
) -> AddedResidual:
    """Give transformer layers of other libraries the layer residual of Miti-DETR.

    With x the input of the layer, y what its feed-forward network F is added to, and z = LN1(x)::

                     post-norm            pre-norm
        before_norm  LN(x + y + F(y))     z + y + F(LN y)
        after_norm   x + LN(y + F(y))     x + y + F(LN y)

    Known are ``torch.nn.TransformerEncoderLayer`` and ``TransformerDecoderLayer`` (post-norm, or
    pre-norm with ``norm_first``), those of Hugging Face's ``Detr``, ``ConditionalDetr``,
    ``DeformableDetr`` and ``RTDetr`` models (post-norm), and, all pre-norm, timm's
    ``vision_transformer.Block`` and the blocks of Detectron2's ``ViT`` and ``SwinTransformer``;
    classes derived from them as well. In a
    decoder layer x skips self-attention and cross-attention. Layer scale and drop path stay on A
    and F; a convolution block at the end of a ``ViT`` block comes before the sum.

    Args:
        module: a known layer, or any module with such layers in it; changed in place, its state
            dict is not.
        placement: ``none``, ``before_norm`` or ``after_norm``.
        layers: names of layers, or of modules that hold them, as in ``module.named_modules()``;
            None: all that are known.

    Returns:
        A handle with :meth:`~AddedResidual.remove`, which is a context manager as well.

    Raises:
        ValueError: another placement; no known layer; a layer that has a residual already.
    """
    if placement not in LAYER_RESIDUALS:
        raise ValueError(f"placement {placement!r} is not one of {', '.join(LAYER_RESIDUALS)}")
    chosen = _choose(module, layers)
    for name, layer in chosen.items():
        if _has_residual(layer):
            raise ValueError(f"layer {name!r} has a layer residual already: remove() it first")
    return AddedResidual(module, chosen, placement)


def known_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Layers of :data:`KNOWN_LAYERS` in a module, itself included (with the name "")."""
    return {name: m for name, m in module.named_modules() if _known_name(m) is not None}


class _LayerHooks:
    """Hooks that join one layer's input to its last sum, by the rule of ``LayerResidual``."""

    def __init__(self, layer: nn.Module, residual: LayerResidual) -> None:
        self.residual = residual
        self._x: Tensor | None = None
        self._normed: Tensor | None = None
        known = KNOWN_LAYERS[_known_name(layer) or ""]
        post_norm = known.is_post_norm(layer)
        close = self._finish_post_norm if post_norm else self._finish_pre_norm
        self._handles = [
            layer.register_forward_pre_hook(self._keep_input, with_kwargs=True),
            layer.register_forward_hook(close, always_call=True),
        ]
        if post_norm and residual.placement == "before_norm":
            norm = layer.get_submodule(known.last_norm)
            self._handles.append(norm.register_forward_pre_hook(self._join_before_last_norm))
        elif residual.placement == "before_norm":
            norm = layer.get_submodule(known.first_norm)
            self._handles.append(norm.register_forward_hook(self._keep_normed))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _keep_input(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._x = layer_input(args, kwargs)

    def _keep_normed(self, norm: nn.Module, args: Any, output: Tensor) -> None:
        self._normed = output

    def _join_before_last_norm(self, norm: nn.Module, args: tuple[Tensor]) -> Tensor:
        assert self._x is not None
        # The norm itself follows, by the layer.
        return self.residual.finish_post_norm(self._x, args[0], nn.Identity())

    def _finish_post_norm(self, layer: nn.Module, args: Any, output: Any) -> Any:
        x, self._x = self._x, None
        if x is None or output is None or self.residual.placement == "before_norm":
            return output  # the layer failed, or the input has joined already
        # The layer has applied its last norm.
        finish = self.residual.finish_post_norm
        return _with_tokens(output, finish(x, _tokens_of(output), nn.Identity()))

    def _finish_pre_norm(self, layer: nn.Module, args: Any, output: Any) -> Any:
        x, normed = self._x, self._normed
        self._x = self._normed = None
        if x is None or output is None:
            return output
        joined = x if normed is None else normed
        tokens = self.residual.finish_pre_norm(x, joined, _tokens_of(output))
        return _with_tokens(output, tokens)


def _tokens_of(output: Any) -> Tensor:
    """The tokens that a layer returns; some releases of transformers return more beside them."""
    return output[0] if isinstance(output, tuple) else output


def _with_tokens(output: Any, tokens: Tensor) -> Any:
    return (tokens, *output[1:]) if isinstance(output, tuple) else tokens


_INPUTS = ("src", "tgt", "x", "hidden_states")


def layer_input(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The tokens among the arguments of a known layer."""
    return args[0] if args else next(kwargs[name] for name in _INPUTS if name in kwargs)


def _choose(module: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Module]:
    known = known_layers(module)
    kinds = ", ".join(KNOWN_LAYERS)
    if not known:
        own = any(isinstance(m, TransformerLayer) for m in module.modules())
        hint = " Its layers have the residual as config key MODEL.DETR.LAYER_RESIDUAL." * own
        raise ValueError(f"{type(module).__name__} has no layer of a known kind ({kinds}).{hint}")
    if names is None:
        return known
    chosen: dict[str, nn.Module] = {}
    for wanted in [names] if isinstance(names, str) else names:
        found = {n: m for n, m in known.items() if n == wanted or n.startswith(f"{wanted}.")}
        if not found:
            modules = dict(module.named_modules())
            what = f"a {type(modules[wanted]).__name__}" if wanted in modules else "no module"
            raise ValueError(
                f"layers: {wanted!r} is {what} and holds no layer of a known kind; those here are "
                f"{', '.join(known)}; known kinds are {kinds}"
            )
        chosen |= found
    return chosen


def _known_name(module: nn.Module) -> str | None:
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((name for name in names if name in KNOWN_LAYERS), None)


def _has_residual(layer: nn.Module) -> bool:
    return any(isinstance(owner, _LayerHooks) for owner in _hook_owners(layer))


def _hook_owners(layer: nn.Module) -> Iterator[Any]:
    for hook in layer._forward_hooks.values():
        yield getattr(hook, "__self__", None)
