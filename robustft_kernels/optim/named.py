"""The optimizers under the names that users look for: a base with its method."""

from typing import Any

from .anchored import Params
from .optimizers import AnchoredAdamW, AnchoredSGD


class AdamSPD(AnchoredAdamW):
    """`AnchoredAdamW` with method="spd": selective projection decay. See there for the formula and arguments."""

    def __init__(self, params: Params, *args: Any, method: str = "spd", **kwargs: Any) -> None:
        super().__init__(params, *args, method=method, **kwargs)


class SGDSPD(AnchoredSGD):
    """`AnchoredSGD` with method="spd": selective projection decay. See `AnchoredAdamW` for the formula."""

    def __init__(self, params: Params, *args: Any, method: str = "spd", **kwargs: Any) -> None:
        super().__init__(params, *args, method=method, **kwargs)


class AdamL2SP(AnchoredAdamW):
    """`AnchoredAdamW` with method="l2sp", the decoupled form. The original form is method="l2sp_coupled". See there for
    the formula and arguments."""

    def __init__(self, params: Params, *args: Any, method: str = "l2sp", **kwargs: Any) -> None:
        super().__init__(params, *args, method=method, **kwargs)


class SGDL2SP(AnchoredSGD):
    """`AnchoredSGD` with method="l2sp", the decoupled form. See `AnchoredAdamW` for the formula."""

    def __init__(self, params: Params, *args: Any, method: str = "l2sp", **kwargs: Any) -> None:
        super().__init__(params, *args, method=method, **kwargs)


class AdamFTP(AnchoredAdamW):
    """`AnchoredAdamW` with method="ftp": fast trainable projection. See there for the formula and arguments.

    The first step's update is discarded, as in the paper. Radii begin at 1e-8, while the moments keep the update.
    """

    def __init__(self, params: Params, *args: Any, method: str = "ftp", **kwargs: Any) -> None:
        super().__init__(params, *args, method=method, **kwargs)


class SGDFTP(AnchoredSGD):
    """`AnchoredSGD` with method="ftp": fast trainable projection. See `AnchoredAdamW` for the formula, and `AdamFTP`
    for the first step."""

    def __init__(self, params: Params, *args: Any, method: str = "ftp", **kwargs: Any) -> None:
        super().__init__(params, *args, method=method, **kwargs)


class AdamPGM(AnchoredAdamW):
    """`AnchoredAdamW` with method="project": projection onto a fixed `radius`. See there for the formula."""

    def __init__(self, params: Params, *args: Any, method: str = "project", **kwargs: Any) -> None:
        super().__init__(params, *args, method=method, **kwargs)


class SGDPGM(AnchoredSGD):
    """`AnchoredSGD` with method="project": projection onto a fixed `radius`. See `AnchoredAdamW` for the formula."""

    def __init__(self, params: Params, *args: Any, method: str = "project", **kwargs: Any) -> None:
        super().__init__(params, *args, method=method, **kwargs)
