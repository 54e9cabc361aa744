"""The layer residual: the one rule that turns DETR into Miti-DETR.

A transformer layer takes ``x`` and computes sub-layers A (attention; in the decoder self-attention,
then cross-attention) and F (feed-forward). The layer residual is one more path from the layer's
input to its output, drawn with double lines. LN is LayerNorm; the LN at the right end is the
layer's last one::

                        post-norm                                      pre-norm

    none         x -+-----v                                 x -+--------------v
                    '-[A]-+-[LN]-+-----v                       '-[LN]-[A]-----+-+------------v
                                 '-[F]-+-[LN]- out                              '-[LN]-[F]---+- out

    before_norm  x =========================v               x -+--------------v
                  -+-----v                  "                  '-[LN]=========|==============v
                   '-[A]-+-[LN]-+-----v     "                       '-[A]-----+-+------------+
                                '-[F]-+-----+-[LN]- out                         '-[LN]-[F]---+- out

    after_norm   x ================================v        x =+==============================v
                  -+-----v                         "           +--------------v              "
                   '-[A]-+-[LN]-+-----v            "           '-[LN]-[A]-----+-+------------+
                                '-[F]-+-[LN]-------+- out                       '-[LN]-[F]---+- out

In formulas, with y what F is added to, z = LN1(x) and the strength s::

                 post-norm                   pre-norm
    none         LN(y + F(y))                y + F(LN y)
    before_norm  LN(s x + y + F(y))          s z + y + F(LN y)
    after_norm   s x + LN(y + F(y))          s x + y + F(LN y)

The strength is 1, except while ``MODEL.DETR.RESIDUAL_RAMP_ITERS`` raises it from 0, where each of
the three is DETR. The ramp is for a warm start from DETR's weights.

``before_norm`` is what the published code computes (wenchima/Miti-DETR
``models/transformer_v1.py`` at ae42bd0; note that its pre-norm layers carry z, not x).
``after_norm`` is equation (6) of the paper. The residual has no parameters: checkpoints of all
three fit each other.
"""

import torch
from torch import Tensor, nn

LAYER_RESIDUALS = ("none", "before_norm", "after_norm")
LAYER_RESIDUAL_STACKS = ("both", "encoder", "decoder")


def placements(layer_residual: str, layer_residual_in: str) -> tuple[str, str]:
    """Placement in the encoder and in the decoder; a stack without the layer residual is DETR's.

    Raises:
        ValueError: if ``layer_residual_in`` is not one of :data:`LAYER_RESIDUAL_STACKS`.
    """
    if layer_residual_in not in LAYER_RESIDUAL_STACKS:
        raise ValueError(
            f"layer_residual_in {layer_residual_in!r} is not one of "
            f"{', '.join(LAYER_RESIDUAL_STACKS)} (config key MODEL.DETR.LAYER_RESIDUAL_IN)"
        )
    return (
        layer_residual if layer_residual_in != "decoder" else "none",
        layer_residual if layer_residual_in != "encoder" else "none",
    )


class LayerResidual(nn.Module):
    """Closes a transformer layer: the last sum and norm, with the layer input joined to them.

    Attributes:
        placement: one of :data:`LAYER_RESIDUALS`.
    """

    # The strength as a tensor on the host, None for 1. With a number, the layer would be compiled
    # for each of its values.
    _factor: Tensor | None = None

    def __init__(self, placement: str = "none") -> None:
        """Choose the placement.

        Raises:
            ValueError: if it is not one of :data:`LAYER_RESIDUALS`.
        """
        super().__init__()
        if placement not in LAYER_RESIDUALS:
            raise ValueError(
                f"layer residual {placement!r} is not one of {', '.join(LAYER_RESIDUALS)} "
                "(config key MODEL.DETR.LAYER_RESIDUAL)"
            )
        self.placement = placement

    @property
    def strength(self) -> float:
        """Factor of the joined input, in [0, 1]."""
        return 1.0 if self._factor is None else self._factor.item()

    @strength.setter
    def strength(self, strength: float) -> None:
        self._factor = None if strength == 1 else torch.tensor(strength, dtype=torch.float64)

    def finish_post_norm(self, x: Tensor, total: Tensor, last_norm: nn.Module) -> Tensor:
        """Output of a post-norm layer.

        Args:
            x: the layer's input.
            total: y + F(y), the last sum of the plain layer; the same shape.
            last_norm: the layer's last LayerNorm.
        """
        if self.placement == "before_norm":
            return last_norm(self._scaled(x) + total)
        if self.placement == "after_norm":
            return self._scaled(x) + last_norm(total)
        return last_norm(total)

    def finish_pre_norm(self, x: Tensor, normed: Tensor, total: Tensor) -> Tensor:
        """Output of a pre-norm layer.

        Args:
            x: the layer's input.
            normed: LN1(x); the same shape.
            total: y + F(LN y), the output of the plain layer; the same shape.
        """
        if self.placement == "before_norm":
            return self._scaled(normed) + total
        if self.placement == "after_norm":
            return self._scaled(x) + total
        return total

    def extra_repr(self) -> str:
        """Show the placement in the printed model."""
        return self.placement

    def _scaled(self, path: Tensor) -> Tensor:
        return path if self._factor is None else self._factor * path
