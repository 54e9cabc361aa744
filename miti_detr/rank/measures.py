"""How far the tokens of an image are from being all the same: measures of one token matrix.

X is (n, C): n tokens as rows, C channels. All functions are meant for float64; they are pure. "Rank
collapse" is X coming close to ``1 x^T``, a matrix of identical rows.
Source: Dong, Cordonnier, Loukas, *Attention is not all you need*, 2021; Miti-DETR, equation (2).
"""

import math

import torch
from torch import Tensor


def residual(x: Tensor) -> Tensor:
    """What is left of the tokens (n, C) without the row that they share: ``X - 1 mean(X)^T``.

    The mean minimises the Frobenius norm, which is what Dong et al. plot; for the composite norm it
    is an upper bound of the minimum that equation (2) names.
    """
    return x - x.mean(dim=0)


def published_residual(x: Tensor, output: Tensor) -> Tensor:
    """The "residual" of equations (10) to (12) of the paper: ``X_l + res(X_{l+1} - X_l)``.

    It centres the output by the mean of the *change*, and so keeps what the rows of X_l share: it
    is large for tokens that are all the same, and no measure of rank.

    Args:
        x: X_l, input of a layer, (n, C).
        output: X_{l+1}, (n, C).
    """
    return x + residual(output - x)


def composite_norm(x: Tensor) -> Tensor:
    """``sqrt(|X|_1 |X|_inf)`` of (n, C): largest absolute column sum times largest row sum.

    The "1,inf norm" of Dong et al. It is homogeneous, but no norm: the triangle inequality fails.
    """
    size = x.abs()
    return (size.sum(dim=0).max() * size.sum(dim=1).max()).sqrt()


def relative_residual(x: Tensor) -> Tensor:
    """``|res X| / |X|`` of (n, C) in the composite norm: 1 for centred tokens, 0 for equal ones.

    NaN where all tokens are zero.
    """
    return composite_norm(residual(x)) / composite_norm(x)


def mean_cosine(x: Tensor) -> Tensor:
    """Mean cosine of all pairs of different rows of (n, C), in O(n C); NaN for a single row."""
    n = len(x)
    direction = torch.nn.functional.normalize(x, dim=1, eps=torch.finfo(x.dtype).tiny)
    total = direction.sum(dim=0).square().sum() - direction.square().sum()
    return total / (n * (n - 1)) if n > 1 else x.new_tensor(torch.nan)


def singular_values(x: Tensor) -> Tensor:
    """Singular values of (n, C), falling, by the smaller Gram matrix.

    Those below about 1e-8 of the largest are rounding.
    """
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


def effective_rank(values: Tensor) -> Tensor:
    """``exp(H(p))`` of singular values, with p their shares of the sum (Roy and Vetterli, 2007)."""
    share = values / values.sum()
    return torch.special.entr(share).sum().exp()


def stable_rank(values: Tensor) -> Tensor:
    """``|X|_F^2 / s_1^2`` of falling singular values: at least 1."""
    return values.square().sum() / values[0].square()


def attention_entropy(weights: Tensor, num_keys: int) -> Tensor:
    """Mean entropy of rows of attention weights over its maximum: 1 uniform, 0 one token each.

    Args:
        weights: (..., Lq, Lk); rows sum to 1.
        num_keys: how many keys may be attended to, the others being padding.

    Returns:
        The mean of ``H(row) / log(num_keys)`` over all rows; NaN for one key.
    """
    limit = math.log(num_keys) if num_keys > 1 else math.nan
    return torch.special.entr(weights).sum(dim=-1).mean() / limit


def measure_tokens(x: Tensor) -> dict[str, float]:
    """All measures of one token matrix.

    Args:
        x: (n, C), un-padded tokens of one image; computed in float64.

    Returns:
        ``residual`` (relative, composite norm), ``residual_fro`` (relative, Frobenius), ``cosine``,
        ``effective_rank`` and ``effective_rank_residual`` (of res X), ``stable_rank``, ``std``
        (over the channels, mean of the tokens). NaN where a measure is not defined, as for tokens
        that are all zero.
    """
    x = x.double()
    rest = residual(x)
    values = singular_values(x)
    return {
        "residual": float(composite_norm(rest) / composite_norm(x)),
        "residual_fro": float(rest.norm() / x.norm()),
        "cosine": float(mean_cosine(x)) if bool(x.any()) else float("nan"),
        "effective_rank": float(effective_rank(values)),
        "effective_rank_residual": float(effective_rank(singular_values(rest))),
        "stable_rank": float(stable_rank(values)),
        "std": float(x.std(dim=1, correction=0).mean()),
    }


def measure_step(x: Tensor, output: Tensor) -> dict[str, float]:
    """The two sides of equation (14) of the paper, beside the residual proper, in composite norm.

    Args:
        x: X_l, tokens (n, C) before a layer; computed in float64.
        output: X_{l+1}, after it, (n, C).

    Returns:
        ``norm_residual``: ``|res(X_{l+1})|``; ``norm_residual_change``: ``|res(X_{l+1} - X_l)|``,
        the right side of (14); ``norm_published``: :func:`published_residual`, its left side as the
        paper defines it.
    """
    x, output = x.double(), output.double()
    return {
        "norm_residual": float(composite_norm(residual(output))),
        "norm_residual_change": float(composite_norm(residual(output - x))),
        "norm_published": float(composite_norm(published_residual(x, output))),
    }
