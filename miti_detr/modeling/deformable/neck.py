"""From the features of the backbone to levels of one width."""

from collections.abc import Sequence

from torch import Tensor, nn


class LevelProjections(nn.ModuleList):
    """A 1x1 convolution for each feature, then strided 3x3 convolutions for more levels.

    Each has a group norm of 32 groups. The first strided convolution takes the last feature, the
    next one its result.

    State-dict keys ``{level}.0`` (convolution) and ``{level}.1`` (norm) are the published ones.
    """

    def __init__(self, channels: Sequence[int], d_model: int, num_levels: int) -> None:
        """Make ``num_levels`` levels of width C = ``d_model`` from features of these channels."""
        convolutions = [nn.Conv2d(count, d_model, kernel_size=1) for count in channels]
        for level in range(len(channels), num_levels):
            count = channels[-1] if level == len(channels) else d_model
            convolutions.append(nn.Conv2d(count, d_model, kernel_size=3, stride=2, padding=1))
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
        super().__init__(nn.Sequential(conv, nn.GroupNorm(32, d_model)) for conv in convolutions)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map features (N, C', h, w) to levels (N, C, h, w)."""
        levels = [project(feature) for project, feature in zip(self, features, strict=False)]
        x = features[-1]
        for project in list(self)[len(features) :]:
            x = project(x)
            levels.append(x)
        return levels
