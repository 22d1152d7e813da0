"""Points in the plane drawn by a flow whose start and KL-regularised optimum are known: mixtures of Gaussians."""

from stepwell.tasks.mixture.task import mixture

__all__ = ["mixture"]
