"""Measures of one token matrix: how far its tokens are from being identical.

X is (n, C): n tokens as rows, C channels. All functions are pure and meant for float64. Rank
collapse means that X approaches ``1 x^T``, a matrix of identical rows.
Source: Dong, Cordonnier, Loukas, *Attention is not all you need*, 2021; Miti-DETR, equation (2).
"""

import math

import torch
from torch import Tensor


def residual(x: Tensor) -> Tensor:
    """Return the tokens (n, C) minus their mean: ``X - 1 mean(X)^T``.

    The mean minimises the Frobenius norm, which Dong et al. plot. In the composite norm, the result
    is an upper bound of the minimum in equation (2).
    """
    return x - x.mean(dim=0)


def published_residual(x: Tensor, output: Tensor) -> Tensor:
    """Return the "residual" of equations (10) to (12) of the paper: ``X_l + res(X_{l+1} - X_l)``.

    It subtracts the mean of the *change* from the output and so keeps what the rows of X_l share.
    It is large for identical tokens and therefore does not measure rank.

    Args:
        x: (n, C) input X_l of a layer.
        output: (n, C) output X_{l+1} of the layer.
    """
    return x + residual(output - x)


def composite_norm(x: Tensor) -> Tensor:
    """Return ``sqrt(|X|_1 |X|_inf)`` of (n, C): largest absolute column sum times largest row sum.

    This is the "1,inf norm" of Dong et al. It is homogeneous but violates the triangle inequality.
    """
    size = x.abs()
    return (size.sum(dim=0).max() * size.sum(dim=1).max()).sqrt()


def relative_residual(x: Tensor) -> Tensor:
    """Return ``|res X| / |X|`` of (n, C) in the composite norm: 1 if centred, 0 if identical.

    It is NaN if all tokens are zero.
    """
    return composite_norm(residual(x)) / composite_norm(x)


def mean_cosine(x: Tensor) -> Tensor:
    """Return the mean cosine of all pairs of rows of (n, C), in O(n C); NaN for a single row."""
    n = len(x)
    direction = torch.nn.functional.normalize(x, dim=1, eps=torch.finfo(x.dtype).tiny)
    total = direction.sum(dim=0).square().sum() - direction.square().sum()
    return total / (n * (n - 1)) if n > 1 else x.new_tensor(torch.nan)


def singular_values(x: Tensor) -> Tensor:
    """Return the singular values of (n, C) in decreasing order, from the smaller Gram matrix.

    Values below about 1e-8 of the largest are rounding errors.
    """
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


def effective_rank(values: Tensor) -> Tensor:
    """Return ``exp(H(p))`` with p the singular values over their sum (Roy and Vetterli, 2007)."""
    share = values / values.sum()
    return torch.special.entr(share).sum().exp()


def stable_rank(values: Tensor) -> Tensor:
    """Return ``|X|_F^2 / s_1^2``, at least 1, from singular values in decreasing order."""
    return values.square().sum() / values[0].square()


def attention_entropy(weights: Tensor, num_keys: int) -> Tensor:
    """Return the mean entropy of attention rows over its maximum.

    It is 1 for uniform attention and 0 if each row attends to one token.

    Args:
        weights: (..., Lq, Lk) attention weights; rows sum to 1.
        num_keys: number of keys that are not padding.

    Returns:
        Mean of ``H(row) / log(num_keys)`` over all rows; NaN for a single key.
    """
    limit = math.log(num_keys) if num_keys > 1 else math.nan
    return torch.special.entr(weights).sum(dim=-1).mean() / limit


def measure_tokens(x: Tensor) -> dict[str, float]:
    """Return all measures of one token matrix.

    Args:
        x: (n, C) un-padded tokens of one image; converted to float64.

    Returns:
        ``residual`` (relative, composite norm), ``residual_fro`` (relative, Frobenius), ``cosine``,
        ``effective_rank`` and ``effective_rank_residual`` (of res X), ``stable_rank``, ``std``
        (over the channels, averaged over the tokens). A measure that is not defined, as for zero
        tokens, is NaN.
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
    """Return both sides of equation (14) of the paper and the residual, in the composite norm.

    Args:
        x: (n, C) tokens X_l before a layer; converted to float64.
        output: (n, C) tokens X_{l+1} after the layer.

    Returns:
        ``norm_residual``: ``|res(X_{l+1})|``; ``norm_residual_change``: ``|res(X_{l+1} - X_l)|``,
        the right side of (14); ``norm_published``: norm of :func:`published_residual`, the left
        side as the paper defines it.
    """
    x, output = x.double(), output.double()
    return {
        "norm_residual": float(composite_norm(residual(output))),
        "norm_residual_change": float(composite_norm(residual(output - x))),
        "norm_published": float(composite_norm(published_residual(x, output))),
    }
