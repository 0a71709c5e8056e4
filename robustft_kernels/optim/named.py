"""The optimizers under the names that users look for: a base with its method."""

from .optimizers import AnchoredAdamW, AnchoredSGD


class AdamSPD(AnchoredAdamW):
    """`AnchoredAdamW` with method="spd": selective projection decay. See there for the formula and arguments."""

    default_method = "spd"


class SGDSPD(AnchoredSGD):
    """`AnchoredSGD` with method="spd": selective projection decay. See `AnchoredAdamW` for the formula."""

    default_method = "spd"


class AdamL2SP(AnchoredAdamW):
    """`AnchoredAdamW` with method="l2sp", the decoupled form. The original form is method="l2sp_coupled". See there for
    the formula and arguments."""

    default_method = "l2sp"


class SGDL2SP(AnchoredSGD):
    """`AnchoredSGD` with method="l2sp", the decoupled form. See `AnchoredAdamW` for the formula."""

    default_method = "l2sp"


class AdamFTP(AnchoredAdamW):
    """`AnchoredAdamW` with method="ftp": fast trainable projection. See there for the formula and arguments.

    The first step's update is discarded, as in the paper. Radii begin at 1e-8, while the moments keep the update.
    """

    default_method = "ftp"


class SGDFTP(AnchoredSGD):
    """`AnchoredSGD` with method="ftp": fast trainable projection. See `AnchoredAdamW` for the formula, and `AdamFTP`
    for the first step."""

    default_method = "ftp"


class AdamPGM(AnchoredAdamW):
    """`AnchoredAdamW` with method="project": projection onto a fixed `radius`. See there for the formula."""

    default_method = "project"


class SGDPGM(AnchoredSGD):
    """`AnchoredSGD` with method="project": projection onto a fixed `radius`. See `AnchoredAdamW` for the formula."""

    default_method = "project"
